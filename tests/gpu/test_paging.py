"""PagedKVCache and mla_decode: forks, copy-on-write and prefix hits give what a plain cache gives."""

import pytest
import torch

from mla_kernels import PagedKVCache, mla_append, mla_decode
from mla_kernels.paging import slot_mapping
from mla_kernels.reference import mla_append_reference, mla_decode_reference
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

    def append_batch(self, sequences: list[int], counts: list[int] | None = None) -> None:
        slots = self.cache.append_batch(sequences, counts)
        new = self._draw(len(slots.pages))
        self._write(slots, new)
        parts = new.split(counts or [1] * len(sequences))
        for sequence, own in zip(sequences, parts, strict=True):
            self.lines[sequence] = torch.cat([self.lines[sequence], own])

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


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_batches_of_forks_and_others(page_size, worst):
    plain, log = Plain(page_size), ErrorLog(torch.bfloat16)
    first, other = plain.allocate(75), plain.allocate(64)
    sequences = [other, first, plain.fork(first), plain.fork(first)]
    plain.append_batch(sequences)  # two of the three copy the page, if it has room
    plain.check(log, "a token each", sequences)
    plain.append_batch(sequences[::-1], [5, 0, 17, 1])
    plain.check(log, "counts", sequences)
    twins = [plain.fork(sequence) for sequence in sequences]
    plain.append_batch(twins)
    plain.check(log, "every one copied", sequences + twins)
    log.check(worst)


def test_pages_past_two_to_the_31_elements_are_copied():
    cache = PagedKVCache(60_000, 64, max_pages_per_sequence=60_000, max_sequences=4)
    cache.allocate(59_990 * 64)
    first = cache.allocate(10)
    assert int(cache.slots(first).pages[0]) * 64 * 576 > 2**31
    lines = torch.randn(10, 576, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    cache.write(cache.slots(first), lines[:, :512], lines[:, 512:])
    forks = [first, cache.fork(first), cache.fork(first)]
    cache.append_batch(forks)
    pages = [int(cache.slots(fork).pages[0]) for fork in forks]
    assert len(set(pages)) == 3
    for page in pages:
        assert torch.equal(cache.kv_cache[page, :10, 0], lines)


def test_a_decode_step_waits_for_nothing():
    """No append, write, table or copy-on-write makes the host wait for the GPU."""
    plain = Plain(16)
    sequences = [plain.allocate(n) for n in (20, 33, 48)]
    sequences.append(plain.fork(sequences[0]))
    plain.append_batch(sequences)  # the kernels are loaded, and pinned memory is there
    sequences.append(plain.fork(sequences[1]))
    lines = plain._draw(len(sequences))
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        slots = plain.cache.append_batch(sequences)
        plain.cache.write(slots, lines[:, :512], lines[:, 512:])
        plain.cache.write(plain.cache.append(sequences[0], 1), lines[:1, :512], lines[:1, 512:])
        plain.cache.tables(sequences)
        plain.cache.sync()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    with pytest.raises(RuntimeError, match="synchroniz"):  # this test's own eyes
        torch.cuda.set_sync_debug_mode("error")
        try:
            lines[0, 0].item()
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def test_one_graph_appends_and_decodes(worst):
    """A whole decode step captured: RMSNorm, RoPE, append to the slots that each replay is told, decode."""
    plain, log = Plain(64), ErrorLog(torch.bfloat16)
    sequences = [plain.allocate(n) for n in (70, 3, 640)]
    sequences.append(plain.fork(sequences[0]))
    n, rows = len(sequences), len(plain.cache.cache_seqlens)
    angles = torch.rand(1000, 32, generator=plain.generator, device="cuda") * 6.28
    options = {"norm_weight": plain._draw(1)[0, :512].clone(), "cos": angles.cos(), "sin": angles.sin()}
    options["positions"] = torch.zeros(n, dtype=torch.int64, device="cuda")
    mapping = torch.full((n,), -1, dtype=torch.int64, device="cuda")  # writes nothing yet
    new = plain._draw(n)
    q = torch.randn(rows, 1, HEADS, 576, generator=plain.generator, device="cuda").bfloat16()
    plain.cache.sync()
    appended = (mapping, new[:, :512], new[:, 512:])
    decoded = (q, plain.cache.kv_cache, plain.cache.block_table, plain.cache.cache_seqlens)
    mla_append(plain.cache.kv_cache, *appended, **options)
    mla_decode(*decoded)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_append(plain.cache.kv_cache, *appended, **options)
        out, lse = mla_decode(*decoded)
    one_page = torch.zeros(1, n, 576, dtype=torch.bfloat16, device="cuda")
    for step in range(70):
        lengths = [plain.cache.length(sequence) for sequence in sequences]
        mapping.copy_(slot_mapping(plain.cache.append_batch(sequences), 64, mapping.device))
        options["positions"].copy_(torch.tensor(lengths, device="cuda"))
        new.copy_(plain._draw(n))
        plain.cache.sync()
        graph.replay()
        own = torch.arange(n, device="cuda")
        lines = plain.cache.kv_cache.view(-1, 576)[mapping]  # as rounded: one may fall the other way
        wanted = mla_append_reference(one_page, own, *appended[1:], **options)[0]
        torch.testing.assert_close(lines.double(), wanted.double(), rtol=2**-7, atol=2**-12)
        for sequence, line in zip(sequences, lines, strict=True):
            plain.lines[sequence] = torch.cat([plain.lines[sequence], line[None]])
        if step % 23 == 0:
            index = [plain.cache.row(sequence) for sequence in sequences]
            plain.against_plain(log, f"step {step}", sequences, q[index], out[index], lse[index])
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
