"""Certificates: what a rule really does, measured; and the same checks as test cases.

::

    from bpfree.certify import certify, parametrize_with_checks

    certificate = certify("dfa", quick=True)
    certificate.properties["credit"]        # "local"

    @parametrize_with_checks("my-rule")     # in a plugin's own tests
    def test_conformance(check):
        check()
"""

from bpfree.certify.cases import Case, cases, parametrize_with_checks
from bpfree.certify.certificate import Certificate, read_certificate
from bpfree.certify.checks.check import Check
from bpfree.certify.examination import CHECKS, certify, examine
from bpfree.certify.findings import CheckFailed, Finding, NotApplicable, NotShown, Unmeasured
from bpfree.certify.measurements import Measurements
from bpfree.certify.subject import Specimen, Subject
from bpfree.certify.task_checks import TaskCheck, task_checks

__all__ = [
    "CHECKS",
    "Case",
    "Certificate",
    "Check",
    "CheckFailed",
    "Finding",
    "Measurements",
    "NotApplicable",
    "NotShown",
    "Specimen",
    "Subject",
    "TaskCheck",
    "Unmeasured",
    "cases",
    "certify",
    "examine",
    "parametrize_with_checks",
    "read_certificate",
    "task_checks",
]
