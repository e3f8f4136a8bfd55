"""A job as people submit it: `ray job submit`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def submitted(ray_cluster: str, script: str, settings: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a script as a job on the cluster of the tests, to its end; its status is the verb's."""
    import ray

    gcs = ray.get_runtime_context().gcs_address
    return submitted_to({"RAY_API_SERVER_ADDRESS": ray_cluster, "RAY_ADDRESS": gcs}, script, settings)


def submitted_to(cluster: Mapping[str, str], script: str, settings: list[str]) -> subprocess.CompletedProcess[str]:
    """The same on a cluster that these environment variables name.

    Of several clusters on a machine Ray takes any for a job, whatever `--address` says: both sides are told which.
    """
    client, gcs = str(Path(sys.executable).parent / "ray"), cluster["RAY_ADDRESS"]
    command = [client, "job", "submit", "--working-dir", ".", "--", "env", f"RAY_ADDRESS={gcs}", sys.executable, script]
    place = {**os.environ, **cluster}
    deadline = time.monotonic() + 180
    while True:
        done = subprocess.run(
            [*command, *settings], cwd=REPOSITORY, env=place, capture_output=True, text=True, timeout=1000
        )
        if "No available agent" not in done.stderr or time.monotonic() > deadline:  # a cluster that has just started
            break
        time.sleep(1)
    return done
