"""The loader of MLflow models: ``mlflow.pyfunc.load_model("runs:/ID/model")`` predicts by a run's tested weights.

The weights are read as by :func:`bpfree.load`, so that loading runs no code from the model's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bpfree.saved import Saved, decided, load, probabilities
from bpfree.tasks.facts import NAMED
from bpfree.tasks.spec import has_own_loss

__all__ = ["Predictor"]


class Predictor:
    """The prediction of a model in MLflow's terms.

    Args:
        saved: the trained rule.
    """

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        spec = saved.spec
        self._named = spec.targets in NAMED and (spec.targets == "classes" or not has_own_loss(spec))

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Predict classes with their probabilities, or the outputs of a task without classes.

        Args:
            model_input: raw inputs as in training: an array (N, ...), a table with a column for each entry of an input, or a mapping of
                the parts of an input.
            params: ``scores``: return the rule's scores (N, C) instead; ``seed``: of a stochastic rule's draws.

        Returns:
            A table of ``prediction`` (name or number of the class; of several labels a list) and ``probability_NAME`` of each class; or
            an array (N, ...) of outputs.

        Raises:
            UsageError: inputs of another shape or range than those of training.
        """
        params = params or {}
        inputs, seed = self._inputs(model_input), int(params.get("seed", 0))
        scores, spec = self.saved.predict(inputs, seed=seed), self.saved.spec
        if params.get("scores") or not self._named:
            return scores.cpu().numpy()
        predicted = decided(spec, scores, spec.class_names or range(spec.outputs))
        chances = probabilities(spec, scores).numpy()
        columns = {f"probability_{name}": chances[:, place] for place, name in enumerate(self.saved.classes)}
        return pd.DataFrame({"prediction": predicted, **columns})

    def _inputs(self, given: Any) -> Any:
        """Convert a table to an array: its columns by name where the inputs have names; one column of arrays to their stack."""
        if not isinstance(given, pd.DataFrame):
            return given
        names = list(self.saved.spec.input_names)
        values = (given[names] if names and set(names) <= set(given.columns) else given).to_numpy()
        return np.stack([np.asarray(value) for value in values[:, 0]]) if values.dtype == object and values.shape[1] == 1 else values


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    """Load a model for MLflow.

    Args:
        path: of the checkpoint.
        model_config: ``device``; ``allow_code``: files of code that may be executed, for a rule that is named by its file.
    """
    options = dict(model_config or {})
    return Predictor(load(Path(path), device=options.get("device") or "cpu", allow_code=options.get("allow_code") or ()))
