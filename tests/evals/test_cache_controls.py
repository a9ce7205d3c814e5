"""Controls of cache methods: the same budget, one per budget, and none where nobody has one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

import accel
from accel.errors import OptionError
from accel.evals.controls import build_control, keep_of, plan_controls, swept
from accel.evals.results import SampleRecord
from accel.patches.h2o import H2O
from accel.protocols import KVCompression, Method, Retain
from accel.registry import build

SHARES = [0.5, 0.3]


@dataclass(frozen=True, kw_only=True)
class Unasked(KVCompression):
    """A cache method that decides by itself how much it keeps."""

    when = ()

    def groups(self, *_: Any, **__: Any) -> Any:
        return []

    def select(self, *_: Any) -> Retain:
        raise NotImplementedError


def record(**changes: Any) -> SampleRecord:
    needed = {f.name: 0 for f in fields(SampleRecord) if f.name not in changes}
    return SampleRecord(**{**needed, "label": "m", "options": [], "cache": None, "kept_share": None, "not_pruned": {}, **changes})  # type: ignore[arg-type]


def test_cache_methods_are_swept_like_those_that_prune() -> None:
    found = swept({"h2o": [build("h2o")], "snapkv": [build("snapkv", {"window": 8})], "streaming": [accel.Streaming()]}, SHARES)
    assert list(found) == ["h2o(keep=0.5)", "h2o(keep=0.3)", "snapkv(keep=0.5, window=8)", "snapkv(keep=0.3, window=8)", "streaming"]
    assert [keep_of(group) for group in found.values()] == [0.5, 0.3, 0.5, 0.3, None]


def test_of_two_that_keep_neither_is_swept() -> None:
    both: list[Method] = [build("h2o"), build("fastervlm")]
    assert keep_of(both) is None
    with pytest.raises(OptionError, match=r"compress the cache and can be told how much to keep, got both"):
        swept({"both": both}, SHARES)


def test_one_control_per_budget_stands_beside_all_methods_of_that_budget() -> None:
    methods = swept({"h2o": [build("h2o")], "snapkv": [build("snapkv")]}, SHARES)
    planned = plan_controls(["random_kv", "streaming_kv"], methods)
    assert [(c.label, c.keep, c.references) for c in planned if c.name == "random_kv"] == [
        ("random_kv (keep 0.5)", 0.5, ("h2o(keep=0.5)", "snapkv(keep=0.5)")),
        ("random_kv (keep 0.3)", 0.3, ("h2o(keep=0.3)", "snapkv(keep=0.3)")),
    ]
    assert len(planned) == 4


def test_a_control_is_given_the_budget_and_draws_anew_for_each_sample() -> None:
    methods = {"h2o(keep=40)": [build("h2o", {"keep": 40})]}
    [control] = plan_controls(["random_kv"], methods)
    made = [build_control(control, methods["h2o(keep=40)"], record(sample=i, seed=7)) for i in range(2)]
    assert [m.options()["keep"] for m in made] == [40, 40]
    assert made[0].options()["seed"] != made[1].options()["seed"]


def test_a_method_without_the_option_lends_the_share_that_it_reached() -> None:
    methods = {"own": [Unasked()]}
    [control] = plan_controls(["random_kv"], methods)
    assert (control.label, control.keep) == ("random_kv (share kept by own)", None)
    cache = {"kept_share": 0.42, "whole": [1, 5, 130]}
    for found, keep in ((cache, 0.42), ({**cache, "kept_share": 0.0}, 1 / 130), (None, 1.0)):
        assert build_control(control, methods["own"], record(cache=found, kept_share=0.9)).options()["keep"] == keep


def test_a_method_is_no_control_of_itself_and_kinds_do_not_mix() -> None:
    for name, method in (("random_kv", build("random_kv")), ("random_kv", build("fastervlm")), ("random_tokens", H2O())):
        with pytest.raises(OptionError, match=r"runs at the budget of a (method that compresses the cache|token-pruning method): name one"):
            plan_controls([name], {"m": [method]})


def test_methods_that_store_less_than_they_read_get_controls_of_the_same_cache(tmp_path: Any) -> None:
    """HACK's structural heads have no room for what they are given before the last scale: at equal reads it holds fewer bytes than its controls."""
    from head_profiles import saved
    from next_scale import INFO

    uneven = build("hack", {"profile": saved(tmp_path, ["CCSS", "CCSS"]), "keep": 0.5, "contextual_share": 0.2, "alpha": 0.5})
    planned = plan_controls(["random_kv"], {"uneven": [uneven], "even": [H2O(keep=0.5)]}, INFO)
    assert [(control.label, control.references, control.by_cache) for control in planned] == [
        ("random_kv (keep 0.5)", ("uneven", "even"), False), ("random_kv (cache of uneven)", ("uneven",), True),
    ]  # fmt: skip
    found = record(cache={"retained": [1.0, 5.0, 8.6, 0.0], "attended": [1.0, 5.0, 8.6, 15.0], "whole": [1, 5, 14, 30], "kept_share": 0.5})
    assert build_control(planned[1], [uneven], found).options()["keep"] == 9
    assert build_control(planned[0], [uneven], found).options()["keep"] == 0.5
