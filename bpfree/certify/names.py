"""Names of the checks, which reading a certificate needs without loading what they execute."""

from __future__ import annotations

__all__ = ["FULL", "ONLY_FULL", "expected"]

FULL = (
    "whole-run-reading",
    "whole-run-consistency",
    "hidden-blocks-needed",
    "trait-dependence",
    "trait-downstream-weights",
    "trait-reverse-span",
    "trait-supervision",
    "trait-update",
    "trait-passes",
    "labels-unseen",
    "prediction-per-example",
    "no-host-state-in-predict",
    "permuted-labels",
    "same-seed",
    "resume",
    "two-instances",
    "global-generators",
    "caller-state",
    "config-roundtrip",
    "networks-refused",
    "batch-shapes",
    "bf16",
    "nan-reported",
    "state-restored",
    "updates-something",
    "no-host-sync",
    "memory-constant",
    "learning",
)
"""All checks of a full certificate, in order."""
ONLY_FULL = ("whole-run-reading", "whole-run-consistency", "hidden-blocks-needed", "permuted-labels", "learning")
"""Those that ``--quick`` leaves out."""


def expected(kind: str) -> tuple[str, ...]:
    """Return the checks that a certificate of this kind must have: ``full`` or ``quick``; a partial one may have any."""
    return {"full": FULL, "quick": tuple(name for name in FULL if name not in ONLY_FULL)}.get(kind, ())
