"""Exported programs. Oracle: ``Saved.predict`` of the rule, on inputs that the export itself has not seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study_kit import call
from torch import Tensor

import bpfree
from bpfree import BpfreeError, TaskSpec, UsageError, exporting
from bpfree.baselines import Backprop
from bpfree.exporting import export
from bpfree.network import mlp
from bpfree.saved import Saved

PIXELS = TaskSpec("pixels", (1, 6, 6), 3, mean=(0.4,), std=(0.2,), scale=255.0, limits=(0.0, 255.0), class_names=("a", "b", "c"))
FORMATS = ["torch-export", "onnx"]


def saved_of(spec: TaskSpec = PIXELS, rule: type[bpfree.Rule] = Backprop) -> Saved:
    torch.manual_seed(0)
    return Saved(rule(mlp(spec), spec).eval(), spec, None, Path("runs/mine/checkpoints/last.pt"))


def inputs_of(spec: TaskSpec, count: int) -> Tensor:
    made = spec.example(count, torch.Generator().manual_seed(7))
    return made.abs().clamp_max(1) * 255 if spec.limits else made


def run(path: Path, inputs: Tensor) -> dict[str, Any]:
    """Compute outputs with the program alone."""
    if path.suffix == ".pt2":
        return {name: value.detach().numpy() for name, value in torch.export.load(path).module()(inputs).items()}
    runtime = pytest.importorskip("onnxruntime", reason="ONNX needs bpfree[onnx]")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"inputs": inputs.numpy()}), strict=True))


both = pytest.mark.parametrize("kind", ["torch-export", pytest.param("onnx", marks=pytest.mark.slow)], indirect=True)
"""The exporter to ONNX takes seconds: one quick test of it is enough."""


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason="ONNX needs bpfree[onnx]")
    return request.param


def place(folder: Path, kind: str) -> Path:
    return folder / ("model.onnx" if kind == "onnx" else "model.pt2")


def test_a_program_takes_raw_inputs_of_any_number(kind: Any, tmp_path: Path) -> None:
    saved, path = saved_of(), place(tmp_path, kind)
    found = export(saved, path, format=kind)
    assert found.difference < 1e-5
    for count in (1, 2, 9):
        inputs = inputs_of(PIXELS, count)
        made = run(path, inputs)
        np.testing.assert_allclose(made["scores"], saved.predict(inputs), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made["probabilities"], saved.predict_proba(inputs), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    if kind == "torch-export":
        known = {"bpfree.json": ""}
        torch.export.load(path, extra_files=known)
        assert json.loads(known["bpfree.json"])["classes"] == ["a", "b", "c"]
    else:
        import onnx

        assert json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["classes"]) == ["a", "b", "c"]


def test_real_outputs_and_tokens(tmp_path: Path) -> None:
    numbers = TaskSpec("numbers", (4,), 2, "real", mean=(1.0, 2.0, 3.0, 4.0), std=(2.0,), scale=1.0)
    saved = saved_of(numbers)
    export(saved, tmp_path / "n.pt2", format="torch-export")
    inputs = inputs_of(numbers, 3)
    np.testing.assert_allclose(run(tmp_path / "n.pt2", inputs)["outputs"], saved.predict(inputs), rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_size(tmp_path: Path) -> None:
    saved = saved_of()
    assert export(saved, tmp_path / "m.pt2", format="torch-export", batch=4).about["batch"] == 4
    assert run(tmp_path / "m.pt2", inputs_of(PIXELS, 4))["scores"].shape == (4, 3)
    with pytest.raises(Exception, match=r"batch|size|4"):
        run(tmp_path / "m.pt2", inputs_of(PIXELS, 5))


class Noisy(Backprop):
    """Adds noise to its scores, makes tensors for as many examples as there are, and reads a weight in Python."""

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator)
        start = torch.zeros(len(inputs), scores.shape[1])
        noise = torch.randn(scores.shape, generator=generator) + torch.empty(scores.shape).normal_(generator=generator)
        first = next(self.parameters()).flatten()[0]
        with torch.autocast("cpu", enabled=False):
            return scores + (2 if float(first) > 0 else 3) * noise + start


@both
def test_noise_is_that_of_each_example_by_itself(kind: Any, tmp_path: Path) -> None:
    saved, path = saved_of(rule=Noisy), place(tmp_path, kind)
    export(saved, path, format=kind, seed=3)
    inputs = inputs_of(PIXELS, 4)
    alone = torch.cat([saved.predict(one, seed=3) for one in inputs])
    np.testing.assert_allclose(run(path, inputs)["scores"], alone, rtol=1e-4, atol=1e-4)
    assert not np.allclose(alone, torch.cat([saved.predict(one, seed=4) for one in inputs]), atol=1e-2)


class Deciding(Backprop):
    """Goes on by the values of its inputs."""

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        scores = super().predict(inputs, generator)
        return scores if float(scores.sum()) > 0 else -scores


def test_what_depends_on_the_values_of_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BpfreeError, match="decides by the values of its inputs") as caught:
        export(saved_of(rule=Deciding), tmp_path / "m.pt2", format="torch-export")
    assert "bpfree predict" in caught.value.fix
    assert not list(tmp_path.iterdir())


class Foreign(Backprop):
    """Computes outside of torch."""

    def predict(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.from_numpy(np.tanh(super().predict(inputs, generator).numpy()))


def test_what_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises(BpfreeError, match="cannot be exported as torch-export") as caught:
        export(saved_of(rule=Foreign), tmp_path / "m.pt2", format="torch-export")
    assert caught.value.where == "Foreign"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@both
def test_a_program_that_predicts_otherwise_is_not_kept(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = exporting._loaded

    def wrong(path: Path, kind: Any) -> Any:
        program = loaded(path, kind)
        return lambda inputs: {name: value + 1e-3 for name, value in program(inputs).items()}

    monkeypatch.setattr(exporting, "_loaded", wrong)
    with pytest.raises(BpfreeError, match=r"does not predict what the rule predicts: scores by up to 0\.001"):
        export(saved_of(), place(tmp_path, kind), format=kind)
    assert not list(tmp_path.iterdir())


def test_requests_that_cannot_be_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown format"):
        export(saved_of(), tmp_path / "m", format="tflite")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a batch of 0"):
        export(saved_of(), tmp_path / "m", format="torch-export", batch=0)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BpfreeError, match="needs onnx") as caught:
        export(saved_of(), tmp_path / "m.onnx", format="onnx")
    assert "bpfree[onnx]" in caught.value.fix


def test_a_run_is_exported_and_checked_by_the_command(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NoProp, with noise: a chain of blocks, whose steps are unrolled."""
    fast = ("tracking.enabled=false", "pictures.every=0", "threads=1", "device=cpu", "budget.epochs=1")
    assert call("train", "rule=noprop-dt", "rule.T=2", *fast) == 0
    (folder,) = Path("runs").iterdir()
    capsys.readouterr()
    words = ("export", str(folder), "rule.inference=sampled", "--format", "torch-export", "--output", "out/m.pt2")
    assert call(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["difference"] < found["tolerance"]
    assert (found["rule"], found["batch"], len(found["classes"])) == ("noprop-dt", "dynamic", 10)
    saved = bpfree.load(folder, changes=[bpfree_leaf("rule.inference", "sampled")])
    inputs = torch.rand(3, 1, 8, 8)
    alone = torch.cat([saved.predict(one) for one in inputs])
    np.testing.assert_allclose(run(Path("out/m.pt2"), inputs)["scores"], alone, rtol=1e-4, atol=1e-4)
    for wrong, what in ((("--batch", "many"), "--batch many"), (("photos",), "'photos' is no setting")):
        assert call(*words, *wrong) == 2
        assert what in capsys.readouterr().err


def bpfree_leaf(key: str, value: str) -> Any:
    from bpfree.leaves import parse_words

    (leaf,) = parse_words([f"{key}={value}"])
    return leaf
