"""Whose weights an update needs, found by changing them.

*Dependence*: all parameters of block m are moved a little; does the update of block l change?

*Downstream weights*, the judge of locality: to the linear maps of block m a component is added that lies in the null space of all
inputs which they meet, so that every forward value stays as it was and only the weights differ. If the update of a block l below
changes nevertheless, it was made with the weights of m: weight transport. However a rule computes (autograd, forward mode, transposes by
hand, copies made when a phase began), it cannot use what it does not read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.certify.probe import Moment, Probe, Sampling
from bpfree.certify.subject import Specimen, Subject
from bpfree.rule import Rule
from bpfree.step import Batch, Step

__all__ = ["Matrix", "dependence", "downstream_weights", "name_of_dependence"]

FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative changes below it are rounding: honest rules stay below 1e-13 in double precision."""
RANK_TOLERANCE = 1e-10
Values = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Matrix:
    """How much each block's update changes when something is done to each other block.

    Attributes:
        blocks: names, first to last.
        values: [update of l][weights of m]: the relative change, 0 where it is rounding, ``None`` where it could not be measured.
        moments: [l][m]: the phase in which the change was largest.
        silent: blocks whose update is identically zero.
        specimen: what it was measured on, in words.
        reasons: why a block's weights could not be changed so, by block.
    """

    blocks: list[str]
    values: Values
    moments: dict[str, dict[str, str]]
    silent: list[str]
    specimen: str
    reasons: dict[str, str]

    def reach(self) -> int | None:
        """The largest m - l, for m above l, of a change; 0: none. Unmeasured pairs are left out; ``None`` if no pair could be measured."""
        pairs = [(i, j) for i in range(len(self.blocks)) for j in range(i + 1, len(self.blocks))]
        known = [(i, j) for i, j in pairs if self.at(i, j) is not None]
        if pairs and not known:
            return None
        return max((j - i for i, j in known if self.at(i, j)), default=0)

    def at(self, update: int, weights: int) -> float | None:
        """The entry at two positions."""
        return self.values[self.blocks[update]][self.blocks[weights]]

    def unmeasured(self, beyond: int = 0) -> list[tuple[str, str]]:
        """Pairs (l, m) more than ``beyond`` blocks apart, m above l, that could not be measured."""
        count = len(self.blocks)
        pairs = [(i, j) for i in range(count) for j in range(i + 1 + beyond, count)]
        return [(self.blocks[i], self.blocks[j]) for i, j in pairs if self.at(i, j) is None]

    def farthest(self) -> tuple[str, str] | None:
        """The pair (l, m) with a change that is farthest apart, m above l."""
        count = len(self.blocks)
        pairs = [(j - i, i, j) for i in range(count) for j in range(i + 1, count) if self.at(i, j)]
        return None if not pairs else (self.blocks[max(pairs)[1]], self.blocks[max(pairs)[2]])

    def to_dict(self) -> dict[str, Any]:
        """Plain values: rows are updates, columns weights."""
        rows = [[_plain(self.at(i, j)) for j in range(len(self.blocks))] for i in range(len(self.blocks))]
        return {"blocks": self.blocks, "rows": rows, "silent": self.silent, "specimen": self.specimen, "reasons": self.reasons}


def _plain(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def dependence(subject: Subject, specimen: Specimen, *, dtype: torch.dtype = torch.float64) -> Matrix:
    """Move all parameters of each block by a tenth of their size, and compare the updates."""
    probe = Probe(subject, specimen, dtype=dtype)
    base = probe.run()
    rule = probe.build()
    found = {name: _compare(base, probe.run(_noise(rule, name), base=base), dtype) for name in rule.network.blocks}
    return _matrix(list(rule.network.blocks), base, found, describe(specimen, probe.sampling), {})


def downstream_weights(subject: Subject, specimen: Specimen, depends: Matrix, *, dtype: torch.dtype = torch.float64) -> Matrix:
    """Add to each block's linear maps what its inputs cannot see, and compare the updates.

    A block whose null space is empty is tried again with fewer samples, a smaller image, wider layers. Where that does not help, an update
    that nothing at all done to the block's parameters could change (``depends``) does not need its weights either.
    """
    found: dict[str, _Changes] = {}
    reasons: dict[str, str] = {}
    words: list[str] = []
    blocks: list[str] = []
    silent: list[Moment] = []
    for smaller, sampling in _ladder(specimen):
        probe = Probe(subject, smaller, sampling, dtype=dtype)
        base = probe.run()
        rule = probe.build()
        blocks, silent = list(rule.network.blocks), silent or base
        seen = _inputs(probe)
        fresh = {name: value for name in blocks if name not in found and (value := _intervene(probe, base, rule, seen, name, reasons))}
        if fresh:
            words.append(
                f"{', '.join(fresh)} on {describe(smaller, sampling)}" if found or len(fresh) < len(blocks) else describe(smaller, sampling)
            )
        found |= fresh
        if all(name in found for name in blocks[1:]):
            break
    matrix = _matrix(blocks, silent, found, "; ".join(words), reasons)
    for row, column in itertools.product(blocks, blocks):
        if matrix.values[row][column] is None and depends.values[row][column] == 0:
            matrix.values[row][column] = 0.0
    open_columns = {column for _, column in matrix.unmeasured()}
    return replace(matrix, reasons={name: reason for name, reason in reasons.items() if name in open_columns})


def describe(specimen: Specimen, sampling: Sampling) -> str:
    """The specimen in words."""
    network = f"{specimen.kind}, depth {specimen.depth}, width {specimen.width}, {specimen.image}x{specimen.image} inputs"
    return f"{network}, {sampling.samples} samples x {sampling.steps} steps"


def _ladder(specimen: Specimen) -> Iterator[tuple[Specimen, Sampling]]:
    yield specimen, Sampling()
    yield replace(specimen, width=2 * specimen.width), Sampling(samples=2)
    yield replace(specimen, width=4 * specimen.width, image=4), Sampling(samples=2, steps=1)


# --- what is added ----------------------------------------------------------------------------------------------------


def _noise(rule: Rule, block: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    added = {}
    for own, p in rule.network.blocks[block].named_parameters():
        scale = 0.1 * max(float(p.detach().square().mean().sqrt()), 0.01)
        added[f"network.blocks.{block}.{own}"] = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return added


def _intervene(
    probe: Probe, base: list[Moment], rule: Rule, seen: Mapping[str, Tensor], block: str, reasons: dict[str, str]
) -> _Changes | None:
    added, why = _invisible(rule, block, seen)
    if not added:
        reasons[block] = why
        return None
    moments = probe.run(added, base=base)
    moved = max((_distance(a.output, b.output) for a, b in zip(base, moments, strict=True)), default=0.0)
    if moved > FLOOR[probe.dtype]:
        reasons[block] = f"its forward values did not stay (relative change {moved:.1e})"
        return None
    return _compare(base, moments, probe.dtype)


def _invisible(rule: Rule, block: str, seen: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """For each linear map of the block a change of its own size in the null space of its inputs."""
    generator = torch.Generator().manual_seed(2)
    added, why = {}, "it has no linear map (nn.Linear or a convolution without groups) that was executed"
    for own, p in rule.network.blocks[block].named_parameters():
        name = f"network.blocks.{block}.{own}"
        if name not in seen:
            continue
        size = p[0].numel()
        basis = _row_space(seen[name])
        if basis.shape[1] >= size:
            why = f"its inputs have as many independent directions ({size}) as it has weights per unit: nothing is invisible to them"
            continue
        change = torch.randn(p.shape, generator=generator, dtype=p.dtype).flatten(1)
        for _ in range(2):  # twice, for the last digits
            change = change - (change @ basis) @ basis.T
        added[name] = (change * (p.detach().norm() / change.norm())).view_as(p)
    return added, why


def _row_space(rows: Tensor) -> Tensor:
    """(D, r) an orthonormal basis of the rows (R, D)."""
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > RANK_TOLERANCE * sizes.max().clamp_min(1e-300)).sum()) if len(sizes) else 0
    basis: Tensor = directions[:rank].T
    return basis


# --- what the linear maps meet ----------------------------------------------------------------------------------------


def _inputs(probe: Probe) -> dict[str, Tensor]:
    """(R, D) the inputs of each linear map, by its weight's name: of a plain forward pass before each step.

    Networks that only their rule can execute are watched during its own steps.
    """
    seen: dict[str, list[Tensor]] = {}

    @contextmanager
    def watch(rule: Rule, batch: Batch, step: Step) -> Iterator[None]:
        names = {id(p): name for name, p in rule.named_parameters()}
        if rule.network.chain:
            with torch.no_grad(), _listening(names, seen):
                if step.phase.on_features:
                    rule.network.blocks[rule.network.readout or ""](batch.inputs)
                else:
                    rule.network(batch.inputs)
            yield
        else:
            with _listening(names, seen):
                yield

    probe.run(watch=watch)
    return {name: torch.cat(rows) for name, rows in seen.items()}


@contextmanager
def _listening(names: Mapping[int, str], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        weight = getattr(module, "weight", None)
        if id(weight) in names and arguments and isinstance(arguments[0], Tensor):
            rows = _rows(module, arguments[0].detach())
            if rows is not None:
                seen.setdefault(names[id(weight)], []).append(rows)

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _rows(module: nn.Module, x: Tensor) -> Tensor | None:
    """What each unit of a linear map multiplies: (R, D) rows; by im2col for convolutions."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    if isinstance(module, nn.Conv1d) and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        wide = [(1, size[0]) for size in (module.kernel_size, module.dilation, module.stride)]
        patches = F.unfold(x[:, :, None], wide[0], wide[1], (0, module.padding[0]), wide[2])
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return None


# --- comparing --------------------------------------------------------------------------------------------------------

_Changes = dict[str, tuple[float, str]]


def _compare(base: Sequence[Moment], other: Sequence[Moment], dtype: torch.dtype) -> _Changes:
    """By block: the largest relative change of its update in any step, and that step's phase."""
    largest: _Changes = {}
    for a, b in zip(base, other, strict=True):
        for name in a.updates:
            change = _distance(a.updates[name], b.updates[name])
            change = change if change > FLOOR[dtype] else 0.0
            if name not in largest or change > largest[name][0]:
                largest[name] = (change, a.phase)
    return largest


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """Relative: the norm of the difference over the larger norm; 1 where one of them is not finite."""
    if a is None or b is None:
        return 0.0
    size = max(float(a.norm()), float(b.norm()))
    value = float((a - b).norm()) / size if size > 0 else 0.0
    return value if math.isfinite(value) else 1.0


def _matrix(blocks: list[str], base: list[Moment], found: Mapping[str, _Changes], specimen: str, reasons: dict[str, str]) -> Matrix:
    values: Values = {row: {column: found[column][row][0] if column in found else None for column in blocks} for row in blocks}
    moments = {row: {column: found[column][row][1] if column in found else "" for column in blocks} for row in blocks}
    silent = [name for name in blocks if not any(bool(moment.updates[name].any()) for moment in base)]
    return Matrix(blocks, values, moments, silent, specimen, reasons)


def name_of_dependence(matrix: Matrix) -> str:
    """``independent``, ``upstream``, ``neighbours`` or ``all``: the narrowest that holds every change."""
    count = len(matrix.blocks)
    changed = [(i, j) for i in range(count) for j in range(count) if i != j and matrix.at(i, j)]
    if not changed:
        return "independent"
    above = max((j - i for i, j in changed), default=0)
    if above <= 0:
        return "upstream"
    return "neighbours" if above == 1 and count > 2 else "all"
