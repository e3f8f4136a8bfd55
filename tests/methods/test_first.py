"""FIRST: the card's reference vectors, the place the scores are read at, what is trained, and what is saved."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydr.data.examples import Example, write_examples
from raydr.errors import ConfigError
from raydr.llm.listwise import ListwiseConfig
from raydr.losses import lambdarank, listnet, ranknet
from raydr.methods.first import First, FirstReranker, WindowBatches, to_ranks
from raydr.models.causal_lm import CausalLm, left_padded
from raydr.train.batches import pad
from raydr.train.objective import Labels, TrainBatch
from raydr.types import Hit, Passage, Query

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


def test_mistakes_at_the_top_cost_more():
    ranks = torch.arange(1, 21)[None]
    scores = -0.5 * torch.arange(20.0)[None]

    def swapped(a: int, b: int) -> float:
        order = list(range(20))
        order[a], order[b] = order[b], order[a]
        return ranknet(scores[:, order], ranks).item()

    assert swapped(0, 1) > swapped(18, 19)


def test_ranks_of_equal_scores_are_distinct():
    assert to_ranks(torch.tensor([[0.5, 2.0, 0.5, 1.0]])).tolist() == [[3, 1, 4, 2]]


def config(folder, **settings):
    return First.Config(
        engine={"model": str(folder), "backend": "transformers", "dtype": "float32"},
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
    return TrainBatch(labels, pairs=pad(tokens, 0)), tokens


def test_training_reads_the_logits_that_decoding_reads(causal_lm):
    method = First(config(causal_lm("Llama")))
    batch, tokens = windows(method)
    network = method.build_model().eval()
    objective, letters = method.build_objective(), method.build_objective()._prompt.letters[:4]
    seen = {}

    def model(*inputs):
        seen["logits"] = network(*inputs)
        return seen["logits"]

    objective(model, batch)
    plain = AutoModelForCausalLM.from_pretrained(causal_lm("Llama")).eval()
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
    quiet = CausalLm(network.transformer, neftune_alpha=0.0)
    del quiet
    embedded = torch.zeros(1, 10, 32)
    noise = network._add_noise(torch.nn.Identity(), None, embedded)
    assert noise.abs().max() <= 5 / (10 * 32) ** 0.5


def test_a_small_network_learns_an_order_and_what_is_saved_reranks(causal_lm, tmp_path):
    """The relevant passage says so; after some steps its letter has the best logit, wherever it stands."""
    folder = causal_lm("Llama")
    words = ["exact", "close", "far", "nothing"]
    passages = {f"{q}-{n}": Passage(f"{q}-{n}", f"{word} match") for q in range(8) for n, word in enumerate(words)}
    examples = [
        Example(
            Query(f"q{q}", "find it"),
            [f"{q}-0"],
            [f"{q}-{n}" for n in (1, 2, 3)],
            negative_scores=[3.0, 2.0, 1.0],
            positive_scores=[4.0],
        )
        for q in range(8)
    ]
    from raydr.artifacts import open_artifact, write_artifact
    from raydr.data.examples import KIND, ExampleSet

    with write_artifact(tmp_path / "examples", kind=KIND, config={}) as writer:
        write_examples(writer.path, examples, passages)
    open_artifact(tmp_path / "examples")
    method = First(config(folder, short_share=0.0, neftune_alpha=0.0))
    batches = iter(method.build_batches(ExampleSet.open(tmp_path / "examples"), batch_size=8, seed=0))
    network, objective, tokenizer = method.build_model().train(), method.build_objective(), method.build_tokenizer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    own = ExampleSet.open(tmp_path / "examples")
    for _ in range(150):
        groups = next(batches)
        texts = [own.passages(group.passages) for group in groups]
        tokens = tokenizer.tokenize([own.query(group.query) for group in groups], texts)["pairs"]
        teacher = torch.tensor([group.teacher_scores for group in groups])
        labels = Labels(torch.arange(teacher.numel()), torch.zeros(8, 1, dtype=torch.int64), teacher_scores=teacher)
        output = objective(network, TrainBatch(labels, pairs=pad(tokens, 0)))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    method.save_model(network, tmp_path / "model")
    reranker = First(First.Config(**method.trained(str(tmp_path / "model")).args)).build_reranker()
    hits = [Hit(f"0-{n}", 0.0) for n in (2, 3, 0, 1)]
    ranked = reranker.rerank(Query("q", "find it"), hits, passages)
    assert [hit.passage_id for hit in ranked] == ["0-0", "0-1", "0-2", "0-3"]
    assert [hit.score for hit in ranked] == sorted((hit.score for hit in ranked), reverse=True)


def test_windows_of_a_batch_have_one_size_and_shuffled_passages(tmp_path):
    examples = SimpleNamespace(
        __len__=lambda: 2,
        positives=lambda row: np.array([0]),
        negatives=lambda row: np.arange(1, 8 - row),
        positive_scores=lambda row: np.array([9.0]),
        negative_scores=lambda row: np.arange(7 - row, 0, -1.0),
        query=lambda row: Query(f"q{row}", "x"),
    )

    class Sized:
        def __len__(self):
            return 2

        def __getattr__(self, name):
            return getattr(examples, name)

    sampler = WindowBatches(Sized(), batch_size=2, window_size=20, short_share=0.5, seed=1)
    batches = [batch for batch, _ in zip(sampler, range(30))]
    sizes = {len(group.passages) for batch in batches for group in batch}
    assert all(len({len(group.passages) for group in batch}) == 1 for batch in batches)
    assert max(sizes) == 7 and min(sizes) < 7
    assert len({group.passages for batch in batches for group in batch if len(group.passages) == 7}) > 5
    for batch in batches:
        for group in batch:
            assert all((passage == 0) == (score == 9.0) for passage, score in zip(group.passages, group.teacher_scores))
    assert [b for b, _ in zip(sampler, range(5))] == batches[:5]
    examples.positive_scores = lambda row: np.array([])
    with pytest.raises(ConfigError, match="q0.*scores of a teacher"):
        WindowBatches(Sized(), batch_size=2, window_size=20, short_share=0.5, seed=1)


class _Oracle(FirstReranker):
    """Ranks by the number in a text."""

    async def rank_window(self, query, passages):
        from raydr.llm.listwise import RankedWindow

        await asyncio.sleep(0)
        scores = [float(text) - 100 * len(passages) for text in passages]  # windows are on different scales
        return RankedWindow(sorted(range(len(scores)), key=lambda n: -scores[n]), scores)


@pytest.mark.parametrize("scores", ["window", "calibrated"])
def test_a_list_is_ranked_by_windows_and_every_hit_comes_back(scores):
    reranker = _Oracle(ListwiseConfig(engine={"model": "none"}, window_size=20, stride=10, scores=scores))
    values = np.random.default_rng(0).permutation(95)
    passages = {str(n): Passage(str(n), str(value)) for n, value in enumerate(values)}
    hits = [Hit(passage_id, 0.0) for passage_id in passages]
    ranked = reranker.rerank(Query("q", "x"), hits, passages)
    assert sorted(hit.passage_id for hit in ranked) == sorted(passages)
    assert [int(passages[hit.passage_id].text) for hit in ranked[:10]] == list(range(94, 84, -1))
    own = [hit.score for hit in ranked]
    if scores == "calibrated":
        assert own == sorted(own, reverse=True)
        head = [int(passages[hit.passage_id].text) for hit in ranked[:10]]
        np.testing.assert_allclose(np.diff(own[:10]), np.diff(head))
    assert reranker.rerank(Query("q", "x"), [], passages) == []
    many = reranker.rerank_many([(Query("a", "x"), hits), (Query("b", "x"), hits[:7])], passages)
    assert many[0] == ranked
    assert len(many[1]) == 7
