"""The entry point: set the environment before torch loads, and turn errors into messages and exit codes."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from bpfree.document.terminal import fitted, width_of
from bpfree.errors import BpfreeError, told
from bpfree.redaction import redact, redact_logs
from bpfree.version import __version__

__all__ = ["cli", "main"]

# Idle OpenMP threads that spin make a busy machine up to 60 times slower; this must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Messages of torch's C++ parts (such as a profiler's on memory allocated before it started) mean nothing to a user.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# MLflow sends telemetry by default; with bpfree only if the user enables it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

PAUSE = 10.0
"""Seconds that other processes give the first one to report an error in a request."""

EPILOG = """
\b
Examples:
  bpfree rules                              list learning rules
  bpfree rules noprop-dt                    show a method card
  bpfree train rule=noprop-dt task=mnist budget.epochs=2 seed=1
  bpfree train --config runs/RUN/config.yaml     repeat a run
  bpfree train --resume runs/RUN            resume after an interruption
  bpfree evaluate runs/RUN --split test
  bpfree predict runs/RUN photos/ --output predictions.csv
  bpfree export runs/RUN --format onnx --output model.onnx
  bpfree runs                               list runs and their status
  bpfree compare noprop-dt dfa --seeds 3    compare with floor and ceiling
  bpfree study list                         studies, such as tables of papers
  bpfree certify dfa                        measure a rule's properties
  bpfree plugins new my-rule                create a rule of your own
  bpfree completion --install               complete words with TAB
"""


class Commands(click.Group):
    """Commands in the order of use, each imported when it is named."""

    modules = {
        "train": "train",
        "evaluate": "evaluate",
        "predict": "predict",
        "export": "export",
        "compare": "compare",
        "study": "study",
        "certify": "certify",
        "rules": "listing",
        "networks": "listing",
        "tasks": "listing",
        "programs": "listing",
        "metrics": "listing",
        "plugins": "plugins",
        "registry": "registry",
        "runs": "runs",
        "track": "track",
        "completion": "completion",
    }

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.modules)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.modules:
            return None
        module = __import__(f"bpfree.cli.{self.modules[name]}", fromlist=[name])
        return getattr(module, name)  # type: ignore[no-any-return]


@click.command(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bpfree")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option("--disable", multiple=True, metavar="PLUGIN", help="Disable a plugin (like BPFREE_DISABLE_PLUGINS).")
def cli(debug: bool, disable: tuple[str, ...]) -> None:
    """Train neural networks without end-to-end back-propagation, and compare learning rules fairly.

    Settings are words of the form KEY=VALUE, the same everywhere; `bpfree train --print-config` lists every key.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    redact_logs(logging.getLogger().handlers)
    logging.getLogger("bpfree").setLevel(logging.ERROR if _rank() else logging.INFO)
    if disable:
        os.environ["BPFREE_DISABLE_PLUGINS"] = ",".join(filter(None, [os.environ.get("BPFREE_DISABLE_PLUGINS", ""), *disable]))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong request, 129, 130 or 143 interrupted and resumable."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale without some characters shows escapes instead of failing
        sys.stdout.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # Python in child processes must not import from the current folder
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    debug = "--debug" in words
    # accepted anywhere
    words = [word for word in words if word != "--debug"]
    _leave(_run(["--debug", *words] if debug else words, debug=debug))


def _leave(code: int) -> NoReturn:
    """End the process; under a launcher, the first process ends first."""
    if _several():
        if _rank() and code == 2:
            time.sleep(PAUSE)  # a launcher ends all processes when one ends, and the first one must report the reason
        # Threads of torch.distributed may outlive the interpreter and abort it, which a launcher would report as a failure.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(words: list[str], *, debug: bool) -> int:
    if "_BPFREE_COMPLETE" in os.environ:
        from bpfree.cli import completion  # noqa: F401  (it registers the shells)
    try:
        result: Any = cli.main(args=words, prog_name="bpfree", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BpfreeError as error:
        if error.exit_code > 128:  # interrupted: the progress display has printed how to resume
            return error.exit_code
        return _say(error, f"error: {error}", error.exit_code, debug)
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # this exception exists since click 8.2; earlier versions print the help themselves
            click.echo(error.format_message())
            return 0
        from bpfree.cli.usage import told_usage

        return _say(error, f"error: {told_usage(error, words)}", error.exit_code, debug)
    except SystemExit as error:  # an exit that bpfree did not request
        if _place(error).startswith(str(Path(click.__file__).parent)):  # the completions were printed
            return int(error.code or 0)
        text = f"error: code outside of bpfree has called sys.exit({error.code!r})\n  where: {_place(error)}"
        return _say(error, text, 1, debug)
    except (click.Abort, KeyboardInterrupt) as error:
        return _say(error, "interrupted", 130, debug)
    except BrokenPipeError:  # the reader of the output has ended, as in `bpfree rules | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:  # code outside of bpfree may raise anything
        text, fix = " ".join(told(error).split()), "run again with --debug for the traceback"
        return _say(error, f"error: unexpected {text}\n  where: {_place(error)}\n  fix:   {fix}", 1, debug)


def _place(error: BaseException) -> str:
    """Return file, line and function that raised an error."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{place.filename}, line {place.lineno}, in {place.name}"


def _several() -> bool:
    """Tell whether a launcher has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _rank() -> int:
    """Return the rank of this process among those of a launcher."""
    return int(os.environ.get("RANK", "0")) if _several() else 0


def _say(error: BaseException, message: str, code: int, debug: bool) -> int:
    if debug:
        click.echo(redact("".join(traceback.format_exception(error))), err=True, nl=False)
    rank = _rank()
    if rank and code == 2:  # if several processes make the same request, only the first one reports its errors
        return code
    message = redact(message)
    click.echo(fitted(f"process {rank}: {message}" if rank else message, width_of(sys.stderr)), err=True)
    return code
