"""mla_prefill against the oracle: shapes, masks, scales, ragged batches, what may lie beside the inputs."""

import itertools
import math

import pytest
import torch

from mla_kernels import merge_partials, mla_prefill
from mla_kernels.prefill import prefill_variant
from mla_kernels.prefill_reference import mla_prefill_reference
from mla_kernels.prefill_tuning import HEAD_DIMS, PrefillTuning
from tests.gpu.cases import by_dtype, by_mask, same_bits

by_dims = pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
LSE_LIMIT = 1e-3  # absolute; of logits that reach hundreds relative


def inputs(dims, s_q, s_k, dtype, *, b=2, h_q=4, h_kv=2, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (b, s_q, h_q, dims[0]), (b, s_k, h_kv, dims[0]), (b, s_k, h_kv, dims[1])
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def starts(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def relative(out, expected):
    return ((out.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def torch_error(q, k, v, causal, expected):
    """Error of the same attention in PyTorch, every intermediate of the inputs' dtype."""
    group = q.shape[2] // k.shape[2]
    rows, keys, values = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = rows @ keys.mT * q.shape[-1] ** -0.5
    if causal:
        sees = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~sees, -math.inf)
    return relative((scores.softmax(-1).nan_to_num(0) @ values).transpose(1, 2), expected)


def check(q, k, v, causal, result=None):
    out, lse = result or mla_prefill(q, k, v, causal=causal, return_lse=True)
    expected, expected_lse = mla_prefill_reference(q, k, v, causal=causal)
    assert relative(out, expected) <= 2 * torch_error(q, k, v, causal, expected)
    blind = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind)
    assert (out.transpose(1, 2)[blind] == 0).all()
    torch.testing.assert_close(lse.double()[~blind], expected_lse[~blind], rtol=1e-5, atol=LSE_LIMIT)


@pytest.mark.parametrize("s_k", [1, 127, 128, 300])
@pytest.mark.parametrize("s_q", [1, 63, 64, 65, 193, 400])
@by_mask
@by_dims
def test_lengths(dims, causal, s_q, s_k):
    check(*inputs(dims, s_q, s_k, torch.bfloat16), causal)


@pytest.mark.parametrize("logits", ["sd 0.01", "sd 1", "sd 10", "rising", "falling", "falling far"])
@by_mask
@by_dims
@by_dtype
def test_logits(dtype, dims, causal, logits):
    """Tiles are taken from the last to the first: where logits fall along kv each has a new maximum, "far"
    beyond what the probabilities' type holds."""
    q, k, v = inputs(dims, 200, 1500, dtype)
    if logits.startswith("sd"):
        q *= float(logits[3:])
    else:
        far = 30 if logits == "falling far" else 1
        ramp = torch.linspace(0.0, far * 12.0, k.shape[1], device="cuda")
        q[..., 0] = 4
        k[..., 0] = (ramp if logits == "rising" else ramp.flip(0))[:, None].to(dtype)
    check(q, k, v, causal)


@pytest.mark.parametrize("h_q, h_kv", [(1, 1), (8, 1), (16, 2), (40, 8)])
@by_mask
def test_grouped_heads(causal, h_q, h_kv):
    check(*inputs((128, 128), 300, 500, torch.bfloat16, h_q=h_q, h_kv=h_kv), causal)


@by_mask
@by_dims
@by_dtype
def test_ragged(dtype, dims, causal):
    """Sequences of any length, empty ones too, beside one of NaN: only its own results are NaN."""
    lengths_q, lengths_k = [3, 0, 200, 65, 17, 400, 1, 0], [130, 50, 0, 65, 300, 400, 7, 0]
    q, k, v = (x[0] for x in inputs(dims, sum(lengths_q), sum(lengths_k), dtype, b=1))
    cu_q, cu_k = starts(lengths_q), starts(lengths_k)
    for x in (k, v):
        x[cu_k[4] : cu_k[5]] = math.nan
    options = {"causal": causal, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out, lse = mla_prefill(q, k, v, return_lse=True, **options)
    for i, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        if i == 4:
            assert out[rows].isnan().all() and lse[:, rows].isnan().all()
        elif length_q and not length_k:
            assert (out[rows] == 0).all() and (lse[:, rows] == -math.inf).all()
        elif length_q:
            result = out[None, rows], lse[None, :, rows]
            check(q[None, rows], k[None, keys], v[None, keys], causal, result)


def test_many_ragged_sequences():
    """More sequences than lanes of the warp that schedules them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 300, (100,), generator=generator).tolist()
    q, k, v = (x[0] for x in inputs((64, 64), sum(lengths), sum(lengths), torch.bfloat16, b=1))
    cu = starts(lengths)
    options = {"causal": True, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    expected = mla_prefill_reference(q, k, v, **options)
    out, lse = mla_prefill(q, k, v, return_lse=True, **options)
    assert relative(out, expected[0]) < 6e-3
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=LSE_LIMIT)


@by_mask
def test_lengths_out_of_order_touch_nothing_outside(causal):
    """Whatever the lengths, no byte beyond the tensors is read into a sequence in order, or written."""
    q, k, v = (x[0] for x in inputs((128, 128), 500, 500, torch.bfloat16, b=1))
    bad = [-(2**31), 100, 200, 400, 300, 2**31 - 1, 600]  # but sequence 1
    cu = torch.tensor(bad, dtype=torch.int32, device="cuda")
    out, _ = mla_prefill(q, k, v, causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    torch.cuda.synchronize()
    alone = [x[100:200][None].contiguous() for x in (q, k, v)]
    assert same_bits(out[100:200], mla_prefill(*alone, causal=causal)[0])


def test_strides_and_what_lies_between():
    """Views into larger tensors, NaN around them, as MLA's k and v come out of one projection."""
    dims, s = (192, 128), 300
    q, k, v = inputs(dims, s, s, torch.bfloat16, h_q=4, h_kv=4)
    wide = torch.full((2, s + 8, 4, 512), math.nan, device="cuda", dtype=torch.bfloat16)
    inner = wide[:, 3 : 3 + s]
    views = inner[..., 64:256], inner[..., 256:384]
    for view, tensor in zip(views, (k, v), strict=True):
        view.copy_(tensor)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(mla_prefill(heads_first, *views, causal=True), mla_prefill(q, k, v, causal=True))


@by_dtype
def test_parts_of_the_keys_merge(dtype):
    q, k, v = inputs((192, 128), 100, 700, dtype)
    parts = [
        mla_prefill(q, k[:, part], v[:, part], causal=False, return_lse=True)
        for part in (slice(0, 300), slice(300, 301), slice(301, 700))
    ]
    merged = merge_partials(*(torch.stack(x) for x in zip(*parts, strict=True)))
    check(q, k, v, False, merged)


def test_a_graph_takes_new_lengths():
    q, k, v = (x[0] for x in inputs((128, 128), 600, 600, torch.bfloat16, b=1))
    cu = starts([100, 500])

    def call():
        return mla_prefill(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for lengths in ([100, 500], [599, 1], [0, 600]):
        cu.copy_(starts(lengths))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        again = call()
        assert same_bits(out, again[0]) and same_bits(lse, again[1])


def test_compiled():
    q, k, v = inputs((64, 64), 200, 200, torch.bfloat16)

    @torch.compile(fullgraph=True)
    def attend(q, k, v):
        return mla_prefill(q, k, v, causal=True, return_lse=True)

    for compiled, eager in zip(
        attend(q, k, v), mla_prefill(q, k, v, causal=True, return_lse=True), strict=True
    ):
        assert same_bits(compiled, eager)


def test_nothing_to_do():
    q, k, v = inputs((64, 64), 5, 0, torch.bfloat16)
    out, lse = mla_prefill(q, k, v, causal=False, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    q, k, v = inputs((64, 64), 0, 5, torch.bfloat16)
    assert mla_prefill(q, k, v, causal=False).shape == (2, 0, 4, 64)


def test_checked_mode_reads_the_starts(monkeypatch):
    q, k, v = (x[0] for x in inputs((64, 64), 10, 10, torch.bfloat16, b=1))
    monkeypatch.setenv("MLA_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"cu_seqlens_k\[1\] is 11"):
        mla_prefill(q, k, v, causal=True, cu_seqlens_q=starts([10]), cu_seqlens_k=starts([11]))


VARIANTS = {
    "polynomial": PrefillTuning(64, 64, 3, 128, 4, 160, 32, polynomials=2),
    "as it comes": PrefillTuning(64, 64, 3, 128, 4, 160, 32, turns=False, compares=False),
    "two consumers": PrefillTuning(64, 64, 2, 128, 4, compares=False),
}


@pytest.mark.parametrize("tuning", VARIANTS.values(), ids=VARIANTS)
@by_mask
@by_dtype
def test_other_variants(dtype, causal, tuning):
    q, k, v = inputs((64, 64), 500, 700, dtype)
    check(q, k, v, causal, prefill_variant(tuning, q, k, v, causal=causal))
