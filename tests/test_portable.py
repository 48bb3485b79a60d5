"""The Triton operator against the oracle: on the GPU if there is one, else in Triton's interpreter."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_kernels import portable
from mla_kernels.device import DeviceUnavailable
from mla_kernels.reference import mla_decode_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT_LIMIT = {torch.bfloat16: 3e-3, torch.float16: 5e-4}  # relative L2
LSE_LIMIT = 1e-5
GARBAGE = torch.tensor([-(2**31), 2**31 - 1, -1, 2147480000], dtype=torch.int32)


def paged_inputs(lengths, s_q, h_q, page_size, dtype, *, seed=0, max_pages=None, scale=1.0):
    """q, pool, table, lengths: random lines in shuffled pages; NaN and garbage ids in all the rest."""
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages_of) + 2
    pool = torch.full((num_pages, page_size, 1, 576), math.nan)
    free = torch.randperm(num_pages, generator=generator).int()
    width = max_pages or max(pages_of) + 1
    table = GARBAGE.repeat(len(lengths) * width)[: len(lengths) * width].view(len(lengths), width).clone()
    for i, length in enumerate(lengths):
        table[i, : pages_of[i]], free = free[: pages_of[i]], free[pages_of[i] :]
        for j in range(pages_of[i]):
            in_use = min(page_size, length - j * page_size)
            pool[table[i, j], :in_use] = torch.randn(in_use, 1, 576, generator=generator)
    q = scale * torch.randn(len(lengths), s_q, h_q, 576, generator=generator)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return tuple(t.to(DEVICE) for t in (q.to(dtype), pool.to(dtype), table, seqlens))


def assert_matches_reference(inputs, **options):
    out, lse = portable.mla_decode(*inputs, **options)
    options.pop("out", None)
    ref_out, ref_lse = mla_decode_reference(*inputs, **options)
    assert out.dtype == inputs[0].dtype and lse.dtype == torch.float32
    for i in range(len(out)):
        error = (out[i].double() - ref_out[i]).norm() / ref_out[i].norm().clamp(min=1e-30)
        assert error <= OUT_LIMIT[out.dtype], f"sequence {i}: relative L2 error {error:.2e}"
    torch.testing.assert_close(lse.double(), ref_lse, rtol=0, atol=LSE_LIMIT)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 31, 32, 33, 64, 65, 97]), min_size=1, max_size=3),
    s_q=st.integers(1, 3),
    h_q=st.sampled_from([1, 3, 8, 9, 16, 17]),
    page_size=st.sampled_from([1, 2, 16, 64, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    causal=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(lengths, s_q, h_q, page_size, dtype, causal, scale, seed):
    inputs = paged_inputs(lengths, s_q, h_q, page_size, dtype, seed=seed, scale=scale)
    assert_matches_reference(inputs, causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_heads_and_shares(dtype):
    assert_matches_reference(paged_inputs([130, 40], 1, 128, 64, dtype))


def test_maximum_growing_along_kv():
    q, pool, table, seqlens = paged_inputs([120], 1, 16, 16, torch.bfloat16)
    q[..., -1] = 24  # with the default scale of 1/24, the last number of a line is added to its logit
    for j in range(8):
        pool[table[0, j], :, 0, -1] += 5.0 * j
    assert_matches_reference((q, pool, table, seqlens))


def test_scale_three_dimensional_cache_and_strided_table():
    q, pool, table, seqlens = paged_inputs([50, 7], 1, 4, 16, torch.float16)
    wide = torch.cat([table, table], 1)[:, : table.shape[1]]
    assert not wide.is_contiguous()
    assert_matches_reference((q, pool.squeeze(2), wide, seqlens), softmax_scale=0.1)


def test_pool_that_is_a_slice_of_larger_lines():
    q, pool, table, seqlens = paged_inputs([50, 7], 1, 4, 16, torch.float16)
    roomy = torch.full((*pool.shape[:-1], 640), math.nan, dtype=pool.dtype, device=DEVICE)
    roomy[..., :576] = pool
    assert_matches_reference((q, roomy[..., :576], table, seqlens))


def test_out_is_written_and_lse_is_optional():
    inputs = paged_inputs([33, 0], 2, 3, 64, torch.bfloat16)
    expected, _ = portable.mla_decode(*inputs)
    out = torch.full_like(expected, math.nan)
    assert portable.mla_decode(*inputs, out=out, return_lse=False) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_queries(causal):
    q, *rest = paged_inputs([97, 5, 0, 33], 6, 3, 32, torch.bfloat16)
    counts = [2, 0, 1, 3]
    starts = torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32, device=DEVICE)
    ragged = torch.cat([own[:n] for own, n in zip(q, counts, strict=True)])
    out, lse = portable.mla_decode(ragged, *rest, causal=causal, cu_seqlens_q=starts)
    ref_out, ref_lse = mla_decode_reference(ragged, *rest, causal=causal, cu_seqlens_q=starts)
    assert out.shape == (6, 3, 512) and lse.shape == (3, 6)
    assert (out.double() - ref_out).norm() <= OUT_LIMIT[torch.bfloat16] * ref_out.norm()
    torch.testing.assert_close(lse.double(), ref_lse, rtol=0, atol=LSE_LIMIT)


@pytest.mark.parametrize(
    ("starts", "message"),
    [([0, 6], r"cu_seqlens_q has shape \(2,\), must be \(3,\)"), ([0.0, 1, 6], "torch.int32")],
)
def test_ragged_arguments_are_checked(starts, message):
    q, *rest = paged_inputs([9, 5], 3, 2, 32, torch.bfloat16)
    with pytest.raises((TypeError, ValueError), match=message):
        portable.mla_decode(
            q.flatten(0, 1),
            *rest,
            cu_seqlens_q=torch.tensor(starts, device=DEVICE).to(
                torch.float32 if isinstance(starts[0], float) else torch.int32
            ),
        )


def test_empty_batch():
    q, pool, table, seqlens = paged_inputs([3], 1, 2, 16, torch.bfloat16)
    out, lse = portable.mla_decode(q[:0], pool, table[:0], seqlens[:0])
    assert out.shape == (0, 1, 2, 512) and lse.shape == (0, 2, 1)


@pytest.mark.parametrize("length", [-1, -(2**31), 4 * 16 + 1, 2**31 - 1])
def test_invalid_length_is_nan_there_alone(length):
    inputs = paged_inputs([20, 33, 5], 2, 3, 16, torch.bfloat16, max_pages=4)
    assert_nan_in_sequence_one_alone(inputs, lambda table, seqlens: seqlens[1].fill_(length))


@pytest.mark.parametrize("page", [-1, -(2**31), 8, 2**31 - 1])
@pytest.mark.parametrize("slot", [0, 2])
def test_invalid_page_is_nan_there_alone(page, slot):
    inputs = paged_inputs([20, 33, 5], 2, 3, 16, torch.bfloat16)
    assert inputs[1].shape[0] == 8
    assert_nan_in_sequence_one_alone(inputs, lambda table, seqlens: table[1, slot].fill_(page))


def assert_nan_in_sequence_one_alone(inputs, spoil):
    good_out, good_lse = portable.mla_decode(*inputs, causal=True)
    spoil(inputs[2], inputs[3])
    out, lse = portable.mla_decode(*inputs, causal=True)
    assert out[1].isnan().all() and lse[1].isnan().all()
    for i in (0, 2):
        assert torch.equal(out[i], good_out[i]) and torch.equal(lse[i], good_lse[i])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"q": a["q"].float()}, TypeError, r"q is torch.float32.*bfloat16 or torch.float16"),
        (lambda a: a | {"kv_cache": a["kv_cache"].half()}, TypeError, r"kv_cache is torch.float16.*bfloat16"),
        (lambda a: a | {"block_table": a["block_table"].long()}, TypeError, r"block_table.*int64.*int32"),
        (lambda a: a | {"cache_seqlens": [3, 4]}, TypeError, r"cache_seqlens is a list"),
        (
            lambda a: a | {"cache_seqlens": a["cache_seqlens"][:1]},
            ValueError,
            r"cache_seqlens.*\(1,\).*\(2,\)",
        ),
        (lambda a: a | {"q": a["q"][..., :512].contiguous()}, ValueError, r"q has shape.*512.*576"),
        (lambda a: a | {"q": a["q"][0]}, ValueError, r"q has shape \(1, 4, 576\)"),
        (lambda a: a | {"q": a["q"].transpose(1, 2)[:, :2]}, ValueError, r"q has strides.*contiguous\(\)"),
        (
            lambda a: a | {"kv_cache": a["kv_cache"].expand(-1, -1, 2, -1)},
            ValueError,
            r"kv_cache.*one latent",
        ),
        (lambda a: a | {"kv_cache": a["kv_cache"][:, :12]}, ValueError, r"page_size 12.*power of two"),
        (
            lambda a: a | {"kv_cache": a["kv_cache"].repeat(1, 1, 1, 2)[..., ::2]},
            ValueError,
            r"kv_cache has strides",
        ),
        (lambda a: a | {"block_table": a["block_table"][:1]}, ValueError, r"block_table.*\(2, max_pages\)"),
        (
            lambda a: a | {"block_table": a["block_table"].mT.contiguous().mT},
            ValueError,
            r"block_table.*strides",
        ),
        (lambda a: a | {"head_dim_v": 256}, ValueError, r"head_dim_v is 256, must be 512"),
        (
            lambda a: a | {"out": torch.empty(2, 1, 4, 576, device=DEVICE).bfloat16()},
            ValueError,
            r"out.*\(2, 1, 4, 512\)",
        ),
        (lambda a: a | {"out": torch.empty(2, 1, 4, 512, device=DEVICE)}, TypeError, r"out is torch.float32"),
        (lambda a: a | {"cache_seqlens": a["cache_seqlens"].to("meta")}, ValueError, r"on meta, q on"),
    ],
)
def test_bad_arguments_name_value_limit_and_remedy(change, error, message):
    names = ("q", "kv_cache", "block_table", "cache_seqlens")
    arguments = dict(zip(names, paged_inputs([20, 3], 1, 4, 16, torch.bfloat16), strict=True))
    with pytest.raises(error, match=message):
        portable.mla_decode(**change(arguments))


def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [t.cpu() for t in paged_inputs([3], 1, 2, 16, torch.bfloat16)]
    with pytest.raises(DeviceUnavailable, match=r"q is on cpu.*TRITON_INTERPRET=1.*mla_kernels\.reference"):
        portable.mla_decode(*inputs)


def test_missing_triton_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "mla_kernels.portable_kernels", raising=False)
    monkeypatch.delattr("mla_kernels.portable_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install triton"):
        portable.mla_decode(*paged_inputs([3], 1, 2, 16, torch.bfloat16))


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mla_kernels import portable, portable_kernels as kernels

def compile(kernel, capability, constants, **types):
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 1}).metadata.shared

constants = {"ROW_BLOCK": portable.ROW_BLOCK, "TILE": portable.TILE, "INTERPRETED": False}
pointers = {"table_ptr": "*i32", "seqlens_ptr": "*i32", "part_out_ptr": "*fp32", "part_lse_ptr": "*fp32"}
attend, merge = kernels.attend_share, kernels.merge_shares
print(json.dumps([
    compile(attend, 80, constants | {"CAUSAL": True, "PAGE": 1}, **pointers, q_ptr="*bf16", kv_ptr="*bf16",
            scale_log2="fp32"),
    compile(attend, 90, constants | {"CAUSAL": False, "PAGE": 64, "s_q": 1, "h_q": 1}, **pointers,
            q_ptr="*fp16", kv_ptr="*fp16", scale_log2="fp32"),
    compile(merge, 80, {"SHARES_PADDED": 8}, **pointers, out_ptr="*bf16", lse_ptr="*fp32"),
]))
"""


def test_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    smallest_shared_memory = 64 * 1024  # Turing, and AMD's LDS
    assert all(shared <= smallest_shared_memory for shared in json.loads(done.stdout))
