"""Writes a trained dual encoder as a folder that transformers and sentence-transformers open directly.

save_dual_encoder(network, TextEncoder(config), Path("model"))        # then: SentenceTransformer("model")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydr.encoders.text import TextEncoder
from raydr.errors import ConfigError

if TYPE_CHECKING:
    from raydr.models.dual_encoder import DualEncoder

_ST = "sentence_transformers.models."
_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def save_dual_encoder(network: DualEncoder, encoder: TextEncoder, folder: Path) -> None:
    """Weights (safetensors), tokenizer, pooling, normalisation, lengths and prompts; `folder` exists and is empty.

    sentence-transformers knows one maximum length: the longer one of queries and passages is written.
    """
    save_transformer(network.transformer, encoder.checkpoint.path, folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": _ST + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": _ST + "Pooling"},
    ]
    if encoder.normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": _ST + "Normalize"})
        (folder / "2_Normalize").mkdir()
    pooling = {flag: name == encoder.pooling for name, flag in _POOLING_FLAGS.items()}
    (folder / "1_Pooling").mkdir()
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling/config.json", {"word_embedding_dimension": encoder.checkpoint.hidden_size, **pooling})
    longest = max(encoder.max_query_tokens, encoder.max_passage_tokens)
    settings = {"max_seq_length": longest, "do_lower_case": encoder.checkpoint.lowercase}
    _write(folder / "sentence_bert_config.json", settings)
    prompts = {"query": encoder.query_prompt, "document": encoder.passage_prompt}
    _write(folder / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "dot"})


def save_transformer(transformer: Any, source: Path, folder: Path) -> None:
    """A transformers model and the tokenizer of the checkpoint `source` that it started from."""
    from transformers import AutoTokenizer

    if not hasattr(transformer, "save_pretrained"):
        raise ConfigError(f"{type(transformer).__name__} is no transformers model, which export needs")
    transformer.save_pretrained(folder, safe_serialization=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    tokenizer.save_pretrained(folder)


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
