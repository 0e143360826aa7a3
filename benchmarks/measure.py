"""Common code of the benchmarks: options, timing in interleaved pairs, saved bytes, tables, result files.

Speeds are ratios within one run: the two sides are timed alternately, so that other load on the machine affects
both, and the median of the pairs' ratios is reported. Absolute times depend on the machine and its load. Wall-clock
seconds are reported with processor seconds of all threads, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle OpenMP threads that spin slow a busy machine
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import torch
from torch import Tensor

from bpfree import Task, TaskSpec
from bpfree.cli.output import print_table
from bpfree.tasks.task import Split
from bpfree.version import __version__

OUR_PATHS = ("--save", "--output", "--keep")
PEERS = {"--pcx": "PYTHON", "--biotorch": "FOLDER", "--evotorch": "FOLDER"}
"""Options that say where another implementation is, and what stands for the place."""
RESULTS = Path(__file__).resolve().parent / "results"


class Cost(NamedTuple):
    """Seconds of the clock, and of processors in all threads of the process: the latter depend less on other load."""

    wall: float
    processor: float


Pair = tuple[Cost, Cost]
"""Of ours, and of what it is compared with."""


class Benchmark:
    """The options of one benchmark and the file that its results go to.

    Args:
        name: of the script and of its result file.
        about: the script's docstring.
        pairs: interleaved pairs by default; ``None``: the benchmark has none.
    """

    def __init__(self, name: str, about: str | None, *, pairs: int | None = None) -> None:
        self.name = name
        self.parser = argparse.ArgumentParser(description=(about or name).splitlines()[0])
        self.parser.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, figures without meaning")
        self.parser.add_argument("--save", nargs="?", const=RESULTS, type=Path, metavar="FOLDER", help="write the result file")
        self.parser.add_argument("--device", default="cpu", help="cpu or cuda")
        self.parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
        if pairs is not None:
            self.parser.add_argument("--pairs", type=int, default=pairs, help=f"interleaved pairs (default {pairs})")

    def start(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the command line, set torch's threads, and record the load."""
        self._words = list(sys.argv[1:] if arguments is None else arguments)
        self.options = self.parser.parse_args(self._words)
        if self.options.quick and "pairs" in self.options:
            self.options.pairs = 1
        torch.set_num_threads(self.options.threads)
        self.device = torch.device(self.options.device)
        self._load = load()
        return self.options

    def finish(self, results: dict[str, Any], *, suffix: str = "") -> None:
        """Write ``<name><suffix>-<device>.json`` if a folder was given."""
        if self.options.save is None:
            return
        content = {"benchmark": f"{self.name}{suffix}", "command": self.command(), **self.facts(), "results": results}
        path = self.options.save / f"{self.name}{suffix}-{self.device.type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path.name}")

    def command(self) -> str:
        """Return the command line without the paths of this machine."""
        words, skip = [], False
        for word in self._words:
            path = word in OUR_PATHS or word in PEERS
            given = word.startswith(tuple(f"{name}=" for name in (*OUR_PATHS, *PEERS)))
            if not path and not given and not (skip and not word.startswith("-")):
                words.append(word)
            elif word.partition("=")[0] in PEERS:
                words += [word.partition("=")[0], PEERS[word.partition("=")[0]]]
            skip = path
        return shlex.join(["python", f"benchmarks/{self.name}.py", *words])

    def facts(self) -> dict[str, Any]:
        """Return versions, hardware, threads, date, and how busy the machine was."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "quick": self.options.quick,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "bpfree": __version__},
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu},
            "threads": self.options.threads,
            "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
            "load_average": {"before": self._load, "after": load()},
        }


def load() -> float:
    """Return the number of processes that wanted a core in the last minute."""
    return round(os.getloadavg()[0], 2)


def cpu_name() -> str:
    """Return the processor's model, as far as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- time -------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """``with Stopwatch(device) as watch: ...`` leaves the :class:`Cost` in ``watch.cost``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.cost = Cost(0.0, 0.0)

    def __enter__(self) -> Stopwatch:
        synchronize(self._device)
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        synchronize(self._device)
        wall, processor = self._began
        self.cost = Cost(time.perf_counter() - wall, time.process_time() - processor)


def timed(work: Callable[[], Any], device: torch.device, *, repeat: int = 1) -> Callable[[], Cost]:
    """Wrap ``work``, repeated ``repeat`` times, as a function that returns the cost of one repetition."""

    def measure() -> Cost:
        with Stopwatch(device) as watch:
            for _ in range(repeat):
                work()
        return Cost(watch.cost.wall / repeat, watch.cost.processor / repeat)

    return measure


def interleaved(ours: Callable[[], Cost], other: Callable[[], Cost], count: int) -> list[Pair]:
    """Measure the costs of both, ``count`` times; every second pair begins with the other."""
    pairs = []
    for number in range(count):
        first, second = (ours, other) if number % 2 == 0 else (other, ours)
        a, b = first(), second()
        pairs.append((a, b) if number % 2 == 0 else (b, a))
    return pairs


def compared(pairs: Sequence[Pair], target: float | None) -> dict[str, Any]:
    """Return all pairs, their ratios, and the median beside its target (of wall time), if there is one."""
    ratios = [ours.wall / other.wall for ours, other in pairs]
    of_processor = [ours.processor / other.processor for ours, other in pairs]
    return {
        "pairs_seconds": [[ours.wall, other.wall] for ours, other in pairs],
        "pairs_processor_seconds": [[ours.processor, other.processor] for ours, other in pairs],
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "median_processor_ratio": statistics.median(of_processor),
        "median_seconds": [statistics.median(pair[side].wall for pair in pairs) for side in (0, 1)],
        "median_processor_seconds": [statistics.median(pair[side].processor for pair in pairs) for side in (0, 1)],
        "target_ratio": target,
        "reached": None if target is None else statistics.median(ratios) <= target,
    }


RATIO_HEADERS = ("what", "ours ms", "bare ms", "median ratio", "range", "processor ratio", "pairs", "target")


def ratio_row(label: str, result: dict[str, Any]) -> list[str]:
    """Format a result of :func:`compared` under :data:`RATIO_HEADERS`."""
    ours, other = (f"{1000 * seconds:.3f}" for seconds in result["median_seconds"])
    ratio, spread = f"{result['median_ratio']:.3f}", f"{min(result['ratios']):.3f} to {max(result['ratios']):.3f}"
    of_processor = f"{result['median_processor_ratio']:.3f}"
    target = "" if result["target_ratio"] is None else f"<= {result['target_ratio']:g}"
    return [label, ours, other, ratio, spread, of_processor, str(len(result["ratios"])), target]


def show_ratios(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of ratios."""
    print_table(RATIO_HEADERS, [ratio_row(label, result) for label, result in results.items()], right=range(1, 8))


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(work: Callable[[], Any]) -> int:
    """Return the peak bytes of tensors saved for backward while ``work`` runs."""
    alive: dict[int, int] = {}
    peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            self.tensor = tensor
            alive[id(self)] = tensor.numel() * tensor.element_size()
            peak = max(peak, sum(alive.values()))

        def __del__(self) -> None:
            alive.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        work()
    return peak


# --- data -------------------------------------------------------------------------------------------------------------


def synthetic_task(spec: TaskSpec, *, train: int, held: int = 256, seed: int = 0) -> Task:
    """Make random uint8 images and classes in the shapes of a task, for speed alone."""
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, *spec.input_shape), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(spec.outputs, (count,), generator=generator))

    return Task(spec, split(train), split(held), split(held))
