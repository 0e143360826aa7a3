"""The sending thread against a store that fails on command. Oracle: a list of what a perfect store would hold."""

from __future__ import annotations

import json
import threading
import time

from bpfree.tracking.events import SPOOL_NAME, Artifact, End, Metrics, Opening, Spool, Tags
from bpfree.tracking.sender import Sender
from bpfree.tracking.store import RefusedError


class FakeStore:
    """Takes events while ``allowed`` lasts; refuses the tag ``bad``; knows ``known`` steps."""

    uri = shown = "fake://store"

    def __init__(self, known: dict[str, int] | None = None) -> None:
        self.allowed = 10**9
        self.calls: list[list[object]] = []
        self.attempts = 0
        self.known = known or {}

    def probe(self) -> None: ...

    def open(self, opening: Opening, *, search: bool) -> bool:
        opening.run_id = "run"
        return bool(self.known)

    def last_step(self, run_id: str, key: str) -> int:
        return self.known.get(key, -1)

    def send(self, run_id: str, events: list[object]) -> None:
        self.attempts += 1
        if self.allowed <= 0:
            raise ConnectionError("away")
        if any(isinstance(event, Tags) and "bad" in event.values for event in events):
            raise RefusedError("no such tag")
        self.allowed -= 1
        self.calls.append(list(events))

    def steps(self) -> list[int]:
        return [event.step for call in self.calls for event in call if isinstance(event, Metrics) and event.values]


def metric(step: int) -> Metrics:
    return Metrics(1000 + step, step, {"loss": float(step)})


def sender(store: FakeStore, folder, **options) -> Sender:
    return Sender(store, Opening("fake://store", "e", "n", 0), Spool(folder / SPOOL_NAME), interval=0.02, **options)  # type: ignore[arg-type]


def spooled(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / SPOOL_NAME).read_text().splitlines()]


def until(condition, seconds=10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_order_and_size_of_batches(tmp_path):
    """All, once, in order; metrics and tags together up to 1000, files alone, the end last."""
    store, events = FakeStore(), [Metrics(0, step, {f"k{i}": 0.0 for i in range(400)}) for step in range(5)]
    thread = sender(store, tmp_path)
    everything = [*events, Tags({"a": "b"}), Artifact("x", ""), metric(6), End("FINISHED", 1)]
    for event in everything:
        thread.put(event)
    thread.start(5)
    assert thread.finish(5)
    assert [event for call in store.calls for event in call] == everything
    assert [len(call) for call in store.calls] == [2, 2, 2, 1, 1, 1]
    assert not (tmp_path / SPOOL_NAME).exists()


def test_spool_after_a_store_that_came_and_went(tmp_path):
    """Away, back for a part, away again: the file holds exactly what is unsent, with what came later."""
    store = FakeStore()
    store.allowed = 0
    thread = sender(store, tmp_path)
    for name in "abcd":  # four calls
        thread.put(Artifact(name, ""))
    thread.start(5)
    until(lambda: (tmp_path / SPOOL_NAME).exists() and len(spooled(tmp_path)) == 5)
    thread.put(Artifact("e", ""))  # as many come as go: the file is as long as before, but another one
    thread.put(Artifact("f", ""))
    store.allowed = 2
    until(lambda: [line.get("path") for line in spooled(tmp_path)] == [None, "c", "d", "e", "f"])
    thread.put(Artifact("g", ""))
    until(lambda: [line.get("path") for line in spooled(tmp_path)] == [None, "c", "d", "e", "f", "g"])
    assert not thread.finish(1)
    assert [line.get("path") for line in spooled(tmp_path)] == [None, "c", "d", "e", "f", "g"]
    assert [event.path for call in store.calls for event in call] == ["a", "b"]


def test_one_last_attempt_if_it_was_away_before_the_end(tmp_path):
    """The end does not wait for a store that is known to be away, however long it may."""
    store = FakeStore()
    store.allowed = 0
    thread = sender(store, tmp_path)
    thread.put(metric(1))
    thread.start(5)
    until(lambda: store.attempts >= 2)
    began = time.monotonic()
    assert not thread.finish(30)
    assert time.monotonic() - began < 5


def test_patience_if_it_went_away_at_the_end(tmp_path):
    """A short outage at the very end is waited for."""
    store = FakeStore()
    thread = Sender(store, Opening("u", "e", "n", 0), Spool(tmp_path / SPOOL_NAME), interval=5.0)  # type: ignore[arg-type]
    thread.start(5)  # the next attempt would come in five seconds: the first failure is the end's
    store.allowed = 0
    thread.put(metric(1))
    timer = threading.Timer(0.3, lambda: setattr(store, "allowed", 10))
    timer.start()
    assert thread.finish(20)
    assert store.attempts >= 2
    timer.join()


def test_refused_events_are_put_aside(tmp_path, caplog):
    """The others of the batch arrive; the refused one lies in the spool with its reason and is not read back."""
    store = FakeStore()
    thread = sender(store, tmp_path)
    for event in (metric(1), Tags({"bad": "x"}), metric(2)):
        thread.put(event)
    thread.start(5)
    assert thread.finish(5)
    assert store.steps() == [1, 2]
    assert spooled(tmp_path)[1] == {"event": "tags", "values": {"bad": "x"}, "rejected": "no such tag"}
    assert Spool(tmp_path / SPOOL_NAME).read()[1] == []
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_a_run_that_goes_on_sends_no_step_twice(tmp_path):
    """Known to the store up to 3; left unsent 2 to 5; computed again from 4 on, in the same batch and in a later one."""
    store = FakeStore(known={"loss": 3})
    thread = sender(store, tmp_path, again=True, earlier=[metric(step) for step in (2, 3, 4, 5)])
    thread.put(metric(4))
    thread.start(5)
    for step in (5, 6, 7):
        thread.put(metric(step))
    assert thread.finish(5)
    assert store.steps() == [4, 5, 6, 7]


def test_spool_round_trip(tmp_path):
    """What is written is what is read, non-finite numbers included; a line cut off by a crash is left out."""
    spool = Spool(tmp_path / SPOOL_NAME)
    opening = Opening("u", "e", "n", 5, {"t": "1"}, {"p": "2"}, ("digits", "abc"), "run")
    events = [Metrics(1, 2, {"a": float("inf"), "b": 0.5}), Tags({"x": "é"}), Artifact("/p", "f"), End("KILLED", 3)]
    spool.keep(opening, events, whole=True)
    with (tmp_path / SPOOL_NAME).open("a") as file:
        file.write('{"event": "metr')
    assert Spool(tmp_path / SPOOL_NAME).read() == (opening, events)
