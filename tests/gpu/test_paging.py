"""PagedKVCache and mla_decode: forks, copy-on-write and prefix hits give what a plain cache gives."""

import pytest
import torch

from mla_kernels import PagedKVCache, mla_decode
from mla_kernels.reference import mla_decode_reference
from tests.gpu.cases import ErrorLog

HEADS = 16


class Plain:
    """The latents of each sequence, kept whole, beside the cache under test."""

    def __init__(self, page_size: int, prefix_cache: bool = False):
        self.cache = PagedKVCache(
            512, page_size, max_pages_per_sequence=256, max_sequences=8, prefix_cache=prefix_cache
        )
        self.cache.kv_cache.fill_(float("nan"))
        self.lines: dict[int, torch.Tensor] = {}
        self.generator = torch.Generator("cuda").manual_seed(0)

    def _draw(self, n: int) -> torch.Tensor:
        return torch.randn(n, 576, generator=self.generator, device="cuda").bfloat16()

    def allocate(self, n: int) -> int:
        sequence = self.cache.allocate(n)
        self.lines[sequence] = self._draw(n)
        self._write(self.cache.slots(sequence), self.lines[sequence])
        return sequence

    def append(self, sequence: int, n: int) -> None:
        new = self._draw(n)
        self._write(self.cache.append(sequence, n), new)
        self.lines[sequence] = torch.cat([self.lines[sequence], new])

    def fork(self, sequence: int) -> int:
        other = self.cache.fork(sequence)
        self.lines[other] = self.lines[sequence]
        return other

    def _write(self, slots, lines: torch.Tensor) -> None:
        self.cache.write(slots, lines[:, :512], lines[:, 512:])

    def check(self, log: ErrorLog, label: str, sequences: list[int]) -> None:
        q = torch.randn(len(sequences), 1, HEADS, 576, generator=self.generator, device="cuda").bfloat16()
        out, lse = mla_decode(q, self.cache.kv_cache, *self.cache.tables(sequences))
        self.against_plain(log, label, sequences, q, out, lse)

    def against_plain(self, log, label, sequences, q, out, lse) -> None:
        for i, sequence in enumerate(sequences):
            lines = self.lines[sequence]
            pool = torch.zeros(1, len(lines), 1, 576, dtype=torch.bfloat16, device="cuda")
            pool[0, :, 0] = lines
            table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
            length = torch.tensor([len(lines)], dtype=torch.int32, device="cuda")
            ref_out, ref_lse = mla_decode_reference(q[i : i + 1], pool, table, length)
            log.add(f"{label}, sequence {sequence}", out[i : i + 1], lse[i : i + 1], ref_out, ref_lse)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_forks_that_grow_apart(page_size, worst):
    plain, log = Plain(page_size), ErrorLog(torch.bfloat16)
    first = plain.allocate(100 if page_size == 1 else 1000)
    second = plain.fork(first)
    plain.check(log, "forked", [first, second])
    for n in (1, 3, 60):
        plain.append(second, n)
        plain.append(first, 1)
        plain.check(log, f"grown by {n}", [second, first])
    if page_size > 1:
        assert plain.cache.usage().shared > 0
    plain.cache.free(first)
    third = plain.allocate(50)  # into the pages that came free
    plain.check(log, "freed", [third, second])
    log.check(worst)


def test_a_prefix_that_is_found_is_not_written_again(worst):
    plain, log = Plain(16, prefix_cache=True), ErrorLog(torch.bfloat16)
    tokens = list(range(500))
    lines = plain._draw(500)
    first = plain.cache.allocate(tokens)
    plain._write(plain.cache.slots(first), lines)
    plain.lines[first] = lines
    plain.cache.commit(first)
    plain.cache.free(first)
    again = plain.cache.allocate([*tokens[:300], *range(1000, 1040)])
    found = plain.cache.cached_tokens(again)
    assert found == 288, "whole pages of the first 300 tokens"
    own = torch.cat([lines[:found], plain._draw(340 - found)])
    plain._write(plain.cache.slots(again, found), own[found:])
    plain.lines[again] = own
    plain.check(log, "prefix", [again])
    log.check(worst)


def test_one_graph_follows_the_cache(worst):
    """Replays between appends: `sync` brings table and lengths to the addresses that were captured."""
    plain, log = Plain(64), ErrorLog(torch.bfloat16)
    sequences = [plain.allocate(n) for n in (70, 1, 640)]
    rows = len(plain.cache.cache_seqlens)
    q = torch.randn(rows, 1, HEADS, 576, generator=plain.generator, device="cuda").bfloat16()
    plain.cache.sync()
    tensors = (q, plain.cache.kv_cache, plain.cache.block_table, plain.cache.cache_seqlens)
    mla_decode(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = mla_decode(*tensors)
    for step in range(70):
        for sequence in sequences:
            plain.append(sequence, 1)
        plain.cache.sync()
        graph.replay()
        if step % 23 == 0:
            index = [plain.cache.row(sequence) for sequence in sequences]
            plain.against_plain(log, f"step {step}", sequences, q[index], out[index], lse[index])
    log.check(worst)
