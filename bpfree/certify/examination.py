"""The examination: every check on a rule, and the certificate of what they found."""

from __future__ import annotations

import dataclasses
import datetime
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bpfree import sources
from bpfree.certify.certificate import Certificate
from bpfree.certify.checks import contract, isolation, learning, reproducibility, traits, whole_runs
from bpfree.certify.checks.check import Check
from bpfree.certify.checks.places import is_own, place_of_error
from bpfree.certify.findings import NEEDLESS, CheckFailed, Finding, NotApplicable, NotShown, Unmeasured
from bpfree.certify.measurements import Measurements
from bpfree.certify.subject import Subject
from bpfree.errors import BpfreeError, UsageError, unknown_name
from bpfree.hooks import API_VERSION
from bpfree.plugins import Plugins
from bpfree.rule import Rule
from bpfree.seeds import preserved_global_state
from bpfree.training import environment

__all__ = ["CHECKS", "certify", "check_waivers", "examine", "examine_with", "select", "set_aside"]

CHECKS: list[Check] = [
    *(*whole_runs.CHECKS, *traits.CHECKS, *isolation.CHECKS),
    *(*reproducibility.CHECKS, *contract.CHECKS, *learning.CHECKS),
]
"""All checks, in order: first those of whole runs, before anything of this process has been trained."""
Progress = Callable[[Check, int, int, Finding | None], None]


def certify(
    rule: str | type[Rule],
    settings: Iterable[str] = (),
    *,
    quick: bool = False,
    only: Iterable[str] = (),
    waive: Mapping[str, str] | None = None,
    registry: Plugins | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Examine a rule and record what was measured, on one thread of the CPU; the caller's state is restored.

    Args:
        rule: its registered name, or a class.
        settings: ``KEY=VALUE`` words over its configuration.
        quick: without learning and permuted labels.
        only: ids of single checks; the certificate is then partial, and has no properties.
        waive: expected failures by check, each with its written reason, beside the rule's own ``waivers``.
        registry: of names; the installed plugins by default.
        progress: called before and after each check, with its number, how many there are, and what it found.

    Raises:
        UsageError: an unknown rule, key or check, or a waiver without a reason.
        BpfreeError: no small instance of the rule can be built.
    """
    subject = Subject(rule, settings, registry)
    chosen = select(quick=quick, only=only)
    waivers = check_waivers({**subject.rule.waivers, **(waive or {})})
    report = progress or (lambda check, number, count, finding: None)
    began = time.perf_counter()
    with set_aside():
        m = Measurements(subject)
        findings = []
        obstacle = _obstacle(m, chosen)
        for number, check in enumerate(chosen, start=1):
            report(check, number, len(chosen), None)
            findings.append(examine(m, check, waivers) if obstacle is None else obstacle.pop(0))
            report(check, number, len(chosen), findings[-1])
        properties = {} if only or obstacle is not None else m.properties(quick=quick)
        return _certificate(m, "partial" if only else "quick" if quick else "full", findings, properties, began)


def _obstacle(m: Measurements, chosen: Sequence[Check]) -> list[Finding] | None:
    """Return the findings on a rule that cannot be built: one failure, and all else unmeasured; ``None`` if it can be."""
    first, *others = chosen
    try:
        m.build()
    except BpfreeError:
        raise
    except Exception as error:
        said = f"the rule cannot be built: {type(error).__name__}: {' '.join(str(error).split())}"
        failed = Finding(first.id, first.title, "failed", said, _place(error, m.subject.rule), "correct the rule")
        return [failed, *(Finding(check.id, check.title, "unmeasured", f"the rule cannot be built; see {first.id}") for check in others)]
    return None


def select(*, quick: bool = False, only: Iterable[str] = ()) -> list[Check]:
    """Return the requested checks.

    Raises:
        UsageError: there is no such check.
    """
    known = {check.id: check for check in CHECKS}
    for name in only:
        if name not in known:
            raise unknown_name("check", name, known)
    wanted = set(only)
    return [check for check in CHECKS if (check.id in wanted if wanted else check.quick or not quick)]


def check_waivers(waivers: Mapping[str, str]) -> dict[str, str]:
    """Return the expected failures by check.

    Raises:
        UsageError: an unknown check, or no reason.
    """
    known = {check.id for check in CHECKS}
    for name, reason in waivers.items():
        if name not in known:
            raise unknown_name("check", name, known, where="waivers")
        if not reason.strip():
            raise UsageError(f"the waiver of {name!r} gives no reason", where="waivers", fix=f"--waive '{name}=why this is expected'")
    return dict(waivers)


def examine(m: Measurements, check: Check, waivers: Mapping[str, str] | None = None) -> Finding:
    """Run one check; whatever it raises becomes a finding."""
    began = time.perf_counter()
    finding = _run(m, check)
    finding.seconds = round(time.perf_counter() - began, 2)
    reason = (waivers or {}).get(check.id, "")
    if reason and finding.status == "failed":
        if check.waivable:
            finding.status, finding.waiver = "waived", reason
        else:
            finding.what += "; this check cannot be waived"
    elif reason and finding.status in ("passed", "not shown"):
        finding.what = f"{finding.what + '; ' if finding.what else ''}{NEEDLESS}"
    return finding


def examine_with(name: str, run: Callable[[], str | None]) -> Finding:
    """Make the finding of a check, by name, from a function of its own."""
    (check,) = (check for check in CHECKS if check.id == name)
    return _found(check, run, None)


def _run(m: Measurements, check: Check) -> Finding:
    return _found(check, lambda: check.run(m), m.subject.rule)


def _found(check: Check, run: Callable[[], str | None], rule: type[Rule] | None) -> Finding:
    try:
        return Finding(check.id, check.title, "passed", what=run() or "")
    except CheckFailed as error:
        return Finding(check.id, check.title, "failed", error.what, error.where, error.fix)
    except NotShown as error:
        return Finding(check.id, check.title, "not shown", str(error))
    except Unmeasured as error:
        return Finding(check.id, check.title, "unmeasured", str(error))
    except NotApplicable as error:
        return Finding(check.id, check.title, "not applicable", str(error))
    except BpfreeError as error:
        return Finding(check.id, check.title, "failed", error.what, error.where, error.fix or "see the message")
    except Exception as error:
        return Finding(
            check.id,
            check.title,
            "failed",
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            "" if rule is None else _place(error, rule),
            "correct the rule",
        )


def _place(error: BaseException, rule: type[Rule]) -> str:
    """Name the innermost line of the rule's own source; if there is none, the innermost line of all."""
    frames = [(str(frame.f_globals.get("__name__", "?")), line, frame.f_code) for frame, line in traceback.walk_tb(error.__traceback__)]
    if any(is_own(rule, module) for module, _, _ in frames):
        return place_of_error(error, rule)
    return f"{frames[-1][2].co_filename}:{frames[-1][1]}" if frames else ""


def _declared(m: Measurements) -> dict[str, Any]:
    """Return the traits; empty for a rule that raises when it is built, which every check has reported."""
    try:
        return {**dataclasses.asdict(m.traits()), "targets": list(m.traits().targets)}
    except BpfreeError:
        raise
    except Exception:
        return {}


def _certificate(m: Measurements, kind: str, findings: list[Finding], properties: dict[str, Any], began: float) -> Certificate:
    subject = m.subject
    return Certificate(
        rule=subject.name,
        plugin=subject.owner.name,
        distribution=subject.owner.distribution,
        version=subject.owner.version,
        settings=list(subject.settings),
        config=subject.config,
        traits=_declared(m),
        kind=kind,
        date=datetime.date.today().isoformat(),
        properties=properties,
        findings=findings,
        sources=sources.certificate_hashes(subject.registry, subject.name),
        environment={k: v for k, v in environment.describe(torch.device("cpu")).items() if v},
        seconds=round(time.perf_counter() - began, 1),
        api=API_VERSION,
    )


@contextmanager
def set_aside() -> Iterator[None]:
    """Use one thread inside; restore the caller's generators and settings afterwards."""
    with environment.numerics(threads=1, deterministic=False), preserved_global_state(torch.device("cpu")):
        yield
