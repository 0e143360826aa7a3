"""NoProp-DT's blocks in two processes against one, of one thread each. Targets: 1.8 times the blocks per second, or 0.95 of two copies.

Three arms are timed in turn, in two processes that stand ready: *one* trains the whole network; *two* share its blocks
(``parallel=blocks``, Gloo); *copies* are two plain loops that know nothing of each other, over the same blocks with the same loss and
optimiser and no rule code. A block counts once for each batch that it has learned from. What two copies reach is what the machine gives
to two processes at all: caches and memory are shared, and so is other load.

*One* and *two* are runs of the trainer: the seconds of their second pass, on the trainer's clock, with the exchange of blocks at its
end, and without start-up, evaluation and checkpoints. Both begin with the same weights, and are to end with the same bits.

Cases: ``cnn``, T=10 blocks of ``noprop-cnn``, MNIST's shapes; ``resnet``, T=4 blocks whose stems are torchvision's ResNet-18 in CIFAR
form with a quarter of its width. Batches of 128 random inputs, one-hot embeddings.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import measure
import torch
import torch.nn.functional as F

from bpfree import TrainConfig
from bpfree.cli.output import print_table
from bpfree.config import parse_words, resolve
from bpfree.rule import Rule
from bpfree.training.config import BudgetConfig, EvaluationConfig
from bpfree.training.trainer import Trainer

FASTER, OF_COPIES = 1.8, 0.95
BATCH = 128


@dataclass(frozen=True)
class Case:
    """A network of T blocks, and the steps of a timed pass."""

    T: int
    task: str
    steps: int
    settings: tuple[str, ...]

    def make(self) -> Rule:
        """Build the rule with its defaults, from the same random numbers in every process."""
        torch.manual_seed(0)
        recipe = resolve(parse_words(["rule=noprop-dt", f"rule.T={self.T}", f"task={self.task}", *self.settings]))
        return recipe.build_rule(recipe.registry.get("tasks", self.task).spec(recipe.options["task"], None))


CASES = {
    "cnn": Case(10, "mnist", 40, ("network=noprop-cnn",)),
    "resnet": Case(4, "cifar10", 8, ("network=noprop", "network.stem=torchvision:resnet18", "network.options={width: 0.25}")),
}


def trained(case: Case, steps: int, batch: int) -> tuple[float, str]:
    """Train by a run, in which this process has all blocks or a part of them.

    Returns:
        The seconds of its second pass, and a hash of the weights that it ends with.
    """
    rule = case.make()
    task = measure.synthetic_task(rule.spec, train=steps * batch, held=batch)
    config = TrainConfig(
        device="cpu", threads=1, batch_size=batch, budget=BudgetConfig(epochs=2), evaluation=EvaluationConfig(every=2, test=False)
    )
    first, second = Trainer(rule, task, config).fit().history
    bits = hashlib.sha256(b"".join(value.numpy().tobytes() for value in rule.state_dict().values()))
    return second["seconds"] - first["seconds"], bits.hexdigest()


def plain(case: Case, steps: int, batch: int, barrier: Any) -> float:
    """Return the seconds of a hand-written loop: each block's forward pass, loss, backward pass, and one fused optimiser."""
    rule: Any = case.make()
    rule.train()
    blocks = list(rule.network.blocks.values())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, *rule.spec.input_shape, generator=generator)
    u = F.one_hot(torch.randint(rule.spec.outputs, (batch,), generator=generator), rule.spec.outputs).float()
    states = [torch.randn(u.shape, generator=generator) for _ in blocks]
    optimizer = torch.optim.AdamW([p for block in blocks for p in block.parameters()], lr=1e-3, weight_decay=1e-3, fused=True)

    def step() -> None:
        for block, z in zip(blocks, states, strict=True):
            F.mse_loss(block(inputs, z).softmax(1), u, reduction="sum").div(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    barrier.wait()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - began


def serve(pipe: Connection, barrier: Any, rank: int) -> None:
    """Serve as one of the two processes: do one job after the other."""
    torch.set_num_threads(1)
    while True:
        what, name, steps, batch, port = pipe.recv()
        for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(variable, None)
        if what == "two":
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        pipe.send((plain(CASES[name], steps, batch, barrier), "") if what == "copies" else trained(CASES[name], steps, batch))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def blocks_per_second(pipes: Sequence[Connection], what: str, name: str, steps: int, batch: int) -> tuple[float, set[str]]:
    """Return the blocks per second of all processes that take part, by the time of the slowest, and hashes of their weights."""
    parts = pipes[:1] if what == "one" else pipes
    port = free_port()
    for pipe in parts:
        pipe.send((what, name, steps, batch, port))
    answers = [pipe.recv() for pipe in parts]
    blocks = CASES[name].T * steps * (len(parts) if what == "copies" else 1)
    return blocks / max(seconds for seconds, _ in answers), {bits for _, bits in answers}


KINDS = ("one", "two", "copies")


def measured(pipes: Sequence[Connection], name: str, pairs: int, *, quick: bool) -> dict[str, Any]:
    """Measure all arms of a case in turn, ``pairs`` times, print a table, and return the figures."""
    steps, batch = (2, 8) if quick else (CASES[name].steps, BATCH)
    rounds, same = [], True
    for number in range(pairs):
        order = KINDS[number % 3 :] + KINDS[: number % 3]
        found = {what: blocks_per_second(pipes, what, name, steps, batch) for what in order}
        rounds.append({what: found[what][0] for what in KINDS})
        same &= len(found["one"][1] | found["two"][1]) == 1
    faster, of_copies, copies = (
        statistics.median(r[a] / r[b] for r in rounds) for a, b in (("two", "one"), ("two", "copies"), ("copies", "one"))
    )
    print_table((f"{name}: blocks per second", "median", "range"), [_row(what, [r[what] for r in rounds]) for what in KINDS], right=(1, 2))
    print(
        f"two over one {faster:.3f} (target {FASTER:g}), over copies {of_copies:.3f} ({OF_COPIES:g}); one of them is to be met; "
        f"same bits: {'yes' if same else 'NO'}"
    )
    return {
        "T": CASES[name].T,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "blocks_per_second": {what: statistics.median(r[what] for r in rounds) for what in KINDS},
        "two_over_one": faster,
        "two_over_copies": of_copies,
        "copies_over_one": copies,
        "same_bits": same,
        "targets": {"two_over_one": FASTER, "two_over_copies": OF_COPIES},
        "reached": same and (faster >= FASTER or of_copies >= OF_COPIES),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_parallel", __doc__, pairs=7)
    benchmark.parser.add_argument("--case", choices=sorted(CASES), help="measure only this network")
    options = benchmark.start(arguments)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    ends = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=serve, args=(theirs, barrier, rank), daemon=True) for rank, (_, theirs) in enumerate(ends)]
    for process in processes:
        process.start()
    try:
        pipes = [ours for ours, _ in ends]
        chosen = [name for name in CASES if options.case in (None, name)]
        results = {name: measured(pipes, name, options.pairs, quick=options.quick) for name in chosen}
    finally:
        for process in processes:
            process.kill()
            process.join()
    benchmark.finish(results, suffix=f"_{options.case}" if options.case else "")


def _row(what: str, rates: list[float]) -> tuple[str, str, str]:
    return what, f"{statistics.median(rates):.1f}", f"{min(rates):.1f} to {max(rates):.1f}"


if __name__ == "__main__":
    main()
