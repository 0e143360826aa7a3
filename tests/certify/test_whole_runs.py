"""Whole runs as the examination. Oracles: rules whose truth is known by construction or from the literature; bits of an unexamined run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from certify_cheaters import LocalHeads
from certify_disguises import Autograd, Chained, HandWritten, Liar, PhaseCopies
from honest_rules import HONEST, FeedbackAlignment, Honest
from torch import Tensor, nn

from bpfree import Batch, Phase, Step, runner
from bpfree.baselines import DFA
from bpfree.certify import Measurements, certify, examine
from bpfree.certify.arms import Arm, Change, Reference, WholeRun
from bpfree.certify.checks.whole_runs import CHECKS
from bpfree.certify.reading import Reading, Verdict, measure_reading, read_matrix
from bpfree.certify.subject import Subject
from bpfree.certify.transport import chained_transport
from bpfree.certify.twice import Record, dirty
from bpfree.certify.whole_examination import examine_whole_runs
from bpfree.certify.whole_runs import run_arm, run_reference, settings_of
from bpfree.network import feedback_weights
from bpfree.network.network import Network
from bpfree.rule import Rule
from bpfree.tasks.task import Task

EPOCHS = 1


@pytest.fixture(scope="module")
def few() -> Task:
    """A quarter of the digits."""
    task = Subject("dfa").resolve(settings_of(Subject("dfa"), "runs", 1, 0)).build_task()
    return Task(task.spec, task.train.subset(torch.arange(320)), None, task.test.subset(torch.arange(64)))  # type: ignore[union-attr]


def reading_of(rule: str | type[Rule], task: Task, settings: tuple[str, ...] = ()) -> Reading:
    subject = Subject(rule, settings)
    reference, _ = run_reference(subject, task, epochs=EPOCHS)
    return measure_reading(subject, reference, task, draw=3, epochs=EPOCHS)


def verdicts(reading: Reading) -> set[str]:
    return {cell.verdict for row in reading.cells.values() for cell in row.values()}


@pytest.mark.parametrize("known", HONEST, ids=lambda known: known.rule.__name__)
def test_what_is_said_of_honest_rules_is_true(known: Honest, few: Task) -> None:
    """Each is found to read or to execute exactly what its author says; those that do neither are local by bits."""
    reading = reading_of(known.rule, few, known.settings)
    found = verdicts(reading)
    assert reading.exact
    assert "unmeasured" not in found
    assert ("reads" in found) == (known.reads != "nothing")
    assert bool(found & {"reads", "executes"}) == (known.reads != "nothing" or known.learns != "nothing")


class WeightsAsFeedback(FeedbackAlignment):
    """Credit through the weights themselves, by the library's own way of putting others in their place."""

    def feedback(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in feedback_weights(self.network).items()}


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [(Autograd, "reads"), (Chained, "reads"), (HandWritten, "reads"), (PhaseCopies, "at construction"), (WeightsAsFeedback, "reads")],
)
def test_disguises_read_the_weights_above(rule: type[Liar | FeedbackAlignment], verdict: Verdict, few: Task) -> None:
    reading = reading_of(rule, few)
    assert verdicts(reading) == {verdict}
    assert reading.reach(verdict) == len(reading.blocks) - 1


class OnlyTheNext(LocalHeads):
    """Each block's local loss is taken after the next block, whose weights it reads."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        x, names = batch.inputs, self.network.names
        loss = torch.zeros(())
        for name, above in zip(names, [*names[1:], None], strict=True):
            y = self.network.blocks[name](x.detach())
            part = self.spec.loss(y, batch) if above is None else (self.network.blocks[above](y) ** 2).mean()
            part.backward(inputs=list(self.network.blocks[name].parameters()))
            x, loss = y, part.detach()
        return {"loss": loss}


def test_the_reach_is_how_far_above_it_reads(few: Task) -> None:
    reading = reading_of(OnlyTheNext, few)
    assert reading.reach("reads") == 1
    assert {(below, above) for below, above, _ in reading.found("reads")} == set(zip(reading.blocks, reading.blocks[1:], strict=False))


class FeedbackOfTheWeights(DFA):
    """Direct feedback that is made from the readout's first weights: copied, or only scaled by their deviation."""

    copied = True

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        first = next(p.detach() for p in network.blocks[network.readout].parameters() if p.dim() > 1)
        for name, value in self.named_buffers():
            if "feedback" in name:
                value.copy_(first.T.reshape(value.shape) if self.copied and value.numel() == first.numel() else value * first.std())


class ScaledFeedback(FeedbackOfTheWeights):
    copied = False


def test_what_is_read_at_construction_is_told_apart(few: Task) -> None:
    """A copy of the first weights is one thing, a scale another: a permutation leaves it as it is."""
    assert [name for name, _ in Subject(ScaledFeedback).build(Subject(ScaledFeedback).specimen()).named_buffers() if "feedback" in name]
    assert verdicts(reading_of(ScaledFeedback, few)) <= {"none", "statistics"}
    assert "statistics" in verdicts(reading_of(ScaledFeedback, few))
    assert "at construction" in verdicts(reading_of(FeedbackOfTheWeights, few))
    (told,) = certify(ScaledFeedback, only=["trait-downstream-weights"]).findings
    assert (told.status, "scaled by a statistic of the first weights" in told.what) == ("passed", True)
    (told,) = certify(FeedbackOfTheWeights, only=["trait-downstream-weights"]).findings
    assert told.status == "failed"


class KeepsAnother(DFA):
    """Trains another network end to end, and writes its weights over its own."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.kept = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1 for name, p in network.named_parameters()}

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                p.copy_(self.kept[name])
        self.kept = {name: value * 0.99 for name, value in self.kept.items()}
        return super().credit(batch, step)

    def end_phase(self, phase: Phase, step: Step) -> None:
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                p.copy_(self.kept[name])


def test_weights_that_come_from_elsewhere_leave_it_unmeasured(few: Task) -> None:
    reading = reading_of(KeepsAnother, few)
    assert verdicts(reading) == {"unmeasured"}
    assert any("overwritten" in cell.why or "same seed" in cell.why for _, _, cell in reading.found("unmeasured"))


class Exchanges(DFA):
    """Puts other layers in the places of its network's."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        network.blocks[network.readout] = nn.Linear(network.blocks[network.readout].in_features, spec.outputs)


def test_an_exchanged_network_leaves_it_unmeasured(few: Task) -> None:
    reading = reading_of(Exchanges, few)
    assert reading.exchanged
    assert verdicts(reading) == {"unmeasured"}


class DependsOnTheRun(DFA):
    """Ends elsewhere each time."""

    runs = 0

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.index == 0:
            type(self).runs += 1
        result = super().credit(batch, step)
        for p in self.network.parameters():
            if p.grad is not None:
                p.grad.mul_(1 + self.runs)
                p.grad.add_(torch.ones_like(p) * self.runs)
        return result


def test_runs_that_do_not_repeat_leave_it_unmeasured(few: Task) -> None:
    reading = reading_of(DependsOnTheRun, few)
    assert verdicts(reading) == {"unmeasured"}
    assert "two runs of the same seed" in reading.trouble


def test_an_examined_run_ends_with_the_weights_of_an_ordinary_one(few: Task, tmp_path: Any) -> None:
    """The reference is what a user gets, and a run whose blocks are only executed twice is the same."""
    subject = Subject("dfa")
    kept: dict[str, Tensor] = {}
    for recipe in [subject.resolve(settings_of(subject, str(tmp_path), EPOCHS, 0), few.spec)]:
        run = runner.run(recipe, quiet=True, task=few)
        assert run.folder is not None
        kept = torch.load(run.folder / "checkpoints" / "last.pt", weights_only=True)["weights"]
    reference, _ = run_reference(subject, few, epochs=EPOCHS)
    final = {f"network.blocks.{block}.{name}": p for block, own in reference.final.items() for name, p in own.items()}
    assert final.keys() <= kept.keys()
    assert all(torch.equal(kept[name], value) for name, value in final.items())
    control = run_arm(subject, Arm(None), reference, few, draw=1, epochs=EPOCHS)
    assert not any(change.differs for change in control.changes.values())


def test_an_arm_records_when_weights_differ(few: Task) -> None:
    """The first step is enough for back-propagation, and the rest of the run is not made."""
    subject = Subject("backprop")
    reference, _ = run_reference(subject, few, epochs=EPOCHS)
    run = run_arm(subject, Arm("readout"), reference, few, draw=1, epochs=EPOCHS)
    assert {change.first for change in run.changes.values()} == {1}
    assert run.transport > 0.1
    assert isinstance(reference, Reference)
    assert reference.steps == 5


def test_the_declared_window_is_judged() -> None:
    """A liar fails, with what, where and what to do; the same rule with true traits passes."""
    (finding,) = certify(Chained, only=["whole-run-reading"]).findings
    assert finding.status == "failed"
    assert "declares downstream_weights=0, but what block 'b1' learns reads the weights of block 'readout'" in finding.what
    assert "declare downstream_weights='all'" in finding.fix
    (finding,) = certify("backprop", only=["whole-run-reading"]).findings
    assert finding.status == "passed"
    assert "bit for bit" in finding.what


class PredictsByNeighbours(DFA):
    """Keeps the examples, and predicts the class of the nearest."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.known = [*getattr(self, "known", [])[-30:], (batch.inputs.flatten(1), batch.targets)]
        return super().credit(batch, step)

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        if not hasattr(self, "known"):
            return super().predict(inputs, generator)
        rows, targets = torch.cat([x for x, _ in self.known]), torch.cat([y for _, y in self.known])
        return nn.functional.one_hot(targets[torch.cdist(inputs.flatten(1), rows).argmin(1)], self.spec.outputs).float()


def test_predictions_without_the_blocks_are_told() -> None:
    found = {finding.id: finding for finding in certify(PredictsByNeighbours, only=["hidden-blocks-needed"]).findings}
    assert found["hidden-blocks-needed"].status == "failed"
    assert "hidden blocks not needed: 100 % of" in found["hidden-blocks-needed"].what


def test_first_steps_along_the_gradient_are_compared(few: Task) -> None:
    """Oracles: back-propagation is the gradient; direct feedback with drawn weights is at a right angle to it."""
    exact = examine_whole_runs(Subject("backprop"), few, draw=1)
    drawn = examine_whole_runs(Subject("dfa"), few, draw=1)
    assert all(value > 0.95 for values in exact.alignment.values() for value in values)  # by Adam, of the gradient's signs
    assert all(abs(value) < 0.3 for values in drawn.alignment.values() for value in values)
    assert {len(values) for values in drawn.alignment.values()} == {5}


class BeginsLater(DFA):
    """Updates nothing for three steps, and follows the gradient then."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.index < 3:
            return {"loss": torch.zeros(())}
        loss = self.spec.loss(self.network(batch.inputs), batch)
        loss.backward()
        return {"loss": loss.detach()}


def test_the_first_update_is_looked_for_where_a_rule_begins_later(few: Task) -> None:
    found = examine_whole_runs(Subject(BeginsLater), few, draw=1)
    assert found.least_aligned is not None
    assert found.least_aligned > 0.9


class OnlyOneSeed(DFA):
    """Fails for other first weights of these shapes than those of ``known``, and in predictions with the latter."""

    known = torch.empty(0)

    def is_fresh(self) -> bool:
        return torch.equal(next(self.network.parameters()), self.known)

    def start_phase(self, phase: Phase) -> None:
        if next(self.network.parameters()).shape == self.known.shape and not self.is_fresh():
            raise ArithmeticError("not with these weights")

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        if self.is_fresh():
            raise ArithmeticError("not before it has learned")
        return super().predict(inputs, generator)


def test_measurements_that_a_rule_evades_are_open(few: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that fails where it is measured is not called local, and says why."""
    subject = Subject(OnlyOneSeed)
    built = subject.resolve(settings_of(subject, "runs", 1, 0), few.spec).build_rule(few.spec)
    monkeypatch.setattr(OnlyOneSeed, "known", next(built.network.parameters()).detach().clone())
    m = Measurements(subject)
    monkeypatch.setattr("bpfree.certify.measurements.examine_whole_runs", lambda subject: examine_whole_runs(subject, few, draw=1))
    found = {check.id: examine(m, check) for check in CHECKS}
    for id_, why in (("whole-run-consistency", "not with these weights"), ("hidden-blocks-needed", "not before it has learned")):
        assert found[id_].status == "unmeasured"
        assert why in found[id_].what
    assert m.credit_in_whole_runs == "unmeasured"


def test_a_rule_that_fails_says_why() -> None:
    class Fails(DFA):
        def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
            raise ArithmeticError("no credit today")

    found = examine_whole_runs(Subject(Fails), draw=1)
    assert "no credit today" in found.trouble


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ((0.5, 0.6, 0.7), "reads"),
        ((3e-4, 4e-4, 2e-3), "reads"),
        ((2e-4, 1e-3, 2e-4), "none"),  # at one of three moments
        ((1e-6, 2e-6, 3e-6), "none"),
    ],
)
def test_where_bits_do_not_agree_placebos_decide(changes: tuple[float, ...], verdict: Verdict) -> None:
    """Made-up runs whose rounding is 2.5e-5: ten times that counts, at two of three moments."""
    weights = {name: {"weight": torch.randn(3, 3)} for name in ("b1", "b2")}
    moved = {name: {"weight": own["weight"] + 1} for name, own in weights.items()}
    reference = Reference(Record(), after=[moved], initial=weights, final=moved)
    placebos = []

    def run(arm: Arm, draw: int) -> WholeRun:
        if arm.rounding:
            placebos.append(draw)
        found = changes if arm.block else (1e-5, 2e-5, 2.5e-5)
        return WholeRun(arm, {"b1": Change(1, found)}, transport=1.0)

    reading = read_matrix(reference, run, draw=5)
    assert len(set(placebos)) == 20
    assert (reading.exact, reading.threshold) == (False, pytest.approx(2.5e-4))
    assert reading.cells["b1"]["b2"].verdict == verdict


def test_a_cell_without_a_positive_control_is_open() -> None:
    """Equal weights show nothing where even a cotangent that is sent down on purpose would not be seen."""
    weights = {name: {"weight": torch.randn(3, 3)} for name in ("b1", "b2", "b3")}
    moved = {name: {"weight": own["weight"] + 1} for name, own in weights.items()}
    reference = Reference(Record(), after=[moved], initial=weights, final=moved)

    def run(arm: Arm, draw: int) -> WholeRun:
        return WholeRun(arm, {name: Change() for name in ("b1", "b2")}, transport=1.0)

    control = {"b1": {"b2": 0.5, "b3": 0.0}, "b2": {"b3": 0.5}}
    cells = read_matrix(reference, run, draw=5, control=control).cells
    assert [cells["b1"]["b2"].verdict, cells["b1"]["b3"].verdict, cells["b2"]["b3"].verdict] == ["none", "unmeasured", "none"]
    assert "transport would not show" in cells["b1"]["b3"].why


def test_a_chained_cotangent_goes_through_the_dirty_weights() -> None:
    """Oracle: the chain rule by hand, on two linear maps without biases; and a block that is dead passes nothing."""
    first, last = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    network = Network({"b1": first, "readout": last}, input_shape=(4,), readout="readout")
    weights = {"b1": {"weight": first.weight.detach().clone()}, "readout": {"weight": last.weight.detach().clone()}}
    x = torch.randn(6, 4)
    found = chained_transport(network, weights, x, 9)
    other = dirty(weights["readout"]["weight"], torch.Generator().manual_seed(9))
    sent = torch.randn(6, 2, generator=torch.Generator().manual_seed(9))
    through = [(sent @ matrix).T @ x for matrix in (weights["readout"]["weight"], other)]
    apart = float((through[0] - through[1]).norm() / max(through[0].norm(), through[1].norm()))
    assert found == {"b1": {"readout": pytest.approx(apart, rel=1e-4)}}
    dead = Network({"b1": nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "readout": nn.Linear(3, 2)}, input_shape=(4,), readout="readout")
    nn.init.constant_(dead.blocks["b1"][0].bias, -100.0)
    weights = {name: {key: p.detach().clone() for key, p in block.named_parameters()} for name, block in dead.blocks.items()}
    assert chained_transport(dead, weights, x, 9) == {"b1": {"readout": 0.0}}
