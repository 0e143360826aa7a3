"""The thread that reads a run's log, against a store that fails on command. Oracle: a list of what a perfect store would hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from bpfree.record.folder import Cursor, RunFolder
from bpfree.record.log import Event, EventLog
from bpfree.run import Run
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.follower import Follower
from bpfree.tracking.tracker import RefusedError, Tracker

pytestmark = pytest.mark.time_dependent
HOUR = 3600.0
"""Longer than a test may take: no one waits for it in vain."""


class FakeSink(Tracker):
    """Takes batches while ``allowed`` lasts, but not for the next ``away`` attempts; refuses events that are ``bad``."""

    name, shown = "fake", "fake://store"

    def __init__(self, folder: Path) -> None:
        super().__init__(Run("id", "name", folder=folder), TrackingConfig())
        self.allowed, self.away, self.attempts, self.knows = 10**9, 0, 0, True
        self.batches: list[list[Event]] = []
        self.refuses = False

    def holds_run(self) -> bool:
        return self.knows

    def open(self, run: Run, began: int, seen: Sequence[Event], again: bool) -> bool:
        if self.refuses:
            raise RefusedError("never")
        self.known["run_id"] = "run"
        return self.knows

    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        self.attempts += 1
        if self.allowed <= 0 or self.away > 0:
            self.away -= 1
            raise ConnectionError("away")
        self.allowed -= 1
        self.batches.append([event for event in events if "bad" not in event])
        return [(event, "no such thing") for event in events if "bad" in event]

    @property
    def sent(self) -> list[Any]:
        return [event.get("number", event["event"]) for batch in self.batches for event in batch]


def begun(folder: Path) -> EventLog:
    log = RunFolder(folder).log
    log.append("begin", format=2, id="id", name="name", config={}, tags={}, total_epochs=1, resumed=False, epoch=0)
    return log


def follower(sink: FakeSink, *, interval: float = 0.02) -> Follower:
    return Follower(sink, interval=interval)


def test_everything_arrives_once_and_in_order(tmp_path: Path) -> None:
    """More than a batch, some before the thread begins, some after; the next reader has nothing to send."""
    sink, log = FakeSink(tmp_path), begun(tmp_path)
    for number in range(700):
        log.append("metrics", number=number)
    reader = follower(sink)
    assert reader.start(HOUR)
    for number in range(700, 900):
        log.append("metrics", number=number)
    assert reader.finish(HOUR)
    assert sink.sent == ["begin", *range(900)]
    assert Cursor.read(tmp_path / "sent-fake.json").offset == log.size
    again = follower(sink)
    again.start(HOUR)
    assert again.finish(HOUR)
    assert sink.sent == ["begin", *range(900)]


def test_a_store_that_comes_and_goes(tmp_path: Path) -> None:
    """Whoever reads on begins where the store went away."""
    sink, log = FakeSink(tmp_path), begun(tmp_path)
    sink.allowed = 1
    reader = follower(sink)
    reader.start(HOUR)
    log.append("metrics", number=1)
    until(lambda: sink.attempts > 1)
    log.append("metrics", number=2)
    assert not reader.finish(HOUR)
    assert sink.sent == ["begin"]
    sink.allowed = 10
    reader = follower(sink)
    reader.start(HOUR)
    assert reader.finish(HOUR)
    assert sink.sent == ["begin", 1, 2]


def test_one_last_attempt_if_it_was_away_before_the_end(tmp_path: Path) -> None:
    """The end does not wait for a store that is known to be away, however long it may: ``finish`` would take an hour."""
    sink, _ = FakeSink(tmp_path), begun(tmp_path)
    sink.allowed = 0
    reader = follower(sink)
    reader.start(HOUR)
    until(lambda: sink.attempts >= 2)
    assert not reader.finish(HOUR)


def test_patience_if_it_went_away_at_the_end(tmp_path: Path) -> None:
    """A short outage at the very end is waited for."""
    sink, log = FakeSink(tmp_path), begun(tmp_path)
    reader = follower(sink, interval=3600.0)
    reader.start(HOUR)  # the next attempt would come in an hour: the first failure is the end's
    sink.away = 1
    log.append("metrics", number=1)
    assert reader.finish(HOUR)
    assert sink.sent == ["begin", 1]
    assert sink.attempts == 3


def test_what_is_refused_is_noted(tmp_path: Path, caplog: Any) -> None:
    """The others arrive; what the store refuses, and lines that cannot be read, are noted with the reason, and told once."""
    sink, log = FakeSink(tmp_path), begun(tmp_path)
    log.append("metrics", number=1)
    log.append("metrics", bad=True)
    log.path.write_bytes(log.path.read_bytes() + b"{damaged\n")
    log.append("metrics", number=2)
    reader = follower(sink)
    reader.start(HOUR)
    assert reader.finish(HOUR)
    assert [number for number in sink.sent if number != "unreadable"] == ["begin", 1, 2]
    refused = Cursor.read(tmp_path / "sent-fake.json").refused
    assert [(each["event"], each["reason"]) for each in refused] == [("metrics", "no such thing"), ("unreadable", "it cannot be read")]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_a_store_that_never_takes_the_run(tmp_path: Path) -> None:
    """It is not asked for ever: ``finish`` would take an hour."""
    sink, _ = FakeSink(tmp_path), begun(tmp_path)
    sink.refuses = True
    reader = follower(sink)
    reader.start(0.0)
    assert not reader.finish(HOUR)
    assert reader.reason == "never"


def test_a_store_that_lost_the_run_gets_all_of_it(tmp_path: Path) -> None:
    sink, log = FakeSink(tmp_path), begun(tmp_path)
    log.append("metrics", number=1)
    reader = follower(sink)
    reader.start(HOUR)
    assert reader.finish(HOUR)
    sink.knows = False
    log.append("metrics", number=2)
    reader = follower(sink)
    reader.start(HOUR)
    assert reader.finish(HOUR)
    assert sink.sent == ["begin", 1, "begin", 1, 2]


def test_another_store_gets_all_of_it(tmp_path: Path) -> None:
    sink, log = FakeSink(tmp_path), begun(tmp_path)
    log.append("metrics", number=1)
    for name in ("one", "other"):
        sink.shown = f"fake://{name}"
        reader = follower(sink)
        reader.start(HOUR)
        assert reader.finish(HOUR)
    assert sink.sent == ["begin", 1, "begin", 1]


def test_ends_of_sessions_that_were_resumed(tmp_path: Path) -> None:
    """Only the last end ends the run."""
    sink, log = FakeSink(tmp_path), begun(tmp_path)
    log.append("end", status="interrupted")
    begun_again = {"format": 2, "id": "id", "name": "name", "config": {}, "tags": {}, "total_epochs": 1, "resumed": True, "epoch": 0}
    log.append("begin", **begun_again)
    log.append("end", status="finished")
    reader = follower(sink)
    reader.start(HOUR)
    assert reader.finish(HOUR)
    assert sink.sent == ["begin", "stopped", "begin", "end"]
