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

from bpfree.study.cells import Plan
from bpfree.study.line import Line
from bpfree.study.state import State
from bpfree.tracking.events import Artifact, End, Metrics, Opening, Tags, write_text
from bpfree.tracking.store import RUN_TAG, Store

__all__ = ["Parent"]

logger = logging.getLogger("bpfree.tracking")

NAME = "mlflow.json"
PARENT = "mlflow.parentRunId"


class Parent:
    """The study's run in the store.

    Args:
        plan: the study, resolved; its first cell says which store.
        state: its folder remembers the run.

    Attributes:
        run_id: empty as long as the store has not answered, or where nothing is tracked.
    """

    def __init__(self, plan: Plan, state: State) -> None:
        self._plan, self._state = plan, state
        config = plan.cells[0].recipe.settings.tracking
        self._enabled, self._experiment = config.enabled, config.experiment
        self._store = Store(config.resolve_uri(plan.output), config.timeout)
        self._warned = False
        known = self._known()
        self.run_id = str(known.get("run_id", "")) if known.get("uri") == self._store.shown else ""

    def _known(self) -> dict[str, Any]:
        try:
            content = json.loads((self._state.folder / NAME).read_text(encoding="utf-8"))
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
            self._store.open(opening, search=True)

        if self._asked(ask) and opening.run_id:
            self.run_id = opening.run_id
            write_text(self._state.folder / NAME, json.dumps({"uri": self._store.shown, "run_id": self.run_id}, indent=2) + "\n")

    def close(self, lines: Sequence[Line], files: Iterable[Path], status: str) -> None:
        """Log the table and the report's files, adopt cells that ran while the store was away, and end the run.

        Args:
            lines: of the table.
            files: of the report.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if not self._enabled:
            return
        if not self.run_id:
            self.open()
        if not self.run_id:
            return
        finished = [outcome for line in lines for outcome in line.finished]
        values = dict(_values(self._plan.study.metric("test"), lines)) | {"cells/finished": float(len(finished))}

        def tell() -> None:
            self._adopt(finished)
            self._store.send(self.run_id, [Metrics(_now(), len(finished), values), Tags({"status": status.lower()})])
            self._store.send(self.run_id, [*(Artifact(str(path), "") for path in files), End(status, _now())])

        self._asked(tell)

    def _adopt(self, finished: Iterable[Any]) -> None:
        client = self._store.connect()
        for outcome in finished:
            child = outcome.tracking.get("mlflow_run_id")
            if child and outcome.tags.get(PARENT) != self.run_id:
                client.set_tag(child, PARENT, self.run_id)
                outcome.tags[PARENT] = self.run_id
                self._state.write(outcome)

    def _tags(self) -> dict[str, str]:
        study = self._plan.study
        tags = {RUN_TAG: f"study {study.name} in {self._state.folder.absolute()}", "study": study.name, "study_title": study.title}
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


def _values(metric: str, lines: Sequence[Line]) -> Iterable[tuple[str, float]]:
    """The mean of each line, as a metric of the study's run."""
    for line in lines:
        values: Mapping[int, float] = line.by_seed(metric)
        if values:
            yield f"{metric}/{line.label}", statistics.fmean(values.values())


def _now() -> int:
    return time.time_ns() // 1_000_000
