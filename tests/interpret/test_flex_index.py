"""FlexPrefill's selection by kernels, in the interpreter, against its definition."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, PagedKeys, Ragged
from accel.kernels.flex_index import FlexIndex, SelectionRule, api, flex_index, triton_kernels, triton_select

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _unwritten_memory_shows(monkeypatch):
    empty = torch.empty

    def filled(*args, **options):
        made = empty(*args, **options)
        return made.fill_(torch.nan if made.is_floating_point() else True)

    monkeypatch.setattr(torch, "empty", filled)


class Batch:
    """Sequences of (L, N) tokens in one q and one k tensor, `gap` rows of NaN before, between and behind them."""

    def __init__(self, sizes, *, Hq=2, Hkv=1, D=16, sharpness=1.5, seed=0, gap=0, dtype=torch.float32, softcap=None) -> None:
        g = torch.Generator().manual_seed(seed)
        self.scale, self.softcap = D**-0.5, softcap
        q_parts, k_parts, q_start, k_start = [torch.full((gap, Hq, D), torch.nan)], [torch.full((gap, Hkv, D), torch.nan)], [], []
        for L, N in sizes:
            q_start.append(sum(map(len, q_parts)))
            k_start.append(sum(map(len, k_parts)))
            common = torch.randn(1, Hq, D, generator=g)
            q_parts += [(0.3 * torch.randn(L, Hq, D, generator=g) + common) * sharpness, torch.full((gap, Hq, D), torch.nan)]
            k_parts += [torch.randn(N, Hkv, D, generator=g), torch.full((gap, Hkv, D), torch.nan)]
        self.q, self.k = torch.cat(q_parts).to(dtype), torch.cat(k_parts).to(dtype)
        self.lens = Ragged.of([L for L, _ in sizes], [N for _, N in sizes], q_start=q_start)
        self.keys = ContiguousKeys(self.k, self.k, torch.tensor(k_start), self.lens.kv_len)

    @classmethod
    def planted(cls, q: Tensor, k: Tensor, *, scale: float | None = None) -> Batch:
        """One sequence of given rows, q: (L, Hq, D), k: (N, Hkv, D)."""
        one = cls([(q.shape[0], k.shape[0])], Hq=q.shape[1], Hkv=k.shape[1], D=q.shape[2])
        one.q, one.k, one.keys = q, k, dataclasses.replace(one.keys, k=k, v=k)
        one.scale = one.scale if scale is None else scale
        return one

    def index(self, rule: SelectionRule, impl: str = "triton", *, diagnostics: bool = False) -> FlexIndex:
        return flex_index(
            self.q, self.keys, self.lens, rule=rule, scale=self.scale, softcap=self.softcap, impl=impl, diagnostics=diagnostics
        )

    def assert_same_tiles(self, rule: SelectionRule) -> FlexIndex:
        found, exact = self.index(rule), self.index(rule, "naive")
        assert torch.equal(found.is_finite, exact.is_finite)
        for rows in self.lens.rows():
            assert torch.equal(found.plan.block_mask(rows), exact.plan.block_mask(rows)), rows
        return found


def _rule(**options) -> SelectionRule:
    return SelectionRule(**{"block_size": 16, "min_budget": 16, "gamma": 0.9, **options})


RAGGED = [(70, 70), (5, 90), (40, 61), (1, 33), (0, 20), (48, 48), (1, 1)]
OPTIONS = [
    pytest.param({}, id="default"),
    pytest.param({"tau": 1.0}, id="query-aware"),
    pytest.param({"tau": 1.0, "qa_scope": "row", "gamma": 0.6}, id="query-aware-rows"),
    pytest.param({"tau": 0.0, "coverage": "token", "min_budget": 0}, id="token-coverage"),
    pytest.param({"slash_pooling": "reference", "max_budget": 48, "tau": 0.0}, id="reference-pooling"),
    pytest.param({"size_corrected_estimate": True, "sink_blocks": 2, "local_blocks": 3, "tau": 0.2, "min_budget": 0}, id="corrected-sizes"),
    pytest.param({"gqa_mode": "group_union", "tau": 0.15}, id="union"),
]


@pytest.mark.parametrize(
    "dtype, options",
    [pytest.param(torch.float32, *one.values, id=f"fp32-{one.id}") for one in OPTIONS]
    + [pytest.param(torch.float16, *one.values, id=f"fp16-{one.id}") for one in OPTIONS[:2]],
)
def test_a_ragged_batch_with_gaps_gets_the_tiles_of_the_definition(dtype, options):
    Batch(RAGGED, gap=7, dtype=dtype).assert_same_tiles(_rule(**options))


@pytest.mark.parametrize("options", OPTIONS)
def test_all_numbers_behind_the_plan_equal_the_definition(options):
    batch = Batch([(75, 75), (20, 100)], gap=3, seed=1)
    rule = _rule(**options)
    found, exact = batch.index(rule, diagnostics=True), batch.index(rule, "naive", diagnostics=True)
    for rows in batch.lens.rows():
        assert torch.equal(found.plan.block_mask(rows), exact.plan.block_mask(rows))
        for field in dataclasses.fields(found.diagnostics[0]):
            got, want = (getattr(one.diagnostics[rows.index], field.name).double() for one in (found, exact))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0, msg=lambda text, name=field.name: f"{name}: {text}")


@pytest.mark.parametrize(
    "block_size, D, sizes, heads",
    [
        pytest.param(16, 80, [(50, 50), (33, 65)], (3, 1), id="b16-D80-G3"),
        pytest.param(32, 64, [(100, 130)], (2, 2), id="b32-D64-G1"),
        pytest.param(64, 128, [(150, 150), (20, 200)], (2, 1), id="b64-D128"),
        pytest.param(128, 64, [(300, 300), (30, 257)], (4, 1), id="b128-D64-G4"),
    ],
)
def test_block_sizes_head_sizes_and_groups(block_size, D, sizes, heads):
    batch = Batch(sizes, Hq=heads[0], Hkv=heads[1], D=D, sharpness=2.0)
    batch.assert_same_tiles(_rule(block_size=block_size, min_budget=0, tau=0.1))


def test_keys_cut_into_ranges_of_any_length_give_the_same(monkeypatch):
    # by default a range has at least four tiles; here 11 and 6 tiles are cut into ranges of 1, 2 and 3
    batch = Batch([(100, 170), (40, 90)], seed=2)
    want = batch.index(_rule(tau=0.0), "naive")
    for fewest in (1, 2, 3):
        monkeypatch.setattr(triton_select, "_FEWEST_TILES", fewest)
        found = batch.index(_rule(tau=0.0))
        assert all(torch.equal(found.plan.block_mask(rows), want.plan.block_mask(rows)) for rows in batch.lens.rows())


def test_block_128_in_several_ranges(monkeypatch):
    # two key tiles to a block: runs of distances cross tiles, blocks and ranges
    monkeypatch.setattr(triton_select, "_FEWEST_TILES", 1)
    Batch([(140, 470), (100, 300)], Hq=1, D=16, sharpness=2.0).assert_same_tiles(_rule(block_size=128, min_budget=0, tau=0.0))


def test_a_soft_cap_is_applied_to_the_probe_the_estimate_and_the_map():
    for options in ({}, {"tau": 1.0}):
        Batch([(70, 90)], sharpness=6.0, softcap=3.0).assert_same_tiles(_rule(**options))


@pytest.mark.parametrize("page_size", [16, 8])
def test_paged_keys(page_size):
    batch = Batch([(40, 101)], Hq=2, Hkv=2)
    n = -(-101 // page_size)
    table = torch.randperm(n + 2, generator=torch.Generator().manual_seed(0))[None, :n].int()
    pages = torch.full((n + 2, page_size, 2, 16), torch.nan)
    for i, page in enumerate(table[0].tolist()):
        rows = batch.k[i * page_size : (i + 1) * page_size]
        pages[page, : len(rows)] = rows
    want = batch.index(_rule(tau=0.2)).plan.block_mask(next(batch.lens.rows()))
    batch.keys = PagedKeys(pages, pages, table, torch.tensor([101]))
    assert torch.equal(batch.index(_rule(tau=0.2)).plan.block_mask(next(batch.lens.rows())), want)


def test_head_major_and_spread_tensors_are_read_in_place():
    batch = Batch([(50, 80)], Hq=4, Hkv=2)
    want = batch.index(_rule(tau=1.0)).plan.block_mask(next(batch.lens.rows()))
    batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    # every second column of a wider tensor
    batch.q = torch.stack([batch.q, torch.full_like(batch.q, torch.nan)], -1).flatten(-2)[..., ::2]
    assert torch.equal(batch.index(_rule(tau=1.0)).plan.block_mask(next(batch.lens.rows())), want)


# --- planted patterns ------------------------------------------------------------------------------------------------------------


def test_a_hot_column_is_kept_and_nothing_else():
    q, k = torch.ones(200, 1, 16), 0.1 * torch.randn(200, 1, 16, generator=torch.Generator().manual_seed(0))
    k[70] = 5.0
    found = Batch.planted(q, k).assert_same_tiles(_rule(tau=0.0))
    assert found.plan.vertical[0, 0].nonzero().flatten().tolist() == [0, 70 // 16]


@pytest.mark.parametrize("distance", [64, 66, 79, 95])
def test_a_hot_distance_is_kept_on_both_diagonals_it_touches(distance):
    code = torch.randn(311 + distance, 1, 64, generator=torch.Generator().manual_seed(0))
    code /= code.norm(dim=-1, keepdim=True)
    one = Batch.planted(40 * code[:311], code[distance:], scale=1.0)
    slash = one.assert_same_tiles(_rule(tau=0.0)).plan.slash[0, 0]
    near, beyond = divmod(distance, 16)
    assert slash[near] or beyond == 15
    assert slash[near + 1] or beyond < 2


@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_block_constant_map_is_query_aware_and_its_hot_tiles_are_kept(scope):
    g = torch.Generator().manual_seed(3)
    code = torch.randn(12, 64, generator=g)
    code /= code.norm(dim=-1, keepdim=True)
    hot = [0, *(int(torch.randint(0, i, (1,), generator=g)) for i in range(1, 12))]
    one = Batch.planted((14 * code[hot]).repeat_interleave(16, 0)[:, None], code.repeat_interleave(16, 0)[:, None], scale=1.0)
    tiles = one.assert_same_tiles(_rule(gamma=0.95, qa_scope=scope)).plan.extra[0, 0]
    assert all(tiles[i, hot[i]] for i in range(12))
    assert tiles.sum() < 60


@pytest.mark.parametrize(
    "N, b, needed, masses, distance",
    [
        pytest.param(1024, 128, 864, [0.133462] * 7 + [0.065768], 0.071829, id="aligned"),
        pytest.param(1000, 128, 842, [0.136892] * 6 + [0.134443, 0.044202], 0.104627, id="tail"),
    ],
)
def test_uniform_attention_gives_the_golden_values(N, b, needed, masses, distance):
    one = Batch.planted(torch.zeros(N, 1, 8), torch.randn(N, 1, 8, generator=torch.Generator().manual_seed(0)))
    heads = one.index(_rule(block_size=b, tau=0.0), diagnostics=True).diagnostics[0]
    assert heads.vertical_tokens.item() == heads.slash_tokens.item() == needed
    torch.testing.assert_close(heads.vertical_mass[0], torch.tensor(masses), atol=2e-6, rtol=0)
    assert heads.distance.item() == pytest.approx(distance, abs=2e-6)


def test_equal_masses_are_kept_in_order_of_index():
    # one hot key in each of four blocks, all alike: gamma needs three of them
    k = torch.zeros(160, 1, 16)
    k[[20, 52, 84, 116], 0, 0] = 40.0
    one = Batch.planted(torch.ones(160, 1, 16), k)
    found = one.index(_rule(tau=0.0, gamma=0.7, min_budget=0, coverage="block"))
    assert found.plan.vertical[0, 0].nonzero().flatten().tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize("scope", ["global", "row"])
def test_equal_tiles_of_the_pooled_map_are_kept_in_order_of_index(scope):
    # zero queries: every tile of a row has the same share
    one = Batch.planted(torch.zeros(100, 1, 16), torch.randn(120, 1, 16, generator=torch.Generator().manual_seed(0)))
    for gamma in (0.37, 0.63):
        one.assert_same_tiles(_rule(tau=1.0, gamma=gamma, qa_scope=scope, min_budget=0))


@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_gamma_beyond_rounding_lists_no_tile_above_the_diagonal(scope):
    batch = Batch([(100, 120)])
    rows = next(batch.lens.rows())
    tiles = batch.index(_rule(gamma=1 - 1e-15, tau=1.0, qa_scope=scope)).plan.extra[0]
    causal = torch.ones(tiles.shape[1:], dtype=torch.bool).tril(rows.first_block(16))
    # rows of the buffer past the last query block stay empty too
    causal[rows.query_blocks(16) :] = False
    assert not (tiles & ~causal).any()
    assert (tiles.sum((-1, -2)) >= 0.9 * causal.sum()).all()


# --- what keeps everything -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["q", "k"])
def test_a_head_that_sees_nan_keeps_every_tile(side):
    batch, rule = Batch([(60, 80), (40, 40)], Hq=4, Hkv=2), _rule(tau=0.0, min_budget=0)
    rows = next(batch.lens.rows())
    clean = batch.index(rule, "naive").plan.block_mask(rows)
    if side == "q":
        batch.q[55, 1] = torch.nan
    else:
        batch.k[30, 0] = torch.nan
    found = batch.index(rule)
    spoilt = [1] if side == "q" else [0, 1]
    assert found.is_finite[0].tolist() == [h not in spoilt for h in range(4)]
    assert found.is_finite[1].all()
    mask = found.plan.block_mask(rows)
    for h in range(4):
        assert int(mask[h].sum()) == rows.causal_tiles(16) if h in spoilt else torch.equal(mask[h], clean[h])


@pytest.mark.parametrize("scope", ["global", "row"])
def test_nan_outside_the_probe_spoils_only_query_aware_heads(scope):
    batch = Batch([(60, 80)], Hq=2)
    batch.q[3, 1] = torch.nan
    rows = next(batch.lens.rows())
    found = batch.index(_rule(tau=1.0, qa_scope=scope, min_budget=0))
    assert found.is_finite[0].tolist() == [True, False]
    assert int(found.plan.block_mask(rows)[1].sum()) == rows.causal_tiles(16)
    assert batch.index(_rule(tau=0.0)).is_finite.all()


@pytest.mark.parametrize("options", [{"gamma": 1.0}, {"min_q": 45, "min_kv": 64}], ids=["gamma-1", "too-short"])
def test_whole_sequences_keep_every_tile(options):
    batch = Batch([(60, 60), (40, 80), (0, 30), (0, 0), (70, 70)])
    found = batch.assert_same_tiles(_rule(tau=0.2, **options))
    kept = [int(found.plan.block_mask(rows).sum()) == 2 * rows.causal_tiles(16) for rows in batch.lens.rows()]
    assert kept[:4] == [True] * 4


def test_an_empty_batch_has_an_empty_plan():
    batch = Batch([(0, 0)])
    assert batch.index(_rule()).plan.vertical.shape == (1, 2, 0)


# --- launches and dispatch -------------------------------------------------------------------------------------------------------


def _recorded(monkeypatch):
    launches = []

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def run(*args, **options):
                launches.append((self.name, grid, [a for a in (*args, *options.values()) if not isinstance(a, Tensor)]))
                return self.kernel[grid](*args, **options)

            return run

    for name in [name for name in dir(triton_kernels) if name.endswith("_fwd_kernel")]:
        monkeypatch.setattr(triton_kernels, name, Recorder(name, getattr(triton_kernels, name)))
    return launches


def test_a_layer_takes_six_launches_that_depend_on_bounds_alone(monkeypatch):
    launches = _recorded(monkeypatch)
    recordings = []
    for sizes in ([(60, 60), (30, 50)], [(20, 33), (0, 1)]):
        batch = Batch(sizes)
        batch.lens = dataclasses.replace(batch.lens, max_q=64, max_kv=96)
        launches.clear()
        with monkeypatch.context() as patched:
            for name in ("item", "tolist", "nonzero", "__bool__", "__int__"):
                patched.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the device"))
            triton_select.select(batch.q, batch.keys, batch.lens, rule=_rule(tau=0.5), scale=batch.scale, softcap=None)
        recordings.append(list(launches))
    assert len(recordings[0]) == 6
    # the same calls would be captured in a CUDA graph
    assert recordings[0] == recordings[1]


def test_without_query_aware_heads_no_map_is_made(monkeypatch):
    launches = _recorded(monkeypatch)
    plan = Batch([(60, 60)]).index(_rule(tau=0.0)).plan
    assert plan.extra is None
    assert len(launches) == 4


def test_what_the_kernels_cannot_do_raises_with_the_reason(monkeypatch):
    batch = Batch([(60, 60)])
    with pytest.raises(UnsupportedError, match="published"):
        batch.index(_rule(fidelity="published", coverage="token"))
    with pytest.raises(UnsupportedError, match="block_size"):
        batch.index(_rule(block_size=256))
    elsewhere = dataclasses.replace(batch.lens, kv_len=batch.lens.kv_len.to("meta"))
    assert triton_select.obstacles(batch.q, batch.keys, elsewhere, _rule()) == ["q is on cpu, kv_len on meta"]
    monkeypatch.setattr(triton_select, "MAP_TILES", 10)
    with pytest.raises(UnsupportedError, match="maps of query-aware heads"):
        batch.index(_rule(tau=0.1))
    batch.index(_rule(tau=0.0))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedError, match="CUDA"):
        batch.index(_rule(tau=0.0))


def test_lengths_may_be_views_of_any_stride():
    batch = Batch([(60, 60), (30, 50)], gap=3)
    want = batch.index(_rule(tau=0.5)).plan
    table = torch.stack([batch.lens.q_start, batch.lens.q_len, batch.lens.kv_len, batch.keys.start], 1)
    batch.lens = dataclasses.replace(batch.lens, q_start=table[:, 0], q_len=table[:, 1], kv_len=table[:, 2])
    batch.keys = dataclasses.replace(batch.keys, start=table[:, 3])
    found = batch.index(_rule(tau=0.5)).plan
    for rows in batch.lens.rows():
        assert torch.equal(found.block_mask(rows), want.block_mask(rows))


def test_a_page_table_of_another_stride_is_refused():
    batch = Batch([(20, 20)])
    pages = batch.k.new_zeros(4, 16, 1, 16)
    keys = PagedKeys(pages, pages, torch.zeros(1, 4, dtype=torch.int32)[:, ::2], batch.lens.kv_len)
    assert "page_table must have last stride 1" in triton_select.obstacles(batch.q, keys, batch.lens, _rule())[0]


def test_auto_falls_back_on_cuda_counted_and_never_elsewhere(caplog):
    batch = Batch([(60, 60)])
    api._log_fallback.cache_clear()
    before = dict(api.dispatches)
    # stands in for a tensor on a GPU: the choice reads no more of it
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(60, 2, 16))
    for _ in range(2):
        assert api._choose("auto", q, batch.keys, batch.lens, _rule()) == "cpu"
    assert api.dispatches["auto->cpu"] - before.get("auto->cpu", 0) == 2
    assert len([record for record in caplog.records if "selects by torch" in record.message]) == 1
    batch.index(_rule(), "auto")
    assert api.dispatches["cpu"] - before.get("cpu", 0) == 1


def test_importing_the_selection_does_not_import_triton():
    code = "import sys, accel.kernels.flex_index, accel.kernels.flex_index.triton_select; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
