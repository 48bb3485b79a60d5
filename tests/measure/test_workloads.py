"""Inputs: right lengths, poison wherever nothing may look, the same every time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.measure import workloads
from mla_kernels.measure.figures import kv_bytes
from mla_kernels.reference import mla_decode_reference


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    page_size=st.sampled_from([1, 16, 64]),
    sets=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_exactly_the_live_slots_are_numbers(lengths, page_size, sets, seed):
    workload = workloads.explicit(lengths, h_q=2, page_size=page_size)
    inputs = workloads.materialize(workload, seed=seed, device="cpu", sets=sets)
    num_pages = inputs.kv_cache.shape[0]
    live = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for table in inputs.block_tables:
        for sequence, length in enumerate(lengths):
            pages = -(-length // page_size)
            assert ((table[sequence, pages:] < 0) | (table[sequence, pages:] >= num_pages)).all()
            assert table.shape[1] > pages  # every row has an entry that nothing may read
            for token in range(length):
                page = int(table[sequence, token // page_size])
                assert not live[page, token % page_size], "a slot belongs to two tokens"
                live[page, token % page_size] = True
    finite = inputs.kv_cache.squeeze(2).isfinite()
    assert torch.equal(finite.all(-1), live) and torch.equal(finite.any(-1), live)
    assert (~live).any(), "there must be poison"
    assert inputs.q.isfinite().all()


def test_the_oracle_meets_no_poison():
    workload = workloads.explicit([0, 1, 63, 64, 65, 140], h_q=4, s_q=2)
    inputs = workloads.materialize(workload, device="cpu", sets=2)
    for table in inputs.block_tables:
        out, _lse = mla_decode_reference(inputs.q, inputs.kv_cache, table, inputs.cache_seqlens)
        assert out.isfinite().all()


def test_the_seed_decides():
    workload = workloads.normal(4, 100, 40, seed=1, h_q=2)
    assert (
        workload == workloads.normal(4, 100, 40, seed=1, h_q=2) != workloads.normal(4, 100, 40, seed=2, h_q=2)
    )
    first, again, other = (workloads.materialize(workload, seed=s, device="cpu") for s in (3, 3, 4))
    for name in ("q", "kv_cache", "block_tables", "cache_seqlens"):
        assert torch.equal(getattr(first, name).nan_to_num(), getattr(again, name).nan_to_num())
    assert not torch.equal(first.q, other.q) and not torch.equal(first.block_tables, other.block_tables)


def test_pages_are_in_random_order():
    table = workloads.materialize(workloads.uniform(1, 64 * 64, h_q=1), device="cpu").block_tables[0, 0, :64]
    assert (table.diff() == 1).sum() < 8


@pytest.mark.parametrize("logit_std", [0.01, 1.0, 10.0])
def test_logits_have_the_standard_deviation_asked_for(logit_std):
    workload = workloads.uniform(2, 512, h_q=32)
    inputs = workloads.materialize(workload, logit_std=logit_std, device="cpu")
    lines = inputs.kv_cache[inputs.block_tables[0, 0, :8].long()].reshape(-1, 576).double()
    logits = inputs.q[0, 0].double() @ lines.T * 576**-0.5
    assert logits.std().item() == pytest.approx(logit_std, rel=0.1)


@pytest.mark.parametrize("draw", [workloads.normal, workloads.lognormal])
def test_drawn_lengths_have_their_mean_and_spread(draw):
    lengths = np.array(draw(20_000, 4096, 1000, seed=5, h_q=1).lengths)
    assert lengths.mean() == pytest.approx(4096, rel=0.02) and lengths.std() == pytest.approx(1000, rel=0.05)
    assert min(draw(2000, 10, 50, seed=5, h_q=1, s_q=3).lengths) == 3


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=40))
def test_spread_evenly_keeps_the_tokens(lengths):
    even = workloads.spread_evenly(workloads.explicit(lengths, h_q=1))
    assert sum(even.lengths) == sum(lengths) and max(even.lengths) - min(even.lengths) <= 1
    assert type(even).model_validate(even.model_dump()) == even


@pytest.mark.parametrize("b", [1, 16, 128])
def test_kv_sets_defeat_the_l2(b):
    l2 = 60 << 20
    workload = workloads.uniform(b, 4096, h_q=16)
    sets = workloads.sets_to_defeat_l2(workload, l2)
    assert sets * kv_bytes(workload) > 4 * l2 >= (sets - 1) * kv_bytes(workload)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_shapes_and_types(dtype):
    inputs = workloads.materialize(workloads.uniform(3, 100, h_q=5, s_q=2, dtype=dtype), device="cpu", sets=2)
    assert inputs.q.shape == (3, 2, 5, 576) and inputs.kv_cache.shape[1:] == (64, 1, 576)
    assert inputs.q.dtype == inputs.kv_cache.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert inputs.block_tables.shape[:2] == (2, 3) and inputs.block_tables.dtype == torch.int32
    assert inputs.cache_seqlens.tolist() == [100] * 3 and inputs.cache_seqlens.dtype == torch.int32
