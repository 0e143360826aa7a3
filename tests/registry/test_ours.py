"""The registry of this repository: entries, index and tables, certificates, reference results."""

from __future__ import annotations

import json
import shlex
import statistics
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

from bpfree.cli.main import cli
from bpfree.plugins import installed_plugins
from bpfree.registry import OTHER_CHANGE, certificates, measured_on_another_core, missing, problems, read_entries, registry_folder
from bpfree.registry.validation import StaleCertificate

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "registry"
ENTRIES = read_entries(FOLDER)
RESULTS = [
    pytest.param(result, id=f"{result['rule']}-{result['source'].rpartition('/')[2]}")
    for entry in ENTRIES
    for result in entry.results
    if (ROOT / result["source"].partition("#")[0]).is_file()  # other people's figures are where they say
]


def test_it_is_the_one_that_comes_with_the_package() -> None:
    assert registry_folder() == FOLDER


def test_it_is_valid() -> None:
    """Schema, installed plugins, sources, generated files; each fault names the command that mends it."""
    everything = problems(FOLDER, installed_plugins())
    found = [problem for problem in everything if not isinstance(problem, StaleCertificate)]
    assert not found, "\n".join(map(str, found))
    if stale := [problem.what for problem in everything if isinstance(problem, StaleCertificate)]:  # make certify renews them
        warnings.warn("; ".join(stale), stacklevel=1)
    if other := measured_on_another_core(FOLDER, installed_plugins()):  # no failure, but to be seen
        warnings.warn(f"{OTHER_CHANGE}: {', '.join(other)}", stacklevel=1)


def test_every_plugin_and_the_baselines_have_entries() -> None:
    """Oracle: the folders in plugins/ and the rules that they register."""
    named = {}
    for path in ROOT.glob("plugins/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        (name,) = project["entry-points"]["bpfree"]
        named[name] = project["name"]
    entries = {entry.name: entry.distribution for entry in ENTRIES}  # and those of other people's plugins
    assert {"core": "bpfree", **named}.items() <= entries.items()
    registered = {name: owner.name for name, _, owner in installed_plugins().items("rules") if owner.name in {"core", *named}}
    assert registered.items() <= {rule: entry.name for entry in ENTRIES for rule in entry.rules}.items()


UNEXAMINED = ["evolution", "particles", "spsa"]
"""Rules whose page says that they have not been examined in full: many small evaluations, which the whole runs' watches make slow."""


def test_every_rule_has_a_certificate() -> None:
    if not certificates(FOLDER):
        pytest.skip("no rule has a certificate yet: make certify")
    assert sorted(missing(FOLDER)) == UNEXAMINED, "make certify, and take the rules that now have one out of UNEXAMINED"


def test_the_figures_of_our_own_results_are_here() -> None:
    ours = {"core", *(path.parent.name.replace("_", "-") for path in ROOT.glob("plugins/*/pyproject.toml"))}
    named = [result for entry in ENTRIES if entry.name in ours for result in entry.results]
    assert named
    for result in named:
        assert (ROOT / result["source"].partition("#")[0]).is_file(), result


@pytest.mark.parametrize("result", RESULTS)
def test_reference_results_are_those_of_their_files(result: dict[str, Any]) -> None:
    """Oracle: the recorded figures of each seed, from which mean and deviation are computed again."""
    name, _, pointer = result["source"].partition("#")
    found: Any = json.loads((ROOT / name).read_text())
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        found = found[int(key)] if isinstance(found, list) else found[key]
    figures = [percent(figure) for figure in found]
    assert len(figures) == result["seeds"]
    assert result["mean"] == pytest.approx(statistics.mean(figures), abs=0.0051)
    if len(figures) > 1:
        assert result["deviation"] == pytest.approx(statistics.stdev(figures), abs=0.0051)


def percent(figure: Any) -> float:
    """Test accuracy in per cent: files hold shares, percentages, or errors in per cent."""
    if isinstance(figure, dict):
        return float(figure["test_accuracy"]) if "test_accuracy" in figure else 100 - float(figure["test_error"])
    return 100 * figure if figure <= 1 else float(figure)


@pytest.mark.parametrize("result", RESULTS)
def test_commands_of_results_are_commands(result: dict[str, Any]) -> None:
    """They pass the command line's parser, and name a rule or study that is there."""
    program, command, *words = shlex.split(result["command"])
    assert program == "bpfree"
    with cli.make_context("bpfree", [command], resilient_parsing=True) as context:
        found = cli.get_command(context, command)
        assert found is not None
        found.make_context(command, list(words), parent=context, resilient_parsing=True)
    if command == "study":
        assert words[1] in installed_plugins().names("studies")
    else:
        assert any(result["rule"] in word.split(",")[0].removeprefix("rule=") for word in words)
