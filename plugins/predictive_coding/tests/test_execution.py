"""Executions of single blocks. Oracle: autograd through the same layers, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bpfree_predictive_coding.execution import KINDS, ClosedForm, Executor, Traced, known_layers
from bpfree_predictive_coding.layers import Residual, Scaled
from pc_oracles import DEVICE, gradients_of
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

from bpfree import Network
from bpfree.network.trace import run_block

VECTOR, SIGNAL, PICTURE = (6,), (4, 9), (4, 9, 7)
EXACTLY = {"rtol": 1e-10, "atol": 1e-13}
"""Rounding of float64."""


def conv(channels: int = 4, out: int = 6, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, **{"kernel_size": 3, **options})


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), VECTOR),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), VECTOR),
    "linear on sequences": (lambda: nn.Linear(9, 5), SIGNAL),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), SIGNAL),
    "conv1d groups": (lambda: nn.Conv1d(4, 6, 2, groups=2, bias=False), SIGNAL),
    "conv2d": (conv, PICTURE),
    "conv2d stride": (lambda: conv(stride=(2, 3), padding=(1, 0)), PICTURE),
    "conv2d stride that leaves a rest": (lambda: conv(stride=4), PICTURE),
    "conv2d dilation": (lambda: conv(dilation=(2, 1), padding=2), PICTURE),
    "conv2d groups": (lambda: conv(groups=2, bias=False), PICTURE),
    "conv2d depthwise": (lambda: conv(groups=4, out=8), PICTURE),
    "conv2d oblong": (lambda: conv(kernel_size=(1, 4)), PICTURE),
    "flatten": (nn.Flatten, PICTURE),
    "flatten some": (lambda: nn.Flatten(2), PICTURE),
    "flatten the first two": (lambda: nn.Flatten(1, 2), PICTURE),
    "identity": (nn.Identity, VECTOR),
    "relu": (nn.ReLU, VECTOR),
    "leaky relu": (lambda: nn.LeakyReLU(0.2), VECTOR),
    "leaky relu that grows": (lambda: nn.LeakyReLU(-0.5), VECTOR),
    "gelu": (nn.GELU, VECTOR),
    "gelu by tanh": (lambda: nn.GELU("tanh"), VECTOR),
    "silu": (nn.SiLU, VECTOR),
    "elu": (lambda: nn.ELU(0.7), VECTOR),
    "tanh": (nn.Tanh, VECTOR),
    "sigmoid": (nn.Sigmoid, VECTOR),
    "hardtanh": (lambda: nn.Hardtanh(-0.3, 0.6), VECTOR),
    "max pool": (lambda: nn.MaxPool2d(2), PICTURE),
    "max pool overlap": (lambda: nn.MaxPool2d(3, stride=2, padding=1), PICTURE),
    "max pool oblong": (lambda: nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0)), PICTURE),
    "max pool ceil": (lambda: nn.MaxPool2d(2, ceil_mode=True), PICTURE),
    "max pool dilation": (lambda: nn.MaxPool2d(2, stride=1, dilation=(3, 2)), PICTURE),
    "average pool": (lambda: nn.AvgPool2d(2), PICTURE),
    "average pool overlap": (lambda: nn.AvgPool2d((3, 2), stride=(2, 1), padding=(1, 0)), PICTURE),
    "average pool ceil": (lambda: nn.AvgPool2d(2, ceil_mode=True), PICTURE),
    "average pool without padding": (lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), PICTURE),
    "average pool divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), PICTURE),
    "scaled linear": (lambda: Scaled(nn.Linear(6, 5, bias=False), 0.3), VECTOR),
    "scaled conv": (lambda: Scaled(conv(bias=False, stride=2), 0.3), PICTURE),
    "residual": (lambda: Residual(nn.Sequential(nn.Tanh(), nn.Linear(6, 6))), VECTOR),
    "residual of a layer": (lambda: Residual(nn.Linear(6, 6)), VECTOR),
    "residual of residuals": (lambda: Residual(nn.Sequential(Residual(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())), nn.Tanh())), VECTOR),
    "residual of a scaled conv": (lambda: Residual(nn.Sequential(nn.GELU(), Scaled(conv(out=4, padding=1, bias=False), 0.4))), PICTURE),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(conv(), nn.SiLU()), nn.Sequential(nn.MaxPool2d(2), nn.Sequential(nn.Flatten()))),
        PICTURE,
    ),
    "two maps": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), VECTOR),
    "nothing": (nn.Sequential, VECTOR),
    "frozen below": (lambda: nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 4)), VECTOR),
    "frozen above": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4).requires_grad_(False)), VECTOR),
    "frozen bias": (lambda: _frozen_bias(nn.Linear(6, 5)), VECTOR),
}


def _frozen_bias(layer: nn.Linear) -> nn.Linear:
    layer.bias.requires_grad_(False)
    return layer


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A block, its input and a signal at its output."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    block = build().to(DEVICE, torch.float64)
    x = torch.randn(3, *shape, dtype=torch.float64).to(DEVICE)
    return block, x, torch.randn_like(block(x)).detach()


def no_autograd(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("reverse mode was called")


@pytest.mark.parametrize("name", LAYERS)
def test_known_layers_in_closed_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, products with the Jacobian (twice) and parameters' gradients (added to what is there), without any reverse-mode call."""
    block, x, signal = made(name)
    source = x.clone().requires_grad_()
    parameters = {key: p for key, p in block.named_parameters() if p.requires_grad}
    output = block(source)
    exact = torch.autograd.grad(output, [source, *parameters.values()], signal)
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", no_autograd)
        patch.setattr(torch.autograd, "backward", no_autograd)
        patch.setattr(Tensor, "backward", no_autograd)
        layers = known_layers(block)
        assert layers is not None
        execution = ClosedForm(layers, x)
        for _ in range(2):
            pulled = execution.pull(signal)
            assert_close(pulled, exact[0], **EXACTLY)
            assert not pulled.requires_grad  # though gradients are enabled here
        execution.backward(signal)
        again = ClosedForm(layers, x)
        again.backward(signal)
    assert_close(execution.output, output, **EXACTLY)
    assert not execution.output.requires_grad
    found = gradients_of(block)
    assert found.keys() == parameters.keys()
    for key, value in zip(parameters, exact[1:], strict=True):
        assert_close(found[key], 2 * value, **EXACTLY)
        assert not found[key].requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_the_generic_way_is_the_same(name: str) -> None:
    """Oracle: the closed form. A block at the bottom cannot be pulled through, and need not."""
    block, x, signal = made(name)
    closed = ClosedForm(known_layers(block) or [], x)
    traced = Traced(run_block(1, name, block, x, input_grad=True))
    assert_close(traced.output, closed.output, **EXACTLY)
    assert not traced.output.requires_grad
    for _ in range(2):
        assert_close(traced.pull(signal), closed.pull(signal), **EXACTLY)
    closed.backward(signal)
    ours = gradients_of(block)
    block.zero_grad()
    traced.backward(signal)
    assert gradients_of(block).keys() == ours.keys()
    for key, value in gradients_of(block).items():
        assert_close(ours[key], value, **EXACTLY)
    block.zero_grad()
    Traced(run_block(0, name, block, x)).backward(signal)
    assert gradients_of(block).keys() == ours.keys()
    for key, value in gradients_of(block).items():
        assert_close(ours[key], value, **EXACTLY)


def test_kinks_are_taken_as_autograd_takes_them() -> None:
    """Zero for a rectifier, the bounds for a hard tanh, and equal entries of a pooling window."""
    for layer, value in [
        (nn.ReLU(), 0.0),
        (nn.LeakyReLU(0.1), 0.0),
        (nn.ELU(), 0.0),
        (nn.Hardtanh(-1, 1), 1.0),
        (nn.Hardtanh(-1, 1), -1.0),
    ]:
        x = torch.full((2, 3), value, dtype=torch.float64, device=DEVICE, requires_grad=True)
        signal = torch.rand_like(x)
        exact = torch.autograd.grad(layer(x), x, signal)[0]
        assert_close(ClosedForm([layer], x.detach()).pull(signal), exact, **EXACTLY)
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    pool = nn.MaxPool2d(3, stride=1)
    signal = torch.rand(2, 3, 2, 2, dtype=torch.float64, device=DEVICE)
    assert_close(ClosedForm([pool], x.detach()).pull(signal), torch.autograd.grad(pool(x), x, signal)[0], **EXACTLY)


def test_memory_formats_do_not_matter() -> None:
    """A signal that is laid out otherwise, as it comes from a flattened or transposed tensor."""
    for name in ("conv2d", "max pool overlap", "average pool overlap"):
        block, x, signal = made(name)
        execution = ClosedForm(known_layers(block) or [], x)
        other = signal.to(memory_format=torch.channels_last)
        assert_close(execution.pull(other), execution.pull(signal), **EXACTLY)
        assert not other.is_contiguous()


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def hooked_before(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer


def hooked_backward(layer: nn.Module) -> nn.Module:
    layer.register_full_backward_hook(lambda module, inner, outer: (2 * inner[0],))
    return layer


def hooked_before_backward(layer: nn.Module) -> nn.Module:
    layer.register_full_backward_pre_hook(lambda module, outer: (2 * outer[0],))
    return layer


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unknown": (lambda: nn.Softplus(), VECTOR),
    "normalisation": (lambda: nn.LayerNorm(6), VECTOR),
    "subclassed": (lambda: Louder(6, 6), VECTOR),
    "subclassed sequence": (lambda: Doubled(nn.Linear(6, 6)), VECTOR),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), VECTOR),
    "weight norm of a scaled map": (lambda: Scaled(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6, bias=False)), 0.5), VECTOR),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(6, 6), "weight", 3), VECTOR),
    "pruned conv": (lambda: prune.l1_unstructured(conv(), "weight", 3), PICTURE),
    "hook": (lambda: hooked(nn.Linear(6, 6)), VECTOR),
    "hook on an activation": (lambda: hooked(nn.Tanh()), VECTOR),
    "hook before": (lambda: hooked_before(nn.Linear(6, 6)), VECTOR),
    "hook on the way back": (lambda: hooked_backward(nn.Linear(6, 6)), VECTOR),
    "hook before the way back": (lambda: hooked_before_backward(nn.Linear(6, 6)), VECTOR),
    "hook on a sequence": (lambda: hooked(nn.Sequential(nn.Linear(6, 6))), VECTOR),
    "hook in a sum": (lambda: Residual(nn.Sequential(nn.Tanh(), hooked(nn.Linear(6, 6)))), VECTOR),
    "hook on a sum": (lambda: hooked(Residual(nn.Linear(6, 6))), VECTOR),
    "hook in a scaled map": (lambda: Scaled(hooked(nn.Linear(6, 6, bias=False)), 0.5), VECTOR),
    "in place": (lambda: nn.ReLU(inplace=True), VECTOR),
    "in place elsewhere": (lambda: nn.SiLU(inplace=True), VECTOR),
    "unknown in a sum": (lambda: Residual(nn.Softplus()), VECTOR),
    "unknown scaled": (lambda: Scaled(nn.Softplus(), 0.5), VECTOR),
    "padding by name": (lambda: conv(padding="same"), PICTURE),
    "other padding": (lambda: conv(padding=1, padding_mode="reflect"), PICTURE),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 2, 3), PICTURE),
    "adaptive pooling": (lambda: nn.AdaptiveAvgPool2d(1), PICTURE),
    "dropout": (lambda: nn.Dropout(0.0), VECTOR),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_goes_the_generic_way(name: str) -> None:
    """Oracle: autograd end to end through two copies of the block's neighbourhood. Alone, and among known layers."""
    torch.manual_seed(0)
    build, shape = UNKNOWN[name]
    block = nn.Sequential(nn.Identity(), nn.Sequential(nn.LeakyReLU(0.5), build())).to(DEVICE, torch.float64)
    assert known_layers(build()) is None
    assert known_layers(block) is None
    network = Network({"b1": nn.Identity(), "b2": block}, input_shape=shape)
    execute = Executor(network)
    assert execute.closed == ["b1"]
    x = torch.randn(3, *shape, dtype=torch.float64, device=DEVICE)
    source = x.clone().requires_grad_()
    output = block(source)
    signal = torch.randn_like(output)
    exact = torch.autograd.grad(output, [source, *block.parameters()], signal)
    with torch.no_grad():
        execution = execute(1, x)
        assert_close(execution.output, output, **EXACTLY)
        assert_close(execution.pull(signal), exact[0], **EXACTLY)
        execution.backward(signal)
    for p, value in zip(block.parameters(), exact[1:], strict=True):
        assert p.grad is not None
        assert_close(p.grad, value, **EXACTLY)


def test_more_that_is_not_known() -> None:
    """A flattening that takes the batch axis along, and a pooling that returns its choices."""
    assert known_layers(nn.Flatten(0)) is None
    other = nn.Linear(2, 2)
    other.forward = lambda x: x  # type: ignore[method-assign]
    assert known_layers(other) is None
    assert known_layers(nn.Flatten(-2)) is None
    assert known_layers(nn.MaxPool2d(2, return_indices=True)) is None
    assert known_layers(nn.Linear(2, 2)) is not None


def test_layers_are_found_in_order() -> None:
    parts = [nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.ReLU()]
    nested = nn.Sequential(parts[0], nn.Sequential(nn.Sequential(parts[1], parts[2]), parts[3]))
    assert known_layers(nested) == parts


def test_all_blocks_go_the_generic_way_if_asked() -> None:
    network = Network({"b1": nn.Linear(6, 6), "b2": nn.Tanh()}, input_shape=(6,))
    assert Executor(network).closed == ["b1", "b2"]
    execute = Executor(network, "generic")
    assert execute.closed == []
    assert len(execute) == 2
    x = torch.randn(2, 6)
    assert isinstance(execute(0, x), Traced)
    assert isinstance(Executor(network)(0, x), ClosedForm)


def test_only_what_learns_is_pulled_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the lowest layer that learns nothing is computed: counted at the activations."""
    block = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    called, kind = [], KINDS[nn.Tanh]
    monkeypatch.setitem(KINDS, nn.Tanh, kind._replace(pull=lambda *args: (called.append(args), kind.pull(*args))[1]))
    execution = ClosedForm(known_layers(block) or [], torch.randn(2, 3))
    execution.backward(torch.randn(2, 2))
    assert len(called) == 1
    block.requires_grad_(False)
    execution.backward(torch.randn(2, 2))
    assert len(called) == 1


HALF: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)), (20,)),
    "smooth": (lambda: nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 30), nn.SiLU(), nn.Linear(30, 9), nn.ELU()), (20,)),
    "convolutions": (lambda: nn.Sequential(conv(), nn.LeakyReLU(), conv(6, 8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)), PICTURE),
    "pooled": (lambda: nn.Sequential(conv(), nn.Sigmoid(), nn.AvgPool2d(2, stride=1), nn.Hardtanh(), nn.MaxPool2d(2, stride=1)), PICTURE),
    "residual": (lambda: Residual(nn.Sequential(nn.Tanh(), Scaled(nn.Linear(20, 20, bias=False), 0.2))), (20,)),
    "scaled": (lambda: Scaled(conv(bias=False), 0.2), PICTURE),
}


@pytest.mark.parametrize("kind", ["closed", "traced"])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_takes_signals_of_single_precision(name: str, kind: str) -> None:
    """Under autocast maps make bfloat16, and a signal may be precise. Oracle: single precision, within 3 %.

    Gradients have the weights' type. A few windows of a max-pooling have another winner.
    """
    torch.manual_seed(0)
    build, shape = HALF[name]
    block, x = build().to(DEVICE), torch.randn(8, *shape).to(DEVICE)
    exact = ClosedForm(known_layers(block) or [], x)
    signal = torch.randn_like(exact.output)
    exact.backward(signal)
    expected = [exact.output, exact.pull(signal), *gradients_of(block).values()]
    block.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        made = ClosedForm(known_layers(block) or [], x) if kind == "closed" else Traced(run_block(1, "", block, x, input_grad=True))
        pulled = made.pull(signal)
        made.backward(signal)
    assert name == "residual" or made.output.dtype == torch.bfloat16
    outside = made.pull(signal) if kind == "closed" else pulled
    for ours, true in zip([made.output, pulled, *gradients_of(block).values(), outside], [*expected, expected[1]], strict=True):
        assert float((ours.float() - true).norm() / true.norm()) < (0.2 if name == "pooled" else 0.03)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def test_the_first_block_cannot_be_pulled_through() -> None:
    """Its input is clamped, so nothing is kept for that on the generic path; the next one's can be."""
    network = Network({"b1": nn.Linear(6, 6), "b2": nn.Linear(6, 6)}, input_shape=(6,))
    execute, x = Executor(network, "generic"), torch.randn(2, 6)
    with pytest.raises(RuntimeError):
        execute(0, x).pull(x)
    assert execute(1, x).pull(x).shape == (2, 6)
