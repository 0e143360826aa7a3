"""The task csv. Oracles: numpy's reader for numbers, the cells that were written for categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bpfree import Task, UsageError
from bpfree.tasks.tables import CSV, TableConfig

RNG = np.random.default_rng(0)
COLOURS = ("red", "green", "blue")
ROWS = 30


def write(path: Path, header: str, rows: list[str]) -> str:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


def rows(count: int = ROWS) -> list[str]:
    return [f"{RNG.normal():.6f},{COLOURS[place % 3]},{RNG.integers(0, 100)},{'yes' if place % 2 else 'no'}" for place in range(count)]


def table(folder: Path, count: int = ROWS) -> str:
    return write(folder / "table.csv", "weight,colour,age,bought", rows(count))


def loaded(path: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    config = TableConfig(path, **options)
    train, _ = CSV.load(config, None)  # type: ignore[misc]
    assert train.targets is not None
    return train.inputs, train.targets, CSV.spec(config, None)  # type: ignore[union-attr]


def test_numbers_are_those_that_numpy_reads(tmp_path: Path) -> None:
    values = RNG.normal(size=(ROWS, 4)) * [1, 1e6, 1e-3, 1]
    np.savetxt(tmp_path / "n.csv", values, delimiter=",", header="a,b,c,y", comments="")
    config = TableConfig(str(tmp_path / "n.csv"), test=str(tmp_path / "n.csv"), target="y")
    train, test = CSV.load(config, None)  # type: ignore[misc]
    expected = np.loadtxt(tmp_path / "n.csv", delimiter=",", skiprows=1).astype(np.float32)
    np.testing.assert_array_equal(train.inputs.numpy(), expected[:, :3])  # type: ignore[union-attr]
    np.testing.assert_array_equal(train.targets.numpy(), expected[:, 3:])  # type: ignore[union-attr]
    np.testing.assert_array_equal(test.inputs.numpy(), expected[:, :3])  # type: ignore[union-attr]
    spec = CSV.spec(config, None)
    assert (spec.targets, spec.outputs, spec.input_names) == ("real", 1, ("a", "b", "c"))


def test_categories_are_one_hot_in_the_order_that_is_recorded(tmp_path: Path) -> None:
    path = table(tmp_path)
    inputs, targets, spec = loaded(path, target="bought", test=path)
    assert spec.input_names == ("weight", "colour=blue", "colour=green", "colour=red", "age")
    assert spec.class_names == ("no", "yes")
    for place, line in enumerate(Path(path).read_text().splitlines()[1:]):
        weight, colour, age, bought = line.split(",")
        row = dict(zip(spec.input_names, inputs[place].tolist(), strict=True))
        assert row["weight"] == np.float32(weight)
        assert row["age"] == float(age)
        assert {name: value for name, value in row.items() if name.startswith("colour")} == {
            f"colour={each}": float(each == colour) for each in COLOURS
        }
        assert spec.class_names[targets[place]] == bought


def test_numbers_may_be_names_and_columns_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "z.csv", "id,zip,y", [f"{place},{(place % 2) * 10 + 5},{'ab'[place % 2]}" for place in range(ROWS)])
    assert loaded(path, target="y", categorical=["zip"], leave_out=["id"])[2].input_names == ("zip=15", "zip=5")
    assert loaded(path, target="y")[2].input_names == ("id", "zip")


def test_whole_numbers_as_targets_have_to_be_told(tmp_path: Path) -> None:
    path = write(tmp_path / "w.csv", "a,y", [f"{RNG.normal()},{place % 3 * 5}" for place in range(ROWS)])
    with pytest.raises(UsageError, match="whole numbers: classes or numbers") as caught:
        loaded(path, target="y")
    assert "task.targets=classes or task.targets=real" in caught.value.fix
    assert loaded(path, target="y", targets="classes")[2].class_names == ("0", "5", "10")
    assert loaded(path, target="y", targets="real")[2].targets == "real"


@pytest.mark.parametrize("missing", ["", " ", "NA", "nan", "?"])
@pytest.mark.parametrize("column", ["weight", "colour", "bought"])
def test_a_missing_value_is_refused_with_its_column_and_line(missing: str, column: str, tmp_path: Path) -> None:
    names = ["weight", "colour", "age", "bought"]
    made = rows()
    cells = made[11].split(",")
    cells[names.index(column)] = missing
    made[11] = ",".join(cells)
    with pytest.raises(UsageError, match="missing") as caught:
        loaded(write(tmp_path / "m.csv", ",".join(names), made), target="bought")
    assert caught.value.where.endswith(f"line 13, column {column}")


@pytest.mark.parametrize(
    ("header", "row", "options", "message"),
    [
        ("a,b,y", "1,2", {}, "2 cells, but there are 3 columns"),
        ("a,a,y", "1,2,x", {}, "two columns have the same name"),
        ("1,2,3", "1,2,x", {}, "does not name the columns"),
        ("a,b,y", "1,none,x", {}, "'none' is no number, but 30 of 31 cells of the column are"),
        ("a,b,y", "1,2,x", {"target": "z"}, "there is no column 'z'"),
        ("a,b,y", "1,2,x", {"target": ""}, "needs the target's column"),
        ("a,b,y", "1,2,x", {"leave_out": ["q"]}, "there is no column 'q'"),
        ("a,b,y", "1,2,x", {"leave_out": ["a", "b"]}, "no column but the target's"),
        ("a,b,y", "1,inf,x", {}, "no finite number"),
        ("a;b,y", "1,2", {}, "which separates the columns"),
    ],
)
def test_tables_that_are_no_task_are_refused(header: str, row: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    many = [f"{place},{place},{'xz'[place % 2]}" for place in range(ROWS)]
    path = write(tmp_path / "t.csv", header, [*many, row] if header.count(",") == 2 else [row] * 5)
    with pytest.raises(UsageError, match=message):
        loaded(path, **{"target": "y", **options})


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00a")
    for path, message in (("", "needs a table"), ("none.csv", "no such table"), (str(tmp_path / "b.csv"), "cannot read the table")):
        with pytest.raises(UsageError, match=message):
            loaded(path, target="y")
    with pytest.raises(UsageError, match="has no examples"):
        loaded(write(tmp_path / "e.csv", "a,y", []), target="y")


def test_what_the_training_table_does_not_have_is_refused_in_the_test_table(tmp_path: Path) -> None:
    path = table(tmp_path)
    other = write(tmp_path / "other.csv", "weight,colour,age,bought", ["1,red,3,yes", "2,pink,3,no"])
    with pytest.raises(UsageError, match="'pink' does not occur in the training table") as caught:
        loaded(path, target="bought", test=other)
    assert caught.value.where.endswith("line 3, column colour")


def test_an_identifier_is_no_category(tmp_path: Path) -> None:
    path = write(tmp_path / "i.csv", "name,a,y", [f"n{place},{place},{'xz'[place % 2]}" for place in range(ROWS)])
    with pytest.raises(UsageError, match="30 categories in 30 rows") as caught:
        loaded(path, target="y")
    assert "task.leave_out=[name]" in caught.value.fix


@pytest.mark.parametrize(("separator", "said"), [(";", "auto"), ("\t", "auto"), ("|", "|"), ("\t", "tab")])
def test_separators(separator: str, said: str, tmp_path: Path) -> None:
    lines = [separator.join([str(RNG.normal()), "ab"[place % 2]]) for place in range(ROWS)]
    path = write(tmp_path / "s.csv", separator.join("ay"), lines)
    assert loaded(path, target="y", separator=said)[2].input_names == ("a",)


def test_quoted_text_may_hold_separators_and_line_ends(tmp_path: Path) -> None:
    lines = ['"one, two",1,x', '"three\nfour",2,z'] * 10
    inputs, _, spec = loaded(write(tmp_path / "q.csv", "t,a,y", lines), target="y")
    assert spec.input_names == ("t=one, two", "t=three\nfour", "a")
    assert inputs[:, 2].tolist()[:2] == [1, 2]


def test_columns_are_standardised_by_the_training_split(tmp_path: Path) -> None:
    made = Task.from_source(CSV, TableConfig(table(tmp_path, 200), target="bought"))
    np.testing.assert_allclose(made.spec.mean, made.train.inputs.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(made.spec.std, made.train.inputs.double().numpy().std(0), rtol=1e-9)
    assert Task.from_source(CSV, TableConfig(table(tmp_path, 200), target="bought"), normalise="none").spec.mean == (0.0,)


def test_a_table_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "a,y", ["1,p", "2,q"] * 5)
    assert loaded(path, target="y")[2].class_names == ("p", "q")
    write(tmp_path / "c.csv", "a,y", ["1,p", "2,other"] * 5)
    assert loaded(path, target="y")[2].class_names == ("other", "p")
