"""Weights of a run that are tested: those of the best epoch on validation or the last, and the rule's calibration with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bpfree import seeds
from bpfree.errors import BpfreeError
from bpfree.training.calibration import Calibration, calibrate, calibrates
from bpfree.training.crossfit import cross_fitted
from bpfree.training.saving import Checkpoints
from bpfree.training.setup import Setup
from bpfree.training.state import RunState, copied

__all__ = ["Selection"]

logger = logging.getLogger("bpfree")


class Selection:
    """Keeps the best weights of a run during training, and puts the selected ones into the rule afterwards.

    Args:
        setup: the run's.
        state: of the run; holds the best score and weights, so that checkpoints have them.
        checkpoints: of the run.
    """

    def __init__(self, setup: Setup, state: RunState, checkpoints: Checkpoints) -> None:
        self._setup, self._run, self._rule, self._state, self._checkpoints = setup, setup.run, setup.rule, state, checkpoints
        self._metric = setup.task.spec.primary

    def keep(self, metrics: Mapping[str, float]) -> None:
        """Keep the present weights if they are the best on validation so far, and the run selects the best.

        Args:
            metrics: of the epoch that has ended, with the task's primary metric (``val/accuracy``) where it was evaluated.
        """
        score = self._metric.sign * metrics.get(f"val/{self._metric.name}", math.nan)
        best = self._state.best
        if self._setup.config.select != "best-val" or not math.isfinite(score) or (best is not None and score <= best[0]):
            return
        weights = copied(self._rule)
        self._state.best = (score, weights)
        self._checkpoints.save_selected(weights, score)

    def take(self, save: Callable[[Mapping[str, Any] | None], None]) -> None:
        """Load the selected weights into the rule, and let it calibrate with them where it can.

        Args:
            save: writes a checkpoint with the given weights, or the rule's for ``None``; called after a calibration.
        """
        state, best, last = self._state, self._setup.config.select == "best-val", None
        chooses = calibrates(self._rule) and (self._setup.task.validation is not None or self._setup.config.calibration.folds > 0)
        if best and chooses:  # training may resume from these
            last = {name: value.detach().clone() for name, value in state.team.weights().items()}
        if best:
            self._take_best()
        if chooses:
            state.calibration = _calibrated(state, self._setup)
            if last is not None:
                self._checkpoints.save_selected(copied(self._rule), state.best[0] if state.best else math.nan)
                state.calibration.before = {}
            save(last)
            self._run.result.update(state.calibration.result())

    def _take_best(self) -> None:
        if self._state.best is None:
            logger.warning("nothing was evaluated on validation, so the last weights are tested")
            return
        score, weights = self._state.best
        if weights.keys() != self._rule.state_dict().keys():
            raise BpfreeError("the best epoch came before the network grew, so its weights do not fit", where="select", fix="select=last")
        self._rule.load_state_dict(weights)
        self._run.result[f"val/{self._metric.name}_selected"] = self._metric.sign * score


def _calibrated(state: RunState, setup: Setup) -> Calibration:
    """Let the rule calibrate with its present weights, unless it did so after the same step, before the run was interrupted.

    Its buffers are set. The first of several processes chooses for all.
    """
    rule, world, config, found = setup.rule, setup.world, setup.config, state.calibration
    if found is not None and found.step == state.at.step:
        found.put(rule)
        return found
    if config.calibration.folds:
        return cross_fitted(setup, step=state.at.step)
    data, seed = setup.task.validation, seeds.derive_in(config.stream, config.seed, "calibration")
    assert data is not None
    generator = torch.Generator(setup.device).manual_seed(seed)
    found = world.from_first(lambda: calibrate(rule, data, generator, step=state.at.step, precision=config.precision))
    if world.size > 1:
        world.send(rule.buffers())
    return found
