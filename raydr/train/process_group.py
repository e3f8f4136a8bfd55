"""How training processes find one another: Ray Train's torch backend, with gloo on the address that Ray uses.

Notable: gloo gives the others the address that a machine's own name leads to, which on Debian and Ubuntu is 127.0.1.1:
workers on two such machines each call themselves and give up after half a minute. Ray's nodes have found an address by
which they reach each other, so workers on several nodes take the interface with that one. On one node nothing is
changed, and `GLOO_SOCKET_IFNAME` in a node's environment decides. NCCL does not need it: it looks at the interfaces.

    TorchTrainer(..., torch_config=torch_config(is_gpu=False))
"""

from __future__ import annotations

import os
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


def torch_config(*, is_gpu: bool) -> TorchConfig:
    """NCCL for GPUs, gloo for CPUs."""
    return TorchConfig(backend="nccl") if is_gpu else _GlooConfig(backend="gloo")


class _GlooConfig(TorchConfig):
    @property
    def backend_cls(self) -> Any:
        return _OnRaysAddress


class _OnRaysAddress(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        from ray.util import get_node_ip_address

        if len(set(worker_group.execute(get_node_ip_address))) > 1:
            worker_group.execute(take_rays_interface)
        super().on_start(worker_group, backend_config)


def take_rays_interface() -> None:
    """In a worker: tells gloo which interface has the address by which Ray knows this node, unless it was told."""
    from ray.util import get_node_ip_address

    if (name := interface_with(get_node_ip_address())) is not None:
        os.environ.setdefault(VARIABLE, name)


def interface_with(address: str) -> str | None:
    """The name of the network interface that has an address; None where none has."""
    import psutil  # comes with DeepSpeed

    for name, own in psutil.net_if_addrs().items():
        if any(one.address == address for one in own):
            return name
    return None
