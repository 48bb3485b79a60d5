"""Chunked prefill on the CPU: which keys meet which queries, and the operator against the oracle in fp64.

The arithmetic runs through torch here; what runs on a Hopper GPU is tested in tests/gpu.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.chunked_prefill import mla_prefill_paged
from mla_kernels.chunks import TILE, plan_chunks
from mla_kernels.reference import mla_prefill_paged_reference

HEADS = 2


@st.composite
def batches(draw, longest=40):
    """(query tokens, lengths): any of the queries may be new, all of them, or none."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=5))
    return [draw(st.integers(0, length)) for length in lengths], lengths


@settings(max_examples=300, deadline=None)
@given(batch=batches(3 * TILE), limit=st.integers(1, 4 * TILE))
def test_every_query_sees_each_of_its_keys_once(batch, limit):
    queries, lengths = batch
    starts = [0, *accumulate(queries)]
    seen = {}
    finished = set()
    for chunk in plan_chunks(starts, lengths, limit):
        assert 0 < chunk.tokens <= limit and len(chunk.calls) <= 2
        keys = [(s, position) for s, begin, end in chunk.parts for position in range(begin, end)]
        assert chunk.starts == [keys.index((s, begin)) for s, begin, _ in chunk.parts]
        for call in chunk.calls:
            assert call.q_starts[0] == call.k_starts[0] == 0 and len(call.q_starts) == len(call.k_starts)
            assert call.q_starts[-1] == call.q_end - call.q_begin
            assert call.k_starts[-1] == call.k_end - call.k_begin
            assert call.fresh == seen.keys().isdisjoint(range(call.q_begin, call.q_end))
            for i, begin in enumerate(call.q_starts[:-1]):
                n, own = call.q_starts[i + 1] - begin, slice(call.k_starts[i], call.k_starts[i + 1])
                own = keys[call.k_begin : call.k_end][own]
                for r in range(n):
                    query = call.q_begin + begin + r
                    sees = own[: max(0, r + len(own) - n + 1)] if call.causal else own
                    assert query not in finished or not sees
                    seen.setdefault(query, []).extend(sees)
                    if call.causal and sees:
                        finished.add(query)
    for s, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        for r in range(n):
            assert seen[starts[s] + r] == [(s, position) for position in range(length - n + r + 1)]
    assert finished == set(range(starts[-1]))


def test_a_sequence_that_fits_a_chunk_is_not_cut_and_no_cut_is_within_a_tile():
    starts, lengths = [0, 1, 2, 3, 4], [300, 200, 1200, 100]
    parts = [chunk.parts for chunk in plan_chunks(starts, lengths, 500)]
    assert parts == [
        [(0, 0, 300), (1, 0, 200)],
        [(2, 0, 384)],
        [(2, 384, 768)],
        [(2, 768, 1200)],
        [(3, 0, 100)],
    ]
    assert plan_chunks([0, 0], [9], 4) == [] and plan_chunks([0], [], 4) == []


@dataclass
class Case:
    """Arguments over a shuffled pool in which every slot that must not be read is NaN."""

    q: torch.Tensor
    pool: torch.Tensor
    table: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    starts: list[int]
    lengths: list[int]

    def run(self, **options):
        own = {"cu_seqlens_q": self.starts, "cache_seqlens": self.lengths, "return_lse": True}
        return mla_prefill_paged(self.q, self.pool, self.table, self.w_uk, self.w_uv, **(own | options))

    def expected(self, **options):
        own = {"cu_seqlens_q": torch.tensor(self.starts), "cache_seqlens": torch.tensor(self.lengths)}
        return mla_prefill_paged_reference(
            self.q, self.pool, self.table, self.w_uk, self.w_uv, **own, **options
        )

    def check(self, **options):
        chunked = {"workspace_tokens": options.pop("workspace_tokens", 7)}
        for result, wanted in zip(self.run(**chunked, **options), self.expected(**options), strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=1e-10)


def make_case(queries, lengths, page_size=4, seed=0, dtype=torch.float64, spare=2):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    pages = [-(-length // page_size) for length in lengths]
    ids = torch.randperm(sum(pages) + spare, generator=generator).int()
    pool = torch.full((len(ids), page_size, 1, 576), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), max(pages, default=0) + 1), 2**31 - 1, dtype=torch.int32)
    given_out = 0
    for i, (length, n) in enumerate(zip(lengths, pages, strict=True)):
        own = ids[given_out : given_out + n]
        given_out += n
        table[i, :n] = own
        for position in range(length):
            pool[own[position // page_size], position % page_size, 0] = randn(576)
    weights = (randn(HEADS, 128, 512) / 512**0.5 for _ in range(2))
    return Case(randn(sum(queries), HEADS, 192), pool, table, *weights, [0, *accumulate(queries)], lengths)


@settings(max_examples=60, deadline=None)
@given(
    batch=batches(),
    limit=st.integers(1, 50),
    page_size=st.sampled_from([1, 2, 3, 16, 256]),
    seed=st.integers(0, 9),
)
def test_equals_the_oracle_whatever_the_chunks(batch, limit, page_size, seed):
    make_case(*batch, page_size=page_size, seed=seed).check(workspace_tokens=limit)


def test_a_prefix_shared_by_two_sequences():
    case = make_case([3, 5], [20, 21])
    case.table[1, :4] = case.table[0, :4]
    case.check()


def test_large_scores_do_not_overflow_and_the_scale_is_used():
    case = make_case([4, 1], [30, 9])
    case.q *= 200
    case.check(softmax_scale=0.5)


def test_lengths_may_be_arrays_or_tensors_and_the_pool_three_dimensional():
    case = make_case([4, 1], [30, 9])
    wanted = case.run()
    for kind in (np.array, torch.tensor):
        own = {"cu_seqlens_q": kind(case.starts), "cache_seqlens": kind(case.lengths)}
        assert all(map(torch.equal, case.run(**own), wanted))
    case.pool = case.pool.squeeze(2)
    out = case.run(return_lse=False)
    assert torch.equal(out, wanted[0])


def test_no_queries_no_result():
    case = make_case([0, 0], [3, 0])
    out, lse = case.run()
    assert out.shape == (0, HEADS, 128) and lse.shape == (HEADS, 0)


@pytest.mark.parametrize("bad", [-1, 2**31 - 1, 999])
def test_a_page_outside_the_pool_spoils_its_sequence_and_no_other(bad, monkeypatch):
    case = make_case([2, 3, 2], [9, 20, 8])
    wanted = case.run(workspace_tokens=50)
    case.table[1, 2] = bad
    for limit in (5, 50):
        for result, before in zip(case.run(workspace_tokens=limit), wanted, strict=True):
            result, before = (x if x.shape[0] > HEADS else x.T for x in (result, before))
            assert result[2:5].isnan().all()
            for others in (slice(0, 2), slice(5, 7)):
                torch.testing.assert_close(result[others], before[others])
    monkeypatch.setenv("MLA_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"block_table\[1, 2\] is"):
        case.run()


def test_bf16_is_computed_in_fp32():
    case = make_case([5, 7], [50, 40], dtype=torch.bfloat16)
    wanted, wanted_lse = case.expected()
    for limit in (16, 1000):
        out, lse = case.run(workspace_tokens=limit)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert (out - wanted).norm() < 3e-3 * wanted.norm()
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cu_seqlens_q": [0, 4, 6]}, ValueError, "must ascend from 0 to the 5 tokens of q"),
        ({"cu_seqlens_q": [0, 6, 5]}, ValueError, "must ascend from 0"),
        ({"cu_seqlens_q": [0, 5]}, ValueError, "have 2 and 2 numbers, must have 3 and 2"),
        ({"cu_seqlens_q": [0.0, 4.0, 5.0]}, TypeError, "cu_seqlens_q is float64"),
        ({"cache_seqlens": [3, 9]}, ValueError, r"cache_seqlens\[0\] is 3, must be in \[4, 36\]"),
        ({"cache_seqlens": [30, 37]}, ValueError, r"cache_seqlens\[1\] is 37, must be in \[1, 36\]"),
        ({"workspace_tokens": 0}, ValueError, "workspace_tokens is 0, must be an int >= 1"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale is -1.0, must be finite and > 0"),
    ],
)
def test_refuses_impossible_lengths(change, error, message):
    case = make_case([4, 1], [30, 9])
    with pytest.raises(error, match=message):
        case.run(**change)


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("q", lambda t: t[..., :128], ValueError, r"q has shape \(5, 2, 128\), must be \(total_q, h, 192\)"),
        ("q", lambda t: t.float(), TypeError, "kv_cache is torch.float64, must be q's torch.float32"),
        ("q", lambda t: t.int(), TypeError, "q is torch.int32, must be torch.bfloat16 or torch.float16"),
        ("q", lambda t: t.mT.contiguous().mT, ValueError, "q has strides"),
        ("pool", lambda t: t[..., :512], ValueError, r"kv_cache has shape \(\d+, 4, 1, 512\)"),
        ("table", lambda t: t.long(), ValueError, "block_table is torch.int64"),
        ("w_uk", lambda t: t[:1], ValueError, r"w_uk has shape \(1, 128, 512\), must be \(2, 128, 512\)"),
        ("w_uv", lambda t: t.to("meta"), ValueError, "w_uv is on meta, q on cpu"),
    ],
)
def test_refuses_other_tensors(name, change, error, message):
    case = make_case([4, 1], [30, 9])
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(error, match=message):
        case.run()
