"""Forward passes that a step really makes. Oracle: rules whose passes are known by construction. Where they go through matrices that are
not the network's own weights, the count must be right or open, never too low."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bpfree import Batch, Card, Rule, Step, Traits, always
from bpfree.certify import Measurements, Subject, certify, examine
from bpfree.certify.checks import traits
from bpfree.certify.passes import Work, disagreement, stands_as_weight
from bpfree.certify.show import render
from bpfree.certify.table import table

(CHECK,) = [check for check in traits.CHECKS if check.id == "trait-passes"]
CANDIDATES = 8
KINDS = ("dense", "convolutional")


class Searches(Rule):
    """Without gradients: of candidates around the weights, or of steps along them."""

    card = Card("a search", equation="none")
    traits_of = always(Traits(dependence="all", downstream_weights="all", update="in-place", passes=1))

    def candidates(self, step: Step) -> dict[str, Tensor]:
        """By parameter: (K, ...)."""
        with torch.no_grad():
            return {
                name: p + 0.01 * torch.randn((CANDIDATES, *p.shape), generator=step.generator, dtype=p.dtype)
                for name, p in self.network.named_parameters()
            }

    @torch.no_grad()
    def take(self, losses: Tensor, found: dict[str, Tensor]) -> None:
        best = int(losses.argmin())
        for name, p in self.network.named_parameters():
            p.copy_(found[name][best])

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        return self.spec.loss(scores, batch).detach()

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        raise AssertionError("learn does it")


class Swarm(Searches):
    """Eight candidates at once by functional_call under vmap; makes eight passes."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        found = self.candidates(step)
        with torch.no_grad():
            scores = vmap(lambda values: functional_call(self.network, values, (batch.inputs,)))(found)
        losses = torch.stack([self.loss(row, batch) for row in scores])
        self.take(losses, found)
        return {"loss": losses.min()}


class SwarmAndSelf(Swarm):
    """The same beside a plain pass with its own weights: nine."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            self.network(batch.inputs)
        return super().learn(batch, step)


class OneByOne(Searches):
    """A plain pass, and one of a single candidate without vmap: two."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        found = self.candidates(step)
        with torch.no_grad():
            loss = self.loss(self.network(batch.inputs), batch)
            other = self.loss(functional_call(self.network, {n: v[0] for n, v in found.items()}, (batch.inputs,)), batch)
        if other < loss:
            self.take(torch.zeros(1), found)
        return {"loss": loss}


class Copied(Searches):
    """A plain pass, and one through a copy of the network: two."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        other = copy.deepcopy(self.network)
        with torch.no_grad():
            loss = self.loss(self.network(batch.inputs), batch)
            other(batch.inputs)
            for p in self.network.parameters():
                p.mul_(0.999)
        return {"loss": loss}


class Inside(Searches):
    """The same under torch.inference_mode, where torch hands on whole operations."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with torch.inference_mode():
            loss = self.loss(self.network(batch.inputs), batch).clone()
            functional_call(self.network, {n: p * 1.0 for n, p in self.network.named_parameters()}, (batch.inputs,))
        with torch.no_grad():
            for p in self.network.parameters():
                p.mul_(0.999)
        return {"loss": torch.tensor(float(loss))}


class Stacked(Searches):
    """The first weights of its network as one matrix of two versions, used from the left, beside a plain pass: three of that block."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        weight = next(p for p in self.network.parameters() if p.dim() == 2)
        with torch.no_grad():
            loss = self.loss(self.network(batch.inputs), batch)
            rows = batch.inputs.flatten(1)[:, : weight.shape[1]]
            _ = torch.cat([weight, 1.01 * weight]) @ rows.T
            for p in self.network.parameters():
                p.mul_(0.999)
        return {"loss": loss}


class InEinsum(Searches):
    """Weights of equal layers put together in an einsum, beside a plain pass."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        equal = [p for p in self.network.parameters() if p.shape == (32, 32)]
        with torch.no_grad():
            loss = self.loss(self.network(batch.inputs), batch)
            rows = batch.inputs.flatten(1)[:, :32]
            torch.einsum("kij,nj->kni", torch.stack(equal), rows)
            for p in self.network.parameters():
                p.mul_(0.999)
        return {"loss": loss}


class WrittenInPlace(Searches):
    """A plain pass, and the products of another one written into tensors that were there before: two."""

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            loss = self.loss(self.network(batch.inputs), batch)
            for weight in (p for p in self.network.parameters() if p.dim() == 2):
                torch.zeros(len(batch.inputs), weight.shape[0], dtype=weight.dtype).addmm_(
                    weight.new_ones(len(batch.inputs), weight.shape[1]), weight.T
                )
            for p in self.network.parameters():
                p.mul_(0.999)
        return {"loss": loss}


class MeZO(Searches):
    """Malladi et al. 2023: the weights are moved there and back in place; two passes."""

    traits_of = always(Traits(dependence="all", downstream_weights="all", update="in-place", passes=2))

    @torch.no_grad()
    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        parameters = list(self.network.parameters())
        noise = [torch.randn(p.shape, generator=step.generator, dtype=p.dtype) for p in parameters]

        def move(by: float) -> None:
            for p, z in zip(parameters, noise, strict=True):
                p.add_(z, alpha=by)

        move(1e-3)
        above = self.loss(self.network(batch.inputs), batch)
        move(-2e-3)
        below = self.loss(self.network(batch.inputs), batch)
        move(1e-3)
        slope = float(above - below) / 2e-3
        move(-0.01 * slope)
        return {"loss": above}


class InferringMeZO(MeZO):
    """The same, its passes in inference mode."""

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        return super().loss(scores, batch).clone()

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        for _ in range(2):
            with torch.inference_mode():
                self.network(batch.inputs)
        with torch.no_grad():
            for p in self.network.parameters():
                p.mul_(0.999)
        return {"loss": torch.zeros(())}


def measured(rule: type[Rule], kind: str = "dense") -> tuple[dict[str, float] | None, str]:
    observation = Measurements(Subject(rule)).observations[kind]
    return observation.measured_passes(), observation.disagreement()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [Swarm, SwarmAndSelf, OneByOne, Copied, Inside], ids=lambda rule: rule.__name__)
def test_passes_through_other_tensors_leave_the_count_open(rule: type[Rule], kind: str) -> None:
    passes, reason = measured(rule, kind)
    assert passes is None
    assert "copies" in reason


@pytest.mark.parametrize("rule", [Stacked, InEinsum], ids=lambda rule: rule.__name__)
def test_weights_put_together_in_one_matrix_leave_the_count_open(rule: type[Rule]) -> None:
    passes, reason = measured(rule)
    assert passes is None
    assert "candidates of its weights" in reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [MeZO, InferringMeZO], ids=lambda rule: rule.__name__)
def test_weights_that_are_moved_in_place_are_counted(rule: type[Rule], kind: str) -> None:
    passes, reason = measured(rule, kind)
    assert reason == ""
    assert passes is not None
    assert set(passes.values()) == {2.0}


def test_products_in_place_are_counted() -> None:
    passes, reason = measured(WrittenInPlace)
    assert reason == ""
    assert passes is not None
    assert set(passes.values()) == {2.0}


def test_what_is_open_is_unmeasured_and_no_other_number_is_advised() -> None:
    """The check neither passes nor says to declare fewer passes than the rule makes."""
    m = Measurements(Subject(SwarmAndSelf))
    finding = examine(m, CHECK)
    assert finding.status == "unmeasured"
    assert "where 1 were counted" in finding.what
    assert not finding.fix
    assert examine(Measurements(Subject(MeZO)), CHECK).status == "passed"


def test_it_is_told_so_in_certificates_and_tables() -> None:
    certificate = certify("hebbian-norm", quick=True)
    assert certificate.properties["passes"] == {"dense": None}
    assert any(line.split(maxsplit=1)[:1] == ["passes"] and line.endswith("unmeasured") for line in render(certificate))
    assert table([certificate]).splitlines()[-1].split(" | ")[4] == "?"


# --- the account ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "stands"),
    [
        ("mm", ((7, 64), (64, 32)), True),
        ("mm", ((7, 64), (64, 96)), True),  # three side by side
        ("mm", ((32, 64), (64, 7)), True),  # from the left
        ("mv", ((64, 64), (64,)), True),
        ("bmm", ((8, 7, 64), (8, 64, 32)), True),
        ("addmm", ((32,), (7, 64), (64, 32)), True),
        ("mm", ((32, 7), (7, 64)), False),  # a gradient of weights: the sum is over examples
        ("mm", ((7, 32), (32, 64)), False),  # a gradient of inputs
        ("mm", ((7, 5), (5, 32)), False),  # feedback of an output error
        ("mm", ((7, 63), (63, 32)), False),
    ],
)
def test_which_factors_stand_as_weights(name: str, args: Any, stands: bool) -> None:
    """Oracle: written by hand, for weights of 32 outputs and 64 inputs."""
    tensors = tuple(torch.empty(shape) for shape in args)
    assert stands_as_weight(name, tensors, {(32, 64)}) is stands


def test_kernels_stand_as_weights_but_not_when_transposed() -> None:
    kernel = nn.Conv2d(3, 16, 3).weight
    args = (torch.empty(7, 3, 8, 8), torch.empty(32, 3, 3, 3), None, [1, 1], [1, 1], [1, 1])
    shapes = {(kernel.shape[0], kernel[0].numel())}
    assert stands_as_weight("convolution", (*args, False, [0, 0], 1), shapes)
    assert not stands_as_weight("convolution", (*args, True, [0, 0], 1), shapes)


def test_the_tolerances() -> None:
    """Copies leave the count open from the first product; other work from half a pass, feedback from the forward products on."""

    def doubt(forward_mode: bool = False, **found: int) -> str:
        work = Work(forward=Counter(w=1000), **found)
        work.total = 1000 + work.explained + work.copies + work.feedback + found.get("total", 0)
        return disagreement(work, 1000.0, 1.0, forward_mode=forward_mode)

    assert doubt(explained=5000) == ""
    assert "copies" in doubt(copies=10)
    assert doubt(copies=1000, forward_mode=True) == ""  # the tangents of as many passes
    assert "copies" in doubt(copies=1010, forward_mode=True)
    assert doubt(feedback=1500) == ""
    assert "reverse-mode" in doubt(feedback=1510)
    assert doubt(total=500) == ""
    assert "no pass and no gradient" in doubt(total=510)
