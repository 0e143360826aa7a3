"""Trackers that write files. Oracles: the module csv and TensorBoard's own reader, against what ``read_run`` has of the log."""

from __future__ import annotations

import csv
import shutil
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Child
from killed_runs import kill
from study_kit import call

from bpfree import BpfreeError, Run, UsageError, hookimpl, runner
from bpfree.config import parse_words, resolve
from bpfree.record.folder import Cursor, RunFolder, read_run
from bpfree.record.recorder import Recorder
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.file_trackers import CSVTracker, FileTracker, TensorBoardTracker
from bpfree.tracking.follower import Follower
from bpfree.tracking.sending import Tracking, complete, is_sent, send

TIMES = ("seconds", "processor_seconds", "samples_per_second", "step_ms")
WORDS = ["rule=dfa", "network.width=16", "task=digits", "device=cpu", "tracking.system=false", "pictures.every=0", "log_interval=0.001"]

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    EventAccumulator = None

Points = dict[tuple[str, str], dict[int, float]]
FILES = {"csv": "metrics.csv", "tensorboard": "tensorboard/events.out.tfevents.bpfree"}
both = pytest.mark.parametrize(
    "name",
    ["csv", pytest.param("tensorboard", marks=pytest.mark.skipif(EventAccumulator is None, reason="TensorBoard is not installed"))],
)


def csv_points(place: Path) -> Points:
    """By kind and name; each step is there once."""
    points: Points = {}
    with (place / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            steps = points.setdefault((row["kind"], row["name"]), {})
            assert int(row["step"]) not in steps, row
            assert int(row["time"]) > 1e12
            steps[int(row["step"])] = float(row["value"])
    return points


def tensorboard_points(place: Path) -> Points:
    """By tag, in the place of kind and name; each step is there once."""
    reader = EventAccumulator(str(place / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    points: Points = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        points["", tag] = {event.step: event.value for event in events}
        assert len(points["", tag]) == len(events), tag
    return points


READ: dict[str, Callable[[Path], Points]] = {"csv": csv_points, "tensorboard": tensorboard_points}


def as_written(name: str, value: float) -> float:
    """TensorBoard keeps scalars in single precision."""
    return float(struct.unpack("f", struct.pack("f", value))[0]) if name == "tensorboard" else value


def assert_as_recorded(name: str, place: Path, run: Run, *, timed: bool = True) -> None:
    """All of the history and the result, and nothing that is not of the log.

    Not ``timed``: an epoch may have been computed again, and one whose seconds did not increase (the clock charges measured steps later,
    and never runs back) has no speed, though the first try may have had one.
    """
    points = READ[name](place)
    epoch, end = ("", "") if name == "tensorboard" else ("epoch", "end")
    expected = Counter[tuple[str, str, int]]()
    for kind, step, metrics in [*((epoch, int(metrics["epoch"]), metrics) for metrics in run.history), (end, run.epoch, run.result)]:
        for key, value in metrics.items():
            expected[kind, key, step] += 1
            assert step in points[kind, key]
            if timed or key not in TIMES:
                assert points[kind, key][step] == pytest.approx(as_written(name, value), rel=0, abs=0, nan_ok=True), (key, step)
    written = Counter((kind, key, step) for (kind, key), steps in points.items() for step in steps)
    others = {(kind, key) for kind, key, _ in written - expected}
    assert all(kind == "progress" or key.startswith("step/") or (key in TIMES and not timed) for kind, key in others), others
    assert any(kind == "progress" or key.startswith("step/") for kind, key in others)


def config_for(folder: Path, *words: str) -> Any:
    return resolve(parse_words([*WORDS, f"output={folder / 'runs'}", *words]))


@both
def test_a_run_is_there_as_it_was(tmp_path: Path, name: str) -> None:
    run = runner.run(config_for(tmp_path, "budget.epochs=2", f"tracking.to=[{name}]"), quiet=True)
    assert run.folder is not None
    assert_as_recorded(name, run.folder, read_run(run.folder))
    assert is_sent(run.folder)
    assert not (tmp_path / "mlflow.db").exists()
    assert read_run(run.folder).tracking == run.tracking == {}  # nothing of it is part of the record


@both
def test_a_run_goes_on_in_the_same_file(tmp_path: Path, name: str) -> None:
    run = runner.run(config_for(tmp_path, "budget.epochs=2", f"tracking.to=[{name}]"), quiet=True)
    longer = runner.resume(str(run.folder), changes=parse_words(["budget.epochs=4"]), quiet=True)
    assert run.folder is not None
    seen = read_run(run.folder)
    assert [metrics["epoch"] for metrics in seen.history] == [1, 2, 3, 4]
    points = READ[name](run.folder)
    for key in ("test/accuracy", "val/accuracy"):
        for step, result in ((2, run), (4, longer)):
            kind = "" if name == "tensorboard" else "end" if key.startswith("test") else "epoch"
            value = result.result[key] if key in result.result else result.history[step - 1][key]
            assert points[kind, key][step] == as_written(name, value)


class KillInEpoch:
    """Ends the process when the log has the second epoch, of which there is no checkpoint yet: it is computed again."""

    def __init__(self, point: str, followers: list[Follower]) -> None:
        self._point, self._followers = point, followers

    @hookimpl
    def epoch_end(self, metrics: dict[str, float]) -> None:
        if self._point == "noted" or metrics["epoch"] < 2:
            return
        while self._point == "sent" and any(follower.cursor.offset < follower._log.size for follower in self._followers):
            for follower in self._followers:
                follower._wake.set()
        kill()


def be_killed(folder: Path, point: str, *words: str) -> None:
    """The whole life of a process."""
    followers, begin, keep = list[Follower](), Follower.start, Follower._keep

    def starting(self: Follower, patience: float) -> bool:
        followers.append(self)
        return begin(self, patience)

    def kill_before(self: Follower) -> None:
        """The file has it, the place in the log is not noted; of two trackers, which are not in step, for the one that is looked at."""
        if point == "noted" and self._tracker.name == "csv" and "progress" in self.cursor.known.get("last", {}):
            kill()
        keep(self)

    Follower.start, Follower._keep = starting, kill_before  # type: ignore[method-assign]
    config = resolve(parse_words([f"output={folder / 'runs'}", *words]))
    runner.run(config, run_id="killed", quiet=True, observers=[KillInEpoch(point, followers)])


@pytest.fixture
def killed(tmp_path: Path) -> Callable[..., Path]:
    """Runs in a process of its own that is killed at some point."""

    def run(point: str, *words: str) -> Path:
        process = Child(be_killed, tmp_path, point, *WORDS, *words)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        return tmp_path / "runs" / "killed"

    return run


def go_on(place: Path, *words: str) -> Run:
    if (place / "checkpoints" / "last.pt").is_file():
        return runner.resume(str(place), quiet=True)
    return runner.run(resolve(parse_words([*WORDS, f"output={place.parent}", *words])), run_id=place.name, quiet=True)


NAMES = ["csv"] if EventAccumulator is None else ["csv", "tensorboard"]
TO = f"tracking.to=[{','.join(NAMES)}]"


@pytest.mark.time_dependent
@pytest.mark.parametrize("point", ["sent", "noted"])
def test_a_run_that_was_killed_and_goes_on_has_each_point_once(killed: Callable[..., Path], point: str) -> None:
    """The epoch that is computed again has the same numbers, but for times; the readers refuse a step that is there twice."""
    words = ("budget.epochs=3", TO, "tracking.interval=0.02")
    place = killed(point, *words)
    assert csv_points(place)
    assert go_on(place, *words).status == "finished"
    seen = read_run(place)
    assert [metrics["epoch"] for metrics in seen.history] == [1, 2, 3]
    for name in NAMES:
        assert_as_recorded(name, place, seen, timed=False)


@pytest.mark.time_dependent
def test_what_a_killed_run_has_not_sent_is_sent_later(killed: Callable[..., Path]) -> None:
    """``bpfree track send`` reads on: the run ends as interrupted, with what it had; a second call changes no byte."""
    place = killed("unsent", "budget.epochs=3", TO, "tracking.interval=100")
    assert complete(place)  # a run without an end may still train: nothing is done
    assert call("track", "send", str(place)) == 0
    seen = read_run(place)
    assert (seen.status, seen.epoch) == ("interrupted", 2)
    for name in NAMES:
        assert_as_recorded(name, place, seen)
    content = [(place / FILES[name]).read_bytes() for name in NAMES]
    assert call("track", "send", str(place)) == 0
    assert [(place / FILES[name]).read_bytes() for name in NAMES] == content


# --- without training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(new_run: Callable[..., Run], epoch: Callable[[Run, Any, int], dict[str, float]]) -> Callable[..., Run]:
    """A run of three epochs by hand."""

    def record(*trackers: Any, name: str = "by-hand", **options: Any) -> Run:
        run = new_run(name)
        config = TrackingConfig(to=list(trackers), system=False, **options)
        made = {"csv": CSVTracker, "tensorboard": TensorBoardTracker}
        recorder = Recorder([Tracking(config, {each: made[each] for each in trackers})])
        run.config = {"tracking.to": list(trackers), "tracking.folder": options.get("folder")}
        recorder.run_start(run)
        for number in (1, 2, 3):
            recorder.progress(run, {"step": 10.0 * number, "rule/loss": 0.1 * number})
            epoch(run, recorder, number)
        run.status, run.result = "finished", {"test/accuracy": 0.1, 'odd, "name"': float("inf")}
        recorder.run_end(run)
        return run

    return record


@both
def test_a_file_that_is_gone_or_cut_is_written_again(recorded: Callable[..., Run], name: str) -> None:
    """Also where the note of how far it was is gone, or damaged."""
    place = recorded(name).folder or Path()
    path, cursor = place / FILES[name], RunFolder(place).cursor(name)
    content = path.read_bytes()
    assert_as_recorded(name, place, read_run(place))
    spoilers: list[Callable[[], Any]] = [
        path.unlink,
        lambda: path.write_bytes(content[:100]),
        cursor.unlink,
        lambda: cursor.write_text("{damaged"),
    ]
    for spoil in spoilers:
        spoil()
        assert send(place, TrackingConfig(to=[name])) == []
        assert path.read_bytes() == content


@both
def test_an_outage_costs_a_warning_and_is_made_up_for(
    recorded: Callable[..., Run], name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full in the middle of a line."""

    def half(self: FileTracker, point: Any) -> bytes:
        with self.path.open("ab") as file:
            file.write(b"half a l")
        raise OSError(28, "No space left on device")

    kind = {"csv": CSVTracker, "tensorboard": TensorBoardTracker}[name]
    with monkeypatch.context() as patch:
        patch.setattr(kind, "encoded", half)
        place = recorded(name, flush_timeout=0.2).folder or Path()
    assert [record.getMessage().count("No space left") for record in caplog.records if record.levelname == "WARNING"] == [1]
    assert not is_sent(place)
    assert complete(place)
    assert_as_recorded(name, place, read_run(place))


@pytest.mark.parametrize("sends", [complete, lambda place: send(place, TrackingConfig(to=["csv"]))], ids=["resume", "track send"])
def test_a_note_that_could_not_be_written_as_a_whole_is_removed(recorded: Callable[..., Run], sends: Callable[[Path], Any]) -> None:
    """The folder became read-only between the two ends of the write, so that the part could not be removed then."""
    place = recorded("csv").folder or Path()
    part = place / ".sent-csv.json-0123abcd"
    part.touch()
    sends(place)
    assert not part.exists()


def test_several_trackers_of_a_run_beside_each_other(recorded: Callable[..., Run]) -> None:
    """Each has a note of its own; one that is added later gets all of the run."""
    place = recorded("csv").folder or Path()
    assert [path.name for path in RunFolder(place).cursors()] == ["sent-csv.json"]
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    assert send(place, TrackingConfig(to=["csv", "tensorboard"])) == []
    assert [path.name for path in RunFolder(place).cursors()] == ["sent-csv.json", "sent-tensorboard.json"]
    for name in ("csv", "tensorboard"):
        assert_as_recorded(name, place, read_run(place))


def test_a_chosen_folder_has_one_for_each_run(recorded: Callable[..., Run], tmp_path: Path) -> None:
    """A relative one is where the output folder is, wherever the process is."""
    for name in ("one", "other"):
        run = recorded("csv", name=name, folder="tables")
        assert_as_recorded("csv", tmp_path / "tables" / run.id, read_run(run.folder or ""))
        assert not (run.folder or Path()).joinpath("metrics.csv").exists()
    assert len(list((tmp_path / "tables").iterdir())) == 2


def test_a_run_that_is_moved_keeps_its_file_and_a_copy_has_its_own(recorded: Callable[..., Run], tmp_path: Path) -> None:
    place = recorded("csv").folder or Path()
    content = (place / "metrics.csv").read_bytes()
    copied = tmp_path / "runs" / "copied"
    shutil.copytree(place, copied)
    assert send(copied, TrackingConfig(to=["csv"])) == []
    assert (copied / "metrics.csv").read_bytes() == content
    moved = place.rename(tmp_path / "moved")
    before = Cursor.read(moved / "sent-csv.json").offset
    assert send(moved, TrackingConfig(to=["csv"])) == []
    assert (Cursor.read(moved / "sent-csv.json").offset, (moved / "metrics.csv").read_bytes()) == (before, content)


def test_lines_of_somebody_elses_making_are_left_out(recorded: Callable[..., Run]) -> None:
    """And noted, with the reason; what comes after them arrives."""
    place = recorded("csv").folder or Path()
    with RunFolder(place).log as log:
        log.append("epoch", metrics={"a": 1})
        log.append("result", metrics={"train/accuracy": 0.25})
    refused = send(place, TrackingConfig(to=["csv"]))
    assert refused is not None
    assert [(each["event"], each["reason"]) for each in refused] == [("epoch", "the event is malformed")]
    assert csv_points(place)["result", "train/accuracy"] == {3: 0.25}


def test_a_library_that_is_missing(recorded: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A warning, as for any store that is away; an error if the tracker is required, or asked for afterwards."""
    for module in list(sys.modules):
        if module.split(".")[0] == "tensorboard":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    place = recorded("csv", "tensorboard").folder or Path()
    assert "pip install 'bpfree[tensorboard]'" in caplog.text
    assert_as_recorded("csv", place, read_run(place))
    with pytest.raises(BpfreeError, match=r"bpfree\[tensorboard\]"):
        send(place, TrackingConfig(to=["tensorboard"]))
    with pytest.raises(BpfreeError, match=r"bpfree\[tensorboard\]"):
        recorded("tensorboard", name="strict", required=True)


def test_names_that_nobody_registers_are_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)no-such.*tracking\.to.*csv, mlflow, tensorboard"):
        config_for(tmp_path, "tracking.to=[csv, no-such]")
    assert config_for(tmp_path, "tracking.to=[no-such]", "tracking.enabled=false").settings.tracking.to == ["no-such"]


def test_no_tracker_at_all(tmp_path: Path) -> None:
    run = runner.run(config_for(tmp_path, "budget.epochs=1", "tracking.to=[csv]", "tracking.enabled=false"), quiet=True)
    assert run.folder is not None
    assert not list(run.folder.glob("sent-*"))
    assert not (run.folder / "metrics.csv").exists()
