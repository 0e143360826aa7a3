"""Connections to a Ray cluster: an existing one, or one started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bpfree.errors import BpfreeError, UsageError
from bpfree.search_path import search_path

__all__ = ["SECRETS", "connect", "import_ray", "room"]

PASSED_ON = ("BPFREE_DATA", "BPFREE_DISABLE_PLUGINS", "MLFLOW_DISABLE_TELEMETRY", "OMP_NUM_THREADS")
SECRETS = ("MLFLOW_TRACKING_URI",)
"""Variables that tasks take with them: Ray writes those of an environment into its logs."""
LOOPBACK = ("127.0.0.1", "::1")


def import_ray(address: str | None) -> Any:
    """Import Ray, and prepare it for a cluster.

    Args:
        address: of the cluster, as :func:`connect` takes it.

    Raises:
        BpfreeError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if _is_own(address) and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # is read once, on import
    try:
        import ray
    except ImportError as error:
        raise BpfreeError(f"this executor needs Ray ({error})", where="--executor ray, --ray", fix="pip install 'bpfree[ray]'") from error
    return ray


def _is_own(address: str | None) -> bool:
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"  # Ray's word for a new cluster on this machine


def connect(ray: Any, address: str | None, *, processors: float) -> bool:
    """Connect to a cluster, unless this process is connected already; return whether it was not.

    A cluster of its own listens on this machine's loopback alone, and takes only who has its token, where Ray has tokens.

    Args:
        ray: the package.
        address: of the cluster, or ``auto`` for the one that this machine belongs to; ``None``: the environment's ``RAY_ADDRESS``,
            else a cluster of its own.
        processors: of a cluster of its own.

    Raises:
        BpfreeError: the cluster does not answer, or would listen to other machines.
    """
    if ray.is_initialized():
        return False
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    variables["PYTHONPATH"] = os.pathsep.join(filter(os.path.isabs, search_path()))  # what is on this path is on theirs
    variables["PYTHONSAFEPATH"] = "1"
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": logging.ERROR}
    if _is_own(address):
        options |= {"num_cpus": processors, "include_dashboard": False}
    else:
        options["address"] = found = address or os.environ["RAY_ADDRESS"]
    if _is_own(address) or not found.startswith("ray://"):
        options["job_config"] = _job(ray)
    try:
        with _on_loopback(ray) if _is_own(address) else contextlib.nullcontext():
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BpfreeError(f"the Ray cluster does not answer: {error}", where=f"address {address}", fix="ray start --head") from error
    return True


def _job(ray: Any) -> Any:
    """Make a job whose workers do not look for modules in the current folder first, as Ray's default does."""

    class JobConfig(ray.job_config.JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True  # Ray then adds neither the current nor the script's folder; the paths that are named are in PYTHONPATH

    return JobConfig()


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Let a cluster that is started inside listen on the loopback, whose address Ray otherwise replaces by the machine's own.

    Raises:
        BpfreeError: it does not.
    """
    constants, name = ray._private.ray_constants, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"  # for this process, and for those that it starts
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        yield
        if ray.util.get_node_ip_address() not in LOOPBACK:
            ray.shutdown()
            fix = "start one with `ray start --head`, and give its --address"
            raise BpfreeError("this version of Ray cannot start a cluster that listens on the loopback alone", fix=fix)
    finally:
        constants.ENABLE_RAY_CLUSTER = before[0]
        if before[1] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[1]


def room(ray: Any, *, processors: float, gpus: float, what: str) -> int:
    """Count how many processes of a given size fit on the cluster at a time.

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
