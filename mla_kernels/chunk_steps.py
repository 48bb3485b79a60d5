"""What a chunk of a paged prefill takes: keys and values out of latents, attention, the merge of its result.

Twice with the same methods: on a Hopper GPU, and by torch's operators anywhere.
"""

from __future__ import annotations

import ctypes

import torch

from mla_kernels import launch
from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V
from mla_kernels.chunks import Call, Chunk
from mla_kernels.compiler import KernelConfig
from mla_kernels.prefill import mla_prefill

NOPE, ROPE, VALUE = 128, 64, 128  # columns of a head: keys without position and with it, values

WARPS = 8  # a CTA: tokens of the gathering kernel, rows of the merging one
GATHER = KernelConfig(
    "gather_latents.cu", (("MLA_BF16", 1),), "gather_latents", 0, 32 * WARPS
)  # of either type
MERGE = {
    torch.bfloat16: KernelConfig("merge_part.cu", (("MLA_BF16", 1),), "merge_part-bf16", 0, 32 * WARPS),
    torch.float16: KernelConfig("merge_part.cu", (("MLA_BF16", 0),), "merge_part-fp16", 0, 32 * WARPS),
}


class GatherParams(ctypes.Structure):
    """``GatherParams`` of cuda/gather_latents.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("pool", "lines", "rotary", "table", "parts")),
        *((name, ctypes.c_int64) for name in ("page_stride", "token_stride", "table_stride")),
        *((name, ctypes.c_int64) for name in ("key_stride", "head_stride")),
        *((name, ctypes.c_int) for name in ("num_parts", "tokens", "num_pages", "page_size", "heads")),
    )


class MergeParams(ctypes.Structure):
    """``MergeParams`` of cuda/merge_part.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("part", "part_lse", "first", "sum", "lse", "out")),
        ("lse_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int),
        ("heads", ctypes.c_int),
    )


class NativeSteps:
    """The steps on a Hopper GPU. In memory: a chunk's lines, keys and values, and two partial results."""

    def __init__(self, q, pool, block_table, w_uk, w_uv, scale, chunks: list[Chunk]):
        self._q, self._pool, self._table, self._scale = q, pool, block_table, scale
        total, heads, _ = q.shape
        self._w_uk, self._w_uv = w_uk.transpose(1, 2), w_uv.view(heads * VALUE, HEAD_DIM_V).T
        tokens = max((chunk.tokens for chunk in chunks), default=0)
        self._lines = q.new_empty(tokens, HEAD_DIM)
        self._k, self._v = q.new_empty(tokens, heads, NOPE + ROPE), q.new_empty(tokens, heads, VALUE)
        self.out = q.new_empty(total, heads, VALUE)
        self.lse = torch.full((heads, total), float("-inf"), dtype=torch.float32, device=q.device)
        summed = any(not (call.causal or call.fresh) for chunk in chunks for call in chunk.calls)
        self._sum = q.new_empty(total, heads, VALUE, dtype=torch.float32) if summed else None
        # Where the keys of a sequence begin with those of a chunk, and go on in the next: its first query
        # there, and the partial result, which is the running one until that next chunk has been merged.
        self._first: tuple[int, torch.Tensor] | None = None
        self._before: tuple[int, torch.Tensor] | None = None
        self._numbers = self._send(chunks)

    def _send(self, chunks: list[Chunk]) -> dict[int, torch.Tensor]:
        """Parts of each chunk and starts of each call, on the device, by the object's id; by one copy."""
        rows = {}
        for chunk in chunks:
            parts = zip(chunk.parts, chunk.starts, strict=True)
            rows[id(chunk)] = [n for part, line in parts for n in (part.sequence, part.begin, line)]
            for call in chunk.calls:
                rows[id(call)] = [*call.q_starts, *call.k_starts]
        flat = torch.tensor([n for row in rows.values() for n in row], dtype=torch.int32)
        flat = (flat.pin_memory() if len(flat) else flat).to(self._q.device, non_blocking=True)
        return dict(zip(rows, flat.split([len(row) for row in rows.values()]), strict=True))

    def decompress(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """k (tokens, h, 192) and v (tokens, h, 128)."""
        self._before, self._first = self._first, None
        tokens, heads = chunk.tokens, self._q.shape[1]
        lines, k, v = self._lines[:tokens], self._k[:tokens], self._v[:tokens]
        params = GatherParams(
            pool=self._pool.data_ptr(),
            lines=lines.data_ptr(),
            rotary=k[..., NOPE:].data_ptr(),
            table=self._table.data_ptr(),
            parts=self._numbers[id(chunk)].data_ptr(),
            page_stride=self._pool.stride(0) // 8,  # vectors of 16 bytes
            token_stride=self._pool.stride(1) // 8,
            table_stride=self._table.stride(0),
            key_stride=k.stride(0) // 8,
            head_stride=k.stride(1) // 8,
            num_parts=len(chunk.parts),
            tokens=tokens,
            num_pages=self._pool.shape[0],
            page_size=self._pool.shape[1],
            heads=heads,
        )
        self._launch(GATHER, "gather_latents", params, (-(-tokens // WARPS), 1))
        latents = lines[:, :HEAD_DIM_V]
        torch.bmm(latents.expand(heads, -1, -1), self._w_uk, out=k[..., :NOPE].transpose(0, 1))
        torch.mm(latents, self._w_uv, out=v.view(tokens, heads * VALUE))
        return k, v

    def attend(self, call: Call, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = slice(call.q_begin, call.q_end), slice(call.k_begin, call.k_end)
        tensors = self._q[queries], k[keys], v[keys]
        options = {"causal": call.causal, "softmax_scale": self._scale, "return_lse": True}
        if len(call.q_starts) == 2:  # one sequence, which need not be found by its starts
            out, lse = mla_prefill(*(tensor[None] for tensor in tensors), **options)
            return out[0], lse[0]
        q_starts, k_starts = self._numbers[id(call)].chunk(2)
        return mla_prefill(*tensors, cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, **options)

    def merge(self, call: Call, part: torch.Tensor, part_lse: torch.Tensor) -> None:
        begin = call.q_begin
        if call.fresh and not call.causal:
            self._first = begin, part
            self.lse[:, begin : call.q_end] = part_lse
            return
        params = MergeParams(
            part=part.data_ptr(),
            part_lse=part_lse.data_ptr(),
            first=0 if self._before is None else self._before[1][begin - self._before[0] :].data_ptr(),
            sum=0 if self._sum is None else self._sum[begin:].data_ptr(),
            lse=self.lse[:, begin:].data_ptr(),
            out=self.out[begin:].data_ptr() if call.causal else 0,
            lse_stride=self.lse.stride(0),
            tokens=len(part),
            heads=part.shape[1],
        )
        self._launch(MERGE[part.dtype], "merge_part", params, (-(-len(part) // WARPS), part.shape[1]))

    def _launch(
        self, config: KernelConfig, entry: str, params: ctypes.Structure, grid: tuple[int, int]
    ) -> None:
        device = self._q.device.index
        with torch.cuda.device(device):
            launch.bind(device)
            kernel = launch.load(config, entry, device, persistent=False)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
            kernel.launch(grid, launch.current_stream(device), arguments)


class PortableSteps:
    """The same by torch's operators, on any device, in fp32 or wider."""

    def __init__(self, q, pool, block_table, w_uk, w_uv, scale, chunks: list[Chunk]):
        wide = torch.promote_types(q.dtype, torch.float32)
        self._pool, self._table, self._scale, self._dtype = pool, block_table.long(), scale, q.dtype
        self._q, self._w_uk, self._w_uv = q.to(wide), w_uk.to(wide), w_uv.to(wide)
        total, heads, _ = q.shape
        self._sum = self._q.new_zeros(total, heads, VALUE)
        self.lse = self._q.new_full((heads, total), float("-inf"))

    @property
    def out(self) -> torch.Tensor:
        return self._sum.to(self._dtype)

    def decompress(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        num_pages, page_size, _ = self._pool.shape
        own = []
        for sequence, begin, end in chunk.parts:
            position = torch.arange(begin, end, device=self._pool.device)
            page = self._table[sequence, position // page_size]
            inside = (page >= 0) & (page < num_pages)
            lines = self._pool[page.where(inside, 0), position % page_size].to(self._q.dtype)
            own.append(lines.masked_fill(~inside[:, None], float("nan")))
        lines = torch.cat(own)
        latents, heads = lines[:, :HEAD_DIM_V], self._q.shape[1]
        rotary = lines[:, None, HEAD_DIM_V:].expand(-1, heads, -1)
        k = torch.cat([torch.einsum("tl,hdl->thd", latents, self._w_uk), rotary], -1)
        return k, torch.einsum("tl,hdl->thd", latents, self._w_uv)

    def attend(self, call: Call, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self._q.shape[1]
        out = self._q.new_empty(call.q_end - call.q_begin, heads, VALUE)
        lse = self._q.new_empty(heads, len(out))
        for i, (begin, keys) in enumerate(zip(call.q_starts[:-1], call.k_starts[:-1], strict=True)):
            end, keys_end = call.q_starts[i + 1], call.k_starts[i + 1]
            own = slice(call.k_begin + keys, call.k_begin + keys_end)
            rows = self._q[call.q_begin + begin : call.q_begin + end]
            scores = torch.einsum("qhd,khd->hqk", rows, k[own]) * self._scale
            if call.causal:
                shape = scores.shape[1:]
                hidden = torch.ones(shape, dtype=torch.bool, device=k.device).triu(1 + shape[1] - shape[0])
                scores.masked_fill_(hidden, float("-inf"))
            lse[:, begin:end] = scores.logsumexp(-1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[own])
        return out, lse

    def merge(self, call: Call, part: torch.Tensor, part_lse: torch.Tensor) -> None:
        rows = slice(call.q_begin, call.q_end)
        lse = torch.logaddexp(self.lse[:, rows], part_lse)
        keep, take = ((each - lse).exp().T[..., None] for each in (self.lse[:, rows], part_lse))
        self._sum[rows] = keep * self._sum[rows] + take * part
        self.lse[:, rows] = lse
