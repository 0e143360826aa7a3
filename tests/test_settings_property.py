"""Settings that are dropped or mangled: refused, or recorded as typed. A seeded generator draws the configurations.

Oracle: the recorded configuration of the undisturbed words, which a disturbed word may change in its own key alone; and, for what the
value must be, Python's own reading of the text by the type that the key had before.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_kit import call

from bpfree import UsageError
from bpfree.cli.annotate import annotate
from bpfree.config import parse_words, resolve
from bpfree.recipe import Recipe
from bpfree.yaml_values import text_of

MENU: dict[str, list[str]] = {
    "network.norm": ["none", "batch", "layer"],
    "network.activation": ["relu", "gelu", "tanh"],
    "network.dropout": ["0", "0.25", "1e-1"],
    "network.depth": ["0", "2", "03"],
    "network.width": ["16", "32"],
    "task.validation": ["0.2", ".25", "1e-1"],
    "task.split_seed": ["0", "010"],
    "seed": ["0", "7", "010"],
    "stream": ["01", "null", "a word", "1e5", "~"],
    "batch_size": ["32", "100"],
    "optimizer.lr": ["1e-3", "0.1", "2"],
    "optimizer.weight_decay": ["0", "1e-4"],
    "optimizer.options.eps": ["1e-6"],
    "schedule.name": ["cosine", "linear"],
    "schedule.warmup": ["0.1", "0"],
    "schedule.final": ["0.5"],
    "clip.norm": ["1", "2.5"],
    "clip.scope": ["global"],
    "precision": ["fp32", "bf16"],
    "deterministic": ["true", "false", "yes"],
    "threads": ["1", "02", "null"],
    "select": ["last", "best-val"],
    "data.resident": ["yes", "no", "auto"],
    "data.root": ["~/data", "007", "null", "on"],
    "tracking.experiment": ["83e2010", "12:30", "0x10", "1_000", "true", "2001-01-01"],
    "tracking.enabled": ["false"],
    "output": ["007", "1e3", "a #b", "[a", "no", "-.5"],
    "log_interval": ["0.5", "2"],
    "evaluation.every": ["1", "2"],
    "alignment.every": ["3"],
    "alignment.draws": ["2", "0"],
}
MANGLED = [
    *("", "null", "~", "Null", "true", "True", "yes", "on", "off", "0", "1", "-1", "010", "0x10", "0o7", "1_000", "1e3"),
    *("1e999", "5.0", ".inf", ".nan", "12:30", "2001-01-01", "[a]", "[1, 2]", "[]", "{}", "{a: 1}", "{a}", "a, b", "a: b"),
    *("a #b", " 7", "'7'", '"null"', "no such thing", "!x", "&a b", "*a", "|"),
]  # fmt: skip


def drawn(generator: random.Random) -> dict[str, str]:
    """Words by key, with the rule and the task."""
    keys = generator.sample(sorted(MENU), generator.randint(3, 12))
    words = {"rule": generator.choice(["backprop", "dfa", "frozen"]), "task": "digits"}
    return words | {key: generator.choice(MENU[key]) for key in keys}


def recipe_of(words: dict[str, str]) -> Recipe | None:
    try:
        return resolve(parse_words(f"{key}={value}" for key, value in words.items()))
    except UsageError:
        return None


def valid(generator: random.Random) -> tuple[dict[str, str], Recipe]:
    while True:
        words = drawn(generator)
        recipe = recipe_of(words)
        if recipe is not None:
            return words, recipe


def full(key: str) -> str:
    return f"{key}.name" if key in ("rule", "task") else key


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    empty = {}  # an empty free mapping stands where its keys would
    return {key for key in {*one, *other} if one.get(key, empty) != other.get(key, empty)}


def meant(key: str, text: str, value: Any) -> bool:
    """Whether the recorded value is what the text says, read by hand."""
    if ".options." in key and text[:2] in ("0x", "0o"):  # a key without a type: YAML's core schema
        return bool(value == int(text, 0))
    if value is None:
        return text in ("null", "Null", "~")
    if isinstance(value, bool):
        return text.lower() in (("true", "yes", "on") if value else ("false", "no", "off"))
    if isinstance(value, int):
        return text.strip(" '\"").lstrip("+").isdigit() and int(text.strip(" '\"")) == value
    if isinstance(value, float):
        return float(text.strip(" '\"")) == value
    if isinstance(value, str):
        return value == (yaml.safe_load(text) if text[:1] in "'\"" else text)
    return bool(value == yaml.safe_load(text))


@pytest.mark.parametrize("seed", range(2))
def test_a_mangled_setting_is_refused_or_recorded_as_typed_and_nothing_else_changes(seed: int) -> None:
    generator = random.Random(seed)
    refused = kept = 0
    for _ in range(20):
        words, recipe = valid(generator)
        key = generator.choice(list(words))
        text = generator.choice(MANGLED if generator.random() < 0.6 else MENU.get(key, MANGLED))
        disturbed = recipe_of({**words, key: text})
        if disturbed is None:
            refused += 1
            continue
        kept += 1
        before, after = recipe.flat(), disturbed.flat()
        assert differing(before, after) <= {full(key)}, (words, key, text)
        assert meant(key, text, after[full(key)]), (words, key, text, after[full(key)])
    assert refused
    assert kept


@pytest.mark.parametrize("seed", range(2))
def test_a_setting_that_is_dropped_leaves_its_default_and_all_others(seed: int) -> None:
    generator = random.Random(seed)
    default = resolve([]).flat()
    for _ in range(20):
        words, recipe = valid(generator)
        key = generator.choice([key for key in words if key != "rule"])
        rest = recipe_of({name: text for name, text in words.items() if name != key})
        if rest is None:  # another one did something only beside it
            continue
        before, after = recipe.flat(), rest.flat()
        assert differing(before, after) <= {full(key)}, (words, key)
        assert after.get(full(key)) == default.get(full(key)), (words, key)


@pytest.mark.parametrize("seed", range(2))
def test_a_misspelt_setting_is_refused(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(10):
        words, _ = valid(generator)
        key = generator.choice([key for key in words if "options" not in key])
        place = generator.randrange(len(key))
        other = key[:place] + generator.choice("qz_.-") + key[place + 1 :]
        assert recipe_of({(other if name == key else name): text for name, text in words.items()}) is None, (words, other)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_recorded_gives_the_same_configuration_again(seed: int, tmp_path: Path) -> None:
    """As YAML, as a mapping, and as words."""
    from bpfree.config import read_yaml

    generator, file = random.Random(seed), tmp_path / "config.yaml"
    for _ in range(10):
        _, recipe = valid(generator)
        file.write_text(annotate(recipe), encoding="utf-8")
        assert resolve(read_yaml(file)) == recipe
        assert resolve(recipe.to_dict()) == recipe
        assert resolve(parse_words(f"{key}={text_of(value)}" for key, value in recipe.flat().items())) == recipe
        assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
        assert dataclasses.replace(recipe) == recipe


@pytest.mark.parametrize("seed", range(2))
def test_the_command_line_exits_with_two_or_prints_what_was_typed(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(seed)
    for _ in range(3):
        words, recipe = valid(generator)
        key, text = generator.choice(list(words)), generator.choice(MANGLED)
        said = [f"{name}={value}" for name, value in {**words, key: text}.items()]
        code = call("train", "--print-config", *said)
        output = capsys.readouterr()
        assert code in (0, 2), output.err
        if code == 2:
            assert "error:" in output.err
            assert "unexpected" not in output.err
            continue
        printed = resolve(yaml.safe_load(output.out)).flat()
        assert differing(recipe.flat(), printed) <= {full(key)}
        assert meant(key, text, printed[full(key)])
