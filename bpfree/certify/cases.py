"""The checks as test cases, for a plugin's own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from bpfree.certify.checks.check import Check
from bpfree.certify.examination import check_waivers, examine, select, set_aside
from bpfree.certify.findings import Finding
from bpfree.certify.measurements import Measurements
from bpfree.certify.subject import Subject
from bpfree.rule import Rule

__all__ = ["Case", "cases", "parametrize_with_checks"]


class Case:
    """One check on one rule; call it.

    Args:
        rule: a registered name, or a class.
        check: the check to run.
        settings: ``KEY=VALUE`` words over the rule's configuration.
    """

    def __init__(self, rule: str | type[Rule], check: Check, settings: tuple[str, ...] = ()) -> None:
        self.rule, self.check, self.settings = rule, check, settings

    def find(self) -> Finding:
        """Run the check; the cases of a rule share its measurements."""
        m = _measurements(self.rule, self.settings)
        with set_aside():
            return examine(m, self.check, check_waivers(m.subject.rule.waivers))

    def __call__(self) -> None:
        """Run the check as a test.

        Raises:
            AssertionError: it failed; with what, where, and what to do.
        """
        finding = self.find()
        if finding.status == "failed":
            raise AssertionError(str(finding))
        if finding.status == "waived":
            _pytest().xfail(f"waived: {finding.waiver}")
        if finding.status in ("not shown", "unmeasured", "not applicable"):
            _pytest().skip(f"{finding.status}: {finding.what}")

    def __repr__(self) -> str:
        return self.check.id


@lru_cache(maxsize=2)
def _measurements(rule: str | type[Rule], settings: tuple[str, ...]) -> Measurements:
    return Measurements(Subject(rule, settings))


def cases(rule: str | type[Rule], settings: Iterable[str] = (), *, full: bool = False) -> list[Case]:
    """Return a case for each check on a rule.

    Args:
        rule: a registered name, or a class.
        settings: ``KEY=VALUE`` words over its configuration.
        full: also learning and permuted labels, which take most of the time.
    """
    return [Case(rule, check, tuple(settings)) for check in select(quick=not full)]


def parametrize_with_checks(rule: str | type[Rule], settings: Iterable[str] = (), *, full: bool = False) -> Callable[..., Any]:
    """Decorate a pytest function to run once per check, which it receives as the argument ``check``.

    A failed check fails its case, a waived one is an expected failure, one that is unmeasured or not shown is skipped with its reason.
    """
    decorator: Callable[..., Any] = _pytest().mark.parametrize("check", cases(rule, settings, full=full), ids=repr)
    return decorator


def _pytest() -> Any:
    import pytest

    return pytest
