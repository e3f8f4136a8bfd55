"""oneDNN's linear layers give what PyTorch's give, gradients too, and leave a network what it was."""

import pytest
import torch
from torch import nn

from raydr.train import linear
from raydr.train.linear import OneDnnLinear, through_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def _quicker(monkeypatch):
    monkeypatch.setattr(linear, "_is_quicker", lambda: True)


def network(*, bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Linear(40, 1, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (3, 7, 24), (0, 24)])
def test_values_and_gradients_are_pytorchs(shape, bias):
    found = []
    for change in (lambda model: None, through_onednn):
        model = network(bias=bias)
        change(model)
        inputs = torch.linspace(-1, 1, 24).expand(shape).clone().requires_grad_()
        output = model(inputs)
        output.square().sum().backward()
        found.append([output, inputs.grad, *(weight.grad for weight in model.parameters())])
    assert isinstance(model[0], OneDnnLinear)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_frozen_weights_have_no_gradient_and_pass_it_on():
    model = network(bias=True).requires_grad_(False)
    through_onednn(model)
    inputs = torch.ones(2, 24, requires_grad=True)
    model(inputs).sum().backward()
    assert inputs.grad.any() and model[0].weight.grad is None


def test_other_types_and_names_stay():
    model = network(bias=True)
    names = list(model.state_dict())
    through_onednn(model)
    assert list(model.state_dict()) == names
    assert model.bfloat16()(torch.ones(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
