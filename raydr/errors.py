"""The errors a user can cause, each with a message that says what to do. Everything else is a bug and may traceback.

`raydr` and the jobs print these without a traceback and exit with status 2.
"""

from __future__ import annotations

import re


class RaydrError(Exception):
    """Base of every error that is the input's or the machine's fault, not raydr's."""


class ConfigError(RaydrError):
    """A configuration that cannot work; the message names the file, the field and the way out."""


class DataError(RaydrError):
    """Input data that cannot be used; the message names file, line and field."""


class ArtifactError(RaydrError):
    """An artifact that is missing, unfinished, damaged or made by something else than what is asked of it."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether Ray ended a worker (or several, one after the other) because its node had no memory left."""
    while error is not None:
        # Of an actor, and so of a training's workers and its controller, only the text says what they died of.
        if re.search("OutOfMemoryError|address the out of memory issue", f"{type(error).__name__} {error}"):
            return True
        error = getattr(error, "cause", None) or error.__cause__
    return False


LESS_MEMORY = (
    "a node's memory was used up, and Ray ended a worker there. Let fewer work on a node, by more CPUs for each "
    "(embed.worker_cpus, rerank.worker_cpus, train.worker_cpus) or fewer of them (num_workers), or take less at once "
    "(method.args.batch_tokens; train.batch_size or train.chunk_tokens; index.num_shards higher), then give the same "
    "command again, which goes on from what is whole"
)


class MissingDependencyError(RaydrError):
    """A package that this step needs is not installed; the message names the extra that brings it."""
