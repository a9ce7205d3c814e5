"""DyVTE: routers and what they read, the batch rule, options, files of routers, and their training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_contexts import INFO
from routers import linear_router
from torch import Tensor

import accel
from accel import Recipe
from accel.errors import OptionError, UnsupportedError
from accel.patches import _dyvte_table, _dyvte_training
from accel.patches._dyvte_training import RouterTraining
from accel.patches._routers import Router, RouterHeader, load_routers, read_header, save_routers, text_feature
from accel.patches.dyvte import DyVTE
from accel.protocols import Keep, ModelInfo, PruningContext, Stage, Unit

D = INFO.hidden_size
MODEL = replace(INFO, fingerprint=lambda: "abc")
HEADER = RouterHeader("toy", "abc", INFO.n_layers, 8, 2, (3, 5, 7), 0.5, 1.03, 1e-6, "made up")


def rows_of(*rows: str) -> tuple[Tensor, Tensor, Tensor]:
    """is_text, is_visual, is_structural from words such as "pptVVsVt": padding, text, visual, structural."""
    return tuple(torch.tensor([[letter in kind for letter in row] for row in rows]) for kind in ("t", "V", "s"))  # type: ignore[return-value]


# --- what a router reads ------------------------------------------------------------------------------------------------------


def test_router_golden_vector() -> None:
    states = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, -1.0], [0.5, 0.5]]])
    is_text, is_visual, _ = rows_of("Vttt")
    feature = text_feature(states, is_text, is_visual)
    torch.testing.assert_close(feature, torch.tensor([[2.0, 0.5, 0.5, 0.5]]))
    router = Router(
        torch.tensor([[1, 0, -1, 0.5], [0, 1, 0.5, -1], [0.5, 0.5, 0.5, 0.5]]), torch.tensor([[1, -1, 0.5], [-0.5, 1, 0.25]])
    )
    logits = router.logits(feature)
    torch.testing.assert_close(logits, torch.tensor([[2.370168, -0.270298]]), atol=2e-6, rtol=0)
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.933421, 0.066579]]), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("row", "mean", "last"),
    [
        ("tVVttt", (3, 4), 5), ("tVtVtt", (4,), 5), ("tVVsVt", (0,), 5), ("VVVVVt", (), 5), ("tttVVV", (0, 1), 2), ("pptVtt", (4,), 5),
        ("tttttt", (0, 1, 2, 3, 4), 5), ("tVVttp", (3,), 4), ("ptVVVV", (), 1), ("tVVstt", (4,), 5),
    ],
    ids=["usual", "two pictures", "one token behind", "one token at all", "nothing behind", "padding in front", "no picture", "padding behind",
         "one in front", "structural last"],
)  # fmt: skip
def test_text_is_that_behind_the_last_visual_token(row: str, mean: tuple[int, ...], last: int) -> None:
    states = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    is_text, is_visual, is_structural = rows_of(row)
    # whatever stands in padding and in the picture must not matter
    states[~is_text] = torch.nan
    own = states[0, last]
    want = torch.cat([states[0, list(mean)].mean(0) if mean else own, own])
    torch.testing.assert_close(text_feature(states, is_text, is_visual | is_structural)[0], want)


def test_a_sequence_of_nothing_gives_zeros() -> None:
    is_text, is_visual, _ = rows_of("pppp")
    assert torch.equal(text_feature(torch.full((1, 4, 3), torch.nan), is_text, is_visual), torch.zeros(1, 6))


def test_a_sequence_reads_the_same_in_any_batch() -> None:
    states = torch.randn(2, 8, 4, dtype=torch.bfloat16)
    is_text, is_visual, _ = rows_of("tVVVtttt", "pptVVttt")
    together = text_feature(states, is_text, is_visual)
    assert together.dtype == torch.float32
    for b in range(2):
        torch.testing.assert_close(text_feature(states[b : b + 1], is_text[b : b + 1], is_visual[b : b + 1])[0], together[b])


# --- the batch rule -----------------------------------------------------------------------------------------------------------


def bound(tmp_path: Path, routers: dict[int, Router], **options: Any) -> DyVTE:
    header = replace(HEADER, candidate_layers=tuple(routers))
    return DyVTE(routers=str(save_routers(tmp_path / "r.safetensors", routers, header)), **options).bind(MODEL)


def batch(*rows: str, stage: int, values: list[float], state: dict[str, Any]) -> PruningContext:
    """A context before layer `stage`; the text of sequence b holds the number values[b] throughout."""
    is_text, is_visual, is_structural = rows_of(*rows)
    features = torch.tensor(values)[:, None, None].expand(-1, is_text.shape[1], 8).clone()
    units = [Unit(b, row.count("V"), 1, row.count("V"), n_structural=row.count("s")) for b, row in enumerate(rows) if "V" in row]
    minus = torch.full(is_text.shape, -1)
    return PruningContext(
        Stage("layer", stage), units, features, is_visual=is_visual, is_structural=is_structural, is_text=is_text, unit=minus,
        place=minus[..., None].expand(-1, -1, 3), observed={}, state=state,
    )  # fmt: skip


def above(number: float) -> Router:
    """Fires where the text's number lies above 0 (number 1) or below (−1)."""
    return linear_router(torch.full((16,), number))


ROWS = ("tVVstt", "pVVttt", "tttttt")


def test_sequences_that_leave_are_hidden_until_the_last_one_does(tmp_path: Path) -> None:
    method = bound(tmp_path, {3: above(1), 5: above(-1)})
    assert method.stages(MODEL) == [Stage("layer", n, needs_learned_choice=True) for n in (4, 6)]
    state: dict[str, Any] = {}
    # the row without a picture would fire, and must not
    first = method.select(batch(*ROWS, stage=4, values=[2, -2, 2], state=state))
    assert isinstance(first, Keep)
    assert first.index[first.ok].tolist() == [1, 2, 3, 1, 2]
    assert first.hidden is not None
    assert first.hidden.tolist() == [[letter in "Vs" for letter in ROWS[0]], [False] * 6, [False] * 6]
    # the first row's router has changed its mind, which no longer counts
    second = method.select(batch(*ROWS, stage=6, values=[2, -2, 2], state=state))
    assert isinstance(second, Keep)
    assert second.hidden is None
    assert second.index.shape == (3, 0)


def test_ragged_sequences_are_dropped_at_once(tmp_path: Path) -> None:
    method = bound(tmp_path, {3: above(1), 5: above(-1)}, batch_mode="ragged")
    state: dict[str, Any] = {}
    first = method.select(batch(*ROWS, stage=4, values=[2, -2, 2], state=state))
    assert isinstance(first, Keep)
    assert first.hidden is None
    assert first.ok.sum(1).tolist() == [0, 2, 0]
    second = method.select(batch("tppptt", *ROWS[1:], stage=6, values=[2, -2, 2], state=state))
    assert isinstance(second, Keep)
    assert second.index.shape == (3, 0)


def test_nothing_is_answered_where_nobody_new_leaves(tmp_path: Path) -> None:
    method = bound(tmp_path, {3: above(1), 5: above(1)})
    state: dict[str, Any] = {}
    assert method.select(batch(*ROWS, stage=4, values=[-2, -2, 2], state={})) is None
    assert method.select(batch(*ROWS, stage=4, values=[2, -2, 2], state=state)) is not None
    assert method.select(batch(*ROWS, stage=6, values=[2, -2, 2], state=state)) is None
    assert method.select(batch("tttt", "tttt", stage=4, values=[2, 2], state={})) is None
    assert DyVTE(exit_layer=3).select(batch("tttt", stage=4, values=[2], state={})) is None


@pytest.mark.parametrize(("threshold", "fires"), [(0.0, True), (0.5, True), (0.9, True), (0.99, False), (1.0, False)])
def test_a_router_fires_above_the_threshold(threshold: float, fires: bool, tmp_path: Path) -> None:
    # exit logit 3 above the other: 0.953
    method = bound(tmp_path, {3: linear_router(torch.full((16,), 3 / 16))}, threshold=threshold)
    assert (method.select(batch("tVtt", stage=4, values=[1.0], state={})) is not None) is fires


def test_the_threshold_is_that_of_the_file_unless_given(tmp_path: Path) -> None:
    routers = {3: linear_router(torch.full((16,), 3 / 16))}
    path = str(save_routers(tmp_path / "r.safetensors", routers, replace(HEADER, candidate_layers=(3,), threshold=0.97)))
    for method, fires in ((DyVTE(routers=path), False), (DyVTE(routers=path, threshold=0.5), True)):
        assert (method.bind(MODEL).select(batch("tVtt", stage=4, values=[1.0], state={})) is not None) is fires


# --- fixed exits, options -----------------------------------------------------------------------------------------------------


def test_a_fixed_exit_drops_everything_behind_its_layer() -> None:
    method = DyVTE(exit_layer=5)
    assert method.bind(MODEL) is method
    [stage] = method.stages(MODEL)
    assert stage == Stage("layer", 6, is_known_ahead=True)
    ctx = batch("tVVst", stage=6, values=[0], state={})
    keep = method.select(replace(ctx, features=torch.zeros(1, 5, 0), is_text=torch.zeros_like(ctx.is_text)))
    assert keep is not None
    assert keep.index.shape == (1, 0)
    assert method.count(stage, ctx.units) == [0]
    assert [DyVTE(exit_layer=n).stages(MODEL) for n in (11, 12, 99)] == [[], [], []]
    assert DyVTE(exit_layer=10).stages(MODEL) != []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exit_layer": -1}, "exit_layer must be None or a whole number of at least 0"), ({"exit_layer": 1.5}, "exit_layer"),
        ({"exit_layer": True}, "exit_layer"), ({"exit_layer": 3, "routers": "r"}, "fixed exit, which has no routers"),
        ({"exit_layer": 3, "threshold": 0.5, "candidate_layers": [3]}, "no threshold and no candidate_layers"), ({"routers": 3}, "path of a file"),
        ({"routers": "r", "threshold": 1.5}, r"threshold must be a number in \[0, 1\]"), ({"routers": "r", "threshold": "a"}, "threshold"),
        ({"routers": "r", "candidate_layers": []}, "candidate_layers"), ({"routers": "r", "candidate_layers": [1, -1]}, "candidate_layers"),
        ({"routers": "r", "candidate_layers": 3}, "candidate_layers"), ({"batch_mode": "mask"}, "batch_mode must be one of mask_then_drop, ragged"),
        ({"allow_other_model": 1}, "allow_other_model must be true or false"), ({"position_mode": "both"}, "position_mode"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"dyvte: .*{message}"):
        DyVTE(**options)


def test_without_routers_and_without_a_layer_it_says_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match=r"give exit_layer=N.*routers=FILE.*accel tune dyvte"):
        DyVTE().bind(MODEL)


def test_candidate_layers_come_in_order_and_hashable() -> None:
    method = DyVTE(routers="r", candidate_layers=[7, 3, 3])    # type: ignore[arg-type]
    assert method.candidate_layers == (3, 7)
    assert hash(method)


def test_an_early_exit_is_pointed_out() -> None:
    assert "before the layers that fuse text and picture" in (DyVTE(exit_layer=2).notice(MODEL) or "")
    assert DyVTE(exit_layer=3).notice(MODEL) is None
    assert DyVTE(exit_layer=0).notice(replace(MODEL, n_layers=3)) is None
    assert DyVTE().notice(MODEL) is None


# --- files --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    routers = {layer: above(1) for layer in (3, 5, 7)}
    return save_routers(tmp_path / "routers.safetensors", routers, HEADER)


def test_a_file_comes_back_as_it_was_written(file: Path) -> None:
    assert read_header(file) == HEADER
    routers = load_routers(file)
    assert list(routers) == [3, 5, 7]
    assert torch.equal(routers[5].w1, above(1).w1)
    assert routers[5].w1.dtype == torch.float32
    assert list(load_routers(file, (5,))) == [5]


def test_only_the_candidates_asked_for_are_stages(file: Path) -> None:
    stages = DyVTE(routers=str(file), candidate_layers=(5,)).bind(MODEL).stages(MODEL)
    assert [stage.layer for stage in stages] == [6]
    with pytest.raises(OptionError, match=r"holds routers of layers 3, 5, 7, asked for 4"):
        DyVTE(routers=str(file), candidate_layers=(4, 5)).bind(MODEL)


def test_what_is_no_file_of_routers_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    for name, message in (("gone", "cannot read routers"), ("text", "cannot read routers"), ("other", "holds no routers of this version")):
        with pytest.raises(OptionError, match=message):
            DyVTE(routers=str(tmp_path / name)).bind(MODEL)
    broken = save_routers(tmp_path / "broken", {3: above(1)}, replace(HEADER, candidate_layers=(3,), router_hidden=5))
    with pytest.raises(OptionError, match=r"layer 3 has shapes .* expected \(\(5, 16\), \(2, 5\)\)"):
        DyVTE(routers=str(broken)).bind(MODEL)


@pytest.mark.parametrize(
    "changes, message",
    [({"n_layers": 16}, "with layers 12, this llava model has 16"), ({"hidden_size": 4096}, "hidden size 8, .* has 4096"),
     ({"hidden_size": None}, "does not say the hidden size")],
)  # fmt: skip
def test_routers_of_another_size_are_refused(changes: dict[str, Any], message: str, file: Path) -> None:
    model: ModelInfo = replace(MODEL, **changes)
    for method in (DyVTE(routers=str(file)), DyVTE(routers=str(file), allow_other_model=True)):
        with pytest.raises(UnsupportedError, match=message):
            method.bind(model)


def test_routers_of_other_weights_are_refused_unless_wanted(file: Path) -> None:
    other = replace(MODEL, fingerprint=lambda: "def")
    with pytest.raises(UnsupportedError, match=r"trained for toy \(weights abc\), this llava model has weights def.*allow_other_model=True"):
        DyVTE(routers=str(file)).bind(other)
    wanted = DyVTE(routers=str(file), allow_other_model=True)
    assert wanted.bind(other).stages(other) != []
    assert wanted.notice(other) == "these routers were trained for toy, not for this model"
    assert wanted.notice(MODEL) is None
    assert DyVTE(routers=str(file)).notice(MODEL) is None


def test_compact_positions_are_refused_where_they_have_axes(file: Path) -> None:
    method = DyVTE(exit_layer=3, position_mode="compact")
    assert "compact" in method.supports(replace(MODEL, has_multimodal_rope=True), "transformers", [])[0]


def test_a_recipe_names_routers_by_their_place_beside_it(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.of(DyVTE(routers=str(file), threshold=0.7))
    written = recipe.save(tmp_path / "recipe.yaml")
    assert "routers: routers.safetensors" in written.read_text()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    monkeypatch.chdir("/")
    [method] = Recipe.load(moved / "recipe.yaml").methods
    assert isinstance(method, DyVTE)
    assert method.routers == str(moved / "routers.safetensors")
    assert len(method.bind(MODEL).stages(MODEL)) == 3
    # of another folder: by its whole path, and an absolute path stays what it is
    elsewhere = Recipe.of(method).save(moved / "sub" / "recipe.json")
    assert str(moved / "routers.safetensors") in elsewhere.read_text()
    assert Recipe.load(elsewhere) == Recipe.of(method)


# --- training -----------------------------------------------------------------------------------------------------------------


def test_labels_demand_the_same_answer_and_nearly_its_certainty() -> None:
    yes, no = torch.tensor(True), torch.tensor(False)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    label = _dyvte_table.exit_labels
    assert label(yes, one, one, 1.03)
    assert label(yes, zero, zero, 1.03)
    assert label(yes, torch.tensor(1.0299), one, 1.03)
    assert label(yes, torch.tensor(0.5), one, 1.03)
    assert not label(yes, torch.tensor(1.04), one, 1.03)
    assert not label(yes, torch.tensor(1e-3), zero, 1.03)
    assert not label(no, zero, one, 1.03)
    assert label(yes, torch.tensor(1e-3), zero, 1.03, 0.01)
    assert not label(no, torch.tensor(1e-3), zero, 1.03, 0.01)


def separable(n: int = 400, layers: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    feature = 30 * torch.randn(n, layers, 16, generator=draw)
    labels = torch.stack([feature[:, 0, 3] > 10, feature[:, 1, 5] + feature[:, 1, 2] < 0], 1)
    return feature, labels, _dyvte_training.held_out_rows(n, 0.25, 0)


def test_one_step_reduces_the_loss_on_a_table() -> None:
    feature, labels, _ = separable()
    for i, layer in enumerate(feature.unbind(1)):
        w1, w2 = (w.requires_grad_() for w in _dyvte_training.new_routers(1, 8, 16, seed=i))
        router = _dyvte_training.Trained(w1, w2, torch.zeros(1))
        optimizer = torch.optim.AdamW([w1, w2], lr=1e-3, weight_decay=0)
        losses = []
        for _ in range(2):
            loss = _dyvte_training.loss_of(router.logits(layer[:, None]), labels[:, i : i + 1].long()).sum()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[1] < losses[0]


def test_routers_learn_what_can_be_told_apart_and_each_for_itself() -> None:
    feature, labels, is_held_out = separable()
    training = RouterTraining(max_epochs=60, learning_rate=3e-3, batch=32)
    found = _dyvte_training.fit(feature, labels, is_held_out, training, hidden=16, seed=0)
    fires = found.logits(feature[is_held_out]).argmax(-1) == 1
    assert (_dyvte_training.balanced_accuracy(fires, labels[is_held_out]) > 0.85).all()
    torch.testing.assert_close(found.router(1).logits(feature[:, 1]), found.logits(feature)[:, 1])
    again = _dyvte_training.fit(feature, labels, is_held_out, training, hidden=16, seed=0)
    assert torch.equal(again.w1, found.w1)
    other = _dyvte_training.fit(feature, labels, is_held_out, training, hidden=16, seed=1)
    assert not torch.equal(other.w1, found.w1)


def test_early_stopping_keeps_the_best_epoch_of_each_layer() -> None:
    feature, labels, is_held_out = separable()
    one = _dyvte_training.fit(feature, labels, is_held_out, RouterTraining(max_epochs=1), hidden=4, seed=0)
    assert one.epoch.tolist() == [1, 1]
    found = _dyvte_training.fit(feature, labels, is_held_out, RouterTraining(max_epochs=40, patience=3), hidden=4, seed=0)
    stopped = _dyvte_training.fit(feature, labels, is_held_out, RouterTraining(max_epochs=int(found.epoch.max()), patience=40), hidden=4, seed=0)
    assert torch.equal(stopped.w1, found.w1)


def test_balanced_accuracy_of_a_single_class_is_that_of_the_class() -> None:
    fires = torch.tensor([[True, True], [False, True], [False, True], [False, True]])
    labels = torch.tensor([[True, True], [True, True], [False, True], [False, True]])
    assert _dyvte_training.balanced_accuracy(fires, labels).tolist() == [0.75, 1.0]


def test_the_threshold_is_the_lowest_from_which_on_enough_answers_stay() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.6, 0.95], [0.3, 0.7], [0.2, 0.2]])
    agrees = torch.tensor([[True, True], [False, True], [False, True], [False, False]])
    exit_of, calibrate = _dyvte_training.exit_of, _dyvte_training.calibrate
    assert exit_of(shares, 0.5).tolist() == [0, 0, 1, -1]
    assert _dyvte_training.agreement(exit_of(shares, 0.5), agrees) == 0.75
    # from 0.6 on the second question waits for the second layer
    assert calibrate(shares, agrees, 1.0) == 0.6
    assert calibrate(shares, agrees, 0.75) == 0.3
    assert calibrate(shares, torch.zeros_like(agrees), 1.0) == 0.95
    # surest where it is wrong: nothing short of never
    assert calibrate(torch.tensor([[1.0]]), torch.tensor([[False]]), 0.99) == 1.0


# --- training on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_vlm() -> Any:
    pytest.importorskip("PIL")
    from accel.evals.models import load_model

    return load_model("small-vlm")


TRAINING = RouterTraining(n_questions=12, max_epochs=3)


def test_training_leaves_routers_a_recipe_and_a_report_and_the_model_alone(small_vlm: Any, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in small_vlm.model.state_dict().items()}
    calibration = DyVTE.calibration()
    assert calibration is not None
    method = calibration.run(
        small_vlm, "scenes", tmp_path, fixed={"candidate_layers": (5, 6), "batch_mode": "ragged"}, seed=0, show_progress=False, training=TRAINING
    )
    after = small_vlm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in small_vlm.model.parameters())
    assert Recipe.load(tmp_path / "recipe.yaml").methods == (method,)
    assert isinstance(method, DyVTE)
    assert method.batch_mode == "ragged"
    header = read_header(tmp_path / "routers.safetensors")
    assert (header.model, header.n_layers, header.hidden_size, header.router_hidden) == ("small-vlm", 8, 128, 64)
    assert header.candidate_layers == (5, 6)
    report = json.loads((tmp_path / "routers.json").read_text())
    assert report["fingerprint"] == header.fingerprint
    assert report["threshold"] == header.threshold
    assert [row["layer"] for row in report["layers"]] == [5, 6]
    assert {"exit_share", "accuracy_on_keep", "accuracy_on_exit"} <= set(report["layers"][0])
    with accel.apply(small_vlm.model, method):
        assert list(small_vlm.model.state_dict()) == list(before)


def test_training_goes_on_where_it_was_killed_and_ends_the_same(small_vlm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dyvte_table, "CHUNK", 4)
    real, calls = _dyvte_table.measure, []

    def measure(loaded: Any, asked: Any, layers: Any) -> Any:
        calls.append(len(asked))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(loaded, asked, layers)

    def train(folder: Path, seed: int = 0) -> DyVTE:
        fixed = {"candidate_layers": (5,)}
        return _dyvte_training.train_routers(small_vlm, "scenes", folder, fixed=fixed, seed=seed, show_progress=False, training=TRAINING)

    whole = load_routers(train(tmp_path / "whole").routers or "")
    monkeypatch.setattr(_dyvte_table, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    again = load_routers(train(tmp_path / "cut").routers or "")
    assert len(calls) == 4, "one chunk was there already"
    assert torch.equal(again[5].w1, whole[5].w1)
    train(tmp_path / "cut")
    assert len(calls) == 4


def test_a_folder_of_another_table_is_refused(small_vlm: Any, tmp_path: Path) -> None:
    asked = _dyvte_table.questions("scenes", 2, 0)
    make = _dyvte_table.make_table
    make(small_vlm, asked, (6,), tmp_path, about={"model": "a"}, show_progress=False)
    with pytest.raises(UnsupportedError, match=r"holds another table.*(?s:.*)candidate_layers: \[6\] there, \[5\] asked"):
        make(small_vlm, asked, (5,), tmp_path, about={"model": "a"}, show_progress=False)


def test_a_table_holds_what_a_router_is_given_and_what_an_exit_does(small_vlm: Any) -> None:
    from accel.evals.pictures.questions import inputs_of, prompt_of

    asked = _dyvte_table.questions("scenes", 6, 0)
    found = _dyvte_table.measure(small_vlm, asked, (1, 6))
    inputs = inputs_of(small_vlm, asked[0].picture(), prompt_of(small_vlm, asked[0].text))
    with torch.no_grad():
        states = small_vlm.model(**inputs, output_hidden_states=True).hidden_states
    own = states[7][0, 1 + 144 :]
    torch.testing.assert_close(found["feature"][0, 1].float(), torch.cat([own[:-1].mean(0), own[-1]]), rtol=2e-3, atol=2e-3)
    # the model reads pictures: right behind the second layer almost nothing is known, behind the last but one everything
    assert found["agrees"][:, 1].sum() > found["agrees"][:, 0].sum()
    assert (found["loss"][:, 0] > found["full_loss"]).any()


def test_users_bring_their_own_questions(small_vlm: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from accel.evals.scenes import held_out

    rows = []
    for item in held_out("color", "train", 3):
        image.fromarray(item.scene.image).save(tmp_path / f"{item.index}.png")
        rows.append({"image": f"{item.index}.png", "text": item.question.text, "answer": item.question.answer})
    data = tmp_path / "asked.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = _dyvte_table.questions(str(data), None, 0)
    assert [(q.text, q.answer) for q in found] == [(row["text"], row["answer"]) for row in rows]
    assert _dyvte_table.questions(data, 2, 0) != _dyvte_table.questions(data, 2, 3)
    agrees = _dyvte_table.measure(small_vlm, found, (6,))["agrees"]
    assert agrees.shape == (3, 1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1 is not JSON"), ('{"image": "a.png", "text": "what?"}', "expected .*answer"), ("[]", "expected"),
        ('{"image": "a.png", "text": "what?", "answer": " "}', "expected"), ('{"image": "a.png", "text": "what?", "answer": "it"}', "no picture"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    data.write_text(line)
    with pytest.raises(OptionError, match=message):
        _dyvte_table.questions(str(data), None, 0)


@pytest.mark.parametrize("data", [None, "gone", "gone.jsonl", 3])
def test_data_that_is_not_there_says_what_is_wanted(data: Any) -> None:
    with pytest.raises(OptionError, match=r"no questions to train on.*--data scenes"):
        _dyvte_table.questions(data, None, 0)


@pytest.mark.parametrize(
    "fixed, message",
    [
        ({"exit_layer": 3}, "leave out exit_layer"), ({"routers": "r"}, "leave out routers"),
        ({"candidate_layers": (7,)}, "before the last of 8 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(small_vlm: Any, fixed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        _dyvte_training.train_routers(small_vlm, "scenes", tmp_path, fixed=fixed, training=TRAINING)


def test_text_models_are_refused(tmp_path: Path) -> None:
    from accel.evals.models import LoadedModel

    with pytest.raises(OptionError, match="cannot be asked about pictures"):
        _dyvte_training.train_routers(LoadedModel(None, None, "tiny"), "scenes", tmp_path)


def test_routers_that_never_saw_an_exit_are_left_out() -> None:
    feature, labels, _ = separable(100)
    agrees = torch.stack([torch.zeros(100, dtype=torch.bool), labels[:, 1]], 1)
    table = _dyvte_table.Table((2, 4), feature, agrees, torch.zeros(100, 2), torch.zeros(100))
    found = _dyvte_training._fit(table, RouterTraining(max_epochs=2), 8, 0, device=torch.device("cpu"), show_progress=False)
    assert list(found["routers"]) == [4]
    assert [row["is_used"] for row in found["report"]["layers"]] == [False, True]
    never = replace(table, agrees=torch.zeros_like(agrees))
    with pytest.raises(UnsupportedError, match="nothing to learn"):
        _dyvte_training._fit(never, RouterTraining(max_epochs=2), 8, 0, device=torch.device("cpu"), show_progress=False)


def test_the_fingerprint_knows_the_weights_and_not_their_dtype(small_vlm: Any) -> None:
    import copy

    from accel.patching import host_for

    def fingerprint(model: Any) -> str:
        found = host_for(model).describe(model).fingerprint
        assert found is not None
        return found()

    own = fingerprint(small_vlm.model)
    other = copy.deepcopy(small_vlm.model)
    # what a version of transformers adds to a configuration is none of the weights
    other.config.text_config.attention_dropout = 0.1
    for dtype in (torch.bfloat16, torch.float16):
        assert fingerprint(copy.deepcopy(other).to(dtype)) == own
    with torch.no_grad():
        # what is not exact in either half type: rounding once and rounding twice give different values
        for weight in other.parameters():
            weight.mul_(1 + 2**-9 + 2**-12)
    exact = fingerprint(other)
    for dtype in (torch.bfloat16, torch.float16):
        assert fingerprint(copy.deepcopy(other).to(dtype)) == exact
    with torch.no_grad():
        other.lm_head.weight[-1] *= -1
    assert fingerprint(other) != own
