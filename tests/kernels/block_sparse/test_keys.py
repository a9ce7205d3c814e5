"""Key views: the same tokens whatever the memory, nothing copied by stealth, zeros past the end."""

from __future__ import annotations

import pytest
import torch

from accel.kernels.block_sparse import ContiguousKeys, PagedKeys
from accel.kernels.block_sparse.keys import token_major


def views():
    """The same two sequences of 5 and 7 tokens, with NaN everywhere else."""
    data = torch.arange(12 * 2 * 4, dtype=torch.float32).view(12, 2, 4)
    lengths = torch.tensor([5, 7])
    flat = torch.full((16, 2, 4), torch.nan)
    flat[2:7], flat[8:15] = data[:5], data[5:]
    contiguous = ContiguousKeys(flat, -flat, torch.tensor([2, 8]), lengths)
    cache = torch.full((2, 2, 9, 4), torch.nan)
    cache[0, :, 1:6], cache[1, :, 2:9] = data[:5].transpose(0, 1), data[5:].transpose(0, 1)
    static = ContiguousKeys.from_cache(cache, -cache, start=torch.tensor([1, 2]), kv_len=lengths)
    pages = torch.full((6, 3, 2, 4), torch.nan)
    table = torch.tensor([[4, 0, 5], [3, 1, 2]], dtype=torch.int32)
    for b, part in enumerate((data[:5], data[5:])):
        for t, token in enumerate(part):
            pages[table[b, t // 3], t % 3] = token
    return {"contiguous": contiguous, "static_cache": static, "paged": PagedKeys(pages, -pages, table, lengths)}, (data[:5], data[5:])


@pytest.mark.parametrize("name", ["contiguous", "static_cache", "paged"])
def test_tokens_heads_blocks_and_means_agree(name):
    found, sequences = views()
    keys = found[name]
    for b, data in enumerate(sequences):
        k, v = keys.tokens(b)
        assert torch.equal(k, data.transpose(0, 1))
        assert torch.equal(v, -k)
        one_head, _ = keys.head_tokens(b, range(1, 2))
        assert torch.equal(one_head, k[1:])
        gathered, values = keys.gather(b, torch.tensor([2, 0]), 3)
        n = k.shape[1]
        want = torch.zeros(2, 6, 4)
        want[:, : max(0, n - 6)] = k[:, 6:]
        want[:, 3:] = k[:, :3]
        assert torch.equal(gathered, want)
        assert torch.equal(values, -want)
        means = keys.block_mean(b, 3)
        assert torch.allclose(means[:, 0], k[:, :3].mean(1))
        assert torch.allclose(means[:, -1], k[:, (n - 1) // 3 * 3 :].mean(1))


def test_a_row_past_the_end_is_zero_even_where_the_first_key_is_nan():
    keys = ContiguousKeys(torch.full((3, 1, 4), torch.nan), torch.zeros(3, 1, 4), torch.tensor([0]), torch.tensor([3]))
    gathered, _ = keys.gather(0, torch.tensor([0]), 4)
    assert gathered[:, :3].isnan().all()
    assert torch.equal(gathered[:, 3], torch.zeros(1, 4))


def test_contiguous_keys_are_views():
    found, _ = views()
    for name in ("contiguous", "static_cache"):
        k, _ = found[name].tokens(1)
        assert k.untyped_storage().data_ptr() == found[name].k.untyped_storage().data_ptr()


def test_a_tensor_without_a_token_view_is_refused():
    x = torch.zeros(2, 3, 2, 4)
    assert token_major(x)[0].shape == (6, 2, 4)
    with pytest.raises(ValueError, match="contiguous"):
        token_major(x.transpose(2, 3))
    with pytest.raises(ValueError, match="last stride 1"):
        ContiguousKeys(torch.zeros(4, 3, 2).transpose(0, 2), torch.zeros(2, 3, 4), torch.tensor([0]), torch.tensor([2]))


@pytest.mark.parametrize("name", ["contiguous", "paged"])
def test_value_heads_may_have_another_size(name):
    keys = views()[0][name]
    assert keys.value_dim == keys.head_dim == 4
    assert keys.n_kv_heads == 2
    narrow = ContiguousKeys(torch.zeros(3, 1, 8), torch.zeros(3, 1, 2), torch.tensor([0]), torch.tensor([3]))
    assert (narrow.head_dim, narrow.value_dim) == (8, 2)
