"""What the tests of the page allocator and of the cache share."""

import sys

import pytest


@pytest.fixture
def eager_threads():
    """Threads take turns after microseconds, not milliseconds, so that a missing lock shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
