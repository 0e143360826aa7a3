"""Processes that stand ready to train together: each task gets a process group of its own, on the loopback."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch
from children import Child

from bpfree.training.distributed import LEAVING_HANGS


class Ranks:
    """As many processes as a test wants, started once; one that was killed is replaced when it is needed again."""

    def __init__(self, most: int) -> None:
        self._members = [_stand_by() for _ in range(most)]

    def run(self, size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``work(*arguments)`` returns in each of ``size`` processes; an exception that any of them raises is raised here."""
        self.start(size, work, *arguments)
        answers = self.collect(size)
        for _, error, text in answers:
            if error is not None:
                error.add_note(text)
                raise error
        return [answer for answer, _, _ in answers]

    def start(self, size: int, work: Callable[..., Any], *arguments: Any) -> list[int]:
        """Begin, and return the numbers of the processes."""
        port = str(free_port())
        if LEAVING_HANGS:  # they are still in their group
            self.close()
        for rank in range(size):
            if self._members[rank][0].poll() is not None:
                self._members[rank] = _stand_by()
            where = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._members[rank][1].send((where, work, arguments))
        return [process.pid for process, _ in self._members[:size]]

    def collect(self, size: int) -> list[tuple[Any, BaseException | None, str]]:
        """For each process: what it returned, or the exception that it raised and its traceback."""
        answers = []
        for _, pipe in self._members[:size]:
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((None, ChildProcessError("the process was killed"), ""))
            except BaseException:  # the time limit of the test
                self.close()  # or late answers would be taken for those of the next one
                raise
        return answers

    def close(self) -> None:
        for process, _ in self._members:
            process.kill()
            process.wait()


def _stand_by() -> tuple[Child, Connection]:
    ours, theirs = Pipe()
    process = Child(_serve, theirs)
    theirs.close()
    return process, ours


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        where, work, arguments = pipe.recv()
        os.environ.update(where)
        try:
            answer = (work(*arguments), None, "")
        except BaseException as error:
            answer = (None, error, traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception as error:  # it cannot be pickled
            pipe.send((None, RuntimeError(f"{error}: {answer!r}"), answer[2]))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
