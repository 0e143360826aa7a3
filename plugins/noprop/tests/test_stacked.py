"""Blocks computed as one: the loop's gradients, statistics and operations, and the loop where that cannot be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_noprop.dt import NoPropDT
from torch import Tensor

from bpfree.options import OptimizerConfig
from bpfree.step import Batch, Phase
from bpfree.tasks.task import TaskSpec
from bpfree.training.accumulation import accumulate
from bpfree.training.operations import counted_operations
from bpfree.training.stepper import new_step

MakeRule = Callable[..., NoPropDT]
Pair = tuple[NoPropDT, NoPropDT]


@pytest.fixture
def pair(make_rule: MakeRule) -> Callable[..., Pair]:
    """Equal rules, of which one stacks and one does not."""

    def make(**options: Any) -> Pair:
        stacked, loop = (make_rule(execution=execution, **options) for execution in ("stacked", "loop"))
        assert all(torch.equal(a, b) for a, b in zip(stacked.parameters(), loop.parameters(), strict=True))
        return stacked, loop

    return make


@pytest.fixture
def stackings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each step that is computed as one."""
    seen: list[int] = []
    credit = NoPropDT.credit_stacked

    def watched(self: NoPropDT, stack: Any, *args: Any) -> Any:
        seen.append(len(stack.blocks))
        return credit(self, stack, *args)

    monkeypatch.setattr(NoPropDT, "credit_stacked", watched)
    return seen


def after(rule: NoPropDT, batch: Batch, *, steps: int = 1, parts: int = 1, phase: Phase | None = None) -> dict[str, Tensor]:
    """Metrics and gradients of the last of some steps, and all weights and buffers at the end."""
    # Not Adam, which makes steps of rounding errors where gradients are zero (biases that batch norm undoes); small, as weights are steep.
    step, gradients = new_step(rule, OptimizerConfig("sgd", lr=1e-3), seed=3), {}
    step.phase = phase or step.phase
    apply = step.apply

    def noting(*names: str) -> None:
        gradients.update({f"{name}.grad": p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None})
        apply(*names)

    step.apply = noting
    for step.index in range(steps):
        metrics = accumulate(rule, batch, step, parts)
    return {**metrics, **gradients, **rule.state_dict()}


def double(batch: Batch) -> Batch:
    targets = batch.targets
    return Batch(batch.inputs.double(), targets.double() if targets is not None and targets.is_floating_point() else targets)


CASES: dict[str, dict[str, Any]] = {
    "one-hot": {},
    "learned": {"embedding": "learned", "head": "radial"},
    "prototype": {"embedding": "prototype"},
    "flat": {"network": {"depth": 0}},
    "noise": {"state": "noise"},
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_are_the_loops(case: str, parts: int, pair: Callable[..., Pair], batch: Batch, stackings: list[int]) -> None:
    # Oracle: the same noise and the same arithmetic one block after the other, in double precision, over three optimiser steps.
    stacked, loop = (after(rule.double(), double(batch), steps=3, parts=parts) for rule in pair(**CASES[case]))
    assert stackings == [3] * 3 * parts
    assert stacked.keys() == loop.keys()
    for name, value in stacked.items():
        torch.testing.assert_close(value, loop[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_gradients_in_lower_precision(
    dtype: torch.dtype, tolerance: float, pair: Callable[..., Pair], batch: Batch, device: torch.device, stackings: list[int]
) -> None:
    # Oracle: the loop, to the tolerance that the module states: the error of each gradient over its norm.
    bf16 = dtype is torch.bfloat16
    with torch.autocast(device.type, dtype) if bf16 else nullcontext():
        stacked, loop = (after(rule, batch) for rule in pair())
    assert stackings == [3]
    weights = [name for name in loop if name.endswith("weight.grad") and loop[name].dim() == 2]
    assert len(weights) > 10
    for name in weights:
        assert (stacked[name] - loop[name]).norm() <= tolerance * loop[name].norm(), name


def test_soft_labels_and_frozen_bodies(pair: Callable[..., Pair], batch: Batch, stackings: list[int]) -> None:
    # Oracle: the loop; and frozen bodies get no gradient.
    rules = pair()
    for rule in rules:
        rule.double().freeze_features()
    soft = Batch(batch.inputs, F.one_hot(batch.targets, 4).double() * 0.8 + 0.05)
    stacked, loop = (after(rule, double(soft)) for rule in rules)
    assert stackings
    assert {name for name in stacked if name.endswith(".grad") and "blocks" in name} == {
        f"network.blocks.t{t}.out.{kind}.grad" for t in (1, 2, 3) for kind in ("weight", "bias")
    }
    for name, value in stacked.items():
        torch.testing.assert_close(value, loop[name], rtol=1e-9, atol=1e-9, msg=name)


def test_eval_mode_is_the_loops(pair: Callable[..., Pair], batch: Batch, stackings: list[int]) -> None:
    # Oracle: the loop; running statistics are read and stay.
    stacked, loop = (after(rule.double().eval(), double(batch)) for rule in pair())
    assert stackings
    for name, value in stacked.items():
        torch.testing.assert_close(value, loop[name], rtol=1e-9, atol=1e-9, msg=name)
    assert stacked["network.blocks.t1.stem.2.num_batches_tracked"] == 0


def test_operations_are_the_loops(pair: Callable[..., Pair], batch: Batch) -> None:
    # Oracle: torch's operation counter on the loop.
    counts = []
    for rule in pair():
        step = new_step(rule)
        with counted_operations() as operations:
            rule.credit(batch, step)
        counts.append(operations())
    assert counts[0] == counts[1] > 0


# --- when it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["noprop-cnn", "noprop-paper"])
def test_convolutional_blocks_take_the_loop_and_say_so_once(
    network: str, pair: Callable[..., Pair], device: torch.device, caplog: pytest.LogCaptureFixture, stackings: list[int]
) -> None:
    # Oracle: equal to the loop bit by bit, dropout masks included.
    images = TaskSpec("images", input_shape=(1, 8, 8), outputs=4)
    size = {"channels": 2, "width": 4} if network == "noprop-cnn" else {}
    rules = pair(spec=images, network={"name": network, **size})
    batch = Batch(torch.randn(6, 1, 8, 8, device=device), (torch.arange(6) % 4).to(device))
    with caplog.at_level(logging.WARNING, logger="bpfree"):
        stacked, loop = (after(rule, batch, steps=2) for rule in rules)
    assert not stackings
    assert [record.getMessage().partition(" has")[0] for record in caplog.records] == ["rule.execution=stacked: Conv2d"]
    assert "Conv2d has no batched form" in rules[0].plan()
    assert all(torch.equal(stacked[name], loop[name]) for name in loop)


def test_what_makes_a_step_a_loop(make_rule: MakeRule, batch: Batch, stackings: list[int], caplog: pytest.LogCaptureFixture) -> None:
    # Oracle: nothing is computed as one, and hooks are called.
    def credited(rule: NoPropDT, **place: Any) -> None:
        step = new_step(rule)
        for name, value in place.items():
            setattr(step, name, value)
        rule.credit(batch, step)

    credited(make_rule(execution="stacked"), local_groups=frozenset({"t1", "t2", "head"}))
    credited(make_rule(execution="stacked"), phase=Phase(groups=("t1", "t2")))
    credited(make_rule(execution="stacked", T=1))
    rule, called = make_rule(execution="stacked"), []
    rule.network.blocks["t2"].fuse[0].register_forward_hook(lambda *args: called.append("module"))
    credited(rule)
    rule = make_rule(execution="stacked")
    rule.network.blocks["t2"].fuse[0].weight.register_hook(lambda gradient: called.append("parameter"))
    credited(rule)
    rule = make_rule(execution="stacked")
    rule.network.blocks["t2"].fuse[0].weight.register_post_accumulate_grad_hook(lambda parameter: called.append("accumulated"))
    credited(rule)
    assert called == ["module", "parameter", "accumulated"]
    rule = make_rule(execution="stacked")
    rule.network.blocks["t2"].eval()
    credited(rule)
    assert not stackings
    assert len(caplog.records) == 7


def test_automatic_choice(make_rule: MakeRule, batch: Batch, stackings: list[int], device: torch.device) -> None:
    # Oracle: the sizes and devices that were measured.
    narrow, wide = make_rule(), make_rule(network={"width": 129})
    for rule in (narrow, wide):
        rule.credit(batch, new_step(rule))
    on_cpu = device.type == "cpu"
    assert stackings == [3] * on_cpu
    assert ("a step computes all blocks as one, by batched products" in narrow.plan()) == on_cpu
    assert ("more than 128 units" if on_cpu else "not measured on this device") in wide.plan()
    assert "a step computes" not in make_rule(updates="sequential").plan()


def test_a_copied_rule_stacks_its_own_blocks(pair: Callable[..., Pair], batch: Batch) -> None:
    # Oracle: the original's parameters have no gradient after a step of the copy.
    rule, _ = pair()
    twin = copy.deepcopy(rule)
    twin.credit(batch, new_step(twin))
    assert all(p.grad is None for p in rule.parameters())
    assert all(p.grad is not None for p in twin.network.parameters())
