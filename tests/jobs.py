"""A job as people submit it: `ray job submit`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def submitted(ray_cluster: str, script: str, settings: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a script as a job on the cluster, to its end; its status is the verb's.

    Of several clusters on a machine Ray takes any for a job, whatever `--address` says: both sides are told which.
    """
    import ray

    client, gcs = str(Path(sys.executable).parent / "ray"), ray.get_runtime_context().gcs_address
    command = [client, "job", "submit", "--working-dir", ".", "--", "env", f"RAY_ADDRESS={gcs}", sys.executable, script]
    place = {**os.environ, "RAY_API_SERVER_ADDRESS": ray_cluster}
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [*command, *settings], cwd=REPOSITORY, env=place, capture_output=True, text=True, timeout=500
        )
        if "No available agent" not in done.stderr or time.monotonic() > deadline:  # a cluster that has just started
            break
        time.sleep(1)
    return done
