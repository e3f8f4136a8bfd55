"""The schema of `data`: where a corpus is, what its columns are called, and what happens to bad input.

data: {path: DIR, split: test}
data: {path: "s3://bucket/corpus.parquet", columns: {passage_id: key, text: body}, on_error: skip}
data: {path: msmarco-passage/trec-dl-2019/judged}
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field, model_validator

from raydr.config import Config
from raydr.data.images import ImageConfig
from raydr.types import IMAGE, RESERVED_COLUMNS

DataFormat: TypeAlias = Literal["auto", "beir", "mbeir", "msmarco", "jsonl", "csv", "parquet", "hf_disk", "ir_datasets"]
MetadataType: TypeAlias = Literal["string", "int64", "float64", "bool", "list<string>", "json"]


class Columns(Config):
    """What the columns (or JSON fields) are called in a source; null tries the usual names, in their documented order.

    Used for JSONL, CSV, Parquet and Hugging Face datasets; the names of BEIR, M-BEIR and MS MARCO are fixed.
    """

    passage_id: str | None = None
    """Usual names: passage_id, _id, id, doc_id, docid, pid."""
    title: str | None = None
    """Usual name: title. A source without titles is fine."""
    text: str | None = None
    """The passage's text. Usual names: text, contents, content, passage, document_text, body."""
    query_id: str | None = None
    """Usual names: query_id, query-id, _id, id, qid."""
    query_text: str | None = None
    """Usual names: text, query, query_text, question."""
    relevance: str | None = None
    """The grade in a qrels table. Usual names: relevance, score, label, rel, grade."""
    image: str | None = None
    """A passage's picture, with `data.images`. Usual names: image, img, image_path, img_path."""
    query_image: str | None = None
    """A query's picture, likewise. Usual names: image, query_image, img, image_path, img_path, query_img_path."""


class SplitDocuments(Config):
    """Cuts every document into overlapping passages `<document id>#0`, `#1`, ... that keep the document's title."""

    max_tokens: int = Field(default=200, ge=1)
    """Longest passage in tokens. Leave room for the title and the special tokens below the encoder's own maximum."""
    overlap_tokens: int = Field(default=50, ge=0)
    """How many tokens of a passage are repeated at the start of the next one."""
    tokenizer: str = "minilm"
    """What counts the tokens: a folder with `tokenizer.json`, a hub name, or `minilm` (the packaged one)."""

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> SplitDocuments:
        if self.overlap_tokens >= self.max_tokens:
            raise ValueError(f"overlap_tokens ({self.overlap_tokens}) must be less than max_tokens ({self.max_tokens})")
        return self


class DataConfig(Config):
    """Where a corpus is and how to read it; `docs/data_formats.md` describes every format."""

    path: str = Field(min_length=1)
    """A folder, a file, any URI pyarrow opens (file://, s3://, gs://, hdfs://), or an ir_datasets id."""
    format: DataFormat = "auto"
    """`auto` decides by what lies at `path`."""
    split: str | None = None
    """Judgements to use (train, dev, test, ...). Null: `test` if there is one, otherwise the only one there is."""
    passages: str | None = None
    """Passages file or folder when it has an unusual name; relative to `path`, or a path or URI of its own."""
    queries: str | None = None
    """Queries file, likewise."""
    qrels: str | None = None
    """Judgements file, likewise; `split` is then not needed."""
    columns: Columns = Field(default_factory=Columns)
    """Names of the columns where they are unusual."""
    metadata: Literal["all", "none"] | list[str] = "all"
    """Which further fields of the corpus become columns that can be filtered on and are returned with hits."""
    metadata_types: dict[str, MetadataType] = Field(default_factory=dict)
    """Types of metadata columns; a type that is not declared is that of the column's first value."""
    on_error: Literal["raise", "skip"] = "raise"
    """`raise`: stop, naming file, line and field; `skip`: leave bad records out, counted, in rejects.jsonl."""
    on_empty: Literal["error", "keep"] = "error"
    """A passage with neither title nor text: `error` treats it as bad input, `keep` keeps it as an empty passage."""
    split_documents: SplitDocuments | None = None
    """Cuts long documents into passages; null takes every document as one passage."""
    images: ImageConfig | None = None
    """Reads pictures of passages and queries, and the queries' instructions, tasks and copies; null: texts only."""

    @model_validator(mode="after")
    def _metadata_can_be_columns(self) -> DataConfig:
        selected = self.metadata if isinstance(self.metadata, list) else []
        for name in [*selected, *self.metadata_types]:
            if name in self.reserved:
                raise ValueError(f"{name!r} is a column name of raydr itself and cannot be a metadata column")
        undeclared = sorted(set(self.metadata_types) - set(selected)) if self.metadata != "all" else []
        if undeclared:
            raise ValueError(f"metadata_types names {undeclared}, which `metadata` does not select")
        return self

    @model_validator(mode="after")
    def _pictures_are_read(self) -> DataConfig:
        if self.images is None and (self.columns.image or self.columns.query_image):
            raise ValueError("columns.image and columns.query_image need data.images: data.images={} reads pictures")
        return self

    @property
    def reserved(self) -> frozenset[str]:
        """Names that metadata columns may not have."""
        return RESERVED_COLUMNS if self.images is None else RESERVED_COLUMNS | {IMAGE}

    def recorded(self) -> dict[str, Any]:
        """The settings as an artifact knows them: texts without pictures are what they were before there were any."""
        settings = self.model_dump(mode="json")
        if self.images is None:
            del settings["images"], settings["columns"]["image"], settings["columns"]["query_image"]
        return settings
