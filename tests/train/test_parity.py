"""Two workers learn what one with the joined batch learns, and caching changes nothing, under every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raydr.methods.contrastive import InBatchContrastive
from tests.servers import free_port
from tests.train.parity_worker import (
    BFLOAT16,
    CASES,
    CLIP_NORM,
    LABELLED,
    LABELLED_CASES,
    SPLIT,
    TAUGHT,
    TOWERS,
    gradients,
)
from tests.train.tiny import random_batch, tiny_cross_encoder, tiny_network, tiny_towers

pytestmark = pytest.mark.slow


def run_workers(out: Path, world_size: int) -> dict[str, dict]:
    out.mkdir()
    script = str(Path(__file__).with_name("parity_worker.py"))
    port = str(free_port())
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(out)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=850)
        assert worker.returncode == 0, output[-4000:]
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    out = tmp_path_factory.mktemp("parity") / "one"
    return out, run_workers(out, 1)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    out = tmp_path_factory.mktemp("parity") / "two"
    return out, run_workers(out, 2)


@pytest.mark.parametrize(("stage", "chunk_tokens", "accumulation"), CASES)
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_same_loss_and_same_gradients(request, workers, stage, chunk_tokens, accumulation):
    name = f"stage{stage}-chunk{chunk_tokens}-accumulation{accumulation}"
    assert not differences(request, workers, name, f"stage0-chunkNone-accumulation{accumulation}")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradients_are_those_of_autograd(one_worker, accumulation):
    """The reference of all others: one worker, ZeRO 0, no caching, without anything of raydr's training."""
    network, objective = tiny_network(), InBatchContrastive(temperature=0.05, symmetric=True)
    for seed in range(accumulation):
        batch = random_batch(8, 3, seed=seed)
        queries, passages = (network(tokens.ids, tokens.mask) for tokens in batch.sides)
        (objective.loss(queries, passages, batch.labels).loss / accumulation).backward()
    end = load_file(one_worker[0] / f"stage0-chunkNone-accumulation{accumulation}.safetensors")
    found = gradients(tiny_network().state_dict(), end)
    for name, weight in network.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("stage", SPLIT)
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_a_loss_over_pairs(request, workers, stage):
    """Whose batch is not joined: each worker has the loss of its own queries, and the mean of these is the whole's."""
    start = tiny_cross_encoder().state_dict()
    assert not differences(request, workers, f"stage{stage}-chunkNone-pairs", "stage0-chunkNone-pairs", start=start)


@pytest.mark.parametrize("stage", SPLIT)
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(request, workers, stage):
    folder, results = request.getfixturevalue(workers)
    start = tiny_network().state_dict()
    plain, clipped = (
        gradients(start, load_file(folder / f"{name}.safetensors"))
        for name in ("stage0-chunkNone-accumulation1", f"stage{stage}-chunkNone-clipped")
    )
    norm = torch.stack([gradient.norm() for gradient in plain.values()]).norm().item()
    assert norm > 0.3
    if stage:
        assert results[f"stage{stage}-chunkNone-clipped"]["norm"] == pytest.approx(norm, rel=1e-3)  # before clipping
    for name, gradient in plain.items():
        torch.testing.assert_close(clipped[name], gradient * CLIP_NORM / norm, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("stage", "chunk_tokens"), TAUGHT)
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_the_in_batch_teacher_sees_the_joined_batch(request, workers, stage, chunk_tokens):
    assert not differences(request, workers, f"stage{stage}-chunk{chunk_tokens}-taught", "stage0-chunkNone-taught")


@pytest.mark.parametrize(("name", "stage", "chunk_tokens"), LABELLED_CASES)
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_labels_are_those_of_the_joined_batch(request, workers, name, stage, chunk_tokens):
    """Pairs across queries of different workers, clusters, and the scores of each query's own group."""
    assert not differences(request, workers, f"stage{stage}-chunk{chunk_tokens}-{name}", f"stage0-chunkNone-{name}")


@pytest.mark.parametrize(("stage", "chunk_tokens"), TOWERS)
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_two_towers_and_a_loss_that_reads_the_texts(request, workers, stage, chunk_tokens):
    start = tiny_towers().state_dict()
    name, reference = f"stage{stage}-chunk{chunk_tokens}-vdr", "stage0-chunkNone-vdr"
    assert not differences(request, workers, name, reference, start=start)


def test_every_variant_has_a_loss_of_its_own(one_worker):
    losses = [one_worker[1][f"stage0-chunkNone-{name}"]["losses"][0] for name in LABELLED]
    assert all(abs(one - other) > 1e-3 for n, one in enumerate(losses) for other in losses[:n])


@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_activations_that_are_computed_again_change_nothing(request, workers):
    assert not differences(request, workers, "stage2-chunk40-checkpointed", "stage0-chunkNone-accumulation1")


@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_lower_layers_learn_more_slowly(request, workers):
    """Two layers and a decay of one half: the top one moves as it does without, the embeddings a quarter as far."""
    folder, _ = request.getfixturevalue(workers)
    start = tiny_network().state_dict()
    found, plain = (load_file(folder / f"stage2-chunk40-{name}.safetensors") for name in ("decayed", "accumulation1"))
    factors = {"layer.1.": 1.0, "layer.0.": 0.5, "embeddings.": 0.25}
    for name, value in start.items():
        factor = next(factor for part, factor in factors.items() if part in name)
        torch.testing.assert_close(found[name] - value, factor * (plain[name] - value), atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("stage", "chunk_tokens"), BFLOAT16)
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_bfloat16_hands_on_the_float32_weights(request, workers, stage, chunk_tokens):
    """The gradients are rounded, the weights are not: those that have no gradient leave as they came."""
    folder, _ = request.getfixturevalue(workers)
    start, exact = tiny_network().state_dict(), load_file(folder / "stage0-chunkNone-accumulation1.safetensors")
    found = load_file(folder / f"stage{stage}-chunk{chunk_tokens}-bfloat16.safetensors")
    off = sum(float((found[name] - exact[name]).square().sum()) for name in start)
    moved = sum(float((exact[name] - value).square().sum()) for name, value in start.items())
    assert off < 0.05**2 * moved, f"{(off / moved) ** 0.5:.3f} of the way off"
    for name, value in start.items():
        still = exact[name] == value
        assert torch.equal(found[name][still], value[still]), name
    assert any((value != value.bfloat16().float()).any() for value in found.values())


@pytest.mark.parametrize("stage", ["1", "2", "3"])
@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_in_bfloat16_a_checkpoint_changes_nothing(request, workers, stage):
    """The float32 copies of the weights are in it, and what Adam knows of each."""
    assert request.getfixturevalue(workers)[1]["resumed"][stage] == 0.0


def differences(request, workers, name, reference, *, start=None):
    """What is not as with one worker, ZeRO 0, no caching, to 1e-5: the losses, or gradients by name."""
    folder, results = request.getfixturevalue(workers)
    reference_folder, reference_results = request.getfixturevalue("one_worker")
    start = start or tiny_network().state_dict()
    found, expected = (
        gradients(start, load_file(path))
        for path in (folder / f"{name}.safetensors", reference_folder / f"{reference}.safetensors")
    )
    assert found.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    far = {key: float((found[key] - gradient).abs().max()) for key, gradient in expected.items()}
    off = {key: size for key, size in far.items() if not size <= 1e-5}
    losses = results[name]["losses"]
    if losses != pytest.approx(reference_results[reference]["losses"], abs=1e-5, rel=1e-6):
        off["losses"] = losses
    return off
