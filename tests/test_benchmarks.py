"""The benchmarks run, and their files have the form that benchmarks/README.md describes. No figure is judged here."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_studies import cell_record

import bpfree
from bpfree.files import write_text
from bpfree.study.store import CellKey

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
Run = Callable[..., dict[str, Any]]
STEPS = (
    *("feedback_step", "forward_gradient_step", "forward_gradient_memory", "gradient_free_memory", "hebbian_step"),
    *("local_losses_step", "predictive_coding_step"),
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script by name; nothing stays behind."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(FOLDER)
    names = {path.stem for path in FOLDER.glob("*.py")}
    yield importlib.import_module
    for name in names & set(sys.modules):
        del sys.modules[name]
    torch.set_num_threads(threads)


@pytest.fixture
def smoke(load: Callable[[str], Any], tmp_path: Path, device: torch.device) -> Run:
    """Runs a script with ``--quick --save`` and returns what it wrote."""

    def run(name: str, *words: str, suffix: str = "") -> dict[str, Any]:
        load(name).main([*words, "--quick", "--device", device.type, "--save", str(tmp_path)])
        text = (tmp_path / f"{name}{suffix}-{device.type}.json").read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert os.uname().nodename not in text
        content: dict[str, Any] = json.loads(text)
        assert content["command"].startswith(f"python benchmarks/{name}.py")
        assert content["quick"] is True
        assert content["versions"]["torch"] == torch.__version__
        assert content["hardware"]["cpu"]
        assert isinstance(content["threads"], int)
        results: dict[str, Any] = content["results"]
        return results

    return run


def check_ratio(result: dict[str, Any]) -> None:
    assert len(result["pairs_seconds"]) == len(result["pairs_processor_seconds"]) == len(result["ratios"]) == 1
    ours, other = result["pairs_seconds"][0]
    assert result["median_ratio"] == result["ratios"][0] == pytest.approx(ours / other)
    assert result["reached"] == (result["median_ratio"] <= result["target_ratio"])


def test_trainer_overhead(smoke: Run) -> None:
    """Also: both arms do the same arithmetic, or the ratio would compare different things."""
    result = smoke("trainer_overhead")
    check_ratio(result)
    assert result["same_weights"]
    assert (result["data"], result["steps"]) == ("synthetic", 20)


@pytest.mark.slow
def test_streamed(smoke: Run) -> None:
    result = smoke("streamed")
    check_ratio(result["step"])
    assert result["step"]["same_weights"]
    assert result["saved_bytes"].keys() == {"streamed", "backprop"}
    assert result["growth_over_depth_2"]["streamed"] <= 1.05 < result["growth_over_depth_2"]["backprop"]


def test_noprop_step(smoke: Run) -> None:
    found = smoke("noprop_step")
    assert found["bf16_units"] in (True, False, None)
    results = found["cases"]
    assert [result["T"] for result in results.values()] == [10, 10, 10, 10, 4]
    for result in results.values():
        check_ratio(result)
        assert result["bf16"]["median_ratio"] > 0
        assert result["learn_median_ms"] > 0
    assert (
        ["mapped" in result for result in results.values()]
        == ["grouped" in result for result in results.values()]
        == [False, False, True, True, False]
    )


def test_noprop_streams(smoke: Run, load: Callable[[str], Any]) -> None:
    """Also: each stage moves its own blocks alone."""
    rows = smoke("noprop_streams")["rows"]
    assert len(rows) == 9
    assert all(-100 <= value[0] <= 100 for row in rows.values() for value in row.values())
    script, task, weights = load("noprop_streams"), bpfree.load_task("digits"), list[dict[str, torch.Tensor]]()

    class Watched(script.ByStage):  # type: ignore[misc, name-defined]
        def start_stage(self, stage: bpfree.Stage) -> None:
            super().start_stage(stage)
            weights.append({name: value.clone() for name, value in self.network.named_parameters()})

    rule = script.noprop(task, Watched)
    script.scores(rule, task, 0, 0, 1)
    weights.append(dict(rule.network.named_parameters()))
    moved = [{name.split(".")[1] for name in old if not torch.equal(old[name], new[name])} for old, new in itertools.pairwise(weights)]
    assert moved == [{"t1", "t2"}, {"t3", "t4"}, {"t5", "t6"}]


def test_noprop_frozen(load: Callable[[str], Any], tmp_path: Path) -> None:
    """Features are those of the stem, in half precision, also where the work was stopped; the two heads have as many parameters."""
    script = load("noprop_frozen")
    spec = bpfree.TaskSpec("cifar", (3, 8, 8), 10, scale=255.0)
    task = load("measure").synthetic_task(spec, train=300, held=20)
    body = torch.nn.Conv2d(3, 6, 5)
    (tmp_path / "train-done").write_text("250")  # of which nothing was kept
    made = script.features(body, task, tmp_path)
    maps = body(spec.normalise(task.train.inputs))
    assert made["published"].train.inputs.shape == (300, 6 * 4 * 4)
    assert not made["published"].train.inputs[:250].any()
    expected = {"published": maps.flatten(1), "pooled": maps.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(1)}
    for name, values in expected.items():
        torch.testing.assert_close(made[name].train.inputs[250:].float(), values[250:], rtol=0.02, atol=0.02)
    features = bpfree.TaskSpec("features", (6144,), 10)
    chain, head = (script.count(script.MAKERS[row](features, 0.5, script.Sizes())) for row in ("chain", "head"))
    assert head == pytest.approx(chain, rel=0.005)


@pytest.mark.slow  # it compiles
def test_noprop_inference(smoke: Run) -> None:
    (case,) = smoke("noprop_inference")["cases"].values()
    assert [name for name in case["pairs"] if name != "onnx"] == ["predict", "ensemble", "folded", "exported", "compiled", "sample"]
    check_ratio(case["pairs"]["predict"])
    assert (case["T"], case["batch"]) == (10, 2)
    assert case["compile_seconds"] > 0


@pytest.mark.slow
def test_noprop_sampling(smoke: Run) -> None:
    """Shares are shares; exact blocks draw classes as often as their beliefs say, within the noise of five times 256 draws."""
    (found,) = smoke("noprop_sampling", suffix="_mnist")["seeds"]
    for split in ("validation", "test"):
        assert all(0 <= value <= 1 for value in found[split].values())
        drawn = found[split]["class-sampled, exact blocks with the beliefs of t1"]
        assert abs(drawn - found[split]["t1: mean probability of the true class"]) < 5 * (0.1 * 0.9 / (5 * 256)) ** 0.5
    assert found["result"]["test/effort/blocks"] <= 2
    assert found["early_exit"]["batch"]["median_ratio"] > 0


@pytest.mark.slow
def test_noprop_memory(smoke: Run) -> None:
    found = smoke("noprop_memory")
    assert list(found["table_2"]) == ["mnist, CT"]
    assert found["table_2"]["mnist, CT"]["published_mib"] == 1001
    cases = found["cases"]
    assert len(cases) == 5
    for label, case in cases.items():
        assert (case["growth"] <= 1.05) == ("sequential" in label)
        assert case["reached"] is (True if "sequential" in label else None)
        assert case["total_bytes"]["4"] == case["step_bytes"]["4"] + case["kept_bytes"]["4"]


def test_the_raw_passes_of_noprop_have_the_rules_gradients(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same noise: so the comparison leaves out nothing but the noise and the head."""
    script = load("noprop_step")
    monkeypatch.setattr(script, "drop", lambda parameters: None)
    monkeypatch.setattr(torch, "randn_like", lambda u: torch.zeros_like(u))
    rule, batch = script.make(script.CASES[0], torch.device("cpu"), 16)
    monkeypatch.setattr(rule.schedule, "noised", lambda u, t, generator: rule.schedule.signal[t] * u)

    def grads(work: Callable[[], Any]) -> dict[str, torch.Tensor]:
        rule.zero_grad()
        work()
        return {name: p.grad.clone() for name, p in rule.network.named_parameters()}

    raw = grads(script.raw_passes(rule, batch))
    ours = grads(script.credit_only(rule, batch, script.new_step(rule)))
    assert raw.keys() == ours.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(raw[name], grad, msg=name)


@pytest.mark.parametrize("way", ["grouped", "mapped"])
def test_image_paths_at_once_have_the_gradients_of_the_loop(way: str, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is compared is the same work."""
    script = load("noprop_step")
    sums: dict[str, list[float]] = {}
    rule, batch = script.make(next(case for case in script.CASES if case.network == "noprop-cnn"), torch.device("cpu"), 4)
    paths = script.image_paths(rule.double(), type(batch)(batch.inputs.double(), batch.targets))
    for name in ("loop", way):

        def note(leaves: list[Any], name: str = name) -> None:
            sums[name] = sorted(float(value) for p in leaves if p.grad is not None for value in p.grad.flatten())
            for p in leaves:
                p.grad = None

        monkeypatch.setattr(script, "drop", note)
        paths[name]()
    torch.testing.assert_close(torch.tensor(sums[way]), torch.tensor(sums["loop"]))


def test_forward_gradient_step(smoke: Run) -> None:
    result = smoke("forward_gradient_step")
    variants = result["cost"]["variants"]
    assert variants["forward"]["mixed"]["median_ratio"] == 1
    for variant in variants.values():
        assert variant["mixed"]["median_seconds"] > 0
        assert variant["reached"] in (None, variant["mixed"]["median_ratio"] <= (variant["target_ratio"] or 0))
    assert len(result["directions"]) == 4
    for compared in result["directions"].values():
        check_ratio(compared)


@pytest.mark.slow
def test_forward_gradient_memory(smoke: Run) -> None:
    rules = smoke("forward_gradient_memory")["rules"]
    assert all(rules[name]["growth"] <= 1.05 for name in ("local blockwise", "local groupwise"))
    assert all(rules[name]["growth"] > 1.05 for name in ("backprop", "activities", "weights"))


def test_gradient_free_memory(smoke: Run) -> None:
    steps = smoke("gradient_free_memory")["steps"]
    assert all(steps[name]["over_inference"] <= 1.05 for name in ("spsa", "spsa, 8 directions"))
    assert all(steps[name]["over_inference"] > 1.5 for name in ("spsa, optimiser", "backprop"))


def test_gradient_free_functions(smoke: Run) -> None:
    """Without EvoTorch, which is no requirement."""
    result = smoke("gradient_free_functions")
    assert list(result["values"]) == ["sphere", "rosenbrock"]
    assert all(list(found) == ["ours"] and len(found["ours"]) == 2 for found in result["values"].values())
    assert result["speed"] == {}


def test_feedback_step(smoke: Run) -> None:
    """Without BioTorch, which is no requirement."""
    result = smoke("feedback_step")
    assert list(result["speed"]) == [f"{other}, {variant}" for variant in ("grey", "colour") for other in ("back-propagation", "identity")]
    for compared in result["speed"].values():
        assert compared["median_ratio"] == compared["ratios"][0]
    assert result["agreement"] == {}


def test_local_losses_step(smoke: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the authors' code, which is no requirement. Oracle: memory grows with depth in back-propagation alone."""
    monkeypatch.delenv("PEERS", raising=False)
    result = smoke("local_losses_step", "--case", "mlp")
    assert list(result["speed"]) == [f"back-propagation, {loss}, mlp" for loss in ("pred", "sim", "predsim")]
    assert result["agreement"] == {}
    assert result["memory"]["back-propagation"]["growth"] > 1.5
    assert all(found["reached"] for found in result["memory"].values())


@pytest.mark.slow
def test_sampled_hamiltonian(smoke: Run) -> None:
    rows = smoke("sampled_hamiltonian", "--rows", "u-swim", "elm, scale chosen")["pendulum"]["rows"]
    assert set(rows) == {"u-swim", "elm, scale chosen", "cubic monomials"}
    assert all(0 < row["energy_error"] < 1 for row in rows.values())


def test_hebbian_step(smoke: Run) -> None:
    result = smoke("hebbian_step")
    assert list(result) == ["layer 1", "layer 2", "layer 3", "all layers", "rule.learn"]
    for compared in result.values():
        check_ratio(compared)


@pytest.mark.slow
def test_readout_rates(smoke: Run) -> None:
    """All rows of a study that have a readout on features, one epoch each. Oracle: chance, and a rate at which nothing is learned."""
    words = ("hebbian-digits", "--rates", "1e-9", "0.1", "--set", "budget.epochs=4")
    rows = smoke("readout_rates", *words, suffix="_hebbian-digits")["rows"]
    assert set(rows) >= {"SoftHebb", "own-prediction twin", "Sanger"}
    assert not set(rows) & {"Itoh's norm", "back-propagation"}
    for still, learned in rows.values():
        assert (still["rate"], learned["rate"]) == (1e-9, 0.1)
        assert learned["training"] > still["training"] + 10


def test_noprop_chain_compares_ways_that_validation_chooses(load: Callable[[str], Any]) -> None:
    """Oracle: made-up accuracies, whose best on validation is not the best on test; gains and the family's size by hand."""
    chain = load("noprop_chain")
    means = {("q(z|y)", "chain"): 57, ("q(z|y)", "path"): 59, ("analytic", "chain"): 56.9, ("own", "chain"): 58, ("blind", "mean"): 61}
    means |= {("blind", "product"): 60, ("one large block", "chain"): 55}
    test = {chain.Way(*way): {seed: mean + 0.1 * seed * (seed % 2) for seed in range(5)} for way, mean in means.items()}
    validation = {way: dict.fromkeys(range(5), 60.0 + (way in (("own", "chain"), ("blind", "product")))) for way in test}
    found = chain.compared({"": (test, validation)})
    names = [
        "analytic, chain - q(z|y), chain",
        "q(z|y), chain - q(z|y), path",
        "own, chain - blind, product",
        "own, chain - one large block, chain",
    ]
    assert list(found) == names
    assert [found[name].gain for name in names] == pytest.approx([-0.1, -2, -2, 3])
    assert chain.by_row(test)["own"]["chain"] == pytest.approx([58, 58.1, 58, 58.3, 58])


@pytest.mark.slow
def test_predictive_coding_step(smoke: Run) -> None:
    """Without PCX, which is no requirement."""
    result = smoke("predictive_coding_step")
    assert list(result["speed"]) == ["back-propagation", "path=generic", "profile_every=100"]
    for compared in result["speed"].values():
        assert compared["median_ratio"] == compared["ratios"][0]
        assert compared["target_ratio"] is compared["reached"] is None
    assert all(rule["growth"] > 1 for rule in result["memory"]["rules"].values())


PEER = """
import json, sys
import numpy as np

print(json.dumps({"versions": {"pcx": "0", "jax": "1"}}), flush=True)
for line in sys.stdin:
    command, *words = line.split()
    if command == "check":
        given = dict(np.load(words[0]))
        assert len(given.pop("inputs")) == len(given.pop("targets")) == 5
        np.savez(words[1], **{name: value + 1 for name, value in given.items()})
    print(json.dumps({"wall": 1.0, "processor": 1.0}), flush=True)
"""


def test_predictive_coding_beside_another_process(
    load: Callable[[str], Any], smoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """With something that speaks pcx_step.py's protocol, and does another arithmetic. No path is written."""
    if device.type != "cpu":
        pytest.skip("PCX is compared on the CPU")
    script = load("predictive_coding_step")
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(script, "PEER", tmp_path / "peer.py")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    result = smoke("predictive_coding_step", "--only", "speed", "--pcx", sys.executable)["speed"]["PCX 0, jax 1"]
    assert cores is None or os.sched_getaffinity(0) == cores  # it takes PCX's, and gives them back
    check_ratio(result)
    assert result["pairs_seconds"][0][1] == 0.5  # of each of two steps
    assert not result["same_arithmetic"]
    text = (tmp_path / "predictive_coding_step-cpu.json").read_text()
    assert "--pcx PYTHON" in text
    assert sys.executable not in text


def test_the_other_side_of_predictive_coding_needs_no_library_to_explain_itself() -> None:
    done = subprocess.run([sys.executable, "-S", FOLDER / "pcx_step.py", "--help"], capture_output=True, text=True, check=True)
    assert "--accuracy" in done.stdout


@pytest.mark.slow
def test_startup(smoke: Run) -> None:
    result = smoke("startup")
    for words in ("--help", "rules", "plugins list", "completion"):
        assert result[words]["imports"] == []


@pytest.mark.slow
def test_accuracy_of_digits(smoke: Run) -> None:
    result = smoke("accuracy", "digits", suffix="_digits")
    labels = [line["label"] for line in result["rows"]]
    assert labels[:3] == ["noprop-dt", "- its best block", "- mean of its blocks"]
    assert labels[3] in ("- sampled inference", "- deterministic inference")
    assert {"noprop-dt, T=1", "noprop-dt, own-prediction twin", "backprop", "dfa", "frozen", "linear"} <= set(labels)
    assert all(line["command"].startswith("bpfree train rule=") for line in result["rows"])
    assert result["markdown"].count("\n") == len(labels) + 1


@pytest.mark.slow
@pytest.mark.slow
def test_regression_predicts_each_example_once(smoke: Run) -> None:
    for part in smoke("noprop_regression").values():
        assert part["examples"] == 120
        assert part["methods"].keys() == {"noprop-dt", "backprop", "ridge"}
        assert all(0.5 < method["coverage"] <= 1 for method in part["methods"].values())


def test_accuracy_goes_on_where_it_stopped(load: Callable[[str], Any], smoke: Run, tmp_path: Path) -> None:
    """The second call finds the finished run, and only tests it again."""
    words = ("cifar10", "--output", str(tmp_path / "runs"))
    first = smoke("accuracy", *words, suffix="_cifar10")
    (folder,) = (tmp_path / "runs" / "noprop-dt" / "s0").iterdir()
    epochs = (folder / "events.jsonl").read_text().count('"epoch", ')
    script = load("accuracy")
    task = script.smoke_task("cifar10")
    recipe_of = script.runner.recipe_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.runner, "recipe_of", lambda *a, **k: WithTask(recipe_of(*a, **{**k, "spec": task.spec}), task))
        again = script.train([], folder.parent, None)
    assert again.result["test/accuracy"] == first["rows"][0]["accuracies"][0]
    assert (folder / "events.jsonl").read_text().count('"epoch", ') == epochs


class WithTask:
    """A recipe whose data are given."""

    def __init__(self, recipe: Any, task: Any) -> None:
        self._recipe, self._task = recipe, task

    def build_task(self) -> Any:
        return self._task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)


def test_oldest_covers_every_dependency(load: Callable[[str], Any]) -> None:
    """With a bare interpreter: -S leaves out site-packages."""
    done = subprocess.run([sys.executable, "-S", FOLDER / "oldest.py", "--dev"], capture_output=True, text=True, check=True)
    pins = dict(line.split("==") for line in done.stdout.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert len(pins) == len(wanted) + len(load("oldest").OF_THE_TIME)
    for requirement in wanted:
        name, bound = requirement.split(">=")
        assert re.fullmatch(rf"{re.escape(bound)}(\.0|\.\*)?", pins[name])
        assert pins[name].count(".") >= 2


def test_denormals(smoke: Run) -> None:
    found = smoke("denormals")
    assert found["share"] == 0.01
    assert found["cases"].keys() == {"credit", "predict"}
    for result in found["cases"].values():
        check_ratio(result)


def test_denormals_are_a_hundredth_of_the_weights(load: Callable[[str], Any]) -> None:
    rule = load("denormals").decayed(0.01)
    weights = torch.cat([p.flatten() for p in rule.network.parameters() if p.dim() > 1])
    tiny = (weights != 0) & (weights.abs() < torch.finfo(torch.float32).tiny)
    assert float(tiny.float().mean()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.slow
def test_study_report(smoke: Run) -> None:
    result = smoke("study_report")
    assert (result["cells"], result["epochs"]) == (30, 5)
    assert result["bytes"]["page"] > result["bytes"]["markdown"] > 0


def test_study_cells_are_added_to_those_of_before(load: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished cells alone, without trials; a cell that was run again replaces the old one, other seeds and studies stay."""
    script, file = load("study_cells"), tmp_path / "some_studies-cpu.json"
    study = tmp_path / "made.yaml"
    study.write_text("title: made\nsettings: {task: digits}\nrows:\n  - {label: DFA, settings: {rule: dfa}}\n", encoding="utf-8")
    others = {"made": {"cells": {"DFA": [{"seed": 1, "test_accuracy": 7.0}, {"seed": 2, "test_accuracy": 8.0}]}}, "another": {"cells": {}}}
    file.write_text(json.dumps({"note": "of before", "studies": others}), encoding="utf-8")

    def add(name: str, seed: int, score: float, status: str = "finished", trial: int | None = None) -> None:
        key = CellKey(name, "DFA", "", seed, trial, {"config": {}})
        facts = {
            "result": {"test/accuracy": score, "test/linear_probe/accuracy": 0.25, "train/processor_seconds": 1.25},
            "history": [{"val/accuracy": 0.5}],
        }
        record = cell_record(key, status, **facts)
        write_text(tmp_path / "runs" / "studies" / "made" / "cells" / f"{name}.json", record.to_json())

    with pytest.raises(SystemExit, match="--runs"):
        script.main([str(study), "--runs", str(tmp_path / "runs"), "--to", str(file)])
    add("a", 1, 0.91)
    add("b", 0, 0.9, "diverged")
    add("c", 1000, 0.99, trial=0)
    script.main([str(study), "task.subset=100", "--runs", str(tmp_path / "runs"), "--to", str(file)])
    content = json.loads(file.read_text(encoding="utf-8"))
    assert (content["benchmark"], content["note"], content["hardware"]["gpu"]) == ("some_studies", "of before", None)
    assert content["studies"]["another"] == {"cells": {}}
    made = content["studies"]["made"]
    assert made["command"] == "bpfree study run made task.subset=100"
    assert [run["test_accuracy"] for run in made["cells"]["DFA"]] == [91.0, 8.0]
    assert made["cells"]["DFA"][0]["validation_accuracy_by_epoch"] == [50.0]
    assert made["cells"]["DFA"][0]["probed"] == 25.0
    assert "DFA 91.0 8.0" in capsys.readouterr().out


@pytest.mark.slow
def test_study_workers(smoke: Run) -> None:
    result = smoke("study_workers")
    assert (result["cells"], result["epochs"]) == (2, 1)
    (seconds,), (ratio,), (again,) = result["seconds"], result["ratios"], result["again_seconds"]
    assert ratio == seconds["one"] / seconds["two"]
    assert 0 < again < seconds["one"]  # Python alone has started, not torch


@pytest.mark.slow
def test_the_page_of_200_cells_is_small(load: Callable[[str], Any], tmp_path: Path) -> None:
    script = load("study_report")
    made = script.planned(tmp_path, script.ROWS)
    assert len(made.cells) == 200
    lines = script.made_lines(made, script.EPOCHS)
    page = script.write_report(script.report_on(made, lines, ["study", "run", "study.yaml"]), tmp_path)
    assert page.stat().st_size < script.MEGABYTES * 1e6
    assert page.read_text(encoding="utf-8").count('<svg class="panel"') > 2 * (3 + 3)


def test_run_all_passes_options_on(load: Callable[[str], Any]) -> None:
    commands = load("run_all").commands(["--save", "--full", "--device", "cuda"])
    names = [Path(command[1]).stem for command in commands]
    assert names[:-2] == ["trainer_overhead", "streamed", "noprop_step", "noprop_inference", "noprop_memory", *STEPS]
    assert names[-2:] == ["startup", "accuracy"]
    assert all(command[-3:] == ["--save", "--device", "cuda"] for command in commands)
    assert all(Path(command[1]).is_file() for command in commands)


def test_entry_points_are_found_without_installation(tmp_path: Path) -> None:
    """Only the written folders are on the path, in an interpreter without site-packages."""
    python = [sys.executable, "-S"]
    done = subprocess.run([*python, FOLDER / "entry_points.py", tmp_path], capture_output=True, text=True, check=True)
    look = (
        "import importlib.metadata as m; print(*(f'{e.name} {e.value} {e.dist.name}' for e in m.entry_points(group='bpfree')), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": done.stdout.strip()}
    found = subprocess.run([*python, "-c", look], capture_output=True, text=True, check=True, env=environment).stdout
    assert "noprop bpfree_noprop.plugin bpfree-noprop" in found


def test_gpu_script_refuses_unknown_parts_and_skips_what_is_done(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "STATE": str(tmp_path / "state"), "DEVICE": "tested", "PYTHON": sys.executable}
    script = ["bash", str(FOLDER / "gpu.sh")]
    assert subprocess.run([*script, "everything"], env=environment, capture_output=True).returncode == 2
    names = ("trainer_overhead", "streamed", "noprop_step", "noprop_inference", "noprop_memory", *STEPS)
    for name in names:
        (tmp_path / f"{name}-tested.json").touch()
    done = subprocess.run([*script, "bench"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("its result is there") == len(names)
    for name in (
        "claims-cifar10",
        "biotorch-cifar10",
        *(f"noprop-{study}" for study in ("table1-mnist", "table1-cifar10", "table1-cifar100", "modern-cifar10", "chain-cifar10")),
    ):
        (tmp_path / f"study_{name}-tested.csv").touch()
    done = subprocess.run([*script, "papers"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("its result is there")) == (0, 7)
