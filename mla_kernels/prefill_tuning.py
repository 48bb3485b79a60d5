"""Every choice in how a variant of the prefill kernel is built, and which serves which call."""

from __future__ import annotations

from dataclasses import dataclass

from .compiler import KernelConfig

WARPGROUP, WARPGROUP_ROWS = 128, 64
SHARED_LIMIT = 227 * 1024  # bytes that a block may have
REGISTER_FILE = 65536
LEAST_REGISTERS, MOST_REGISTERS = 24, 240
KEYS = (64, 80, 96, 112, 128, 160, 176, 192)  # that QK has a WGMMA for (cuda/wgmma.cuh)
_BARRIERS_AND_ITEMS = 512  # bytes of shared memory besides tiles, at most


class PrefillTuningError(ValueError):
    """A tuning that no kernel can have; says the value, the limit and the remedy."""


@dataclass(frozen=True)
class PrefillTuning:
    """One variant of the prefill kernel. Raises PrefillTuningError for values with which it would not run.

    Args:
        head_dim, head_dim_v: of q and k; of v and out.
        consumers: warpgroups of 64 query rows each, 2 or 3.
        keys: of a tile.
        stages: tiles of K, and of V, that shared memory holds.
        consumer_registers, producer_registers: of a thread of those warpgroups.
        polynomials: of every eight exponentials, those that the FMA pipe evaluates.
        turns: the consumers issue WGMMA one after the other, not as it comes.
        compares: every score with the reference of its row, not only the sums of probabilities with a limit.
        queries: items whose queries shared memory holds, 1 or 2.
    """

    head_dim: int
    head_dim_v: int
    consumers: int
    keys: int
    stages: int
    consumer_registers: int = 232
    producer_registers: int = 40
    polynomials: int = 0
    turns: bool = True
    compares: bool = True
    queries: int = 1

    def __post_init__(self) -> None:
        _require(self.consumers in (2, 3), "consumers", self.consumers, "2 or 3", "take one of them")
        _require(self.keys in KEYS, "keys", self.keys, f"one of {KEYS}", "take one of them")
        _require(self.queries in (1, 2), "queries", self.queries, "1 or 2", "take one of them")
        _require(self.stages >= 2, "stages", self.stages, "at least 2", "take fewer keys a tile")
        registers = self.consumers * self.consumer_registers + self.producer_registers
        # what the kernel has at launch: setmaxnreg would wait for more for ever
        warpgroups = 1 + self.consumers
        limit = warpgroups * (REGISTER_FILE // (warpgroups * WARPGROUP) // 8 * 8)
        _require(registers <= limit, "registers of all", registers, f"at most {limit}", "take fewer")
        for name in ("consumer_registers", "producer_registers"):
            value = getattr(self, name)
            fits = LEAST_REGISTERS <= value <= MOST_REGISTERS and value % 8 == 0
            limits = f"a multiple of 8 in [{LEAST_REGISTERS}, {MOST_REGISTERS}]"
            _require(fits, name, value, limits, "round it")
        limit = f"at most {SHARED_LIMIT:,}"
        _require(self.shared_bytes <= SHARED_LIMIT, "shared memory", self.shared_bytes, limit, "fewer stages")

    @property
    def rows(self) -> int:
        """Query rows of an item."""
        return self.consumers * WARPGROUP_ROWS

    @property
    def shared_bytes(self) -> int:
        queries = self.queries * self.rows * self.head_dim
        tiles = self.stages * self.keys * (self.head_dim + self.head_dim_v)
        return 2 * (queries + tiles) + _BARRIERS_AND_ITEMS

    def kernel_config(self, element: str) -> KernelConfig:
        """``element``: "bf16" or "fp16"."""
        defines = (
            ("MLA_BF16", int(element == "bf16")),
            ("MLA_HEAD_DIM", self.head_dim),
            ("MLA_HEAD_DIM_V", self.head_dim_v),
            ("MLA_CONSUMERS", self.consumers),
            ("MLA_KEYS", self.keys),
            ("MLA_STAGES", self.stages),
            ("MLA_QUERIES", self.queries),
            ("MLA_POLYNOMIALS", self.polynomials),
            ("MLA_TURNS", int(self.turns)),
            ("MLA_COMPARES", int(self.compares)),
            ("MLA_CONSUMER_REGISTERS", self.consumer_registers),
            ("MLA_PRODUCER_REGISTERS", self.producer_registers),
        )
        name = f"prefill-{element}-{self.head_dim}x{self.head_dim_v}-{self.rows}x{self.keys}x{self.stages}"
        name += f"-{self.queries}q" * (self.queries > 1) + f"-{self.polynomials}of8" * (self.polynomials > 0)
        name += "-sums" * (not self.compares) + "-free" * (not self.turns)
        threads = (1 + self.consumers) * WARPGROUP
        return KernelConfig("prefill.cu", defines, name, self.shared_bytes, threads)


def _require(condition: bool, name: str, value: object, limit: str, remedy: str) -> None:
    if not condition:
        raise PrefillTuningError(f"{name} is {value}, must be {limit}: {remedy}")


# Those that ship, by head dims.
VARIANTS = {
    (tuning.head_dim, tuning.head_dim_v): tuning
    for tuning in (
        PrefillTuning(64, 64, 3, 128, 4, 160, 32, compares=False),
        PrefillTuning(128, 128, 3, 80, 4, 160, 32, compares=False),
        PrefillTuning(192, 128, 2, 128, 2, turns=False),
        PrefillTuning(256, 256, 2, 80, 2, turns=False),
    )
}
HEAD_DIMS = tuple(VARIANTS)

# With 128 rows an item, where items of 192 leave too many CTAs idle; and how much faster an SM is with 192.
FEWER_ROWS = {
    (64, 64): (PrefillTuning(64, 64, 2, 128, 4, compares=False), 1.27),
    (128, 128): (PrefillTuning(128, 128, 2, 128, 3, compares=False), 1.11),
}


def serving(
    head_dims: tuple[int, int], b: int, s_q: int, s_k: int, h_q: int, causal: bool, ctas: int
) -> PrefillTuning:
    """The variant that serves ``b`` sequences of these lengths (of ragged ones their mean): that with which
    the last CTA ends first, by a count of rows x keys (the faster one at 31 of 32 shapes on an H100)."""
    most = VARIANTS[head_dims]
    if head_dims not in FEWER_ROWS:
        return most
    fewer, speed = FEWER_ROWS[head_dims]
    times = (_time(tuning.rows, b, s_q, s_k, h_q, causal, ctas) for tuning in (most, fewer))
    return most if next(times) <= next(times) * speed else fewer


def _time(rows: int, b: int, s_q: int, s_k: int, h_q: int, causal: bool, ctas: int) -> float:
    """Of the last CTA to end, in rows x keys."""
    blocks = -(-s_q // rows)
    longest = rows * s_k
    if not causal:
        return -(-b * h_q * blocks // ctas) * longest
    keys = (max(0, min(s_k, s_k - s_q + (i + 1) * rows)) for i in range(blocks))
    # items of any length: half of the longest is not filled up at the end
    return max(longest, b * h_q * rows * sum(keys) / ctas + longest / 2)


def shipped_prefill_configs() -> list[KernelConfig]:
    """Every instance that ``mla_prefill`` can launch."""
    tunings = [*VARIANTS.values(), *(tuning for tuning, _ in FEWER_ROWS.values())]
    return [tuning.kernel_config(element) for element in ("bf16", "fp16") for tuning in tunings]
