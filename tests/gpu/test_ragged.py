"""Sequences with query tokens of their own number: cu_seqlens_q against the oracle."""

import itertools
import math

import pytest
import torch

from mla_kernels.decode import mla_decode
from mla_kernels.reference import mla_decode_reference
from tests.gpu.cases import Case, ErrorLog, by_dtype, paged_case, same_bits

COUNTS = {
    "mixed": [1, 0, 3, 1, 17, 2, 0, 5, 1],
    "one each": [1] * 9,
    "a chunk among single tokens": [1, 1, 130, 1, 1, 1, 1, 1, 1],
    "first and last without any": [0, 4, 4, 4, 4, 4, 4, 4, 0],
}
LENGTHS = [300, 64, 4096, 0, 1000, 65, 128, 2000, 140]

by_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def starts_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device="cuda")


def ragged_case(
    counts: list[int], h_q: int, dtype, page_size: int, logits: str = "sd 1"
) -> tuple[Case, torch.Tensor]:
    case = paged_case(LENGTHS, 1, h_q, dtype, page_size=page_size, logits=logits)
    generator = torch.Generator("cuda").manual_seed(7)
    q = torch.randn(sum(counts), h_q, 576, generator=generator, device="cuda").to(dtype)
    return Case(q, case.kv_cache, case.block_table, case.cache_seqlens), starts_of(counts)


def add(log: ErrorLog, label: str, out, lse, ref_out, ref_lse) -> None:
    """As one sequence of total_q query tokens."""
    log.add(label, out[None], lse[None], ref_out[None], ref_lse[None])


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@by_counts
@by_dtype
def test_against_the_oracle(dtype, counts, page_size, worst):
    log = ErrorLog(dtype)
    for h_q in (1, 9, 16, 64, 128):
        case, starts = ragged_case(counts, h_q, dtype, page_size)
        for causal in (False, True):
            options = {"causal": causal, "cu_seqlens_q": starts}
            ref_out, ref_lse = mla_decode_reference(*case.tensors(), **options)
            poison = case.q.new_full((*case.q.shape[:2], 512), math.nan)
            out, lse = mla_decode(*case.tensors(), out=poison, **options)
            add(log, f"h_q {h_q} causal {causal}", out, lse, ref_out, ref_lse)
    log.check(worst)


def test_equal_counts_are_the_uniform_result(worst):
    """Three tokens each: the same numbers as (b, s_q, h_q, 576), whose LSE is (b, h_q, s_q)."""
    counts = [3] * len(LENGTHS)
    case, starts = ragged_case(counts, 16, torch.bfloat16, 16)
    out, lse = mla_decode(*case.tensors(), causal=True, cu_seqlens_q=starts)
    uniform = case.q.view(-1, 3, 16, 576)
    even_out, even_lse = mla_decode(uniform, *case.tensors()[1:], causal=True)
    log = ErrorLog(torch.bfloat16)
    ragged_lse = even_lse.permute(1, 0, 2).reshape(16, -1)
    add(log, "ragged", out, lse, even_out.double().view_as(out), ragged_lse.double())
    log.check(worst)


def test_replays_follow_the_counts(worst):
    counts = [[2, 2, 2, 2, 2, 2, 2, 2, 2], [1, 0, 9, 0, 0, 3, 3, 1, 1], [18, 0, 0, 0, 0, 0, 0, 0, 0]]
    case, starts = ragged_case(counts[0], 16, torch.bfloat16, 64)
    mla_decode(*case.tensors(), causal=True, cu_seqlens_q=starts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = mla_decode(*case.tensors(), causal=True, cu_seqlens_q=starts)
    log = ErrorLog(torch.bfloat16)
    for own in counts:
        starts.copy_(starts_of(own))
        graph.replay()
        ref_out, ref_lse = mla_decode_reference(*case.tensors(), causal=True, cu_seqlens_q=starts)
        add(log, str(own), out, lse, ref_out, ref_lse)
    log.check(worst)


@pytest.mark.parametrize("starts", [[-5, 3, 40, 2, 2**31 - 1, 7, 0, 1, -(2**31), 20], [0] * 10, [20] * 10])
def test_starts_out_of_order_write_nothing_outside(starts):
    """Nonsense on the device may give nonsense, but no access outside the tensors."""
    case, _ = ragged_case([2] * 9, 16, torch.bfloat16, 64)
    room = torch.full((3 * 18, 16, 512), 7.0, dtype=torch.bfloat16, device="cuda")
    bad = torch.tensor(starts, dtype=torch.int32, device="cuda")
    mla_decode(*case.tensors(), cu_seqlens_q=bad, out=room[18:36])
    torch.cuda.synchronize()
    assert (room[:18] == 7).all() and (room[36:] == 7).all()


def test_checked_mode_names_the_start(monkeypatch):
    monkeypatch.setenv("MLA_KERNELS_CHECK", "1")
    case, starts = ragged_case([2] * 9, 16, torch.bfloat16, 64)
    case.cache_seqlens.clamp_(min=0)
    starts[3] = 99
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[3\] is 99, must be in \[4, 18\]"):
        mla_decode(*case.tensors(), cu_seqlens_q=starts)


def test_no_query_tokens_at_all():
    case, starts = ragged_case([0] * 9, 16, torch.bfloat16, 64)
    out, lse = mla_decode(*case.tensors(), cu_seqlens_q=starts)
    assert out.shape == (0, 16, 512) and lse.shape == (16, 0)


def test_runs_repeat_bitwise():
    case, starts = ragged_case(COUNTS["mixed"], 64, torch.bfloat16, 16)
    first = mla_decode(*case.tensors(), causal=True, cu_seqlens_q=starts)
    for _ in range(20):
        again = mla_decode(*case.tensors(), causal=True, cu_seqlens_q=starts)
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_compiled(worst):
    case, starts = ragged_case(COUNTS["mixed"], 16, torch.bfloat16, 64)
    compiled = torch.compile(
        lambda *tensors: mla_decode(*tensors, causal=True, cu_seqlens_q=starts), fullgraph=True
    )
    out, lse = compiled(*case.tensors())
    ref_out, ref_lse = mla_decode_reference(*case.tensors(), causal=True, cu_seqlens_q=starts)
    log = ErrorLog(torch.bfloat16)
    add(log, "compiled", out, lse, ref_out, ref_lse)
    log.check(worst)
