"""Continuous time, flow matching and the baselines on targets and inputs of other kinds than images of one class each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_noprop import blocks, timed
from bpfree_noprop.adjoint import NoPropAdjoint
from bpfree_noprop.backprop import NoPropBackprop
from bpfree_noprop.base import NoPropRule
from bpfree_noprop.ct import NoPropCT, NoPropCTConfig
from bpfree_noprop.fm import NoPropFM, NoPropFMConfig
from torch import Tensor, nn

import bpfree
from bpfree.errors import UsageError
from bpfree.options import OptimizerConfig
from bpfree.step import Batch
from bpfree.tasks.spec import InputPart
from bpfree.tasks.task import Split, Task, TaskSpec
from bpfree.training.config import EvaluationConfig
from bpfree.training.stepper import new_step

RULES = {"ct": NoPropCT, "fm": NoPropFM, "backprop": NoPropBackprop, "adjoint": NoPropAdjoint}
SMALL: dict[str, dict[str, Any]] = {
    "ct": {"steps": 20, "validation_steps": 4},
    "fm": {"steps": 20, "validation_steps": 4},
    "backprop": {"T": 2},
    "adjoint": {"steps": 8, "validation_steps": 4, "training_steps": 8},
}


def rule_of(name: str, spec: TaskSpec, *, width: int = 32, **options: Any) -> NoPropRule:
    torch.manual_seed(0)
    cls = RULES[name]
    config = cls.Config(**{**SMALL[name], **options})
    wanted = cls.network_options(spec, config) | {"width": width}
    builder = {**blocks.NETWORKS, **timed.NETWORKS}[wanted.pop("name")]
    return cls(builder.build(spec, builder.Config(**wanted)), spec, config)


def trained(rule: NoPropRule, task: Task, *metrics: str, epochs: int = 10) -> dict[str, Any]:
    config = bpfree.TrainConfig(
        budget=bpfree.BudgetConfig(epochs=epochs),
        optimizer=OptimizerConfig(lr=5e-3),
        batch_size=32,
        device="cpu",
        evaluation=EvaluationConfig(metrics=list(metrics)),
    )
    return dict(bpfree.Trainer(rule, task, config).fit().result)


def parts_of(inputs: Any, targets: Tensor) -> list[Split]:
    return [Split(inputs[a:b], targets[a:b]) for a, b in ((0, 500), (500, 600), (600, 700))]


# --- real values: exact blocks ------------------------------------------------------------------------------------------


def population(covariance: Tensor) -> Tensor:
    """Return rows whose mean is 0 and whose covariance is exactly this."""
    rows = math.sqrt(len(covariance)) * torch.linalg.cholesky(covariance).T
    return torch.cat([rows, -rows])


def gaussian(name: str, covariance: Tensor, prior: Tensor, **options: Any) -> Any:
    """Return a rule for ``y = x + e``, ``e ~ N(0, covariance)``, ``x ~ N(0, prior)``, in double precision, whose targets are whitened."""
    d = len(covariance)
    rule = rule_of(name, TaskSpec("gaussian", (d,), d, "real"), width=2, **options).double().eval()
    rule.prepare(Split(torch.empty(0, d), population(covariance + prior)), torch.Generator())
    return rule


def exact_ct(covariance: Tensor, prior: Tensor, **options: Any) -> NoPropCT:
    """Make the block say ``E[u | x, z_t]``."""
    rule = gaussian("ct", covariance, prior, **options)
    W, block = rule.embed.weight, rule.block
    precision = (W @ covariance @ W.T).inverse()  # of u given x

    def judge(x: Tensor, z: Tensor, abar: Tensor) -> Tensor:
        share = abar.flatten()[0]
        posterior = (precision + share / (1 - share) * torch.eye(len(W), dtype=W.dtype)).inverse()
        return (x @ W.T @ precision + z * share.sqrt() / (1 - share)) @ posterior

    block.features, block.judge = (lambda x: x), judge
    block.moments = lambda t: torch.sigmoid(-rule.noise(t)[0])[:, None]
    return rule  # type: ignore[no-any-return]


def calibrated(rule: NoPropRule, covariance: Tensor, prior: Tensor) -> dict[str, float]:
    draws, d = torch.Generator().manual_seed(1), len(covariance)
    x = torch.randn(20_000, d, generator=draws, dtype=torch.float64) @ torch.linalg.cholesky(prior).T
    y = x + torch.randn(20_000, d, generator=draws, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    with torch.no_grad():
        return rule.calibrate(Split(x, y), draws)


@pytest.mark.parametrize("steps", [3, 10, 100])
def test_continuous_time_has_mean_and_variance_of_the_target(steps: int) -> None:
    """Oracle: y given x is N(x, 1/4) by construction; an exact block, whose residuals are measured on other examples."""
    covariance, prior = torch.eye(1, dtype=torch.float64) / 4, torch.eye(1, dtype=torch.float64)
    rule = exact_ct(covariance, prior, steps=steps)
    found = calibrated(rule, covariance, prior)
    snr = torch.exp(-rule.noise(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))[0])
    wanted = (1 / (5 + snr)).tolist()  # u = y / sqrt(1.25)
    assert list(found.values()) == pytest.approx([wanted[0], wanted[2]], rel=0.05)
    assert float(rule.residuals.at(0.5)) == pytest.approx(wanted[1], rel=0.05)
    x = torch.full((60_000, 1), 0.7, dtype=torch.float64)
    drawn = rule.sample(x, 1, torch.Generator().manual_seed(2))[0]
    assert abs(drawn.var().item() / 0.25 - 1) < 0.02
    assert abs(drawn.mean().item() - 0.7) < 0.01
    with torch.no_grad():
        torch.testing.assert_close(rule.predict(x[:3], torch.Generator()), x[:3], rtol=0.01, atol=0)


def test_without_the_residuals_noise_of_the_last_state_is_left() -> None:
    # Oracle: the diffusion's own limit: z_1 over its signal has the variance of u given x, and exp(gamma_0).
    covariance, prior = torch.eye(1, dtype=torch.float64) / 4, torch.eye(1, dtype=torch.float64)
    rule = exact_ct(covariance, prior, steps=300, step_noise="paper", gamma_0=-2.0, gamma_1=8.0)
    assert rule.residuals is None
    assert not rule.calibrates
    drawn = rule.sample(torch.zeros(60_000, 1, dtype=torch.float64), 1, torch.Generator().manual_seed(2))[0]
    assert drawn.var().item() == pytest.approx(0.25 + 1.25 * math.exp(-2), rel=0.03)


def test_before_it_is_calibrated_the_input_says_nothing() -> None:
    # Oracle: the posterior variance of a target N(0, 1) of which only the state is known, 1 / (1 + SNR).
    rule = rule_of("ct", TaskSpec("r", (3,), 2, "real"))
    t = torch.tensor([0.0, 0.25, 1.0])
    wanted = 1 / (1 + torch.exp(-rule.noise(t)[0])).detach()
    for time, value in zip(t.tolist(), wanted, strict=True):
        torch.testing.assert_close(rule.residuals.at(time), value * torch.eye(2), rtol=1e-3, atol=1e-4)


def test_several_values_have_their_covariance() -> None:
    covariance = torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=torch.float64)
    prior = torch.tensor([[2.0, -0.5], [-0.5, 0.5]], dtype=torch.float64)
    rule = exact_ct(covariance, prior, steps=10)
    calibrated(rule, covariance, prior)
    drawn = rule.sample(torch.zeros(40_000, 2, dtype=torch.float64), 1, torch.Generator().manual_seed(2))[0]
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.04, atol=0.03)


def test_the_flow_carries_noise_to_the_target() -> None:
    # Oracle: in one dimension the flow keeps quantiles: z_0 goes to mean + deviation * z_0, and 0 to the mean.
    covariance, prior = torch.eye(1, dtype=torch.float64) / 4, torch.eye(1, dtype=torch.float64)
    rule = gaussian("fm", covariance, prior, steps=100, stepper="heun")
    block, variance = rule.block, 0.2  # of u = y / sqrt(1.25) given x

    def judge(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        mean, t = x / math.sqrt(1.25), t.flatten()[0]
        return mean + (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2) * (z - t * mean)

    block.features, block.judge, block.moments = (lambda x: x), judge, (lambda t: t[:, None])
    x = torch.full((60_000, 1), 0.7, dtype=torch.float64)
    drawn = rule.sample(x, 1, torch.Generator().manual_seed(2))[0]
    start = rule.start(x, torch.Generator().manual_seed(2))
    torch.testing.assert_close(drawn, 0.7 + 0.5 * start, rtol=0, atol=2e-3)
    assert abs(drawn.var().item() / 0.25 - 1) < 0.02
    with torch.no_grad():
        torch.testing.assert_close(rule.predict(x[:3], torch.Generator()), x[:3], rtol=1e-4, atol=0)
        alone = rule.alternatives(x[:3], torch.Generator())["one_step"]
    torch.testing.assert_close(alone, x[:3], rtol=1e-6, atol=0)  # from t = 0 the velocity leads to the mean


# --- real values: learned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), [("ct", (1,)), ("ct", (2, 1)), ("fm", (2, 1)), ("backprop", (1,)), ("adjoint", (2, 1))])
def test_real_values_are_learned(name: str, shape: tuple[int, ...]) -> None:
    # Oracle: the noise of the target is a tenth of its deviation, so that R2 can be 0.99; its scale and mean are far from 1 and 0.
    torch.manual_seed(0)
    d = math.prod(shape)
    x = torch.randn(700, 6)
    y = 300 + 40 * (torch.tanh(x[:, :d]) + 0.1 * torch.randn(700, d))
    task = Task(TaskSpec("curve", (6,), d, "real", output_shape=shape), *parts_of(x, y.view(-1, *shape)))
    rule = rule_of(name, task.spec)
    result = trained(rule, task, "r2")
    assert result["test/r2"] > 0.8
    with torch.no_grad():
        assert rule.predict(task.test.inputs[:5], torch.Generator()).shape == (5, *shape)
        if name in ("ct", "fm"):
            assert rule.sample(task.test.inputs[:5], 3, torch.Generator()).shape == (3, 5, *shape)
            with rule.quick_predictions():
                others = rule.alternatives(task.test.inputs[:5], torch.Generator())
            assert all(each.shape == (5, *shape) for each in others.values())
            assert {"one_step", "flow"} <= set(others)
    if name == "ct":
        assert 0 < result["calibration/end/residual_variance"] < result["calibration/start/residual_variance"] < 0.5
        torch.testing.assert_close(rule.noise.at_ends()[1], torch.tensor(-4.0))  # nothing holds it, so it stays
        assert "gamma_0" not in dict(rule.noise.named_parameters())


# --- several labels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sets(spec: TaskSpec) -> TaskSpec:
    return replace(spec, targets="multilabel")


@pytest.mark.parametrize("embedding", ["one-hot", "learned"])
def test_sets_of_labels_in_continuous_time(embedding: str, sets: TaskSpec, batch: Batch) -> None:
    # Oracle: Eq. 9 written out: u the sum of the labels' embeddings, estimates by one sigmoid for each label, a head of sigmoids.
    rule = rule_of("ct", sets, embedding=embedding, times="uniform")
    rows = (torch.rand(16, 4, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    step, weight = new_step(rule, seed=3), rule.embed.weight
    u = rows @ weight
    t = torch.rand(16, generator=step.generator_for("time"))
    gamma, slope = rule.noise(t)
    abar = torch.sigmoid(-gamma)[:, None]
    z = abar.sqrt() * u + (1 - abar).sqrt() * torch.randn(u.shape, generator=step.generator_for("block"))
    uhat = rule.block(batch.inputs, z, t).sigmoid() @ weight
    wanted = 0.5 * (-slope * torch.exp(-gamma) * (uhat - u).pow(2).sum(1)).mean()
    first, last = (torch.sigmoid(-g) for g in rule.noise.at_ends())
    end = last.sqrt() * u + (1 - last).sqrt() * torch.randn(u.shape, generator=step.generator_for("head"))
    wanted = wanted + F.binary_cross_entropy(rule.head.linear(end).sigmoid(), rows, reduction="sum") / 16
    d = u.shape[1]
    wanted = wanted + 0.5 * (first * u.pow(2).sum(1).mean() - d * first - d * torch.log1p(-first))
    torch.testing.assert_close(rule.objective(Batch(batch.inputs, rows), new_step(rule, seed=3)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embedding", ["one-hot", "learned"])
def test_sets_of_labels_by_flow_matching(embedding: str, sets: TaskSpec) -> None:
    # Oracle: the 16 subsets of four labels are read from their clean states; between two of them a label is undecided.
    rule = rule_of("fm", sets, embedding=embedding)
    subsets = torch.tensor([[(i >> k) & 1 for k in range(4)] for i in range(16)]).float()
    scores = rule.nearness(rule.embed(subsets))
    assert torch.equal(scores > 0, subsets > 0)
    between = rule.nearness((rule.embed(subsets[:1]) + rule.embed(subsets[1:2])) / 2)
    torch.testing.assert_close(between[0, 0], torch.tensor(0.0), rtol=0, atol=1e-6)
    assert ("head" in rule.groups()) == (embedding == "learned")


@pytest.mark.parametrize(("name", "embedding"), [*((name, "one-hot") for name in RULES), ("ct", "learned"), ("fm", "learned")])
def test_sets_of_labels_are_learned(name: str, embedding: str, sets: TaskSpec) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(700, 1, 6, 6)
    labels = (inputs.flatten(1)[:, :4] > 0).float()
    labels[:, 3] = labels[:, 0] * labels[:, 1]  # labels that depend on each other
    task = Task(replace(sets, std=(1.0,)), *parts_of(inputs, labels))
    result = trained(rule_of(name, task.spec, embedding=embedding), task, epochs=12)
    assert result["test/label_accuracy"] > (0.62 if name == "adjoint" else 0.75)  # without learning 0.56


def test_what_other_targets_rule_out(sets: TaskSpec) -> None:
    for name, options in (("ct", {"embedding": "prototype"}), ("fm", {"embedding": "learned", "head": "radial"})):
        with pytest.raises(UsageError, match="'multilabel'"):
            rule_of(name, sets, **options)
    for name in RULES:
        with pytest.raises(UsageError, match="'real'"):
            rule_of(name, TaskSpec("r", (3,), 2, "real"), embedding="learned")


# --- many classes, other inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ct", "fm"])
def test_a_thousand_classes(name: str) -> None:
    # Oracle: examples are their class's corner of a cube in ten dimensions; chance is 0.001.
    corners = torch.tensor([[(i >> k) & 1 for k in range(10)] for i in range(1000)]).float() * 2 - 1
    options = {"loss": "cross-entropy"} if name == "ct" else {}
    rule = rule_of(name, TaskSpec("many", (10,), 1000), width=128, embedding="learned", embedding_dim=16, **options)
    step = new_step(rule, OptimizerConfig(lr=3e-3))
    for step.index in range(150 if name == "ct" else 250):
        chosen = torch.randint(1000, (256,), generator=torch.Generator().manual_seed(step.index))
        rule.learn(Batch(corners[chosen], chosen), step)
    with torch.no_grad():
        found = rule.eval().predict(corners, torch.Generator()).argmax(1)
    assert float((found == torch.arange(1000)).float().mean()) > (0.3 if name == "ct" else 0.02)


class Words(nn.Module):
    """A model of one's own for token inputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(20, 16), nn.Linear(16, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.table(tokens)))


class Both(nn.Module):
    """A model of one's own for inputs of two tensors."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.words, self.numbers, self.head = Words(8), nn.Linear(3, 8), nn.Linear(16, outputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat([self.words(inputs["words"]), self.numbers(inputs["numbers"])], 1).relu())


@pytest.mark.parametrize(("name", "several"), [("ct", False), ("ct", True), ("fm", True), ("adjoint", False)])
def test_inputs_that_a_stem_takes(name: str, several: bool) -> None:
    # Oracle: a class is the first token, or its sum with a bit of the numbers: chance is 1 of 3.
    torch.manual_seed(0)
    words, numbers = torch.randint(0, 20, (700, 6)), torch.randn(700, 3)
    words[:, 1:] = words[:, :1]
    labels = ((words[:, 0] + (numbers[:, 0] > 0).long()) if several else words[:, 0]) % 3
    parts = {"words": InputPart((6,), "integer", vocabulary=20), "numbers": InputPart((3,))}
    spec = TaskSpec("t", (), 3, structure=parts) if several else TaskSpec("t", (6,), 3, vocabulary=20)
    inputs: Any = {"words": words, "numbers": numbers} if several else words
    cut: Callable[[Any, int, int], Any] = lambda x, a, b: {k: v[a:b] for k, v in x.items()} if several else x[a:b]  # noqa: E731
    task = Task(spec, *(Split(cut(inputs, a, b), labels[a:b]) for a, b in ((0, 500), (500, 600), (600, 700))))
    cls = RULES[name]
    network = bpfree.build_network("noprop-timed", spec, stem=Both if several else Words, width=32)
    rule = cls(network, spec, cls.Config(**SMALL[name]))
    assert rule.traits.inputs == "any"
    assert trained(rule, task)["test/accuracy"] > 0.7
    with pytest.raises(UsageError, match="network=noprop-timed"):
        timed.NETWORKS["noprop-timed-mlp"].build(spec, None)


def test_configurations_are_taken_as_declared() -> None:
    # Oracle: the configurations' own types and the traits.
    for name, config in (("ct", NoPropCTConfig()), ("fm", NoPropFMConfig())):
        assert set(RULES[name].traits_of(config).targets) == {"classes", "soft", "multilabel", "real"}
        assert RULES[name].traits_of(config).inputs == "real"


def test_cross_entropy_in_continuous_time(sets: TaskSpec, batch: Batch) -> None:
    # Oracle: torch's losses of the block's outputs at the drawn times; real values have none.
    rows = (torch.rand(16, 4, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    for spec, targets in ((replace(sets, targets="classes"), batch.targets), (sets, rows)):
        rule, seen = rule_of("ct", spec, loss="cross-entropy"), []
        rule.block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        found = rule.losses(Batch(batch.inputs, targets), new_step(rule, seed=3))["block/loss"]
        if spec is sets:
            wanted = F.binary_cross_entropy_with_logits(seen[0], rows, reduction="sum") / 16
        else:
            wanted = F.cross_entropy(seen[0], batch.targets)
        torch.testing.assert_close(found, wanted / 2)
    with pytest.raises(UsageError, match=r"rule\.loss=squared"):
        rule_of("ct", TaskSpec("r", (3,), 2, "real"), loss="cross-entropy")
