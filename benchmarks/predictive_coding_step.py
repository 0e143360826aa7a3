"""Predictive coding's step beside PCX's, back-propagation's and the generic path; bytes kept during its credit, against depth.

Speed: MLP 784-300-300-10 with GELU, batch 64, T=8 inference steps of plain SGD at rate 0.01 on the states, a squared error at the
clamped output, then a step of AdamW at rate 3e-4 on the weights. A step is ``rule.learn``, without the measurements that the rule makes
of itself at every hundredth one (``profile_every=0``), which PCX does not make either.

PCX (``--pcx``, the Python of an environment that has it; see pcx_step.py) runs in a separate process, on as many cores, and the same
ones; the two take turns. Before that, both take some steps from the same weights on the same batches, which must change
the weights alike. Targets: no slower than PCX; aim half its time. The other ratios have no target.

Memory: the peak of what ``rule.credit`` allocates, beyond parameters, buffers and ``.grad``, for hidden layers of width 128, batch
64. Every layer has a state, a prediction and, once one has reached it, an error, so it grows with depth; with T only until errors have
reached all layers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import measure
import numpy as np
import torch
from bpfree_predictive_coding.rules import PredictiveCoding
from forward_gradient_memory import peak
from measure import Cost
from torch import Tensor
from torch.nn import functional as F

from bpfree import Batch, Rule, TaskSpec
from bpfree.baselines import Backprop
from bpfree.cli.output import print_table
from bpfree.network.builders import MLPConfig, mlp
from bpfree.options import OptimizerConfig
from bpfree.training.stepper import new_step

SPEC = TaskSpec("vectors", (784,), 10)
OPTIMIZER = OptimizerConfig("adamw", lr=3e-4, weight_decay=0.01)
BATCHES, CHECKED = 32, 5
"""Batches that both sides go through again and again, too many to be learned by heart soon, and those of the check."""
TARGET, CLOSE = 1.0, 0.01
DEPTHS, WIDTH = (4, 8, 16, 32), 128
PATHS = {"closed form": "auto", "generic": "generic"}
FACTORS = (1, 4, 8)
"""On T: with the second one, errors reach all layers of the deepest network."""
PEER = Path(__file__).resolve().parent / "pcx_step.py"


@dataclass(frozen=True)
class Setting:
    """What is timed."""

    widths: tuple[int, ...] = (300, 300)
    batch: int = 64
    T: int = 8
    state_lr: float = 0.01
    state_momentum: float = 0.0
    output: str = "squared"
    steps: int = 50
    """Between two readings of the clock."""

    def config(self, **options: Any) -> Any:
        """Return the rule's configuration."""
        names = ("T", "state_lr", "state_momentum", "output")
        return PredictiveCoding.Config(**{name: getattr(self, name) for name in names}, **{"profile_every": 0, **options})

    def words(self) -> list[str]:
        """Return the command-line words for pcx_step.py."""
        sizes = [SPEC.input_size, *self.widths, SPEC.outputs]
        words = ["--sizes", *sizes, "--batch", self.batch, "--T", self.T, "--output", self.output, "--activation", "gelu"]
        words += ["--state-lr", self.state_lr, "--state-momentum", self.state_momentum]
        return [*map(str, words), "--lr", str(OPTIMIZER.lr), "--weight-decay", str(OPTIMIZER.weight_decay)]


# --- our side ---------------------------------------------------------------------------------------------------------


def network(widths: Sequence[int], spec: TaskSpec = SPEC) -> Any:
    """Build a perceptron of these widths, always with the same initial weights."""
    torch.manual_seed(0)
    return mlp(spec, MLPConfig(widths=list(widths), activation="gelu"))


def batches(count: int, setting: Setting, device: torch.device) -> list[Batch]:
    """Make random batches."""
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(setting.batch, SPEC.input_size, generator=generator).to(device),
            torch.randint(SPEC.outputs, (setting.batch,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def steps(rule: Rule, setting: Setting, device: torch.device) -> Callable[[], Cost]:
    """Return a function that takes a number of steps and returns the cost of one; called once already as a warm-up."""
    step, data = new_step(rule, OPTIMIZER), batches(BATCHES, setting, device)

    def work() -> None:
        for number in range(setting.steps):
            rule.learn(data[number % BATCHES], step)
            step.index += 1

    def measured() -> Cost:
        cost = measure.timed(work, device)()
        return Cost(cost.wall / setting.steps, cost.processor / setting.steps)

    measured()
    return measured


# --- PCX --------------------------------------------------------------------------------------------------------------


class Pcx:
    """The other process: ``with Pcx(python, setting, threads) as pcx: ...``."""

    def __init__(self, python: str, setting: Setting, threads: int) -> None:
        self._command = [python, str(PEER), "--threads", str(threads), *setting.words()]
        self._setting = setting

    def __enter__(self) -> Pcx:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"pcx_step.py ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def steps(self) -> Cost:
        """Return the cost of one step, averaged over several."""
        cost, count = self.ask("run", self._setting.steps), self._setting.steps
        return Cost(cost["wall"] / count, cost["processor"] / count)


@contextlib.contextmanager
def same_cores(threads: int) -> Iterator[None]:
    """Restrict this thread, and the processes that it starts, to the first cores that it may use: PCX takes the same."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def linear_layers(rule: Rule) -> list[torch.nn.Linear]:
    return [module for module in rule.network.modules() if isinstance(module, torch.nn.Linear)]


def difference(pcx: Pcx, setting: Setting) -> float:
    """Return how far a few steps of ours and of PCX's from the same weights end apart, relative to PCX's change.

    Adam divides by the gradients' size, so that the rounding of the smallest ones shows; hence the whole vector's norm.
    """
    rule = PredictiveCoding(network(setting.widths), SPEC, setting.config())
    before = parameters(rule)
    data = batches(CHECKED, setting, torch.device("cpu"))
    targets = [F.one_hot(batch.targets, SPEC.outputs).float() for batch in data if batch.targets is not None]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, inputs=torch.stack([batch.inputs for batch in data]), targets=torch.stack(targets), **before)
        pcx.ask("check", source, target)
        theirs = {name: torch.from_numpy(value) for name, value in np.load(target).items()}
    step = new_step(rule, OPTIMIZER)
    for batch in data:
        rule.learn(batch, step)
        step.index += 1
    ours = parameters(rule)
    apart = sum((ours[name] - theirs[name]).square().sum() for name in ours)
    moved = sum((theirs[name] - before[name]).square().sum() for name in ours)
    return float(torch.as_tensor(apart / moved).sqrt())


def parameters(rule: Rule) -> dict[str, Tensor]:
    """Copy the parameters, under the names that pcx_step.py uses."""
    layers = linear_layers(rule)
    weights = {f"weight{index}": layer.weight.detach().clone() for index, layer in enumerate(layers)}
    return weights | {f"bias{index}": layer.bias.detach().clone() for index, layer in enumerate(layers)}


# --- the comparisons --------------------------------------------------------------------------------------------------


def against_pcx(python: str, setting: Setting, threads: int, count: int) -> tuple[str, dict[str, Any]]:
    """Compare with PCX; returns a label with versions, and the ratio."""
    with same_cores(threads), Pcx(python, setting, threads) as pcx:
        apart = difference(pcx, setting)
        ours = steps(PredictiveCoding(network(setting.widths), SPEC, setting.config()), setting, torch.device("cpu"))
        pcx.steps()
        found = measure.compared(measure.interleaved(ours, pcx.steps, count), TARGET)
    versions = pcx.facts["versions"]
    label = f"PCX {versions['pcx']}, jax {versions['jax']}"
    return label, found | {"facts": pcx.facts, "relative_difference_of_updates": apart, "same_arithmetic": apart <= CLOSE}


def against_others(setting: Setting, device: torch.device, count: int) -> dict[str, dict[str, Any]]:
    """Return ratios to other steps of ours, each with its own network."""

    def ours(**options: Any) -> Callable[[], Cost]:
        return steps(PredictiveCoding(network(setting.widths), SPEC, setting.config(**options)).to(device), setting, device)

    others = {
        "back-propagation": steps(Backprop(network(setting.widths), SPEC).to(device), setting, device),
        "path=generic": ours(path="generic"),
        "profile_every=100": ours(profile_every=100),
    }
    step = ours()
    return {label: measure.compared(measure.interleaved(step, other, count), None) for label, other in others.items()}


def memory(depths: Sequence[int], setting: Setting, device: torch.device) -> dict[str, Any]:
    """Return the peak bytes by rule and depth."""
    spec = TaskSpec("vectors", (WIDTH,), SPEC.outputs)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(setting.batch, WIDTH, generator=generator),
        torch.randint(spec.outputs, (setting.batch,), generator=generator),
    )
    batch = Batch(inputs.to(device), targets.to(device))
    sizes: dict[str, dict[int, int]] = {}
    for depth in depths:

        def made(factor: int, path: str = "auto", depth: int = depth) -> Rule:
            config = replace(setting, T=factor * setting.T).config(path=path)
            return PredictiveCoding(network([WIDTH] * depth, spec), spec, config)

        rules = {f"{label}, T={factor * setting.T}": made(factor, path) for label, path in PATHS.items() for factor in FACTORS}
        rules["backprop"] = Backprop(network([WIDTH] * depth, spec), spec)
        for name, rule in rules.items():
            sizes.setdefault(name, {})[depth] = peak(rule.to(device), batch, device)
    first, last = depths[0], depths[-1]
    return {
        "rules": {
            name: {
                "peak_bytes": by_depth,
                "growth": by_depth[last] / by_depth[first],
                "bytes_per_layer": (by_depth[last] - by_depth[first]) / (last - first),
            }
            for name, by_depth in sizes.items()
        },
        "activation_bytes_per_layer": setting.batch * WIDTH * 4,
    }


def show_memory(found: dict[str, Any], depths: Sequence[int]) -> None:
    activation = found["activation_bytes_per_layer"]
    headers = ["KiB at depth", *map(str, depths), "growth", "activations per layer"]
    rows = [
        [
            name,
            *(f"{result['peak_bytes'][depth] / 1024:,.0f}" for depth in depths),
            f"{result['growth']:.2f}",
            f"{result['bytes_per_layer'] / activation:.2f}",
        ]
        for name, result in found["rules"].items()
    ]
    print_table(headers, rows, right=range(1, len(headers)))
    print(f"one layer's activations take {activation / 1024:.0f} KiB")


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("predictive_coding_step", __doc__, pairs=15)
    benchmark.parser.add_argument("--pcx", action="append", default=[], metavar="PYTHON", help="Python with PCX; repeatable")
    benchmark.parser.add_argument("--only", choices=["speed", "memory"], help="measure only this part")
    options = benchmark.start(arguments)
    setting = Setting(widths=(16, 16), batch=8, T=2, steps=2) if options.quick else Setting()
    results: dict[str, Any] = {}
    if options.only != "memory":
        speed = results["speed"] = {}
        if options.pcx and benchmark.device.type == "cpu":
            for python in options.pcx:
                label, speed[label] = against_pcx(python, setting, options.threads, options.pairs)
        else:
            print(
                "PCX is left out"
                + (": it is compared on the CPU only" if options.pcx else "; --pcx PYTHON names an environment that has it")
            )
        speed |= against_others(setting, benchmark.device, options.pairs)
        measure.show_ratios(speed)
        for label, result in speed.items():
            if "facts" in result:
                verdict = "the same arithmetic" if result["same_arithmetic"] else "NOT the same arithmetic"
                print(f"{label}: {verdict}; updates differ by {result['relative_difference_of_updates']:.1e} of their size")
    if options.only != "speed":
        depths = (2, 4) if options.quick else DEPTHS
        results["memory"] = memory(depths, setting, benchmark.device)
        show_memory(results["memory"], depths)
    benchmark.finish(results)


if __name__ == "__main__":
    main()
