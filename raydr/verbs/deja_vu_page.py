"""What `raydr deja-vu` leaves to be read: a table for a spreadsheet, and a page of then-and-now pairs.

Notable: both are safe to open whatever stands in the articles. The page is one file without a script or anything from
elsewhere, and its own policy forbids both; in the table, a cell that a spreadsheet would take for a formula begins with
an apostrophe. The names that were masked are marked where they stand, with their kind.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from raydr.data.articles import Article
from raydr.encoders.masking import Masked
from raydr.version import __version__

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_SHOWN = 900
"""Characters of an article that are seen at once; the rest opens at a click."""
_ON_PAGE = 200
_KINDS = {"PER": "person", "ORG": "organisation", "LOC": "place", "MISC": "other name"}

_STYLE = """
:root { --paper: #fff; --text: #1f2933; --soft: #5f6b78; --line: #d9dee4; --shade: #f5f7f9; --mark: #e3e8ee; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --text: #e4e8ec; --soft: #9aa5b1; --line: #39424d; --shade: #1c2229; --mark: #39424d; }
}
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 75rem; background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 0; } h3 { font-size: 1rem; margin: 0; }
.soft, footer { color: var(--soft); }
section { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1.5rem; padding: 1.5rem 0;
  border-top: 1px solid var(--line); margin-top: 1.5rem; }
@media (max-width: 50rem) { section { grid-template-columns: minmax(0, 1fr); } }
.now { position: sticky; top: 1rem; align-self: start; }
@media (max-width: 50rem) { .now { position: static; } }
article { background: var(--shade); border-radius: .5rem; padding: .8rem 1rem; margin-bottom: .8rem; }
p { margin: .4rem 0; white-space: pre-line; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: .25rem; padding: 0 .2rem; }
ol { margin: 0; padding: 0; list-style: none; } footer { margin-top: 3rem; font-size: .85rem; }
"""


class OldHit(NamedTuple):
    """An old article that was found."""

    article: Article
    similarity: float
    """Cosine of the masked texts; larger is more alike."""
    copies: int
    """How often it was printed, this copy included."""
    masked: Masked


class Found(NamedTuple):
    """One of today's articles with the old ones found for it, the most alike first."""

    query: Article
    masked: Masked
    hits: list[OldHit]


def write_table(found: Sequence[Found], file: Path) -> None:
    """A row for each pair, in UTF-8 with the mark by which spreadsheets know it."""
    header = [
        *("query_id", "query_date", "query_title", "rank", "similarity", "article_id", "date", "publication", "place"),
        *("title", "copies", "text", "masked_names", "query_masked_names"),
    ]
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for own in found:
            for rank, hit in enumerate(own.hits, start=1):
                old, now = hit.article, own.query
                row = [
                    *(now.article_id, now.date, now.title, rank, f"{hit.similarity:.4f}", old.article_id, old.date),
                    *(old.publication, old.place, old.title, hit.copies, old.text),
                    *("; ".join(_names(masked)) for masked in (hit.masked, own.masked)),
                ]
                writer.writerow([_safe(cell) if isinstance(cell, str) else cell for cell in row])


def write_page(found: Sequence[Found], file: Path, *, told: Sequence[str]) -> None:
    """The page; `told` says how it was made. Of more than two hundred articles of today it shows the first."""
    more = f" The first {_ON_PAGE} of {len(found)} are shown; the table has all." if len(found) > _ON_PAGE else ""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        "<meta name=viewport content='width=device-width, initial-scale=1'><title>Then and now</title>",
        f"<style>{_STYLE}</style></head><body><h1>Then and now</h1>",
        f"<p class=soft>{escape('; '.join(told))}.{more} Names that were left out of the comparison are ",
        "<mark>marked</mark>. Similarity is at most 1; compare it within a list, not between lists.</p>",
        *(_section(own) for own in found[:_ON_PAGE]),
        f"<footer>raydr {escape(__version__)}</footer></body></html>",
    ]
    file.write_text("\n".join(parts), encoding="utf-8")


def _section(own: Found) -> str:
    about = " · ".join(part for part in (own.query.date, own.query.publication, own.query.place) if part)
    hits = "".join(f"<li>{_hit(rank, hit)}</li>" for rank, hit in enumerate(own.hits, start=1))
    nothing = "<p class=soft>Nothing was found.</p>"
    return (
        f"<section><div class=now><h2>{escape(own.query.title or own.query.article_id)}</h2>"
        f"<p class=soft>{escape(about)}</p>{_text(own.query, own.masked)}</div><ol>{hits or nothing}</ol></section>"
    )


def _hit(rank: int, hit: OldHit) -> str:
    old = hit.article
    copies = f"printed {hit.copies} times" if hit.copies > 1 else ""
    about = " · ".join(part for part in (old.date, old.publication, old.place, copies) if part)
    return (
        f"<article><h3>{rank}. {escape(old.title or old.article_id)}</h3>"
        f"<p class=soft>{escape(about)} · similarity {hit.similarity:.3f}</p>{_text(old, hit.masked)}</article>"
    )


def _text(article: Article, masked: Masked) -> str:
    """The text below its title, with the masked names marked; a long one in two parts."""
    first = masked.text.find("\n\n") + 2 if article.title and article.text else 0
    last = len(masked.text)
    if last - first <= 1.3 * _SHOWN:
        return f"<p>{''.join(_marked(masked, first, last))}</p>"
    cut = masked.text.rfind(" ", first, first + _SHOWN)
    cut = cut if cut > first else first + _SHOWN
    cut = next((e.end for e in masked.entities if e.start < cut < e.end), cut)
    head, rest = ("".join(_marked(masked, *ends)) for ends in ((first, cut), (cut, last)))
    return f"<p>{head} …</p><details><summary class=soft>the rest</summary><p>{rest}</p></details>"


def _marked(masked: Masked, first: int, last: int) -> Iterator[str]:
    done = first
    for entity in masked.entities:
        if entity.start < first or entity.end > last:
            continue
        yield escape(masked.text[done : entity.start])
        kind = _KINDS.get(entity.label, entity.label)
        yield f'<mark title="{escape(kind)}">{escape(masked.text[entity.start : entity.end])}</mark>'
        done = entity.end
    yield escape(masked.text[done:last])


def _names(masked: Masked) -> list[str]:
    """The names that were masked, each once."""
    return list(dict.fromkeys(" ".join(masked.text[e.start : e.end].split()) for e in masked.entities))


def _safe(cell: str) -> str:
    """The cell as text: a spreadsheet runs what begins like a formula."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell
