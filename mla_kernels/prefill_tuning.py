"""Every choice in how a variant of the prefill kernel is built, and which serves which call."""

from __future__ import annotations

from dataclasses import dataclass

from .compiler import KernelConfig

WARPGROUP, WARPGROUP_ROWS = 128, 64
SHARED_LIMIT = 227 * 1024  # bytes that a block may have
REGISTER_FILE = 65536 // WARPGROUP  # registers for a thread of each warpgroup, added up
LEAST_REGISTERS, MOST_REGISTERS = 24, 240
KEYS = (64, 80, 96, 112, 128, 160, 176, 192)  # that QK has a WGMMA for (cuda/ptx.cuh)
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
    """

    head_dim: int
    head_dim_v: int
    consumers: int
    keys: int
    stages: int
    consumer_registers: int = 240
    producer_registers: int = 24
    polynomials: int = 0
    turns: bool = True
    compares: bool = True

    def __post_init__(self) -> None:
        _require(self.consumers in (2, 3), "consumers", self.consumers, "2 or 3", "take one of them")
        _require(self.keys in KEYS, "keys", self.keys, f"one of {KEYS}", "take one of them")
        _require(self.stages >= 2, "stages", self.stages, "at least 2", "take fewer keys a tile")
        registers = self.consumers * self.consumer_registers + self.producer_registers
        limit = REGISTER_FILE
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
        queries = self.rows * self.head_dim
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
            ("MLA_POLYNOMIALS", self.polynomials),
            ("MLA_TURNS", int(self.turns)),
            ("MLA_COMPARES", int(self.compares)),
            ("MLA_CONSUMER_REGISTERS", self.consumer_registers),
            ("MLA_PRODUCER_REGISTERS", self.producer_registers),
        )
        name = f"prefill-{element}-{self.head_dim}x{self.head_dim_v}-{self.rows}x{self.keys}x{self.stages}"
        name += f"-{self.polynomials}of8" * (self.polynomials > 0)
        name += "-sums" * (not self.compares) + "-free" * (not self.turns)
        threads = (1 + self.consumers) * WARPGROUP
        return KernelConfig("prefill.cu", defines, name, self.shared_bytes, threads, programmatic=False)


def _require(condition: bool, name: str, value: object, limit: str, remedy: str) -> None:
    if not condition:
        raise PrefillTuningError(f"{name} is {value}, must be {limit}: {remedy}")


# Those that ship, by head dims.
VARIANTS = {
    (tuning.head_dim, tuning.head_dim_v): tuning
    for tuning in (
        PrefillTuning(64, 64, 3, 128, 4, consumer_registers=160, producer_registers=32, compares=False),
        PrefillTuning(128, 128, 3, 80, 4, consumer_registers=160, producer_registers=32, compares=False),
        PrefillTuning(192, 128, consumers=2, keys=128, stages=2, turns=False),
        PrefillTuning(256, 256, consumers=2, keys=80, stages=2, compares=False),
    )
}
HEAD_DIMS = tuple(VARIANTS)


def shipped_prefill_configs() -> list[KernelConfig]:
    """Every instance that ``mla_prefill`` can launch."""
    return [tuning.kernel_config(element) for element in ("bf16", "fp16") for tuning in VARIANTS.values()]
