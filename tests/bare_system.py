"""A process whose system lacks what only Unix, or only Linux, has: run with the words of commands of ``bpfree``, ``;`` between them.

Modules are taken away from ``bpfree`` and its plugins alone: other packages have been written, and built, for the system that is here.
"""

import builtins
import importlib
import os
import pkgutil
import signal
import sys

import mlflow.tracking  # noqa: F401  before anything is missing, like the others here
import psutil  # noqa: F401
import torch  # noqa: F401

MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
NAMES = {
    signal: "SIGALRM SIGHUP SIGKILL SIGUSR1 SIGUSR2 ITIMER_REAL setitimer pthread_sigmask sigwait",
    os: "fork getloadavg getpgid killpg posix_fallocate pread pwrite sched_getaffinity setpgid setsid uname O_DIRECTORY",
}
OURS = (
    *("bpfree", "bpfree_feedback", "bpfree_forward_gradient", "bpfree_gradient_free", "bpfree_hebbian", "bpfree_local_losses"),
    *("bpfree_noprop", "bpfree_predictive_coding", "bpfree_sampled"),
)
importing = builtins.__import__


def without(name, context=None, *rest, **options):  # type: ignore[no-untyped-def]
    if name.partition(".")[0] in MODULES and str((context or {}).get("__name__", "")).startswith("bpfree"):
        raise ImportError(f"{name} is not on this system")
    return importing(name, context, *rest, **options)


builtins.__import__ = without
for module, names in NAMES.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

for package in map(importlib.import_module, OURS):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
print("imported", len([name for name in sys.modules if name.startswith("bpfree")]), "modules")

from bpfree.cli.main import main  # noqa: E402

for words in " ".join(sys.argv[1:]).split(";"):
    print(f"$ bpfree {words.strip()}", flush=True)
    try:
        main(words.split())
    except SystemExit as end:
        print("exit", end.code, flush=True)
