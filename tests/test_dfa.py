"""Direct feedback alignment. Oracles: back-propagation, torch's own transposed convolution, and derivatives by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Network, Stepper, TaskSpec, UsageError, split
from bpfree.baselines import DFA, Backprop, DFAConfig
from bpfree.network import broadcast_backward, broadcast_shapes

SPEC = TaskSpec("t", (6,), 5)
IMAGES = TaskSpec("i", (3, 8, 8), 5)


def dense(depth: int = 2) -> Network:
    torch.manual_seed(0)
    blocks: dict[str, nn.Module] = {"b1": nn.Sequential(nn.Linear(6, 9), nn.Tanh())}
    if depth > 1:
        blocks["b2"] = nn.Sequential(nn.Linear(9, 7), nn.Tanh())
    return Network(blocks | {"readout": nn.Linear(7 if depth > 1 else 9, 5)}, input_shape=(6,), readout="readout").double()


def images() -> Network:
    torch.manual_seed(0)
    blocks = {
        "b1": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),
        "b2": nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU()),
        "readout": nn.Sequential(nn.Flatten(), nn.Linear(54, 5)),
    }
    return Network(blocks, input_shape=(3, 8, 8), readout="readout").double()


def gradients(rule: DFA | Backprop, batch: Batch) -> dict[str, Tensor]:
    rule.zero_grad()
    rule.credit(batch, Stepper(rule).step)
    return {name: p.grad.clone() for name, p in rule.network.named_parameters() if p.grad is not None}


def batch_of(spec: TaskSpec, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randn(count, *spec.input_shape, generator=generator, dtype=torch.float64), torch.arange(count) % 5)


@pytest.mark.parametrize(("placement", "key"), [("blocks", "feedback_b1"), ("layers", "feedback_blocks_readout_weight")])
def test_with_one_hidden_layer_and_its_weights_it_is_back_propagation(placement: str, key: str) -> None:
    rule = DFA(dense(1), SPEC, DFAConfig(placement=placement))  # type: ignore[arg-type]
    rule.get_buffer(key).copy_(rule.network.get_parameter("blocks.readout.weight"))
    expected, found = gradients(Backprop(rule.network, SPEC), batch_of(SPEC)), gradients(rule, batch_of(SPEC))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_signs_of_the_error() -> None:
    """Oracle: by hand, the signs of softmax(s) - y over N through the matrix, and the derivative of the block's own tanh."""
    rule, batch = DFA(dense(), SPEC, DFAConfig(error="sign")), batch_of(SPEC)
    found = gradients(rule, batch)
    h = rule.network.blocks["b1"](batch.inputs).detach()
    error = rule.network(batch.inputs).detach().softmax(1) - F.one_hot(batch.targets, 5)
    delta = error.sign() / 6 @ rule.get_buffer("feedback_b1") * (1 - h**2)
    torch.testing.assert_close(found["blocks.b1.0.weight"], delta.T @ batch.inputs)
    exact = rule.network.blocks["b2"](h).detach()
    torch.testing.assert_close(found["blocks.readout.weight"], (error / 6).T @ exact)


@pytest.mark.parametrize("error", ["full", "sign"])
def test_in_layers_the_error_arrives_at_all_positions(error: str) -> None:
    """Oracle: torch's transposed convolution of the error, repeated over the output's positions (BioTorch's ``conv2d_input``)."""
    rule, batch = DFA(images(), IMAGES, DFAConfig(placement="layers", error=error)), batch_of(IMAGES)  # type: ignore[arg-type]
    found = gradients(rule, batch)
    network = rule.network
    with torch.no_grad():
        u1 = network.blocks["b1"][0](batch.inputs)
        u2 = network.blocks["b2"][0](u1.relu())
        e = (network.blocks["readout"](u2.relu()).softmax(1) - F.one_hot(batch.targets, 5)) / 6
        sent = e if error == "full" else e.sign() / 6
        above = (sent @ rule.get_buffer("feedback_blocks_readout_1_weight")).view_as(u2)
        matrix = rule.get_buffer("feedback_blocks_b2_0_weight")
        assert matrix.shape == (5, 4, 3, 3)
        below = F.conv_transpose2d(sent[:, :, None, None].expand(-1, -1, 3, 3), matrix, stride=2, padding=1, output_padding=1)
    for name, u, signal in (("b2", u2, above), ("b1", u1, below)):
        layer = network.blocks[name][0]
        source = batch.inputs if name == "b1" else u1.relu()
        expected = torch.autograd.grad(layer(source), layer.weight, signal * (u > 0))[0]
        torch.testing.assert_close(found[f"blocks.{name}.0.weight"], expected)


def test_layers_within_a_block_get_the_error_too() -> None:
    """Of a block of two layers the first learns from the error at the second one's input, whatever comes from above."""
    network = split(nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh()), nn.Linear(7, 5)), (6,)).double()
    rule, batch = DFA(network, SPEC, DFAConfig(placement="layers")), batch_of(SPEC)
    before = gradients(rule, batch)
    last = list(rule.layers)[-1]
    rule.get_buffer(rule.layers[last]).zero_()
    after = gradients(rule, batch)
    first, second = [name for name in before if name.endswith("weight")][:2]
    assert torch.equal(before[first], after[first])
    assert not after[second].any()


def test_matrices_are_drawn_as_xavier_has_it() -> None:
    rule = DFA(split(nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 5)), (6,)), SPEC, DFAConfig(placement="layers", scale=2.0))
    matrix = rule.get_buffer(rule.layers[list(rule.layers)[-1]])
    assert float(matrix.abs().max()) == pytest.approx(2 * (6 / 305) ** 0.5, rel=0.02)


def test_shapes_of_broadcast_matrices() -> None:
    assert broadcast_shapes(images(), 5) == {
        "blocks.b1.0.weight": (5, 3, 3, 3),
        "blocks.b2.0.weight": (5, 4, 3, 3),
        "blocks.readout.1.weight": (5, 54),
    }


def test_tokens_at_all_places_get_the_error_of_their_example() -> None:
    """A linear layer on (N, L, D): the same cotangent at each place."""
    layer = nn.Linear(4, 3)
    x = torch.randn(2, 7, 4, requires_grad=True)
    matrix = torch.randn(5, 4)
    with broadcast_backward(layer, {"weight": matrix}) as sent:
        y = layer(x)
    sent.error = torch.randn(2, 5)
    (pulled,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(pulled, (sent.error @ matrix)[:, None].expand(2, 7, 4))


def test_an_error_that_is_not_set_is_named() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    with broadcast_backward(layer, {"weight": torch.randn(5, 4)}):
        y = layer(x)
    with pytest.raises(UsageError, match="the error that broadcast_backward sends is not set"):
        y.sum().backward()


def test_needed_cotangents_are_those_above_the_lowest_block_that_learns() -> None:
    network = dense()
    x = batch_of(SPEC).inputs
    network.blocks["b1"].requires_grad_(False)
    traces = network.traces(x, input_grad="needed")
    assert [trace.input.requires_grad for trace in traces] == [False, False, True]
    traces.send_down(torch.ones(6, 5, dtype=torch.float64))
    assert network.get_parameter("blocks.b2.0.weight").grad is not None
    assert network.get_parameter("blocks.b1.0.weight").grad is None
