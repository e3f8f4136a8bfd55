"""The prompt of a listwise reranker: lettered passages, and a check that the tokenizer can tell the letters apart.

A window of passages becomes one chat turn: the query, a line `[A] text` per passage, the request for an order. The
answer starts with `[`, so a prompt that ends in that one token is followed by the letter of the best passage.

Notable: everything the scores rest on is found out from the tokenizer itself at the start, in the place where it will
stand: which token the bracket is, which token each letter is, what stands between two letters. Prompt, bracket and
letter are put together as token ids, so that a tokenizer which would merge `[A` (Qwen's, Llama 3's) gives each letter a
token of its own all the same. One that makes two letters one token, or a letter several, is refused with what it does.
Foreign identifiers in texts are rewritten, `[B]` to `(B)`, and special tokens and the chat template's own marks taken
out, also where other characters stand for them, so that no passage can vote for another or end the user's turn; what it
says in plain words stays (docs/security.md). The prompt always fits: passages are cut to equal token budgets, on token
boundaries, for as long as it does not.

    prompt = ListwisePrompt(tokenizer, PromptConfig(), max_tokens=4096)
    prompt.encode("who hunts mice", ["A cat.", "A dog."])          # token ids, the last of them the bracket
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from raydr.config import Config, read_yaml
from raydr.errors import ConfigError

if TYPE_CHECKING:
    from raydr.llm.pictures import PictureReader

IDENTIFIERS = string.ascii_uppercase + string.ascii_lowercase
"""Letters of a window's passages in order: A to Z, and a to z where a window holds more than 26."""
_FOREIGN = re.compile(r"\[\s*([A-Za-z0-9]{1,3})\s*\]")
_MARKS = re.compile(r"<\|?/?\w+\|?>|\[/?[A-Z_]{2,}\]")
"""What chat templates write between turns: <|user|>, <start_of_turn>, [INST]; not all of it are special tokens."""
_NOT_PLAIN = re.compile(r"[^\t\n\r -~]+")
_UNSEEN = {"Mn", "Cf", "Cc"}
"""Kinds of characters that normalisers drop: marks on letters, zero-width ones, control characters."""


class PromptConfig(Config):
    """The wording, and how much of a passage is read. A checkpoint wants the wording it was trained with."""

    template: str | None = None
    """YAML file of a wording in rank_llm's form (`system_message`, `prefix`, `body`, `suffix`), for checkpoints trained
    with it; its fields take the place of those below."""
    system: str = "You rank passages by how relevant they are to a query."
    """System message; where the chat template has no such role it opens the user's turn."""
    prefix: str = "{num} passages follow, each marked by a letter in square brackets. The query is: {query}\n\n"
    """Stands before the passages. `{num}`: their number; `{query}`."""
    body: str = "[{rank}] {candidate}\n"
    """One passage. `{rank}`: its letter; `{candidate}`: title and text; `{query}` and `{num}` as above."""
    suffix: str = (
        "\nThe query is: {query}\nOrder all {num} passages by their relevance to it, the most relevant first. Answer "
        "with the letters only, like this: [B] > [A]"
    )
    """Stands behind the passages."""
    title_separator: str = ". "
    """Stands between title and text of a passage that has a title."""
    max_passage_words: int = Field(default=300, ge=1)
    """Words read of a passage (FIRST, released code)."""
    max_query_words: int = Field(default=100, ge=1)
    """Words read of a query."""

    @field_validator("body")
    @classmethod
    def _body_names_its_parts(cls, body: str) -> str:
        if "[{rank}]" not in body or "{candidate}" not in body:
            raise ValueError("must hold [{rank}] and {candidate}")
        return body

    def wording(self) -> PromptConfig:
        """This config with the template's fields in it. Raises `ConfigError` for a file that lacks some."""
        if self.template is None:
            return self
        path = Path(self.template)
        read = read_yaml(path)
        missing = [
            name for name in ("system_message", "prefix", "body", "suffix") if not isinstance(read.get(name), str)
        ]
        if missing:
            raise ConfigError(f"{path}: no field {', '.join(missing)}; rank_llm's templates have all four")
        fields = {"system": read["system_message"], **{name: read[name] for name in ("prefix", "body", "suffix")}}
        return self.model_copy(update={**fields, "template": None})


class ListwisePrompt:
    """Windows to token ids, and the token ids that an answer is made of."""

    def __init__(self, tokenizer: Any, config: PromptConfig, *, max_tokens: int, num_identifiers: int) -> None:
        if not 1 <= num_identifiers <= len(IDENTIFIERS):
            raise ConfigError(f"a window holds 1 to {len(IDENTIFIERS)} passages, not {num_identifiers}: one per letter")
        self._tokenizer = tokenizer
        self._config = config.wording()
        self._chat = Chat(tokenizer, self._config.system)
        self._max_tokens = max_tokens
        self._read_contract(num_identifiers)

    def _read_contract(self, num_identifiers: int) -> None:
        """Which tokens an answer is made of, read off answers in their place behind a prompt."""
        name, letters = self._tokenizer.name_or_path, IDENTIFIERS[:num_identifiers]
        prompt = self._render("a query", ["a passage", "another"])
        start = self._ids(prompt)
        opened = self._ids(prompt + "[")
        self.bracket: int = opened[-1] if opened[:-1] == start else self._alone("[")
        found, merged = [], {}
        for place, letter in enumerate(letters):
            ids = self._ids(f"{prompt}[{letter}")
            found.append(ids[-1] if ids[:-1] == [*start, self.bracket] else self._alone(letter))
            if ids[:-1] == start:
                merged[ids[-1]] = place
        if len(set(found)) < len(found):
            first = next(n for n, token in enumerate(found) if token in found[:n])
            twin = letters[found.index(found[first])]
            raise ConfigError(
                f"{name}: {twin!r} and {letters[first]!r} are the same token, so a window can hold {first} passages at "
                f"most here, not {num_identifiers}"
            )
        self.letters: list[int] = found
        self._place_of = {**merged, **{token: place for place, token in enumerate(found)}}
        # Of the four letters of this answer the first may be merged with its bracket.
        answer = self._ids(f"{prompt}[{letters[0]}] > " + " > ".join(f"[{letters[n]}]" for n in (-1, 0, -1)))
        places = [n for n, token in enumerate(answer) if n >= len(start) and token in (found[0], found[-1])][-3:]
        if len(places) != 3 or answer[places[0] + 1 : places[1]] != answer[places[1] + 1 : places[2]]:
            pieces = self._tokenizer.convert_ids_to_tokens(answer[len(start) :])
            raise ConfigError(f"{name}: letters of an answer are not tokens of their own: {pieces}")
        self.separator: list[int] = answer[places[0] + 1 : places[1]]
        """What stands between two letters of an answer."""
        self.closing: list[int] = answer[places[2] + 1 :]
        """What stands behind the last letter."""

    def _alone(self, text: str) -> int:
        """The token of a bracket or letter that is merged with what stands before it, where nothing does."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = self._tokenizer.convert_ids_to_tokens(ids)
            raise ConfigError(f"{self._tokenizer.name_or_path}: {text!r} must be one token of its own; it is {pieces}")
        return ids[0]

    def encode(self, query: str, passages: Sequence[str], *, reserve: int = 1) -> list[int]:
        """Token ids of the window's prompt, the bracket the last; leaves `reserve` tokens of the limit free.

        Raises `ConfigError` when even empty passages do not fit.
        """
        if len(passages) > len(self.letters):
            raise ConfigError(f"{len(passages)} passages for {len(self.letters)} identifiers")
        query = self._chat.clean(query, self._config.max_query_words)
        # It stands in the prompt twice, and leaves half of it to the passages.
        query = self._chat.cut(query, max(1, self._max_tokens // 8))
        texts = [self._chat.clean(text, self._config.max_passage_words) for text in passages]
        budget = self._max_tokens - reserve - 1
        cap: int | None = None
        while True:
            ids = self._ids(self._render(query, texts))
            overflow = len(ids) - budget
            if overflow <= 0:
                return [*ids, self.bracket]
            if cap == 0:
                raise ConfigError(
                    f"the prompt for {len(passages)} passages needs {len(ids)} tokens without any text of theirs, and "
                    f"the model reads {self._max_tokens}; take a smaller window_size"
                )
            lengths = [self._chat.num_tokens(text) for text in texts]
            longest = max(lengths, default=0)
            cap = _fitting(lengths, overflow, longest if cap is None else min(cap, longest))
            texts = [self._chat.cut(text, cap) for text in texts]

    def answer(self, order: Sequence[int]) -> list[int]:
        """Token ids of the answer that puts the passages at places `order` in this order, behind the bracket."""
        ids: list[int] = []
        for place in order:
            ids += [*(self.separator if ids else []), self.letters[place]]
        return [*ids, *self.closing]

    def places(self, answer: Sequence[int], num_passages: int) -> list[int]:
        """The order that generated tokens mean: always all places, those not named behind the others as they came."""
        found = (self._place_of.get(token, num_passages) for token in answer)
        named = dict.fromkeys(place for place in found if place < num_passages)
        return [*named, *(place for place in range(num_passages) if place not in named)]

    def _render(self, query: str, passages: Sequence[str]) -> str:
        config, known = self._config, {"num": str(len(passages)), "query": query}
        lines = [
            filled(config.body, known | {"rank": IDENTIFIERS[place], "candidate": " ".join(text.split())})
            for place, text in enumerate(passages)
        ]
        return self._chat.render("".join([filled(config.prefix, known), *lines, filled(config.suffix, known)]))

    def _ids(self, text: str) -> list[int]:
        return self._chat.ids(text)


_PROBE = "Who hunts mice?"
"""Stands for what a user says where a template is looked at."""


class Chat:
    """One user's turn as the checkpoint's chat template writes it, and texts from outside made safe for it.

    With `pictures`, how the checkpoint reads these, a turn may hold them: `picture` is what stands there for one.
    """

    def __init__(self, tokenizer: Any, system: str, pictures: PictureReader | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{tokenizer.name_or_path}: raydr needs a fast tokenizer (a tokenizer.json)")
        self._tokenizer, self._system, self._pictures = tokenizer, system, pictures
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        template = str(getattr(tokenizer, "chat_template", None) or "")
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        marks = {token for token, special in added.items() if special or token in template}
        if pictures is not None:
            marks.add(pictures.placeholder)
        longest_first = sorted({*marks, *_MARKS.findall(template)} - {"", " "}, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)

    def render(self, user: str) -> str:
        """The turn, up to where the answer starts."""
        if not self._has_template:
            return f"{self._system}\n\n{user}\n\n"
        return self._applied(user, in_parts=self._wants_parts)

    def _applied(self, user: str, *, in_parts: bool) -> str:
        def said(text: str) -> Any:
            return [{"type": "text", "text": text}] if in_parts else text

        try:
            return self._template(
                [{"role": "system", "content": said(self._system)}, {"role": "user", "content": said(user)}]
            )
        except Exception:  # noqa: BLE001 (templates raise what they like for a role they do not have)
            return self._template([{"role": "user", "content": said(f"{self._system}\n {user}")}])

    def _template(self, messages: list[dict[str, Any]]) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template writes a turn only where it comes as a list of parts: LLaVA's leave a text out."""
        try:
            return _PROBE not in self._applied(_PROBE, in_parts=False)
        except Exception:  # noqa: BLE001 (likewise)
            return True

    @cached_property
    def picture(self) -> str:
        """What stands in a turn for a picture: what the template writes for one that comes before a text."""
        if self._pictures is None:
            raise ConfigError(f"{self._tokenizer.name_or_path}: a model of text has no place for a picture")
        plain = f"{self._pictures.placeholder}\n"
        text = {"type": "text", "text": _PROBE}
        try:
            without = self._template([{"role": "user", "content": [text]}])
            with_one = self._template([{"role": "user", "content": [{"type": "image"}, text]}])
        except Exception:  # noqa: BLE001 (likewise: no template, or one that knows texts alone)
            return plain
        written = with_one[max(0, without.find(_PROBE)) : max(0, with_one.find(_PROBE))]
        return written if written.count(self._pictures.placeholder) == 1 else plain

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered turn, without the special tokens a tokenizer adds around a text: the template has
        written its own.
        """
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if ids[: len(self._start)] == self._start else [*self._start, *ids]

    @cached_property
    def _start(self) -> list[int]:
        """The token that begins a prompt whose template has not written it."""
        bos = self._tokenizer.bos_token_id
        if bos is None:
            return []
        # Templates of multimodal checkpoints leave it to the processor, which adds what the tokenizer does.
        left_out = self._pictures is not None and self._tokenizer("", verbose=False)["input_ids"][:1] == [bos]
        return [bos] if left_out or not self._has_template else []

    def clean(self, text: str, max_words: int) -> str:
        """A text from outside: without special tokens, foreign identifiers and excessive length."""
        text = _first_words(text, 2 * max_words)  # marks and identifiers are some of them
        return _first_words(neutralized(_replaced(self._marks, " ", text)), max_words)

    def num_tokens(self, text: str) -> int:
        return len(self._spans(text))

    def cut(self, text: str, num_tokens: int) -> str:
        """The text of its first `num_tokens` tokens."""
        spans = self._spans(text)
        if len(spans) <= num_tokens:
            return text
        return text[: spans[num_tokens - 1][1]] if num_tokens else ""

    def _spans(self, text: str) -> list[tuple[int, int]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["offset_mapping"]


def filled(wording: str, values: dict[str, str]) -> str:
    """Each `{name}` of the wording replaced, once: what texts from outside hold in braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), wording)


def neutralized(text: str) -> str:
    """`text` without anything that reads like an identifier: [B] becomes (B)."""
    return _replaced(_FOREIGN, r"(\1)", text)


def _replaced(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """`pattern.sub`, which also finds what a tokenizer's normaliser would make of other characters: [B] of a full-width
    bracket, of a letter with an accent, of one with a zero-width space beside it.
    """
    if not pattern.search(_NOT_PLAIN.sub(_seen, unicodedata.normalize("NFKD", text))):
        return text
    parts = [(part, place) for place, char in enumerate(text) for part in unicodedata.normalize("NFKD", char)]
    seen = [(part, place) for part, place in parts if not _NOT_PLAIN.match(part) or _is_seen(part)]
    pieces, last = [], 0
    for found in pattern.finditer("".join(part for part, _ in seen)):
        start, end = seen[found.start()][1], seen[found.end() - 1][1] + 1
        pieces += [text[last:start], found.expand(replacement)]
        last = max(last, end)
    return "".join([*pieces, text[last:]])


@cache
def _is_seen(char: str) -> bool:
    return unicodedata.category(char) not in _UNSEEN


def _seen(found: re.Match[str]) -> str:
    return "".join(filter(_is_seen, found[0]))


def _first_words(text: str, number: int) -> str:
    return " ".join(text.split(maxsplit=number)[:number])


def _fitting(lengths: list[int], overflow: int, cap: int) -> int:
    """The largest number of tokens per passage, below `cap`, that saves `overflow` tokens; 0 if none does."""
    for smaller in range(cap - 1, 0, -1):
        if sum(max(0, length - smaller) for length in lengths) >= overflow:
            return smaller
    return 0
