"""train: the method's own training, from mining to the trained model, on Ray Train; `out/method` says what came out.

    raydr train jobs/configs/contrastive.yaml data.path=DIR out=OUT
    ray job submit --working-dir . -- python jobs/train.py CONFIG.yaml data.path=/abs/DIR out=/abs/OUT

`reproduce` of a config that has a `train` section trains first, and embeds, searches and measures with what it learned.
"""

from __future__ import annotations

from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Component
from raydr.errors import ConfigError
from raydr.methods.base import build_method
from raydr.steps import Steps
from raydr.verbs.config import RunConfig

KIND = "method"


def train(config: RunConfig) -> Artifact:
    """The trained method, as configuration, in `out/method` (kind "method"); finished steps are used as they are.

    Raises `ConfigError` for a config without a `train` section.
    """
    if config.train is None:
        raise ConfigError("this config has no `train` section; add one, or set a field of it: train.max_steps=1000")
    method = build_method(config.method).fit(Steps.of(config))
    out, settings = config.out / "method", method.model_dump(mode="json")
    if not is_finished(out, fingerprint(KIND, settings, {})):
        with write_artifact(out, kind=KIND, config=settings) as writer:
            writer.details["method"] = settings
    return open_artifact(out, kind=KIND)


def trained(config: RunConfig) -> RunConfig:
    """`config` with its method as it was trained; without a `train` section, `config` itself."""
    if config.train is None:
        return config
    method = Component.model_validate(train(config).manifest.details["method"])
    return config.model_copy(update={"method": method})
