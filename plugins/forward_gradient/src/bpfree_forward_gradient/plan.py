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
    """Describe each scope in a paragraph: where noise enters, which losses it is multiplied with, and what else learns how."""
    return "\n".join([_headline(config), *(line for scope in scopes for line in _scope(scope))])


def _headline(config: ForwardGradientConfig) -> str:
    words = [
        f"forward gradients: noise ({config.noise}) on {config.perturb}",
        "of its own for each example" if config.per_example else "shared by the batch",
        f"{config.tangents} direction{'s' if config.tangents > 1 else ''} per step" + (", antithetic" if config.antithetic else ""),
    ]
    return "; ".join(words)


def _scope(scope: Scope) -> Iterator[str]:
    names = list(scope.module._modules)
    yield f"{', '.join(names)}: {'the loss of the task' if scope.scores else _losses(scope)}"
    short = _Paths(names)
    if scope.config.perturb == "activities":
        for site, reach in zip(scope.sites, scope.reach, strict=True):
            yield f"  {' + '.join(short(source.layer) for source in site.sources)}: {', '.join(_site(scope, site, reach, short))}"
    weights = scope.perturbed_parameters()
    if weights:
        per = "example" if scope.perturbs_per_example else "batch"
        yield f"  {_list([short(name) for name in weights])}: noise of their own, one derivative per {per}"
    if scope.final is not None:
        yield f"  {short(scope.final)}: exact gradient in closed form"
    if any(is_batch_norm(part) for part in scope.module.modules()):
        frozen = scope.config.batch_norm == "frozen-statistics"
        yield f"  batch norm: {'running statistics, which take one more forward pass' if frozen else 'statistics of the batch'}"


class _Paths:
    """Paths without the block's name, where there is one block only."""

    def __init__(self, blocks: Sequence[str]) -> None:
        self._prefix = f"{blocks[0]}." if len(blocks) == 1 else ""

    def __call__(self, path: str) -> str:
        return path.removeprefix(self._prefix)


def _losses(scope: Scope) -> str:
    parts = [f"{scope.groups} groups of channels"] if scope.groups > 1 else []
    parts += [f"{scope.tokens} patches"] if scope.tokens > 1 else []
    return f"local losses of {' x '.join(parts)}, at a linear head" if parts else "one local loss, at a linear head"


def _site(scope: Scope, site: Site, reach: Reach, short: _Paths) -> Iterator[str]:
    yield f"noise {'before' if site.before else 'behind'} {short(site.module)}"
    if site.masked and scope.config.mask:
        yield "on active units"
    norms = [source.norm for source in site.sources if source.norm is not None]
    if norms:
        exact = scope.config.norm_gradient == "exact"
        yield f"{'exactly back through' if exact else 'ignoring'} {' and '.join(short(norm) for norm in norms)}"
        if scope.config.norm_scales == "activities" and any(list(scope.part(norm).parameters()) for norm in norms):
            yield "whose scale and shift take the same estimate"
    parts = (("example", reach.examples), ("patch", reach.tokens and scope.tokens > 1), ("group", reach.groups))
    own = [name for name, yes in parts if yes]
    if reach.examples:
        yield f"one derivative per {' and '.join(own)}"
    else:
        yield f"one derivative per {' and '.join(['batch', *own])} (examples meet behind the noise)"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
