"""A tracking server that is slow, down or gone costs a run nothing but one warning, and nothing is lost."""

from __future__ import annotations

import json
import time

import pytest

from bpfree.errors import BpfreeError
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.events import SPOOL_NAME
from bpfree.tracking.mlflow_tracker import send_unsent


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= 30]


def spooled(run):
    return [json.loads(line) for line in (run.folder / SPOOL_NAME).read_text().splitlines()]


def epochs(lines):
    return [line["step"] for line in lines if line["event"] == "metrics" and "epoch" in line["values"]]


def finish(run, tracker, status="finished"):
    run.status = status
    tracker.run_end(run)


def test_real_server(server, new_run, track, epoch, stored):
    """Over HTTP as in a file: every point, NaN included, files through the server."""
    run = new_run()
    (run.folder / "config.yaml").write_text("a: 1\n")
    tracker = track(server.uri)
    tracker.run_start(run)
    for number in (1, 2, 3):
        epoch(run, tracker, number)
    tracker.epoch_end(run, {"epoch": 4.0, "train/loss": float("nan"), "rule/loss": float("inf")})
    finish(run, tracker)
    found, points = stored(run, server.uri)
    assert found.info.status == "FINISHED"
    assert points["train/loss"][:3] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert points["train/loss"][3][1] != points["train/loss"][3][1]
    assert points["rule/loss"][0][1] > 1e308
    from mlflow import MlflowClient

    assert {a.path for a in MlflowClient(server.uri).list_artifacts(found.info.run_id)} == {"config.yaml", "environment.json"}


def test_nobody_listens(closed_port, new_run, track, epoch, caplog):
    """The start waits no longer than a connection attempt (plus importing MLflow); the spool has everything."""
    import mlflow  # noqa: F401

    run = new_run(config={"seed": 1})
    tracker = track(f"http://127.0.0.1:{closed_port}", timeout=5.0, flush_timeout=5.0)
    began = time.monotonic()
    tracker.run_start(run)
    assert time.monotonic() - began < 4
    for number in (1, 2, 3):
        epoch(run, tracker, number)
    finish(run, tracker)
    assert time.monotonic() - began < 10
    lines = spooled(run)
    assert lines[0]["event"] == "open"
    assert lines[0]["params"] == {"seed": "1"}
    assert lines[0]["run_id"] is None
    assert epochs(lines) == [1, 2, 3]
    assert lines[-1]["event"] == "end"
    assert len(warnings(caplog)) == 1
    assert str(run.folder / SPOOL_NAME) in warnings(caplog)[0]


def test_required(closed_port, new_run, track, caplog):
    """Refused before training, with exit status 1; no warning beside the error, and no file."""
    run = new_run()
    with pytest.raises(BpfreeError, match="does not answer") as caught:
        track(f"http://127.0.0.1:{closed_port}", required=True).run_start(run)
    assert caught.value.exit_code == 1
    time.sleep(0.3)
    assert warnings(caplog) == []
    assert list(run.folder.iterdir()) == []


def test_black_hole(black_hole, new_run, track, epoch, caplog):
    """A server that accepts and never answers: the start waits for the timeout, hooks wait for nothing."""
    run = new_run()
    tracker = track(black_hole, timeout=1.0, flush_timeout=1.0)
    began = time.monotonic()
    tracker.run_start(run)
    assert time.monotonic() - began < 4
    durations = []
    for number in range(1, 31):
        before = time.perf_counter()
        epoch(run, tracker, number)
        durations.append(time.perf_counter() - before)
        time.sleep(0.02)
    assert sorted(durations)[len(durations) // 2] < 0.005
    assert max(durations) < 0.5  # a request would take its whole timeout; 50 ms are exceeded by a busy machine alone
    began = time.monotonic()
    finish(run, tracker)
    assert time.monotonic() - began < 4
    assert epochs(spooled(run)) == list(range(1, 31))
    assert len(warnings(caplog)) == 1


def test_spool_survives_a_kill(closed_port, new_run, track, epoch):
    """During an outage the spool is on disk before the run ends, so that even SIGKILL loses only the last moments."""
    run = new_run()
    tracker = track(f"http://127.0.0.1:{closed_port}", flush_timeout=0.1)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    deadline = time.monotonic() + 10
    while not ((run.folder / SPOOL_NAME).exists() and epochs(spooled(run)) == [1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert epochs(spooled(run)) == [1]
    finish(run, tracker)


def test_server_comes_back(gate, server, new_run, track, epoch, stored, caplog):
    """An outage in the middle: everything arrives, once, and nothing is left in the folder."""
    run = new_run()
    tracker = track(gate.uri)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    time.sleep(1)
    gate.shut()
    epoch(run, tracker, 2)
    deadline = time.monotonic() + 20
    while not warnings(caplog) and time.monotonic() < deadline:
        time.sleep(0.05)
    gate.open()
    epoch(run, tracker, 3)
    finish(run, tracker)
    _, points = stored(run, server.uri)
    assert points["train/loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert not (run.folder / SPOOL_NAME).exists()
    assert len(warnings(caplog)) == 1


def test_run_resumed_after_an_outage_sends_what_was_left(gate, server, new_run, track, epoch, stored):
    """Epochs 3 and 4 unsent, resumed from a checkpoint of epoch 3 with the server back: one point per epoch."""
    run = new_run()
    tracker = track(gate.uri, flush_timeout=0.5)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    epoch(run, tracker, 2)
    time.sleep(1.5)
    gate.shut()
    epoch(run, tracker, 3)
    epoch(run, tracker, 4)
    finish(run, tracker, "interrupted")
    assert epochs(spooled(run)) == [3, 4]

    gate.open()
    again = new_run(resumed=True, epoch=3, history=run.history[:3], tracking=dict(run.tracking))
    tracker = track(gate.uri)
    tracker.run_start(again)
    assert stored(again, server.uri)[0].info.status == "RUNNING"  # not KILLED, as the first session left it
    epoch(again, tracker, 4)
    epoch(again, tracker, 5)
    finish(again, tracker)
    found, points = stored(again, server.uri)
    assert points["train/loss"] == [(n, 1 / n) for n in range(1, 6)]
    assert found.info.status == "FINISHED"
    assert not (run.folder / SPOOL_NAME).exists()


def test_send_unsent(closed_port, uri, new_run, track, epoch):
    """A run that never reached its store is sent later, elsewhere even: whole, with its own times."""
    run = new_run(config={"seed": 5})
    tracker = track(f"http://127.0.0.1:{closed_port}", flush_timeout=0.1)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    epoch(run, tracker, 2)
    finish(run, tracker)
    assert send_unsent(run.folder, TrackingConfig(uri=uri, interval=0.05), run.folder.parent)
    assert not (run.folder / SPOOL_NAME).exists()
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("bpfree").experiment_id])[0]
    assert found.info.status == "FINISHED"
    assert found.info.start_time == int(run.tracking["mlflow_started"])
    assert found.data.params == {"seed": "5"}
    assert [p.step for p in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2]


def test_run_without_folder(closed_port, new_run, track, caplog):
    """There is nowhere to keep it, and the warning says so."""
    run = new_run()
    run.folder = None
    tracker = track(f"http://127.0.0.1:{closed_port}", flush_timeout=0.1)
    tracker.run_start(run)
    tracker.epoch_end(run, {"epoch": 1.0})
    finish(run, tracker)
    assert len(warnings(caplog)) == 1
    assert "is lost" in warnings(caplog)[0]


def test_server_dies(server, new_run, track, epoch, caplog):
    """Killed between epochs 2 and 3: no exception, what follows is in the spool, what came before is not.

    It is the last test here, because the next one that needs a server has to start another.
    """
    run = new_run()
    tracker = track(server.uri, flush_timeout=3.0)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    epoch(run, tracker, 2)
    time.sleep(2)
    server.kill()
    epoch(run, tracker, 3)
    time.sleep(0.5)
    epoch(run, tracker, 4)
    finish(run, tracker)
    lines = spooled(run)
    assert epochs(lines) == [3, 4]
    assert lines[0]["run_id"] == run.tracking["mlflow_run_id"]
    assert len(warnings(caplog)) == 1
