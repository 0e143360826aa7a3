"""A reader of a page, who does what it says: runs its commands and its Python, and writes its files."""

from __future__ import annotations

import resource
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from sitemaker.blocks import Block

__all__ = ["Reader", "Taken"]


@dataclass(frozen=True)
class Taken:
    """Seconds of the clock, and of processors."""

    wall: float
    processor: float


@dataclass
class Reader:
    """Does what a page says, in a folder.

    Attributes:
        folder: in which all is done.
        variables: of the shell's environment.
        shown: what the commands of the last block printed.
        taken: what each command took; of Python, by ``python, line N``.
    """

    folder: Path
    variables: dict[str, str]
    shown: str = ""
    taken: dict[str, Taken] = field(default_factory=dict)

    def follow(self, block: Block) -> None:
        """Do what a block says; what says nothing is passed by."""
        if block.language == "bash":
            self.run(block.text.splitlines())
        elif block.remark.startswith("written to "):
            self.write(self.folder / block.remark.removeprefix("written to "), block.text)
        elif block.runs:
            self.shown = ""
            self.call(["python", "-"], f"python, line {block.line}", block.text)

    def write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")

    def run(self, lines: list[str], *, expected: int = 0) -> None:
        self.shown = ""
        for line in lines:
            self.call(["bash", "-c", line], line, expected=expected)

    def call(self, words: list[str], name: str, given: str = "", *, expected: int = 0) -> None:
        """Run a program, and keep what it printed and what it took.

        Raises:
            AssertionError: it ended otherwise than expected.
        """
        began, before = time.perf_counter(), processor_seconds()
        done = subprocess.run(words, cwd=self.folder, env=self.variables, input=given, capture_output=True, text=True, check=False)
        self.taken[name] = Taken(time.perf_counter() - began, processor_seconds() - before)
        assert done.returncode == expected, f"{name}\nexited with {done.returncode}:\n{done.stdout}{done.stderr}"
        self.shown += done.stdout


def processor_seconds() -> float:
    """Return what the processes begun from here have taken, once they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
