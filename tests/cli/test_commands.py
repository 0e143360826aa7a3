"""The command line as a person uses it: in process, in an empty folder."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import bpfree
from bpfree.cli.main import main
from bpfree.record.folder import read_run
from bpfree.tracking.sending import is_sent

FAST = ["budget.epochs=2", "tracking.system=false", "threads=1", "device=cpu"]


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def only_run(folder: Path) -> Path:
    (run,) = [path for path in (folder / "runs").iterdir() if path.is_dir()]
    return run


def test_train_then_predict_evaluate_and_reproduce(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", *FAST) == 0
    assert "test accuracy" in capsys.readouterr().out
    run = only_run(workplace)
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "events.jsonl", "checkpoints", "plots"}
    result = read_run(run).result
    assert read_run(run).status == "finished"

    # the library, without trainer and MLflow
    saved = bpfree.load(run)
    task = bpfree.Task.from_source(__import__("bpfree.tasks.digits", fromlist=["DIGITS"]).DIGITS)
    accuracy = (saved.predict(task.test.inputs).argmax(1) == task.test.targets).float().mean().item()
    assert accuracy == pytest.approx(result["test/accuracy"])
    assert isinstance(saved.network, torch.nn.Module)
    with pytest.raises(bpfree.UsageError, match=r"expected \(N, 1, 8, 8\)"):
        saved.predict(torch.zeros(2, 65))

    # evaluate: validation unless told otherwise
    for arguments, split in (([], "validation"), (["--split", "test"], "test")):
        assert call("evaluate", str(run), "--json", *arguments) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["split"] == split
    assert scores["accuracy"] == pytest.approx(result["test/accuracy"])
    assert call("evaluate", run.name) == 0

    # the logged configuration gives the same weights, bit for bit
    assert call("train", "--config", str(run / "config.yaml"), "--quiet", "output=again") == 0
    (again,) = (workplace / "again").iterdir()
    first, second = (torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["weights"] for folder in (run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.makes_database
def test_tracking_lands_in_one_sqlite_store(workplace: Path) -> None:
    assert call("train", "rule=dfa", *FAST) == 0
    store = sqlite3.connect(workplace / "mlflow.db")
    params = dict(store.execute("select key, value from params"))
    assert params["rule.name"] == "dfa"
    assert params["budget.epochs"] == "2"
    tags = dict(store.execute("select key, value from tags"))
    assert tags["rule"] == "dfa"
    assert tags["plugin"] == "bpfree"
    assert tags["data_fingerprint"]
    metrics = {key for (key,) in store.execute("select distinct key from metrics")}
    assert metrics >= {
        "train/loss",
        "train/accuracy",
        "val/loss",
        "val/accuracy",
        "samples_per_second",
        "step_ms",
        "peak_memory_mb",
        "test/accuracy",
    }
    assert [status for (status,) in store.execute("select status from runs")] == ["FINISHED"]


def test_protocols_score_features_in_a_run_and_later(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle of the later scores: those of the run itself."""
    names = ("linear_probe", "nearest_centroid", "clustering")
    asked = "evaluation.protocols=[linear-probe,nearest-centroid,clustering]"
    assert call("train", "rule=dfa", asked, *FAST) == 0
    shown = capsys.readouterr().out
    run = only_run(workplace)
    result = read_run(run).result
    for name in names:
        accuracies = [result[f"{split}/{name}/accuracy"] for split in ("test", "val")]
        of_test, of_validation = (f"{100 * accuracy:.2f} %" for accuracy in accuracies)
        assert re.search(rf"{name.replace('_', '-')} +accuracy {of_test}, {of_validation} on validation", shown)
    store = sqlite3.connect(workplace / "mlflow.db")
    assert {f"test/{name}/accuracy" for name in names} <= {key for (key,) in store.execute("select distinct key from metrics")}

    for split, prefix in (("test", "test"), ("validation", "val")):
        assert call("evaluate", str(run), "--json", "--split", split) == 0
        scores = json.loads(capsys.readouterr().out)
        assert [scores[f"{name}/accuracy"] for name in names] == [result[f"{prefix}/{name}/accuracy"] for name in names]
    assert call("evaluate", str(run), "--split", "train", "evaluation.protocols=[linear-probe]") == 0
    table = capsys.readouterr().out
    assert "linear_probe/accuracy" in table
    assert "clustering" not in table
    assert "did you mean 'linear-probe'" in refused(capsys, 2, "evaluate", str(run), "evaluation.protocols=[linear-prob]")
    assert only_run(workplace) == run


def test_tracking_can_be_off(workplace: Path) -> None:
    assert call("train", "rule=frozen", "tracking.enabled=false", *FAST) == 0
    assert not (workplace / "mlflow.db").exists()


def test_print_config_is_a_configuration_and_trains_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", "rule.scale=2", "--print-config") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["rule"] == {"name": "dfa", "scale": 2.0, "error": "full", "placement": "blocks"}
    assert "# deviation of the feedback weights" in text
    assert list(workplace.iterdir()) == []


def test_listings_and_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("rules") == 0
    assert "noprop-dt" in capsys.readouterr().out
    assert call("rules", "dfa") == 0
    card = capsys.readouterr().out
    for part in ("1609.01596", "delta_l = B_l e", "reverse_span=1", "scale", "deviation of the feedback weights"):
        assert part in card
    assert call("rules", "dfa", "--json") == 0
    assert json.loads(capsys.readouterr().out)["traits"]["downstream_weights"] == 0
    for name, passes, optimizer in (("ipc", 8, {"name": "adam", "lr": 3e-4}), ("softhebb", 1, {"name": "adam"})):
        assert call("rules", name, "--json") == 0  # of the default options; the rate of softhebb depends on the network
        card = json.loads(capsys.readouterr().out)
        assert (card["traits"]["passes"], card["optimizer"]) == (passes, optimizer)
    assert call("plugins", "list", "--json") == 0
    assert {record["name"] for record in json.loads(capsys.readouterr().out)} >= {"core", "noprop"}
    assert call("tasks") == 0
    assert "cifar100" in capsys.readouterr().out
    assert call("networks", "vgg") == 0
    assert "pool_after" in capsys.readouterr().out


def test_a_comparison_ends_with_a_table_and_the_pages_path(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", "dfa", "--seeds", "2", "tracking.enabled=false", *FAST) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "dfa on digits"
    assert [line.split()[0] for line in lines[4:8]] == ["linear", "frozen", "dfa", "backprop"]
    page = Path(lines[-1]).read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert call("compare", "noprop-dt,rule.T=2", "--seeds", "1", "tracking.enabled=false", *FAST) == 0
    assert "noprop-dt,rule.T=2 (twin)" in capsys.readouterr().out


# --- bad input: one clear message, the right code, no traceback, nothing left behind ---------------------------------


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert call(*words) == code
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    assert output.err.startswith("error: ") or "error: " in output.err
    return output.err


def test_wrong_requests(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'dfa'" in refused(capsys, 2, "train", "rule=dffa")
    assert "did you mean optimizer.lr?" in refused(capsys, 2, "train", "optimizer.lrr=1")
    assert "seed='x'" in refused(capsys, 2, "train", "seed=x")
    assert "expected key=value" in refused(capsys, 2, "train", "seed")
    assert "no such run or checkpoint" in refused(capsys, 2, "evaluate", "nowhere")
    assert "no such run or checkpoint" in refused(capsys, 2, "train", "--resume", "nowhere")
    assert "too small" in refused(capsys, 2, "train", "network=vgg")
    assert "needs images" in refused(
        capsys, 2, "train", "network=vgg", "network.pool_after=[1]", "task=npz", f"task.path={vectors(workplace)}"
    )
    assert "did you mean train?" in refused(capsys, 2, "trian")
    assert sorted(path.name for path in workplace.iterdir()) in (["vectors.npz"], ["runs", "vectors.npz"])
    assert not (workplace / "runs").exists() or list((workplace / "runs").iterdir()) == []


def vectors(folder: Path) -> Path:
    path = folder / "vectors.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(50, 4)).astype("float32"), y=np.arange(50) % 2)
    return path


def no_network(*arguments: object, **options: object) -> None:
    raise OSError("no network")


def test_missing_data(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's network is like, the download is made to fail."""
    monkeypatch.setenv("BPFREE_DATA", str(workplace / "empty"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    text = refused(capsys, 1, "train", "task=mnist", "tracking.enabled=false")
    assert "BPFREE_DATA" in text or "data.root" in text


def test_failures_of_checkpoints(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", "tracking.enabled=false", "--quiet", *FAST) == 0
    run = only_run(workplace)
    capsys.readouterr()
    assert "another rule" in refused(capsys, 1, "evaluate", str(run), "rule=backprop")
    assert "another rule" in refused(capsys, 1, "train", "--resume", str(run), "rule=backprop")
    assert "choose a task of the same shape" in refused(capsys, 1, "evaluate", str(run), "task=mnist")
    corrupt = workplace / "corrupt.pt"
    corrupt.write_bytes((run / "checkpoints" / "last.pt").read_bytes()[:-500])
    before = corrupt.read_bytes()
    assert "cannot read the checkpoint" in refused(capsys, 1, "evaluate", str(corrupt))
    assert "cannot read the checkpoint" in refused(capsys, 1, "train", "--resume", str(corrupt))
    assert corrupt.read_bytes() == before
    torch.save({"something": 1}, workplace / "other.pt")
    assert "no checkpoint of bpfree" in refused(capsys, 1, "evaluate", str(workplace / "other.pt"))


def test_changes_that_name_nothing_or_would_do_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an evaluation, and of a run that continues; ``batch_size=064`` is no change."""
    assert call("train", "rule=dfa", "output=007", "tracking.enabled=false", "--quiet", *FAST) == 0
    (run,) = (workplace / "007").iterdir()
    capsys.readouterr()
    for word, expected in {
        "rule=": "names no rule",
        "rule=null": "names no rule",
        "task=[a]": "names no task",
        "optimizer.options={beta:3}": "has no value",
        "clip.scope=global": "does nothing with clip.norm=null",
        "seed=1e3": "must be a whole number",
    }.items():
        assert expected in refused(capsys, 2, "evaluate", run.name, "output=007", word)
        assert expected in refused(capsys, 2, "train", "--resume", run.name, "output=007", word)
    for word in ("optimizer.lr=0.5", "batch_size=16", "budget.epochs=9", "select=best-val", "task.augment=[flip]"):
        assert "are of training" in refused(capsys, 2, "evaluate", run.name, "output=007", word)
    assert "cannot be resumed with other settings" in refused(capsys, 2, "train", "--resume", run.name, "output=007", "optimizer.lr=0.5")
    assert call("evaluate", run.name, "output=007", "batch_size=064", "seed=00", "evaluation.batch_size=0100") == 0
    assert call("train", "--resume", run.name, "output=007", "batch_size=064", "log_interval=2", "--quiet") == 0


def test_an_output_folder_that_cannot_be_written(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "occupied").write_text("a file, and not mine to touch")
    assert "cannot write to the output folder" in refused(capsys, 1, "train", "output=occupied", "tracking.enabled=false")
    assert (workplace / "occupied").read_text() == "a file, and not mine to touch"


def test_an_unreachable_tracking_server(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ["tracking.uri=http://127.0.0.1:9", "tracking.timeout=2", "tracking.flush_timeout=1"]
    assert "error" in refused(capsys, 1, "train", "rule=frozen", "tracking.required=true", *gone, *FAST)
    assert call("train", "rule=frozen", "--quiet", *gone, *FAST) == 0  # a warning, and the run continues
    run = only_run(workplace)
    assert not is_sent(run)
    assert (run / "checkpoints" / "last.pt").exists()
    capsys.readouterr()
    assert "try again" in refused(capsys, 1, "track", "send", str(run), "tracking.flush_timeout=1")
    assert call("track", "send", run.name, "tracking.uri=sqlite:///mlflow.db") == 0
    assert is_sent(run)
    store = sqlite3.connect(workplace / "mlflow.db")
    assert store.execute("select count(*) from metrics where key='val/accuracy'").fetchone() == (2,)
    assert call("track", "send", run.name) == 0


def test_debug_shows_the_traceback(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dffa", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_finished_run_is_not_tested_again_unless_it_goes_on(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", "tracking.enabled=false", *FAST) == 0
    run = only_run(workplace)
    before = read_run(run)
    assert before.tags["test_evaluations"] == "1"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optimizer"]["name"], config["optimizer"]["lr"]) == ("adam", 1e-3)  # what auto stood for
    capsys.readouterr()
    assert call("train", "--resume", str(run)) == 0
    output = capsys.readouterr()
    assert "is already finished" in output.err
    assert f"{100 * before.result['test/accuracy']:.2f} %" in output.out
    assert read_run(run) == before
    assert call("train", "--resume", str(run), "budget.epochs=3") == 0
    after = read_run(run)
    assert after.tags["test_evaluations"] == "2"
    assert after.result["train/samples"] == 1.5 * before.result["train/samples"]
    log = run / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # killed at the end of its second session
    assert call("train", "--resume", str(run)) == 0
    assert read_run(run).tags["test_evaluations"] == "2"


def test_settings_of_a_comparison_reach_the_rules_that_they_fit(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The linear classifier stays linear, and a rule with a network of its own keeps it."""
    words = ["network.depth=6", "tracking.enabled=false", "--seeds", "1", "budget.epochs=1", "device=cpu"]
    assert call("compare", "dfa", "noprop-dt,rule.T=2", *words) == 0
    lines = {line.split("  ")[0].removesuffix(" (control)"): line.split() for line in capsys.readouterr().out.splitlines()[4:10]}
    assert lines["linear"][-2:] == ["650", "650"]
    assert lines["dfa"][-1] == lines["backprop"][-1]
    assert "seeds N" in refused(capsys, 2, "compare", "dfa", "seed=3")
    assert "no hidden blocks" in refused(capsys, 2, "train", "rule=linear", "network.depth=3")


def test_folders_that_are_moved_copied_or_named_from_elsewhere(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One database, one MLflow run for the run wherever it is, one for the copy. Oracle: the points in the database."""
    assert call("train", "rule=dfa", "--quiet", *FAST) == 0
    run = only_run(workplace)
    (workplace / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(workplace / "deep" / "down")
    assert call("train", "--quiet", "--resume", f"../../runs/{run.name}", "budget.epochs=3") == 0
    monkeypatch.chdir(workplace)
    shutil.copytree(run, workplace / "runs" / "copy")
    for epochs in (4, 5):
        assert call("train", "--quiet", "--resume", "copy", f"budget.epochs={epochs}") == 0
    run.rename(workplace / "moved")
    assert call("train", "--quiet", "--resume", "moved", "budget.epochs=4") == 0
    assert [path.relative_to(workplace) for path in workplace.rglob("mlflow.db")] == [Path("mlflow.db")]
    with sqlite3.connect("mlflow.db") as store:
        named = dict(store.execute("select value, run_uuid from tags where key = 'bpfree.run'"))
        points = store.execute("select run_uuid, step from metrics where key = 'val/accuracy' order by step").fetchall()
    assert named.keys() == {run.name, "copy"}
    assert [step for run_uuid, step in points if run_uuid == named[run.name]] == [1, 2, 3, 4]
    assert [step for run_uuid, step in points if run_uuid == named["copy"]] == [1, 2, 3, 4, 5]


def test_help_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("plugins",)):
        assert call(*words) == 0
        assert "Usage: " in capsys.readouterr().out


def test_a_run_goes_on_with_its_own_settings_in_its_own_folder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "rule=dfa", "tracking.enabled=false", *FAST) == 0
    run = only_run(workplace)
    before = {path.name: path.read_bytes() for path in (run / "config.yaml", run / "events.jsonl")}
    assert "network.width" in refused(capsys, 2, "train", "--resume", str(run), "network.width=64")
    assert {path.name: path.read_bytes() for path in (run / "config.yaml", run / "events.jsonl")} == before
    assert "budget" in refused(capsys, 2, "train", "--resume", str(run), "budget.epochs=1")
    assert {path.name: path.read_bytes() for path in (run / "config.yaml", run / "events.jsonl")} == before
    assert call("train", "--resume", str(run), "seed=0") == 0  # what it was
    elsewhere = workplace / "mine" / "ck"
    elsewhere.mkdir(parents=True)
    (elsewhere / "last.pt").write_bytes((run / "checkpoints" / "last.pt").read_bytes())
    assert "outside its run's folder" in refused(capsys, 2, "train", "--resume", str(elsewhere / "last.pt"))


def test_a_comparison_survives_a_rule_that_fails_and_tasks_without_classes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bpfree.baselines import DFA

    draw = np.random.default_rng(0)
    np.savez(workplace / "real.npz", x=draw.normal(size=(80, 4)).astype("float32"), y=draw.normal(size=(80, 2)).astype("float32"))
    task = ["task=npz", "task.path=real.npz", "tracking.enabled=false", "--seeds", "1", *FAST]
    assert call("compare", "backprop", "--only", *task) == 0
    output = capsys.readouterr().out
    assert re.search(r"row +test loss", output)
    assert re.search(r"backprop +\d+\.\d+  ", output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DFA, "signals", lambda *arguments: 1 / 0)
        assert call("compare", "dfa,optimizer.options.betas=[0.5,0.9]", "tracking.enabled=false", "--seeds", "1", *FAST) == 1
    output = capsys.readouterr().out
    assert re.search(r"dfa,.* +failed", output)
    assert "failed: ZeroDivisionError" in output
    assert re.search(r"backprop +\d+\.\d\d ", output)


def test_a_run_whose_data_have_moved_goes_on_with_the_same_data(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the weights of a run whose data stayed where they were."""
    settings = ["rule=dfa", "task=npz", "network.width=8", "tracking.enabled=false", "threads=1", "device=cpu", "--quiet"]
    vectors(workplace)
    for output, epochs in (("stayed", 3), ("runs", 2)):
        assert call("train", *settings, "task.path=vectors.npz", f"budget.epochs={epochs}", f"output={output}") == 0
    (workplace / "elsewhere").mkdir()
    (workplace / "vectors.npz").rename(workplace / "elsewhere" / "vectors.npz")
    run, (stayed,) = only_run(workplace), (workplace / "stayed").iterdir()
    capsys.readouterr()
    assert call("train", "--resume", str(run), "budget.epochs=3", "--quiet") == 2
    assert "no such file of arrays" in capsys.readouterr().err
    path = "task.path=elsewhere/vectors.npz"
    assert call("train", "--resume", str(run), path, "budget.epochs=1", "--quiet") == 2
    assert "the run has already used 200 % of the new budget" in capsys.readouterr().err
    assert call("train", "--resume", str(run), path, "task.split_seed=3", "budget.epochs=3", "--quiet") == 2
    assert "task.split_seed" in capsys.readouterr().err
    assert call("train", "--resume", str(run), path, "budget.epochs=3", "--quiet") == 0
    first, second = (torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["weights"] for folder in (run, stayed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    np.savez(workplace / "other.npz", x=np.ones((50, 4), "float32") * np.arange(50)[:, None], y=np.arange(50) % 2)
    assert call("train", "--resume", str(run), "task.path=other.npz", "budget.epochs=4", "--quiet") == 1
    assert "the checkpoint was made on other data" in capsys.readouterr().err


class Odd(BaseException):
    """What no library should raise: no Exception, and without words."""

    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(("error", "said"), [(ValueError("two\nlines"), "ValueError: two lines"), (Odd(), "Odd: no message")])
def test_an_error_of_foreign_code_says_where_it_was_raised(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: this file, and the function that raises."""
    from bpfree.cli import main as module

    def raise_it(**options: object) -> None:
        raise error

    monkeypatch.setattr(module.cli, "main", raise_it)
    with pytest.raises(SystemExit) as caught:
        module.main(["rules"])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert f"error: unexpected {said}\n  where: {__file__}, line " in text
    assert "in raise_it\n  fix:   " in text
