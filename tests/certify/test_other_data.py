"""Rules that learn something else than the classes of images: the examination takes data and targets of a kind that they take.

Oracles: direct feedback is local and back-propagation is not, whatever the targets are; twice the loss of two equal views is the loss.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpfree import Batch, Step, Traits
from bpfree.baselines import DFA, Backprop
from bpfree.certify import certify
from bpfree.certify.subject import Subject
from bpfree.cli.main import cli
from bpfree.rule import Rule

STRUCTURE = ["trait-dependence", "trait-downstream-weights", "trait-reverse-span", "trait-supervision", "trait-update", "trait-passes"]
CHECKS = [*STRUCTURE, "same-seed", "batch-shapes", "updates-something", "no-host-state-in-predict", "prediction-per-example"]


def only(kind: str, base: type[Rule]) -> type[Rule]:
    """The same rule, which says that it takes targets of one kind alone."""

    class Only(base):  # type: ignore[misc,valid-type]
        @classmethod
        def traits_of(cls, config: Any, network: Any = None) -> Traits:
            return dataclasses.replace(base.traits_of(config, network), targets=(kind,))

    Only.__name__ = Only.__qualname__ = f"{base.__name__}Of{kind.title()}"
    return Only


@pytest.mark.parametrize("kind", ["real", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("multilabel", "soft"))])
def test_targets_of_each_kind(kind: str) -> None:
    rule = only(kind, DFA)
    assert Subject(rule).targets == kind
    found = {finding.id: finding for finding in certify(rule, only=[*CHECKS, "whole-run-reading", "hidden-blocks-needed"]).findings}
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(found, "passed")
    assert "digits, bit for bit" in found["whole-run-reading"].what


def test_a_liar_on_numbers_fails() -> None:
    class Lies(only("real", Backprop)):  # type: ignore[misc]
        @classmethod
        def traits_of(cls, config: Any, network: Any = None) -> Traits:
            return Traits(dependence="all", downstream_weights=0, reverse_span="all", targets=("real",))

    found = {finding.id: finding.status for finding in certify(Lies, only=["whole-run-reading", "trait-downstream-weights"]).findings}
    assert found == {"whole-run-reading": "failed", "trait-downstream-weights": "failed"}


class TwoViews(DFA):
    """Learns from the mean of two views of each example."""

    @classmethod
    def traits_of(cls, config: Any, network: Any = None) -> Traits:
        return dataclasses.replace(DFA.traits_of(config, network), views=2)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        one, other = batch.views
        assert not torch.equal(one, other) or step.index >= 0
        return super().credit(Batch((one + other) / 2, batch.targets), step)


def test_batches_have_the_views_that_a_rule_asks_for() -> None:
    found = {finding.id: finding for finding in certify(TwoViews, only=[*CHECKS, "whole-run-reading", "networks-refused", "bf16"]).findings}
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(found, "passed")


TOKENS = """
import torch
from torch import nn

import bpfree
from bpfree.baselines import DFA


class Recurrent(nn.Module):
    def __init__(self, inputs, size):
        super().__init__()
        self.cell = nn.GRU(inputs, size, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


def network(spec, depth: int = 2, width: int = 8):
    blocks = {"b1": nn.Sequential(nn.Embedding(spec.vocabulary, 6), Recurrent(6, width))}
    blocks |= {f"b{place}": Recurrent(width, width) for place in range(2, depth + 1)}
    blocks["readout"] = nn.Linear(width, spec.outputs)
    return bpfree.Network(blocks, input_shape=spec.input_shape, readout="readout", example=spec.example(1))


def letters():
    drawn = torch.randint(5, (90, 7), generator=torch.Generator().manual_seed(0))
    parts = [bpfree.Split(drawn[place, :-1], drawn[place, 1:]) for place in (slice(0, 60), slice(60, 75), slice(75, 90))]
    return bpfree.Task(bpfree.TaskSpec("letters", (6,), 5, "tokens", vocabulary=5), *parts)


class Letters(DFA):
    @classmethod
    def specimen(cls, kind, depth, width):
        names = {"task.name": "mine.py:letters", "network.name": "mine.py:network"}
        return {**names, "network.depth": depth, "network.width": width} if kind == "dense" else None
"""


@pytest.mark.slow
def test_a_rule_names_the_task_that_it_is_examined_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens, on blocks that have no null space and no linear maps of their own: whole runs judge them."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TOKENS)
    words = [
        word for name in ("whole-run-reading", "trait-passes", "trait-dependence", "same-seed", "batch-shapes") for word in ("--only", name)
    ]
    with pytest.raises(SystemExit) as ended:
        cli(["certify", "mine.py:Letters", *words])
    said = capsys.readouterr().out
    assert "failed" not in said, said
    assert ended.value.code == 0
