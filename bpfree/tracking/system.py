"""Sample the use of processors, memory, disk, network and GPUs during a run with MLflow's collectors.

MLflow's monitor would publish its first sample one interval (10 s) after the start, from a thread that talks to the
store; this one samples within the first second and writes the values to the log, so that short runs have them, and
outages do not lose them. The keys are MLflow's (``system/cpu_utilization_percentage``, ``system/gpu_0_power_usage_watts`` and so on).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bpfree.tracking.store import without_telemetry

__all__ = ["SystemMetrics"]

logger = logging.getLogger("bpfree.tracking")

FIRST_SECONDS = 0.5
MONITORS = (
    ("cpu_monitor", "CPUMonitor"),
    ("disk_monitor", "DiskMonitor"),
    ("network_monitor", "NetworkMonitor"),
    ("gpu_monitor", "GPUMonitor"),
)


class SystemMetrics:
    """A thread that samples.

    Args:
        submit: takes each sample, a dictionary of ``system/...`` values.
        interval: seconds between samples.
    """

    def __init__(self, submit: Callable[[dict[str, float]], None], interval: float = 1.0) -> None:
        self._submit, self._interval = submit, interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bpfree-system-metrics", daemon=True)

    def start(self) -> None:
        """Begin sampling."""
        self._thread.start()

    def stop(self, patience: float = 2.0) -> None:
        """End sampling; nothing is submitted afterwards."""
        self._stopped.set()
        self._thread.join(patience)

    def _work(self) -> None:
        with contextlib.suppress(Exception):  # the first measurement of use needs an earlier one as a reference
            import psutil

            psutil.cpu_percent()
        without_telemetry()
        monitors = list(_monitors())
        wait = min(self._interval, FIRST_SECONDS)
        while not self._stopped.wait(wait):
            wait = self._interval
            sample = self._sample(monitors)
            if sample and not self._stopped.is_set():
                self._submit(sample)

    def _sample(self, monitors: list[Any]) -> dict[str, float]:
        sample: dict[str, float] = {}
        for monitor in list(monitors):
            try:
                monitor.collect_metrics()
                sample.update({f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()})
                monitor.clear_metrics()
            except Exception as error:
                monitors.remove(monitor)
                logger.info("system metrics of %s failed and are left out: %s", type(monitor).__name__, error)
        return sample


def _monitors() -> Iterator[Any]:
    """List the collectors that work here; some fail without a GPU or psutil, which is normal."""
    for module, name in MONITORS:
        try:
            yield getattr(importlib.import_module(f"mlflow.system_metrics.metrics.{module}"), name)()
        except Exception as error:
            logger.debug("no %s: %s", name, error)
