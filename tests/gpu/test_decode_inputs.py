"""What mla_decode does with inputs that are wrong: an error from the host, or NaN in that sequence alone."""

import math

import pytest
import torch

from mla_kernels.decode import mla_decode
from mla_kernels.reference import mla_decode_reference
from tests.gpu.cases import ErrorLog, paged_case, same_bits

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
LENGTHS = [300, 5000, 64, 0, 1000, 1]

by_shape = pytest.mark.parametrize(
    ("s_q", "h_q", "causal"), [(1, 1, False), (1, 16, False), (3, 9, True), (1, 128, False), (2, 128, True)]
)


def case_with_readable_surroundings(s_q, h_q):
    """A read outside the pool would find ones here, not the NaN that is the right answer."""
    return paged_case(LENGTHS, s_q, h_q, torch.bfloat16, guard=1.0)


def others(i: int) -> list[int]:
    return [j for j in range(len(LENGTHS)) if j != i]


@by_shape
def test_page_outside_the_pool_is_nan_in_its_sequence_alone(s_q, h_q, causal):
    case = case_with_readable_surroundings(s_q, h_q)
    good_out, good_lse = mla_decode(*case.tensors(), causal=causal)
    num_pages = case.kv_cache.shape[0]
    wrong = []
    for i, length in enumerate(LENGTHS):
        in_use = -(-length // 64)
        for index in sorted({0, in_use // 2, in_use - 1}) if length else []:
            for page in (-1, INT_MIN, num_pages, INT_MAX):
                table = case.block_table.clone()
                table[i, index] = page
                out, lse = mla_decode(case.q, case.kv_cache, table, case.cache_seqlens, causal=causal)
                rest = others(i)
                kept = same_bits(out[rest], good_out[rest]) & same_bits(lse[rest], good_lse[rest])
                if not (out[i].isnan().all() and lse[i].isnan().all()):
                    wrong.append(f"sequence {i}, page {index} of {in_use} = {page}: not all NaN")
                if not kept:
                    wrong.append(f"sequence {i}, page {index} of {in_use} = {page}: another sequence changed")
    assert not wrong, "\n".join(wrong)


@by_shape
def test_length_out_of_range_is_nan_in_its_sequence_alone(s_q, h_q, causal, worst):
    case = case_with_readable_surroundings(s_q, h_q)
    ref_out, ref_lse = mla_decode_reference(*case.tensors(), causal=causal)
    log = ErrorLog(torch.bfloat16)
    for i in range(len(LENGTHS)):
        for length in (-1, INT_MIN, case.block_table.shape[1] * 64 + 1, INT_MAX):
            seqlens = case.cache_seqlens.clone()
            seqlens[i] = length
            out, lse = mla_decode(case.q, case.kv_cache, case.block_table, seqlens, causal=causal)
            label = f"sequence {i}, length {length}"
            assert out[i].isnan().all() and lse[i].isnan().all(), f"{label}: not all NaN"
            rest = others(i)
            log.add(label, out[rest], lse[rest], ref_out[rest], ref_lse[rest])
    log.check(worst)


@by_shape
def test_nothing_but_invalid_sequences(s_q, h_q, causal):
    case = case_with_readable_surroundings(s_q, h_q)
    for seqlens in (torch.full_like(case.cache_seqlens, -1), torch.full_like(case.cache_seqlens, INT_MAX)):
        out, lse = mla_decode(case.q, case.kv_cache, case.block_table, seqlens, causal=causal)
        assert out.isnan().all() and lse.isnan().all()


def test_longest_length_that_the_table_allows(worst):
    case = paged_case([64 * 4, 64 * 7], 1, 16, torch.bfloat16)
    table = case.block_table[:, :7].contiguous()  # no entry to spare
    log = ErrorLog(torch.bfloat16)
    tensors = (case.q, case.kv_cache, table, case.cache_seqlens)
    log.add("full table", *mla_decode(*tensors), *mla_decode_reference(*tensors))
    log.check(worst)


def test_checked_mode_raises(monkeypatch):
    case = paged_case(LENGTHS, 1, 16, torch.bfloat16)
    unchecked = mla_decode(*case.tensors())
    monkeypatch.setenv("MLA_KERNELS_CHECK", "1")
    checked = mla_decode(*case.tensors())
    assert same_bits(checked[0], unchecked[0]) and same_bits(checked[1], unchecked[1])

    num_pages, capacity = case.kv_cache.shape[0], case.block_table.shape[1] * 64
    for length in (-1, capacity + 1):
        seqlens = case.cache_seqlens.clone()
        seqlens[2] = length
        with pytest.raises(ValueError, match=rf"cache_seqlens\[2\] is {length}.*{capacity}"):
            mla_decode(case.q, case.kv_cache, case.block_table, seqlens)
    for page in (-1, num_pages):
        table = case.block_table.clone()
        table[1, 3] = page
        with pytest.raises(ValueError, match=rf"block_table\[1, 3\] is {page}.*{num_pages - 1}"):
            mla_decode(case.q, case.kv_cache, table, case.cache_seqlens)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same contents, contiguous, but starting 2 bytes after an aligned address."""
    storage = tensor.new_empty(tensor.numel() + 1)
    storage[1:] = tensor.flatten()
    return storage[1:].view(tensor.shape)


def with_line_stride(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    roomy = tensor.new_empty(*tensor.shape[:-1], stride)
    roomy[..., : tensor.shape[-1]] = tensor
    return roomy[..., : tensor.shape[-1]]


BAD_ARGUMENTS = {
    # dtypes and types
    "q fp32": ("q", lambda t: t.float(), TypeError, "float32.*bfloat16"),
    "q int8": ("q", lambda t: t.to(torch.int8), TypeError, "int8.*bfloat16"),
    "q numpy": ("q", lambda t: t.float().cpu().numpy(), TypeError, "ndarray.*Tensor"),
    "cache of another dtype": ("kv_cache", lambda t: t.half(), TypeError, "float16.*bfloat16"),
    "cache fp8": ("kv_cache", lambda t: t.to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn.*bfloat16"),
    "table int64": ("block_table", lambda t: t.long(), TypeError, "int64.*int32"),
    "lengths int64": ("cache_seqlens", lambda t: t.long(), TypeError, "int64.*int32"),
    "lengths fp32": ("cache_seqlens", lambda t: t.float(), TypeError, "float32.*int32"),
    "lengths list": ("cache_seqlens", lambda t: t.tolist(), TypeError, "list.*Tensor"),
    "out fp32": ("out", lambda t: t.float(), TypeError, "float32.*bfloat16"),
    # shapes
    "q 3-D": ("q", lambda t: t[:, 0], ValueError, r"\(6, 16, 576\)"),
    "q 512 columns": ("q", lambda t: t[..., :512].contiguous(), ValueError, "512.*576"),
    "q no heads": ("q", lambda t: t[:, :, :0], ValueError, "h_q >= 1"),
    "q no tokens": ("q", lambda t: t[:, :0], ValueError, "s_q"),
    "cache 640 columns": ("kv_cache", lambda t: with_line_stride(t, 640)[..., :560], ValueError, "560.*576"),
    "cache 2-D": ("kv_cache", lambda t: t[0, :, 0], ValueError, r"\(64, 576\)"),
    "cache two KV heads": ("kv_cache", lambda t: t.expand(-1, -1, 2, -1), ValueError, "2, 576.*one"),
    "page size 48": ("kv_cache", lambda t: t[:, :48], ValueError, "48.*64"),
    "page size 0": ("kv_cache", lambda t: t[:, :0], ValueError, "0, 1, 576"),
    "no pages": ("kv_cache", lambda t: t[:0], ValueError, "kv_cache.*at least 1"),
    "table 1-D": ("block_table", lambda t: t[0], ValueError, r"\(6, max_pages\)"),
    "table of another batch": ("block_table", lambda t: t[:5], ValueError, r"\(6, max_pages\)"),
    "lengths of another batch": ("cache_seqlens", lambda t: t[:5], ValueError, r"\(5,\).*\(6,\)"),
    "lengths 2-D": ("cache_seqlens", lambda t: t[:, None], ValueError, r"\(6, 1\).*\(6,\)"),
    "out 576 columns": ("out", lambda t: t.new_empty(6, 1, 16, 576), ValueError, "576.*512"),
    "out of another batch": ("out", lambda t: t[:5], ValueError, r"\(5, 1, 16, 512\).*\(6, 1, 16, 512\)"),
    "head_dim_v": ("head_dim_v", lambda _: 256, ValueError, "256.*512"),
    # strides and alignment
    "q columns apart": ("q", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], ValueError, r"q.*\.contiguous\(\)"),
    "q heads of a larger q": (
        "q",
        lambda t: t.repeat(1, 1, 2, 1)[:, :, :16],
        ValueError,
        r"\.contiguous\(\)",
    ),
    "cache columns apart": (
        "kv_cache",
        lambda t: t.repeat(1, 1, 1, 2)[..., ::2],
        ValueError,
        "strides.*must",
    ),
    "cache line stride 577": ("kv_cache", lambda t: with_line_stride(t, 577), ValueError, "577.*8"),
    "table transposed": ("block_table", lambda t: t.T.contiguous().T, ValueError, "strides.*must"),
    "lengths apart": (
        "cache_seqlens",
        lambda t: t.repeat_interleave(2)[::2],
        ValueError,
        r"\.contiguous\(\)",
    ),
    "out apart": ("out", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], ValueError, r"out.*\.contiguous\(\)"),
    "q unaligned": ("q", shifted, ValueError, "q.*16 bytes"),
    "cache unaligned": ("kv_cache", shifted, ValueError, "kv_cache.*16 bytes"),
    "out unaligned": ("out", shifted, ValueError, "out.*16 bytes"),
    # devices
    "q on the CPU": ("q", lambda t: t.cpu(), ValueError, "cpu.*cuda|cuda.*cpu"),
    "cache on the CPU": ("kv_cache", lambda t: t.cpu(), ValueError, "cpu.*cuda"),
    "table on the CPU": ("block_table", lambda t: t.cpu(), ValueError, "cpu.*cuda"),
    "lengths on the CPU": ("cache_seqlens", lambda t: t.cpu(), ValueError, "cpu.*cuda"),
    "out on the CPU": ("out", lambda t: t.cpu(), ValueError, "cpu.*cuda"),
    # scale
    "scale NaN": ("softmax_scale", lambda _: math.nan, ValueError, "nan.*finite"),
    "scale infinite": ("softmax_scale", lambda _: math.inf, ValueError, "inf.*finite"),
    "scale negative": ("softmax_scale", lambda _: -0.1, ValueError, "-0.1.*> 0"),
}


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_argument_is_refused_with_value_and_limit(name, change, error, message):
    case = paged_case(LENGTHS, 1, 16, torch.bfloat16)
    names = ("q", "kv_cache", "block_table", "cache_seqlens")
    good = dict(zip(names, case.tensors(), strict=True)) | {"out": case.q.new_empty(6, 1, 16, 512)}
    with pytest.raises(error, match=message):
        mla_decode(**good | {name: change(good.get(name))})
    mla_decode(**good)
    torch.cuda.synchronize()


def test_everything_on_the_cpu():
    from mla_kernels.device import DeviceUnavailable

    tensors = [tensor.cpu() for tensor in paged_case([5], 1, 16, torch.bfloat16).tensors()]
    with pytest.raises(DeviceUnavailable, match=r"cpu.*mla_kernels\.reference"):
        mla_decode(*tensors)
