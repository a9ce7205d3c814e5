"""What holds for every test of the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers
from accel.patches.hosts.transformers.implementation import _SWITCHED
from accel.patches.hosts.transformers.layers import LAYERS

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    """Models are shared between tests: the test that leaves one patched fails itself, not the next one."""
    yield
    assert not LAYERS
    assert not _SWITCHED
