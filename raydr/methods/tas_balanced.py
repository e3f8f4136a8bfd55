"""TAS-Balanced: batches of queries of one topic, pairs of evenly spread difficulty, two teachers.

"Efficiently Teaching an Effective Dense Retriever with Balanced Topic Aware Sampling", Sebastian Hofstaetter,
Sheng-Chieh Lin, Jheng-Hong Yang, Jimmy Lin, Allan Hanbury, SIGIR 2021, arXiv 2104.06967; where the paper leaves a
choice, the authors' code (matchmaker) decides. Trains a small dual encoder in small batches on one GPU, without labels
in the loss and without mining.

1. once: score (query, positive, negative) with a cross-encoder; cluster the queries' embeddings of a baseline model
2. a batch is b queries of one random cluster, so that other queries' passages are topically close
3. a query's pairs fall into 10 bins of the teacher's margin; draw a bin, then a pair in it
4. loss on each query's own pair: squared error between the margins of student and cross-encoder
5. loss on all other pairs of the batch: the same against ColBERT, which scores the batch on the fly
6. total = pairwise + 0.75 in-batch

| equation | function |
| --- | --- |
| k-means of queries (section 3) | `cluster_queries` |
| TAS, balanced margins (section 3) | `TopicBatches`, `margin_bounds` |
| pairwise Margin-MSE | `raydr.losses.margin_mse` with one negative |
| in-batch Margin-MSE | `in_batch_margin_mse` |
| ColBERT | `raydr.models.colbert.late_interaction` |

Departures from the paper:

- The in-batch loss is a mean over pairs without each query's own, as in matchmaker; the printed sum is larger by about
  the batch size, and 0.75 was tuned for the mean.
- Clustering is spherical by default (inner product), as in matchmaker; the paper's formula is `spherical: false`.
- A query is embedded once; matchmaker embeds it a second time for the pairwise negative, with another dropout.
- The default checkpoint is the one installed with raydr; the paper starts from DistilBERT.

Scores live on the teachers' scale: raw logits, no sigmoid, no normalised embeddings, no temperature.

Numbers to reproduce (Table 6, MS MARCO dev, batch of 32): MRR@10 .340, nDCG@10 .402, R@1000 .975; random sampling with
both teachers MRR@10 .331, R@1000 .968 (Table 4). Adam, learning rate 7e-6, batch 32, up to 800k steps.

`raydr train` makes everything: it trains a cross-encoder and a ColBERT on mined examples unless trained ones are named,
scores, clusters, and trains the student. Tables that were made elsewhere are named instead:

    method:
      import_path: raydr.methods.tas_balanced:TasBalanced
      args: {pairs: pairs.parquet, clusters: clusters.parquet, colbert: runs/colbert/model}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from pydantic import Field
from torch import Tensor, nn

from raydr.artifacts import artifacts_named_in, fingerprint, is_finished, write_artifact
from raydr.config import Component
from raydr.data.examples import ExampleSet
from raydr.encoders.colbert import load_colbert
from raydr.errors import ConfigError, DataError
from raydr.index.shard import dense
from raydr.losses import margin_mse
from raydr.methods.base import DualEncoderConfig, DualEncoderMethod
from raydr.models.colbert import late_interaction
from raydr.models.pooling import Pooling
from raydr.stages.supervision import ScoredPairs, read_clusters, read_pairs, write_clusters
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput, Tokens
from raydr.train.sampling import BatchSampler, Group
from raydr.train.trainer import MODEL, settings_for

if TYPE_CHECKING:
    from raydr.steps import Steps

ZERO_SHOT = "raydr.methods.zero_shot:ZeroShot"
COLBERT = "raydr.methods.colbert:ColBertRanker"

CLUSTERS = "clusters.parquet"


class TasBalancedConfig(DualEncoderConfig):
    """Settings of sampling and loss beside those of the encoder; the defaults are the paper's."""

    pooling: Literal["auto"] | Pooling = "cls"
    """The first token's vector (section 2.1)."""
    normalize: bool | None = False
    """Off: the student learns the teachers' margins in absolute units."""
    max_query_tokens: int | None = Field(default=30, ge=1)
    """Longest query in tokens, special ones included (section 4.1)."""
    max_passage_tokens: int | None = Field(default=200, ge=1)
    """Longest passage in tokens, special ones included (section 4.1)."""
    num_negatives: Literal[1] = 1
    """Fixed: a query comes with one scored pair."""
    negative_depth: None = None
    """Unused: the pairs are those of the table."""
    pairs: str | None = None
    """Parquet file, or folder of them, of scored pairs: query_id, positive_id, negative_id, positive_score and
    negative_score, the scores being the cross-encoder's logits (mean over an ensemble). Or the scores artifact of
    `raydr.stages.score`, for all pairs of a query's positives and negatives. Null: `raydr train` makes one."""
    clusters: str | None = None
    """Parquet file of query_id and cluster, as `write_clusters` makes it. Null: `raydr train` makes one."""
    colbert: str | None = None
    """Folder of the trained ColBERT, the in-batch teacher; of the student's vocabulary. Null: `raydr train` trains one,
    unless `in_batch_weight` is 0."""
    cross_encoder: Component = Component(import_path="raydr.methods.cross_encoder:CrossEncoderRanker")
    """The pairwise teacher as a method: what it starts from, or is where `cross_encoder_steps` is 0."""
    cross_encoder_steps: int = Field(default=2000, ge=0)
    """Updates of the pairwise teacher; 0: it is trained already."""
    cross_encoder_learning_rate: float = Field(default=1e-5, gt=0)
    """Of these updates."""
    colbert_steps: int = Field(default=2000, ge=1)
    """Updates of the in-batch teacher, which starts from the student's checkpoint."""
    colbert_learning_rate: float = Field(default=7e-6, gt=0)
    """Of these updates (section 4.2)."""
    baseline: Component | None = None
    """The retriever whose negatives are mined and whose embeddings of the queries are clustered. Null: the student's
    checkpoint as its folder says it is used; a bare language model is no retriever and needs one to be named."""
    num_clusters: int = Field(default=2000, ge=1)
    """Clusters of the training queries (k = 2000 for 400k queries in section 4.2)."""
    spherical: bool = True
    """Whether queries are clustered by inner product with centroids of length 1, as in matchmaker; otherwise by
    distance, which is the paper's formula."""
    sampling: Literal["random", "tas", "tas_balanced"] = "tas_balanced"
    """`random` queries and pairs, `tas`: queries of one topic, `tas_balanced`: and margins spread evenly (Table 4)."""
    clusters_per_batch: int = Field(default=1, ge=1)
    """Clusters that make a batch (n = 1 in section 4.2)."""
    num_bins: int = Field(default=10, ge=1)
    """Bins of the margins of a query (h = 10 in section 4.2)."""
    pairwise_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on each query's own pair; 0 trains with the in-batch teacher alone (Table 4)."""
    in_batch_weight: float = Field(default=0.75, ge=0)
    """Weight of the loss on the batch's other pairs (alpha in section 4.2); 0 needs no in-batch teacher."""
    gather: bool = True
    """Whether the in-batch pairs are those of all workers, whose joint batch is of one topic."""


def in_batch_margin_mse(
    positive_scores: Float[Tensor, "query query"],
    negative_scores: Float[Tensor, "query query"],
    teacher_positive_scores: Float[Tensor, "query query"],
    teacher_negative_scores: Float[Tensor, "query query"],
) -> Float[Tensor, ""]:
    """Squared error between student's and teacher's margins of a query's own positive over other queries' passages.

    Entry i, j is the score of query i and the positive (negative) of query j. A query's own passages are left out: the
    pairwise teacher knows them better. The mean over positives and that over negatives count half each; 0 for one
    query. Source: the in-batch loss of section 3 in the form of matchmaker's `train.py`.
    """
    differences = torch.stack([positive_scores, negative_scores]).float()
    differences = differences - torch.stack([teacher_positive_scores, teacher_negative_scores]).float()
    margins = differences[0].diagonal()[:, None] - differences
    others = ~torch.eye(len(positive_scores), dtype=torch.bool, device=positive_scores.device)
    return (margins.square() * others).sum() / (2 * others.sum().clamp(min=1))


def margin_bounds(margins: Float64[np.ndarray, " pair"], num_bins: int) -> Int64[np.ndarray, " bound"]:
    """Where each bin begins in a query's ascending margins, and their number as the end of the last bin.

    The bins split the range of the margins into equal widths, lower edge included; the largest margin is in the last.
    Where all margins are equal, all are in the last. Source: section 3 (H), with the inequality that is meant.
    """
    lowest, highest = margins[0], margins[-1]
    edges = lowest + np.arange(num_bins) * ((highest - lowest) / num_bins)
    return np.append(np.searchsorted(margins, edges), len(margins))


def cluster_queries(
    embeddings: Float32[np.ndarray, "query dim"], *, num_clusters: int = 2000, spherical: bool = True, seed: int = 0
) -> Int64[np.ndarray, " query"]:
    """The cluster of each query by k-means: 2000 for the 400k queries of section 4.2.

    `spherical` clusters by inner product with centroids of length 1, as matchmaker does; otherwise by distance.
    """
    import faiss

    num_queries, dim = embeddings.shape
    if num_queries < num_clusters:
        raise ConfigError(f"num_clusters: {num_clusters} clusters of {num_queries} queries; ask for fewer")
    # 10 rounds are what FAISS gives the coarse quantiser of an inverted file, which is what matchmaker trains.
    kmeans = faiss.Kmeans(dim, num_clusters, niter=10, spherical=spherical, seed=seed, min_points_per_centroid=1)
    kmeans.train(embeddings)
    _, nearest = kmeans.index.search(embeddings, 1)
    return nearest[:, 0]


class TopicBatches:
    """Batches of `batch_size` queries of `clusters_per_batch` random clusters, each with one of its scored pairs.

    Clusters are drawn uniformly and with replacement, whatever their size, and queries within one without; a cluster
    that is too small is topped up by another, so a batch may then mix clusters and even hold a query twice. There are
    no epochs. Queries with fewer than two pairs or without a cluster are left out. Source: matchmaker's
    `tas_balanced_training_loader.py`.

    Args:
        clusters: label of each query, -1 for none; None: all queries make one cluster, which is random sampling.
        num_bins: bins of a query's margins; 1 draws its pairs uniformly.
    """

    def __init__(
        self,
        pairs: ScoredPairs,
        clusters: Int64[np.ndarray, " query"] | None,
        *,
        batch_size: int,
        seed: int,
        clusters_per_batch: int = 1,
        num_bins: int = 10,
    ) -> None:
        if batch_size < clusters_per_batch:
            raise ConfigError(
                f"clusters_per_batch: {clusters_per_batch} do not fit into a batch of {batch_size} queries"
            )
        margins = pairs.positive_scores - pairs.negative_scores
        # By every column, so that a seed gives the same batches whatever the order of the file.
        order = np.lexsort((pairs.negatives, pairs.positives, margins, pairs.queries))
        self._pairs, self._margins = ScoredPairs(*(column[order] for column in pairs)), margins[order]
        self._starts = np.searchsorted(self._pairs.queries, np.arange(pairs.queries.max(initial=-1) + 2))
        queries = np.flatnonzero(np.diff(self._starts) >= 2)
        labels = np.full(len(queries), -1) if clusters is None else clusters[queries]
        if clusters is not None:
            queries, labels = queries[labels >= 0], labels[labels >= 0]
        if not len(queries):
            raise DataError("no query has two scored pairs" + ("" if clusters is None else " and a cluster"))
        by_label = np.argsort(labels, kind="stable")
        self._labels, firsts = np.unique(labels[by_label], return_index=True)
        self._clusters = np.split(queries[by_label], firsts[1:])
        self._batch_size, self._share, self._num_bins = batch_size, batch_size // clusters_per_batch, num_bins
        self._seed = seed

    def __iter__(self) -> Iterator[list[Group]]:
        rng = np.random.default_rng(self._seed)
        while True:
            batch: list[Group] = []
            while len(batch) < self._batch_size:
                drawn = rng.integers(len(self._clusters))
                cluster, label = self._clusters[drawn], int(self._labels[drawn])
                queries = rng.choice(cluster, min(self._share, len(cluster)), replace=False)
                batch.extend(self._group(int(query), label, rng) for query in queries[: self._batch_size - len(batch)])
            yield batch

    def _group(self, query: int, label: int, rng: np.random.Generator) -> Group:
        start, end = self._starts[query : query + 2]
        bounds = start + margin_bounds(self._margins[start:end], self._num_bins)
        low = high = 0
        while low == high:  # an empty bin is drawn again
            drawn = rng.integers(self._num_bins)
            low, high = bounds[drawn], bounds[drawn + 1]
        pair = rng.integers(low, high)
        passages = (int(self._pairs.positives[pair]), int(self._pairs.negatives[pair]))
        scores = (float(self._pairs.positive_scores[pair]), float(self._pairs.negative_scores[pair]))
        return Group(query, passages, scores, label)


class TokenTeacher:
    """An in-batch teacher (`InBatchTeacher`): a frozen ColBERT that reads the token ids of its student.

    Args:
        network: token ids and mask to one embedding per token ([CLS] and [SEP] included).
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, queries: Tokens, passages: Tokens) -> Float[Tensor, "query passage"]:
        network = self._network.to(queries.ids.device)
        return late_interaction(
            network(*queries.inputs), network(*passages.inputs), queries.full_mask, passages.full_mask
        )


class DualTeacher(EmbeddingObjective):
    """Both losses over a batch whose groups are (positive, negative)."""

    def __init__(self, *, pairwise_weight: float = 1.0, in_batch_weight: float = 0.75) -> None:
        if not pairwise_weight and not in_batch_weight:
            raise ConfigError("pairwise_weight, in_batch_weight: one of them has to be above 0")
        self._pairwise_weight, self._in_batch_weight = pairwise_weight, in_batch_weight

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        scores = queries @ passages.T
        loss, metrics = scores.new_zeros(()), {}
        if self._pairwise_weight:
            if batch.teacher_scores is None:
                raise ConfigError("pairwise_weight: the batches carry no teacher's scores of their pairs; set it to 0")
            metrics["pairwise"] = margin_mse(batch.groups(scores), batch.teacher_scores.detach())
            loss = loss + self._pairwise_weight * metrics["pairwise"]
        if self._in_batch_weight:
            teacher = batch.in_batch_teacher
            if teacher is None or teacher.shape != scores.shape:
                raise ConfigError("in_batch_weight: no in-batch teacher has scored the whole batch; set it to 0")
            metrics["in_batch"] = in_batch_margin_mse(*_halves(scores), *_halves(teacher.detach()))
            loss = loss + self._in_batch_weight * metrics["in_batch"]
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def _halves(
    scores: Float[Tensor, "query passage"],
) -> tuple[Float[Tensor, "query query"], Float[Tensor, "query query"]]:
    """The columns of the positives and those of the negatives."""
    positives, negatives = scores.unflatten(1, (-1, 2)).unbind(dim=2)
    return positives, negatives


class TasBalanced(DualEncoderMethod):
    """A dual encoder trained with balanced topic-aware sampling and two teachers."""

    Config: ClassVar[type[TasBalancedConfig]] = TasBalancedConfig
    config: TasBalancedConfig

    def fit(self, steps: Steps) -> Component:
        """Both teachers, the scores, the clusters, and the student; what the config names is not made."""
        config, made = self.config, {}
        baseline = config.baseline or Component(import_path=ZERO_SHOT, args={"model": config.model})
        index = steps.base(baseline)
        examples, dev = steps.mine(baseline, index, "examples"), steps.dev(baseline, index)
        if config.pairs is None:
            teacher = self._cross_encoder(steps, examples, dev)
            made["pairs"] = str(steps.score(teacher, examples, "scores").path.resolve())
        if config.colbert is None and config.in_batch_weight:
            made["colbert"] = self._colbert(steps, examples, made.get("pairs", config.pairs))
        if config.clusters is None and config.sampling != "random":
            made["clusters"] = str(self._clustered(steps, examples, baseline))
        student = self._with(made)
        model = steps.train(student, steps.train_config, examples, "train", dev=dev)
        return self.trained(str((model.path / MODEL).resolve()))

    def _cross_encoder(self, steps: Steps, examples: ExampleSet, dev: ExampleSet | None) -> Component:
        """The pairwise teacher, trained where it has to be."""
        config = self.config
        if not config.cross_encoder_steps:
            return config.cross_encoder
        changes = {
            "max_steps": config.cross_encoder_steps,
            "learning_rate": config.cross_encoder_learning_rate,
            "schedule_steps": None,
        }
        plan = settings_for(config.cross_encoder, steps.train_config.model_copy(update=changes))
        model = steps.train(config.cross_encoder, plan, examples, "cross-encoder", dev=dev)
        args = {**config.cross_encoder.args, "model": str((model.path / MODEL).resolve())}
        return Component(import_path=config.cross_encoder.import_path, args=args)

    def _colbert(self, steps: Steps, examples: ExampleSet, scores: str | None) -> str:
        """Folder of the in-batch teacher, trained on the pairwise teacher's margins (section 4.2)."""
        config = self.config
        if scores is None or not is_finished(scores):
            raise ConfigError(
                "colbert: name a trained one, or leave `pairs` out: it is trained on scores that are made here"
            )
        shared = ("model", "max_query_tokens", "max_passage_tokens", "query_prompt", "passage_prompt")
        args = {name: value for name, value in self.component.args.items() if name in shared}
        method = Component(import_path=COLBERT, args={**args, "scores": scores})
        changes = {
            "max_steps": config.colbert_steps,
            "learning_rate": config.colbert_learning_rate,
            "schedule_steps": None,
            "keep": "last",
        }
        plan = settings_for(method, steps.train_config.model_copy(update=changes))
        model = steps.train(method, plan, examples, "colbert")
        return str((model.path / MODEL).resolve())

    def _clustered(self, steps: Steps, examples: ExampleSet, baseline: Component) -> Path:
        """The table of the queries' clusters."""
        out = steps.config.out / "clusters"
        how: dict[str, Any] = {
            "num_clusters": self.config.num_clusters,
            "spherical": self.config.spherical,
            "seed": steps.train_config.seed,
        }
        settings = {**how, "baseline": baseline.model_dump(mode="json")}
        inputs = {"examples": examples.artifact, **artifacts_named_in(settings)}
        prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
        if not is_finished(out, fingerprint("clusters", settings, prints)):
            with write_artifact(out, kind="clusters", config=settings, inputs=inputs) as writer:
                clusters = cluster_queries(dense(steps.embed_queries(baseline, examples)), **how)
                write_clusters(out / CLUSTERS, examples.query_ids, clusters)
                writer.counts["queries"] = len(examples)
        return (out / CLUSTERS).resolve()

    def build_objective(self) -> EmbeddingObjective:
        config = self.config
        objective = DualTeacher(pairwise_weight=config.pairwise_weight, in_batch_weight=config.in_batch_weight)
        objective.gather = config.gather
        if config.in_batch_weight:
            if config.colbert is None:
                raise ConfigError("colbert: name the folder of a trained ColBERT, or set in_batch_weight to 0")
            objective.in_batch_teacher = TokenTeacher(load_colbert(config.colbert))
        return objective

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        config = self.config
        if config.pairs is None:
            raise ConfigError("pairs: TAS-Balanced trains on scored pairs; name the table that holds them")
        by_topic = config.sampling != "random"
        if by_topic and config.clusters is None:
            raise ConfigError("clusters: name the table of the queries' clusters, or choose sampling: random")
        return TopicBatches(
            read_pairs(config.pairs, examples),
            read_clusters(config.clusters, examples) if by_topic and config.clusters else None,
            batch_size=batch_size,
            seed=seed,
            clusters_per_batch=config.clusters_per_batch if by_topic else 1,
            num_bins=config.num_bins if config.sampling == "tas_balanced" else 1,
        )
