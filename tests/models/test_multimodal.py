"""Networks that read pictures (MM-Embed's card, tests 3 to 6), on small models of the real classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from raydr.models.multimodal import LatentAttention, MultimodalEmbedder, Preprocessing, QwenVision, ScoreFusion
from tests.multimodal import IMAGE, PREPROCESSING, dual_model, llava_model, llava_network, qwen_model, qwen_network

WORDS = 190


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "qwen2_5_vl"])
def network(request) -> MultimodalEmbedder:
    return llava_network() if request.param == "llava" else qwen_network(request.param)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def mixed(network: MultimodalEmbedder) -> tuple[torch.Tensor, ...]:
    """A text with a picture and one without: (ids, mask, pixels)."""
    seen = [5, 6, *([IMAGE] * network.vision.num_tokens), 7, 8]
    alone = [9, 10, 11]
    ids = torch.tensor([seen, alone + [0] * (len(seen) - 3)])
    return ids, (torch.arange(len(seen)) < torch.tensor([[len(seen)], [3]])).long(), pictures(1)


@torch.no_grad()
def test_a_mixed_batch_equals_one_by_one(network):
    ids, mask, pixels = mixed(network)
    together = network(ids, mask, None, pixels)
    torch.testing.assert_close(together[:1], network(ids[:1], None, None, pixels), atol=1e-6, rtol=0)
    torch.testing.assert_close(together[1:], network(ids[1:, :3]), atol=1e-6, rtol=0)
    assert torch.allclose(together.norm(dim=1), torch.ones(2))


@torch.no_grad()
def test_words_keep_their_order_around_a_picture(network):
    """Visual tokens take the placeholders' places, all else stays: seen in what the language model is given."""
    ids, _, pixels = mixed(network)
    given = {}
    handle = network.transformer.register_forward_pre_hook(lambda _, __, named: given.update(named), with_kwargs=True)
    network(ids[:1], None, None, pixels)
    handle.remove()
    words, visual = network.transformer.get_input_embeddings()(ids[0]), network.vision(pixels)[0]
    number = network.vision.num_tokens
    torch.testing.assert_close(given["inputs_embeds"][0, :2], words[:2])
    torch.testing.assert_close(given["inputs_embeds"][0, 2 : 2 + number], visual)
    torch.testing.assert_close(given["inputs_embeds"][0, 2 + number :], words[2 + number :])


def test_text_alone_never_enters_the_vision_tower(network):
    calls = []
    handle = network.vision.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        plain = network(torch.tensor([[5, 6, 7]]))
        assert not calls
        network.always_looks = True
        torch.testing.assert_close(network(torch.tensor([[5, 6, 7]])), plain)
        assert calls
    network.always_looks = False
    handle.remove()


def test_pictures_and_placeholders_must_agree(network):
    ids, mask, pixels = mixed(network)
    for wrong in (None, pictures(2)):
        with pytest.raises(ValueError, match="placeholders"):
            network(ids, mask, None, wrong)
    with pytest.raises(ValueError, match="placeholders"):
        network(torch.tensor([[5, 6]]), None, None, pixels)


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_only_in_both_directions_the_first_token_sees_the_last(bidirectional, attention):
    network = llava_network(bidirectional=bidirectional)
    network.transformer.set_attn_implementation(attention)
    first = torch.tensor([[1, 0, 0, 0]])
    states = [network(torch.tensor([[5, 6, 7, last]]), None, first) for last in (8, 9)]
    assert torch.equal(*states) is not bidirectional
    if bidirectional:  # and what is padding is seen by nobody, whichever kernel does it
        padded = network(
            torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[1, 1, 1, 1, 0]]), functional.pad(first, (0, 1))
        )
        torch.testing.assert_close(padded, states[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_instruction_acts_through_attention_alone():
    network = llava_network(bidirectional=True)
    ids, pooled = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    states = {}
    handle = network.transformer.register_forward_hook(lambda _, __, out: states.update(last=out.last_hidden_state))
    embedding = network(ids, None, pooled)
    handle.remove()
    expected = functional.normalize(states["last"][:, 2:].mean(dim=1), dim=-1)
    torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(embedding, network(ids), atol=1e-3)  # all tokens are not the same as some
    other = network(torch.tensor([[50, 6, 7, 8, 9]]), None, pooled)
    assert not torch.allclose(embedding, other, atol=1e-4)
    padded = network(
        functional.pad(ids, (0, 3), value=77),
        functional.pad(torch.ones_like(ids), (0, 3)),
        functional.pad(pooled, (0, 3)),
    )
    torch.testing.assert_close(embedding, padded, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_as_transformers_runs_it(kind):
    """Patches, positions in three dimensions and hidden states equal those of the library's own forward pass."""
    model, network = qwen_model(kind), qwen_network(kind, pooling="last")
    assert isinstance(network.vision, QwenVision)
    ids, mask, pixels = mixed(network)
    grid, types = torch.tensor([[1, 4, 4]]), (ids == IMAGE).int()
    positions, _ = model.get_rope_index(ids, types, grid, None, mask)
    torch.testing.assert_close(network.vision.positions(ids == IMAGE)[:, 0], positions[:, 0])
    patches = network.vision._patches(network.vision.normalize(pixels))
    states = model(
        input_ids=ids, attention_mask=mask, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=types
    ).last_hidden_state
    expected = functional.normalize(states[torch.arange(2), mask.sum(dim=1) - 1], dim=-1)
    torch.testing.assert_close(network(ids, mask, None, pixels), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_llava_as_transformers_runs_it():
    """The whole picture: what the library puts before the features of its tiles."""
    model, network = llava_model(image_grid_pinpoints=[[32, 32]]), llava_network()
    pixels = pictures(2)
    values = network.vision.normalize(pixels)
    sizes = torch.tensor([[32, 32], [32, 32]])
    theirs = model.get_image_features(values[:, None].expand(-1, 2, -1, -1, -1), sizes).pooler_output
    ours = network.vision(pixels)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other[: network.vision.num_tokens], atol=1e-6, rtol=0)


def test_pixels_are_normalised_as_processors_do():
    processor = pytest.importorskip("transformers").CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=list(PREPROCESSING.mean), image_std=list(PREPROCESSING.std)
    )
    pixels = pictures(2)
    theirs = processor([picture.permute(1, 2, 0).numpy() for picture in pixels], return_tensors="pt").pixel_values
    torch.testing.assert_close(llava_network().vision.normalize(pixels), theirs, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_latent_attention_against_einsum():
    torch.manual_seed(0)
    dim, heads, width = 12, 2, 12
    head = LatentAttention(dim, num_latents=8, num_heads=heads, head_dim=width, hidden=48)
    hidden = torch.randn(3, 5, dim)
    latents = head.latent_norm(head.latents)
    query = (head.token_norm(hidden) @ head.to_query.weight.T).view(3, 5, heads, width)
    key, value = (latents @ head.to_key_value.weight.T).view(8, 2, heads, width).unbind(1)
    weights = torch.einsum("bthd,lhd->bhtl", query, key).div(width**0.5).softmax(dim=-1)
    attended = torch.einsum("bhtl,lhd->bthd", weights, value).flatten(2) @ head.to_out.weight.T + hidden
    up = functional.linear(head.norm(attended), head.up.weight, head.up.bias)
    gated = up[..., :48] * functional.gelu(up[..., 48:])
    expected = attended + functional.linear(gated, head.down.weight, head.down.bias)
    torch.testing.assert_close(head(hidden), expected, atol=1e-5, rtol=1e-5)
    for part in (head.to_out.weight, head.down.weight, head.down.bias):
        part.zero_()
    torch.testing.assert_close(head(hidden), hidden)  # then the embedding is the plain mean


@torch.no_grad()
def test_latent_pooling_is_the_mean_of_what_it_gives():
    network = llava_network(pooling="latent", bidirectional=True)
    ids, mask, pixels = mixed(network)
    embeddings = network(ids, mask, None, pixels)
    assert embeddings.shape == (2, 64)
    torch.testing.assert_close(embeddings[1:], network(ids[1:, :3]), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "vision-text-dual-encoder"])
def test_score_fusion_adds(kind):
    pooling = "own" if kind == "clip" else "mean"
    network = ScoreFusion(dual_model(kind), PREPROCESSING, pooling=pooling, normalize=False).eval()
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    pooled = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    pixels, rows = pictures(2), torch.tensor([1, 2])
    found = network(ids, mask, pooled, pixels, rows)
    words, seen = network(ids, mask), network.pictures(pixels)
    torch.testing.assert_close(found[0], words[0])
    torch.testing.assert_close(found[1], words[1] + seen[0])
    torch.testing.assert_close(found[2], seen[1])
    network.normalize = True
    assert torch.allclose(network(ids, mask, pooled, pixels, rows).norm(dim=1), torch.ones(3))


def test_the_preprocessing_is_not_part_of_the_weights():
    assert not any("normalize" in name for name in llava_network().state_dict())
    assert Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).size == 8
