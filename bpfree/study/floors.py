"""The floors of a study: measured once for each task and network of its rows, and kept with its cells.

A floor belongs to the rows that share a task and a network. Rules that initialise a network of their own have one each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bpfree.errors import BpfreeError
from bpfree.files import replacing, write_text
from bpfree.metric import ACCURACY, LOSS, Metric
from bpfree.recipe import Recipe, quick_examples
from bpfree.rule import Rule
from bpfree.sources import floor_hash
from bpfree.study.cells import Plan
from bpfree.study.fingerprints import digest
from bpfree.study.rows import Cell, TableRow, table_measure
from bpfree.study.worker import TaskCache, reason_of
from bpfree.tasks.task import TaskSpec
from bpfree.training import environment
from bpfree.training.floor import Floor, Reading, chance_of, measure_floor, nearest_mean, read_inputs
from bpfree.training.trainer import Interrupted

__all__ = ["FloorRecord", "Floors", "Known", "floor_key", "has_floor", "measure_floor_of", "measure_floors"]

logger = logging.getLogger("bpfree")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class FloorRecord:
    """A measured floor.

    Attributes:
        network: name of the network; with the rule's where the rule initialises it.
        source: what is read: ``inputs``, a block's name, or all of them together.
        penalty: of the readout's weights.
        real: whether scores are minus a loss; otherwise accuracies from 0 to 1.
        chosen: whether source and penalty were chosen on validation; otherwise they are defaults.
        seeds: of the scores, in their order.
        validation, test: score of each seed.
        inputs: test score of each seed of a readout of the inputs alone.
        readings: source, penalty and mean on validation of everything that was read.
        skipped: sources that are too large to be read.
        gradient: the largest entry that any solution was left with.
        chance: accuracy of guessing; ``None`` for real targets.
        nearest_mean: test accuracy of the nearest class mean of the inputs; ``None`` for other targets than classes.
        examples: by seed, of each test example: 1 if it is right, or its loss.
    """

    network: str
    source: str
    penalty: float
    real: bool
    chosen: bool
    seeds: Sequence[int]
    validation: Sequence[float]
    test: Sequence[float]
    inputs: Sequence[float]
    readings: Sequence[tuple[str, float, float | None]]
    skipped: Sequence[str]
    gradient: float
    chance: float | None = None
    nearest_mean: float | None = None
    examples: Mapping[int, Array] = field(default_factory=dict, repr=False, compare=False)

    @property
    def metric(self) -> Metric:
        """Metric of the floor; scores of a loss are minus its value."""
        return LOSS if self.real else ACCURACY

    @property
    def by_seed(self) -> dict[int, float]:
        """Test score of each seed."""
        return dict(zip(self.seeds, self.test, strict=True))


def floor_key(cell: Cell) -> str:
    """Identify what a cell's floor depends on, apart from seeds, data and versions: task, network, and who initialises it."""
    recipe = cell.recipe
    if recipe.is_program:  # a program has no floor
        return json.dumps({key: value for key, value in cell.settings.items() if key.split(".")[0] in ("task", "program")}, default=str)
    named = {key: value for key, value in cell.settings.items() if key.split(".")[0] in ("task", "network")}
    rule = recipe.registry.get("rules", recipe.names["rule"])
    own = {key: value for key, value in cell.settings.items() if key.split(".")[0] == "rule"} if _initialises(rule) else {}
    return json.dumps([named, own], sort_keys=True, default=str)


def has_floor(cell: Cell) -> bool:
    """Tell whether a cell can have a floor: a task without targets and a program have none."""
    return not cell.recipe.is_program and cell.recipe.spec().targets != "none"


def _initialises(rule: type[Rule]) -> bool:
    """Tell whether a rule has a network, or initial weights, of its own."""
    return rule.brings_network or getattr(rule.network_options, "__func__", None) is not Rule.network_options.__func__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Known:
    """Measurements of this process: readings of the inputs by task, and floors by task and untrained weights."""

    inputs: dict[Any, Reading] = field(default_factory=dict)
    floors: dict[Any, Floor] = field(default_factory=dict)


class Floors:
    """The floors that were measured for a study.

    Args:
        plan: the study.
        folder: of the study's records.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder / "floors"
        self._known: dict[str, FloorRecord | None] = {}

    def of(self, row: TableRow, rows: Iterable[TableRow]) -> FloorRecord | None:
        """Return the floor of a row; ``None`` if it was not measured or does not exist."""
        if not has_floor(row.cells[0]):
            return None
        key = floor_key(row.cells[0])
        first = next((other for other in rows if floor_key(other.cells[0]) == key), row)
        return self.read(self.id_of(first.cells[0]))

    def id_of(self, cell: Cell) -> str:
        """Hash all that the floor of a cell's row depends on, 16 hex digits."""
        identity = {
            "key": floor_key(cell),
            "stream": cell.recipe.settings.stream,
            "seeds": list(self._plan.seeds),
            **{name: cell.key.identity[name] for name in ("data", "torch", "device", "threads")},
            "sources": floor_hash(cell.recipe),
            **({"quick": quick_examples(cell.recipe.settings)} if cell.recipe.settings.quick else {}),
        }
        return digest(identity)

    def read(self, name: str) -> FloorRecord | None:
        """Return a record; ``None`` for nothing, or a file that cannot be read."""
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def _read(self, name: str) -> FloorRecord | None:
        try:
            content = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
            content["readings"] = [(source, penalty, rank) for source, penalty, rank in content["readings"]]
            return FloorRecord(**content, examples=self._examples(name))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _examples(self, name: str) -> dict[int, Array]:
        try:
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as arrays:
                return {int(seed): arrays[seed] for seed in arrays.files}
        except Exception:  # numpy does not document what a damaged archive raises
            return {}

    def write(self, name: str, record: FloorRecord) -> None:
        """Write a record: numbers as JSON, and a byte per test example in a second file."""
        arrays = {str(seed): values for seed, values in record.examples.items()}
        with replacing(self._folder / f"{name}.npz") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes a flag for an array
        content = {item.name: getattr(record, item.name) for item in dataclasses.fields(record) if item.name != "examples"}
        write_text(self._folder / f"{name}.json", json.dumps(content, indent=2) + "\n")
        self._known[name] = record


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_floors(plan: Plan, rows: Sequence[TableRow], folder: Path, say: Callable[[str], None]) -> Floors:
    """Measure the missing floors of all rows that have a result.

    What cannot be measured is left blank, with a warning. Tasks without targets have no floor, nor have tables of another metric than
    accuracy, error and loss.

    Args:
        plan: the study.
        rows: its table.
        folder: of the study's records.
        say: called with a message before each.
    """
    floors, tasks = Floors(plan, folder), TaskCache()
    known = Known()
    groups: dict[str, Cell] = {}
    for row in rows if table_measure(plan.study, rows).of_predictions else ():
        key = floor_key(row.cells[0])
        if key not in groups and has_floor(row.cells[0]) and any(floor_key(other.cells[0]) == key and other.finished for other in rows):
            groups[key] = row.cells[0]
    for cell in groups.values():
        name = floors.id_of(cell)
        if floors.read(name) is None:
            say(f"measuring the floor of {cell.recipe.names['network']} on {cell.recipe.names['task']} (readouts of untrained features)")
            try:
                floors.write(name, measure_floor_of(cell.recipe, plan.seeds, tasks, known))
            except Interrupted:
                raise
            except Exception as error:
                logger.warning("the floor of %s was not measured: %s", cell.key.row, reason_of(error))
    return floors


def measure_floor_of(recipe: Recipe, seeds: Sequence[int], tasks: TaskCache, known: Known) -> FloorRecord:
    """Measure the floor of a row.

    Args:
        recipe: of the row.
        seeds: of the repetitions.
        tasks: that were loaded before.
        known: what was measured before; filled here.

    Raises:
        BpfreeError: real targets with a loss of the task's own, which ridge regression does not minimise.
    """
    task, settings = tasks.get(recipe), recipe.settings
    if task.spec.targets == "real" and type(task.spec).loss is not TaskSpec.loss:
        raise BpfreeError("the task has a loss of its own, and a floor is measured in the squared error")
    device = environment.resolve_device(settings.device)
    key = (task.fingerprint(), task.spec, str(device))
    with environment.numerics(threads=settings.threads, deterministic=settings.deterministic), torch.random.fork_rng(devices=[]):
        if key not in known.inputs:
            known.inputs[key] = read_inputs(task, len(seeds), device)
        rules = [_with_seed(recipe, seed).build_rule(task.spec) for seed in seeds]
        same = (*key, *map(_digest, rules))
        if same not in known.floors:
            known.floors[same] = measure_floor(task, rules, device=device, inputs=known.inputs[key])
        return _record(recipe, known.floors[same], seeds, chance_of(task), nearest_mean(task, device))


def _digest(rule: Rule) -> str:
    """Hash an untrained network and the way in which it is read: rules that begin with the same weights share a floor."""
    made = hashlib.sha256(f"{type(rule).representations.__module__}.{type(rule).representations.__qualname__}\0{rule.network}".encode())
    for name, tensor in rule.network.state_dict().items():
        made.update(
            name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else name.encode()
        )
    return made.hexdigest()


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, seed=seed))


def _record(recipe: Recipe, found: Floor, seeds: Sequence[int], chance: float | None, mean: float | None) -> FloorRecord:
    network = recipe.names["network"]
    if _initialises(recipe.registry.get("rules", recipe.names["rule"])):
        network += f" of {recipe.names['rule']}"
    return FloorRecord(
        network=network,
        source=found.best.source,
        penalty=found.best.penalty,
        real=found.real,
        chosen=found.chosen,
        seeds=list(seeds),
        validation=list(found.best.validation),
        test=list(found.test),
        inputs=list(found.linear.test),
        readings=[(each.source, each.penalty, each.rank if each.validation else None) for each in found.readings],
        skipped=list(found.skipped),
        gradient=max(each.gradient for each in found.readings),
        chance=chance,
        nearest_mean=mean,
        examples={seed: values.numpy() for seed, values in zip(seeds, found.best.examples, strict=True)},
    )
