"""The planner of head budgets: the table of kv-compression.md §2.3, its integer rule, and files of plans."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import OptionError
from accel.patches._head_plan import HeadPlan, Shapes, make_plan, real_budgets

SMALL: Shapes = ((1, 1), (2, 2), (3, 3), (4, 4))
SIDES = {680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 10521: (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)}


def squares(total: int) -> Shapes:
    found = tuple((side, side) for side in SIDES[total])
    assert sum(height * width for height, width in found) == total
    return found


def types(*rows: str) -> list[list[bool]]:
    """From words such as "CCS"."""
    return [[letter == "C" for letter in row] for row in rows]


# --- the table of §2.3 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, keep, alpha, expected, share, is_truncated",
    [
        (680, 0.7, 0.5, (272, 680), 1 / 3, False),
        (680, 0.5, 0.5, (113, 566), 1 / 3, False),
        (680, 0.3, 0.5, (68, 340), 1 / 3, False),
        (680, 0.1, 0.5, (22, 113), 1 / 3, True),
        (10521, 0.7, 0.5, (4208, 10521), 1 / 3, False),
        (10521, 0.7, 0.8, (6575, 10521), 2 / 3, False),
        (10521, 0.5, 0.5, (1753, 8767), 1 / 3, False),
        (10521, 0.5, 0.8, (3945, 10521), 2 / 3, False),
        (10521, 0.3, 0.5, (1052, 5260), 1 / 3, False),
        (10521, 0.3, 0.8, (2104, 7364), 2 / 3, False),
        (10521, 0.1, 0.5, (350, 1753), 1 / 3, True),
        (10521, 0.1, 0.8, (289, 4101), 0.276, False),
    ],
)
def test_the_table_of_the_specification(
    total: int, keep: float, alpha: float, expected: tuple[int, int], share: float, is_truncated: bool
) -> None:
    # 10 layers of 10 heads, each layer with the same share of contextual ones
    plan = make_plan(types(*["C" * round(10 * alpha) + "S" * round(10 - 10 * alpha)] * 10), scale_shapes=squares(total), n_protected=5, keep=keep)
    assert plan.alpha == alpha
    assert plan.share == pytest.approx(share, abs=5e-4)
    real = real_budgets(plan.alpha, keep * total, total, plan.share)
    assert tuple(math.floor(budget + 1e-9) for budget in real) == expected
    assert plan.truncates_newest == is_truncated
    # what rounding left is under one entry per head, and goes to structural heads unless they have everything
    assert set(plan.contextual) <= {expected[0], expected[0] + (expected[1] == total)}
    assert all(expected[1] <= budget <= expected[1] + 100 / (100 - 100 * alpha) for budget in plan.structural)
    assert plan.n_entries() <= math.floor(100 * keep * total + 1e-9) < plan.n_entries() + 10


def test_a_share_is_lowered_only_where_that_makes_room_for_the_last_scale() -> None:
    # half of the heads; 21 entries are the first five and the last scale. At a third B_S is 5/3 of the mean
    half = types("CS", "SC")

    def planned(keep: int) -> HeadPlan:
        return make_plan(half, scale_shapes=SMALL, n_protected=5, keep=keep)

    assert planned(13).share == 1 / 3
    # 12 · 5/3 = 20 < 21: s = 2 − 21/12 = ¼
    assert planned(12).share == pytest.approx(1 / 4)
    assert (planned(12).contextual, planned(12).structural) == ((3, 3), (21, 21))
    assert not planned(12).truncates_newest
    # 11: s would be 2 − 21/11 = 0.09 < 0.1
    assert planned(11).share == 1 / 3
    assert planned(11).truncates_newest


@pytest.mark.parametrize("n_contextual, expected", [(12, 1 / 3), (13, 2 / 3)], ids=["below 65 %", "65 %"])
def test_the_share_of_contextual_heads_is_larger_where_they_are_many(n_contextual: int, expected: float) -> None:
    plan = make_plan(types("C" * n_contextual + "S" * (20 - n_contextual)), scale_shapes=SMALL, n_protected=5, keep=17)
    assert plan.share == expected


# --- whole numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, keep, share, contextual, structural",
    [
        # B 10.5: 3.5 and 17.5; ⌊84⌋ − 80 = 4 pays one more for the one structural head of layer 0 and for the three of layer 1
        (("CCCS", "CSSS"), 0.35, 1 / 3, (3, 3), (18, 18)),
        # B 10.3: 5.15 and 15.45; ⌊82.4⌋ − 80 = 2 pays layer 0, and the first that cannot be paid ends it: layer 0 is not paid twice
        (("CCCS", "CSSS"), 10.3 / 30, 0.5, (5, 5), (16, 15)),
        # B 22.8: clipped at 30, contextual 15.6; ⌊182.4⌋ − 180 = 2 pays the one contextual head of layer 0, not the three of layer 1
        (("CSSS", "CCCS"), 0.76, 1 / 3, (16, 15), (30, 30)),
        # B 10.9: 9.81 and 18.53; ⌊87.2⌋ − 81 = 6 goes round six times
        (("CCCCCCCS",), 10.9 / 30, 0.9, (9,), (24,)),
        # 28 of 30 entries: what structural heads cannot take any more goes to contextual ones. 26 and 30: nothing is left
        (("CS",), 28, 0.9, (26,), (30,)),
    ],
    ids=["both paid", "stops", "clipped", "round and round", "no rest"],
)
def test_what_rounding_leaves_is_spent_layer_by_layer(
    rows: tuple[str, ...], keep: float, share: float, contextual: tuple[int, ...], structural: tuple[int, ...]
) -> None:
    plan = make_plan(types(*rows), scale_shapes=SMALL, n_protected=2, keep=keep, share=share)
    assert (plan.contextual, plan.structural) == (contextual, structural)


def by_the_rule(rows: list[list[bool]], total: int, mean: int, share: Fraction) -> tuple[list[int], list[int]]:
    """§2.3 in fractions, one entry after the other."""
    n_heads = sum(map(len, rows))
    alpha = Fraction(sum(map(sum, rows)), n_heads)
    if alpha in (0, 1):
        of_contextual = of_structural = Fraction(mean)
    else:
        of_contextual, of_structural = share * mean, mean * (1 - alpha * share) / (1 - alpha)
        if of_structural > total:
            of_contextual, of_structural = (mean - (1 - alpha) * total) / alpha, Fraction(total)
    found = {True: [math.floor(of_contextual)] * len(rows), False: [math.floor(of_structural)] * len(rows)}
    left = mean * n_heads - sum(found[one][layer] for layer, row in enumerate(rows) for one in row)
    for kind in (False, True):
        places = [layer for layer, row in enumerate(rows) for _ in [0] if kind in row]
        while any(found[kind][layer] < total for layer in places):
            for layer in places:
                cost = rows[layer].count(kind)
                if found[kind][layer] == total:
                    continue
                if cost > left:
                    return found[True], found[False]
                found[kind][layer] += 1
                left -= cost
    return found[True], found[False]


Problem = tuple[list[list[bool]], Shapes, int, int, Fraction]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n_heads = draw(st.integers(1, 8))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=n_heads, max_size=n_heads), min_size=1, max_size=6))
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
    total = sum(height * width for height, width in shapes)
    share = draw(st.fractions(Fraction(1, 20), 1, max_denominator=20))
    return rows, tuple(shapes), draw(st.integers(2, max(2, total + 2))), draw(st.integers(0, min(6, total))), share


@given(problems())
def test_budgets_follow_the_rule_sum_to_what_was_asked_and_differ_by_at_most_one(problem: Problem) -> None:
    rows, shapes, keep, n_protected, share = problem
    total, n_heads = sum(height * width for height, width in shapes), sum(map(len, rows))
    mean = min(keep, total)
    contextual, structural = by_the_rule(rows, total, mean, share)
    used = {kind: [budgets[layer] for layer, row in enumerate(rows) if kind in row] for kind, budgets in ((True, contextual), (False, structural))}
    has_room = min(used[True], default=1) >= 1 and min(used[False], default=total) >= min(total, n_protected + 1)
    if not has_room:
        with pytest.raises(OptionError, match="keep more"):
            make_plan(rows, scale_shapes=shapes, n_protected=n_protected, keep=keep, share=float(share))
        return
    plan = make_plan(rows, scale_shapes=shapes, n_protected=n_protected, keep=keep, share=float(share))
    assert {kind: [plan.contextual[i] if kind else plan.structural[i] for i, row in enumerate(rows) if kind in row] for kind in (True, False)} == used
    # invariants 9 and 10: all heads together, and each layer by its own share of contextual heads
    assert 0 <= mean * n_heads - plan.n_entries() < len(rows[0])
    assert plan.n_entries() == sum(
        sum(row) * plan.contextual[layer] + (len(row) - sum(row)) * plan.structural[layer] for layer, row in enumerate(rows)
    )
    for budgets in used.values():
        assert max(budgets, default=0) - min(budgets, default=0) <= 1
        assert all(budget <= total for budget in budgets)


@given(
    alpha=st.floats(0.01, 0.99), keep=st.floats(0.01, 1), more=st.floats(0, 1), share=st.floats(0.01, 1), larger=st.floats(0, 1),
    total=st.integers(30, 12000),
)  # fmt: skip
def test_real_budgets_hold_equation_7_and_are_monotone(alpha: float, keep: float, more: float, share: float, larger: float, total: int) -> None:
    contextual, structural = real_budgets(alpha, keep * total, total, share)
    assert alpha * contextual + (1 - alpha) * structural == pytest.approx(keep * total, rel=1e-9)
    assert 0 < contextual <= structural * (1 + 1e-9) <= total * (1 + 2e-9)
    # more is kept: neither kind gets less
    richer = real_budgets(alpha, (keep + more * (1 - keep)) * total, total, share)
    assert all(b >= a - 1e-6 for a, b in zip((contextual, structural), richer, strict=True))
    # a larger share moves entries from structural to contextual heads
    evener = real_budgets(alpha, keep * total, total, share + larger * (1 - share))
    assert evener[0] >= contextual - 1e-6
    assert evener[1] <= structural + 1e-6
    assert real_budgets(alpha, keep * total, total, 1.0) == pytest.approx((keep * total, keep * total))


# --- special plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["C", "S"], ids=["all contextual", "all structural"])
def test_one_kind_alone_gets_the_mean_with_any_share(letter: str) -> None:
    for share in ("auto", 0.2):
        plan = make_plan(types(letter * 4, letter * 4), scale_shapes=SMALL, n_protected=5, keep=0.35, share=share)
        budgets = plan.contextual if letter == "C" else plan.structural
        # 8 · 10.5 = 84: both layers cannot have 11
        assert budgets == (11, 10)
        assert plan.alpha == (letter == "C")
        assert plan.heads(1, contextual=letter == "C") == (0, 1, 2, 3)
        assert plan.heads(1, contextual=letter != "C") == ()
    # contextual heads alone truncate nothing
    assert plan.truncates_newest == (letter == "S")


def test_layers_of_one_kind_stand_beside_mixed_ones() -> None:
    plan = make_plan(types("CCCC", "SCSC", "SSSS"), scale_shapes=SMALL, n_protected=5, keep=0.5, share=0.4)
    assert [plan.heads(layer, contextual=True) for layer in range(3)] == [(0, 1, 2, 3), (1, 3), ()]
    assert [plan.heads(layer, contextual=False) for layer in range(3)] == [(), (0, 2), (0, 1, 2, 3)]
    # 6 and 24: exact, so nothing is left
    assert plan.n_entries() == 6 * 6 + 6 * 24 == 12 * 15


def test_keep_is_a_share_as_a_float_and_a_count_as_an_int() -> None:
    rows = types("CS", "CS")
    share, count = (make_plan(rows, scale_shapes=SMALL, n_protected=5, keep=keep, share=0.5) for keep in (0.4, 12))
    assert (share.contextual, share.structural) == (count.contextual, count.structural) == ((6, 6), (18, 18))
    # 100 · 0.29 falls short of 29 by rounding
    odd = make_plan(types("SS"), scale_shapes=((10, 10),), n_protected=0, keep=0.29)
    assert odd.structural == (29,)


@pytest.mark.parametrize("keep", [1.0, 30, 99])
def test_everything_kept_is_everything_for_both_kinds(keep: float) -> None:
    for rows in (types("CCS", "CSS"), types("CCC"), types("SS"), types("CCCCCCS")):
        plan = make_plan(rows, scale_shapes=SMALL, n_protected=5, keep=keep)
        assert set(plan.contextual + plan.structural) == {30}


@pytest.mark.parametrize(
    "rows, keep, share, message",
    [
        (("CS",), 2, 0.1, "contextual heads 0 entries each, and they need 1 at least; keep more"),
        (("SS",), 0.17, "auto", "structural heads 5 entries each, and they need 6 at least, the first 5 tokens and one more; keep more"),
        (("CCCCCCCS",), 3, 1.0, "structural heads 3 entries"),
    ],
    ids=["no contextual entry", "first tokens only", "equal"],
)
def test_budgets_too_small_to_work_with_raise(rows: tuple[str, ...], keep: float, share: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_plan(types(*rows), scale_shapes=SMALL, n_protected=5, keep=keep, share=share)
    # one more token for every head is enough for the second
    make_plan(types("SS"), scale_shapes=SMALL, n_protected=5, keep=0.2)


# --- files --------------------------------------------------------------------------------------------------------------------

PLAN = make_plan(types("CCCS", "CSSS"), scale_shapes=SMALL, n_protected=5, keep=0.35, share=1 / 3)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json", about={"weights": "abc", "alpha": 0.5})
    plan, about = HeadPlan.load(path)
    assert plan == PLAN
    assert type(plan.keep) is float
    assert (about["weights"], about["alpha"]) == ("abc", 0.5)
    count = make_plan(types("CS"), scale_shapes=SMALL, n_protected=0, keep=12)
    assert type(HeadPlan.load(count.save(tmp_path / "count.json", about={}))[0].keep) is int


@pytest.mark.parametrize("key", ["weights", "keep", "structural", "is_contextual", "scale_shapes", "n_protected", "share", "fingerprint", "format"])
def test_a_file_that_was_changed_is_refused(key: str, tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json", about={"weights": "abc"})
    found = json.loads(path.read_text())
    changes: dict[str, Any] = {
        "weights": "abd", "fingerprint": "0" * 16, "format": "accel.hack.plan.0", "keep": 0.36, "structural": [18, 19],
        "is_contextual": [[True, True, False, True], [True, False, False, False]], "scale_shapes": [[1, 1], [2, 2], [5, 5]], "n_protected": 4,
        "share": 0.5,
    }  # fmt: skip
    place = found if key in ("weights", "fingerprint", "format") else found["plan"]
    assert place[key] != changes[key]
    place[key] = changes[key]
    path.write_text(json.dumps(found))
    with pytest.raises(OptionError, match="of another version, or was changed after it was made"):
        HeadPlan.load(path)


@pytest.mark.parametrize("key", ["plan", "fingerprint", "format", "is_contextual", "keep"])
def test_a_file_with_something_missing_is_refused(key: str, tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json", about={})
    found = json.loads(path.read_text())
    (found if key in found else found["plan"]).pop(key)
    path.write_text(json.dumps(found))
    with pytest.raises(OptionError, match=r"plan\.json (is no plan|is of another version)"):
        HeadPlan.load(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"plan": 3, "fingerprint": "a", "format": "accel.hack.plan.1"}', "\x00\x01"], ids=repr)
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OptionError, match=r"plan\.json"):
        HeadPlan.load(tmp_path / "plan.json")
    with pytest.raises(OptionError, match="is no plan"):
        HeadPlan.load(tmp_path / "gone.json")
