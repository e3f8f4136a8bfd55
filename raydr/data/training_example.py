"""A training example in the one form that all trainers' formats are read into and written from.

TrainingExample("which pet catches mice", positives=(TrainingPassage("The cat ..."),))
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple


class TrainingPassage(NamedTuple):
    """A passage of an example; `score` is a teacher's (or a first ranker's), larger is better."""

    text: str
    title: str = ""
    passage_id: str | None = None
    score: float | None = None

    @property
    def full_text(self) -> str:
        """Title and text joined by a space, for formats without titles."""
        return f"{self.title} {self.text}".strip() if self.title else self.text

    @property
    def some_id(self) -> str:
        """The id, or one made from the content where a format needs one: the same passage always gets the same."""
        return self.passage_id if self.passage_id is not None else content_id(self.full_text)


@dataclass(frozen=True)
class TrainingExample:
    """A query with its passages."""

    query: str
    query_id: str | None = None
    positives: tuple[TrainingPassage, ...] = ()
    negatives: tuple[TrainingPassage, ...] = ()
    candidates: tuple[TrainingPassage, ...] = ()
    """A ranked list nobody has judged: positives and negatives are not known."""
    prompt: str | None = None
    answers: tuple[str, ...] = ()
    label: float | None = None
    """A number for the whole row, such as the margin between positive and negative."""
    unread: tuple[str, ...] = ()
    """Fields of the source that hold something this form has no place for (images, for instance)."""

    @property
    def labelled(self) -> tuple[TrainingPassage, ...]:
        return self.positives + self.negatives

    @property
    def some_query_id(self) -> str:
        return self.query_id if self.query_id is not None else content_id(self.query)

    def features(self) -> set[str]:
        """What this example has beyond texts: a format that does not keep one of these loses something."""
        passages = self.labelled + self.candidates
        present = {
            "query ids": self.query_id is not None,
            "passage ids": any(passage.passage_id is not None for passage in passages),
            "titles (joined into the text)": any(passage.title for passage in passages),
            "scores": any(passage.score is not None for passage in passages),
            "several positives in one record": len(self.positives) > 1,
            "which passages are positive": bool(self.labelled),
            "prompts": self.prompt is not None,
            "answers": bool(self.answers),
            "labels": self.label is not None,
        }
        return {name for name, there in present.items() if there} | {f"field {name!r}" for name in self.unread}


def content_id(text: str) -> str:
    """A stable id for a text that has none (16 hexadecimal digits of its SHA-256)."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
