"""Prefill over the paged latent cache: keys and values come out of latents chunk by chunk, in bounded memory.

A prompt's new tokens attend to themselves and to what the cache holds already: earlier parts of the prompt, a
shared prefix, a chat's history. Absorbed attention, as in decode, does (576 + 512) / (192 + 128) = 3.4 times
the arithmetic for each query. So keys and values are decompressed, once for many queries. All of them at once
would take 71 times the bytes of the cache (128 heads). A chunk of them (``chunks.py``) is gathered from its
pages, multiplied with W_UK and W_UV by cuBLAS, attended to by ``mla_prefill``, and joined to what came before
by its LSE, in fp32 (``cuda/merge_part.cu``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mla_kernels.append import takes_rows
from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V, check_softmax_scale, checked_mode
from mla_kernels.chunk_steps import NOPE, ROPE, VALUE, NativeSteps, PortableSteps
from mla_kernels.chunks import plan_chunks
from mla_kernels.decode import check_device_values
from mla_kernels.device import HOPPER, capability

WORKSPACE_TOKENS = 8192


@torch.no_grad()
def mla_prefill_paged(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    cu_seqlens_q: Sequence[int] | np.ndarray | torch.Tensor,
    cache_seqlens: Sequence[int] | np.ndarray | torch.Tensor,
    softmax_scale: float | None = None,
    workspace_tokens: int = WORKSPACE_TOKENS,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Causal attention of new tokens over a paged latent cache that has them already, keys decompressed.

    Runs on torch's current stream without a host synchronisation. Lengths are read on the host, to divide the
    keys into chunks: they are Python ints, or arrays or tensors on the CPU. A CUDA graph would keep them; use
    ``mla_decode``, whose lengths are on the device, for what is captured.

    Memory beside the arguments: ``workspace_bytes`` for a chunk, and ``result_bytes`` for the queries.

    Args:
        q: (total_q, h, 192) bf16 or fp16, contiguous: 128 columns and 64 rotary ones, of the new tokens of
            all sequences end to end.
        kv_cache: (num_pages, page_size, [1,] 576) of q's dtype: 512 latent columns and 64 rotary ones.
        block_table: (b, max_pages) int32 on q's device: pages of each sequence.
        w_uk, w_uv: (h, 128, 512) of q's dtype, contiguous: k = w_uk latent (without its rotary part, which
            all heads share), v = w_uv latent.
        cu_seqlens_q: (b + 1,) on the host, ascending from 0 to total_q: where each sequence's queries begin.
        cache_seqlens: (b,) on the host: tokens of each sequence in the cache, the new ones included. Query r
            of n sees positions <= length - n + r.
        softmax_scale: factor on q.k, > 0; 192 ** -0.5 if None.
        workspace_tokens: keys that are decompressed at a time, >= 1. Few take many calls and merges.
        return_lse: also return lse.

    Returns:
        out (total_q, h, 128) of q's dtype; with return_lse also lse (h, total_q) fp32, natural log. NaN in a
        sequence with a page id outside the pool.

    Raises:
        TypeError, ValueError: an argument of another type, shape, stride, device or range; with
            MLA_KERNELS_CHECK=1 also page ids out of range (this synchronises).

    On the CPU and on GPUs that are not Hopper the same chunks are computed by torch, in fp32 or wider, and q
    may be of any float dtype: correct, not fast.
    """
    starts, lengths = _host("cu_seqlens_q", cu_seqlens_q), _host("cache_seqlens", cache_seqlens)
    native = q.is_cuda and capability(q.device.index) == HOPPER
    _check(q, kv_cache, block_table, w_uk, w_uv, native)
    _check_lengths(q, kv_cache, block_table, starts, lengths, workspace_tokens)
    scale = check_softmax_scale(softmax_scale, NOPE + ROPE)
    if checked_mode():
        on_device = torch.tensor(lengths, dtype=torch.int32, device=q.device)
        check_device_values(kv_cache, block_table, on_device)
    pool = kv_cache.squeeze(2) if kv_cache.dim() == 4 else kv_cache
    chunks = plan_chunks(starts, lengths, workspace_tokens)
    steps = (NativeSteps if native else PortableSteps)(q, pool, block_table, w_uk, w_uv, scale, chunks)
    if len(chunks) == 1:  # the result of its only call
        (call,) = chunks[0].calls
        out, lse = steps.attend(call, *steps.decompress(chunks[0]))
        out = out.to(q.dtype)
        return (out, lse) if return_lse else out
    for chunk in chunks:
        k, v = steps.decompress(chunk)
        for call in chunk.calls:
            steps.merge(call, *steps.attend(call, k, v))
    return (steps.out, steps.lse) if return_lse else steps.out


def workspace_bytes(tokens: int, heads: int) -> int:
    """Bytes of a chunk on a Hopper GPU: its lines, and the keys and values of every head."""
    return 2 * tokens * (HEAD_DIM + heads * (NOPE + ROPE + VALUE))


def result_bytes(total_q: int, heads: int) -> int:
    """The same of the queries: running result in fp32, result, partial ones of two calls; LSEs of three."""
    return total_q * heads * ((4 + 2 + 2 + 2) * VALUE + 4 + 4 + 4)


def _host(name: str, values) -> list[int]:
    """Integers on the host as a list."""
    if isinstance(values, torch.Tensor) and values.is_cuda:
        raise TypeError(f"{name} is on {values.device}, must be on the host: keep a copy there, to plan by")
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name} is {array.dtype} of shape {array.shape}, must be integers (n,): pass a list")
    return array.tolist()


def _check(q, kv_cache, block_table, w_uk, w_uv, native: bool) -> None:
    if q.dim() != 3 or q.shape[2] != NOPE + ROPE or q.shape[1] == 0:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, must be (total_q, h, {NOPE + ROPE}) with h >= 1: {NOPE} columns "
            f"and {ROPE} rotary ones, not absorbed"
        )
    known = (torch.bfloat16, torch.float16)
    if not q.is_floating_point() or (native and q.dtype not in known):
        raise TypeError(f"q is {q.dtype}, must be torch.bfloat16 or torch.float16: convert it with .to()")
    shape = tuple(kv_cache.shape)
    if len(shape) not in (3, 4) or shape[-1] != HEAD_DIM or 0 in shape or (len(shape) == 4 and shape[2] != 1):
        raise ValueError(f"kv_cache has shape {shape}, must be (num_pages, page_size, [1,] {HEAD_DIM})")
    if block_table.dim() != 2 or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table is {block_table.dtype} of shape {tuple(block_table.shape)}, must be int32 "
            "(b, max_pages): a row a sequence"
        )
    weights = (q.shape[1], NOPE, HEAD_DIM_V)
    for name, tensor in (("w_uk", w_uk), ("w_uv", w_uv)):
        if tuple(tensor.shape) != weights:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {weights}, for the h of q")
    for name, tensor in (("kv_cache", kv_cache), ("w_uk", w_uk), ("w_uv", w_uv)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, must be q's {q.dtype}: convert it with .to()")
    others = {"kv_cache": kv_cache, "block_table": block_table, "w_uk": w_uk, "w_uv": w_uv}
    for name, tensor in others.items():
        if tensor.device != q.device:
            raise ValueError(
                f"{name} is on {tensor.device}, q on {q.device}: all must be on one device, use .to(q.device)"
            )
    for name, tensor in (("q", q), ("w_uk", w_uk), ("w_uv", w_uv)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous: call .contiguous()")
    if block_table.stride(-1) != 1 and block_table.shape[1] > 1:
        strides = block_table.stride()
        raise ValueError(f"block_table has strides {strides}, the last must be 1: call .contiguous()")
    if native and not (takes_rows(kv_cache) and takes_rows(q)):
        raise ValueError(
            f"lines of q or of kv_cache (strides {kv_cache.stride()}) do not begin at multiples of 16 bytes: "
            "call .contiguous() or .clone()"
        )


def _check_lengths(q, kv_cache, block_table, starts: list[int], lengths: list[int], workspace_tokens) -> None:
    b, total = block_table.shape[0], len(q)
    limit = block_table.shape[1] * kv_cache.shape[1]
    if isinstance(workspace_tokens, bool) or not isinstance(workspace_tokens, int) or workspace_tokens < 1:
        raise ValueError(f"workspace_tokens is {workspace_tokens!r}, must be an int >= 1: keys of a chunk")
    if len(starts) != b + 1 or len(lengths) != b:
        raise ValueError(
            f"cu_seqlens_q and cache_seqlens have {len(starts)} and {len(lengths)} numbers, must have "
            f"{b + 1} and {b}, for {b} rows of block_table: pass the batch's own"
        )
    if starts[0] != 0 or starts[-1] != total or sorted(starts) != starts:
        raise ValueError(f"cu_seqlens_q is {starts}, must ascend from 0 to the {total} tokens of q")
    for i, length in enumerate(lengths):
        n = starts[i + 1] - starts[i]
        if not n <= length <= limit:
            raise ValueError(
                f"cache_seqlens[{i}] is {length}, must be in [{n}, {limit}]: put its {n} new tokens into the "
                "cache first, and its pages into block_table"
            )
