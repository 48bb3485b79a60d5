"""Records to test with: valid ones, built part by part."""

import datetime

import pytest

from mla_kernels.measure.measurements import Ceiling, Sustained
from mla_kernels.measure.records import (
    Accuracy,
    Device,
    Kernel,
    Method,
    Point,
    Record,
    Run,
    Software,
    Source,
    Workload,
)


@pytest.fixture(scope="session")  # factories without state, which hypothesis may share
def make_point():
    """A timed point; keyword arguments replace its fields, ``us`` its samples."""

    def make(
        implementation="mla_kernels", *, us=100.0, power_w=None, lengths=(4096, 4096), h_q=16, s_q=1, **fields
    ):
        workload = Workload(b=len(lengths), h_q=h_q, s_q=s_q, mean_len=lengths[0], lengths=lengths)
        sustained = None
        if power_w is not None:
            sustained = Sustained(
                seconds=us * 1e-6 * 30_000,
                calls=30_000,
                ramp_seconds=1.0,
                energy_j=power_w * us * 1e-6 * 30_000,
                power_samples_w=[power_w],
                sm_mhz_samples=[1500],
                throttle=["sw_power_cap"],
            )
        error = Accuracy(out_rel_l2=1e-3, lse_max_abs=1e-6, reference="fp64 oracle, all 2 sequences")
        defaults = {
            "implementation": implementation,
            "workload": workload,
            "status": "ok",
            "mode": "burst" if sustained is None else "sustained",
            "kv_sets": 3,
            "samples_us": [us] * 15,
            "calls_per_sample": 20,
            "sustained": sustained,
            "error": None if implementation.startswith("block:") else error,
        }
        return Point(**defaults | fields)

    return make


@pytest.fixture(scope="session")
def make_record(make_point):
    """A whole record; keyword arguments replace its sections."""

    def make(**sections):
        kernel = Kernel(
            name="decode",
            source="decode.cu",
            digest="a" * 64,
            options=["-arch=sm_90a"],
            cubin_sha256="b" * 64,
            registers=168,
            stack_bytes=0,
            shared_bytes=1024,
        )
        samples = {"samples_us": [1000.0] * 15, "calls_per_sample": 3, "mode": "burst"}
        defaults = {
            "experiment": "roofline",
            "run": Run(
                id="20260101T000000Z-0123456",
                utc=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
                commit="0123456789abcdef0123456789abcdef01234567",
                dirty=False,
                command="python -m mla_kernels.measure record roofline",
            ),
            "source": Source(kernels=[kernel]),
            "device": Device(
                name="NVIDIA H200",
                compute_capability="9.0",
                driver="580.0",
                sms=132,
                l2_bytes=60 << 20,
                memory_bytes=141 * 10**9,
                sm_clock_max_mhz=1980,
                mem_clock_max_mhz=3201,
                power_limit_w=700.0,
            ),
            "software": Software(
                python="3.12.3",
                torch="2.11.0",
                cupy="14.2.0",
                nvrtc="13.0",
                triton=None,
                platform="Linux-x86_64",
            ),
            "method": Method(
                timer="events",
                warmup="4",
                rounds=15,
                l2_rotation_bytes=1,
                graph=True,
                seed=0,
                sustained_seconds=3.0,
            ),
            "ceilings": [
                Ceiling(name="hbm_read", bytes=4_000_000_000, **samples),
                Ceiling(name="matmul_bf16_8192", flop=800_000_000_000, **samples),
            ],
            "points": [make_point()],
        }
        return Record(**defaults | sections)

    return make
