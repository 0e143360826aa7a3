"""A backward pass through other weights. Oracles: back-propagation, autograd with the feedback as weights, derivatives by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Network, UsageError, split
from bpfree.network import feedback_weights, replaced_backward

models = pytest.importorskip("torchvision.models")


def convolutional() -> Network:
    torch.manual_seed(0)
    blocks = {
        "b1": nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        "b2": nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=1), nn.ReLU(inplace=True)),
        "b3": nn.Sequential(nn.Conv2d(6, 6, (1, 3), padding="same", bias=False), nn.ReLU(), nn.Flatten(2)),
        "b4": nn.Sequential(nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(80, 8), nn.ReLU(inplace=True)),
        "readout": nn.Linear(8, 5),
    }
    return Network(blocks, input_shape=(3, 8, 8), readout="readout")


def dense() -> Network:
    torch.manual_seed(0)
    blocks = {"b1": nn.Sequential(nn.Linear(6, 9), nn.Tanh()), "b2": nn.Sequential(nn.Linear(9, 7), nn.Tanh()), "readout": nn.Linear(7, 5)}
    return Network(blocks, input_shape=(6,), readout="readout")


def residual() -> Network:
    torch.manual_seed(0)
    return split(models.resnet18(num_classes=5, width_per_group=64), (3, 16, 16))


def batch(network: Network, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, *network.input_shape, generator=generator, dtype=dtype), torch.arange(6) % 5


def gradients(network: Network, feedback: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    x, y = batch(network, network.dtype)
    network.zero_grad()
    if feedback is None:
        loss = F.cross_entropy(network(x), y)
    else:
        with replaced_backward(network, feedback) as replaced:
            loss = F.cross_entropy(network(x), y)
        assert sorted(replaced.met) == sorted(feedback)
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [dense, convolutional, residual])
def test_with_its_own_weights_it_is_back_propagation_exactly(make: object) -> None:
    network: Network = make()  # type: ignore[operator]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected = gradients(network)
    network.load_state_dict(state)  # running statistics
    found = gradients(network, dict(feedback_weights(network)))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_feedback_alignment_by_hand() -> None:
    """Oracle: delta_l = (B_{l+1}^T delta_{l+1}) * tanh'(a_l), grad W_l = delta_l^T h_{l-1} (Lillicrap et al. 2016)."""
    network = dense().double()
    generator = torch.Generator().manual_seed(3)
    feedback = {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in feedback_weights(network).items()}
    found = gradients(network, feedback)
    x, y = batch(network, torch.float64)
    w = list(feedback_weights(network).values())
    b = list(feedback.values())
    biases = [block.bias for block in (network.blocks["b1"][0], network.blocks["b2"][0], network.blocks["readout"])]
    with torch.no_grad():
        h = [x]
        for weight, bias in zip(w[:2], biases, strict=False):
            h.append(torch.tanh(h[-1] @ weight.T + bias))
        delta = ((h[2] @ w[2].T + biases[2]).softmax(1) - F.one_hot(y, 5)) / len(x)
        for level in (2, 1, 0):
            torch.testing.assert_close(found[list(feedback)[level]], delta.T @ h[level])
            delta = (delta @ b[level]) * (1 - h[level] ** 2) if level else delta


@pytest.mark.parametrize(
    ("stride", "padding", "mode"), list(itertools.product((1, 2), (0, 1), ("zeros", "reflect", "replicate", "circular")))
)
def test_a_convolution_pulls_through_the_feedback_as_autograd_does(stride: int, padding: int, mode: str) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=stride, padding=padding, padding_mode=mode, groups=2, dtype=torch.float64)
    other = nn.Conv2d(4, 6, 3, stride=stride, padding=padding, padding_mode=mode, groups=2, dtype=torch.float64)
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    with replaced_backward(layer, {"weight": other.weight}):
        y = layer(x)
    signal = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, signal)
    (expected,) = torch.autograd.grad(other(x), x, signal)
    torch.testing.assert_close(found, expected)
    assert torch.equal(y, layer(x))


def test_outside_it_is_back_propagation() -> None:
    network = dense()
    expected = gradients(network)
    gradients(network, {name: torch.zeros_like(w) for name, w in feedback_weights(network).items()})
    assert all(torch.equal(value, expected[name]) for name, value in gradients(network).items())


def test_zeros_let_no_credit_through() -> None:
    network = dense()
    found = gradients(network, {"blocks.readout.weight": torch.zeros(5, 7)})
    assert not found["blocks.b2.0.weight"].any()
    assert found["blocks.readout.weight"].any()


class Mixed(nn.Module):
    """Attention, a recurrent layer, a table of tokens, a bilinear map and two ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm((4, 8))
        self.linear, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(self.attention(x, x, x, need_weights=False)[0])
        return self.linear(self.lstm(x)[0]).mean(1)


def test_it_says_what_it_did_not_meet() -> None:
    module = Mixed()
    assert list(feedback_weights(module)) == ["linear.weight", "unused.weight"]
    with replaced_backward(module, {name: torch.randn_like(w) for name, w in feedback_weights(module).items()}) as replaced:
        module(torch.randint(10, (3, 4))).sum().backward()
    assert replaced.met == ["linear.weight"]
    assert replaced.unmet == {
        "attention.in_proj_weight": "the backward pass of MultiheadAttention is not replaced",
        "attention.out_proj.weight": "the backward pass of MultiheadAttention is not replaced",
        "lstm.weight_ih_l0": "the backward pass of LSTM is not replaced",
        "lstm.weight_hh_l0": "the backward pass of LSTM is not replaced",
        "unused.weight": "its layer was not called",
    }
    with replaced_backward(module, {}) as replaced:
        pass
    assert replaced.unmet["linear.weight"] == "no feedback was given"


def test_what_cannot_be_replaced_is_refused() -> None:
    module = Mixed()
    for name, shape, message in [
        ("lstm.weight_ih_l0", (32, 8), "no feedback can be given for lstm.weight_ih_l0: the backward pass of LSTM"),
        ("linear.weigt", (8, 8), "did you mean 'linear.weight'"),
        ("linear.weight", (8,), r"feedback of shape \(8,\) for linear.weight, where \(8, 8\) is wanted"),
    ]:
        with pytest.raises(UsageError, match=message), replaced_backward(module, {name: torch.zeros(shape)}):
            pass


def test_a_weight_that_two_layers_share_has_one_name() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    assert list(feedback_weights(module)) == ["0.weight"]
    x = torch.randn(2, 3, requires_grad=True)
    with replaced_backward(module, {"0.weight": torch.eye(3)}):
        y = module(x)
    (pulled,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(pulled, torch.ones(2, 3))
