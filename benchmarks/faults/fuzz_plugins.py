"""Plugins that raise, print, exit, or change torch's state: a rule of another plugin works as if they were not there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from faults.fuzz_files import Case
from faults.kit import PATH_VARIABLE

__all__ = ["TRAIN", "plugins"]

RULE = """
import os
import sys

import torch

import bpfree
from bpfree.baselines import DFA

bpfree_api = 2
{at_import}

class Odd(DFA):
    def __init__(self, *arguments, **options):
        {at_init}
        super().__init__(*arguments, **options)

    def credit(self, batch, step):
        {at_step}
        return super().credit(batch, step)

@bpfree.hookimpl
def bpfree_rules():
    {at_hook}
    return {{"odd": Odd}}
"""
DEEDS: dict[str, str] = {
    "raises": "raise ValueError('odd')",
    "raises without words": "raise RuntimeError",
    "raises what has no words": "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "exits": "sys.exit(0)",
    "exits with 5": "sys.exit(5)",
    "interrupts": "raise KeyboardInterrupt",
    "raises a base exception": "raise BaseException('odd')",
    "recurses": "(lambda f: f(f))(lambda f: f(f))",
    "is not there": "import nothing_of_this_name",
}
HARMLESS: dict[str, str] = {
    "prints": "print('odd')",
    "prints errors": "print('odd', file=sys.stderr)",
    "threads": "torch.set_num_threads(3)",
    "default type": "torch.set_default_dtype(torch.float64)",
    "no gradients": "torch.set_grad_enabled(False)",
    "seed": "torch.manual_seed(7)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "directory": "os.chdir('/')",
    "environment": "os.environ['BPFREE_DATA'] = '/nowhere'",
    "warns": "import warnings; warnings.warn('odd')",
    "logging": "import logging; logging.disable(50)",
}
SHAPES: dict[str, str] = {
    "states no interface": "import bpfree\n",
    "another interface": "bpfree_api = 99\n",
    "an interface that is no number": "bpfree_api = 'two'\n",
    "registers a list": "bpfree_api = 2\ndef bpfree_rules():\n    return ['odd']\n",
    "registers a number": "bpfree_api = 2\ndef bpfree_rules():\n    return {'odd': 3}\n",
    "registers what is there": "from bpfree.baselines import DFA\nbpfree_api = 2\ndef bpfree_rules():\n    return {'dfa': DFA}\n",
    "is no Python": "this is no Python\n",
    "is empty": "",
    "has NUL": "bpfree_api = 2\x00\n",
}
PLACES = ("at_import", "at_hook", "at_init", "at_step")
TRAIN = ("task=digits", "network.width=8", "device=cpu", "threads=1", "budget.epochs=1", "tracking.enabled=false", "--quiet")


def plugins(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Put a plugin on the path; the command uses it, or another rule."""
    shapes = list(SHAPES.items())
    if number < len(shapes):
        how, code = shapes[number]
        _install(folder, code)
        return Case(how, ["train", "rule=dfa", *TRAIN], refused=False, variables=_path(folder), check=_like_alone(material))
    deeds = DEEDS | HARMLESS
    how, place = draws.choice(list(deeds)), draws.choice(PLACES)
    _install(folder, RULE.format(**{at: deeds[how] if at == place else "pass" for at in PLACES}))
    where = f"{how}, {place}"
    if draws.random() < 0.4 or (how in HARMLESS and place in PLACES[:2]):  # the plugin must not affect another rule
        return Case(
            f"{where}; dfa is trained", ["train", "rule=dfa", *TRAIN], refused=False, variables=_path(folder), check=_like_alone(material)
        )
    harmful = how in DEEDS
    return Case(f"{where}; it is trained", ["train", "rule=odd", *TRAIN], refused=harmful, variables=_path(folder))


def _install(folder: Path, code: str) -> None:
    """Write a distribution with the plugin ``odd``."""
    site = folder / "site"
    info = site / "bpfree_odd-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bpfree-odd\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[bpfree]\nodd = odd\n")
    (site / "odd").mkdir()
    (site / "odd" / "__init__.py").write_text(code)


def _path(folder: Path) -> dict[str, str]:
    return {PATH_VARIABLE: str(folder / "site")}


def _like_alone(material: Path) -> Callable[[str, int], list[str]]:
    """Return a check that the other rule ends as it does without the plugin."""
    wanted = _accuracy((material / "plain.txt").read_text())

    def check(text: str, code: int) -> list[str]:
        if code:
            return [f"another rule cannot be trained: exit code {code}: {text[-300:]}"]
        return [] if _accuracy(text) == wanted else [f"another rule ends with {_accuracy(text)}, not {wanted}"]

    return check


def _accuracy(text: str) -> list[str]:
    return [line for line in text.splitlines() if "accuracy" in line]
