"""Executing blocks twice. Oracles: the same network executed plainly, autograd by hand through dirty weights, the generators' states."""

from __future__ import annotations

import copy
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap

from bpfree.certify.twice import Doubles, Record, dirty, units_of
from bpfree.network import feedback_weights, replaced_backward
from bpfree.network.network import Network


class Scaled(nn.Module):
    """Has a parameter of its own beside a layer's: one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.ones(5)), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.gain
        return y


def network(dropout: float = 0.0) -> Network:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(dropout))
    return Network({"b1": first, "b2": nn.Sequential(Scaled(), nn.Tanh()), "readout": nn.Linear(5, 3)}, input_shape=(4,), readout="readout")


def recorded(net: Network, work: Any) -> tuple[Record, Any]:
    watch = Doubles(net)
    with watch.watching():
        watch.begin_step()
        result = work(net)
    return watch.record, result


def soil(net: Network, block: str) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.blocks[block].parameters():
            p.copy_(dirty(p, generator))


def doubled(net: Network, record: Record, work: Any, block: str = "b2", **options: Any) -> tuple[Doubles, Any]:
    soil(net, block)
    watch = Doubles(net, record, doubled=(block,), **options)
    with watch.watching():
        watch.begin_step()
        result = work(net)
    return watch, result


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def test_units_are_the_outermost_modules_with_parameters_of_their_own() -> None:
    found = {name: list(units) for name, units in units_of(network()).items()}
    assert found == {"b1": ["blocks.b1.0", "blocks.b1.1"], "b2": ["blocks.b2.0"], "readout": ["blocks.readout"]}


@pytest.mark.parametrize("block", ["b1", "b2", "readout"])
def test_values_buffers_and_noise_are_those_of_a_plain_execution(block: str) -> None:
    """Bit for bit, with dropout and batch norm, in the block that is dirty and above it."""

    def work(net: Network) -> Tensor:
        torch.manual_seed(3)
        y: Tensor = net(X)
        return torch.cat([y.flatten(), torch.rand(2)])

    net = network(dropout=0.5)
    kept = copy.deepcopy(net.state_dict())
    record, plain = recorded(net, work)
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    net.load_state_dict(kept)
    _, twice = doubled(net, record, work, block)
    assert torch.equal(twice, plain)
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())


def test_cotangents_go_through_the_dirty_weights() -> None:
    """A linear readout: the gradient of its inputs is the dirty matrix, that of its own weights the plain one."""

    def work(net: Network) -> tuple[Tensor, Tensor]:
        h = torch.ones(2, 5, requires_grad=True)
        (net.blocks["readout"](h)[:, 1]).sum().backward()
        gradient = net.blocks["readout"].weight.grad
        assert h.grad is not None
        assert gradient is not None
        net.blocks["readout"].weight.grad = None
        return h.grad, gradient

    net = network()
    record, (plain, own) = recorded(net, work)
    assert torch.equal(plain[0], net.blocks["readout"].weight[1])
    _, (through, again) = doubled(net, record, work, "readout")
    assert torch.equal(through[0], net.blocks["readout"].weight[1])
    assert not torch.equal(through, plain)
    assert torch.equal(again, own)


def test_tangents_go_through_the_dirty_weights_too() -> None:
    def work(net: Network) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            value, tangent = forward_ad.unpack_dual(net.blocks["readout"](forward_ad.make_dual(torch.zeros(1, 5), torch.eye(5)[:1])))
            return value.clone(), tangent.clone()

    net = network()
    record, (value, tangent) = recorded(net, work)
    _, (same, other) = doubled(net, record, work, "readout")
    assert torch.equal(same, value)
    assert torch.equal(other[0], net.blocks["readout"].weight[:, 0])
    assert not torch.equal(other, tangent)


def test_substituted_and_perturbed_parameters_have_the_values_of_the_reference() -> None:
    """What a rule executes with ``functional_call``, under ``vmap``, or after writing into parameters, is executed with the same again."""

    def work(net: Network) -> list[Tensor]:
        layer, h = net.blocks["readout"], torch.ones(2, 5)
        moved = {name: p.detach() + 1 for name, p in layer.named_parameters()}
        found = [functional_call(layer, moved, (h,))]
        with torch.no_grad():
            layer.weight.add_(1)
            found.append(layer(h))
            layer.weight.sub_(1)
        return [*found, layer(h).detach(), vmap(layer)(h[None]).detach()]

    net = network()
    record, plain = recorded(net, work)
    _, twice = doubled(net, record, work, "readout")
    assert all(torch.equal(a, b) for a, b in zip(twice, plain, strict=True))


def test_a_copy_of_a_block_is_executed_as_it_is() -> None:
    net = network()
    record, plain = recorded(net, lambda net: copy.deepcopy(net.blocks["b2"])(torch.ones(2, 5)))
    _, other = doubled(net, record, lambda net: copy.deepcopy(net.blocks["b2"])(torch.ones(2, 5)))
    assert not torch.equal(other, plain)


def test_other_inputs_than_the_first_meet_other_weights() -> None:
    """The ordinary inputs keep their values, whenever and however often they come."""
    first, second = torch.ones(2, 5), torch.zeros(2, 5)

    def work(net: Network) -> list[Tensor]:
        return [net.blocks["readout"](x).detach() for x in (first, second, first)]

    net = network()
    record, plain = recorded(net, work)
    watch, twice = doubled(net, record, work, "readout", altered=("readout",))
    assert [torch.equal(a, b) for a, b in zip(twice, plain, strict=True)] == [True, False, True]
    assert watch.sides["readout"] == 1


def test_strictly_ordinary_inputs_are_outputs_of_the_block_below() -> None:
    def work(net: Network, noise: float) -> list[Tensor]:
        x = X
        found = []
        for block in net.blocks.values():
            x = block(x.detach() + noise if found else x)
            found.append(x.detach())
        return found

    for noise, same in ((0.0, True), (0.5, False)):
        net = network()
        kept = copy.deepcopy(net.state_dict())
        record, plain = recorded(net, lambda net, noise=noise: work(net, noise))
        net.load_state_dict(kept)
        watch = Doubles(net, record, doubled=("readout",), altered=("readout",), strict=True)
        with watch.watching():
            watch.begin_step()
            assert torch.equal(work(net, noise)[-1], plain[-1]) is same


def test_the_clean_execution_is_not_observed() -> None:
    """Hooks of modules, changed classes and calls that a profiler sees are executions with dirty weights only."""
    net, seen = network(), list[Tensor]()

    class Noting(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.layer.weight.detach().clone())
            return super().forward(x)

    record, _ = recorded(net, lambda net: net.blocks["b2"](torch.ones(2, 5)))
    clean = net.blocks["b2"][0].layer.weight.detach().clone()

    def work(net: Network) -> None:
        net.blocks["b2"][0].__class__ = Noting
        net.blocks["b2"][0].layer.register_forward_pre_hook(lambda module, given: seen.append(module.weight.detach().clone()))
        net.blocks["b2"](torch.ones(2, 5))

    watch, _ = doubled(net, record, work)
    assert len(seen) == 2
    assert not any(torch.equal(weight, clean) for weight in seen)
    assert "changed how" in watch.changed["b2"]


def test_the_librarys_replaced_backward_changes_no_execution() -> None:
    """Oracle: the values of the plain network. A ``forward`` of a rule's own is a change, also with the library's code in other globals."""
    net = network()
    record, plain = recorded(net, lambda net: net.blocks["readout"](torch.ones(2, 5)))

    def replaced(net: Network) -> Tensor:
        with replaced_backward(net, feedback_weights(net)):
            return net.blocks["readout"](torch.ones(2, 5, requires_grad=True))

    def forged(net: Network) -> Tensor:
        layer: Any = net.blocks["readout"]
        with replaced_backward(net, feedback_weights(net)):
            found = layer.forward
            layer.forward = FunctionType(found.__code__, dict(found.__globals__), closure=found.__closure__)
            return layer(torch.ones(2, 5, requires_grad=True))

    watch, values = doubled(net, record, replaced, "readout")
    assert torch.equal(values, plain)
    assert not watch.changed
    assert "changed how" in doubled(net, record, forged, "readout")[0].changed["readout"]


def test_dirty_parameters_are_others_and_as_large() -> None:
    """Also of constants and zeros, of which a permutation alone would make the same."""
    generator = torch.Generator().manual_seed(0)
    for clean in (torch.randn(20, 30), torch.ones(50), torch.zeros(50)):
        made = dirty(clean, generator)
        assert not torch.equal(made, clean)
        assert made.shape == clean.shape
        if bool(clean.any()):
            assert float(made.norm() / clean.norm()) == pytest.approx(1, abs=0.2)
