"""The command ``bpfree predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bpfree.cli.code import allow_code

if TYPE_CHECKING:
    from bpfree.predicting import Predicted

SHOWN = 50
"""Predictions that a terminal shows."""
BEST = 3
"""Classes that it shows of each, with their probabilities."""

HELP = """Predict with a trained rule: RUN is a run's folder, its name, or a checkpoint file.

INPUTS are pictures, folders of pictures, files of arrays (.npz, .npy) or tables (.csv, .tsv), read as the run's task reads them. They
may be mixed with settings of the run, such as `rule.inference=deterministic`. Predictions go to a file (--output), to a pipe as csv, or
to the terminal. They are made in batches, so that there may be any number of them.

\b
Examples:
  bpfree predict RUN photos/ --output predictions.csv
  bpfree predict RUN people.csv --output predictions.json
  bpfree predict RUN flats.csv --interval 0.9
  bpfree predict RUN arrays.npz --array x_test | head
"""


@click.command(help=HELP, short_help="Predict with a trained rule.")
@click.argument("run")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--output", metavar="FILE", help="Where to write: .csv, .json, or .jsonl (an object in each line).")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Inputs computed at a time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--array", default="", metavar="NAME", help="Name of the inputs in a file of several arrays.  [default: x, or the only one]")
@click.option("--resize", is_flag=True, help="Bring pictures to the size and colours of the run's inputs.")
@click.option("--skip-damaged", is_flag=True, help="Leave out pictures that cannot be read, with a warning each.")
@click.option("--interval", type=click.FloatRange(0, 1, True, True), help="Add the interval of this probability to numbers: 0.9, say.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of a rule that predicts with noise.")
@allow_code
def predict(
    run: str,
    inputs: tuple[str, ...],
    output: str | None,
    batch_size: int,
    device: str,
    array: str,
    resize: bool,
    skip_damaged: bool,
    interval: float | None,
    seed: int,
    allow_code: tuple[str, ...],
) -> int:
    from bpfree.predicting import Reading, csv_to, predict_files, writer_of

    skipped: list[str] = []

    def skip(reason: str) -> None:
        skipped.append(reason)
        click.echo(f"skipped: {reason}", err=True)

    saved, places = opened(run, inputs, device, allow_code)
    reading = Reading(batch_size, array, resize, skip if skip_damaged else None, seed, interval)
    found = predict_files(saved, places, reading)
    count = 0
    if output is not None:
        with writer_of(Path(output)) as writer:
            for each in _counted(found):
                writer.add(each)
                count += 1
        click.echo(f"{count:,} predictions in {output}{f', {len(skipped):,} pictures skipped' if skipped else ''}", err=True)
    elif sys.stdout.isatty():
        _show(found)
    else:
        table = csv_to(sys.stdout)
        for each in found:
            table.add(each)
    return 1 if skipped else 0


def opened(run: str, words: Iterable[str], device: str, allow_code: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Load the rule with the settings among the words; return it with the other words, which name files."""
    from bpfree.config import allowing
    from bpfree.leaves import last_said, parse_words
    from bpfree.saved import load
    from bpfree.training.environment import resolve_device

    places = [word for word in words if "=" not in word or Path(word).exists()]
    leaves = parse_words([word for word in words if word not in places])
    output = last_said(leaves, "output", "runs")
    registry = allowing(leaves, allow_code)
    return load(run, device=resolve_device(device), output=output, changes=leaves, registry=registry), places


def _counted(found: Iterator[Predicted]) -> Iterator[Predicted]:
    """Show on a terminal how many predictions there are so far."""
    for count, each in enumerate(found, 1):
        if count % 1000 == 0 and sys.stderr.isatty():
            click.echo(f"\r{count:,} predictions", err=True, nl=False)
        yield each
    if sys.stderr.isatty():
        click.echo("\r", err=True, nl=False)


def _show(found: Iterator[Predicted]) -> None:
    """Print the first predictions as a table."""
    from bpfree.cli.output import print_table

    shown = list(islice(found, SHOWN))
    if shown and shown[0].decision is None:
        print_table(["input", *shown[0].values], [[each.name, *(f"{value:.5g}" for value in each.values.values())] for each in shown])
    elif shown:
        print_table(["input", "prediction", "probabilities"], [_cells(each) for each in shown])
    if next(found, None) is not None:
        click.echo(f"... the first {SHOWN}; all of them with --output FILE.csv")


def _cells(found: Predicted) -> list[str]:
    best = sorted(found.values.items(), key=lambda entry: -entry[1])[:BEST]
    said = ", ".join(found.decision) if isinstance(found.decision, list) else str(found.decision)
    return [found.name, said, ", ".join(f"{name} {value:.3f}" for name, value in best)]
