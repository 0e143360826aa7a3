"""Errors of the command line's own parser in the layout of all errors: what, where, fix, known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import click

from bpfree.errors import UsageError, did_you_mean

__all__ = ["told_usage"]

NEAR = 0.7
"""Similarity above which an option is taken for a misspelt one, not for a setting with dashes."""
VALUE = re.compile(r"'(.*?)' is not one of")


def told_usage(error: click.ClickException, words: Sequence[str]) -> UsageError:
    """Say what is wrong with the words of a command line.

    Args:
        error: as click raises it.
        words: of the command line.
    """
    context = error.ctx if isinstance(error, click.UsageError) else None
    where = context.command_path if context is not None else "command line"
    what = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption) and context is not None:
        return _unknown_option(error.option_name, context, words)
    if context is not None and isinstance(context.command, click.Group) and (found := re.match(r"No such command '(.*?)'", what)):
        known = context.command.list_commands(context)
        fix = did_you_mean(found[1], known, quoted=False) or f"{where} --help lists the commands"
        return UsageError(f"unknown command {found[1]!r}", where=where, fix=fix, known=known)
    if isinstance(error, click.BadParameter) and error.param is not None:
        name = error.param.human_readable_name if isinstance(error.param, click.Argument) else error.param.opts[0]
        if isinstance(error.param.type, click.Choice) and (found := VALUE.match(error.message)):
            choices = list(map(str, error.param.type.choices))
            fix = did_you_mean(found[1], choices, quoted=False) or "use one of the known values"
            return UsageError(f"unknown value {found[1]!r}", where=f"{where}: {name}", fix=fix, known=choices)
        return UsageError(_lowered(error.message.rstrip(".") or what), where=f"{where}: {name}", fix=_usage(context))
    return UsageError(_lowered(what), where=where, fix=_usage(context))


def _unknown_option(option: str, context: click.Context, words: Sequence[str]) -> UsageError:
    """Suggest the nearest option, or the word ``KEY=VALUE`` where the command takes settings."""
    command, where = context.command, context.command_path
    known = [name for each in command.params if isinstance(each, click.Option) for name in each.opts if name.startswith("--")]
    near = difflib.get_close_matches(option, known, n=1, cutoff=NEAR)
    takes_settings = any(each.name in ("settings", "words") for each in command.params)
    what = f"unknown option {option!r}"
    if takes_settings and not near and option.startswith("--"):
        return UsageError(what, where=where, fix=f"settings are words without dashes: {_as_setting(option, words)}")
    return UsageError(what, where=where, fix=f"did you mean {near[0]}?" if near else f"{where} --help lists the options", known=known)


def _as_setting(option: str, words: Sequence[str]) -> str:
    key = option.lstrip("-").replace("-", "_")
    given = next((word for word in words if word.partition("=")[0] == option), option)
    if "=" in given:
        return f"{key}={given.partition('=')[2]}"
    after = list(words[words.index(given) + 1 :]) if given in words else []
    return f"{key}={after[0] if after and not after[0].startswith('-') else 'VALUE'}"


def _usage(context: click.Context | None) -> str:
    return " ".join(context.get_usage().split()).replace("Usage: ", "usage: ", 1) if context is not None else ""


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
