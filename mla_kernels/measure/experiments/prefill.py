"""How fast is attention over whole sequences, against FA3, cuDNN, FA2 and plain PyTorch?

The chapter's grid (types, batch, length, heads, head dim, causal, varlen), its five headline rows, and the
head dims of MLA (192/128) and of 256. The grid has 2,400 configurations: scope "full" takes its rows,
sweeps of length, batch and heads, and a covering set in which any two values of two axes meet at least once.
Scope "whole" takes them all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator

from mla_kernels.prefill_tuning import VARIANTS

from ..calls import PrefillWorkload
from ..experiment import SEED, Progress, run_steps
from ..figures import DECODE
from ..points import Step
from ..prefill_inputs import evenly, prefill, prefill_lognormal
from ..records import PEER, Record
from ..timing import ROUNDS

SCOPES = ("full", "live", "whole")
AXES = {  # the chapter's, lines 49-60
    "dtype": ("bf16", "fp16"),
    "b": (1, 2, 4, 8, 16),
    "s": (512, 1024, 2048, 4096, 8192, 16384),
    "h": (8, 16, 32, 64, 128),
    "d": (64, 128),
    "causal": (True, False),
    "ragged": (True, False),
}
# (b, s) of 32 heads, d 64: lines 69-116
CHAPTER_ROWS = ((1, 1024), (1, 2048), (1, 4096), (4, 1024), (4, 2048))
CHAPTER_REPEATS = 100
# (b, s, h), d 64: lines 142-176
CHAPTER_BANDWIDTHS = ((1, 512, 8), (4, 1024, 16), (1, 4096, 64), (1, 2048, 128))
SWEEPS = (
    *((1, s, 32) for s in AXES["s"]),
    *((b, 2048, 32) for b in AXES["b"]),
    *((4, 2048, h) for h in AXES["h"]),
)
MLA, WIDE = (192, 128), (256, 256)
FURTHER = (  # (b, s, h, dims), causal and not
    *((b, s, 128, MLA) for b, s in ((1, 2048), (1, 4096), (1, 16384), (4, 4096), (8, 2048))),
    *((b, s, 16, WIDE) for b, s in ((1, 4096), (1, 16384), (4, 4096), (8, 2048))),
)
CHUNK = 1024  # queries, over all the keys so far: causal with s_q < s_k
CHUNKS = ((1, 16384, 32, (128, 128)), (1, 16384, 128, MLA))
SUSTAINED = (  # (b, s, h, dims, causal)
    (1, 16384, 32, (64, 64), False),
    (1, 16384, 32, (128, 128), False),
    (1, 16384, 128, MLA, True),
)
MOST_COST = 1 << 41  # b · s² · h · d of a configuration of the covering set; any pair of values has one
FA3, CUDNN, FA2, MATH = (PEER + f"prefill_{name}" for name in ("fa3", "cudnn", "fa2", "math"))
FASTEST = (FA3, CUDNN)
# Choices of the kernel of d 64, changed one at a time where what ships has another.
CHANGED_FROM = 4096  # tokens: in shorter calls what ships may have fewer rows an item
CHANGES = ("polynomials=0", "polynomials=1", "polynomials=2", "polynomials=3", "compares=1", "turns=0")
LIVE_LENGTHS = (1024, 4096, 16384)
LIVE_RAGGED = ((4, 4096, 32, 64), (8, 2048, 32, 128))


def whole() -> Iterator[dict]:
    """Every configuration of the chapter's grid, as values of ``AXES``."""
    for values in itertools.product(*AXES.values()):
        yield dict(zip(AXES, values, strict=True))


def covering() -> list[dict]:
    """Configurations in which any two values of two axes meet.

    Greedy: next is what brings most pairs together, of those one of dtype, head dim, mask and form that met
    least so far, of those the cheapest.
    """
    pairs = {items: set(itertools.combinations(items, 2)) for items in (tuple(c.items()) for c in whole())}
    left = set().union(*pairs.values())
    used = Counter()

    def two_valued(items: tuple) -> tuple:
        return tuple(item for item in items if len(AXES[item[0]]) == 2)

    def merit(items: tuple) -> tuple:
        c = dict(items)
        cost = c["b"] * c["s"] ** 2 * c["h"] * c["d"]
        return cost <= MOST_COST and len(pairs[items] & left), -used[two_valued(items)], -cost

    chosen = []
    while left:
        best = max(pairs, key=merit)
        left -= pairs[best]
        chosen.append(dict(best))
        used[two_valued(best)] += 1
    return chosen


def workload_of(c: dict) -> PrefillWorkload:
    """Of a configuration. Ragged sequences have log-normal lengths of mean s, a single one has s."""
    dims, axes = (c["d"], c["d"]), {"dtype": c["dtype"], "causal": c["causal"]}
    if c["ragged"] and c["b"] > 1:
        return prefill_lognormal(c["b"], c["s"], c["h"], dims, seed=SEED, **axes)
    return prefill(c["b"], c["s"], c["h"], dims, ragged=c["ragged"], **axes)


def steps(scope: str) -> Iterator[Step]:
    """``scope`` "full", "live" for a run beside a notebook, or "whole" for the chapter's whole grid."""
    full = scope != "live"
    for b, s in CHAPTER_ROWS:
        rounds = CHAPTER_REPEATS if full else ROUNDS
        host = (b, s) == CHAPTER_ROWS[0]
        yield _step(prefill(b, s, 32, (64, 64)), FA2, MATH, host=host, memory=True, rounds=rounds)
    for b, s, h in CHAPTER_BANDWIDTHS if full else ():
        yield _step(prefill(b, s, h, (64, 64)))
    if scope == "whole":
        for c in whole():
            yield _with_its_even(workload_of(c))
    elif full:
        yield from _sweeps()
        for c in covering():
            yield _with_its_even(workload_of(c))
    else:
        for s, d, causal in itertools.product(LIVE_LENGTHS, (64, 128), (True, False)):
            yield _step(prefill(1, s, 32, (d, d), causal=causal))
        for b, s, h, d in LIVE_RAGGED:
            yield _with_its_even(prefill_lognormal(b, s, h, (d, d), seed=SEED, causal=True))
    for (b, s, h, dims), causal in itertools.product(FURTHER if full else FURTHER[::2], (True, False)):
        more = (FA2, MATH) if full and (b, s) in ((1, 2048), (1, 4096)) else ()
        yield _step(prefill(b, s, h, dims, causal=causal), *more)
    for b, s, h, dims in CHUNKS if full else ():
        yield Step(prefill(b, s, h, dims, s_q=CHUNK, causal=True), (DECODE, FA3, FA2))
    for b, s, h, dims, causal in SUSTAINED if full else SUSTAINED[1:2]:
        yield _step(prefill(b, s, h, dims, causal=causal), sustain=(DECODE, *FASTEST))


def _sweeps() -> Iterator[Step]:
    for (b, s, h), d, causal in itertools.product(dict.fromkeys(SWEEPS), (64, 128), (True, False)):
        more = (FA2, MATH) if (b, h) == (1, 32) else ()
        changed = variants() if more and d == 64 and s >= CHANGED_FROM else ()
        yield _step(prefill(b, s, h, (d, d), causal=causal), *more, *changed, memory=bool(more))


def _step(workload: PrefillWorkload, *more: str, **fields) -> Step:
    """Ours, the fastest peers, and ``more``."""
    return Step(workload, (DECODE, *FASTEST, *more), **fields)


def variants() -> tuple[str, ...]:
    """Of ``CHANGES``, those that change something of the kernel of d 64, as implementations."""
    choices = {name: int(value) for name, value in dataclasses.asdict(VARIANTS[64, 64]).items()}
    changes = (change.split("=") for change in CHANGES)
    return tuple(f"{DECODE}[{name}={v}]" for name, v in changes if choices.get(name, int(v)) != int(v))


def _with_its_even(workload: PrefillWorkload) -> Step:
    """A workload; if it is ragged, beside it the same tokens evenly in the form for equal lengths."""
    return _step(workload, beside=Step(evenly(workload)) if workload.ragged else None)


def run(scope: str = "full", progress: Progress = print, **options) -> Record:
    """Measure. ``options`` are those of run_steps, which says what it raises."""
    return run_steps("prefill", scope, list(steps(scope)), progress, loaded_ceilings=False, **options)
