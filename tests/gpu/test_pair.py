"""The variant of 128 query rows, by pairs of CTAs, against fp64."""

import functools

import pytest
import torch

from mla_kernels.decode import decode_variant
from mla_kernels.tuning import PAIR_ROWS, VARIANTS
from tests.gpu.cases import (
    LOGIT_SD,
    any_shape,
    by_dtype,
    by_mask,
    check_cases,
    decode_into_poison,
    paged_case,
    same_bits,
)

PAIR = VARIANTS[PAIR_ROWS]
LENGTHS = [0, 1, 20, 63, 64, 65, 140, 1000, 4096]
SHAPES = [(1, 128), (2, 128), (4, 128), (1, 96), (3, 43), (1, 16), (5, 100)]  # s_q, h_q


decode = functools.partial(decode_variant, PAIR)


@pytest.mark.parametrize("logits", LOGIT_SD)
@by_mask
@by_dtype
def test_shapes(dtype, causal, logits, worst):
    cases = {f"s_q {s} h_q {h}": paged_case(LENGTHS, s, h, dtype, logits=logits) for s, h in SHAPES}
    check_cases(cases, causal, worst, decode)


@pytest.mark.parametrize("page_size", [128, 256])
@by_dtype
def test_larger_pages(dtype, page_size, worst):
    cases = {
        f"sd {sd}": paged_case(LENGTHS, 2, 128, dtype, page_size=page_size, logits=sd) for sd in LOGIT_SD
    }
    check_cases(cases, True, worst, decode)


@pytest.mark.parametrize("logits", ["sd 1", "sd 10", "rising"])
@by_dtype
def test_split_sequences(dtype, logits, worst):
    lengths = {"one": [30_000], "two": [20_000, 700], "many": [3000] * 40}
    cases = {name: paged_case(some, 1, 128, dtype, logits=logits) for name, some in lengths.items()}
    check_cases(cases, False, worst, decode)


@pytest.mark.parametrize("first", [0, 1, 64, 2000, 2990])
@by_dtype
def test_scores_that_grow_large_late_and_in_few_rows(dtype, first, worst):
    """Tiles are done again from somewhere in the middle, by one warpgroup alone."""
    cases = {}
    for heads in ([0], [8], [70], [0, 127]):
        case = paged_case([3000, 64, 100], 1, 128, dtype)
        page = case.block_table[0, first // 64]
        for head in heads:
            line = case.kv_cache[page, first % 64, 0].float()
            case.q[0, 0, head] = (line * (18 * 24 / line.square().sum())).to(dtype)  # a logit of 18
        cases[f"heads {heads}"] = case
    check_cases(cases, False, worst, decode)


def test_a_bad_length_or_page_spoils_its_sequence_alone():
    case = paged_case([500, 700, 900, 100], 1, 128, torch.bfloat16)
    good = decode_into_poison(case, decode)
    case.block_table[1, 3] = case.kv_cache.shape[0]
    case.cache_seqlens[2] = -5
    out, lse = decode_into_poison(case, decode)
    for bad in (1, 2):
        assert out[bad].isnan().all() and lse[bad].isnan().all()
    for fine in (0, 3):
        assert same_bits(out[fine], good[0][fine]) and same_bits(lse[fine], good[1][fine])


def test_a_graph_follows_lengths_and_repeats_bits():
    case = paged_case([4096] * 70, 2, 128, torch.bfloat16)
    whole = decode_into_poison(case, decode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(*case.tensors())
    for lengths in ([4096] * 70, [17 * i + 1 for i in range(70)], [4096] * 70):
        case.cache_seqlens.copy_(torch.tensor(lengths))
        for _ in range(20):
            graph.replay()
        expected = decode(*case.tensors())
        assert same_bits(out, expected[0]) and same_bits(lse, expected[1])
    assert same_bits(out, whole[0]) and same_bits(lse, whole[1])


@any_shape(max_examples=60, most_sequences=80, most_s_q=4)
def test_any_shape(worst, lengths, s_q, h_q, dtype, causal, logits, seed):
    case = paged_case(lengths, s_q, h_q, dtype, logits=logits, seed=seed)
    check_cases({f"{lengths} s_q {s_q} h_q {h_q} {logits}": case}, causal, worst, decode)
