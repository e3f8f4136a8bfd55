"""What a query is searched in decides its figures: one index of all collections, or one collection of it alone."""

from __future__ import annotations

import json

import numpy as np

from raydr.config import Component
from raydr.encoders.factory import EncoderFactory
from raydr.stages.config import SearchConfig
from raydr.stages.search import search_corpus
from raydr.types import Passage
from raydr.verbs.config import RunConfig
from raydr.verbs.evaluate import evaluate
from tests.corpora import METHOD
from tests.embedded_pictures import picture, pictured

# Embeddings count words (alpha, beta, ...): texts of news score twice what pictures do.
PASSAGES = {
    Passage("c1", "", image=picture(1)): ("cirr", [1, 0, 0, 0, 0, 0]),
    Passage("c2", "", image=picture(2)): ("cirr", [0, 1, 0, 0, 0, 0]),
    Passage("c3", "", image=picture(3)): ("cirr", [0, 0, 1, 0, 0, 0]),
    Passage("n1", "some news"): ("news", [2, 0, 0, 0, 0, 0]),
    Passage("n2", "other news", image=picture(4)): ("news", [0, 2, 0, 0, 0, 0]),
}
QUERIES = {
    "q1": ("alpha", {"c1": 1}),
    "q2": ("beta", {"c2": 1}),
    "q3": ("gamma", {"c3": 1}),
    "q4": ("alpha", {"n1": 1}),
}


def test_a_local_pool_is_easier_and_hides_the_wrong_modality(tmp_path):
    tasks = {"q1": "cirr", "q2": "cirr", "q3": "cirr", "q4": "news"}
    embeddings = np.array([embedding for _, embedding in PASSAGES.values()])
    metadata = {"dataset": [dataset for dataset, _ in PASSAGES.values()]}
    built = pictured(tmp_path, [*PASSAGES], embeddings, QUERIES, tasks=tasks, metadata=metadata)
    settings = {"measures": ["Hit@1", "R@1"], "task_measures": {"news": "Hit@5"}, "num_resamples": 100}
    config = RunConfig.model_validate({"out": tmp_path, "data": {"path": "made here"}, "evaluate": settings})

    def figures(pool: str, **search):
        encoder = EncoderFactory(Component.model_validate(METHOD))
        queries = built.corpus.queries()
        search_corpus(built.index, queries, encoder, SearchConfig(k=5, **search), tmp_path / pool, use_ray=False)
        artifact = evaluate(config, name=pool, to=f"evaluate_{pool}")
        return json.loads((artifact.path / "metrics.json").read_text())

    everything, cirr = figures("global"), figures("local", filters={"dataset": "cirr"})
    assert (everything["cirr/Hit@1"], cirr["cirr/Hit@1"]) == (1 / 3, 1.0)
    assert (everything["cirr/WrongModality@1"], cirr["cirr/WrongModality@1"]) == (2 / 3, 0.0)
    assert (everything["news/Hit@5"], cirr["news/Hit@5"]) == (1.0, 0.0), (
        "of the other collection's tasks it says nothing"
    )
    assert everything["TaskMean"] == (1 / 3 + 1) / 2
