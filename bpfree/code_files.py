"""Code that is named by its file, ``FILE.py:NAME``: a rule, a network or a task that no plugin has registered.

To name a file is to ask for its code to be executed, and a configuration, a study file or a run's folder may be another user's. So a
file is executed only where the person at the command line has named that very file, in a word ``rule=FILE.py:NAME`` or with
``--allow-code FILE``. A file is read once, when it is allowed: what is hashed is what is executed, also in workers, to which the text
travels.

In what is recorded the hash of the code stands in the name, ``FILE.py@HASH:NAME``: under that name a file that has changed is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from bpfree.code_hash import hash_of_python
from bpfree.errors import UsageError
from bpfree.files import expanded

__all__ = ["MODULE", "CodeFile", "CodeName", "codes_in", "files_of", "placed", "replaced", "shown"]

CODE = re.compile(r"(?P<path>.+\.py)(?:@(?P<hash>[0-9a-f]{16}))?:(?P<name>[^\W\d]\w*)", re.DOTALL)

MODULE = "bpfree_code_"
"""Begin of the names of modules that are files of code."""


@dataclass(frozen=True)
class CodeName:
    """A name of an object in a file of code.

    Attributes:
        path: of the file.
        name: of what is meant in it.
        hash: of the code that is meant; empty: as the file is now.
    """

    path: str
    name: str
    hash: str = ""

    @classmethod
    def parse(cls, text: str) -> CodeName | None:
        """Read ``FILE.py:NAME`` or ``FILE.py@HASH:NAME``; ``None`` for a name of another kind."""
        found = CODE.fullmatch(text)
        return None if found is None else cls(found["path"], found["name"], found["hash"] or "")

    @property
    def text(self) -> str:
        """The name as it is written."""
        return f"{self.path}{self.hash and f'@{self.hash}'}:{self.name}"

    @property
    def short(self) -> str:
        """The file's own name and the name in it: the same on every machine."""
        return f"{Path(self.path).name}:{self.name}"

    def resolved(self, folder: Path | None = None) -> CodeName:
        """Return the name with the absolute path, through symbolic links.

        Args:
            folder: to which a relative path belongs; ``None``: the current one.
        """
        path = expanded(Path(self.path))
        return replace(self, path=str((path if folder is None else folder / path).resolve()))


def placed(value: Any, folder: Path | None = None) -> Any:
    """Return the value of a setting, or a list of them, with absolute paths where it names code in files.

    Args:
        value: as it is written.
        folder: to which a relative path belongs; ``None``: the current one.
    """
    return replaced(value, lambda code: code.resolved(folder).text)


def codes_in(value: Any) -> list[CodeName]:
    """List the names of code in the value of a setting: a text, or a list of texts."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    return [code for text in texts if isinstance(text, str) and (code := CodeName.parse(text)) is not None]


def replaced(value: Any, by: Callable[[CodeName], str]) -> Any:
    """Return the value of a setting, or a list of them, with another text for each name of code in it."""
    if isinstance(value, (list, tuple)):
        return [replaced(each, by) for each in value]
    code = CodeName.parse(value) if isinstance(value, str) else None
    return value if code is None else by(code)


def shown(name: str) -> str:
    """Return a name for display: without folder and hash where it names code in a file."""
    code = CodeName.parse(name)
    return name if code is None else code.short


@dataclass(frozen=True)
class CodeFile:
    """A file of code in the version that was allowed.

    Attributes:
        path: absolute, through symbolic links.
        source: its bytes.
        hash: of the code, 16 hex digits; comments and docstrings do not count.
    """

    path: Path
    source: bytes
    hash: str

    @classmethod
    def read(cls, path: str | Path) -> CodeFile:
        """Read a file; nothing is executed.

        Raises:
            UsageError: there is no such file, or it cannot be read.
        """
        place = expanded(Path(path)).resolve()
        try:
            source = place.read_bytes()
        except OSError as error:
            raise UsageError(
                f"cannot read the file of code: {error.strerror}", where=str(path), fix="give the path of a .py file"
            ) from error
        return cls(place, source, hash_of_python(source)[:16])

    def module(self) -> ModuleType:
        """Execute the code, the first time in this process.

        Raises:
            BaseException: whatever the code raises.
        """
        digest = hashlib.sha256(f"{self.path}\0".encode() + self.source).hexdigest()[:8]
        name = f"{MODULE}{re.sub(r'[^A-Za-z0-9]', '_', self.path.stem)}_{digest}"
        if name in sys.modules:
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = str(self.path)
        code = compile(self.source, str(self.path), "exec", dont_inherit=True)
        text = importlib.util.decode_source(self.source)
        # tracebacks and inspect show what is executed, also where the file has changed or is on another machine
        linecache.cache[str(self.path)] = (len(text), None, text.splitlines(keepends=True), str(self.path))
        sys.modules[name] = module  # dataclasses and pickle look it up
        try:
            exec(code, module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def line_of(self, error: BaseException | None) -> str:
        """Return the file, with the line in which an error arose if it arose in this file."""
        if isinstance(error, SyntaxError) and error.filename == str(self.path):
            return f"{self.path}, line {error.lineno}"
        frames = [] if error is None else list(traceback.walk_tb(error.__traceback__))
        lines = [line for frame, line in frames if frame.f_code.co_filename == str(self.path)]
        return f"{self.path}, line {lines[-1]}" if lines else str(self.path)


def files_of(names: Iterable[str]) -> list[CodeFile]:
    """Read the files that names lead to, each once; other names are skipped.

    Raises:
        UsageError: there is no such file.
    """
    codes = [code.resolved() for name in names if (code := CodeName.parse(name)) is not None]
    return [CodeFile.read(path) for path in dict.fromkeys(code.path for code in codes)]
