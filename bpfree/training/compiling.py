"""Compilation of blocks by one switch, with eager blocks wherever it fails.

What calls a block, also to differentiate it, is left as it is: only ``block(...)`` is compiled, at its first call. Keys of state
dictionaries stay. Results equal eager ones up to the order of sums: 1e-5 of a gradient's norm in float32, 1e-12 in float64, as long as
rounding does not decide where a ReLU or a max-pooling has its kink. Copies of a compiled module are eager.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bpfree.rule import Metrics
from bpfree.step import Batch, Step
from bpfree.training.meters import Clock
from bpfree.training.probes import Take

__all__ = ["Compilation"]

logger = logging.getLogger("bpfree")

MODES = {"default": "default", "cuda-graphs": "reduce-overhead"}
"""Ours, and torch's names for them."""


class Compilation:
    """Blocks that ``torch.compile`` compiles when they are first called; after any failure all of them are eager, with one warning.

    Args:
        blocks: on their device.
        mode: ``none``, ``default``, or ``cuda-graphs``, which takes away the launching of kernels (on a CPU it is ``default``).
        device: the run's.

    Attributes:
        graphs: compiled so far: at first calls, and again for new shapes or modes of a block.
        seconds: of steps in which something was compiled (:meth:`around`).
        trouble: why blocks are eager although compilation was requested; the empty string if they are compiled.
    """

    def __init__(self, blocks: Iterable[nn.Module], mode: str, device: torch.device) -> None:
        self._blocks = [] if mode == "none" else list(blocks)
        self._mode = mode
        self.graphs, self.seconds, self.trouble = 0, 0.0, ""
        self._inside = 0.0  # seconds of the compiler itself
        if mode == "cuda-graphs" and device.type != "cuda":
            logger.warning("compile=cuda-graphs: there are none on %s, so blocks are compiled without", device.type)
            self._mode = "default"
        try:
            for block in self._blocks:
                block._compiled_call_impl = self._guarded(block)
        except Exception as error:  # torch.compile does not know this platform
            self._give_up(error)

    def costs(self) -> dict[str, float]:
        """Return ``train/compile_seconds`` if anything was compiled."""
        return {"train/compile_seconds": self.seconds} if self.graphs else {}

    def wants(self, batch: Batch, step: Step) -> bool:
        """Tell whether a step may compile something."""
        return bool(self._blocks)

    def around(self, take: Take, clock: Clock, batch: Batch, step: Step) -> Metrics:
        """Take a step; the running clock does not count what is compiled in it."""
        graphs, mark = self.graphs, clock.mark()
        metrics = take(batch, step)
        if self.graphs != graphs:
            self.seconds += clock.forget(mark)
        return metrics

    @contextmanager
    def apart(self, clock: Clock) -> Iterator[None]:
        """Deduct the compilation inside from a clock that is stopped afterwards: for calls of a rule outside of steps."""
        before = self._inside
        yield
        if self._inside > before:
            clock.deduct(self._inside - before)
            self.seconds += self._inside - before

    def _guarded(self, block: nn.Module) -> Callable[..., Any]:
        """Make the compiled call of a block; a block that fails compiled, but not eagerly, ends all compilation."""

        def whole(*args: Any, **kwargs: Any) -> Any:  # torch before 2.7 does not look into torch's own modules by themselves
            return block._call_impl(*args, **kwargs)

        compiled = torch.compile(whole, backend=self._backend)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                result = block._call_impl(*args, **kwargs)
                self._give_up(error)
                return result

        return call

    def _backend(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        """Compile a graph that dynamo has found, or run it as it is."""
        self.graphs += 1
        began = time.perf_counter()
        try:
            return inductor(graph, inputs, MODES[self._mode])
        except Exception as error:
            self._give_up(error)
            return graph.forward  # type: ignore[no-any-return]
        finally:
            self._inside += time.perf_counter() - began

    def _give_up(self, error: Exception) -> None:
        for block in self._blocks:
            block._compiled_call_impl = None
        if not self.trouble:
            self.trouble = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            logger.warning("compile=%s: blocks are not compiled, because that fails: %s", self._mode, self.trouble)


def inductor(graph: Any, inputs: Any, mode: str) -> Callable[..., Any]:
    """Compile the graph by torch's default compiler, with its backward pass, so that a failure shows while the eager way is open."""
    import torch._dynamo
    import torch._functorch.config as autograd
    import torch._inductor

    options = torch._inductor.list_mode_options(mode) if mode != "default" else {}
    backend: Any = torch._dynamo.lookup_backend("inductor")
    early = {"force_non_lazy_backward_lowering": True} if hasattr(autograd, "force_non_lazy_backward_lowering") else {}
    with autograd.patch(early):
        return backend(graph, inputs, config_patches=options)  # type: ignore[no-any-return]
