"""System metrics reach the store through the tracker's queue."""

# ruff: noqa: N802  NVML's own names

from __future__ import annotations

from types import SimpleNamespace

import pytest
from waiting import until

from bpfree.record.folder import RunFolder
from bpfree.tracking.config import TrackingConfig
from bpfree.tracking.system import FIRST_SECONDS

pytestmark = pytest.mark.time_dependent

HOST = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage", "disk_usage_percentage"}
HOST |= {"disk_usage_megabytes", "disk_available_megabytes", "network_receive_megabytes", "network_transmit_megabytes"}


class FakeNVML:
    """Two devices, with the calls of nvidia-ml-py that MLflow's monitor makes."""

    NVMLError = RuntimeError

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=20e9 * (handle + 1), total=80e9)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=40 + handle)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 350_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000


def run_for(samples, run, tracker):
    """A run that lasts until this many samples are taken."""

    def taken():
        return sum(event["event"] == "system" for event, _ in RunFolder(run.folder).log.read())

    tracker.run_start(run)
    before = taken()
    until(lambda: taken() >= before + samples)
    run.status = "finished"
    tracker.run_end(run)


def test_a_short_run_shows_them(uri, new_run, track, stored):
    """MLflow's own monitor has its first sample after 10 s; here a run of 2.5 s has two, at growing steps."""
    assert FIRST_SECONDS + TrackingConfig().system_interval <= 2.5
    run = new_run()
    run_for(2, run, track(uri, system=True))
    _, points = stored(run, uri)
    host = {key.removeprefix("system/"): values for key, values in points.items() if key.startswith("system/") and "gpu" not in key}
    assert set(host) == HOST
    steps = [step for step, _ in host["cpu_utilization_percentage"]]
    assert len(steps) >= 2
    assert steps == sorted(set(steps))


def test_the_first_sample_comes_within_a_second(uri, new_run, track, stored):
    """Whatever the interval: here an hour."""
    assert FIRST_SECONDS < 1
    run = new_run()
    run_for(1, run, track(uri, system=True, system_interval=3600.0))
    assert len(stored(run, uri)[1]["system/cpu_utilization_percentage"]) == 1


def test_gpus(uri, new_run, track, stored, monkeypatch):
    """A fake NVML: every key of MLflow's GPU monitor, for every device, with the fake's numbers."""
    gpu_monitor = pytest.importorskip("mlflow.system_metrics.metrics.gpu_monitor")
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNVML(), raising=False)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNVML())
    run = new_run()
    run_for(2, run, track(uri, system=True, system_interval=0.02))
    _, points = stored(run, uri)
    last = {key: values[-1][1] for key, values in points.items() if key.startswith("system/gpu_")}
    expected = {}
    for i in (0, 1):
        expected |= {f"system/gpu_{i}_memory_usage_percentage": 25.0 * (i + 1), f"system/gpu_{i}_memory_usage_megabytes": 20e3 * (i + 1)}
        expected |= {f"system/gpu_{i}_utilization_percentage": 40.0 + i}
        expected |= {f"system/gpu_{i}_power_usage_watts": 350.0, f"system/gpu_{i}_power_usage_percentage": 50.0}
    assert last == expected


def test_no_gpu_is_no_news(uri, new_run, track, caplog, monkeypatch):
    """NVML that does not initialise: the host's metrics, no message above debug."""

    class NoDriver(FakeNVML):
        def nvmlInit(self) -> None:
            raise RuntimeError("driver not loaded")

    gpu_monitor = pytest.importorskip("mlflow.system_metrics.metrics.gpu_monitor")
    monkeypatch.setattr(gpu_monitor, "pynvml", NoDriver(), raising=False)
    run_for(1, new_run(), track(uri, system=True, system_interval=0.02))
    assert [record.getMessage() for record in caplog.records if record.levelno >= 20] == []


def test_a_resumed_run_adds_to_them(uri, new_run, track, stored):
    """Steps are milliseconds since the run first began: those of the second session are later ones."""
    run = new_run()
    run_for(2, run, track(uri, system=True, system_interval=0.02))
    count = len(stored(run, uri)[1]["system/cpu_utilization_percentage"])
    again = new_run(resumed=True, tracking=dict(run.tracking))
    run_for(2, again, track(uri, system=True, system_interval=0.02))
    steps = [step for step, _ in stored(again, uri)[1]["system/cpu_utilization_percentage"]]
    assert len(steps) > count
    assert steps == sorted(set(steps))
