"""The command ``bpfree compare``."""

from __future__ import annotations

from pathlib import Path

import click

from bpfree.cli.code import allow_code
from bpfree.cli.completion import word
from bpfree.cli.output import json_option

HELP = """Train several rules over several seeds, and compare them in a table and a report.

Each WORD is a rule, a rule with settings of its own (`noprop-dt,rule.T=1`), or a setting of all rules (`task=mnist`); a rule, network or
task may be named by its file, `mine.py:MyRule`, whose code is then executed. A linear classifier on the inputs, the own-prediction twin of
each rule (everything but its readout recipe fixed) and back-propagation are added, and the report measures the floor, because an accuracy
means little without floor and ceiling. Settings of `network` apply to rules that take any network; for a rule with a network of its own
(and the linear classifier), write them in its WORD.

You may interrupt a comparison at any time: the same command resumes it, and finished cells are not run again.

\b
  bpfree compare noprop-dt dfa --seeds 3 budget.epochs=30
  bpfree compare noprop-dt noprop-dt,rule.T=1 task=mnist --jobs 2
"""


@click.command(help=HELP, short_help="Compare rules over seeds, with floor and ceiling.")
@click.argument("words", nargs=-1, required=True, metavar="WORD...", shell_complete=word)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 10_000), help="Number of repetitions, with seeds 0, 1, ...")
@click.option("--only", is_flag=True, help="Do not add the linear classifier, own-prediction twins and back-propagation.")
@click.option("--jobs", "-j", type=click.IntRange(1, 1024), help="Number of parallel cells.  [default: 1, or one per GPU]")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Time limit of a cell.")
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), help="Folder of the report.  [default: the folder of the cells]")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@allow_code
@json_option
def compare(
    words: tuple[str, ...],
    seeds: int,
    only: bool,
    jobs: int | None,
    timeout: float | None,
    to: Path | None,
    quiet: bool,
    allow_code: tuple[str, ...],
    as_json: bool,
) -> int:
    from bpfree.cli.study import run_worklist
    from bpfree.config import allowing
    from bpfree.errors import UsageError
    from bpfree.leaves import parse_words
    from bpfree.study import cells
    from bpfree.study.command import Options
    from bpfree.study.comparing import comparison, leaves_in
    from bpfree.study.worklist import Worklist

    rules = [word for word in words if "=" not in word.split(",")[0]]
    common = parse_words(word for word in words if word not in rules)
    if any(leaf.key in ("seed", "seeds") for leaf in common):
        raise UsageError(
            "a comparison runs each rule with the seeds 0, 1, ..., so seed cannot be set",
            where="seed",
            fix="choose the number of seeds with --seeds N",
        )
    registry = allowing([*common, *(leaf for word in rules for leaf in leaves_in(word))], allow_code)
    shared = [leaf for leaf in common if leaf.key != "output"]
    study = comparison(rules, shared, seeds=seeds, references=not only, registry=registry)
    plan = cells.plan(study, [leaf for leaf in common if leaf.key == "output"], registry=registry)
    again = ["compare", *words, "--seeds", str(seeds), *(["--only"] if only else [])]
    again += [word for file in allow_code for word in ("--allow-code", file)]
    return run_worklist(Worklist(plan), common, again, Options(jobs=jobs, timeout=timeout, folder=to, quiet=quiet), as_json)
