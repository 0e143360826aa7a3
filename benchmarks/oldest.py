"""Print pip constraints that hold every dependency at the lowest version that pyproject.toml allows.

``make test-oldest`` installs with them. Needs nothing but Python 3.11: ``python3 benchmarks/oldest.py [--dev] > oldest.txt``.
``>=X.Y`` becomes ``==X.Y.0``, ``>=X.Y.Z`` becomes ``==X.Y.Z``.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
BOUND = re.compile(r"^\s*([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*([0-9][0-9.]*)")
WITHOUT_ZERO = ("nvidia-ml-py", "pytest-timeout")
"""Packages whose series in question has no release X.Y.0: any release of the series is taken."""


OF_THE_TIME = ("sqlalchemy==2.0.*",)
"""What the oldest versions need of packages that are not ours to bound: MLflow before 3.17 cannot use SQLAlchemy 2.1."""


def constraint(requirement: str) -> str:
    """Turn ``name>=lowest`` into ``name==lowest``.

    Raises:
        SystemExit: a requirement without a lower bound.
    """
    found = BOUND.match(requirement)
    if found is None:
        raise SystemExit(f"no lower bound in {requirement!r}: write name>=X.Y in pyproject.toml")
    name, version = found.groups()
    short = version.count(".") < 2
    if short and name in WITHOUT_ZERO:
        return f"{name}=={version}.*"
    return f"{name}=={version}.0" if short else f"{name}=={version}"


def constraints(*, dev: bool = False) -> Iterator[str]:
    """Yield the constraints of the core's dependencies and of its extras; the extra ``dev`` only if ``dev`` is true."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    extras = [requirement for name, extra in optional.items() if dev or name != "dev" for requirement in extra]
    yield from map(constraint, [*project["dependencies"], *extras])
    yield from OF_THE_TIME


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="also the test tools")
    print("\n".join(constraints(dev=parser.parse_args(arguments).dev)))


if __name__ == "__main__":
    main()
