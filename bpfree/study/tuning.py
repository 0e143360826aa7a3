"""Tuning with equal budgets: every row has the same number of trials, scored on the validation split of seeds that are not tested.

The trials of a row are a function of the study's file and of the scores before them: each process makes the sampler again with the
same seed and gives it the known scores. So trials are cells like any others, kept and resumed; quasi-random ones do not depend on each
other and run side by side, those of TPE come one after the other. A trial that fails, diverges or is pruned counts as one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bpfree.errors import BpfreeError, UsageError
from bpfree.leaves import Leaf, canonical
from bpfree.recipe import Recipe
from bpfree.seeds import derive
from bpfree.study.cells import Plan, cell_of, recipe_with
from bpfree.study.fingerprints import Fingerprints
from bpfree.study.measures import Measure
from bpfree.study.model import Domain, Range, Tune
from bpfree.study.pruning import Decision, Reached, decide, rungs_of
from bpfree.study.rows import Cell, TableRow, Trial, Tuned
from bpfree.study.store import CellRecord
from bpfree.training.config import LIMITS

__all__ = ["Tuner", "check_tuning"]

Known = Callable[[Cell], CellRecord | None]

UNFAIR = {
    "budget": "rows would differ in the amount of training",
    "evaluation": "trials would be measured differently",
    "select": "trials would be measured differently",
    "stream": "it only changes the random draws",
    "task": "trials would be measured differently",
    "task.name": "trials would be measured differently",
    "task.split_seed": "trials would be measured differently",
    "task.validation": "trials would be measured differently",
}


class Tuner:
    """The trials of a row in a column.

    Args:
        row: whose trials, or its twin.
        tune: how.
        fingerprints: of the data.
        known: function that returns the record of a cell.

    Attributes:
        limits: what was decided of each cell's trial, by the cell's id, where trials are pruned; filled by :meth:`cells`.
    """

    def __init__(self, row: TableRow, tune: Tune, fingerprints: Fingerprints, known: Known) -> None:
        self._row, self._tune, self._fingerprints, self._known = row, tune, fingerprints, known
        self._settings: list[dict[str, Any]] = [{}]
        self._cells: list[list[Cell]] = []
        self._final: dict[str, list[Cell]] = {}
        self._defaults: dict[str, Any] = {}
        self._study: Any = None
        self._asked: list[Any] = []
        self._reached: dict[tuple[str, int], float] = {}
        self.limits: dict[str, Decision] = {}

    @property
    def keys(self) -> list[str]:
        """Return the tuned keys."""
        return list(self._row.written.space)

    def cells(self) -> list[Cell]:
        """Return the cells of all trials whose settings are known so far, in order."""
        self._settle()
        return [cell for cells in self._cells for cell in cells]

    def tuned(self) -> Tuned:
        """Collect the scores of the trials."""
        self._settle()
        trials = [self._trial(settings, cells) for settings, cells in zip(self._settings, self._cells, strict=True)]
        scales = [key for key, domain in self._row.written.space.items() if isinstance(domain, Range) and domain.log]
        return Tuned(self.keys, trials, self._tune.trials, self._measure, logarithmic=scales, pruning=self._tune.pruning)

    @property
    def best(self) -> Mapping[str, Any]:
        """Settings that are best on validation; without any result none, which is the configuration as written."""
        best = self.tuned().best
        return best.settings if best is not None else {}

    def final(self, seeds: Sequence[int]) -> list[Cell]:
        """Make the cells with the best settings, which are trained on the study's own seeds."""
        settings = self.best
        key = json.dumps([settings, list(seeds)], default=str)
        if key not in self._final:
            self._final[key] = [cell_of(self._row, seed, self._fingerprints, self._leaves(settings)) for seed in seeds]
        return self._final[key]

    # --- trials -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Ask the sampler for further trials, as far as known scores allow."""
        self._prune()
        while len(self._cells) < self._tune.trials:
            number = len(self._cells)
            if number:
                if self._tune.search == "tpe" and not self._ended(self._cells[-1]):
                    return
                self._settings.append(self._ask(number))
            unseen = {"evaluation.test": False, "evaluation.protocols": []}
            more = self._leaves({**self._settings[number], **self._tune.settings, **unseen})
            self._cells.append([cell_of(self._row, seed, self._fingerprints, more, trial=number) for seed in self._tune.seeds])
            self._prune()

    def _leaves(self, settings: Mapping[str, Any]) -> list[Leaf]:
        # shared: a tuned key may be unused for some values of other tuned keys; check_tuning has found some use of it
        return [Leaf(key, value, "tuning", shared=True) for key, value in settings.items()]

    def _is_pruned(self, cells: Sequence[Cell]) -> bool:
        return any(self.limits.get(cell.key.id, Decision("train")).state == "pruned" for cell in cells)

    def _ended(self, cells: Sequence[Cell]) -> bool:
        if self._is_pruned(cells):
            return True
        found = [self._known(cell) for cell in cells]
        return all(record is not None and record.is_final for record in found)

    def _trial(self, settings: Mapping[str, Any], cells: Sequence[Cell]) -> Trial:
        found = [self._known(cell) for cell in cells]
        if not self._ended(cells):
            return Trial(settings, values=self._values(settings))
        records = [record for record in found if record is not None]
        if self._is_pruned(cells):
            spent = sum(record.history[-1].get("seconds", 0.0) for record in records if record.history)
            return Trial(settings, "pruned", None, spent, self._values(settings), all(record.comparable for record in records))
        bad = next((record.status for record in records if record.status != "finished"), None)
        scores = [score for cell, record in zip(cells, records, strict=True) if (score := self._score(cell, record)) is not None]
        complete = bad is None and len(scores) == len(cells)
        seconds = sum(record.result.get("train/seconds", 0.0) for record in records)
        timed = all(record.comparable for record in records)
        return Trial(settings, bad or "finished", statistics.fmean(scores) if complete else None, seconds, self._values(settings), timed)

    def _values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Complete a trial's values with those of the default configuration; optimiser settings default to the rule's own."""
        if not self._defaults:
            recipe = self._row.recipe
            if not recipe.is_program:
                default = recipe.registry.get("rules", recipe.names["rule"]).optimizer_of(recipe.options["rule"])
                optimizer = recipe.settings.optimizer.over(default)
                recipe = dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, optimizer=optimizer))
            self._defaults = {key: value for key, value in recipe.flat().items() if key in self.keys and value is not None}
        return {**self._defaults, **settings}

    # --- scores -----------------------------------------------------------------------------------------------------

    @property
    def _measure(self) -> Measure:
        primary = self._row.recipe.spec().primary
        return Measure("val", primary, primary.name)

    def _score(self, cell: Cell, record: CellRecord, epochs: float = math.inf) -> float | None:
        """Return the validation score of the weights that ``select`` names, the last or the best, within the first ``epochs``."""
        measure, history = self._measure, [metrics for metrics in record.history if metrics["epoch"] <= epochs]
        values = [value for metrics in history if (value := measure.of(metrics)) is not None and math.isfinite(value)]
        if not values:
            return None
        return measure.metric.best(values) if cell.recipe.settings.select == "best-val" else values[-1]

    # --- pruning ----------------------------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Decide on the pruning of the trials whose settings are known so far."""
        if self._tune.pruner == "none" or not self._cells:
            return
        rungs = rungs_of(self._tune.rung, self._tune.reduction, epochs_of(self._cells[0][0]))
        reached = [self._how_far(cells, rungs) for cells in self._cells]
        greater = self._measure.metric.greater
        for cells, decision in zip(self._cells, decide(reached, rungs, self._tune.reduction, greater=greater), strict=True):
            for cell in cells:
                waits = (
                    decision.state == "train" and (cell.key.id, decision.rung) in self._reached
                )  # until the trial's other seeds have reached the rung
                self.limits[cell.key.id] = Decision("wait", decision.rung) if waits else decision

    def _how_far(self, cells: Sequence[Cell], rungs: Sequence[int]) -> Reached:
        records = [self._known(cell) for cell in cells]
        ended = all(record is not None and record.is_final for record in records)
        scores: dict[int, float] = {}
        for rung in rungs:
            found = [self._score_at(cell, record, rung) for cell, record in zip(cells, records, strict=True)]
            known = [score for score in found if score is not None]
            if len(known) < len(found):
                break
            scores[rung] = statistics.fmean(known)
        return Reached(scores, ended)

    def _score_at(self, cell: Cell, record: CellRecord | None, rung: int) -> float | None:
        """Return a cell's score at a rung; ``None``: it has not reached the rung, or ended without a result."""
        key = cell.key.id, rung
        if key in self._reached or record is None or (record.is_final and record.status != "finished"):
            return self._reached.get(key)
        if record.status == "finished" or (record.history and record.history[-1]["epoch"] >= rung):
            score = self._score(cell, record, rung)
            self._reached[key] = math.nan if score is None else score
        return self._reached.get(key)

    # --- Optuna -----------------------------------------------------------------------------------------------------

    def _ask(self, number: int) -> dict[str, Any]:
        """Ask the sampler for the settings of a trial, from 1, after passing it the known scores of earlier trials."""
        optuna = import_optuna()
        space = _distributions(optuna, self._row.written.space)
        if self._study is None:
            self._study = optuna.create_study(
                sampler=self._sampler(optuna), direction="maximize" if self._measure.metric.greater else "minimize"
            )
            if self._tune.search != "tpe":  # the sampler draws its first point at random, and only the following ones quasi-randomly
                self._study.tell(self._study.ask(space), 0.0)
        if number > 1:
            self._tell(optuna, number)
        trial = self._study.ask(space)
        self._asked.append(trial)
        return {key: trial.params[key] for key in self.keys}

    def _tell(self, optuna: Any, number: int) -> None:
        """Pass the score of a trial to the sampler."""
        if self._tune.search != "tpe":
            self._study.tell(self._asked[-1], 0.0)  # marks the trial as complete; the score is not used
            return
        told = self._trial(self._settings[number - 1], self._cells[number - 1])
        if told.status == "pruned":
            for cell, rung in ((cell, rung) for cell, rung in self._reached if cell == self._cells[number - 1][0].key.id):
                self._asked[-1].report(self._reached[cell, rung], rung)
            self._study.tell(self._asked[-1], state=optuna.trial.TrialState.PRUNED)
        elif told.score is None:
            self._study.tell(self._asked[-1], state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._asked[-1], told.score)

    def _sampler(self, optuna: Any) -> Any:
        # rows that tune the same settings try the same points, so that none has an advantage by chance
        seed = derive("tuning", self._row.recipe.names["task"], *self.keys) % 2**31
        if self._tune.search == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed, warn_independent_sampling=False)


def import_optuna() -> Any:
    """Import Optuna with its log messages silenced.

    Raises:
        BpfreeError: Optuna is not installed.
    """
    import warnings

    try:
        import optuna
    except ImportError as error:
        raise BpfreeError(f"tuning needs Optuna ({error})", where="tune", fix="pip install 'bpfree[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _distributions(optuna: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    made = optuna.distributions
    return {
        key: made.CategoricalDistribution(list(domain.values))
        if not isinstance(domain, Range)
        else made.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        if domain.integer
        else made.FloatDistribution(domain.low, domain.high, log=domain.log)
        for key, domain in space.items()
    }


def epochs_of(cell: Cell) -> int:
    """Return the budget of a trial in epochs."""
    return cell.recipe.settings.budget.resolve(1).epochs or 0


# --- whether it can be tuned ------------------------------------------------------------------------------------------


def check_tuning(plan: Plan) -> None:
    """Check a study's tuning by resolving every choice and both ends of every interval.

    Raises:
        UsageError: with everything that is wrong.
    """
    tune = plan.study.tune
    if tune is None:
        return
    found: dict[str, list[str]] = {}
    for row in plan.rows:
        for problem in _problems(row, tune) if row.written.space else ():
            found.setdefault(problem, []).append(row.written.label)
    listed = [f"{problem} (row {', '.join(dict.fromkeys(labels))})" for problem, labels in found.items()] or [*_unused_settings(plan, tune)]
    if listed:
        raise UsageError.of(listed, "study", where=f"study {plan.study.name}: tune")


def _problems(row: TableRow, tune: Tune) -> Iterator[str]:
    settings = [Leaf(key, value, "tune: settings", shared=True) for key, value in tune.settings.items()]
    try:
        recipe = recipe_with(row, settings)[0]
        if not recipe.task.validation:
            yield "task.validation is 0, but tuning needs a validation split"
        yield from _cannot_be_pruned(recipe, tune)
    except UsageError as error:
        yield from error.problems
        return
    for key, domain in row.written.space.items():
        reason = UNFAIR.get(key, UNFAIR.get(key.split(".")[0]) if key.split(".")[0] in ("budget", "evaluation") else None)
        if reason is not None:
            yield f"{key} cannot be tuned: {reason}"
            continue
        yield from _not_used(row, key, settings)
        for value in _tried(domain):
            try:
                recipe_with(row, [*_leaves({key: value}), *settings])
            except UsageError as error:
                yield from error.problems


def _cannot_be_pruned(recipe: Recipe, tune: Tune) -> Iterator[str]:
    """Report why trials of a row cannot be pruned at the same rungs as those of other rows."""
    budget, every = recipe.settings.budget, recipe.settings.evaluation.every
    if tune.pruner == "none":
        return
    if recipe.is_program:
        yield f"tune: pruner={tune.pruner}: the program {recipe.trains} has no epochs, so that it cannot be pruned"
    elif any(getattr(budget, name) is not None for name in LIMITS if name != "epochs"):
        yield f"tune: pruner={tune.pruner} compares trials after epochs: set budget.epochs as their only budget"
    elif not rungs_of(tune.rung, tune.reduction, budget.resolve(1).epochs or 0) and not recipe.settings.quick:
        yield f"tune: rung={tune.rung}: the first rung must be less than the epochs of a trial"
    elif every > tune.rung:
        yield f"tune: rung={tune.rung}: there is no evaluation until then: set evaluation.every={tune.rung} or less instead of {every}"


def _leaves(values: Mapping[str, Any]) -> list[Leaf]:
    return [Leaf(key, value, "tune: space", shared=True) for key, value in values.items()]


def _not_used(row: TableRow, key: str, settings: Sequence[Leaf]) -> Iterator[str]:
    """Report a tuned key of which no value is used, whatever value one other tuned key has."""
    space, reason = row.written.space, ""
    others: list[dict[str, Any]] = [{}, *({other: value} for other in space if other != key for value in _tried(space[other]))]
    for other in others:
        for value in _tried(space[key]):
            try:
                unused = recipe_with(row, [*_leaves({**other, key: value}), *settings])[0].unused
            except UsageError:  # reported separately
                return
            name = canonical(key, value)
            if name not in unused:
                return
            reason = reason or unused[name]
    yield f"{key} is tuned and not used: {reason}; remove it with tune: {{{key}: null}} in the row"


def _unused_settings(plan: Plan, tune: Tune) -> Iterator[str]:
    """Report settings of trials that no row uses."""
    leaves = [Leaf(key, value, "tune: settings", shared=True) for key, value in tune.settings.items()]
    recipes = [recipe_with(row, leaves)[0] for row in plan.rows if row.written.space]
    for leaf in leaves if recipes else ():
        key = canonical(leaf.key, leaf.value)
        if all(key in recipe.unused for recipe in recipes):
            yield f"{key} is used by no row: {recipes[0].unused[key]}"


def _tried(domain: Domain) -> list[Any]:
    return [domain.low, domain.high] if isinstance(domain, Range) else list(domain.values)
