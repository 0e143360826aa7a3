"""Models without their classifiers, from which stems are made: networks by name, modules and what makes them, trained runs."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.named_networks import REGISTRY
from bpfree.network.network import Network, evaluating
from bpfree.rule import Rule
from bpfree.tasks.task import TaskSpec

__all__ = ["RUN", "Made", "called", "headless", "of_network", "of_run", "untold"]

RUN = "run:"


class Made(NamedTuple):
    """A model without its classifier.

    Attributes:
        body: the model.
        what: it is, in words.
        cut: the classifier's name; empty: it had none.
    """

    body: nn.Module
    what: str
    cut: str = ""

    @property
    def told(self) -> str:
        """What it is, and what was left out."""
        return f"{self.what} without {self.cut}" if self.cut else self.what


@contextmanager
def untold() -> Iterator[None]:
    """Do not log how a network was split: the blocks of a stem are no units of credit."""
    logger = logging.getLogger("bpfree.network")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def called(make: Any, spec: TaskSpec, options: dict[str, Any]) -> nn.Module:
    """Call what makes a stem with what its parameters ask for by name, and with the options.

    Raises:
        UsageError: it cannot be called, or returns something else than a module.
    """
    if not callable(make):
        raise UsageError(f"a stem is a name, a module, or what makes one, not {make!r:.80}", where="stem", fix="give the module's class")
    known = {"spec": spec, "input_shape": tuple(spec.input_shape), "outputs": spec.outputs}
    asked = inspect.signature(make).parameters
    made = make(**{name: value for name, value in known.items() if name in asked}, **options)
    if not isinstance(made, nn.Module):
        raise UsageError(f"the stem's maker returns {type(made).__name__}, not a module", where="stem", fix="return the module")
    return made


def of_network(network: Network, name: str, spec: TaskSpec) -> Made:
    """Return a network without its readout; one whose last linear map makes something else than the task's scores has none.

    Raises:
        UsageError: it is no chain.
    """
    if not network.chain:
        raise UsageError(f"{name} is no chain of blocks, so no stem", where="network.stem", fix="name another network")
    readout = network.readout
    if readout is None or network.shapes.get(readout) != torch.Size(spec.output_size) or not network.hidden:
        return Made(network, name)
    return Made(network.without_readout(), name, readout)


@torch.no_grad()
def headless(module: nn.Module, name: str, spec: TaskSpec) -> Made:
    """Return a copy of a module without its classifier: a last linear layer with as many outputs as the task has."""
    module = copy.deepcopy(module)
    made: dict[str, Any] = {}
    heads = {path: part for path, part in module.named_modules() if path and isinstance(part, nn.Linear)}
    hooks = [part.register_forward_hook(lambda *args, path=path: made.update({path: args[2]})) for path, part in heads.items()]
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    try:
        with evaluating(module):
            found = module(spec.example(2, dtype=weight.dtype))
    except Exception:  # the stem is measured later, and its error is reported there
        return Made(module, name)
    finally:
        for hook in hooks:
            hook.remove()
    scores = tuple(getattr(found, "shape", ()))[1:] == tuple(spec.output_size)
    cut = next((path for path, output in made.items() if output is found), "") if scores else ""
    if cut:
        module.set_submodule(cut, nn.Identity())
    return Made(module, name, cut)


class RuleFeatures(nn.Module):
    """The features of a trained rule that has its own way to compute them."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Any) -> Tensor:
        return self.rule.features(x)


class Renormalise(nn.Module):
    """Takes inputs that were normalised with one task's constants to another's: ``x a + b`` for each channel."""

    factor: Tensor
    shift: Tensor

    def __init__(self, now: TaskSpec, then: TaskSpec) -> None:
        super().__init__()
        shape = (-1,) + (1,) * (len(now.input_shape) - 1)
        mean, std, old_mean, old_std = (torch.tensor(values).view(shape) for values in (now.mean, now.std, then.mean, then.std))
        self.register_buffer("factor", std / old_std)
        self.register_buffer("shift", (mean - old_mean) / old_std)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


def of_run(name: str, spec: TaskSpec) -> Made:
    """Return the network of a trained rule without its readout, with the weights that were tested.

    Raises:
        UsageError: its task has inputs of another shape, or scaled in another way.
    """
    from bpfree.saved import load

    saved = load(name.removeprefix(RUN), registry=REGISTRY.get())
    was = saved.spec
    if (tuple(was.input_shape), was.scale, was.vocabulary) != (tuple(spec.input_shape), spec.scale, spec.vocabulary):
        raise UsageError(
            f"the run was trained on inputs of shape {tuple(was.input_shape)}, divided by {was.scale}",
            where=f"network.stem={name}, task {spec.name}: shape {tuple(spec.input_shape)}, divided by {spec.scale}",
            fix="network.image_size resizes images; or name a run on such inputs",
        )
    ordinary = type(saved.rule).features is Rule.features and saved.network.chain and saved.network.readout is not None
    body: nn.Module = saved.network.without_readout() if ordinary else RuleFeatures(saved.rule)
    if spec.takes_real_tensors and (was.mean, was.std) != (spec.mean, spec.std):
        body = nn.Sequential(Renormalise(spec, was), body)
    return Made(body, f"run {Path(name.removeprefix(RUN)).name}, {type(saved.rule).__name__}", saved.network.readout or "")
