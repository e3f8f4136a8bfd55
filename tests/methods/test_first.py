"""FIRST: the card's reference vectors, the place the scores are read at, what is trained, and what is saved."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raydr.artifacts import write_artifact
from raydr.config import load
from raydr.data.example_files import FILE_SOURCE
from raydr.data.examples import KIND, Example, ExampleSet, write_examples
from raydr.losses import lambdarank, listnet, ranknet
from raydr.methods.first import First, to_ranks
from raydr.models.causal_lm import left_padded
from raydr.stages.score import open_scores
from raydr.train.config import TrainConfig
from raydr.train.metrics import read_metrics
from raydr.train.objective import Labels, TrainBatch
from raydr.train.trainer import train_model
from raydr.types import Hit, Passage, Query
from raydr.verbs.config import RunConfig
from raydr.verbs.train import train
from tests.causal_lms import KINDS

SCORES = [0.2, 1.5, -0.3, 0.9]


@pytest.mark.parametrize(
    ("ranks", "weighted", "unweighted", "gradient"),
    [
        ([3, 1, 4, 2], 0.0714866428, 0.3286699192, [0.0109948864, -0.0333376720, 0.0201472995, 0.0021954860]),
        ([1, 4, 2, 3], 0.2513981984, 1.2620032525, [-0.0750101382, 0.0654047391, -0.0284804816, 0.0380858808]),
    ],
)
def test_ranknet_is_the_cards(ranks, weighted, unweighted, gradient):
    scores, ranks = torch.tensor([SCORES], requires_grad=True), torch.tensor([ranks])
    loss = ranknet(scores, ranks)
    loss.backward()
    assert loss.item() == pytest.approx(weighted, abs=1e-7)
    assert ranknet(scores, ranks, weighted=False).item() == pytest.approx(unweighted, abs=1e-6)
    np.testing.assert_allclose(scores.grad[0], gradient, atol=1e-7)
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-7)


def test_ties_count_and_equal_scores_are_no_nan():
    tied = torch.tensor([[1.0, 1.0, 0.5]])
    assert ranknet(tied, torch.tensor([[1, 2, 3]])).item() == pytest.approx(0.1481279, abs=1e-6)
    assert ranknet(tied, torch.tensor([[3, 2, 1]])).item() == pytest.approx(0.2356137, abs=1e-6)
    assert torch.isfinite(ranknet(torch.zeros(1, 3), torch.tensor([[1, 2, 3]])))


@pytest.mark.parametrize("loss", [ranknet, lambdarank, listnet])
def test_ranking_losses_know_no_scale_and_no_order_of_the_window(loss):
    scores, ranks = torch.tensor([SCORES, SCORES]), torch.tensor([[3, 1, 4, 2], [1, 4, 2, 3]])
    expected = loss(scores, ranks)
    torch.testing.assert_close(loss(scores + 7, ranks), expected)
    turn = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(scores[:, turn], ranks[:, turn]), expected)
    right = loss(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1, 2, 3, 4]]))
    wrong = loss(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1, 2, 3, 4]]))
    assert right < wrong


def test_lambdarank_by_hand():
    """Ranks 1, 2, 3 have gains 1, 1/2, 0, over the ideal sum 1 + 0.5 / log2(3); places are C, A, B by their scores."""
    scores = {"A": 1.0, "B": 0.0, "C": 2.0}
    ideal = 1 + 0.5 / math.log2(3)
    inverse = [1 / math.log2(place) for place in (2, 3, 4, 5)]
    gain = {"A": 1 / ideal, "B": 0.5 / ideal, "C": 0.0}
    distance = {"AB": 1, "AC": 1, "BC": 2}
    pairs = [
        (gain[better] - gain[worse])
        * (inverse[distance[better + worse] - 1] - inverse[distance[better + worse]])
        * math.log2(1 + math.exp(scores[worse] - scores[better]))
        for better, worse in distance
    ]
    found = lambdarank(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1, 2, 3]]))
    assert found.item() == pytest.approx(sum(pairs) / 3, rel=1e-5)


def test_listnet_by_hand():
    """The scores 2, 1, 0 handed out in the teacher's order A, B, C are the target of scores that say C, A, B."""
    target = [math.exp(s) / sum(map(math.exp, (2, 1, 0))) for s in (2, 1, 0)]
    shares = [math.exp(s) / sum(map(math.exp, (1, 0, 2))) for s in (1, 0, 2)]
    expected = -sum(t * math.log(s) for t, s in zip(target, shares, strict=True))
    scores = torch.tensor([[1.0, 0.0, 2.0]], requires_grad=True)
    loss = listnet(scores, torch.tensor([[1, 2, 3]]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(scores.grad[0], np.subtract(shares, target), atol=1e-6)  # the target is a constant


def test_mistakes_at_the_top_cost_more():
    ranks = torch.arange(1, 21)[None]
    scores = -0.5 * torch.arange(20.0)[None]

    def swapped(a: int, b: int) -> float:
        order = list(range(20))
        order[a], order[b] = order[b], order[a]
        return ranknet(scores[:, order], ranks).item()

    assert swapped(0, 1) > swapped(18, 19)


def test_equal_scores_share_a_rank_and_make_no_pair():
    ranks = to_ranks(torch.tensor([[0.5, 2.0, 0.5, 1.0]]))
    assert ranks.tolist() == [[3, 1, 3, 2]]
    scores = torch.tensor([[0.3, 1.0, -4.0, 2.0]])
    swapped = torch.tensor([[-4.0, 1.0, 0.3, 2.0]])
    assert ranknet(scores, ranks) == ranknet(swapped, ranks)


def config(folder, *, engine=None, **settings):
    return First.Config(
        engine={"model": str(folder), "backend": "transformers", "dtype": "float32", **(engine or {})},
        window_size=6,
        stride=3,
        **settings,
    )


def windows(method, *, sizes=(4, 4), seed=0):
    """A batch of windows as training sees it."""
    rng = np.random.default_rng(seed)
    groups = [[Passage(f"{n}", "word " * int(rng.integers(1, 30)) + str(n)) for n in range(size)] for size in sizes]
    queries = [Query(str(n), "a query " * (n + 1)) for n in range(len(sizes))]
    tokens = method.build_tokenizer().tokenize(queries, groups)["pairs"]
    teacher = torch.from_numpy(rng.permuted(np.tile(np.arange(sizes[0]), (len(sizes), 1)), axis=1)).float()
    num_passages = sum(sizes)
    labels = Labels(torch.arange(num_passages), torch.zeros(len(sizes), 1, dtype=torch.int64), teacher_scores=teacher)
    return TrainBatch(labels, pairs=tokens.padded(0)), tokens.ids


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_the_logits_that_decoding_reads(causal_lm, kind):
    method = First(config(causal_lm(kind)))
    batch, tokens = windows(method)
    network = method.build_model().eval()
    objective, letters = method.build_objective(), method.build_objective()._prompt.letters[:4]
    seen = {}

    def model(*inputs):
        seen["logits"] = network(*inputs)
        return seen["logits"]

    objective(model, batch)
    plain = AutoModelForCausalLM.from_pretrained(causal_lm(kind)).eval()
    for row, ids in enumerate(tokens):  # the shorter prompt is padded in the batch, and not here
        with torch.inference_mode():
            expected = plain(torch.tensor([ids])).logits[0, -1, letters]
        torch.testing.assert_close(seen["logits"][row, 1, letters], expected, atol=1e-4, rtol=0)


def test_left_padding_keeps_the_texts():
    ids, mask = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 1]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    moved, own = left_padded(ids, mask)
    assert moved.tolist() == [[0, 0, 5, 6], [7, 8, 9, 1]]
    assert own.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_the_ranking_loss_reaches_the_letters_at_one_place_only(causal_lm):
    method = First(config(causal_lm("Llama"), objective="ranking"))
    batch, _ = windows(method)
    objective, network = method.build_objective(), method.build_model()
    kept = {}

    def model(*inputs):
        kept["logits"] = network(*inputs)
        kept["logits"].retain_grad()
        return kept["logits"]

    objective(model, batch).loss.backward()
    gradient = kept["logits"].grad
    letters = objective._prompt.letters[:4]
    assert gradient[:, 1, letters].abs().min() > 0
    torch.testing.assert_close(gradient[:, 1, letters].sum(dim=1), torch.zeros(2), atol=1e-7, rtol=0)
    gradient[:, 1, letters] = 0
    assert not gradient.any()


def test_without_a_ranking_weight_it_is_the_language_model_loss(causal_lm):
    settings = {"neftune_alpha": 0.0}
    folder = causal_lm("Llama")
    batch, tokens = windows(First(config(folder)))
    losses = {
        name: First(config(folder, **settings, **own)).build_objective()(
            First(config(folder)).build_model().eval(), batch
        )
        for name, own in {"combined": {}, "none": {"ranking_weight": 0.0}, "lm": {"objective": "generation"}}.items()
    }
    assert losses["none"].loss == losses["lm"].loss
    expected = losses["lm"].loss + 10 * losses["combined"].metrics["rank_loss"]
    torch.testing.assert_close(losses["combined"].loss, expected)
    # The loss of the whole answer as transformers computes it, over all tokens of the batch.
    prompt = First(config(folder)).build_objective()._prompt
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    for ids, ranks in zip(tokens, to_ranks(batch.labels.teacher_scores), strict=True):
        answer = [prompt.bracket, *prompt.answer(ranks.argsort().tolist()), 102]
        whole = torch.tensor([[*ids[:-1], *answer]])
        labels = whole.clone()
        labels[:, : len(ids) - 1] = -100
        with torch.inference_mode():
            total += plain(whole, labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert losses["lm"].loss.item() == pytest.approx(total / count, abs=1e-4)


def test_noise_is_for_training_only(causal_lm):
    network = First(config(causal_lm("Llama"), neftune_alpha=5.0)).build_model()
    ids, answer = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    assert torch.equal(network.eval()(ids, None, answer), network(ids, None, answer))
    assert not torch.equal(network.train()(ids, None, answer), network(ids, None, answer))
    embedded = torch.zeros(1, 10, 32)
    noise = network._add_noise(torch.nn.Identity(), None, embedded)
    assert noise.abs().max() <= 5 / (10 * 32) ** 0.5


def matches():
    """Passages that say how well they match, and examples that order them so."""
    words = ["exact", "close", "far", "nothing"]
    passages = {f"{q}-{n}": Passage(f"{q}-{n}", f"{word} match") for q in range(8) for n, word in enumerate(words)}
    examples = [
        Example(
            Query(f"q{q}", "find it"),
            [f"{q}-0"],
            [f"{q}-{n}" for n in (1, 2, 3)],
            negative_scores=[3.0, 2.0, 1.0],
            positive_scores=[4.0],
            negative_sources=[FILE_SOURCE] * 3,
        )
        for q in range(8)
    ]
    return examples, passages


def written(folder, examples, passages):
    with write_artifact(folder, kind=KIND, config={}) as writer:
        write_examples(writer.path, examples, passages)
    return ExampleSet.open(folder)


def ranked(method, model, passages):
    """The hits of a shuffled list, as the trained method reranks them."""
    reranker = First(First.Config(**method.trained(str(model)).args)).build_reranker()
    hits = reranker.rerank(Query("q", "find it"), [Hit(f"0-{n}", 0.0) for n in (2, 3, 0, 1)], passages)
    reranker.close()
    return hits


def test_a_small_network_learns_an_order_and_what_is_saved_reranks(causal_lm, tmp_path):
    """The relevant passage says so; after some steps its letter has the best logit, wherever it stands."""
    folder = causal_lm("Llama")
    examples, passages = matches()
    own = written(tmp_path / "examples", examples, passages)
    method = First(config(folder, short_share=0.0, neftune_alpha=0.0))
    batches = iter(method.build_batches(own, batch_size=8, seed=0))
    network, objective, tokenizer = method.build_model().train(), method.build_objective(), method.build_tokenizer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(150):
        groups = next(batches)
        texts = [own.passages(group.passages) for group in groups]
        tokens = tokenizer.tokenize([own.query(group.query) for group in groups], texts)["pairs"]
        teacher = torch.tensor([group.teacher_scores for group in groups])
        labels = Labels(torch.arange(teacher.numel()), torch.zeros(8, 1, dtype=torch.int64), teacher_scores=teacher)
        output = objective(network, TrainBatch(labels, pairs=tokens.padded(0)))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    method.save_model(network, tmp_path / "model")
    hits = ranked(method, tmp_path / "model", passages)
    assert [hit.passage_id for hit in hits] == ["0-0", "0-1", "0-2", "0-3"]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 16, "alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]}])
def test_training_on_ray_leaves_what_vllm_opens(causal_lm, tmp_path, ray_cluster, lora):
    """Two workers in bfloat16 with tied embeddings: all weights under ZeRO 3, or adapters that are merged into them."""
    examples, passages = matches()
    method = First(config(causal_lm("Llama"), short_share=0.0, neftune_alpha=0.0))
    train = TrainConfig(
        num_workers=2,
        worker_cpus=0.5,
        batch_size=8,
        max_steps=120 if lora is None else 20,
        learning_rate=3e-3,
        zero_stage=3 if lora is None else 2,
        precision="bfloat16",
        lora=lora,
    )
    own = written(tmp_path / "examples", examples, passages)
    artifact = train_model(method.component, train, own, tmp_path / "train")
    records = [record for record in read_metrics(tmp_path / "train/metrics.jsonl") if "loss" in record]
    assert records[-1]["loss"] < records[0]["loss"]
    assert {"lm_loss", "rank_loss", "first_is_right"} <= set(records[0])
    weights = load_file(artifact.path / "model/model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    assert (embeddings != embeddings.bfloat16().float()).any()  # the optimiser's weights, under both their names
    by_transformers = ranked(method, artifact.path / "model", passages)
    if lora is not None:
        start = load_file(causal_lm("Llama") / "model.safetensors")
        changed = {name for name in weights if not torch.equal(weights[name], start[name])}
        assert changed == {name for name in start if any(f".{part}." in name for part in lora["target_modules"])}
    if lora is None:
        # What comes first is learned on every processor; of the rest, bfloat16 may leave two the other way round.
        assert by_transformers[0].passage_id == "0-0"
        assert {hit.passage_id for hit in by_transformers} == {"0-0", "0-1", "0-2", "0-3"}
        served = First(config(causal_lm("Llama"), engine={"backend": "vllm", "max_model_tokens": 512}))
        by_vllm = ranked(served, artifact.path / "model", passages)
        assert [hit.passage_id for hit in by_vllm] == [hit.passage_id for hit in by_transformers]
        np.testing.assert_allclose([hit.score for hit in by_vllm], [hit.score for hit in by_transformers], atol=1e-3)


def small_run(tmp_path: Path, *settings: str) -> RunConfig:
    """`first_small.yaml` over twelve passages, with a step where it has hundreds."""
    words = ["river", "stone", "winter", "music", "engine", "garden", "letter", "silver", "planet", "bridge"]
    rng = np.random.default_rng(0)
    rows = [{"_id": f"p{n}", "title": "", "text": " ".join(rng.choice(words, size=20))} for n in range(12)]
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"_id": f"q{n}", "text": words[n]} for n in range(4)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    judged = "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\tp{n}\t1\n" for n in range(4))
    (tmp_path / "qrels/train.tsv").write_text(judged)
    return load(
        RunConfig,
        Path(__file__).parents[2] / "jobs/configs/first_small.yaml",
        [
            *(f"data.path={tmp_path}", f"out={tmp_path / 'out'}", "data.split=train", "runtime=local"),
            *("method.args.span_batch_size=4", "mine.num_negatives=6", "mine.last_rank=12"),
            *("train.max_steps=1", "train.batch_size=4", "train.worker_cpus=1"),
            *settings,
        ],
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_network_made_out_of_an_encoder_is_trained_on_ray(tmp_path, ray_cluster):
    train(small_run(tmp_path, "method.args.span_steps=0"))
    start, end = (load_file(tmp_path / f"out/{step}/model/model.safetensors") for step in ("start", "train"))
    added = "model.decoder.layers.7.fc2.weight"
    assert not start[added].any() and end[added].any()  # what is made adds nothing; training changes it
    assert start.keys() == end.keys()


@pytest.mark.slow
def test_a_training_starts_from_an_encoder_and_from_spans(tmp_path, instant_training, monkeypatch):
    """Every step of `first_small.yaml`, each training from what the one before it left."""
    monkeypatch.setattr("raydr.runtime.uses_ray", lambda *_, **__: False)
    steps = ("span_steps=1", "taught_steps=1", "taught_queries=5")
    run = small_run(tmp_path, *(f"method.args.{setting}" for setting in steps))
    method = train(run).manifest.details["method"]
    made = {path.parent.name for path in (tmp_path / "out").glob("*/manifest.json")}
    assert {"start", "spans", "span-training", "span-queries", "span-hits", "span-scores", "taught"} <= made
    assert {"examples", "train"} <= made
    hits = ExampleSet.open(tmp_path / "out/span-hits")
    scores = open_scores(tmp_path / "out/span-scores", hits)
    assert len(hits) == 5 and all(len(scores[row]) == 7 for row in range(5))
    assert method["args"]["start"] == "causal"
    assert method["args"]["span_steps"] == method["args"]["taught_steps"] == 0
    assert method["args"]["engine"]["model"] == str((tmp_path / "out/train/model").resolve())
    steps = ("start", "span-training", "taught", "train")
    start, spans, taught, end = (
        load_file(tmp_path / f"out/{step}/model/model.safetensors")["model.decoder.layers.0.fc2.weight"]
        for step in steps
    )
    moved = [float((after - before).norm() / before.norm()) for before, after in pairwise((start, spans, taught, end))]
    assert all(0.01 < share < 0.1 for share in moved)  # each is the one before it, moved by the fixture's little
