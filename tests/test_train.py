"""``bpfree.train`` and what it returns. Oracles: the same words on the command line, and the parts of its HTML."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bpfree
from bpfree import BpfreeError, BudgetConfig, Task, TaskSpec, UsageError
from bpfree.baselines import DFA
from bpfree.cli.main import main
from bpfree.record.folder import read_run

LITTLE: dict[str, Any] = {"tracking": False, "pictures": {"every": 0}, "device": "cpu", "progress": False}


class Narrow(nn.Module):
    """A network of one's own, with an option."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layers(x)
        return made


class Louder(DFA):
    """A rule of one's own."""


@pytest.mark.parametrize(
    ("rule", "settings", "words"),
    [
        ("dfa,rule.scale=0.5", {}, {"epochs": 1, "lr": 0.002, "seed": 3}),
        ("dfa", {"rule.scale": 0.5, "optimizer": {"lr": 0.002}}, {"budget": BudgetConfig(epochs=1), "seed": torch.tensor(3)}),
        (DFA, {"rule": {"scale": 0.5}, "optimizer.lr": 0.002, "seed": 3}, {"budget": {"epochs": 1}}),
    ],
)
def test_it_trains_what_the_command_line_trains(workplace: Path, rule: Any, settings: Any, words: Any) -> None:
    trained = bpfree.train(rule, settings=settings, **words, **LITTLE)
    given = ["rule=dfa", "rule.scale=0.5", "optimizer.lr=0.002", "seed=3", "budget.epochs=1", "tracking.enabled=false", "pictures.every=0"]
    with pytest.raises(SystemExit):
        main(["train", *given, "device=cpu", "output=other", "-q"])
    other = read_run(next(Path("other").iterdir()))
    assert trained.result["test/accuracy"] == other.result["test/accuracy"]
    assert {key: value for key, value in trained.run.config.items() if key != "output"} == {
        key: value for key, value in other.config.items() if key != "output"
    }
    assert trained.folder.parent == Path("runs")


def test_objects_are_trained_as_they_are(digits: Task, workplace: Path) -> None:
    """A class of a rule, a task, and a class of a network with an option; the names say what they are."""
    task = Task.of((digits.train.inputs, digits.train.targets), (digits.test.inputs, digits.test.targets), name="mine")  # type: ignore[attr-defined]
    trained = bpfree.train(Louder, task=task, network=Narrow, settings={"network.width": 5}, epochs=1, **LITTLE)
    assert (trained.run.tags["rule"], trained.run.tags["network"], trained.run.tags["task"]) == ("Louder", "Narrow", "mine")
    assert isinstance(trained.saved.rule, Louder)
    assert [p.shape[0] for p in trained.network.parameters()] == [5, 5, 10, 10]
    assert trained.predict(digits.test.inputs).shape == (359, 10)  # type: ignore[attr-defined]
    with pytest.raises(BpfreeError, match="the run's rule 'Louder' was made in Python"):
        bpfree.load(trained.folder)
    longer = bpfree.train(Louder, task=task, network=Narrow, resume=trained.folder, epochs=2, **LITTLE)
    assert (longer.run.id, longer.run.epoch) == (trained.run.id, 2)


def test_a_module_is_copied_and_trained_from_its_weights(digits: Task, workplace: Path) -> None:
    """Oracle: a trainer of a copy of the module with the same rule and seed: the rule draws its matrices from the seed in both."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    before = copy.deepcopy(module.state_dict())
    trained = bpfree.train("backprop", task=digits, network=module, epochs=1, **LITTLE)
    network = bpfree.split(copy.deepcopy(module), digits.spec.input_shape)
    rule = bpfree.installed_plugins().get("rules", "backprop")(network, digits.spec)
    config = bpfree.TrainConfig(budget=BudgetConfig(epochs=1), device="cpu")
    bpfree.Trainer(rule, digits, config, progress=False).fit()
    for name, value in network.state_dict().items():
        assert torch.equal(trained.network.state_dict()[name], value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_task_that_was_loaded_by_name_keeps_its_name_and_options(workplace: Path) -> None:
    task = bpfree.load_task("digits", validation=0.3)
    trained = bpfree.train("dfa", task=task, epochs=1, **LITTLE)
    assert trained.run.config["task.validation"] == 0.3
    assert (trained.run.tags["task"], trained.run.tags["data_fingerprint"]) == ("digits", task.fingerprint())
    assert bpfree.load(trained.folder).spec == task.spec


def test_callbacks_and_resuming(workplace: Path) -> None:
    trained = bpfree.train("dfa", epochs=9, callbacks=[lambda metrics, stop: stop("now")], **LITTLE)
    assert (trained.run.status, trained.run.reason, trained.run.epoch) == ("finished", "now", 1)
    assert bpfree.train(resume=trained.folder, progress=False).result == trained.result
    longer = bpfree.train("dfa", resume=trained.run.id, epochs=11, **LITTLE)
    assert (longer.run.epoch, len(longer.history)) == (11, 11)
    with pytest.raises(BpfreeError, match="the checkpoint is of another rule: dfa, not backprop"):
        bpfree.train("backprop", resume=trained.folder)
    with pytest.raises(UsageError, match=r"cannot be resumed with other settings[\s\S]*seed"):
        bpfree.train(resume=trained.folder, seed=4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, r"no rule to train[\s\S]*bpfree.train\('dfa'\)"),
        ({"rule": "dfaa"}, "did you mean 'dfa'"),
        ({"rule": "dfa", "leraning_rate": 3}, r"unknown key leraning_rate[\s\S]*did you mean optimizer.lr"),
        ({"rule": "dfa", "task": "digit"}, "unknown task 'digit'"),
        ({"rule": "dfa", "epochs": 3, "budget": {"epochs": 4}}, "budget.epochs is given twice"),
        ({"rule": "dfa", "settings": {"seed": 3}, "seed": 4}, "seed is given twice"),
        ({"rule": "dfa", "network": nn.Linear}, "'in_features' of Linear has no default"),
        ({"rule": DFA(bpfree.mlp(TaskSpec("x", (2,), 2)), TaskSpec("x", (2,), 2))}, r"the rule is an object[\s\S]*bpfree.Trainer"),
        ({"rule": 3}, "is of type int, not a subclass of bpfree.Rule"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(workplace: Path, given: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        bpfree.train(**given)
    assert not list(workplace.iterdir())


# --- what it shows ------------------------------------------------------------------------------------------------------


def test_progress_is_shown_unless_switched_off(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = {**LITTLE, "progress": True}
    bpfree.train("dfa", epochs=2, **shown)
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.split("  ")[0] for line in said.err.splitlines()[:2]] == ["data        ".strip(), "network"]
    assert re.search(r"dfa-digits-s0: epoch 2/2 .*\ndfa-digits-s0: finished: test accuracy", said.err)
    bpfree.train("dfa", epochs=2, **LITTLE)
    assert capfd.readouterr() == ("", "")


class Parts(HTMLParser):
    """Elements, attributes and texts; elements that are not closed in their order."""

    VOID = ("meta", "br", "img", "input", "rect", "path", "line", "circle", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.texts, self.open, self.wrong = list[str](), list[str](), list[str](), list[str]()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_view(html: str) -> Parts:
    """One element, closed, without scripts; nothing is fetched; no rule of its style reaches outside."""
    parts = Parts(html)
    assert (parts.wrong, parts.open) == ([], [])
    assert not {"script", "link", "iframe", "img"} & set(parts.elements)
    assert not [value for name, value in parts.attributes if name in ("href", "src", "xlink:href")]
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    depth, rule = 0, ""
    for letter in style:
        if letter == "{":
            if depth == 0 and not rule.strip().startswith("@media"):
                assert all(".bpfree-view" in each for each in rule.split(",")), rule
            depth, rule = depth + 1, ""
        elif letter == "}":
            depth, rule = depth - 1, ""
        else:
            rule += letter
    assert depth == 0
    return parts


def test_the_result_is_short_as_text_and_has_curves_as_html(workplace: Path) -> None:
    trained = bpfree.train("dfa", epochs=3, **LITTLE)
    accuracy = f"{100 * trained.result['test/accuracy']:.2f} %"
    assert repr(trained).startswith(f"Trained(dfa-digits-s0: status finished; test accuracy {accuracy}; validation accuracy ")
    assert len(repr(trained).splitlines()) == 1
    parts = check_view(trained._repr_html_())
    assert {"dfa-digits-s0", "finished", accuracy, "validation", "training"} <= set(parts.texts)
    assert parts.elements.count("svg") >= 2  # loss, accuracy


def test_a_comparison_is_short_as_text_and_has_curves_as_html(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"budget.epochs": 1, "tracking.enabled": False, "pictures.every": 0, "device": "cpu", "evaluation.protocols": []}
    report = bpfree.compare(["dfa"], references=False, seeds=2, settings=settings)
    said = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said if line.startswith("[")] == ["[1/2] dfa seed 0", "[2/2] dfa seed 1"]
    assert said[-1].startswith("report: ")
    assert Path(said[-1].removeprefix("report: ")).is_file()
    shown = repr(report).splitlines()
    assert shown[0].startswith("Report(dfa on digits: 2 of 2 cells finished")
    assert [line.split()[0] for line in shown[3:]] == ["dfa"]
    parts = check_view(report._repr_html_())
    assert {"dfa on digits", "Leaderboard", "Learning curves"} <= set(parts.texts)
    bpfree.compare(["dfa"], references=False, seeds=2, settings=settings, progress=False)
    assert capfd.readouterr().err == ""
