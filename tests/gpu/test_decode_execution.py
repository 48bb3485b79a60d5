"""How mla_decode runs: repeatably, in CUDA graphs, on several streams, in torch.compile, and with no sync."""

import math
from collections.abc import Callable

import pytest
import torch

from mla_kernels.decode import mla_decode
from mla_kernels.reference import mla_decode_reference
from tests.gpu.cases import DEVICE, Case, ErrorLog, paged_case, same_bits

Result = tuple[torch.Tensor, torch.Tensor]

LONG = [20000, 3, 0, 700]
MANY = [0, 1, 64, 500, 2000, 65] * 30


def equal(a: Result, b: Result) -> torch.Tensor:
    return same_bits(a[0], b[0]) & same_bits(a[1], b[1])


@pytest.mark.parametrize(
    ("lengths", "s_q", "h_q"),
    [
        pytest.param([131072], 1, 16, id="one of 131072, 16 rows"),
        pytest.param([4096], 1, 128, id="one of 4096, 128 rows"),
        pytest.param(LONG, 1, 7, id="uneven, 7 rows"),
        pytest.param(LONG, 2, 128, id="uneven, 256 rows"),
        pytest.param(MANY, 1, 16, id="many, 16 rows"),
        pytest.param(MANY, 3, 24, id="many, 72 rows"),
        pytest.param(MANY, 1, 128, id="many, 128 rows"),
    ],
)
def test_repeats_bitwise(lengths, s_q, h_q):
    case = paged_case(lengths, s_q, h_q, torch.bfloat16)
    other = paged_case([900, 10, 5000], s_q, h_q, torch.bfloat16, seed=1)  # leaves its traces in between
    first = mla_decode(*case.tensors(), causal=True)
    same = []
    for _ in range(100):
        mla_decode(*other.tensors())
        same.append(equal(mla_decode(*case.tensors(), causal=True), first))
    different = 100 - int(torch.stack(same).sum())
    assert different == 0, f"{different} of 100 repeats differ from the first"


def test_a_sequence_does_not_depend_on_its_neighbours_data():
    case = paged_case(LONG, 1, 16, torch.bfloat16)
    before = mla_decode(*case.tensors())
    victim = case.block_table[0, 100]
    case.kv_cache[victim, 17] = math.nan
    after = mla_decode(*case.tensors())
    assert after[0][0].isnan().all() and after[1][0].isnan().all()
    assert equal((after[0][1:], after[1][1:]), (before[0][1:], before[1][1:]))


def capture(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize(
    ("s_q", "h_q", "causal"), [(1, 16, False), (4, 9, True), (1, 128, False), (2, 128, True)]
)
def test_graph_follows_lengths_and_pages_changed_in_place(s_q, h_q, causal, worst):
    full, b = 2048, 8  # whole pages, so that every slot of the pool may come into use
    case = paged_case([full] * b, s_q, h_q, torch.bfloat16)
    pages = case.block_table[:, : full // 64].clone()
    graph, (out, lse) = capture(lambda: mla_decode(*case.tensors(), causal=causal))
    generator = torch.Generator().manual_seed(0)
    log = ErrorLog(torch.bfloat16)
    plans = [
        [0] * b,
        [full] * b,
        [1] * b,
        [0, full, 1, 64, 65, full - 1, 130, 700],
        [full] + [0] * 7,
        [0] * 7 + [full],
    ]
    for lengths in plans + plans[::-1]:
        shuffled = pages.flatten()[torch.randperm(pages.numel(), generator=generator).to(DEVICE)].view_as(
            pages
        )
        case.block_table.fill_(2**31 - 1)
        for i, length in enumerate(lengths):
            in_use = -(-length // 64)
            case.block_table[i, :in_use] = shuffled[i, :in_use]
        case.cache_seqlens.copy_(torch.tensor(lengths))
        case.q.copy_(case.q.roll(1, 0))
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        replayed = out.clone(), lse.clone()
        eager = mla_decode(*case.tensors(), causal=causal)
        assert equal(replayed, eager), f"replay and eager differ for lengths {lengths}"
        log.add(f"lengths {lengths}", *replayed, *mla_decode_reference(*case.tensors(), causal=causal))
    log.check(worst)


def test_graph_captured_before_any_eager_call_of_its_shape():
    case = paged_case([3000, 5], 3, 5, torch.float16)
    graph = torch.cuda.CUDAGraph()
    mla_decode(*paged_case([64], 3, 5, torch.float16).tensors())  # compiles and loads; capture cannot
    with torch.cuda.graph(graph):
        result = mla_decode(*case.tensors())
    for _ in range(3):
        graph.replay()
    assert equal(result, mla_decode(*case.tensors()))


def two_cases(h_q: int) -> list[Case]:
    return [
        paged_case(LONG, 1, h_q, torch.bfloat16),
        paged_case([9000, 30, 100], 1, h_q, torch.bfloat16, seed=1),
    ]


@pytest.mark.parametrize("h_q", [16, 128])
def test_two_streams_at_once(h_q):
    cases = two_cases(h_q)
    expected = [mla_decode(*case.tensors()) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for case, stream, kept in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(mla_decode(*case.tensors()))
    torch.cuda.synchronize()
    for kept, right in zip(results, expected, strict=True):
        assert torch.stack([equal(result, right) for result in kept]).all()


@pytest.mark.parametrize("h_q", [16, 128])
def test_two_graphs_replayed_at_once(h_q):
    cases = two_cases(h_q)
    expected = [mla_decode(*case.tensors()) for case in cases]
    graphs, results = zip(
        *(capture(lambda case=case: mla_decode(*case.tensors())) for case in cases), strict=True
    )
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            assert equal(result, right)


def test_nothing_waits_for_the_gpu():
    case = paged_case([300, 0, 5000], 1, 16, torch.bfloat16)
    mla_decode(*case.tensors())
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla_decode(*case.tensors())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_takes_it_whole(dynamic):
    def step(q, kv_cache, block_table, cache_seqlens):
        out, lse = mla_decode(q * 2, kv_cache, block_table, cache_seqlens, softmax_scale=0.05, causal=True)
        return out + 1, lse

    torch.compiler.reset()
    compiled = torch.compile(
        step, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )  # needs no C compiler
    for lengths in ([300, 0, 70], [64, 500, 1, 2000]):
        tensors = paged_case(lengths, 2, 16, torch.bfloat16).tensors()
        assert equal(compiled(*tensors), step(*tensors))


@pytest.mark.parametrize("causal", [False, True])
def test_custom_op_is_registered_rightly(causal):
    tensors = paged_case([300, 0, 70], 2, 16, torch.bfloat16).tensors()
    torch.library.opcheck(torch.ops.mla_kernels.decode.default, (*tensors, None, causal))
    torch.library.opcheck(torch.ops.mla_kernels.decode.default, (*tensors, 0.1, causal))
