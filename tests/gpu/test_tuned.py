"""Variants by name: the shipped one is what the operator launches, and others compute the same."""

import pytest
import torch

from mla_kernels import mla_decode
from mla_kernels.measure.candidates import name_of, tuning_of
from mla_kernels.measure.points import bind, check
from mla_kernels.measure.workloads import explicit, materialize
from mla_kernels.tuning import PAIR_ROWS, ROWS

LENGTHS = (0, 1, 64, 1000, 4096, 20_000)
COPIES = {32: 12, PAIR_ROWS: 12}  # of them, so that these rows serve as many heads; else 1


@pytest.mark.parametrize("changes", [(), ("programmatic=0",)], ids=["shipped", "programmatic=0"])
@pytest.mark.parametrize("rows", (*ROWS, PAIR_ROWS))
def test_the_shipped_variant_is_the_operator(rows, changes):
    inputs = materialize(explicit(LENGTHS * COPIES.get(rows, 1), h_q=rows))
    bound = bind(name_of(*changes, rows=rows), inputs)
    out, lse = bound.calls[0]()
    expected, expected_lse = mla_decode(
        inputs.q, inputs.kv_cache, inputs.block_tables[0], inputs.cache_seqlens
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_parts_in_fp16_have_room_for_any_latents(scale):
    """Queries are scaled the other way, so that the logits are as they were."""
    inputs = materialize(explicit(LENGTHS[2:], h_q=64))
    inputs.kv_cache.mul_(scale)
    inputs.q.div_(scale)
    assert check(inputs, bind(name_of(rows=64), inputs), seed=0).excess("bf16") is None


@pytest.mark.parametrize("changes", ["ahead_boxes=1", "ahead_boxes=4", "group_slots=4", "item_units=6"])
def test_another_variant_is_right(changes):
    name = name_of(changes, rows=64)
    assert tuning_of(name).changes() == changes
    inputs = materialize(explicit(LENGTHS, h_q=128))
    assert check(inputs, bind(name, inputs), seed=0).excess("bf16") is None
