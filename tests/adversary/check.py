"""Show that each cheating rule cheats in a real run: ``python tests/adversary/check.py [NAME ...] [--epochs N]``.

For each rule: test accuracy as reported, and of its own network; the cosine between the true gradient of the first block and what the rule
gives the optimiser there, in the first and in the last ten steps; the share of steps in which it is above 0.99; the cosine of how the block
moves. ``Smuggler`` is the honest rule.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import bpfree
from adversary import CHEATERS
from adversary.kit import Cheater, Smuggler
from bpfree import Batch, BudgetConfig, Rule, Step, TrainConfig
from bpfree.baselines import Backprop
from bpfree.network import MLPConfig, mlp
from bpfree.seeds import derive, seeded
from bpfree.training.trainer import Trainer

REFERENCES = (
    Cheater(Smuggler, "reference", "It is honest: feedback alignment.", "reads"),
    Cheater(Backprop, "reference", "It is back-propagation, and says so.", "reads"),
)
ROW = "{:<26} {:<10} {:<8} {:>8} {:>8} {:>13} {:>6} {:>13} {:>6}"


class Watch:
    """Compares what a rule does to its first block with the true gradient, step by step."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.true = rule, torch.zeros(0)
        self.gradients: list[float] = []
        self.moves: list[float] = []
        self._learn, self._ready = rule.learn, rule.before_update
        rule.learn, rule.before_update = self.learn, self.before_update  # type: ignore[method-assign]

    def members(self) -> list[torch.nn.Parameter]:
        """Return the weights of the block that is executed first."""
        blocks = self.rule.network.blocks
        return list(blocks["b1" if "b1" in blocks else self.rule.network.names[0]].parameters())

    def learn(self, batch: Batch, step: Step) -> Any:
        members = [p for p in self.members() if p.requires_grad]
        if not members:
            return self._learn(batch, step)
        with torch.enable_grad():
            loss = self.rule.spec.loss(self.rule.network(batch.inputs), batch)
            found = torch.autograd.grad(loss, members, allow_unused=True)
        self.true = flat([torch.zeros_like(p) if g is None else g for p, g in zip(members, found, strict=True)])
        before = flat(members).clone()
        metrics = self._learn(batch, step)
        self.moves.append(cosine(before - flat(members), self.true))
        return metrics

    def before_update(self, groups: Sequence[str]) -> None:
        self._ready(groups)
        members = [p for p in self.members() if p.requires_grad]
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        if members and len(flat(given)) == len(self.true):
            self.gradients.append(cosine(flat(given), self.true))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, 0))


def ends(values: list[float]) -> str:
    """Return means of the first and of the last ten."""
    return f"{sum(values[:10]) / 10:.3f} {sum(values[-10:]) / 10:.3f}" if len(values) >= 10 else "- -"


def build(cheater: Cheater, spec: Any) -> Rule:
    """Build a rule on the default network, as ``bpfree train`` does."""
    words = dict(word.split("=") for word in cheater.settings)
    widths = {key.removeprefix("network."): int(value) for key, value in words.items() if key.startswith("network.")}
    options = {key.removeprefix("rule."): value == "true" for key, value in words.items() if key.startswith("rule.")}
    with seeded(derive(0, "initialisation")):
        rule = cheater.rule(mlp(spec, MLPConfig(**widths)), spec, cheater.rule.Config(**options))
    rule.plan()
    return rule


def show(cheater: Cheater, epochs: int) -> None:
    """Train a rule and print a line about it."""
    began = time.perf_counter()
    for _ in range(1 + cheater.twice):
        task = bpfree.load_task("digits")
        rule = build(cheater, task.spec)
        watch = Watch(rule)
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(budget=BudgetConfig(epochs=epochs), device="cpu")
            run = Trainer(rule, task, config, folder=folder).fit()
    task = bpfree.load_task("digits")
    with torch.no_grad():
        made = rule.eval().network(task.spec.normalise(task.test.inputs))  # type: ignore[union-attr]
        own = float((made.argmax(1) == task.test.targets).float().mean())
    seconds, reported = f"{time.perf_counter() - began:.1f}", f"{100 * run.result['test/accuracy']:.1f}"
    about = (cheater.rule.__name__, cheater.family, cheater.truth, reported, f"{100 * own:.1f}")
    exact = f"{sum(value > 0.99 for value in watch.gradients) / max(1, len(watch.gradients)):.2f}"
    print(ROW.format(*about, ends(watch.gradients), exact, ends(watch.moves), seconds), flush=True)


def main() -> int:
    """Check the named rules, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    print(ROW.format("rule", "family", "truth", "reported", "network", "gradient", "exact", "move", "s"))
    with tempfile.TemporaryDirectory() as home:  # of these runs: what cheaters leave behind goes with it
        (Path(home) / "letter").touch()
        os.environ.update(HOME=home, TMPDIR=home)
        tempfile.tempdir = home
        for cheater in [*REFERENCES, *CHEATERS]:
            if not given.names or {cheater.rule.__name__, cheater.family} & set(given.names):
                try:
                    show(cheater, given.epochs)
                except Exception as error:
                    failed += 1
                    print(f"{cheater.rule.__name__:<26} {cheater.family:<10} failed: {type(error).__name__}: {error}"[:300], flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
