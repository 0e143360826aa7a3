"""States that relax, and what they teach. Oracle: predictive coding by the book, with autograd and torch's SGD on the states (float64)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bpfree_predictive_coding.execution import Executor
from bpfree_predictive_coding.output import Output
from bpfree_predictive_coding.relaxation import ErrorRelaxation, Relaxation
from bpfree_predictive_coding.rules import ErrorPC, FixedPrediction, PredictiveCoding
from pc_oracles import (
    DEVICE,
    FLAT,
    IMAGE,
    LARGE,
    REAL,
    SOFT,
    Top,
    assert_same,
    batch_of,
    by_the_book,
    credited,
    cross_entropy,
    energies,
    network_of,
    part,
    placed,
    predictions,
    relaxed,
    rows,
    rule_of,
    squared,
    weight_gradients,
)
from torch import Tensor, nn

from bpfree import Batch, Network, OptimizerConfig, TaskSpec, new_step
from bpfree.tasks.task import Split, Task
from bpfree.training.accumulation import gather
from bpfree.training.config import BudgetConfig, TrainConfig
from bpfree.training.trainer import Trainer

CASES: dict[str, tuple[str, TaskSpec, dict[str, Any]]] = {
    "tanh": ("tanh", FLAT, {}),
    "gelu": ("gelu", SOFT, {"depth": 2}),
    "relu, real": ("relu", REAL, {}),
    "one hidden block": ("tanh", FLAT, {"depth": 1}),
    "residual": ("residual-mlp", FLAT, {"depth": 5}),
    "image": ("leaky-relu", IMAGE, {"depth": 2}),
    "vgg": ("vgg5", LARGE, {}),
    "layer norm": ("tanh", FLAT, {"norm": "layer"}),
}


def top_of(spec: TaskSpec, batch: Batch, precision: float = 1.0) -> Top:
    return (squared if spec.targets == "real" else cross_entropy)(rows(batch, spec), precision)


def relaxation_of(network: Network, batch: Batch, spec: TaskSpec = FLAT, kind: type[Relaxation] = Relaxation, **options: Any) -> Any:
    energy = "squared" if spec.targets == "real" else "cross-entropy"
    output = Output(energy, rows(batch, spec), options.pop("precision", 1.0))
    with torch.no_grad():
        return kind(Executor(network, options.pop("path", "auto")), batch.inputs, lambda scores: output, **options)


def assert_close(ours: list[Tensor], exact: list[Tensor], rtol: float = 1e-9) -> None:
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("path", ["auto", "generic"])
@pytest.mark.parametrize("case", CASES)
def test_states_and_weights_are_those_by_the_book(case: str, path: str) -> None:
    """After 0, 1, 2 and 6 steps, with momentum and a precision: states, weights' gradients and energies."""
    kind, spec, sizes = CASES[case]
    network, batch = network_of(kind, spec, **sizes), batch_of(spec, 5)
    top = top_of(spec, batch, 0.7)
    for T in (0, 1, 2, 6):
        states, gradients, table = by_the_book(network, batch.inputs, top, T=T, lr=0.2, momentum=0.6)
        ours = relaxed(relaxation_of(network, batch, spec, path=path, precision=0.7, lr=0.2, momentum=0.6), T)
        assert_close(ours.states, states)
        assert [float(value) for value in ours.energies()] == pytest.approx(table[-1], rel=1e-9, abs=1e-30)
        reached = weight_gradients(network, ours)
        assert_same({name: reached.get(name, torch.zeros_like(value)) for name, value in gradients.items()}, gradients)
        for block in network.names[: max(0, len(network.names) - 1 - T)]:  # no error has reached them
            assert not any(name.startswith(f"blocks.{block}.") for name in reached)


@pytest.mark.parametrize("case", CASES)
def test_states_begun_elsewhere(case: str) -> None:
    kind, spec, sizes = CASES[case]
    network, batch = network_of(kind, spec, **sizes), batch_of(spec, 5)
    torch.manual_seed(3)
    begun = [torch.randn_like(state) for state in predictions(network, batch.inputs)]
    states, gradients, _ = by_the_book(network, batch.inputs, top_of(spec, batch), T=3, lr=0.1, momentum=0.5, states=begun)
    ours = relaxed(placed(relaxation_of(network, batch, spec, lr=0.1, momentum=0.5), begun), 3)
    assert_close(ours.states, states)
    assert_same(weight_gradients(network, ours), gradients)
    with torch.no_grad():
        torch.testing.assert_close(ours.scores, network(batch.inputs))  # the forward pass's, whatever the states


@pytest.mark.parametrize(("momentum", "T"), [(0.0, 1), (0.0, 4), (0.8, 5)])
def test_the_rule_does_the_same(momentum: float, T: int) -> None:
    """From its options, with the loss of the forward pass as its metric."""
    batch = batch_of()
    rule = rule_of(PredictiveCoding, T=T, state_lr=0.15, state_momentum=momentum, precision=0.5, profile_every=0)
    _, gradients, _ = by_the_book(rule.network, batch.inputs, cross_entropy(rows(batch), 0.5), T=T, lr=0.15, momentum=momentum)
    found = credited(rule, batch)
    assert_same({name: found.get(name, torch.zeros_like(value)) for name, value in gradients.items()}, gradients)
    metrics = rule.credit(batch, new_step(rule))
    assert metrics.keys() == {"loss"}
    torch.testing.assert_close(metrics["loss"], FLAT.loss(rule.network(batch.inputs), batch).detach())


def test_the_output_can_be_squared_for_classes() -> None:
    """Oracle: by the book with one-hot targets. The loss that is shown, and the objective, are the squared ones too."""
    batch = batch_of()
    rule = rule_of(PredictiveCoding, output="squared", precision=2.0, T=3)
    _, gradients, _ = by_the_book(rule.network, batch.inputs, squared(rows(batch), 2.0), T=3, lr=0.1)
    assert_same(credited(rule, batch), gradients)
    loss = squared(rows(batch))(rule.network(batch.inputs)) / len(batch)
    torch.testing.assert_close(rule.credit(batch, new_step(rule))["loss"], loss.detach())
    objective = rule.objective(batch, new_step(rule))
    assert objective is not None
    assert objective.requires_grad
    torch.testing.assert_close(objective, loss)
    for spec in (FLAT, REAL, SOFT):  # None: it is the task's loss
        assert rule_of(PredictiveCoding, spec=spec).objective(batch_of(spec), new_step(rule)) is None


def test_real_targets_can_be_distributions_of_softmax() -> None:
    """Any target's rows can meet either energy."""
    batch = batch_of(REAL)
    rule = rule_of(PredictiveCoding, spec=REAL, output="cross-entropy", T=3)
    positive = Batch(batch.inputs, batch.targets.softmax(1))  # type: ignore[union-attr]
    _, gradients, _ = by_the_book(rule.network, batch.inputs, cross_entropy(positive.targets), T=3, lr=0.1)  # type: ignore[arg-type]
    assert_same(credited(rule, positive), gradients)
    rule = rule_of(PredictiveCoding, spec=SOFT, output="squared", T=3)
    batch = batch_of(SOFT)
    _, gradients, _ = by_the_book(rule.network, batch.inputs, squared(rows(batch, SOFT)), T=3, lr=0.1)
    assert_same(credited(rule, batch), gradients)


def test_states_may_begin_at_zero() -> None:
    batch = batch_of(IMAGE)
    rule = rule_of(PredictiveCoding, "tanh", IMAGE, init="zeros", T=3)
    zeros = [torch.zeros(len(batch), 8, dtype=torch.float64, device=DEVICE)] * 3
    _, gradients, _ = by_the_book(rule.network, batch.inputs, cross_entropy(rows(batch, IMAGE)), T=3, lr=0.1, states=zeros)
    assert_same(credited(rule, batch), gradients)


# --- nudging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", ["squared", "cross-entropy"])
@pytest.mark.parametrize(
    ("nudge", "epoch", "beta"),
    [
        ("positive", 0, 0.3),
        ("positive", 3, 0.36),
        ("positive", 50, 1.0),
        ("negative", 0, -0.3),
        ("negative", 2, -0.34),
        ("negative", 50, -1.0),
        ("centred", 0, 0.3),
        ("centred", 1, -0.32),
        ("centred", 2, 0.34),
        ("centred", 51, -1.0),
        ("none", 0, 1.0),
        ("none", 7, 1.0),
    ],
)
def test_nudging(energy: str, nudge: str, epoch: int, beta: float) -> None:
    """Clamped to p - beta (p - target), the weights' gradients over beta; ramped up to strength 1, with its sign."""
    batch = batch_of()
    rule = rule_of(PredictiveCoding, output=energy, nudge=nudge, T=3, precision=0.8)
    assert rule.beta(epoch) == pytest.approx(beta)
    with torch.no_grad():
        scores = rule.network(batch.inputs)
    p = scores if energy == "squared" else scores.softmax(1)
    target = p - beta * (p - rows(batch))
    top = (squared if energy == "squared" else cross_entropy)(target, 0.8)
    _, gradients, _ = by_the_book(rule.network, batch.inputs, top, T=3, lr=0.1)
    step = new_step(rule)
    step.epoch = epoch
    metrics = rule.credit(batch, step)
    found = {name: p.grad for name, p in rule.network.named_parameters()}
    assert_same(found, {name: value / beta for name, value in gradients.items()})
    loss = (squared if energy == "squared" else cross_entropy)(rows(batch))(scores) / len(batch)
    torch.testing.assert_close(metrics["loss"], loss)  # of the target itself


@pytest.mark.parametrize("energy", ["squared", "cross-entropy"])
def test_the_output_is_precise_where_scores_are_not(energy: str) -> None:
    """Oracle: the same scores in single precision, with the same bits."""
    torch.manual_seed(0)
    scores, target = torch.randn(5, 3).bfloat16(), torch.rand(5, 3)
    for output in (Output(energy, target, 0.5), Output(energy, target).nudged(scores, 0.3)):  # type: ignore[arg-type]
        assert torch.equal(output.error(scores), output.error(scores.float()))
        assert torch.equal(output.energy(scores), output.energy(scores.float()))
        assert torch.equal(output.loss(scores), output.loss(scores.float()))
        assert output.error(scores).dtype == output.target.dtype == torch.float32
    assert torch.equal(Output(energy, target).nudged(scores, 1.0).target, target)  # type: ignore[arg-type]


# --- the energy goes down ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Relaxation, ErrorRelaxation])
@pytest.mark.parametrize("case", [name for name in CASES if name != "vgg"])
def test_the_energy_does_not_increase(case: str, kind: type[Relaxation]) -> None:
    """At small rates without momentum, at each of 25 steps; after few it is lower."""
    name, spec, sizes = CASES[case]
    network, batch = network_of(name, spec, **sizes), batch_of(spec)
    ours = relaxation_of(network, batch, spec, kind, lr=0.05)
    values = [float(sum(ours.energies()))]
    for _ in range(25):
        relaxed(ours, 1)
        values.append(float(sum(ours.energies())))
    assert all(after < before for before, after in itertools.pairwise(values))


# --- batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Relaxation, ErrorRelaxation])
def test_two_halves_relax_as_the_whole(kind: type[Relaxation]) -> None:
    """The rate of the states is per example."""
    network, batch = network_of("tanh"), batch_of(count=8)
    whole = relaxed(relaxation_of(network, batch, kind=kind, lr=0.3, momentum=0.5), 5)
    halves = [relaxed(relaxation_of(network, part(batch, *ends), kind=kind, lr=0.3, momentum=0.5), 5) for ends in ((0, 3), (3, 8))]
    for index, state in enumerate(whole.states):
        torch.testing.assert_close(state, torch.cat([half.states[index] for half in halves]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factory", [PredictiveCoding, FixedPrediction, ErrorPC])
def test_micro_batches_add_up(factory: type) -> None:
    """4 times 16 examples are 64; so are 3 unequal parts."""
    rule, batch = rule_of(factory, T=4), batch_of(count=64)
    whole = credited(rule, batch)
    for parts in (4, 3):
        gather(rule.credit, rule, batch, new_step(rule), parts)
        assert_same({name: p.grad for name, p in rule.network.named_parameters()}, whole, 1e-12)
        rule.zero_grad()


def test_the_trainer_accumulates() -> None:
    """Oracle: the run on whole batches; momentum, and a last batch that is smaller."""
    batch, results = batch_of(count=40), []
    data = Split(batch.inputs.float().cpu(), batch.targets.cpu())  # type: ignore[union-attr]
    task = Task(FLAT, data, None, data)
    for accumulate in (1, 4):
        rule = rule_of(PredictiveCoding, T=3)
        rule.float()
        options = {"batch_size": 16, "accumulate": accumulate, "optimizer": OptimizerConfig("sgd", lr=0.3, momentum=0.9)}
        Trainer(rule, task, TrainConfig(budget=BudgetConfig(epochs=2), device=str(DEVICE), **options)).fit()
        results.append(rule.network.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


# --- errors relaxed instead ----------------------------------------------------------------------------------------------


def literal_errors(
    network: Network, inputs: Tensor, top: Top, T: int, lr: float, momentum: float
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Errors by torch's SGD on autograd's gradient through the whole network; then states, and the local energies' gradients."""
    blocks = list(network.blocks.values())
    errors = [torch.zeros_like(state).requires_grad_() for state in predictions(network, inputs)]
    optimizer = torch.optim.SGD(errors, lr=lr, momentum=momentum)

    def states() -> list[Tensor]:
        x, found = inputs, []
        for block, error in zip(blocks, errors, strict=False):
            x = block(x) + error
            found.append(x)
        return found

    for _ in range(T):
        optimizer.zero_grad()
        (sum(0.5 * error.square().sum() for error in errors) + top(blocks[-1](states()[-1]))).backward()
        optimizer.step()
    network.zero_grad()
    fixed = [state.detach() for state in states()]
    (sum(energies(network, inputs, fixed, top)) / len(inputs)).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return [error.detach() for error in errors], fixed, gradients


@pytest.mark.parametrize("path", ["auto", "generic"])
@pytest.mark.parametrize("case", CASES)
def test_errors_relax_as_autograd_has_them(case: str, path: str) -> None:
    kind, spec, sizes = CASES[case]
    network, batch = network_of(kind, spec, **sizes), batch_of(spec, 5)
    for T in (1, 2, 5):
        errors, states, gradients = literal_errors(network, batch.inputs, top_of(spec, batch, 0.7), T, 0.2, 0.6)
        ours = relaxed(relaxation_of(network, batch, spec, ErrorRelaxation, path=path, precision=0.7, lr=0.2, momentum=0.6), T)
        assert_close(ours.states, states)
        assert_close(ours.errors[:-1], errors)
        assert_same(weight_gradients(network, ours), gradients)


def test_the_rule_of_errors_does_the_same() -> None:
    batch, rule = batch_of(), rule_of(ErrorPC, T=3, state_lr=0.2, state_momentum=0.5, precision=0.6)
    _, _, gradients = literal_errors(rule.network, batch.inputs, cross_entropy(rows(batch), 0.6), 3, 0.2, 0.5)
    assert_same(credited(rule, batch), gradients)


# --- predictions held ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "residual-mlp"])
def test_held_predictions(kind: str) -> None:
    """Oracle: Torch2PC's loop, with Jacobians at the forward pass by autograd."""
    network, batch = network_of(kind), batch_of()
    blocks, forward = list(network.blocks.values()), predictions(network, batch.inputs)
    sources = [state.clone().requires_grad_() for state in forward]
    outputs = [block(source) for block, source in zip(blocks[1:], sources, strict=True)]
    scores = outputs[-1].detach()
    errors = [torch.zeros_like(state) for state in forward] + [rows(batch) - scores.softmax(1)]
    for T in range(1, 6):
        pulled = torch.autograd.grad(outputs, sources, errors[1:], retain_graph=True)
        errors = [error - 0.3 * (error - pull) for error, pull in zip(errors, pulled, strict=False)] + errors[-1:]
        rule = rule_of(FixedPrediction, network=network, state_lr=0.3, T=T)
        ours = relaxed(relaxation_of(network, batch, lr=0.3, hold=True), T)
        assert_close([value for value in ours.errors if value is not None], [value for value in errors if bool(value.any())])
        assert_close(ours.states, [state + error for state, error in zip(forward, errors, strict=False)])
        exact = torch.autograd.grad(
            [block(x) for block, x in zip(blocks, [batch.inputs, *forward], strict=True)],
            list(network.parameters()),
            [-error / len(batch) for error in errors],
        )
        found = credited(rule, batch)
        for (name, _), value in zip(network.named_parameters(), exact, strict=True):
            torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, rtol=1e-9, atol=1e-13)


def test_no_hidden_block_to_relax() -> None:
    """The readout alone learns, as by back-propagation; nothing is left to relax."""
    network, batch = network_of("tanh", depth=0), batch_of()
    exact = dict(
        zip(
            dict(network.named_parameters()),
            torch.autograd.grad(FLAT.loss(network(batch.inputs), batch), network.parameters()),
            strict=True,
        )
    )
    for factory in (PredictiveCoding, FixedPrediction, ErrorPC):
        rule = rule_of(factory, network=network, profile_every=1)
        assert_same(credited(rule, batch), exact)
        metrics = rule.credit(batch, new_step(rule))
        assert float(metrics["equilibrium_distance"]) == 0
        assert float(metrics["readout/energy"]) == pytest.approx(float(metrics["loss"]))
        rule.zero_grad()


def test_a_network_without_batch_axis_tricks() -> None:
    """States of a convolution keep their shape, and each example its own error. Oracle: the examples one by one."""
    network, batch = network_of("vgg7", LARGE), batch_of(LARGE, 3)
    whole = relaxed(relaxation_of(network, batch, LARGE, lr=0.2), 4)
    for index in range(3):
        single = relaxed(relaxation_of(network, part(batch, index, index + 1), LARGE, lr=0.2), 4)
        assert_close([state[index : index + 1] for state in whole.states], single.states)
    assert [tuple(state.shape[1:]) for state in whole.states] == [tuple(network.shapes[name]) for name in network.hidden]


def test_states_are_kept_in_single_precision_at_least() -> None:
    """Where blocks make bfloat16: small steps would be lost otherwise. Oracle: the same in single precision, within 10 %."""
    network, batch = network_of("tanh"), batch_of()
    network.float()
    inputs = batch.inputs.float()
    target = rows(batch).float()
    for kind in (Relaxation, ErrorRelaxation):
        found = []
        for half in (False, True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half), torch.no_grad():
                ours = kind(Executor(network), inputs, lambda scores: Output("cross-entropy", target), lr=0.1)
                for _ in range(4):
                    assert all(value.dtype == torch.float32 for value in [*ours.gradients().values(), *ours.energies()])
                    ours.step()
                found.append([*ours.states, *[error for error in ours.errors if error is not None], *ours.energies()])
                if half:
                    assert ours.scores.dtype == torch.bfloat16
        for precise, rough in zip(*found, strict=True):
            assert rough.dtype == torch.float32
            assert float((precise - rough).norm() / precise.norm()) < 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("kind", [Relaxation, ErrorRelaxation])
def test_errors_far_from_the_output_are_known_in_single_precision(kind: type[Relaxation], momentum: float) -> None:
    """Down to 1e-15 beside states of size one. Oracle: double precision, within 15 %: errors, energies, and what the weights learn."""
    made = []
    for dtype in (torch.float64, torch.float32):
        network, batch = network_of("tanh", depth=11, width=16).to(dtype), batch_of(count=16)
        target = rows(batch).to(dtype)
        with torch.no_grad():
            ours = kind(
                Executor(network), batch.inputs.to(dtype), lambda _, t=target: Output("cross-entropy", t), lr=0.05, momentum=momentum
            )
        relaxed(ours, 12)
        made.append([*ours.errors, *ours.energies(), *weight_gradients(network, ours).values()])
    if kind is Relaxation:
        assert made[0][0].norm() < 1e-10
    for precise, rough in zip(*made, strict=True):
        assert rough.dtype == torch.float32
        assert float((precise - rough).norm() / precise.norm()) < 0.15


def test_placed_states_begin_anew() -> None:
    """Oracle: the same states placed at once."""
    network, batch = network_of("tanh"), batch_of()
    torch.manual_seed(3)
    begun = [torch.randn_like(state) for state in predictions(network, batch.inputs)]
    late = placed(relaxed(relaxation_of(network, batch, lr=0.2), 3), begun)
    for one, two in zip(relaxed(late, 2).states, relaxed(placed(relaxation_of(network, batch, lr=0.2), begun), 2).states, strict=True):
        assert torch.equal(one, two)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


def test_blocks_without_parameters_are_states_too() -> None:
    """Oracle: by the book. One in closed form, one not."""
    torch.manual_seed(0)
    blocks = {"b1": nn.Linear(6, 5), "b2": nn.Tanh(), "b3": Sum(), "readout": nn.Linear(1, 3)}
    network, batch = Network(blocks, input_shape=(6,), readout="readout").to(DEVICE, torch.float64), batch_of()
    states, gradients, _ = by_the_book(network, batch.inputs, cross_entropy(rows(batch)), T=4, lr=0.2)
    ours = relaxed(relaxation_of(network, batch, lr=0.2), 4)
    assert_close(ours.states, states)
    assert_same(weight_gradients(network, ours), gradients)


def test_cross_entropy_of_rows_that_do_not_sum_to_one() -> None:
    """Oracle: autograd of the energy."""
    torch.manual_seed(0)
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for target in (torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)):
        output = Output("cross-entropy", target, 0.7)
        (gradient,) = torch.autograd.grad(4 * output.energy(scores), scores)
        torch.testing.assert_close(output.error(scores.detach()), -gradient, rtol=1e-12, atol=1e-14)
