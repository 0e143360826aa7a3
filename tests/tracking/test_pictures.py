"""Pictures of what rules learn: which epochs, which pixels, which files; and that nothing else notices."""

from __future__ import annotations

import errno
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_time import Time
from PIL import Image
from torch import Tensor, nn

import bpfree
from bpfree import Phase, Run, Task, hookimpl, runner
from bpfree.baselines import Backprop, Frozen
from bpfree.config import parse_words, resolve
from bpfree.network import MLPConfig, mlp
from bpfree.record import recorder
from bpfree.record.folder import RunFolder, read_run
from bpfree.tracking.config import PicturesConfig
from bpfree.tracking.pictures import Pictures, grid, is_due
from bpfree.training.config import BudgetConfig, TrainConfig
from bpfree.training.trainer import Trainer

ONE = {"rule": "backprop", "network.depth": 2, "network.width": 6, "device": "cpu", "threads": 1}


class Drawn(Backprop):
    """Draws what it is given."""

    shown: Any = None

    def pictures(self, count: int = 64) -> dict[str, Tensor]:
        return self.shown(self, count) if callable(self.shown) else self.shown  # type: ignore[no-any-return]


def rule_of(shown: Any, spec: bpfree.TaskSpec, kind: type[Drawn] = Drawn) -> Drawn:
    torch.manual_seed(0)
    rule = kind(mlp(spec), spec)
    rule.shown = shown
    return rule


def files(folder: Path | None) -> list[str]:
    assert folder is not None
    return sorted(path.relative_to(folder / "pictures").as_posix() for path in folder.rglob("*.png") if "pictures" in path.parts)


# --- which epochs ---------------------------------------------------------------------------------------------------


def test_epochs_thin_out() -> None:
    """Oracle: counted by hand."""
    due = [epoch for epoch in range(1, 501) if is_due(epoch, None)]
    assert due == [*range(1, 21), *range(30, 201, 10), 300, 400, 500]
    assert [epoch for epoch in range(1, 3001) if is_due(epoch, None) and epoch > 500] == [*range(600, 2001, 100), 3000]


@pytest.mark.parametrize(("every", "wanted"), [(None, [*range(1, 21), 23]), (1, [*range(1, 24)]), (10, [10, 20, 23]), (0, [])])
def test_the_last_epoch_is_drawn(every: int | None, wanted: list[int]) -> None:
    assert [epoch for epoch in range(1, 24) if is_due(epoch, every, total=23)] == wanted


# --- which pixels ---------------------------------------------------------------------------------------------------


def test_a_grid() -> None:
    """Each field by its own largest absolute value, zero at 128, enlarged by whole pixels, row by row; what is missing is white."""
    fields = torch.tensor([[-2.0, 0.0], [1.0, 2.0]]).expand(5, 1, 2, 2) * torch.tensor([1.0, 1e-9, 1e9, 0.0, math.inf]).view(5, 1, 1, 1)
    pixels = grid(fields)
    factor, gap = 131, 4  # 3 columns: round((800 / 3 - 4) / 2)
    assert pixels.shape == (2 * (2 * factor + gap) + gap, 3 * (2 * factor + gap) + gap)
    step = 2 * factor + gap
    tiles = [pixels[y : y + 2 * factor, x : x + 2 * factor] for y in (gap, gap + step) for x in (gap, gap + step, gap + 2 * step)]
    enlarged = [[tile[:factor, :factor], tile[:factor, factor:], tile[factor:, :factor], tile[factor:, factor:]] for tile in tiles]
    shown = [[sorted({int(value) for value in np.unique(part)}) for part in tile] for tile in enlarged]
    assert shown[:3] == [[[0], [128], [191], [255]]] * 3
    assert shown[3] == [[128]] * 4
    assert shown[4] == [[128]] * 4  # a field with infinite values in it: those are zero, and so is nan
    assert shown[5] == [[255]] * 4
    assert (pixels[:gap] == 255).all()
    assert (pixels[:, gap + 2 * factor : step + gap] == 255).all()


@pytest.mark.parametrize(("count", "size"), [(64, 28), (64, 3), (10, 8), (1, 28), (16, 32), (64, 8)])
def test_grids_are_of_a_size_to_look_at(count: int, size: int) -> None:
    pixels = grid(torch.randn(count, 3, size, size))
    assert pixels.shape[2] == 3
    assert 600 <= pixels.shape[1] <= 1000
    assert 500 <= pixels.shape[0] <= 1000


def test_colours_keep_their_places() -> None:
    fields = torch.zeros(1, 3, 1, 2)
    fields[0, 0, 0, 0], fields[0, 2, 0, 1] = 1.0, -1.0
    pixels = grid(fields)
    assert pixels[10, 10].tolist() == [255, 128, 128]
    assert pixels[10, -10].tolist() == [128, 128, 0]


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 9), (4, 1, 0, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        grid(torch.zeros(shape))


# --- which files ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_them(workplace: Path) -> None:
    """Blocks by name, each epoch; readable, grey; in the run's artifacts and in its record. The first block's pixels are its weights."""
    run = runner.run(resolve({**ONE, "budget.epochs": 2, "tracking.enabled": False, "pictures.count": 5}), quiet=True)
    assert files(run.folder) == [f"b{block}/epoch-000{epoch}.png" for block in (1, 2) for epoch in (1, 2)]
    assert {name for name in run.artifacts if name.startswith("pictures/")} == {f"pictures/{name}" for name in files(run.folder)}
    assert run.folder is not None
    assert read_run(run.folder).artifacts["pictures/b1/epoch-0002.png"] == run.folder / "pictures/b1/epoch-0002.png"
    weights = torch.load(run.folder / "checkpoints" / "last.pt", weights_only=True)["weights"]["network.blocks.b1.1.weight"]
    with Image.open(run.folder / "pictures/b1/epoch-0002.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), grid(weights[:5].view(5, 1, 8, 8)))


@pytest.mark.parametrize("settings", [{"pictures.every": 0}, {"rule": "linear"}])
def test_nothing_to_draw(workplace: Path, settings: dict[str, Any]) -> None:
    settings = {"rule": "dfa", "budget.epochs": 1, "tracking.enabled": False, "device": "cpu", **settings}
    run = runner.run(resolve(settings), quiet=True)
    assert run.folder is not None
    assert not (run.folder / "pictures").exists()


class Readout(Backprop):
    """A phase in which all learns, then two epochs of the readout alone."""

    def phases(self, budget: bpfree.Budget) -> list[Phase]:
        return [Phase("all", epochs=2), Phase("readout", epochs=2, groups=("readout",))]


@pytest.mark.parametrize(("kind", "epochs"), [(Readout, [1, 2]), (Frozen, [1])])
def test_only_what_has_changed_is_drawn(
    digits: Task, device: torch.device, tmp_path: Path, kind: type[bpfree.Rule], epochs: list[int]
) -> None:
    torch.manual_seed(0)
    rule = kind(mlp(digits.spec, MLPConfig(depth=1, width=4)), digits.spec)
    if kind is Frozen:
        rule.freeze_features()
    config = TrainConfig(budget=BudgetConfig(epochs=4), device=str(device))
    run = Trainer(rule, digits, config, folder=tmp_path, observers=[Pictures()]).fit()
    assert run.epoch == 4
    assert files(tmp_path) == [f"b1/epoch-{epoch:04d}.png" for epoch in epochs]


def test_a_rules_own_pictures(digits: Task, tmp_path: Path) -> None:
    """Any names, which become names of files; as many as are asked for; none is no file."""
    shown = {
        "feature maps/b1": torch.randn(3, 3, 5, 5),
        "../up": torch.randn(1, 1, 4, 6, dtype=torch.float64),
        "none": torch.empty(0, 1, 2, 2),
    }
    asked = []
    rule = rule_of(lambda rule, count: asked.append(count) or shown, digits.spec)
    run = Run("id", "name", folder=tmp_path / "run", epoch=12)
    Pictures(PicturesConfig(count=7)).epoch_end(run, rule)
    assert asked == [7]
    assert files(run.folder) == ["_up/epoch-0012.png", "feature_maps_b1/epoch-0012.png"]
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_run_that_goes_on_keeps_them(workplace: Path) -> None:
    first = runner.run(resolve({**ONE, "budget.epochs": 2, "tracking.enabled": False}), quiet=True)
    assert first.folder is not None
    (first.folder / "pictures" / "b1" / "epoch-0007.png").touch()  # of an epoch that it has not reached: no artifact
    second = runner.resume(str(first.folder), changes=parse_words(["budget.epochs=3", "pictures.count=4"]), quiet=True)
    drawn = {f"pictures/b{block}/epoch-000{epoch}.png" for block in (1, 2) for epoch in (1, 2, 3)}
    assert {name for name in second.artifacts if name.startswith("pictures/")} == drawn


def test_a_resumed_run_draws_again_only_what_has_changed(digits: Task, tmp_path: Path) -> None:
    rule = rule_of({"same": torch.eye(4).reshape(1, 1, 4, 4), "other": torch.ones(1, 1, 2, 2)}, digits.spec)
    run = Run("id", "name", folder=tmp_path, epoch=1)
    Pictures().epoch_end(run, rule)
    rule.shown["other"] = torch.zeros(1, 1, 2, 2)
    run.epoch, run.resumed = 2, True
    (tmp_path / "pictures" / "same" / ".epoch-0001.png-0123abcd").touch()  # of a write that could not end
    again = Pictures()
    again.run_start(run)
    assert not list((tmp_path / "pictures" / "same").glob(".*"))
    again.epoch_end(run, rule)
    assert files(tmp_path) == ["other/epoch-0001.png", "other/epoch-0002.png", "same/epoch-0001.png"]


def test_what_a_full_disk_refuses_is_written_later(
    digits: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rule = rule_of({"a": torch.eye(4).reshape(1, 1, 4, 4)}, digits.spec)
    run, pictures = Run("id", "name", folder=tmp_path, epoch=1), Pictures()
    pictures.run_start(run)

    def full(path: Path, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bpfree.tracking.pictures.replacing", full)
        pictures.epoch_end(run, rule)
        run.epoch, rule.shown["a"] = 2, torch.ones(1, 1, 4, 4)
        pictures.epoch_end(run, rule)
    assert not run.artifacts
    assert caplog.text.count("the run will try again") == 1
    pictures.run_end(run)
    assert files(tmp_path) == ["a/epoch-0001.png", "a/epoch-0002.png"]
    assert list(run.artifacts) == ["pictures/a/epoch-0001.png", "pictures/a/epoch-0002.png"]


# --- that nothing else notices --------------------------------------------------------------------------------------


def fitted(digits: Task, tmp_path: Path, observers: list[Any], rule: bpfree.Rule) -> tuple[Run, dict[str, Tensor], Tensor]:
    config = TrainConfig(budget=BudgetConfig(epochs=2), device="cpu")
    torch.manual_seed(5)
    trainer = Trainer(rule, digits, config, folder=tmp_path, observers=observers)
    states: list[Tensor] = []

    class Look:
        @hookimpl
        def run_end(self, run: Run) -> None:
            states.append(torch.get_rng_state())

    trainer._observers._manager.register(Look())
    run = trainer.fit()
    return run, {name: value.clone() for name, value in rule.state_dict().items()}, states[0]


def test_weights_and_random_state_are_those_of_a_run_without(digits: Task, tmp_path: Path) -> None:
    """Although the rule draws random numbers for its pictures, and is asked in eval mode."""
    modes = []

    def shown(rule: nn.Module, count: int) -> dict[str, Tensor]:
        modes.append((rule.training, torch.is_grad_enabled()))
        return {"noise": torch.randn(2, 1, 3, 3)}

    with_pictures = fitted(digits, tmp_path / "a", [Pictures()], rule_of(shown, digits.spec))
    without = fitted(digits, tmp_path / "b", [], rule_of(shown, digits.spec))
    assert files(tmp_path / "a") == ["noise/epoch-0001.png"]  # the same numbers again, and so no second picture
    assert modes == [(False, False)] * 2
    assert all(torch.equal(value, without[1][name]) for name, value in with_pictures[1].items())
    assert torch.equal(with_pictures[2], without[2])
    assert with_pictures[0].result["test/accuracy"] == without[0].result["test/accuracy"]


def test_drawing_is_outside_the_clock(digits: Task, tmp_path: Path, clock: Time) -> None:
    """Oracle: a clock that the rule moves by 1 in each step, and by 1000 for its pictures of each epoch."""

    class Slow(Drawn):
        def credit(self, batch: bpfree.Batch, step: bpfree.Step) -> Any:
            clock.now += 1
            return super().credit(batch, step)

    def slow(rule: nn.Module, count: int) -> dict[str, Tensor]:
        clock.now += 1000
        return {}

    run, *_ = fitted(digits, tmp_path, [Pictures()], rule_of(slow, digits.spec, Slow))
    assert run.result["train/seconds"] == run.result["train/steps"] > 0
    assert clock.now == run.result["train/steps"] + 2 * 1000


def failing(rule: nn.Module, count: int) -> dict[str, Tensor]:
    raise bpfree.UsageError("cannot draw")


@pytest.mark.parametrize("shown", [failing, {"wrong": torch.zeros(3, 2, 4, 4)}, None, {"list": [1, 2]}])
def test_a_failure_is_one_warning(digits: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture, shown: Any) -> None:
    """Not even an error that may refuse a run ends it."""
    run, *_ = fitted(digits, tmp_path, [Pictures()], rule_of(shown, digits.spec))
    assert run.status == "finished"
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith("no pictures of drawn-digits-s0 from epoch 1 on: ")


def test_the_hook_gets_the_rule(digits: Task) -> None:
    seen = []

    class Look:
        @hookimpl
        def epoch_end(self, rule: bpfree.Rule) -> None:
            seen.append(rule)

    torch.manual_seed(0)
    rule = Backprop(mlp(digits.spec), digits.spec)
    Trainer(rule, digits, TrainConfig(budget=BudgetConfig(epochs=1), device="cpu"), observers=[Look()]).fit()
    assert seen == [rule]


# --- in the store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(track: Any, uri: str, new_run: Any) -> Any:
    """A tracked run, its recorder, and a function that gives the names of the files that are to be sent."""
    run, tracker = new_run(), track(uri, checkpoint=False)
    tracker.run_start(run)

    def names() -> list[str]:
        return [Path(event["path"]).name for event, _ in RunFolder(run.folder).log.read() if event["event"] == "artifact"]

    return run, tracker, names


def add(run: Run, name: str) -> None:
    assert run.folder is not None
    path = run.folder / "pictures" / "b1" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.randbytes(8))
    run.artifacts[f"pictures/b1/{name}"] = path


def test_files_travel_on_the_way(uploads: Any, stored: Any, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, where it belongs; but a file that has changed again at the end."""
    from mlflow.artifacts import list_artifacts

    monkeypatch.setattr(recorder, "BETWEEN_FILES", 0.0)
    run, tracker, names = uploads
    add(run, "first.png")
    tracker.epoch_end(run, {"epoch": 1.0})
    assert names() == ["first.png"]
    add(run, "second.png")
    tracker.epoch_end(run, {"epoch": 2.0})
    tracker.epoch_end(run, {"epoch": 3.0})
    assert names() == ["first.png", "second.png"]
    path = run.artifacts["pictures/b1/first.png"]
    os.utime(path, ns=(1, 1))
    add(run, "third.png")
    tracker.run_end(run)
    assert names() == ["first.png", "second.png", "first.png", "third.png"]
    found, _ = stored(run, uri)
    held = list_artifacts(run_id=found.info.run_id, artifact_path="pictures/b1", tracking_uri=uri)
    assert {entry.path.rpartition("/")[2] for entry in held} == {"first.png", "second.png", "third.png"}


def test_short_runs_send_them_at_the_end(uploads: Any) -> None:
    """Uploads take processor time, which would count as training."""
    run, tracker, names = uploads
    add(run, "first.png")
    tracker.epoch_end(run, {"epoch": 1.0})
    assert names() == []
    tracker.run_end(run)
    assert names() == ["first.png"]
