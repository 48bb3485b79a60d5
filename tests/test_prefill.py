"""The prefill oracle against torch's own attention in fp64, and what the operator refuses, on any machine."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import mla_kernels
from mla_kernels import prefill
from mla_kernels.device import DeviceUnavailable
from mla_kernels.prefill_arguments import check_prefill_starts
from mla_kernels.prefill_plan import PrefillParams
from mla_kernels.prefill_reference import mla_prefill_reference
from mla_kernels.prefill_tuning import HEAD_DIMS, PrefillTuning, PrefillTuningError, serving
from mla_kernels.reference import merge_partials_reference


def tensors(s_q, s_k, h_q=4, h_kv=2, dims=(64, 64), batch=(2,), dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(s_q * 1000 + s_k)
    q = torch.randn(*batch, s_q, h_q, dims[0], generator=generator).to(dtype)
    k = torch.randn(*batch, s_k, h_kv, dims[0], generator=generator).to(dtype)
    v = torch.randn(*batch, s_k, h_kv, dims[1], generator=generator).to(dtype)
    return q, k, v


def starts(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def torch_attention(q, k, v, causal, scale=None):
    """(b, s_q, h_q, d_v) by torch, in fp64, with the mask spelled out; rows that see nothing are 0."""
    group = q.shape[2] // k.shape[2]
    rows, keys, values = (x.double().transpose(1, 2) for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal:
        mask = mask.tril(k.shape[1] - q.shape[1])
    out = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return out.masked_fill(~mask.any(1)[:, None], 0).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q, s_k", [(1, 1), (1, 7), (5, 5), (3, 9), (9, 3)])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
def test_oracle_is_torchs_attention(dims, s_q, s_k, causal):
    q, k, v = tensors(s_q, s_k, dims=dims)
    out, _ = mla_prefill_reference(q, k, v, causal=causal, softmax_scale=0.3)
    torch.testing.assert_close(out, torch_attention(q, k, v, causal, 0.3), rtol=1e-12, atol=1e-12)


def test_oracles_lse_joins_parts_of_the_keys():
    q, k, v = tensors(3, 12)
    halves = [
        mla_prefill_reference(q, k[:, part], v[:, part], causal=False) for part in (slice(7), slice(7, 12))
    ]
    outs, lses = (torch.stack(parts) for parts in zip(*halves, strict=True))
    joined, lse = merge_partials_reference(outs, lses)
    whole = mla_prefill_reference(q, k, v, causal=False)
    torch.testing.assert_close((joined, lse), whole, rtol=1e-12, atol=1e-12)


def test_a_row_that_sees_nothing():
    q, k, v = tensors(5, 2)
    out, lse = mla_prefill_reference(q, k, v, causal=True)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -math.inf).all()
    assert lse[..., 3:].isfinite().all()
    out, lse = mla_prefill_reference(q, k[:, :0], v[:, :0], causal=False)
    assert (out == 0).all() and (lse == -math.inf).all()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=5),
    st.booleans(),
)
def test_ragged_oracle_is_each_sequence_alone(lengths, causal):
    lengths_q, lengths_k = zip(*lengths, strict=True)
    q, k, v = tensors(sum(lengths_q), sum(lengths_k), batch=())
    cu_q, cu_k = starts(lengths_q), starts(lengths_k)
    out, lse = mla_prefill_reference(q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for i in range(len(lengths)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = mla_prefill_reference(q[None, rows], k[None, keys], v[None, keys], causal=causal)
        assert torch.equal(out[rows], alone[0][0]) and torch.equal(lse[:, rows], alone[1][0])
        expected = torch_attention(q[None, rows], k[None, keys], v[None, keys], causal)
        torch.testing.assert_close(alone[0], expected, rtol=1e-12, atol=1e-12)


def test_without_a_gpu_the_operator_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceUnavailable, match="q is on cpu"):
        mla_kernels.mla_prefill(*tensors(3, 3), causal=True)


def strided(tensor, stride):
    """Of the same shape, tokens ``stride`` elements apart."""
    *batch, s, _, d = tensor.shape
    room = torch.empty(*batch, s, stride, dtype=tensor.dtype)
    return room.as_strided(tensor.shape, (s * stride, stride, d, 1))


def refused(change):
    q, k, v = tensors(3, 5)
    arguments = {"q": q, "k": k, "v": v, "causal": True} | change(q, k, v)
    return prefill.mla_prefill(**arguments)


RAGGED = {"cu_seqlens_q": starts([3]), "cu_seqlens_k": starts([5])}
REFUSED = {
    "a list": (lambda q, k, v: {"k": [1]}, TypeError, "k is a list"),
    "fp32": (lambda q, k, v: {"q": q.float()}, TypeError, "q is torch.float32"),
    "mixed": (lambda q, k, v: {"v": v.half()}, TypeError, "v is torch.float16, must be torch.bfloat16"),
    "head dims": (lambda q, k, v: {"v": v[..., :32]}, ValueError, "64 of q, 64 of k and 32 of v"),
    "k's head dim": (lambda q, k, v: {"k": k[..., :32]}, ValueError, "32 of k"),
    "three dims": (lambda q, k, v: {"q": q[0]}, ValueError, r"must be \(b, s_q, h_q, d_qk\)"),
    "batches": (lambda q, k, v: {"q": q[:1]}, ValueError, "must agree"),
    "lengths": (lambda q, k, v: {"v": v[:, 1:]}, ValueError, "must agree"),
    "heads": (lambda q, k, v: {"q": q[:, :, :3]}, ValueError, "h_q is 3 and h_kv 2"),
    "inner stride": (
        lambda q, k, v: {"k": torch.cat([k, k], -1)[..., ::2]},
        ValueError,
        "the last must be 1",
    ),
    "16 bytes": (lambda q, k, v: {"q": strided(q, 260)}, ValueError, "multiples of 8 elements"),
    "scale": (lambda q, k, v: {"softmax_scale": -1.0}, ValueError, "softmax_scale is -1.0"),
    "scale's type": (lambda q, k, v: {"softmax_scale": "1"}, TypeError, "softmax_scale is a str"),
    "one of two": (lambda q, k, v: {"cu_seqlens_q": starts([3])}, ValueError, "belong together"),
    "not ragged": (lambda q, k, v: RAGGED, ValueError, r"must be \(total_q, h_q, d_qk\)"),
    "int64": (
        lambda q, k, v: {"q": q[0], "k": k[0], "v": v[0], **RAGGED, "cu_seqlens_k": starts([5]).long()},
        TypeError,
        "cu_seqlens_k is torch.int64",
    ),
    "numbers of sequences": (
        lambda q, k, v: {"q": q[0], "k": k[0], "v": v[0], **RAGGED, "cu_seqlens_k": starts([2, 3])},
        ValueError,
        r"cu_seqlens_k has shape \(3,\)",
    ),
}


@pytest.mark.parametrize("change, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(change, error, message):
    with pytest.raises(error, match=message):
        refused(change)


@pytest.mark.parametrize("values", [[1, 4, 9], [0, 5, 4, 9], [0, 4, 10], [0, 4, 8], [0, -1, 9]])
def test_starts_out_of_order(values):
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        check_prefill_starts("cu_seqlens_k", torch.tensor(values, dtype=torch.int32), 9)
    check_prefill_starts("cu_seqlens_k", torch.tensor([0, 4, 4, 9], dtype=torch.int32), 9)


@pytest.mark.parametrize(
    "change",
    [
        {"consumers": 4},
        {"keys": 100},
        {"stages": 1},
        {"stages": 9},
        {"consumer_registers": 248},
        {"producer_registers": 48},  # 512 of the 504 that 384 threads have
        {"consumers": 3},
    ],
)
def test_tunings_that_cannot_run(change):
    options = {"head_dim": 128, "head_dim_v": 128, "consumers": 2, "keys": 128, "stages": 2} | change
    with pytest.raises(PrefillTuningError):
        PrefillTuning(**options)


@pytest.mark.parametrize(
    "b, s, h_q, causal, rows",
    [
        (1, 512, 8, False, 128),  # 24 items of 192 rows leave most CTAs without one
        (1, 2048, 8, False, 128),
        (1, 16384, 32, False, 192),
        (4, 1024, 16, True, 128),  # many short items
        (1, 16384, 32, True, 192),
    ],
)
def test_rows_of_an_item_follow_the_shape(b, s, h_q, causal, rows):
    """As measured on an H100, which has 132 multiprocessors."""
    assert serving((64, 64), b, s, s, h_q, causal, ctas=132).rows == rows


def test_head_dims_and_parameters():
    assert set(HEAD_DIMS) == {(64, 64), (128, 128), (192, 128), (256, 256)}
    assert PrefillParams.out.offset == 3 * 128


@pytest.mark.parametrize("ragged", [False, True])
def test_traces_without_a_gpu(ragged):
    """torch.compile takes the operator whole: its fake kernel has the shapes of its results."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = tensors(3, 5, dims=(192, 128), batch=() if ragged else (2,))
    cu = (starts([1, 2]), starts([2, 3])) if ragged else (None, None)
    with FakeTensorMode() as mode:
        fake = [x if x is None else mode.from_tensor(x) for x in (q, k, v, *cu)]
        out, lse = torch.ops.mla_kernels.prefill(*fake[:3], True, 0.1, *fake[3:])
    expected_out, expected_lse = mla_prefill_reference(
        q, k, v, causal=True, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1]
    )
    assert (out.shape, lse.shape) == (expected_out.shape, expected_lse.shape)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
