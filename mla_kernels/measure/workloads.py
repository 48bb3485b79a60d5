"""Workloads: which sequences a decode call attends to, and the tensors of one.

Lengths depend on the seed alone. The tensors depend on the seed and the kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mla_kernels.arguments import HEAD_DIM

from .figures import kv_bytes
from .records import Workload

if TYPE_CHECKING:
    import torch

ROTATION_OVER_L2 = 4  # KV sets total more than this many times the L2 before one is read again
SPARE_PAGES = 7  # pages that belong to no sequence: all NaN
TABLE_PADDING = 4  # table width is a multiple of this, and every row ends in entries that nothing may read


def uniform(b: int, length: int, **axes) -> Workload:
    """``b`` sequences of one length. ``axes``: h_q, and s_q (1), dtype, causal, page_size as wanted."""
    return _workload([length] * b, "uniform", length, **axes)


def normal(b: int, mean: float, sd: float, seed: int = 0, **axes) -> Workload:
    """Lengths drawn from N(mean, sd), no shorter than s_q."""
    drawn = np.random.default_rng(seed).normal(mean, sd, b)
    return _workload(_to_lengths(drawn, axes), "normal", mean, sd, **axes)


def lognormal(b: int, mean: float, sd: float, seed: int = 0, **axes) -> Workload:
    """Lengths drawn from the log-normal distribution of this mean and standard deviation, at least s_q."""
    variance = math.log1p((sd / mean) ** 2)
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - variance / 2, math.sqrt(variance), b)
    return _workload(_to_lengths(drawn, axes), "lognormal", mean, sd, **axes)


def explicit(lengths: Sequence[int], **axes) -> Workload:
    """The lengths given; zero is allowed."""
    return _workload(list(lengths), "explicit", float(np.mean(lengths)), float(np.std(lengths)), **axes)


def spread_evenly(workload: Workload) -> Workload:
    """The same number of tokens in sequences of equal length (to one token)."""
    share, rest = divmod(sum(workload.lengths), workload.b)
    lengths = tuple(share + (i < rest) for i in range(workload.b))
    return workload.model_copy(
        update={
            "lengths_kind": "uniform",
            "mean_len": share + rest / workload.b,
            "sd_len": 0.0,
            "lengths": lengths,
        }
    )


def _to_lengths(drawn: np.ndarray, axes: dict) -> list[int]:
    return [max(int(length), axes.get("s_q", 1)) for length in np.rint(drawn)]


def _workload(lengths: list[int], kind: str, mean: float, sd: float = 0.0, *, h_q: int, **axes) -> Workload:
    fields = {"b": len(lengths), "h_q": h_q, "s_q": 1} | axes
    return Workload(**fields, lengths_kind=kind, mean_len=mean, sd_len=sd, lengths=lengths)


def sets_to_defeat_l2(workload: Workload, l2_bytes: int) -> int:
    """KV sets to rotate through so that together they are more than four times the L2."""
    return int(ROTATION_OVER_L2 * l2_bytes // max(1, kv_bytes(workload))) + 1


@dataclass(frozen=True)
class Inputs:
    """Tensors of a workload: one pool of pages, and a block table for each KV set in it.

    q (b, s_q, h_q, 576) · kv_cache (num_pages, page_size, 1, 576) · block_tables (sets, b, max_pages) int32 ·
    cache_seqlens (b,) int32.
    """

    workload: Workload
    q: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    cache_seqlens: torch.Tensor


def table_width(workload: Workload) -> int:
    """Pages that a row of the page table has room for: those of the longest sequence, and a few."""
    longest = -(-max(workload.lengths) // workload.page_size)
    return (longest // TABLE_PADDING + 1) * TABLE_PADDING


def materialize(
    workload: Workload,
    *,
    logit_std: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cuda",
    sets: int = 1,
    poison: bool = True,
) -> Inputs:
    """Random inputs of which a kernel that reads what it should not gets NaN or a wild page id.

    Pages of all sets are in random order in one pool. Slots past a sequence's end and pages of no sequence
    are NaN, table entries past a sequence's last page are out of range. With softmax_scale = 576 ** -0.5
    the logits have standard deviation ``logit_std``. ``poison`` False: numbers in place of NaN, page 0 in
    place of wild page ids.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[workload.dtype]
    page_size, lengths = workload.page_size, np.array(workload.lengths, dtype=np.int64)
    pages = -(-lengths // page_size)
    width = table_width(workload)
    num_pages = sets * int(pages.sum()) + SPARE_PAGES

    rng = np.random.default_rng(seed)
    wild = np.array([-1, num_pages, num_pages + 12345, 2**31 - 1, -(2**31)] if poison else [0])
    tables = rng.choice(wild, (sets, workload.b, width))
    in_use = np.broadcast_to(np.arange(width) < pages[:, None], tables.shape)
    tables[in_use] = rng.permutation(num_pages)[: in_use.sum()]

    filled = np.zeros(num_pages, dtype=np.int64)  # valid slots of each page
    slots = np.clip(lengths[:, None] - np.arange(width) * page_size, 0, page_size)
    filled[tables[in_use]] = np.broadcast_to(slots, tables.shape)[in_use]

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    generator = torch.Generator(device).manual_seed(seed)
    kv_cache = torch.empty(num_pages, page_size, 1, HEAD_DIM, dtype=dtype, device=device)
    kv_cache.normal_(generator=generator)
    if poison:
        unused = torch.arange(page_size, device=device) >= to_device(filled)[:, None]
        kv_cache[unused] = float("nan")
    q = torch.empty(workload.b, workload.s_q, workload.h_q, HEAD_DIM, dtype=dtype, device=device)
    q.normal_(0.0, logit_std, generator=generator)
    return Inputs(workload, q, kv_cache, to_device(tables), to_device(lengths))
