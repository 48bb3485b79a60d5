"""Chunked prefill on the GPU against the oracle, PyTorch in 16 bits, and keys that are not cut."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch

from mla_kernels.chunked_prefill import mla_prefill_paged, result_bytes, workspace_bytes
from mla_kernels.prefill import mla_prefill
from mla_kernels.reference import mla_prefill_paged_reference
from tests.gpu.cases import DTYPES, by_dtype, same_bits

SCALE = 192**-0.5
BATCH = [5, 300, 0, 64, 257], [700, 300, 90, 1000, 300]  # queries, lengths


@dataclass
class Case:
    q: torch.Tensor
    pool: torch.Tensor
    table: torch.Tensor
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    starts: list[int]
    lengths: list[int]

    def run(self, workspace_tokens):
        return mla_prefill_paged(
            self.q,
            self.pool,
            self.table,
            self.w_uk,
            self.w_uv,
            cu_seqlens_q=self.starts,
            cache_seqlens=self.lengths,
            workspace_tokens=workspace_tokens,
            return_lse=True,
        )

    def expected(self):
        return mla_prefill_paged_reference(
            self.q,
            self.pool,
            self.table,
            self.w_uk,
            self.w_uv,
            cu_seqlens_q=torch.tensor(self.starts),
            cache_seqlens=torch.tensor(self.lengths, device="cuda"),
        )

    def decompressed(self):
        """(queries, keys, values) of each sequence, in the dtype, as PyTorch multiplies them."""
        pool, page_size = self.pool.squeeze(2), self.pool.shape[1]
        for i, (begin, end) in enumerate(pairwise(self.starts)):
            position = torch.arange(self.lengths[i], device="cuda")
            lines = pool[self.table[i, position // page_size].long(), position % page_size]
            k = torch.einsum("tl,hdl->thd", lines[:, :512], self.w_uk)
            rotary = lines[:, None, 512:].expand(-1, k.shape[1], -1)
            v = torch.einsum("tl,hdl->thd", lines[:, :512], self.w_uv)
            yield self.q[begin:end], torch.cat([k, rotary], -1), v

    def by_torch(self):
        outs, lses = [], []
        for q, k, v in self.decompressed():
            scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)).float() * SCALE
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device="cuda").triu(1 + len(k) - len(q))
            scores.masked_fill_(hidden, float("-inf"))
            outs.append((scores.softmax(-1).to(q.dtype) @ v.transpose(0, 1)).transpose(0, 1))
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses, 1)


def make_case(queries, lengths, dtype, *, heads=16, page_size=64, seed=0):
    """A shuffled pool in which every slot that must not be read is NaN; logits of standard deviation 1."""
    host, device = torch.Generator().manual_seed(seed), torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=device, device="cuda")

    pages = [-(-length // page_size) for length in lengths]
    ids = torch.randperm(sum(pages) + 3, generator=host).int().cuda()
    pool = torch.full((len(ids), page_size, 1, 576), float("nan"), dtype=dtype, device="cuda")
    table = torch.full((len(lengths), max(pages) + 1), 2**31 - 1, dtype=torch.int32, device="cuda")
    given_out = 0
    for i, (length, n) in enumerate(zip(lengths, pages, strict=True)):
        table[i, :n] = own = ids[given_out : given_out + n]
        given_out += n
        position = torch.arange(length, device="cuda")
        pool[own[position // page_size].long(), position % page_size, 0] = randn(length, 576).to(dtype)
    weights = ((randn(heads, 128, 512) / 512**0.5).to(dtype) for _ in range(2))
    q = randn(sum(queries), heads, 192).to(dtype)
    return Case(q, pool, table, *weights, [0, *accumulate(queries)], lengths)


def error(result, wanted):
    return ((result.double() - wanted).norm() / wanted.norm()).item()


def check(case, worst, *limits):
    """Within twice PyTorch's error, whatever the chunks."""
    wanted, wanted_lse = case.expected()
    theirs, their_lse = case.by_torch()
    name = {v: k for k, v in DTYPES.items()}[case.q.dtype]
    for limit in limits:
        out, lse = case.run(limit)
        assert out.dtype == case.q.dtype and lse.dtype == torch.float32
        ratio = error(out, wanted) / error(theirs, wanted)
        worst[f"chunked_prefill_over_torch/{name}"] = max(
            ratio, worst.get(f"chunked_prefill_over_torch/{name}", 0)
        )
        assert ratio < 2, f"workspace_tokens {limit}: {ratio:.2f} of PyTorch's error"
        assert (lse - wanted_lse).abs().max() < 2 * (their_lse - wanted_lse).abs().max() + 1e-5


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@by_dtype
def test_page_sizes_and_chunks(dtype, page_size, worst):
    check(make_case(*BATCH, dtype, page_size=page_size), worst, 100, 128, 500, 8192)


@by_dtype
def test_heads_and_a_long_context(dtype, worst):
    check(make_case([200], [5000], dtype, heads=128), worst, 1024, 8192)
    check(make_case([1, 2], [900, 1300], dtype, heads=3), worst, 512)


@by_dtype
def test_equals_one_call_over_all_keys(dtype):
    case = make_case(*BATCH, dtype)
    wanted, wanted_lse = [], []
    for q, k, v in case.decompressed():
        if len(q):
            out, lse = mla_prefill(q[None], k[None], v[None], causal=True, return_lse=True)
            wanted.append(out[0]), wanted_lse.append(lse[0])
    for limit in (128, 8192):
        out, lse = case.run(limit)
        assert error(out, torch.cat(wanted).double()) < {torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(lse, torch.cat(wanted_lse, 1), rtol=0, atol=1e-3)


def test_a_page_outside_the_pool_spoils_its_sequence_and_no_other():
    case = make_case(*BATCH, torch.bfloat16)
    case.table[3, 2] = len(case.pool) + 7
    wanted, _ = case.expected()
    spoiled = slice(case.starts[3], case.starts[4])
    for limit in (256, 8192):
        out, lse = case.run(limit)
        assert out[spoiled].isnan().all() and lse[:, spoiled].isnan().all()
        own = torch.ones(len(out), dtype=torch.bool, device="cuda")
        own[spoiled] = False
        assert error(out[own], wanted[own]) < 6e-3 and lse[:, own].isfinite().all()


def test_memory_is_that_of_a_chunk_and_of_the_results():
    case = make_case([500, 100], [20000, 9000], torch.bfloat16, heads=64)
    results = result_bytes(600, 64)
    for limit in (1024, 4096):
        case.run(limit)  # cuBLAS has its workspace
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.run(limit)
        peak = torch.cuda.max_memory_allocated() - before
        bound = workspace_bytes(limit, 64) + results
        assert 0.5 * bound < peak < bound + 2**20  # blocks of 512 bytes, and the numbers of the plan
    assert workspace_bytes(29000, 64) > 5 * workspace_bytes(4096, 64)  # all keys at once


def test_the_host_does_not_wait_and_repeats_are_the_same():
    case = make_case(*BATCH, torch.bfloat16)
    first = case.run(256)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = case.run(256)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_a_pool_with_strides_of_its_own():
    case = make_case(*BATCH, torch.bfloat16, page_size=16)
    wanted = case.run(500)
    wide = torch.full((*case.pool.shape[:3], 640), float("nan"), dtype=torch.bfloat16, device="cuda")
    wide[..., :576] = case.pool
    case.pool = wide[..., :576]
    assert all(same_bits(a, b) for a, b in zip(case.run(500), wanted, strict=True))
    case.pool = wide[..., 4:580]
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        case.run(500)


def test_lengths_on_the_gpu_are_refused():
    case = make_case([3], [9], torch.bfloat16)
    case.lengths = torch.tensor([9], device="cuda")
    with pytest.raises(TypeError, match="cache_seqlens is on cuda:0, must be on the host"):
        case.run(64)
