"""The probe's numbers: solved by hand, and against the whole attention matrix in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from accel.kernels.block_sparse import ContiguousKeys, PagedKeys, Ragged
from accel.kernels.probe import attention_moments, attention_row, cpu, mean_attention

IMPLS = pytest.mark.parametrize("impl", ["cpu", "naive"])
SHAPES = [
    pytest.param({}, id="vision"),
    pytest.param({"is_causal": True}, id="causal"),
    pytest.param({"is_causal": True, "L": 19, "N": 63}, id="causal-cached-prefix"),
    pytest.param({"L": 1, "N": 129}, id="one-row"),
    pytest.param({"Hq": 6, "Hkv": 2, "D": 80, "softcap": 3.0, "is_causal": True}, id="softcap-G3-D80"),
    pytest.param({"L": 12, "N": 70, "Hkv": 4}, id="next-scale"),
]


@pytest.fixture(params=[None, 200], ids=["whole", "tiles"])
def tile_scores(request, monkeypatch):
    """Once with all rows in one tile, once with a few rows of one head."""
    if request.param is not None:
        monkeypatch.setattr(cpu, "TILE_SCORES", request.param)


# --- by hand -------------------------------------------------------------------------------------------------------------------------------


def _from_attention(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k with exactly this attention (rows, keys), all entries positive: logits are its logarithms, keys unit vectors."""
    return a.log()[None, None], torch.eye(a.shape[1])[None, None]


@IMPLS
def test_received_and_hub_attention_of_the_specification(impl):
    # visual-token-pruning.md §8.3
    a = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.55, 0.1, 0.3]])
    q, k = _from_attention(a)
    options = {"scale": 1.0, "is_causal": False, "impl": impl, "heads": "mean"}
    torch.testing.assert_close(mean_attention(q, k, **options), torch.tensor([[0.2, 0.425, 0.1875, 0.1875]]))
    hubs = torch.tensor([[False, True, False, True]])
    torch.testing.assert_close(mean_attention(q, k, rows=hubs, **options), (a[1] + a[3])[None] / 2)
    torch.testing.assert_close(attention_row(q, k, 0, **options), a[:1])
    torch.testing.assert_close(attention_row(q, k, -1, **options), a[3:])


@IMPLS
@pytest.mark.parametrize(
    "target, sigma",
    [
        pytest.param([2] * 12, 0.0, id="stripe"),
        pytest.param(range(12), 1 - 1 / 12, id="diagonal"),
        pytest.param([0, 1, 2, 3] * 3, 1 - 1 / 4, id="four-keys"),
    ],
)
def test_sigma_of_the_patterns_of_the_specification(impl, target, sigma):
    # kv-compression.md §2.7; attention within e^-60 of one-hot rows
    k = torch.eye(12)[None, None]
    found = attention_moments(k[:, :, list(target)], k, scale=60.0, is_causal=False, impl=impl)
    assert float(found.variance.double().sum()) == pytest.approx(sigma, abs=1e-6)
    assert float(found.row_entropy) == pytest.approx(0, abs=1e-6)


@IMPLS
def test_uniform_rows_have_no_variance_and_full_entropy(impl):
    found = attention_moments(torch.zeros(1, 1, 500, 8), torch.randn(1, 1, 300, 8), scale=1.0, is_causal=False, impl=impl)
    assert torch.all(found.variance == 0) or float(found.variance.max()) < 1e-16
    assert float(found.row_entropy) == pytest.approx(math.log(300), rel=1e-5)


@IMPLS
def test_a_causal_mean_counts_rows_that_do_not_see_a_key(impl):
    # three rows of uniform attention over 1, 2 and 3 keys
    got = mean_attention(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), scale=1.0, is_causal=True, impl=impl)
    torch.testing.assert_close(got[0, 0], torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]) / 3)


# --- against the whole matrix --------------------------------------------------------------------------------------------------------------


def _assert_moments(c, impl, counted, atol=1e-6):
    found = c.moments(impl)
    for got, want in zip((found.mean, found.variance, found.row_entropy), c.reference(counted), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=2e-5)
    torch.testing.assert_close(c.mean(impl), found.mean, atol=1e-6, rtol=1e-5)


@IMPLS
@pytest.mark.parametrize("shape", SHAPES)
def test_all_rows(case, impl, shape, tile_scores):
    c = case(**shape)
    _assert_moments(c, impl, torch.ones(2, c.q.shape[2], dtype=torch.bool))
    torch.testing.assert_close(c.mean(impl).sum(-1), torch.ones(2, c.q.shape[1]))


@IMPLS
@pytest.mark.parametrize("shape", SHAPES)
def test_chosen_rows_as_mask_and_as_list(case, impl, shape, tile_scores):
    c = case(**shape)
    L = c.q.shape[2]
    counted = torch.zeros(2, L, dtype=torch.bool)
    counted[0, 0], counted[1, L // 2 :] = True, True
    c.rows = counted
    _assert_moments(c, impl, counted)
    listed = torch.full((2, L + 2), -1)
    listed[0, 2] = 0
    # in any order
    listed[1, : L - L // 2] = torch.arange(L // 2, L).flip(0)
    by_mask, c.rows = c.mean(impl), listed
    torch.testing.assert_close(c.mean(impl), by_mask)


@IMPLS
@pytest.mark.parametrize("is_causal", [False, True], ids=["vision", "causal"])
def test_padding_changes_nothing(case, impl, is_causal, tile_scores):
    c = case(B=3, is_causal=is_causal)
    c.key_mask = torch.ones(3, 37, dtype=torch.bool)
    c.key_mask[0, :5], c.key_mask[1, 30:], c.key_mask[2, 10:20] = False, False, False
    clean = c.reference(c.key_mask)
    hidden = ~c.key_mask[:, None, :, None]
    c.q, c.k = c.q.masked_fill(hidden, torch.nan), c.k.masked_fill(hidden, torch.nan)
    found = c.moments(impl)
    for got, want in zip((found.mean, found.variance, found.row_entropy), clean, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=2e-5)
    assert torch.all(found.mean.movedim(1, -1)[~c.key_mask] == 0)
    # alone, the middle sequence is the same without its padding
    alone = mean_attention(c.q[1:2, :, :30], c.k[1:2, :, :30], impl=impl, **c.options)
    torch.testing.assert_close(found.mean[1:2, :, :30], alone)


@IMPLS
def test_rows_of_padding_never_count_even_if_named(case, impl):
    c = case(B=1, L=20)
    c.key_mask = torch.arange(20)[None] >= 6
    c.rows = torch.tensor([2, 5, 6, 19])
    torch.testing.assert_close(c.mean(impl).double(), c.attention()[:, :, [6, 19]].mean(2), atol=1e-6, rtol=1e-5)
    assert torch.all(attention_row(c.q, c.k, 3, key_mask=c.key_mask, impl=impl, **c.options) == 0)


@IMPLS
def test_queries_that_are_no_keys_all_count(case, impl):
    # a pooling head: its query stands on no patch, though the last patch is padding
    c = case(B=2, L=1, N=20)
    c.key_mask = torch.arange(20).expand(2, -1) < 15
    torch.testing.assert_close(c.mean(impl).double(), c.attention()[:, :, 0], atol=1e-6, rtol=1e-5)


@IMPLS
def test_nothing_visible_and_nothing_counted_give_zero(case, impl):
    c = case(B=2, is_causal=True, L=9)
    c.key_mask = torch.ones(2, 9, dtype=torch.bool)
    c.key_mask[1] = False
    found = c.moments(impl)
    assert all(torch.all(t[1] == 0) for t in (found.mean, found.variance, found.row_entropy))
    assert found.mean.isfinite().all()
    c.key_mask, c.rows = None, torch.full((2, 3), -1)
    assert torch.all(c.mean(impl) == 0)
    # a row that sees no key counts as a row of zeros
    no_keys = case(B=1, L=4, N=6)
    no_keys.key_mask = torch.zeros(1, 6, dtype=torch.bool)
    assert torch.all(no_keys.mean(impl) == 0)


@IMPLS
def test_a_nan_row_spoils_the_keys_it_sees_and_no_others(case, impl, tile_scores):
    c = case(B=2, is_causal=True, L=37)
    clean = c.mean(impl)
    c.q[0, 1, 20] = torch.nan
    found = c.mean(impl)
    assert found[0, 1, :21].isnan().all()
    torch.testing.assert_close(found[0, 1, 21:], clean[0, 1, 21:])
    found[0, 1] = clean[0, 1]
    torch.testing.assert_close(found, clean)


@IMPLS
def test_equal_rows_have_no_variance_left_by_rounding(impl, tile_scores):
    # 0.9 and its square are not representable: a difference of sums of squares would leave about 1e-7
    q = torch.tensor([9.0, 1.0, 0.0]).log().clamp_min(-20).expand(1, 1, 400, 3)
    k = torch.eye(3)[None, None]
    assert float(attention_moments(q, k, scale=1.0, is_causal=False, impl=impl).variance.max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_computed_in_fp32(case, dtype):
    c = case(dtype=dtype, is_causal=True)
    _assert_moments(c, "cpu", torch.ones(2, 37, dtype=torch.bool))


def test_the_default_dtype_of_torch_changes_nothing(case):
    c = case(is_causal=True)
    want = c.moments("cpu")
    try:
        torch.set_default_dtype(torch.bfloat16)
        got = c.moments("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("mean", "variance", "row_entropy"):
        assert torch.equal(getattr(got, name), getattr(want, name))


# --- forms of input ------------------------------------------------------------------------------------------------------------------------


@IMPLS
@pytest.mark.parametrize("is_causal", [False, True], ids=["vision", "causal"])
def test_packed_sequences_and_pages_give_what_each_gives_alone(case, impl, is_causal):
    sizes = [(20, 20), (5, 5), (0, 0), (33, 33)] if not is_causal else [(7, 20), (5, 5), (0, 3), (33, 33)]
    parts = [case(B=1, L=L, N=N, is_causal=is_causal, seed=i) for i, (L, N) in enumerate(sizes)]
    q = torch.cat([c.q[0].transpose(0, 1) for c in parts])
    lens = Ragged.of([L for L, _ in sizes], [N for _, N in sizes])
    k = torch.cat([c.k[0].transpose(0, 1) for c in parts])
    flat = ContiguousKeys(k, k, lens.kv_len.cumsum(0) - lens.kv_len, lens.kv_len)
    pages, table = torch.full((20, 4, 2, 16), torch.nan), torch.zeros(4, 9, dtype=torch.int32)
    free = iter(torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist())
    for b, c in enumerate(parts):
        for p, piece in enumerate(c.k[0].transpose(0, 1).split(4)):
            table[b, p] = page = next(free)
            pages[page, : len(piece)] = piece
    for keys in (flat, PagedKeys(pages, pages, table, lens.kv_len)):
        got = mean_attention(q, keys, lens=lens, impl=impl, **parts[0].options)
        last = attention_row(q, keys, -1, lens=lens, impl=impl, **parts[0].options)
        assert got.shape == (4, 4, 33)
        for b, ((L, N), c) in enumerate(zip(sizes, parts, strict=True)):
            want = c.attention()[0].mean(1) if L else torch.zeros(4, N, dtype=torch.float64)
            torch.testing.assert_close(got[b, :, :N].double(), want, atol=1e-6, rtol=1e-5)
            assert torch.all(got[b, :, N:] == 0)
            want = c.attention()[0, :, -1] if L else torch.zeros(4, N, dtype=torch.float64)
            torch.testing.assert_close(last[b, :, :N].double(), want, atol=1e-6, rtol=1e-5)


@IMPLS
def test_each_sequence_may_name_its_own_row(case, impl):
    c = case(is_causal=True)
    got = attention_row(c.q, c.k, torch.tensor([6, -2]), impl=impl, **c.options)
    torch.testing.assert_close(got.double(), c.attention()[torch.arange(2), :, torch.tensor([6, 35])], atol=1e-6, rtol=1e-5)


def test_views_are_taken_as_they_are(case):
    c = case(B=2, L=24, Hkv=4)
    fused = torch.stack([c.q, c.k, c.k], 2).permute(0, 3, 2, 1, 4).contiguous()
    q, k = (fused[:, :, i].transpose(1, 2) for i in (0, 1))
    assert not q.is_contiguous()
    assert torch.equal(mean_attention(q, k, **c.options), c.mean())
    # a static cache: 24 of 40 slots
    cache = torch.full((2, 4, 40, 16), torch.nan)
    cache[:, :, :24] = c.k
    assert torch.equal(mean_attention(c.q, cache[:, :, :24], **c.options), c.mean())


def test_heads_are_joined_by_mean_or_largest_value(case):
    c = case()
    each = c.mean()
    assert torch.equal(c.mean(heads="mean"), each.mean(1))
    assert torch.equal(c.mean(heads="max"), each.amax(1))
