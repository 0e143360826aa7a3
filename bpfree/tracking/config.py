"""The options of tracking, and of pictures."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from bpfree.errors import UsageError
from bpfree.options import Sectioned, option
from bpfree.redaction import is_redacted, redact

__all__ = ["PicturesConfig", "TrackingConfig", "sqlite_file", "sqlite_uri"]

logger = logging.getLogger("bpfree.tracking")


@dataclass
class PicturesConfig(Sectioned):
    """Grids of what the rule learns (``pictures/`` in the run's folder), drawn after the epoch's evaluation."""

    every: int | None = option(
        None, "epochs between pictures; 0: never (default: after each of the first 20, then fewer: 30, 40, ..., 200, 300, ...)", ge=0
    )
    count: int = option(64, "number of units of each block that are drawn, from the first", ge=1, unless={"every": (0,)})
    curves: bool = option(True, "draw the run's curves when it ends (plots/ in its folder)")


@dataclass
class TrackingConfig(Sectioned):
    """Which trackers read a run, what they get, and how long the run waits for them."""

    enabled: bool = option(True, "send the run's log to trackers")
    to: list[str] = option(factory=lambda: ["mlflow"], help="names of trackers: mlflow, csv, tensorboard, and those of plugins")
    folder: str | None = option(
        None,
        "folder for trackers that write files, with a subfolder per run; relative to the parent of output (default: the run's folder)",
    )
    uri: str | None = option(None, "MLflow's store (default: $MLFLOW_TRACKING_URI, otherwise mlflow.db beside the output folder)")
    experiment: str = option("bpfree", "MLflow experiment")
    required: bool = option(False, "refuse to train if a tracker cannot be reached, instead of warning")
    interval: float = option(1.0, "seconds between batches sent", gt=0)
    system: bool = option(True, "record the use of processors, memory, disk, network and GPUs")
    system_interval: float = option(1.0, "seconds between system samples", ge=0.05, unless={"system": (False,)})
    timeout: float = option(10.0, "time limit of a request, and of waiting for a server when a run starts, in seconds", gt=0)
    flush_timeout: float = option(30.0, "seconds that the end of a run waits for unsent data", ge=0)
    artifacts: bool = option(True, "upload environment, plots and pictures; the configuration is always there")
    checkpoint: bool = option(True, "also upload the tested or last checkpoint")
    model: Literal["auto", "true", "false"] = option(
        "auto", "log the trained network as an MLflow model, which has the checkpoint (auto: of a study's cells only the best)"
    )
    register: str | None = option(None, "name under which MLflow's registry gets the model", unless={"model": ("false",)})

    @property
    def to_mlflow(self) -> bool:
        """Whether MLflow tracks the run."""
        return self.enabled and "mlflow" in self.to

    def logs_model(self, *, in_study: bool) -> bool:
        """Tell whether the run's model is logged when it has finished; of a study's cells the best may be logged later."""
        return self.model == "true" or (self.model == "auto" and self.checkpoint and not in_study)

    def resolve_uri(self, output_folder: Path) -> str:
        """Return the store: the configured one, ``MLFLOW_TRACKING_URI``, or SQLite beside the output folder.

        Raises:
            UsageError: the configured address was recorded without user, password and query, and the environment names no store.
        """
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        if self.to_mlflow and is_redacted(self.uri):
            if not environment:
                what = "the address of the tracking store was recorded without its user, password and query"
                fix = "set the full address by tracking.uri=... or MLFLOW_TRACKING_URI, or set tracking.enabled=false"
                raise UsageError(what, where=f"tracking.uri={self.uri}", fix=fix)
            _say_once(redact(environment), str(self.uri))
            return environment
        chosen = self.uri or environment
        return chosen or sqlite_uri(output_folder.absolute().parent / "mlflow.db")


@lru_cache(maxsize=64)
def _say_once(taken: str, recorded: str) -> None:
    logger.info("tracking to %s, from MLFLOW_TRACKING_URI: tracking.uri=%s was recorded without its secrets", taken, recorded)


def sqlite_uri(path: Path) -> str:
    """Make the address of a SQLite database, with ``?`` and ``%`` in its path escaped."""
    name = path.as_posix()
    if not {"?", "%"} & set(name):
        return f"sqlite:///{name}"
    from sqlalchemy.engine import make_url  # versions of SQLAlchemy read these characters differently

    for uri in (f"sqlite:///{quote(name, safe='/#: ')}", f"sqlite:///{name}"):
        if make_url(uri).database == name:
            return uri
    return f"sqlite:///file:{quote(name)}?uri=true"


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a SQLite address; ``None`` for other addresses."""
    scheme, _, rest = uri.partition("///")
    if scheme.partition("+")[0].rstrip(":") != "sqlite" or rest in ("", ":memory:"):
        return None
    if {"?", "%"} & set(rest):
        from sqlalchemy.engine import make_url

        rest = make_url(uri).database or ""
        rest = unquote(rest.removeprefix("file:")) if rest.startswith("file:") else rest
    return Path(rest) if rest and rest != ":memory:" else None
