"""The command ``bpfree train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bpfree.cli.code import allow_code
from bpfree.cli.completion import run_name, setting
from bpfree.cli.output import json_option
from bpfree.document.terminal import fitted, width_of

if TYPE_CHECKING:
    from bpfree.leaves import Leaf
    from bpfree.plugins import Plugins
    from bpfree.recipe import Recipe
    from bpfree.run import Run

HELP = """Train one rule on one task, test it once, and track the run.

SETTINGS are KEY=VALUE words that override the defaults and --config files, for example

\b
  rule=dfa                    which rule (bpfree rules lists them)
  rule.scale=0.5              an option of the rule (bpfree rules dfa)
  task=mnist                  which data (bpfree tasks)
  network=mlp network.depth=6 which network, and its sizes (bpfree networks)
  budget.epochs=20            or .samples, .seconds, .forwards, .operations
  optimizer.lr=0.001 batch_size=128 seed=1 device=cpu
  tracking.to=[csv]           metrics.csv instead of MLflow
  tracking.enabled=false      neither

A run has a folder under runs/ (output=...): its configuration, metrics, plots and checkpoints. MLflow shows all runs:
`mlflow ui --backend-store-uri sqlite:///mlflow.db`.

Ctrl-C (or SIGTERM, or SIGHUP) saves a checkpoint first; `bpfree train --resume RUN` resumes the run, bit for bit.

Several processes train together under a launcher: `torchrun --nproc-per-node 2 -m bpfree train ...`, or `--ray N` for a cluster. They share
the blocks of a network where these are independent, else the examples of each batch (parallel=blocks, data).
"""


@click.command(help=HELP, short_help="Train one rule on one task.")
@click.argument("settings", nargs=-1, metavar="[SETTINGS]...", shell_complete=setting)
@click.option(
    "--config",
    "-c",
    "configs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="YAML file of settings (repeatable); later files override earlier ones.",
)
@click.option("--print-config", is_flag=True, help="Print the complete configuration with the meaning of each key, and exit.")
@click.option("--print-plan", is_flag=True, help="Show how the rule treats each layer of the network (if it reports a plan), and exit.")
@click.option("--resume", metavar="RUN", shell_complete=run_name, help="Resume a run (folder, name or checkpoint file).")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.option("--quick", is_flag=True, help="Smoke run with a few batches of each split (quick=true).")
@allow_code
@click.option("--ray", type=click.IntRange(1, 1024), metavar="N", help="Train in N processes of a Ray cluster.")
@click.option(
    "--address", metavar="ADDRESS", help="Address of the Ray cluster, or `auto`.  [default: $RAY_ADDRESS, otherwise a local cluster]"
)
@json_option
def train(
    settings: tuple[str, ...],
    configs: tuple[Path, ...],
    print_config: bool,
    print_plan: bool,
    resume: str | None,
    quiet: bool,
    quick: bool,
    allow_code: tuple[str, ...],
    ray: int | None,
    address: str | None,
    as_json: bool,
) -> int:
    from bpfree import runner
    from bpfree.cli.annotate import annotate
    from bpfree.cli.output import PlanDisplay, exit_code, print_json, print_result
    from bpfree.config import allowing, resolve
    from bpfree.errors import UsageError
    from bpfree.leaves import last_said, parse_words, read_yaml
    from bpfree.training.distributed import World

    world = World.here()
    with world.joined():
        quiet = quiet or not world.first
        observers = [] if quiet else [PlanDisplay()]
        with world.agreed():
            leaves = [leaf for path in configs for leaf in read_yaml(path)] + parse_words([*settings, *(["quick=true"] if quick else [])])
            if address is not None and ray is None:
                raise UsageError("--address needs --ray", where="--address", fix="add --ray N, or leave out --address")
            if resume is not None and (print_config or print_plan):
                raise UsageError(
                    "--print-config and --print-plan cannot be combined with --resume",
                    where="--resume",
                    fix="read config.yaml and plan.txt in the run's folder",
                )
            registry = allowing(leaves, allow_code)
            recipe = resolve(leaves, registry) if resume is None and (ray is None or print_config or print_plan) else None
        if recipe is not None and (print_config or print_plan):
            if world.first:
                width = width_of(sys.stdout)
                click.echo(annotate(recipe, width) if print_config else fitted(_plan(recipe), width), nl=not print_config)
            return 0
        if ray is not None:
            run = _on_ray(leaves, ray, address, resume, quiet, registry)
        elif recipe is not None:
            if not quiet:
                store = ", opening the tracking store" if recipe.settings.tracking.enabled else ""
                click.echo(f"{recipe.trains} on {recipe.names['task']}: loading data{store} ...", err=True)
            run = runner.run(recipe, quiet=quiet, observers=observers)
        else:
            place = resume or ""
            output = last_said(leaves, "output", "runs")
            finished = world.from_first(lambda: runner.has_finished(place, output=output)) and all(leaf.key == "output" for leaf in leaves)
            run = runner.resume(place, output=output, changes=leaves, quiet=quiet, observers=observers, registry=registry)
            if finished and world.first:
                click.echo("this run is already finished; raise its budget (budget.epochs=...) to train it further\n", err=True)
    if world.first and as_json:
        about = {"run": run.id, "status": run.status, "reason": run.reason, "folder": run.folder, "epoch": run.epoch, "tags": run.tags}
        print_json({**about, "result": run.result})
    elif world.first:
        print_result(run)
    return exit_code(run)


def _plan(recipe: Recipe) -> str:
    from bpfree.redaction import redact

    plan = "" if recipe.is_program else recipe.build_rule(recipe.spec()).plan()
    kind = "program" if recipe.is_program else "rule"
    return redact(plan.rstrip()) or f"the {kind} {recipe.trains!r} reports no plan"


def _on_ray(leaves: list[Leaf], size: int, address: str | None, resume: str | None, quiet: bool, registry: Plugins) -> Run:
    from bpfree import ray_team
    from bpfree.errors import BpfreeError

    if not quiet:
        click.echo(f"training in {size} processes of a Ray cluster ...", err=True)
    try:
        return ray_team.train(leaves, size=size, address=address, resume=resume, registry=registry)
    except BpfreeError as error:
        if error.exit_code > 128:  # no progress display has printed how to resume
            click.echo(str(error), err=True)
        raise
