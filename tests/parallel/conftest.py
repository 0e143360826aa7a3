"""Processes that all tests of this folder share: starting them takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from parallel_ranks import Ranks


@pytest.fixture(scope="package")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()
