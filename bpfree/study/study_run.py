"""The MLflow run of a study: the parent of its cells' runs, with the report as its artifacts.

An identifier in the study's folder finds it again, so that a study has one run, however often its processes were killed; a
copy of the folder is another study. An unavailable store causes a warning; cells that ran meanwhile become children later.
"""

from __future__ import annotations

import getpass
import logging
import secrets
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bpfree.record.folder import Cursor, RunFolder
from bpfree.record.log import now
from bpfree.redaction import redact
from bpfree.run import Run
from bpfree.study.cells import Plan
from bpfree.study.measures import Measure
from bpfree.study.report import Report, files_of
from bpfree.study.rows import Cell, TableRow, table_measure
from bpfree.study.store import CellStore
from bpfree.study.worklist import Worklist
from bpfree.tracking.events import Artifact, End, Metrics, Opening, Tags
from bpfree.tracking.sending import complete, config_of
from bpfree.tracking.store import RUN_TAG, Store, file_lock

__all__ = ["StudyRun"]

logger = logging.getLogger("bpfree.tracking")

PARENT = "mlflow.parentRunId"


class StudyRun:
    """The study's run in the store.

    Args:
        plan: the study, resolved; its first row says which store.
        cells: its folder keeps the run's identifier.

    Attributes:
        run_id: empty until the store has answered, and without tracking.
        settled: whether the store has everything of the study's last call.
    """

    def __init__(self, plan: Plan, cells: CellStore) -> None:
        self._plan, self._cells = plan, cells
        config = plan.rows[0].recipe.settings.tracking
        self._enabled, self._experiment = config.to_mlflow, config.experiment
        self._store = Store(config.resolve_uri(plan.output), config.timeout)
        self._warned = False
        self._path = cells.folder / "sent-mlflow.json"
        known = Cursor.read(self._path)
        if known.is_copy(self._path) or known.store != self._store.shown:
            known = Cursor(self._store.shown)
        self._cursor = known
        self.run_id = str(known.known.get("mlflow_run_id", ""))
        self.settled = not self._enabled or bool(known.known.get("settled"))

    def open(self) -> None:
        """Create or find the run, and the database, before several processes would create it."""
        if not self._enabled:
            return
        opening = Opening(self._store.shown, self._experiment, self._plan.study.name, now(), self._tags(), self._params(), None)
        opening.run_id = self.run_id or None
        self._remember(settled=False)

        def ask() -> None:
            self._store.check()
            self._store.probe()
            with file_lock(self._cells.folder / ".mlflow.lock"):  # if two processes start at once, the second finds the run of the first
                self._store.open(opening, search=True)

        if self._asked(ask) and opening.run_id:
            self.run_id = opening.run_id
            self._remember(settled=False)

    def _remember(self, *, settled: bool) -> None:
        self.settled = settled
        self._cursor.known |= {"mlflow_run_id": self.run_id, "settled": settled}
        self._cursor.write(self._path)

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
        values = dict(_values(table_measure(self._plan.study, report.rows), report.rows)) | {"cells/finished": float(len(finished))}

        def tell() -> None:
            self._adopt(worklist.all_cells())
            self._store.send(self.run_id, [Metrics(now(), len(finished), values), Tags({"status": status.lower()})])
            self._store.send(self.run_id, [*(Artifact(path, "") for path in files_of(page)), End(status, now())])

        if self._asked(tell):
            self._remember(settled=True)

    def _adopt(self, cells: Iterable[Cell]) -> None:
        """Send data that cells could not send, and make their runs children of this one, except runs in other stores."""
        known = (self._cells.read(cell) for cell in dict.fromkeys(cell.key.id for cell in cells))
        for record in [one for one in known if one is not None and one.is_final and one.place is not None]:
            run, folder = record.seen(), RunFolder(record.place or "")
            if not folder.log.size or folder.log.is_held() or not self._is_tracked_here(run):
                continue
            if run.tags.get(PARENT) != self.run_id:
                with folder.log as log:
                    log.append("tags", tags={PARENT: self.run_id})
            complete(folder.path, self._store.uri)

    def _is_tracked_here(self, run: Run) -> bool:
        """Tell whether a run's configuration names this store, whose address is recorded without secrets."""
        config = config_of(run)
        return config.to_mlflow and redact(config.uri or config.resolve_uri(self._plan.output)) == self._store.shown

    def _tags(self) -> dict[str, str]:
        study = self._plan.study
        own = self._cursor.known.setdefault("id", f"study-{study.name}-{secrets.token_hex(6)}")
        tags = {RUN_TAG: own, "study": study.name, "study_title": study.title}
        try:
            return tags | {"mlflow.user": getpass.getuser()}
        except Exception:  # a container may not have a name for its user
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
        except Exception as error:  # any error of a store or network: the study does not depend on tracking
            if not self._warned:
                logger.warning("the study itself could not be logged to MLflow at %s: %s", self._store.shown, " ".join(str(error).split()))
            self._warned = True
            return False
        return True


def _values(measure: Measure, rows: Sequence[TableRow]) -> Iterable[tuple[str, float]]:
    """Iterate over the mean of each row, as metrics of the study's run; shares from 0 to 1, as in runs."""
    for row in rows:
        values = row.by_seed(measure)
        if values:
            yield f"{measure.key}/{row.label}", statistics.fmean(values.values()) / measure.metric.factor
