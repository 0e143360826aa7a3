"""Rules and runs that processes train together; what they return can be pickled."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from training_rules import StopAfter, weights

from bpfree import Batch, Budget, Network, Phase, Rule, Run, Step, Task, TrainConfig, Traits, UsageError, always, hookimpl
from bpfree.baselines import DFA, Backprop
from bpfree.cli import main as cli
from bpfree.network import MLPConfig, mlp
from bpfree.tasks.digits import DIGITS
from bpfree.tasks.task import Split, TaskSpec
from bpfree.training.checkpoint import read_checkpoint
from bpfree.training.config import BudgetConfig, CheckpointConfig
from bpfree.training.distributed import World
from bpfree.training.trainer import Interrupted, Trainer


def plain(task: Task, **sizes: Any) -> Rule:
    torch.manual_seed(0)
    return Backprop(mlp(task.spec, MLPConfig(**{"depth": 2, "width": 16, **sizes})), task.spec)


class Drawn(DFA):
    """A local rule whose inputs are noised: by the keyed stream, or by the unkeyed one, whose first draws it notes."""

    keyed = True

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.drawn: list[str] = []

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        generator = step.generator_for("inputs") if self.keyed else step.generator
        noise = torch.randn(batch.inputs.shape, generator=generator)
        if step.index < 3:
            self.drawn.append(hashlib.sha256(noise[:1].numpy().tobytes()).hexdigest())
            if not self.keyed:  # and dropout, which draws from torch's global generator
                self.drawn.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        return super().credit(Batch(batch.inputs + 0.3 * noise, batch.targets), step)


class Unkeyed(Drawn):
    keyed = False


def noised(task: Task) -> Rule:
    torch.manual_seed(0)
    return Drawn(mlp(task.spec, MLPConfig(depth=2, width=16)), task.spec)


def unkeyed(task: Task) -> Rule:
    """With everything that processes have for themselves: unkeyed noise, dropout, batch norm."""
    torch.manual_seed(0)
    return Unkeyed(mlp(task.spec, MLPConfig(depth=2, width=16, norm="batch", dropout=0.2)), task.spec)


class Islands(Rule):
    """Blocks that learn a noised copy of the target alone, as NoProp's do, each with a head of its own; perhaps a shared embedding."""

    traits_of = always(Traits("independent", 0, 1, chain=False, readout="none"))
    sharing = False
    steps = 0

    def __init__(self, network: Any, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        outputs = spec.outputs
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, outputs)) for name in network.names})
        self.register_buffer("codes", torch.eye(outputs))
        self.embed = nn.Embedding(outputs, 8) if self.sharing else nn.Identity()
        self.filled: set[str] = set()

    @classmethod
    def shared_groups_of(cls, config: Any, network: Any = None) -> tuple[str, ...]:
        return ("embed",) if cls.sharing else ()

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        losses = {}
        for name in filter(step.fills, self.network.names):
            self.filled.add(name)
            noise = 0.1 * torch.randn(batch.inputs.shape, generator=step.generator_for(name))
            h = self.network.blocks[name](batch.inputs + noise)
            if self.sharing:
                h = h + self.embed((batch.targets + 1) % 10)
            loss = self.spec.loss(self.heads[name](h), batch) / len(self.network.names)
            loss.backward()
            losses[f"{name}/loss"] = loss.detach()
        return {**losses, "loss": torch.stack([*losses.values(), torch.zeros(())]).sum()}

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return torch.stack([self.heads[name](block(inputs)) for name, block in self.network.blocks.items()]).mean(0)


class Shared(Islands):
    sharing = True


class Moving(Islands):
    """Each block has a frozen parameter, in no group, that the rule moves by hand."""

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {name: [p for p in members if p.requires_grad] for name, members in super().groups().items()}

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        for name in filter(step.fills, self.network.names):
            with torch.no_grad():
                self.network.blocks[name][2].bias += batch.inputs.mean()
        return super().credit(batch, step)


class InTurn(Islands):
    def phases(self, budget: Budget) -> Iterable[Phase]:
        for _ in range(budget.epochs or 1):
            for name in self.network.names:
                yield Phase(name, epochs=1, groups=(name, f"heads.{name}"))


class Kept(InTurn):
    """Blocks in turn that see the features of a fixed map, which are kept from phase to phase."""

    fixed_features = True  # type: ignore[assignment]

    def __init__(self, network: Any, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.register_buffer("map", torch.randn(64, 64) / 8)

    def phases(self, budget: Budget) -> Iterable[Phase]:
        return (replace(phase, on_features=True) for phase in super().phases(budget))

    def features(self, inputs: Any) -> Tensor:
        return torch.tanh(inputs.flatten(1) @ self.map)

    def read(self, features: Tensor, generator: torch.Generator) -> Tensor:
        return super().predict(features, generator)

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        return self.read(self.features(inputs), generator)


def _islands(task: Task, kind: type[Islands], count: int = 4) -> Rule:
    torch.manual_seed(0)

    def block() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh())

    network = Network({f"t{t}": block() for t in range(1, count + 1)}, input_shape=task.spec.input_shape, readout=None, chain=False)
    return kind(network, task.spec)


def islands(task: Task) -> Rule:
    return _islands(task, Islands)


def uneven(task: Task) -> Rule:
    """The last block is much larger than the others."""
    rule = _islands(task, Islands)
    rule.network.blocks["t4"][1] = nn.Sequential(nn.Linear(64, 2048), nn.Linear(2048, 8))
    return rule


def shared(task: Task) -> Rule:
    return _islands(task, Shared)


def moving(task: Task) -> Rule:
    rule = _islands(task, Moving)
    for block in rule.network.blocks.values():
        block[2].bias.requires_grad_(False)
    return rule


def in_turn(task: Task) -> Rule:
    return _islands(task, InTurn)


def kept(task: Task) -> Rule:
    return _islands(task, Kept)


class Sometimes(Backprop):
    """One process alone has a gradient of ``left``, and none has one of ``right``."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.left, self.right = nn.Linear(1, 1), nn.Linear(1, 1)

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.part == 1:
            self.left(torch.ones(1, 1)).sum().backward()
        return super().credit(batch, step)


def sometimes(task: Task) -> Rule:
    torch.manual_seed(0)
    return Sometimes(mlp(task.spec, MLPConfig(depth=1, width=8)), task.spec)


class Exploding(Islands):
    """The second half of the blocks diverges, so that one process of two alone sees it."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        if step.index == 25 and step.fills("t4"):
            with torch.no_grad():
                next(self.network.blocks["t4"].parameters()).fill_(float("nan"))
        return metrics


def exploding(task: Task) -> Rule:
    return _islands(task, Exploding)


class Failing(Islands):
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.index == 5 and step.fills("t4"):
            raise RuntimeError("the second process fails")
        return super().credit(batch, step)


def failing(task: Task) -> Rule:
    return _islands(task, Failing)


def two_islands(task: Task) -> Rule:
    return _islands(task, Islands, count=2)


class OwnSteps(Backprop):
    traits_of = always(Traits(update="own-steps"))


class Solving(Backprop):
    def end_phase(self, phase: Phase, step: Step) -> None: ...


class ByTheClock(Backprop):
    def phases(self, budget: Budget) -> Iterable[Phase]:
        return [Phase("timed", seconds=1.0)]


def own_steps(task: Task) -> Rule:
    return OwnSteps(mlp(task.spec, MLPConfig(depth=1, width=8)), task.spec)


def solving(task: Task) -> Rule:
    return Solving(mlp(task.spec, MLPConfig(depth=1, width=8)), task.spec)


def by_the_clock(task: Task) -> Rule:
    return ByTheClock(mlp(task.spec, MLPConfig(depth=1, width=8)), task.spec)


@dataclass
class Ended:
    """What a process has of a run."""

    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    result: dict[str, float]
    status: str
    tags: dict[str, str]
    rule: dict[str, Any] = field(default_factory=dict)


def small(task: Task, examples: int) -> Task:
    train = Split(task.train.inputs[:examples], task.train.targets[:examples] if task.train.targets is not None else None)
    return Task(task.spec, train, task.validation, task.test)


def train(
    make: Any, options: dict[str, Any], *, folder: Path | None = None, examples: int = 0, stop_at: int = 0, resume: bool = False
) -> Ended:
    """A run of a few passes over digits; ``stop_at``: it is asked to stop after this many steps, in the first process alone."""
    task = Task.from_source(DIGITS)
    task = small(task, examples) if examples else task
    rule = make(task)
    options = dict(options)
    budget = options.pop("budget", None) or BudgetConfig(epochs=options.pop("epochs", 2))
    config = TrainConfig(**{"device": "cpu", "threads": 1, "budget": budget, "log_interval": 0.01, **options})
    watch = StopAfter(stop_at)
    trainer = watch.trainer = Trainer(rule, task, config, folder=folder, observers=[watch] if stop_at else [])
    try:
        run = trainer.fit(folder / "checkpoints" / "last.pt" if resume and folder else None)
    except Interrupted:
        run = trainer.run
    seen = {name: getattr(rule, name) for name in ("drawn", "filled") if isinstance(getattr(rule, name, None), list | set)}
    return Ended(weights(rule), run.history, run.result, run.status, run.tags, seen)


class Watch:
    """After which steps somebody looked, and a checkpoint was written."""

    def __init__(self) -> None:
        self.looked: list[int] = []
        self.saved: list[int] = []

    @hookimpl
    def progress(self, run: Run, metrics: Mapping[str, float]) -> None:
        if "evaluation" not in metrics:
            self.looked.append(int(metrics["step"]))

    @hookimpl
    def checkpoint_saved(self, run: Run, path: Path) -> None:
        self.saved.append(read_checkpoint(path)["training"]["position"]["step"])


def watched(looks: int, saves: int, folder: Path) -> tuple[list[int], list[int]]:
    """A run of two passes in which one process alone is in a hurry to look, and one to save."""
    task, watch, rank = Task.from_source(DIGITS), Watch(), World.here().rank
    checkpoint = CheckpointConfig(every=0, minutes=1e-6 if rank == saves else 1e6)
    log_interval = 1e-6 if rank == looks else 1e6
    config = TrainConfig(device="cpu", threads=1, budget=BudgetConfig(epochs=2), checkpoint=checkpoint, log_interval=log_interval)
    Trainer(islands(task), task, config, folder=folder, observers=[watch]).fit()
    return watch.looked, watch.saved


def refused(make: Any, options: dict[str, Any]) -> str:
    """What a run is refused with."""
    try:
        train(make, options)
    except UsageError as error:
        return str(error)
    return ""


def things(rank: int) -> list[Tensor]:
    """Tensors of many types, of which each process has others."""
    plain = torch.arange(6).reshape(2, 3) + rank
    kinds = (torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return [*(plain.to(kind) for kind in kinds), (plain * 1.0).t(), torch.empty(0, 3, dtype=torch.int16)]


def sent() -> list[Tensor]:
    """The first process's things."""
    world = World.here()
    with world.joined():
        mine = things(world.rank)
        world.send(mine)
    return [thing.contiguous() for thing in mine]


def numbers() -> tuple[list[float], list[float]]:
    world = World.here()
    with world.joined():
        mine = (world.rank + 1.0, -world.rank)
        return world.largest(*mine), world.total(*mine)


def averaged() -> Tensor:
    world = World.here()
    with world.joined():
        mine = torch.tensor([float("inf"), -float("inf"), torch.finfo(torch.float32).max, 0.25, 1.0 + world.rank])
        world.average([mine])
    return mine


def command_line(folder: Path, words: tuple[str, ...], file: str = "") -> tuple[int, str]:
    """Exit code and messages of a command in a folder of each process's own; the first one's has a file with data."""
    place = folder / os.environ["RANK"]
    place.mkdir(exist_ok=True)
    os.chdir(place)
    if file and os.environ["RANK"] == "0":
        numpy.savez(file, x=numpy.zeros((40, 4), "float32"), y=numpy.arange(40) % 2)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli._run(list(words), debug=False)
    return code, said.getvalue()
