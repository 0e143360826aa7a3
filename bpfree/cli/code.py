"""The option that allows code in a file to be executed."""

from __future__ import annotations

import click

__all__ = ["allow_code"]

allow_code = click.option(
    "--allow-code",
    multiple=True,
    metavar="FILE",
    help="Execute the code in this file, where a configuration, study or run names it (repeatable).",
)
