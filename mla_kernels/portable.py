"""``mla_decode`` in Triton, for GPUs that are not Hopper; on CPU tensors under Triton's interpreter.

Flash decoding: the KV tokens of a sequence are cut into equal shares, one program works through one share
for 16 query rows, and a second kernel merges the shares (``portable_kernels.py``). The number of shares
depends on shapes and on the GPU only: results repeat bitwise, and lengths may change under a CUDA graph.
It is written to be right everywhere, not to be fast: 16 rows and 32 tokens fit the shared memory of any GPU.
"""

import itertools
import math
import os
from types import ModuleType
from typing import TYPE_CHECKING

from mla_kernels.arguments import check_decode_arguments

if TYPE_CHECKING:
    import torch

ROW_BLOCK = 16
TILE = 32
PROGRAMS_PER_SM = 2
INTERPRETED_SMS = 2  # on the CPU: a few shares, so that merging is exercised there too


def mla_decode(
    q: "torch.Tensor",
    kv_cache: "torch.Tensor",
    block_table: "torch.Tensor",
    cache_seqlens: "torch.Tensor",
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    out: "torch.Tensor | None" = None,
    return_lse: bool = True,
    cu_seqlens_q: "torch.Tensor | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor] | torch.Tensor":
    """The semantics of ``mla_kernels.mla_decode`` (see ``reference.py``), at any power-of-two page size.

    Args:
        q: (b, s_q, h_q, 576) bf16 or fp16, contiguous.
        kv_cache: (num_pages, page_size, 1, 576) or (num_pages, page_size, 576), of q's dtype.
        block_table: (b, max_pages) int32 page ids.
        cache_seqlens: (b,) int32 lengths in tokens.
        head_dim_v: 512.
        softmax_scale: factor on the logits, 576 ** -0.5 when None.
        causal: bottom-right aligned causal mask over the s_q query tokens.
        out: where to write the result, (b, s_q, h_q, 512) of q's dtype.
        return_lse: False to get ``out`` alone.
        cu_seqlens_q: (b + 1,) int32 for a q of (total_q, h_q, 576); here that costs a host synchronisation.

    Returns:
        out (b, s_q, h_q, 512) and lse (b, h_q, s_q) fp32, natural logarithm. NaN for a sequence whose length
        or page ids are invalid.

    Raises:
        TypeError, ValueError: an argument is not as above.
        ModuleNotFoundError: there is no Triton.
        DeviceUnavailable: CPU tensors without TRITON_INTERPRET=1.
    """
    import torch

    own = {"out": out, "cu_seqlens_q": cu_seqlens_q}
    check_decode_arguments(q, kv_cache, block_table, cache_seqlens, head_dim_v=head_dim_v, **own)
    page_size = kv_cache.shape[1]
    if page_size & (page_size - 1):
        raise ValueError(f"kv_cache has page_size {page_size}, must be a power of two: repack the cache")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (q.is_cuda or interpreted):
        from mla_kernels.device import DeviceUnavailable

        raise DeviceUnavailable(
            f"q is on {q.device}, the Triton kernels need a GPU: move the tensors to one, set "
            "TRITON_INTERPRET=1 before importing triton to interpret them, or use mla_kernels.reference"
        )
    kernels = _import_kernels()
    if cu_seqlens_q is not None:
        result = _decode_ragged(
            q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, out, softmax_scale, causal
        )
        return result if return_lse else result[0]

    b, s_q, h_q, d = q.shape
    rows, max_pages = s_q * h_q, block_table.shape[1]
    if out is None:
        out = q.new_empty(b, s_q, h_q, head_dim_v)
    lse = q.new_empty(b, h_q, s_q, dtype=torch.float32)
    if b > 0:
        row_blocks = -(-rows // ROW_BLOCK)
        shares = _count_shares(q.device, b * row_blocks, max_pages * page_size)
        part_out = q.new_empty(b, rows, shares, head_dim_v, dtype=torch.float32)
        part_lse = q.new_empty(b, rows, shares, dtype=torch.float32)
        # The interpreter rounds fp32 to bf16 towards zero: torch does it there.
        merged = torch.empty_like(out, dtype=torch.float32) if interpreted else out
        with torch.cuda.device(q.device if q.is_cuda else -1):
            kernels.attend_share[(shares, row_blocks, b)](
                q,
                kv_cache,
                block_table,
                cache_seqlens,
                part_out,
                part_lse,
                (d**-0.5 if softmax_scale is None else softmax_scale) * math.log2(math.e),
                s_q,
                h_q,
                kv_cache.shape[0],
                max_pages,
                block_table.stride(0),
                kv_cache.stride(0),
                kv_cache.stride(1),
                CAUSAL=causal,
                PAGE=page_size,
                ROW_BLOCK=ROW_BLOCK,
                TILE=TILE,
                INTERPRETED=interpreted,
                num_warps=4,
                num_stages=1,
            )
            shares_padded = 1 << (shares - 1).bit_length()
            kernels.merge_shares[(rows, b)](
                part_out, part_lse, merged, lse, s_q, h_q, shares, SHARES_PADDED=shares_padded
            )
        if interpreted:
            out.copy_(merged)
    return (out, lse) if return_lse else out


def _decode_ragged(q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, out, softmax_scale, causal):
    """Each sequence's query tokens behind as many empty ones as make all equally many."""
    import torch

    starts = cu_seqlens_q.tolist()
    counts = [end - begin for begin, end in itertools.pairwise(starts)]
    longest, b = max(counts, default=0), len(counts)
    out = q.new_empty(*q.shape[:2], 512) if out is None else out
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if longest == 0:
        return out, lse
    padded = q.new_zeros(b, longest, *q.shape[1:])
    own = torch.tensor([[s >= longest - n for s in range(longest)] for n in counts], device=q.device)
    padded[own] = q
    options = {"softmax_scale": softmax_scale, "causal": causal}
    padded_out, padded_lse = mla_decode(padded, kv_cache, block_table, cache_seqlens, **options)
    out.copy_(padded_out[own])
    lse.copy_(padded_lse.transpose(1, 2)[own].T)
    return out, lse


def _count_shares(device: "torch.device", programs_per_share: int, capacity: int) -> int:
    """Enough shares to fill the GPU, at most the tiles of the table; lengths may change, so not from them."""
    import torch

    sms = INTERPRETED_SMS
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-PROGRAMS_PER_SM * sms // programs_per_share)
    return max(1, min(wanted, -(-capacity // TILE)))


def _import_kernels() -> ModuleType:
    """The kernel module, imported at the first call: Triton may be missing, and is slow to import."""
    try:
        from mla_kernels import portable_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "mla_kernels.portable needs Triton, which is not installed: pip install triton (Linux only), "
            "or use mla_kernels.reference",
            name="triton",
        ) from error
    return portable_kernels
