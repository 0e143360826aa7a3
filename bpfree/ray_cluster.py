"""Reaching a cluster of Ray: an existing one, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from bpfree.errors import BpfreeError, UsageError

__all__ = ["connect", "import_ray", "room"]

PASSED_ON = ("BPFREE_DATA", "BPFREE_DISABLE_PLUGINS", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY", "OMP_NUM_THREADS")


def import_ray() -> Any:
    """The package.

    Raises:
        BpfreeError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise BpfreeError(f"this executor needs Ray ({error})", where="--executor ray, --ray", fix="pip install 'bpfree[ray]'") from error
    return ray


def connect(ray: Any, address: str | None, *, processors: float) -> bool:
    """Connect to a cluster, unless this process is connected already; returns whether it was not.

    Args:
        ray: the package.
        address: of the cluster, or ``auto`` for the one that this machine belongs to; ``None``: the environment's ``RAY_ADDRESS``,
            else a cluster of its own.
        processors: of a cluster of its own.

    Raises:
        BpfreeError: the cluster does not answer.
    """
    if ray.is_initialized():
        return False
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # what is on this path is on theirs
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": logging.ERROR}
    found = address or os.environ.get("RAY_ADDRESS")
    if found is None:
        options |= {"num_cpus": processors, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        options["address"] = found
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BpfreeError(f"the Ray cluster does not answer: {error}", where=f"address {address}", fix="ray start --head") from error
    return True


def room(ray: Any, *, processors: float, gpus: float, what: str) -> int:
    """How many of something fit on the cluster at a time.

    Raises:
        UsageError: not one.
    """
    resources = ray.cluster_resources()
    rooms = [resources.get("CPU", 0) / processors] if processors else []
    rooms += [resources.get("GPU", 0) / gpus] if gpus else []
    found = int(min(rooms, default=1))
    if found < 1:
        asked = f"{processors:g} processors and {gpus:g} GPUs"
        listed = ", ".join(f"{name} {resources[name]:g}" for name in ("CPU", "GPU") if name in resources) or "empty"
        raise UsageError(f"the cluster has no room for one {what}: it asks for {asked}", where=f"cluster: {listed}", fix="lower threads")
    return found
