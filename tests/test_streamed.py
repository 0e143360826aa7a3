"""The hooks of streamed rules, and rules without a readout. Oracles: counted calls, keyed generators, bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bpfree
from bpfree import Batch, BpfreeError, Network, Step, TaskSpec, Trace, Traits, UsageError, always, new_step
from bpfree.certify.examination import certify
from bpfree.certify.subject import Specimen, Subject
from bpfree.config import parse_words, resolve
from bpfree.network import MLPConfig, mlp

FLAT = TaskSpec("flat", (6,), 3)


def batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return Batch(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


class Watched(bpfree.Streamed):
    """Notes what its hooks are called with, and hands on noise from the step's generators."""

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.calls: list[tuple[str, Step]] = []
        self.seen: list[Tensor] = []

    def encode(self, batch: Batch, step: Step) -> Tensor:
        self.calls.append(("encode", step))
        return batch.inputs + torch.randn(batch.inputs.shape, generator=step.generator_for("encode"))

    def hand_over(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        self.calls.append((trace.name, step))
        mask = torch.rand(trace.output.shape, generator=step.generator_for(trace.name)) < 0.5
        return trace.output.detach() * mask

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        self.seen.append(trace.input)
        return trace.output.square().mean()


def rule_of(kind: type[Any], depth: int = 2) -> Any:
    torch.manual_seed(0)
    return kind(mlp(FLAT, MLPConfig(depth=depth, width=5)), FLAT)


def test_the_hooks_get_the_step_and_none_is_called_after_the_last_block() -> None:
    rule = rule_of(Watched)
    step = new_step(rule)
    rule.credit(batch(), step)
    assert [name for name, _ in rule.calls] == ["encode", "b1", "b2"]
    assert all(given is step for _, given in rule.calls)


def test_what_the_hooks_draw_is_seeded_and_repeated() -> None:
    one, other = rule_of(Watched), rule_of(Watched)
    one.credit(batch(), new_step(one))
    torch.rand(10)  # the global generator has no part in it
    other.credit(batch(), new_step(other))
    assert all(map(torch.equal, one.seen, other.seen))
    assert not torch.equal(one.seen[0], batch().inputs)


def test_a_stream_of_a_network_ends_with_its_last_block() -> None:
    network = mlp(FLAT, MLPConfig(depth=2, width=5))
    names = network.names
    asked: list[str] = []

    def hand_over(trace: Trace) -> Tensor:
        asked.append(names[trace.index + 1])  # there is a next one
        return trace.output.detach()

    assert [trace.name for trace in network.stream(batch().inputs, hand_over=hand_over)] == names
    assert asked == names[1:]


# --- without a readout ------------------------------------------------------------------------------------------------


class Goodness(bpfree.Streamed):
    """Forward-Forward in short: positive and negative examples in one batch of twice the size; each block has the same loss."""

    traits_of = always(Traits("upstream", downstream_weights=0, reverse_span=1, passes=2, readout="none", targets=("classes",)))

    def encode(self, batch: Batch, step: Step) -> Tensor:
        classes = self.spec.outputs
        shift = torch.randint(1, classes, (len(batch),), generator=step.generator_for("negatives"))
        wrong = (batch.targets + shift) % classes
        return torch.cat([self.labelled(batch.inputs, batch.targets), self.labelled(batch.inputs, wrong)])

    def labelled(self, x: Tensor, labels: Tensor) -> Tensor:
        rows = x.flatten(1).clone()
        rows[:, : self.spec.outputs] = torch.eye(self.spec.outputs, dtype=x.dtype)[labels]
        return rows.view_as(x)

    def hand_over(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        return self.normed(trace.output.detach())

    def normed(self, h: Tensor) -> Tensor:
        return torch.nn.functional.normalize(h.flatten(1)).view_as(h)

    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        goodness = trace.output.flatten(1).square().mean(1)
        positive, negative = goodness.chunk(2)
        return torch.nn.functional.softplus(torch.cat([1 - positive, negative - 1])).mean()

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        scores = []
        for label in range(self.spec.outputs):
            x = self.labelled(inputs, torch.full((len(inputs),), label))
            traces = self.network.stream(x, grad=False, hand_over=lambda trace: self.normed(trace.output))
            scores.append(sum(trace.output.flatten(1).square().mean(1) for trace in traces))
        return torch.stack(scores, dim=1)


def test_a_network_is_taken_without_its_readout() -> None:
    network = mlp(FLAT, MLPConfig(depth=2, width=5))
    rule = Goodness(network, FLAT)
    assert rule.network.names == ["b1", "b2"]
    assert rule.network.readout is None
    assert network.names == ["b1", "b2", "readout"]  # the caller's stays
    assert rule.network.blocks["b1"] is network.blocks["b1"]
    assert set(rule.groups()) == {"b1", "b2"}
    metrics = bpfree.Stepper(rule).take(batch())
    assert set(metrics) == {"b1/loss", "b2/loss"}
    assert rule.predict(batch().inputs, torch.Generator()).shape == (8, 3)
    bare = network.without_readout()
    assert bare.without_readout() is bare
    with pytest.raises(UsageError, match="no block but the readout"):
        Goodness(mlp(FLAT, MLPConfig(depth=0)), FLAT)


@pytest.mark.parametrize("check", ["trait-dependence", "trait-supervision", "labels-unseen", "networks-refused", "state-restored"])
def test_nothing_in_an_examination_presumes_a_readout(check: str) -> None:
    """Such a rule failed nearly every check when its specimens had one."""
    (finding,) = certify(Goodness, only=[check]).findings
    assert finding.status == "passed", finding


def test_specimens_and_recipes_have_none_either() -> None:
    subject = Subject(Goodness)
    for kind in ("dense", "convolutional"):
        assert subject.build(Specimen(kind, depth=2, width=8)).network.readout is None
    rule = resolve(parse_words(["rule=Goodness", "network.depth=3"]), subject.registry, spec=FLAT).build_rule(FLAT)
    assert rule.network.names == ["b1", "b2", "b3"]


@pytest.mark.parametrize("readout", ["required", "optional"])
def test_a_readout_that_gets_another_number_of_examples_is_named(readout: Any) -> None:
    class Doubling(Goodness):
        traits_of = always(Traits("upstream", 0, 1, readout=readout, targets=("classes",)))

    rule = rule_of(Doubling)
    with pytest.raises(BpfreeError, match="outputs for 16 examples of a batch of 8") as caught:
        rule.credit(batch(), new_step(rule))
    assert 'Traits(readout="none")' in caught.value.fix


def networks() -> Iterator[tuple[str, bool, bool]]:
    """Trait, whether the network has a readout, whether the rule takes it."""
    yield from [("required", True, True), ("required", False, False), ("optional", True, True), ("optional", False, True)]
    yield from [("none", True, True), ("none", False, True)]


@pytest.mark.parametrize(("said", "has", "taken"), list(networks()))
def test_what_the_trait_says_of_a_network(said: Any, has: bool, taken: bool) -> None:
    class Some(Watched):
        traits_of = always(Traits("upstream", 0, 1, readout=said))

    network = mlp(FLAT, MLPConfig(depth=2, width=5))
    network = network if has else network.without_readout()
    if taken:
        assert Some(network, FLAT).network.readout == ("readout" if has and said != "none" else None)
    else:
        with pytest.raises(UsageError, match="needs a network with a readout"):
            Some(network, FLAT)
    wrong = mlp(TaskSpec("other", (6,), 4), MLPConfig(depth=2, width=5))
    if said == "required":  # it must fit the task
        with pytest.raises(UsageError, match=r"outputs of shape \(4,\)"):
            Some(wrong, FLAT)
