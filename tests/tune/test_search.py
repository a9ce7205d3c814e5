"""The search finds the optimum of a toy method, goes on after a kill, and the crossover is the length from which a gain stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from outsider import installed_toy

from accel import FlexPrefill, OptionError, Recipe, UnsupportedError, VFlowOpt, registry
from accel.crossover import NEVER_TOKENS
from accel.protocols import Choice, ModelInfo, Objective, Uniform
from accel.tune.crossover import LengthTimes, crossover_recipe, find_crossover, measure_crossover
from accel.tune.search import TuneResult, objective_named, tunable_options, tune

ROOT = Path(__file__).parents[2]

pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    with installed_toy(folder, monkeypatch):
        yield folder


def search(folder: Path, trials: int, **changes: Any) -> TuneResult:
    arguments = {"model": str(folder.parent / "calls.txt"), "data": None, "folder": folder, "show_progress": False, **changes}
    return tune("toy", objective_named("toy", None), trials=trials, **arguments)


def calls(folder: Path) -> list[str]:
    return (folder.parent / "calls.txt").read_text().splitlines()


def test_search_beats_the_defaults_and_writes_a_recipe_that_loads(tmp_path: Path) -> None:
    result = search(tmp_path / "run", 25)
    assert result.n_done == 25
    assert result.default_score == pytest.approx(-((0.9 - 0.25) ** 2) - 1)
    assert result.score > -0.05
    assert result.best.options()["mode"] == ("b", 1)
    recipe = Recipe.load(result.recipe)
    assert recipe.methods == (result.best,)
    assert "best of 25 trials" in recipe.note
    written = json.loads((tmp_path / "run" / "trials.json").read_text())
    assert written["score"] == result.score
    assert len(written["trials"]) == 25


def test_first_trial_is_the_method_with_its_defaults(tmp_path: Path) -> None:
    result = search(tmp_path / "run", 1)
    assert calls(tmp_path / "run") == ["0.9 4 ('a', 1)"]
    assert result.score == result.default_score
    assert result.best == registry.build("toy")


def test_killed_search_goes_on_where_it_stopped(tmp_path: Path, toy: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from accel.tune.search import tune, objective_named\n"
        "tune('toy', objective_named('toy', None), model=sys.argv[2], data=4, trials=10, folder=Path(sys.argv[1]), show_progress=False)"
    )
    paths = os.pathsep.join([str(ROOT), str(toy)])
    killed = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "calls.txt")], env={**os.environ, "PYTHONPATH": paths}, timeout=120
    )
    assert killed.returncode == 9, "the toy ends its process in the middle of the fourth trial"
    before = calls(folder)
    assert len(before) == 4
    assert not (folder / "recipe.yaml").exists()

    result = search(folder, 10)

    assert result.n_done == 10
    after = calls(folder)
    assert len(after) == 4 + 7, "three trials were kept, the fourth is repeated"
    assert after[4] == before[3]
    assert len(set(after)) == 10, "a resumed sampler does not draw its old numbers again"


def test_search_is_the_same_for_the_same_seed_and_after_a_kill(tmp_path: Path) -> None:
    def trials(folder: str, stops: list[int], seed: int = 0) -> list[Any]:
        """The trials that ended, where the process dies in the middle of those numbers."""
        dead: list[int] = []

        def score(method: Any, model: Any, data: Any) -> float:
            written.append(method)
            if len(written) in stops and len(written) not in dead:
                dead.append(len(written))
                raise KeyboardInterrupt
            return float(-((method.weight - 0.3) ** 2) - (method.mode != ("b", 1)))

        written: list[Any] = []
        arguments: Any = {"model": None, "data": None, "trials": 16, "folder": tmp_path / folder, "seed": seed, "show_progress": False}
        for _ in range(len(stops) + 1):
            try:
                tune("toy", Objective("close", score), **arguments)
            except KeyboardInterrupt:
                continue
        rows = json.loads((tmp_path / folder / "trials.json").read_text())["trials"]
        return [(row["score"], row["options"]) for row in rows if row["state"] == "complete"]

    whole = trials("whole", [])
    assert len(whole) == 16
    assert trials("again", []) == whole
    assert trials("killed", [3, 12]) == whole, "in the spread part and in the learning part"
    assert trials("other", [], seed=1)[1:] != whole[1:]


def test_defaults_outside_the_space_are_still_the_first_trial_and_can_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = registry.method_class("toy")
    monkeypatch.setattr(cls, "search_space", classmethod(lambda cls: {"weight": Uniform(0.0, 0.5), "mode": Choice((("b", 1),))}))
    goal = Objective("large", lambda method, model, data: method.weight)
    result = tune("toy", goal, model=None, data=None, trials=6, folder=tmp_path, show_progress=False)
    assert (result.score, result.default_score, result.n_done) == (0.9, 0.9, 6)
    assert result.best == registry.build("toy")
    assert Recipe.load(result.recipe).methods == (result.best,)
    first, *others = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert first["options"] == {"weight": 0.9, "mode": ["a", 1]}
    assert all(0 <= row["options"]["weight"] <= 0.5 for row in others)


def test_an_option_with_a_floor_never_falls_below_it_and_no_trial_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = registry.method_class("toy")
    space = {"weight": Uniform(0.0, 1.0), "size": Uniform(0, 100, is_integer=True, floor=lambda options: 100 * options["weight"])}
    monkeypatch.setattr(cls, "search_space", classmethod(lambda cls: space))
    tried: list[Any] = []

    def score(method: Any, model: Any, data: Any) -> float:
        tried.append(method)
        return float(-method.size)

    result = tune("toy", Objective("small", score), model=None, data=None, trials=20, folder=tmp_path, show_progress=False)
    assert tried[0] == registry.build("toy"), "weight 0.9 with size 4 lies below the floor: scored apart"
    assert all(100 * method.weight - 0.5 <= method.size <= 100 for method in tried[1:])
    assert result.n_done == 20
    assert min(method.size for method in tried[1:]) < 20 < 80 < max(method.size for method in tried[1:])
    assert result.best in tried
    rows = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert [row["options"]["size"] for row in rows[1:]] == [method.size for method in tried[1:]]


def test_finished_search_is_not_run_again(tmp_path: Path) -> None:
    first = search(tmp_path / "run", 3)
    second = search(tmp_path / "run", 3)
    assert len(calls(tmp_path / "run")) == 3
    assert second == first


@pytest.mark.parametrize("change", [{"about": {"model": "another"}}, {"fixed": {"size": 8}}, {"fixed": {"mode": ("b", 1)}}], ids=str)
def test_folder_of_another_search_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    search(tmp_path / "run", 1, about={"model": "one"})
    with pytest.raises(UnsupportedError, match="holds another search"):
        search(tmp_path / "run", 2, **{"about": {"model": "one"}, **change})


def test_given_options_are_kept_and_not_searched(tmp_path: Path) -> None:
    given = {"size": 9, "mode": ("b", 1)}
    result = search(tmp_path / "run", 4, fixed=given)
    assert {call.split(" ", 1)[1] for call in calls(tmp_path / "run")} == {"9 ('b', 1)"}
    assert result.best.options()["size"] == 9
    assert search(tmp_path / "run", 5, fixed=given).n_done == 5, "tuples come back from the study as lists and are still the same search"


def test_refused_options_count_as_failed_and_the_search_goes_on(tmp_path: Path) -> None:
    def only_small(method: Any, model: Any, data: Any) -> float:
        if method.weight > 0.5:
            raise OptionError("too large")
        return float(method.weight)

    result = tune("toy", Objective("small", only_small), model=None, data=None, trials=20, folder=tmp_path, show_progress=False)
    assert result.n_failed >= 1
    assert result.n_done + result.n_failed == 20
    assert result.default_score is None
    assert 0 < result.score <= 0.5
    tried = [str(trial["options"]) for trial in json.loads((tmp_path / "trials.json").read_text())["trials"]]
    assert len(set(tried)) == 20, "a refused point is not tried again"
    assert result.score > 0.4
    errors = {trial["error"] for trial in json.loads((tmp_path / "trials.json").read_text())["trials"]}
    assert errors == {None, "too large"}


def test_objective_to_be_made_small_is_made_small(tmp_path: Path) -> None:
    goal = Objective("weight", lambda method, model, data: method.weight, minimize=True)
    result = tune("toy", goal, model=None, data=None, trials=12, folder=tmp_path, show_progress=False)
    assert result.score == min(trial["score"] for trial in json.loads((tmp_path / "trials.json").read_text())["trials"])
    assert result.score < 0.9


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_search_without_a_single_score_is_an_error_with_the_reasons(value: float, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"none of 2 trials of toy succeeded(?s:.)*the score is {value}"):
        tune("toy", Objective("none", lambda *_: value), model=None, data=None, trials=2, folder=tmp_path, show_progress=False)


def test_mistake_in_an_objective_is_not_swallowed(tmp_path: Path) -> None:
    def broken(method: Any, model: Any, data: Any) -> float:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        tune("toy", Objective("broken", broken), model=None, data=None, trials=3, folder=tmp_path, show_progress=False)


def test_what_can_be_tuned_is_listed_for_people() -> None:
    assert tunable_options("toy") == [
        "weight: 0 to 1", "size: 1 to 64, whole numbers, logarithmic", "mode: one of ('a', 1), ('b', 1)",
    ]  # fmt: skip
    with pytest.raises(OptionError, match="toy is tuned for one of: closeness; got 'speed'"):
        objective_named("toy", "speed")
    with pytest.raises(OptionError, match="dense has no objective to tune for; `accel tune crossover`"):
        objective_named("dense", None)
    assert objective_named("vflowopt", None).name == objective_named("random_tokens", "information_flow").name == "information_flow"


def test_method_with_nothing_to_tune_and_no_trials_are_refused(tmp_path: Path) -> None:
    goal = Objective("any", lambda *_: 0.0)
    with pytest.raises(OptionError, match="dense has nothing to tune"):
        tune("dense", goal, model=None, data=None, trials=1, folder=tmp_path)
    with pytest.raises(OptionError, match="trials must be at least 1"):
        tune("toy", goal, model=None, data=None, trials=0, folder=tmp_path)


# --- token pruning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.5, 0.8, 1.0])
def test_every_point_of_the_search_spends_the_same_budget(keep: float, tmp_path: Path) -> None:
    models = [ModelInfo("any", n, 4, 4, 16, ("full_attention",) * n, "cpu", "float32", has_vision=True) for n in (4, 5, 8, 28, 32)]
    tried: list[VFlowOpt] = []

    def score(method: Any, model: Any, data: Any) -> float:
        tried.append(method)
        for info in models:
            assert method.bind(info).average_share(info.n_layers) == pytest.approx(keep)
        # pulls the search to the corner with the most tokens in front
        return float(method.r1_factor + method.r2)

    goal = Objective("budget", score)
    result = tune("vflowopt", goal, model=None, data=None, trials=12, folder=tmp_path, fixed={"keep": keep, "alpha": 0.0}, show_progress=False)
    assert (result.n_done, result.n_failed) == (12, 0)
    assert tried[0] == VFlowOpt(keep=keep)
    assert {method.alpha for method in tried} == {0.0}
    assert len({method.r1_factor for method in tried}) > 5
    assert keep > 0.8 or len({method.r2 for method in tried}) > 5


def test_released_strategies_lie_in_the_space() -> None:
    floor = VFlowOpt.search_space()["r2"].floor     # type: ignore[union-attr]
    assert floor is not None
    for keep in (0.5, 0.25, 0.1):
        method = VFlowOpt.released(keep)
        assert floor({**method.options(), "r3": None}) <= method.r2
        assert floor(method.options()) == 0, "with r3 given the budget has no say"


# --- crossover ----------------------------------------------------------------------------------------------------------------


def row(tokens: int, stock: float, gemm: float, sparse_calls: int = 1) -> LengthTimes:
    return LengthTimes(tokens, {}, {"dense (sdpa)": stock, "dense (accel)": gemm}, sparse_calls)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(1024, 0.9, 0.8), row(2048, 1.5, 1.1), row(4096, 2.0, 1.4)], 2048),
        ([row(4096, 2.0, 1.4), row(1024, 0.9, 0.8), row(2048, 1.5, 1.1)], 2048),
        ([row(1024, 1.5, 1.2), row(2048, 1.5, 0.9), row(4096, 2.0, 1.4)], 4096),
        ([row(1024, 2.0, 0.9), row(2048, 2.5, 0.99)], None),
        ([row(1024, 1.01, 1.01)], None),
        ([row(1024, 1.5, 1.5, sparse_calls=0), row(2048, 1.5, 1.5)], 2048),
        ([row(1024, 1.5, 1.5), row(2048, 1.5, 1.5, sparse_calls=0)], None),
        ([row(1024, float("nan"), 1.5)], None),
    ],
    ids=["from_2k", "any_order", "gain_must_stay", "only_faster_than_stock", "within_noise", "ran_dense_at_1k", "ran_dense_at_last", "nan"],
)
def test_crossover_is_the_length_from_which_it_stays_faster_than_the_best_dense(rows: list[LengthTimes], expected: int | None) -> None:
    assert find_crossover(rows) == expected


def test_recipe_holds_the_crossover_and_says_so_where_sparse_never_pays() -> None:
    pays = crossover_recipe(FlexPrefill(gamma=0.9), [row(1024, 0.5, 0.5), row(2048, 2, 2)], where="model")
    assert pays.methods == (FlexPrefill(gamma=0.9, min_seq_len=2048),)
    assert "at 2048 tokens, the longest measured (model)" in pays.note
    never = crossover_recipe(FlexPrefill(), [row(1024, 0.5, 0.5), row(2048, 2, 0.9)], where="model")
    assert never.methods == (FlexPrefill(min_seq_len=NEVER_TOKENS),)
    assert "never faster than the best dense attention up to 2048 tokens" in never.note


def test_measurement_covers_every_length_once_in_rising_order_with_both_baselines() -> None:
    import torch
    from support import tiny_llama

    model = tiny_llama()
    ids = torch.arange(96).reshape(1, 96) % model.config.vocab_size
    method = FlexPrefill(min_seq_len=10**6, block_size=16, min_budget=16)
    times = measure_crossover(model, ids, method, [96, 64, 64], repeats=2, show_progress=False)
    assert [row.tokens for row in times] == [64, 96]
    for row in times:
        assert set(row.speedup) == set(row.ms) - {"flexprefill"}
        assert len(row.speedup) == 2
        assert row.sparse_calls == model.config.num_hidden_layers, "min_seq_len of the method is set aside while measuring"


def test_a_method_whose_options_leave_these_lengths_dense_is_told_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from support import tiny_llama

    monkeypatch.setattr("accel.evals.latency.measure_ttft", None)
    with pytest.raises(UnsupportedError, match=r"flexprefill runs dense at every length up to 64 tokens \(shorter than 1025 tokens\)"):
        measure_crossover(tiny_llama(), torch.ones(1, 64, dtype=torch.long), FlexPrefill(), [32, 64], show_progress=False)


def test_method_that_always_runs_dense_has_no_crossover() -> None:
    import torch
    from support import tiny_llama

    with pytest.raises(UnsupportedError, match=r"dense runs dense at every length up to \d+ tokens \(.+\)"):
        measure_crossover(tiny_llama(), torch.ones(1, 32, dtype=torch.long), registry.build("dense"), [32], repeats=1, show_progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [[], [0], [8, 17]], ids=["none", "zero", "beyond_the_text"])
def test_lengths_outside_the_text_are_refused(lengths: list[int]) -> None:
    import torch

    with pytest.raises(OptionError, match="between 1 and 16"):
        measure_crossover(None, torch.zeros(1, 16, dtype=torch.long), FlexPrefill(), lengths, show_progress=False)
