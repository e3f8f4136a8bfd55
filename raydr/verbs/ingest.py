"""ingest: reads and checks a corpus with its queries and judgements (`out/corpus`); `embed` does it too.

raydr ingest jobs/configs/zero_shot.yaml data.path=DIR out=OUT
"""

from __future__ import annotations

from raydr.artifacts import Artifact
from raydr.data import ingest as data_ingest
from raydr.stages.pictures_on_ray import preparation
from raydr.verbs.config import RunConfig


def ingest(config: RunConfig) -> Artifact:
    """The corpus of the run. Raises `DataError` naming file, line and field of what cannot be read."""
    return data_ingest.ingest(config.data, config.out / "corpus", prepare=preparation(config.runtime)).artifact
