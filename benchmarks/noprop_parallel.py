"""NoProp-DT's blocks in two processes against one, of one thread each. Targets: 1.7 times the blocks per second, or 0.95 of two copies.

Three arms are timed in turn, in two processes that stand ready: *one* trains the whole network (T=10 ``noprop-cnn``, MNIST's shapes,
batch 128, random inputs); *two* share its blocks (``parallel=blocks``, Gloo); *copies* are two plain loops that know nothing of each
other, over the same blocks with the same loss and optimiser and no rule code. A block counts once for each batch that it has learned from.
What two copies reach is what the machine gives to two processes at all: caches and memory are shared.

*One* and *two* are runs of the trainer: the seconds of their second pass, on the trainer's clock, with the exchange of blocks at its
end, and without start-up, evaluation and checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Sequence
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

FASTER, OF_COPIES = 1.7, 0.95
BATCH = 128


def make() -> Rule:
    """Build the rule with its defaults and T=10 blocks."""
    recipe = resolve(parse_words(["rule=noprop-dt", "task=mnist", "network=noprop-cnn"]))
    return recipe.build_rule(recipe.registry.get("tasks", "mnist").spec(recipe.options["task"], None))


def trained(steps: int, batch: int) -> float:
    """Return the seconds of the second pass of a run, in which this process has all blocks or a part of them."""
    rule = make()
    task = measure.synthetic_task(rule.spec, train=steps * batch, held=batch)
    config = TrainConfig(
        device="cpu", threads=1, batch_size=batch, budget=BudgetConfig(epochs=2), evaluation=EvaluationConfig(every=2, test=False)
    )
    first, second = Trainer(rule, task, config).fit().history
    return second["seconds"] - first["seconds"]


def plain(steps: int, batch: int, barrier: Any) -> float:
    """Return the seconds of a hand-written loop: each block's forward pass, loss, backward pass, and one fused optimiser."""
    rule: Any = make()
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
        what, steps, batch, port = pipe.recv()
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        if what == "two":
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        pipe.send(plain(steps, batch, barrier) if what == "copies" else trained(steps, batch))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def blocks_per_second(pipes: Sequence[Connection], what: str, steps: int, batch: int) -> float:
    """Return the blocks per second of all processes that take part, by the time of the slowest."""
    parts = pipes[:1] if what == "one" else pipes
    port = free_port()
    for pipe in parts:
        pipe.send((what, steps, batch, port))
    seconds = max(pipe.recv() for pipe in parts)
    return 10 * steps * (len(parts) if what == "copies" else 1) / seconds


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_parallel", __doc__, pairs=7)
    options = benchmark.start(arguments)
    steps, batch = (2, 8) if options.quick else (40, BATCH)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    ends = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=serve, args=(theirs, barrier, rank), daemon=True) for rank, (_, theirs) in enumerate(ends)]
    for process in processes:
        process.start()
    kinds = ("one", "two", "copies")
    try:
        pipes = [ours for ours, _ in ends]
        rounds = []
        for number in range(options.pairs):
            order = kinds[number % 3 :] + kinds[: number % 3]
            found = {what: blocks_per_second(pipes, what, steps, batch) for what in order}
            rounds.append({what: found[what] for what in kinds})
    finally:
        for process in processes:
            process.kill()
            process.join()
    faster = statistics.median(r["two"] / r["one"] for r in rounds)
    of_copies = statistics.median(r["two"] / r["copies"] for r in rounds)
    rates = {what: statistics.median(r[what] for r in rounds) for what in kinds}
    print_table(("blocks per second", "median", "range"), [_row(what, [r[what] for r in rounds]) for what in kinds], right=(1, 2))
    print(
        f"two over one: {faster:.3f} (target {FASTER:g}); two over copies: {of_copies:.3f} (target {OF_COPIES:g}; one of them is to be met)"
    )
    benchmark.finish(
        {
            "T": 10,
            "batch": batch,
            "steps": steps,
            "rounds": rounds,
            "blocks_per_second": rates,
            "two_over_one": faster,
            "two_over_copies": of_copies,
            "copies_over_one": statistics.median(r["copies"] / r["one"] for r in rounds),
            "targets": {"two_over_one": FASTER, "two_over_copies": OF_COPIES},
            "reached": faster >= FASTER or of_copies >= OF_COPIES,
        }
    )


def _row(what: str, rates: list[float]) -> tuple[str, str, str]:
    return what, f"{statistics.median(rates):.0f}", f"{min(rates):.0f} to {max(rates):.0f}"


if __name__ == "__main__":
    main()
