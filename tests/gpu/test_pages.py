"""Every page size, in every order of pages, in pools past 2^31 elements: mla_decode against the oracle."""

import math

import pytest
import torch

from mla_kernels.decode import mla_decode
from mla_kernels.reference import mla_decode_reference
from mla_kernels.tuning import PAGE_SIZES
from tests.gpu.cases import ErrorLog, by_dtype, paged_case, same_bits

OTHER_SIZES = [size for size in PAGE_SIZES if size != 64]
LENGTHS = [0, 1, 7, 8, 63, 64, 65, 140, 255, 256, 1000, 4096]
SHAPES = [(1, 1), (1, 16), (2, 9), (1, 64), (3, 40), (1, 128)]  # s_q, h_q: every variant of the kernels

by_size = pytest.mark.parametrize("page_size", OTHER_SIZES)


@by_dtype
@by_size
def test_against_the_oracle(page_size, dtype, worst):
    log = ErrorLog(dtype)
    for s_q, h_q in SHAPES:
        for lengths in (LENGTHS, [20000], [128] * 40, [2048] * 3):
            for causal in {False, s_q > 1}:
                case = paged_case(lengths, s_q, h_q, dtype, page_size=page_size)
                ref_out, ref_lse = mla_decode_reference(*case.tensors(), causal=causal)
                poison = case.q.new_full((*case.q.shape[:3], 512), math.nan)
                out, lse = mla_decode(*case.tensors(), causal=causal, out=poison)
                log.add(
                    f"s_q {s_q} h_q {h_q} lengths {lengths[:3]} causal {causal}", out, lse, ref_out, ref_lse
                )
    log.check(worst)


@pytest.mark.parametrize("logits", ["sd 10", "rising"])
@by_size
def test_logits_that_move_the_reference(page_size, logits, worst):
    log = ErrorLog(torch.bfloat16)
    for s_q, h_q in ((1, 16), (2, 64)):
        case = paged_case(LENGTHS, s_q, h_q, torch.bfloat16, page_size=page_size, logits=logits)
        ref_out, ref_lse = mla_decode_reference(*case.tensors())
        log.add(f"s_q {s_q} h_q {h_q}", *mla_decode(*case.tensors()), ref_out, ref_lse)
    log.check(worst)


@by_size
def test_strided_pool(page_size, worst):
    """Pages and tokens with gaps between them, and a pool of three dimensions."""
    case = paged_case(LENGTHS, 1, 16, torch.bfloat16, page_size=page_size)
    pages = case.kv_cache.shape[0]
    wide = torch.full((pages, page_size + 1, 584), math.nan, dtype=torch.bfloat16, device=case.q.device)
    pool = wide[:, :page_size, :576]
    pool.copy_(case.kv_cache[:, :, 0])
    log = ErrorLog(torch.bfloat16)
    ref_out, ref_lse = mla_decode_reference(*case.tensors())
    log.add("strided", *mla_decode(case.q, pool, case.block_table, case.cache_seqlens), ref_out, ref_lse)
    log.check(worst)


@pytest.mark.parametrize("h_q", [16, 128])
@by_size
def test_invalid_pages_and_lengths_are_nan_in_their_sequence_alone(page_size, h_q):
    lengths = [300, 5000, 64, 0, 1000, 1]
    case = paged_case(lengths, 1, h_q, torch.bfloat16, page_size=page_size, guard=1.0)
    good_out, good_lse = mla_decode(*case.tensors())
    num_pages = case.kv_cache.shape[0]
    wrong = []
    for i, length in enumerate(lengths):
        changes = []
        in_use = -(-length // page_size)
        for index in sorted({0, in_use // 2, in_use - 1}) if length else []:
            changes += [("page", index, page) for page in (-1, num_pages, 2**31 - 1)]
        capacity = case.block_table.shape[1] * page_size
        changes += [("length", None, value) for value in (-1, capacity + 1, 2**31 - 1)]
        for what, index, value in changes:
            table, seqlens = case.block_table.clone(), case.cache_seqlens.clone()
            if what == "page":
                table[i, index] = value
            else:
                seqlens[i] = value
            out, lse = mla_decode(case.q, case.kv_cache, table, seqlens)
            rest = [j for j in range(len(lengths)) if j != i]
            if not (out[i].isnan().all() and lse[i].isnan().all()):
                wrong.append(f"sequence {i}, {what} {index} = {value}: not all NaN")
            close = torch.allclose(out[rest].float(), good_out[rest].float(), atol=2e-2, rtol=2e-2)
            if not (close and torch.allclose(lse[rest], good_lse[rest], atol=1e-5)):
                wrong.append(f"sequence {i}, {what} {index} = {value}: another sequence changed")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_replays_follow_tables_and_lengths(page_size, worst):
    case = paged_case([500, 4000, 64, 1], 1, 16, torch.bfloat16, page_size=page_size)
    table, seqlens = case.block_table.clone(), case.cache_seqlens.clone()
    mla_decode(case.q, case.kv_cache, table, seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = mla_decode(case.q, case.kv_cache, table, seqlens)
    log = ErrorLog(torch.bfloat16)
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        table.copy_(case.block_table[order])
        seqlens.copy_(case.cache_seqlens[order])
        graph.replay()
        ref_out, ref_lse = mla_decode_reference(case.q, case.kv_cache, table, seqlens)
        log.add(str(order), out, lse, ref_out, ref_lse)
    log.check(worst)


@pytest.mark.parametrize("pages", [60_000, 120_000])
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_pools_past_two_to_the_31_elements(pages, page_size):
    """Pools of as many tokens as that many pages of 64: bitwise what a small pool gives."""
    small = paged_case([4096, 100, 1, 2500], 1, 16, torch.bfloat16, page_size=page_size)
    tokens = pages * 64
    large = torch.empty(tokens // page_size, page_size, 1, 576, dtype=torch.bfloat16, device=small.q.device)
    assert large.numel() > 2**31 * (pages // 60_000)
    used = small.kv_cache.shape[0]
    first = large.shape[0] - used
    large[first:] = small.kv_cache
    inside = (small.block_table >= 0) & (small.block_table < used)
    table = torch.where(inside, small.block_table + first, small.block_table)
    for seqs in (slice(None), slice(0, 1)):
        tensors = small.block_table[seqs], small.cache_seqlens[seqs]
        out, lse = mla_decode(small.q[seqs], small.kv_cache, *tensors)
        far_out, far_lse = mla_decode(small.q[seqs], large, table[seqs], tensors[1])
        assert same_bits(out, far_out) and same_bits(lse, far_lse)
