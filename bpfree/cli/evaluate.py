"""The command ``bpfree evaluate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from bpfree.cli.code import allow_code
from bpfree.cli.completion import run_name, setting

if TYPE_CHECKING:
    from bpfree.metric import Metric

HELP = """Score a trained rule: CHECKPOINT is a run's folder, its name, or a checkpoint file.

The default is the validation split, so that repeated evaluation does not overuse the test split. SETTINGS change the run's
configuration, for example `task=fashion-mnist`, `rule.inference=deterministic`, `evaluation.draws=20`,
`evaluation.protocols=[linear-probe]`, `evaluation.metrics=[ece]`, `device=cpu`.
"""


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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on one line.")
def evaluate(checkpoint: str, settings: tuple[str, ...], split: str, allow_code: tuple[str, ...], as_json: bool) -> int:
    from bpfree.cli.output import print_pairs, print_table
    from bpfree.config import allowing
    from bpfree.leaves import last_said, parse_words
    from bpfree.scoring import score

    leaves = parse_words(settings)
    output = last_said(leaves, "output", "runs")
    found = score(checkpoint, leaves, split=split, output=output, registry=allowing(leaves, allow_code))
    if as_json:
        click.echo(json.dumps({**found.about, **found.values}))
        return 0
    print_pairs(found.about.items())
    print_table(["metric", "value"], [[key, _text(key, score, found.metrics)] for key, score in found.values.items()], right=[1])
    return 0
