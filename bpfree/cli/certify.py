"""The command ``bpfree certify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bpfree.cli.code import allow_code, named
from bpfree.cli.completion import names_of, run_name, setting

if TYPE_CHECKING:
    from bpfree.certify.certificate import Certificate
    from bpfree.certify.findings import Finding

HELP = """Examine a learning rule, and measure its properties.

How far credit travels, whose weights it needs, what it costs, whether labels leak into predictions, whether a seed repeats it, whether
it learns: measured in whole runs with the rule's own settings and on small networks, on one thread of the CPU. SETTINGS are KEY=VALUE
words of the sections rule and network. Exit status 1: a check failed; each failure says what, where, and what to do.

\b
  bpfree certify dfa --quick
  bpfree certify predictive-coding rule.T=2 --page certificate.html
  bpfree certify my-rule --output my-rule.json       for bpfree registry add
  bpfree certify my-rule --waive 'learning=needs 60 epochs'
  bpfree certify mine.py:MyRule --quick      a rule in a file
  bpfree certify --run RUN                   a run with checkpoint.keep=all
  bpfree certify --list                      the checks
"""


@click.command(short_help="Examine a rule and write a certificate of its measured properties.", help=HELP)
@click.argument("rule", required=False, shell_complete=names_of("rules"))
@click.argument("settings", nargs=-1, metavar="[SETTINGS]...", shell_complete=setting)
@click.option("--quick", is_flag=True, help="Small networks only: skip whole runs, learning and permuted labels.")
@click.option(
    "--run",
    "place",
    metavar="RUN",
    shell_complete=run_name,
    help="Examine a run by forks from its checkpoints; it names the rule and all settings.",
)
@click.option("--draw", type=int, help="Seed of the moments and dirty weights of --run.  [default: a new one]")
@click.option("--only", multiple=True, metavar="CHECK", help="Run only this check (repeatable); the certificate is partial.")
@click.option("--waive", multiple=True, metavar="CHECK=REASON", help="Expect a check to fail, with the reason (repeatable).")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the certificate as JSON.")
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="Write the certificate as an HTML page with heat maps.")
@click.option("--json", "as_json", is_flag=True, help="Print only the certificate, or the list of checks, as JSON.")
@allow_code
@click.option("--list", "list_only", is_flag=True, help="List the checks.")
def certify(
    rule: str | None,
    settings: tuple[str, ...],
    quick: bool,
    place: str | None,
    draw: int | None,
    only: tuple[str, ...],
    waive: tuple[str, ...],
    output: Path | None,
    page: Path | None,
    as_json: bool,
    allow_code: tuple[str, ...],
    list_only: bool,
) -> int:
    if list_only:
        return _list(as_json)
    if rule is None and place is None:
        raise click.UsageError("name a rule (bpfree rules lists them)")
    for path in filter(None, (output, page)):  # before the examination, which takes minutes
        _check_writable(path)
    certificate = (
        _of_run(place, rule, (*settings, *only, *waive), draw, allow_code)
        if place is not None
        else _of_rule(str(rule), settings, quick=quick, only=only, waive=waive, allow_code=allow_code, as_json=as_json)
    )
    if output is not None:
        output.write_text(certificate.to_json(), encoding="utf-8")
    if page is not None:
        from bpfree.certify.page import write_page

        write_page(page, certificate)
    _show(certificate, as_json, [path for path in (output, page) if path is not None])
    return 0 if certificate.passed else 1


def _of_rule(
    rule: str,
    settings: tuple[str, ...],
    *,
    quick: bool,
    only: tuple[str, ...],
    waive: tuple[str, ...],
    allow_code: tuple[str, ...],
    as_json: bool,
) -> Certificate:
    from bpfree.certify.examination import certify as examine

    subject, registry = named("rules", rule, settings, allow_code)
    progress = None if as_json else _progress
    return examine(subject, settings, registry=registry, quick=quick, only=only, waive=_waivers(waive), progress=progress)


def _of_run(place: str, rule: str | None, other: tuple[str, ...], draw: int | None, allow_code: tuple[str, ...]) -> Certificate:
    from bpfree.certify.forks import certify_run
    from bpfree.config import allowing
    from bpfree.errors import UsageError
    from bpfree.training.checkpoint import find_checkpoint

    if rule is not None or other:
        raise UsageError("--run takes rule, settings and checks from the run", where="command line", fix="leave out everything else")
    return certify_run(find_checkpoint(place).parent.parent, registry=allowing([], allow_code), draw=draw)


def _list(as_json: bool) -> int:
    from bpfree.certify.examination import CHECKS
    from bpfree.cli.output import print_json, print_table

    def remarks(check: Any) -> str:
        return ", ".join(word for word, holds in (("not in --quick", not check.quick), ("cannot be waived", not check.waivable)) if holds)

    if as_json:
        print_json([{"check": check.id, "title": check.title, "quick": check.quick, "waivable": check.waivable} for check in CHECKS])
        return 0
    print_table(["check", "what holds if it passes", ""], [[check.id, check.title, remarks(check)] for check in CHECKS])
    return 0


def _check_writable(path: Path) -> None:
    from bpfree.errors import UsageError

    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {str(path.parent)!r}", where=str(path), fix="create it, or choose another folder")


def _waivers(words: tuple[str, ...]) -> dict[str, str]:
    from bpfree.errors import UsageError

    waivers = {}
    for word in words:
        name, sign, reason = word.partition("=")
        if not sign:
            raise UsageError(f"a waiver is CHECK=REASON, not {word!r}", where="--waive", fix=f"write --waive '{name}=why this is expected'")
        waivers[name] = reason
    return waivers


def _progress(check: Any, number: int, count: int, finding: Finding | None) -> None:
    """Show the running check on a terminal and replace it by its result; elsewhere print only the results."""
    live = sys.stderr.isatty()
    if finding is None:
        if live:
            click.echo(f"{number:>3}/{count} {check.id} ...", nl=False, err=True)
        return
    click.echo(f"{chr(13) if live else ''}{number:>3}/{count} {check.id.ljust(26)} {finding.status} ({finding.seconds:.1f} s)", err=True)


def _show(certificate: Certificate, as_json: bool, written: list[Path]) -> None:
    if as_json:
        click.echo(certificate.to_json(), nl=False)
        return
    from bpfree.certify.show import render
    from bpfree.cli.output import say

    click.echo("", err=True)
    say("\n".join(render(certificate)))
    for path in written:
        say(f"written: {path}")
