"""What is back-propagation, what tends to it, and what does not; equilibria in closed form. Float64 throughout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bpfree_predictive_coding.execution import Executor
from bpfree_predictive_coding.output import Output
from bpfree_predictive_coding.relaxation import ErrorRelaxation, Relaxation
from bpfree_predictive_coding.rules import ZIL, FixedPrediction, PredictiveCoding
from pc_oracles import (
    DEVICE,
    FLAT,
    IMAGE,
    LARGE,
    REAL,
    SOFT,
    assert_same,
    batch_of,
    compare,
    credited,
    differ,
    gradients_of,
    moved,
    network_of,
    placed,
    predictions,
    relaxed,
    rows,
    rule_of,
    squared,
    true_gradients,
    weight_gradients,
)
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, TaskSpec, UsageError, new_step

NETWORKS: dict[str, tuple[str, TaskSpec, dict[str, Any]]] = {
    "tanh": ("tanh", FLAT, {}),
    "tanh, deep": ("tanh", FLAT, {"depth": 7, "width": 5}),
    "gelu": ("gelu", FLAT, {"widths": [9, 4, 6]}),
    "leaky relu, soft targets": ("leaky-relu", SOFT, {}),
    "real targets": ("gelu", REAL, {}),
    "images, flattened": ("tanh", IMAGE, {}),
    "no hidden block": ("tanh", FLAT, {"depth": 0}),
    "residual": ("residual-mlp", FLAT, {"depth": 6}),
    "plain": ("residual-mlp", REAL, {"skip": False, "activation": "gelu"}),
    "vgg5": ("vgg5", LARGE, {}),
    "vgg7": ("vgg7", LARGE, {"activation": "tanh"}),
    "layer norm": ("relu", FLAT, {"norm": "layer"}),
    "batch norm": ("tanh", FLAT, {"norm": "batch"}),
}


def backprop(network: Network, batch: Batch, spec: TaskSpec) -> dict[str, Tensor]:
    return true_gradients(network, lambda scores: spec.loss(scores, batch), batch.inputs)


# --- Z-IL ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["auto", "generic"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_z_il_is_back_propagation(name: str, seed: int, path: str) -> None:
    """Oracle: autograd's gradient of the task's loss, in value. The large rate would show any block that moved too early."""
    kind, spec, sizes = NETWORKS[name]
    network, batch = network_of(kind, spec, seed=seed, gain=1.5, **sizes), batch_of(spec, 6, seed=seed)
    exact = backprop(network, batch, spec)
    assert_same(moved(rule_of(ZIL, network=network, spec=spec, path=path), batch), exact)


def test_z_il_takes_the_step_of_back_propagation_with_momentum() -> None:
    """Oracle: three steps of torch's optimiser on autograd's gradients, all blocks at once; and the loss that is shown."""
    optimizer = OptimizerConfig("sgd", lr=0.5, momentum=0.9)
    rule, other = rule_of(ZIL), network_of("tanh")
    exact = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    step = new_step(rule, optimizer)
    for seed in range(3):
        batch = batch_of(seed=seed)
        metrics = rule.learn(batch, step)
        exact.zero_grad()
        loss = FLAT.loss(other(batch.inputs), batch)
        loss.backward()
        exact.step()
        torch.testing.assert_close(metrics["loss"], loss.detach())
        assert_same(dict(rule.network.named_parameters()), dict(other.named_parameters()))  # type: ignore[arg-type]
    assert all(p.grad is None for p in rule.parameters())


def test_z_il_with_another_output() -> None:
    """A precision is a factor on the gradient; squared errors to classes are those of the objective."""
    batch, network = batch_of(), network_of("gelu")
    exact = true_gradients(network, lambda scores: squared(rows(batch), 0.4)(scores) / len(batch), batch.inputs)
    rule = rule_of(ZIL, network=network, output="squared", precision=0.4)
    assert_same(moved(rule, batch), exact)
    objective = rule.objective(batch, new_step(rule))
    assert objective is not None
    found = torch.autograd.grad(objective, list(network.parameters()))
    assert_same(dict(zip(exact, found, strict=True)), {name: value / 0.4 for name, value in exact.items()})


def literal_z_il(
    network: Network, batch: Batch, *, rate: float = 1.0, late: int = 0, begin: float = 0.0, weight_rate: float = 1.0, before: bool = True
) -> dict[str, Tensor]:
    """Inference steps of all states with autograd in all blocks, block l of L learning at step L - l (plus ``late``); the change.

    ``begin`` moves the states away from the forward pass at first; with ``before`` the states' gradients are taken before the weights
    move, as both happen at one time.
    """
    blocks, target = list(network.blocks.values()), rows(batch)
    states = [state + begin * torch.randn_like(state) for state in predictions(network, batch.inputs)]
    old = {name: p.detach().clone() for name, p in network.named_parameters()}
    for time in range(len(blocks) + late):
        learner = len(blocks) - 1 - (time - late)  # its index
        with torch.no_grad():
            ours = placed(Relaxation(Executor(network), batch.inputs, lambda s: Output("cross-entropy", target), lr=rate), states)
            gradients = ours.gradients() if before else {}
            if 0 <= learner < len(blocks):
                network.zero_grad()
                ours.backward(learner, 1.0)
                for p in blocks[learner].parameters():
                    assert p.grad is not None
                    p -= weight_rate * p.grad
            if not before:
                ours.refresh_all()
                gradients = ours.gradients()
            ours.move(gradients)
            states = ours.states
    change = {name: (old[name] - p.detach()) / weight_rate for name, p in network.named_parameters()}
    network.zero_grad()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(old[name])
    return change


@pytest.mark.parametrize("kind", ["tanh", "gelu", "residual-mlp"])
def test_each_condition_of_z_il_is_needed(kind: str) -> None:
    """The literal loop equals the rule and back-propagation; with any one condition changed it is several per cent off, or more."""
    network, batch = network_of(kind, gain=1.5), batch_of()
    exact = backprop(network, batch, FLAT)
    literal = literal_z_il(network, batch)
    assert_same(literal, exact)
    assert_same(literal, moved(rule_of(ZIL, network=network), batch))
    torch.manual_seed(0)
    assert differ(literal_z_il(network, batch, begin=0.05), exact) > 0.03  # forward initialisation
    assert differ(literal_z_il(network, batch, rate=0.9), exact) > 0.05  # rate 1
    assert differ(literal_z_il(network, batch, late=1), exact) > 0.05  # at step L - l
    assert differ(literal_z_il(network, batch, before=False), exact) > 0.03  # pulled through a block before it moves


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_z_il_pulls_through_blocks_that_have_not_moved() -> None:
    """Oracle: the weights that a block had when it was pulled through, seen by a hook that keeps it on the generic path."""
    network, seen = network_of("tanh"), {}
    old = {name: block[0].weight.detach().clone() if name != "readout" else block.weight.detach().clone() for name, block in named(network)}

    def note(name: str, layer: Any) -> Callable[..., None]:
        def keep(*_: Any) -> None:
            seen.setdefault(name, []).append(layer.weight.detach().clone())

        return keep

    for name, block in named(network):
        layer = block if name == "readout" else block[0]
        layer.register_full_backward_hook(note(name, layer))
    rule = rule_of(ZIL, network=network)
    rule.learn(batch_of(), new_step(rule, OptimizerConfig("sgd", lr=1.0)))
    assert {"b2", "b3", "readout"} <= seen.keys()
    for name, values in seen.items():
        assert all(torch.equal(value, old[name]) for value in values), name


def named(network: Network) -> Iterator[tuple[str, Any]]:
    yield from network.blocks.items()


def test_rules_that_apply_themselves_cannot_fill_gradients() -> None:
    rule = rule_of(ZIL)
    with pytest.raises(UsageError, match="learn"):
        rule.credit(batch_of(), new_step(rule))


# --- fixed prediction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["auto", "generic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fixed_prediction_at_rate_one_is_back_propagation(name: str, path: str) -> None:
    """With as many steps as hidden blocks, or more; with one too few the first block is not reached, and the others are exact."""
    kind, spec, sizes = NETWORKS[name]
    network, batch = network_of(kind, spec, **sizes), batch_of(spec)
    exact, hidden = backprop(network, batch, spec), len(network.hidden)
    for T in {max(1, hidden), hidden + 1, 2 * hidden + 3}:
        assert_same(credited(rule_of(FixedPrediction, network=network, spec=spec, state_lr=1.0, T=T, path=path), batch), exact)
    if hidden > 1:
        found = credited(rule_of(FixedPrediction, network=network, spec=spec, state_lr=1.0, T=hidden - 1, path=path), batch)
        assert_same(found, {key: value for key, value in exact.items() if not key.startswith("blocks.b1.")})


def test_fixed_prediction_relaxes_to_back_propagation_at_any_rate() -> None:
    """Torch2PC's rate 0.1: the distance shrinks with the steps, by the factor 0.9 each in the end."""
    network, batch = network_of("tanh"), batch_of()
    exact = backprop(network, batch, FLAT)
    distances = [differ(credited(rule_of(FixedPrediction, network=network, state_lr=0.1, T=T), batch), exact) for T in (20, 60, 160, 320)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    assert distances[-1] < 1e-9


# --- precision -----------------------------------------------------------------------------------------------------------


def relaxation(network: Network, inputs: Tensor, output: Output, kind: type[Relaxation] = Relaxation, **options: Any) -> Relaxation:
    with torch.no_grad():
        return kind(Executor(network), inputs, lambda scores: output, **{"lr": 0.2, "momentum": 0.5, **options})


def equilibrium(network: Network, inputs: Tensor, output: Output, kind: type[Relaxation] = Relaxation) -> Relaxation:
    """A relaxation whose gradient has vanished."""
    ours = relaxation(network, inputs, output, kind)
    size = (output.target - ours.scores).abs().max().item() * output.precision
    for _ in range(100):
        relaxed(ours, 50)
        with torch.no_grad():
            if max(gradient.abs().max().item() for gradient in ours.gradients().values()) < 1e-11 * size + 1e-15:
                return ours
    raise AssertionError("no equilibrium after 5,000 steps")


@pytest.mark.parametrize("energy", ["squared", "cross-entropy"])
@pytest.mark.parametrize(("kind", "seed"), [("tanh", 0), ("tanh", 1), ("gelu", 0), ("residual-mlp", 0)])
def test_small_precision_tends_to_back_propagation(kind: str, seed: int, energy: str) -> None:
    """Over pi, in direction and in length, block by block and monotonically (Whittington and Bogacz 2017)."""
    network, batch = network_of(kind, seed=seed, gain=1.5), batch_of()
    loss = FLAT.loss if energy == "cross-entropy" else lambda scores, _: squared(rows(batch))(scores) / len(batch)
    exact = true_gradients(network, lambda scores: loss(scores, batch), batch.inputs)
    cosines, ratios = [], []
    for pi in (1.0, 0.1, 0.01, 0.001):
        ours = weight_gradients(network, equilibrium(network, batch.inputs, Output(energy, rows(batch), pi)))  # type: ignore[arg-type]
        cosine, ratio = compare(network, {name: value / pi for name, value in ours.items()}, exact)
        cosines.append(cosine)
        ratios.append(ratio)
    for block in range(len(network.names)):
        off = [1 - cosine[block] for cosine in cosines]
        far = [abs(1 - ratio[block]) for ratio in ratios]
        assert off == sorted(off, reverse=True), block
        assert far[1:] == sorted(far[1:], reverse=True), block
        assert off[-1] < 1e-5
        assert far[-1] < 0.01
        assert far[2] < 10.5 * far[3]  # linear in pi in the end
        if energy == "squared":  # the length of cross-entropy's may cross that of back-propagation, between 1 and 0.1
            assert far[0] > max(0.1, far[1])
    assert min(cosines[0]) < 0.99


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_errors_alone_do_not(seed: int) -> None:
    """At precision one the cosines stop at a plateau below one, the same for errors of 1e-4 and 1e-6."""
    network, batch = network_of("tanh", REAL, seed=seed, gain=2.0), batch_of(REAL)
    with torch.no_grad():
        scores = network(batch.inputs)
    plateaus = []
    for size in (1e-4, 1e-6):
        target = scores + size * (rows(batch, REAL) - scores)
        exact = true_gradients(network, lambda made, target=target: squared(target)(made) / len(batch), batch.inputs)  # type: ignore[misc]
        output = Output("squared", target)
        ours = weight_gradients(network, equilibrium(network, batch.inputs, output))
        plateaus.append(compare(network, ours, exact))
    for small, smaller in zip(*plateaus, strict=True):
        assert small == pytest.approx(smaller, abs=1e-3)
    cosines, ratios = plateaus[1]
    assert cosines[0] < 0.95
    assert max(ratios) < 0.5


@pytest.mark.parametrize("beta", [1e-3, -1e-3])
def test_weak_nudging_has_the_plateau_too(beta: float) -> None:
    """It makes the error small and divides by its size. Oracle: the cosines at a small clamped error, another of the same sign."""
    network, batch = network_of("tanh", gain=2.0), batch_of()
    exact = backprop(network, batch, FLAT)
    nudge = "positive" if beta > 0 else "negative"
    found = []
    for strength in (abs(beta), abs(beta) / 10):
        rule = rule_of(
            PredictiveCoding, network=network, nudge=nudge, beta=strength, T=600, state_lr=0.1, state_momentum=0.5, profile_every=0
        )
        found.append(compare(network, credited(rule, batch), exact))
    assert found[0][0] == pytest.approx(found[1][0], abs=2e-3)
    assert min(found[0][0]) < 0.99
    assert min(found[0][0]) > 0  # a negative nudge teaches the same, not the opposite


# --- rate ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "gelu"])
def test_at_few_steps_directions_tend_to_back_propagation_as_the_rate_falls(kind: str) -> None:
    """Cosines of every block that is reached tend to one. Lengths do not: that of block l falls with the power L - l of the rate."""
    network, batch = network_of(kind, gain=1.5), batch_of()
    exact = backprop(network, batch, FLAT)
    for T, reached in ((8, 4), (3, 4), (2, 3)):
        cosines, ratios = [], []
        for rate in (0.1, 0.01, 1e-3, 1e-4):
            options = {"T": T, "state_lr": rate, "profile_every": 0}
            found = credited(rule_of(PredictiveCoding, network=network, **options), batch)
            assert len({name.split(".")[1] for name in found}) == reached
            filled = {name: found.get(name, torch.zeros_like(value)) for name, value in exact.items()}
            cosine, ratio = compare(network, filled, exact)
            cosines.append(cosine)
            ratios.append(ratio)
        for block in range(4 - reached, 4):
            off = [1 - cosine[block] for cosine in cosines]
            assert off[0] > off[1] > off[2] or off[1] < 1e-6
            assert off[-1] < 1e-6
            assert ratios[-1][block] / ratios[-2][block] == pytest.approx(0.1 ** (3 - block), rel=0.02)


# --- linear networks -----------------------------------------------------------------------------------------------------


def linear_network(widths: list[int], seed: int = 0) -> Network:
    torch.manual_seed(seed)
    sizes = [6, *widths]
    blocks: dict[str, nn.Module] = {f"b{i + 1}": nn.Linear(a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes))}
    blocks["readout"] = nn.Linear(sizes[-1], 3)
    return Network(blocks, input_shape=(6,), readout="readout").to(DEVICE, torch.float64)


def minimiser(network: Network, inputs: Tensor, target: Tensor, precision: float) -> list[Tensor]:
    """States at which the quadratic energy is least: its normal equations, stacked over all states, solved directly."""
    maps = [(block.weight.detach(), block.bias.detach()) for _, block in named(network)]
    sizes = [network.shapes[name][0] for name in network.hidden]
    starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    rows_of = [torch.zeros(len(bias), starts[-1], dtype=torch.float64, device=DEVICE) for _, bias in maps]
    right = []
    for index, (weight, bias) in enumerate(maps):  # residual: made @ h - right
        if index < len(sizes):
            rows_of[index][:, starts[index] : starts[index + 1]] = torch.eye(sizes[index])
        if index:
            rows_of[index][:, starts[index - 1] : starts[index]] = -weight
        known = inputs @ weight.T if index == 0 else inputs.new_zeros(len(inputs), len(bias))
        right.append(known + bias if index < len(sizes) else bias - target)
    made, wanted = torch.cat(rows_of), torch.cat(right, 1)
    weights = torch.ones(len(made), dtype=torch.float64, device=DEVICE)
    weights[-3:] = precision
    solved = torch.linalg.solve(made.T @ (weights[:, None] * made), made.T @ (weights[:, None] * wanted.T)).T
    return list(solved.split(sizes, 1))


@pytest.mark.parametrize("precision", [1.0, 0.3])
@pytest.mark.parametrize("widths", [[5], [7, 4, 6]])
def test_linear_networks_relax_to_the_minimiser(widths: list[int], precision: float) -> None:
    """The stacked system, solved; the output's error is S^-1 (y - yhat), S = 1/pi + sum_l J_l J_l^T, times one; and epc's states agree."""
    network, batch = linear_network(widths), batch_of(REAL)
    target = rows(batch, REAL)
    ours = equilibrium(network, batch.inputs, Output("squared", target, precision))
    other = equilibrium(network, batch.inputs, Output("squared", target, precision), ErrorRelaxation)
    for state, also, exact in zip(ours.states, other.states, minimiser(network, batch.inputs, target, precision), strict=True):
        torch.testing.assert_close(state, exact, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(also, exact, rtol=1e-9, atol=1e-10)
    s, jacobian = torch.eye(3, dtype=torch.float64, device=DEVICE) / precision, torch.eye(3, dtype=torch.float64, device=DEVICE)
    for _, block in reversed(list(named(network))[1:]):
        jacobian = jacobian @ block.weight.detach()
        s = s + jacobian @ jacobian.T
    with torch.no_grad():
        wanted = torch.linalg.solve(s, (target - network(batch.inputs)).T).T
    for found in (ours, other):
        assert found.errors[-1] is not None
        torch.testing.assert_close(found.errors[-1], wanted, rtol=1e-9, atol=1e-10)
    assert_same(weight_gradients(network, other), weight_gradients(network, ours), 1e-8)


@pytest.mark.parametrize("energy", ["squared", "cross-entropy"])
@pytest.mark.parametrize("kind", ["tanh", "residual-mlp"])
def test_errors_and_states_relax_to_the_same_equilibrium(kind: str, energy: str) -> None:
    """Not only in linear networks: where one gradient vanishes, so does the other's."""
    network, batch = network_of(kind), batch_of()
    output = Output(energy, rows(batch), 0.5)  # type: ignore[arg-type]
    ours = equilibrium(network, batch.inputs, output)
    other = equilibrium(network, batch.inputs, output, ErrorRelaxation)
    for one, two in zip(ours.states, other.states, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)
    assert_same(weight_gradients(network, other), weight_gradients(network, ours), 1e-7)
    assert gradients_of(network) == {}
