"""The record: one JSON file for one experiment on one GPU, and the only form in which a measurement is kept.

A record holds what was observed (raw samples in microseconds, clocks, power, counters) and where it came from
(commit, source digests, device, software, method). TFLOP/s, TB/s, intervals and joules per token are derived
in ``figures.py`` and never stored; the properties below that look derived (``per_call_us``, ``value``,
``mean_power_w``) are computed when read.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Discriminator, Field, Tag, ValidationError, model_validator

from mla_kernels.choice import TuningTable

from .allocations import Churn, Footprint, Latency
from .calls import PrefillWorkload, Workload
from .measurements import Ceiling, Count, Measurement, Microseconds, Section

SCHEMA_VERSION = 5
# What 2 to 5 added is optional: `host` and `memory` of a point, errors of a peer; `tuning`; `latencies`,
# `footprints`, `churns`; a point's workload may be a prefill.
READABLE_VERSIONS = (1, 2, 3, 4, 5)
REMEDY = "restore the file from git, or measure again with `make record` on a GPU"

# Largest error that an implementation may have and still be timed: relative L2 of out by dtype, absolute LSE.
OUT_REL_L2_LIMIT = {"bf16": 3e-3, "fp16": 5e-4}
LSE_MAX_ABS_LIMIT = 1e-5
PREFILL_LSE_MAX_ABS_LIMIT = 5e-4  # some of its exponentials are polynomials of relative error 8e-5
# Of a peer: wide enough for one that rounds more (keys and values of a decompressed cache are rounded again,
# sums of probabilities kept in bf16), far below what a wrong result shows.
PEER = "peer:"
ALTERNATIVE = "alternative:"  # what one does instead (alternatives.py): the peers' limits
PEER_OUT_REL_L2_LIMIT = {"bf16": 1.2e-2, "fp16": 2e-3}
PEER_LSE_MAX_ABS_LIMIT = 1e-2

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RecordError(Exception):
    """A record that cannot be used. The message names the file, the field, what was found and the remedy."""

    def __init__(self, path: str | os.PathLike, field: str, found: str, remedy: str = REMEDY):
        self.path, self.field, self.found, self.remedy = Path(path), field, found, remedy
        super().__init__(f"{path}: {field}: {found}; {remedy}")


class Run(Section):
    """One run of the recorder. ``commit`` is the measured tree; ``dirty`` says it had uncommitted changes."""

    id: str
    utc: AwareDatetime
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
    dirty: bool
    command: str


class Kernel(Section):
    """A compiled kernel: ``source`` is a file of ``mla_kernels/cuda``, ``digest`` its source_digest()."""

    name: str
    source: str
    digest: Sha256
    options: list[str]
    cubin_sha256: Sha256
    registers: Count
    stack_bytes: Count
    shared_bytes: Count


class Source(Section):
    kernels: list[Kernel] = Field(default_factory=list)


class Device(Section):
    name: str
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    driver: str
    sms: Annotated[int, Field(gt=0)]
    l2_bytes: Annotated[int, Field(gt=0)]
    memory_bytes: Annotated[int, Field(gt=0)]
    sm_clock_max_mhz: Count | None
    mem_clock_max_mhz: Count | None
    power_limit_w: float | None


class Software(Section):
    python: str
    torch: str | None
    cupy: str | None
    nvrtc: str | None
    triton: str | None
    platform: str


class Method(Section):
    """How the samples were taken: ``rounds`` samples a burst point, a mean of ``calls_per_sample`` calls.

    ``l2_rotation_bytes``: the KV sets that a point rotates through total at least this, unless they are one.
    """

    timer: str
    warmup: str
    rounds: Count
    l2_rotation_bytes: Count
    graph: bool
    seed: int
    sustained_seconds: Annotated[float, Field(ge=0)]
    notes: list[str] = Field(default_factory=list)


class Accuracy(Section):
    """Error against the fp64 oracle on the inputs that were timed; ``reference`` says what was compared."""

    out_rel_l2: Annotated[float, Field(ge=0)]
    lse_max_abs: Annotated[float, Field(ge=0)] | None
    reference: str

    def excess(self, dtype: str, peer: bool = False, prefill: bool = False) -> str | None:
        """The limit that this error passes, in words, or None when it is within all of them."""
        out_limit = (PEER_OUT_REL_L2_LIMIT if peer else OUT_REL_L2_LIMIT)[dtype]
        lse_limit = PREFILL_LSE_MAX_ABS_LIMIT if prefill else LSE_MAX_ABS_LIMIT
        lse_limit = PEER_LSE_MAX_ABS_LIMIT if peer else lse_limit
        if self.out_rel_l2 > out_limit:
            return f"out relative L2 error {self.out_rel_l2:.2e} over {out_limit:.0e} ({dtype})"
        if self.lse_max_abs is not None and self.lse_max_abs > lse_limit:
            return f"lse absolute error {self.lse_max_abs:.2e} over {lse_limit:.0e}"
        return None


class Host(Section):
    """Wall time of the host: of one eager call (samples, each a mean of a batch), and of a plan if needed."""

    call_us: Annotated[list[Microseconds], Field(min_length=1)]
    plan_us: list[Microseconds] = Field(default_factory=list)


class Memory(Section):
    """Bytes on the GPU: the cache of one KV set, and what else a call needed (q and out apart)."""

    cache_bytes: Count
    workspace_bytes: Count


def _kind_of_call(fields: object) -> str:
    has_key_heads = "d_qk" in fields if isinstance(fields, dict) else isinstance(fields, PrefillWorkload)
    return PREFILL_CALL if has_key_heads else DECODE_CALL


DECODE_CALL, PREFILL_CALL = "(decode)", "(prefill)"  # not part of a field's name
AnyWorkload = Annotated[
    Annotated[Workload, Tag(DECODE_CALL)] | Annotated[PrefillWorkload, Tag(PREFILL_CALL)],
    Discriminator(_kind_of_call),
]


def rounds_more(implementation: str) -> bool:
    """Whether its errors are measured by the peers' limits."""
    return implementation.startswith((PEER, ALTERNATIVE))


class Point(Measurement):
    """One implementation at one workload.

    ``implementation``: "mla_kernels", one variant of it as ``mla_kernels.tuning`` writes it
    ("mla_kernels[rows=64,ahead_boxes=1]"), a block ("block:stream", "block:mma", "block:skeleton"), a peer
    ("peer:flash_mla" ...) or what one does instead ("alternative:padded" ...).
    ``kv_sets``: KV caches (of prefill: queries, keys and values) rotated through; 1 means that the same are
    read again by every call.
    ``counters``: of one call, from the profiler; where they were asked for and not had, null and a reason.
    """

    implementation: str
    workload: AnyWorkload
    status: Literal["ok", "failed", "skipped"]
    reason: str | None = None
    error: Accuracy | None = None
    kv_sets: Annotated[int, Field(ge=0)] = 0
    host: Host | None = None
    memory: Memory | None = None
    counters: dict[str, float] | None = None
    counters_reason: str | None = None

    @property
    def is_attention(self) -> bool:
        """False for building blocks, whose output means nothing and cannot be checked."""
        return not self.implementation.startswith("block:")

    @property
    def is_peer(self) -> bool:
        """Whether this is somebody else's implementation."""
        return self.implementation.startswith(PEER)

    @model_validator(mode="after")
    def _check(self) -> Point:
        if self.status != "ok":
            if not self.reason:
                raise ValueError(f"status is {self.status!r}, so `reason` must say why")
            if self.samples_us or self.sustained:
                raise ValueError(f"status is {self.status!r}, so there must be no samples")
            return self
        self.require_samples()
        if self.kv_sets < 1:
            raise ValueError("a timed point needs kv_sets >= 1")
        if self.is_attention:
            if self.error is None:
                raise ValueError("no time without a correctness check: `error` is null")
            prefill = isinstance(self.workload, PrefillWorkload)
            if excess := self.error.excess(self.workload.dtype, rounds_more(self.implementation), prefill):
                raise ValueError(f"no time for a wrong result: {excess}")
        elif self.error is not None:
            raise ValueError("a building block computes no attention, so `error` must be null")
        return self


class Suite(Section):
    passed: Count
    failed: Count
    skipped: Count


class Verification(Section):
    """Outcome of the GPU tests: counts by suite; worst error by name, e.g. "out_rel_l2/bf16"."""

    suites: dict[str, Suite]
    worst: dict[str, float]


class Variant(Section):
    """An entry of a tuning table: ``Cost`` of mla_kernels.choice, ``DecodeTuning`` of mla_kernels.tuning."""

    start_us: Annotated[float, Field(gt=0)]
    tile_us: Annotated[float, Field(gt=0)]
    merge_us: Annotated[float, Field(gt=0)]
    rows: Count
    group_slots: Count
    rotary_slots: Count
    value_registers: Count
    score_registers: Count
    producer_registers: Count
    item_units: Count
    min_tiles: Count
    align_percent: Annotated[int, Field(ge=0)]
    register_steps: Count
    ahead_boxes: Count
    programmatic: bool


class Record(Section):
    schema_version: Literal[READABLE_VERSIONS] = SCHEMA_VERSION
    experiment: str
    run: Run
    source: Source
    device: Device
    software: Software
    method: Method | None = None
    ceilings: list[Ceiling] = Field(default_factory=list)
    points: list[Point] = Field(default_factory=list)
    verification: Verification | None = None
    tuning: list[Variant] | None = None  # the tuner's table
    latencies: list[Latency] = Field(default_factory=list)
    footprints: list[Footprint] = Field(default_factory=list)
    churns: list[Churn] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> Record:
        if self.tuning is not None:
            TuningTable.from_json([variant.model_dump() for variant in self.tuning])
        return self


def load_record(path: str | os.PathLike) -> Record:
    """Read and validate a record. Raises RecordError for anything but a whole record of this schema."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordError(path, "(file)", "does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(path, "(file)", f"cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise RecordError(path, "(file)", "is empty")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RecordError(path, "(file)", f"is not whole JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RecordError(path, "(file)", f"holds a JSON {type(fields).__name__}, not an object")
    if (version := fields.get("schema_version")) not in READABLE_VERSIONS:
        found = f"is {version!r}, this code reads {', '.join(map(str, READABLE_VERSIONS))}"
        raise RecordError(path, "schema_version", found, "use the matching version of the code, or " + REMEDY)
    try:
        return Record.model_validate(fields)
    except ValidationError as error:
        raise RecordError(path, *_first_problem(error)) from None


def save_record(record: Record, path: str | os.PathLike) -> None:
    """Write a record so that ``path`` holds either the old or the new one whole, whenever the process dies.

    Raises RecordError, and writes nothing, when the record is not valid.
    """
    path = Path(path)
    try:  # again: model_copy and model_construct skip validation
        record = Record.model_validate(record.model_dump())
    except ValidationError as error:
        raise RecordError(path, *_first_problem(error), "nothing was written") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_to_json(record))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp makes it private
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _to_json(record: Record) -> str:
    """Indented, but with each list of numbers on one line: a diff of records stays readable."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    numbers = re.compile(r"\[\n([-+\d.eE,\s]*?)\n\s*\]")  # a JSON string holds no raw newline
    return numbers.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n"


def _first_problem(error: ValidationError) -> tuple[str, str]:
    """(dotted field, what was found) of the first of pydantic's errors, with the number of the others."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    place = [str(part) for part in first["loc"] if part not in (DECODE_CALL, PREFILL_CALL)]
    field = ".".join(place) or "(file)"
    value = repr(first["input"])
    shown = "" if first["type"] == "missing" else f" (found {value[:80]}{'…' if len(value) > 80 else ''})"
    more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
    return field, f"{first['msg']}{shown}{more}"
