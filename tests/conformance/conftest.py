"""What holds for every test of the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

from accel.patches.hosts.transformers.implementation import _SWITCHED
from accel.patches.hosts.transformers.layers import LAYERS

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads that wait for each other cost more than they compute, a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    """Models are shared between tests: the test that leaves one patched fails itself, not the next one."""
    # what another file's test left for the garbage collector is not this one's doing
    layers, switched = set(LAYERS), set(_SWITCHED)
    yield
    assert not set(LAYERS) - layers
    assert not set(_SWITCHED) - switched
