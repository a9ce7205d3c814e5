"""How far information travels through layers of PowerAttention: the receptive-field statements of sparse-attention.md §3.3 and §3.4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accel.kernels.block_sparse import ContiguousKeys, ImplicitPlan, Ragged, Rows
from accel.kernels.block_sparse.differentiable import differentiable_attention

POWERS_5_1 = ImplicitPlan(256, 5, 1)
PURE_POWERS = ImplicitPlan(256, 1, 0)
WINDOW_9_1 = ImplicitPlan(256, 9, 1, powers=False)


def reached_per_layer(plan: ImplicitPlan, n_blocks: int) -> list[int]:
    """Blocks that the last one depends on after 1, 2, … layers, until nothing is added."""
    reached = frontier = {n_blocks - 1}
    counts: list[int] = []
    while True:
        frontier = {j for i in frontier for j in plan.row_blocks(i)} - reached
        reached = reached | frontier
        # the own block is listed in the first layer already
        if counts and not frontier:
            return counts
        counts.append(len(reached))


# N in units of 1024 tokens; layers with (5, 1), with pure powers, with a window of 9 + 1
LAYERS = [
    (4, 3, 4, 2), (8, 4, 5, 4), (16, 5, 6, 8), (32, 6, 7, 16), (64, 7, 8, 32),
    (128, 8, 9, 64), (256, 9, 10, 128), (512, 10, 11, 256), (1024, 11, 12, 512),
]  # fmt: skip


@pytest.mark.parametrize(("n_k", "power", "pure", "window"), LAYERS, ids=[f"{row[0]}K" for row in LAYERS])
def test_layers_until_the_last_block_depends_on_everything(n_k: int, power: int, pure: int, window: int) -> None:
    n_blocks = n_k * 4
    for plan, layers in ((POWERS_5_1, power), (PURE_POWERS, pure), (WINDOW_9_1, window)):
        counts = reached_per_layer(plan, n_blocks)
        assert len(counts) == layers
        assert counts[-1] == n_blocks


def test_growth_of_the_receptive_field_at_128_blocks() -> None:
    assert reached_per_layer(POWERS_5_1, 128) == [10, 35, 75, 110, 126, 128]
    # 8 blocks a layer; the sink is reached from the start
    assert reached_per_layer(WINDOW_9_1, 128) == [min(10 + 8 * d, 128) for d in range(16)]


@pytest.mark.parametrize("layers", range(1, 8))
@pytest.mark.parametrize(("window", "complete"), [(1, lambda d: 2 ** (d + 1) - 2), (4, lambda d: 2 ** (d + 2) - 4), (5, lambda d: 2 ** (d + 2) - 4)])
def test_powers_of_the_block_matrix_are_complete_up_to_the_first_miss(window: int, complete, layers: int) -> None:
    radius = complete(layers)
    n = (radius + 2) * 8
    edges = ImplicitPlan(8, window, 0).block_mask(Rows(0, 0, n, n))[0].float()
    reach = edges
    for _ in range(layers - 1):
        reach = ((reach @ edges) > 0).float()
    # without a sink everything depends on the distance only: the last row tells all distances
    by_distance = reach[-1].flip(0) > 0
    assert by_distance[: radius + 1].all()
    assert not by_distance[radius + 1]


def test_pure_powers_reach_a_distance_in_as_many_layers_as_it_has_binary_ones() -> None:
    edges = PURE_POWERS.block_mask(Rows(0, 0, 64 * 256, 64 * 256))[0].float()
    reach = torch.eye(64)
    for layers in range(1, 7):
        reach = ((reach @ edges) > 0).float()
        by_distance = reach[-1].flip(0) > 0
        assert by_distance.tolist() == [distance.bit_count() <= layers for distance in range(64)]


def stacked(x: Tensor, weights: list[Tensor], plan: ImplicitPlan) -> Tensor:
    """Toy layers, attention plus residual. x (N, 1, D)."""
    n = x.shape[0]
    lens = Ragged.of([n], [n])
    for w_q, w_k, w_v in weights:
        keys = ContiguousKeys(x @ w_k, x @ w_v, torch.tensor([0]), torch.tensor([n]))
        x = x + differentiable_attention(x @ w_q, keys, plan, lens, scale=0.5)
    return x


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gradients_through_stacked_layers_arrive_from_exactly_the_reachable_blocks(layers: int) -> None:
    block, n_blocks = 3, 34
    plan = ImplicitPlan(block, 5, 1)
    generator = torch.Generator().manual_seed(0)
    n = n_blocks * block
    x = torch.randn(n, 1, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weights = [torch.randn(3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(layers)]
    stacked(x, list(weights), plan)[-1].sum().backward()
    felt = x.grad.abs().view(n_blocks, -1).amax(-1) > 0
    assert felt.sum() == reached_per_layer(plan, n_blocks)[layers - 1]
    radius = 2 ** (layers + 2) - 4
    assert felt[-1 - radius :].all()
    # inside the radius every token counts, not only every block
    assert (x.grad.abs().amax((1, 2))[-radius * block :] > 0).all()


def test_a_finite_difference_confirms_the_gradient_at_the_edge_of_the_radius() -> None:
    block, n_blocks = 3, 34
    plan = ImplicitPlan(block, 5, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_blocks * block, 1, 4, dtype=torch.float64, generator=generator)
    weights = list(torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator))
    base = stacked(x, weights, plan)[-1]
    # two layers: complete up to distance 12, nothing at 13
    for distance, is_felt in ((12, True), (13, False)):
        moved = x.clone()
        moved[(n_blocks - 1 - distance) * block] += 1.0
        assert torch.equal(stacked(moved, weights, plan)[-1], base) != is_felt
