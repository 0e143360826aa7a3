"""The MLflow run of a study: the parent of its cells' runs, with its table and its report as artifacts.

Numbers are metrics of the cells alone, each by one name and in one unit; the parent has their means in a table. The best cell by
validation is the one whose model is kept.

An identifier in the study's folder finds it again, so that a study has one run, however often its processes were killed; a
copy of the folder is another study. An unavailable store causes a warning; cells that ran meanwhile become children later.
"""

from __future__ import annotations

import getpass
import json
import logging
import math
import secrets
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bpfree.record.environment import source
from bpfree.record.folder import Cursor, RunFolder
from bpfree.record.log import now
from bpfree.redaction import redact
from bpfree.run import Run
from bpfree.study.cells import Plan
from bpfree.study.report import Report, files_of
from bpfree.study.rows import Cell, TableRow
from bpfree.study.store import CellRecord, CellStore
from bpfree.study.worklist import Worklist
from bpfree.tracking.events import Artifact, End, Message, Opening, Tags, TextArtifact
from bpfree.tracking.mlflow_tracker import source_tags
from bpfree.tracking.sending import complete, config_of
from bpfree.tracking.store import NOTE_TAG, RUN_TAG, Store, file_lock

__all__ = ["StudyRun"]

logger = logging.getLogger("bpfree.tracking")

PARENT = "mlflow.parentRunId"
TRAINING_VIEW = "workflowType=machine_learning"
"""Part of an address by which MLflow's interface shows its pages for training."""
LINKED = 40
"""Cells up to which the description links to their curves: a description is short."""
TABLE = "table.json"
TABLE_TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])}
"""Tag by which MLflow's interface shows a file as a table."""
ABOUT = (
    "A study of bpfree: the run of the study's name is the parent of its cells, with the report and a table of means among its "
    "artifacts. To compare the rows, group the runs by the tag `study_row`."
)
"""Description of an experiment that is the study's own."""
COSTS = ("train/seconds", "train/samples", "parameters")


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
        lock = self._cells.folder / ".mlflow.lock"

        def ask() -> None:
            with file_lock(lock):  # of two processes that start at once the second takes the identity of the first
                self._identify()
            self._store.check()
            self._store.probe()
            with file_lock(lock):  # and finds its run
                opening = self._opening()
                self._store.open(opening, search=True)
            self.run_id = opening.run_id or ""

        if self._asked(ask) and self.run_id:
            self._remember(settled=False)

    def _opening(self) -> Opening:
        study = self._plan.study
        opening = Opening(self._store.shown, self._experiment, study.name, now(), self._tags(), self._params(), None)
        opening.run_id = self.run_id or None
        opening.tags |= self._note() if not self.run_id else {}
        if self._experiment == study.name:
            opening.about = f"{study.title or study.name}. {ABOUT}"
        return opening

    def _identify(self) -> None:
        """Take the identity that another process has noted since, or draw one, and note it."""
        noted = Cursor.read(self._path)
        if noted.store == self._store.shown and not noted.is_copy(self._path):
            self._cursor.known |= {key: value for key, value in noted.known.items() if key in ("id", "mlflow_run_id") and value}
        self._cursor.known.setdefault("id", f"study-{self._plan.study.name}-{secrets.token_hex(6)}")
        self.run_id = str(self._cursor.known.get("mlflow_run_id", ""))
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
        best = dict(_best(report.rows))
        for record in best.values():
            _ask_for_model(record)

        def tell() -> None:
            self._adopt(worklist.all_cells())
            tags = {"status": status.lower(), **TABLE_TAG, **dict(_best_tags(best)), **self._note(page, report.rows)}
            self._store.send(self.run_id, [Tags(tags)])
            self._store.show_models(self.run_id, [model for record in best.values() if (model := _tracked(record, "mlflow_model_id"))])
            files: list[Message] = [TextArtifact(TABLE, json.dumps(_table(report.rows))), *(Artifact(path, "") for path in files_of(page))]
            self._store.send(self.run_id, [*files, End(status, now())])

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
        tags = {RUN_TAG: self._cursor.known["id"], "study": study.name, "study_title": study.title} | source_tags(source())
        try:
            return tags | {"mlflow.user": getpass.getuser()}
        except Exception:  # a container may not have a name for its user
            return tags

    def _note(self, page: Path | None = None, rows: Sequence[TableRow] = ()) -> dict[str, str]:
        """Describe the study in Markdown, with a link to its report once there is one; a description that was edited stays."""
        if page is not None and self._store.tag(self.run_id, NOTE_TAG) not in (None, self._cursor.known.get("note")):
            return {}
        study, seeds = self._plan.study, ", ".join(map(str, self._plan.seeds))
        columns = [column.label for column in study.columns if column.label]
        grid = f"{len(study.rows)} rows" + (f" in {len(columns)} columns" if columns else "") + f", seeds {seeds}"
        parts = [f"**{study.title}**" if study.title else f"**{study.name}**", study.notes.strip(), f"A study of bpfree: {grid}."]
        if page is not None:
            runs = f"#/experiments/{self._store.experiment_id}/runs"
            files = {"Report": page.name, "table of means": TABLE}
            links = [f"[{name}]({runs}/{self.run_id}/artifacts/{file}?{TRAINING_VIEW})" for name, file in files.items()]
            parts += [" · ".join([*links, *_curves(rows, self._store.experiment_id)])]
        parts += ["To compare the rows in the list of runs, show the cells and group them by the tag `study_row`."]
        self._cursor.known["note"] = "\n\n".join(filter(None, parts))
        return {NOTE_TAG: self._cursor.known["note"]}

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


# --- the table and the best cells ---------------------------------------------------------------------------------------


def _table(rows: Sequence[TableRow]) -> dict[str, Any]:
    """Make a table of the means over seeds, in the names and units of the runs, as ``mlflow.log_table`` writes it."""
    tests = dict.fromkeys(f"test/{name}" for row in rows for name in row.metrics)
    keys = [key for key in (*tests, *COSTS) if any(key in record.result for row in rows for record in row.finished)]
    labels = ["row", "column"] if any(row.column for row in rows) else ["row"]
    columns, data = [*labels, "seeds", *(name for key in keys for name in _columns(key))], []
    for row in rows:
        values = [[record.result[key] for record in row.finished if key in record.result] for key in keys]
        means = [number for key, found in zip(keys, values, strict=True) for number in _statistics(found)[: len(_columns(key))]]
        rounded = [None if mean is None else float(f"{mean:.6g}") for mean in means]
        data.append([*(row.written.label, row.column)[: len(labels)], len(row.finished), *rounded])
    return {"columns": columns, "data": data}


def _curves(rows: Sequence[TableRow], experiment: str) -> Iterator[str]:
    """Yield links to pages of MLflow's interface that compare the cells, where these are few."""
    runs = [run for row in rows for record in row.finished if (run := _tracked(record, "mlflow_run_id"))]
    if not 1 < len(runs) <= LINKED:
        return
    which = f"runs={_quoted(runs)}&experiments={_quoted([experiment])}"
    metric = f"val/{rows[0].primary.name}"
    yield f"[curves](#/metric?{which}&metric={_quoted(metric)}&plot_metric_keys={_quoted([metric])}&x_axis=step&{TRAINING_VIEW})"
    yield f"[comparison of the cells](#/compare-runs?{which}&{TRAINING_VIEW})"


def _quoted(value: Any) -> str:
    return quote(json.dumps(value, separators=(",", ":")))


def _columns(key: str) -> tuple[str, ...]:
    return (key, f"{key} sd") if key.startswith("test/") else (key,)


def _statistics(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation over seeds, ``None`` where there are too few values."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def _best(rows: Sequence[TableRow]) -> Iterator[tuple[str, CellRecord]]:
    """Yield each column with its best cell by validation, of those whose weights are kept; none without a validation split."""
    for column in dict.fromkeys(row.column for row in rows):
        scored = [
            (row.primary.sign * score, record)
            for row in rows
            if row.column == column and not row.recipe.is_program
            for record in row.finished
            if (score := _validated(row, record)) is not None
        ]
        if scored:
            yield column, max(scored, key=lambda one: one[0])[1]


def _validated(row: TableRow, record: CellRecord) -> float | None:
    """Return the validation score of the weights that ``select`` names, the last or the best."""
    values = [value for metrics in record.history if math.isfinite(value := metrics.get(f"val/{row.primary.name}", math.nan))]
    if not values:
        return None
    return row.primary.best(values) if row.recipe.settings.select == "best-val" else values[-1]


def _best_tags(best: dict[str, CellRecord]) -> Iterator[tuple[str, str]]:
    """Yield the tags that name the best cells and their runs."""
    for column, record in best.items():
        end = f"/{column}" if column else ""
        yield f"best_row{end}", record.key.row
        yield f"best_run{end}", _tracked(record, "mlflow_run_id")


def _ask_for_model(record: CellRecord) -> None:
    """Note in the log of the best cell's run that its model is kept, unless it is anyway, or not wanted."""
    config, folder = config_of(record.seen()), RunFolder(record.place or "")
    if not config.to_mlflow or config.model != "auto":
        return
    if not folder.log.size or folder.log.is_held() or any(event["event"] == "model" for event, _ in folder.log.read()):
        return
    with folder.log as log:
        log.append("model")


def _tracked(record: CellRecord, name: str) -> str:
    """Look up what MLflow's tracker knows of a cell's run, as it is now."""
    return str(Cursor.read(RunFolder(record.place or "").cursor("mlflow")).known.get(name, ""))
