"""Who runs a call, what it costs, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.errors import OptionError, UnsupportedError
from accel.evals.gpu.head_groups import GroupCall
from accel.kernels.head_grouped import KVGroup, api, dispatches, grouped_attention


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _operations(call: GroupCall) -> Counter[str]:
    with Operations() as seen:
        grouped_attention(call.q, call.groups, scale=call.scale)
    return seen.count


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def test_one_attention_call_per_group_and_no_copy_of_neighbours():
    count = _operations(GroupCall.random((40, 9, 0), heads=((0, 1), (2, 3), (4,)), n_rows=30))
    assert count[ATTENTION] == 2
    assert count["copy_"] == 2
    assert count["index_select"] == count["index_put_"] == count["clone"] == 0


def test_heads_that_are_no_neighbours_are_gathered_once():
    count = _operations(GroupCall.random((40, 9), heads=((0, 2), (3, 1)), n_rows=30))
    assert count[ATTENTION] == count["index_select"] == count["index_put_"] == 2
    assert count["copy_"] == count["clone"] == 0


def test_rows_of_one_length_are_one_call_and_nothing_is_masked():
    call = GroupCall.random((40,), heads=((0, 1),), batch=4, n_rows=30)
    for lengths, n_calls in (([[40, 40]] * 4, 1), ([[40, 40]] * 2 + [[25, 25]] * 2, 2), ([[40, 30]] * 4, 2), ([[0, 0]] * 3 + [[7, 7]], 1)):
        group = replace(call.groups[0], length=torch.tensor(lengths, dtype=torch.int32))
        count = _operations(replace(call, groups=[group]))
        assert count[ATTENTION] == n_calls
        assert count["where"] == count["masked_fill"] == 0


def test_auto_takes_torch_on_a_cpu_and_counts():
    call, before = GroupCall.random((9, 4, 3)), dispatches.copy()
    call.run("auto")
    call.run("naive")
    assert dispatches - before == Counter({"cpu": 1, "naive": 1})


def test_only_auto_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(api, "_cpu_reasons", lambda q: ["made up"])
    call, before = GroupCall.random((9, 4, 3)), dispatches.copy()
    with caplog.at_level("WARNING"):
        call.check(call.run("auto"))
        call.run("auto")
    assert dispatches - before == Counter({"naive": 2, "auto->naive": 2})
    assert [record.message for record in caplog.records] == ["grouped_attention runs its slow definition: made up"]
    with pytest.raises(UnsupportedError, match="made up"):
        call.run("cpu")


def test_triton_says_why_it_cannot():
    with pytest.raises(UnsupportedError, match="impl='triton'") as raised:
        GroupCall.random((9, 4, 3), head_dim=272).run("triton")
    assert len(raised.value.reasons) >= 2
    assert any("272" in reason for reason in raised.value.reasons)


def test_no_rows_and_no_sequences():
    for batch, n_rows in ((0, 3), (2, 0)):
        call = GroupCall.random((9, 4, 3), batch=batch, n_rows=n_rows, has_lengths=True)
        out, lse = call.run("cpu")
        assert out.shape == call.q.shape
        assert lse.shape == call.q.shape[:3]


def _changed(**changes: object) -> GroupCall:
    call = GroupCall.random((9,), heads=((0, 1),), n_rows=3)
    return replace(call, groups=[replace(call.groups[0], **changes)])


WRONG = {
    "head twice": (_changed(heads=(0, 0)), "hold every KV head of the layer once"),
    "head missing": (_changed(heads=(0, 2)), "hold every KV head of the layer once"),
    "no group": (replace(_changed(), groups=[]), "hold every KV head of the layer once"),
    "query heads": (replace(_changed(), q=torch.zeros(2, 3, 3, 16)), "cannot share 2 KV heads"),
    "q's shape": (replace(_changed(), q=torch.zeros(2, 3, 16)), "q must be"),
    "q's last stride": (replace(_changed(), q=torch.zeros(2, 2, 16, 3).mT), "last stride 1"),
    "keys' shape": (_changed(k=torch.zeros(2, 2, 9, 24), v=torch.zeros(2, 2, 9, 24)), "k of the heads"),
    "values' shape": (_changed(v=torch.zeros(2, 2, 8, 16)), "v of the heads"),
    "keys' last stride": (_changed(k=torch.zeros(2, 2, 16, 9).mT), "last stride 1"),
    "dtype": (_changed(k=torch.zeros(2, 2, 9, 16, dtype=torch.float16)), "is torch.float16"),
    "length's dtype": (_changed(length=torch.zeros(2, 2, dtype=torch.int64)), "int32"),
    "length's shape": (_changed(length=torch.zeros(2, 1, dtype=torch.int32)), "int32"),
    "length": (_changed(length=torch.full((2, 2), 10, dtype=torch.int32)), "between 0 and 9"),
    "scale": (replace(_changed(), scale=0.0), "scale must be positive"),
    "softcap": (replace(_changed(), softcap=0.0), "softcap must be positive"),
    "n_causal": (replace(_changed(), n_causal=4), "n_causal must lie between 0 and the 3"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_explains_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call.run("cpu")


def test_other_refusals():
    call = _changed()
    with pytest.raises(OptionError, match="impl must be one of"):
        call.run("cuda")
    with pytest.raises(UnsupportedError, match="no backward pass"):
        replace(call, q=call.q.requires_grad_()).run("cpu")
    with torch.no_grad():
        replace(call, q=call.q.requires_grad_()).run("cpu")


def test_groups_know_whether_their_heads_are_neighbours():
    k = torch.zeros(1, 0, 1, 16)
    assert KVGroup((3, 4, 5), k, k).span == slice(3, 6)
    assert KVGroup((4, 3), k, k).span is None
