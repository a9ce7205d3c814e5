"""FlexPrefill as users build it: options, when it runs dense, the published preset, and its plans."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from accel.errors import OptionError, UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, Ragged, VerticalSlashPlan
from accel.patches.flexprefill import FlexPrefill
from accel.protocols import AttentionContext, AttentionStep, ModelInfo, RunDense
from accel.registry import build

STEP = AttentionStep(
    layer=3, n_layers=8, batch=1, q_len=8192, kv_len=8192, n_heads=8, n_kv_heads=2, head_dim=128, device="cpu", dtype="bfloat16"
)
MODEL = ModelInfo(
    family="llama", n_layers=2, n_heads=8, n_kv_heads=2, head_dim=64, layer_types=("full_attention",) * 2, device="cpu", dtype="float32"
)


def _sequence(L, N, *, Hq=2, Hkv=1, D=32, sharpness=3.0, seed=0):
    """Queries (L, Hq, D) with a few heavy columns per head, and keys (N, Hkv, D)."""
    g = torch.Generator().manual_seed(seed)
    q, k, u = (torch.randn(rows, heads, D, generator=g) for rows, heads in ((L, Hq), (N, Hkv), (1, Hq)))
    return (0.3 * q + u) * sharpness, k


def _plan(method, q, k, *, lens=None, start=None, scale=None):
    lens = lens or Ragged.of([q.shape[0]], [k.shape[0]])
    keys = ContiguousKeys(k, k, torch.zeros(1, dtype=torch.int64) if start is None else start, lens.kv_len)
    step = replace(
        STEP, batch=lens.batch, q_len=lens.max_q, kv_len=lens.max_kv, n_heads=q.shape[1], n_kv_heads=k.shape[1], head_dim=q.shape[2]
    )
    return method.plan(q, keys, AttentionContext(step=step, lens=lens, scale=q.shape[-1] ** -0.5 if scale is None else scale))


# --- options ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0}, {"gamma": 1.1}, {"gamma": math.nan}, {"gamma": "0.9"}, {"tau": -0.1}, {"tau": 1.5}, {"tau": None},
        {"min_budget": -1}, {"min_budget": 0.5}, {"max_budget": 512}, {"max_budget": 0, "min_budget": 0}, {"block_size": 0},
        {"block_size": 100}, {"block_size": 8}, {"block_size": 1024}, {"sink_blocks": -1}, {"local_blocks": 0}, {"min_q": 0},
        {"coverage": "tokens"}, {"slash_pooling": "floor"}, {"qa_scope": "head"}, {"gqa_mode": "union"}, {"fidelity": "bugs"}, {"min_seq_len": -1},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_its_name(options):
    with pytest.raises(OptionError, match=f"^flexprefill: {next(iter(options))} "):
        FlexPrefill(**options)


def test_options_survive_a_recipe():
    method = FlexPrefill(gamma=0.9, min_budget=256, block_size=64, dense_layers=(0, 1))
    assert build("flexprefill", method.options()) == method
    assert method.changed_options() == {"gamma": 0.9, "min_budget": 256, "block_size": 64, "dense_layers": (0, 1)}


def test_a_misspelt_option_is_answered_with_the_right_one():
    with pytest.raises(OptionError, match="did you mean 'gamma'"):
        build("flexprefill", {"gama": 0.9})


@pytest.mark.parametrize("head_dim, block_size", [(64, 128), (80, 128), (128, 128), (192, 64), (256, 64)])
def test_blocks_are_halved_for_wide_heads_unless_a_size_is_asked_for(head_dim, block_size):
    assert FlexPrefill().block_size_for(head_dim) == block_size
    assert FlexPrefill().rule(replace(STEP, head_dim=head_dim)).block_size == block_size
    assert FlexPrefill(block_size=256).block_size_for(head_dim) == 256


def test_every_tunable_option_may_take_every_value_of_its_range():
    for option, space in FlexPrefill.search_space().items():
        for value in (space.low, space.high):
            FlexPrefill(**{option: value})


# --- when it runs dense ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, step, reason",
    [
        pytest.param({"min_seq_len": 0}, {}, None, id="sparse"),
        pytest.param({"min_seq_len": 0, "dense_layers": (3,)}, {}, "dense layer", id="dense-layer"),
        pytest.param({"min_seq_len": 0}, {"q_len": 1}, "decode", id="decode"),
        pytest.param({"min_seq_len": 16384}, {}, "shorter than 16384 tokens", id="below-min-seq-len"),
        pytest.param({"min_seq_len": 0}, {"q_len": 1024, "kv_len": 1024}, "shorter than 1025 tokens", id="within-the-budget"),
        pytest.param({"min_seq_len": 0}, {"q_len": 1025, "kv_len": 1025}, None, id="past-the-budget"),
        pytest.param({"min_seq_len": 0, "min_budget": 0}, {"q_len": 256, "kv_len": 256}, "shorter than 257 tokens", id="two-blocks"),
        # with 64-token blocks 130 tokens are three blocks
        pytest.param({"min_seq_len": 0, "min_budget": 0}, {"q_len": 130, "kv_len": 130, "head_dim": 256}, None, id="three-blocks"),
        pytest.param({"min_seq_len": 0}, {"q_len": 255}, "fewer than 256 queries", id="few-queries"),
        pytest.param({"min_seq_len": 0}, {"q_len": 256}, None, id="enough-queries"),
        pytest.param({"min_seq_len": 0, "min_q": 2}, {"q_len": 2}, None, id="few-queries-asked-for"),
        pytest.param({"min_seq_len": 0, "gamma": 1.0}, {}, "gamma 1 keeps everything", id="gamma-1"),
    ],
)
def test_shapes_and_options_decide_what_runs_dense(options, step, reason):
    assert FlexPrefill(**options).dense_reason(replace(STEP, **step)) == reason


def test_without_min_seq_len_this_machines_crossover_decides(monkeypatch):
    monkeypatch.setattr("accel.crossover.crossover_tokens", lambda method, step: 10_000)
    assert FlexPrefill().dense_reason(STEP) == "shorter than 10000 tokens"
    assert FlexPrefill().dense_reason(replace(STEP, q_len=10_000, kv_len=10_000)) is None
    assert FlexPrefill().rule(STEP).min_kv == 10_000


def test_models_without_full_attention_are_refused():
    assert FlexPrefill().supports(MODEL, "transformers", []) == []
    hybrid = replace(MODEL, layer_types=("sliding_attention", "full_attention"))
    assert FlexPrefill().supports(hybrid, "transformers", []) == []
    sliding = replace(MODEL, layer_types=("sliding_attention",) * 2)
    assert "sliding_attention" in FlexPrefill().supports(sliding, "transformers", [])[0]


def test_a_model_too_short_for_a_sparse_call_is_told_so():
    short = replace(MODEL, max_positions=2048)
    assert "never runs sparse" in FlexPrefill(min_seq_len=4096).notice(short)
    assert FlexPrefill(min_seq_len=2048).notice(short) is None
    assert FlexPrefill(min_seq_len=4096).notice(MODEL) is None


# --- plans -----------------------------------------------------------------------------------------------------------------------

SMALL = {"block_size": 16, "min_budget": 16, "min_seq_len": 0}


def test_a_plan_keeps_gamma_of_the_last_queries():
    q, k = _sequence(400, 400)
    plan = _plan(FlexPrefill(**SMALL, tau=0.0, gamma=0.9), q, k)
    assert isinstance(plan, VerticalSlashPlan)
    lens = Ragged.of([400], [400])
    assert 0.1 < plan.density(lens, 2) < 0.9
    tiles = plan.block_mask(next(lens.rows()))
    weights = torch.einsum("lhd,nd->hln", q, k[:, 0]).mul(32**-0.5).masked_fill(torch.ones(400, 400).triu(1).bool(), -torch.inf).softmax(-1)
    block = torch.arange(400) // 16
    held = (weights * tiles[:, block][:, :, block]).sum(-1)[:, -16:].mean(-1)
    assert (held >= 0.9 - 1e-4).all()


def test_the_scale_and_the_softcap_of_the_layer_reach_the_selection():
    q, k = _sequence(200, 200)
    method, lens = FlexPrefill(**SMALL, tau=0.0), Ragged.of([200], [200])
    keys = ContiguousKeys(k, k, torch.zeros(1, dtype=torch.int64), lens.kv_len)
    base = AttentionContext(step=replace(STEP, head_dim=32), lens=lens, scale=32**-0.5)
    density = {
        name: method.plan(q, keys, ctx).density(lens, 2)
        for name, ctx in {"base": base, "flat": replace(base, scale=0.01), "capped": replace(base, softcap=0.1)}.items()
    }
    # flatter attention needs more blocks
    assert density["base"] < min(density["flat"], density["capped"])


def test_a_short_sequence_of_a_batch_stays_dense_as_it_would_alone():
    method = FlexPrefill(**{**SMALL, "min_seq_len": 100}, gamma=0.5)
    (q1, k1), (q2, k2) = _sequence(200, 200), _sequence(90, 90, seed=1)
    lens = Ragged.of([200, 90], [200, 90])
    plan = _plan(method, torch.cat([q1, q2]), torch.cat([k1, k2]), lens=lens, start=torch.tensor([0, 200]))
    first, second = lens.rows()
    assert plan.block_mask(second).sum() == 2 * second.causal_tiles(16)
    assert torch.equal(plan.block_mask(first), _plan(method, q1, k1).block_mask(first))


@pytest.mark.parametrize("where", ["queries", "keys"])
def test_nan_runs_dense_with_a_reason(where):
    q, k = _sequence(200, 200)
    (q if where == "queries" else k)[190, 0, 0] = torch.nan
    assert _plan(FlexPrefill(**SMALL), q, k) == RunDense("NaN in the probe")


def test_gradients_are_refused():
    assert FlexPrefill.trainable is False
    q, k = _sequence(64, 64)
    with pytest.raises(UnsupportedError, match="gradients"):
        _plan(FlexPrefill(**SMALL), q.requires_grad_(), k)
    with torch.no_grad():
        assert isinstance(_plan(FlexPrefill(**SMALL), q, k), VerticalSlashPlan)


# --- the published behaviour -----------------------------------------------------------------------------------------------------


def _published_tiles(q, k, *, b, gamma, tau, min_budget):
    """Tiles (nb, nb) bool of one head by the published algorithm, and whether the head is query-aware. q, k: (N, D) fp64.

    Transcribed from sparse-attention.md §2.3–2.7 with the slips of §2.9: items 1, 3, 7, 8, the reference clauses of §2.5 and §2.7.
    """
    n, dim = q.shape
    nb = (n + b - 1) // b
    scores = (q[n - b :] @ k.T) / math.sqrt(dim)
    # row r of the probe stands at position n − b + r and sees as many keys plus one
    probe = [row[: n - b + r + 1].softmax(0).tolist() for r, row in enumerate(scores)]
    column = [sum(row[t] for row in probe if t < len(row)) / b for t in range(n)]
    diagonal = [sum(row[len(row) - 1 - away] for row in probe if away < len(row)) / b for away in range(n)]

    def how_many(mass):
        prefix = torch.tensor(sorted(mass, reverse=True), dtype=q.dtype).cumsum(0)
        tokens = int((prefix <= gamma).sum()) + 1
        return min(max(tokens // 128 + 1, -(-min_budget // b)), nb)

    column_blocks = [sum(column[x : x + b]) for x in range(0, n, b)]
    far_to_near = diagonal[::-1]
    runs = [sum(far_to_near[x : x + b]) for x in range(0, n, b)]
    diagonal_blocks = runs[::-1]

    centre = [torch.stack([x[i : i + b].mean(0) for i in range(0, n, b)]) for x in (q, k)]
    guess = (centre[1] @ q[n - b :].mean(0) / math.sqrt(dim)).softmax(0)
    truth = torch.tensor(column_blocks, dtype=q.dtype)
    middle = (guess + truth) / 2
    divergence = float((guess * (guess / middle).log()).sum() + (truth * (truth / middle).log()).sum()) / 2
    follows_guess = divergence >= 0 and math.sqrt(divergence) < tau

    n_columns, n_diagonals = how_many(column), how_many(diagonal)
    if follows_guess:
        n_columns = n_diagonals = min(-(-min_budget // b), nb)
    columns, diagonals = (
        set(sorted(range(nb), key=lambda x: -math.inf if x == 0 else -mass[x])[:count])
        for mass, count in ((column_blocks, n_columns), (diagonal_blocks, n_diagonals))
    )
    tiles = torch.tensor([[j <= i and (j in columns or i - j in diagonals) for j in range(nb)] for i in range(nb)])
    if follows_guess:
        logits = centre[0] @ centre[1].T / math.sqrt(dim)
        share = torch.zeros(nb, nb, dtype=q.dtype)
        for i in range(nb):
            share[i, : i + 1] = logits[i, : i + 1].softmax(0)
        order = share.flatten().sort(descending=True)
        chosen = order.indices[order.values.cumsum(0) <= gamma * nb]
        tiles.view(-1)[chosen] = True
    return tiles.tril(), follows_guess


@pytest.mark.parametrize("b", [32, 64, 128], ids=lambda b: f"b{b}")
@pytest.mark.parametrize("N", [512, 601, 900])
@pytest.mark.parametrize("tau, sharpness", [(0.1, 3.0), (0.1, 0.5), (0.0, 4.0), (0.84, 4.0)], ids=["sharp", "flat", "lines", "query-aware"])
def test_the_reference_preset_lists_the_blocks_of_the_published_algorithm(b, N, tau, sharpness):
    q, k = _sequence(N, N, Hq=3, sharpness=sharpness, seed=b + N)
    options = {"gamma": 0.9, "tau": tau, "min_budget": 100}
    want = [_published_tiles(q[:, h].double(), k[:, 0].double(), b=b, **options) for h in range(3)]
    # the published code ignores the scale of the layer
    plan = _plan(FlexPrefill.reference(block_size=b, **options), q, k, scale=0.7)
    got = plan.block_mask(next(Ragged.of([N], [N]).rows()))
    for h, (tiles, _) in enumerate(want):
        assert torch.equal(got[h], tiles)


def test_the_reference_cases_hold_sparse_heads_of_both_kinds():
    # or the comparison above would prove little
    kinds = set()
    for sharpness in (3.0, 0.5):
        q, k = _sequence(512, 512, Hq=3, sharpness=sharpness, seed=544)
        for h in range(3):
            tiles, follows_guess = _published_tiles(q[:, h].double(), k[:, 0].double(), b=32, gamma=0.9, tau=0.1, min_budget=100)
            if int(tiles.sum()) < 136:
                kinds.add(follows_guess)
    assert kinds == {True, False}


def test_an_underflowed_estimate_is_query_aware_here_and_vertical_slash_in_the_preset():
    # one block a hundred logits below the others: its estimate is 0 in fp32, 0 · ln 0 is NaN, and NaN < tau is false (§2.6)
    q, k = torch.ones(256, 1, 16), torch.zeros(256, 1, 16)
    k[64:96] = -40.0
    ours = _plan(FlexPrefill(block_size=32, min_budget=32, min_seq_len=0), q, k)
    published = _plan(FlexPrefill.reference(block_size=32, min_budget=32), q, k)
    assert ours.extra is not None
    assert published.extra is None


def test_the_preset_differs_from_the_defaults_only_where_the_published_code_does():
    assert FlexPrefill.reference().changed_options() == {
        "coverage": "token", "slash_pooling": "reference", "fidelity": "published", "block_size": 128, "min_seq_len": 0,
    }  # fmt: skip
    assert FlexPrefill.reference(gamma=0.9, min_budget=512).gamma == 0.9
    with pytest.raises(OptionError, match="gamma"):
        FlexPrefill.reference(gamma=2)
