"""Write entry points of a checkout for environments without installation: ``python benchmarks/entry_points.py FOLDER``.

Writes a minimal ``.dist-info`` folder for the core and each plugin into FOLDER, from their pyproject.toml files, and prints
the PYTHONPATH under which they and their code are found. Needs nothing but Python 3.11.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def version_of(project: dict[str, Any], folder: Path) -> str:
    """Return the version in pyproject.toml, or in the core's version.py."""
    if "version" in project:
        return str(project["version"])
    found = re.search(r'__version__ = "([^"]+)"', (folder / "bpfree" / "version.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def write_info(folder: Path, target: Path) -> None:
    """Write ``NAME-VERSION.dist-info`` in ``target`` for the project in ``folder``."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = version_of(project, folder)
    info = target / f"{project['name'].replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n", encoding="utf-8")
    groups = {**project.get("entry-points", {}), **({"console_scripts": project["scripts"]} if "scripts" in project else {})}
    lines = [line for group, entries in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in entries.items()), "")]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def search_path(target: Path) -> list[Path]:
    """List the folders that hold the entry points and the code."""
    plugins = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    for folder in (ROOT, *plugins):
        write_info(folder, target)
    return [target, ROOT, *(plugin / "src" for plugin in plugins)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    target = parser.parse_args(arguments).folder.resolve()
    print(os.pathsep.join(map(str, search_path(target))))


if __name__ == "__main__":
    main()
