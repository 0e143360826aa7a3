"""What every rule promises: its configuration, the networks it takes, batches of any shape, bf16, and that NaN is reported."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bpfree import yaml_values
from bpfree.certify import training_runs
from bpfree.certify.checks import step_behaviour
from bpfree.certify.checks.check import Check
from bpfree.certify.checks.guard import guarded
from bpfree.certify.checks.networks import CATALOGUE, Offer
from bpfree.certify.checks.places import place_of, place_of_error
from bpfree.certify.findings import CheckFailed, NotApplicable, Unmeasured
from bpfree.certify.loop import Loop, predict, small_rule
from bpfree.certify.measurements import Measurements
from bpfree.certify.subject import Subject, batches, examples, with_views
from bpfree.config import resolve
from bpfree.errors import BpfreeError, UsageError
from bpfree.options import OptimizerConfig
from bpfree.rule import Card, Rule
from bpfree.run import Run
from bpfree.seeds import seeded
from bpfree.step import Batch
from bpfree.tasks.task import Task, TaskSpec
from bpfree.tasks.trees import select
from bpfree.training.environment import autocast

__all__ = ["CHECKS"]

EPOCHS = 4
SGD = OptimizerConfig("sgd", lr=0.1, weight_decay=0.0, momentum=0.0)
TOLERANCE = 1e-3
"""Tolerance of an update, relative to its largest entry: float32, summed in another order."""


def _crash(error: Exception, rule: type[Rule], when: str, fix: str) -> CheckFailed:
    said = (str(error).splitlines() or [""])[0]
    return CheckFailed(f"{when} it fails with {type(error).__name__}: {said}", where=place_of_error(error, rule), fix=fix)


# --- configuration --------------------------------------------------------------------------------------------------------


def config_roundtrip(m: Measurements) -> str | None:
    """Check the configuration: to YAML and back, into the rule, unknown keys, help texts, and the card."""
    subject = m.subject
    _through_yaml(subject)
    _into_the_rule(m)
    _refuses_unknown_keys(subject)
    _has_texts(subject.rule)
    return None


def _where(subject: Subject) -> str:
    return f"{subject.rule.Config.__module__}.{subject.rule.Config.__qualname__}"


def _through_yaml(subject: Subject) -> None:
    try:
        saved = subject.recipe.to_dict()
        again = resolve(yaml_values.read(subject.recipe.to_yaml()), subject.registry).to_dict()
    except Exception as error:
        raise _crash(
            error, subject.rule, "written as YAML and read again", "plain values in Config: numbers, text, lists, mappings"
        ) from error
    key = _first_difference(saved, again)
    if key:
        raise CheckFailed(
            f"the configuration changes when it is written as YAML and read again: {key}",
            where=_where(subject),
            fix="let Config hold what it was given, and derive other values in the rule",
        )


def _first_difference(one: Any, other: Any, key: str = "") -> str:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found = (_first_difference(one.get(k), other.get(k), f"{key}.{k}" if key else str(k)) for k in {**one, **other})
        return next((difference for difference in found if difference), "")
    return "" if one == other else f"{key}={one!r} became {other!r}"


def _into_the_rule(m: Measurements) -> None:
    """Check that the built rule has the given configuration, which checkpoints record."""
    subject, specimen = m.subject, m.subject.specimen(m.kind, depth=2, width=16)
    recipe = subject.resolve(subject.specimen_settings(specimen), specimen.spec)
    given = dataclasses.asdict(recipe.options["rule"])
    rule = recipe.build_rule(specimen.spec)
    key = _first_difference(given, dataclasses.asdict(rule.config))
    if key:
        raise CheckFailed(
            f"the rule does not keep the configuration it was given: rule.{key}",
            where=place_of(subject.rule, "__init__"),
            fix="do not change self.config: it is what checkpoints and tables record",
        )


def _refuses_unknown_keys(subject: Subject) -> None:
    try:
        subject.resolve({"rule.no_such_option": 1})
    except UsageError:
        return
    raise CheckFailed(
        "an unknown option, rule.no_such_option, is accepted without an error",
        where=_where(subject),
        fix="make Config a dataclass with a field for each option",
    )


def _has_texts(rule: type[Rule]) -> None:
    silent = list(_without_help(rule.Config))
    if silent:
        raise CheckFailed(
            f"options without a help text: {', '.join(silent)}",
            where=f"{rule.Config.__module__}.{rule.Config.__qualname__}",
            fix='give each field one: name: float = option(0.1, "what it is, and in which unit")',
        )
    missing = [name for name in ("summary", "equation") if not getattr(rule.card, name).strip()]
    if missing or rule.card.summary == Rule.card.summary:
        raise CheckFailed(
            f"the method card has no {' and no '.join(missing) or 'summary'}",
            where=f"{rule.__module__}.{rule.__qualname__}.card",
            fix=f"card = {Card.__name__}(summary, paper=..., equation=..., notes=...)",
        )


def _without_help(config: type, prefix: str = "") -> Iterator[str]:
    made = config()
    for item in dataclasses.fields(config):
        value = getattr(made, item.name)
        if dataclasses.is_dataclass(value):
            yield from _without_help(type(value), f"{prefix}{item.name}.")
        elif not str(item.metadata.get("help", "")).strip():
            yield prefix + item.name


# --- networks -------------------------------------------------------------------------------------------------------------


def networks_refused(m: Measurements) -> str | None:
    """Check on a catalogue of networks and targets that each works for two steps of each phase, or is refused with a reason."""
    outcomes = {offer.name: _try(m.subject, offer) for offer in CATALOGUE}
    works = [name for name, reason in outcomes.items() if not reason]
    reasons = {reason: [name for name, other in outcomes.items() if other == reason] for reason in outcomes.values() if reason}
    refused = [f"refuses {', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return "; ".join([f"works on {', '.join(works)}", *refused] if works else refused)


def _try(subject: Subject, offer: Offer) -> str:
    """Return an empty string if the rule works on a network, or the reason if the rule refuses it.

    Raises:
        CheckFailed: neither.
    """
    fix = "support it, or refuse it in __init__: raise UsageError(what, fix=...); traits.chain, readout and targets do it for you"
    loop = None
    try:
        with seeded(0):
            rule = subject.rule(offer.build(offer.spec), offer.spec, copy.deepcopy(subject.recipe.options["rule"]))
        before = [p.detach().clone() for p in rule.parameters()]
        loop = Loop(rule)
        for batch in loop.turns(offer.batches(2, subject.views), each=2):
            loop.take(batch)
    except BpfreeError as error:
        if loop is None or loop.step.index == 0:
            return error.what
        raise _crash(error, subject.rule, f"on {offer.name}, after {loop.step.index} steps,", fix) from error
    except Exception as error:
        raise _crash(error, subject.rule, f"on {offer.name}", fix) from error
    _judge(rule, before, offer, fix)
    return ""


def _judge(rule: Rule, before: list[Tensor], offer: Offer, fix: str) -> None:
    after, where = list(rule.parameters()), place_of(type(rule), "learn")
    names = [name for name, p in rule.named_parameters() if not bool(torch.isfinite(p).all())]
    if names:
        raise CheckFailed(f"on {offer.name} weights are not finite after two steps: {names[0]}", where=where, fix=fix)
    if len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
        raise CheckFailed(f"on {offer.name} nothing is learned, and no error is raised", where=where, fix=fix)


# --- batches --------------------------------------------------------------------------------------------------------------


def batch_shapes(m: Measurements) -> str | None:
    """Check partial batches, a single example, and inputs in other memory layouts."""
    remark = _sizes(m)
    if m.spec.takes_real_tensors:
        _layouts(m, m.subject.specimen(m.kind, depth=2, width=16).spec, "non-contiguous", _non_contiguous)
    kinds = m.subject.kinds()
    if "convolutional" in kinds and m.subject.own_task is None:
        colours = dataclasses.replace(m.spec, input_shape=(3, 8, 8))
        _layouts(m, colours, "channels-last", lambda x: x.contiguous(memory_format=torch.channels_last), kind="convolutional")
    return remark


def _sizes(m: Measurements) -> str | None:
    remark = None
    for count, name in ((5, "a partial batch of 5"), (1, "a batch of one example")):
        rule = m.build()
        whole = m.batches(16, 2)
        few = torch.arange(count)
        some = Batch(select(whole[1].inputs, few), None if whole[1].targets is None else whole[1].targets[:count])
        part = with_views(some, m.subject.views)
        try:
            _learn(Loop(rule), [whole[0], part])
        except Exception as error:
            if count == 1 and _has_batch_norm(rule) and "more than 1 value per channel" in str(error):
                remark = "a batch of one example does not apply: the specimen has batch norm, which torch refuses then"
                continue
            raise _crash(error, type(rule), f"on {name}", "take any number of examples: no squeeze(), no division by N - 1") from error
        bad = [name for name, p in rule.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise CheckFailed(
                f"on {name} weights become NaN or infinite: {bad[0]}",
                where=place_of(type(rule), "learn"),
                fix="take any number of examples: no deviation over the batch of one, no division by N - 1",
            )
    return remark


def _has_batch_norm(rule: Rule) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in rule.modules())


def _learn(loop: Loop, given: list[Batch]) -> None:
    for batch in loop.turns(given, each=len(given)):
        loop.take(batch)


def _non_contiguous(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _layouts(m: Measurements, spec: TaskSpec, name: str, lay: Callable[[Tensor], Tensor], kind: str | None = None) -> None:
    """Check that inputs in another layout give the same update."""
    given = batches(spec, 16, 3, dtype=torch.float32, views=m.subject.views)
    laid = [Batch(lay(batch.inputs), batch.targets, tuple(lay(view) for view in batch.views)) for batch in given]
    updates = []
    for some in (given, laid):
        rule = training_runs.build(m.subject, spec, specimen=m.subject.specimen(kind or m.kind, depth=2, width=8)).train()
        before = {key: p.detach().clone() for key, p in rule.named_parameters()}
        try:
            _learn(Loop(rule, optimizer=SGD), some)
        except Exception as error:
            raise _crash(error, type(rule), f"on {name} inputs", "use reshape or flatten where you use view") from error
        updates.append({key: p.detach() - before[key] for key, p in rule.named_parameters() if key in before})
    for key, update in updates[0].items():
        if not torch.allclose(update, updates[1][key], rtol=0, atol=TOLERANCE * float(update.abs().max()) + 1e-7, equal_nan=True):
            raise CheckFailed(
                f"{name} inputs give another update of {key}, by up to {float((update - updates[1][key]).abs().max()):.2g}",
                where=place_of(m.subject.rule, "learn"),
                fix="give .grad the parameter's memory layout, which fused optimisers rely on, and write into no flatten() or reshape()",
            )


# --- numbers --------------------------------------------------------------------------------------------------------------


def bf16(m: Measurements) -> str | None:
    """Check two steps of each phase and a prediction under autocast."""
    rule = m.build()
    given = m.batches(16, 2)
    fix = "cast where kinds meet: x.to(weight.dtype), or torch.autocast(..., enabled=False) around what needs float32"
    try:
        with autocast(torch.device("cpu"), "bf16"):
            _learn(Loop(rule), given)
            scores = predict(rule, given[0].inputs)
    except Exception as error:
        raise _crash(error, type(rule), "under bf16 autocast", fix) from error
    parameters = dict(rule.named_parameters())
    wrong = [f"{name} is {p.dtype}" for name, p in parameters.items() if p.is_floating_point() and p.dtype != torch.float32]
    wrong += [
        f"{name} is not finite" for name, value in {**parameters, "the prediction": scores}.items() if not bool(value.isfinite().all())
    ]
    if wrong:
        raise CheckFailed(f"under bf16 autocast {wrong[0]} after two steps", where=place_of(type(rule), "learn"), fix=fix)
    return None


def nan_reported(m: Measurements) -> str | None:
    """Check that a run on inputs of which half hold a NaN is reported, and that one on clean inputs finishes."""
    spec = m.spec
    if not spec.takes_real_tensors:
        raise NotApplicable("its inputs are no real numbers, so none of them can be NaN")
    clean, spoilt = examples(spec, 32, seed=3), examples(spec, 64)
    task = Task(spec, spoilt, clean, clean)
    # after the task has checked them: the rule is to meet them; whole examples, because rules write labels over some of the inputs
    spoilt.inputs[::2] = torch.nan
    try:
        plain = _run_on(m, Task(spec, clean, clean, clean))
    except BpfreeError as error:
        raise Unmeasured(f"the same run fails on clean inputs: {error.what}") from error
    if plain.status != "finished":
        raise Unmeasured("the same run diverges on clean inputs")
    try:
        run = _run_on(m, task)
    except BpfreeError as error:
        return f"refused: {error.what}"
    except Exception as error:
        raise _crash(error, m.subject.rule, "on inputs that hold NaN", "let NaN pass, or raise BpfreeError") from error
    if run.status != "diverged":
        raise CheckFailed(
            f"a run on inputs that hold NaN ends as {run.status!r} and not as 'diverged'",
            where=place_of(m.subject.rule, "learn"),
            fix="let NaN pass into the loss or the weights: no nan_to_num, no clamp of what may be NaN, no skipped update",
        )
    return run.reason


def _run_on(m: Measurements, task: Task) -> Run:
    return training_runs.train(m.subject, task, rule=small_rule(m.subject, m.kind, task.spec), epochs=EPOCHS)


CHECKS = [
    Check("config-roundtrip", "its configuration is kept, checked and explained", guarded(config_roundtrip)),
    Check("networks-refused", "networks and targets are learned from, or refused with a reason", guarded(networks_refused)),
    Check("batch-shapes", "batches of any size and layout work", guarded(batch_shapes)),
    Check("bf16", "two steps under bf16 autocast stay finite", guarded(bf16)),
    Check("nan-reported", "a run on inputs that hold NaN is called diverged", guarded(nan_reported)),
    *step_behaviour.CHECKS,
]
