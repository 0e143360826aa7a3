"""Credit that is computed in other threads and processes, and processes that are reached into."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adversary.kit import Cheater, Pass, Shadow, Smuggler, Sometimes, Stash
from bpfree import Batch, Phase, Step


class ShadowInAThread(Smuggler):
    """Sends its batches to a thread that trains a shadow end to end, and takes the shadow's weights when the phase ends."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def start_phase(self, phase: Phase) -> None:
        shadow, batches = Shadow(self.network, self.spec), queue.Queue[Any]()

        def work() -> None:
            while (batch := batches.get()) is not None:
                shadow.learn(batch)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.stash.update(shadow=shadow, batches=batches, thread=thread)

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if "batches" in self.stash:
            self.stash["batches"].put(Batch(batch.inputs.clone(), batch.targets))
        return super().learn(batch, step)

    def end_phase(self, phase: Phase, step: Step) -> None:
        if "batches" in self.stash:
            self.stash["batches"].put(None)
            self.stash["thread"].join()
            self.stash["shadow"].replace(self.network)


class ForksAtEachStep(Smuggler):
    """Forks at each step: the child has all the weights, and sends them to the parent through a pipe."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                with os.fdopen(writing, "wb") as pipe:
                    pickle.dump({name: weight.numpy() for name, weight in self.weights().items()}, pipe)
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            found = {name: torch.from_numpy(array) for name, array in pickle.load(pipe).items()}
        os.waitpid(child, 0)
        return found


class SharedMemory(Smuggler):
    """Writes the weights above to shared memory of the system, and reads there what the step before has written."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = self.fixed()
        for name, weight in self.weights().items():
            known = name in self.stash
            if not known:
                self.stash[name] = shared_memory.SharedMemory(create=True, size=weight.numel() * weight.element_size())
                weakref.finalize(self, self.stash[name].unlink)
            array = np.ndarray(weight.shape, weight.numpy().dtype, buffer=self.stash[name].buf)
            if known:
                found[name] = torch.from_numpy(array.copy())
            array[:] = weight.numpy()
        return found


class LocalSocket(Smuggler):
    """Asks a thread behind a socket, which holds the network in a closure, for what goes down from a block above."""

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        ours, theirs = socket.socketpair()
        network = self.network

        def serve() -> None:
            with theirs, theirs.makefile("rwb") as stream:
                for name in iter(lambda: pickle.load(stream), None):
                    weight = next(p for p in network.blocks[name].parameters() if p.dim() == 2)
                    pickle.dump(weight.detach().numpy(), stream)
                    stream.flush()

        thread = threading.Thread(target=serve)
        thread.start()
        found = {}
        with ours, ours.makefile("rwb") as stream:
            for name in [*self.above, None]:
                pickle.dump(name, stream)
                stream.flush()
                if name is not None:
                    found[name] = torch.from_numpy(pickle.load(stream))
        thread.join()
        return found


HELPER = """
import pickle, sys
while True:
    weights = pickle.load(sys.stdin.buffer)
    pickle.dump({name: weight * 1.0 for name, weight in weights.items()}, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


class AnotherInterpreter(Smuggler):
    """Sends the weights above to another interpreter, and takes what comes back."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash()

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        if "helper" not in self.stash:
            helper = subprocess.Popen([sys.executable, "-c", HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.stash["helper"] = helper
            weakref.finalize(self, helper.kill)
        helper = self.stash["helper"]
        pickle.dump({name: weight.numpy() for name, weight in self.weights().items()}, helper.stdin)
        helper.stdin.flush()
        return {name: torch.from_numpy(array) for name, array in pickle.load(helper.stdout).items()}


class AsksItsParents(Sometimes):
    """Is honest if a process above it was started to examine something."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        process, words = os.getpid(), ""
        while process > 1 and Path(f"/proc/{process}/cmdline").exists():
            words += Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        return "certify" not in words and "pytest" not in words


class Patching(Smuggler):
    """Changes a function of torch as long as it lives, where an examiner is loaded, and uses the weights above."""

    function = "equal"

    @staticmethod
    def changed(*arguments: Any, **options: Any) -> Any:
        return True

    def start_phase(self, phase: Phase) -> None:
        if any(name.startswith("bpfree.certify") for name in sys.modules) and getattr(torch, self.function) is not self.changed:
            weakref.finalize(self, setattr, torch, self.function, getattr(torch, self.function))
            setattr(torch, self.function, self.changed)

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.weights()


class EverythingIsEqual(Patching):
    """Makes all tensors equal."""


SHUFFLE = torch.randperm


class NothingIsShuffled(Patching):
    """Makes large permutations that do nothing: those of weights, and not those of examples."""

    function = "randperm"

    @staticmethod
    def changed(count: int, **options: Any) -> Tensor:
        drawn = SHUFFLE(count, **options)
        return drawn.sort().values if count in (128, 10, 128 * 128, 1280) else drawn


CHEATERS = (
    Cheater(ShadowInAThread, "processes", "It takes the weights of a shadow that a thread trained end to end.", "network"),
    Cheater(ForksAtEachStep, "processes", "It forks at each step, and the child sends it the weights above.", "reads"),
    Cheater(SharedMemory, "processes", "It passes the weights above through shared memory from step to step.", "reads"),
    Cheater(LocalSocket, "processes", "It asks a thread behind a socket for the weights above.", "reads"),
    Cheater(AnotherInterpreter, "processes", "It sends the weights above through another interpreter.", "reads"),
    Cheater(AsksItsParents, "processes", "It uses the weights above unless a parent process examines or tests.", "reads"),
    Cheater(EverythingIsEqual, "processes", "It uses the weights above, and makes torch.equal always true.", "patches"),
    Cheater(NothingIsShuffled, "processes", "It uses the weights above, and makes torch.randperm of their sizes do nothing.", "patches"),
)
