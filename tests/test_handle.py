"""The undo log: everything comes back, in reverse order, whatever happens in between."""

from __future__ import annotations

import types

import pytest
import torch

import accel
from accel.handle import Handle


@pytest.fixture
def handle() -> Handle:
    return Handle([], "nowhere")


def test_undo_restores_the_same_object_and_removes_what_was_new(handle: Handle) -> None:
    original = object()
    owner = types.SimpleNamespace(present=original)
    handle.set_attr(owner, "present", 1)
    handle.set_attr(owner, "absent", 2)
    handle.undo()
    assert owner.present is original
    assert not hasattr(owner, "absent")


def test_two_changes_of_one_attribute_are_undone_newest_first(handle: Handle) -> None:
    owner = types.SimpleNamespace(x="first")
    handle.set_attr(owner, "x", "second")
    handle.set_attr(owner, "x", "third")
    handle.undo()
    assert owner.x == "first"


def test_an_attribute_shadowing_a_class_attribute_is_removed_not_copied(handle: Handle) -> None:
    class Owner:
        x = "of the class"

    owner = Owner()
    handle.set_attr(owner, "x", "of the instance")
    handle.undo()
    assert "x" not in vars(owner)
    assert owner.x == "of the class"


def test_a_failing_step_does_not_keep_the_others_from_running(handle: Handle) -> None:
    owner = types.SimpleNamespace(x=1)
    handle.set_attr(owner, "x", 2)

    def fail() -> None:
        raise RuntimeError("cannot restore")

    handle.on_undo(fail)
    with pytest.raises(ExceptionGroup, match="could not restore"):
        handle.undo()
    assert owner.x == 1
    handle.undo()  # nothing is left to fail


def test_pausing_switches_off_and_on_also_after_an_error(handle: Handle) -> None:
    switched: list[bool] = []
    handle.on_pause(switched.append)
    with pytest.raises(KeyError), handle.paused():
        raise KeyError
    assert switched == [False, True]


def test_nested_pauses_end_with_the_outermost_one(handle: Handle) -> None:
    switched: list[bool] = []
    handle.on_pause(switched.append)
    with handle.paused():
        with handle.paused():
            pass
        assert not any(switched)
    assert switched[-1]


def test_report_groups_skipped_layers_and_counts_calls(handle: Handle) -> None:
    handle.patched_layers = [1, 2, 4]
    handle.skipped_layers = {0: "sliding window", 3: "sliding window"}
    handle.stats.layer(1).sparse_calls = 2
    handle.stats.layer(1).active_tiles, handle.stats.layer(1).causal_tiles = 1, 4
    handle.stats.layer(2).dense_calls["decode"] = 7
    report = handle.report()
    assert "3 of 5 layers" in report
    assert "skipped 0, 3: sliding window" in report
    assert "2 sparse (density 0.25)" in report
    assert "7 dense (decode)" in report


def test_report_names_layers_that_keep_reading_everything(handle: Handle) -> None:
    for layer, active in ((0, 40), (1, 91), (2, 90), (3, 100)):
        handle.stats.layer(layer).count_sparse(torch.tensor([active, 100]), is_deferred=False)
    assert "layers 1, 3 read more than 90% of the blocks: dense_layers=[1, 3]" in handle.report()


def test_report_does_not_advise_to_leave_every_layer_dense(handle: Handle) -> None:
    for layer in (0, 1):
        handle.stats.layer(layer).count_sparse(torch.tensor([95, 100]), is_deferred=False)
    handle.stats.layer(2).dense_calls["dense layer"] += 1
    report = handle.report()
    assert "every sparse layer read more than 90% of the blocks: a higher min_seq_len" in report
    assert "dense_layers=" not in report


def test_counts_of_a_device_are_read_when_asked_for(handle: Handle) -> None:
    layer = handle.stats.layer(0)
    for active in (3, 4):
        layer.count_sparse(torch.tensor([active, 10]), is_deferred=True)
    assert (layer.sparse_calls, layer.active_tiles) == (0, 0), "nothing has been read yet"
    assert handle.stats.density == 0.35
    assert handle.stats.total.sparse_calls == 2
    layer.count_sparse(torch.tensor([1, 10]), is_deferred=True)
    assert (handle.stats.layers[0].sparse_calls, handle.stats.layers[0].active_tiles) == (3, 8)


def test_a_reset_keeps_the_tensor_in_which_a_captured_graph_counts(handle: Handle) -> None:
    layer = handle.stats.layer(0)
    layer.count_sparse(torch.tensor([3, 10]), is_deferred=True)
    unread = layer.unread
    handle.stats.reset()
    assert handle.stats.layers == {}, "what was pending is gone, and an entry of zeros would say that the layer ran"
    assert handle.stats.total.sparse_calls == 0
    assert handle.stats.layer(0).unread is unread
    # as a replay does
    unread += torch.tensor([1, 4, 10])
    assert handle.stats.density == 0.4
    assert layer.sparse_calls == 0, "counters from before are left alone"


def test_counts_follow_a_model_to_another_device(handle: Handle) -> None:
    layer = handle.stats.layer(0)
    layer.count_sparse(torch.tensor([3, 10]), is_deferred=True)
    layer.count_sparse(torch.tensor([1, 10], device="meta"), is_deferred=True)
    assert layer.unread.device.type == "meta"
    assert (layer.sparse_calls, layer.active_tiles) == (1, 3)


def test_counts_made_in_inference_mode_are_read_outside_it(handle: Handle) -> None:
    layer = handle.stats.layer(0)
    with torch.inference_mode():
        layer.count_sparse(torch.tensor([3, 10]), is_deferred=True)
    assert handle.stats.density == 0.3
    layer.count_sparse(torch.tensor([5, 10]), is_deferred=True)
    assert handle.stats.density == 0.4


def test_a_reset_starts_new_counters(handle: Handle) -> None:
    handle.stats.layer(0).dense_calls["decode"] += 1
    handle.stats.reset()
    assert handle.stats.total.dense_calls == {}
    assert handle.stats.density is None


def test_a_handle_shows_what_it_holds() -> None:
    handle = Handle([accel.FlexPrefill(gamma=0.9)], "transformers")
    handle.patched_layers = [0, 1]
    handle.is_active = True
    assert repr(handle) == handle.report().splitlines()[0] == "flexprefill(gamma=0.9) on transformers: 2 of 2 layers patched"
    handle.undo()
    assert repr(handle).endswith("patched (undone)")


@pytest.mark.parametrize(
    ("method", "last"), [(accel.FlexPrefill(), "calls: 0 sparse"), (accel.SnapKV(), "cache: no generation yet")], ids=["attention", "cache"]
)
def test_calls_are_told_of_methods_that_make_them_sparse(method: accel.Method, last: str) -> None:
    handle = Handle([method], "transformers")
    handle.patched_layers = [0, 1]
    assert handle.report().splitlines()[-1] == last
