"""The oracle against a naive dense softmax, written here token by token without pages or batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels import reference
from mla_kernels.reference import merge_partials_reference, mla_decode_reference

GARBAGE = (-(2**31), 2**31 - 1, -1, 2147480000)


def dense_attention(q, lines, scale, causal, head_dim_v):
    """One sequence, python loops over rows: q (s_q, h_q, d), lines (len, d) -> out, lse in float64."""
    s_q, h_q, _ = q.shape
    out = torch.zeros(s_q, h_q, head_dim_v, dtype=torch.float64)
    lse = torch.full((h_q, s_q), -math.inf, dtype=torch.float64)
    for s in range(s_q):
        sees = len(lines) - (s_q - 1 - s) if causal else len(lines)
        for h in range(h_q):
            scores = [scale * float(q[s, h].double() @ lines[t].double()) for t in range(sees)]
            if not scores:
                continue
            top = max(scores)
            total = sum(math.exp(x - top) for x in scores)
            lse[h, s] = top + math.log(total)
            for t, x in enumerate(scores):
                out[s, h] += math.exp(x - top) / total * lines[t, :head_dim_v].double()
    return out, lse


def paged(lengths, page_size, d, generator, *, spare_pages=2, four_dims=True):
    """Random lines of each sequence, and the same lines in a shuffled pool whose every other slot is NaN."""
    pages_of = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages_of) + spare_pages
    pool = torch.full((num_pages, page_size, d), math.nan)
    free = torch.randperm(num_pages, generator=generator).tolist()
    width = max(pages_of) + 2
    table = torch.tensor(GARBAGE).repeat(len(lengths), width)[:, :width].to(torch.int32).contiguous()
    sequences = []
    for i, length in enumerate(lengths):
        lines = torch.randn(length, d, generator=generator)
        sequences.append(lines)
        for j in range(pages_of[i]):
            table[i, j] = free.pop()
            part = lines[j * page_size : (j + 1) * page_size]
            pool[table[i, j], : len(part)] = part
    cache = pool[:, :, None] if four_dims else pool
    return sequences, cache, table, torch.tensor(lengths, dtype=torch.int32)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=5),
    s_q=st.integers(1, 4),
    h_q=st.integers(1, 3),
    page_size=st.sampled_from([1, 2, 3, 7, 16]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.01, 1.0, 4.0]),
    chunk_bytes=st.sampled_from([1, 4096, 1 << 30]),
    four_dims=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_softmax(lengths, s_q, h_q, page_size, causal, scale, chunk_bytes, four_dims, seed):
    generator = torch.Generator().manual_seed(seed)
    d, head_dim_v = 12, 8
    sequences, cache, table, seqlens = paged(lengths, page_size, d, generator, four_dims=four_dims)
    q = torch.randn(len(lengths), s_q, h_q, d, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        out, lse = mla_decode_reference(
            q, cache, table, seqlens, head_dim_v=head_dim_v, softmax_scale=scale, causal=causal
        )
    for i, lines in enumerate(sequences):
        dense_out, dense_lse = dense_attention(q[i], lines, scale or d**-0.5, causal, head_dim_v)
        torch.testing.assert_close(out[i], dense_out, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse[i], dense_lse, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_shape_and_scale(dtype):
    generator = torch.Generator().manual_seed(0)
    sequences, cache, table, seqlens = paged([70, 3], 64, 576, generator)
    cache = cache.to(dtype)
    q = torch.randn(2, 1, 2, 576, generator=generator).to(dtype)
    out, lse = mla_decode_reference(q, cache, table, seqlens)
    assert out.shape == (2, 1, 2, 512) and lse.shape == (2, 2, 1)
    assert out.dtype == lse.dtype == torch.float64
    for i, lines in enumerate(sequences):
        dense_out, dense_lse = dense_attention(q[i], lines.to(dtype), 1 / 24, False, 512)
        torch.testing.assert_close(out[i], dense_out, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse[i], dense_lse, rtol=1e-11, atol=1e-12)


def test_large_logits_neither_overflow_nor_lose_the_maximum():
    q = torch.ones(1, 1, 1, 2)
    cache = torch.tensor([[[-2000.0, 0.0], [1000.0, 0.0], [1000.0, 2000.0]]])
    table, seqlens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3])
    out, lse = mla_decode_reference(q, cache, table, seqlens, head_dim_v=1, softmax_scale=1.0)
    assert lse.item() == 3000.0 and out.item() == 1000.0


def test_blind_rows_are_zero_with_minus_infinity():
    generator = torch.Generator().manual_seed(1)
    _, cache, table, seqlens = paged([0, 2], 4, 12, generator)
    q = torch.randn(2, 4, 3, 12, generator=generator)
    out, lse = mla_decode_reference(q, cache, table, seqlens, head_dim_v=8, causal=True)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
    assert (out[1, :2] == 0).all() and (lse[1, :, :2] == -math.inf).all()
    assert out[1, 2:].ne(0).all() and lse[1, :, 2:].isfinite().all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table, lens: lens.__setitem__(1, -1),
        lambda table, lens: lens.__setitem__(1, -(2**31)),
        lambda table, lens: lens.__setitem__(1, table.shape[1] * 4 + 1),
        lambda table, lens: lens.__setitem__(1, 2**31 - 1),
        lambda table, lens: table.__setitem__((1, 0), -1),
        lambda table, lens: table.__setitem__((1, 1), 2**31 - 1),
        lambda table, lens: table.__setitem__((1, 2), 7),  # one past the pool, on the last page in use
    ],
)
def test_invalid_sequence_is_nan_and_leaves_the_others_alone(spoil):
    generator = torch.Generator().manual_seed(2)
    _, cache, table, seqlens = paged([5, 9, 4], 4, 12, generator, spare_pages=1)
    assert cache.shape[0] == 7
    q = torch.randn(3, 2, 3, 12, generator=generator)
    good_out, good_lse = mla_decode_reference(q, cache, table, seqlens, head_dim_v=8)
    spoil(table, seqlens)
    out, lse = mla_decode_reference(q, cache, table, seqlens, head_dim_v=8)
    assert out[1].isnan().all() and lse[1].isnan().all()
    for i in (0, 2):
        torch.testing.assert_close(out[i], good_out[i], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(lse[i], good_lse[i], rtol=1e-12, atol=1e-14)


def test_merge_of_a_split_cache_equals_the_whole():
    generator = torch.Generator().manual_seed(3)
    _, cache, table, seqlens = paged([12, 5, 0, 3], 4, 12, generator)
    q = torch.randn(4, 2, 3, 12, generator=generator)
    whole = mla_decode_reference(q, cache, table, seqlens, head_dim_v=8)
    parts = [
        mla_decode_reference(
            q, cache, table[:, first:], (seqlens - 4 * first).clamp(0, 4 * pages), head_dim_v=8
        )
        for first, pages in ((0, 1), (1, 1), (2, 1))
    ]
    out, lse = merge_partials_reference(*(torch.stack(side) for side in zip(*parts, strict=True)))
    torch.testing.assert_close(out, whole[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, whole[1], rtol=1e-12, atol=1e-14)
    assert (lse[2] == -math.inf).all() and (out[2] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_queries_are_sequences_of_their_own(causal):
    generator = torch.Generator().manual_seed(3)
    q, pool, table, lengths = (
        torch.randn(6, 2, 8, generator=generator),
        torch.randn(7, 4, 8, generator=generator),
        torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32),
        torch.tensor([9, 5], dtype=torch.int32),
    )
    starts = torch.tensor([0, 4, 6], dtype=torch.int32)
    out, lse = mla_decode_reference(q, pool, table, lengths, head_dim_v=4, causal=causal, cu_seqlens_q=starts)
    for i, rows in enumerate((slice(0, 4), slice(4, 6))):
        own = slice(i, i + 1)
        one_out, one_lse = mla_decode_reference(
            q[None, rows], pool, table[own], lengths[own], head_dim_v=4, causal=causal
        )
        assert torch.equal(out[rows], one_out[0]) and torch.equal(lse[:, rows], one_lse[0])
