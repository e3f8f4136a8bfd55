"""News Deja Vu measured: does the tagger find names, do names leak, is the same story found, and what of other times?

    python benchmarks/deja_vu.py --data ../shared/data --seeds 0 1 2 --out runs/deja-vu-benchmark
    python benchmarks/deja_vu.py --data ../shared/data --tiny --out runs/deja-vu-tiny        # does it run?

1. Tagger: F1 on the test parts of wnut17 and topres19th (places alone), trained with and without misread copies.
2. Leak: the share of marked names of topres19th's test part of which nothing is masked; and, for the searches of 3, the
   share of queries whose first hit has a rare capitalised word in common with them that is not masked.
3. Same story: fnc1's headlines look for articles on their story; masked or not, encoder trained or not.
4. Other times: news of 2004 (agnews) looks in newspapers of 1780 to 1869 (topres19th). Nobody judged it: the first hits
   of the first queries are written down as they are, in OUT/cross_era.md.

Every training is an artifact, so what was stopped goes on. One seed decides everything of a row.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, write

from raydr import runtime
from raydr.config import Component, load
from raydr.data.corpus import Corpus
from raydr.data.tagged import NoiseConfig, TaggedSource, read_tagged
from raydr.encoders.tagger import EntityTagger, TaggerConfig
from raydr.evaluation.trec import read_qrels, read_run, write_qrels
from raydr.methods.base import build_method
from raydr.train.config import TrainConfig
from raydr.train.tagging import TaggerTraining, measure_tagger, train_tagger
from raydr.verbs.config import RunConfig
from raydr.verbs.reproduce import reproduce

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "jobs/configs/news_deja_vu_small.yaml"
MEASURES = ["nDCG@10", "RR@10", "R@5", "R@100"]
RARE_SHARE = 0.01
CAPITALISED = re.compile(r"\b[A-Z][a-z]{2,}\b")


def tagger_of(options: argparse.Namespace, seed: int, *, copies: int) -> Path:
    ner = options.data / "ner"
    training = TaggerTraining(
        max_tokens=96,
        sources=tuple(TaggedSource(path=str(ner / name / "train.jsonl")) for name in ("wnut17", "topres19th")),
        noise=NoiseConfig(copies=copies),
        train=TrainConfig(
            batch_size=32,
            max_steps=options.tagger_steps,
            learning_rate=2e-4,
            seed=seed,
            precision=options.precision,
            worker_cpus=options.cpus,
            dropout=options.dropout,
        ),
    )
    return train_tagger(training, options.out / f"tagger-{copies}-{seed}")


def taggers(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], dict[int, Path]]:
    """F1 of taggers with and without misread copies; those with them, by seed."""
    results, made = [], {}
    for copies in (0, 1):
        for seed in options.seeds:
            model = tagger_of(options, seed, copies=copies)
            if copies:
                made[seed] = model
            tagger = EntityTagger(TaggerConfig(model=str(model)))
            row: dict[str, Any] = {"copies": copies, "seed": seed}
            for name in ("wnut17", "topres19th"):
                file = options.data / "ner" / name / "test.jsonl"
                texts = list(islice(read_tagged(TaggedSource(path=str(file))), options.tagged))
                for label, score in measure_tagger(tagger, texts).items():
                    row[f"{name} {label}"] = score.f1
                if name == "topres19th":
                    row["unmasked"] = _left(tagger, texts)
            results.append(row)
    columns = [name for name in results[0] if name not in ("copies", "seed")]
    rows = [
        [
            "with misread copies" if copies else "texts as they are",
            *(_mean([row[name] for row in results if row["copies"] == copies]) for name in columns),
        ]
        for copies in (0, 1)
    ]
    titles = [name.replace("unmasked", "names of topres19th left") for name in columns]
    return markdown(["trained on", *titles], rows), results, made


def _left(tagger: EntityTagger, texts: list) -> float:
    """Share of the marked names that no found one touches."""
    left = total = 0
    for marked, found in zip(texts, tagger.tag([marked.text for marked in texts]), strict=True):
        for entity in marked.annotation.entities:
            total += 1
            left += not any(own.start < entity.end and own.end > entity.start for own in found)
    return left / total if total else 0.0


def cell(options: argparse.Namespace, tagger: Path, seed: int, *, masked: bool, trained: bool) -> dict[str, Any]:
    """Figures of one search on fnc1, and the method that searched."""
    folder = options.out / f"fnc1-{'masked' if masked else 'plain'}-{'trained' if trained else 'start'}-{seed}"
    settings = [
        f"data.path={collection(options)}",
        "data.split=test",
        f"out={folder}",
        "method.args.tagger_training=null",
        f"method.args.tagger={json.dumps({'model': str(tagger)}) if masked else 'null'}",
        f"method.args.masking={str(masked).lower()}",
        f"train.seed={seed}",
        f"train.max_steps={options.steps}",
        f"train.precision={options.precision}",
        f"train.worker_cpus={options.cpus}",
        f"train.dropout={json.dumps(options.dropout)}",
        *(() if trained else ("train=null",)),
    ]
    config = load(RunConfig, CONFIG, settings)
    reproduce(config)
    method = config.method
    if trained:
        method = Component.model_validate(
            json.loads((folder / "method/manifest.json").read_text())["details"]["method"]
        )
    summary = json.loads((folder / "evaluate/summary.json").read_text())["runs"][0]["measures"]
    values = {name: summary[name]["value"] for name in MEASURES}
    return {"masked": masked, "trained": trained, "seed": seed, **values, "leak": leak(folder, method)}


def leak(folder: Path, method: Component) -> float:
    """Share of the queries whose first hit shares a rare capitalised word with them, of those that are not masked."""
    corpus = Corpus.open(folder / "corpus")
    rows = [row for table in corpus.passages(["passage_id", "title", "text"]) for row in table.to_pylist()]
    texts = {row["passage_id"]: f"{row['title'] or ''} {row['text']}" for row in rows}
    counts = Counter(word for text in texts.values() for word in set(CAPITALISED.findall(text)))
    queries = {query.query_id: query.text for query in corpus.queries()}
    first = {query: hits[0].passage_id for query, hits in read_run(folder / "search/run.trec").items() if hits}
    built: Any = build_method(method)
    seen = built.masked([*(queries[query] for query in first), *(texts[passage] for passage in first.values())])
    count = 0
    for query, passage in zip(seen[: len(first)], seen[len(first) :], strict=True):
        common = set(CAPITALISED.findall(query.masked)) & set(CAPITALISED.findall(passage.masked))
        count += any(counts[word] <= max(2, RARE_SHARE * len(texts)) for word in common)
    return count / len(first) if first else 0.0


def collection(options: argparse.Namespace) -> Path:
    """fnc1; with --tiny the articles of a few queries of each part."""
    whole = (options.data / "fnc1").resolve()
    if not options.tiny:
        return whole
    part = options.out / "fnc1-part"
    if part.is_dir():
        return part
    wanted: set[str] = set()
    for split in ("train", "test"):
        judged = dict(islice(read_qrels(whole / f"qrels/{split}.tsv").items(), 12))
        judged = {query: dict(islice(grades.items(), 3)) for query, grades in judged.items()}
        wanted |= {passage for grades in judged.values() for passage in grades}
        (part / "qrels").mkdir(parents=True, exist_ok=True)
        write_qrels(judged, part / f"qrels/{split}.tsv", format="beir")
    with gzip.open(whole / "corpus.jsonl.gz", "rt") as source, (part / "corpus.jsonl").open("w") as target:
        target.writelines(line for line in source if json.loads(line)["_id"] in wanted)
    (part / "queries.jsonl").write_bytes((whole / "queries.jsonl").read_bytes())
    return part


def stories(options: argparse.Namespace, made: dict[int, Path]) -> tuple[str, list[dict[str, Any]]]:
    results = []
    for seed in options.seeds:
        for masked in (False, True):
            for trained in (False, True):
                if not masked and not trained and seed != options.seeds[0]:
                    continue  # depends on no seed
                results.append(cell(options, made[seed], seed, masked=masked, trained=trained))
    rows = []
    for masked in (False, True):
        for trained in (False, True):
            own = [row for row in results if (row["masked"], row["trained"]) == (masked, trained)]
            name = f"{'masked' if masked else 'with names'}, {'trained' if trained else 'as it comes'}"
            rows.append([name, *(_mean([row[measure] for row in own]) for measure in (*MEASURES, "leak"))])
    return markdown(["fnc1", *MEASURES, "first hit shares a rare name"], rows), results


def other_times(options: argparse.Namespace, tagger: Path) -> None:
    """First hits of the first queries, masked and not, side by side, as they are."""
    from raydr.verbs.deja_vu import DejaVuConfig, deja_vu

    out = options.out / "cross_era"
    out.mkdir(parents=True, exist_ok=True)
    old, today = out / "old.jsonl", out / "today.jsonl"
    with gzip.open(options.data / "ner/topres19th/documents.jsonl.gz", "rt") as source:
        lines = list(islice(source, 40 if options.tiny else None))
    with gzip.open(options.data / "agnews/news.jsonl.gz", "rt") as source:
        rows = [json.loads(line) for line in source]
    rows = [row for row in rows if row["split"] == "test"][: 3 if options.tiny else 25]
    _write_once(old, "".join(lines))
    asked = [{"id": row["_id"], "title": row["headline"], "text": row["text"], "date": "2004"} for row in rows]
    _write_once(today, "".join(json.dumps(row) + "\n" for row in asked))
    tables = {}
    for name in ("masked", "plain"):
        config = DejaVuConfig(
            articles=str(old),
            queries=str(today),
            out=out / name,
            tagger=str(tagger) if name == "masked" else None,
            masking=name == "masked",
            k=1,
        )
        table, _ = deja_vu(config)
        import csv

        with table.open(encoding="utf-8-sig", newline="") as stream:
            tables[name] = list(csv.DictReader(stream))
    parts = ["# News of 2004, newspapers of 1780 to 1869: the first hit with names masked, and without\n"]
    for row, masked, plain in zip(asked, tables["masked"], tables["plain"], strict=True):
        parts.append(f"## {row['title']}\n\n{row['text'][:300]}\n")
        for name, hit in (("masked", masked), ("with names", plain)):
            told = " ".join(hit["text"].split())[:400]
            parts.append(f"- {name}: {hit['date']}, {hit['publication']} ({float(hit['similarity']):.3f}): {told}\n")
    (options.out / "cross_era.md").write_text("\n".join(parts), encoding="utf-8")


def _write_once(file: Path, content: str) -> None:
    if not file.is_file() or file.read_text(encoding="utf-8") != content:  # one written again is another file
        file.write_text(content, encoding="utf-8")


def _mean(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tagger-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=80, help="of the encoder's training")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--cpus", type=float, default=2, help="threads of a training")
    parser.add_argument("--dropout", type=float, help="of all trainings; without it: the checkpoint's own")
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps of each, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/deja-vu-benchmark"))
    options = parser.parse_args()
    options.out, options.data, options.tagged = options.out.resolve(), options.data.resolve(), None
    if options.tiny:
        options.seeds, options.tagger_steps, options.steps, options.tagged = options.seeds[:1], 3, 2, 40
    runtime.connect()
    first, found, made = taggers(options)
    second, searched = stories(options, made)
    other_times(options, made[options.seeds[0]])
    tables = f"### Tagger: F1\n\n{first}\n### The same story\n\n{second}\n"
    write(options.out / "deja_vu", "News Deja Vu", tables, {"tagger": found, "stories": searched})


if __name__ == "__main__":
    main()
