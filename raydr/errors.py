"""The errors a user can cause, each with a message that says what to do. Everything else is a bug and may traceback.

`raydr` and the jobs print these without a traceback and exit with status 2.
"""

from __future__ import annotations


class RaydrError(Exception):
    """Base of every error that is the input's or the machine's fault, not raydr's."""


class ConfigError(RaydrError):
    """A configuration that cannot work; the message names the file, the field and the way out."""


class DataError(RaydrError):
    """Input data that cannot be used; the message names file, line and field."""


class ArtifactError(RaydrError):
    """An artifact that is missing, unfinished, damaged or made by something else than what is asked of it."""


class MissingDependencyError(RaydrError):
    """A package that this step needs is not installed; the message names the extra that brings it."""
