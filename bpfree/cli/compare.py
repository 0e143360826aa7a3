"""``bpfree compare``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

ENVIRONMENT = ("device_name", "threads", "torch", "python", "bpfree")

HELP = """Train several rules over several seeds, and put them into one table and one page.

Each WORD is a rule, a rule with settings of its own (`noprop-dt,rule.T=1`), or a setting of all (`task=mnist`). The linear classifier on
the inputs, the frozen twin of each rule (random features, the same readout recipe) and back-propagation stand beside them: the floor and
the ceiling without which an accuracy says little. Settings of `network` reach the rules that take any network; one with a network of its
own (and the linear classifier) takes them in its own WORD.

\b
  bpfree compare noprop-dt dfa --seeds 3 budget.epochs=30
  bpfree compare noprop-dt noprop-dt,rule.T=1 task=mnist budget.epochs=2
"""


@click.command(help=HELP, short_help="Compare rules over seeds, beside floor and ceiling.")
@click.argument("words", nargs=-1, required=True, metavar="WORD...")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Repetitions, with seeds 0, 1, ...")
@click.option("--only", is_flag=True, help="Only the rules named: no linear classifier, frozen twins and back-propagation.")
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="Where to write the page.  [default: in the output folder]")
@click.option("--quiet", "-q", is_flag=True, help="No progress display.")
def compare(words: tuple[str, ...], seeds: int, only: bool, page: Path | None, quiet: bool) -> int:
    from bpfree import comparison
    from bpfree.cli.output import print_table
    from bpfree.comparison_page import write_page
    from bpfree.config import parse_words, resolve
    from bpfree.errors import UsageError

    rules = [word for word in words if "=" not in word.split(",")[0]]
    common = parse_words(word for word in words if word not in rules)
    if any(leaf.key in ("seed", "seeds") for leaf in common):
        raise UsageError("a comparison repeats each rule with the seeds 0, 1, ...", where="seed", fix="say how many with --seeds N")
    rows = comparison.rows_for(rules, references=not only)
    recipe = resolve([*comparison.reaching(rows[0], common), *rows[0].leaves])
    repetitions = list(range(seeds))
    comparison.compare(rows, common, repetitions, quiet=quiet, say=lambda text: click.echo(text, err=True))
    click.echo()
    print_table(comparison.HEADERS, comparison.summary(rows), right=range(1, len(comparison.HEADERS)))
    tags = next((run.tags for row in rows for run in row.finished), {})
    place = write_page(
        page or comparison.default_page(recipe.settings.output),
        rows,
        title=f"{', '.join(rules)} on {recipe.names['task']}",
        settings=comparison.settings_line(common, repetitions),
        command=shlex.join(["bpfree", "compare", *words, "--seeds", str(seeds), *(["--only"] if only else [])]),
        environment=", ".join(f"{key.removeprefix('device_name')} {tags[key]}".strip() for key in ENVIRONMENT if tags.get(key)),
    )
    click.echo(f"\n{place.resolve()}")
    return 0 if all(row.finished for row in rows) else 1
