"""What must hold on a GPU: the checks of `accel.evals.gpu.checks`, which also run without pytest."""

from __future__ import annotations

import pytest
import torch

from accel.evals.gpu.checks import Check, Profile, Skipped, checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("check", checks(Profile(torch.device("cuda"))), ids=lambda check: check.name)
def test_holds(check: Check):
    try:
        print(check.run())
    except Skipped as reason:
        pytest.skip(str(reason))
