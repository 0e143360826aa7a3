"""Addresses without what is secret in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["redact", "redacted"]


def redact(text: str) -> str:
    """The text without passwords in its addresses."""
    return re.sub(r"(://[^/:@\s]+):[^/@\s]+@", r"\1:***@", text)


def redacted(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration without passwords in its addresses."""
    return {key: redact(value) if isinstance(value, str) else value for key, value in config.items()}
