"""FlashMLA's two decode functions on this package's kernels: a caller of FlashMLA changes one import.

    from mla_kernels.flash_mla import flash_mla_with_kvcache, get_mla_metadata

The signatures are those of FlashMLA 9241ae3 (April 2026); its earlier calling convention, in which the
metadata are two tensors, works too. Nothing is planned here: the kernels find their work from
``cache_seqlens`` on the device. So the metadata carry nothing, one set serves every shape, and lengths may
change between calls and between replays of a CUDA graph (FlashMLA asks for new metadata then).

One result differs: for a row that sees no token softmax_lse is -inf, which merges; FlashMLA gives +inf.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class FlashMLASchedMeta:
    """Stands where FlashMLA keeps its schedule. It is empty: there is no plan step."""


def get_mla_metadata(
    cache_seqlens: "torch.Tensor | None" = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> "tuple[FlashMLASchedMeta, None] | tuple[torch.Tensor, torch.Tensor]":
    """Metadata for ``flash_mla_with_kvcache``, which takes None as well.

    Args:
        cache_seqlens: (b,) int32. Absent in FlashMLA's current convention.
        num_q_tokens_per_head_k: s_q * h_q // num_heads_k.
        num_heads_k: 1.
        num_heads_q: h_q.
        is_fp8_kvcache: False.
        topk: None.

    Returns:
        Without ``cache_seqlens``: (FlashMLASchedMeta(), None), FlashMLA's current convention. With it, the
        earlier one: tile_scheduler_metadata (1, 8) and num_splits (b + 1,), int32 zeros on its device, for
        callers that copy them into the buffers of a CUDA graph.

    Raises:
        ValueError: num_heads_k is not 1.
        NotImplementedError: an fp8 cache or sparse attention is asked for.
    """
    if num_heads_k != 1:
        raise ValueError(f"num_heads_k is {num_heads_k}, must be 1: MLA has one latent KV head")
    _reject_unsupported(is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    return cache_seqlens.new_zeros(1, 8), cache_seqlens.new_zeros(len(cache_seqlens) + 1)


def flash_mla_with_kvcache(
    q: "torch.Tensor",
    k_cache: "torch.Tensor",
    block_table: "torch.Tensor | None",
    cache_seqlens: "torch.Tensor | None",
    head_dim_v: int,
    tile_scheduler_metadata: "FlashMLASchedMeta | torch.Tensor | None",
    num_splits: "torch.Tensor | None" = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: "torch.Tensor | None" = None,
    attn_sink: "torch.Tensor | None" = None,
    extra_k_cache: "torch.Tensor | None" = None,
    extra_indices_in_kvcache: "torch.Tensor | None" = None,
    topk_length: "torch.Tensor | None" = None,
    extra_topk_length: "torch.Tensor | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Dense MLA decode over a paged cache: ``mla_decode`` under FlashMLA's name and argument order.

    Args:
        q: (b, s_q, h_q, 576) bf16 or fp16, contiguous.
        k_cache: (num_pages, page_size, 1, 576) of q's dtype.
        block_table: (b, max_pages) int32.
        cache_seqlens: (b,) int32.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: what ``get_mla_metadata`` returned; their contents are not read.
        softmax_scale: factor on the logits, 576 ** -0.5 when None.
        causal: bottom-right aligned causal mask.
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length,
        extra_topk_length: FlashMLA's fp8 and sparse attention, not supported here: False and None.

    Returns:
        out (b, s_q, h_q, 512) of q's dtype and softmax_lse (b, h_q, s_q) fp32, natural logarithm, -inf for a
        row that sees no token.

    Raises:
        NotImplementedError: fp8 or sparse attention is asked for.
        TypeError, ValueError: the metadata are not ``get_mla_metadata``'s, the page table or the lengths are
            missing, there are several KV heads, or ``mla_decode`` rejects an argument.
        DeviceUnavailable: the tensors are on a CPU.
    """
    _reject_unsupported(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    import torch

    from mla_kernels.decode import mla_decode

    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta | torch.Tensor | None):
        raise TypeError(
            f"tile_scheduler_metadata is a {type(tile_scheduler_metadata).__name__}, must be the first of "
            "the two that get_mla_metadata() returns"
        )
    if not isinstance(num_splits, torch.Tensor | None):
        raise TypeError(
            f"num_splits is a {type(num_splits).__name__}, must be the second of the two that "
            "get_mla_metadata() returns: pass softmax_scale and causal by name"
        )
    for name, tensor in {"block_table": block_table, "cache_seqlens": cache_seqlens}.items():
        if tensor is None:
            raise ValueError(f"{name} is None, dense attention needs it: sparse attention is not supported")
    if k_cache.dim() == 4 and k_cache.shape[2] != 1:
        raise ValueError(f"k_cache has {k_cache.shape[2]} KV heads, must have 1: MLA has one latent KV head")
    return mla_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
    )


def _reject_unsupported(**features: object) -> None:
    for name, value in features.items():
        if value is None or value is False:
            continue
        given = value if isinstance(value, bool | int) else f"a {type(value).__name__}"
        raise NotImplementedError(
            f"{name} is {given}, must be {'False' if name == 'is_fp8_kvcache' else 'None'}: only dense "
            "attention over a bf16 or fp16 cache is built here, use FlashMLA itself for fp8 and sparse ones"
        )
