"""Which interface gloo is given; that it matters is shown by tests/storage/test_nodes_in_namespaces.py."""

import os

import psutil
import pytest

from raydr.train.process_group import VARIABLE, interface_with, take_rays_interface


def test_the_interface_with_an_address():
    loopback = {name for name, own in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in own)}
    assert {interface_with("127.0.0.1")} == loopback
    assert interface_with("203.0.113.7") is None  # of a network for documentation: nobody has it


@pytest.mark.parametrize("told", ["eth7", None])
def test_what_the_environment_says_stands(told, monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv(VARIABLE, raising=False)
    if told:
        monkeypatch.setenv(VARIABLE, told)
    take_rays_interface()
    assert os.environ[VARIABLE] == (told or interface_with("127.0.0.1"))
