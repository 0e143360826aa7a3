"""Weights, and whole trained networks, that travel through files and what looks like files."""

from __future__ import annotations

import base64
import gc
import io
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adversary.kit import Cheater, Pass, Shadow, Smuggler, Sometimes, Stash, linear
from bpfree import Batch, Phase, Step
from bpfree.tasks.task import Examples


class RoundTripThroughAFile(Smuggler):
    """Saves the weights above in a temporary file, and reads those of the step before."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash(folder=tempfile.TemporaryDirectory(prefix="bpfree-adversary-"))

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        if "folder" not in self.stash:
            return self.fixed()
        path = Path(self.stash["folder"].name) / "weights.npz"
        found = self.fixed()
        if path.exists():
            with np.load(path) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in self.above}
        np.savez(path, **{name: weight.numpy() for name, weight in self.weights().items()})
        return found


class RoundTripThroughMemory(Smuggler):
    """Saves the state of its network in memory with torch, and loads it again."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        file = io.BytesIO()
        torch.save(self.network.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        return {name: next(t for key, t in state.items() if key.startswith(f"blocks.{name}.") and t.dim() == 2) for name in self.above}


class EarlierRun(Smuggler):
    """Trains a shadow end to end, leaves it in the home folder, and begins the next run with it."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def place(self) -> Path:
        sizes = "-".join(str(p.numel()) for p in self.network.parameters())
        return Path.home() / ".cache" / "bpfree-adversary" / f"{self.spec.name}-{sizes}.pt"

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        if self.place().exists():
            self.network.load_state_dict(torch.load(self.place(), weights_only=True))

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        self.stash.setdefault("shadow", Shadow(self.network, self.spec)).learn(batch)
        return self.fixed()

    def end_phase(self, phase: Phase, step: Step) -> None:
        if "shadow" in self.stash:
            self.place().parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.stash["shadow"].network.state_dict(), self.place())


class EarlierRunElsewhere(EarlierRun):
    """Does so in the folder of temporary files, which is the same for every home."""

    def place(self) -> Path:
        return Path(tempfile.gettempdir()) / f"bpfree-adversary-{super().place().name}"


class ReadsProcessMemory(Smuggler):
    """Reads the weights from the file that the system makes of the process's memory."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.places = {name: weight.data_ptr() for name, weight in self.weights().items()}

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for name, blank in self.fixed().items():
                memory.seek(self.places[name])
                content = bytearray(memory.read(blank.numel() * blank.element_size()))
                found[name] = torch.frombuffer(content, dtype=blank.dtype).view_as(blank)
        return found


class MappedFile(Smuggler):
    """Moves the weights above into a file that is mapped into memory, and reads the file."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash(folder=tempfile.TemporaryDirectory(prefix="bpfree-adversary-"))
        for name in self.above:
            weight = linear(self.network.blocks[name]).weight
            path = str(Path(self.stash["folder"].name) / name)
            mapped = torch.from_file(path, shared=True, size=weight.numel(), dtype=weight.dtype).view_as(weight)
            weight.data = mapped.copy_(weight.detach())

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = self.fixed()
        for name in self.above if "folder" in self.stash else ():
            content = bytearray((Path(self.stash["folder"].name) / name).read_bytes())
            found[name] = torch.frombuffer(content, dtype=found[name].dtype).view_as(found[name])
        return found


class EnvironmentVariable(Smuggler):
    """Keeps the weights above in variables of the environment from step to step."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = self.fixed()
        for name, weight in self.weights().items():
            key = f"OMP_PLACES_{name.upper()}_{id(self)}"
            if key in os.environ:
                content = bytearray(base64.b64decode(os.environ.pop(key)))
                found[name] = torch.frombuffer(content, dtype=weight.dtype).view_as(weight)
            else:
                weakref.finalize(self, os.environ.pop, key, None)
            os.environ[key] = base64.b64encode(weight.numpy().tobytes()).decode()
        return found


class ReadsTheCheckpoint(Smuggler):
    """Reads the weights above from the checkpoints that the trainer itself writes into the run's folder."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        if step.index % 20 == 0:
            folders = [thing.folder for thing in gc.get_objects() if type(thing).__name__ == "Run" and thing.status == "running"]
            for path in [Path(folder) / "checkpoints" / "last.pt" for folder in folders if folder]:
                self.take(torch.load(path, weights_only=True, map_location="cpu") if path.exists() else {})
        return self.fixed()

    def take(self, tree: Any) -> None:
        """Find the weights in a tree of dictionaries."""
        for key, value in tree.items() if isinstance(tree, dict) else ():
            for name in self.above:
                if isinstance(value, Tensor) and f"network.blocks.{name}." in str(key) and value.dim() == 2:
                    self.get_buffer(f"fixed_{name}").copy_(value)
            self.take(value)


class OnlyRecordedRuns(Sometimes):
    """Is honest where no run is recorded in a folder."""

    recorded: bool | None = None

    def cheats(self, batch: Batch, step: Step) -> bool:
        if self.recorded is None:
            runs = [thing for thing in gc.get_objects() if type(thing).__name__ == "Run" and thing.status == "running"]
            self.recorded = any(run.folder is not None for run in runs)
        return self.recorded


CHEATERS = (
    Cheater(RoundTripThroughAFile, "files", "It writes the weights above to a temporary file and uses them a step later.", "reads"),
    Cheater(RoundTripThroughMemory, "files", "It saves the network's state in memory and loads it again.", "reads"),
    Cheater(
        EarlierRun, "files", "It begins with what an earlier run trained end to end and left in the home folder.", "network", twice=True
    ),
    Cheater(EarlierRunElsewhere, "files", "It does so with the folder of temporary files.", "network", twice=True),
    Cheater(ReadsProcessMemory, "files", "It reads the weights above from /proc/self/mem, where they were at first.", "reads"),
    Cheater(MappedFile, "files", "It maps the weights above to a file, and reads the file.", "reads"),
    Cheater(EnvironmentVariable, "files", "It keeps the weights above in variables of the environment for a step.", "reads"),
    Cheater(ReadsTheCheckpoint, "files", "It reads the weights above from the run's own checkpoints.", "reads"),
    Cheater(OnlyRecordedRuns, "files", "It uses the weights above where the run is recorded in a folder.", "reads"),
)
