"""Processes that stand ready to train together: each task gets a process group of its own, on the loopback."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS = 60


class Ranks:
    """As many processes as a test wants, started once."""

    def __init__(self, most: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``work(*arguments)`` returns in each of ``size`` processes; an exception that any of them raises is raised here."""
        port = str(free_port())
        for rank, pipe in enumerate(self._pipes[:size]):
            where = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pipe.send((where, work, arguments))
        answers = []
        for pipe in self._pipes[:size]:
            assert pipe.poll(SECONDS), "a process does not answer"
            answers.append(pipe.recv())
        for _, error, text in answers:
            if error is not None:
                error.add_note(text)
                raise error
        return [answer for answer, _, _ in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


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
