"""The probe's kernels in the interpreter, against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, PagedKeys, Ragged
from accel.kernels.probe import attention_moments, attention_row, mean_attention, triton_kernels, triton_launch
from accel.kernels.probe.triton_launch import Tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _unwritten_memory_shows(monkeypatch):
    empty = torch.empty

    def filled(*args, **options):
        made = empty(*args, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 1)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles and, where rows are few, ranges of keys, on inputs that the interpreter can do."""
    monkeypatch.setattr(triton_launch, "choose_tiles", lambda block_d, dtype: (Tiles(32, 16, 4, 2), Tiles(16, 32, 4, 2)))
    monkeypatch.setattr(triton_launch, "_FEWEST_TILES", 2)


class Packed:
    """Sequences of (L, N) tokens, two NaN rows before, between and behind them."""

    def __init__(self, sizes, *, Hq=2, Hkv=1, D=16, dtype=torch.float32, seed=0, **options: Any) -> None:
        g = torch.Generator().manual_seed(seed)
        self.options = {"scale": 0.4, "softcap": None, "is_causal": False, **options}
        gap_q, gap_k = (torch.full((2, heads, D), torch.nan) for heads in (Hq, Hkv))
        q, k, q_start, k_start = [gap_q], [gap_k], [], []
        for L, N in sizes:
            q_start.append(sum(map(len, q)))
            k_start.append(sum(map(len, k)))
            q += [torch.randn(L, Hq, D, generator=g) * 1.5, gap_q]
            k += [torch.randn(N, Hkv, D, generator=g), gap_k]
        self.q, flat = torch.cat(q).to(dtype), torch.cat(k).to(dtype)
        self.lens = Ragged.of([L for L, _ in sizes], [N for _, N in sizes], q_start=q_start)
        self.keys = ContiguousKeys(flat, flat, torch.tensor(k_start), self.lens.kv_len)
        self.rows: Tensor | None = None
        self.key_mask: Tensor | None = None

    def paged(self, page_size: int) -> PagedKeys:
        free = iter(torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist())
        pages = torch.full((64, page_size, *self.keys.k.shape[1:]), torch.nan, dtype=self.q.dtype)
        table = torch.zeros(self.lens.batch, -(-self.lens.max_kv // page_size), dtype=torch.int32)
        for b in range(self.lens.batch):
            for p, piece in enumerate(self.keys.tokens(b)[0].transpose(0, 1).split(page_size)):
                table[b, p] = page = next(free)
                pages[page, : len(piece)] = piece
        return PagedKeys(pages, pages, table, self.lens.kv_len)

    def assert_same(self, keys=None, *, atol: float = 2e-6) -> None:
        given = {"rows": self.rows, "key_mask": self.key_mask, "lens": self.lens, **self.options}
        found, exact = (attention_moments(self.q, keys or self.keys, impl=impl, **given) for impl in ("triton", "naive"))
        for name, got in (("mean", found.mean), ("variance", found.variance), ("row_entropy", found.row_entropy)):
            torch.testing.assert_close(got, getattr(exact, name), atol=atol, rtol=5 * atol, msg=lambda text, name=name: f"{name}: {text}")


SIZES = [(50, 50), (5, 40), (0, 20), (0, 0), (33, 33), (1, 1)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="vision"),
        pytest.param({"is_causal": True, "Hq": 4, "Hkv": 2}, id="causal-two-groups"),
        pytest.param({"is_causal": True, "softcap": 2.0, "Hq": 3, "Hkv": 1, "D": 24}, id="causal-softcap-G3-D24"),
        pytest.param({"dtype": torch.float16}, id="fp16"),
    ],
)
def test_all_rows_of_ragged_sequences(options):
    Packed(SIZES, **options).assert_same()


def test_the_mean_alone():
    batch = Packed(SIZES, is_causal=True)
    found, exact = (mean_attention(batch.q, batch.keys, lens=batch.lens, impl=impl, **batch.options) for impl in ("triton", "naive"))
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["vision", "causal"])
def test_chosen_rows(is_causal):
    batch = Packed(SIZES, is_causal=is_causal)
    g = torch.Generator().manual_seed(0)
    batch.rows = torch.rand(6, 50, generator=g) < 0.4
    batch.assert_same()
    # out of order, twice, none, few
    batch.rows = torch.tensor([[40, 3, 3], [4, 0, -1], [-1, -1, -1], [-1, -1, -1], [32, 31, 1], [0, -1, -1]])
    batch.assert_same()


@pytest.mark.parametrize("is_causal", [False, True], ids=["vision", "causal"])
def test_padding_inside_sequences(is_causal):
    batch = Packed([(70, 70), (40, 40), (33, 33)], is_causal=is_causal)
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[0, :37], mask[1, 10:12], mask[2] = False, False, False
    batch.key_mask = mask
    for b in range(3):
        padding = (~mask[b, : int(batch.lens.kv_len[b])]).nonzero()[:, 0]
        batch.q[batch.lens.q_start[b] + padding] = torch.nan
        batch.keys.k[batch.keys.start[b] + padding] = torch.nan
    batch.assert_same()


def test_pages():
    batch = Packed([(20, 70), (33, 33), (0, 0)], is_causal=True)
    batch.assert_same(batch.paged(8))


@pytest.mark.parametrize("n_splits", [1, 2, 3, 9])
def test_ranges_of_keys_are_merged(monkeypatch, n_splits):
    run = triton_launch.probe
    monkeypatch.setattr(triton_launch, "probe", lambda request: run(request, n_splits=n_splits))
    batch = Packed([(3, 130), (2, 40), (0, 9)], is_causal=True)
    # the first ranges hold padding only
    batch.key_mask = torch.arange(130).expand(3, -1) >= 50
    batch.assert_same()


def test_one_row_of_each_sequence():
    batch = Packed(SIZES, is_causal=True)
    given = {"lens": batch.lens, **batch.options}
    for row in (-1, torch.tensor([49, 0, 0, 0, 20, 0])):
        found, exact = (attention_row(batch.q, batch.keys, row, impl=impl, **given) for impl in ("triton", "naive"))
        torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5)


def test_padded_batches_of_views():
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 50, 3, 4, 16, generator=g)
    q, k = (fused[:, :, i].transpose(1, 2) for i in (0, 1))
    found, exact = (mean_attention(q, k, scale=0.4, is_causal=False, impl=impl) for impl in ("triton", "naive"))
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5)


def test_equal_rows_have_no_variance_left_by_rounding():
    q = torch.tensor([9.0, 1.0, 0.0]).log().clamp_min(-20).expand(1, 1, 100, 3).contiguous()
    found = attention_moments(q, torch.eye(3)[None, None], scale=1.0, is_causal=False, impl="triton")
    assert float(found.variance.max()) < 1e-12
    assert float(found.row_entropy) == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), rel=1e-4)


@pytest.mark.parametrize("side", ["q", "k"])
def test_a_nan_spoils_the_keys_that_its_row_sees(side):
    batch = Packed([(70, 70), (33, 33)], is_causal=True)
    if side == "q":
        batch.q[batch.lens.q_start[0] + 20, 1] = torch.nan
    else:
        batch.keys.k[batch.keys.start[0] + 60, 0] = torch.nan
    given = {"lens": batch.lens, **batch.options}
    found, exact = (mean_attention(batch.q, batch.keys, impl=impl, **given) for impl in ("triton", "naive"))
    assert exact[0].isnan().any()
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5, equal_nan=True)


def test_two_launches_that_depend_on_bounds_alone(monkeypatch):
    launches: list[Any] = []

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def run(*args, **options):
                launches.append((self.name, grid, [a for a in (*args, *options.values()) if not isinstance(a, Tensor)]))
                return self.kernel[grid](*args, **options)

            return run

    for name in ("probe_fwd_kernel_stats", "probe_fwd_kernel_columns"):
        monkeypatch.setattr(triton_kernels, name, Recorder(name, getattr(triton_kernels, name)))
    recordings, results = [], []
    for sizes in ([(20, 60), (30, 50)], [(20, 33), (0, 1)]):
        batch = Packed(sizes, is_causal=True)
        lens = Ragged(batch.lens.q_start, batch.lens.q_len, batch.lens.kv_len, max_q=32, max_kv=64)
        launches.clear()
        for _ in range(2):
            results.append(mean_attention(batch.q, batch.keys, lens=lens, impl="triton", **batch.options))
        recordings.append(list(launches))
    assert len(recordings[0]) == 4
    # the same calls would be captured in a CUDA graph, and equal inputs give equal results
    assert recordings[0] == recordings[1]
    assert torch.equal(results[0], results[1])


def test_what_the_kernels_cannot_do_raises_with_the_reason():
    q = torch.zeros(1, 2, 5, 8)
    for given, reason in ((q.bfloat16(), "bf16"), (q.double(), "float64"), (torch.zeros(1, 2, 5, 300), "head_dim is 300")):
        with pytest.raises(UnsupportedError, match=reason):
            mean_attention(given, given, scale=1.0, is_causal=False, impl="triton")
