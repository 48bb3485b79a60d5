"""Which choice in the kernels is worth what, and is there a better table for this card?

Each candidate changes one thing of a shipped variant, a few change two. Those that switch an idea off are its
ablation. All candidates of a workload take turns with the shipped variant, each checked first. A candidate
that does not fit the card or does not compile is a point with that reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mla_kernels.choice import SHIPPED
from mla_kernels.tuning import PAIR_ROWS

from ..candidates import SHIPPED_ROWS, best_table, name_of, shipped_rows
from ..experiment import Progress, run_steps
from ..points import Step
from ..records import Record, Variant, Workload
from ..workloads import uniform

SHAPES = ((1, 4096), (128, 4096), (64, 16384))  # (b, kv)
FULL_HEADS = (8, 16, 32, 64, 128)
LIVE = ((16, (128, 4096)), (64, (128, 4096)), (128, (64, 16384)))  # (h_q, shape)

EVERYWHERE = (("programmatic=0",), ("item_units=6",), ("align_percent=0",), ("min_tiles=2",))
OF_FEW_ROWS = (
    ("group_slots=4",),  # two tiles
    ("group_slots=3",),  # a tile and a half
    ("rotary_slots=2",),
    ("item_units=3",),
)
OF_64_ROWS = (
    ("item_units=1",),
    ("ahead_boxes=1",),
    ("ahead_boxes=3",),
    ("ahead_boxes=4",),
    ("group_slots=4",),  # no third tile begun
    ("group_slots=4", "register_steps=4"),  # the queries back in shared memory, the ring pays for it
    ("register_steps=12",),  # does not fit: what the registers make room for
    ("register_steps=20",),
    ("score_registers=168", "producer_registers=24"),
    ("value_registers=152", "score_registers=176", "register_steps=20"),
)
OF_PAIRS = (("item_units=1",), ("group_slots=3", "rotary_slots=3"), ("register_steps=8",))
# (h_q, b, kv) at which the shipped variants of all rows take turns, for what they cost: HBM has little to do
COSTS = (
    (128, 1, 1024),
    (128, 1, 4096),
    (128, 4, 1024),
    (128, 4, 4096),
    (128, 16, 1024),
    (64, 64, 1024),
    (128, 64, 1024),
    (128, 128, 1024),
)


def candidates(workload: Workload) -> tuple[str, ...]:
    """Implementations to measure at a workload, the shipped variant first."""
    rows = shipped_rows(workload)
    changes = (*EVERYWHERE, *{64: OF_64_ROWS, PAIR_ROWS: OF_PAIRS}.get(rows, OF_FEW_ROWS))
    own = [name_of(*c, rows=rows) for c in changes if not set(c) <= _shipped_choices(rows)]
    return (name_of(rows=rows), *own)


def _shipped_choices(rows: int) -> set[str]:
    """The shipped variant's fields as candidates write them."""
    return {f"{name}={value:d}" for name, value in dataclasses.asdict(SHIPPED.of_rows(rows)).items()}


def steps(scope: str) -> Iterator[Step]:
    """``scope`` "full", or "live" for a run beside a notebook."""
    chosen = LIVE if scope == "live" else [(h_q, shape) for h_q in FULL_HEADS for shape in SHAPES]
    for h_q, (b, length) in chosen:
        workload = uniform(b, length, h_q=h_q)
        yield Step(workload, candidates(workload))
    if scope == "full":
        for h_q, b, length in COSTS:
            yield Step(uniform(b, length, h_q=h_q), tuple(name_of(rows=rows) for rows in SHIPPED_ROWS))


def run(scope: str = "full", progress: Progress = print, **options) -> Record:
    """Measure, and put the best table into the record. ``options`` are those of run_steps."""
    record = run_steps("tuning", scope, list(steps(scope)), progress, loaded_ceilings=False, **options)
    table = [Variant(**entry) for entry in best_table(record.points).to_json()]
    return record.model_copy(update={"tuning": table})
