"""deja-vu: articles of today and articles of long ago; which tell a similar story about other people and places?

Notable: two files in, a ranked table and a page to read out; what is found is told without the names it was found
without. Reprints of one article are collapsed to the copy that was read best, before anything is searched. Every step
leaves an artifact in `out`, so a second question to the same articles embeds nothing again.

    raydr deja-vu old.csv today.csv --train-tagger data/ner/topres19th/train.jsonl --out runs/deja_vu
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from raydr import runtime
from raydr.artifacts import MANIFEST, Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Component, Config
from raydr.data.articles import Article, read_articles
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.files import Folder
from raydr.data.near_duplicates import best_copies, reprint_groups
from raydr.data.ocr import clean, readable_shares
from raydr.data.tagged import TaggedSource
from raydr.encoders.factory import EncoderFactory
from raydr.encoders.precision import choose_precision
from raydr.encoders.tagger import EntityTagger, TaggerConfig
from raydr.encoders.text import available_cpus
from raydr.errors import ConfigError, DataError
from raydr.evaluation.trec import read_run
from raydr.index.config import IndexConfig
from raydr.methods.base import build_method
from raydr.runtime import Runtime
from raydr.stages.config import SearchConfig
from raydr.stages.search import RUN, search_corpus
from raydr.train.config import TrainConfig
from raydr.train.tagging import TaggerTraining, train_tagger
from raydr.train.trainer import MODEL
from raydr.types import Query, Run
from raydr.verbs.config import RunConfig
from raydr.verbs.deja_vu_page import Found, OldHit, write_page, write_table
from raydr.verbs.embed import embed
from raydr.verbs.index import index

KIND = "articles"
_FILE = "articles.parquet"
_COLUMNS = {"article_id": "article_id", "headline": "title", "body": "text", "date": "date"}
_COLUMNS |= {name: name for name in ("publication", "place")}
"""Columns of the kept articles, and what of an `Article` they hold."""
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("passage_id", "text", *_COLUMNS)),
        ("year", pa.int64()),
        ("copies", pa.int64()),
    ]
)
METHOD = "raydr.methods.news_deja_vu:NewsDejaVu"
_NO_TAGGER = """there is no tagger yet, and it is what finds the names. Either
  train one here, from texts in which names are marked (some minutes; it stays in --out):
    raydr deja-vu OLD.csv TODAY.csv --train-tagger MARKED.jsonl [--train-tagger ANOTHER.conll ...]
  or name one that is trained: a folder, or a model of the Hugging Face hub such as
    --tagger dell-research-harvard/historical_newspaper_ner
  or search without masking names, to compare: --no-masking
docs/deja_vu.md says more"""


class DejaVuConfig(Config):
    """What is asked of `raydr deja-vu`."""

    articles: str
    """The old articles."""
    queries: str
    """The articles of today."""
    out: Path = Path("runs/deja_vu")
    """Folder of the results and of what can be used again."""
    tagger: str | None = None
    """A trained tagger: its folder, or a name on the hub."""
    train_tagger: tuple[str, ...] = ()
    """Files of marked texts to train one on."""
    tagger_steps: int = Field(default=600, ge=1)
    """How long a tagger is trained."""
    encoder: str = "minilm"
    """What compares texts: a folder, a name on the hub, or `minilm`, which is installed."""
    k: int = Field(default=10, ge=1)
    """Old articles for each of today's."""
    from_year: int | None = None
    """Only articles of this year and later; those without a date are left out."""
    to_year: int | None = None
    """Only articles of this year and earlier, likewise."""
    publication: tuple[str, ...] = ()
    """Only articles of these newspapers."""
    place: tuple[str, ...] = ()
    """Only articles from these places."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What columns are called where it is unusual: text -> NAME."""
    reprints: bool = False
    """Whether all copies of a reprinted article are kept."""
    within_days: int = Field(default=30, ge=0)
    """Copies of an article are printed within so many days."""
    masking: bool = True
    """Whether names are masked."""
    runtime: Runtime = "auto"
    """`ray` or `local`; `auto`: Ray with many articles."""

    @model_validator(mode="after")
    def _makes_sense(self) -> DejaVuConfig:
        if self.tagger and self.train_tagger:
            raise ValueError("tagger and train_tagger: name a tagger, or train one")
        if self.from_year is not None and self.to_year is not None and self.from_year > self.to_year:
            raise ValueError(f"from_year ({self.from_year}) is after to_year ({self.to_year})")
        return self


class Old(NamedTuple):
    """An old article, and how often it was printed, this copy included."""

    article: Article
    copies: int


def deja_vu(config: DejaVuConfig) -> tuple[Path, Path]:
    """Searches; the paths of the table and of the page. Raises `DataError` naming file, row and column of bad input,
    and `ConfigError` where there is nothing to find names with.
    """
    queries = read_articles(config.queries, columns=config.columns, all_columns=False, name="today's articles")
    args = _method_args(config)
    artifact = _collapsed(config)
    old = _old(artifact)
    _check_filters(config, old)
    method = Component(import_path=METHOD, args=args)
    run = RunConfig(
        out=config.out,
        runtime=config.runtime,
        data=DataConfig(path=str(artifact.path / _FILE), format="parquet"),
        method=method,
        index=IndexConfig(factory="Flat", bm25=None),  # nobody asks by words here
    )
    _say("finding names and embedding" if config.masking else "embedding")
    embed(run)
    index(run)
    corpus = Corpus.open(config.out / "corpus")
    _say(f"searching for {len(queries)} articles of today")
    result = search_corpus(
        config.out / "index",
        [Query(f"q{row}", article.whole) for row, article in enumerate(queries)],
        EncoderFactory(method),
        SearchConfig(k=config.k, filters=_filters(config)),
        config.out / "search",
        use_ray=runtime.uses_ray(config.runtime, num_passages=corpus.num_passages),
        corpus=corpus,
    )
    found = _found(queries, old, read_run(result.path / RUN), method)
    table, page = config.out / "deja_vu.csv", config.out / "deja_vu.html"
    write_table(found, table)
    write_page(found, page, told=_told(config, old))
    return table, page


def _method_args(config: DejaVuConfig) -> dict[str, Any]:
    """Arguments of the method; trains the tagger where one is asked for, and takes one that was trained here before."""
    args = {"model": config.encoder, "mask": {"clean_ocr": True}}
    if not config.masking:
        return {**args, "masking": False, "mask": {}}
    model, here = config.tagger, config.out / "tagger"
    if config.train_tagger:
        _say(f"training a tagger for {config.tagger_steps} steps; it stays in {here}")
        training = TaggerTraining(
            max_tokens=96,
            sources=tuple(TaggedSource(path=file) for file in config.train_tagger),
            train=TrainConfig(
                batch_size=32,
                max_steps=config.tagger_steps,
                learning_rate=2e-4,
                worker_cpus=available_cpus(),
                precision="bfloat16" if choose_precision("auto", "cpu") == "bfloat16" else "float32",
            ),
        )
        runtime.connect()
        model = str(train_tagger(training, here))
    elif model is None and (here / "train" / MANIFEST).is_file():
        model = str((open_artifact(here / "train", kind="model").path / MODEL).resolve())
        _say(f"names are found by the tagger in {here}")
    if model is None:
        raise ConfigError(_NO_TAGGER)
    EntityTagger(TaggerConfig(model=model))  # what is no tagger is told now, before anything is read
    return {**args, "tagger": {"model": model}}


def _collapsed(config: DejaVuConfig) -> Artifact:
    """The old articles, one copy of each, as a table that is made once of the same file and settings."""
    stamp = [file.stamp for file in Folder.open(config.articles).files()]
    settings = {
        "file": stamp,
        "columns": config.columns,
        "within_days": None if config.reprints else config.within_days,
        "layout": 1,
    }
    out = config.out / "articles"
    if is_finished(out, fingerprint(KIND, settings, {})):
        return open_artifact(out, kind=KIND)
    articles = read_articles(config.articles, columns=config.columns, name="old articles")
    texts = [clean(article.whole) for article in articles]
    groups = [[row] for row in range(len(articles))]
    if not config.reprints:
        _say("looking for reprints")
        groups = reprint_groups(texts, [article.day for article in articles], within_days=config.within_days)
    said = [article.ocr_quality for article in articles]
    quality = [own for own in said if own is not None]
    if len(quality) < len(articles):  # where the file does not say it of all, what can be seen decides
        quality = readable_shares(texts)
    kept = best_copies(groups, quality)
    if len(kept) < len(articles):
        _say(f"{len(articles)} articles, {len(articles) - len(kept)} of them reprints of others, which are left out")
    rows = [
        {
            "passage_id": f"a{row}",
            "text": articles[row].whole,
            **{column: getattr(articles[row], name) or None for column, name in _COLUMNS.items()},
            "year": articles[row].year,
            "copies": len(group),
        }
        for row, group in sorted(zip(kept, groups, strict=True))
    ]
    with write_artifact(out, kind=KIND, config=settings) as writer:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), out / _FILE)
        writer.counts |= {"articles": len(rows), "reprints": len(articles) - len(rows)}
    return open_artifact(out, kind=KIND)


def _old(artifact: Artifact) -> dict[str, Old]:
    """The kept articles by the ids they are searched by."""
    rows = pq.read_table(artifact.path / _FILE).to_pylist()
    return {
        row["passage_id"]: Old(
            Article(
                row["article_id"],
                row["body"] or "",
                row["headline"] or "",
                row["date"] or "",
                row["publication"] or "",
                row["place"] or "",
            ),
            row["copies"],
        )
        for row in rows
    }


def _check_filters(config: DejaVuConfig, old: Mapping[str, Old]) -> None:
    """Raises `DataError` where a filter can match nothing, and says what could."""
    for name, wanted in (("publication", config.publication), ("place", config.place)):
        there = sorted({getattr(own.article, name) for own in old.values()} - {""})
        for value in wanted:
            if value not in there:
                near = difflib.get_close_matches(value, there, n=3, cutoff=0.4) or there[:5]
                known = f"nearest: {', '.join(map(repr, near))}" if near else f"no article has a {name}"
                raise DataError(f"{config.articles}: no article has the {name} {value!r}; {known}")
    years = [own.article.year for own in old.values() if own.article.year is not None]
    first, last = config.from_year, config.to_year
    if (first is not None or last is not None) and not any(
        (first is None or year >= first) and (last is None or year <= last) for year in years
    ):
        known = f"they are of {min(years)} to {max(years)}" if years else "none has a date"
        raise DataError(f"{config.articles}: no article is of the years asked for; {known}")


def _filters(config: DejaVuConfig) -> dict[str, Any]:
    years = {"gte": config.from_year, "lte": config.to_year}
    asked: dict[str, Any] = {"year": {name: year for name, year in years.items() if year is not None}}
    asked |= {"publication": list(config.publication), "place": list(config.place)}
    return {name: condition for name, condition in asked.items() if condition}


def _found(queries: Sequence[Article], old: Mapping[str, Old], run: Run, method: Component) -> list[Found]:
    """What was found, with the names in it: of these few articles they are looked for once more."""
    built: Any = build_method(method)
    hits = [run.get(f"q{row}", []) for row in range(len(queries))]
    ids = list(dict.fromkeys(hit.passage_id for own in hits for hit in own))
    texts = [*(article.whole for article in queries), *(old[id_].article.whole for id_ in ids)]
    masked = built.masked(texts)
    of_old = dict(zip(ids, masked[len(queries) :], strict=True))
    return [
        Found(
            article,
            masked[row],
            [
                OldHit(old[hit.passage_id].article, hit.score, old[hit.passage_id].copies, of_old[hit.passage_id])
                for hit in hits[row]
            ],
        )
        for row, article in enumerate(queries)
    ]


def _told(config: DejaVuConfig, old: Mapping[str, Old]) -> list[str]:
    """What the page says of how it was made."""
    years = [own.article.year for own in old.values() if own.article.year is not None]
    told = [f"{len(old):,} old articles" + (f" of {min(years)} to {max(years)}" if years else "")]
    reprints = sum(own.copies - 1 for own in old.values())
    if reprints:
        told.append(f"{reprints:,} reprint{'s'[: reprints != 1]} left out")
    if config.from_year is not None or config.to_year is not None:
        told.append(f"only the years {config.from_year or 'before'} to {config.to_year or 'today'}")
    for name, values in (("publication", config.publication), ("place", config.place)):
        if values:
            told.append(f"only the {name} {' or '.join(values)}")
    told.append("compared without the marked names" if config.masking else "compared with all names")
    return told


def _say(what: str) -> None:
    print(f"deja-vu: {what}", file=sys.stderr, flush=True)
