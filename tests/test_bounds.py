"""Requests beyond all measure are refused before anything of their size is made.

Oracles: the exit code of a wrong request, and how much Python has allocated meanwhile (in MiB).
"""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import pytest
import torch

from bpfree import UsageError
from bpfree.cli.main import main
from bpfree.config import parse_words, read_yaml, resolve
from bpfree.network import memory
from bpfree.study.file import read_study
from bpfree.training import environment

STUDY = "title: t\nrows: [{label: a, settings: {rule: dfa}}]\n"
TUNE = "tune: {space: {optimizer.lr: {low: 0.1, high: 1}}, "
NINES = "9" * 5000


def doubling(first: str, entry: str) -> str:
    """Anchors of which each stands for ten of the one before: 10^9 values in the end."""
    lines = [f"n0: &n0 {first}", *(f"n{i}: &n{i} {entry.replace('*', f'*n{i - 1}')}" for i in range(1, 10))]
    return "\n".join(lines)


TEXTS = {
    "aliases": doubling("[x, x]", f"[{', '.join(['*'] * 10)}]"),
    "aliases in mappings": doubling("{a: x}", f"{{{', '.join(f'k{i}: *' for i in range(10))}}}"),
    "merged": doubling("{a: x}", f"{{<<: [{', '.join(['*'] * 10)}], b: {{<<: *, c: *}}}}"),
    "recursive mapping": "a: &a {b: *a}",
    "recursive list": "a: &a [[*a]]",
    "nested maps": "a: " + "{b: " * 2000 + "1" + "}" * 2000,
    "nested by indentation": "".join(" " * i + "a:\n" for i in range(1000)),
    "nested lists": "a: " + "[" * 10_000,
    "digits": f"seed: {NINES}",
    "hexadecimal": f"seed: 0x{NINES}",
    "long": "a: " + "x" * 5_000_000,
}
STUDIES = {
    "seeds": f"{STUDY}seeds: 1000000000",
    "trials": f"{STUDY}{TUNE}trials: 1000000000}}",
    "tuning seeds": f"{STUDY}{TUNE}trials: 2, seeds: 1000000000}}",
    "jobs": f"{STUDY}jobs: 100000",
}
WORDS = [
    f"seed={NINES}",
    f"seed=0x{NINES}",
    "seed=18446744073709551616",
    "threads=100000",
    "data.workers=100000",
    "network.depth=1000000000",
    "optimizer.options=" + "{a: " * 2000 + "1" + "}" * 2000,
    "network.widths=" + "[" * 2000,
    "optimizer.options={a: &a [*a]}",
]


def peak(folder: Path, words: list[str]) -> float:
    """MiB that a refused command allocates at most."""
    resolve({"rule": "dfa"})  # plugins are loaded
    tracemalloc.start()
    try:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_stand_for_too_much(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("big.yaml").write_text(TEXTS[name])
    assert peak(workplace, ["train", "--config", "big.yaml"]) < 50
    assert peak(workplace, ["study", "show", "big.yaml"]) < 50
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("name", STUDIES)
def test_studies_that_list_too_much(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("big.yaml").write_text(STUDIES[name])
    assert peak(workplace, ["study", "run", "big.yaml"]) < 50
    assert "must be at most" in capsys.readouterr().err


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word[:30])
def test_words_that_ask_for_too_much(word: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peak(workplace, ["train", "rule=dfa", "task=digits", word]) < 50
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("words", [["study", "run", "quickstart", "--seeds"], ["compare", "dfa", "--seeds"], ["compare", "dfa", "--jobs"]])
def test_options_that_ask_for_too_much(words: list[str], workplace: Path) -> None:
    assert peak(workplace, [*words, "1000000000"]) < 50


def test_an_endless_file_is_not_read_to_its_end() -> None:
    for read in (read_yaml, read_study):
        with pytest.raises(UsageError):
            read(Path("/dev/zero"))


def test_what_people_write_is_read(tmp_path: Path) -> None:
    """Aliases that share settings, and many values."""
    path = tmp_path / "study.yaml"
    rows = "".join(f"- label: r{number}\n  settings: {{<<: *common, optimizer.lr: 0.{number}}}\n" for number in range(1, 1000))
    path.write_text(f"title: t\nsettings: &common {{rule: dfa, budget.epochs: 2}}\nrows:\n{rows}")
    study = read_study(path)
    assert [row.settings["rule"] for row in study.rows] == ["dfa"] * 999


@pytest.mark.parametrize("rule", ["backprop", "noprop-dt"])
def test_networks_that_do_not_fit_are_refused_with_both_numbers(rule: str) -> None:
    """Oracle: weights and gradients of the hidden layers of backprop's network counted here, 3 (w^2 + w) + 64 w + w + 10 w + 10."""
    recipe = resolve(parse_words([f"rule={rule}", "task=digits", "network.width=10000000"]))
    with pytest.raises(UsageError, match=r"take ([\d,]+\.\d GiB), and \d+\.\d GiB of the machine's memory are free") as error:
        recipe.build_rule(recipe.spec())
    width = 10**7
    count = 3 * (width**2 + width) + 64 * width + width + 10 * width + 10
    assert rule != "backprop" or f"take {2 * 4 * count / 2**30:,.1f} GiB" in str(error.value)


def test_sizes_that_no_tensor_can_have() -> None:
    recipe = resolve(parse_words(["rule=backprop", "task=digits", "network.width=1000000000000000"]))
    with pytest.raises(UsageError, match="larger than any memory"):
        recipe.build_rule(recipe.spec())


def test_a_large_network_that_fits_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the bits of the network that is made without the second look that large ones get."""
    recipe = resolve(parse_words(["rule=backprop", "task=digits", "network.width=32"]))
    small = recipe.build_rule(recipe.spec()).state_dict()
    monkeypatch.setattr(memory, "SMALL", 2000)
    monkeypatch.setattr("bpfree.recipe.LARGE", 16)
    large = recipe.build_rule(recipe.spec()).state_dict()
    assert all(torch.equal(small[name], large[name]) for name in small)


@pytest.mark.parametrize(
    ("free", "place"), [({"device": 10**9, "machine": 10**10}, "device"), ({"device": 10**10, "machine": 10**8}, "machine"), (None, "")]
)
def test_the_device_holds_gradients_too_and_the_machine_weights(
    free: dict[str, int] | None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 144 million weights, 576 MB, and as many gradients."""
    free = free or {"device": 2 * 580_000_000, "machine": 580_000_000}
    monkeypatch.setattr(environment, "free_memory", lambda device: free)
    recipe = resolve(parse_words(["rule=backprop", "task=digits", "network.width=12000", "network.depth=2"]))
    with pytest.raises(UsageError, match=rf"GiB of {place} are free") if place else contextlib.nullcontext():
        recipe.build_rule(recipe.spec())
