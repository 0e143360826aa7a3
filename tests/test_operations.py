"""Operations and forward-pass equivalents. Oracles: closed forms of dense networks, and runs that were not disturbed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_rules import StopAfter, assert_equal_bits, config_of, noisy, rule_on, weights

from bpfree import Batch, Budget, Phase, Rule, Run, Step, Task, TaskSpec, Traits, UsageError, always
from bpfree.baselines import DFA, Backprop, Frozen, Linear
from bpfree.config import parse_words, resolve
from bpfree.network import MLPConfig, mlp
from bpfree.plugins import installed_plugins
from bpfree.tasks.augment import FLIP
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.operations import Operations, counted_operations
from bpfree.training.trainer import Interrupted, Trainer

LAYERS = [2 * 64 * 32, 2 * 32 * 32, 2 * 32 * 10]
"""Operations of the layers of the network of ``rule_on``, for one example."""
FORWARD = sum(LAYERS)
BACKPROP = 3 * FORWARD - LAYERS[0]
"""Forward, gradients of all weights, and of all inputs but the first layer's."""
EXAMPLES = 1295


def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operations, "wants", lambda *arguments: False)


class WeightPerturbation(Rule):
    """Forward gradients by ``torch.func.jvp`` with respect to all parameters."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in self.network.named_parameters()}
        moves = {name: torch.randn(p.shape, generator=step.generator, device=p.device) for name, p in parameters.items()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return self.spec.loss(torch.func.functional_call(self.network, values, (batch.inputs,)), batch)

        value, slope = torch.func.jvp(loss, (parameters,), (moves,))
        for name, p in self.network.named_parameters():
            p.grad = slope * moves[name]
        return {"loss": value}


@pytest.mark.parametrize(
    ("factory", "step", "forward"),
    [
        (Backprop, BACKPROP, FORWARD),
        (Frozen, FORWARD + LAYERS[-1], FORWARD),
        (Linear, 2 * 2 * 64 * 10, 2 * 64 * 10),
        # the feedback of both hidden blocks is a product with (10, 32)
        (DFA, 2 * FORWARD + 2 * LAYERS[-1], FORWARD),
        # tangents: W dx and dW x; torch multiplies the first layer's zero tangent too
        (WeightPerturbation, 3 * FORWARD, FORWARD),
    ],
)
def test_closed_forms(digits: Task, device: torch.device, factory: type[Rule], step: int, forward: int) -> None:
    """Two epochs, the last batch of which is smaller; every epoch says how far."""
    rule = rule_on(digits, factory, **({"depth": 0} if factory is Linear else {}))
    run = Trainer(rule, digits, config_of(device, budget=BudgetConfig(epochs=2))).fit()
    assert len(digits.train) == EXAMPLES
    assert run.result["forward_operations"] == forward
    assert run.result["train/operations"] == 2 * EXAMPLES * step
    assert run.result["train/forwards"] == pytest.approx(2 * EXAMPLES * step / forward, rel=1e-12)
    assert [m["forwards"] for m in run.history] == pytest.approx([EXAMPLES * step / forward, 2 * EXAMPLES * step / forward], rel=1e-12)


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"precision": "bf16"}])
def test_micro_batches_and_half_precision_cost_the_same(digits: Task, device: torch.device, options: dict[str, Any]) -> None:
    run = Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1), **options)).fit()
    assert (run.result["train/operations"], run.result["forward_operations"]) == (EXAMPLES * BACKPROP, FORWARD)


def test_a_twin_costs_what_is_left_to_learn(digits: Task, device: torch.device) -> None:
    run = Trainer(rule_on(digits, DFA), digits, config_of(device, budget=BudgetConfig(epochs=1), twin=True)).fit()
    assert EXAMPLES * (FORWARD + LAYERS[-1]) <= run.result["train/operations"] < EXAMPLES * 2 * FORWARD


class ReadoutLater(Backprop):
    """A phase of everything, and one of the readout on features."""

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("all", epochs=1), Phase("readout", epochs=2, groups=("readout",), on_features=True)]

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if not step.phase.on_features:
            return super().credit(batch, step)
        loss = self.spec.loss(self.read(batch.inputs, step.generator), batch)
        loss.backward()
        return {"loss": loss.detach()}


@pytest.mark.parametrize(("augment", "times"), [((), 1), ((FLIP,), 2)])
def test_features_count_as_often_as_they_are_computed(
    digits: Task, device: torch.device, tmp_path: Path, augment: tuple[Any, ...], times: int
) -> None:
    """Once if they are kept, in each pass otherwise; an interruption counts none twice."""
    expected = EXAMPLES * (BACKPROP + times * sum(LAYERS[:-1]) + 2 * 2 * LAYERS[-1])
    run = Trainer(rule_on(digits, ReadoutLater), digits, config_of(device), augment=augment).fit()
    assert run.result["train/operations"] == expected
    watch = StopAfter(30)  # in the first pass on features
    watch.trainer = Trainer(rule_on(digits, ReadoutLater), digits, config_of(device), folder=tmp_path, observers=[watch], augment=augment)
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    again = Trainer(rule_on(digits, ReadoutLater), digits, config_of(device), folder=tmp_path, augment=augment)
    assert again.fit(tmp_path / "checkpoints" / "last.pt").result["train/operations"] == expected


@pytest.mark.parametrize("at", [1, 21, 40, 70])
def test_a_run_that_goes_on_counts_the_same(digits: Task, device: torch.device, tmp_path: Path, at: int) -> None:
    """Several phases, other batch sizes, growth; equal to the last bit."""
    straight = Trainer(noisy(digits), digits, config_of(device)).fit()
    watch = StopAfter(at)
    watch.trainer = Trainer(noisy(digits), digits, config_of(device), folder=tmp_path, observers=[watch])
    with pytest.raises(Interrupted):
        watch.trainer.fit()
    run = Trainer(noisy(digits), digits, config_of(device), folder=tmp_path).fit(tmp_path / "checkpoints" / "last.pt")
    for key in ("train/operations", "train/forwards", "forward_operations"):
        assert run.result[key] == straight.result[key] > 0
    assert [m["forwards"] for m in run.history] == [m["forwards"] for m in straight.history]


def test_a_budget_of_forward_passes_ends_a_run(digits: Task, device: torch.device, tmp_path: Path) -> None:
    """In the middle of a pass, after the step that uses it up; schedules follow it; a larger one continues."""
    budget = BudgetConfig(forwards=5000)
    seen: list[float] = []

    class Watched(Backprop):
        def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
            seen.append(step.progress)
            return super().credit(batch, step)

    run = Trainer(rule_on(digits, Watched), digits, config_of(device, budget=budget), folder=tmp_path).fit()
    per_step = 64 * BACKPROP / FORWARD
    assert run.status == "finished"
    assert run.total_epochs is None
    assert 5000 <= run.result["train/forwards"] < 5000 + per_step
    assert seen[:2] == pytest.approx([0, per_step / 5000], rel=1e-9)
    assert "val/accuracy" in run.history[-1]
    longer = Trainer(rule_on(digits, Watched), digits, config_of(device, budget=BudgetConfig(forwards=9000)), folder=tmp_path)
    assert 9000 <= longer.fit(tmp_path / "checkpoints" / "last.pt").result["train/forwards"] < 9000 + per_step


def test_a_phase_may_end_with_its_share(digits: Task, device: torch.device) -> None:
    class Halves(Backprop):
        def phases(self, budget: Budget) -> Iterable[Phase]:
            return [Phase(name, forwards=0.5 * (budget.forwards or 0)) for name in ("a", "b")]

    rates: list[tuple[str, float]] = []

    class Watched(Halves):
        def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
            rates.append((step.phase.name, step.progress))
            return super().credit(batch, step)

    run = Trainer(rule_on(digits, Watched), digits, config_of(device, budget=BudgetConfig(forwards=4000))).fit()
    assert 4000 <= run.result["train/forwards"] < 4000 + 2 * 64 * BACKPROP / FORWARD
    first = [progress for name, progress in rates if name == "a"]
    assert first[-1] < 0.5 <= min(progress for name, progress in rates if name == "b")


def test_one_of_five_limits() -> None:
    assert BudgetConfig(forwards=7).resolve(100) == Budget(forwards=7)
    assert BudgetConfig(operations=7e3).resolve(100) == Budget(operations=7e3)
    with pytest.raises(UsageError, match="one limit"):
        BudgetConfig(forwards=7, samples=3).resolve(100)


# --- what must not happen --------------------------------------------------------------------------------------------


class Breaking(Backprop):
    """Cannot be counted: it notices another dispatch mode, after it has drawn and moved."""

    where = "credit"

    def _look(self) -> None:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("not like this")

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        noise = torch.randn(batch.inputs.shape, generator=step.generator, device=batch.inputs.device)
        metrics = super().credit(Batch(batch.inputs + 0.1 * noise * torch.rand(()).item(), batch.targets), step)
        if self.where == "credit":
            with torch.no_grad():
                next(self.parameters()).add_(0.01)
            self._look()
        return metrics

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        if self.where == "predict":
            self._look()
        return super().predict(inputs, generator)


@pytest.mark.parametrize("where", ["credit", "predict"])
def test_a_rule_that_cannot_be_counted_trains_as_if_nobody_had_tried(
    digits: Task, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, where: str
) -> None:
    monkeypatch.setattr(Breaking, "where", where)
    one, other = rule_on(digits, Breaking), rule_on(digits, Breaking)
    with caplog.at_level(logging.WARNING):
        run = Trainer(one, digits, config_of(device), folder=tmp_path).fit()
        resumed = Trainer(rule_on(digits, Breaking), digits, config_of(device, budget=BudgetConfig(epochs=4)), folder=tmp_path)
        longer = resumed.fit(tmp_path / "checkpoints" / "last.pt")
    assert [r.getMessage() for r in caplog.records] == [
        "the operations of Breaking cannot be counted: RuntimeError: not like this",
    ]
    for made in (run, longer):
        assert not {"train/forwards", "train/operations", "forward_operations"} & made.result.keys()
        assert not any("forwards" in m for m in made.history)
    with pytest.raises(UsageError, match="not like this"):
        Trainer(rule_on(digits, Breaking), digits, config_of(device, budget=BudgetConfig(forwards=100))).fit()
    uncounted(monkeypatch)
    monkeypatch.setattr(Breaking, "where", "nowhere" if where == "predict" else where)
    Trainer(other, digits, config_of(device)).fit()
    assert_equal_bits(weights(one), weights(other))


class Scaling(Rule):
    """No matrix product anywhere."""

    traits_of = always(Traits(readout="optional"))

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.network(batch.inputs), batch)
        loss.backward()
        return {"loss": loss.detach()}


class Gains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] * self.gain


def test_a_forward_pass_without_products_is_no_measure(digits: Task, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    def made(**budget: int) -> Run:
        from bpfree import split

        rule = Scaling(split(nn.Sequential(nn.Identity(), Gains()), (1, 8, 8)), digits.spec)
        return Trainer(rule, digits, config_of(device, budget=BudgetConfig(**budget))).fit()

    run = made(epochs=1)
    assert run.status == "finished"
    assert not any("forward" in key or "operations" in key for key in run.result)
    assert "no matrix product" in caplog.text
    with pytest.raises(UsageError, match="no matrix product"):
        made(forwards=100)


def test_a_rules_own_error_stays_what_it_is(digits: Task, device: torch.device) -> None:
    class Wrong(Backprop):
        def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
            raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        Trainer(rule_on(digits, Wrong), digits, config_of(device)).fit()


def test_a_checkpoint_from_before_operations_were_counted(digits: Task, device: torch.device, tmp_path: Path) -> None:
    """It continues, without these numbers."""
    Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=1)), folder=tmp_path).fit()
    path = tmp_path / "checkpoints" / "last.pt"
    saved = read_checkpoint(path)
    del saved["training"]["operations"]
    saved["training"]["step_bytes"] = saved["training"].pop("memory")["step_bytes"]
    del saved["training"]["position"]["phase_operations"]
    del saved["digest"]  # as it was before there were any
    torch.save(saved, path)
    run = Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(epochs=2)), folder=tmp_path).fit(path)
    assert run.status == "finished"
    assert "train/operations" not in run.result
    with pytest.raises(UsageError, match="first part were not counted"):
        Trainer(rule_on(digits), digits, config_of(device, budget=BudgetConfig(forwards=10**6)), folder=tmp_path).fit(path)


# --- all rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", installed_plugins().names("rules"))
def test_every_rule_is_counted_and_none_is_changed_by_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same run with no one counting, bit for bit; a training step costs a good part of a forward pass at least.

    Less than one where features are kept, or where a prediction takes many steps of which training makes one (NoProp-CT and -FM: 20).
    """
    words = [f"rule={name}", "budget.epochs=3", "device=cpu", "threads=1"]
    recipe = resolve(parse_words(words))
    task = recipe.build_task()
    small = Task(task.spec, task.train.subset(torch.arange(150)), task.validation, task.test)
    rules = [recipe.build_rule(task.spec) for _ in range(2)]
    run = Trainer(rules[0], small, recipe.settings).fit()
    assert run.result["train/operations"] > 0
    assert run.result["train/forwards"] > 0.2 * run.result["train/samples"]
    assert all("forwards" in m for m in run.history)
    uncounted(monkeypatch)
    Trainer(rules[1], small, recipe.settings).fit()
    assert_equal_bits(weights(rules[0]), weights(rules[1]))


@pytest.mark.parametrize("name", installed_plugins().names("rules"))
@pytest.mark.parametrize("twin", [False, True])
def test_every_rule_and_twin_ends_with_its_budget_of_forward_passes(name: str, twin: bool) -> None:
    recipe = resolve(parse_words([f"rule={name}", f"twin={twin}", "budget.forwards=2500", "device=cpu", "threads=1"]))
    task = recipe.build_task()
    config = recipe.settings
    config.evaluation = EvaluationConfig(test=False, alternatives=False)
    run = Trainer(recipe.build_rule(task.spec), task, config).fit()
    assert run.status == "finished"
    learns_nothing = twin and name in ("forward-forward", "hebbian-norm")  # they predict by the untrained layers themselves
    assert run.result["train/forwards"] >= (0 if learns_nothing else 1250 if "softhebb" in name or twin else 2500)


def test_the_counter_agrees_with_torchs_and_adds_products_with_vectors() -> None:
    torch.manual_seed(0)
    spec = TaskSpec("flat", (6,), 3)
    network, x = mlp(spec, MLPConfig(depth=2, width=5)), torch.randn(4, 6)
    with FlopCounterMode(display=False) as theirs:
        network(x).sum().backward()
    with counted_operations() as ours:
        network(x).sum().backward()
    assert ours() == theirs.get_total_flops() > 0
    matrix, vector = torch.randn(7, 6), torch.randn(6)
    with counted_operations() as count:
        matrix @ vector
        vector @ vector
        torch.addmv(torch.zeros(7), matrix, vector)
    assert count() == 2 * 42 + 2 * 6 + 2 * 42


def test_products_in_place_count() -> None:
    """Oracle: the same products with a result of their own."""
    a, b = torch.randn(2, 7, 6), torch.randn(2, 6, 5)
    with counted_operations() as count:
        torch.zeros(7, 5).addmm_(a[0], b[0])
        torch.zeros(2, 7, 5).baddbmm_(a, b)
        torch.zeros(7, 5).addbmm_(a, b)
        torch.zeros(7).addmv_(a[0], b[0, :, 0])
        torch.zeros(7, 5).addr_(a[0, :, 0], b[0, 0])
    with counted_operations() as expected:
        a[0] @ b[0]
        a @ b
        a @ b
        a[0] @ b[0, :, 0]
        a[0, :, :1] @ b[0, :1]
    assert count() == expected() > 0


def test_factorisations_and_solutions_count() -> None:
    """Oracle: Golub and Van Loan: Cholesky n^3/3, LU 2n^3/3, a triangle n^2 for each column, an inverse 2n^3."""
    n, columns = 6, 5
    matrix = torch.eye(n).expand(2, n, n) * 3
    right = torch.ones(2, n, columns)
    calls = {
        lambda: torch.linalg.cholesky(matrix): 2 * n**3 // 3,
        lambda: torch.linalg.lu_factor(matrix): 2 * 2 * n**3 // 3,
        lambda: torch.linalg.inv(matrix): 2 * 2 * n**3,
        lambda: torch.linalg.solve(matrix, right): 2 * (2 * n**3 // 3 + 2 * n**2 * columns),
        lambda: torch.linalg.solve(matrix, right[:, :, 0]): 2 * (2 * n**3 // 3 + 2 * n**2),
        lambda: torch.linalg.solve_triangular(matrix, right, upper=True): 2 * n**2 * columns,
        lambda: torch.cholesky_solve(right, matrix): 2 * 2 * n**2 * columns,
        lambda: torch.linalg.qr(matrix, mode="r"): 2 * (4 * n**3 // 3),
        lambda: torch.linalg.qr(matrix): 2 * 2 * (4 * n**3 // 3),
        lambda: torch.linalg.svd(matrix): 2 * 22 * n**3,
        lambda: torch.ops.aten._linalg_svd(matrix, False, False): 2 * (8 * n**3 // 3),  # svdvals asks for vectors while it is watched
    }
    for call, expected in calls.items():
        with counted_operations() as count:
            call()
        assert count() == expected
