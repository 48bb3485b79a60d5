"""A record survives the disk whole, and anything else is refused with its file and field."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mla_kernels.measure.measurements import Telemetry
from mla_kernels.measure.records import (
    Accuracy,
    Point,
    RecordError,
    Verification,
    Workload,
    load_record,
    save_record,
)

microseconds = st.floats(1e-3, 1e7)
telemetry = st.builds(
    Telemetry,
    sm_mhz=st.none() | st.integers(0, 3000),
    mem_mhz=st.none() | st.integers(0, 5000),
    power_w=st.none() | st.floats(0, 1000),
    temperature_c=st.none() | st.floats(0, 100),
    throttle=st.lists(st.text(max_size=20), max_size=3),
)


@st.composite
def points(draw):
    lengths = draw(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=8))
    workload = Workload(
        b=len(lengths),
        h_q=draw(st.integers(1, 512)),
        s_q=draw(st.integers(1, 8)),
        dtype=draw(st.sampled_from(["bf16", "fp16"])),
        lengths_kind="explicit",
        mean_len=sum(lengths) / len(lengths),
        lengths=lengths,
    )
    common = {
        "implementation": draw(st.sampled_from(["mla_kernels", "peer µ"])),
        "workload": workload,
        "mode": "burst",
    }
    if draw(st.booleans()):
        return Point(
            **common, status=draw(st.sampled_from(["failed", "skipped"])), reason=draw(st.text(min_size=1))
        )
    return Point(
        **common,
        status="ok",
        error=Accuracy(out_rel_l2=draw(st.floats(0, 5e-4)), lse_max_abs=None, reference=draw(st.text())),
        samples_us=draw(st.lists(microseconds, min_size=1, max_size=20)),
        calls_per_sample=draw(st.integers(1, 1000)),
        kv_sets=draw(st.integers(1, 1000)),
        before=draw(st.none() | telemetry),
        after=draw(st.none() | telemetry),
        counters=draw(st.none() | st.dictionaries(st.text(max_size=9), st.floats(0, 1e15), max_size=3)),
    )


@given(drawn=st.lists(points(), max_size=3))
@settings(max_examples=60, deadline=None)
def test_round_trip_is_exact(drawn, tmp_path_factory, make_record):
    path = tmp_path_factory.mktemp("record") / "r.json"
    record = make_record(points=drawn)
    save_record(record, path)
    assert load_record(path) == record


def test_lists_of_numbers_stay_on_one_line(tmp_path, make_record):
    save_record(make_record(), tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert '"lengths": [4096, 4096]' in text
    assert len(text.splitlines()) < 200


def refused(path) -> RecordError:
    with pytest.raises(RecordError) as caught:
        load_record(path)
    error = caught.value
    assert str(path) in str(error) and error.field in str(error) and error.remedy in str(error)
    return error


@pytest.fixture
def saved(tmp_path, make_record):
    path = tmp_path / "roofline.json"
    save_record(make_record(), path)
    return path


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_truncated(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    assert "not whole JSON" in refused(saved).found


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[1]", "a JSON list, not an object"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"schema_version": 1} {"schema_version": 1}', "not whole JSON"),
    ],
)
def test_not_a_record(tmp_path, content, found):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    error = refused(path)
    assert found in error.found and error.field == "(file)"


def test_missing_file(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.json").found


@pytest.mark.parametrize("version", [0, 6, "1", None])
def test_foreign_schema_version(saved, version):
    fields = json.loads(saved.read_text())
    saved.write_text(json.dumps(fields | {"schema_version": version}))
    error = refused(saved)
    assert error.field == "schema_version" and error.found == f"is {version!r}, this code reads 1, 2, 3, 4, 5"


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        (("device", "colour"), "green", "device.colour"),
        (("points", 0, "tflops"), 600.0, "points.0.tflops"),
        (("points", 0, "samples_us", 3), "fast", "points.0.samples_us.3"),
        (("points", 0, "samples_us", 3), -1.0, "points.0.samples_us.3"),
        (("points", 0, "samples_us", 3), math.inf, "points.0.samples_us.3"),
        (("points", 0, "error", "out_rel_l2"), math.nan, "points.0.error.out_rel_l2"),
        (("points", 0, "error", "out_rel_l2"), 0.5, "points.0"),
        (("points", 0, "error"), None, "points.0"),
        (("points", 0, "workload", "b"), 7, "points.0.workload"),
        (("run", "commit"), "main", "run.commit"),
        (("source", "kernels", 0, "digest"), "a" * 63, "source.kernels.0.digest"),
        (("ceilings", 0, "flop"), 1, "ceilings.0"),
    ],
)
def test_bad_field_is_named(saved, place, value, field):
    fields = json.loads(saved.read_text())
    inner = fields
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    saved.write_text(json.dumps(fields))
    assert refused(saved).field == field


def test_missing_field_is_named(saved):
    fields = json.loads(saved.read_text())
    del fields["device"]["sms"]
    saved.write_text(json.dumps(fields))
    error = refused(saved)
    assert (error.field, error.found) == ("device.sms", "Field required")


@pytest.mark.parametrize(
    "change",
    [
        {"error": None},
        {"error": Accuracy(out_rel_l2=4e-3, lse_max_abs=0, reference="oracle")},
        {"error": Accuracy(out_rel_l2=0, lse_max_abs=2e-5, reference="oracle")},
        {"samples_us": []},
        {"calls_per_sample": 0},
        {"kv_sets": 0},
        {"mode": "sustained"},
        {"status": "failed"},
        {"status": "failed", "reason": "it was slow"},
        {"implementation": "block:mma", "error": Accuracy(out_rel_l2=0, lse_max_abs=0, reference="oracle")},
    ],
)
def test_no_time_without_a_passed_check(make_point, change):
    with pytest.raises(ValidationError):
        make_point(**change)


def test_an_invalid_record_is_not_written(saved, make_record):
    before = saved.read_bytes()
    invalid = make_record().model_copy(update={"experiment": None})
    with pytest.raises(RecordError, match=r"experiment.*nothing was written"):
        save_record(invalid, saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_verification_section(tmp_path, make_record):
    verification = Verification(
        suites={"decode": {"passed": 3, "failed": 0, "skipped": 1}}, worst={"out_rel_l2/bf16": 2e-3}
    )
    record = make_record(experiment="verification", points=[], method=None, verification=verification)
    save_record(record, tmp_path / "v.json")
    assert load_record(tmp_path / "v.json").verification == verification


WRITER = """
import sys
from mla_kernels.measure.records import load_record, save_record
path = sys.argv[1]
record = load_record(path)
many = record.model_copy(update={"points": record.points * 200})
print("writing", flush=True)
while True:
    save_record(many, path)
    save_record(record, path)
"""


def test_a_killed_writer_leaves_a_whole_record(saved):
    sizes = set()
    for delay in (0.0, 0.05, 0.1, 0.15):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, saved], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "writing\n"
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline:  # a reader meets only whole files either
            sizes.add(len(load_record(saved).points))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        sizes.add(len(load_record(saved).points))
        if len(load_record(saved).points) != 1:  # the next writer starts from the small one
            record = load_record(saved)
            save_record(record.model_copy(update={"points": record.points[:1]}), saved)
    assert sizes <= {1, 200}
