"""Rules as estimators of scikit-learn. Oracles: its own checks of estimators, and what ``bpfree.Saved`` and the trainer say."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator

from bpfree import BpfreeError, UsageError
from bpfree.baselines import Backprop
from bpfree.record.folder import read_run
from bpfree.recorded import Trainer
from bpfree.sklearn import LocalClassifier, LocalRegressor
from bpfree.tasks.digits import DIGITS
from bpfree.training.stopping import Interrupted

QUICK = {
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_estimators_unfitted",
    "check_n_features_in",
    "check_fit_check_is_fitted",
    "check_readonly_memmap_input",
    "check_estimator_sparse_tag",
    "check_classifiers_one_label",
    "check_classifiers_regression_target",
    "check_regressor_multioutput",
    "check_methods_subset_invariance",
    "check_dict_unchanged",
}
"""Checks of a second or so, which are run each time."""
FAMILIES = ("dfa", "linear", "softhebb", "hebbian-norm", "noprop-dt", "predictive-coding", "local-forward-gradient")
"""Rules of the core and of each plugin: by gradients and in place, drawing noise, and with networks of their own."""
IRIS = load_iris(return_X_y=True)
NAMED = np.array(["setosa", "versicolor", "virginica"], dtype=object)[IRIS[1]]


def quick(rule: Any = "dfa", **options: Any) -> LocalClassifier:
    return LocalClassifier(rule, **{"epochs": 2, "random_state": 0, "device": "cpu", **options})


@pytest.mark.parametrize("estimator", [LocalClassifier(epochs=1), LocalRegressor(epochs=1)], ids=lambda each: type(each).__name__)
def test_it_passes_quick_checks_of_scikit_learn(estimator: Any) -> None:
    ran = []
    for made, check in estimator_checks_generator(estimator):
        name = getattr(check, "func", check).__name__
        if name in QUICK:
            check(made)
            ran.append(name)
    assert len(set(ran)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [LocalClassifier(), LocalRegressor()], ids=lambda each: type(each).__name__)
def test_it_passes_all_checks_of_scikit_learn(estimator: Any) -> None:
    found = check_estimator(estimator, on_skip=None, on_fail=None)
    assert len(found) > 40
    assert [(each["check_name"], each["exception"]) for each in found if each["status"] in ("failed", "xfail")] == []


# --- what is predicted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", FAMILIES)
def test_rules_of_all_families_are_repeated_and_stored(rule: str) -> None:
    fitted = quick(rule).fit(IRIS[0], NAMED)
    chances = fitted.predict_proba(IRIS[0])
    assert np.array_equal(chances, clone(fitted).fit(IRIS[0], NAMED).predict_proba(IRIS[0]))
    assert np.array_equal(chances, pickle.loads(pickle.dumps(fitted)).predict_proba(IRIS[0]))
    assert np.array_equal(chances, fitted.saved_.predict_proba(IRIS[0].astype(np.float32)))
    assert np.array_equal(fitted.predict(IRIS[0]), fitted.classes_[chances.argmax(1)])
    assert list(fitted.predict(IRIS[0][:5])) == fitted.saved_.predict_classes(IRIS[0][:5].astype(np.float32)) or rule.startswith("noprop")
    assert fitted.n_iter_ == len(fitted.history_)
    assert list(fitted.classes_) == ["setosa", "versicolor", "virginica"]


def test_a_prediction_does_not_depend_on_what_is_predicted_with_it() -> None:
    """257 rows are one more than are computed at a time."""
    fitted, rows = quick().fit(*IRIS), np.resize(IRIS[0], (257, 4))
    together = fitted.decision_function(rows)
    alone = np.concatenate([fitted.decision_function(rows[place : place + 1]) for place in (0, 100, 255, 256)])
    assert np.array_equal(together[[0, 100, 255, 256]], alone)


def test_it_learns_what_is_easy() -> None:
    """Fisher's flowers: linear discriminants have 98 %."""
    assert cross_val_score(LocalClassifier(random_state=0, device="cpu"), *IRIS).mean() > 0.9


def test_it_learns_numbers_in_their_own_units() -> None:
    """Of a linear least-squares fit the score on these training data is 0.52."""
    X, y = load_diabetes(return_X_y=True)
    fitted = LocalRegressor("backprop", random_state=0, device="cpu").fit(X, y)
    assert fitted.score(X, y) > 0.5
    assert fitted.predict(X).mean() == pytest.approx(y.mean(), rel=0.05)
    both = LocalRegressor("backprop", epochs=2, random_state=0).fit(X, np.stack([y, 2 * y + 1], 1))
    assert both.predict(X[:3]).shape == (3, 2)
    assert fitted.saved_.spec.targets == "real"


def test_the_random_state_decides_all_of_it() -> None:
    def weights(**options: Any) -> Any:
        return quick(**options).fit(*IRIS).decision_function(IRIS[0])

    assert np.array_equal(weights(), weights())
    assert not np.array_equal(weights(), weights(random_state=1))
    assert not np.array_equal(weights(random_state=None), weights(random_state=None))
    states = [np.random.RandomState(3) for _ in range(2)]
    assert np.array_equal(weights(random_state=states[0]), weights(random_state=states[1]))
    cut = [weights(validation_fraction=0.3, random_state=seed) for seed in (0, 0, 1)]
    assert np.array_equal(cut[0], cut[1])
    assert not np.array_equal(cut[0], cut[2])


def test_two_classes_are_decided_by_one_number() -> None:
    X, y = IRIS[0][:100], NAMED[:100]
    fitted = quick().fit(X, y)
    decided = fitted.decision_function(X)
    assert decided.shape == (100,)
    chances = fitted.predict_proba(X)
    assert np.allclose(decided, np.log(chances[:, 1] / chances[:, 0]), atol=1e-4)
    assert (fitted.predict(X) == fitted.classes_[(decided > 0).astype(int)]).all()


def test_rows_become_images_for_networks_of_convolutions() -> None:
    train, _ = DIGITS.load(DIGITS.Config(), None)[:2]
    X, y = train.inputs[:200].flatten(1).numpy(), train.targets[:200].numpy()
    fitted = quick(network="vgg", network_options={"channels": [8, 8], "pool_after": [2]}, input_shape=(1, 8, 8), epochs=1).fit(X, y)
    assert fitted.saved_.spec.input_shape == (1, 8, 8)
    assert len(fitted.saved_.spec.mean) == 1
    assert fitted.predict(X[:3]).shape == (3,)
    with pytest.raises(ValueError, match=r"input_shape=\(1, 8, 9\) has 72 numbers, but X has 64 features"):
        quick(input_shape=(1, 8, 9)).fit(X, y)


def test_inputs_are_normalised_by_what_is_trained_on_unless_that_is_off() -> None:
    assert quick().fit(*IRIS).saved_.spec.mean == pytest.approx(IRIS[0].mean(0), rel=1e-5)
    assert quick(normalise=False).fit(*IRIS).saved_.spec.mean == (0.0,)


# --- in scikit-learn's hands --------------------------------------------------------------------------------------------


def test_a_search_over_rules_and_rates_in_a_pipeline() -> None:
    steps = make_pipeline(StandardScaler(), quick(normalise=False))
    grid = {"localclassifier__rule": ["dfa", "oja"], "localclassifier__lr": [1e-3, 1e-2]}
    search = GridSearchCV(steps, grid, cv=2, error_score="raise").fit(IRIS[0], NAMED)
    assert len(search.cv_results_["params"]) == 4
    assert search.best_estimator_.predict(IRIS[0][:2]).dtype == NAMED.dtype


def test_names_of_features_are_the_tasks() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(IRIS[0], columns=["a", "b", "c", "d"])
    fitted = quick().fit(table, NAMED)
    assert list(fitted.feature_names_in_) == ["a", "b", "c", "d"]
    assert fitted.saved_.spec.input_names == ("a", "b", "c", "d")
    assert fitted.saved_.classes == ("setosa", "versicolor", "virginica")


def test_classes_in_place_of_names_and_what_a_rule_does_without() -> None:
    by_class, by_name = quick(Backprop).fit(*IRIS), quick("backprop").fit(*IRIS)
    assert np.array_equal(by_class.predict_proba(IRIS[0]), by_name.predict_proba(IRIS[0]))
    assert by_name.unused_ == {}


def test_all_other_settings_are_those_of_the_command_line() -> None:
    fitted = quick(settings={"budget.samples": 64, "schedule": {"name": "cosine"}}, rule_options={"scale": 0.5}).fit(*IRIS)
    assert fitted.history_[-1]["samples"] == 64
    assert fitted.saved_.rule.config.scale == 0.5
    stopped = quick(epochs=40, validation_fraction=0.2, settings={"budget.patience": 1}).fit(*IRIS)
    assert "val/accuracy" in stopped.history_[0]
    assert stopped.n_iter_ < 40


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rule": "dfaa"}, "did you mean 'dfa'"),
        ({"settings": {"seed": 1}}, "seed is the parameter random_state"),
        ({"settings": {"rule": "oja"}}, r"rule\.name is the parameter rule"),
        ({"settings": {"evaluation.test": True}}, "tests nothing"),
        ({"settings": {"tracking.to": ["csv"]}}, r"tracking\.to does nothing"),
        ({"settings": {"optimizer.leraning_rate": 1}}, r"did you mean optimizer\.lr"),
        ({"epochs": 0}, r"budget\.epochs=0 is out of range"),
        ({"validation_fraction": 1.0}, r"task\.validation=1 is out of range"),
    ],
)
def test_parameters_that_cannot_be_are_refused_when_it_is_fitted(options: dict[str, Any], what: str) -> None:
    made = quick(**options)
    with pytest.raises(UsageError, match=what):
        made.fit(*IRIS)
    with pytest.raises(NotFittedError):
        made.predict(IRIS[0])


def test_a_training_that_diverges_is_an_error_which_leaves_the_earlier_fit() -> None:
    fitted = quick("backprop").fit(*IRIS)
    before = fitted.predict_proba(IRIS[0])
    with pytest.raises(BpfreeError, match="ended as diverged"):
        fitted.set_params(lr=1e30).fit(*IRIS)
    assert np.array_equal(fitted.predict_proba(IRIS[0]), before)


def test_ctrl_c_ends_a_search_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search counts any other exception as a fit that failed, and goes on."""

    def stopped(trainer: Trainer) -> None:
        raise Interrupted("stopped by SIGINT", None)

    monkeypatch.setattr(Trainer, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        GridSearchCV(quick(), {"lr": [1e-3, 1e-2]}, cv=2).fit(*IRIS)


# --- what is written ----------------------------------------------------------------------------------------------------


def test_nothing_is_written_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = quick().fit(*IRIS)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    recorded = quick(output="runs", settings={"tracking.enabled": False}, verbose=1).fit(*IRIS)
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_run(folder).status == "finished"
    assert "test/accuracy" not in read_run(folder).result
    assert "finished" in capsys.readouterr().err
    assert np.array_equal(alone.predict_proba(IRIS[0]), recorded.predict_proba(IRIS[0]))
    assert np.array_equal(pickle.loads(pickle.dumps(recorded)).predict(IRIS[0]), alone.predict(IRIS[0]))
