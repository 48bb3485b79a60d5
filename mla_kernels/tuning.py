"""Every choice in how a variant of the decode kernels is built. (Which serves which call: ``choice.py``.)"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .compiler import KernelConfig

ROWS = (8, 16, 32, 64)  # query rows a CTA: decode_swapped.cu, the last decode_rows.cu
PAIR_ROWS = 128  # of a pair of CTAs: decode_pair.cu
WORK = {"decode": 0, "stream": 1, "mma": 2, "skeleton": 3}  # enum class Work of cuda/producer.cuh

# How pages come into tiles of 64 tokens, and MLA_PAGE_SIZE of cuda/layout.cuh: pages of 64 are tiles, larger
# ones are several; of smaller powers of two down to 8 TMA brings pieces; tokens of still smaller ones are
# gathered one by one. Pieces (of any page from 8 on) and tokens also take ragged queries.
Pages = Literal["tiles", "tiles128", "tiles256", "pieces", "tokens"]
PAGES = {"tiles": 64, "tiles128": 128, "tiles256": 256, "pieces": 0, "tokens": 1}
PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# cuda/layout.cuh
TILE_TOKENS = 64
BOX_BYTES, BOXES, GROUP_BOXES, GROUPS, STEPS_PER_BOX = 8192, 9, 4, 2, 4
WARPGROUP, WARPGROUPS = 128, 4  # values, values, scores, producer
PAIR_WARPGROUPS = 3  # of 128 rows: two that attend, producer
SHARED_LIMIT = 227 * 1024  # bytes that a block may have
REGISTER_LIMIT = 65536 // WARPGROUP  # of a thread of each warpgroup, added up
LEAST_REGISTERS, MOST_REGISTERS = 24, 240


def pages_of(page_size: int, ragged: bool) -> Pages:
    """How pages of this size come into tiles."""
    if page_size >= TILE_TOKENS and not ragged:
        return "tiles" if page_size == TILE_TOKENS else f"tiles{page_size}"
    return "pieces" if page_size >= 8 else "tokens"


def loader_registers(pages: Pages, rows: int) -> int:
    """What a thread of the producer's warpgroup needs at least, where pages are no tiles (0: of tiles)."""
    if pages == "tokens":
        # three warps gather, and unroll less than two (cuda/producer.cuh)
        return 48 if rows == TILE_TOKENS else 56
    return 40 if pages == "pieces" else 0


class TuningError(ValueError):
    """A tuning that no kernel can have, or no table; says the value, the limit and the remedy."""


@dataclass(frozen=True)
class DecodeTuning:
    """One variant of the decode kernel. Raises TuningError for values with which it would not run.

    Args:
        rows: query rows a CTA; 64 is ``decode_rows.cu``, fewer ``decode_swapped.cu``, 128 a pair of CTAs
            (``decode_pair.cu``).
        group_slots: groups of four boxes (64 tokens x 256 columns) that the ring of tiles holds. (Of fewer
            than 64 rows, a CTA that shares its tiles with none keeps to four: cuda/loader.cuh.)
        rotary_slots: boxes of rotary columns in it, which P takes the place of. Of 128 rows half boxes.
        value_registers, score_registers, producer_registers: of a thread of those warpgroups.
        item_units: what an item costs besides its tiles, in tiles, for the schedule.
        min_tiles: of a share, before an item is split further.
        align_percent: by how much a share may grow so that its ends fall on those of items of equal length.
        register_steps: 64 rows: of the 36 steps of QK^T those whose queries stay in registers. 128 rows: of
            the 18 in each CTA.
        ahead_boxes: 64 rows: boxes of a tile that are multiplied under the softmax of the tile before.
        programmatic: start before the kernel ahead in the stream has ended (it waits by itself).
    """

    rows: int
    group_slots: int
    rotary_slots: int
    value_registers: int
    score_registers: int
    producer_registers: int = 32
    item_units: int = 1
    min_tiles: int = 1
    align_percent: int = 7
    register_steps: int = 0
    ahead_boxes: int = 0
    programmatic: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), bool if field.type == "bool" else int
            if type(value) is not wanted:
                raise TuningError(f"{field.name} is {value!r}, must be of type {wanted.__name__}: correct it")
        require(self.rows in (*ROWS, PAIR_ROWS), "rows", self.rows, f"one of {_ALL_ROWS}", "choose one")
        require(
            self.item_units >= 1, "item_units", self.item_units, "at least 1", "empty requests need a unit"
        )
        require(self.min_tiles >= 1, "min_tiles", self.min_tiles, "at least 1", "a share has a tile")
        fits = 0 <= self.align_percent <= 100
        require(fits, "align_percent", self.align_percent, "in [0, 100]", "shares may at most double")
        self._check_registers()
        if self.rows == PAIR_ROWS:
            self._check_ring_of_pair()
        else:
            self._check_ring()
        if self.shared_bytes > SHARED_LIMIT:
            parts = ", ".join(f"{name} {size:,}" for name, size in self.shared_plan())
            raise TuningError(
                f"shared memory is {self.shared_bytes:,} bytes ({parts}), must be at most {SHARED_LIMIT:,}: "
                "take fewer group_slots or rotary_slots"
                + (", or more register_steps" if self.rows == 64 else "")
            )

    def _check_registers(self) -> None:
        at_launch = REGISTER_LIMIT // self.warpgroups // 8 * 8  # values ask for more, the producer for less
        asked = {  # least and most, and of how many warpgroups
            "value_registers": (at_launch, MOST_REGISTERS, 2),
            "score_registers": (LEAST_REGISTERS, MOST_REGISTERS, 1),
            "producer_registers": (LEAST_REGISTERS, at_launch, 1),
        }
        if self.rows == PAIR_ROWS:  # those that attend score, too
            del asked["score_registers"]
        for name, (least, most, _) in asked.items():
            value = getattr(self, name)
            fits = value % 8 == 0 and least <= value <= most
            require(fits, name, value, f"a multiple of 8 in [{least}, {most}]", "setmaxnreg takes no other")
        total = sum(count * getattr(self, name) for name, (_, _, count) in asked.items())
        most = self.warpgroups * at_launch
        require(
            total <= most,
            " + ".join(f"{count} {name}" if count > 1 else name for name, (_, _, count) in asked.items()),
            total,
            f"at most {most}, what a block of {self.threads} threads may have",
            "take from one of them",
        )

    def _check_not_read(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value == 0, name, value, f"0 for {self.rows} rows", f"{self.source} does not read it")

    def _check_ring_of_pair(self) -> None:
        self._check_not_read("score_registers", "ahead_boxes")
        slots = self.rotary_slots
        require(
            slots == self.group_slots, "rotary_slots", slots, "group_slots", "a tile has one of each there"
        )
        require(slots >= 3, "group_slots", slots, "at least 3", "two are in use, one under way")
        steps = self.register_steps
        fits = steps % STEPS_PER_BOX == 0 and STEPS_PER_BOX <= steps < GROUP_BOXES * STEPS_PER_BOX
        require(fits, "register_steps", steps, "4, 8 or 12", "take whole boxes")

    def _check_ring(self) -> None:
        require(self.rotary_slots >= 2, "rotary_slots", self.rotary_slots, "at least 2", "else it hangs")
        if self.rows != 64:
            self._check_not_read("register_steps", "ahead_boxes")
        else:
            most = BOXES * STEPS_PER_BOX - 1
            fits = 1 <= self.register_steps <= most
            require(fits, "register_steps", self.register_steps, f"in [1, {most}]", "some in either memory")
            fits = 1 <= self.ahead_boxes < BOXES
            require(
                fits, "ahead_boxes", self.ahead_boxes, f"in [1, {BOXES - 1}]", "two chains need two parts"
            )
        # A tile, and of the next one what is multiplied before this one is given back.
        least = GROUPS + max(1, -(-self.ahead_boxes // GROUP_BOXES))
        require(
            self.group_slots >= least,
            "group_slots",
            self.group_slots,
            f"at least {least}, a tile and what comes after it",
            "take more, or fewer ahead_boxes",
        )

    @property
    def most_parts(self) -> int:
        """Of an item, so that a unit of each and its rows' stats have room in the ring (cuda/merge.cuh)."""
        (_, values), (_, rotary), *_ = self.shared_plan()
        room = values + rotary
        unit = (2 if self.rows == 64 else 1) * 512 + 8 * 4  # and each value warp has a scale
        warp_rows, warps = (self.rows, 1) if self.rows < 64 else (16, 2)  # warps: that a slice may touch
        most = room // (unit + warps * warp_rows * 12)
        # Of 64 rows a half has 128 units in fp32: from as many parts on, a slice is one, of one warp.
        return room // (unit + warp_rows * 12) if self.rows == 64 and most >= 128 else most

    @property
    def cluster_ctas(self) -> int:
        """CTAs that share a block of rows."""
        return 2 if self.rows == PAIR_ROWS else 1

    def serves(self, pages: Pages) -> bool:
        """Whether it takes pages that come so."""
        return self.rows != PAIR_ROWS or pages.startswith("tiles")

    @property
    def source(self) -> str:
        """The kernel's file."""
        return {64: "decode_rows.cu", PAIR_ROWS: "decode_pair.cu"}.get(self.rows, "decode_swapped.cu")

    @property
    def warpgroups(self) -> int:
        """Of a block."""
        return PAIR_WARPGROUPS if self.rows == PAIR_ROWS else WARPGROUPS

    @property
    def threads(self) -> int:
        """Of a block."""
        return WARPGROUP * self.warpgroups

    @property
    def query_boxes(self) -> int:
        """Boxes of queries kept in shared memory; of 128 rows, for each 64 of them, and half a box."""
        if self.rows == PAIR_ROWS:
            return GROUP_BOXES - self.register_steps // STEPS_PER_BOX
        return BOXES - self.register_steps // STEPS_PER_BOX

    @property
    def shared_bytes(self) -> int:
        """What ``SharedMemory`` of the kernel takes; a launch asks for all there is."""
        return sum(size for _, size in self.shared_plan())

    def shared_plan(self) -> tuple[tuple[str, int], ...]:
        """(what, bytes) of ``SharedMemory`` in cuda/decode_*.cu, padding with the last."""
        if self.rows == PAIR_ROWS:
            return self._shared_plan_of_pair()
        values = self.group_slots * GROUP_BOXES * BOX_BYTES
        rotary = self.rotary_slots * BOX_BYTES
        barriers = 8 * (self.group_slots * (GROUP_BOXES + 1) + 3 * self.rotary_slots)
        queries = self.query_boxes * self.rows * 128
        end = values + rotary + barriers + queries
        if self.rows != 64:  # the queries have barriers, and stand at a multiple of 1,024
            end = _up(values + rotary + barriers, 1024) + queries + 16
        sums = 3 * self.rows * 4 + 3 * 8
        moved = self.rotary_slots * self.rows * 4 + self.rotary_slots * (16 if self.rows == 64 else 4)
        across_warps = 0 if self.rows == 64 else 4 * self.rows * 4
        end = end + sums + moved + across_warps
        end = _up(end, 8) + (0 if self.rows == 64 else 4 * self.rows * 8 + self.rows * 4)
        end = _up(end, 8) + _QUEUE + _WORK_ITEM
        end = _up(end, 8 if self.rows == 64 else 1024)
        rest = end - values - rotary - queries
        return (
            ("values", values),
            ("rotary columns, then P", rotary),
            ("queries", queries),
            ("the rest", rest),
        )

    def _shared_plan_of_pair(self) -> tuple[tuple[str, int], ...]:
        queries = 2 * (self.query_boxes * BOX_BYTES + BOX_BYTES // 2)
        values, rotary = self.group_slots * GROUP_BOXES * BOX_BYTES, self.rotary_slots * BOX_BYTES // 2
        ring = 2 * 8 * self.group_slots
        messages = 2 * WARPGROUP * (64 + 32)  # partial scores, then P, of each thread that attends
        barriers, again = 2 * 8 * 8, 8
        schedule = 32 * _WORK_RANGE
        rest = _up(_up(ring, 16) + again + barriers + _QUEUE + _WORK_ITEM + schedule, 16)
        return (
            ("values", values),
            ("rotary columns", rotary),
            ("queries", queries),
            ("messages", messages),
            ("the rest", rest),
        )

    def kernel_config(
        self, element: Literal["bf16", "fp16"], work: str = "decode", pages: Pages = "tiles"
    ) -> KernelConfig:
        """The cubin, and how it is launched. ``work`` other than "decode" is a building block.

        ``pages`` other than "tiles": of ``for_pages``, under this tuning's name.
        """
        if pages != "tiles":
            built = self.for_pages(pages).kernel_config(element, work)
            defines = tuple(
                (name, PAGES[pages] if name == "MLA_PAGE_SIZE" else value) for name, value in built.defines
            )
            name = f"{self.kernel_config(element, work).name}-{pages}"
            return dataclasses.replace(built, defines=defines, name=name)
        defines = (
            ("MLA_BF16", int(element == "bf16")),
            ("MLA_ROWS", self.rows),
            ("MLA_PAGE_SIZE", PAGES["tiles"]),
            ("MLA_ITEM_UNITS", self.item_units),
            ("MLA_MIN_TILES", self.min_tiles),
            ("MLA_ALIGN_PERCENT", self.align_percent),
            # Nothing is loaded for "mma": its ring is arithmetic, and must fit the producer's registers.
            ("MLA_GROUP_SLOTS", 4 if work == "mma" else self.group_slots),
            ("MLA_ROTARY_SLOTS", self.rotary_slots),
            ("MLA_VALUE_REGISTERS", self.value_registers),
            ("MLA_SCORE_REGISTERS", self.score_registers),
            ("MLA_REGISTER_STEPS", self.register_steps),
            ("MLA_PRODUCER_REGISTERS", self.producer_registers),
            ("MLA_AHEAD_BOXES", self.ahead_boxes),
            ("MLA_WORK", WORK[work]),
        )
        name = f"{self.source.removesuffix('.cu')}-{element}-{self.rows}" + (
            "" if work == "decode" else f"-{work}"
        )
        if compiled := dataclasses.replace(self, programmatic=True).changes():
            name += "+" + compiled.replace(",", "+")
        return KernelConfig(self.source, defines, name, SHARED_LIMIT, self.threads, self.programmatic)

    def for_pages(self, pages: Pages) -> DecodeTuning:
        """The same where pages are no tiles: their loader wants more registers.

        With 64 rows the scores give them, and a box of queries goes back to shared memory. It takes the place
        of a rotary box of the ring, not of a group: with 2 tiles instead of 2 1/2 pages of 32 took 450 us
        instead of 278 (scratch, one H100, h_q 128, b 128, kv 4096).
        """
        require(
            self.serves(pages), f"rows for pages in {pages}", self.rows, "at most 64", "take another variant"
        )
        wanted = loader_registers(pages, self.rows)
        if wanted == 0:
            return self
        more = max(0, wanted - self.producer_registers)
        changed = {
            "score_registers": self.score_registers - more,
            "producer_registers": self.producer_registers + more,
        }
        if self.rows == 64:
            changed |= {
                "rotary_slots": min(self.rotary_slots, 2),
                "register_steps": min(self.register_steps, 12),
            }
        return dataclasses.replace(self, **changed)

    def changes(self) -> str:
        """What differs from the shipped variant of these rows: "ahead_boxes=1,group_slots=4", or nothing."""
        shipped = VARIANTS[self.rows]
        return ",".join(
            f"{field.name}={getattr(self, field.name):d}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(shipped, field.name)
        )

    @classmethod
    def parse(cls, text: str) -> DecodeTuning:
        """The shipped variant of some rows with changes: "rows=64" or "rows=64,ahead_boxes=1".

        Raises TuningError for text of another form and for what does not fit.
        """
        kinds = {field.name: bool if field.type == "bool" else int for field in dataclasses.fields(cls)}
        changes = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if name not in kinds or not equals or not value.isdecimal() or name in changes:
                raise TuningError(
                    f"tuning {text!r}: {part!r} is none of {', '.join(kinds)} = a number: correct it"
                )
            changes[name] = kinds[name](int(value))
        rows = changes.get("rows")
        require(rows in VARIANTS, f"rows of {text!r}", rows, f"one of {_ALL_ROWS}", "name them")
        return dataclasses.replace(VARIANTS[rows], **changes)


_ALL_ROWS = ", ".join(map(str, (*ROWS, PAIR_ROWS)))

# sizeof(WorkItem) and WorkRange of cuda/schedule.cuh (tests/test_tuning.py compares).
_WORK_ITEM, _WORK_RANGE = 48, 48


def _up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


_QUEUE = _up(3 * _WORK_ITEM, 8) + 6 * 8  # sizeof(ItemQueue): three items, their barriers


def require(condition: bool, name: str, value: object, limit: str, remedy: str) -> None:
    if not condition:
        raise TuningError(f"{name} is {value}, must be {limit}: {remedy}")


# Those that ship, by rows: up to 64 for an H200, 128 for an H100. 128 accumulators of a value thread of 64
# rows begin at R24, which makes 154; the scores get what is left.
VARIANTS = {
    tuning.rows: tuning
    for tuning in (
        DecodeTuning(8, 6, 2, value_registers=136, score_registers=208),
        DecodeTuning(16, 5, 4, value_registers=136, score_registers=208),
        DecodeTuning(32, 5, 3, value_registers=136, score_registers=208),
        DecodeTuning(64, 5, 3, 160, 160, item_units=3, register_steps=16, ahead_boxes=2),
        DecodeTuning(128, 4, 4, 240, 0, producer_registers=24, item_units=3, register_steps=4),
    )
}
