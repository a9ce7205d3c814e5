"""Top-k, top-p, seeds and pictures, on inputs solved by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.errors import AccelError, OptionError
from accel.models.sampling import as_output, check_output, check_sampling, draw, filtered, generators_for

LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()


def kept(**options: Any) -> list[int]:
    return filtered(LOGITS, **({"top_k": 0, "top_p": 0.0} | options)).isfinite().nonzero()[:, 0].tolist()


def test_top_k_keeps_the_largest_and_ties_with_the_last_of_them() -> None:
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert filtered(torch.tensor([1.0, 2.0, 1.0]), top_k=2, top_p=0.0).isfinite().tolist() == [True, True, True]


def test_top_p_drops_ascending_mass_up_to_one_minus_p() -> None:
    # ascending mass 0.1, 0.3, 0.6, 1.0; dropped where it is ≤ 1 − p
    assert kept(top_p=0.69) == [0, 2]
    assert kept(top_p=0.95) == [0, 1, 2, 3]
    assert kept(top_p=0.3) == [0]
    assert kept(top_p=1e-9) == [0], "the largest always stays"
    assert kept(top_p=1.0) == kept(top_p=0.0) == [0, 1, 2, 3]


def test_top_p_sees_what_top_k_has_left() -> None:
    # top-3 renormalised: 0.444, 0.333, 0.222; 1 − p = 0.24 drops the last, which it would not have among all four (0.1 dropped, 0.3 kept)
    assert kept(top_k=3, top_p=0.76) == [0, 2]
    assert kept(top_p=0.76) == [0, 2, 3]


@pytest.mark.parametrize(
    "options", [{"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 1.1}, {"top_p": -0.1}, {"top_p": float("nan")}], ids=str
)
def test_options_out_of_range_raise(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        check_sampling(**({"top_k": 0, "top_p": 0.0} | options))


def test_draws_follow_the_distribution_and_never_take_a_filtered_code() -> None:
    logits = filtered(LOGITS, top_k=3, top_p=0.0).expand(1, 20000, 4)
    ids = draw(logits, [torch.Generator().manual_seed(0)])
    share = torch.bincount(ids.flatten(), minlength=4) / 20000
    # standard error below 0.004
    assert torch.allclose(share, torch.tensor([4 / 9, 0, 3 / 9, 2 / 9]), atol=0.015)
    assert share[1] == 0


def test_an_image_draws_from_its_own_generator_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7)
    both = draw(logits, generators_for([3, 4], 2, torch.device("cpu")))
    alone = draw(logits[1:], generators_for([4], 1, torch.device("cpu")))
    assert torch.equal(both[1:], alone)
    assert [g.initial_seed() for g in generators_for(7, 3, torch.device("cpu"))] == [7, 8, 9]


def test_no_seed_follows_torchs_own_state() -> None:
    def seeds() -> list[int]:
        torch.manual_seed(5)
        return [g.initial_seed() for g in generators_for(None, 2, torch.device("cpu"))]

    assert seeds() == seeds()
    assert len(set(seeds())) == 2


def test_wrong_seeds_raise() -> None:
    generator = torch.Generator()
    twice = [generator, generator]
    for seed, message in (([1], "1 seeds for 2"), ("12", "seed is an int"), (1.5, "seed is an int"), (twice, "same torch.Generator")):
        with pytest.raises(OptionError, match=message):
            generators_for(seed, 2, torch.device("cpu"))  # type: ignore[arg-type]


def test_pictures_are_rgb_and_cut_to_eight_bits() -> None:
    pixels = torch.zeros(1, 3, 2, 4)
    pixels[0, 0] = 1.0
    pixels[0, 1] = 0.999
    image = as_output(pixels, "pil")[0]
    assert image.size == (4, 2)
    assert image.getpixel((0, 0)) == (255, 254, 0)
    assert as_output(pixels, "tensor") is pixels


def test_an_output_that_cannot_be_made_raises_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="output"):
        check_output("jpeg")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AccelError, match="Pillow"):
        check_output("pil")
    check_output("tensor")
