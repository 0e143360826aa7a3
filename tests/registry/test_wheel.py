"""What is packaged. Oracle: the folders on disk, and a wheel built from a copy of the sources."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ci_scripts
import pytest
from sitemaker.blocks import blocks

from bpfree.version import __version__

ROOT = Path(__file__).parents[2]


def test_the_list_of_packages_is_complete() -> None:
    """It is written out in pyproject.toml, because the folder registry is one of them."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "bpfree").rglob("*.py")}
    assert listed == sorted(found | {"bpfree._registry"})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The unpacked wheel."""
    scratch = tmp_path_factory.mktemp("wheel")
    source = scratch / "source"
    source.mkdir()
    for name in ("bpfree", "registry"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(scratch), str(source)]
    built = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    (made,) = scratch.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(scratch / "unpacked")
    yield scratch / "unpacked"
    shutil.rmtree(scratch)


@pytest.mark.slow
def test_it_holds_every_file_that_is_no_build_product(wheel: Path) -> None:
    inside = {path.relative_to(wheel / "bpfree").as_posix() for path in (wheel / "bpfree").rglob("*") if path.is_file()}
    ours = {path.relative_to(ROOT / "bpfree").as_posix() for path in (ROOT / "bpfree").rglob("*") if path.is_file()}
    registry = {f"_registry/{path.relative_to(ROOT / 'registry').as_posix()}" for path in (ROOT / "registry").rglob("*") if path.is_file()}
    assert inside == {name for name in ours | registry if not name.endswith(".pyc")}


@pytest.mark.slow
def test_the_command_line_reads_the_registry_in_it(wheel: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}

    def call(*words: str) -> str:
        result = subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    where = call("-c", "from bpfree.registry import registry_folder; print(registry_folder())").strip()
    assert Path(where) == wheel / "bpfree" / "_registry"
    assert (
        json.loads(call("-m", "bpfree", "registry", "list", "--json")) == json.loads((ROOT / "registry/index.json").read_text())["plugins"]
    )
    call("-m", "bpfree", "plugins", "new", "from-a-wheel")
    assert (tmp_path / "from-a-wheel/src/bpfree_from_a_wheel/plugin.py").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # what the README says takes a minute, and several times that beside other work
def test_wheels_alone_do_what_the_readme_says(tmp_path: Path) -> None:
    """The core and every plugin as wheels, in an environment with nothing else of ours, in a folder without the checkout.

    Oracle: the exit codes; what is imported from where. What trains is a smoke run (``quick=true``), and there are no tools for developers.
    """
    script = ci_scripts.load("downstream")
    interpreter = script.clean_environment(tmp_path / "environment")
    wheels, work = tmp_path / "wheels", tmp_path / "work"
    work.mkdir()
    sources = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
    for source in sources:
        script.build_wheel(interpreter, source, tmp_path / "sources", wheels)
    script.call(interpreter, "-m", "pip", "install", "--quiet", "--no-index", *sorted(wheels.glob("*.whl")), cwd=work)  # with dependencies

    seen = script.plugins_seen(interpreter, work)
    assert {record["status"] for record in seen.values()} == {"ok"}
    assert len(seen) == len(sources)
    assert {(record["distribution"].startswith("bpfree"), record["version"]) for record in seen.values()} == {(True, __version__)}
    (work / "mine.csv").write_text(
        "weight,colour,bought\n" + "".join(f"{place},red,{'yes' if place % 2 else 'no'}\n" for place in range(40))
    )
    ran = []
    for block in blocks(ROOT / "README.md"):
        if block.runs:
            script.call(interpreter, "-c", block.text, cwd=work)
        for line in block.text.splitlines() if block.language == "bash" else ():
            program, *words = shlex.split(line, comments=True)
            if program == "bpfree":
                quick = ["quick=true"] if words[0] in ("study", "compare", "train") else []
                script.call(interpreter.parent / "bpfree", *words, *quick, cwd=work)
                ran.append(words[0])
    assert set(ran) >= {"study", "compare", "train"}
    assert {path.parent.name.partition("-")[0] for path in (work / "runs").rglob("report*.html")} == {"quickstart", "compare"}
