"""ANCE-PRF: the card's faithfulness tests, over a tiny retriever, its real index and its real training batches.

The fifth, and the slices of the sixth, are in test_ance_prf_training.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import QuerySet
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest, ingest_queries
from raydr.encoders.factory import EncoderFactory
from raydr.encoders.feedback import SETTINGS, assembled
from raydr.encoders.texts import Vectors
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.reader import IndexReader
from raydr.index.shard import VectorIndex
from raydr.methods.ance_prf import AncePrf, AncePrfConfig
from raydr.methods.base import Method, build_method
from raydr.pipeline import Pipeline
from raydr.stages.config import EmbedConfig, MineConfig, PrfConfig, SearchConfig
from raydr.stages.embed import embed_corpus
from raydr.stages.mine import mine_negatives
from raydr.stages.passage_embeddings import PassageEmbeddings, keep_embeddings
from raydr.stages.prf import chosen_refiner
from raydr.stages.search import search_corpus
from raydr.train import grad_cache
from raydr.train.batches import _SCHEMA, stream, to_batch, tokenized
from raydr.train.dump import save_batch
from raydr.train.evaluate import evaluate
from raydr.types import Passage, Query
from tests.contracts import check_encoder
from tests.corpora import WordCounts
from tests.train.tiny import TOPICS, tiny_checkpoint

K = 2


class Made(NamedTuple):
    """A retriever, its index over a corpus of four topics, and what was mined in it."""

    retriever: Component
    index: Path
    examples: ExampleSet
    kept: Path

    def method(self, **args: Any) -> AncePrf:
        settings = {"num_feedback": K, "num_negatives": 4, "num_candidates": 12, "passage_embeddings": str(self.kept)}
        config = AncePrfConfig(**{"retriever": self.retriever, **settings, **args})
        return AncePrf(config)

    def passages(self) -> dict[str, Passage]:
        rows = IndexReader.open(self.index).passages(range(32))
        return {row["passage_id"]: Passage(row["passage_id"], row["text"], row["title"] or "") for row in rows}


def write_source(folder: Path) -> Path:
    """Eight passages of each topic; a query of three of its words, the first four passages relevant to it."""
    rng = np.random.default_rng(0)
    (folder / "qrels").mkdir(parents=True)
    corpus, queries, judged = [], [], ["query-id\tcorpus-id\tscore"]
    for topic, words in TOPICS.items():
        for number in range(8):
            text = " ".join(rng.choice(words.split(), size=9))
            corpus.append({"_id": f"{topic}{number}", "text": text, "title": topic if number % 2 else ""})
        for number in range(4):
            queries.append({"_id": f"q-{topic}{number}", "text": " ".join(rng.choice(words.split(), size=3))})
            judged += [f"q-{topic}{number}\t{topic}{place}\t1" for place in range(2)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels/train.tsv").write_text("\n".join(judged) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("prf")
    model = tiny_checkpoint(folder / "model", dropout=0.0)
    args = {"model": str(model), "precision": "float32", "backend": "torch", "num_threads": 1, "normalize": False}
    retriever = Component(import_path="raydr.methods.zero_shot:ZeroShot", args=args)
    data = DataConfig(path=str(write_source(folder / "source")), split="train")
    corpus = ingest(data, folder / "corpus")
    build_encoder = EncoderFactory(retriever)
    embedded = embed_corpus(corpus, build_encoder, EmbedConfig(), folder / "embed", use_ray=False, method=retriever)
    build_index(corpus, embedded, IndexConfig(num_shards=2), folder / "index", use_ray=False)
    config = MineConfig(num_feedback=K, keep="random", last_rank=24, num_negatives=16)
    queries = ingest_queries(data, corpus, folder / "queries")
    examples = ExampleSet(
        mine_negatives(folder / "index", queries, build_encoder, config, folder / "examples", use_ray=False)
    )
    kept = keep_embeddings(folder / "index", [examples], folder / "passage_embeddings")
    return Made(retriever, folder / "index", examples, kept.path)


@pytest.fixture(scope="module")
def feedback() -> tuple[Passage, ...]:
    return (Passage("a", "the coral whale"), Passage("b", "knead the dough", title="bread"), Passage("c", "a comet"))


class CountedWords(Method):
    """A retriever that no network stands behind."""

    def build_encoder(self):
        return WordCounts()


class TestAssembly:
    """1."""

    QUERY, PASSAGES = [0, 10, 11, 2], [[0, 20, 21, 2], [0, 30, 2], [0, 40, 41, 42, 2]]

    def test_one_separator_between_parts_and_no_second_beginning(self):
        whole = [0, 10, 11, 2, 20, 21, 2, 30, 2, 40, 41, 42, 2]
        assert assembled(self.QUERY, self.PASSAGES, 512) == whole
        assert assembled(self.QUERY, self.PASSAGES, len(whole)) == whole
        assert assembled(self.QUERY, [], 512) == self.QUERY

    def test_what_is_too_long_ends_with_a_separator_or_is_cut(self):
        assert assembled(self.QUERY, self.PASSAGES, 8, "closed") == [0, 10, 11, 2, 20, 21, 2, 2]
        assert assembled(self.QUERY, self.PASSAGES, 8, "open") == [0, 10, 11, 2, 20, 21, 2, 30]

    @pytest.mark.parametrize("template", ["separated", "tct"])
    def test_the_text_that_the_tokenizer_makes_of_it(self, made, feedback, template):
        encoder = made.method(num_feedback=3, template=template).build_feedback_encoder()
        (ids,) = encoder.reader.ids([Query("q", "What IS prf", feedback=feedback)])
        text = encoder.reader._tokenizer.decode(ids, skip_special_tokens=False)
        read = "prf [SEP] the coral whale [SEP] bread knead the dough [SEP] a comet"
        if template == "separated":
            assert text == f"[CLS] what is {read} [SEP]"
        else:
            assert text.startswith(f"[CLS] [ q ] what is {read} [MASK] [MASK]")
            assert len(ids) == 64
            assert set(text.split("a comet ")[1].split()) == {"[MASK]"}

    def test_long_texts_are_cut_where_they_should_be(self, made):
        long = tuple(Passage(str(n), "harbour " * 80) for n in range(2))
        query = Query("q", "tide " * 40, feedback=long)
        for truncation, last in (("closed", "[SEP]"), ("open", "harbour")):
            reader = made.method(truncation=truncation, max_query_tokens=8).build_feedback_encoder().reader
            (ids,) = reader.ids([query])
            assert (len(ids), ids[7], ids[-1]) == (64, 102, reader._tokenizer.token_to_id(last))
        reader = made.method(max_query_tokens=8, max_feedback_tokens=12).build_feedback_encoder().reader
        assert len(reader.ids([query])[0]) == 8 + 2 * 11

    def test_less_feedback_than_is_read_is_an_error(self, made, feedback):
        encoder = made.method(num_feedback=3).build_feedback_encoder()
        with pytest.raises(DataError, match=r"query 'q': has 2 passages of feedback, and this encoder reads 3"):
            encoder.encode_queries([Query("q", "x", feedback=feedback[:2])])
        more = encoder.encode_queries(
            [
                Query("q", "x", feedback=(*feedback, Passage("d", "more"))),
            ]
        )
        np.testing.assert_array_equal(more, encoder.encode_queries([Query("q", "x", feedback=feedback)]))


def test_2_case_makes_no_difference_even_to_a_tokenizer_that_tells_cases_apart(made, feedback, tmp_path):
    cased = shutil.copytree(made.retriever.args["model"], tmp_path / "cased")
    spec = json.loads((cased / "tokenizer.json").read_text())
    spec["normalizer"]["lowercase"] = False
    (cased / "tokenizer.json").write_text(json.dumps(spec))
    settings = json.loads((cased / "tokenizer_config.json").read_text()) | {"do_lower_case": False}
    (cased / "tokenizer_config.json").write_text(json.dumps(settings))
    retriever = made.retriever.model_copy(update={"args": {**made.retriever.args, "model": str(cased)}})
    upper = tuple(passage._replace(text=passage.text.upper(), title=passage.title.upper()) for passage in feedback)
    queries = [Query("a", "What IS PRF", feedback=upper), Query("b", "what is prf", feedback=feedback)]
    for lowercase in (True, False):
        encoder = made.method(retriever=retriever, num_feedback=3, lowercase=lowercase).build_feedback_encoder()
        ids = encoder.reader.ids(queries)
        assert (ids[0] == ids[1]) is lowercase
        first, second = encoder.encode_queries(queries)
        assert np.array_equal(first, second) is lowercase


class Plain:
    """The least an engine has to be."""

    device = torch.device("cpu")

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.texts = network, 0

    def __call__(self, ids, mask):
        self.texts += len(ids)
        return self.network(ids, mask)

    def backward(self, loss) -> None:
        loss.backward()

    def train(self) -> None:
        self.network.train()

    def eval(self) -> None:
        self.network.eval()


def trained(method: AncePrf, examples: ExampleSet, *, steps: int, chunk_tokens: int | None = 256):
    """The network after so many steps of Adam on the method's own batches, and the losses."""
    torch.manual_seed(0)
    engine = Plain(method.build_model().train())
    optimizer = torch.optim.Adam(engine.network.parameters(), lr=2e-3)
    sampler = method.build_batches(examples, batch_size=8, seed=0)
    batches = stream(sampler, method.tokenizer(), examples, first=0, last=steps, worker_rank=0, num_workers=1,
                     on_ray=False)  # fmt: skip
    losses = []
    for batch in batches:
        output = grad_cache.backward(engine, method.build_objective(), batch, chunk_tokens=chunk_tokens)
        assert batch.passages is not None and not batch.passages.embeddings.requires_grad
        assert batch.passages.embeddings.grad is None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return engine, losses


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_3_nothing_but_the_query_encoder_learns(made, tmp_path):
    method = made.method()
    folders = (made.kept, made.index, Path(made.retriever.args["model"]))
    before, encoder = [files_of(folder) for folder in folders], build_method(made.retriever).encoder()
    vectors = encoder.encode_passages([Passage("p", "the coral whale")])
    engine, losses = trained(method, made.examples, steps=40)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert engine.texts == 40 * 8 * 2  # each query twice (cached, with its graph); no passage ever
    assert [files_of(folder) for folder in folders] == before
    np.testing.assert_array_equal(encoder.encode_passages([Passage("p", "the coral whale")]), vectors)

    found = evaluate(engine, made.examples, method.tokenizer())  # dev evaluation reads feedback as training does
    untrained = evaluate(Plain(method.build_model()), made.examples, method.tokenizer())
    assert found["nDCG@10"] > untrained["nDCG@10"]

    (tmp_path / "model").mkdir()
    method.save_model(engine.network, tmp_path / "model")
    served = method.trained(str(tmp_path / "model")).build().build_feedback_encoder()
    queries = [made.examples.query(row) for row in range(3)]
    tokens = [torch.tensor([ids]) for ids in served.reader.ids(queries)]
    with torch.no_grad():
        expected = torch.cat([engine.network.eval()(ids, None) for ids in tokens])
    np.testing.assert_allclose(served.encode_queries(queries), expected.numpy(), atol=1e-5)
    assert served.version != method.build_feedback_encoder().version


def test_3_the_frozen_vectors_are_those_of_the_index(made):
    kept, examples = PassageEmbeddings.open(made.kept), made.examples
    reader = IndexReader.open(made.index)
    rows = [int(reader.passage_ids.where([id_])[0]) for id_ in examples.passage_ids]
    np.testing.assert_array_equal(kept.of(examples.passage_ids), reader.embeddings(np.array(rows)))
    with pytest.raises(DataError, match="no embedding of 'nowhere'"):
        kept.of(["nowhere"])


def test_3_ready_embeddings_travel_through_ray_datas_tables_and_the_dump(made, tmp_path):
    method = made.method()
    groups = next(iter(method.build_batches(made.examples, batch_size=4, seed=1)))
    row = tokenized(groups, method.tokenizer(), made.examples.artifact.path)
    (again,) = pa.Table.from_pylist([row], schema=_SCHEMA).to_pylist()
    batch = to_batch(again, method.tokenizer().pad_id)
    ids = [made.examples.passage_ids[place] for group in groups for place in group.passages]
    expected = PassageEmbeddings.open(made.kept).of(ids)
    assert batch.passages is not None
    np.testing.assert_array_equal(batch.passages.embeddings.numpy(), expected)
    assert isinstance(method.tokenizer().tokenize([], [])["passages"], Vectors)
    with pytest.raises(TypeError, match="ready embeddings"):
        _ = batch.texts
    from safetensors.torch import load_file

    saved = load_file(save_batch(batch, tmp_path / "batch.safetensors"))
    np.testing.assert_array_equal(saved["passages.embeddings"].numpy(), expected)
    assert "queries.ids" in saved


def test_4_before_training_it_is_the_retrievers_query_encoder(made):
    queries = [Query("a", "the tide of the ocean"), Query("b", "Dough"), Query("c", "")]
    encoder = made.method(num_feedback=0).build_feedback_encoder()
    np.testing.assert_array_equal(
        encoder.encode_queries(queries), build_method(made.retriever).encoder().encode_queries(queries)
    )
    check_encoder(encoder)


class TestNegatives:
    """6."""

    def test_are_unjudged_hits_of_the_first_search(self, made):
        reader, encoder = IndexReader.open(made.index), build_method(made.retriever).encoder()
        for row in range(len(made.examples)):
            query, ids = made.examples.query(row), made.examples.passage_ids
            top = reader.search(encoder.encode_queries([query]), 24).rows[0]
            hits = reader.passage_ids.take(top).tolist()
            found = [ids[place] for place in made.examples.negatives(row)]
            judged = {ids[place] for place in made.examples.positives(row)}
            assert len(set(found)) == len(found) == 16
            assert set(found) <= set(hits) - judged
            assert found == [hit for hit in hits if hit in found]  # hardest first all the same
            # Feedback is the first k of the same search, judged or not.
            assert [passage.passage_id for passage in query.feedback] == hits[:K]

    def test_are_drawn_alike_again_and_are_not_just_the_hardest(self, made, tmp_path):
        queries = QuerySet.open(made.examples.artifact.path.parent / "queries")
        config = MineConfig(num_feedback=K, keep="random", last_rank=24, num_negatives=16)
        for name, changes, same in (
            ("again", {}, True),
            ("seed", {"seed": 1}, False),
            ("hard", {"keep": "hardest"}, False),
        ):
            settings = config.model_copy(update=changes)
            found = ExampleSet(
                mine_negatives(
                    made.index, queries, EncoderFactory(made.retriever), settings, tmp_path / name, use_ray=False
                )
            )
            lists = [[[own.passage_ids[place] for place in own.negatives(row)] for row in range(len(own))]
                     for own in (made.examples, found)]  # fmt: skip
            assert (lists[0] == lists[1]) is same
            assert [found.query(row).feedback for row in range(4)] == [
                made.examples.query(row).feedback for row in range(4)
            ]

    def test_the_usual_sampler_and_its_refusals(self, made):
        group = next(iter(made.method(negatives="random").build_batches(made.examples, batch_size=2, seed=0)))[0]
        assert len(group.passages) == 5
        with pytest.raises(ConfigError, match=r"num_feedback: .* keep 2 hits of a first search, 3 are read"):
            made.method(num_feedback=3).build_batches(made.examples, batch_size=2, seed=0)
        with pytest.raises(ValueError, match="num_candidates"):
            made.method(num_candidates=3)


def test_7_padding_makes_no_difference_and_the_order_of_hits_does(made, feedback):
    encoder = made.method(num_feedback=3).build_feedback_encoder()
    short, long = Query("a", "tide", feedback=feedback), Query("b", "sun " * 20, feedback=feedback)
    alone = encoder.encode_queries([short])
    np.testing.assert_allclose(encoder.encode_queries([long, short])[1:], alone, atol=1e-5)
    network, (ids,) = encoder.network.load_network("float32"), encoder.reader.ids([short])
    padded = torch.tensor([ids + [0] * 9]), torch.tensor([[1] * len(ids) + [0] * 9])
    with torch.no_grad():
        np.testing.assert_allclose(network(*padded).numpy(), alone, atol=1e-5)
    turned = encoder.encode_queries([short._replace(feedback=feedback[::-1])])
    assert np.abs(turned - alone).max() > 1e-3


def test_8_the_second_search_of_an_unchanged_query_is_the_first_one_longer(made):
    passages, encoder = made.passages(), build_method(made.retriever).encoder()
    index = VectorIndex()
    index.add(list(passages), encoder.encode_passages(list(passages.values())))
    refiner = made.method(num_feedback=0).build_refiner(encoder)
    queries = [made.examples.query(row) for row in range(6)]
    once = Pipeline(encoder, index, passages).search(queries, k=5)
    twice = Pipeline(encoder, index, passages, refiner=refiner).search(queries, k=30)
    assert {id_: hits[:5] for id_, hits in twice.items()} == once


def test_8_batch_search_is_the_pipeline(made, tmp_path):
    passages, encoder = made.passages(), build_method(made.retriever).encoder()
    index = VectorIndex()
    index.add(list(passages), encoder.encode_passages(list(passages.values())))
    queries = [Query(f"q{row}", made.examples.query(row).text) for row in range(6)]
    build_encoder = EncoderFactory(made.retriever)
    for prf in (PrfConfig(refiner=made.method().component), PrfConfig(method="average"), PrfConfig(method="rocchio")):
        build_refiner = chosen_refiner(prf, None)
        assert build_refiner is not None
        expected = Pipeline(encoder, index, passages, refiner=build_refiner(encoder)).search(queries, k=9)
        run = search_corpus(
            made.index, queries, build_encoder, SearchConfig(k=9, prf=prf), tmp_path / prf.method, use_ray=False
        )
        lines = [line.split() for line in (run.path / "run.trec").read_text().splitlines()]
        found = {query.query_id: [line[2] for line in lines if line[0] == query.query_id] for query in queries}
        assert found == {id_: [hit.passage_id for hit in hits] for id_, hits in expected.items()}
        assert run.manifest.details["prf"]["num_feedback"] == {"learned": K, "average": 3, "rocchio": 5}[prf.method]
        assert run.manifest.details["prf_s"] > 0
        assert (run.manifest.details["prf"]["version"] is not None) is (prf.method == "learned")


def test_8_a_query_with_too_few_hits_keeps_its_first_embedding(made, tmp_path):
    queries = [Query("q", made.examples.query(0).text)]
    runs = []
    for method in ("none", "average", "learned"):
        prf = PrfConfig(method=method, refiner=made.method().component)
        config = SearchConfig(prf=prf, allow_ids=("sea1",))
        run = search_corpus(
            made.index, queries, EncoderFactory(made.retriever), config, tmp_path / method, use_ray=False
        )
        runs.append((run.path / "run.trec").read_text())
    assert runs[0] == runs[1] == runs[2]


def test_9_tcts_vector_is_the_mean_from_position_4_masks_included(made, feedback):
    from transformers import AutoModel

    encoder = made.method(num_feedback=3, template="tct").build_feedback_encoder()
    query = Query("q", "what is prf", feedback=feedback)
    ids = torch.tensor(encoder.reader.ids([query]))
    model = AutoModel.from_pretrained(made.retriever.args["model"], add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state
    expected = hidden[:, 4:64].mean(dim=1)
    np.testing.assert_allclose(encoder.encode_queries([query]), expected.numpy(), atol=1e-5)
    assert encoder.version != made.method(num_feedback=3).build_feedback_encoder().version


class TestGuard:
    """10."""

    @pytest.fixture(scope="class")
    def checkpoint(self, made, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / "model"
        folder.mkdir()
        method = made.method()
        method.save_model(method.build_model(), folder)
        return folder

    def test_another_k_is_refused(self, made, checkpoint):
        encoder = build_method(made.retriever).encoder()
        assert made.method(model=str(checkpoint)).build_refiner(encoder).num_feedback == K
        with pytest.raises(ConfigError, match=r"num_feedback: .* was trained with 2, not with 3; set"):
            made.method(model=str(checkpoint), num_feedback=3).build_refiner(encoder)
        component = made.method(model=str(checkpoint)).component
        with pytest.raises(ConfigError, match=r"prf\.k: this refiner has learned to read the first 2 hits"):
            chosen_refiner(PrfConfig(k=3, refiner=component), None)(encoder)
        assert chosen_refiner(PrfConfig(k=2, refiner=component), None)(encoder).num_feedback == K

    def test_so_is_another_input(self, made, checkpoint):
        with pytest.raises(ConfigError, match="lowercase: .* was trained with True, not with False"):
            made.method(model=str(checkpoint), lowercase=False).build_feedback_encoder()

    def test_so_is_another_retriever_and_an_index_of_another(self, made, checkpoint, tmp_path):
        other_model = tiny_checkpoint(tmp_path / "other", dropout=0.0, seed=1)
        other = made.retriever.model_copy(update={"args": {**made.retriever.args, "model": str(other_model)}})
        with pytest.raises(ConfigError, match="was trained for the encoder .* train it again for this one"):
            made.method(model=str(checkpoint), retriever=other).build_feedback_encoder()
        with pytest.raises(ConfigError, match="but the index was made by"):
            made.method(model=str(checkpoint)).build_refiner(build_method(other).encoder())
        with pytest.raises(ConfigError, match="passage_embeddings: of the encoder"):
            made.method(retriever=other).embeddings()

    def test_so_is_a_checkpoint_of_something_else(self, made, checkpoint, tmp_path):
        with pytest.raises(ConfigError, match="no encoder that reads feedback"):
            made.method(model=made.retriever.args["model"]).build_feedback_encoder()
        damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
        (damaged / SETTINGS).write_text("{}")
        with pytest.raises(ArtifactError, match="cannot be read"):
            made.method(model=str(damaged)).build_feedback_encoder()

    def test_and_a_retriever_of_other_things_than_texts(self, made):
        words = Component(import_path="tests.methods.test_ance_prf:CountedWords")
        with pytest.raises(ConfigError, match="CountedWords encodes with WordCounts"):
            made.method(retriever=words).build_feedback_encoder()

    def test_nothing_learned_is_not_applied_as_if_it_were(self, made):
        with pytest.raises(ConfigError, match="nothing here has learned to refine queries"):
            chosen_refiner(PrfConfig(), build_method(made.retriever).build_refiner)(made.method().encoder())

    def test_without_the_frozen_vectors_there_is_no_training(self, made):
        with pytest.raises(ConfigError, match="passage_embeddings: name the artifact"):
            made.method(passage_embeddings=None).tokenizer()
