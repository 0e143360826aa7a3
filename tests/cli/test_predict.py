"""``bpfree predict``. Oracle: ``Saved.predict_proba`` on the same inputs, read by other means (NumPy, PIL, by hand)."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from study_kit import call

import bpfree
from bpfree import TaskSpec
from bpfree.baselines import Backprop
from bpfree.network import mlp
from bpfree.predicting import Reading, as_json, predict_files
from bpfree.saved import Saved
from bpfree.tasks.tables import named_inputs

FAST = ("tracking.enabled=false", "pictures.every=0", "threads=1", "device=cpu", "budget.epochs=1")
Array = np.ndarray[Any, np.dtype[Any]]


def run_of(*words: str) -> str:
    assert call("train", "rule=dfa", *FAST, *words) == 0
    (run,) = Path("runs").iterdir()
    return str(run)


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def shares(rows: list[dict[str, str]]) -> Array:
    return np.array([[float(value) for name, value in row.items() if name.startswith("p_")] for row in rows])


@pytest.fixture
def pictures(workplace: Path) -> Array:
    """Nine grey pictures of 8x8 in a folder, which are returned as (9, 8, 8)."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    Path("photos/below").mkdir(parents=True)
    for place, each in enumerate(pixels):
        Image.fromarray(each).save(f"photos/{'below/' if place > 6 else ''}{place}.png")
    return pixels


def test_folders_of_pictures_arrays_and_tables_of_one_run(pictures: Array, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("task=digits")
    saved = bpfree.load(run)
    expected = saved.predict_proba(pictures / 255)  # the raw pixels of this task lie in 0 to 1
    np.savez("arrays.npz", x=pictures / 255, other=pictures)
    np.savetxt("table.csv", (pictures / 255).reshape(9, 64), delimiter=",")
    for place in ("photos", "arrays.npz", "table.csv"):
        capsys.readouterr()
        assert call("predict", run, place, "--output", "out.csv", "--batch-size", "4") == 0
        assert "9 predictions in out.csv" in capsys.readouterr().err
        rows = rows_of("out.csv")
        np.testing.assert_allclose(shares(rows), expected, atol=2e-5)
        assert [row["class"] for row in rows] == [saved.classes[best] for best in expected.argmax(1)]
    names = {"photos": "photos/below/8.png", "arrays.npz": "arrays.npz[8]", "table.csv": "table.csv:9"}
    assert rows[-1]["input"] == names["table.csv"]
    assert call("predict", run, *names, "--output", "out.json") == 0  # all at once
    found = json.loads(Path("out.json").read_text())
    assert [found[place]["input"] for place in (8, 17, 26)] == list(names.values())
    assert sum(found[8]["probabilities"].values()) == pytest.approx(1)
    capsys.readouterr()
    assert call("predict", run, "photos") == 0  # to what is no terminal
    assert list(csv.DictReader(capsys.readouterr().out.splitlines()))[8]["input"] == names["photos"]


def test_a_batch_is_all_that_is_held(pictures: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: files that are opened before the first prediction is there."""
    saved = bpfree.load(run_of("task=digits"))
    opened, before = list[Path](), Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), before(path))[1])
    found = predict_files(saved, ["photos"], Reading(batch_size=2))
    assert (next(found).name, len(opened)) == ("photos/0.png", 2)
    assert (len(list(found)), len(opened)) == (8, 9)


def test_pictures_are_resized_as_the_task_resizes_them(workplace: Path) -> None:
    """Oracle: PIL's bilinear interpolation; classes are the names of folders."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 14, 3), dtype=np.uint8)
    for place, each in enumerate(pixels):
        Path(f"mine/{('cat', 'dog')[place % 2]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(f"mine/{('cat', 'dog')[place % 2]}/{place:02}.png")
    run = run_of("task=folder", "task.path=mine", "task.size=[8]", "task.validation=0")
    assert call("predict", run, "mine/cat", "--output", "out.jsonl") == 0
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    small = np.stack([np.asarray(Image.fromarray(each).resize((8, 8), Image.Resampling.BILINEAR)) for each in pixels[::2]])
    expected = bpfree.load(run).predict_proba(small)
    np.testing.assert_allclose([list(each["probabilities"].values()) for each in found], expected, rtol=1e-6)
    assert [each["class"] for each in found] == [("cat", "dog")[best] for best in expected.argmax(1)]


def test_other_sizes_and_colours_only_when_asked(pictures: Array, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("task=digits")
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save("large.png")
    Image.fromarray(np.eye(8 * 3, dtype=np.uint8).reshape(8, 24, 3)[:, :8] * 255).save("coloured.png")
    for name, what in (("large.png", "9 x 8 pixels, but the run's have 8 x 8"), ("coloured.png", "colours, but the run's are grey")):
        assert call("predict", run, "photos", name, "--output", "out.csv") == 2
        said = capsys.readouterr().err
        assert what in said
        assert f"where: {name}" in said
        assert not Path("out.csv").exists()
        assert call("predict", run, name, "--resize", "--output", f"{name}.csv") == 0


def test_pictures_that_cannot_be_read_are_named(pictures: Array, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("task=digits")
    Path("photos/3.png").write_bytes(Path("photos/4.png").read_bytes()[:60])
    Path("photos/5.png").write_text("no picture")
    assert call("predict", run, "photos", "--output", "out.csv") == 2
    assert "where: photos/3.png" in capsys.readouterr().err
    assert call("predict", run, "photos", "--output", "out.csv", "--skip-damaged") == 1
    assert [Path(row["input"]).stem for row in rows_of("out.csv")] == list("0124678")
    assert "skipped: photos/5.png" in capsys.readouterr().err


def people(*names: str) -> str:
    random = np.random.default_rng(0)
    rows = [[f"{random.uniform(0, 9):.3f}", random.choice(["red", "blue=ish"]), random.choice(names)] for _ in range(40)]
    return "age,hair,kind\n" + "".join(f"{','.join(row)}\n" for row in rows)


def test_columns_of_a_table_are_found_by_their_names(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In another order, with others beside them. Oracle: inputs that are encoded by hand."""
    Path("people.csv").write_text(people("owl", "fox"))
    run = run_of("task=csv", "task.path=people.csv", "task.target=kind", "task.validation=0")
    Path("people.csv").unlink()  # the run knows its columns
    Path("new.csv").write_text("hair;id;age\nred;a;2.5\nblue=ish;b;7\n")
    assert call("predict", run, "new.csv", "--output", "out.csv") == 0
    rows = rows_of("out.csv")
    np.testing.assert_allclose(shares(rows), bpfree.load(run).predict_proba([[2.5, 0, 1], [7, 1, 0]]), atol=1e-5)
    assert list(rows[0]) == ["input", "class", "p_fox", "p_owl"]
    assert rows[1]["input"] == "new.csv:3"
    for text, what, where in (
        ("id,age\na,2\n", "there is no column 'hair'", "new.csv"),
        ("hair,age\nred,2\ngreen,3\n", "'green' does not occur in the training table", "new.csv, line 3, column hair"),
        ("hair,age\nred,\n", "a value is missing", "new.csv, line 2, column age"),
        ("hair,age\nred,2,4\n", "3 cells, but there are 2 columns", "new.csv, line 2"),
    ):
        Path("new.csv").write_text(text)
        capsys.readouterr()
        assert call("predict", run, "new.csv") == 2
        said = capsys.readouterr().err
        assert what in said
        assert f"where: {where}" in said


def test_numbers_have_intervals(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the interval that the run itself predicts."""
    random = np.random.default_rng(0).uniform(0, 9, (60, 3))
    Path("flats.csv").write_text("rooms,size,price\n" + "".join(f"{a:.4f},{b:.4f},{c:.4f}\n" for a, b, c in random))
    small = ["rule=noprop-dt", "rule.T=2", "network=noprop-mlp", "network.width=8", "network.depth=0", "budget.epochs=1"]
    run = run_of("task=csv", "task.path=flats.csv", "task.target=price", *small)
    assert call("predict", run, "flats.csv", "--interval", "0.8", "--output", "out.csv") == 0
    rows = rows_of("out.csv")
    assert list(rows[0]) == ["input", "price", "price_low", "price_high"]
    low, high = bpfree.load(run).predict_interval(random[:, :2].round(4), 0.8)
    np.testing.assert_allclose([float(row["price_low"]) for row in rows], low[:, 0], rtol=1e-4)
    np.testing.assert_allclose([float(row["price_high"]) for row in rows], high[:, 0], rtol=1e-4)
    shutil.rmtree("runs")
    run = run_of("task=csv", "task.path=flats.csv", "task.target=price")
    capsys.readouterr()
    assert call("predict", run, "flats.csv", "--interval", "0.8") == 2
    assert "without a distribution" in capsys.readouterr().err


def test_numbers_have_the_name_of_their_column(workplace: Path) -> None:
    random = np.random.default_rng(0).uniform(0, 9, (40, 3))
    Path("flats.csv").write_text("rooms,size,price\n" + "".join(f"{a:.4f},{b:.4f},{c:.4f}\n" for a, b, c in random))
    run = run_of("task=csv", "task.path=flats.csv", "task.target=price", "task.validation=0")
    assert call("predict", run, "flats.csv", "--output", "out.csv") == 0
    rows = rows_of("out.csv")
    assert list(rows[0]) == ["input", "price"]
    expected = bpfree.load(run).predict(random[:, :2])[:, 0]
    np.testing.assert_allclose([float(row["price"]) for row in rows], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "what", "where"),
    [
        (("nothing.png",), "no such file or folder", "nothing.png"),
        (("notes.txt",), "neither a picture nor a file of arrays or a table", "notes.txt"),
        (("empty",), "the folder holds no picture", "empty"),
        (("two.npz",), "which array holds the inputs?", "two.npz"),
        (("two.npz", "--array", "c"), "there is no array c", "two.npz"),
        (("two.npz", "--array", "a"), "inputs have shape (5, 9)", "two.npz[0] to two.npz[4]"),
        (("bad.npz",), "cannot read the arrays", "bad.npz"),
        (("one.npy",), "a single example", "one.npy"),
        (("short.csv",), "2 numbers, but an input has 64", "short.csv, line 1"),
        (("photos", "--output", "out.txt"), "predictions are not written as .txt", "out.txt"),
        (("photos", "rule.nothing=3"), "nothing", ""),
        (("photos", "--device", "abacus"), "abacus", ""),
    ],
)
def test_what_cannot_be_predicted_is_named(
    words: tuple[str, ...], what: str, where: str, pictures: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").touch()
    Path("empty").mkdir()
    np.savez("two.npz", a=np.zeros((5, 9)), b=np.zeros((5, 8)))
    Path("bad.npz").write_bytes(b"PK no archive")
    np.save("one.npy", np.zeros((8, 8)))
    Path("short.csv").write_text("1,2\n")
    run = run_of("task=digits")
    capsys.readouterr()
    assert call("predict", run, *words) == 2
    said = capsys.readouterr().err
    assert what in said
    assert f"where: {where}" in said or not where


def test_settings_change_the_rule(pictures: Array) -> None:
    """Noise is drawn where it is asked for, from the seed."""
    assert call("train", "rule=noprop-dt", *FAST, "rule.T=2") == 0
    (run,) = map(str, Path("runs").iterdir())
    found = []
    for words in ((), ("rule.inference=sampled",), ("rule.inference=sampled",), ("rule.inference=sampled", "--seed", "1")):
        assert call("predict", run, "photos", *words, "--output", "out.csv") == 0
        found.append(shares(rows_of("out.csv")))
    np.testing.assert_array_equal(found[1], found[2])
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[1], found[3])


def test_several_labels_are_listed(tmp_path: Path) -> None:
    spec = TaskSpec("tags", (4,), 3, "multilabel", class_names=("a", "b", "c"))
    saved = Saved(Backprop(mlp(spec), spec).eval(), spec, None, Path("here"))
    torch.manual_seed(0)
    rows = torch.randn(6, 4)
    np.save(tmp_path / "rows.npy", rows.numpy())
    found = list(predict_files(saved, [tmp_path / "rows.npy"]))
    assert [as_json(each)["labels"] for each in found] == saved.predict_classes(rows)
    np.testing.assert_allclose([list(each.values.values()) for each in found], saved.predict_proba(rows))


def test_columns_and_categories_may_hold_the_sign_between_them() -> None:
    names = ("k=v=c", "k=v=d=e", "x=1", "x=2=3", "m=n", "n")
    found = {"k=v": ("c", "d=e"), "x": ("1", "2=3"), "m=n": None, "n": None}
    assert named_inputs(names, ["k=v", "x", "n", "m=n"]) == found
