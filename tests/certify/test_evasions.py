"""Weight transport that comes late, early, or by other ways than linear modules; and honest rules that look like it.

Oracle throughout: what each rule reads is written in it. No rule that transports weights may be called local; where the measurement
cannot decide, it has to say so.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

import certify_disguises as disguises
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import Batch, Budget, Card, Network, Phase, Rule, Step, Streamed, Trace, Traits, always
from bpfree.baselines import DFA, Backprop
from bpfree.certify import Finding, Measurements, Subject, certify, examine
from bpfree.certify.checks import traits
from bpfree.certify.interventions import Matrix, name_of_dependence

CHECKS = {check.id: check for check in traits.CHECKS}


def judged(rule: Any) -> tuple[Finding, str]:
    m = Measurements(Subject(rule))
    return examine(m, CHECKS["trait-downstream-weights"]), m.credit


def feedback(index: int, layer: nn.Linear) -> Tensor:
    """Fixed and random."""
    return torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(index), dtype=layer.weight.dtype)


# --- copies, made at some time ----------------------------------------------------------------------------------------


class Copies(disguises.HandWritten):
    """The chain rule with copies of the weights, which begin as noise."""

    copies: list[Tensor]
    steps = 0

    def prepare(self, data: Any, generator: torch.Generator) -> None:
        self.copies = [
            torch.randn(layer.weight.shape, generator=generator, dtype=layer.weight.dtype) for _, layer in disguises.layers(self)
        ]

    def copy_weights(self) -> None:
        self.copies = [layer.weight.detach().clone() for _, layer in disguises.layers(self)]

    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return self.copies[index].to(layer.weight.dtype)


class CopiesWhenBuilt(Copies):
    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.copy_weights()

    def prepare(self, data: Any, generator: torch.Generator) -> None:
        pass


class CopiesBeforeAnything(CopiesWhenBuilt):
    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        copies = [part.weight.detach().clone() for part in network.modules() if isinstance(part, nn.Linear)]
        super().__init__(network, spec, config)
        self.copies = copies


class CopiesIntoBuffers(Copies):
    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        for index, (_, layer) in enumerate(disguises.layers(self)):
            self.register_buffer(f"feedback{index}", layer.weight.detach().clone())

    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return self.get_buffer(f"feedback{index}")


class CopiesInPrepare(Copies):
    def prepare(self, data: Any, generator: torch.Generator) -> None:
        self.copy_weights()


class CopiesAtTheEnd(Copies):
    def end_phase(self, phase: Phase, step: Step) -> None:
        self.copy_weights()


class CopiesAfterUpdates(Copies):
    every = 1

    def after_update(self, groups: Sequence[str]) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.copy_weights()


class CopiesEveryTenSteps(CopiesAfterUpdates):
    every = 10


class CopiesEveryThirtySteps(CopiesAfterUpdates):
    every = 30


class DecaysAndCopiesEveryTenSteps(CopiesEveryTenSteps):
    """Its updates change with the weights of their own block as well."""

    def before_update(self, groups: Sequence[str]) -> None:
        for p in self.parameters():
            p.grad = 0.1 * p.detach() if p.grad is None else p.grad + 0.1 * p.detach()


class MasterWeights(Backprop):
    """Learns on a copy of its network, and writes the result into the network."""

    traits_of = always(Traits(downstream_weights=0, update="in-place"))

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.master = copy.deepcopy(self.network)

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.master(batch.inputs), batch)
        masters = list(self.master.parameters())
        with torch.no_grad():
            for master, own, gradient in zip(masters, self.network.parameters(), torch.autograd.grad(loss, masters), strict=True):
                own.copy_(master.sub_(0.1 * gradient))
        return {"loss": loss.detach()}


class WritesWhatItKeeps(MasterWeights):
    """Its own weights are not the network's, until it overwrites these."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        with torch.no_grad():
            for p in self.master.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def test_weights_that_are_overwritten_from_elsewhere_are_unmeasured() -> None:
    finding, credit = judged(WritesWhatItKeeps)
    assert finding.status == "unmeasured"
    assert "overwritten in a step" in finding.what
    assert credit == "unmeasured"


class InTheTenthPhase(disguises.HandWritten):
    """The weights themselves, but only in one of many phases."""

    late = False

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase(f"p{index}", epochs=1) for index in range(12)]

    def start_phase(self, phase: Phase) -> None:
        self.late = phase.name == "p9"

    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return layer.weight if self.late else feedback(index, layer)


class LayerwiseTwice(Streamed):
    """One block after the other, twice; the last hidden block's second phase uses the readout."""

    card = Card("layer by layer", equation="none")

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase(f"{name}, {turn}", epochs=1, groups=(name,)) for turn in (1, 2) for name in self.network.names]

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor | None:
        if step.phase.name != f"{self.network.hidden[-1]}, 2" or trace.name != self.network.hidden[-1]:
            return None
        return self.spec.loss(self.network.blocks["readout"](trace.output), batch)


@pytest.mark.parametrize(
    "rule",
    [
        *(CopiesWhenBuilt, CopiesBeforeAnything, CopiesIntoBuffers, CopiesInPrepare, CopiesAtTheEnd, CopiesAfterUpdates),
        *(CopiesEveryTenSteps, CopiesEveryThirtySteps, DecaysAndCopiesEveryTenSteps, MasterWeights, InTheTenthPhase),
    ],
    ids=lambda rule: rule.__name__,
)
def test_copies_of_weights_are_found_whenever_they_are_made(rule: type[Rule]) -> None:
    finding, credit = judged(rule)
    assert finding.status == "failed"
    assert "'b1' changes with the weights of block 'readout'" in finding.what
    assert credit in ("uses the weights of all blocks above", "equivalent to back-propagation")


def test_every_phase_of_a_layerwise_rule_is_looked_at() -> None:
    finding, _ = judged(LayerwiseTwice)
    assert "'b4' changes with the weights of block 'readout'" in finding.what
    assert "in phase 'b4, 2'" in finding.where


class SignSymmetry(disguises.HandWritten):
    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return layer.weight.sign()


class PseudoInverses(disguises.HandWritten):
    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return torch.linalg.pinv(layer.weight).T


class Quantised(disguises.HandWritten):
    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return (layer.weight * 4).round() / 4


class OneLayer(disguises.HandWritten):
    """Feedback alignment, but for the last hidden layer."""

    def transposed(self, index: int, layer: nn.Linear) -> Tensor:
        return layer.weight if index == 3 else feedback(index, layer)


@pytest.mark.parametrize(("rule", "reach"), [(SignSymmetry, 4), (PseudoInverses, 4), (Quantised, 4), (OneLayer, 3)])
def test_functions_of_the_weights_are_weights(rule: type[Rule], reach: int) -> None:
    finding, _ = judged(rule)
    assert finding.status == "failed"
    assert f"downstream_weights={str(reach) if reach < 4 else repr('all')}," in finding.fix


# --- blocks that are not just linear maps -------------------------------------------------------------------------------


class ByHand(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh()


class Beside(nn.Module):
    """A linear map that carries no credit, and something else that does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def other(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x.detach()) + self.other(x)).tanh()


class BesideByHand(Beside):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def other(self, x: Tensor) -> Tensor:
        return x @ self.weight


class BesideAttention(Beside):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)

    def other(self, x: Tensor) -> Tensor:
        y = x.view(-1, 4, 8)
        return self.attention(y, y, y)[0].flatten(1)  # type: ignore[no-any-return]


class BesideGroups(Beside):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.convolution = nn.Conv1d(width, width, 1, groups=4)

    def other(self, x: Tensor) -> Tensor:
        return self.convolution(x[:, :, None]).flatten(1)  # type: ignore[no-any-return]


class BesideNarrow(Beside):
    """A second linear map, whose inputs have no null space."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.narrow = nn.Linear(1, width, bias=False)

    def other(self, x: Tensor) -> Tensor:
        return self.narrow(x[:, :1])  # type: ignore[no-any-return]


class BesideGains(Beside):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def other(self, x: Tensor) -> Tensor:
        return x * self.gain


class Functional(Beside):
    def other(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x).tanh()


class Affine(nn.Linear):
    """Does something to its input first, which its own hooks cannot see."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(2 * input + 1, self.weight, self.bias).tanh()


class Through(Rule):
    """Random feedback to the last hidden block, and autograd through all hidden blocks from there."""

    card = Card("credit through hidden blocks", equation="none")
    traits_of = always(Traits(dependence="all", downstream_weights=0, reverse_span=3))
    kind: type[nn.Module]

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        first = nn.Sequential(nn.Flatten(), nn.Linear(spec.input_size, 32), nn.Tanh())
        blocks = {"b1": first, "b2": self.hidden_block(), "b3": self.hidden_block(), "readout": nn.Linear(32, spec.outputs)}
        super().__init__(Network(blocks, input_shape=spec.input_shape, readout="readout"), spec, config)

    def hidden_block(self) -> nn.Module:
        return self.kind(32)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        features = self.network.features(batch.inputs)
        scores = self.network.blocks["readout"](features.detach())
        loss = self.spec.loss(scores, batch)
        loss.backward()
        feedback = torch.randn(self.spec.outputs, 32, generator=torch.Generator().manual_seed(0), dtype=features.dtype)
        features.backward(self.spec.error(scores.detach(), batch) @ feedback)
        return {"loss": loss.detach()}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        return super().specimen(kind, depth, width) if kind == "dense" else None


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (ByHand, "weight of it"),
        (BesideByHand, "weight of it"),
        (BesideAttention, "attention.in_proj_weight"),
        (BesideGroups, "convolution.weight"),
        (BesideNarrow, "independent directions"),
        (BesideGains, "gain of it"),
        (Functional, "linear.weight"),
    ],
)
def test_a_block_of_which_a_part_cannot_be_changed_is_never_called_local(block: type[nn.Module], named: str) -> None:
    """Whatever stands beside it."""
    rule = type(f"Through{block.__name__}", (Through,), {"kind": block, "__module__": __name__})
    finding, credit = judged(rule)
    assert finding.status == "unmeasured"
    assert named in finding.what
    assert credit == "unmeasured"


def test_a_linear_module_that_does_more_than_its_name_says_is_noticed() -> None:
    class ThroughAffine(Through):
        def hidden_block(self) -> nn.Module:
            return Affine(32, 32)

    finding, credit = judged(ThroughAffine)
    assert finding.status == "unmeasured"
    assert "forward values did not stay" in finding.what
    assert credit == "unmeasured"


class HeadsOnAnything(Through):
    """Local losses: nothing done to a block above changes anything, so that its weights need not be reached one by one."""

    kind = BesideAttention
    traits_of = always(Traits(dependence="upstream", downstream_weights=0, reverse_span=1))

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.heads = nn.ModuleDict({name: nn.Linear(32, spec.outputs) for name in self.network.hidden})

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        for trace in self.network.stream(batch.inputs):
            scores = trace.output if trace.name == "readout" else self.heads[trace.name](trace.output)
            self.spec.loss(scores, batch).backward()
        return {}


def test_local_losses_are_local_on_blocks_of_any_kind() -> None:
    finding, credit = judged(HeadsOnAnything)
    assert finding.status == "passed"
    assert credit == "local"


class Decoy(Backprop):
    """Back-propagation in a network of its own; the one that it was given stands idle."""

    traits_of = always(Traits(dependence="independent", downstream_weights=0, reverse_span=0))

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.real = copy.deepcopy(self.network)
        self.network.requires_grad_(False)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        loss = self.spec.loss(self.real(batch.inputs), batch)
        loss.backward()
        return {"loss": loss.detach()}


def test_a_rule_that_learns_beside_its_network_is_not_called_local() -> None:
    finding, credit = judged(Decoy)
    assert finding.status == "unmeasured"
    assert "parameters of the rule itself" in finding.what
    assert credit == "unmeasured"


# --- honest rules that look like it -------------------------------------------------------------------------------------


class NoisyInputs(DFA):
    """Its steps see other inputs than a plain forward pass does."""

    def noise(self, batch: Batch, step: Step) -> Any:
        return torch.randn(batch.inputs.shape, generator=step.generator, dtype=batch.inputs.dtype)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return super().credit(Batch(batch.inputs + 0.1 * self.noise(batch, step), batch.targets), step)


class GlobalNoise(NoisyInputs):
    def noise(self, batch: Batch, step: Step) -> Any:
        return torch.randn_like(batch.inputs)


class PythonsNoise(NoisyInputs):
    def noise(self, batch: Batch, step: Step) -> Any:
        return random.gauss(0, 1)


class Dropout(DFA):
    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        settings = super().specimen(kind, depth, width)
        return None if settings is None else {**settings, "network.dropout": 0.2}


class OwnMomentum(DFA):
    def before_update(self, groups: Sequence[str]) -> None:
        self.momenta: dict[str, Tensor] = getattr(self, "momenta", {})
        for name, p in self.named_parameters():
            if p.grad is not None:
                self.momenta[name] = p.grad + 0.9 * self.momenta[name] if name in self.momenta else p.grad
                p.grad = self.momenta[name].clone()


class Decays(DFA):
    def before_update(self, groups: Sequence[str]) -> None:
        for p in self.parameters():
            p.grad = 0.1 * p.detach() if p.grad is None else p.grad + 0.1 * p.detach()


class KolenPollack(Copies):
    """Feedback weights that learn by the same products as the forward ones, and read none of these."""

    @torch.no_grad()
    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        found = super().gradients(batch, step)
        self.copies = [
            0.9 * feedback.to(layer.weight.dtype) - 0.1 * found[f"{name}.weight"]
            for feedback, (name, layer) in zip(self.copies, disguises.layers(self), strict=True)
        ]
        return found


@pytest.mark.parametrize(
    "rule", [NoisyInputs, GlobalNoise, PythonsNoise, Dropout, OwnMomentum, Decays, KolenPollack], ids=lambda rule: rule.__name__
)
def test_honest_rules_with_noise_and_memory_are_local(rule: type[Rule]) -> None:
    finding, credit = judged(rule)
    assert finding.status == "passed", finding
    assert credit == "local"


class Mirror(Copies):
    """Finds out the weights above by executing the layers on noise."""

    @torch.no_grad()
    def gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        for index, (_, layer) in enumerate(disguises.layers(self)):
            noise = torch.randn(64, layer.in_features, generator=step.generator, dtype=layer.weight.dtype)
            self.copies[index] = self.copies[index].to(noise.dtype) + 0.1 * (layer(noise) - layer.bias).T @ noise
        return super().gradients(batch, step)


def test_weights_that_are_found_out_by_executing_layers_are_not_called_local() -> None:
    finding, credit = judged(Mirror)
    assert finding.status != "passed"
    assert credit != "local"


class FiniteDifferences(DFA):
    """Node perturbation: a second forward pass with noise on one block's output, and how much the loss has changed."""

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        return super().specimen(kind, depth, width) if kind == "dense" else None

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        x = batch.inputs.flatten(1)
        for place, name in enumerate(self.network.hidden):
            clean = self.network.blocks[name](x.view_as(batch.inputs) if place == 0 else x)
            noise = 0.1 * torch.randn(clean.shape, generator=step.generator_for(name), dtype=clean.dtype)
            moved = clean + noise
            for above in self.network.names[place + 1 :]:
                moved = self.network.blocks[above](moved)
            change = self.spec.loss(moved, batch) - metrics["loss"]
            for p in self.network.blocks[name].parameters():
                if p.dim() > 1:
                    p.grad = (noise * change * (1 - clean.square())).T @ x
            x = clean
        return metrics


def test_perturbed_forward_passes_read_the_weights_above_as_forward_mode_does() -> None:
    finding, _ = judged(FiniteDifferences)
    assert finding.status == "failed"
    assert "'b1' changes with the weights of block 'readout'" in finding.what


class Unpredictable(NoisyInputs):
    def noise(self, batch: Batch, step: Step) -> Any:
        return os.urandom(1)[0] / 255


def test_a_rule_that_does_not_repeat_itself_is_unmeasured() -> None:
    m = Measurements(Subject(Unpredictable))
    for name in ("trait-dependence", "trait-downstream-weights"):
        finding = examine(m, CHECKS[name])
        assert finding.status == "unmeasured"
        assert "two runs from the same seeds differ" in finding.what


class Overflows(DFA):
    def before_update(self, groups: Sequence[str]) -> None:
        for p in self.parameters():
            p.grad = torch.full_like(p, float("nan"))


def test_updates_that_are_not_finite_are_no_evidence() -> None:
    m = Measurements(Subject(Overflows))
    finding = examine(m, CHECKS["trait-downstream-weights"])
    assert finding.status == "unmeasured"
    assert "not finite" in finding.what
    assert not m.equals_backprop


@pytest.mark.parametrize(
    ("pairs", "name"),
    [([], "independent"), ([(2, 0)], "upstream"), ([(0, 1), (2, 0)], "neighbours"), ([(0, 2)], "all"), ([(0, 1), (1, 3)], "all")],
)
def test_a_dependence_has_the_narrowest_name_that_holds_it(pairs: list[tuple[int, int]], name: str) -> None:
    """Pairs: update of, parameters of."""
    blocks = ["b1", "b2", "b3", "b4"]
    values = {row: {column: float(row == column or (i, j) in pairs) for j, column in enumerate(blocks)} for i, row in enumerate(blocks)}
    assert name_of_dependence(Matrix(blocks, values, {}, [], "", {})) == name


class WithoutPhases(DFA):
    def phases(self, budget: Budget) -> Iterable[Phase]:
        return []


def test_a_rule_without_phases_is_told_so() -> None:
    finding = examine(Measurements(Subject(WithoutPhases)), CHECKS["trait-downstream-weights"])
    assert finding.status == "failed"
    assert "no phases" in finding.what
    assert finding.where == "WithoutPhases.phases"


class BreaksWhenBuilt(DFA):
    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        raise TypeError("not so")


def test_a_rule_that_breaks_when_it_is_built_gets_a_certificate_that_says_where() -> None:
    certificate = certify(BreaksWhenBuilt, quick=True)
    assert certificate.status == "failed"
    assert certificate.traits == {}
    assert certificate.counts == {"failed": 1, "unmeasured": len(certificate.findings) - 1}
    assert certificate.findings[0].what == "the rule cannot be built: TypeError: not so"
    assert "BreaksWhenBuilt.__init__" in certificate.findings[0].where


@pytest.mark.parametrize("rule", [disguises.Checkpointed, disguises.NestedFunctions])
def test_what_reverse_mode_executes_again_is_no_forward_pass(rule: type[Rule]) -> None:
    """Oracle: one pass for the gradient, and one for the loss that is reported."""
    assert set(Measurements(Subject(rule)).observations["dense"].passes().values()) == {2.0}
