"""Progress in a notebook. Oracles: an IPython that notes what it is shown; Jupyter itself, where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import bpfree
from bpfree.tracking import notebook

LITTLE: dict[str, Any] = {"tracking": False, "pictures": {"every": 0}, "device": "cpu", "log_interval": 3600}


class Shown:
    """An IPython with a kernel: outputs by handle, each with the contents that it had one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: list[list[dict[str, str]]] = []
        ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
        display.display = self.display  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.outputs.append([content])
        return types.SimpleNamespace(update=lambda content, raw: self.outputs[-1].append(content))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    monkeypatch.setattr(notebook, "BETWEEN", 0.0)
    return Shown(monkeypatch)


def test_a_run_is_one_output_that_is_replaced_and_leaves_a_line(shown: Shown, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trained = bpfree.train("dfa", epochs=3, **LITTLE)
    (contents,) = shown.outputs
    texts = [content["text/plain"] for content in contents]
    assert [text.partition("  ")[0] for text in texts[:-1]] == [f"dfa-digits-s0: epoch {epoch}/3" for epoch in (1, 2, 3)]
    assert all("<progress" in content["text/html"] for content in contents[:-1])
    assert 'value="0.667"' in contents[1]["text/html"]
    accuracy = f"test accuracy {100 * trained.result['test/accuracy']:.2f} %"
    assert texts[-1].startswith(f"dfa-digits-s0: finished: {accuracy}")
    assert accuracy in contents[-1]["text/html"]
    assert "<progress" not in contents[-1]["text/html"]
    said = capfd.readouterr()
    assert said.err == ""  # which a notebook shows as an error
    assert said.out.splitlines()[0].startswith("data ")


def test_updates_are_few(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    """Twenty epochs of milliseconds: the first content, and the last."""
    shown = Shown(monkeypatch)
    monkeypatch.setattr(notebook, "BETWEEN", 3600.0)
    bpfree.train("dfa", epochs=20, **LITTLE)
    assert [len(contents) for contents in shown.outputs] == [2]


def test_a_comparison_is_one_output(shown: Shown, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"budget.epochs": 1, "tracking.enabled": False, "pictures.every": 0, "device": "cpu"}
    bpfree.compare(["dfa", "backprop"], references=False, seeds=1, settings=settings)
    (contents,) = shown.outputs
    last = contents[-1]["text/plain"].splitlines()
    assert last[0] == "dfa, backprop on digits: 2 of 2 cells"
    assert [line.split(":")[0] for line in last[1:3]] == ["[1/2] dfa seed 0", "[2/2] backprop seed 0"]
    assert last[-1].startswith("report: ")
    assert capfd.readouterr() == ("", "")


def test_switched_off_nothing_is_shown(shown: Shown, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bpfree.train("dfa", epochs=1, progress=False, **LITTLE)
    assert shown.outputs == []
    assert capfd.readouterr() == ("", "")


def test_markup_in_a_name_is_shown_as_text(shown: Shown) -> None:
    notebook.Place().show("<b>", ["a & b"], 0.5, ["<i>"])
    html = shown.outputs[0][0]["text/html"]
    assert "&lt;b&gt;" in html
    assert "a &amp; b" in html
    assert "&lt;i&gt;" in html


def test_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notebook.in_notebook()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert not notebook.in_notebook()
    assert notebook.output() is sys.stderr


CODE = "import bpfree\nbpfree.train('dfa', epochs=2, tracking=False, device='cpu')"


@pytest.mark.slow
def test_jupyter_executes_a_notebook(workplace: Path) -> None:
    """One output in place, the summary as text, and the result with its curves."""
    pytest.importorskip("nbconvert", reason="needs the extra notebook")
    pytest.importorskip("ipykernel", reason="needs the extra notebook")
    cell = {"cell_type": "code", "id": "one", "source": CODE, "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    Path("one.ipynb").write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    words = ["jupyter", "nbconvert", "--to", "notebook", "--execute", "--output", "done.ipynb", "one.ipynb"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = json.loads(Path("done.ipynb").read_text())["cells"][0]["outputs"]
    assert [output["output_type"] for output in outputs] == ["stream", "display_data", "execute_result"]
    assert outputs[0]["name"] == "stdout"
    assert "finished: test accuracy" in "".join(outputs[1]["data"]["text/plain"])
    assert "<svg" in "".join(outputs[2]["data"]["text/html"])
