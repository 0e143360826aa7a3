"""What is measured of a rule, each thing once."""

from __future__ import annotations

from functools import cached_property

import torch

from bpfree.certify.subject import Specimen, Subject
from bpfree.rule import Rule

__all__ = ["Measurements"]


class Measurements:
    """What is measured of a rule; made when it is first asked for, and kept.

    Args:
        subject: the rule.

    Attributes:
        subject: as given.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @cached_property
    def kind(self) -> str:
        """The kind of network that measurements are taken on."""
        return self.subject.kind()

    def build(self, *, seed: int = 0, depth: int = 2, width: int = 16, dtype: torch.dtype = torch.float32) -> Rule:
        """A small instance for images of 8 times 8 pixels and five classes."""
        return self.subject.build(Specimen(self.kind, depth, width), seed=seed, dtype=dtype)
