"""Mining by modality over a real index of texts, pictures and both: equal to the definition, query by query."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raydr.config import Component
from raydr.data.examples import ExampleSet
from raydr.encoders.factory import EncoderFactory
from raydr.index import store
from raydr.index.reader import IndexReader
from raydr.stages.config import MineConfig, ModalityConfig, SearchConfig
from raydr.stages.mine import mine_negatives
from raydr.types import MODALITIES, Passage
from tests.corpora import METHOD, WordCounts
from tests.embedded_pictures import picture, pictured

RNG = np.random.default_rng(11)
ENCODER = EncoderFactory(Component.model_validate(METHOD))


def passage(number: int) -> Passage:
    kind = number % 4
    image = picture(number) if kind in (1, 2) else None
    text, title = (f"text {number}", "") if kind in (0, 2) else ("", "" if kind == 1 else f"title {number}")
    return Passage(f"p{number:02d}", text, title, image)


PASSAGES = [passage(number) for number in RNG.permutation(80)]
BY_ID = {p.passage_id: p for p in PASSAGES}
EMBEDDINGS = RNG.integers(0, 4, size=(80, WordCounts.dim)).astype(np.float32)
VECTOR = {p.passage_id: row for p, row in zip(PASSAGES, EMBEDDINGS, strict=True)}


def score_of(text: str, passage_id: str) -> float:
    return float(VECTOR[passage_id] @ WordCounts().count([text])[0])


def query(number: int) -> tuple[str, dict[str, int]]:
    """Its text and judgements; every other query has a positive that is found, at rank 1, 3, 5, ..."""
    text = " ".join(RNG.choice(WordCounts.VOCABULARY, size=3))
    judged = RNG.choice([*BY_ID], size=RNG.integers(1, 4), replace=False).tolist()
    grades = {id_: int(RNG.integers(0, 3)) for id_ in judged}
    if number % 2:
        grades[sorted(BY_ID, key=lambda id_: (-score_of(text, id_), id_))[number - 1]] = 1
    return text, grades


QUERIES = {f"q{number}": query(number) for number in range(30)}
POSITIVES = {q: own for q, (_, grades) in QUERIES.items() if (own := [id_ for id_, g in grades.items() if g >= 1])}
CONFIG = MineConfig(modality_aware=ModalityConfig(depth=24, low_rank=19), num_negatives=5)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    tasks = {"q0": "cirr"}
    return pictured(tmp_path_factory.mktemp("pictured"), PASSAGES, EMBEDDINGS, QUERIES, tasks=tasks)


def mined(built, out, config=CONFIG, **search) -> ExampleSet:
    settings = SearchConfig(**search)
    return ExampleSet(mine_negatives(built.index, built.queries, ENCODER, config, out, use_ray=False, search=settings))


def score(query_id: str, passage_id: str) -> float:
    return score_of(QUERIES[query_id][0], passage_id)


def ranking(query_id: str, ids=BY_ID) -> list[str]:
    return sorted(ids, key=lambda id_: (-score(query_id, id_), id_))


def expected(query_id: str, depth: int, low_rank: int, ids=BY_ID) -> list[tuple[str, str]]:
    """The rule, rank by rank."""
    own, found, seen = POSITIVES[query_id], [], False
    right = {BY_ID[id_].modality for id_ in own}
    for rank, id_ in enumerate(ranking(query_id, ids)[:depth], start=1):
        if id_ in own:
            seen = True
        elif BY_ID[id_].modality in right and rank > low_rank:
            found.append((id_, "low_rank"))
        elif BY_ID[id_].modality not in right and not seen:
            found.append((id_, "wrong_modality"))
    return found


def negatives(examples: ExampleSet) -> dict[str, list[tuple[str, str]]]:
    return {
        id_: [
            (examples.passage_ids[place], source)
            for place, source in zip(examples.negatives(row), examples.negative_sources(row), strict=True)
        ]
        for row, id_ in enumerate(examples.query_ids)
    }


def test_what_the_rows_of_an_index_are_made_of(built):
    reader = IndexReader.open(built.index)
    assert reader.has_pictures
    found = dict(zip(reader.passage_ids, (MODALITIES[place] for place in reader.modalities), strict=True))
    assert found == {id_: p.modality for id_, p in BY_ID.items()}
    assert set(found.values()) == set(MODALITIES)
    assert reader.modalities_of(["p01", "p03", "nowhere"]) == {"p01": "image", "p03": "text"}


def test_negatives_are_those_of_the_rule(built, tmp_path):
    examples = mined(built, tmp_path / "out")
    found = negatives(examples)
    rule = {query_id: expected(query_id, 24, 19) for query_id in POSITIVES}
    assert {q: own for q, own in found.items() if rule[q]} == {q: own for q, own in rule.items() if own}
    counts, kinds = examples.artifact.manifest.counts, Counter(s for own in rule.values() for _, s in own)
    for kind in ("wrong_modality", "low_rank"):
        assert counts[kind] == kinds[kind] > 0
        assert counts[f"without_{kind}"] == sum(kind not in [s for _, s in own] for own in rule.values())
    assert counts["unfound"] == sum(not set(ranking(q)[:24]) & set(own) for q, own in POSITIVES.items()) > 0
    assert counts["candidates"] == 24 * len(POSITIVES)
    for row, query_id in enumerate(examples.query_ids):
        ids = [id_ for id_, _ in found[query_id]]
        assert examples.negative_scores(row).tolist() == [score(query_id, id_) for id_ in ids]
        assert examples.passages(examples.negatives(row)) == [BY_ID[id_] for id_ in ids]
    assert examples.task(examples.query_ids.index("q0")) == "cirr"


def test_random_ones_of_the_right_modality_where_there_are_neither(built, tmp_path):
    """Of depth 1: a query whose first hit is its positive has neither kind."""
    config = CONFIG.model_copy(update={"modality_aware": ModalityConfig(depth=1, low_rank=0)})
    examples = mined(built, tmp_path / "out", config)
    bare = [query_id for query_id in POSITIVES if ranking(query_id)[0] in POSITIVES[query_id]]
    found = negatives(examples)
    assert bare
    for query_id, own in found.items():
        if query_id not in bare:
            assert own == expected(query_id, 1, 0)
            continue
        right = {BY_ID[id_].modality for id_ in POSITIVES[query_id]}
        assert {source for _, source in own} == {"random"}
        assert len({id_ for id_, _ in own}) == 5
        assert {BY_ID[id_].modality for id_, _ in own} <= right
        assert not {id_ for id_, _ in own} & set(POSITIVES[query_id])
    assert examples.artifact.manifest.counts["filled"] == len(bare)
    without = mined(built, tmp_path / "without", config.model_copy(update={"fill_random": False}))
    assert {query_id for query_id, own in negatives(without).items() if not own} == set(bare)


def test_filters_leave_what_is_of_the_wrong_modality(built, tmp_path):
    config = CONFIG.model_copy(update={"margin": 0.0, "fill_random": False})
    found = negatives(mined(built, tmp_path / "out", config))
    for query_id, own in found.items():
        limit = min(score(query_id, id_) for id_ in POSITIVES[query_id])
        rule = expected(query_id, 24, 19)
        assert own == [(id_, s) for id_, s in rule if s == "wrong_modality" or score(query_id, id_) < limit]
    assert sum(map(len, found.values())) < sum(len(expected(q, 24, 19)) for q in POSITIVES)


def test_blocks_change_nothing_and_what_is_deleted_is_gone(tmp_path):
    built = pictured(tmp_path / "pictured", PASSAGES, EMBEDDINGS, QUERIES)
    whole = mined(built, tmp_path / "whole")
    parts = mined(built, tmp_path / "parts", query_batch=7)
    assert negatives(parts) == negatives(whole)
    assert parts.artifact.manifest.counts == whole.artifact.manifest.counts
    gone = [id_ for id_ in BY_ID if not any(id_ in own for own in POSITIVES.values())][:12]
    store.delete(built.index, gone)
    left = [id_ for id_ in BY_ID if id_ not in gone]
    found = negatives(mined(built, tmp_path / "deleted"))
    for query_id, own in found.items():
        assert not {id_ for id_, _ in own} & set(gone)
        if rule := expected(query_id, 24, 19, left):
            assert own == rule


def test_examples_from_before_there_was_such_a_setting_are_still_the_same(built, tmp_path):
    examples = mined(built, tmp_path / "out", MineConfig())
    assert "modality_aware" not in examples.artifact.manifest.config
    assert {source for own in negatives(examples).values() for _, source in own} == {"model"}
