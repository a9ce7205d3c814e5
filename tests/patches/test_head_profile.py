"""What is measured of heads and how it sorts them: the table of kv-compression.md §2.7, the gap, and files of profiles."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from next_scale import INFO, SHAPES, context
from torch import Tensor

from accel.errors import OptionError
from accel.patches._hack_profiler import HeadProfiler, Sums
from accel.patches._head_profile import (
    HeadProfile,
    ProfileHeader,
    Shapes,
    automatic_count,
    classify,
    rank_correlation,
    read_header,
    schedule_mismatch,
    standing_gap,
)
from accel.protocols import CompressionContext, HeadGroup

ROWS, KEYS = 16, 30
HEADER = ProfileHeader("toy", "abc", 2, 4, SHAPES, "float32", 3, 0.25, "3 pictures of classes")


def profile(sigma: Any, entropy: Any = None, **changes: Any) -> HeadProfile:
    values = torch.as_tensor(sigma, dtype=torch.float32)
    size = tuple(values.shape)
    found = torch.zeros(size) if entropy is None else torch.as_tensor(entropy, dtype=torch.float32)
    return HeadProfile(values, found, torch.zeros(*size, 4, 4), replace(HEADER, n_layers=size[0], n_heads=size[1]), **changes)


# --- the statistic ------------------------------------------------------------------------------------------------------------


def attending(*heads: Tensor, **changes: Any) -> CompressionContext:
    """The last scale of one picture whose heads attend exactly as these matrices (16, 30) say."""
    # every query has a channel of its own, in which the keys hold the logarithms of its row
    q = torch.eye(ROWS).expand(1, len(heads), -1, -1)
    k = torch.stack([head.clamp_min(1e-38).log().T for head in heads])[None]
    return context(KEYS - ROWS, batch=1, heads=len(heads), q=q, k=k, **changes)


def measured(ctx: CompressionContext, *, layers: int = 2) -> Sums:
    assert ctx.scale_shapes is not None
    heads = ctx.k.shape[1]
    sums = Sums.of(layers, heads, len(ctx.scale_shapes))
    HeadProfiler(sums=sums).observe(replace(ctx, layer=0), HeadGroup(tuple(range(heads)), ctx.k.shape[2]))
    return sums


def one_hot(*keys: int) -> Tensor:
    """(16, 30): query i reads one key, the i-th of these, from the front again where they end."""
    return torch.eye(KEYS)[[keys[i % len(keys)] for i in range(ROWS)]]


def stripes() -> Tensor:
    """Every query reads the same four keys, in the same proportions."""
    row = torch.zeros(KEYS)
    row[[2, 3, 11, 29]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    return row.expand(ROWS, -1)


def test_the_table_of_the_specification() -> None:
    uniform, distinct = torch.full((ROWS, KEYS), 1 / KEYS), one_hot(*range(5, 21))
    heads = {
        "stripes": (stripes(), 0),
        "uniform": (uniform, 0),
        "all different": (distinct, 1 - 1 / 16),
        "four keys": (one_hot(0, 7, 20, 29), 1 - 1 / 4),
        "two keys": (one_hot(3, 4), 1 - 1 / 2),
        "a third fixed": (stripes() / 3 + distinct * 2 / 3, (2 / 3) ** 2 * (1 - 1 / 16)),
        "nine tenths fixed": (uniform * 0.9 + distinct * 0.1, 0.1**2 * (1 - 1 / 16)),
    }
    found = measured(attending(*(head for head, _ in heads.values())))
    for (name, (_, expected)), sigma in zip(heads.items(), found.sigma[0].tolist(), strict=True):
        assert sigma == pytest.approx(expected, abs=1e-6), name
    # a head that never moves is not told from another such head by rounding
    assert found.sigma[0, :2].tolist() == [0, 0]
    assert (found.sigma[1] == 0).all(), "another layer"
    assert found.n == 1


def test_entropy_is_a_share_of_the_largest_possible() -> None:
    four = torch.zeros(KEYS)
    four[[1, 8, 9, 25]] = 1 / 4
    found = measured(attending(torch.full((ROWS, KEYS), 1 / KEYS), one_hot(4), four.expand(ROWS, -1)))
    assert found.entropy[0].tolist() == pytest.approx([1, 0, math.log(4) / math.log(KEYS)], abs=1e-6)


def test_what_is_read_of_each_scale_is_counted_by_the_scale_that_reads() -> None:
    # positions 0, 1…4, 5…13, 14…29
    found = measured(attending(one_hot(0, 13, 14, 29), stripes()))
    assert found.scale_use[0, 0, 3].tolist() == pytest.approx([0.25, 0, 0.25, 0.5], abs=1e-6)
    assert found.scale_use[0, 1, 3].tolist() == pytest.approx([0, 0.7, 0.2, 0.1], abs=1e-6)
    assert (found.scale_use[0, :, :3] == 0).all()
    # an earlier scale adds to its own row, and nothing to the statistic of the last
    earlier = measured(context(5, step=2, batch=1, heads=2))
    torch.testing.assert_close(earlier.scale_use[0, :, 2].sum(-1), torch.ones(2, dtype=torch.float64))
    assert (earlier.scale_use[0, :, 2, 3] == 0).all()
    assert (earlier.scale_use[0, :, [0, 1, 3]] == 0).all()
    assert not earlier.sigma.any()
    assert earlier.n == 0


def test_only_conditional_rows_count_and_the_others_are_measured_beside_them() -> None:
    ctx = context(14, batch=4, has_guidance_pairs=True)
    both, halves = measured(ctx), [measured(replace(ctx, has_guidance_pairs=False, **rows_of(ctx, part))) for part in (slice(2), slice(2, 4))]
    assert (both.n, both.n_guided) == (2, 2)
    torch.testing.assert_close(both.sigma, halves[0].sigma)
    torch.testing.assert_close(both.sigma_unconditional, halves[1].sigma)
    torch.testing.assert_close(both.entropy, halves[0].entropy)
    torch.testing.assert_close(both.scale_use, halves[0].scale_use)
    assert halves[0].n_guided == 0
    assert not halves[0].sigma_unconditional.any()


def rows_of(ctx: CompressionContext, part: slice) -> dict[str, Any]:
    found = {name: getattr(ctx, name)[part] for name in ("q", "k", "v", "position", "valid", "q_position")}
    assert ctx.entry_scale is not None
    return {**found, "entry_scale": ctx.entry_scale[part]}


def dense_sigma(q: Tensor, k: Tensor) -> Tensor:
    """(H,): the definition, for one row of the batch."""
    return (q[0].double() @ k[0].double().mT).softmax(-1).var(1, correction=0).sum(-1)


def large(seed: int = 0) -> CompressionContext:
    """A last scale of 32 × 32 queries after one entry: heads that follow the query more or less sharply, and one that does not."""
    draw = torch.Generator().manual_seed(seed)
    n = 1024
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], -1)
    # (n, 16): smooth in both directions, as position embeddings are
    waves = torch.cat([f(place * frequency) for f in (torch.sin, torch.cos) for frequency in (0.05, 0.1, 0.2, 0.4)], -1)
    waves = torch.nn.functional.normalize(waves, dim=-1)
    noise = torch.nn.functional.normalize(torch.randn(4, n + 1, 16, generator=draw), dim=-1)
    k = torch.nn.functional.normalize(torch.cat([noise[:, :1], waves.expand(4, -1, -1)], 1) + 0.5 * noise, dim=-1)
    q = torch.stack([20 * waves, 8 * waves, 20 * (waves + noise[2, 1:]), 10 * noise[3, :1].expand(n, -1) + waves])
    whole: dict[str, Any] = {
        "q": q[None], "k": k[None], "v": k[None], "valid": torch.ones(1, 4, n + 1, dtype=torch.bool), "scale_shapes": ((1, 1), (32, 32)),
        "position": torch.arange(n + 1).expand(1, 4, -1), "entry_scale": torch.tensor([0] + [1] * n).expand(1, 4, -1),
    }  # fmt: skip
    return context(0, step=1, batch=1, **whole)


def test_streaming_equals_the_definition_and_key_order_does_not_matter() -> None:
    ctx = context(14, batch=1)
    exact = dense_sigma(ctx.q, ctx.k)
    torch.testing.assert_close(measured(ctx).sigma[0], exact, rtol=0, atol=1e-6)
    order = torch.randperm(KEYS, generator=torch.Generator().manual_seed(0))
    assert ctx.entry_scale is not None
    turned = measured(replace(ctx, k=ctx.k[:, :, order], entry_scale=ctx.entry_scale[:, :, order]))
    torch.testing.assert_close(turned.sigma[0], exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(turned.scale_use, measured(ctx).scale_use, rtol=0, atol=1e-6)


def test_half_of_the_queries_are_enough() -> None:
    ctx = large()
    assert ctx.q.shape[2] == 1024, "twice the 512 rows that are looked at"
    exact, found = dense_sigma(ctx.q, ctx.k), measured(ctx).sigma[0]
    assert (found != exact).any()
    torch.testing.assert_close(found, exact, rtol=0.05, atol=1e-6)
    assert exact.max() > 10 * exact.min(), "heads of very different kinds"


def test_what_is_read_is_looked_at_all_over_the_map() -> None:
    """128 rows are looked at; every eighth query of a map of 32 columns would be of four columns."""
    ctx = large()
    # head 0 reads the first scale in the columns that such a stride would meet
    q, k = torch.zeros(1, 4, 1024, 16), torch.zeros(1, 4, 1025, 16)
    k[:, :, 0, 0] = 1.0
    q[:, :, torch.arange(1024) % 8 == 4, 0] = 100.0
    found = measured(replace(ctx, q=q, k=k)).scale_use[0, 0, 1, 0]
    assert 1 / 16 < float(found) < 1 / 4, "one column of eight"


# --- two kinds ----------------------------------------------------------------------------------------------------------------


def kinds(sigma: Any, alpha: Any = "auto", **changes: Any) -> list[str]:
    rows = classify(profile(sigma, **changes), alpha=alpha, fallback=0.5)
    return ["".join("C" if one else "S" for one in row) for row in rows]


def test_heads_are_ranked_over_all_layers() -> None:
    assert kinds([[0.01, 0.02, 0.03], [0.7, 0.8, 0.9]], 0.5) == ["CCC", "SSS"]
    assert kinds([[0.01, 0.9, 0.03], [0.7, 0.02, 0.8]], 0.5) == ["CSC", "SCS"]


@pytest.mark.parametrize("alpha, n", [(0, 0), (0.01, 1), (0.07, 7), (0.29, 29), (0.295, 30), (0.5, 50), (1, 100), (1.0, 100)])
def test_their_number_is_rounded_up(alpha: float, n: int) -> None:
    sigma = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    found = torch.tensor(classify(profile(sigma), alpha=alpha, fallback=0.5))
    assert int(found.sum()) == n
    assert sigma[found].max() < sigma[~found].min() if 0 < n < 100 else True


def test_ties_go_to_the_lower_head() -> None:
    assert kinds([[0.5] * 4, [0.5] * 4], 0.75) == ["CCCC", "CCSS"]


def gapped(n_low: int, n: int = 20, factor: float = 1000.0) -> Tensor:
    """(n,) in a mixed order: log σ in even steps of 0.1, and behind the n_low lowest one of log(factor)."""
    logs = -8 + 0.1 * torch.arange(n, dtype=torch.float64)
    logs[n_low:] += math.log(factor) - 0.1
    return logs.exp()[torch.randperm(n, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("n_low, expected", [(10, 10), (13, 13), (17, 17), (9, 14), (18, 14), (3, 14)])
def test_the_widest_gap_between_a_half_and_85_percent_is_the_border(n_low: int, expected: int) -> None:
    # 0.7 of 20 are 14 where there is no gap inside
    assert automatic_count(gapped(n_low), 0.7) == expected


# eight gaps lie inside: (ln 8 + 4) / ln 2 = 8.77 times the usual 0.1
@pytest.mark.parametrize("factor, expected", [(math.exp(0.89), 12), (math.exp(0.86), 10)], ids=["above", "below"])
def test_a_gap_counts_where_one_kind_of_heads_would_rarely_show_it(factor: float, expected: int) -> None:
    assert automatic_count(gapped(12, factor=factor), 0.5) == expected


@pytest.mark.parametrize("n", [24, 256, 900])
def test_heads_of_one_kind_are_rarely_taken_for_two(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    found = [standing_gap(torch.randn(n, generator=generator, dtype=torch.float64).exp()) for _ in range(400)]
    assert sum(border is not None for border in found) < 0.09 * 400
    # two kinds a factor of twenty apart are seen
    two = torch.cat([torch.randn(n // 3 * 2, generator=generator).mul(0.2).exp(), 20 * torch.randn(n // 3, generator=generator).mul(0.2).exp()])
    assert standing_gap(two.double()) == n // 3 * 2


def test_the_widest_of_two_gaps_counts() -> None:
    sigma = gapped(11, factor=5)
    sigma[sigma > sigma.sort().values[14]] *= 100
    assert automatic_count(sigma, 0.5) == 15


@pytest.mark.parametrize("fallback, n", [(0.5, 10), (0.8, 16), (0.51, 11)])
def test_without_a_gap_the_fallback_is_used_as_a_share(fallback: float, n: int) -> None:
    assert automatic_count(gapped(0), fallback) == n
    assert automatic_count(torch.zeros(20), fallback) == n, "heads that are all alike"


def test_heads_that_do_not_move_at_all_are_no_trouble() -> None:
    assert kinds([[0.0, 0.9, 0.0, 0.0], [0.0, 0.8, 0.95, 0.0]]) == ["CSCC", "CSSC"]
    assert kinds([[0.0] * 4, [0.0] * 4]) == ["CCCC", "SSSS"]


def test_the_diffuse_guard_moves_heads_that_read_everything_alike() -> None:
    sigma, entropy = [[0.01, 0.02, 0.7], [0.03, 0.8, 0.9]], [[0.95, 0.2, 0.95], [0.9, 0.3, 0.1]]
    assert kinds(sigma, 0.5, entropy=entropy) == ["CCS", "CSS"]
    guarded = classify(profile(sigma, entropy), alpha=0.5, fallback=0.5, has_diffuse_guard=True)
    # 0.9 is not above 0.9; nobody takes the place of the first
    assert guarded == [[False, True, False], [True, False, False]]


def test_rank_correlation_is_spearmans() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # 1 − 6 · 2 / (4 · 15)
    assert rank_correlation(a, torch.tensor([[10.0, 30.0], [20.0, 40.0]])) == pytest.approx(0.8)


# --- files --------------------------------------------------------------------------------------------------------------------


def full() -> HeadProfile:
    draw = torch.Generator().manual_seed(0)
    sigma, entropy, unconditional = torch.rand(3, 2, 4, generator=draw)
    return HeadProfile(sigma, entropy, torch.rand(2, 4, 4, 4, generator=draw), HEADER, unconditional)


@pytest.mark.parametrize("is_guided", [True, False])
def test_a_profile_survives_its_file(is_guided: bool, tmp_path: Path) -> None:
    wanted = full() if is_guided else replace(full(), sigma_unconditional=None, header=replace(HEADER, rank_correlation=None))
    path = wanted.save(tmp_path / "profile.safetensors")
    found = HeadProfile.load(path)
    assert found.header == wanted.header == read_header(path)
    for name in ("sigma", "entropy", "scale_use"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    if wanted.sigma_unconditional is None:
        assert found.sigma_unconditional is None
    else:
        assert found.sigma_unconditional is not None
        assert torch.equal(found.sigma_unconditional, wanted.sigma_unconditional)


def test_maps_that_are_not_square_keep_their_sides(tmp_path: Path) -> None:
    header = replace(HEADER, scale_shapes=((1, 1), (2, 3), (5, 2), (4, 4)))
    assert HeadProfile.load(replace(full(), header=header).save(tmp_path / "profile.safetensors")).header.scale_shapes == header.scale_shapes


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    good = full().save(tmp_path / "good.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("cut", "text", "other", "old", "gone", "short")}
    files["cut"].write_bytes(good.read_bytes()[:-50])
    files["text"].write_text("sigma: 3")
    save_file({"sigma": torch.zeros(2, 4)}, files["other"])
    save_file({"sigma": torch.zeros(2, 4)}, files["old"], metadata={**HEADER.as_metadata(), "format": "accel.hack.profile.0"})
    metadata = HEADER.as_metadata()
    del metadata["fingerprint"]
    save_file({"sigma": torch.zeros(2, 4)}, files["short"], metadata=metadata)
    for name, path in files.items():
        for read in (HeadProfile.load, read_header):
            with pytest.raises(OptionError, match="head profile") as caught:
                read(path)
            assert str(path) in str(caught.value), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sigma": torch.zeros(2, 3)}, r"shapes .*'sigma': \(2, 3\).*expected .*'sigma': \(2, 4\)"),
        ({"scale_use": torch.zeros(2, 4, 4, 3)}, "expected"),
        ({"sigma_unconditional": torch.zeros(4, 2)}, "expected"),
        ({"sigma": torch.full((2, 4), float("nan"))}, "not finite"),
        ({"entropy": torch.full((2, 4), float("inf"))}, "not finite"),
        ({"scale_use": torch.full((2, 4, 4, 4), float("nan"))}, "not finite"),
    ],
    ids=["sigma", "scale_use", "unconditional", "nan", "inf entropy", "nan scale_use"],
)
def test_tensors_that_are_not_those_of_the_header_are_refused(changes: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    path = replace(full(), **changes).save(tmp_path / "profile.safetensors")    # type: ignore[arg-type]
    with pytest.raises(OptionError, match=message):
        HeadProfile.load(path)


def test_a_header_knows_which_model_it_is_of() -> None:
    assert HEADER.mismatches(INFO) == []
    assert "2 layers" in HEADER.mismatches(replace(INFO, n_layers=3))[0]
    assert "4 heads" in HEADER.mismatches(replace(INFO, n_kv_heads=8))[0]
    assert not HEADER.is_of_other_weights(replace(INFO, fingerprint=lambda: "abc"))
    assert HEADER.is_of_other_weights(replace(INFO, fingerprint=lambda: "abd"))
    assert not HEADER.is_of_other_weights(INFO), "a host that cannot tell weights apart"


def test_one_list_of_scales_must_begin_with_the_other() -> None:
    longer: Shapes = (*SHAPES, (6, 6))
    for calibrated, asked in ((SHAPES, SHAPES), (SHAPES, longer), (longer, SHAPES), (SHAPES, SHAPES[:1])):
        assert schedule_mismatch(calibrated, asked) is None
    other: Shapes = ((1, 1), (2, 2), (3, 4), (4, 4))
    message = schedule_mismatch(SHAPES, other)
    assert message is not None
    assert "1 2 3 4" in message
    assert "1 2 3×4 4" in message
    # the last that both have counts, and the first
    for asked in (SHAPES[1:], (*SHAPES[:3], (4, 5)), (*SHAPES[:2], (3, 4)), ((2, 2),)):
        assert schedule_mismatch(SHAPES, asked) is not None
