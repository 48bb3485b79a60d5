"""What a prefill call of given shapes needs, found once: the kernel, its grid, the packed arguments.

Nothing here looks at lengths: the kernel finds its work on the device (``cuda/prefill_schedule.cuh``).
"""

from __future__ import annotations

import ctypes
import math
import threading

import torch

from . import launch
from .prefill_tuning import WARPGROUP_ROWS, PrefillTuning, serving

ELEMENT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_SECTION_BYTES = 24 << 20  # of keys and values that CTAs read at one time, about half of an H100's L2
_MAPS_KEPT = 256


class PrefillParams(ctypes.Structure):
    """``PrefillParams`` of cuda/prefill_schedule.cuh, field by field."""

    _fields_ = (
        ("q_map", ctypes.c_uint64 * 16),
        ("k_map", ctypes.c_uint64 * 16),
        ("v_map", ctypes.c_uint64 * 16),
        ("out", ctypes.c_uint64),
        ("lse", ctypes.c_uint64),
        ("cu_seqlens_q", ctypes.c_uint64),
        ("cu_seqlens_k", ctypes.c_uint64),
        ("tickets", ctypes.c_uint64),
        ("softmax_scale_log2", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("b", "s_q", "s_k", "h_q", "h_kv", "causal", "section_keys")),
        ("pad", ctypes.c_char * 56),
    )


class PrefillPlan:
    """A launch of the prefill kernel for tensors of these shapes and strides on one device.

    Args:
        q, k, v: tensors as the calls will bring them, checked; their contents are not read.
        sequences: b of ragged batches, None otherwise.
        scale, causal: as ``mla_prefill`` has them.
        tuning: None for the variant that ships.
    """

    def __init__(
        self, q, k, v, sequences: int | None, scale: float, causal: bool, tuning: PrefillTuning | None = None
    ):
        self.device = q.device.index
        self._ragged = sequences is not None
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        b = sequences if self._ragged else len(q)
        s_q, h_q = q.shape[-3:-1]
        s_k, h_kv = k.shape[-3:-1]
        ctas, parts = launch.sm_count(self.device), b if self._ragged else 1
        mean = (-(-s_q // parts), -(-s_k // parts))
        tuning = tuning or serving((head_dim, head_dim_v), b, *mean, h_q, causal, ctas)
        self._tuning = tuning
        config = tuning.kernel_config(ELEMENT[q.dtype])
        self._kernel = launch.load(config, "mla_prefill", self.device, persistent=True)
        blocks = -(-s_q // tuning.rows) + (b - 1 if self._ragged else 0)  # of ragged ones at most
        most_items = blocks * h_q * (1 if self._ragged else b)
        self._grid = (max(1, min(ctas, most_items)), 1)
        self._maps: dict[tuple[int, int, int], tuple] = {}
        self._mapped = None
        self._lock = threading.Lock()  # the packed arguments are shared
        self._params = PrefillParams(
            softmax_scale_log2=scale * math.log2(math.e),
            b=b,
            s_q=s_q,
            s_k=s_k,
            h_q=h_q,
            h_kv=h_kv,
            causal=bool(causal),
            section_keys=_SECTION_BYTES // (2 * (head_dim + head_dim_v)),
        )
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))

    def run(self, q, k, v, out, lse, cu_seqlens_q=None, cu_seqlens_k=None) -> None:
        """Launches on torch's current stream of the plan's device."""
        with torch.cuda.device(self.device):
            launch.bind(self.device)
            stream = launch.current_stream(self.device)
            params, workspace = self._params, launch.workspace(self.device)
            addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr())
            with self._lock, workspace.lock:
                if addresses != self._mapped:
                    params.q_map, params.k_map, params.v_map = self._maps_of(addresses, q, k, v)
                    self._mapped = addresses
                if cu_seqlens_q is not None:
                    params.cu_seqlens_q = cu_seqlens_q.data_ptr()
                    params.cu_seqlens_k = cu_seqlens_k.data_ptr()
                params.out, params.lse = out.data_ptr(), lse.data_ptr()
                _, params.tickets = workspace.addresses(stream, 0)
                self._kernel.launch(self._grid, stream, self._arguments)

    def _maps_of(self, addresses, q, k, v) -> tuple:
        found = self._maps.get(addresses)
        if found is None:
            if len(self._maps) >= _MAPS_KEPT:
                self._maps.clear()
            keys = self._tuning.keys
            of_keys = (
                (lambda t: ragged_tensor_map(t, keys))
                if self._ragged
                else (lambda t: head_tensor_map(t, keys))
            )
            found = self._maps[addresses] = (head_tensor_map(q, WARPGROUP_ROWS), of_keys(k), of_keys(v))
        return found


def head_tensor_map(tensor: torch.Tensor, rows: int) -> ctypes.Array:
    """Map of a (b, s, h, d) or (total, h, d) tensor as (d, s, h, b): boxes of 64 columns x ``rows``."""
    s, h, d = tensor.shape[-3:]
    b = len(tensor) if tensor.dim() == 4 else 1
    token, head = _stride(tensor, -3), _stride(tensor, -2)
    batch = _stride(tensor, 0) if tensor.dim() == 4 else d
    return launch.tensor_map(tensor.data_ptr(), tensor.dtype, (d, s, h, b), (token, head, batch), rows)


def ragged_tensor_map(tensor: torch.Tensor, rows: int) -> ctypes.Array:
    """Map of a (total, h, d) tensor as (d, rows, total + 1, h), in which token i is at every (y, z) with
    y + z = rows + i: a box at (y, z) ends with token z - 1, its further rows are zero.

    (The address lies before the tensor, but no box in range does: token rows - y - 1 before z is at least 0.)
    """
    total, h, d = tensor.shape
    token, head = _stride(tensor, -3), _stride(tensor, -2)
    address = tensor.data_ptr() - rows * token * tensor.element_size()
    return launch.tensor_map(address, tensor.dtype, (d, rows, total + 1, h), (token, token, head), rows)


def _stride(tensor: torch.Tensor, dim: int) -> int:
    """Of a dimension of one element any will do."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else tensor.shape[-1]
