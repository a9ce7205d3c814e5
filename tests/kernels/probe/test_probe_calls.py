"""What the probe costs, refuses and imports."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.errors import OptionError, UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, Ragged
from accel.kernels.probe import api, attention_moments, attention_row, cpu, mean_attention
from accel.kernels.probe.request import RowSet

OPTIONS = {"scale": 0.5, "is_causal": False}


class _LargestAllocation(TorchDispatchMode):
    """Elements of the largest storage that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("ask", [mean_attention, attention_moments], ids=["mean", "moments"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["vision", "causal"])
def test_no_tensor_grows_with_rows_times_keys(monkeypatch, ask, is_causal):
    monkeypatch.setattr(cpu, "TILE_SCORES", 1 << 12)
    largest = []
    for n in (512, 1024):
        q, k = (torch.randn(1, 2, n, 8).bfloat16() for _ in range(2))
        with _LargestAllocation() as seen:
            ask(q, k, scale=0.5, is_causal=is_causal)
        largest.append(seen.largest)
    # q and k themselves are larger than any tile; the matrix would have 2 · 1024² entries
    assert largest[1] <= 2 * 1024 * 8
    assert largest[1] <= 2 * largest[0]


def test_the_table_of_rows_is_sorted_and_built_without_reading():
    found = RowSet.listed(torch.tensor([[5, 2, 9, 2], [0, 1, 2, 3]]), torch.tensor([[True, True, False, True], [False] * 4]))
    assert found.index is not None
    assert found.index.tolist() == [[2, 2, 5, 0], [0, 0, 0, 0]]
    assert found.count.tolist() == [3, 0]


def test_the_rows_that_count_are_found_without_waiting_for_a_device():
    from support import NoHostReads

    # meta tensors have no values: any read fails
    lens = Ragged(*(torch.empty(2, dtype=torch.int64, device="meta") for _ in range(3)), max_q=7, max_kv=9)
    mask, index = torch.empty(2, 9, dtype=torch.bool, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    with NoHostReads():
        for rows in (None, index, torch.empty(2, 7, dtype=torch.bool, device="meta")):
            for key_mask in (None, mask):
                api._row_set(rows, key_mask, lens, is_causal=True)


def test_empty_inputs_have_empty_answers():
    assert mean_attention(torch.zeros(0, 2, 5, 8), torch.zeros(0, 2, 5, 8), **OPTIONS).shape == (0, 2, 5)
    assert torch.all(mean_attention(torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 5, 8), **OPTIONS) == 0)
    found = attention_moments(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 0, 8), **OPTIONS)
    assert found.mean.shape == (1, 2, 0)
    assert torch.all(found.row_entropy == 0)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"rows": torch.tensor([5])}, "does not exist", id="row-behind"),
        pytest.param({"rows": torch.tensor([-2])}, "does not exist", id="row-before"),
        pytest.param({"rows": torch.ones(1, 4, dtype=torch.bool)}, "rows must be", id="mask-shape"),
        pytest.param({"rows": torch.tensor([0.0])}, "rows must be", id="rows-dtype"),
        pytest.param({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, "key_mask must be", id="key-mask-shape"),
        pytest.param({"key_mask": torch.ones(1, 5)}, "key_mask must be", id="key-mask-dtype"),
        pytest.param({"softcap": 0.0}, "softcap", id="softcap"),
        pytest.param({"lens": Ragged.of([5], [5])}, "without `lens`", id="lens"),
        pytest.param({"q": torch.zeros(1, 3, 5, 8)}, "does not fit", id="heads"),
        pytest.param({"q": torch.zeros(2, 2, 5, 8)}, "of one B", id="batch"),
        pytest.param({"q": torch.zeros(1, 2, 9, 8), "is_causal": True}, "queries are the last", id="causal-length"),
        pytest.param({"heads": "sum"}, "heads must be", id="heads-option"),
        pytest.param({"impl": "fast"}, "impl must be", id="impl"),
    ],
)
def test_a_wrong_argument_explains_itself(change, message):
    given = {"q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 5, 8), **OPTIONS, **change}
    with pytest.raises((ValueError, OptionError), match=message):
        mean_attention(**given)


def test_rows_outside_the_query_raise():
    q = torch.zeros(1, 2, 5, 8)
    for row in (5, -6, torch.tensor([5]), torch.tensor([-6])):
        with pytest.raises(ValueError, match="does not exist"):
            attention_row(q, q, row, **OPTIONS)
    keys = ContiguousKeys(q[0].transpose(0, 1), q[0].transpose(0, 1), torch.zeros(1, dtype=torch.int64), torch.tensor([5]))
    with pytest.raises(ValueError, match="lie outside"):
        mean_attention(q[0].transpose(0, 1), keys, lens=Ragged.of([5], [5], q_start=[1]), **OPTIONS)
    with pytest.raises(ValueError, match="does not fit 5 keys"):
        mean_attention(q[0].transpose(0, 1), keys, lens=Ragged.of([4], [4]), **OPTIONS)


def test_quantised_tensors_and_kernels_without_a_gpu_are_refused_with_the_reason(monkeypatch):
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(UnsupportedError, match="dequantise"):
        mean_attention(q.to(torch.int8), q.to(torch.int8), **OPTIONS)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match="CUDA"):
        mean_attention(q, q, impl="triton", **OPTIONS)


def test_auto_falls_back_on_cuda_counted_and_logged_once(caplog):
    api._log_fallback.cache_clear()
    before = dict(api.dispatches)
    # stands in for tensors on a GPU: the choice reads no more of them
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64, shape=(5, 2, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "triton_obstacles", lambda device, dtype: (f"no sparse kernel for {dtype}",))
        for _ in range(2):
            assert api._choose("auto", SimpleNamespace(q=q, keys=SimpleNamespace(dtype=torch.float64))) == "cpu"
    assert api.dispatches["auto->cpu"] - before.get("auto->cpu", 0) == 2
    assert len([record for record in caplog.records if "runs in torch" in record.message]) == 1


def test_no_graph_is_recorded_for_tensors_that_want_gradients():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    assert not mean_attention(q, q, **OPTIONS).requires_grad
    assert not attention_row(q, q, heads="mean", **OPTIONS).requires_grad


def test_importing_the_probe_does_not_import_triton():
    code = "import sys, accel.kernels.probe; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
