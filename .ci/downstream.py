"""Install each plugin in plugins/ against this core, in a separate clean environment, and certify its rules.

    python .ci/downstream.py [PLUGIN ...] [--first] [--keep FOLDER]

A clean environment is a fresh venv that borrows everything but bpfree and its plugins from the running one: a folder of links to
its installed packages, named by a .pth file. So it takes seconds, not gigabytes, and no editable install of the running one shows.
Core and plugin are installed as wheels. What is run there: `bpfree plugins list`, and `bpfree certify --quick` for each rule.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_THE_CORE = ("bpfree", "registry", "pyproject.toml", "README.md", "LICENSE")
OURS = ("bpfree", "__editable__")
"""What installed things of ours, and of any editable install, begin with."""


def borrow(folder: Path) -> None:
    """Fill a folder with links to the running environment's packages, except bpfree, its plugins, and editable installs."""
    folder.mkdir(parents=True)
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for item in Path(site).iterdir():
            if not item.name.startswith(OURS) and item.suffix != ".pth" and item.name != "__pycache__":
                (folder / item.name).symlink_to(item)


def clean_environment(folder: Path) -> Path:
    """Make a venv that borrows packages; returns the path of its interpreter."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    borrow(folder / "borrowed")
    there = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    (Path(sysconfig.get_path("purelib", "venv", there)) / "borrowed.pth").write_text(f"{folder / 'borrowed'}\n")
    return folder / "venv" / "bin" / "python"


def install(interpreter: Path, source: Path, scratch: Path) -> None:
    """Install a package from a copy of its source, as a wheel, without dependencies and without the network."""
    pip(interpreter, "install", "--no-deps", copied(source, scratch), cwd=scratch)


def build_wheel(interpreter: Path, source: Path, scratch: Path, target: Path) -> None:
    """Build the wheel of a package from a copy of its source, without the network."""
    pip(interpreter, "wheel", "--no-deps", "--wheel-dir", target, copied(source, scratch), cwd=scratch)


def pip(interpreter: Path, command: str, *words: object, cwd: Path) -> None:
    call(interpreter, "-m", "pip", command, "--quiet", "--no-index", "--no-build-isolation", *words, cwd=cwd)


def copied(source: Path, scratch: Path) -> Path:
    """Copy the source of a package."""
    target = scratch / source.resolve().name
    if source == ROOT:
        target.mkdir(parents=True)
        for name in OF_THE_CORE:
            copy(source / name, target / name)
    else:
        copy(source, target)
    return target


def copy(source: Path, target: Path) -> None:
    """Copy a source folder without the files that builds and runs leave behind."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*"))
    else:
        shutil.copy2(source, target)


def call(*words: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder away from this checkout, without the variables of its environment.

    Raises:
        SystemExit: it failed, with what it said, if ``check``.
    """
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "BPFREE_DISABLE_PLUGINS")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    result = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if check and result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}\nfailed with {result.returncode}:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    return result


def plugins_seen(interpreter: Path, folder: Path) -> dict[str, dict[str, object]]:
    """Return the output of `bpfree plugins list` there, by name, after checking where bpfree is imported from.

    Raises:
        SystemExit: it is not imported from that environment.
    """
    place = call(interpreter, "-c", "import bpfree; print(bpfree.__file__)", cwd=folder).stdout.strip()
    if not Path(place).is_relative_to(interpreter.parent.parent):
        raise SystemExit(f"bpfree is imported from {place}, not from {interpreter.parent.parent}")
    listed = call(interpreter.parent / "bpfree", "plugins", "list", "--json", cwd=folder)
    return {record["name"]: record for record in json.loads(listed.stdout)}


def examine(source: Path, folder: Path, *, first: bool) -> bool:
    """Examine one plugin; tell whether all checks passed."""
    interpreter = clean_environment(folder)
    install(interpreter, ROOT, folder / "sources")
    install(interpreter, source, folder / "sources")
    seen = plugins_seen(interpreter, folder)
    others = [record for name, record in seen.items() if name != "core"]
    if len(others) != 1 or others[0]["status"] != "ok":
        print(f"{source.name}: failed: {[(record['name'], record['status'], record['reason']) for record in others]}", flush=True)
        return False
    (record,) = others
    rules = record["provides"]["rules"]  # type: ignore[index]  # plain JSON
    print(f"{source.name}: {record['distribution']} {record['version']} is {record['status']}, interface {record['api']}", flush=True)
    outcomes = [certified(interpreter, rule, folder) for rule in rules[: 1 if first else None]]
    return all(outcomes)


def certified(interpreter: Path, rule: str, folder: Path) -> bool:
    """Tell whether the quick examination of a rule passes."""
    began = time.perf_counter()
    result = call(interpreter.parent / "bpfree", "certify", rule, "--quick", cwd=folder, check=False)
    print(f"  {rule}: {'passed' if result.returncode == 0 else 'failed'} in {time.perf_counter() - began:.0f} s", flush=True)
    if result.returncode != 0:
        print(result.stdout[-6000:] + result.stderr[-3000:], flush=True)
    return result.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
    parser.add_argument("plugins", nargs="*", metavar="PLUGIN", help=f"folders in plugins/: {', '.join(known)}; all of them by default")
    parser.add_argument("--first", action="store_true", help="certify only the first rule of each")
    parser.add_argument("--keep", type=Path, help="make the environments in this folder and leave them there")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.plugins if name not in known]
    if unknown:
        parser.error(f"no such plugin: {', '.join(unknown)}; known: {', '.join(known)}")
    scratch = given.keep or Path(tempfile.mkdtemp(prefix="bpfree-downstream-"))
    try:
        outcomes = [examine(known[name], scratch.resolve() / name, first=given.first) for name in given.plugins or known]
    finally:
        if given.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
