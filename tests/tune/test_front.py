"""The search for accuracy against latency: its front, the rule by which it chooses, and a kill in its middle. No clock takes part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from outsider import installed_toy

from accel import Recipe
from accel.errors import AccelError, OptionError, UnsupportedError
from accel.protocols import Choice, Uniform
from accel.tune.front import FrontResult, Measured, choose, parse_search, search_space, tune_front

pytest.importorskip("optuna")

DENSE = 0.9


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with installed_toy(tmp_path / "site", monkeypatch):
        yield


def reached(method: Any) -> Measured:
    """More weight is more score and more time; mode "a" only takes time, sizes above 32 are refused."""
    if method.size > 32:
        raise OptionError("too large")
    return Measured(DENSE * min(1.0, method.weight / 0.6), DENSE, 0.2 + method.weight + 0.5 * (method.mode == ("a", 1)))


def search(folder: Path, trials: int = 40, margin: float = 0.05, measure: Any = reached, **changes: Any) -> FrontResult:
    return tune_front("toy", measure, trials=trials, folder=folder, margin=margin, show_progress=False, **changes)


def test_the_fastest_within_the_margin_is_chosen_and_near_the_best_there_is(tmp_path: Path) -> None:
    found = search(tmp_path / "run", 60)
    assert found.within_margin
    assert found.measured.score >= DENSE - 0.05 - 1e-9
    fit = [row for row in found.rows if row["score"] >= DENSE - 0.05 - 1e-9]
    assert found.measured.time_share == min(row["time_share"] for row in fit)
    # weight 0.567 with mode b: 0.767; the defaults take 1.6
    assert 0.766 < found.measured.time_share < 0.9
    assert found.best.options()["mode"] == ("b", 1)
    assert [row["is_default"] for row in found.rows].index(True) == 0
    recipe = Recipe.load(found.recipe)
    assert recipe.methods == (found.best,)
    assert f"score {found.measured.score:.3f} (dense 0.900, margin 0.05)" in recipe.note
    assert f"the fastest of {len(found.rows)} trials" in recipe.note


def test_the_front_is_what_no_other_trial_beats(tmp_path: Path) -> None:
    rows = search(tmp_path / "run", 30).rows
    for row in rows:
        beaten = any(
            o["score"] >= row["score"] and o["time_share"] <= row["time_share"] and (o["score"], o["time_share"]) != (row["score"], row["time_share"])
            for o in rows
        )
        assert row["is_front"] == (not beaten)
    assert 1 < sum(row["is_front"] for row in rows) < len(rows)
    assert sum(row["is_chosen"] for row in rows) == 1


def test_a_search_that_is_stopped_goes_on_and_ends_alike(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", 24)
    calls = 0

    def stopped(method: Any) -> Measured:
        nonlocal calls
        calls += 1
        if calls in (3, 20):
            raise KeyboardInterrupt
        return reached(method)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "stopped", 24, measure=stopped)
    again = search(tmp_path / "stopped", 24, measure=stopped)
    assert [(row["options"], row["score"]) for row in again.rows] == [(row["options"], row["score"]) for row in whole.rows]
    assert again.best == whole.best
    assert calls == 24 + 2, "only the two that were cut short are measured again"


def test_a_finished_search_measures_nothing_and_may_choose_by_another_margin(tmp_path: Path) -> None:
    strict = search(tmp_path / "run", 30, margin=0.0)
    loose = search(tmp_path / "run", 30, margin=0.5, measure=lambda method: pytest.fail("measured"))
    assert loose.measured.time_share < strict.measured.time_share
    assert loose.rows[0]["options"] == strict.rows[0]["options"]
    assert json.loads((tmp_path / "run" / "trials.json").read_text())["margin"] == 0.5


def test_where_none_is_within_the_margin_the_highest_score_is_chosen_and_said(tmp_path: Path) -> None:
    found = search(tmp_path / "run", 10, measure=lambda method: Measured(0.3 * method.weight, DENSE, method.weight))
    assert not found.within_margin
    assert found.measured.score == max(row["score"] for row in found.rows)
    assert "none was within the margin" in Recipe.load(found.recipe).note


def test_refused_options_count_as_failed(tmp_path: Path) -> None:
    found = search(tmp_path / "run", 30)
    assert found.n_failed >= 1
    assert found.n_failed + len(found.rows) == 30
    failed = json.loads((tmp_path / "run" / "trials.json").read_text())["failed"]
    assert {row["error"] for row in failed} == {"too large"}
    assert all(row["options"]["size"] > 32 for row in failed)


def test_what_is_no_fault_of_the_options_ends_the_search(tmp_path: Path) -> None:
    def full(method: Any) -> Measured:
        raise AccelError("cannot write samples.jsonl: No space left on device")

    with pytest.raises(AccelError, match="No space left"):
        search(tmp_path / "run", 3, measure=full)
    # and is tried again, the defaults first
    assert search(tmp_path / "run", 3).rows[0]["is_default"]


def test_a_search_where_all_fail_tells_why(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"none of 2 trials of toy succeeded(?s:.)*the score is nan"):
        search(tmp_path / "run", 2, measure=lambda method: Measured(float("nan"), DENSE, 1.0))


def test_what_is_given_is_not_searched_and_what_is_added_comes_first(tmp_path: Path) -> None:
    found = search(tmp_path / "run", 8, fixed={"mode": ("b", 1)}, added={"weight": Uniform(0.7, 0.8)})
    assert all(0.7 <= row["options"]["weight"] <= 0.8 for row in found.rows[1:])
    assert found.best.options()["mode"] == ("b", 1)
    assert list(found.rows[0]["options"]) == ["weight", "size"]
    assert list(search_space("toy", {}, {"precision": Choice(("fast", "accurate"))})) == ["precision", "weight", "size", "mode"]


@pytest.mark.parametrize(
    ("name", "fixed", "added", "message"),
    [
        ("toy", {}, {"weigth": Uniform(0, 1)}, "has no option 'weigth' to search"), ("toy", {"size": 3}, {"size": Uniform(1, 2)}, "given as 3"),
        ("dense", {}, {}, "nothing to tune; name an option and its limits with --search"),
    ],
    ids=["unknown", "given", "nothing"],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused(name: str, fixed: dict[str, Any], added: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        search_space(name, fixed, added)


def test_another_search_is_not_gone_on_with(tmp_path: Path) -> None:
    search(tmp_path / "run", 1, about={"tasks": "needle"})
    with pytest.raises(UnsupportedError, match="holds another search"):
        search(tmp_path / "run", 2, about={"tasks": "fewshot"})


@pytest.mark.parametrize(("trials", "margin"), [(0, 0.1), (1, -0.1), (1, 2.0)])
def test_numbers_outside_their_limits_are_refused(trials: int, margin: float, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"trials must be|the margin is"):
        search(tmp_path / "run", trials, margin)


def test_of_equally_fast_ones_the_best_and_a_margin_holds_but_for_rounding() -> None:
    rows = [{"score": s, "dense_score": 0.3, "time_share": t} for s, t in ((0.1, 0.5), (0.2, 0.5), (0.3, 1.0))]
    assert choose(rows, 0.3 - 0.1) is rows[1]
    assert choose(rows, 0.05) is rows[2]
    assert choose([], 0.1) is None


def test_what_is_to_be_searched_is_read_as_people_write_it() -> None:
    assert parse_search(["keep=0.1..0.9", "window = 16..128", "mode=mean|max", "size=-1..1e3"]) == {
        "keep": Uniform(0.1, 0.9), "window": Uniform(16, 128, is_integer=True), "mode": Choice(("mean", "max")), "size": Uniform(-1, 1000.0),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["keep", "keep=0.5", "keep=0.9..0.1", "keep=a..b", "=1..2", "keep=1...2", "keep=0..inf"])
def test_other_spellings_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match=r"such as keep=0.1..0.9"):
        parse_search([text])


def test_a_choice_that_is_no_value_is_told() -> None:
    with pytest.raises(OptionError, match=r"--search mode=\[\|b: cannot read one of the values of mode"):
        parse_search(["mode=[|b"])
