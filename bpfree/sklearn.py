"""Rules as estimators of scikit-learn: :class:`LocalClassifier` and :class:`LocalRegressor`.

They take part in what scikit-learn does with estimators: ``cross_val_score``, ``Pipeline``, ``GridSearchCV``, ``clone``, ``pickle``. A fit
is a run of :class:`bpfree.Trainer` on a recipe, as ``bpfree train`` makes it, but that nothing is written or tracked, unless ``output``
names a folder. Nothing is tested in it: that is what cross-validation is for.

Not here, because the trainer has none of it: ``partial_fit``, ``sample_weight`` (weights of classes: ``settings={"task.class_weights":
"balanced"}``), sparse inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from bpfree.config import resolve
from bpfree.errors import BpfreeError, UsageError
from bpfree.leaves import Leaf, canonical, leaves_of
from bpfree.plugins import installed_plugins
from bpfree.recipe import Recipe
from bpfree.recorded import Trainer
from bpfree.run import Run, new_run_id
from bpfree.saved import BATCH_SIZE, Saved, load
from bpfree.study.things import Things
from bpfree.tasks.intervals import central
from bpfree.tasks.task import Split, Task, TaskSpec
from bpfree.training.config import LIMITS
from bpfree.training.stopping import Interrupted

__all__ = ["LocalClassifier", "LocalRegressor"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
ORIGIN = "argument"
"""Where settings come from, in messages."""
SEEDS = 2**31 - 1
LENGTHS = {f"budget.{limit}" for limit in LIMITS if limit != "epochs"}
RECORDED = {"tracking", "pictures", "checkpoint"}
"""Sections of settings that are about what is written."""
PARAMETERS = {
    "rule.name": "the parameter rule",
    "network.name": "the parameter network",
    "batch_size": "the parameter batch_size",
    "optimizer.name": "the parameter optimizer",
    "optimizer.lr": "the parameter lr",
    "budget.epochs": "the parameter epochs",
    "task.name": "given to fit",
    "task.validation": "the parameter validation_fraction",
    "task.normalise": "the parameter normalise",
    "task.split_seed": "random_state",
    "seed": "the parameter random_state",
    "device": "the parameter device",
    "output": "the parameter output",
    "evaluation.test": "no setting of a fit, which tests nothing",
}
"""Settings that a parameter stands for, or that are decided here."""
LEAST = 8
"""Rows that are predicted together at least."""


class _Local(BaseEstimator):
    """What classifier and regressor share."""

    def __init__(
        self,
        rule: Any = "dfa",
        *,
        network: Any = "auto",
        rule_options: Mapping[str, Any] | None = None,
        network_options: Mapping[str, Any] | None = None,
        epochs: int = 30,
        batch_size: int = 32,
        optimizer: str = "auto",
        lr: float | None = None,
        settings: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] | None = None,
        normalise: bool = True,
        validation_fraction: float = 0.0,
        random_state: Any = None,
        device: str = "auto",
        output: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        self.rule = rule
        self.network = network
        self.rule_options = rule_options
        self.network_options = network_options
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.lr = lr
        self.settings = settings
        self.input_shape = input_shape
        self.normalise = normalise
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device
        self.output = output
        self.verbose = verbose

    def _inputs(self, X: Array) -> torch.Tensor:
        """Return examples (N, *input_shape) of rows (N, F).

        Raises:
            ValueError: a row has another number of entries.
        """
        shape = tuple(self.input_shape or X.shape[1:])
        if math.prod(shape) != X.shape[1]:
            raise ValueError(f"input_shape={shape} has {math.prod(shape)} numbers, but X has {X.shape[1]} features")
        return torch.from_numpy(np.array(X, dtype=np.float32)).reshape(-1, *shape)

    def _train(self, X: Array, truth: torch.Tensor, outputs: int, **about: Any) -> None:
        """Train a rule on rows (N, F) and their targets, and keep it as ``saved_``.

        Raises:
            BpfreeError: parameters that do not fit each other or the data, or a training that diverged.
        """
        inputs = self._inputs(X)
        names = tuple(getattr(self, "feature_names_in_", ())) if inputs.dim() == 2 else ()
        spec = TaskSpec("data", tuple(inputs.shape[1:]), outputs, scale=1.0, input_names=names, **about)
        examples, tested = Split(inputs, truth), Split(inputs[:1], truth[:1])  # a task has a test split, which is not read here
        things = Things(installed_plugins())
        data = things.name("tasks", Task(spec, examples, None, tested))
        recipe = resolve(self._leaves(things, data), things.registry)
        task = recipe.build_task()
        try:
            run, saved = self._fitted(recipe, task)
        except Interrupted as error:  # a search must not take it for a failed fit
            raise KeyboardInterrupt(error.what) from error
        if run.status != "finished":
            raise BpfreeError(f"the training ended as {run.status}: {run.reason}", fix="a smaller lr, perhaps")
        self.run_, self.saved_, self.unused_ = run, saved, dict(recipe.unused)
        self.history_, self.n_iter_ = run.history, run.epoch

    def _leaves(self, things: Things, data: str) -> list[Leaf]:
        """Return the parameters as settings; those that not every rule uses may be left aside.

        Raises:
            UsageError: a setting that a parameter stands for, or that does nothing here.
        """
        further = [replace(leaf, key=canonical(leaf.key, leaf.value)) for leaf in leaves_of(self.settings or {}, "", "settings")]
        self._check_further({leaf.key for leaf in further})
        state = self.random_state
        seed = int(state if isinstance(state, Integral) else check_random_state(state).randint(SEEDS))
        rule, network = things.name("rules", self.rule), things.name("networks", self.network)
        own = {
            "rule.name": rule,
            "network.name": network,
            "task.name": data,
            **{f"rule.{key}": value for key, value in (self.rule_options or {}).items()},
            **{f"network.{key}": value for key, value in (self.network_options or {}).items()},
            "seed": seed,
            "device": self.device,
            "evaluation.test": False,
            "task.validation": float(self.validation_fraction),
            "task.normalise": "auto" if self.normalise else "none",
            **({"task.split_seed": seed} if self.validation_fraction else {}),
            **({} if self.output is None else {"output": str(self.output)}),
            **({} if {leaf.key for leaf in further} & LENGTHS else {"budget.epochs": self.epochs}),
        }
        shared = {"batch_size": self.batch_size, "optimizer.name": self.optimizer, "optimizer.lr": self.lr}
        return [
            *(Leaf(key, value, ORIGIN, shared=True) for key, value in shared.items() if value not in (None, "auto")),
            *(Leaf(key, value, ORIGIN) for key, value in own.items()),
            *further,
        ]

    def _check_further(self, keys: set[str]) -> None:
        if taken := sorted(keys & PARAMETERS.keys()):
            raise UsageError(f"{taken[0]} is {PARAMETERS[taken[0]]}", where="settings", fix="leave it out of settings")
        unseen = sorted(key for key in keys if key.partition(".")[0] in RECORDED)
        if unseen and self.output is None:
            raise UsageError(
                f"{unseen[0]} does nothing, as nothing is written", where="settings", fix="give output=FOLDER, or leave it out"
            )

    def _fitted(self, recipe: Recipe, task: Task) -> tuple[Run, Saved]:
        """Train, with a folder in ``output`` if that is given."""
        rule = recipe.build_rule(task.spec)
        folder = None if self.output is None else Path(self.output) / new_run_id(f"{recipe.trains}-data")
        options: dict[str, Any] = {"augment": recipe.augmentations(), "progress": bool(self.verbose), "folder": folder, "recipe": recipe}
        run = Trainer(rule, task, recipe.settings, **options).fit()
        if folder is None:
            return run, Saved(rule.eval(), task.spec, None, Path())
        found = load(folder, spec=task.spec, registry=recipe.registry, device=run.tags.get("device", "cpu"))
        return run, replace(found, recipe=None)  # which cannot be pickled

    def _outputs(self, X: Any) -> Array:
        """Return the rule's outputs (N, C) for rows (N, F)."""
        inputs, count = self._rows(X)
        found: Array = self.saved_.predict(inputs).cpu().numpy()[:count]
        return found

    def _rows(self, X: Any) -> tuple[torch.Tensor, int]:
        """Return inputs for rows (N, F), and N; the last one is there several times where few would be computed together.

        A product with a single row is summed in another order than one with several: so what is predicted for an example does not depend
        on how many are predicted with it.
        """
        check_is_fitted(self, "saved_")
        inputs = self._inputs(validate_data(self, X, reset=False, dtype=np.float32))
        left = len(inputs) % BATCH_SIZE
        missing = max(0, LEAST - left) if left else 0
        return torch.cat([inputs, inputs[-1:].expand(missing, *inputs.shape[1:])]), len(inputs)


class LocalClassifier(ClassifierMixin, _Local):
    """Classify by a network that a rule trains.

    Args:
        rule: name of a rule, such as ``softhebb``, or its class.
        network: name of a network, a builder, or a class of modules; ``auto``: what the rule asks for.
        rule_options, network_options: their options, such as ``{"width": 64}``.
        epochs: passes over the training examples.
        batch_size: examples per update.
        optimizer, lr: name and rate; ``auto`` and ``None``: what the rule declares. A rule that does without leaves them aside.
        settings: all else that ``bpfree train`` takes, by dotted key or nested: ``{"schedule.name": "cosine"}``.
        input_shape: of one example, such as ``(1, 8, 8)``, for networks that need images; ``None``: a vector.
        normalise: bring each feature (each channel of images) to mean 0 and deviation 1, by the training examples.
        validation_fraction: of the examples, held out to choose weights by (``{"select": "best-val"}``) or to stop early
            (``{"budget.patience": 5}``).
        random_state: of initialisation, order, noise and the validation cut.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        output: folder in which each fit leaves a run, tracked as ``settings`` say; ``None``: nothing is written.
        verbose: 1 shows the progress.

    Attributes:
        classes_: labels, in the order of the columns of :meth:`predict_proba`.
        saved_: the trained rule, a :class:`bpfree.Saved`.
        run_: the run, with ``result``, ``tags`` and so on.
        history_: metrics of each epoch.
        n_iter_: epochs.
        unused_: parameters that the rule does without, each with the reason.
        n_features_in_, feature_names_in_: of the data.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows X (N, F) and their labels y (N,), numbers or texts.

        Raises:
            ValueError: data that are no such rows and labels.
            BpfreeError: parameters that do not fit each other or the data, or a training that diverged.
        """
        X, y = validate_data(self, X, y, dtype=np.float32)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        classes, places = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"a classifier needs examples of two classes at least; y has one class: {classes[0]!r}")
        self._train(X, torch.from_numpy(places.astype(np.int64)), len(classes), class_names=tuple(map(str, classes)))
        self.classes_ = classes
        return self

    def predict(self, X: Any) -> Array:
        """Predict labels (N,): of the highest score."""
        best = self._outputs(X).argmax(1)
        found: Array = self.classes_[best]
        return found

    def predict_proba(self, X: Any) -> Array:
        """Predict probabilities (N, C), as :meth:`bpfree.Saved.predict_proba` does: the softmax of the scores."""
        inputs, count = self._rows(X)
        return self.saved_.predict_proba(inputs)[:count]

    def decision_function(self, X: Any) -> Array:
        """Return the scores (N, C); of two classes (N,) the second one's less the first one's."""
        scores = self._outputs(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores


class LocalRegressor(RegressorMixin, _Local):
    """Predict numbers by a network that a rule trains.

    Targets are brought to mean 0 and deviation 1 for the training, and predictions back. The parameters are those of
    :class:`LocalClassifier`.

    Attributes:
        saved_: the trained rule, a :class:`bpfree.Saved`, which predicts normalised targets.
        mean_, scale_: (K,) of the targets.
        run_, history_, n_iter_, unused_, n_features_in_, feature_names_in_: as of :class:`LocalClassifier`; ``history_`` is in
            normalised targets.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows X (N, F) and their numbers y, (N,) or (N, K).

        Raises:
            ValueError: data that are no such rows and numbers.
            BpfreeError: parameters that do not fit each other or the data, or a training that diverged.
        """
        X, y = validate_data(self, X, y, dtype=np.float32, multi_output=True, y_numeric=True)
        rows = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
        mean, deviation = rows.mean(0), rows.std(0)
        scale = np.where(deviation > 0, deviation, 1.0)
        targets = torch.from_numpy(((rows - mean) / scale).astype(np.float32))
        self._train(X, targets, rows.shape[1], targets="real", output_shape=(rows.shape[1],))
        self.mean_, self.scale_, self._single = mean, scale, np.ndim(y) == 1
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict numbers, (N,) or (N, K) as the targets were.

        Args:
            X: rows (N, F).
            return_std: also return the deviation of the distribution that the rule predicts, of the same shape, from 999 draws.

        Raises:
            UsageError: with ``return_std`` as of :meth:`sample_y`.
        """
        found = self._in_units(self._outputs(X))
        return (found, self.sample_y(X, 999).std(-1, ddof=1)) if return_std else found

    def sample_y(self, X: Any, n_samples: int = 99, random_state: Any = 0) -> Array:
        """Draw from the distribution that the rule predicts: (N, n_samples), or (N, K, n_samples).

        Raises:
            UsageError: the rule has none, or has not measured what it needs for it: give ``validation_fraction``, or
                ``settings={"calibration.folds": 5}``.
        """
        inputs, count = self._rows(X)
        seed = int(check_random_state(random_state).randint(SEEDS))
        draws = self.saved_.sample(inputs, n_samples, seed=seed).cpu().numpy()[:, :count]
        return np.stack([self._in_units(each) for each in draws], -1)

    def predict_interval(self, X: Any, level: float = 0.9, n_samples: int = 999, random_state: Any = 0) -> tuple[Array, Array]:
        """Predict the ends of the interval that a target is in with probability ``level``, each (N,) or (N, K).

        Raises:
            UsageError: as of :meth:`sample_y`; or a level that needs more samples.
        """
        draws = torch.from_numpy(np.moveaxis(self.sample_y(X, n_samples, random_state), -1, 0))
        low, high = central(draws, level)
        return low.numpy(), high.numpy()

    def _in_units(self, outputs: Array) -> Array:
        """Return normalised targets in their own units, (N,) or (N, K)."""
        found: Array = outputs.astype(np.float64).reshape(-1, len(self.mean_)) * self.scale_ + self.mean_
        return found[:, 0] if self._single else found

    def __sklearn_tags__(self) -> Any:
        """Return what scikit-learn may expect: also several targets."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
