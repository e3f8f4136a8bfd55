"""Machines on one machine, for tests of what happens between them: network namespaces joined by a switch.

Each has addresses, ports and a loopback of its own, so that nothing gets from one to another but over the wire, and
the wire can be cut. What they share is the disk. Notable: the switch lies in the first machine's namespace, so the
network of whoever runs the tests stays as it is. Wants root and `ip` (iproute2).

    with Machines("head", "a") as machines:
        machines.start("a", ["python", "-m", "http.server"], log)
        machines.cut("a"); machines.mend("a"); machines.kill("a")
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NETWORK = "198.18.0"
"""From the addresses that RFC 2544 keeps for measuring networks: no real one is hidden by it."""


class Machines:
    """Machines by name; the first is the one with the switch. They go, with all that runs on them, with the block.

    A process on one of them that shall cut wires too makes its own `Machines` of the same names, with `owner` the
    process id of the one whose block it is.
    """

    def __init__(self, *names: str, owner: int | None = None) -> None:
        self._prefix = f"raydr-{owner or os.getpid()}-"
        self._wanted = names
        self._names = list(names) if owner else []

    def __enter__(self) -> Machines:
        try:
            for name in self._wanted:
                self.add(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        there = [line.split()[0] for line in ip("netns", "list").splitlines()]
        for name in reversed([own.removeprefix(self._prefix) for own in there if own.startswith(self._prefix)]):
            self.kill(name)
            ip("netns", "del", self.namespace(name))
        self._names.clear()

    def namespace(self, name: str) -> str:
        return self._prefix + name

    def address(self, name: str) -> str:
        return f"{NETWORK}.{1 + self._names.index(name)}"

    def add(self, name: str) -> None:
        """Another machine, on the switch."""
        own = self.namespace(name)
        ip("netns", "add", own)
        self._names.append(name)
        first = self.namespace(self._names[0])
        device = "eth0"
        if own == first:
            ip("-n", own, "link", "add", device, "type", "bridge")
        else:
            port = f"to-{name}"
            ip("-n", first, "link", "add", port, "type", "veth", "peer", "name", device, "netns", own)
            ip("-n", first, "link", "set", port, "master", "eth0", "up")
        ip("-n", own, "address", "add", f"{self.address(name)}/24", "dev", device)
        for link in ("lo", device):
            ip("-n", own, "link", "set", link, "up")
        # Leads nowhere: from it Ray, like much else, reads which of a machine's addresses is its own.
        ip("-n", own, "route", "add", "default", "via", f"{NETWORK}.254")

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on that machine."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(name)}", *command]

    def start(
        self, name: str, command: Sequence[str], log: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen:
        """A process on that machine, which stays when this one ends."""
        with log.open("w") as output:
            return subprocess.Popen(
                self.inside(name, command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env
            )

    def processes(self, name: str) -> list[int]:
        return [int(line) for line in ip("netns", "pids", self.namespace(name)).split()]

    def kill(self, name: str) -> None:
        """SIGKILLs all that runs there, as a power cut would."""
        while own := self.processes(name):
            for pid in own:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def cut(self, name: str) -> None:
        """Pulls the plug: what runs there goes on, hears nothing and is not heard. Nobody is told."""
        ip("-n", self.namespace(self._names[0]), "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        ip("-n", self.namespace(self._names[0]), "link", "set", f"to-{name}", "up")


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """Why there can be no machines here; None where there can."""
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "no network namespaces: ip (iproute2) or nsenter (util-linux) is not installed"
    try:
        with Machines("probe", "other"):
            return None
    except OSError as error:
        return f"no network namespaces, which want root and CAP_SYS_ADMIN: {error}"
