"""Add-ons to the updates of any rule: they change gradients between the rule and the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bpfree.errors import UsageError, unknown_name
from bpfree.options import NoOptions
from bpfree.rule import Rule

__all__ = ["CENTRALISE", "Activations", "Addon", "AddonKind", "make_addons", "names_of"]

WHERE = "optimizer.addons"
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Addon(Protocol):
    """The methods of an add-on; it may be a module, whose state is saved in checkpoints."""

    def update(self, groups: Mapping[str, list[nn.Parameter]], activations: Activations) -> None:
        """Change the ``.grad`` of the parameters that are about to be applied.

        Called after the rule's ``before_update``, before clipping and the optimiser.

        Args:
            groups: that are applied now, with their parameters.
            activations: of the step's last forward pass, if the add-on requests them; else empty.
        """


@dataclass(frozen=True)
class AddonKind:
    """A registered add-on.

    Attributes:
        make: ``(rule, config) -> Addon``.
        Config: dataclass of its options.
        summary: one line for listings.
        watches: whether it needs inputs and pre-activations of linear maps and convolutions, which are then kept for each step.
    """

    make: Callable[[Rule, Any], Addon]
    Config: type = NoOptions
    summary: str = ""
    watches: bool = False


class Activations(dict[str, tuple[Tensor, Tensor]]):
    """Input and pre-activation, detached, of each linear map and convolution of a rule, by the module's path, in the last forward pass."""

    def __init__(self, rule: nn.Module | None = None) -> None:
        super().__init__()
        self._rule = rule

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the inputs and pre-activations of layers inside; outside, nothing is kept."""
        handles: list[RemovableHandle] = []
        self.clear()
        for path, module in self._rule.named_modules() if self._rule is not None else ():
            if isinstance(module, LAYERS):
                handles.append(module.register_forward_hook(self._hook(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self[path] = (inputs[0].detach(), output.detach())

        return keep


def names_of(entries: Sequence[Any]) -> list[str]:
    """Name the add-ons of a configuration."""
    return [str(entry["name"]) if isinstance(entry, Mapping) and "name" in entry else str(entry) for entry in entries]


def make_addons(entries: Sequence[Any], rule: Rule, known: Mapping[str, AddonKind]) -> list[tuple[AddonKind, Addon]]:
    """Make the add-ons of a configuration.

    Args:
        entries: names, or mappings with ``name`` and options.
        rule: whose updates they change.
        known: the registered ones.

    Raises:
        UsageError: an unknown name or option, or an option of another type.
    """
    return [(kind, kind.make(rule, config)) for kind, config in configured(entries, known)]


def configured(entries: Sequence[Any], known: Mapping[str, AddonKind]) -> list[tuple[AddonKind, Any]]:
    """Read the add-ons of a configuration: their kinds and options.

    Raises:
        UsageError: as of ``make_addons``.
    """
    from bpfree.typed import Misfit, typed

    found = []
    for entry, name in zip(entries, names_of(entries), strict=True):
        if name not in known:
            raise unknown_name("add-on", name, known, where=WHERE)
        kind, hints = known[name], _types(known[name].Config)
        options = {key: value for key, value in entry.items() if key != "name"} if isinstance(entry, Mapping) else {}
        values = {}
        for key, value in options.items():
            if key not in hints:
                raise unknown_name(f"option of the add-on {name}", key, list(hints), where=WHERE)
            try:
                values[key] = typed(value, hints[key], key)
            except Misfit as error:
                raise UsageError(f"{name}: {key} {error}", where=WHERE) from error
        found.append((kind, kind.Config(**values)))
    return found


def _types(config: type) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(config)


# --- one that comes with the core --------------------------------------------------------------------------------------------


class Centralise:
    """Gradient centralisation: subtract from each output's gradient its mean over the inputs (Yong et al., ECCV 2020, equation 1)."""

    @torch.no_grad()
    def update(self, groups: Mapping[str, list[nn.Parameter]], activations: Activations) -> None:
        """Centralise the gradients of all weights with two axes or more; biases and norms stay."""
        for members in groups.values():
            for parameter in members:
                if parameter.grad is not None and parameter.dim() > 1:
                    parameter.grad -= parameter.grad.mean(dim=tuple(range(1, parameter.dim())), keepdim=True)


CENTRALISE = AddonKind(
    lambda rule, config: Centralise(), summary="gradient centralisation: each output's gradient has mean zero (Yong et al. 2020)"
)
