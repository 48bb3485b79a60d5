"""Where new tokens live, and what may be written there."""

from typing import NamedTuple

import numpy as np
import torch

from mla_kernels.append import APPEND, mla_append
from mla_kernels.arguments import HEAD_DIM


class Slots(NamedTuple):
    """Token i is line ``offsets[i]`` of page ``pages[i]``; both arrays are (n,) int32, on the host."""

    pages: np.ndarray
    offsets: np.ndarray


def write_latents(kv_cache: torch.Tensor, slots: Slots, kv_c: torch.Tensor, k_pe: torch.Tensor) -> None:
    """Puts the latents of n tokens into their slots, on the current stream: by ``mla_append`` where it can.

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
        slot_mapping = torch.from_numpy(index[0] * page_size + index[1]).to(kv_cache.device)
        mla_append(kv_cache, slot_mapping, kv_c.contiguous(), k_pe.contiguous())
        return
    page, offset = torch.from_numpy(index).to(kv_cache.device)
    kv_cache[page, offset, 0, : kv_c.shape[1]] = kv_c
    kv_cache[page, offset, 0, kv_c.shape[1] :] = k_pe
