"""mla_decode against the fp64 oracle, over the whole grid and past its edges."""

import pytest
import torch

from mla_kernels.reference import mla_decode_reference
from tests.gpu.cases import (
    LOGIT_SD,
    ErrorLog,
    any_shape,
    by_dtype,
    by_mask,
    check_cases,
    decode_into_poison,
    paged_case,
)

LENGTHS = [0, 1, 20, 63, 64, 65, 140, 4096]
BATCHES = [1, 2, 6, 64, 128]
QUERY_TOKENS = [1, 2, 3, 4]
HEADS = [1, 3, 8, 9, 16, 24, 63, 64, 96, 126, 128]

by_logits = pytest.mark.parametrize("logits", LOGIT_SD)


def windows(b: int) -> list[slice]:
    """Runs of b sequences that together hold every length, given that the first 8 do."""
    return [slice(first, first + b) for first in range(0, len(LENGTHS), b)]


@by_logits
@by_mask
@by_dtype
def test_grid(dtype, causal, logits, worst):
    """All of b x s_q x h_q, as parts of one large case of mixed lengths: the oracle runs once per s_q."""
    largest = max(BATCHES)
    shuffled = torch.randperm(largest - 8, generator=torch.Generator().manual_seed(0)).tolist()
    lengths = LENGTHS + [LENGTHS[i % 8] for i in shuffled]  # 6 sequences of a window may start at number 6
    whole = paged_case(lengths, max(QUERY_TOKENS), max(HEADS), dtype, logits=logits)
    log = ErrorLog(dtype)
    for s_q in QUERY_TOKENS:
        tensors = whole.part(slice(None), s_q, max(HEADS)).tensors()
        ref_out, ref_lse = mla_decode_reference(*tensors, causal=causal)
        for h_q in HEADS:
            for b in BATCHES:
                for window in windows(b):
                    out, lse = decode_into_poison(whole.part(window, s_q, h_q), causal=causal)
                    label = f"b {b} (from {window.start}) s_q {s_q} h_q {h_q}"
                    log.add(label, out, lse, ref_out[window, :, :h_q], ref_lse[window, :h_q])
    log.check(worst)


@by_mask
@by_dtype
def test_more_rows_than_128(dtype, causal, worst):
    shapes = [(8, 64), (16, 32), (512, 1), (3, 126), (7, 73), (5, 100), (2, 65), (2, 127), (130, 1)]
    lengths = [700, 0, 1, 129, 600]
    check_cases(
        {f"s_q {s_q} h_q {h_q}": paged_case(lengths, s_q, h_q, dtype) for s_q, h_q in shapes}, causal, worst
    )


@by_dtype
def test_every_head_count(dtype, worst):
    whole = paged_case([200, 1, 65], 1, 128, dtype)
    cases = {f"h_q {h_q}": whole.part(slice(None), 1, h_q) for h_q in range(1, 129)}
    check_cases(cases, False, worst)


@pytest.mark.parametrize(("s_q", "h_q"), [(1, 1), (1, 16), (1, 128), (2, 128)])
@pytest.mark.parametrize("logits", ["sd 1", "rising"])
def test_one_long_sequence(s_q, h_q, logits, worst):
    case = paged_case([131072 - 3], s_q, h_q, torch.bfloat16, logits=logits)
    check_cases({"131069 tokens": case}, True, worst)


@by_dtype
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 16), (2, 9), (1, 128)])
def test_large_batch_of_mixed_lengths(dtype, s_q, h_q, worst):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 300, (1000,), generator=generator)
    lengths[torch.randint(1000, (200,), generator=generator)] = 0
    lengths[torch.randint(1000, (6,), generator=generator)] = 20000
    check_cases({"b 1000": paged_case(lengths.tolist(), s_q, h_q, dtype)}, True, worst)


@pytest.mark.parametrize("lengths", [[0], [0] * 300, [0, 0, 5000], [5000, 0, 0], [1] * 300])
def test_mostly_empty_batches(lengths, worst):
    cases = {f"h_q {h_q}": paged_case(lengths, 2, h_q, torch.bfloat16) for h_q in (5, 16, 64, 128)}
    check_cases(cases, True, worst)


@pytest.mark.parametrize("scale", [1e-4, 0.02, 0.2])
def test_softmax_scale(scale, worst):
    check_cases({"scale": paged_case([300, 20], 2, 24, torch.float16)}, True, worst, softmax_scale=scale)


@any_shape(max_examples=150, most_sequences=12, most_s_q=6)
def test_any_shape(worst, lengths, s_q, h_q, dtype, causal, logits, seed):
    case = paged_case(lengths, s_q, h_q, dtype, logits=logits, seed=seed)
    check_cases({f"{lengths} s_q {s_q} h_q {h_q} {logits}": case}, causal, worst)
