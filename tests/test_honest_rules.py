"""The honest rules learn, and do what their papers say.

Oracles: back-propagation, where feedback is the transposed weights; contraction by a known factor; weights that a mirror is to find; direct
feedback alignment in the linear case; the gradient at a fixed point, by autograd through the relaxation; targets by a linear solver; the
derivative along a direction; the best candidates by hand; closed forms of goodness and similarity.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any

import honest_rules
import pytest
import torch
import torch.nn.functional as F
from honest_rules import (
    HONEST,
    Candidates,
    DifferenceTargets,
    EquilibriumPropagation,
    FeedbackAlignment,
    ForwardForward,
    Honest,
    KolenPollack,
    LocalErrors,
    MeZO,
    Pepita,
    TargetsThroughout,
    WeightMirror,
)
from torch import Tensor, nn

from bpfree import Batch, OptimizerConfig, Rule, Stepper, Task, TrainConfig, new_step
from bpfree.baselines import Backprop
from bpfree.network import MLPConfig, mlp
from bpfree.training.config import BudgetConfig
from bpfree.training.trainer import Trainer

LEARNED: dict[type[Rule], tuple[int, float]] = {
    ForwardForward: (8, 0.8),
    LocalErrors: (5, 0.9),
    FeedbackAlignment: (8, 0.8),
    KolenPollack: (8, 0.85),
    WeightMirror: (6, 0.85),
    Pepita: (8, 0.85),
    EquilibriumPropagation: (5, 0.85),
    DifferenceTargets: (5, 0.85),
    TargetsThroughout: (5, 0.85),
    MeZO: (12, 0.75),
    Candidates: (8, 0.75),
}
"""Epochs, and a test accuracy well below what was measured and well above chance, which is a tenth."""


def default_rule(kind: type[Rule], task: Task, **sizes: Any) -> Any:
    """A rule on the network that a recipe gives it, or on one of other sizes."""
    torch.manual_seed(0)
    options = dict(kind.network_options(task.spec, kind.Config()))
    assert options.pop("name") == "mlp"
    return kind(mlp(task.spec, MLPConfig(**{**options, **sizes})), task.spec)


def exactly(kind: type[Rule], task: Task, **sizes: Any) -> Any:
    """The same in double precision."""
    return default_rule(kind, task, **sizes).double()


def some(task: Task, count: int = 16, dtype: torch.dtype = torch.float64) -> Batch:
    return Batch(task.spec.normalise(task.train.inputs[:count]).to(dtype), task.train.targets[:count])


def gradients(rule: Rule, batch: Batch) -> dict[str, Tensor]:
    """Of the network's parameters, by one call of ``credit``."""
    rule.zero_grad()
    rule.credit(batch, new_step(rule))
    return {name: p.grad.clone() for name, p in rule.network.named_parameters() if p.grad is not None}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.detach().flatten(), other.detach().flatten(), dim=0))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("honest", HONEST, ids=lambda honest: honest.rule.__name__)
def test_learns_digits(honest: Honest, digits: Task) -> None:
    epochs, least = LEARNED[honest.rule]
    settings = TrainConfig(budget=BudgetConfig(epochs=epochs), device="cpu")
    result = Trainer(default_rule(honest.rule, digits), digits, settings).fit().result
    assert result["test/accuracy"] > least


@pytest.mark.parametrize("honest", HONEST, ids=lambda honest: honest.rule.__name__)
def test_the_truth_agrees_with_the_declaration(honest: Honest) -> None:
    traits = honest.rule.traits_of(honest.rule.Config())
    assert traits.downstream_weights == (0 if honest.reads == honest.learns == "nothing" else "all")
    assert honest.truth.endswith(".")
    assert honest.rule.card.paper
    assert honest.rule.card.equation


def test_each_is_short() -> None:
    classes = [part for part in ast.parse(inspect.getsource(honest_rules)).body if isinstance(part, ast.ClassDef)]
    assert [part.name for part in classes if part.end_lineno is None or part.end_lineno - part.lineno >= 40] == []


# --- local losses ---------------------------------------------------------------------------------------------------------


def test_goodness_in_closed_form(digits: Task) -> None:
    """Of the first block: (sigmoid(g) - right) 2 h x^T, mean over each half."""
    rule, batch = exactly(ForwardForward, digits), some(digits)
    found = gradients(rule, batch)["blocks.b1.1.weight"]
    x = rule.encode(batch, new_step(rule)).flatten(1)
    h = rule.network.blocks["b1"](x.view(-1, 1, 8, 8)).detach()
    right = torch.arange(len(x)) < len(batch)
    slope = (h.square().sum(1) - h.shape[1]).sigmoid() - right.double()
    torch.testing.assert_close(found, (slope[:, None] * 2 * h).t() @ x / len(batch))


def test_wrong_labels_are_wrong(digits: Task) -> None:
    rule, batch = exactly(ForwardForward, digits), some(digits, 200)
    right, wrong = rule.encode(batch, new_step(rule)).flatten(1)[:, :10].argmax(1).chunk(2)
    assert torch.equal(right, batch.targets)
    assert not bool((wrong == batch.targets).any())
    assert len(wrong.unique()) == 10


def test_similarity_of_labels() -> None:
    """One within a class, -1 / (C - 1) between two of C classes."""
    classes = torch.tensor([0, 2, 2, 1])
    expected = torch.where(classes[:, None] == classes, 1.0, -0.5)
    torch.testing.assert_close(honest_rules.similarity(F.one_hot(classes, 3).float()), expected)


# --- other feedback -------------------------------------------------------------------------------------------------------


def test_feedback_of_the_weights_is_back_propagation(digits: Task) -> None:
    rule, batch = exactly(FeedbackAlignment, digits), some(digits)
    for name, key in rule.keys.items():
        rule.get_buffer(key).copy_(rule.network.get_parameter(name))
    exact = Backprop(rule.network, digits.spec)
    found = gradients(rule, batch)
    assert_same(found, gradients(exact, batch))


def test_feedback_alignment_ignores_the_weights_above(digits: Task) -> None:
    """With feedback of its own the signal of a hidden block is the error through B, whatever the readout's weights are."""
    rule, batch = exactly(FeedbackAlignment, digits, depth=1), some(digits)
    found = gradients(rule, batch)["blocks.b1.1.bias"]
    block = rule.network.blocks["b1"]
    scores = rule.network(batch.inputs).detach()
    signal = digits.spec.error(scores, batch) @ rule.get_buffer(rule.keys["blocks.readout.weight"])
    torch.testing.assert_close(found, (signal * (block(batch.inputs) > 0)).sum(0))


def feedback_cosines(rule: Any) -> list[float]:
    """Of the weights above the first block with their feedback."""
    return [cosine(rule.network.get_parameter(name), matrix) for name, matrix in list(rule.feedback().items())[1:]]


def trained(rule: Any, task: Task, epochs: int) -> Any:
    Trainer(rule, task, TrainConfig(budget=BudgetConfig(epochs=epochs), device="cpu")).fit()
    return rule


def test_feedback_stays_as_it_was(digits: Task) -> None:
    rule = default_rule(FeedbackAlignment, digits, depth=2)
    before = {name: matrix.clone() for name, matrix in rule.feedback().items()}
    start = feedback_cosines(rule)
    trained(rule, digits, 4)
    assert all(torch.equal(matrix, before[name]) for name, matrix in rule.feedback().items())
    assert all(after > first + 0.05 for first, after in zip(start, feedback_cosines(rule), strict=True))  # the weights come to it


def test_weights_and_feedback_meet(digits: Task) -> None:
    """Their difference shrinks by 1 - lr decay at each step, without momentum."""
    rule, batch = exactly(KolenPollack, digits, depth=2), some(digits)
    stepper = Stepper(rule, OptimizerConfig("sgd", lr=0.1, momentum=0.0, weight_decay=0.2))
    pairs = [(rule.network.get_parameter(name), rule.get_parameter(key)) for name, key in rule.keys.items()]
    before, starts = [(w - b).detach().clone() for w, b in pairs], [w.detach().clone() for w, _ in pairs]
    for _ in range(10):
        stepper.take(batch)
    for (weight, matrix), difference, start in zip(pairs, before, starts, strict=True):
        assert not torch.allclose(weight, start)
        torch.testing.assert_close((weight - matrix).detach(), difference * (1 - 0.1 * 0.2) ** 10)


def test_the_angle_between_weights_and_feedback_shrinks(digits: Task) -> None:
    rule = default_rule(KolenPollack, digits, depth=2)
    start = feedback_cosines(rule)
    trained(rule, digits, 6)
    assert max(start) < 0.1 < 0.3 < min(feedback_cosines(rule))


def test_a_mirror_finds_the_weights(digits: Task) -> None:
    """Also their size, which decides whether training diverges."""
    rule, batch = default_rule(WeightMirror, digits), some(digits, 64, torch.float32)
    step = new_step(rule)
    assert max(feedback_cosines(rule)) < 0.1
    for step.index in range(60):
        rule.credit(batch, step)
    assert min(feedback_cosines(rule)) > 0.9
    for name, matrix in list(rule.feedback().items())[1:]:
        assert 0.9 < float(matrix.norm() / rule.network.get_parameter(name).detach().norm()) < 1.1


def test_pepita_of_a_linear_layer_is_direct_feedback_alignment(digits: Task) -> None:
    """Through D = -F W_1^T, at the pushed input."""
    rule, batch = exactly(Pepita, digits, depth=1, activation="identity"), some(digits)
    found = gradients(rule, batch)
    error, count = digits.spec.error(rule.network(batch.inputs).detach(), batch), len(batch)
    projection, weight = rule.get_buffer("projection"), rule.network.get_parameter("blocks.b1.1.weight").detach()
    pushed = batch.inputs.flatten(1) + count * error @ projection
    torch.testing.assert_close(found["blocks.b1.1.weight"], (-error @ projection @ weight.t()).t() @ pushed)


# --- relaxations and targets ----------------------------------------------------------------------------------------------


class LongRelaxation(EquilibriumPropagation):
    FREE, NUDGED, BETA = 300, 300, 0.01


def test_equilibrium_propagation_estimates_the_gradient(digits: Task) -> None:
    """By autograd through a relaxation that is written down here once more, with transposes by hand."""
    rule, batch = exactly(LongRelaxation, digits, width=12), some(digits)
    found = gradients(rule, batch)
    rule.zero_grad()
    (w1, b1), (w2, b2), (w3, b3) = (tuple(block.parameters()) for block in rule.network.blocks.values())
    x = batch.inputs.flatten(1)
    s1, s2, s3 = (torch.zeros(len(batch), size, dtype=x.dtype) for size in (12, 12, 10))
    for _ in range(300):
        new = (x @ w1.t() + b1 + s2 @ w2).tanh(), (s1 @ w2.t() + b2 + s3 @ w3).tanh(), s2 @ w3.t() + b3
        s1, s2, s3 = ((old + fresh) / 2 for old, fresh in zip((s1, s2, s3), new, strict=True))
    torch.testing.assert_close(rule.predict(batch.inputs, torch.Generator()), s3)
    digits.spec.loss(s3, batch).backward()
    for name, p in rule.network.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)


def test_few_iterations_give_its_direction(digits: Task) -> None:
    few, batch = exactly(EquilibriumPropagation, digits), some(digits)
    found, exact = gradients(few, batch), gradients(exactly(LongRelaxation, digits), batch)
    assert min(cosine(found[name], exact[name]) for name in found) > 0.5


def with_exact_inverses(kind: type[Rule], task: Task) -> Any:
    """Of linear blocks, the readout too."""
    rule = exactly(kind, task, depth=2, width=10, activation="identity")
    for name in rule.inverses:
        linear: Any = next(part for part in rule.network.blocks[name].modules() if isinstance(part, nn.Linear))
        inverse = nn.Linear(*reversed(linear.weight.t().shape), dtype=torch.float64)
        inverse.weight = nn.Parameter(torch.linalg.inv(linear.weight).detach().clone())
        inverse.bias = nn.Parameter((-inverse.weight @ linear.bias).detach().clone())
        rule.inverses[name] = inverse
    return rule


@pytest.mark.parametrize("kind", [DifferenceTargets, TargetsThroughout])
def test_targets_by_exact_inverses_are_met(kind: type[Rule], digits: Task) -> None:
    """A block whose input is the target of the block below gives its own target."""
    rule, batch = with_exact_inverses(kind, digits), some(digits)
    found = gradients(rule, batch)
    assert all(float(p.grad.abs().max()) < 1e-12 for p in rule.inverses.parameters())  # nothing to learn
    first, second, readout = rule.network.blocks.values()
    h1 = first(batch.inputs).detach()
    h2 = second(h1).detach()
    scores = readout(h2).detach()
    error = rule.RATE * len(batch) * digits.spec.error(scores, batch)
    if kind is DifferenceTargets:
        t2 = h2 - error @ readout.weight.detach()
    else:
        t2 = torch.linalg.solve(readout.weight.detach(), (scores - error - readout.bias.detach()).t()).t()
    t1 = torch.linalg.solve(second[0].weight.detach(), (t2 - second[0].bias.detach()).t()).t()
    torch.testing.assert_close(found["blocks.b2.0.weight"], (h2 - t2).t() @ h1 / len(batch))
    torch.testing.assert_close(found["blocks.b1.1.weight"], (h1 - t1).t() @ batch.inputs.flatten(1) / len(batch))


# --- values of the loss alone ---------------------------------------------------------------------------------------------


def test_the_slope_is_the_derivative_along_the_direction(digits: Task) -> None:
    rule, batch = default_rule(MeZO, digits, activation="tanh"), some(digits, 64, torch.float32)
    step, before = new_step(rule), [p.detach().clone() for p in rule.parameters()]
    found = [float(rule.slope(batch, step, direction)[0]) for direction in range(4)]
    for p, old in zip(rule.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-6)
    exact = gradients(Backprop(rule.network, digits.spec), batch)
    for direction, slope in enumerate(found):
        derivative = 0.0
        for name, block in rule.network.blocks.items():
            generator = step.generator_for(f"{name} {direction}")
            for own, p in block.named_parameters():
                derivative += float((torch.randn(p.shape, generator=generator) * exact[f"blocks.{name}.{own}"]).sum())
        assert slope == pytest.approx(derivative, rel=1e-2, abs=1e-3)


def test_a_step_of_mezo(digits: Task) -> None:
    """W - lr mean g z, with directions that are drawn here all at once."""
    rule, batch = exactly(MeZO, digits), some(digits)
    step, start = new_step(rule, OptimizerConfig("sgd", lr=0.01)), rule.network.blocks["readout"].weight.detach().clone()
    slopes = [float(rule.slope(batch, step, direction)[0]) for direction in range(MeZO.DIRECTIONS)]
    drawn = [torch.randn(10, 32, generator=step.generator_for(f"readout {k}"), dtype=torch.float64) for k in range(MeZO.DIRECTIONS)]
    expected = start - 0.01 * sum(g * z for g, z in zip(slopes, drawn, strict=True)) / MeZO.DIRECTIONS
    rule.learn(batch, step)
    torch.testing.assert_close(rule.network.blocks["readout"].weight.detach(), expected)


def test_the_best_candidates_by_hand(digits: Task) -> None:
    rule, batch = exactly(Candidates, digits), some(digits)
    stepper = Stepper(rule)
    start = {name: p.detach().clone() for name, p in rule.network.named_parameters()}
    tried: list[tuple[float, dict[str, Tensor]]] = []
    for number in range(Candidates.COUNT):
        generator = stepper.step.generator_for(f"candidate {number}")
        weights = {name: p + Candidates.SIZE * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in start.items()}
        rule.network.load_state_dict(weights)
        tried.append((float(digits.spec.loss(rule.network(batch.inputs), batch).detach()), weights))
    rule.network.load_state_dict(start)
    stepper.take(batch)
    best = sorted(tried, key=lambda pair: pair[0])[: Candidates.BEST]
    for name, p in rule.network.named_parameters():
        torch.testing.assert_close(p.detach(), torch.stack([weights[name] for _, weights in best]).mean(0))
