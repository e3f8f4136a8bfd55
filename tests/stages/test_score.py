"""Scores of a ranker for training examples: in this process and on Ray the same, and made again when the ranker was."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import write_artifact
from raydr.config import Component
from raydr.encoders.cross_encoder import PairConfig, load_cross_encoder, save_cross_encoder
from raydr.errors import ConfigError
from raydr.stages.config import ScoreConfig
from raydr.stages.score import SCORES, open_scores, score_examples
from tests.train.tiny import tiny_checkpoint, write_topic_examples


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("score") / "examples", negatives=5)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("score") / "start", seed=4)


def trained_ranker(folder, start, *, seed) -> Component:
    """A ranker in a model artifact, as training leaves it."""
    with write_artifact(folder, kind="model", config={"seed": seed}) as writer:
        network = load_cross_encoder(PairConfig(model=str(start)))
        network.transformer.classifier.weight.data *= seed
        (writer.path / "model").mkdir()
        save_cross_encoder(network, str(start), writer.path / "model")
    args = {"model": str(folder / "model"), "max_pair_tokens": 48, "precision": "float32", "num_threads": 1}
    return Component(import_path="raydr.encoders.cross_encoder:CrossEncoderReranker", args=args)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_scores(ray_cluster, examples, start, tmp_path):
    """In blocks of five, on two actors: every query once, and to the last bit."""
    ranker, config = trained_ranker(tmp_path / "ranker", start, seed=100), ScoreConfig(queries_per_block=5)
    here = score_examples(examples, ranker, config, tmp_path / "here", use_ray=False)
    on_ray = score_examples(
        examples, ranker, config.model_copy(update={"num_workers": (1, 2)}), tmp_path / "ray", use_ray=True
    )
    assert sorted(pq.read_table(on_ray.path / SCORES)["row"].to_pylist()) == list(range(len(examples)))
    expected, found = (open_scores(artifact.path, examples) for artifact in (here, on_ray))
    assert np.ptp(np.concatenate(expected)) > 0.01
    for row, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert len(one) == len(examples.positives(row)) + len(examples.negatives(row))
        np.testing.assert_array_equal(one, other)
    assert here.manifest.details == on_ray.manifest.details
    assert here.fingerprint == on_ray.fingerprint  # where it runs decides nothing


def test_scores_of_a_ranker_that_was_trained_again_are_made_again(examples, start, tmp_path, capsys):
    def scored(seed):
        ranker = trained_ranker(tmp_path / "ranker", start, seed=seed)
        return score_examples(examples, ranker, ScoreConfig(), tmp_path / "scores", use_ray=False)

    first = open_scores(scored(100).path, examples)
    capsys.readouterr()
    again = open_scores(scored(100).path, examples)
    assert "has these scores already" in capsys.readouterr().err
    other = open_scores(scored(-100).path, examples)
    assert all(np.array_equal(one, same) for one, same in zip(first, again, strict=True))
    assert not any(np.allclose(one, new, atol=1e-3) for one, new in zip(first, other, strict=True))


def test_blocks_change_nothing(examples, start, tmp_path):
    ranker = trained_ranker(tmp_path / "ranker", start, seed=100)
    whole, parts = (
        score_examples(examples, ranker, ScoreConfig(queries_per_block=size), tmp_path / str(size), use_ray=False)
        for size in (1000, 7)
    )
    for one, other in zip(open_scores(whole.path, examples), open_scores(parts.path, examples), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert whole.manifest.details["ordered_share"] == pytest.approx(parts.manifest.details["ordered_share"], abs=0.02)


def test_what_scores_no_pairs_is_refused(examples, tmp_path):
    encoder = Component(import_path="raydr.encoders.text:TextEncoder")
    with pytest.raises(ConfigError, match="TextEncoder has no method score"):
        score_examples(examples, encoder, ScoreConfig(), tmp_path / "scores", use_ray=False)
