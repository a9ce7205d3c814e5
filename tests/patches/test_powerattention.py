"""PowerAttention's mask, token by token and as row lists, against sparse-attention.md §3.2 and §3.3; its options and decisions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_llama
from torch import Tensor

import accel
from accel.kernels.block_sparse import ImplicitPlan, Ragged, Rows
from accel.kernels.block_sparse.differentiable import token_mask
from accel.patches.powerattention import PowerAttention
from accel.protocols import AttentionStep, ModelInfo
from accel.registry import build


def step(**changes: object) -> AttentionStep:
    """A prefill of 8192 tokens in layer 2 of 28."""
    sizes = {"layer": 2, "n_layers": 28, "batch": 1, "q_len": 8192, "kv_len": 8192, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64}
    return AttentionStep(**{**sizes, "device": "cpu", "dtype": "float32", **changes})  # type: ignore[arg-type]


def pattern(**options: object) -> ImplicitPlan:
    return PowerAttention(**options).static_pattern(step())  # type: ignore[arg-type]


def model_info(n_layers: int = 28) -> ModelInfo:
    return ModelInfo("llama", n_layers, 4, 2, 64, ("full_attention",) * n_layers, "cpu", "float32", 131072)


def is_visible(query: int, key: int, *, block: int, window: int, sink: int, max_power: int | None) -> bool:
    """sparse-attention.md §3.2, word for word."""
    i, j = query // block, key // block
    powers = [2**m for m in range(20 if max_power is None else max_power + 1)]
    return key <= query and (j < sink or 0 <= i - j < window or i - j in powers)


patterns = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 7),
        "window_blocks": st.integers(1, 9),
        "sink_blocks": st.integers(0, 3),
        "max_power": st.none() | st.integers(0, 5),
    }
)


# --- the mask -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(options=patterns, n=st.integers(1, 90), data=st.data())
def test_the_mask_is_the_rule_token_by_token(options: dict, n: int, data: st.DataObject) -> None:
    q_len = data.draw(st.integers(1, n))
    rule = {"block": options["block_size"], "window": options["window_blocks"], "sink": options["sink_blocks"], "max_power": options["max_power"]}
    want = torch.tensor([[is_visible(query, key, **rule) for key in range(n)] for query in range(n - q_len, n)])
    assert torch.equal(token_mask(pattern(**options), Rows(0, 0, q_len, n))[0], want)


@settings(max_examples=60)
@given(options=patterns, n_blocks=st.integers(1, 200))
def test_row_lists_ascend_without_duplicates_and_equal_the_mask(options: dict, n_blocks: int) -> None:
    plan = pattern(**options)
    n = n_blocks * plan.block_size
    mask = plan.block_mask(Rows(0, 0, n, n))[0]
    w, s = plan.window_blocks, plan.sink_blocks
    for i in range(n_blocks):
        row = plan.row_blocks(i)
        assert all(a < b for a, b in pairwise(row))
        assert row == mask[i].nonzero().flatten().tolist()
        if i >= w:
            # ⌈log2 w⌉ is the first power at or past the window
            assert len(row) <= s + w + max(0, i.bit_length() - 1 - (w - 1).bit_length() + 1)


@settings(max_examples=80)
@given(options=patterns, data=st.data())
def test_the_mask_is_dense_exactly_up_to_its_dense_blocks(options: dict, data: st.DataObject) -> None:
    method = PowerAttention(**options)
    limit = method.longest_dense_blocks * method.block_size
    assert method.min_useful_len == limit + 1
    n = data.draw(st.integers(1, limit))
    assert torch.equal(token_mask(pattern(**options), Rows(0, 0, n, n))[0], torch.ones(n, n, dtype=torch.bool).tril())
    hidden = torch.ones(limit + 1, limit + 1, dtype=torch.bool).tril() & ~token_mask(pattern(**options), Rows(0, 0, limit + 1, limit + 1))[0]
    assert hidden.any()


@pytest.mark.parametrize(
    ("window", "sink", "max_power", "blocks"),
    [(5, 1, None, 6), (4, 1, None, 6), (1, 0, None, 3), (1, 0, 0, 2), (8, 2, None, 11), (8, 2, 2, 10), (3, 0, None, 3)],
    ids=["defaults", "4 is a power", "pure powers", "capped", "8 is a power", "8 past the cap", "no sink"],
)
def test_dense_length_of_known_patterns(window: int, sink: int, max_power: int | None, blocks: int) -> None:
    assert PowerAttention(window_blocks=window, sink_blocks=sink, max_power=max_power).longest_dense_blocks == blocks


def test_the_first_hidden_pair_of_the_defaults_is_block_1_for_query_block_6() -> None:
    mask = pattern().block_mask(Rows(0, 0, 7 * 256, 7 * 256))[0]
    assert (torch.ones_like(mask).tril() & ~mask).nonzero().tolist() == [[6, 1]]


# N, last-row blocks, active tiles, density of the causal half in %, ideal speed-up: the digits that §3.3 prints
TABLE = [
    (4, 7, 88, "64.7", "1.55"),
    (8, 8, 215, "40.7", "2.46"),
    (16, 9, 502, "24.1", "4.14"),
    (32, 10, 1141, "13.8", "7.24"),
    (64, 11, 2548, "7.75", "12.9"),
    (128, 12, 5619, "4.28", "23.4"),
    (256, 13, 12274, "2.34", "42.8"),
    (512, 14, 26609, "1.27", "78.9"),
    (1024, 15, 57328, "0.68", "146"),
]


@pytest.mark.parametrize(("n_k", "last_row", "tiles", "density", "speedup"), TABLE, ids=[f"{row[0]}K" for row in TABLE])
def test_tile_counts_of_the_table(n_k: int, last_row: int, tiles: int, density: str, speedup: str) -> None:
    plan = pattern()
    n_blocks = n_k * 1024 // 256
    lengths = [len(plan.row_blocks(i)) for i in range(n_blocks)]
    causal = n_blocks * (n_blocks + 1) // 2
    assert lengths[-1] == last_row
    assert sum(lengths) == tiles

    def printed(value: float, like: str) -> str:
        return f"{value:.{len(like.partition('.')[2])}f}"

    assert printed(100 * tiles / causal, density) == density
    assert printed(causal / tiles, speedup) == speedup


def test_density_of_a_plan_is_that_of_the_table() -> None:
    lens = Ragged.of([16384], [16384])
    assert pattern().tiles(lens, 3) == (3 * 502, 3 * 64 * 65 // 2)


# --- options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be a whole number of at least 1"),
        ({"block_size": 256.0}, "block_size"),
        ({"window_blocks": 0}, "window_blocks"),
        ({"window_blocks": True}, "window_blocks"),
        ({"sink_blocks": -1}, "sink_blocks"),
        ({"max_power": -1}, "max_power"),
        ({"is_adapted": "yes"}, "is_adapted must be True or False"),
        ({"apply_to": "Prefill"}, "apply_to must be prefill, decode, both or None"),
        ({"full_layers": "3/7"}, "full_layers must be '2/7', 'none', layer indices or None"),
        ({"full_layers": (0, -1)}, "full_layers"),
        ({"full_layers": 3}, "full_layers"),
        ({"min_seq_len": -1}, "min_seq_len"),
    ],
    ids=lambda value: next(iter(value.items())).__repr__() if isinstance(value, dict) else "",
)
def test_options_out_of_range_explain_themselves(options: dict, message: str) -> None:
    with pytest.raises(accel.OptionError, match=message):
        PowerAttention(**options)


def test_options_survive_a_recipe_with_its_lists() -> None:
    method = PowerAttention(full_layers=(0, 3), is_adapted=True)
    assert build("powerattention", {"full_layers": [0, 3], "is_adapted": True}) == method
    assert method.changed_options() == {"full_layers": (0, 3), "is_adapted": True}


def test_every_tunable_option_exists_and_its_bounds_are_valid() -> None:
    for option, values in PowerAttention.search_space().items():
        for value in getattr(values, "values", None) or (values.low, values.high):  # type: ignore[union-attr]
            PowerAttention(**{option: int(value)})


# --- which calls run sparse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({}, [0, 1, 7, 8, 14, 15, 21, 22]),
        ({"is_adapted": True}, []),
        ({"is_adapted": True, "full_layers": "2/7"}, [0, 1, 7, 8, 14, 15, 21, 22]),
        ({"full_layers": "none"}, []),
        ({"full_layers": (3, 5), "dense_layers": (9,)}, [3, 5, 9]),
        ({"full_layers": ()}, []),
    ],
    ids=["unmodified model", "adapted", "adapted hybrid", "none", "given", "given none"],
)
def test_which_layers_stay_dense(options: dict, dense: list[int]) -> None:
    method = PowerAttention(min_seq_len=0, **options)
    assert [i for i in range(28) if method.dense_reason(step(layer=i)) == "dense layer"] == dense


@pytest.mark.parametrize(
    ("options", "q_len", "kv_len", "reason"),
    [
        ({}, 8192, 8192, None),
        ({}, 1, 8193, "decode"),
        ({}, 4, 8196, "few query rows"),
        ({}, 511, 8192, "few query rows"),
        ({}, 512, 8192, None),
        ({"is_adapted": True}, 1, 8193, None),
        ({"is_adapted": True}, 4, 8196, None),
        ({"apply_to": "both"}, 1, 8193, None),
        ({"apply_to": "decode"}, 8192, 8192, "prefill"),
        ({"apply_to": "decode"}, 1, 8193, None),
        ({"apply_to": "decode"}, 4, 8196, None),
        ({"is_adapted": True, "apply_to": "prefill"}, 1, 8193, "decode"),
        ({}, 1536, 1536, "shorter than 1537 tokens"),
        ({}, 1537, 1537, None),
        ({"is_adapted": True}, 1, 1536, "shorter than 1537 tokens"),
        ({"is_adapted": True}, 1, 1537, None),
        ({"is_adapted": True, "min_seq_len": 9000}, 1, 8999, "shorter than 9000 tokens"),
        ({"is_adapted": True, "min_seq_len": 9000}, 1, 9000, None),
    ],
    ids=lambda value: repr(value),
)
def test_which_phases_and_lengths_run_sparse(options: dict, q_len: int, kv_len: int, reason: str | None) -> None:
    method = PowerAttention(**{"min_seq_len": 0, **options})
    assert method.dense_reason(step(q_len=q_len, kv_len=kv_len)) == reason


@pytest.mark.parametrize("q_len", [1, 5000], ids=["decode", "prefill"])
def test_below_the_measured_crossover_everything_runs_dense(q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.crossover.measured_crossovers", lambda: {"powerattention/cpu/float32/d64": 6000})
    method = PowerAttention(is_adapted=True)
    assert method.dense_reason(step(q_len=q_len, kv_len=5999)) == "shorter than 6000 tokens"
    assert method.dense_reason(step(q_len=q_len, kv_len=6000)) is None


def test_an_unmodified_model_gets_one_line_of_notice_and_an_adapted_one_none() -> None:
    line = PowerAttention().notice(model_info())
    assert line is not None
    assert "adapting" in line
    assert "\n" not in line
    assert PowerAttention(is_adapted=True).notice(model_info()) is None


def test_a_model_of_dense_layers_only_is_told_so() -> None:
    assert PowerAttention().notice(model_info(2)) == "all 2 layers stay dense; full_layers='none' makes them sparse"


def test_layers_that_the_model_lacks_are_refused() -> None:
    assert PowerAttention(full_layers=(0, 27)).supports(model_info(), "transformers", []) == []
    assert PowerAttention(full_layers=(0, 28, 30)).supports(model_info(), "transformers", []) == ["full_layers names 28, 30, the last layer is 27"]


# --- in a model ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 64, (1, 200), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_an_unmodified_model_runs_five_of_seven_layers_sparse_and_decodes_densely(ids: Tensor) -> None:
    model = tiny_llama(num_hidden_layers=9)
    with accel.apply(model, "powerattention", block_size=16, min_seq_len=0) as handle:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert {i: s.sparse_calls for i, s in handle.stats.layers.items() if s.sparse_calls} == dict.fromkeys(range(2, 7), 1)
        # two decoding steps: 9 layers, of which 4 are dense for their own reason
        assert handle.stats.total.dense_calls == {"dense layer": 4 * 3, "decode": 5 * 2}
        assert "adapting the model" in handle.report()


@torch.no_grad()
def test_decoding_an_adapted_model_equals_its_prefill(ids: Tensor) -> None:
    model = tiny_llama()
    with accel.apply(model, "powerattention", block_size=16, min_seq_len=0, is_adapted=True) as handle:
        grown = model.generate(ids, max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True)
        assert handle.stats.total.dense_calls == {}
        assert handle.stats.total.sparse_calls == 3 * 40
        assert handle.notices == []
        whole = model(grown.sequences[:, :-1]).logits[:, 199:]
    torch.testing.assert_close(torch.stack(grown.logits, 1), whole, rtol=1e-4, atol=1e-5)
    assert (model(grown.sequences[:, :-1]).logits[:, 199:] - whole).abs().max() > 1e-3
