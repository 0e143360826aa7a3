"""The outcome of a run in a few lines, as a person would paste them into a message."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from statistics import fmean

from bpfree.document.terminal import duration
from bpfree.run import Run

__all__ = ["outcome"]

FEW_BLOCKS = 6


def outcome(run: Run) -> Sequence[tuple[str, str]]:
    """Return name and text of each line; a text may have several lines, and what was not measured has none."""
    return [*_head(run), *_scores(run), *_others(run), *_alignment(run), *_costs(run), *_places(run)]


def _head(run: Run) -> Iterator[tuple[str, str]]:
    tags = run.tags
    trained = tags.get("rule") or tags.get("program")
    if trained:
        network = f" ({tags['network']})" if "network" in tags else ""
        yield "run", f"{trained} on {tags.get('task', '?')}{network}, seed {tags.get('seed', '?')}"
    epochs = f" after {run.epoch} epoch{'s' * (run.epoch != 1)}" if run.epoch else ""
    yield "status", f"{run.status}{epochs}{f': {run.reason}' if run.reason else ''}"
    if tags.get("quick"):
        yield "quick", "a smoke run: its numbers are meaningless"


def _scores(run: Run) -> Iterator[tuple[str, str]]:
    for metric, value in run.scores("test"):
        error = run.result.get(f"test/{metric.name}_se")
        spread = "" if error is None else f" +- {metric.text(error)} (standard error over draws)"
        yield f"test {_words(metric.name)}", f"{metric.text(value)}{spread}"
    for metric, value in run.scores("val"):
        seen = [value for metrics in run.history if not math.isnan(value := metrics.get(f"val/{metric.name}", math.nan))]
        best = f" last, {metric.text(metric.best(seen))} best" if seen else ""
        yield f"validation {_words(metric.name)}", f"{metric.text(value)}{best}"


def _others(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the best of the rule's other predictions, and the results of protocols."""
    protocols = {name.replace("-", "_"): name for name in run.config.get("evaluation.protocols", [])}
    primary, found = run.primary, dict[str, float]()
    for key, value in run.result.items():
        split, name, last = (*key.split("/"), "", "")[:3]
        if split != "test" or not last:
            continue
        if name in protocols:
            metric, held = run.metric(key), run.result.get(f"val/{name}/{last}")
            yield (
                protocols[name],
                f"{_words(metric.name)} {metric.text(value)}" + ("" if held is None else f", {metric.text(held)} on validation"),
            )
        elif last == primary.name and not math.isnan(value):
            found[name] = value
    if found:
        best = primary.best(found.values())
        name = next(name for name, value in found.items() if value == best)
        yield (
            "other predictions",
            f"{_words(primary.name)} {primary.text(best)} ({name}{f', the best of {len(found)}' if len(found) > 1 else ''})",
        )


def _alignment(run: Run) -> Iterator[tuple[str, str]]:
    if not run.config.get("alignment.every"):
        return
    wanted = {"cosine": "cosine with the true gradient", "objective_cosine": "cosine with the gradient of the rule's objective"}
    wanted |= {"variance": "relative variance of estimates"}
    last = next((metrics for metrics in reversed(run.history) if any(key.startswith("alignment/") for key in metrics)), {})
    texts = []
    for kind, words in wanted.items():
        blocks = {key.split("/")[1]: value for key, value in last.items() if key.startswith("alignment/") and key.endswith(f"/{kind}")}
        if blocks:
            texts.append(f"{words}: {_by_block(blocks)}")
    yield "alignment", "\n".join(texts) or "not measured: no step was compared, or the rule's credit cannot be"


def _by_block(values: dict[str, float]) -> str:
    if len(values) <= FEW_BLOCKS:
        return ", ".join(f"{name} {value:.2g}" for name, value in values.items())
    (first, *_, final), numbers = values, list(values.values())
    return f"mean {fmean(numbers):.2g} of {len(values)} blocks ({first} {numbers[0]:.2g} to {final} {numbers[-1]:.2g})"


def _costs(run: Run) -> Iterator[tuple[str, str]]:
    result = run.result
    if "train/seconds" in result:
        spent = duration(result["train/seconds"])
        if "train/processor_seconds" in result:
            spent += f" ({duration(result['train/processor_seconds'])} of processor time)"
        steps = f", {result['train/steps']:,.0f} steps" if "train/steps" in result else ""
        speed = f", {result['train/samples_per_second']:,.0f} samples/s" if "train/samples_per_second" in result else ""
        yield "training", f"{spent}{steps}{speed}"
    if (peak := result.get("train/peak_memory_mb", 0.0)) >= 0.05:
        yield "memory", f"{peak:,.1f} MiB of tensors at the peak of a step, without the data"
    if "parameters" in result and "parameters_trained" in result:
        yield "parameters", f"{result['parameters']:,.0f} ({result['parameters_trained']:,.0f} trained)"


def _places(run: Run) -> Iterator[tuple[str, str]]:
    if "classes" in run.tags:
        yield "classes", run.tags["classes"]
    if "mlflow_uri" in run.tracking:
        yield "tracking", run.tracking["mlflow_uri"]
    if run.folder is None:
        return
    yield "record", str(run.folder)
    place = shlex.quote(str(run.folder))
    if run.status == "finished":
        more = "" if "program" in run.tags else f"\nbpfree train --resume {place} budget.epochs={2 * max(1, run.epoch)}"
        yield "next", f"bpfree evaluate {place}{more}"
    elif run.status == "interrupted" and "program" not in run.tags:
        yield "next", f"bpfree train --resume {place}"


def _words(name: str) -> str:
    return name.replace("_", " ")
