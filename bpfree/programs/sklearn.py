"""The program ``sklearn``: any classifier or regressor of scikit-learn, by its name.

It is fitted once, on the flattened, normalised inputs of the training split. Its outputs are scored like those of a network: log
probabilities (clipped at the smallest distance from 1 that their type knows, as ``sklearn.metrics.log_loss`` does), else the decision
function, else one for the predicted class; a regressor's predictions. Where an estimator does not predict the class of its best score,
the two scores change places, so that accuracies are those of its ``score``. ``random_state`` is the run's seed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bpfree.errors import nearest
from bpfree.options import option
from bpfree.program import Program, ProgramContext
from bpfree.tasks.task import TaskSpec

__all__ = ["SKLEARN", "estimators"]

SEED = "random_state"
KINDS = {"classes": "classifier", "real": "regressor"}
"""Targets that estimators can be fitted to."""


@dataclass
class Config:
    """Which estimator."""

    estimator: str = option("LogisticRegression", "a classifier or regressor of scikit-learn, such as RandomForestClassifier")
    options: dict[str, Any] = option(factory=dict, help="its arguments, such as C or max_depth; random_state is the seed")


@lru_cache(maxsize=4)
def estimators(kind: str) -> dict[str, type]:
    """List the classes of scikit-learn's own modules by name: ``classifier`` or ``regressor``."""
    from sklearn.utils import all_estimators

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(all_estimators(type_filter=kind))


def check(config: Config, spec: TaskSpec) -> list[str]:
    """Find what does not fit: the task's targets and inputs, the estimator's name, its arguments."""
    kind, name, where = KINDS.get(spec.targets), config.estimator, f"program.estimator={config.estimator!r}"
    if kind is None:
        return [f"sklearn is fitted to {' or '.join(KINDS)}, but task {spec.name!r} has {spec.targets!r} targets"]
    if not spec.takes_real_tensors:
        return [f"sklearn takes inputs of one tensor of real numbers, which task {spec.name!r} has not"]
    known, others = estimators(kind), {name for each in KINDS.values() if each != kind for name in estimators(each)}
    if name in others:
        return [f"{where}: is no {kind}, and task {spec.name!r} has {spec.targets!r} targets"]
    if name not in known:
        guess = nearest(name, known)
        return [
            f"{where}: scikit-learn has no such {kind}: " + (f"did you mean {guess}?" if guess else "sklearn.utils.all_estimators lists")
        ]
    return _arguments(known[name], config, spec)


def _arguments(kind: type, config: Config, spec: TaskSpec) -> list[str]:
    names, found = list(inspect.signature(kind).parameters), []
    for key in config.options:
        if key == SEED:
            found.append(f"program.options.{SEED}: is the run's seed")
        elif key not in names:
            guess = next((name for name in names if name.lower() == key.lower()), nearest(key, names))
            found.append(
                f"unknown key program.options.{key} of {config.estimator}: "
                + (f"did you mean {guess}?" if guess else f"known here: {', '.join(names)}")
            )
    if found:
        return found
    try:
        made = build(config, spec, 0)
        made._validate_params()
    except (TypeError, ValueError, AttributeError) as error:
        return [f"program.options of {config.estimator}: {' '.join(str(error).split())}"]
    from sklearn.utils import get_tags

    if spec.targets == "real" and spec.outputs > 1 and not get_tags(made).target_tags.multi_output:
        return [f"program.estimator={config.estimator!r}: predicts one number, and task {spec.name!r} has {spec.outputs}"]
    return []


def build(config: Config, spec: TaskSpec, seed: int) -> Any:
    """Make the estimator, with the seed where it has one."""
    kind = estimators(KINDS[spec.targets])[config.estimator]
    seeded = {SEED: seed} if SEED in inspect.signature(kind).parameters else {}
    return kind(**config.options, **seeded)


def train(context: ProgramContext) -> Mapping[str, float]:
    """Fit the estimator, and score it on all splits."""
    spec = context.spec
    inputs, targets = context.arrays("train")
    model = build(context.options, spec, context.seed)
    with limited(context.threads):
        if spec.targets == "real":
            rows = targets.reshape(len(targets), -1)
            model.fit(flat(inputs), rows[:, 0] if rows.shape[1] == 1 else rows)
        else:
            model.fit(flat(inputs), targets)

        def predict(x: Any) -> Any:
            return outputs(model, flat(x), spec)

        context.log(context.score("train", predict) | context.score("val", predict))
        return context.score("test", predict)


def flat(inputs: Any) -> Any:
    """Rows (N, F) of inputs (N, ...)."""
    return inputs.reshape(len(inputs), -1)


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """Compute with this many threads of the processor's libraries inside."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(threads):
        yield


def outputs(model: Any, rows: Any, spec: TaskSpec) -> Any:
    """Give outputs of the task's shape: real predictions, or scores (M, C) of classes, the predicted one first."""
    predicted = np.asarray(model.predict(rows))
    if spec.targets == "real":
        return predicted.reshape(len(rows), *spec.output_size)
    found = _scores(model, rows, predicted).astype(float)
    unseen = found.min(1, keepdims=True) + np.log(np.finfo(float).eps)  # classes that are not in the training split
    scores = np.repeat(unseen, spec.outputs, 1)
    scores[:, np.asarray(model.classes_, int)] = found
    place, best = np.arange(len(rows)), scores.argmax(1)
    scores[place, best], scores[place, predicted] = scores[place, predicted], scores[place, best]
    return scores


def _scores(model: Any, rows: Any, predicted: Any) -> Any:
    """Scores (M, K) of the classes that the estimator has seen."""
    if hasattr(model, "predict_proba"):
        chances = np.asarray(model.predict_proba(rows))
        return np.log(np.clip(chances, np.finfo(chances.dtype).eps, 1))
    if hasattr(model, "decision_function"):
        decided = np.asarray(model.decision_function(rows), float)
        decided = np.stack([np.zeros_like(decided), decided], 1) if decided.ndim == 1 else decided
        if decided.shape[1] == len(model.classes_):  # not of pairs of classes
            return decided
    return (predicted[:, None] == np.asarray(model.classes_)[None]).astype(float)


SKLEARN = Program(
    train,
    Config,
    "a classifier or regressor of scikit-learn: program.estimator, program.options",
    check=check,
    packages=("scikit-learn",),
)
