"""A tracking server that is slow, down or gone costs a run nothing but one warning, and nothing is lost."""

from __future__ import annotations

import pytest
from waiting import until, until_threads_end

from bpfree.errors import BpfreeError
from bpfree.record.folder import RunFolder
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.sending import is_sent, send

pytestmark = pytest.mark.time_dependent
HOUR = 3600.0
"""Longer than a test may take: no one waits for it in vain."""


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= 30]


def epochs(events):
    return [event["epoch"] for event in events if event["event"] == "epoch"]


def run_log(run):
    return (event for event, _ in RunFolder(run.folder).log.read())


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


def test_nobody_listens(closed_port, new_run, track, epoch, unsent, caplog):
    """Start and end wait no longer than a connection attempt, however long they may; the log has everything."""
    run = new_run(config={"seed": 1})
    tracker = track(f"http://127.0.0.1:{closed_port}", timeout=HOUR, flush_timeout=HOUR)
    tracker.run_start(run)
    for number in (1, 2, 3):
        epoch(run, tracker, number)
    finish(run, tracker)
    events = unsent(run)
    assert events[0]["event"] == "begin"
    assert events[0]["config"] == {"seed": 1}
    assert epochs(events) == [1, 2, 3]
    assert events[-1]["event"] == "end"
    assert len(warnings(caplog)) == 1
    assert f"bpfree track send {run.folder}" in warnings(caplog)[0]


def test_required(closed_port, new_run, track, caplog):
    """Refused before training, with exit status 1; no warning beside the error, and no file."""
    run = new_run()
    with pytest.raises(BpfreeError, match="does not answer") as caught:
        track(f"http://127.0.0.1:{closed_port}", required=True).run_start(run)
    assert caught.value.exit_code == 1
    until_threads_end()
    assert warnings(caplog) == []
    assert list(run.folder.iterdir()) == []


def test_a_database_that_fails_shows_no_traceback(uri, new_run, track, epoch, capfd):
    """MLflow logs the tracebacks of what SQLite refuses, such as a table that is gone. Oracle: what is written to the terminal."""
    import sqlite3

    run = new_run()
    tracker = track(uri, flush_timeout=0.5)
    tracker.run_start(run)
    with sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=10) as database:
        database.execute("drop table metrics")
    epoch(run, tracker, 1)
    finish(run, tracker)
    assert "Traceback" not in capfd.readouterr().err


def test_black_hole(black_hole, new_run, track, epoch, unsent, caplog):
    """A server that accepts and never answers: start and end wait for their patience, hooks for nothing. Requests take an hour here."""
    run = new_run()
    tracker = track(black_hole, timeout=HOUR, patience=0.2, flush_timeout=0.2)
    tracker.run_start(run)
    for number in range(1, 31):
        epoch(run, tracker, number)
    finish(run, tracker)
    assert epochs(unsent(run)) == list(range(1, 31))
    assert len(warnings(caplog)) == 1


def test_the_log_is_there_at_once(closed_port, new_run, track, epoch, unsent):
    """During an outage each fact is in the file before the next one, so that SIGKILL loses nothing."""
    run = new_run()
    tracker = track(f"http://127.0.0.1:{closed_port}", flush_timeout=0.1)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    assert epochs(unsent(run)) == [1]
    finish(run, tracker)


def test_server_comes_back(gate, server, new_run, track, epoch, unsent, stored, caplog):
    """An outage in the middle: everything arrives, once, and nothing is left in the folder."""
    run = new_run()
    tracker = track(gate.uri)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    until(lambda: not unsent(run))
    gate.shut()
    epoch(run, tracker, 2)
    until(lambda: warnings(caplog))
    gate.open()
    epoch(run, tracker, 3)
    finish(run, tracker)
    _, points = stored(run, server.uri)
    assert points["train/loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert is_sent(run.folder)
    assert len(warnings(caplog)) == 1


def test_run_resumed_after_an_outage_sends_what_was_left(gate, server, new_run, track, epoch, unsent, stored):
    """Epochs 3 and 4 unsent, resumed from a checkpoint of epoch 3 with the server back: one point per epoch."""
    run = new_run()
    tracker = track(gate.uri, flush_timeout=0.5)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    epoch(run, tracker, 2)
    until(lambda: not unsent(run))
    gate.shut()
    epoch(run, tracker, 3)
    epoch(run, tracker, 4)
    finish(run, tracker, "interrupted")
    assert epochs(unsent(run)) == [3, 4]

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
    assert is_sent(run.folder)


def test_sending_later(closed_port, uri, new_run, track, epoch):
    """A run that never reached its store is sent later, elsewhere even: whole, with its own times."""
    run = new_run(config={"seed": 5})
    tracker = track(f"http://127.0.0.1:{closed_port}", flush_timeout=0.1)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    epoch(run, tracker, 2)
    finish(run, tracker)
    assert send(run.folder, TrackingConfig(uri=uri, interval=0.05)) == []
    assert is_sent(run.folder)
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("bpfree").experiment_id])[0]
    assert found.info.status == "FINISHED"
    assert found.info.start_time == next(run_log(run))["time"]
    assert found.data.params == {"seed": "5"}
    assert [p.step for p in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2]


def test_server_dies(server, new_run, track, epoch, unsent, caplog):
    """Killed between epochs 2 and 3: no exception, what follows is left to send, what came before is not.

    It is the last test here, because the next one that needs a server has to start another.
    """
    run = new_run()
    tracker = track(server.uri, flush_timeout=3.0)
    tracker.run_start(run)
    epoch(run, tracker, 1)
    epoch(run, tracker, 2)
    until(lambda: not unsent(run))
    server.kill()
    epoch(run, tracker, 3)
    until(lambda: warnings(caplog))
    epoch(run, tracker, 4)
    finish(run, tracker)
    assert epochs(unsent(run)) == [3, 4]
    assert len(warnings(caplog)) == 1
