"""The rule of modality-aware mining, on ranked lists made by hand, and against its definition on random ones."""

from __future__ import annotations

import numpy as np
import pytest

from raydr.config import validate
from raydr.errors import ConfigError
from raydr.stages.config import MineConfig, ModalityConfig
from raydr.stages.modality import by_modality
from raydr.stages.negatives import Candidates, score_limits
from raydr.types import MODALITIES

TEXT, IMAGE, BOTH = range(3)
PAPER = ModalityConfig()


def found(ranked, modalities, relevant, config=PAPER, *, limits=None, scores=None):
    """Rows of both kinds of negatives of one query; `ranked` are the rows at ranks 1, 2, ..."""
    rows = np.array([ranked], dtype=np.int64)
    given = None if scores is None else np.array([scores], dtype=np.float32)
    hard = by_modality(
        Candidates(rows, ["model"] * len(ranked), given),
        [np.array(relevant, dtype=np.int64)],
        np.array(modalities, dtype=np.int8),
        limits or {},
        config,
    )
    columns, kinds = hard.of(0)
    return {
        kind: [ranked[column] for column, own in zip(columns, kinds, strict=True) if own == kind]
        for kind in ("wrong_modality", "low_rank")
    }, hard.counts


class TestFifty:
    """A list of 50: rank r holds row r; texts at even rows, pictures at odd ones, and the picture 7 is the positive."""

    ranked = list(range(1, 51))
    modalities = [TEXT if row % 2 == 0 else IMAGE for row in range(60)]

    def test_positive_at_rank_7(self):
        negatives, counts = found(self.ranked, self.modalities, [7])
        assert negatives == {"wrong_modality": [2, 4, 6], "low_rank": [47, 49]}
        assert counts == {
            "candidates": 50, "removed_relevant": 1, "wrong_modality": 3, "low_rank": 2,
            "without_wrong_modality": 0, "without_low_rank": 0, "unfound": 0,
        }  # fmt: skip

    def test_positive_absent(self):
        negatives, counts = found(self.ranked, self.modalities, [51])
        assert negatives == {"wrong_modality": list(range(2, 51, 2)), "low_rank": [47, 49]}
        assert counts["unfound"] == 1

    def test_positive_first(self):
        negatives, counts = found(self.ranked, self.modalities, [1])
        assert negatives == {"wrong_modality": [], "low_rank": [47, 49]}
        assert counts["without_wrong_modality"] == 1

    def test_every_labelled_positive_is_left_out_and_the_best_one_counts(self):
        negatives, counts = found(self.ranked, self.modalities, [9, 5, 49, 51])
        assert negatives == {"wrong_modality": [2, 4], "low_rank": [47]}
        assert counts["removed_relevant"] == 3

    def test_positives_of_two_modalities_make_both_right(self):
        modalities = [BOTH if row in (2, 48) else own for row, own in enumerate(self.modalities)]
        negatives, _ = found(self.ranked, modalities, [7, 52])
        assert negatives == {"wrong_modality": [2], "low_rank": [46, 47, 49, 50]}

    def test_a_picture_with_text_is_a_modality_of_its_own(self):
        modalities = [BOTH if row in (3, 47) else own for row, own in enumerate(self.modalities)]
        assert found(self.ranked, modalities, [7])[0] == {"wrong_modality": [2, 3, 4, 6], "low_rank": [49]}

    def test_what_is_there_twice_counts_once(self):
        ranked = [*self.ranked[:2], 2, *self.ranked[3:46], 47, 47, 49, 2]
        negatives, _ = found(ranked, self.modalities, [7])
        assert negatives == {"wrong_modality": [2, 4, 6], "low_rank": [47, 49]}

    def test_every_constant_is_a_setting(self):
        config = ModalityConfig(depth=20, low_rank=14)
        negatives, counts = found(self.ranked, self.modalities, [7], config)
        assert negatives == {"wrong_modality": [2, 4, 6], "low_rank": [15, 17, 19]}
        assert counts["candidates"] == 20
        fewer = ModalityConfig(num_wrong_modality=2, num_low_rank=1)
        assert found(self.ranked, self.modalities, [7], fewer)[0] == {"wrong_modality": [2, 4], "low_rank": [47]}

    def test_another_modality_may_count_wherever_it_ranks(self):
        config = ModalityConfig(above_positive=False)
        anywhere = {"wrong_modality": list(range(2, 51, 2)), "low_rank": [47, 49]}
        assert found(self.ranked, self.modalities, [7], config)[0] == anywhere
        assert found(self.ranked, self.modalities, [1], config)[0] == anywhere

    def test_filters_are_for_those_of_low_rank(self):
        scores = [1 - 0.01 * rank for rank in self.ranked]
        config = MineConfig(margin=0.395, modality_aware=PAPER)
        limits = score_limits(np.array([0.93], dtype=np.float32), config)  # below 0.535: from rank 47 on
        negatives, counts = found(self.ranked, self.modalities, [7], limits=limits, scores=scores)
        assert negatives == {"wrong_modality": [2, 4, 6], "low_rank": [47, 49]}
        assert counts["removed_margin"] == 0
        limits = score_limits(np.array([0.91], dtype=np.float32), config)  # below 0.515: rank 49 alone
        negatives, counts = found(self.ranked, self.modalities, [7], limits=limits, scores=scores)
        assert negatives == {"wrong_modality": [2, 4, 6], "low_rank": [49]}
        assert counts["removed_margin"] == 1

    def test_a_short_list_has_neither(self):
        negatives, counts = found([7, 2, 4, -1, -1], self.modalities, [7])
        assert negatives == {"wrong_modality": [], "low_rank": []}
        assert (counts["without_wrong_modality"], counts["without_low_rank"], counts["candidates"]) == (1, 1, 3)


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    modalities = rng.integers(0, len(MODALITIES), size=200).astype(np.int8)
    ranked = np.stack([rng.permutation(200)[:50] for _ in range(30)])
    ranked[:, 40:][rng.random((30, 10)) < 0.1] = -1
    relevant = [rng.choice(200, size=rng.integers(1, 5), replace=False) for _ in ranked]
    config = ModalityConfig(depth=50, low_rank=int(rng.integers(20, 49)))
    hard = by_modality(Candidates(ranked, ["model"] * 50, None), relevant, modalities, {}, config)
    for line, rows in enumerate(ranked.tolist()):
        own = set(relevant[line].tolist())
        right = {modalities[row] for row in own}
        best = min((rank for rank, row in enumerate(rows, start=1) if row in own), default=np.inf)
        others = [(rank, row) for rank, row in enumerate(rows, start=1) if row >= 0 and row not in own]
        wrong = [row for rank, row in others if modalities[row] not in right and rank < best]
        low = [row for rank, row in others if modalities[row] in right and rank > config.low_rank]
        assert ranked[line][hard.wrong_modality[line]].tolist() == wrong
        assert ranked[line][hard.low_rank[line]].tolist() == low
    assert hard.counts["wrong_modality"] > 0
    assert hard.counts["low_rank"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modality_aware": {"depth": 45}}, r"low_rank \(45\) leaves no rank down to depth \(45\)"),
        ({"modality_aware": {}, "sources": ["bm25"]}, "sources: with modality_aware, negatives are the model's hits"),
        ({"modality_aware": {}, "last_rank": 50}, r"last_rank: .*modality_aware\.depth"),
    ],
)
def test_what_cannot_be_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(MineConfig, settings, where="config.yaml")
