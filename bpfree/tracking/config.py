"""The options of tracking, and of pictures."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote

from bpfree.errors import UsageError
from bpfree.options import option
from bpfree.redaction import is_redacted, redact

__all__ = ["PicturesConfig", "TrackingConfig", "sqlite_file", "sqlite_uri"]

logger = logging.getLogger("bpfree.tracking")


@dataclass
class PicturesConfig:
    """Grids of what the rule learns (``pictures/`` in the run's folder), drawn after the epoch's evaluation."""

    every: int | None = option(
        None, "epochs between pictures; 0: never (none: after each of the first 20, then fewer: 30, 40, ..., 200, 300, ...)", ge=0
    )
    count: int = option(64, "units drawn of each block: its first ones", ge=1, unless={"every": (0,)})
    curves: bool = option(True, "draw the run's curves when it ends (plots/ in its folder)")


@dataclass
class TrackingConfig:
    """Which trackers read a run, what they get, and how long the run waits for them."""

    enabled: bool = option(True, "have trackers read the run's log")
    to: list[str] = option(factory=lambda: ["mlflow"], help="trackers by name: mlflow, csv, tensorboard, and what plugins bring")
    folder: str | None = option(
        None,
        "folder for trackers that write files: one in it for each run; relative to where the output folder lies (none: the run's own)",
    )
    uri: str | None = option(None, "MLflow's store; none: MLFLOW_TRACKING_URI, or else mlflow.db beside the output folder")
    experiment: str = option("bpfree", "MLflow experiment")
    required: bool = option(False, "refuse to train while a tracker cannot be reached, instead of warning")
    interval: float = option(1.0, "seconds between batches sent", gt=0)
    system: bool = option(True, "sample the use of processors, memory, disk, network and GPUs")
    system_interval: float = option(1.0, "seconds between system samples", ge=0.05, unless={"system": (False,)})
    timeout: float = option(10.0, "seconds that one request may take, and that the start of a run waits for a server", gt=0)
    flush_timeout: float = option(30.0, "seconds that the end of a run waits for what is not sent yet", ge=0)
    artifacts: bool = option(True, "upload configuration, environment, plots and pictures")
    checkpoint: bool = option(True, "upload the tested or last checkpoint too")

    @property
    def to_mlflow(self) -> bool:
        """Whether MLflow tracks the run."""
        return self.enabled and "mlflow" in self.to

    def resolve_uri(self, output_folder: Path) -> str:
        """The store: what is configured, ``MLFLOW_TRACKING_URI``, or SQLite beside the output folder.

        Raises:
            UsageError: what is configured was recorded, without user, password and query, and the environment names no store.
        """
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        if self.to_mlflow and is_redacted(self.uri):
            if not environment:
                what = "the address of the tracking store was recorded without its user, password and query"
                fix = "give it again with tracking.uri=..., or by MLFLOW_TRACKING_URI; or tracking.enabled=false"
                raise UsageError(what, where=f"tracking.uri={self.uri}", fix=fix)
            _say_once(redact(environment), str(self.uri))
            return environment
        chosen = self.uri or environment
        return chosen or sqlite_uri(output_folder.absolute().parent / "mlflow.db")


@lru_cache(maxsize=64)
def _say_once(taken: str, recorded: str) -> None:
    logger.info("tracking to %s, from MLFLOW_TRACKING_URI: tracking.uri=%s was recorded without its secrets", taken, recorded)


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite database, whatever its path holds: ``?`` begins the options of one, and ``%`` stands for other characters."""
    name = path.as_posix()
    if not {"?", "%"} & set(name):
        return f"sqlite:///{name}"
    from sqlalchemy.engine import make_url  # whose versions read them differently

    for uri in (f"sqlite:///{quote(name, safe='/#: ')}", f"sqlite:///{name}"):
        if make_url(uri).database == name:
            return uri
    return f"sqlite:///file:{quote(name)}?uri=true"


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite address; ``None`` for other addresses."""
    scheme, _, rest = uri.partition("///")
    if scheme.partition("+")[0].rstrip(":") != "sqlite" or rest in ("", ":memory:"):
        return None
    if {"?", "%"} & set(rest):
        from sqlalchemy.engine import make_url

        rest = make_url(uri).database or ""
        rest = unquote(rest.removeprefix("file:")) if rest.startswith("file:") else rest
    return Path(rest) if rest and rest != ":memory:" else None
