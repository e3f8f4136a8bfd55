"""Data in: corpora, queries and judgements of every common format, checked, as one `corpus` artifact.

`config` says where the data is, `sources` finds its files, `records` reads them line by line, `ingest` checks and
writes them, `corpus` reads them back. `training_formats` converts among the JSONL shapes trainers use. The formats and
every rule are described in `docs/data_formats.md`.
"""
