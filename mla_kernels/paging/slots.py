"""Where new tokens live, and what may be written there."""

from typing import NamedTuple

import numpy as np
import torch

from mla_kernels.append import APPEND, mla_append, takes_rows
from mla_kernels.arguments import HEAD_DIM

CONTIGUOUS = torch.contiguous_format


class Slots(NamedTuple):
    """Token i is line ``offsets[i]`` of page ``pages[i]``; both arrays are (n,) int32, on the host."""

    pages: np.ndarray
    offsets: np.ndarray


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Host numbers on the device, on the current stream. Through pinned memory, so that nobody waits."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda" and len(values):  # pinned memory is given away again only after the copy
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def slot_mapping(slots: Slots, page_size: int, device: torch.device) -> torch.Tensor:
    """(n,) int64 on the device, page * page_size + offset: as ``mla_append`` wants slots.

    The host does not wait for the copy. It is no part of a CUDA graph: a captured ``mla_append`` reads a
    tensor that stays, into which this one is copied before each replay.
    """
    return to_device(slots.pages.astype(np.int64) * page_size + slots.offsets, device)


def write_latents(kv_cache: torch.Tensor, slots: Slots, kv_c: torch.Tensor, k_pe: torch.Tensor) -> None:
    """Puts the latents of n tokens into their slots, on the current stream.

    On CUDA by ``mla_append``, if the pool is one that it takes, else by torch's indexed copy. The host does
    not wait for either. Slots are read now: this is not for a graph capture.

    Args:
        kv_cache: (num_pages, page_size, 1, latent + rope), the pool.
        slots: of n tokens, none twice.
        kv_c: (n, latent) of the pool's dtype and device: the latents after RMSNorm.
        k_pe: (n, rope), likewise: the rotary part, rotated.

    Raises:
        TypeError, ValueError: another shape, dtype or device, or a slot outside the pool; nothing is written.
    """
    num_pages, page_size, _, head_dim = kv_cache.shape
    n = len(slots.pages)
    if kv_c.dim() != 2 or k_pe.dim() != 2 or len(kv_c) != n or len(k_pe) != n:
        raise ValueError(
            f"kv_c {tuple(kv_c.shape)} and k_pe {tuple(k_pe.shape)} must have {n} rows: one for each slot"
        )
    if kv_c.shape[1] + k_pe.shape[1] != head_dim:
        raise ValueError(
            f"kv_c and k_pe have {kv_c.shape[1]} and {k_pe.shape[1]} columns, must have {head_dim} together: "
            "pass the latent and the rotary part"
        )
    for name, tensor in (("kv_c", kv_c), ("k_pe", k_pe)):
        if tensor.dtype != kv_cache.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, must be the pool's {kv_cache.dtype}: use .to()")
        if tensor.device != kv_cache.device:
            raise ValueError(f"{name} is on {tensor.device}, the pool on {kv_cache.device}: use .to()")
    index = np.stack(slots).astype(np.int64)
    if ((index < 0) | (index >= np.array([[num_pages], [page_size]]))).any():
        raise ValueError(
            f"a slot is outside the pool of {num_pages} pages of {page_size} tokens: "
            "take slots from append() or slots()"
        )
    if (
        kv_cache.is_cuda
        and kv_cache.dtype in APPEND
        and (kv_c.shape[1], head_dim) == (512, HEAD_DIM)
        and not page_size & (page_size - 1)
    ):
        mapping = slot_mapping(slots, page_size, kv_cache.device)
        parts = (part if takes_rows(part) else part.clone(memory_format=CONTIGUOUS) for part in (kv_c, k_pe))
        mla_append(kv_cache, mapping, *parts)
        return
    page, offset = to_device(index, kv_cache.device)
    kv_cache[page, offset, 0, : kv_c.shape[1]] = kv_c
    kv_cache[page, offset, 0, kv_c.shape[1] :] = k_pe
