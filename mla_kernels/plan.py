"""What a decode call of given shapes needs, found once: the kernel, its grid, the packed arguments.

Nothing here looks at lengths or page ids: the kernels find their work on the device (``cuda/schedule.cuh``).
"""

import ctypes
import math

import torch

from mla_kernels import launch
from mla_kernels.arguments import HEAD_DIM_V
from mla_kernels.choice import H200_SMS, Grid, active_table
from mla_kernels.compiler import KernelConfig
from mla_kernels.tuning import PAIR_ROWS, TILE_TOKENS, DecodeTuning, Pages, pages_of

# Tensor cores truncate: a score summed in chains of 8 or 9 steps (bf16) comes out 8.5e-8 of itself too
# small on average, in chains of 4 or 5 (fp16) 4.2e-8 (LSE of 45, H200). A little more than that makes the
# worst row best (cuda/softmax.cuh, tests/test_truncation.py).
_TRUNCATION = {torch.bfloat16: 1.1e-7, torch.float16: 7e-8}
_ELEMENT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_MOST_TOKENS = 2**31 - 128  # of a sequence: positions are 32-bit, and are rounded up to tiles
_MAPS_KEPT = 256  # of one plan: a cache a layer


def kernel_config(
    dtype: torch.dtype,
    query_rows: int,
    b: int,
    pages: int,
    ctas: int = H200_SMS,
    variant: DecodeTuning | str | None = None,
    page_size: int = 64,
    ragged: bool = False,
) -> KernelConfig:
    """The cubin that serves ``b`` sequences of at most ``pages`` pages, ``query_rows`` = s_q * h_q rows each.

    ``pages``: of 64 tokens, or as many tokens in pages of ``page_size``.

    ``variant``: None for what the tuning table says, a tuning, or a building block of the table's kernel:
    "stream", "mma" or "skeleton".
    """
    come = pages_of(page_size, ragged)
    tuning, work = _chosen(query_rows, b, pages, ctas, variant, come)
    return tuning.kernel_config(_ELEMENT[dtype], work, come)


def _chosen(query_rows: int, b: int, pages: int, ctas: int, variant, come: Pages) -> tuple[DecodeTuning, str]:
    """The tuning, and what of its work is done."""
    if isinstance(variant, DecodeTuning):
        return variant, "decode"
    return active_table().serving(query_rows, b, pages, ctas, come), variant or "decode"


def _partial_slot_bytes(rows: int, dtype: torch.dtype) -> int:
    """A PartialSlot of cuda/parts.cuh: O, of its rows three sums, of its value warps a scale."""
    o, warps = HEAD_DIM_V * (2 if dtype == torch.bfloat16 else 4), 16 if rows == PAIR_ROWS else 8
    return -(-(rows * (o + 3 * 4) + warps * 4) // 128) * 128


def result_shapes(q: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of out and lse, for queries (b, s_q, h_q, 576) or, of their own number, (total_q, h_q, 576)."""
    *tokens, h_q, _ = q.shape
    return (*tokens, h_q, HEAD_DIM_V), (*tokens[:-1], h_q, tokens[-1])


class DecodePlan:
    """A launch of the decode kernel for tensors of these shapes on one device.

    Args:
        q, kv_cache, block_table: tensors as the calls will bring them, checked; their contents are not read.
        scale, causal: as ``mla_decode`` has them.
        variant: as ``kernel_config`` has it.
        ragged: q is (total_q, h_q, 576), and a call brings cu_seqlens_q.
    """

    def __init__(
        self, q, kv_cache, block_table, scale: float, causal: bool, variant=None, ragged: bool = False
    ):
        b, (max_pages, page_size) = len(block_table), (block_table.shape[1], kv_cache.shape[1])
        h_q = q.shape[-2]
        total_q = q.numel() // (h_q * q.shape[-1])
        s_q = -(-total_q // b)  # of ragged queries the mean: what the choice and the grid are made for
        self.device = q.device.index
        self.result_shapes = result_shapes(q)
        ctas = launch.sm_count(self.device)
        pages = pages_of(page_size, ragged)
        tuning, work = _chosen(s_q * h_q, b, -(-max_pages * page_size // TILE_TOKENS), ctas, variant, pages)
        tuning, config = tuning.for_pages(pages), tuning.kernel_config(_ELEMENT[q.dtype], work, pages)
        self._pages, rows = pages, tuning.rows
        cluster = tuning.cluster_ctas
        grid = Grid.of(rows, s_q * h_q, b, min(ctas // cluster, tuning.most_parts))
        self._kernel = launch.load(config, "mla_decode", self.device, persistent=True)
        self._grid = (grid.group * cluster, grid.groups)
        self._rows = rows
        self._room = 2 * grid.group * grid.groups * _partial_slot_bytes(rows, q.dtype)
        self._maps: tuple[dict, dict] = {}, {}  # of kv_cache and q, by address
        self._mapped = [0, 0]  # whose maps the arguments hold
        self._params = launch.DecodeParams(
            softmax_scale_log2=scale * math.log2(math.e) * (1 + _TRUNCATION[q.dtype]),
            b=b,
            s_q=s_q,
            h_q=h_q,
            num_pages=kv_cache.shape[0],
            max_pages=max_pages,
            table_stride=block_table.stride(0),
            row_blocks=grid.row_blocks,
            row_groups=grid.row_groups,
            causal=bool(causal),
            items_each=grid.items_each,
            item_parts=grid.item_parts,
            page_shift=page_size.bit_length() - 1,
            max_tokens=min(max_pages * page_size, _MOST_TOKENS),
            total_q=total_q,
        )
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))

    def run(self, q, kv_cache, block_table, cache_seqlens, out, lse, cu_seqlens_q=None) -> None:
        """Launches on torch's current stream of the plan's device."""
        if torch._C._cuda_getDevice() == self.device:
            self._launch(q, kv_cache, block_table, cache_seqlens, out, lse, cu_seqlens_q)
        else:
            with torch.cuda.device(self.device):
                self._launch(q, kv_cache, block_table, cache_seqlens, out, lse, cu_seqlens_q)

    def _launch(self, q, kv_cache, block_table, cache_seqlens, out, lse, cu_seqlens_q) -> None:
        launch.bind(self.device)
        stream = launch.current_stream(self.device)
        params, workspace = self._params, launch.workspace(self.device)
        kv_address, q_address = kv_cache.data_ptr(), q.data_ptr()
        with workspace.lock:  # the packed arguments are shared, too
            if self._pages == "tokens":
                params.kv_map = launch.token_pool(kv_cache, q)
            elif kv_address != self._mapped[0]:
                params.kv_map, params.rotary_map = self._map(0, kv_address, lambda: self._kv_maps(kv_cache))
            if q_address != self._mapped[1]:
                params.q_map, rotary = self._map(1, q_address, lambda: self._query_maps(q))
                if rotary is not None:  # a pair's
                    params.q_rotary_map = rotary
            if cu_seqlens_q is not None:
                params.cu_seqlens_q = cu_seqlens_q.data_ptr()
            params.out = out.data_ptr()
            params.lse = lse.data_ptr()
            params.block_table = block_table.data_ptr()
            params.cache_seqlens = cache_seqlens.data_ptr()
            params.partials, params.arrivals = workspace.addresses(stream, self._room)
            self._kernel.launch(self._grid, stream, self._arguments)

    def _kv_maps(self, kv_cache) -> tuple[ctypes.Array, ctypes.Array]:
        whole = launch.kv_tensor_map(kv_cache)
        if self._rows == PAIR_ROWS:
            return whole, launch.kv_tensor_map(kv_cache, columns=32)
        return launch.kv_pieces_map(kv_cache) if self._pages == "pieces" else whole, whole

    def _query_maps(self, q) -> tuple[ctypes.Array, ctypes.Array | None]:
        tiles = self._pages.startswith("tiles")
        encode = launch.query_tensor_map if tiles else launch.flat_query_tensor_map
        whole = encode(q, min(self._rows, TILE_TOKENS))
        return whole, encode(q, TILE_TOKENS, columns=32) if self._rows == PAIR_ROWS else None

    def _map(self, which: int, address: int, encode):
        maps = self._maps[which]
        found = maps.get(address)
        if found is None:
            if len(maps) >= _MAPS_KEPT:
                maps.clear()
            found = maps[address] = encode()
        self._mapped[which] = address
        return found
