"""Records of a card that follows a formula exactly, so that every finding has a known answer."""

import datetime
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from mla_kernels.compiler import source_digest
from mla_kernels.measure import experiment, figures, measurements, records
from mla_kernels.measure.experiments import EXPERIMENTS
from mla_kernels.measure.workloads import sets_to_defeat_l2

CARD = SimpleNamespace(
    read=4.0,  # TB/s
    matmul=800.0,  # TFLOP/s
    fixed_us=10.0,
    read_share=0.9,  # of decode's bytes
    matmul_share=0.75,
    held=0.8,  # sustained over burst, arithmetic alone
    l2_bytes=60 << 20,
    l2_gain=1.5,
    uneven=1.04,
    static_w=100.0,
    w_per_tb_s=80.0,
    w_per_tflops=0.5,
)
BLOCK_SPEED = {"mla_kernels": 1.0, "block:stream": 1.05, "block:mma": 1.2, "block:skeleton": 1.1}
PEER_SPEED = {"peer:flash_mla": 0.7, "peer:fa3": 0.75, "peer:flashinfer_fa3": 0.8, "peer:flashinfer_fa2": 0.6}
SLOW_SPEED = 0.1
PEER_ERROR = 1.1e-3
CACHE_BYTES, WORKSPACE_BYTES = 1_000_000, 10_000


def us_of(implementation, workload, mode, kv_sets):
    """Time of a call on the card."""
    read, matmul = CARD.read * CARD.read_share, CARD.matmul * CARD.matmul_share
    if mode == "sustained":
        matmul *= CARD.held
    if kv_sets == 1 and figures.kv_bytes(workload) < CARD.l2_bytes:
        read *= CARD.l2_gain
    silent = records.Point.model_construct(implementation=implementation, workload=workload)
    us = max(figures.point_bytes(silent) / read, figures.point_flop(silent) / matmul) / 1e6
    if workload.lengths_kind != "uniform":
        us *= CARD.uneven
    return (CARD.fixed_us + us) / (BLOCK_SPEED | PEER_SPEED).get(implementation, SLOW_SPEED)


def make_point(implementation, workload, mode="burst", kv_sets=None, *, us=None, **fields):
    """A timed point of the card; keyword arguments replace what it would give."""
    kv_sets = kv_sets or sets_to_defeat_l2(workload, CARD.l2_bytes)
    us = us or us_of(implementation, workload, mode, kv_sets)
    point = {
        "implementation": implementation,
        "workload": workload,
        "mode": mode,
        "status": "ok",
        "kv_sets": kv_sets,
        "samples_us": [us] * 15,
        "calls_per_sample": 20,
    }
    if not implementation.startswith("block:"):
        point["error"] = _error(implementation, workload)
    if mode == "sustained":
        rates = [count / us / 1e6 for count in _counts(implementation, workload)]
        power = CARD.static_w + CARD.w_per_tb_s * rates[0] + CARD.w_per_tflops * rates[1]
        point["sustained"] = _window(us, power)
    return records.Point(**point | fields)


def _error(implementation, workload):
    error = PEER_ERROR if implementation.startswith("peer:") else 1e-3
    if workload.dtype == "fp16":
        error /= 8
    return records.Accuracy(out_rel_l2=error, lse_max_abs=1e-6, reference="fp64 oracle")


def _host_and_memory(implementation):
    """Ours calls in 9 µs, peers in 30; a decompressed cache is 30 times as large."""
    peer, large = implementation.startswith("peer:"), implementation.endswith("decompressed")
    return {
        "host": records.Host(call_us=[30.0 if peer else 9.0] * 9, plan_us=[50.0] if peer else []),
        "memory": records.Memory(
            cache_bytes=CACHE_BYTES * (30 if large else 1),
            workspace_bytes=WORKSPACE_BYTES * (5 if peer else 1),
        ),
    }


def _counts(implementation, workload):
    silent = records.Point.model_construct(implementation=implementation, workload=workload)
    return figures.point_bytes(silent), figures.point_flop(silent)


def _window(us, power):
    calls = 30_000
    seconds = us * 1e-6 * calls
    return measurements.Sustained(
        seconds=seconds,
        calls=calls,
        ramp_seconds=1.0,
        energy_j=power * seconds,
        power_samples_w=[power],
        sm_mhz_samples=[1500],
        throttle=["sw_power_cap"],
    )


def make_record(name, points, **sections):
    """A whole record of the sources of this tree, with the card's ceilings."""
    ceilings = []
    for mode, held in (("burst", 1.0), ("sustained", CARD.held)):
        for ceiling, work in (
            (figures.HBM_READ, {"bytes": 4 * 10**9}),
            (figures.MATMUL, {"flop": 8 * 10**11}),
        ):
            us = (
                work["bytes"] / CARD.read / 1e6
                if "bytes" in work
                else work["flop"] / CARD.matmul / held / 1e6
            )
            timed = {"samples_us": [us] * 15, "calls_per_sample": 3, "mode": mode}
            timed |= {"sustained": _window(us, 600.0)} if mode == "sustained" else {}
            ceilings.append(measurements.Ceiling(name=ceiling, **work, **timed))
    kernel = {"options": ["-arch=sm_90a"], "cubin_sha256": "b" * 64, "registers": 168, "stack_bytes": 0}
    defaults = {
        "experiment": name,
        "run": records.Run(
            id="20260101T000000Z-0123456",
            utc=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
            commit="0123456789abcdef0123456789abcdef01234567",
            dirty=False,
            command=f"python -m mla_kernels.measure record {name}",
        ),
        "source": records.Source(
            kernels=[
                records.Kernel(name=f, source=f, digest=source_digest(f), shared_bytes=1024, **kernel)
                for f in ("decode_rows.cu", "decode_swapped.cu")
            ]
        ),
        "device": records.Device(
            name="NVIDIA H200",
            compute_capability="9.0",
            driver="580.0",
            sms=132,
            l2_bytes=CARD.l2_bytes,
            memory_bytes=141 * 10**9,
            sm_clock_max_mhz=1980,
            mem_clock_max_mhz=3201,
            power_limit_w=700.0,
        ),
        "software": records.Software(
            python="3.12.3", torch="2.11.0", cupy="14.2.0", nvrtc="13.0", triton=None, platform="Linux-x86_64"
        ),
        "ceilings": ceilings,
        "points": points,
    }
    return records.Record(**defaults | sections)


def _measured(name):
    points = []
    for step in experiment.each_of(experiment.merge(list(EXPERIMENTS[name].steps("live")))):
        sets = sets_to_defeat_l2(step.workload, CARD.l2_bytes) if step.rotate else 1
        for implementation in step.implementations:
            extra = {}
            if step.host and not implementation.startswith("block:"):
                extra = _host_and_memory(implementation)
            points.append(make_point(implementation, step.workload, "burst", sets, **extra))
        points += [make_point(i, step.workload, "sustained", sets) for i in step.sustain]
    return make_record(name, points)


@pytest.fixture(scope="session")
def roofline():
    return _measured("roofline")


@pytest.fixture(scope="session")
def bandwidth():
    return _measured("bandwidth")


@pytest.fixture(scope="session")
def record_of_peers():
    return _measured("peers")


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """Figures as the notebook would get them: a list of PNG files."""
    files = []

    def keep():
        files.append(tmp_path / f"{len(files)}.png")
        plt.gcf().savefig(files[-1], bbox_inches="tight", dpi="figure")  # as the notebook does

    monkeypatch.setattr(plt, "show", keep)
    return files


@pytest.fixture(scope="session")
def card():
    """The card's constants, and makers of points and records on it."""
    return SimpleNamespace(**vars(CARD), point=make_point, record=make_record)
