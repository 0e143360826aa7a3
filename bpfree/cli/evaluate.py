"""The command ``bpfree evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bpfree.cli.code import allow_code
from bpfree.cli.completion import run_name, setting

if TYPE_CHECKING:
    from bpfree.confusion import ClassScores
    from bpfree.metric import Metric
    from bpfree.scoring import Scored

HELP = """Score a trained rule: CHECKPOINT is a run's folder, its name, or a checkpoint file.

The default is the validation split, so that repeated evaluation does not overuse the test split. SETTINGS change the run's
configuration, for example `task=fashion-mnist`, `rule.inference=deterministic`, `evaluation.draws=20`,
`evaluation.protocols=[linear-probe]`, `evaluation.metrics=[ece]`, `device=cpu`. Classes are scored one by one, too.
"""
FEW = 20
"""Most classes that are all shown; of more, those with the lowest F1."""
MATRIX, WIDTH = 20, 79
"""Most classes of a printed matrix, and letters of its lines."""
PAIRS = 10
"""Confused pairs of classes that are shown."""


def _text(key: str, value: float, known: Mapping[str, Metric]) -> str:
    """Format a metric with its unit; other values of protocols (a penalty, operations) are plain numbers."""
    from bpfree.metric import KNOWN, metric_of

    metric = metric_of(key, known)
    return metric.text(value) if metric.name in {**KNOWN, **known} else f"{value:.4g}"


@click.command(help=HELP, short_help="Score a trained rule on a split.")
@click.argument("checkpoint", shell_complete=run_name)
@click.argument("settings", nargs=-1, metavar="[SETTINGS]...", shell_complete=setting)
@click.option(
    "--split", type=click.Choice(["validation", "test", "train"]), default="validation", show_default=True, help="Split to score."
)
@allow_code
@click.option("--confusion", "picture", metavar="FILE", help="Draw the confusion matrix: FILE.svg or FILE.png.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on one line.")
def evaluate(
    checkpoint: str, settings: tuple[str, ...], split: str, allow_code: tuple[str, ...], picture: str | None, as_json: bool
) -> int:
    from bpfree.cli.output import print_pairs, print_table
    from bpfree.config import allowing
    from bpfree.leaves import last_said, parse_words
    from bpfree.scoring import score

    if picture is not None:
        from bpfree.confusion import check_picture

        check_picture(Path(picture))
    leaves = parse_words(settings)
    output = last_said(leaves, "output", "runs")
    found = score(checkpoint, leaves, split=split, output=output, registry=allowing(leaves, allow_code))
    if picture is not None:
        _draw(found, Path(picture))
    if as_json:
        click.echo(json.dumps({**found.about, **found.values, **_classes_as_json(found)}))
        return 0
    print_pairs(found.about.items())
    print_table(["metric", "value"], [[key, _text(key, score, found.metrics)] for key, score in found.values.items()], right=[1])
    if found.classes is not None:
        _print_classes(found.classes)
    return 0


def _draw(found: Scored, path: Path) -> None:
    from bpfree.confusion import draw
    from bpfree.errors import UsageError

    if found.classes is None:
        raise UsageError("the task has no classes that could be confused", where=f"--confusion {path}", fix="leave --confusion out")
    draw(found.classes, path, f"{found.about['rule']} on {found.about['task']}, {found.about['split']}")


def _classes_as_json(found: Scored) -> dict[str, Any]:
    if found.classes is None:
        return {}
    return {"classes": found.classes.rows()} | ({} if found.classes.counts is None else {"confusion": found.classes.counts})


def _print_classes(found: ClassScores) -> None:
    """Print the scores of each class and, below, the counts of confusions, or the most frequent ones where there are many classes."""
    from bpfree.cli.output import print_table
    from bpfree.document.confusion import text_of

    rows, counts = found.rows(), found.counts
    shown = rows if len(rows) <= FEW else sorted(rows, key=lambda row: float(row["f1"]))[: FEW // 2]
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("precision", "recall", "f1")}
    total = {"class": "mean", **means, "support": sum(row["support"] for row in rows)}
    click.echo()
    print_table(
        ["class", "precision", "recall", "F1", "support"],
        [[row["class"], *(f"{100 * row[key]:.1f} %" for key in means), text_of(row["support"])] for row in (*shown, total)],
        right=range(1, 5),
    )
    if len(shown) < len(rows):
        click.echo(f"({len(shown)} of {len(rows)} classes, those with the lowest F1; all of them with --json)")
    if counts is None:
        return
    click.echo()
    if len(rows) <= MATRIX and sum(_widths(found.names, counts)) <= WIDTH:
        table = [[name, *(text_of(count) if count else "." for count in row)] for name, row in zip(found.names, counts, strict=True)]
        print_table(["true / predicted", *found.names], table, right=range(1, len(rows) + 1))
    elif pairs := found.confused(PAIRS):
        table = [[true, made, text_of(count), f"{100 * share:.1f} %"] for true, made, count, share in pairs]
        print_table(["true", "predicted as", "examples", "of the class"], table, right=(2, 3))


def _widths(names: Sequence[str], counts: Sequence[Sequence[float]]) -> Iterator[int]:
    from bpfree.document.confusion import text_of

    yield max(len("true / predicted"), *map(len, names))
    for name, *column in zip(names, *counts, strict=True):
        yield 2 + max(len(name), *(len(text_of(count)) for count in column))
