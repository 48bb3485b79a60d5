"""What one does about lengths that differ without a kernel for them: right, where it needs no GPU."""

import pytest
import torch

from mla_kernels.measure import alternatives, points
from mla_kernels.measure.alternatives import ALTERNATIVES
from mla_kernels.measure.experiments import varlen
from mla_kernels.measure.peers import PEERS
from mla_kernels.measure.records import ALTERNATIVE, PEER
from mla_kernels.measure.workloads import explicit, materialize, spread_evenly
from mla_kernels.reference import mla_decode_reference


@pytest.mark.parametrize("name", ["padded", "loop"])
def test_the_result_is_that_of_the_unpadded_sequences(name):
    inputs = materialize(explicit([70, 1, 130], h_q=4, s_q=1), device="cpu", sets=2, poison=False)
    bound = points.bind(ALTERNATIVE + name, inputs)
    for call, table in zip(bound.calls, inputs.block_tables, strict=False):
        bound.out.fill_(float("nan"))
        out, lse = bound.unpack(call())
        expected, _ = mla_decode_reference(inputs.q, inputs.kv_cache, table, inputs.cache_seqlens)
        assert lse is None
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 8e-3


@pytest.fixture
def decode_by_reference(monkeypatch):
    """The kernel needs a GPU: the fp64 reference in its place shows what the alternatives ask of it."""

    def decode(q, kv_cache, block_table, cache_seqlens, *, causal, out):
        result, lse = mla_decode_reference(q, kv_cache, block_table, cache_seqlens, causal=causal)
        return out.copy_(result), lse.float()

    monkeypatch.setattr(alternatives, "mla_decode", decode)


def test_one_call_a_sequence_is_the_decode_of_the_batch(decode_by_reference):
    inputs = materialize(explicit([70, 0, 130, 1], h_q=4), device="cpu", sets=2)  # NaN where nothing may read
    bound = points.bind("alternative:kernel_loop", inputs)
    assert len(bound.calls) == len(inputs.block_tables) == 2
    assert points.check(inputs, bound, seed=0).excess("bf16") is None


def test_the_padded_kernel_is_held_to_the_padded_lengths(decode_by_reference):
    lengths = [70, 0, 130]
    inputs = materialize(explicit(lengths, h_q=4), device="cpu", sets=2)
    bound = points.bind("alternative:padded_kernel", inputs)
    assert points.check(inputs, bound, seed=0).excess("bf16") is None

    _, lse = bound.oracle(0, torch.arange(3))
    _, own = mla_decode_reference(inputs.q, inputs.kv_cache, inputs.block_tables[0], inputs.cache_seqlens)
    zeros = torch.tensor([[max(lengths) - length] for length in lengths]).log()  # exp(0) for each of them
    assert torch.allclose(lse[..., 0], torch.logaddexp(own[..., 0], zeros.double()))


def test_an_unknown_one_is_refused():
    inputs = materialize(explicit([3], h_q=2), device="cpu", poison=False)
    with pytest.raises(ValueError, match="'torn' is unknown; known are padded, padded_kernel"):
        points.bind("alternative:torn", inputs)


def test_the_loop_refuses_what_it_cannot_do():
    for axes, lengths in (({"s_q": 2, "causal": True}, [5, 9]), ({}, [0, 4])):
        inputs = materialize(explicit(lengths, h_q=2, **axes), device="cpu", poison=False)
        with pytest.raises(NotImplementedError):
            points.bind("alternative:loop", inputs)


@pytest.mark.parametrize("scope", ["full", "live"])
def test_every_batch_that_differs_has_its_even_one(scope):
    steps = list(varlen.steps(scope))
    assert all(len(step.implementations) > 1 for step in steps)
    beside = {ALTERNATIVE + name for name in ALTERNATIVES} | {PEER + "flash_mla", PEER + "fa3"}
    assert all(set(step.implementations[1:]) == beside for step in steps)
    assert {name.removeprefix(PEER) for name in varlen.BESIDE} <= PEERS.keys()
    for step in steps:
        differ = len(set(step.workload.lengths)) > 1
        assert (step.beside and step.beside.workload) == (spread_evenly(step.workload) if differ else None)
    listed = {step.workload.lengths for step in steps}
    assert set(varlen.CHAPTER_BATCHES) <= listed
    assert {s.workload.b for s in steps if s.workload.lengths_kind == "lognormal"} >= {4, 8, 16}


def test_padded_copies_fit_the_card():
    for step in varlen.steps("full"):
        w = step.workload
        assert w.b * max(w.lengths) * 576 * 2 < 4e9
        assert 4 * w.b * w.h_q * max(w.lengths) < 4e9, "scores in fp32"
    assert torch.bfloat16.itemsize == 2
