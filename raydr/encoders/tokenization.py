"""Texts to token ids, with a cost that does not grow with what lies beyond the limit.

Notable: a text far longer than the model reads is cut to a bounded prefix before it is tokenised, and the result is
still exactly that of the whole text. That holds because the cut falls where a space follows a non-space, only tokens
that end before the last space of the prefix are counted, and enough of them must have come out; otherwise the prefix
doubles, up to the whole text. Tokenizers whose pieces could depend on distant text are given the whole text always.

    BoundedTokenizer(tokenizer.backend_tokenizer, max_tokens=256).encode(["one text", "another"])
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from raydr.errors import ConfigError

_CHARACTERS_PER_TOKEN = 8
"""First guess of a sufficient prefix; English has between 4 and 5."""
_BOUNDARY = re.compile(r"\S(?= )")
_GPT_SPLIT_END = r"\s+(?!\S)|\s+"
_SPACE_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}


def load_tokenizer(path: Path, *, lowercase: bool = False) -> tuple[Tokenizer, int]:
    """The fast tokenizer of a checkpoint, and the id to pad with. Raises `ConfigError` when it has none."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Normalizers
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises what the files make it stumble over
        raise ConfigError(f"{path}: cannot load the tokenizer: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{path}: {type(tokenizer).__name__} has no fast (Rust) form; save one as tokenizer.json")
    backend: Tokenizer = tokenizer.backend_tokenizer
    if tokenizer.truncation_side == "left":
        raise ConfigError(f"{path}: the tokenizer truncates on the left; raydr keeps the beginning of a text")
    if lowercase:
        backend.normalizer = Normalizers([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
    return backend, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


class BoundedTokenizer:
    """Tokenises batches of texts to at most `max_tokens` ids each, special tokens included."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, *, characters_per_token: int = _CHARACTERS_PER_TOKEN):
        num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_tokens <= num_special:
            raise ConfigError(f"a maximum of {max_tokens} tokens leaves no room beside {num_special} special tokens")
        self.max_tokens = max_tokens
        self._prefix_characters = max(1, max_tokens * characters_per_token)
        self._is_local = is_local(json.loads(tokenizer.to_str()))
        # Own copies, because truncation is a state of the tokenizer and threads may share the original.
        self._whole = Tokenizer.from_str(tokenizer.to_str())
        self._whole.no_truncation()
        self._whole.no_padding()
        self._truncating = Tokenizer.from_str(self._whole.to_str())
        self._truncating.enable_truncation(max_tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, exactly as if the whole text had been tokenised and then truncated."""
        bounded = self._bound(list(texts)) if self._is_local else texts
        return [encoding.ids for encoding in self._truncating.encode_batch_fast(bounded)]

    def _bound(self, texts: list[str]) -> list[str]:
        """`texts` with the far too long ones replaced by prefixes that give the same tokens."""
        limit = self._prefix_characters
        pending = [i for i, text in enumerate(texts) if len(text) > limit]
        whole = {i: texts[i] for i in pending}
        while pending:
            cuts = {i: _last_boundary(whole[i], limit) for i in pending}
            prefixes = {i: whole[i][:cut] for i, cut in cuts.items() if cut}
            encodings = self._whole.encode_batch(list(prefixes.values()), add_special_tokens=False)
            for (i, prefix), encoding in zip(prefixes.items(), encodings, strict=True):
                stable_until = prefix.rfind(" ")
                if sum(end <= stable_until for _, end in encoding.offsets) >= self.max_tokens:
                    texts[i] = prefix
                    pending.remove(i)
            limit *= 2
            pending = [i for i in pending if len(whole[i]) > limit]
        return texts


def _last_boundary(text: str, limit: int) -> int:
    """The largest cut in the second half of `text[:limit]` where a space follows a non-space; 0 where there is none."""
    ends = [match.end() for match in _BOUNDARY.finditer(text, limit // 2, limit)]
    return ends[-1] if ends else 0


def is_local(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer (its tokenizer.json) cuts texts into words at spaces before it looks for tokens, so that no
    token depends on words further on. False means "not known to", which costs speed only.
    """
    added = (token["content"].strip(" ") for token in spec.get("added_tokens", ()))
    return not any(" " in content for content in added) and _splits_at_spaces(spec.get("pre_tokenizer"))


def _splits_at_spaces(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    kind = pre_tokenizer["type"]
    if kind == "Sequence":  # later members only split further
        return _splits_at_spaces(pre_tokenizer["pretokenizers"][0])
    if kind == "Split":
        pattern = pre_tokenizer["pattern"].get("Regex", "")
        return pattern.endswith(_GPT_SPLIT_END) and not re.search(r"\(\?[=!<]", pattern.removesuffix(_GPT_SPLIT_END))
    return (
        kind in _SPACE_SPLITTERS
        or (kind == "Metaspace" and pre_tokenizer.get("split", True))
        or (kind == "ByteLevel" and pre_tokenizer.get("use_regex", True))
    )
