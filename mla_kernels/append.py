"""The append operator: new latents into the paged pool, normed and rotated on the way if asked for."""

from __future__ import annotations

import ctypes

import torch

from mla_kernels import launch
from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V, checked_mode
from mla_kernels.compiler import KernelConfig
from mla_kernels.device import HOPPER, capability

ROPE_DIM = HEAD_DIM - HEAD_DIM_V
WARPS = 8  # a CTA, a token each
APPEND = {
    torch.bfloat16: KernelConfig("append.cu", (("MLA_BF16", 1),), "append-bf16", 0, 32 * WARPS),
    torch.float16: KernelConfig("append.cu", (("MLA_BF16", 0),), "append-fp16", 0, 32 * WARPS),
}


class AppendParams(ctypes.Structure):
    """``AppendParams`` of cuda/append.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("pool", "kv_c", "k_pe", "norm_weight", "cos", "sin")),
        *((name, ctypes.c_uint64) for name in ("slots", "positions")),
        *((name, ctypes.c_int64) for name in ("page_stride", "token_stride", "kv_c_stride", "k_pe_stride")),
        ("num_slots", ctypes.c_int64),
        ("max_positions", ctypes.c_int64),
        ("n", ctypes.c_int),
        ("page_shift", ctypes.c_int),
        ("interleaved", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


def mla_append(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = True,
) -> None:
    """Writes the latents of n tokens into their slots of the pool, in place, on torch's current stream.

    One launch and no host synchronisation: a CUDA graph that captured it may be replayed after the tensors
    changed in place.

    Args:
        kv_cache: (num_pages, page_size, [1,] 576) bf16 or fp16, the pool; page_size a power of two.
        slot_mapping: (n,) int64: page * page_size + line of each token, none twice. A negative slot, or one
            past the pool, is not written.
        kv_c: (n, 512) of the pool's dtype, last dimension contiguous: the latents.
        k_pe: (n, 64), likewise: the rotary part.
        norm_weight: (512,) of the pool's dtype: kv_c becomes kv_c / rms(kv_c) * norm_weight, in fp32
            (DeepSeek-V2, kv_a_layernorm). None: it has been normed.
        norm_eps: added to the mean square.
        cos, sin: (max_positions, 32) fp32: k_pe is rotated by the angles of ``positions``. None: it has been.
        positions: (n,) int64; a token at a position outside [0, max_positions) gets a NaN rotary part.
        interleaved: pairs are columns 2 i and 2 i + 1, as in DeepSeek-V3's own inference code; False: i and
            i + 32, as in Llama's.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, stride or device; with
            MLA_KERNELS_CHECK=1 also a slot past the pool (this synchronises).
    """
    _check(kv_cache, slot_mapping, kv_c, k_pe, norm_weight, cos, sin, positions)
    if torch.compiler.is_compiling():
        torch.ops.mla_kernels.append(
            kv_cache, slot_mapping, kv_c, k_pe, norm_weight, norm_eps, cos, sin, positions, interleaved
        )
        return
    _check_rows(kv_cache, kv_c, k_pe)
    num_slots = kv_cache.shape[0] * kv_cache.shape[1]
    if checked_mode() and len(slot_mapping) and slot_mapping.max() >= num_slots:
        raise ValueError(
            f"slot_mapping has {int(slot_mapping.max())}, must be below {num_slots} (num_pages * page_size): "
            "take slots from PagedKVCache.append()"
        )
    if len(slot_mapping) == 0:
        return
    if not kv_cache.is_cuda or capability(kv_cache.device.index) != HOPPER:
        _append_portable(
            kv_cache, slot_mapping, kv_c, k_pe, norm_weight, norm_eps, cos, sin, positions, interleaved
        )
        return
    tensors = {"kv_c": kv_c, "k_pe": k_pe, "norm_weight": norm_weight, "cos": cos, "sin": sin}
    tensors |= {"slots": slot_mapping, "positions": positions, "pool": kv_cache}
    params = AppendParams(
        **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        page_stride=kv_cache.stride(0),
        token_stride=kv_cache.stride(1),
        kv_c_stride=kv_c.stride(0),
        k_pe_stride=k_pe.stride(0),
        num_slots=num_slots,
        max_positions=0 if cos is None else len(cos),
        n=len(slot_mapping),
        page_shift=kv_cache.shape[1].bit_length() - 1,
        interleaved=interleaved,
        eps=norm_eps,
    )
    device = kv_cache.device.index
    with torch.cuda.device(device):
        launch.bind(device)
        kernel = launch.load(APPEND[kv_cache.dtype], "mla_append", device, persistent=False)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        kernel.launch((-(-params.n // WARPS), 1), launch.current_stream(device), arguments)


def _check(kv_cache, slot_mapping, kv_c, k_pe, norm_weight, cos, sin, positions) -> None:
    shape = tuple(kv_cache.shape)
    if kv_cache.dtype not in APPEND:
        raise TypeError(f"kv_cache is {kv_cache.dtype}, must be torch.bfloat16 or torch.float16")
    if len(shape) not in (3, 4) or shape[-1] != HEAD_DIM or (len(shape) == 4 and shape[2] != 1):
        raise ValueError(f"kv_cache has shape {shape}, must be (num_pages, page_size, [1,] {HEAD_DIM})")
    if shape[1] & (shape[1] - 1) or shape[1] == 0:
        raise ValueError(f"kv_cache has pages of {shape[1]} tokens, must be a power of two: repack the cache")
    n = len(slot_mapping)
    wanted = {
        "slot_mapping": (slot_mapping, (n,), torch.int64),
        "kv_c": (kv_c, (n, HEAD_DIM_V), kv_cache.dtype),
        "k_pe": (k_pe, (n, ROPE_DIM), kv_cache.dtype),
    }
    if norm_weight is not None:
        wanted["norm_weight"] = (norm_weight, (HEAD_DIM_V,), kv_cache.dtype)
    if len({tensor is None for tensor in (cos, sin, positions)}) > 1:
        raise ValueError("cos, sin and positions belong together: pass all of them or none")
    if cos is not None:
        wanted["cos"] = (cos, (len(cos), ROPE_DIM // 2), torch.float32)
        wanted["sin"] = (sin, (len(cos), ROPE_DIM // 2), torch.float32)
        wanted["positions"] = (positions, (n,), torch.int64)
    for name, (tensor, expected, dtype) in wanted.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, must be {dtype}: convert it with .to()")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {expected}")
        if tensor.device != kv_cache.device:
            raise ValueError(f"{name} is on {tensor.device}, the pool on {kv_cache.device}: use .to()")
        if name not in ("kv_c", "k_pe") and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous: call .contiguous()")


def takes_rows(tensor: torch.Tensor) -> bool:
    """Whether the rows of a tensor are contiguous and begin at multiples of 16 bytes, as the kernel reads."""
    steps = tensor.stride()[: 1 if tensor.dim() == 2 else 2]
    return tensor.stride(-1) == 1 and not any(step % 8 for step in steps) and tensor.data_ptr() % 16 == 0


def _check_rows(kv_cache, kv_c, k_pe) -> None:
    for name, tensor in (("kv_cache", kv_cache), ("kv_c", kv_c), ("k_pe", k_pe)):
        if not takes_rows(tensor):
            raise ValueError(
                f"{name} has strides {tensor.stride()} and starts at {tensor.data_ptr():#x}: rows must be "
                "contiguous and begin at multiples of 16 bytes, call .contiguous()"
            )


@torch.library.custom_op("mla_kernels::append", mutates_args=("kv_cache",))
def _append_op(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> None:
    options = {"norm_weight": norm_weight, "norm_eps": norm_eps, "cos": cos, "sin": sin}
    options |= {"positions": positions, "interleaved": interleaved}
    mla_append(kv_cache, slot_mapping, kv_c, k_pe, **options)


@_append_op.register_fake
def _append_fake(*arguments) -> None:
    """Returns nothing, and changes no shape."""


def _append_portable(
    kv_cache, slot_mapping, kv_c, k_pe, norm_weight, norm_eps, cos, sin, positions, interleaved
) -> None:
    """The same by torch's operators, which synchronise."""
    pool = kv_cache.view(*kv_cache.shape[:2], HEAD_DIM)
    inside = (slot_mapping >= 0) & (slot_mapping < pool.shape[0] * pool.shape[1])
    slots, latent, rotary = slot_mapping[inside], kv_c[inside].float(), k_pe[inside].float()
    if norm_weight is not None:
        latent = latent * (latent.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * norm_weight.float()
    if cos is not None:
        own = positions[inside]
        known = (own >= 0) & (own < len(cos))
        c = cos[own.where(known, 0)].where(known[:, None], float("nan"))
        s = sin[own.where(known, 0)]
        a, b = (rotary[:, 0::2], rotary[:, 1::2]) if interleaved else rotary.chunk(2, dim=1)
        pair = a * c - b * s, b * c + a * s
        rotary = torch.stack(pair, dim=-1).flatten(1) if interleaved else torch.cat(pair, dim=1)
    page, line = slots // pool.shape[1], slots % pool.shape[1]
    pool[page, line] = torch.cat([latent, rotary], dim=1).to(pool.dtype)
