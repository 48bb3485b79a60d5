"""What the decode operators accept, checked on the host: nothing here looks at the contents of a tensor.

And what every operator checks in the same way.
"""

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HEAD_DIM = 576
HEAD_DIM_V = 512


def checked_mode() -> bool:
    """Whether MLA_KERNELS_CHECK=1 asks for checks that read tensors back."""
    return os.environb.get(b"MLA_KERNELS_CHECK") == b"1"  # (no encoding of the name: 1 us less a call)


def check_softmax_scale(softmax_scale: float | None, head_dim: int = HEAD_DIM) -> float:
    """The scale to use. Raises TypeError or ValueError unless it is finite and positive."""
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, int | float):
        raise TypeError(f"softmax_scale is a {type(softmax_scale).__name__}, must be a number or None")
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale is {softmax_scale}, must be finite and > 0: fold a sign into q")
    return float(softmax_scale)


def check_tensors(tensors: dict[str, "torch.Tensor"]) -> None:
    """Raises TypeError or ValueError unless all are tensors on one device, and "q" is bf16 or fp16."""
    import torch

    q = tensors["q"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, must be a torch.Tensor")
        if tensor.device != q.device:
            raise ValueError(
                f"{name} is on {tensor.device}, q on {q.device}: all must be on one device, use .to(q.device)"
            )
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"q is {q.dtype}, must be torch.bfloat16 or torch.float16: convert it with .to()")


def check_decode_arguments(
    q: "torch.Tensor",
    kv_cache: "torch.Tensor",
    block_table: "torch.Tensor",
    cache_seqlens: "torch.Tensor",
    *,
    head_dim_v: int = HEAD_DIM_V,
    out: "torch.Tensor | None" = None,
    cu_seqlens_q: "torch.Tensor | None" = None,
) -> None:
    """Dtypes, shapes, strides and devices that every decode operator of this package asks for.

    Args:
        q: (b, s_q, h_q, 576) bf16 or fp16, contiguous.
        kv_cache: (num_pages, page_size, 1, 576) or (num_pages, page_size, 576), of q's dtype, last dimension
            contiguous.
        block_table: (b, max_pages) int32, last dimension contiguous.
        cache_seqlens: (b,) int32, contiguous.
        out: None, or (b, s_q, h_q, 512) of q's dtype, contiguous.
        cu_seqlens_q: None, or (b + 1,) int32, contiguous; then q is (total_q, h_q, 576) and out likewise.

    Raises:
        TypeError: something is no tensor or has another dtype.
        ValueError: another shape, stride or device. Each message gives the value, the limit and the remedy.
    """
    import torch

    tensors = {"q": q, "kv_cache": kv_cache, "block_table": block_table, "cache_seqlens": cache_seqlens}
    for name, tensor in {"out": out, "cu_seqlens_q": cu_seqlens_q}.items():
        if tensor is not None:
            tensors[name] = tensor
    check_tensors(tensors)
    for name, dtype in {"kv_cache": q.dtype, "out": q.dtype}.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise TypeError(f"{name} is {tensors[name].dtype}, must be q's {dtype}: convert it with .to()")
    for name in ("block_table", "cache_seqlens", "cu_seqlens_q"):
        if name in tensors and tensors[name].dtype != torch.int32:
            raise TypeError(f"{name} is {tensors[name].dtype}, must be torch.int32: convert it with .int()")

    if head_dim_v != HEAD_DIM_V:
        raise ValueError(f"head_dim_v is {head_dim_v}, must be {HEAD_DIM_V}: no other latent size is built")
    ragged = cu_seqlens_q is not None
    if ragged and (q.dim() != 3 or q.shape[2] != HEAD_DIM or q.shape[1] == 0):
        raise ValueError(
            f"q has shape {tuple(q.shape)}, must be (total_q, h_q, {HEAD_DIM}) with h_q >= 1 beside "
            "cu_seqlens_q: lay the query tokens of all sequences end to end"
        )
    if not ragged and (q.dim() != 4 or q.shape[3] != HEAD_DIM or 0 in q.shape[1:]):
        raise ValueError(
            f"q has shape {tuple(q.shape)}, must be (b, s_q, h_q, {HEAD_DIM}) with s_q, h_q >= 1: "
            "absorb the key projection and append the rope part first"
        )
    b = block_table.shape[0] if ragged and block_table.dim() == 2 else q.shape[0]
    if ragged and tuple(cu_seqlens_q.shape) != (b + 1,):
        raise ValueError(
            f"cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}, must be ({b + 1},): where each of the {b} "
            "sequences of block_table begins, and the end"
        )
    if (
        kv_cache.dim() not in (3, 4)
        or kv_cache.shape[-1] != HEAD_DIM
        or (kv_cache.dim() == 4 and kv_cache.shape[2] != 1)
        or kv_cache.shape[1] == 0
    ):
        raise ValueError(
            f"kv_cache has shape {tuple(kv_cache.shape)}, must be (num_pages, page_size, 1, {HEAD_DIM}) or "
            f"(num_pages, page_size, {HEAD_DIM}): MLA has one latent KV head"
        )
    if block_table.dim() != 2 or block_table.shape[0] != b:
        raise ValueError(
            f"block_table has shape {tuple(block_table.shape)}, must be ({b}, max_pages): a row per sequence"
        )
    if tuple(cache_seqlens.shape) != (b,):
        raise ValueError(
            f"cache_seqlens has shape {tuple(cache_seqlens.shape)}, must be ({b},): a length per sequence"
        )
    if out is not None and tuple(out.shape) != (*q.shape[:-1], HEAD_DIM_V):
        raise ValueError(f"out has shape {tuple(out.shape)}, must be {(*q.shape[:-1], HEAD_DIM_V)}")

    for name in ("q", "cache_seqlens", "out", "cu_seqlens_q"):
        if name in tensors and not tensors[name].is_contiguous():
            raise ValueError(
                f"{name} has strides {tensors[name].stride()}, must be contiguous: call .contiguous()"
            )
    for name in ("kv_cache", "block_table"):
        if tensors[name].stride(-1) != 1 and tensors[name].shape[-1] > 1:
            raise ValueError(
                f"{name} has strides {tensors[name].stride()}, the last must be 1: call .contiguous()"
            )
