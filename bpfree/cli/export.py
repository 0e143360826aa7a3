"""The command ``bpfree export``."""

from __future__ import annotations

import json

import click

from bpfree.cli.code import allow_code

HELP = """Export a trained rule as a program that needs no bpfree: RUN is a run's folder, its name, or a checkpoint file.

The program takes raw inputs, as `bpfree predict` does, and returns the rule's scores and probabilities, or its outputs. It is loaded again
and compared with the rule before the file is kept. SETTINGS change the run, for example `rule.inference=deterministic`; a rule that
predicts with noise is exported with that of --seed.

\b
Examples:
  bpfree export RUN --format onnx --output model.onnx
  bpfree export RUN --format torch-export --output model.pt2 --batch 1
"""


@click.command(help=HELP, short_help="Export a trained rule as torch.export or ONNX program.")
@click.argument("run")
@click.argument("settings", nargs=-1, metavar="[SETTINGS]...")
@click.option("--format", "kind", type=click.Choice(["torch-export", "onnx"]), required=True, help="onnx needs `bpfree[onnx]`.")
@click.option("--output", required=True, metavar="FILE", help="Where to write.")
@click.option("--batch", default="dynamic", show_default=True, metavar="N|dynamic", help="Examples in a batch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of a rule that predicts with noise.")
@allow_code
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(
    run: str, settings: tuple[str, ...], kind: str, output: str, batch: str, seed: int, allow_code: tuple[str, ...], as_json: bool
) -> int:
    from bpfree.cli.output import print_pairs
    from bpfree.cli.predict import opened
    from bpfree.errors import UsageError
    from bpfree.exporting import TOLERANCE, check_kind
    from bpfree.exporting import export as exported

    if batch != "dynamic" and not batch.isdecimal():
        raise UsageError(f"--batch {batch}", where="--batch", fix="give a number, or dynamic")
    size = None if batch == "dynamic" else int(batch)
    check_kind(kind, size)
    saved, others = opened(run, settings, "cpu", allow_code)
    if others:
        raise UsageError(f"{others[0]!r} is no setting", where="command line", fix="settings are KEY=VALUE; export reads no inputs")
    found = exported(saved, output, format=kind, batch=size, seed=seed)  # type: ignore[arg-type]
    if as_json:
        facts = {"path": str(found.path), "difference": found.difference, "examples": found.examples, "tolerance": TOLERANCE}
        click.echo(json.dumps({**facts, **found.about}))
        return 0
    shape = ", ".join(map(str, ("N" if size is None else size, *found.about["input_shape"])))
    named = saved.classes
    print_pairs(
        [
            ("program", f"{found.path} ({found.path.stat().st_size:,} bytes)"),
            ("inputs", f"inputs ({shape}) {'int64' if saved.spec.vocabulary is not None else 'float32'}, raw"),
            ("outputs", "scores, probabilities" if named else "outputs"),
            ("checked", f"loaded again: within {found.difference:.1g} of the rule on {found.examples} examples (tolerance {TOLERANCE:g})"),
        ]
    )
    return 0
