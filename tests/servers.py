"""Servers that tests start as processes of their own: free ports, and waiting until one answers.

port = free_port()
wait_until_ready(f"http://127.0.0.1:{port}/health", process, log_path)
"""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path


def free_port() -> int:
    """A TCP port of this machine that nobody uses at the moment."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def wait_until_ready(address: str, process: subprocess.Popen, log: Path, timeout_s: float = 300) -> None:
    """Until `address` answers 200. Fails with the end of the log where the process ends, or nobody answers in time."""
    import httpx

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if httpx.get(address, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
