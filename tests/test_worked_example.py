"""The worked example of the documentation, literally: its commands run, its files are written, and what is printed is what it shows.

A block that begins with ``written to FILE`` is that file's content; ``replaces METHOD in FILE`` gives a method of it another text. The
commands run one after the other in a fresh environment, where ``pip`` may not use the network. A text block shows what the commands before
it print: line by line, in this order, with other numbers; ``...`` stands for lines left out.

Oracles: the page; the certificate's own verdict; the registry's validation.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ci_scripts
import pytest
from sitemaker import reader
from sitemaker.blocks import Block, blocks

pytestmark = [
    pytest.mark.timeout(1200),  # the page's commands take a minute and a half, and several times that beside other work
    pytest.mark.xdist_group("worked example"),  # by one reader
]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "worked-example.md"
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e[-+]\d+)?")


def environment(folder: Path) -> dict[str, str]:
    """The variables of a shell in which a fresh venv with bpfree in it is active."""
    script = ci_scripts.load("downstream")
    interpreter = script.clean_environment(folder)
    script.install(interpreter, ROOT, folder / "sources")
    for name, words in {"pip": '-m pip "$@" --no-index --no-build-isolation', "pytest": '-m pytest -p no:cacheprovider "$@"'}.items():
        program = interpreter.parent / name
        program.write_text(f'#!/bin/sh\nexec "{interpreter}" {words}\n')
        program.chmod(0o755)
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "BPFREE_DISABLE_PLUGINS")
    variables = {key: value for key, value in os.environ.items() if key not in left_out}
    return {**variables, "PATH": f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"}


class Reader(reader.Reader):
    """Does what the page says, edits what the first command wrote, and looks at what is printed."""

    def follow(self, block: Block) -> None:
        remark = block.remark.removeprefix("no-run: ")
        if block.language == "bash":
            self.run(block.text.splitlines(), expected=1 if remark == "exits with 1" else 0)
        elif block.language == "text":
            line = missing(block.text, self.shown)
            assert not line, f"{PAGE.name}:{block.line}: not printed: {line}\nwhat was:\n{self.shown}"
        elif remark.startswith("replaces "):
            _, method, _, place = remark.split()
            self.replace(method, self.folder / place, block.text)
        else:
            assert remark.startswith("written to "), f"{PAGE.name}:{block.line}: nothing says what this block is for"
            path = self.folder / remark.removeprefix("written to ")
            assert path.is_file(), f"bpfree plugins new wrote no {path}"
            self.write(path, block.text)

    @staticmethod
    def replace(method: str, path: Path, text: str) -> None:
        """The method is the last of its class."""
        pattern = re.compile(rf"^    def {method}\(.*?(?=\n\n\n)", re.MULTILINE | re.DOTALL)
        changed, count = pattern.subn(lambda _: text.rstrip("\n"), path.read_text())
        assert count == 1
        path.write_text(changed)


def missing(expected: str, shown: str) -> str:
    """The first line that was not printed after those before it; empty if there is none."""
    lines = iter([plain(line) for line in shown.splitlines()])
    for line in expected.splitlines():
        if line.strip() not in ("", "...") and plain(line) not in lines:  # this continues where the last line was found
            return line
    return ""


def plain(line: str) -> str:
    """Without its numbers, how wide they make a column, and a step's time, which a busy machine does not show."""
    line = re.sub(r"^(time of a step).*", r"\1", line)
    return re.sub(r"[\s-]+", " ", NUMBER.sub("#", line).replace("#*", "#")).strip()


@pytest.fixture(scope="module")
def follower(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """One who has done all that the page says."""
    folder = tmp_path_factory.mktemp("worked-example")
    (folder / "work").mkdir()
    follower = Reader(folder / "work", environment(folder / "environment"))
    for block in blocks(PAGE):
        follower.follow(block)
        if "pip install" in block.text:
            check_style(follower.folder / "my-dfa")
    return follower


def check_style(package: Path) -> None:
    """Oracle: ruff, with the package's own settings."""
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "."]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_there_are_five_commands(follower: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    """That each exits as it should and prints what is shown is asserted on the way; here, how long they took is printed."""
    numbered = re.findall(r"^## \d\..*?^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    commands = [line for block in numbered for line in block.splitlines()]
    begin = [" ".join(line.split()[:2]) for line in commands]
    assert begin == ["bpfree plugins", "pip install", "bpfree train", "bpfree certify", "bpfree registry"]
    chosen, whole = sum(follower.taken[line].wall for line in commands), sum(each.wall for each in follower.taken.values())
    with capsys.disabled():
        print("", *(f"{follower.taken[line].wall:6.1f} s  {line}" for line in commands), sep="\n")
        print(f"{chosen:6.1f} s  from nothing to an entry; {whole:.1f} s for the whole page")


@pytest.mark.slow
def test_the_rule_is_certified(follower: Reader) -> None:
    """In full, without a failure, a waiver or a pair of blocks that could not be measured; as the shipped dfa, below its floor."""
    certificate = json.loads((follower.folder / "my-dfa/my-dfa.json").read_text())
    assert certificate["status"] == "certified"
    status = {finding["id"]: finding["status"] for finding in certificate["findings"]}
    assert status.pop("learning") == "not shown"
    assert set(status.values()) == {"passed"}
    assert certificate["properties"]["credit"] == "local"


@pytest.mark.slow
def test_the_registry_is_valid_and_lists_it(follower: Reader) -> None:
    def said(*words: str) -> str:
        command = ["bash", "-c", " ".join(["bpfree registry", *words, "--folder registry --json"])]
        return subprocess.run(command, cwd=follower.folder, env=follower.variables, capture_output=True, text=True, check=True).stdout

    (record,) = json.loads(said("list"))
    assert (record["name"], record["rules"], list(record["certificates"])) == ("my-dfa", ["my-dfa"], ["my-dfa"])
    assert record["certificates"]["my-dfa"]["status"] == "certified"
    assert record["results"][0]["mean"] == 95.91


def test_a_line_that_is_not_printed_is_noticed() -> None:
    assert missing("a  1.5 s\n...\nb", "a 2 s\nc\nb\n") == ""
    assert missing("a 1\nb", "b\na 2\n") == "b"
    assert missing("time of a step  1.2 times", "time of a step  unmeasured") == ""
    assert missing("weights of 'b1'", "weights of 'readout'") == "weights of 'b1'"
