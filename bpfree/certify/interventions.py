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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.certify.findings import Unmeasured
from bpfree.certify.probe import Moment, Probe, Sampling
from bpfree.certify.subject import Specimen, Subject
from bpfree.rule import Rule
from bpfree.step import Batch, Step

__all__ = ["Matrix", "dependence", "downstream_weights", "name_of_dependence"]

ROUNDS = 32
"""Passes over the batches, of all phases together, in the search for delayed credit (a rule may copy weights every n steps)."""
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative changes below it are rounding: honest rules stay below 1e-13 in double precision."""
OVERWRITTEN = "its weights are overwritten in a step, by what the rule keeps elsewhere"
BLIND = {torch.float64: 1e-10, torch.float32: 1e-4}
RANK_TOLERANCE = 1e-10
Values = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Matrix:
    """How much each block's update changes when each other block is changed.

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
        """Return the largest m - l, m above l, of a change; 0: none. Unmeasured pairs are skipped; ``None`` if no pair was measured."""
        pairs = [(i, j) for i in range(len(self.blocks)) for j in range(i + 1, len(self.blocks))]
        known = [(i, j) for i, j in pairs if self.at(i, j) is not None]
        if pairs and not known:
            return None
        return max((j - i for i, j in known if self.at(i, j)), default=0)

    def at(self, update: int, weights: int) -> float | None:
        """Return the entry at two positions."""
        return self.values[self.blocks[update]][self.blocks[weights]]

    def unmeasured(self, beyond: int = 0) -> list[tuple[str, str]]:
        """List the pairs (l, m) more than ``beyond`` blocks apart, m above l, that could not be measured."""
        count = len(self.blocks)
        pairs = [(i, j) for i in range(count) for j in range(i + 1 + beyond, count)]
        return [(self.blocks[i], self.blocks[j]) for i, j in pairs if self.at(i, j) is None]

    def farthest(self) -> tuple[str, str] | None:
        """Return the pair (l, m), m above l, with a change that is farthest apart."""
        count = len(self.blocks)
        pairs = [(j - i, i, j) for i in range(count) for j in range(i + 1, count) if self.at(i, j)]
        return None if not pairs else (self.blocks[max(pairs)[1]], self.blocks[max(pairs)[2]])

    def joined(self, other: Matrix) -> Matrix:
        """Return the matrix with the entries of another one wherever this has none."""
        values, moments = {}, {}
        for row in self.blocks:
            values[row] = {name: value or other.values[row][name] or value for name, value in self.values[row].items()}
            moments[row] = {
                name: word if self.values[row][name] else other.moments[row][name] or word for name, word in self.moments[row].items()
            }
        return replace(self, values=values, moments=moments)

    def to_dict(self) -> dict[str, Any]:
        """Return the matrix as plain values: rows are updates, columns weights."""
        rows = [[_plain(self.at(i, j)) for j in range(len(self.blocks))] for i in range(len(self.blocks))]
        return {"blocks": self.blocks, "rows": rows, "silent": self.silent, "specimen": self.specimen, "reasons": self.reasons}


def _plain(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def dependence(subject: Subject, specimen: Specimen, *, dtype: torch.dtype = torch.float64) -> Matrix:
    """Move all parameters of each block by a tenth of their size, and compare the updates.

    Raises:
        Unmeasured: two runs without any change differ, or updates are not finite.
    """
    probe = Probe(subject, specimen, dtype=dtype)
    base = probe.run()
    if broken := [name for moment in base for name, update in moment.updates.items() if not bool(update.isfinite().all())]:
        raise Unmeasured(f"the update of block {broken[0]!r} is not finite on {describe(specimen, probe.sampling)}")
    if any(change for change, _ in _compare(base, probe.run(), dtype).values()):
        raise Unmeasured("two runs from the same seeds differ: its steps depend on something besides weights, batches and generators")
    rule = probe.build()
    found = {name: _compare(base, probe.run(_noise(rule, name), base=base), dtype) for name in rule.network.blocks}
    return _matrix(list(rule.network.blocks), base, found, describe(specimen, probe.sampling), {})


def downstream_weights(subject: Subject, specimen: Specimen, depends: Matrix, *, dtype: torch.dtype = torch.float64) -> Matrix:
    """Add to each block's linear maps what its inputs cannot see, and compare the updates.

    A block whose null space is empty is tried again with fewer samples, a smaller image, wider layers. Where that does not help, an update
    that nothing at all done to the block's parameters could change (``depends``) does not need its weights either.
    """
    found: dict[str, _Column] = {}
    words: list[str] = []
    blocks: list[str] = []
    silent: list[Moment] = []
    for smaller, sampling in _ladder(specimen):
        probe = Probe(subject, smaller, sampling, dtype=dtype)
        base, seen = _inputs(probe)
        rule = probe.build()
        blocks, silent = list(rule.network.blocks), silent or base
        wanted = [name for name in blocks if name not in found or found[name].why]
        columns = {name: _intervene(probe, base, rule, seen, name) for name in wanted}
        _look_again_later(probe, columns, len(base))
        fresh = [name for name in wanted if not columns[name].why]
        if fresh:
            words.append(
                f"{', '.join(fresh)} on {describe(smaller, sampling)}" if found or len(fresh) < len(blocks) else describe(smaller, sampling)
            )
        found |= {name: columns[name].over(found.get(name)) for name in wanted}
        if not any(found[name].why for name in blocks[1:]):
            break
    changes = {name: column.changes for name, column in found.items()}
    matrix = _matrix(blocks, silent, changes, "; ".join(words), {})
    for row, column in itertools.product(blocks, blocks):
        if matrix.values[row][column] is None and depends.values[row][column] == 0 and found[column].why != OVERWRITTEN:
            matrix.values[row][column] = 0.0
    open_columns = {column for _, column in matrix.unmeasured()}
    return replace(matrix, reasons={name: found[name].why for name in blocks if name in open_columns})


def describe(specimen: Specimen, sampling: Sampling) -> str:
    """Describe the specimen in words."""
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


@dataclass
class _Column:
    """What changes with the weights of one block.

    Attributes:
        changes: by block whose update it is; without what could not be measured.
        added: to the block's parameters, by name.
        why: what of the block could not be changed, so that no change of an update means nothing; empty: all of it was.
    """

    changes: _Changes = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    why: str = ""

    def over(self, earlier: _Column | None) -> _Column:
        """Combine this column with an earlier, incomplete one."""
        seen = {} if earlier is None else earlier.changes
        return replace(self, changes={**seen, **self.changes})


def _intervene(probe: Probe, base: list[Moment], rule: Rule, seen: Mapping[str, Tensor], block: str) -> _Column:
    added, why = _invisible(rule, block, seen)
    if not added:
        return _Column(why=why)
    for late in (False, True):
        moments = probe.run(added, base=base, late=late)
        moved = max((_distance(a.output, b.output) for a, b in zip(base, moments, strict=True)), default=0.0)
        if moved <= FLOOR[probe.dtype]:
            break
    else:
        return _Column(why=f"its forward values did not stay (relative change {moved:.1e})")
    if _is_overwritten(base, moments, added, rule, block):
        return _Column({}, added, OVERWRITTEN)
    changes = _compare(base, moments, probe.dtype)
    return _Column({name: change for name, change in changes.items() if change[0] or not why}, added, why)


def _is_overwritten(base: list[Moment], moments: list[Moment], added: Mapping[str, Tensor], rule: Rule, block: str) -> bool:
    """Tell whether the added change is gone after a step."""
    named = rule.network.blocks[block].named_parameters()
    whole = torch.cat([added.get(f"network.blocks.{block}.{own}", torch.zeros_like(p)).detach().flatten() for own, p in named])
    left = (float((b.updates[block] - a.updates[block] + whole).norm()) for a, b in zip(base, moments, strict=True))
    return any(value < 0.1 * float(whole.norm()) for value in left)


def _look_again_later(probe: Probe, columns: Mapping[str, _Column], steps: int) -> None:
    """Add to the columns what changes after many steps only: first with all of them changed at once, then, if need be, one by one."""
    together = {name: change for column in columns.values() for name, change in column.added.items()}
    if not together:
        return
    rounds = max(2, ROUNDS * probe.sampling.steps // steps)
    long = Probe(probe.subject, probe.specimen, replace(probe.sampling, rounds=rounds), dtype=probe.dtype)
    base, seen = _inputs(long)
    if not all(_is_blind(seen, name, together) for name in together if name in seen):
        return  # other noise at each step
    changed = _compare(base, long.run(together, base=base), probe.dtype)
    rows = list(changed)
    known = {row for name, column in columns.items() for row in rows[: rows.index(name)] if column.changes.get(row, (0.0, ""))[0]}
    if any(change for row, (change, _) in changed.items() if row not in known):
        for column in columns.values():
            later = _compare(base, long.run(column.added, base=base), probe.dtype) if column.added else {}
            for row, change in later.items():
                if change[0] > column.changes.get(row, (0.0, ""))[0]:
                    column.changes[row] = change


def _is_blind(seen: Mapping[str, Tensor], name: str, added: Mapping[str, Tensor]) -> bool:
    """Tell whether these other inputs also give the same output with the added change."""
    parts = [added[name].flatten(1), *([added[_bias_of(name)][:, None]] if _bias_of(name) in added else [])]
    change = torch.cat(parts, 1)
    rows = seen[name][:, : change.shape[1]]
    return float((rows @ change.T).norm()) <= BLIND[change.dtype] * float(rows.norm() * change.norm())


def _invisible(rule: Rule, block: str, seen: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Make for each linear map of a block a change of its own size in the null space of its inputs; list the parameters without one."""
    generator = torch.Generator().manual_seed(2)
    added: dict[str, Tensor] = {}
    parameters = {f"network.blocks.{block}.{own}": p for own, p in rule.network.blocks[block].named_parameters()}
    full = []
    for name, p in parameters.items():
        if name not in seen:
            continue
        basis = _row_space(seen[name])
        if basis.shape[1] >= len(basis):
            full.append(name)
            continue
        bias = parameters.get(_bias_of(name))
        flat = p.detach().flatten(1)
        change = torch.randn((len(p), len(basis)), generator=generator, dtype=p.dtype)
        for _ in range(2):  # twice, for the last digits
            change = change - (change @ basis) @ basis.T
        change *= flat.norm() / change.norm()
        added[name] = change[:, : flat.shape[1]].reshape(p.shape)
        if bias is not None and len(basis) > flat.shape[1]:
            added[_bias_of(name)] = change[:, -1].clone()
    if full:
        size = parameters[full[0]][0].numel()
        return added, f"its inputs have as many independent directions ({size}) as it has weights per unit: nothing is invisible to them"
    left = [name.removeprefix(f"network.blocks.{block}.") for name in parameters if name not in added]
    if left:
        return added, f"{', '.join(left)} of it belong to no linear map (nn.Linear or a convolution without groups) that was executed"
    return added, "" if parameters else "it has no parameters"


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _row_space(rows: Tensor) -> Tensor:
    """Return (D, r): an orthonormal basis of the row space of ``rows`` (R, D)."""
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > RANK_TOLERANCE * sizes.max().clamp_min(1e-300)).sum()) if len(sizes) else 0
    basis: Tensor = directions[:rank].T
    return basis


# --- what the linear maps meet ----------------------------------------------------------------------------------------


def _inputs(probe: Probe) -> tuple[list[Moment], dict[str, Tensor]]:
    """Return a trajectory and the inputs (R, D) of each linear map in it, by its weight's name, with a column of ones for the bias.

    These are the inputs in the plain forward pass before each step, and when the step first executes the map (which may add noise to them).
    Executing a block on any other inputs is a way of reading its weights. Networks that only their rule can execute are watched
    all the time.
    """
    seen: dict[str, list[Tensor]] = {}
    names: dict[int, str] = {}
    met: set[int] | None = None

    @contextmanager
    def watch(rule: Rule, batch: Batch, step: Step) -> Iterator[None]:
        nonlocal met
        met = set() if rule.network.chain else None
        names.update({id(p): name for name, p in rule.named_parameters()})
        yield
        met = None

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        weight = getattr(module, "weight", None)
        if id(weight) in names and (met is None or id(weight) not in met) and arguments and isinstance(arguments[0], Tensor):
            rows = _rows(module, arguments[0].detach())
            if rows is not None:
                seen.setdefault(names[id(weight)], []).append(_with_ones(rows, module))
                if met is not None:
                    met.add(id(weight))

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        moments = probe.run(watch=watch, ready=lambda rule: names.update({id(p): name for name, p in rule.named_parameters()}))
    finally:
        handle.remove()
    return moments, {name: torch.cat(rows) for name, rows in seen.items()}


def _with_ones(rows: Tensor, module: nn.Module) -> Tensor:
    return rows if module.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def _rows(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return the rows (R, D) that each unit of a linear map multiplies; by im2col for convolutions."""
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
    """Return for each block the largest relative change of its update in any step, and that step's phase."""
    largest: _Changes = {}
    for a, b in zip(base, other, strict=True):
        for name in a.updates:
            change = _distance(a.updates[name], b.updates[name])
            change = change if change > FLOOR[dtype] else 0.0
            if name not in largest or change > largest[name][0]:
                largest[name] = (change, a.phase)
    return largest


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """Return the norm of the difference over the larger norm; 1 if either is not finite."""
    if a is None or b is None:
        return 0.0
    size = max(float(a.norm()), float(b.norm()))
    if not math.isfinite(size):
        return 1.0
    value = float((a - b).norm()) / size if size > 0 else 0.0
    return value if math.isfinite(value) else 1.0


def _matrix(blocks: list[str], base: list[Moment], found: Mapping[str, _Changes], specimen: str, reasons: dict[str, str]) -> Matrix:
    values: Values = {row: {column: found[column].get(row, (None, ""))[0] for column in blocks} for row in blocks}
    moments = {row: {column: found[column].get(row, (None, ""))[1] for column in blocks} for row in blocks}
    silent = [name for name in blocks if not any(bool(moment.updates[name].any()) for moment in base)]
    return Matrix(blocks, values, moments, silent, specimen, reasons)


def name_of_dependence(matrix: Matrix) -> str:
    """Return ``independent``, ``upstream``, ``neighbours`` or ``all``: the narrowest name that covers every change."""
    count = len(matrix.blocks)
    changed = [(i, j) for i in range(count) for j in range(count) if i != j and matrix.at(i, j)]
    if not changed:
        return "independent"
    above = max((j - i for i, j in changed), default=0)
    if above <= 0:
        return "upstream"
    return "neighbours" if above == 1 and count > 2 else "all"
