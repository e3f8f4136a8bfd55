"""A small causal language model out of a pretrained encoder: a reranker that a laptop can train and vLLM can serve.

A layer of BERT and one of OPT with the norm behind the block (opt-350m's kind) are the same but for the mask, so the
encoder's weights become a decoder's as they stand: attention, feed-forward and norms exactly, and a head that writes
with the encoder's own word embeddings. Notable: BERT normalises the sum of word and position embeddings and OPT does
not, so each table is scaled by itself to what it contributes on average; positions beyond the encoder's repeat. Two
layers more come on top, meant for comparing passages: each token looks there at those like it. What comes out has never
seen a causal mask: it is a start for training, not a language model.

    causal_from_encoder("minilm", Path("small"))           # then: AutoModelForCausalLM.from_pretrained("small")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydr.artifacts import fingerprint, is_finished, open_artifact, write_artifact
from raydr.encoders.checkpoint import load_transformer, locate, open_checkpoint
from raydr.errors import ConfigError

KIND = "model"
MODEL = "model"
MAX_POSITIONS = 2048
EXTRA_LAYERS = 2
_OWN_SCORE = 12.0


def small_causal_lm(model: str, out: Path) -> Path:
    """The folder of the language model made of `model`, in the artifact `out` (kind "model"); a finished one stays."""
    settings = {
        "encoder": open_checkpoint(model).fingerprint(),
        "max_positions": MAX_POSITIONS,
        "extra_layers": EXTRA_LAYERS,
    }
    if not is_finished(out, fingerprint(KIND, settings, {})):
        with write_artifact(out, kind=KIND, config=settings) as writer:
            folder = writer.path / MODEL
            folder.mkdir()
            causal_from_encoder(model, folder)
    return open_artifact(out, kind=KIND).path / MODEL


def causal_from_encoder(
    model: str, folder: Path, *, max_positions: int = MAX_POSITIONS, extra_layers: int = EXTRA_LAYERS
) -> None:
    """Writes the checkpoint and its tokenizer into `folder`, which exists and is empty.

    `extra_layers` come on top, and let through what they are given until training changes them.

    Raises `ConfigError` for an encoder that is not a BERT with absolute positions.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer, OPTConfig, OPTForCausalLM

    path = locate(model)
    encoder: Any = load_transformer(AutoModel, path, dtype=torch.float32)
    bert = encoder.config
    if bert.model_type != "bert" or bert.hidden_act != "gelu":
        raise ConfigError(f"{path}: a {bert.model_type} encoder; only BERT's layers (with gelu) become a decoder's")
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    decoder: Any = OPTForCausalLM(
        OPTConfig(
            vocab_size=bert.vocab_size,
            hidden_size=bert.hidden_size,
            word_embed_proj_dim=bert.hidden_size,
            ffn_dim=bert.intermediate_size,
            num_hidden_layers=bert.num_hidden_layers + extra_layers,
            num_attention_heads=bert.num_attention_heads,
            max_position_embeddings=max_positions,
            activation_function="gelu",
            do_layer_norm_before=False,
            dropout=0.0,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        words, positions = _embeddings(encoder.embeddings)
        body = decoder.model.decoder
        body.embed_tokens.weight.copy_(words)
        rows = torch.arange(max_positions)
        last = len(positions) - 1
        rows = torch.where(rows <= last, rows, 1 + (rows - 1) % last)  # position 0 is [CLS]'s and comes once
        body.embed_positions.weight[body.embed_positions.offset :].copy_(positions[rows])
        decoder.lm_head.weight.copy_(encoder.embeddings.word_embeddings.weight)
    for own, theirs in zip(body.layers, encoder.encoder.layer, strict=False):
        attention = theirs.attention
        for part, source in {
            own.self_attn.q_proj: attention.self.query,
            own.self_attn.k_proj: attention.self.key,
            own.self_attn.v_proj: attention.self.value,
            own.self_attn.out_proj: attention.output.dense,
            own.self_attn_layer_norm: attention.output.LayerNorm,
            own.fc1: theirs.intermediate.dense,
            own.fc2: theirs.output.dense,
            own.final_layer_norm: theirs.output.LayerNorm,
        }.items():
            part.load_state_dict(source.state_dict())
    for layer in body.layers[bert.num_hidden_layers :]:
        _match(layer, encoder.encoder.layer[-1].output.LayerNorm)
    decoder.save_pretrained(folder, safe_serialization=True)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.model_max_length = max_positions
    tokenizer.save_pretrained(folder)


def _match(layer: Any, norm: Any) -> None:
    """Makes a layer look from each token at those like it, and add nothing yet to what leaves `norm`."""
    import torch

    attention = layer.self_attn
    with torch.no_grad():
        for part in (attention.out_proj, layer.fc2):
            part.weight.zero_()
            part.bias.zero_()
        spread = (norm.weight.pow(2).mean() + norm.bias.var()).sqrt()
        for own in (layer.self_attn_layer_norm, layer.final_layer_norm):
            own.weight.fill_(spread)
        # A token's score with itself: what softmax makes of 12 and of a fraction of it is a choice, not an average.
        scale = (_OWN_SCORE / attention.head_dim**0.5) ** 0.5 / spread
        for part in (attention.q_proj, attention.k_proj):
            part.weight.copy_(scale * torch.eye(len(part.weight)))
            part.bias.zero_()


def _embeddings(bert: Any) -> tuple[Any, Any]:
    """Word and position tables whose sum is near to BERT's normalised sum.

    BERT computes (x - mean(x)) / deviation(x) * gain + bias of x = word + position + type; with the deviation of an
    average x in the place of each one's own, the sum splits into a table of words and one of positions.
    """
    words = bert.word_embeddings.weight + bert.token_type_embeddings.weight[0]
    positions = bert.position_embeddings.weight
    words = words - words.mean(dim=1, keepdim=True)
    positions = positions - positions.mean(dim=1, keepdim=True)
    deviation = (words.pow(2).mean(dim=1).mean() + positions.pow(2).mean(dim=1).mean()).sqrt()
    gain, bias = bert.LayerNorm.weight, bert.LayerNorm.bias
    return words / deviation * gain + bias, positions / deviation * gain
