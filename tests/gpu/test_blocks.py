"""The building blocks of the ceilings: their results have no meaning, but they must run, long, and stop."""

import pytest
import torch

from mla_kernels.decode import decode_variant, mla_decode
from tests.gpu.cases import paged_case


@pytest.mark.parametrize("h_q", [8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("work", ["stream", "mma", "skeleton"])
def test_block_leaves_the_card_as_it_was(work, h_q):
    """Many launches, decode before and after: bitwise the same, so counters and rings are clean."""
    case = paged_case([4096] * 128, 1, h_q, torch.bfloat16)
    before = mla_decode(*case.tensors())
    for _ in range(100):
        decode_variant(work, *case.tensors())
        mla_decode(*case.tensors())
    after = mla_decode(*case.tensors())
    torch.cuda.synchronize()
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_unknown_block_is_named():
    case = paged_case([64], 1, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="'streams', must be a DecodeTuning or one of stream, mma, skeleton"):
        decode_variant("streams", *case.tensors())
