"""Spoilt files, by family: each function makes one in a folder and says which command is to meet it."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CANARY", "FAMILIES", "Case"]

CANARY = "CANARY"
SHELL = f"touch {CANARY}"


@dataclass
class Case:
    """An input and the command that meets it.

    Attributes:
        how: what was done to the input.
        words: of the command line.
        refused: whether it must be refused.
        variables: of the environment.
        check: what is wrong with the command's output and exit code, beyond what holds for all.
    """

    how: str
    words: Sequence[str]
    refused: bool = True
    variables: dict[str, str] = field(default_factory=dict)
    check: Callable[[str, int], list[str]] | None = None


Family = Callable[[Path, Path, random.Random, int], Case]


class _Planted:
    """An object whose pickle runs a command when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (SHELL,)


DEEP = 3000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML: dict[str, str | bytes] = {
    "runs code by a tag": f'rule: !!python/object/apply:os.system ["{SHELL}"]\n',
    "runs code by another tag": f"!!python/object/new:subprocess.Popen\nargs: [[touch, {CANARY}]]\n",
    "a tag of its own": "rule: !mine dfa\n",
    "an environment variable": "rule: dfa\ntracking: {experiment: '${oc.env:PATH}'}\n",
    "an interpolation": "rule: dfa\nseed: ${batch_size}\n",
    "an unknown resolver": "rule: dfa\ntracking: {experiment: '${eval:1+1}'}\n",
    "a bomb of aliases": BOMB,
    "nested too deeply": "a: " + "[" * DEEP + "]" * DEEP + "\n",
    "an alias of itself": "rule: &a [*a]\n",
    "the same key twice": "rule: dfa\nseed: 1\nseed: 2\n",
    "an open quote": 'rule: "dfa\n',
    "tabs": "rule:\n\tname: dfa\n",
    "a list": "- rule\n- dfa\n",
    "a number": "3\n",
    "not UTF-8": b"rule: \xff\xfe\xfa\n",
    "NUL": b"rule: d\x00fa\n",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "an unknown key": "rule: dfa\nbatchsize: 3\n",
    "an unknown rule": "rule: dfaa\n",
    "a mapping for a number": "rule: dfa\nseed: {a: 1}\n",
    "a number for a section": "rule: dfa\nbudget: 3\n",
    "a number out of range": "rule: dfa\nbatch_size: -4\n",
    "a huge number": "rule: dfa\nbatch_size: 1" + "0" * 400 + "\n",
    "digits without end": "rule: dfa\nbatch_size: " + "9" * 6000 + "\n",
    "not a number": "rule: dfa\noptimizer: {lr: .nan}\n",
    "infinity": "rule: dfa\nbudget: {seconds: .inf, epochs: .inf}\n",
    "a date": "rule: dfa\nseed: 2020-01-01\n",
    "an empty name": "rule: ''\n",
    "a null key": "rule: dfa\nnull: 3\n",
    "a list as key": "rule: dfa\n? [a, b]\n: 3\n",
    "a path out": "rule: ../../etc/passwd\n",
    "two documents": "rule: dfa\n---\nrule: backprop\n",
}
WORDS = (
    "rule",
    "=3",
    "rule=",
    "rule==dfa",
    "seed=[",
    "seed=1e99",
    "seed=${oc.env:PATH}",
    "budget.epochs=0",
    "budget=3",
    "rule.nothing=1",
    "network.width=-1",
    "task=npz",
    "device=nowhere",
    "batch_size=!!python/name:os.system",
    "optimizer=nothing",
    "optimizer.options={lr: [}",
    "--config=nowhere.yaml",
    "--config=.",
    "--resume=nowhere",
    "precision=fp7",
    "rule=dfa rule=dfa.x",
    "task.augment=[nothing]",
    "threads=100000000000",
    "seed=\x1b[31m",
    "....=1",
    "rule.=1",
)


def _spoilt(text: str, draws: random.Random) -> tuple[str, str]:
    """Return the text with a random change, which may leave it valid."""
    lines = text.splitlines()
    at = draws.randrange(len(lines))
    junk = draws.choice(
        ["[", "{", ": :", "\x07", "null", "-1", "1e400", "!!binary x", "'", "*x", "&x *x", "true", "[1, [2]]", "{a: 1}", "é" * 50]
    )
    match draws.randrange(5):
        case 0:
            lines[at] = re.sub(r"(:\s*).*", lambda found: found[1] + junk, lines[at])
        case 1:
            lines.insert(at, junk)
        case 2:
            del lines[at]
        case 3:
            lines = lines[: at + 1]
            lines[-1] = lines[-1][: draws.randint(0, len(lines[-1]))]
        case _:
            lines[at] = "".join(draws.sample(lines[at], len(lines[at])))
    return "\n".join(lines) + "\n", f"line {at + 1} becomes {lines[min(at, len(lines) - 1)] if lines else ''!r}"


def _flipped(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    """Return the bytes with a random change."""
    spoilt, at = bytearray(content), draws.randrange(len(content))
    match draws.randrange(4):
        case 0:
            spoilt[at] ^= 1 << draws.randrange(8)
            return bytes(spoilt), f"bit of byte {at}"
        case 1:
            return bytes(spoilt[:at]), f"cut at {at}"
        case 2:
            size = min(len(spoilt) - at, draws.randint(1, 4096))
            spoilt[at : at + size] = draws.randbytes(size)
            return bytes(spoilt), f"{size} bytes at {at}"
        case _:
            del spoilt[at : at + draws.randint(1, 100)]
            return bytes(spoilt), f"bytes left out at {at}"


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# --- what people write ----------------------------------------------------------------------------------------------------


def configurations(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Spoil a configuration file, or words of the command line."""
    known, path = list(YAML), folder / "config.yaml"
    if number < len(known):
        _write(path, YAML[known[number]])
        return Case(known[number], ["train", "--config", str(path), "--print-config"])
    if number < len(known) + len(WORDS):
        word = WORDS[number - len(known)]
        return Case(f"the word {word!r}", ["train", *word.split(" "), *([] if "rule" in word else ["rule=dfa"]), "--print-config"])
    text, how = _spoilt((material / "run" / "config.yaml").read_text(), draws)
    _write(path, text)
    return Case(how, ["train", "--config", str(path), "--print-config"], refused=False)


STUDIES: dict[str, str] = {
    "no rows": "title: Nothing\nseeds: 1\n",
    "no seeds": "title: Nothing\nseeds: 0\nrules: [dfa]\n",
    "too many seeds": "title: Nothing\nseeds: 100000000000\nrules: [dfa]\n",
    "an unknown rule": "title: A\nseeds: 1\nrules: [dfaa]\nsettings: {task: digits}\n",
    "an unknown key": "title: A\nseeds: 1\nrules: [dfa]\nsetting: {task: digits}\n",
    "an unknown setting": "title: A\nseeds: 1\nrules: [dfa]\nsettings: {tusk: digits}\n",
    "a path as title": "title: ../../x\nseeds: [a]\nrules: [dfa]\n",
    "the same row twice": "title: A\nseeds: 1\nrules: [dfa, dfa]\nsettings: {task: digits}\n",
    "a grid without end": "title: A\nseeds: 1\nsettings: {task: digits}\nrules: [{rule: dfa, tune: {optimizer.lr: {low: 1, high: 0}}}]\n",
    "time below zero": "title: A\nseeds: 1\ntimeout: -1\nrules: [dfa]\nsettings: {task: digits}\n",
    "an interpolation": "title: A\nseeds: 1\nrules: [dfa]\nsettings: {task: digits, tracking.experiment: '${oc.env:PATH}'}\n",
    "rows that are numbers": "title: A\nseeds: 1\nrows: [1, 2]\n",
    "a row in a row": "title: A\nseeds: 1\nrows: [{label: a, settings: {rule: {rule: dfa}}}]\n",
}


def study_files(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Spoil a study's file."""
    known = STUDIES | {name: text for name, text in YAML.items() if name not in STUDIES}
    path, words = folder / "study.yaml", ["study", "run", "study.yaml", "--dry-run", "tracking.enabled=false"]
    if number < len(known):
        name = list(known)[number]
        _write(path, known[name])
        return Case(name, words)
    text, how = _spoilt((material / "study.yaml").read_text(), draws)
    _write(path, text)
    return Case(how, words, refused=False)


# --- what runs leave ------------------------------------------------------------------------------------------------------


def _run(material: Path, folder: Path) -> Path:
    return Path(shutil.copytree(material / "run", folder / "runs" / "it"))


def checkpoints(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Make a checkpoint that is damaged, planted, or well-formed and wrong."""
    import torch

    from bpfree.training.checkpoint import read_checkpoint, write_checkpoint

    path = _run(material, folder) / "checkpoints" / "last.pt"
    words = draws.choice([["evaluate", "runs/it"], ["train", "--resume", "runs/it", "budget.epochs=2", "--quiet"]])
    content, kind = path.read_bytes(), number % 4
    if kind == 0:
        spoilt, how = _flipped(content, draws)
        _write(path, spoilt)
        return Case(how, words)
    if kind == 1:
        planted = draws.choice(["pickle", "torch", "inside", "empty", "text", "zip"])
        if planted == "torch":
            torch.save({"format": 1, "weights": _Planted()}, path)
        elif planted == "inside":
            write_checkpoint(path, read_checkpoint(path) | {"weights": {"a": _Planted()}})
        elif planted == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("../../CANARY", "x")
        else:
            _write(path, {"pickle": pickle.dumps(_Planted()), "empty": b"", "text": b"weights: 3\n"}[planted])
        return Case(f"planted: {planted}", words)
    known = read_checkpoint(path)
    if kind == 2:
        key = draws.choice([key for key in known if key not in ("digest", "bpfree")])
        value = draws.choice([None, 3, "x", [], {}, torch.zeros(2), -1, {"a": {"b": 1}}])
        write_checkpoint(path, known | {key: value})
        return Case(f"{key} is {value!r:.40}", words, refused=False)
    training = dict(known["training"])
    key = draws.choice(list(training))
    training[key] = draws.choice([None, 3, "x", [], {}, torch.zeros(2)])
    write_checkpoint(path, known | {"training": training})
    return Case(f"training.{key} is {training[key]!r:.40}", ["train", "--resume", "runs/it", "budget.epochs=2", "--quiet"], refused=False)


def run_folders(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Spoil a run's log, or another of its files."""
    run = _run(material, folder)
    store = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"
    words = draws.choice([["runs"], ["evaluate", "runs/it"], ["train", "--resume", "runs/it", "--quiet"], ["runs", "--clean"]])
    log = run / "events.jsonl"
    lines, kind = log.read_text().splitlines(), number % 6
    if kind == 0:
        at = draws.randrange(len(lines))
        deep = '{"event": ' * DEEP
        event = json.loads(lines[at])
        event[draws.choice(list(event))] = draws.choice([None, 3, "x", [], {}, [[1]], -1, "\x00"])
        lines[at] = draws.choice(["null", "[]", "{}", deep, "\x00" * 99, '{"event": "end", "time": 1}', json.dumps(event)])
        _write(log, "\n".join(lines) + "\n")
        return Case(f"line {at + 1} of the log is {lines[at][:80]!r}", words, refused=False)
    if kind == 1:
        spoilt, how = _flipped(log.read_bytes(), draws)
        _write(log, spoilt)
        return Case(f"the log: {how}", words, refused=False)
    if kind == 2:
        (folder / "secret.txt").write_text("not yours\n")
        out = draws.choice(["../../secret.txt", str(folder / "secret.txt"), "../../../../../../etc/passwd", ".", "\x00", "link"])
        (run / "link").symlink_to(folder / "secret.txt")
        lines.insert(-1, json.dumps({"event": "artifact", "time": 1, "path": out}))
        _write(log, "\n".join(lines) + "\n")

        def taken(text: str, code: int) -> list[str]:
            names = {"secret.txt", "passwd", "link"}
            return [f"{path.name} was uploaded" for path in folder.rglob("mlruns/**/*") if path.name in names]

        shutil.copy(_database(), folder / "mlflow.db")
        return Case(f"the log names the artifact {out!r}", ["track", "send", "runs/it", store], check=taken)
    if kind == 3:
        name = draws.choice(["config.yaml", "sent-mlflow.json", "plan.txt", "predictions.npz"])
        _write(
            run / name,
            draws.choice([b"", b"\xff\xfe", b"[1, 2", b"{}", b"3", b"null", f'!!python/object/apply:os.system ["{SHELL}"]'.encode()]),
        )
        shutil.copy(_database(), folder / "mlflow.db")
        return Case(
            f"{name} is {(run / name).read_bytes()[:30]!r}", draws.choice([words, ["track", "send", "runs/it", store]]), refused=False
        )
    if kind == 4:
        name = draws.choice(["events.jsonl", "checkpoints", "config.yaml"])
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if draws.random() < 0.5 and name != "checkpoints":
            path.mkdir()
        words = ["train", "--resume", "runs/it", "--quiet"] if name == "checkpoints" else words
        return Case(f"{name} is gone, or a folder", words, refused=name == "checkpoints")
    shutil.rmtree(run)
    run.symlink_to(run)
    return Case("the folder is a link to itself", ["evaluate", "runs/it"])


def _database() -> Path:
    from faults.stores import empty_database

    return empty_database()


def arrays(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Spoil arrays of the task ``npz``."""
    import numpy as np

    path = folder / "arrays.npz"
    words = [
        "train",
        "rule=dfa",
        "task=npz",
        "task.path=arrays.npz",
        "budget.epochs=1",
        "tracking.enabled=false",
        "network.width=8",
        "--quiet",
    ]
    x, y = np.ones((40, 6), np.float32), np.arange(40) % 3
    bad = x.copy()
    bad[3, 2] = np.nan
    made: dict[str, dict[str, Any]] = {
        "an object that runs code": {"x": np.array([_Planted()] * 4, dtype=object), "y": y[:4]},
        "objects as targets": {"x": x, "y": np.array([{} for _ in range(40)], dtype=object)},
        "other lengths": {"x": x, "y": y[:7]},
        "no targets": {"x": x},
        "no inputs": {"y": y},
        "not a number": {"x": bad, "y": y},
        "infinity": {"x": np.where(np.isnan(bad), np.inf, bad), "y": y},
        "nothing in it": {"x": x[:0], "y": y[:0]},
        "one example": {"x": x[:1], "y": y[:1]},
        "texts": {"x": np.array(["a"] * 40), "y": y},
        "complex numbers": {"x": x.astype(np.complex64), "y": y},
        "dates": {"x": x, "y": np.array(["2020-01-01"] * 40, dtype="datetime64[D]")},
        "classes below zero": {"x": x, "y": y - 5},
        "a number for inputs": {"x": np.float32(3), "y": y},
        "seven dimensions": {"x": np.ones((40, 1, 1, 1, 1, 1, 1), np.float32), "y": y},
    }
    if number < len(made):
        name = list(made)[number]
        np.savez(path, **made[name])
        return Case(name, words, refused=name != "one example")
    if number == len(made):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**15, 6)})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", header.getvalue() + bytes(100))
            archive.writestr("y.npy", header.getvalue() + bytes(100))
        return Case("a header that claims more than there is memory", words)
    spoilt, how = _flipped((material / "arrays.npz").read_bytes(), draws)
    _write(path, spoilt)
    return Case(how, words, refused=False)


# --- the registry -----------------------------------------------------------------------------------------------------------


def _json(content: Any, draws: random.Random) -> str:
    """Spoil a random place of a JSON value; returns the place."""
    where, at = "", content
    while True:
        key = draws.choice(list(at) if isinstance(at, dict) else range(len(at)))
        where += f"/{key}"
        if isinstance(at[key], (dict, list)) and at[key] and draws.random() < 0.75:
            at = at[key]
            continue
        value = draws.choice([None, -1, "x", [], {}, "../../x", 1e308, True, "<script>", [[[]]]])
        if draws.random() < 0.2:
            del at[key]
            return f"{where} left out"
        at[key] = value
        return f"{where} is {value!r}"


def entries(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Spoil an entry of a registry, or its index."""
    shutil.copytree(material / "registry", folder / "registry")
    if number % 4 == 3:
        index = folder / "registry" / "index.json"
        content = json.loads(index.read_text())
        how = _json(content, draws)
        _write(index, draws.choice([json.dumps(content), "[" * DEEP, "", "null", "\x00", "{}"]))
        return Case(f"the index: {how}", ["registry", "list", "--index", "registry/index.json"], refused=False)
    path = folder / "registry" / "plugins" / draws.choice(["core.toml", "hebbian.toml", "noprop.toml"])
    text, how = _spoilt(path.read_text(), draws)
    if number % 4 == 2:
        content = path.read_bytes()
        text, how = draws.choice(
            [
                ("", "empty"),
                ("x = [" * 500, "nested"),
                ("name = 3\n", "a number as name"),
                ("\x00", "NUL"),
                ('name = "../../x"\n', "a path"),
            ]
        )
        assert content
    _write(path, text)
    command = draws.choice([["registry", "validate", "--folder", "registry"], ["registry", "list", "--folder", "registry"]])
    return Case(f"{path.name}: {how}", command, refused=number % 4 == 2)


def certificates(material: Path, folder: Path, draws: random.Random, number: int) -> Case:
    """Spoil a certificate, in a registry or given to be added."""
    shutil.copytree(material / "registry", folder / "registry")
    path = folder / "registry" / "certificates" / "dfa.json"
    content = json.loads(path.read_text())
    how = _json(content, draws)
    text: str | bytes = json.dumps(content)
    if number % 4 == 3:
        text, how = draws.choice(
            [(b"\xff", "not UTF-8"), ("", "empty"), ("[" * DEEP, "nested"), ("[]", "a list"), ("{}", "empty"), ("NaN", "no JSON")]
        )
    _write(path, text)
    add = ["registry", "add", "core", "--certificate", str(folder / "given.json"), "--folder", "registry"]
    shutil.copy(path, folder / "given.json")
    validate = ["registry", "validate", "--folder", "registry"]
    if number % 2:
        shutil.copy(material / "registry" / "certificates" / "dfa.json", path)
        return Case(how, add, refused=number % 4 == 3)
    return Case(how, draws.choice([validate, ["registry", "show", "core", "--folder", "registry"]]), refused=False)


FAMILIES: dict[str, Family] = {
    "configuration": configurations,
    "study file": study_files,
    "checkpoint": checkpoints,
    "run folder": run_folders,
    "npz": arrays,
    "registry entry": entries,
    "certificate": certificates,
}
