"""What the rules make of a network, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bpfree.network.closed_form import is_batch_norm
from bpfree.network.reach import Reach
from bpfree.network.sites import Site
from bpfree_forward_gradient.options import ForwardGradientConfig
from bpfree_forward_gradient.scope import Scope

__all__ = ["describe"]


def describe(scopes: Sequence[Scope], config: ForwardGradientConfig) -> str:
    """A paragraph per scope: where noise goes, which losses it is multiplied with, and what else learns how."""
    return "\n".join([_headline(config), *(line for scope in scopes for line in _scope(scope))])


def _headline(config: ForwardGradientConfig) -> str:
    words = [
        f"forward gradients: noise ({config.noise}) on {config.perturb}",
        "of its own for each example" if config.per_example else "shared by the batch",
        f"{config.tangents} direction{'s' if config.tangents > 1 else ''} per step" + (", antithetic" if config.antithetic else ""),
    ]
    return "; ".join(words)


def _scope(scope: Scope) -> Iterator[str]:
    names = ", ".join(scope.module._modules)
    losses = "the task's loss" if scope.scores else f"{_count(scope)} at a local head"
    yield f"{names}: {losses}"
    if scope.config.perturb == "activities":
        for site, reach in zip(scope.sites, scope.reach, strict=True):
            yield f"  noise {_place(scope, site)}: {_derivative(reach, scope)}"
    weights = scope.perturbed_parameters()
    if weights:
        yield f"  noise on parameters: {_short(weights)}: one derivative per {'example' if scope.perturbs_per_example else 'batch'}"
    if scope.final is not None:
        yield f"  exact gradient in closed form: {scope.final}"
    yield from _batch_norm(scope)


def _count(scope: Scope) -> str:
    parts = [f"{scope.groups} groups of channels"] if scope.groups > 1 else []
    parts += [f"{scope.tokens} patches"] if scope.tokens else []
    return f"local losses of {' times '.join(parts)}" if parts else "one local loss"


def _place(scope: Scope, site: Site) -> str:
    where = "before" if site.before else "behind"
    layers = " + ".join(source.layer for source in site.sources)
    mask = ", only on active units" if site.masked and scope.config.mask else ""
    return f"{where} {site.module} for {layers}{mask}{_norms(scope, site)}"


def _norms(scope: Scope, site: Site) -> str:
    names = " and ".join(source.norm for source in site.sources if source.norm is not None)
    if not names:
        return ""
    cotangent = "in closed form" if scope.config.norm_gradient == "exact" else "ignored"
    scales = f", scale and shift of {names} from the same estimate" if scope.config.norm_scales == "activities" else ""
    return f", cotangent of {names} {cotangent}{scales}"


def _derivative(reach: Reach, scope: Scope) -> str:
    own = [name for name, yes in (("example", reach.examples), ("patch", reach.tokens), ("group", reach.groups)) if yes]
    if not reach.examples:
        return "one derivative per batch, because batch norm behind the noise mixes examples" + (
            f"; per {' and '.join(own)}" if own else ""
        )
    return f"one derivative per {' and '.join(own)}"


def _batch_norm(scope: Scope) -> Iterator[str]:
    if any(is_batch_norm(part) for part in scope.module.modules()):
        frozen = scope.config.batch_norm == "frozen-statistics"
        yield f"  batch norm: {'running statistics, one more forward pass' if frozen else 'statistics of the batch'}"


def _short(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
