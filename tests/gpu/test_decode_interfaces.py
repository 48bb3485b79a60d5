"""The other ways to the same result: options, views, FlashMLA's functions, merging, the portable operator."""

import math

import pytest
import torch

from mla_kernels import flash_mla, portable
from mla_kernels.decode import merge_partials, mla_decode
from mla_kernels.reference import merge_partials_reference, mla_decode_reference
from tests.gpu.cases import DTYPES, OUT_LIMIT, ErrorLog, by_dtype, paged_case, same_bits

LENGTHS = [300, 0, 5000, 64, 1]


def test_lse_is_optional():
    case = paged_case(LENGTHS, 2, 16, torch.bfloat16)
    out, _ = mla_decode(*case.tensors())
    alone = mla_decode(*case.tensors(), return_lse=False)
    assert isinstance(alone, torch.Tensor) and same_bits(alone, out)


def test_out_is_written_in_place():
    case = paged_case(LENGTHS, 2, 16, torch.bfloat16)
    expected, expected_lse = mla_decode(*case.tensors())
    buffer = torch.full((7, 2, 16, 512), math.nan, dtype=torch.bfloat16, device=case.q.device)
    out, lse = mla_decode(*case.tensors(), out=buffer[1:6])
    assert out.data_ptr() == buffer[1:6].data_ptr()
    assert same_bits(out, expected) and same_bits(lse, expected_lse)
    assert buffer[0].isnan().all() and buffer[6].isnan().all(), "written outside out"


def test_views_that_are_taken_as_they_are():
    case = paged_case(LENGTHS, 2, 16, torch.bfloat16)
    expected = mla_decode(*case.tensors())
    wide_table = torch.full((5, case.block_table.shape[1] + 9), -7, dtype=torch.int32, device=case.q.device)
    wide_table[:, 4:-5] = case.block_table
    roomy = case.kv_cache.new_full((*case.kv_cache.shape[:3], 640), math.nan)
    roomy[..., :576] = case.kv_cache
    every_second = case.kv_cache.new_full((2 * len(case.kv_cache), 64, 576), math.nan)
    every_second[::2] = case.kv_cache[:, :, 0]
    for cache in (case.kv_cache, case.kv_cache[:, :, 0], roomy[..., :576], every_second[::2]):
        out, lse = mla_decode(case.q, cache, wide_table[:, 4:-5], case.cache_seqlens)
        assert same_bits(out, expected[0]) and same_bits(lse, expected[1]), (cache.shape, cache.stride())


def test_empty_batch():
    case = paged_case(LENGTHS, 2, 16, torch.bfloat16)
    out, lse = mla_decode(case.q[:0], case.kv_cache, case.block_table[:0], case.cache_seqlens[:0])
    assert out.shape == (0, 2, 16, 512) and lse.shape == (0, 16, 2)


@pytest.mark.parametrize("earlier", [False, True], ids=["current", "earlier"])
@pytest.mark.parametrize(("s_q", "h_q", "causal"), [(1, 128, False), (2, 16, True)])
def test_flash_mla_functions_equal_mla_decode(earlier, s_q, h_q, causal):
    case = paged_case(LENGTHS, s_q, h_q, torch.bfloat16)
    expected = mla_decode(*case.tensors(), causal=causal)
    arguments = (case.cache_seqlens, s_q * h_q, 1) if earlier else ()
    plan = flash_mla.get_mla_metadata(*arguments)
    out, lse = flash_mla.flash_mla_with_kvcache(*case.tensors(), 512, *plan, causal=causal)
    assert same_bits(out, expected[0]) and same_bits(lse, expected[1])


def test_flash_mla_metadata_in_the_buffers_of_a_graph():
    """As serving engines use FlashMLA: plan outside the graph, copy into its buffers, replay."""
    case = paged_case([2048] * 4, 1, 16, torch.bfloat16)
    buffers = [t.clone() for t in flash_mla.get_mla_metadata(case.cache_seqlens, 16, 1)]

    def step():
        return flash_mla.flash_mla_with_kvcache(*case.tensors(), 512, *buffers)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for lengths in ([2048] * 4, [5, 0, 2000, 64]):
        case.cache_seqlens.copy_(torch.tensor(lengths))
        plan = flash_mla.get_mla_metadata(case.cache_seqlens, 16, 1)
        for buffer, value in zip(buffers, plan, strict=True):
            buffer.copy_(value)
        graph.replay()
        expected = mla_decode(*case.tensors())
        assert same_bits(out, expected[0]) and same_bits(lse, expected[1])


@by_dtype
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 16), (2, 128)])
def test_merging_a_cache_split_by_pages(dtype, s_q, h_q, worst):
    case = paged_case([4096, 100, 0, 64, 1000], s_q, h_q, dtype)
    width = case.block_table.shape[1]
    parts = []
    for first, last in ((0, 8), (8, 30), (30, width)):
        seqlens = (case.cache_seqlens - 64 * first).clamp(0, 64 * (last - first))
        parts.append(mla_decode(case.q, case.kv_cache, case.block_table[:, first:last], seqlens))
    outs, lses = (torch.stack(side) for side in zip(*parts, strict=True))
    out, lse = merge_partials(outs, lses)
    log = ErrorLog(dtype)
    log.add("merge of the same partials", out, lse, *merge_partials_reference(outs, lses))
    log.check(worst)
    ref_out, ref_lse = mla_decode_reference(*case.tensors())
    # The partials were rounded once more than the whole.
    assert (out.double() - ref_out).norm() <= 1.5 * OUT_LIMIT[dtype] * ref_out.norm()
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    assert (lse - ref_lse)[ref_lse.isfinite()].abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("dtype", "page_size", "s_q", "h_q", "causal"),
    [
        ("bf16", 64, 1, 16, False),
        ("fp16", 64, 3, 128, True),
        ("bf16", 1, 2, 9, True),
        ("fp16", 16, 1, 5, False),
        ("bf16", 256, 2, 128, True),
    ],
)
def test_portable_operator(dtype, page_size, s_q, h_q, causal):
    pytest.importorskip("triton")
    case = paged_case(LENGTHS, s_q, h_q, DTYPES[dtype], page_size=page_size)
    log = ErrorLog(DTYPES[dtype])
    out, lse = portable.mla_decode(*case.tensors(), causal=causal)
    log.add("portable", out, lse, *mla_decode_reference(*case.tensors(), causal=causal))
    log.check({})  # its errors are not mla_decode's
