"""Show the progress of a run: a live line in a terminal, an output in place in a notebook, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from bpfree.document.terminal import duration, fitted, width_of
from bpfree.hooks import hookimpl
from bpfree.metric import LOSS, metric_of, scores_in
from bpfree.run import PAUSED, Run
from bpfree.tracking.notebook import Place, in_notebook, output

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from bpfree.step import Phase

__all__ = ["ProgressDisplay"]

BETWEEN_LINES = 2.0
BETWEEN_FEATURES = 15.0
FEW_PHASES = 8
SHARED = {"blocks": "blocks", "data": "examples of each batch"}


class ProgressDisplay:
    """Shows runs, one after the other.

    Args:
        quiet: show only runs that did not finish.
        stream: output, live if it is a terminal; ``None``: standard error, or the output of a notebook's cell.
        label: before the run's name, such as ``[2/6]`` in a comparison.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None, label: str | None = None) -> None:
        self.quiet, self.label = quiet, label
        self._stream = stream
        self._view: _Plain | _Live | _Notebook | None = None

    @hookimpl
    def run_start(self, run: Run) -> None:
        """Prepare the display without starting it, because another observer may still refuse the run."""
        stream = self._stream or output()
        name = f"{self.label} {run.name}" if self.label else run.name
        if self.quiet:
            self._view = None
        else:
            live = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
            if self._stream is None and in_notebook():
                self._view = _Notebook(name)
            else:
                self._view = _Live(name, stream, run) if live else _Plain(name, stream, run)
            if int(run.tags.get("world_size", 1)) > 1:
                print_line(stream, f"{name}: {run.tags['world_size']} processes share the {SHARED[run.tags['parallel']]}")

    @hookimpl
    def phase_start(self, run: Run, phase: Phase) -> None:
        """Show the name of the phase."""
        if self._view is not None:
            self._view.phase(phase.name)

    @hookimpl
    def progress(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Update the display inside an epoch."""
        if self._view is not None:
            self._view.inside(run, metrics)

    @hookimpl
    def epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Show the epoch's metrics."""
        if self._view is not None:
            self._view.epoch(run, metrics)

    @hookimpl(trylast=True)
    def run_end(self, run: Run) -> None:
        """Print how the run ended, and how to resume it."""
        text = f"{self.label} {_ending(run)}" if self.label else _ending(run)
        if self._view is not None:
            self._view.end(text)
        elif run.status != "finished" and not run.reason.startswith(PAUSED):  # the caller that stopped the run reports it
            print_line(self._stream or output(), text)
        self._view = None


def print_line(stream: TextIO, text: str) -> None:
    """Print a line that fits the terminal, without buffering, also into a pipe."""
    stream.write(f"{fitted(text, width_of(stream))}\n")
    stream.flush()


class _Plain:
    """One line per epoch, at most one in two seconds, and the last."""

    def __init__(self, name: str, stream: TextIO, run: Run) -> None:
        self._name, self._stream = name, stream
        self._clock = _ClockText()
        self._shown = -math.inf
        self._held: str | None = None
        self._phases = 0
        self._phase = ""
        epochs = f", {run.total_epochs} epoch{'s' * (run.total_epochs > 1)}" if run.total_epochs else ""
        again = f", resumed after epoch {run.epoch}" if run.resumed else ""
        print_line(stream, f"{name}: started{epochs}{again}")

    def phase(self, name: str) -> None:
        self._phases += 1
        self._phase = name if name != "train" else ""
        if self._phase and self._phases <= FEW_PHASES:
            print_line(self._stream, f"{self._name}: phase {name}")

    def inside(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._clock.note(metrics.get("progress", math.nan))
        if (aside := _aside(metrics)) and time.monotonic() - self._shown >= BETWEEN_FEATURES:
            self._shown = time.monotonic()
            print_line(self._stream, f"{self._name}: {aside}")

    def epoch(self, run: Run, metrics: Mapping[str, float]) -> None:
        share = metrics.get("epoch", 0) / run.total_epochs if run.total_epochs else math.nan
        left = self._clock.note(share)
        self._held = "  ".join(
            [
                f"{self._name}: {_count(run, metrics)}",
                *([self._phase] if self._phase else []),
                *_summary(run, metrics),
                *([f"{left} left"] if left else []),
            ]
        )
        if time.monotonic() - self._shown >= BETWEEN_LINES or metrics.get("epoch") == run.total_epochs:
            self._show()

    def _show(self) -> None:
        if self._held is not None:
            print_line(self._stream, self._held)
            self._held, self._shown = None, time.monotonic()

    def end(self, text: str) -> None:
        self._show()
        print_line(self._stream, text)


class _Live:
    """A bar and a line of numbers that stay in place while the run lasts; the last numbers remain as a line."""

    def __init__(self, name: str, stream: TextIO, run: Run) -> None:
        self._name, self._stream = name, stream
        self._shown: tuple[Live, Progress, TaskID, Text] | None = None
        self._clock = _ClockText()
        self._phase = ""
        self._texts: list[str] = []

    def _begin(self) -> tuple[Live, Progress, TaskID, Text]:
        if self._shown is None:
            from rich.console import Console, Group
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column
            from rich.text import Text

            console = Console(file=self._stream)
            name = TextColumn("{task.description}", style="bold", markup=False, table_column=Column(no_wrap=True, max_width=36))
            others = [
                TextColumn(f"{{task.fields[{key}]}}", markup=False, table_column=Column(no_wrap=True)) for key in ("count", "phase", "left")
            ]
            bar = Progress(name, BarColumn(20), *others, console=console)
            task = bar.add_task(self._name, total=1.0, phase="", count="", left="")
            numbers = Text("", style="dim", no_wrap=True, overflow="ellipsis")
            live = Live(
                Group(bar, numbers),
                console=console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # output to another stream, such as a file, is not redirected
                redirect_stderr=self._stream is sys.stderr,
            )
            live.start()
            self._shown = (live, bar, task, numbers)
        return self._shown

    def phase(self, name: str) -> None:
        self._phase = name if name != "train" else ""

    def inside(self, run: Run, metrics: Mapping[str, float]) -> None:
        losses = [key for key in metrics if metric_of(key).name == LOSS.name]
        if aside := _aside(metrics):
            self._show(run, metrics, metrics.get("progress", math.nan), [aside])
            return
        now = [f"loss {metrics[losses[0]]:.4g}"] if losses and not self._texts else []
        self._show(run, metrics, metrics.get("progress", math.nan), now + self._texts)

    def epoch(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._texts = _summary(run, metrics) or self._texts
        self._show(run, metrics, metrics.get("epoch", 0) / run.total_epochs if run.total_epochs else math.nan, self._texts)

    def _show(self, run: Run, metrics: Mapping[str, float], share: float, texts: list[str]) -> None:
        _, bar, task, numbers = self._begin()
        left = self._clock.note(share)
        bar.update(
            task,
            completed=None if math.isnan(share) else share,
            phase=self._phase,
            count=_count(run, metrics),
            left=f"{left} left" if left else "",
        )
        numbers.plain = "  ".join(texts)

    def end(self, text: str) -> None:
        if self._shown is not None:
            self._shown[0].stop()
        if self._texts:
            print_line(self._stream, f"{self._name}: {'  '.join(self._texts)}")
        print_line(self._stream, text)


class _Notebook:
    """A bar and numbers in an output of the notebook; how the run ended remains."""

    def __init__(self, name: str) -> None:
        self._name, self._place, self._clock = name, Place(), _ClockText()
        self._phase = ""
        self._texts: list[str] = []

    def phase(self, name: str) -> None:
        self._phase = name if name != "train" else ""

    def inside(self, run: Run, metrics: Mapping[str, float]) -> None:
        aside = _aside(metrics)
        self._show(run, metrics, metrics.get("progress", math.nan), [aside] if aside else self._texts)

    def epoch(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._texts = _summary(run, metrics) or self._texts
        self._show(run, metrics, metrics.get("epoch", 0) / run.total_epochs if run.total_epochs else math.nan, self._texts)

    def _show(self, run: Run, metrics: Mapping[str, float], share: float, texts: list[str]) -> None:
        left = self._clock.note(share)
        shown = [_count(run, metrics), self._phase, *texts, f"{left} left" if left else ""]
        self._place.show(self._name, shown, None if math.isnan(share) else share)

    def end(self, text: str) -> None:
        ended, *lines = text.partition(": ")[2].split("\n")
        self._place.show(self._name, [ended, *self._texts], lines=lines, last=True)


class _ClockText:
    """Estimates the time left from the share of the budget that this session has used and its wall time."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._left = ""

    def note(self, share: float) -> str:
        """Record the used share of the budget, and return the time left; the last estimate if the share is unknown."""
        if math.isnan(share):
            return self._left
        now = time.monotonic()
        if self._first is None:
            self._first = (now, share)
        since, begun = self._first
        self._left = duration((now - since) / (share - begun) * (1 - share)) if begun < share < 1 else ""
        return self._left


def _aside(metrics: Mapping[str, float]) -> str:
    """Describe work other than training: an evaluation, or features that are computed once before a phase's first step."""
    shares = {"features": "computing features", "evaluation": "evaluating"}
    return next((f"{what} {100 * metrics[name]:.0f} %" for name, what in shares.items() if name in metrics), "")


def _count(run: Run, metrics: Mapping[str, float]) -> str:
    epoch = int(metrics.get("epoch", run.epoch))
    return f"epoch {epoch}/{run.total_epochs}" if run.total_epochs else f"epoch {epoch}"


def _summary(run: Run, metrics: Mapping[str, float]) -> list[str]:
    """Format the main metrics: losses, the primary metric, speed."""
    parts = []
    for name, label in (("train/loss", "loss"), ("val/loss", "val loss")):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:.4g}")
    if not parts and "rule/loss" in metrics:
        parts.append(f"loss {metrics['rule/loss']:.4g}")
    measured = [metric for metric in run.measures.values() if metric.name != LOSS.name]
    for split, label in (("val", "val "), ("train", "")):
        if found := scores_in(metrics, split, measured):
            parts += [f"{label}{metric.name.replace('_', ' ')} {metric.text(value)}" for metric, value in found]
            break
    if "samples_per_second" in metrics:
        parts.append(f"{metrics['samples_per_second']:,.0f} samples/s")
    return parts


def _ending(run: Run) -> str:
    if run.status == "finished":
        results = [f"test {metric.name.replace('_', ' ')} {metric.text(value)}" for metric, value in run.scores("test")]
        results += [f"{duration(run.result['train/seconds'])} of training"] if "train/seconds" in run.result else []
        return f"{run.name}: finished{': ' if results else ''}{', '.join(results)}"
    reason = f": {run.reason}" if run.reason else ""
    text = f"{run.name}: {run.status} after epoch {run.epoch}{reason}"
    resumable = "program" not in run.tags and not run.reason.startswith(PAUSED)
    if run.status == "interrupted" and run.folder is not None and resumable:
        return f"{text}\n  resume it with: bpfree train --resume {shlex.quote(str(run.folder))}"
    return text
