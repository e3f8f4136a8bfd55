"""Named entities in texts: the labels of a tagger, BIO tags to stretches of text and back, and F1 per entity.

Notable: everything is by character offsets in the original string, so nothing depends on how a text is cut into words;
a text in which only some kinds of entity were marked says nothing about the others, and is taken so, in training and in
measuring. F1 is seqeval's and conlleval's: an entity counts when its kind and both its ends are right.

    text, offsets = joined(["in", "Liverpool", "."])                    # "in Liverpool."
    entities_of(["O", "B-LOC", "O"], offsets)                           # [Entity(3, 12, "LOC")]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from raydr.types import Annotation, Entity

KINDS = ("PER", "ORG", "LOC", "MISC")
"""What a tagger that is trained here finds."""
LABELS = ("O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI"))
"""Its labels, in the order of the network's outputs: the nine of CoNLL 2003."""
_NO_SPACE_BEFORE = frozenset({".", ",", ";", ":", "!", "?", ")", "]", "}", "%", "'s", "n't", "'re", "'ve", "'ll", "'m"})
_NO_SPACE_AFTER = frozenset({"(", "[", "{", "£", "$"})


def joined(tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Tokens as the text they were cut from may have looked, and where each stands in it.

    Punctuation stands at its word, as in the texts that a tagger will meet.
    """
    parts: list[str] = []
    offsets: list[tuple[int, int]] = []
    position, glued = 0, True
    for token in tokens:
        if not glued and token not in _NO_SPACE_BEFORE:
            parts.append(" ")
            position += 1
        parts.append(token)
        offsets.append((position, position + len(token)))
        position += len(token)
        glued = token in _NO_SPACE_AFTER
    return "".join(parts), offsets


def entities_of(tags: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[Entity]:
    """The entities that BIO tags mark, as stretches of the text.

    An I- that continues nothing of its kind begins an entity, as in conlleval.
    """
    found: list[Entity] = []
    kind = ""
    for tag, (start, end) in zip(tags, offsets, strict=True):
        prefix, _, own = tag.partition("-")
        if prefix == "I" and own == kind:
            found[-1] = found[-1]._replace(end=end)
        elif own:
            found.append(Entity(start, end, own))
        kind = own
    return found


def allowed_labels(words: Sequence[tuple[int, int]], annotation: Annotation) -> list[int]:
    """For each word (its start and end in the text) the labels of `LABELS` that it may have, as bits of a number.

    What lies in a marked entity has one; what does not is outside, or in an entity of a kind that was not looked for.
    """
    outside = 1
    for kind in set(KINDS) - set(annotation.labels):
        outside |= _bit(f"B-{kind}") | _bit(f"I-{kind}")
    entities = sorted(annotation.entities)
    allowed, place = [], 0
    for start, end in words:
        while place < len(entities) and entities[place].end <= start:
            place += 1
        if place == len(entities) or entities[place].start >= end:
            allowed.append(outside)
        else:
            entity = entities[place]
            allowed.append(_bit(f"{'B' if start <= entity.start else 'I'}-{entity.label}"))
    return allowed


def _bit(label: str) -> int:
    return 1 << LABELS.index(label)


class Score(NamedTuple):
    """How well entities are found; shares from 0 to 1."""

    precision: float
    recall: float
    f1: float
    num_entities: int
    """Entities that are there."""


def entity_scores(
    gold: Sequence[Iterable[Entity]], found: Sequence[Iterable[Entity]], labels: Sequence[str] = KINDS
) -> dict[str, Score]:
    """Precision, recall and F1 of each of the `labels`, and of all of them together (`all`, the micro average).

    `gold` and `found` hold the entities of each text; those with other labels are not counted on either side.
    """
    right, there, claimed = Counter[str](), Counter[str](), Counter[str]()
    for own, other in zip(gold, found, strict=True):
        marked, given = ({entity for entity in side if entity.label in labels} for side in (own, other))
        there.update(entity.label for entity in marked)
        claimed.update(entity.label for entity in given)
        right.update(entity.label for entity in marked & given)
    scores = {label: _score(right[label], claimed[label], there[label]) for label in labels}
    scores["all"] = _score(right.total(), claimed.total(), there.total())
    return scores


def _score(right: int, claimed: int, there: int) -> Score:
    f1 = 2 * right / (claimed + there) if claimed + there else 0.0
    return Score(right / claimed if claimed else 0.0, right / there if there else 0.0, f1, there)


def on_tokens(entities: Iterable[Entity], offsets: Sequence[tuple[int, int]]) -> list[Entity]:
    """Entities with their ends moved out to those of the tokens they touch, so that they compare with tags of these."""
    moved = []
    for entity in entities:
        touched = [(start, end) for start, end in offsets if start < entity.end and end > entity.start]
        if touched:
            moved.append(Entity(touched[0][0], touched[-1][1], entity.label))
    return moved
