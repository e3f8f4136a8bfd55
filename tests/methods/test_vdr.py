"""VDR and SiDR: numbers worked by hand, which sides learn from which term, the contrastive mask, two workers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from raydr.methods.base import build_method
from raydr.methods.vdr import Vdr, VdrConfig, VocabularyContrastive, contrastive_mask, symmetric
from raydr.models.tokens import Tokens
from raydr.models.towers import Towers
from raydr.models.vocabulary import bag_of_tokens, top_mask
from raydr.train import grad_cache
from raydr.train.objective import Labels, TrainBatch
from tests.models.test_vocabulary import SHIFT, WORDS, tower

DIMS = WORDS - SHIFT


def objective(**settings: Any) -> VocabularyContrastive:
    config = VdrConfig(**{"train_topk": 16, **settings})
    return VocabularyContrastive(config, shift=SHIFT, normalize=False, special=[])


def batch(num: int = 3, group: int = 2, *, seed: int = 0) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)

    def texts(count: int, longest: int, side: Any) -> Tokens:
        ids = torch.randint(SHIFT, WORDS, (count, longest), generator=generator)
        lengths = torch.randint(3, longest + 1, (count, 1), generator=generator)
        mask = (torch.arange(longest) < lengths).long()
        return Tokens(ids * mask, mask, side=side)

    rows = torch.arange(num * group)
    labels = Labels(rows, rows[::group, None].clone())
    return TrainBatch(labels, texts(num, 6, "query"), texts(num * group, 12, "passage"))


def with_tokens(made: TrainBatch) -> Labels:
    return dataclasses.replace(made.labels, query_tokens=made.queries, passage_tokens=made.passages)


class Plain:
    """The least an engine has to be."""

    device = torch.device("cpu")

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def __call__(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class TestByHand:
    QUERIES = torch.tensor([[1.0, 0, 2], [0, 1, 1]])
    PASSAGES = torch.tensor([[1.0, 0, 1], [0, 2, 1], [1, 1, 0], [0, 0, 1]])

    def test_the_symmetric_loss_of_the_card(self):
        found = {
            sides: float(symmetric(self.QUERIES, self.PASSAGES, torch.eye(2, 4, dtype=torch.bool), sides=sides))
            for sides in ("sum", "mean", "scaled")
        }
        assert found["sum"] == pytest.approx(0.703733, abs=1e-6)
        assert found["mean"] == pytest.approx(0.703733 / 2, abs=1e-6)
        assert found["scaled"] == pytest.approx(2 * 0.483638, abs=1e-5)

    @pytest.mark.parametrize("semi", [False, True])
    def test_the_loss_is_the_mean_of_its_terms(self, semi):
        """In the order of the released code: all positives, then all negatives."""
        made, generator = batch(), torch.Generator().manual_seed(1)
        queries, passages = (torch.rand(n, DIMS, generator=generator) + 0.1 for n in (3, 6))
        found = objective(semi=semi).loss(queries, passages, with_tokens(made)).loss
        order = [0, 2, 4, 1, 3, 5]
        p = passages[order]
        how = {"shift": SHIFT, "num_dims": DIMS}
        assert made.queries is not None and made.passages is not None
        b_q = bag_of_tokens(made.queries.ids, made.queries.mask, **how).float()
        b_p = bag_of_tokens(made.passages.ids, made.passages.mask, **how).float()[order]

        def sym(left: Tensor, right: Tensor) -> Tensor:
            scores, own = left @ right.T, torch.arange(3)
            cross_entropy = torch.nn.functional.cross_entropy
            return cross_entropy(scores, own) + cross_entropy(scores[:, :3].T, own)

        sparse_q = queries * (top_mask(queries, 16) | b_q.bool())
        sparse_p = p * (top_mask(p, 16) | b_p.bool())
        terms = [sym(sparse_q, p), sym(b_q, p)]
        if semi:
            terms += [sym(queries, sparse_p), sym(queries, b_p)]
        torch.testing.assert_close(found, torch.stack(terms).mean())


class TestWhoLearns:
    def gradients(self, *, keep: str, semi: bool = True) -> dict[str, float]:
        """Size of the gradient of each tower from one term of the loss."""
        network = Towers(queries=tower(seed=0), passages=tower(seed=1))
        made = batch()
        assert made.queries is not None and made.passages is not None
        how = {"shift": SHIFT, "num_dims": DIMS}
        queries, passages = network(*made.queries.inputs), network(*made.passages.inputs)
        bags = [bag_of_tokens(side.ids, side.mask, **how).float() for side in made.sides]
        sides = {"bag of query": (bags[0], passages[::2]), "bag of passage": (queries, bags[1][::2])}[keep]
        symmetric(*sides, torch.eye(3, dtype=torch.bool)).backward()
        sizes = {}
        for name, part in (("queries", network.queries), ("passages", network.passages)):
            own: Any = part
            words = own.transformer.get_input_embeddings().weight.grad
            sizes[name] = 0.0 if words is None else float(words.abs().sum())
            sizes[f"{name} norm"] = 0.0 if own.norm.weight.grad is None else float(own.norm.weight.grad.abs().sum())
        return sizes

    def test_a_querys_bag_trains_the_passages_alone(self):
        sizes = self.gradients(keep="bag of query")
        assert sizes["queries"] == sizes["queries norm"] == 0
        assert sizes["passages"] > 0
        assert sizes["passages norm"] > 0

    def test_a_passages_bag_trains_the_queries_alone(self):
        sizes = self.gradients(keep="bag of passage")
        assert sizes["passages"] == sizes["passages norm"] == 0
        assert sizes["queries"] > 0


class TestContrastiveMask:
    def test_the_example_of_the_card(self):
        bags = torch.zeros(2, 6, dtype=torch.bool)
        bags[0, 0] = bags[1, 3] = True
        assert [row.nonzero().flatten().tolist() for row in contrastive_mask(bags)] == [[2, 4], [1, 5]]

    def test_it_charges_everyone_but_the_positive(self):
        made, generator = batch(num=4, group=1), torch.Generator().manual_seed(3)
        queries, passages = (torch.rand(4, DIMS, generator=generator) + 0.1 for _ in range(2))
        assert made.queries is not None
        bags = bag_of_tokens(made.queries.ids, made.queries.mask, shift=SHIFT, num_dims=DIMS)
        mask = contrastive_mask(bags)
        assert (mask.sum(dim=0) <= 1).all()
        assert not (mask & bags.any(dim=0)).any()
        own, charged = objective(contrastive_mask=True)._charged(bags, passages)
        change = own @ charged.T - bags.float() @ passages.T
        torch.testing.assert_close(change.diagonal(), torch.zeros(4), atol=1e-4, rtol=0)
        assert (change[~torch.eye(4, dtype=torch.bool)] > 0).all()
        for semi in (False, True):
            plain, masked = (
                objective(semi=semi, contrastive_mask=on).loss(queries, passages, with_tokens(made)).loss
                for on in (False, True)
            )
            assert masked > plain


def test_gradient_caching_is_exact_with_two_towers_and_bags():
    found = {}
    for chunk_tokens in (None, 20):
        network = Towers(queries=tower(seed=0), passages=tower(seed=1))
        made = batch(num=4, group=3, seed=5)
        output = grad_cache.backward(
            Plain(network), objective(semi=True, contrastive_mask=True), made, chunk_tokens=chunk_tokens
        )
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found[chunk_tokens] = (output.loss.detach(), gradients)
    torch.testing.assert_close(found[20][0], found[None][0])
    largest = max(float(gradient.abs().max()) for gradient in found[None][1].values())
    for name, gradient in found[None][1].items():
        torch.testing.assert_close(found[20][1][name], gradient, atol=1e-5 * largest, rtol=1e-3, msg=name)


def test_the_method_builds_what_it_says(tmp_path):
    from tests.train.tiny import tiny_checkpoint

    model = str(tiny_checkpoint(tmp_path / "m"))
    for towers, sides in (("two", ["query", "passage"]), ("one", [None, None])):
        method = build_method(Vdr(VdrConfig(model=model, towers=towers, max_passage_tokens=32)).component)
        from raydr.types import Passage, Query

        read = method.tokenizer().tokenize([Query("q", "a cat")], [[Passage("p", "a dog")]])
        assert [read[name].side for name in ("queries", "passages")] == sides
        network = method.build_model()
        assert isinstance(network, Towers) == (towers == "two")
        tokens = read["queries"].padded(0)
        assert network(*tokens.inputs).shape == (1, 29523)
        (tmp_path / towers).mkdir()
        method.save_model(network, tmp_path / towers)
        trained = build_method(method.trained(str(tmp_path / towers)))
        assert trained.encoder().dim == 29523


def test_sidr_learns_to_search_bags():
    """Questions name none of their passage's words, so bags alone cannot tell; the pairs are learned by heart."""
    made = batch(num=8, group=1, seed=11)
    assert made.queries is not None and made.passages is not None
    network = Towers(queries=tower(seed=0), passages=tower(seed=1)).train()
    for part in network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    bags = bag_of_tokens(made.passages.ids, made.passages.mask, shift=SHIFT, num_dims=DIMS).float()
    asked = bag_of_tokens(made.queries.ids, made.queries.mask, shift=SHIFT, num_dims=DIMS).float()

    def found() -> dict[str, float]:
        with torch.no_grad():
            queries, passages = network(*made.sides[0].inputs), network(*made.sides[1].inputs)
        sparse = queries * (top_mask(queries, 16) | asked.bool())
        scores = {"parametric": sparse @ passages.T, "alpha": asked @ passages.T, "beta": queries @ bags.T}
        return {name: float((own.argmax(dim=1) == torch.arange(8)).float().mean()) for name, own in scores.items()}

    before, optimizer = found(), torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        grad_cache.backward(Plain(network), objective(semi=True), made, chunk_tokens=None)
        optimizer.step()
    assert max(before.values()) < 0.8
    assert found() == {"parametric": 1.0, "alpha": 1.0, "beta": 1.0}
