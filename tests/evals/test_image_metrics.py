"""Image metrics: nothing between a set and itself, and the known value for known shifts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accel.errors import OptionError
from accel.evals import image_metrics as M
from accel.evals.models.small_var.architecture import Judge


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge().eval()


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_a_set_and_itself_are_at_no_distance(judge: Judge) -> None:
    x = pictures(300)
    assert M.frechet_distance(x, x, judge) == pytest.approx(0, abs=1e-9)
    assert M.perceptual_distance(x, x, judge).eq(0).all()
    assert M.psnr(x, x).eq(math.inf).all()


def test_frechet_distance_of_a_shift_is_its_squared_length() -> None:
    torch.manual_seed(0)
    x, shift = torch.randn(500, 6), torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 0.0])
    assert M.frechet_distance_of_features(x, x + shift) == pytest.approx(5.25, rel=1e-5)


def test_frechet_distance_of_a_stretch_is_that_of_the_deviations() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 4, dtype=torch.float64)
    x = x - x.mean(0)
    # (3 − 1)² times the sum of the variances
    assert M.frechet_distance_of_features(x, 3 * x) == pytest.approx(4 * float(x.var(0).sum()), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5).double(), torch.randn(300, 5).double() @ torch.randn(5, 5).double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # the definition, through complex eigenvalues of the product itself
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
    assert M.frechet_distance_of_features(a, b) == pytest.approx(expected, rel=1e-9)
    assert M.frechet_distance_of_features(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_stands_fewer_pictures_than_features() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 64)
    assert M.frechet_distance_of_features(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("shift", "expected"), [(0.1, 20.0), (0.01, 40.0)])
def test_psnr_of_a_known_shift(shift: float, expected: float) -> None:
    x = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
    torch.testing.assert_close(M.psnr(x, x + shift), torch.full((2,), expected, dtype=torch.float64))


def test_perceptual_distance_grows_with_noise_and_keeps_pictures_apart(judge: Judge) -> None:
    x, noise = pictures(300), pictures(300, 1) - 0.5
    little, much = (M.perceptual_distance(x, x + share * noise, judge) for share in (0.1, 0.8))
    assert little.shape == (300,)
    assert (little < much).all()
    alone = M.perceptual_distance(x[260:261], x[260:261] + 0.1 * noise[260:261], judge)
    torch.testing.assert_close(alone, little[260:261], rtol=1e-4, atol=1e-8)


class Brightness:
    """Sees class 1 where a picture is bright."""

    @staticmethod
    def classes(pixels: Tensor) -> Tensor:
        return (pixels.mean((1, 2, 3)) > 0.5).long()


def test_class_accuracy_with_its_error_and_by_class() -> None:
    pixels = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.9]).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    found = M.class_accuracy(pixels, torch.tensor([1, 1, 0, 1, 0]), Brightness())
    assert found.value == pytest.approx(0.6)
    assert found.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert found.by_class == {0: 0.5, 1: pytest.approx(2 / 3)}
    assert M.class_accuracy(pixels[:1], torch.tensor([1]), Brightness()).stderr is None


def test_what_cannot_be_compared_is_refused(judge: Judge) -> None:
    x = pictures(4)
    with pytest.raises(OptionError, match="equal shapes"):
        M.psnr(x, x[:2])
    with pytest.raises(OptionError, match="pictures must be"):
        M.frechet_distance(x[:, :1], x, judge)
    with pytest.raises(OptionError, match="as many labels"):
        M.class_accuracy(x, torch.zeros(3, dtype=torch.int64), judge)
    with pytest.raises(OptionError, match="equal d"):
        M.frechet_distance_of_features(torch.zeros(4, 2), torch.zeros(4, 3))
