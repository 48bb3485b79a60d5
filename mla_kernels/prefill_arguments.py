"""What the prefill operator accepts, checked on the host: nothing here looks at the contents of a tensor."""

from __future__ import annotations

import torch

from .arguments import check_tensors
from .prefill_tuning import HEAD_DIMS


def check_prefill_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> None:
    """Dtypes, shapes, strides and devices, as ``mla_prefill`` names them.

    Raises:
        TypeError: something is no tensor or has another dtype.
        ValueError: another shape, stride or device. Each message gives the value, the limit and the remedy.
    """
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k belong together: pass both or neither")
    ragged = cu_seqlens_q is not None
    if not ragged:
        del tensors["cu_seqlens_q"], tensors["cu_seqlens_k"]
    check_tensors(tensors)
    for name, tensor in tensors.items():
        wanted = torch.int32 if name.startswith("cu") else q.dtype
        if tensor.dtype != wanted:
            raise TypeError(f"{name} is {tensor.dtype}, must be {wanted}: convert it with .to()")
    _check_shapes(q, k, v, ragged)
    if ragged:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            starts = tensors[name]
            if starts.dim() != 1 or len(starts) < 1 or len(starts) != len(cu_seqlens_q):
                raise ValueError(
                    f"{name} has shape {tuple(starts.shape)}, must be (b + 1,), the same for q and k: "
                    "where each sequence begins, and the end"
                )
            if not starts.is_contiguous():
                raise ValueError(
                    f"{name} has strides {starts.stride()}, must be contiguous: use .contiguous()"
                )


def _check_shapes(q, k, v, ragged: bool) -> None:
    shapes = {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}
    names = {"q": "total_q, h_q, d_qk", "k": "total_k, h_kv, d_qk", "v": "total_k, h_kv, d_v"}
    if not ragged:
        names = {"q": "b, s_q, h_q, d_qk", "k": "b, s_k, h_kv, d_qk", "v": "b, s_k, h_kv, d_v"}
    for name, shape in shapes.items():
        if len(shape) != (3 if ragged else 4):
            more = "" if ragged else "; of sequences end to end also pass cu_seqlens_q and cu_seqlens_k"
            raise ValueError(f"{name} has shape {shape}, must be ({names[name]}): reshape it{more}")
    if (q.shape[-1], v.shape[-1]) not in HEAD_DIMS or k.shape[-1] != q.shape[-1]:
        known = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(
            f"head dims are {q.shape[-1]} of q, {k.shape[-1]} of k and {v.shape[-1]} of v, must be "
            f"(d_qk, d_v) in {known} with k's equal to q's: pad with zeros (and pass softmax_scale)"
        )
    if k.shape[:-1] != v.shape[:-1] or (not ragged and q.shape[0] != k.shape[0]):
        raise ValueError(
            f"q, k and v have shapes {', '.join(map(str, shapes.values()))}, must agree as ({names['q']}), "
            f"({names['k']}) and ({names['v']})"
        )
    h_q, h_kv = q.shape[-2], k.shape[-2]
    if h_q == 0 or h_kv == 0 or h_q % h_kv:
        raise ValueError(
            f"h_q is {h_q} and h_kv {h_kv}, must be a multiple of it and not 0: repeat heads of k and v"
        )
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _check_strides(name, tensor)


def _check_strides(name: str, tensor: torch.Tensor) -> None:
    *strides, last = tensor.stride()
    if last != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}, the last must be 1 (contiguous heads): use .contiguous()"
        )
    for size, stride in zip(tensor.shape, strides, strict=False):
        if size > 1 and (stride % 8 or not 0 <= stride < 2**39):
            raise ValueError(
                f"{name} has strides {tensor.stride()}, all but the last must be multiples of 8 elements "
                "(16 bytes, what the copy engine reads) below 2 ** 39: call .contiguous()"
            )


def check_prefill_alignment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ValueError for a tensor that does not begin at a multiple of 16 bytes."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} starts at {tensor.data_ptr():#x}, must be aligned to 16 bytes: call .clone()"
            )


def check_prefill_starts(name: str, starts: torch.Tensor, total: int) -> None:
    """Reads where sequences begin back; ValueError for the first that is out of order. Synchronises."""
    values = starts.tolist()
    least = 0
    for i, start in enumerate(values):
        most = 0 if i == 0 else total
        if not least <= start <= most:
            raise ValueError(
                f"{name}[{i}] is {start}, must be in [{least}, {most}]: begin at 0, ascend, and end at the "
                f"{total} tokens there are"
            )
        least = start
    if values[-1] != total:
        raise ValueError(
            f"{name} ends at {values[-1]}, must end at the {total} tokens there are: cut them off"
        )
