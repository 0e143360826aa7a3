"""Tuning with equal budgets: every row has the same number of trials, scored on the validation split of seeds that are not tested.

The trials of a row are a function of the study's file and of the scores before them: each process makes the sampler again with the
same seed and gives it the known scores. So trials are cells like any others, kept and resumed; quasi-random ones do not depend on each
other and run side by side, those of TPE come one after the other. A trial that fails or diverges counts as one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bpfree.errors import BpfreeError
from bpfree.leaves import Leaf
from bpfree.seeds import derive
from bpfree.study.cells import Cell, Place, Plan, cell_of
from bpfree.study.space import Interval, Tune
from bpfree.study.state import Outcome
from bpfree.study.timing import comparable
from bpfree.study.trials import Trial, Tuned

__all__ = ["Tuner"]

Known = Callable[[str], Outcome | None]


class Tuner:
    """The trials of a row in a column.

    Args:
        plan: of the study.
        place: whose trials.
        tune: how.
        known: the outcome of a cell, by its hash.
    """

    def __init__(self, plan: Plan, place: Place, tune: Tune, known: Known) -> None:
        self._plan, self._place, self._tune, self._known = plan, place, tune, known
        self._settings: list[dict[str, Any]] = [{}]
        self._cells: list[list[Cell]] = []
        self._final: dict[str, list[Cell]] = {}
        self._defaults: dict[str, Any] = {}
        self._study: Any = None
        self._asked: list[Any] = []

    @property
    def keys(self) -> list[str]:
        """What is tuned."""
        return list(self._place.row.space)

    def cells(self) -> list[Cell]:
        """The cells of all trials that are settled so far, in their order."""
        self._settle()
        return [cell for cells in self._cells for cell in cells]

    def tuned(self) -> Tuned:
        """What is known of the trials."""
        self._settle()
        trials = [self._trial(settings, cells) for settings, cells in zip(self._settings, self._cells, strict=True)]
        scales = [key for key, domain in self._place.row.space.items() if isinstance(domain, Interval) and domain.log]
        return Tuned(self.keys, trials, self._tune.trials, greater=self._accuracy, logarithmic=scales)

    @property
    def best(self) -> Mapping[str, Any]:
        """The settings that are best on validation; none without any result: the configuration as written is taken."""
        best = self.tuned().best
        return best.settings if best is not None else {}

    def final(self, seeds: Sequence[int]) -> list[Cell]:
        """The cells with the best settings, trained afresh on the study's own seeds."""
        settings = self.best
        key = json.dumps([settings, list(seeds)], default=str)
        if key not in self._final:
            self._final[key] = [cell_of(self._place, seed, self._plan.book, self._leaves(settings)) for seed in seeds]
        return self._final[key]

    # --- trials -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Ask for further trials, as far as what is known allows."""
        while len(self._cells) < self._tune.trials:
            number = len(self._cells)
            if number:
                if self._tune.search == "tpe" and not self._ended(self._cells[-1]):
                    return
                self._settings.append(self._ask(number))
            unseen = {"evaluation.test": False, "evaluation.protocols": []}
            more = self._leaves({**self._settings[number], **self._tune.settings, **unseen})
            self._cells.append([cell_of(self._place, seed, self._plan.book, more, trial=number) for seed in self._tune.seeds])

    def _leaves(self, settings: Mapping[str, Any]) -> list[Leaf]:
        # shared: what is tuned may be idle where another tuned key says so; that it is of use at all was seen before
        return [Leaf(key, value, "tuning", shared=True) for key, value in settings.items()]

    def _ended(self, cells: Sequence[Cell]) -> bool:
        found = [self._known(cell.id) for cell in cells]
        return all(outcome is not None and outcome.is_final for outcome in found)

    def _trial(self, settings: Mapping[str, Any], cells: Sequence[Cell]) -> Trial:
        found = [self._known(cell.id) for cell in cells]
        if not self._ended(cells):
            return Trial(settings, values=self._values(settings))
        outcomes = [outcome for outcome in found if outcome is not None]
        bad = next((outcome.status for outcome in outcomes if outcome.status != "finished"), None)
        scores = [score for cell, outcome in zip(cells, outcomes, strict=True) if (score := self._score(cell, outcome)) is not None]
        complete = bad is None and len(scores) == len(cells)
        seconds = sum(outcome.result.get("train/seconds", 0.0) for outcome in outcomes)
        timed = all(map(comparable, outcomes))
        return Trial(settings, bad or "finished", statistics.fmean(scores) if complete else None, seconds, self._values(settings), timed)

    def _values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Also those that the default configuration has, where it says them; the optimiser's are the rule's own default."""
        if not self._defaults:
            recipe = self._place.recipe
            default = recipe.registry.get("rules", recipe.names["rule"]).optimizer
            if not isinstance(default, property):
                recipe = dataclasses.replace(
                    recipe, settings=dataclasses.replace(recipe.settings, optimizer=recipe.settings.optimizer.over(default))
                )
            self._defaults = {key: value for key, value in recipe.flat().items() if key in self.keys and value is not None}
        return {**self._defaults, **settings}

    # --- scores -----------------------------------------------------------------------------------------------------

    @property
    def _accuracy(self) -> bool:
        return self._place.recipe.spec().targets in ("classes", "soft")

    def _score(self, cell: Cell, outcome: Outcome) -> float | None:
        """On validation, by the weights that ``select`` names: the last, or the best."""
        name, factor = ("val/accuracy", 100.0) if self._accuracy else ("val/loss", 1.0)
        values = [metrics[name] for metrics in outcome.history if name in metrics and math.isfinite(metrics[name])]
        if not values:
            return None
        if cell.recipe.settings.select == "best-val":
            return factor * (max(values) if self._accuracy else min(values))
        return factor * values[-1]

    # --- Optuna -----------------------------------------------------------------------------------------------------

    def _ask(self, number: int) -> dict[str, Any]:
        """Settings of the trial with this number, from 1; those before it are given to the sampler as far as their scores are known."""
        optuna = import_optuna()
        space = _distributions(optuna, self._place.row.space)
        if self._study is None:
            self._study = optuna.create_study(sampler=self._sampler(optuna), direction="maximize" if self._accuracy else "minimize")
            if self._tune.search != "tpe":  # the sampler draws its very first point at random, and only the following ones evenly
                self._study.tell(self._study.ask(space), 0.0)
        if number > 1:
            self._tell(optuna, number)
        trial = self._study.ask(space)
        self._asked.append(trial)
        return {key: trial.params[key] for key in self.keys}

    def _tell(self, optuna: Any, number: int) -> None:
        """Tell the sampler of the trial before this one."""
        if self._tune.search != "tpe":
            self._study.tell(self._asked[-1], 0.0)  # that it has ended; the score is not used
            return
        told = self._trial(self._settings[number - 1], self._cells[number - 1])
        if told.score is None:
            self._study.tell(self._asked[-1], state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._asked[-1], told.score)

    def _sampler(self, optuna: Any) -> Any:
        # rows that tune the same settings try the same points: none is luckier than another
        seed = derive("tuning", self._place.recipe.names["task"], *self.keys) % 2**31
        if self._tune.search == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed, warn_independent_sampling=False)


def import_optuna() -> Any:
    """Optuna, without its chatter.

    Raises:
        BpfreeError: it is not installed.
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
        if not isinstance(domain, Interval)
        else made.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        if domain.integer
        else made.FloatDistribution(domain.low, domain.high, log=domain.log)
        for key, domain in space.items()
    }
