"""The processes that train one network together, as a launcher (``torchrun``, Ray) has started them.

A launcher passes a process's rank in the environment: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, and ``MASTER_ADDR`` and ``MASTER_PORT``,
where the first one is met. A world of one does nothing, and does not touch ``torch.distributed``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bpfree.errors import BpfreeError, UsageError

__all__ = ["World"]

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: the first one evaluates while they do. One that dies is noticed at once."""


LEAVING_HANGS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8)
"""Whether a process may wait for ever when it destroys a group of Gloo: two of ten did with torch 2.6 and 2.7, none of 60 with 2.8."""


@dataclass(frozen=True)
class World:
    """The rank of a process among those that train together; all of them call each method, in the same order.

    Attributes:
        rank: of this process; 0 evaluates, notifies observers, and writes.
        size: how many there are.
        local_rank: among those of this machine, which is also the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> World:
        """Read the process group, if there is one, else the launcher's environment.

        Raises:
            UsageError: the environment names several processes, but not which of them this is, or where they meet.
        """
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), local)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(
                f"WORLD_SIZE={size}, but {', '.join(missing)} is not set",
                where="environment",
                fix="start with torchrun, or unset WORLD_SIZE",
            )
        return cls(int(os.environ["RANK"]), size, local)

    @property
    def first(self) -> bool:
        """Tell whether this process is the one that evaluates and writes."""
        return self.rank == 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the process group inside; leave one that exists already as it is, and our own where leaving may hang."""
        if self.size == 1 or dist.is_initialized():
            yield
            return
        with _explained():
            dist.init_process_group(_backend(), rank=self.rank, world_size=self.size, timeout=PATIENCE)
        try:
            yield
        finally:
            if not LEAVING_HANGS:
                dist.destroy_process_group()

    # --- agreeing ---------------------------------------------------------------------------------------------------

    def largest(self, *numbers: float) -> list[float]:
        """Return the largest of each number over all processes."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def total(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all processes."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def _reduced(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        with _explained():
            dist.all_reduce(values, operation)
        return cast(list[float], values.tolist())

    def gathered(self, thing: T) -> list[T]:
        """Return the object of each process, in the order of ranks."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(things, thing)
        return things

    def collected(self, thing: T) -> list[T]:
        """Return the object of each process, by rank, in the first process; elsewhere an empty list. Tensors arrive on the CPU."""
        own = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, thing)
        if self.size == 1:
            return [own]
        things: list[Any] = [None] * self.size
        with _explained():
            dist.gather_object(own, things if self.first else None)
        return things if self.first else []

    def from_first(self, call: Callable[[], T]) -> T:
        """Return the result of the first process's call in all processes; the other processes do not call.

        Raises:
            BpfreeError: in the other processes, if the call fails in the first one, which raises the original error.
        """
        if self.size == 1:
            return call()
        answer: list[Any] = [None, None]
        try:
            if self.first:
                answer[0] = call()
        except BaseException as error:
            answer[1] = _described(error)
            raise
        finally:
            with _explained():
                dist.broadcast_object_list(answer, src=0)
        if answer[1]:
            raise _elsewhere("the first process", *answer[1])
        return cast(T, answer[0])

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run the body, which needs no other process, on every rank; if it fails on one, all raise.

        Raises:
            BpfreeError: where it has not failed, if it has in another process; there, what it raised.
        """
        if self.size == 1:
            yield
            return
        trouble, gathered = None, []
        try:
            yield
        except BaseException as error:
            trouble = _described(error)
            raise
        finally:
            gathered = self.gathered(trouble)
        for rank, found in enumerate(gathered):
            if found:
                raise _elsewhere(f"process {rank}", *found)

    # --- tensors ----------------------------------------------------------------------------------------------------

    def send(self, tensors: Iterable[Tensor], *, source: int = 0) -> None:
        """Overwrite the tensors, of whatever type, by those of one process."""
        self._in_flat_pieces(tensors, lambda flat: dist.broadcast(flat.view(torch.uint8), src=source))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace the tensors by their means over all processes; values that agree everywhere keep their bits."""

        def exchange(flat: Tensor) -> None:
            extremes = torch.cat([flat, -flat])
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            high, low = extremes[: len(flat)], -extremes[len(flat) :]
            dist.all_reduce(flat)  # the sum of equal numbers may overflow, or its quotient differ from them
            flat.copy_(torch.where(high == low, high, flat / self.size))

        self._in_flat_pieces(tensors, exchange)

    def _in_flat_pieces(self, tensors: Iterable[Tensor], exchange: Callable[[Tensor], object]) -> None:
        """Exchange all tensors of one kind as a single flat tensor, and write the result back into them."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for members in kinds.values():
            with torch.no_grad():
                flat = torch.cat([tensor.reshape(-1) for tensor in members])
                with _explained():
                    exchange(flat)
                for tensor, piece in zip(members, flat.split([tensor.numel() for tensor in members]), strict=True):
                    tensor.copy_(piece.view(tensor.shape))

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each ``.grad`` by its sum over all processes; a ``.grad`` that is ``None`` in all of them stays ``None``."""
        if not parameters:
            return
        flags = torch.tensor([float(p.grad is not None) for p in parameters])
        kinds = {(p.dtype, p.device) for p in parameters}
        together = kinds == {(flags.dtype, flags.device)}  # one exchange for all; on a GPU, reading the flags must not wait for it
        if not together:
            with _explained():
                dist.all_reduce(flags)
        for kind in sorted(kinds, key=str):
            members = [p for p in parameters if (p.dtype, p.device) == kind]
            pieces = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in members]
            flat = torch.cat([flags, *pieces] if together else pieces)
            with _explained():
                dist.all_reduce(flat)
            if together:
                flags, flat = flat.split([len(flags), len(flat) - len(flags)])
            there = dict(zip(parameters, flags.tolist(), strict=True))
            for parameter, piece in zip(members, flat.split([p.numel() for p in members]), strict=True):
                if not there[parameter]:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter, requires_grad=False)
                parameter.grad.copy_(piece.view(parameter.shape))


def _described(error: BaseException) -> tuple[str, int]:
    """Return an error's text and exit code, which are sent to other processes."""
    return str(error) or type(error).__name__, getattr(error, "exit_code", 1)


def _elsewhere(where: str, text: str, code: int) -> BpfreeError:
    error = BpfreeError(f"{where} failed: {text}")
    error.exit_code = code
    return error


def _backend() -> str:
    """Choose NCCL between GPUs, unless processes share one, and Gloo for everything else."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    alone = torch.cuda.is_available() and here <= torch.cuda.device_count() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if alone else "gloo"


@contextmanager
def _explained() -> Iterator[None]:
    """Turn a failure of communication into an error that says that another process has probably ended."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "EADDRINUSE" in reason:
            port = os.environ.get("MASTER_PORT", "")
            fix = "choose a free port: torchrun --master-port PORT ..., or --standalone for any"
            raise UsageError(f"the port {port} is in use", where=f"MASTER_PORT={port}", fix=fix) from error
        raise BpfreeError(
            "another process of this run has ended, or cannot be reached", where=reason, fix="if it has a checkpoint, use --resume"
        ) from error
