"""Print tables and results of runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from bpfree.document.tables import text_pairs, text_table
from bpfree.document.terminal import fitted, width_of
from bpfree.hooks import hookimpl
from bpfree.run import Run

__all__ = ["PlanDisplay", "exit_code", "json_option", "print_json", "print_pairs", "print_result", "print_table", "say"]


class PlanDisplay:
    """Shows a run's ``plan.txt``, if it has one, on standard error before training begins."""

    @hookimpl(tryfirst=True)
    def run_start(self, run: Run) -> None:
        """Show the plan."""
        if "plan.txt" in run.artifacts:
            click.echo(run.artifacts["plan.txt"].read_text(encoding="utf-8"), err=True)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Container[int] = ()) -> None:
    """Print a plain table that fits the terminal; columns in ``right`` are aligned to the right, and empty ones left out."""
    listed = [list(map(str, row)) for row in rows]
    used = [place for place in range(len(headers)) if not listed or any(row[place] for row in listed)]
    lines = [[row[place] for place in used] for row in listed]
    numbers = [number for number, place in enumerate(used) if place in right]
    click.echo("\n".join(text_table([headers[place] for place in used], lines, numbers, width_of(sys.stdout))))


def print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, a line each, without those whose value is empty."""
    click.echo("\n".join(text_pairs(pairs, width_of(sys.stdout))))


def say(text: str, *, err: bool = False) -> None:
    """Print text that fits the terminal."""
    click.echo(fitted(text, width_of(sys.stderr if err else sys.stdout)), err=err)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
"""The option of every listing."""


def print_json(content: Any) -> None:
    """Print JSON, with ``null`` for numbers that JSON does not have."""
    click.echo(json.dumps(finite(content), indent=2, ensure_ascii=False, default=str))


def finite(content: Any) -> Any:
    """Replace NaN and infinite numbers by ``None``."""
    if isinstance(content, Mapping):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_result(run: Run) -> None:
    """Print the result of a run in a few lines."""
    result = run.result
    lines = [("status", f"{run.status}{f': {run.reason}' if run.reason else ''}")]
    for metric, value in run.scores("test"):
        error = result.get(f"test/{metric.name}_se")
        spread = "" if error is None else f" +- {metric.text(error)} (standard error over draws)"
        lines.append((f"test {_words(metric.name)}", f"{metric.text(value)}{spread}"))
    for metric, value in run.scores("val"):
        best = metric.best(seen for metrics in run.history if not math.isnan(seen := metrics.get(f"val/{metric.name}", math.nan)))
        lines.append((f"validation {_words(metric.name)}", f"{metric.text(value)} last, {metric.text(best)} best"))
    lines.extend(protocol_lines(run))
    if "classes" in run.tags:
        lines.append(("classes", run.tags["classes"]))
    if "train/seconds" in result:
        spent = f"{result['train/seconds']:.1f} s"
        if "train/processor_seconds" in result:
            spent += f" ({result['train/processor_seconds']:.1f} of the processor)"
        speed = f", {result['train/samples_per_second']:,.0f} samples/s" if "train/samples_per_second" in result else ""
        steps = f", {result['train/steps']:,.0f} steps" if "train/steps" in result else ""
        lines.append(("training", f"{spent}{speed}{steps}"))
        if "train/peak_memory_mb" in result:
            lines.append(("memory", f"{result['train/peak_memory_mb']:.1f} MiB of tensors at the peak of a step, without the data"))
    if "parameters" in result and "parameters_trained" in result:
        lines.append(("parameters", f"{result['parameters']:,.0f} ({result['parameters_trained']:,.0f} trained)"))
    if run.tags.get("quick"):
        lines.append(("quick", "a smoke run: its numbers are meaningless"))
    if "mlflow_uri" in run.tracking:
        lines.append(("tracking", run.tracking["mlflow_uri"]))
    if run.folder is not None:
        lines.append(("folder", str(run.folder)))
    print_pairs(lines)


def protocol_lines(run: Run) -> Iterator[tuple[str, str]]:
    """Format the results of evaluation protocols, a line each."""
    from bpfree.plugins import installed_plugins
    from bpfree.tasks.protocols import result_key

    for name in installed_plugins().names("protocols"):
        prefix = f"test/{result_key(name)}/"
        for key, value in run.result.items():
            if key.startswith(prefix):
                metric, held = run.metric(key), run.result.get(f"val/{key.removeprefix('test/')}")
                validation = "" if held is None else f", {metric.text(held)} on validation"
                yield name, f"{_words(metric.name)} {metric.text(value)}{validation}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def exit_code(run: Run) -> int:
    """Return the exit code of a run: 0 if it finished, 1 if it diverged."""
    return 0 if run.status == "finished" else 1
