"""One workload, several implementations: bind, check against the oracle, capture, time interleaved.

Nothing that a point does ends the run: what cannot be measured becomes a point with its reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V

from .bound import Bound, measure_host, measure_memory
from .calls import PrefillWorkload, Workload
from .candidates import is_candidate, tuning_of
from .figures import DECODE, ELEMENT_BYTES, AnyWorkload, flop
from .measurements import Measurement
from .records import ALTERNATIVE, PEER, Accuracy, Host, Memory, Point, rounds_more
from .timing import ROUNDS, Loop, burst, capture, sustained
from .workloads import Inputs, materialize, sets_to_defeat_l2

if TYPE_CHECKING:
    import torch

    Known = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by KV set: out and lse of the checked sequences

BLOCKS = ("block:stream", "block:mma", "block:skeleton")
CHECK_FLOP = 1e12  # fp64 work allowed for one check: tens of milliseconds on a data-centre GPU


@dataclass(frozen=True)
class Step:
    """What to measure at one workload: ``implementations`` in a burst, those of ``sustain`` also under load.

    ``rotate`` False reads one KV set again and again. ``count``: those to run under the profiler. ``poison``
    False leaves finite values where nothing should be read: some peers multiply what they mask.
    ``host``: also time eager calls on the host. ``memory``: measure it (``host`` does too). ``rounds``: of
    the burst. ``beside``: another step, whose implementations take their turns in the same burst: in one of
    its own the card would be in another state (its clocks at the power cap), and the two are to be compared.
    """

    workload: AnyWorkload
    implementations: tuple[str, ...] = (DECODE,)
    sustain: tuple[str, ...] = ()
    rotate: bool = True
    count: tuple[str, ...] = ()
    poison: bool = True
    host: bool = False
    memory: bool = False
    rounds: int = ROUNDS
    beside: Step | None = None

    def together(self) -> Iterator[Step]:
        """Itself, and what is beside it."""
        yield self
        if self.beside is not None:
            yield from self.beside.together()


def bind(implementation: str, inputs: Inputs) -> Bound:
    """Raises ValueError for a name that is none."""
    tensors = [(inputs.q, inputs.kv_cache, table, inputs.cache_seqlens) for table in inputs.block_tables]
    if implementation == DECODE:
        from mla_kernels.decode import mla_decode

        out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)
        causal = inputs.workload.causal
        return Bound([functools.partial(mla_decode, *args, causal=causal, out=out) for args in tensors], out)
    if is_candidate(implementation):
        from mla_kernels.decode import decode_variant

        out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)
        tuned = functools.partial(
            decode_variant, tuning_of(implementation), causal=inputs.workload.causal, out=out
        )
        return Bound([functools.partial(tuned, *args) for args in tensors], out)
    if implementation in BLOCKS:
        from mla_kernels.decode import decode_variant

        kind = implementation.removeprefix("block:")
        return Bound([functools.partial(decode_variant, kind, *args) for args in tensors])
    if implementation.startswith(PEER):
        from .peers import find

        return find(implementation).bind(inputs)
    if implementation.startswith(ALTERNATIVE):
        from . import alternatives

        return alternatives.find(implementation)(inputs)
    known = ", ".join((DECODE, *BLOCKS, f"{PEER}NAME", f"{ALTERNATIVE}NAME", f"{DECODE}[rows=...]"))
    raise ValueError(f"implementation {implementation!r} is unknown; known are {known}")


@dataclass(frozen=True)
class Operation:
    """What measuring has to know of an operator.

    ``sets``: (workload, L2 bytes) -> sets of inputs to rotate through. ``materialize``, ``bind``, ``check``
    as below. ``bytes``: the cache of one set, for an implementation that has none of its own, and the output.
    """

    sets: Callable[[AnyWorkload, int], int]
    materialize: Callable[..., Any]
    bind: Callable[[str, Any], Bound]
    check: Callable[..., Accuracy]
    bytes: Callable[[Any], tuple[int, int]]


def operation_of(workload: AnyWorkload) -> Operation:
    """Prefill's or decode's."""
    if isinstance(workload, PrefillWorkload):
        from . import prefill_points as of

        return Operation(of.sets, of.materialize, of.bind, of.check, of.sizes)
    return Operation(sets_to_defeat_l2, materialize, bind, check, lambda inputs: (pool_bytes(inputs), 0))


@dataclass
class _Outcome:
    """What became of one implementation so far."""

    error: Accuracy | None = None
    loop: Loop | None = None
    kv_sets: int = 0
    host: Host | None = None
    memory: Memory | None = None
    status: str = "ok"
    reason: str | None = None
    measured: list[Measurement] = field(default_factory=list)

    def prepare(self, step: Step, name: str, inputs: Inputs, seed: int, known: Known) -> None:
        """Bind, check, capture. Raises what these raise, ArithmeticError for a wrong result."""
        prefill = isinstance(step.workload, PrefillWorkload)
        of = operation_of(step.workload)
        if step.host or step.memory:
            bound, self.memory = measure_memory(lambda: of.bind(name, inputs), *of.bytes(inputs))
        else:
            bound = of.bind(name, inputs)
        if not name.startswith("block:"):
            self.error = of.check(inputs, bound, seed, known)
            if excess := self.error.excess(step.workload.dtype, rounds_more(name), prefill):
                raise ArithmeticError(excess)
        if step.host:
            self.host = measure_host(bound)
        self.loop = capture(name, bound.calls)
        self.kv_sets = len(bound.calls)

    def stop(self, error: Exception) -> None:
        unsupported = isinstance(error, NotImplementedError) or type(error).__name__ == "OutOfMemoryError"
        self.status = "skipped" if unsupported else "failed"
        self.reason = f"{type(error).__name__}: {one_line(error)}"


def one_line(error: object) -> str:
    """What an error says, as a reason that a point can keep."""
    return " ".join(str(error).split())[:400]


def measure(
    step: Step, *, l2_bytes: int, seed: int, absent: Mapping[str, str] = MappingProxyType({})
) -> list[Point]:
    """Points of a step and of the one beside it: each implementation in a burst, then the sustained ones.

    ``absent``: implementations known not to run here, with the reason; they are not tried.
    """
    import torch

    torch.cuda.empty_cache()  # graphs of the step before kept their pools
    turns = [_Turns(each, l2_bytes, absent) for each in step.together()]
    alive = lambda: [outcome for each in turns for outcome in each.alive()]  # noqa: E731
    try:
        for each in turns:
            each.prepare(seed)
        if alive():
            bursts = burst([outcome.loop for outcome in alive()], step.rounds)
            for outcome in alive():
                outcome.measured.append(bursts[outcome.loop.name])
        for each in turns:
            each.sustain()
    except Exception as error:  # of the device: no outcome of this step can be trusted
        for outcome in alive():
            outcome.measured.clear()
            outcome.stop(error)
    points = [point for each in turns for point in each.points()]
    return sorted(points, key=lambda point: point.mode)  # "burst" before "sustained"


class _Turns:
    """The implementations of a step, and what became of each."""

    def __init__(self, step: Step, l2_bytes: int, absent: Mapping[str, str]):
        self.step, self.of = step, operation_of(step.workload)
        self.sets = self.of.sets(step.workload, l2_bytes) if step.rotate else 1
        self.outcomes = {name: _Outcome() for name in step.implementations}
        for name in absent.keys() & self.outcomes.keys():
            self.outcomes[name].status, self.outcomes[name].reason = "skipped", one_line(absent[name])

    def alive(self) -> list[_Outcome]:
        return [outcome for outcome in self.outcomes.values() if outcome.status == "ok"]

    def prepare(self, seed: int) -> None:
        step, known = self.step, {}
        try:
            inputs = self.of.materialize(step.workload, seed=seed, sets=self.sets, poison=step.poison)
        except Exception as error:  # no room, say: what shares the burst need not care
            for outcome in self.alive():
                outcome.stop(error)
        for name, outcome in self.outcomes.items():
            if outcome.status != "ok":
                continue
            try:
                outcome.prepare(step, name, inputs, seed, known)
                outcome.loop = replace(outcome.loop, name=f"{name} at {step.workload}")
            except Exception as error:
                outcome.stop(error)

    def sustain(self) -> None:
        for name in self.step.sustain:
            if self.outcomes[name].status == "ok":
                self.outcomes[name].measured.append(sustained(self.outcomes[name].loop))

    def points(self) -> list[Point]:
        return [
            point
            for name, outcome in self.outcomes.items()
            for point in _to_points(self.step, name, outcome, self.sets)
        ]


def _to_points(step: Step, name: str, outcome: _Outcome, sets: int) -> list[Point]:
    point = {"implementation": name, "workload": step.workload, "error": outcome.error}
    if outcome.status != "ok":
        return [Point(**point, kv_sets=sets, mode="burst", status=outcome.status, reason=outcome.reason)]
    point |= {"kv_sets": outcome.kv_sets, "host": outcome.host, "memory": outcome.memory}
    return [Point(**point, status="ok", **measurement.model_dump()) for measurement in outcome.measured]


def pool_bytes(inputs: Inputs) -> int:
    """Bytes of the pages that one KV set occupies."""
    workload = inputs.workload
    pages = sum(-(-length // workload.page_size) for length in workload.lengths)
    return pages * workload.page_size * HEAD_DIM * ELEMENT_BYTES


def check(inputs: Inputs, bound: Bound, seed: int, known: Known | None = None) -> Accuracy:
    """Error against the fp64 oracle on the first and the last KV set, into a poisoned output.

    Where all sequences would take more than ``CHECK_FLOP``, a random subset of them. Raises ArithmeticError
    for NaN or infinity where the oracle has none. ``known`` keeps what the absorbed oracle gives, for the
    next implementation on the same inputs.
    """
    import torch

    chosen = sequences_to_check(inputs.workload, seed)
    rows = torch.tensor(chosen, device=inputs.q.device)
    oracle = bound.oracle or functools.partial(absorbed_oracle, inputs)
    known = {} if known is None or bound.oracle else known
    squared_error = squared_norm = worst_lse = 0.0
    has_lse = True
    for index in sorted({0, len(bound.calls) - 1}):
        bound.out.fill_(float("nan"))
        out, lse = bound.unpack(bound.calls[index]())
        if index not in known:
            known[index] = oracle(index, rows)
        expected_out, expected_lse = known[index]
        squared_error += (out[rows].double() - expected_out).square().sum().item()
        squared_norm += expected_out.square().sum().item()
        if has_lse := lse is not None:
            lse = lse[rows].double()
            difference = torch.where(lse == expected_lse, 0.0, (lse - expected_lse).abs())  # -inf equals -inf
            worst_lse = max(worst_lse, difference.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    relative = math.sqrt(squared_error / squared_norm) if squared_norm else math.sqrt(squared_error)
    if not (math.isfinite(relative) and math.isfinite(worst_lse)):
        raise ArithmeticError(
            f"result is not finite: out relative L2 error {relative}, lse error {worst_lse}"
        )
    b = inputs.workload.b
    subset = f"all {b} sequences" if len(chosen) == b else f"{len(chosen)} of {b} sequences, at random"
    return Accuracy(
        out_rel_l2=relative,
        lse_max_abs=worst_lse if has_lse else None,
        reference=f"fp64 oracle, {subset}",
    )


def absorbed_oracle(inputs: Inputs, index: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in fp64 of the sequences ``rows`` on KV set ``index``."""
    from mla_kernels.reference import mla_decode_reference

    table, causal = inputs.block_tables[index][rows], inputs.workload.causal
    return mla_decode_reference(
        inputs.q[rows], inputs.kv_cache, table, inputs.cache_seqlens[rows], causal=causal
    )


def sequences_to_check(workload: Workload, seed: int) -> list[int]:
    """Indices of sequences, in order, whose fp64 reference stays within ``CHECK_FLOP`` (one at the least)."""
    cost = flop(workload) / max(1, sum(workload.lengths))  # of one token
    order = np.random.default_rng(seed).permutation(workload.b)
    total = np.cumsum([workload.lengths[i] * cost for i in order])
    return sorted(order[: max(1, int((total <= CHECK_FLOP).sum()))].tolist())
