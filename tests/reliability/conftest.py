"""Fixtures of the reliability tests."""

from collections.abc import Iterator

import pytest

from tests.reliability.harness import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts runs of the program quickly."""
    server = Forks()
    yield server
    server.close()
