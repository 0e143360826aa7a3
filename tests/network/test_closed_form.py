"""Gradients of single layers in closed form. Oracle unless a test names another: autograd, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.ops import Conv2dNormActivation
from torchvision.ops.misc import FrozenBatchNorm2d

from bpfree.network.closed_form import (
    input_gradient,
    is_batch_norm,
    is_linear,
    is_norm,
    norm_parameter_gradients,
    output_rows,
    parameter_gradients,
)

LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, 2-d": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear, 3-d": (lambda: nn.Linear(3, 4), (5, 2, 3)),
    "linear, 4-d": (lambda: nn.Linear(3, 4), (5, 2, 6, 3)),
    "linear, no bias": (lambda: nn.Linear(3, 4, bias=False), (5, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (3, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3), (3, 2, 7, 6)),
    "conv2d, strides": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 2)), (3, 2, 8, 7)),
    "conv2d, dilation": (lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2), (3, 2, 7, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 5, 5)),
    "conv2d, same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same", dilation=(1, 2)), (3, 2, 7, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (3, 2, 7, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular", stride=2), (3, 2, 7, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), (3, 2, 7, 6)),
    "conv2d, replicate": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate", groups=2), (3, 2, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1, groups=2), (3, 2, 4, 5, 3)),
    "conv3d, same": (lambda: nn.Conv3d(2, 4, 2, padding="same", bias=False), (3, 2, 4, 5, 3)),
}


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(6), (5, 6)),
    "layer, tokens": (lambda: nn.LayerNorm(6, eps=0.1), (5, 3, 6)),
    "layer, two axes": (lambda: nn.LayerNorm((3, 6)), (5, 2, 3, 6)),
    "layer, no bias": (lambda: nn.LayerNorm(6, bias=False), (5, 3, 6)),
    "layer, no scale": (lambda: nn.LayerNorm((3, 6), elementwise_affine=False), (5, 3, 6)),
    "group": (lambda: nn.GroupNorm(2, 6), (5, 6, 4, 3)),
    "group, vectors": (lambda: nn.GroupNorm(3, 6), (5, 6)),
    "group, one axis": (lambda: nn.GroupNorm(1, 6), (5, 6, 4)),
    "group, no scale": (lambda: nn.GroupNorm(2, 6, affine=False), (5, 6, 4, 3)),
    "batch, vectors": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "batch, one axis": (lambda: nn.BatchNorm1d(6), (5, 6, 4)),
    "batch, maps": (lambda: nn.BatchNorm2d(6, eps=0.1), (5, 6, 4, 3)),
    "batch, volumes": (lambda: nn.BatchNorm3d(6), (2, 6, 4, 3, 2)),
    "batch, no scale": (lambda: nn.BatchNorm2d(6, affine=False), (5, 6, 4, 3)),
    "batch, eval": (lambda: nn.BatchNorm2d(6).eval(), (5, 6, 4, 3)),
    "batch, eval, vectors": (lambda: nn.BatchNorm1d(6).eval(), (5, 6)),
    "batch, eval, no scale": (lambda: nn.BatchNorm1d(6, affine=False).eval(), (5, 6, 4)),
    "batch, no statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (5, 6, 4, 3)),
    "batch, no statistics, eval": (lambda: nn.BatchNorm2d(6, track_running_stats=False).eval(), (5, 6, 4, 3)),
}


def prepared(make: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer with random parameters and statistics, an input that is not centred, a signal."""
    torch.manual_seed(0)
    module = make().to(device, torch.float64)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
        x = 2 * torch.randn(shape, dtype=torch.float64, device=device) + 1
        return module, x, torch.randn_like(copy.deepcopy(module)(x))


def by_autograd(module: nn.Module, x: Tensor, signal: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    module(x).backward(signal)
    assert x.grad is not None
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}, x.grad


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps(name: str, device: torch.device) -> None:
    module, x, signal = prepared(*LINEAR[name], device)
    assert is_linear(module)
    assert not is_norm(module)
    assert output_rows(module) == 4 or "groups" in name
    torch.testing.assert_close(parameter_gradients(module, x, signal), by_autograd(module, x, signal)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NORMS)
def test_normalisations(name: str, device: torch.device) -> None:
    module, x, signal = prepared(*NORMS[name], device)
    assert is_norm(module)
    assert not is_linear(module)
    assert is_batch_norm(module) == name.startswith("batch")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    parameters, cotangent = by_autograd(module, x, signal)
    torch.testing.assert_close(input_gradient(module, x, signal), cotangent, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(norm_parameter_gradients(module, x, signal), parameters, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_channels_last_inputs(device: torch.device) -> None:
    for make, shape in (LINEAR["conv2d, strides"], NORMS["group"], NORMS["batch, maps"]):
        module, x, signal = prepared(make, shape, device)
        parameters, cotangent = by_autograd(module, x, signal)
        x, signal = x.contiguous(memory_format=torch.channels_last), signal.contiguous(memory_format=torch.channels_last)
        gradients = parameter_gradients if is_linear(module) else norm_parameter_gradients
        torch.testing.assert_close(gradients(module, x, signal), parameters, rtol=1e-11, atol=1e-11)
        if is_norm(module):
            torch.testing.assert_close(input_gradient(module, x, signal), cotangent, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("name", ["linear, 3-d", "conv2d, strides", "conv2d, same"])
def test_half_precision_activities_give_gradients_of_the_parameters_type(
    name: str, types: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Oracle: autograd in float64 on the rounded values, within the precision of bfloat16 (8 bits)."""
    module, x, signal = prepared(*LINEAR[name], device)
    x, signal = x.to(types[0]), signal.to(types[1])
    expected, _ = by_autograd(module, x.double(), signal.double())
    gradients = parameter_gradients(module.float(), x, signal)
    for key, value in expected.items():
        assert gradients[key].dtype == torch.float32
        torch.testing.assert_close(gradients[key].double(), value, rtol=2**-6, atol=2**-6 * float(value.abs().max()))


@pytest.mark.parametrize("name", ["layer, tokens", "group", "batch, maps", "batch, eval"])
def test_normalisations_of_half_precision_are_computed_in_single_precision(name: str, device: torch.device) -> None:
    """Oracle: autograd in float64 on the rounded values; the tolerance is that of single precision."""
    module, x, signal = prepared(*NORMS[name], device)
    x, signal = (x + 20).bfloat16(), signal.bfloat16()
    parameters, cotangent = by_autograd(module, x.double(), signal.double())
    module.float()
    torch.testing.assert_close(input_gradient(module, x, signal).double(), cotangent, rtol=1e-3, atol=1e-4)
    found = norm_parameter_gradients(module, x, signal)
    assert {value.dtype for value in found.values()} == {torch.float32}
    torch.testing.assert_close({key: value.double() for key, value in found.items()}, parameters, rtol=1e-3, atol=1e-3)


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ChannelsFirst(nn.LayerNorm):
    """As torchvision's LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_what_is_not_known_is_not_claimed() -> None:
    """Oracle: the list; each would get wrong gradients, or parameters that are not there."""
    parametrised = nn.Linear(3, 3)
    parametrize.register_parametrization(parametrised, "weight", nn.Tanh())
    pruned = prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    unknown = [
        *(parametrised, pruned, normed, Doubled(3, 3), nn.LazyLinear(3), nn.Bilinear(2, 2, 2), nn.Embedding(3, 3)),
        *(nn.ConvTranspose2d(2, 2, 3), nn.LazyConv2d(2, 3), nn.MultiheadAttention(4, 2).out_proj, Conv2dNormActivation(2, 2)),
        *(nn.InstanceNorm2d(3, affine=True), nn.LocalResponseNorm(2), FrozenBatchNorm2d(3), ChannelsFirst(3), nn.RMSNorm(3)),
    ]
    for module in unknown:
        assert not is_linear(module), module
        assert not is_norm(module), module
        assert output_rows(module) is None, module
    assert is_batch_norm(nn.LazyBatchNorm1d())  # it mixes examples all the same
    lazy = nn.LazyLinear(3)
    lazy(torch.zeros(2, 4))
    assert is_linear(lazy)  # now an nn.Linear


class Scaling(nn.Module):
    """y = w x by channel, with its own closed form."""

    rows = 3

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def parameter_gradients(self, x: Tensor, signal: Tensor) -> dict[str, Tensor]:
        return {"w": (x * signal).sum(0)}


class Centre(nn.Module):
    """A normalisation of one's own: x - mean."""

    normalises = True

    def input_gradient(self, x: Tensor, signal: Tensor) -> Tensor:
        return signal - signal.mean(-1, keepdim=True)


def test_layers_can_bring_their_own() -> None:
    """Oracle: what their methods return."""
    torch.manual_seed(0)
    x, signal = torch.randn(2, 4, 3).unbind()
    assert is_linear(Scaling())
    assert not is_norm(Scaling())
    assert output_rows(Scaling()) == 3
    torch.testing.assert_close(parameter_gradients(Scaling(), x, signal)["w"], (x * signal).sum(0))
    centre = Centre()
    assert is_norm(centre)
    assert norm_parameter_gradients(centre, x, signal) == {}
    torch.testing.assert_close(input_gradient(centre, x, signal).sum(1), torch.zeros(4))
    centre.weight = nn.Parameter(torch.ones(3))
    assert not is_norm(centre)  # nothing says how its scale learns
