"""The output of ncu, and what happens where ncu is missing, forbidden or of another version."""

import stat
import textwrap

import pytest

from mla_kernels.measure.counters import METRICS, CountersUnavailable, parse_csv, profile
from mla_kernels.measure.workloads import uniform

# Layout of `ncu --csv --metrics ...` (Nsight Compute 2022.3 and later): a row for each kernel and metric,
# thousands separated, lines of ncu and of the program around the table.
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
ROW = (
    '"{id}","2583","python3","127.0.0.1","{kernel}","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0",'
    '"Command line profiler metrics","{metric}","{unit}","{value}"'
)


def table(*rows):
    lines = [ROW.format(id=i, kernel=k, metric=m, unit=u, value=v) for i, k, m, u, v in rows]
    return "\n".join(["==PROF== Connected to process 2583 (/usr/bin/python3.12)", HEADER, *lines])


TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
DECODE = "void decode<64, 128>(Params, int)"
TWO_KERNELS = table(
    (0, DECODE, "dram__bytes_read.sum", "byte", "604,012,288"),
    (0, DECODE, "gpu__time_duration.sum", "ns", "150,000"),
    (0, DECODE, TENSOR, "%", "48.00"),
    (1, "merge(float *)", "dram__bytes_read.sum", "byte", "1,024"),
    (1, "merge(float *)", "gpu__time_duration.sum", "ns", "50,000"),
    (1, "merge(float *)", TENSOR, "%", "0"),
)


def test_kernels_of_a_call_are_added_up():
    counters = parse_csv(TWO_KERNELS + "\n==PROF== Disconnected from process 2583\n")
    assert counters == {
        "dram_read_bytes": 604_013_312.0,
        "duration_ns": 200_000.0,
        "tensor_pipe_active_pct": 36.0,
        "kernels": 2.0,
    }


def test_units_that_ncu_scaled():
    rows = [
        (0, DECODE, "dram__bytes_read.sum", "Mbyte", "604.01"),
        (0, DECODE, "gpu__time_duration.sum", "us", "150"),
    ]
    counters = parse_csv(table(*rows))
    assert counters["dram_read_bytes"] == pytest.approx(604.01e6) and counters["duration_ns"] == 150_000


def test_a_metric_without_a_number_is_absent_not_zero():
    counters = parse_csv(
        table(
            (0, DECODE, "dram__bytes_read.sum", "byte", "n/a"),
            (0, DECODE, "dram__bytes_write.sum", "byte", "0"),
        )
    )
    assert counters == {"dram_write_bytes": 0.0, "kernels": 1.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no table"),
        ("==PROF== Connected\n==WARNING== No kernels were profiled.\n", "No kernels were profiled"),
        (table((0, DECODE, "dram__bytes_read.sum", "byte", "n/a")), "none of the metrics"),
    ],
)
def test_no_counters_is_a_reason(text, reason):
    with pytest.raises(CountersUnavailable, match=reason):
        parse_csv(text)


@pytest.fixture
def profile_with(tmp_path, monkeypatch):
    """profile() where PATH holds nothing but this script, as ``ncu``."""

    def call(script=None):
        if script is not None:
            ncu = tmp_path / "ncu"
            ncu.write_text("#!/bin/sh\n" + textwrap.dedent(script))
            ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        return profile("mla_kernels", uniform(1, 64, h_q=16))

    return call


def test_without_ncu(profile_with):
    with pytest.raises(CountersUnavailable, match="not on PATH"):
        profile_with()


def test_without_permission(profile_with):
    script = 'echo "==PROF== Connected"; echo "==ERROR== ERR_NVGPUCTRPERM - no permission" >&2; exit 1'
    with pytest.raises(CountersUnavailable, match="ERR_NVGPUCTRPERM"):
        profile_with(script)


def test_a_metric_that_ncu_lacks_is_dropped(profile_with, tmp_path):
    (tmp_path / "table.csv").write_text(TWO_KERNELS)
    counters = profile_with(f"""\
        case "$*" in *{TENSOR}*) echo "==ERROR== Failed to find metric {TENSOR}"; exit 9;; esac
        while read -r line; do echo "$line"; done < {tmp_path}/table.csv
        """)
    assert counters["dram_read_bytes"] == 604_013_312.0


def test_what_ncu_is_asked(profile_with, tmp_path):
    profile_with(f"""\
        for argument in "$@"; do echo "$argument"; done > {tmp_path}/arguments
        while read -r line; do echo "$line"; done <<'END'
        {TWO_KERNELS.replace(chr(10), chr(10) + " " * 8)}
        END
        """)
    asked = (tmp_path / "arguments").read_text().splitlines()
    assert asked[asked.index("--clock-control") + 1] == "none"
    assert asked[asked.index("--metrics") + 1].split(",") == list(METRICS)
    assert asked[asked.index("-m") + 1] == "mla_kernels.measure.counters"
