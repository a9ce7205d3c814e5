"""Overlays paint the right patches: kept ones as they are, merged ones tinted, dropped ones dark."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch

from accel.evals.pictures.overlays import DROPPED, JOINED, KEPT, MERGED, NO_PATCH, data_address, fate_maps, overlay, plain, png_bytes
from accel.protocols import Stage, Unit
from accel.stats import PruningEvent

Image = pytest.importorskip("PIL.Image")
UNIT = Unit(0, 6, 2, 3)
# map, row, column of a grid of 2 × 3, a newline behind each row
PLACES = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 1, 2)]
NEWLINES = (3, 7)


def event(kept: set[int], *, anchors: dict[int, int] | None = None, **changes: Any) -> PruningEvent:
    """One stage over the tokens of `PLACES`, or of what `changes` says."""
    places = changes.pop("places", PLACES)
    n = len(places)
    anchor = torch.full((1, n), -1)
    for source, target in (anchors or {}).items():
        anchor[0, source] = target
    made: dict[str, Any] = {
        "method": "some", "stage": Stage("projector"), "units": [UNIT], "unit": torch.zeros(1, n, dtype=torch.int64), "place": torch.tensor([places]),
        "is_structural": torch.tensor([[i in NEWLINES and n == len(PLACES) for i in range(n)]]),
        "is_kept": torch.tensor([[i in kept for i in range(n)]]), "anchor": anchor,
    }  # fmt: skip
    return PruningEvent(**{**made, **changes})


def grey(width: int, height: int) -> Any:
    return Image.new("RGB", (width, height), (200, 200, 200))


def test_each_patch_has_its_fate() -> None:
    [found] = fate_maps([event({0, 6, 3}, anchors={1: 0, 0: 0, 6: 6})])
    assert found.grid.tolist() == [[JOINED, MERGED, DROPPED], [DROPPED, DROPPED, KEPT]]
    assert (found.count(KEPT, JOINED), found.count(MERGED), found.count(DROPPED)) == (2, 1, 3)


def test_later_stages_add_to_what_earlier_ones_did() -> None:
    first, second = event({0, 1, 6}, anchors={2: 1}), event({0})
    assert fate_maps([first])[0].grid.tolist() == [[KEPT, JOINED, MERGED], [DROPPED, DROPPED, KEPT]]
    assert fate_maps([first, second])[0].grid.tolist() == [[KEPT, DROPPED, MERGED], [DROPPED, DROPPED, DROPPED]]


def test_newlines_are_not_drawn_though_they_share_a_place() -> None:
    [found] = fate_maps([event({3, 7})])
    assert (found.grid == DROPPED).all()


def test_every_map_is_cut_to_its_own_extent() -> None:
    places = [(0, 0, 0), (0, 0, 1), (1, 4, 2), (1, 5, 3)]
    maps = fate_maps([event({0, 3}, places=places, units=[Unit(0, 4, 1, 4)])])
    assert [m.number for m in maps] == [0, 1]
    assert maps[0].grid.tolist() == [[KEPT, DROPPED]]
    assert maps[1].grid.tolist() == [[DROPPED, NO_PATCH], [NO_PATCH, KEPT]]


def test_other_pictures_and_sequences_are_left_out() -> None:
    units = [Unit(0, 3, 1, 3, picture=0), Unit(0, 3, 1, 3, picture=1), Unit(1, 3, 1, 3)]
    row = [(0, 0, c) for c in range(3)] + [(1, 0, c) for c in range(3)]
    two = event(
        set(), places=row, units=units, unit=torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, -1, -1, -1]]), place=torch.tensor([row, row]),
        is_structural=torch.zeros(2, 6, dtype=torch.bool), is_kept=torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1]]).bool(),
        anchor=torch.full((2, 6), -1),
    )  # fmt: skip
    assert [m.grid.tolist() for m in fate_maps([two])] == [[[KEPT, DROPPED, DROPPED]]]
    assert [m.grid.tolist() for m in fate_maps([two], picture=1)] == [[[DROPPED, KEPT, DROPPED]]]
    assert [m.grid.tolist() for m in fate_maps([two], sequence=1)] == [[[DROPPED, DROPPED, KEPT]]]


def test_pixels_lie_under_their_patch() -> None:
    # 450 × 400: no factor, rows of 200 and columns of 150 pixels
    drawn = np.asarray(overlay(grey(450, 400), fate_maps([event({0, 6}, anchors={1: 6})])))
    middle = {(r, c): drawn[100 + 200 * r, 75 + 150 * c].tolist() for r in range(2) for c in range(3)}
    assert middle[0, 0] == middle[1, 2] == [200, 200, 200]
    assert middle[0, 2] == middle[1, 0] == middle[1, 1]
    assert max(middle[0, 2]) < 60
    red, green, blue = middle[0, 1]
    assert red > green > blue
    assert drawn[0, 0].tolist() == drawn[100, 149].tolist() == [255, 255, 255], "a line around what is kept"
    assert drawn[100, 151].tolist() == middle[0, 1]
    assert drawn[399, 449].tolist() == [230, 140, 20], "another one around what holds others"


def test_neighbours_that_are_both_kept_have_no_line_between_them() -> None:
    drawn = np.asarray(overlay(grey(450, 400), fate_maps([event({0, 1})])))
    assert drawn[100, 149].tolist() == drawn[100, 150].tolist() == [200, 200, 200]


@pytest.mark.parametrize(
    "size, shown", [((48, 32), (384, 256)), ((450, 300), (450, 300)), ((4096, 1024), (1024, 256))], ids=["small", "fits", "large"]
)
def test_pictures_are_brought_to_a_size_that_can_be_read(size: tuple[int, int], shown: tuple[int, int]) -> None:
    maps = fate_maps([event({0})])
    assert overlay(grey(*size), maps).size == shown
    assert plain(grey(*size)).size == shown


def test_several_maps_stand_side_by_side() -> None:
    places = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    maps = fate_maps([event({0, 3}, places=places, units=[Unit(0, 4, 1, 4)])])
    drawn = np.asarray(overlay(grey(400, 400), maps))
    assert drawn.shape == (400, 808, 3)
    assert [int(drawn[200, x, 0]) > 100 for x in (100, 300, 508, 708)] == [True, False, False, True]


def test_the_address_holds_the_picture() -> None:
    address = data_address(png_bytes(grey(7, 5)))
    prefix, _, data = address.partition(",")
    assert prefix == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (7, 5)
