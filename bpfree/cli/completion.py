"""Shell completion: commands, names, keys of settings and their values, studies with their rows, and runs.

What depends on installed plugins is kept from one call to the next (:mod:`bpfree.kept`), so that torch is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete, add_completion_class, split_arg_string

__all__ = ["SHELLS", "completion", "labels_of", "names_of", "run_name", "setting", "study_name", "word"]

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
SECTIONS = {"rule": "rules", "network": "networks", "program": "programs", "task": "tasks"}
LISTS = {
    "evaluation.metrics": "metrics",
    "evaluation.protocols": "protocols",
    "diagnostics": "diagnostics",
    "tracking.to": "trackers",
    "task.augment": "augmentations",
    "optimizer.addons": "addons",
}
"""Keys whose values are lists of names."""
PART = "part"
"""Type of a completion that goes on: no blank is put behind it."""


def names_of(kind: str) -> Complete:
    """Complete the names of a kind, with their summaries."""
    return lambda context, parameter, incomplete: _items(_named(kind), "", incomplete)


def study_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete an installed study, or a study file in this folder."""
    found = _items(_named("studies"), "", incomplete)
    if "/" in incomplete and not found:
        return [CompletionItem(incomplete, type="file")]
    return found + _items([(path.name, "study file") for path in sorted(Path().glob("*.y*ml"))], "", incomplete)


def run_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a run by its name in the output folder, the newest first, or by its path."""
    if "/" in incomplete:
        return [CompletionItem(incomplete, type="file")]
    words = dict(word.partition("=")[::2] for word in _settings(context))
    folder = Path(words.get("output", "runs"))
    found = sorted(folder.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    return _items([(path.parent.name, "") for path in found], "", incomplete)


def labels_of(kind: str) -> Complete:
    """Complete the labels of a study's ``rows`` or ``columns``, separated by commas."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, begun = incomplete.rpartition(",")
        given = before.split(",") if comma else []
        study = context.params.get("name") or next(iter(context.args), "")
        found = [label for label in _labels(str(study), kind) if label not in given]
        return _items([(label, "") for label in found], before + comma, begun)

    return complete


def word(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a rule or a setting."""
    return names_of("rules")(context, parameter, incomplete) + setting(context, parameter, incomplete)


def setting(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete ``KEY=``, and the value behind it where that is a name."""
    key, sign, value = incomplete.partition("=")
    if sign:
        return _values(context, key, value)
    keys = {name: meaning for name, meaning, _ in _keys(_settings(context))}
    if "." in incomplete:
        return _items([(f"{name}=", meaning) for name, meaning in keys.items()], "", incomplete, PART)
    short = [(f"{name}=", "") for name in ("rule", "network", "task", "program", "optimizer", "schedule")]
    plain = [(f"{name}=", meaning) for name, meaning in keys.items() if "." not in name]
    sections = [(f"{name}.", "") for name in dict.fromkeys(name.partition(".")[0] for name in keys if "." in name)]
    return _items([*short, *plain, *sections], "", incomplete, PART)


def _values(context: click.Context, key: str, value: str) -> list[CompletionItem]:
    if key.removesuffix(".name") in SECTIONS:
        return _items(_named(SECTIONS[key.removesuffix(".name")]), f"{key}=", value)
    if key in LISTS:
        before, comma, begun = value.removeprefix("[").rpartition(",")
        return _items([(f"{name}]", text) for name, text in _named(LISTS[key])], f"{key}=[{before}{comma}", begun)
    full = f"{key}.name" if key in ("optimizer", "schedule") else key
    found: Sequence[str] = next((choices for name, _, choices in _keys(_settings(context)) if name == full), [])
    return _items([(choice, "") for choice in found], f"{key}=", value)


def _items(found: Iterable[Sequence[str]], before: str, incomplete: str, kind: str = "plain") -> list[CompletionItem]:
    return [CompletionItem(f"{before}{name}", type=kind, help=text or None) for name, text in found if name.startswith(incomplete)]


def _settings(context: click.Context) -> Sequence[str]:
    """Return the words so far; an option that still lacks its value leaves them unread."""
    return [str(each) for each in (context.params.get("settings") or context.params.get("words") or context.args)]


# --- what is kept -----------------------------------------------------------------------------------------------------


def _named(kind: str) -> list[tuple[str, str]]:
    from bpfree.plugins import plugin_index

    index = plugin_index()
    if kind == "plugins":
        return [(record.name, record.status) for record in index.records]
    return [(name, summary) for name, _, summary in index.summaries[kind]]


def _keys(words: Sequence[str]) -> Iterator[Sequence[Any]]:
    """Yield key, meaning and choices of each setting, with the options of the rule, network and task that the words name."""
    from bpfree.kept import kept

    known: dict[str, Any] = kept("keys", _all_keys)
    yield from known[""]
    chosen = {"task": "digits", **{word.partition("=")[0].removesuffix(".name"): word.partition("=")[2] for word in words}}
    for section in SECTIONS:
        yield from known[section].get(chosen.get(section, ""), [])


def _all_keys() -> tuple[dict[str, Any], list[Path] | None]:
    """List all keys: of every run, and of each rule, network, program and task."""
    from bpfree.plugins import installed_plugins
    from bpfree.recipe import RunConfig
    from bpfree.tasks.common import TaskCommon

    registry = installed_plugins()
    known: dict[str, Any] = {"": [*_fields(RunConfig, ""), *_fields(TaskCommon, "task.")]}
    for section, kind in SECTIONS.items():
        known[section] = {name: list(_fields(thing.Config, f"{section}.")) for name, thing, _ in registry.items(kind)}
    return known, [] if registry.keepable else None


def _fields(config: type, prefix: str) -> Iterator[list[Any]]:
    import dataclasses
    import typing

    from bpfree.options import bounded_help

    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        kind, key = hints[item.name], f"{prefix}{item.name}"
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{key}.")  # type: ignore[arg-type]
        else:
            yield [key, bounded_help(item), _choices(key, kind)]


def _choices(key: str, kind: Any) -> list[str]:
    """List the values of a key that has few; those of optimisers and schedules are names of torch's classes."""
    import typing

    from torch import optim

    from bpfree.training.schedules import CLASSES, SHAPES

    if key == "optimizer.name":
        found = [name.lower() for name, each in vars(optim).items() if isinstance(each, type) and issubclass(each, optim.Optimizer)]
        return ["auto", *(name for name in found if name != "optimizer"), *(name for name, _ in _named("optimizers"))]
    if key == "schedule.name":
        return [*SHAPES, *CLASSES]
    if key == "device":
        return ["auto", "cpu", "cuda", "mps"]
    if kind is bool:
        return ["true", "false"]
    parts = [part for each in (kind, *typing.get_args(kind)) if typing.get_origin(each) is typing.Literal for part in typing.get_args(each)]
    return [str(part) for part in parts]


def _labels(study: str, kind: str) -> list[str]:
    from bpfree.errors import BpfreeError
    from bpfree.kept import kept

    def read() -> tuple[dict[str, list[str]], list[Path] | None]:
        from bpfree.study.file import find_study

        found = find_study(study)
        labels = {"rows": [row.label for row in found.rows], "columns": [column.label for column in found.columns if column.label]}
        return labels, [found.path] if found.path is not None else None

    try:
        found: dict[str, list[str]] = kept("labels", read, words=os.path.abspath(study) if os.path.exists(study) else study)
    except BpfreeError:  # no such study
        return []
    return found[kind]


# --- shells -----------------------------------------------------------------------------------------------------------


class Bash(BashComplete):
    """Takes the line up to the cursor, because bash breaks words at ``=`` and ``:``; replaces only what follows the last of these."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' completion type value response
    response=$(env COMP_WORDS="${COMP_LINE:0:$COMP_POINT}" BREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete $1)
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            part) compopt -o nospace; COMPREPLY+=("$value") ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        self._begun = words.pop() if words and not line[-1:].isspace() else ""
        return words[1:], self._begun

    def format_completion(self, item: CompletionItem) -> str:
        breaks = "".join(mark for mark in "=:" if mark in os.environ.get("BREAKS", "=:"))
        found = re.match(rf".*[{breaks}]", self._begun) if breaks else None
        return f"{item.type},{item.value[found.end() if found else 0 :]}"


class Zsh(ZshComplete):
    """Puts no blank behind a completion that goes on."""

    source_template = ZshComplete.source_template.replace(
        '        elif [[ "$type" == "dir" ]]; then',
        '        elif [[ "$type" == "part" ]]; then\n            compadd -U -S \'\' -- "$key"\n        elif [[ "$type" == "dir" ]]; then',
    )

    def format_completion(self, item: CompletionItem) -> str:
        return f"part\n{item.value}\n_" if item.type == PART else super().format_completion(item)


class Fish(FishComplete):
    """Puts a blank behind a completion or none as fish itself decides."""

    def format_completion(self, item: CompletionItem) -> str:
        help = item.help and item.help.replace(",", ";")  # click's script breaks lines at commas
        return super().format_completion(CompletionItem(item.value, "plain" if item.type == PART else item.type, help))


SHELLS = {"bash": Bash, "zsh": Zsh, "fish": Fish}
for _name, _kind in SHELLS.items():
    add_completion_class(_kind, _name)

SOURCED = {
    "bash": 'source "{path}"',
    "zsh": '(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}; source "{path}"',
}
"""What a shell's own file says to read the completion."""


@click.command(short_help="Install shell completion.")
@click.argument("shell", required=False, type=click.Choice(list(SHELLS)))
@click.option("--install", is_flag=True, help="Install it for this user, and print where.")
def completion(shell: str | None, install: bool) -> None:
    r"""Print the completion script of a SHELL (default: that of $SHELL), or install it.

    \b
      bpfree completion --install         for new shells
      source <(bpfree completion bash)    for this shell alone

    It completes commands, names, KEY= words and their values, studies with their rows, and runs.
    """
    from bpfree.cli.output import say

    shell = shell or _own_shell()
    script = SHELLS[shell](click.get_current_context().find_root().command, {}, "bpfree", "_BPFREE_COMPLETE").source()
    if not install:
        click.echo(script)
        return
    for path in _install(shell, script):
        say(f"wrote {path}")
    list(_keys(()))  # so that the first completion is quick too
    say("open a new shell to use it")


def _own_shell() -> str:
    from bpfree.errors import UsageError

    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise UsageError(f"the shell is {name or 'unknown'}", where="$SHELL", fix="name one: bpfree completion bash", known=SHELLS)
    return name


def _install(shell: str, script: str) -> Iterator[Path]:
    """Write the script where the shell reads it, and yield the files that were changed."""
    from bpfree.files import write_text

    home = Path.home()
    if shell == "fish":
        path = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish" / "completions" / "bpfree.fish"
    else:
        path = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "bpfree" / f"completion.{shell}"
    write_text(path, script)
    yield path
    if shell in SOURCED:
        rc = Path((shell == "zsh" and os.environ.get("ZDOTDIR")) or home) / f".{shell}rc"
        line = f"{SOURCED[shell].format(path=path)}  # completion of bpfree"
        text = rc.read_text(encoding="utf-8") if rc.exists() else ""
        if line not in text.splitlines():
            with rc.open("a", encoding="utf-8") as file:
                file.write(f"{'' if not text or text.endswith(chr(10)) else chr(10)}{line}\n")
            yield rc
