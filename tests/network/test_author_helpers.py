"""What a rule needs of an execution. Oracles: autograd, torch's own layers, and bits that must not change."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import BpfreeError, Network, UsageError
from bpfree.network import add_gradient, add_gradients, kept_buffers, recorded_calls


def network(device: torch.device) -> Network:
    torch.manual_seed(0)
    blocks = {
        "b1": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        "b2": nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(4 * 25, 6)), nn.BatchNorm1d(6), nn.Tanh()),
        "readout": nn.Linear(6, 3),
    }
    return Network(blocks, input_shape=(2, 5, 5), readout="readout").to(device)


def inputs(device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(7, 2, 5, 5, generator=torch.Generator().manual_seed(seed)).to(device)


# --- extra passes -----------------------------------------------------------------------------------------------------


def test_extra_passes_leave_every_bit_of_the_buffers(device: torch.device) -> None:
    net, twin = network(device), network(device)
    x, other = inputs(device), inputs(device, 2)
    before = copy.deepcopy(net.state_dict())
    objects = {name: buffer.data_ptr() for name, buffer in net.named_buffers()}
    with suppress(KeyError), kept_buffers(net):
        extra = net(other)
        raise KeyError
    assert torch.equal(extra, twin(other))  # an ordinary pass in value: statistics of the batch
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name: buffer.data_ptr() for name, buffer in net.named_buffers()} == objects
    moved = copy.deepcopy(net)
    moved(x)
    assert not torch.equal(moved.blocks["b1"][1].running_mean, net.blocks["b1"][1].running_mean)


def test_graphs_made_before_and_inside_stay_valid(device: torch.device) -> None:
    net, twin = network(device), network(device)
    first = net(inputs(device)).sum()
    with kept_buffers(net):
        extra = net(inputs(device, 2)).square().sum()
    (first + extra).backward()
    twin(inputs(device)).sum().backward()
    state = copy.deepcopy(twin.state_dict())
    twin(inputs(device, 2)).square().sum().backward()
    twin.load_state_dict(state)
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()], rtol=1e-4, atol=1e-5)


def test_norms_without_statistics_or_in_eval_mode_are_let_be() -> None:
    moving, fixed, bare = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3, track_running_stats=False)
    module = nn.Sequential(moving, nn.Sequential(fixed, bare))
    x = torch.randn(5, 3) + 2
    expected = module(x)
    with kept_buffers(module):
        assert torch.equal(module(x), expected)
    assert int(moving.num_batches_tracked) == 1
    assert [norm.training for norm in (moving, fixed, bare)] == [True, False, True]


def test_a_buffer_that_two_modules_share_is_shared_inside_too() -> None:
    class Counting(nn.Module):
        def __init__(self, count: Tensor) -> None:
            super().__init__()
            self.register_buffer("count", count)

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("count").add_(1)
            return x * self.get_buffer("count")

    count = torch.zeros(())
    module = nn.Sequential(Counting(count), Counting(count))
    with kept_buffers(module):
        assert float(module(torch.ones(()))) == 2.0  # 1 times 2
    assert float(count) == 0.0


# --- parts of a trace -------------------------------------------------------------------------------------------------


def test_a_loss_of_a_part_reaches_the_blocks_up_to_it(device: torch.device) -> None:
    """Oracle: autograd through the composed blocks."""
    net, twin = network(device), network(device)
    x = inputs(device)
    trace = net.trace(("b1", "b2"), x, input_grad=True)
    assert list(trace.parts) == ["b1", "b2"]
    assert trace.parts["b2"] is trace.output
    assert trace.name == "b1+b2"
    first = twin.blocks["b1"](x)
    second = twin.blocks["b2"](first)
    assert torch.equal(trace.parts["b1"], first)
    assert torch.equal(trace.output, second)
    (trace.parts["b1"].square().mean() + trace.parts["b2"].square().mean()).backward()
    (first.square().mean() + second.square().mean()).backward()
    for name, parameter in net.named_parameters():
        expected = dict(twin.named_parameters())[name].grad
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            assert torch.equal(parameter.grad, expected), name
    assert trace.input.grad is not None
    alone = net.trace("b1", x)
    assert dict(alone.parts) == {"b1": alone.output}


def test_a_loss_of_the_first_part_leaves_the_second_block_alone(device: torch.device) -> None:
    net = network(device)
    net.trace(("b1", "b2"), inputs(device)).parts["b1"].square().mean().backward()
    assert {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None} == {"b1"}


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_are_added_in_the_parameters_dtype_where_it_learns() -> None:
    layer = nn.Linear(3, 2).to(torch.float64)
    layer.bias.requires_grad_(False)
    value = torch.arange(6.0).view(2, 3)
    add_gradients(layer, {"weight": value, "bias": torch.ones(2)})
    add_gradient(layer.weight, value.requires_grad_())
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float64
    assert torch.equal(layer.weight.grad, 2 * value.detach().double())
    assert not layer.weight.grad.requires_grad
    assert layer.bias.grad is None


def test_what_was_given_is_not_written_to() -> None:
    layer, value = nn.Linear(2, 2, bias=False), torch.ones(2, 2)
    for _ in range(3):
        add_gradient(layer.weight, value)
    assert torch.equal(value, torch.ones(2, 2))
    assert torch.equal(layer.weight.grad, 3 * value)


def test_a_gradient_of_another_shape_is_refused_even_where_it_would_broadcast() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.zeros(2, 2)
    with pytest.raises(BpfreeError, match=r"shape \(2,\) for a parameter of shape \(2, 2\)"):
        add_gradient(layer.weight, torch.ones(2))


# --- pre-activations --------------------------------------------------------------------------------------------------


def test_a_layers_input_and_pre_activation() -> None:
    """Oracle: the layer by hand; the graph reaches the weights."""
    block = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh())
    x = torch.randn(5, 2, 2)
    with recorded_calls(block[1]) as calls:
        y = block(x)
    (call,) = calls[block[1]]
    assert torch.equal(call.input, x.flatten(1))
    assert torch.equal(call.output, F.linear(x.flatten(1), block[1].weight, block[1].bias))
    assert torch.equal(torch.tanh(call.output), y)
    call.output.sum().backward()
    torch.testing.assert_close(block[1].weight.grad, x.flatten(1).sum(0).expand(3, 4))
    block(x)
    assert len(calls[block[1]]) == 1  # outside nothing is recorded


def test_a_layer_that_is_called_twice_has_two_calls() -> None:
    layer = nn.Linear(3, 3)
    with recorded_calls(layer) as calls:
        layer(layer(torch.ones(1, 3)))
    first, second = calls[layer]
    assert torch.equal(first.output, second.input)


def test_a_pre_activation_that_is_overwritten_is_refused() -> None:
    block = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    with pytest.raises(UsageError, match="overwritten in place"), recorded_calls(block[0]):
        block(torch.randn(5, 4))
