"""The MLflow run of a study: the parent of its cells' runs, with the report as its artifacts.

It is found again by the study's name and folder, so that a study has one, however often its processes were killed. A store that is away
costs a warning; cells that ran meanwhile become its children when it is back.
"""

from __future__ import annotations

import getpass
import json
import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpfree import runner
from bpfree.files import write_text
from bpfree.study.cells import Plan
from bpfree.study.report import Report, files_of
from bpfree.study.rows import Cell, TableRow
from bpfree.study.store import CellStore
from bpfree.study.worklist import Worklist
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.events import SPOOL_NAME, Artifact, End, Metrics, Opening, Tags
from bpfree.tracking.journal import ended_as
from bpfree.tracking.store import RUN_TAG, Store, file_lock, redact

__all__ = ["StudyRun"]

logger = logging.getLogger("bpfree.tracking")

NAME = "mlflow.json"
PARENT = "mlflow.parentRunId"


class StudyRun:
    """The study's run in the store.

    Args:
        plan: the study, resolved; its first row says which store.
        cells: its folder remembers the run.

    Attributes:
        run_id: empty as long as the store has not answered, or where nothing is tracked.
        settled: whether the store knows all of the study, as it was when it was last run.
    """

    def __init__(self, plan: Plan, cells: CellStore) -> None:
        self._plan, self._cells = plan, cells
        config = plan.rows[0].recipe.settings.tracking
        self._enabled, self._experiment = config.enabled, config.experiment
        self._store = Store(config.resolve_uri(plan.output), config.timeout)
        self._warned = False
        known = self._known() if self._known().get("uri") == self._store.shown else {}
        self.run_id = str(known.get("run_id", ""))
        self.settled = not self._enabled or bool(known.get("settled"))

    def _known(self) -> dict[str, Any]:
        try:
            content = json.loads((self._cells.folder / NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def open(self) -> None:
        """Make the run, or find it again; also the database, before several processes would."""
        if not self._enabled:
            return
        opening = Opening(self._store.shown, self._experiment, self._plan.study.name, _now(), self._tags(), self._params(), None)
        opening.run_id = self.run_id or None

        def ask() -> None:
            self._store.check()
            self._store.probe()
            with file_lock(self._cells.folder / ".mlflow.lock"):  # of two processes that begin at once, the second finds the first one's
                self._store.open(opening, search=True)

        if self._asked(ask) and opening.run_id:
            self.run_id = opening.run_id
            self._remember(settled=False)

    def _remember(self, *, settled: bool) -> None:
        self.settled = settled
        content = {"uri": self._store.shown, "run_id": self.run_id, "settled": settled}
        write_text(self._cells.folder / NAME, json.dumps(content, indent=2) + "\n")

    def close(self, worklist: Worklist, report: Report, page: Path, status: str) -> None:
        """Log the table and the report's files, adopt cells that ran while the store was away, and end the run.

        Args:
            worklist: its cells, those of tuning too, may have runs.
            report, page: as written.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if not self._enabled:
            return
        if not self.run_id:
            self.open()
        if not self.run_id:
            return
        finished = [record for row in report.rows for record in row.finished]
        values = dict(_values(self._plan.study.metric("test"), report.rows)) | {"cells/finished": float(len(finished))}

        def tell() -> None:
            self._adopt(worklist.all_cells())
            self._store.send(self.run_id, [Metrics(_now(), len(finished), values), Tags({"status": status.lower()})])
            self._store.send(self.run_id, [*(Artifact(str(path), "") for path in files_of(page)), End(status, _now())])

        if self._asked(tell):
            self._remember(settled=True)

    def _adopt(self, cells: Iterable[Cell]) -> None:
        """Send what cells could not, and put their runs below this one; those that another store has stay there."""
        client = self._store.connect()
        known = (self._cells.read(cell) for cell in dict.fromkeys(cell.key.id for cell in cells))
        for record in [one for one in known if one is not None and one.is_final and one.run]:
            folder = self._plan.output / record.run
            if (folder / SPOOL_NAME).is_file() and self._was_meant_here(folder) and runner.complete_tracking(folder):
                record.tracking |= self._found(client, record.run)
            child = record.tracking.get("mlflow_run_id")
            here = record.tracking.get("mlflow_uri") == self._store.shown
            if child and here and record.tags.get(PARENT) != self.run_id:
                client.set_tag(child, PARENT, self.run_id)
                record.tags[PARENT] = self.run_id
                with self._cells.lock(record.key.id) as free:
                    if free:
                        self._cells.write(record)

    def _found(self, client: Any, run: str) -> dict[str, str]:
        """Where a cell's run is that this process has not trained."""
        experiment = client.get_experiment_by_name(self._experiment)
        found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = '{run}'", max_results=1) if experiment else []
        return {"mlflow_run_id": str(found[0].info.run_id), "mlflow_uri": self._store.shown} if found else {}

    def _was_meant_here(self, folder: Path) -> bool:
        """Whether a run's journal names this store."""
        config = ended_as(folder).get("config", {})
        named = TrackingConfig(uri=config.get("tracking.uri"), enabled=bool(config.get("tracking.enabled", False)))
        return named.enabled and redact(named.resolve_uri(self._plan.output)) == self._store.shown

    def _tags(self) -> dict[str, str]:
        study = self._plan.study
        tags = {RUN_TAG: f"study {study.name} in {self._cells.folder.absolute()}", "study": study.name, "study_title": study.title}
        try:
            return tags | {"mlflow.user": getpass.getuser()}
        except Exception:  # a container may have no name for its user
            return tags

    def _params(self) -> dict[str, str]:
        plan = self._plan
        params = {
            "rows": ", ".join(row.label for row in plan.study.rows),
            "columns": ", ".join(column.label for column in plan.study.columns if column.label),
            "seeds": ", ".join(map(str, plan.seeds)),
            "changes": "; ".join(plan.changes),
        }
        return {name: value for name, value in params.items() if value}

    def _asked(self, ask: Any) -> bool:
        try:
            ask()
        except Exception as error:  # whatever a store or a network raises; the study does not need it
            if not self._warned:
                logger.warning("the study has no run of its own in MLflow at %s: %s", self._store.shown, " ".join(str(error).split()))
            self._warned = True
            return False
        return True


def _values(metric: str, rows: Sequence[TableRow]) -> Iterable[tuple[str, float]]:
    """The mean of each row, as a metric of the study's run."""
    for row in rows:
        values: Mapping[int, float] = row.by_seed(metric)
        if values:
            yield f"{metric}/{row.label}", statistics.fmean(values.values())


def _now() -> int:
    return time.time_ns() // 1_000_000
