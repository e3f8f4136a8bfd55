"""What a FAISS factory string means in bytes and in work, without FAISS.

Notable: sizes are those of FAISS's files to within a percent (tests/planning/test_structure.py builds them); a part
that raydr cannot serve, or whose size is not known here, is an error that names what is.

    structure("IVF4096,PQ48", dim=384).row_bytes          # 48 of code and 8 of row number
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from raydr.errors import ConfigError

Kind = Literal["flat", "sq", "hnsw", "ivf"]

_SQ_BITS = {"SQ4": 4, "SQ6": 6, "SQ8": 8, "SQfp16": 16, "SQbf16": 16}
_KNOWN = "Flat, SQ4, SQ6, SQ8, SQfp16, SQbf16, HNSW32, IVF4096,Flat, .., IVF4096,PQ48; PCA64 or OPQ16 first, RFlat last"


class Structure(NamedTuple):
    """An index by its parts."""

    kind: Kind
    coding: Literal["flat", "sq", "pq"]
    dim: int
    """Of what is coded, after a PCA or OPQ."""
    code_bytes: float
    """Of one vector's code."""
    link_bytes: float
    """Of one vector's places in graph or lists."""
    refine_bytes: float
    """Of one vector's exact copy, which `RFlat` keeps."""
    fixed_bytes: float
    """What every shard holds however many rows it has: centroids, code books, a transform."""
    num_lists: int
    """IVF lists; 0 without."""
    links: int
    """HNSW's M; 0 without."""
    needs_training: bool

    @property
    def is_exact(self) -> bool:
        """Whether there is no recall to measure."""
        return self.kind == "flat" and not self.needs_training and not self.refine_bytes

    @property
    def row_bytes(self) -> float:
        """Bytes that one row adds to a shard's file, and to memory once it has been read."""
        return self.code_bytes + self.link_bytes + self.refine_bytes


class _Code(NamedTuple):
    coding: Literal["flat", "sq", "pq"]
    bytes: float
    books_bytes: float


def structure(factory: str, dim: int) -> Structure:
    """The parts of a factory string for embeddings of `dim`. Raises `ConfigError` for what raydr cannot plan."""
    parts = factory.replace(" ", "").split(",")
    given_dim, fixed, refine = dim, 0.0, 0.0
    transformed = re.fullmatch(r"PCA[RW]*(\d+)|OPQ\d+(?:_(\d+))?", parts[0])
    if transformed:
        dim = int(transformed[1] or transformed[2] or dim)
        fixed += 4 * (given_dim + 1) * dim + (4 * given_dim**2 if transformed[1] else 0)  # a PCA keeps all of its axes
        parts = parts[1:]
    if len(parts) > 1 and parts[-1] == "RFlat":
        refine = given_dim * 4.0
        parts = parts[:-1]
    elif len(parts) > 1 and (refined := re.fullmatch(r"Refine\((\w+)\)", parts[-1])):
        refine = _code(refined[1], given_dim, factory).bytes
        parts = parts[:-1]
    core, rest = (parts[0], parts[1:]) if parts else ("", [])
    trains = bool(transformed)
    if (graph := re.fullmatch(r"HNSW(\d*)(?:_(\w+))?", core)) and len(rest) <= 1:
        code = _code(graph[2] or (rest[0] if rest else "Flat"), dim, factory)
        links = int(graph[1] or 32)
        # 2 M neighbours on the ground, M on each of the 1/(M-1) levels above; a level and an offset.
        link_bytes = 4 * (2 * links + links / (links - 1)) + 12
        kind, lists = "hnsw", 0
    elif (inverted := re.fullmatch(r"IVF(\d+)([kKM]?)(?:_HNSW(\d*))?", core)) and len(rest) == 1:
        code = _code(rest[0], dim, factory)
        lists = int(inverted[1]) * {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}[inverted[2]]
        fixed += lists * dim * 4
        links, link_bytes, kind, trains = 0, 8.0, "ivf", True
        if inverted[3] is not None:
            fixed += lists * (8 * int(inverted[3] or 32) + 16)
    elif not rest and core != "" and not core.startswith("PQ"):
        code = _code(core, dim, factory)
        kind, lists, links, link_bytes = ("flat" if code.coding == "flat" else "sq"), 0, 0, 0.0
    else:
        raise _unknown(factory, ",".join(parts))
    return Structure(
        kind, code.coding, dim, code.bytes, link_bytes, refine, fixed + code.books_bytes, lists, links,
        trains or code.coding != "flat",
    )  # fmt: skip


def _code(word: str, dim: int, factory: str) -> _Code:
    if word == "Flat":
        return _Code("flat", 4.0 * dim, 0.0)
    if word in _SQ_BITS:
        return _Code("sq", -(-dim * _SQ_BITS[word] // 8), 8.0 * dim)
    pieces = re.fullmatch(r"PQ(\d+)(?:x(\d+))?(?:np)?", word)
    if pieces is None:
        raise _unknown(factory, word)
    number, bits = int(pieces[1]), int(pieces[2] or 8)
    if dim % number:
        raise ConfigError(
            f"index.factory {factory!r}: dimension {dim} is not a multiple of {number} PQ pieces; "
            f"take PQ{max(n for n in range(1, number + 1) if dim % n == 0)}, or an OPQ or PCA that makes it one"
        )
    return _Code("pq", -(-number * bits // 8), 2.0**bits * dim * 4)


def _unknown(factory: str, part: str) -> ConfigError:
    return ConfigError(f"index.factory {factory!r}: the planner does not know {part!r}; it knows {_KNOWN}")
