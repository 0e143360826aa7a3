"""muPC. Oracles: the paper's multipliers, the definition of the network with them, and variances over width and depth."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from bpfree_predictive_coding.layers import Residual, Scaled
from bpfree_predictive_coding.rules import ErrorPC, IncrementalPC, PredictiveCoding
from bpfree_predictive_coding.scaling import mupc
from pc_oracles import DEVICE, FLAT, IMAGE, LARGE, assert_same, batch_of, by_the_book, credited, cross_entropy, network_of, rows, rule_of
from torch import Tensor, nn

import bpfree
from bpfree import Network, TaskSpec, UsageError
from bpfree.config import parse_words, resolve
from bpfree.training.trainer import Trainer


def scaled_maps(network: Network) -> dict[str, Scaled]:
    return {name: part for name, part in network.blocks.named_modules() if isinstance(part, Scaled)}


def test_multipliers_of_the_residual_network() -> None:
    """1/sqrt(D) for the first map, 1/sqrt(N L) in residual sums, 1/N for the last (Innocenti et al. 2025); without shortcuts 1/sqrt(N)."""
    depth, width = 5, 7
    expected = {"b1.1": 1 / math.sqrt(192)} | {f"b{i}.inner.1": 1 / math.sqrt(width * depth) for i in (2, 3, 4)} | {"readout.1": 1 / width}
    network = network_of("residual-mlp", IMAGE, depth=depth, width=width)
    assert mupc(network) == pytest.approx(expected)
    assert {name: part.factor for name, part in scaled_maps(network).items()} == pytest.approx(expected)
    plain = mupc(network_of("residual-mlp", IMAGE, depth=depth, width=width, skip=False))
    assert plain == pytest.approx({"b1.1": 1 / math.sqrt(192), "b2.1": 7**-0.5, "b3.1": 7**-0.5, "b4.1": 7**-0.5, "readout.1": 1 / 7})


def test_multipliers_of_other_networks() -> None:
    """A readout that is a bare layer, and convolutions by their fan-in."""
    assert mupc(network_of("tanh", depth=1, width=9)) == pytest.approx({"b1.0": 1 / math.sqrt(6), "readout": 1 / 9})
    found = mupc(network_of("vgg5", LARGE))  # 2, 4, 8, 8 channels, the last ones of 2x2
    assert found == pytest.approx(
        {"b1.0": 18**-0.5, "b2.0": 18**-0.5, "b3.0": 36**-0.5, "b4.0": 72**-0.5, "readout.1": 1 / 32},
    )


def test_multipliers_in_residual_blocks_of_others() -> None:
    """Blocks cut from a module whose traced graph adds two tensors; one that adds a constant keeps 1/sqrt(D)."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.plain, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = self.plain(torch.tanh(h + self.second(torch.tanh(h)))) + 1
            return self.head(torch.tanh(h))  # type: ignore[no-any-return]

    network = bpfree.split(Cut(), (6,))
    assert network.names == ["first", "second", "plain", "head"]
    assert list(mupc(network).values()) == pytest.approx([6**-0.5, (8 * 4) ** -0.5, 8**-0.5, 1 / 8])


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.map(torch.tanh(x)), x)


class Chosen(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.map(x) + x if len(x) > 0 else self.map(x)  # a length, which torch.fx does not know


def test_multipliers_in_blocks_of_ones_own() -> None:
    """A sum in any module that can be traced; a map beside a sum of ours is in none; what cannot be traced is taken for no sum."""
    beside = nn.Sequential(nn.Linear(6, 6), Residual(nn.Sequential(nn.Tanh(), nn.Linear(6, 6))))
    blocks = {"first": nn.Linear(6, 6), "own": Sum(), "beside": beside, "chosen": Chosen(), "last": nn.Linear(6, 3)}
    found = mupc(Network(blocks, input_shape=(6,), readout="last"))
    plain, summed = 6**-0.5, 30**-0.5
    expected = {"first": plain, "own.map": summed, "beside.0": plain, "beside.1.inner.1": summed, "chosen.map": plain, "last": 1 / 6}
    assert found == pytest.approx(expected)


def test_a_first_map_in_a_sum_is_scaled_as_the_first() -> None:
    found = mupc(Network({"sum": Residual(nn.Linear(6, 6)), "last": nn.Linear(6, 3)}, input_shape=(6,), readout="last"))
    assert found == pytest.approx({"sum.inner": 6**-0.5, "last": 1 / 6})


def test_weights_are_standard_normal_without_biases() -> None:
    """Mean and standard deviation over 20,000 weights; the function is the maps' times their multipliers."""
    rule = rule_of(PredictiveCoding, network=network_of("residual-mlp", depth=4, width=100), scaling="mupc")
    names = [name for name, _ in rule.network.named_parameters()]
    assert len(names) == 4
    assert all(name.endswith("linear.weight") for name in names)
    weights = torch.cat([p.detach().flatten() for p in rule.network.parameters()])
    assert float(weights.mean()) == pytest.approx(0, abs=0.03)
    assert float(weights.std()) == pytest.approx(1, abs=0.02)
    x = batch_of().inputs
    first, second, third, last = (p.detach() for p in rule.network.parameters())
    h = x @ first.T / math.sqrt(6)
    for weight in (second, third):
        h = h + h.tanh() @ weight.T / math.sqrt(100 * 4)
    torch.testing.assert_close(rule.network(x), h.tanh() @ last.T / 100)


def test_it_learns_by_the_book() -> None:
    """In closed form. Oracle: autograd through the scaled network."""
    rule, batch = rule_of(PredictiveCoding, network=network_of("residual-mlp"), scaling="mupc", T=4), batch_of()
    _, gradients, _ = by_the_book(rule.network, batch.inputs, cross_entropy(rows(batch)), T=4, lr=0.1)
    assert_same(credited(rule, batch), gradients)
    assert "derivatives in closed form: b1, b2, b3, readout" in rule.plan()
    assert f"b2.inner.1: multiplier {1 / math.sqrt(28):.3g}" in rule.plan()
    assert isinstance(rule.network.blocks["b2"], Residual)


def test_forward_variance_does_not_depend_on_width_or_depth() -> None:
    """That of hidden states: the sums add 1/L each, so at most a factor e over all; torch's parametrisation grows or shrinks with depth."""
    spec = TaskSpec("wide", (50,), 3)
    x = torch.randn(200, 50, dtype=torch.float64, device=DEVICE)
    spread, plain = [], []
    for depth in (4, 12, 48):
        for width in (32, 256):
            for scaling, values in (("mupc", spread), ("none", plain)):
                network = network_of("residual-mlp", spec, depth=depth, width=width, activation="identity", seed=depth)
                rule = rule_of(PredictiveCoding, network=network, spec=spec, scaling=scaling)
                with torch.no_grad():
                    values.append(float(rule.network.features(x).var()))
    assert all(0.8 < value < 1.3 * math.e for value in spread)
    assert max(plain) / min(plain) > 100


def test_who_takes_it() -> None:
    """The rate, and the network, that a rule takes by default; a network without linear maps is refused."""
    for factory, rate in ((PredictiveCoding, 1e-3), (IncrementalPC, 3e-4), (ErrorPC, 1e-3)):
        assert rule_of(factory).optimizer.lr == rate
        assert rule_of(factory, scaling="mupc").optimizer.lr == 0.1
        assert rule_of(factory).factors == {}
    network = Network({"b1": nn.Tanh(), "readout": nn.Flatten()}, input_shape=(3,), readout="readout")
    with pytest.raises(UsageError, match="no linear layer to scale"):
        mupc(network)
    with pytest.raises(UsageError, match="no linear layer to scale"):
        PredictiveCoding(network, FLAT, PredictiveCoding.Config(scaling="mupc"))


@pytest.mark.parametrize("name", ["predictive-coding", "ipc", "epc"])
def test_a_run_is_loaded_again(name: str, tmp_path: Path) -> None:
    """Oracle: the predictions and multipliers of the rule that was trained; above chance after an epoch."""
    words = [f"rule={name}", "rule.scaling=mupc", "rule.state_lr=0.3", "rule.output=squared", "network.width=32", "network.depth=4"]
    recipe = resolve(parse_words([*words, "task=digits", "budget.epochs=1", "device=cpu", "threads=1"]))
    task = recipe.build_task()
    rule = recipe.build_rule(task.spec)
    made = Trainer(rule, task, recipe.settings, folder=tmp_path, recipe=recipe.to_dict()).fit()
    assert made.result["test/accuracy"] > 0.2
    saved = bpfree.load(tmp_path)
    factors = {path: part.factor for path, part in scaled_maps(rule.network).items()}
    assert list(factors) == ["b1.1", "b2.inner.1", "b3.inner.1", "readout.1"]
    assert {path: part.factor for path, part in scaled_maps(saved.network).items()} == factors
    inputs = task.test.inputs[:50]
    with torch.no_grad():
        torch.testing.assert_close(saved.predict(inputs), rule.eval().network(task.spec.normalise(inputs)))
