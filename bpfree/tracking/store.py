"""A small interface to an MLflow store: open a run, send events. All calls may block, and run in the sender's thread."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import socket
import sqlite3
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from bpfree.errors import BpfreeError, UsageError
from bpfree.redaction import redact, redact_logs
from bpfree.tracking.config import sqlite_file, sqlite_uri
from bpfree.tracking.events import Artifact, DataSet, End, Message, Metrics, Model, Opening, Tags, TextArtifact
from bpfree.tracking.tracker import RefusedError

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from mlflow import MlflowClient

__all__ = ["RUN_TAG", "Store", "file_lock", "prepare_mlflow"]

RUN_TAG = "bpfree.run"
"""Tag with bpfree's identifier, which finds a run whose creation was not confirmed."""

OUR_TIMEOUT = "_BPFREE_MLFLOW_TIMEOUT"
"""Environment variable that distinguishes a timeout set here from one set by the user."""

KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Tag of an experiment by which MLflow's interface opens its view of training, and not that of generative AI."""
NOTE_TAG = "mlflow.note.content"
"""Tag whose text MLflow's interface shows as a description."""
EXPERIMENT_NOTE = (
    "Runs of bpfree: neural networks trained without end-to-end back-propagation, and the baselines beside them. A study is a run with its "
    "cells as nested runs and its report among its artifacts; group runs by the tag `study_row` to compare its rows."
)

PROBE_SECONDS = 2.0
LOCK_SECONDS = 120.0
PARAM_LENGTH, MODEL_PARAM_LENGTH, TAG_LENGTH, PER_BATCH = 6000, 4000, 5000, 100
CHATTER = (
    "alembic",
    "alembic.runtime.migration",
    "alembic.runtime.plugins",
    "mlflow.store",
    "mlflow.tracking",
    "mlflow.system_metrics",
    "urllib3.connectionpool",
)
PERMANENT = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "MALFORMED_REQUEST",
}
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p", "afs"}


def without_telemetry() -> None:
    """Disable MLflow's telemetry unless the user has enabled it; call this before MLflow is imported."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        os.environ.setdefault(name, "true")


def prepare_mlflow(timeout: float) -> None:
    """Import MLflow without telemetry and log messages, with bounded requests; the user's settings are kept.

    MLflow reads all of these only from the environment of the process.
    """
    without_telemetry()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the sender itself retries, with its own back-off
    if os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") == os.environ.get(OUR_TIMEOUT):  # unset, or set here for another run
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = os.environ[OUR_TIMEOUT] = str(math.ceil(timeout))
    quiet(*CHATTER)
    import mlflow.tracking  # noqa: F401  sets up its logging, whose level is then raised

    quiet(*CHATTER)
    quiet("mlflow.store.db.utils", level=logging.CRITICAL)  # it prints the traceback of an error that bpfree reports itself
    redact_logs()


def quiet(*names: str, level: int = logging.ERROR) -> None:
    """Limit loggers to errors, or another level, unless they are being debugged."""
    for name in names:
        logger = logging.getLogger(name)
        if logger.level in (logging.NOTSET, logging.INFO):
            logger.setLevel(level)


def file_lock(path: Path, timeout: float = LOCK_SECONDS) -> BaseFileLock:
    """Return a lock file to hold in a ``with`` block; the system releases it if the process dies.

    Entering raises ``TimeoutError`` if another process holds the lock for the whole time.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=timeout)


def _on_network(folder: Path) -> bool:
    import psutil

    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype in NETWORK_FILE_SYSTEMS


def _client_of(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(path: Path) -> None:
    """Create MLflow's tables under another file name, so that a killed process leaves no incomplete database."""
    made = path.with_name(f".{path.name}.new")
    for part in (made, *(made.with_name(f"{made.name}-{kind}") for kind in ("journal", "wal", "shm"))):
        part.unlink(missing_ok=True)
    client = _client_of(sqlite_uri(made))
    with contextlib.suppress(AttributeError):  # open connections would keep the file under its first name
        client._tracking_client.store.engine.dispose()
    if not _on_network(path.absolute().parent):
        # In this mode, which the file stores, readers do not wait for writers; it needs shared memory.
        with contextlib.closing(sqlite3.connect(made)) as database:
            database.execute("PRAGMA journal_mode=WAL")
    os.replace(made, path)


class Store:
    """A connection to an MLflow store.

    Args:
        uri: anything that MLflow takes.
        timeout: seconds that one request may take.
    """

    def __init__(self, uri: str, timeout: float) -> None:
        self.timeout, named = timeout, sqlite_file(uri)
        self.database = named and named.resolve()  # one address per file, whatever the current folder
        if named is not None and not {"?", "%"} & set(uri):
            uri = uri.replace(str(named), str(self.database), 1)
        self.uri, self.shown = uri, redact(uri)
        self._client: MlflowClient | None = None
        self.experiment_id = self.model_id = ""

    # --- connecting -------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Check quickly whether a server listens, because a request may wait for its whole timeout.

        Raises:
            OSError: no server listens.
        """
        parts = urlsplit(self.uri)
        host = parts.hostname
        if parts.scheme not in ("http", "https") or host is None:
            return
        if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(host):
            return
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=min(PROBE_SECONDS, self.timeout)).close()

    def check(self) -> None:
        """Refuse a URI that can never work here.

        Raises:
            UsageError: a folder of files, which MLflow no longer writes to.
        """
        prepare_mlflow(self.timeout)
        if urlsplit(self.uri).scheme not in ("", "file") or self.uri.startswith("databricks"):
            return  # other stores may be temporarily unavailable, which the sender handles
        from mlflow.exceptions import MlflowException

        try:
            self._client = self._new_client()
        except MlflowException as error:
            fix = "use sqlite:///PATH/mlflow.db or the address of an MLflow server (MLFLOW_ALLOW_FILE_STORE=true enables folders)"
            raise UsageError(
                "MLflow no longer supports a folder of files as a store", where=f"tracking.uri={self.shown}", fix=fix
            ) from error

    def connect(self) -> MlflowClient:
        """Return the client; the first call creates the database, one process at a time."""
        if self._client is None:
            self.probe()
            prepare_mlflow(self.timeout)
            with self._creation():
                self._client = self._new_client()
        return self._client

    def _new_client(self) -> MlflowClient:
        return _client_of(self.uri)

    @contextlib.contextmanager
    def _creation(self) -> Iterator[None]:
        if self.database is None:
            yield
            return
        with file_lock(self.database.with_name(f"{self.database.name}.lock")):
            if not self.database.exists():
                _make_database(self.database)
            yield

    def _experiment(self, name: str, about: str) -> str:
        client = self.connect()
        with self._creation():
            found = client.get_experiment_by_name(name)
            if found is None:
                place = None if self.database is None else (self.database.absolute().parent / "mlruns" / quote(name, safe=" ")).as_uri()
                try:
                    tags = {KIND_TAG: KIND, NOTE_TAG: about or EXPERIMENT_NOTE}
                    return str(client.create_experiment(name, artifact_location=place, tags=tags))
                except Exception:  # another client of the server may have created it first
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise
        if KIND_TAG not in found.tags:  # made by an earlier version, or by hand
            client.set_experiment_tag(found.experiment_id, KIND_TAG, KIND)
        return str(found.experiment_id)

    # --- a run ------------------------------------------------------------------------------------------------------

    def open(self, opening: Opening, *, search: bool) -> bool:
        """Create the run, or continue the existing one, and set ``opening.run_id`` and ``opening.time``.

        Args:
            opening: the run.
            search: whether it may exist under an unknown identifier (its creation was not confirmed).

        Raises:
            RefusedError: the store will never accept it.

        Returns:
            Whether the run existed.
        """
        with self._judged():
            client = self.connect()
            self.experiment_id = self._experiment(opening.experiment, opening.about)
            existing = self._find(client, opening, search)
            if existing is None:
                tags = _tags(opening.tags)
                made = client.create_run(self.experiment_id, start_time=opening.time, tags=tags, run_name=opening.name)
                opening.run_id, known = made.info.run_id, {}
            else:
                opening.run_id, opening.time, known = existing.info.run_id, existing.info.start_time, existing.data.params
                self.experiment_id = existing.info.experiment_id
                if not opening.ended:
                    client.update_run(opening.run_id, status="RUNNING")
                self._change_tags(client, opening, existing.data.tags)
            if opening.dataset is not None:  # repeating this is harmless, and the process that created the run may have been killed here
                client.log_inputs(opening.run_id, datasets=[_dataset(opening.dataset)])
            self._params(client, opening, known)
            return existing is not None

    def holds(self, run_id: str) -> bool:
        """Tell whether the store has the run, and it is not deleted."""
        return self._active(self.connect(), run_id) is not None

    def tag(self, run_id: str, name: str) -> str | None:
        """Return a tag of a run, ``None`` if it has none of this name."""
        found = self._active(self.connect(), run_id)
        return None if found is None else found.data.tags.get(name)

    def show_models(self, run_id: str, models: Sequence[str]) -> None:
        """Show models of other runs, by their identifiers, with this one."""
        from mlflow.entities import LoggedModelOutput

        client = self.connect()
        outputs = client.get_run(run_id).outputs
        known = {one.model_id for one in (outputs.model_outputs if outputs else ())}
        if new := [LoggedModelOutput(model, 0) for model in models if model not in known]:
            client.log_outputs(run_id, new)

    def _find(self, client: MlflowClient, opening: Opening, search: bool) -> Any:
        known = None if opening.run_id is None else self._active(client, opening.run_id)
        if known is not None or not search:
            return known
        name = opening.tags[RUN_TAG].replace("'", "")
        found = client.search_runs([self.experiment_id], f"tags.`{RUN_TAG}` = '{name}'", max_results=1)
        return found[0] if found else None

    def _active(self, client: MlflowClient, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _change_tags(self, client: MlflowClient, opening: Opening, known: dict[str, str]) -> None:
        """Set the tags that have changed in a resumed run, except its user and its description, which may be edited in the store."""
        from mlflow.entities import RunTag

        assert opening.run_id is not None
        tags = {
            key: value for key, value in _tags(opening.tags).items() if known.get(key) != value and key not in ("mlflow.user", NOTE_TAG)
        }
        if tags:
            client.log_batch(opening.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _params(self, client: MlflowClient, opening: Opening, known: dict[str, str]) -> None:
        """Log missing parameters; what a resumed run has changed becomes a tag, because parameters cannot change."""
        from mlflow.entities import Param

        assert opening.run_id is not None
        params = {} if opening.resumed and known else opening.params
        new = [Param(_name(key), _cut(value, PARAM_LENGTH)) for key, value in params.items() if _name(key) not in known]
        for start in range(0, len(new), PER_BATCH):
            client.log_batch(opening.run_id, params=new[start : start + PER_BATCH])
        changed = {
            f"resumed/{key}": value
            for key, value in opening.params.items()
            if known.get(_name(key), None if opening.resumed and known else _cut(value, PARAM_LENGTH)) != _cut(value, PARAM_LENGTH)
        }
        for key, value in _tags(changed).items():
            client.set_tag(opening.run_id, key, value)

    def last_step(self, run_id: str, key: str) -> int:
        """Return the last step of a metric in the store, -1 if it has none."""
        history = self.connect().get_metric_history(run_id, _name(key))
        return max((point.step for point in history), default=-1)

    def send(self, run_id: str, events: Sequence[Message]) -> None:
        """Send events: any number of metrics and tags together, each other one by itself.

        Raises:
            RefusedError: the store will never accept it. Any other exception: try again.
        """
        client = self.connect()
        with self._judged():
            if isinstance(events[0], (Metrics, Tags)):
                self._send_batch(client, run_id, events)
            for event in events:
                if isinstance(event, Artifact):
                    self._upload(client, run_id, event)
                elif isinstance(event, TextArtifact):
                    client.log_text(run_id, event.text, event.name)
                elif isinstance(event, Model):
                    self._log_model(client, run_id, event)
                elif isinstance(event, End):
                    client.set_terminated(run_id, event.status, end_time=event.time)

    def _send_batch(self, client: MlflowClient, run_id: str, events: Sequence[Message]) -> None:
        from mlflow.entities import Metric, RunTag
        from mlflow.exceptions import MlflowException

        tags: dict[str, str] = {}
        for event in events:
            if isinstance(event, Tags):
                tags.update(event.values)
        metrics = [Metric(_name(key), value, e.time, e.step) for e in events if isinstance(e, Metrics) for key, value in e.values.items()]
        kept = _tags(tags)
        if metrics or kept:
            client.log_batch(run_id, metrics=metrics, tags=[RunTag(key, value) for key, value in kept.items()])
        for key in map(_name, tags.keys() - {key for key, value in tags.items() if value}):
            with contextlib.suppress(MlflowException):  # it is not there
                client.delete_tag(run_id, key)

    def _log_model(self, client: MlflowClient, run_id: str, model: Model) -> None:
        from bpfree.tracking.model import log

        params = {_name(key): _cut(value, MODEL_PARAM_LENGTH) for key, value in model.params.items()}
        metrics = [Metrics(one.time, one.step, {_name(key): value for key, value in one.values.items()}) for one in model.metrics]
        try:
            self.model_id = log(
                client, self.experiment_id, run_id, dataclasses.replace(model, tags=_tags(model.tags), params=params, metrics=metrics)
            )
        except BpfreeError as error:
            raise RefusedError(f"the model was not logged: {error.what}") from error

    def _upload(self, client: MlflowClient, run_id: str, event: Artifact) -> None:
        if not event.path.exists():
            raise RefusedError(f"{event.path} does not exist any more")
        upload = client.log_artifacts if event.path.is_dir() else client.log_artifact
        upload(run_id, str(event.path), event.folder or None)

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """Convert permanent errors of the store to :class:`RefusedError`; other errors may be temporary."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code in PERMANENT:
                raise RefusedError(str(error).splitlines()[0]) from error
            raise


def _name(key: str) -> str:
    """Convert to a metric, parameter or tag name that MLflow accepts: letters, digits, ``_ - . space : /``."""
    clean = "".join(c if (c.isascii() and c.isalnum()) or c in "_-. :/" else "_" for c in key)
    return "/".join(part if part.strip(".") else "_" for part in clean.split("/"))[:250]


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else f"{value[: length - 40]}... ({len(value)} characters)"


def _tags(tags: dict[str, str]) -> dict[str, str]:
    return {_name(key): _cut(str(value), TAG_LENGTH) for key, value in tags.items() if str(value)}


def _dataset(data: DataSet) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = '{"tags": {"mlflow.source.name": "bpfree"}}'
    dataset = Dataset(data.name, data.digest, "code", source, schema=data.schema, profile=data.profile)
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])
