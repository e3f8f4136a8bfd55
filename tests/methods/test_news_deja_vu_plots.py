"""The card's small experiment, plots times names: does masking both sides find the plot about other people?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raydr.config import Component
from raydr.data.ocr import noisy
from raydr.methods.base import build_method
from raydr.train.batches import to_batch
from raydr.train.objective import Labels
from raydr.types import Passage, Query
from tests.taggers import gazetteer_tagger

PATH = "raydr.methods.news_deja_vu:NewsDejaVu"
PLOTS = [
    "a fire broke out in the mill of {p} at {q} and {r} lost all her savings , says {p}",
    "{p} and {r} were married at {q} after an engagement of three years , friends of {p} report",
    "the bank of {p} at {q} failed and {r} was arrested for fraud on the complaint of {p}",
    "{p} fell from a horse near {q} and broke a leg ; the doctor , {r} , has hope for {p}",
    "{p} won the election for mayor of {q} by forty votes over {r} , and {p} thanked the voters",
    "thieves took silver spoons from the house of {p} in {q} ; {r} saw them run from {p}",
    "the strike of the dock workers at {q} ended when {p} and {r} agreed on wages , said {p}",
    "{p} opened a school for girls in {q} with money that {r} had left to {p}",
    "a flood carried off the bridge at {q} ; {p} rescued {r} in a boat that {p} had built",
    "the play of {p} was hissed in {q} and {r} refused to act for {p} again",
    "{p} sued {r} at {q} over a patent on a sewing machine that {p} claims to have invented",
    "cholera has come to {q} , {p} and {r} are among the dead , and the son of {p} is ill",
]
TRAINED = 4
"""Plots that training sees; the others are measured."""
NAMES = [
    {"p": "John Smith", "q": "London", "r": "Mary"},
    {"p": "George Brown", "q": "Boston", "r": "Anna"},
    {"p": "Peter Clark", "q": "Paris", "r": "Mary Jones"},
]


def told(plot: int, names: int, *, noise: float = 0.0, seed: int = 0) -> str:
    """The story, misread but for its names: the tagger of these tests knows them by their letters."""
    rng = np.random.default_rng([plot, names, seed])
    words = [word if word[0] == "{" else noisy(word, rate=noise, rng=rng)[0] for word in PLOTS[plot].split()]
    return " ".join(words).format(**NAMES[names])


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    tagger = gazetteer_tagger(tmp_path_factory.mktemp("tagger"), max_positions=128)
    return {"tagger": {"model": str(tagger), "num_threads": 1}, "backend": "torch", "num_threads": 1}


def cosines(by_queries, by_passages) -> np.ndarray:
    """For every plot told of the first names: the similarity of each plot of other names, then of each of the same."""
    plots = range(TRAINED, len(PLOTS))
    queries = by_queries.encode_queries([Query(str(plot), told(plot, 0)) for plot in plots])
    passages = [Passage(f"{plot}/{own}", told(plot, own, noise=0.1)) for own in (1, 0) for plot in plots]
    return queries @ by_passages.encode_passages(passages).T


def measured(scores: np.ndarray) -> tuple[float, float]:
    """How often the same plot of other names is first among all but the query itself, and how far it is ahead."""
    count = len(scores)
    right = np.arange(count)
    own = scores[right, right]
    others = scores.copy()
    others[right, right] = others[right, count + right] = -1
    return float((own > others.max(axis=1)).mean()), float((own - others.max(axis=1)).mean())


def test_masking_both_sides_finds_the_plot_and_training_widens_the_gap(settings):
    masked = build_method(Component(import_path=PATH, args=settings))
    plain = build_method(Component(import_path=PATH, args={**settings, "masking": False, "tagger": None}))
    both, neither = cosines(masked.encoder(), masked.encoder()), cosines(plain.encoder(), plain.encoder())
    one_side = cosines(masked.encoder(), plain.encoder())
    assert measured(both)[0] >= measured(neither)[0] + 0.4
    assert measured(both)[1] > measured(one_side)[1] and measured(both)[0] >= measured(one_side)[0]
    assert measured(both)[1] > measured(neither)[1]

    network = masked.build_model()
    _train(masked, network)
    trained = measured(_with_network(masked, network))
    assert trained[1] > measured(both)[1] and trained[0] >= measured(both)[0]


def _train(method, network, steps: int = 8) -> None:
    """Same-plot pairs of the plots that are not measured, in batches of all of them."""
    objective, tokenizer = method.build_objective(), method.tokenizer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-5)
    rng = np.random.default_rng(0)
    network.train()
    torch.manual_seed(0)
    for step in range(steps):
        queries, groups = [], []
        for plot in range(TRAINED):
            other = int((plot + 1 + rng.integers(TRAINED - 1)) % TRAINED)
            queries.append(Query(str(plot), told(plot, step % 3)))
            texts = (told(plot, (step + 1) % 3, noise=0.1, seed=step), told(other, step % 3, noise=0.1, seed=step))
            groups.append([Passage(str(n), text) for n, text in enumerate(texts)])
        rows = {side: read.parts for side, read in tokenizer.tokenize(queries, groups).items()}
        plan = {"pairs": None, "teacher_scores": None, "clusters": None, "names": []}
        numbers = list(range(2 * TRAINED))
        positives = [[2 * plot] for plot in range(TRAINED)]
        batch = to_batch({**plan, **rows, "passage_rows": numbers, "positive_rows": positives}, tokenizer.pad_id)
        labels: Labels = batch.labels
        output = objective.loss(network(*batch.queries.inputs), network(*batch.passages.inputs), labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    network.eval()


def _with_network(method, network) -> np.ndarray:
    """`cosines` by a network in memory."""

    class Trained:
        def encode_queries(self, queries):
            return self._run([(query, [Passage("p", "x")]) for query in queries], "queries")

        def encode_passages(self, passages):
            return self._run([(Query("q", "x"), [passage]) for passage in passages], "passages")

        def _run(self, pairs, side):
            tokens = method.tokenizer().tokenize([q for q, _ in pairs], [group for _, group in pairs])[side]
            with torch.inference_mode():
                return network(*tokens.padded(0).inputs).numpy()

    return cosines(Trained(), Trained())
