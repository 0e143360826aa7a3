"""Renew the certificates of the registry that are missing or stale, then its index and tables, and the table in the docs.

    python .ci/certify.py [RULE ...] [--all] [--jobs 2]

Each rule is examined by a separate process, `bpfree certify RULE --output registry/certificates/RULE.json`, with one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bpfree.certify.certificate import Certificate, read_certificate
from bpfree.certify.table import write_docs
from bpfree.errors import BpfreeError
from bpfree.plugins import installed_plugins
from bpfree.registry import OTHER_CHANGE, core_changed, read_entries, renew, state
from bpfree.registry.certificates import certificate_file, certificates

REGISTRY = Path(__file__).resolve().parent.parent / "registry"
DOCS = REGISTRY.parent / "docs" / "certificates.md"


def present(rule: str) -> dict[str, Certificate]:
    """Return the existing certificate; one that cannot be read counts as none."""
    try:
        return {rule: read_certificate(certificate_file(REGISTRY, rule))}
    except BpfreeError:
        return {}


def certify(rule: str) -> bool:
    """Examine a rule and print the result; a certificate of a failed examination is written too."""
    target = certificate_file(REGISTRY, rule)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.perf_counter()
    command = [sys.executable, "-m", "bpfree", "certify", rule, "--output", str(target)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    now = present(rule)
    status = now[rule].status if rule in now else "no certificate"
    print(f"{rule:24} {status:24} {seconds:6.0f} s", flush=True)
    if result.returncode != 0:
        print(result.stdout[-4000:] + result.stderr[-4000:], flush=True)
    return result.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", metavar="RULE", help="rules to examine (default: all of the registry's entries)")
    parser.add_argument("--all", action="store_true", help="renew fresh certificates, too")
    parser.add_argument("--jobs", type=int, default=2, help="examinations at a time (2)")
    given = parser.parse_args(arguments)
    known, plugins = [rule for entry in read_entries(REGISTRY) for rule in entry.rules], installed_plugins()
    unknown = [rule for rule in given.rules if rule not in known]
    if unknown:
        parser.error(f"no entry of the registry has {', '.join(unknown)}")
    chosen = []
    for rule in given.rules or known:
        now = state(rule, present(rule), plugins)
        if given.all or not now.startswith("certified"):
            chosen.append(rule)
        else:
            since = f"; {OTHER_CHANGE}" if core_changed(present(rule)[rule], plugins) else ""
            print(f"{rule:24} {now:24}  fresh{since}", flush=True)
    (REGISTRY / "certificates").mkdir(exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = list(pool.map(certify, chosen))
    for path in [*renew(REGISTRY), *write_docs(DOCS, certificates(REGISTRY))]:
        print(f"wrote {path.relative_to(REGISTRY.parent)}")
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
