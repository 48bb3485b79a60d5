"""Hardware counters of one call, read by Nsight Compute (``ncu``) where it is on PATH.

The parent runs ``ncu`` on this module as a script; the script prepares a workload and puts one call between
cudaProfilerStart and cudaProfilerStop. Several kernels of one call are added up (percentages by duration).

    python -m mla_kernels.measure.counters --implementation mla_kernels --workload "$WORKLOAD_AS_JSON"
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .records import Workload

# Our name for each metric of ncu. lts sectors are 32 bytes; xbar2l1tex is what goes from L2 to the SMs.
METRICS = {
    "dram__bytes_read.sum": "dram_read_bytes",
    "dram__bytes_write.sum": "dram_write_bytes",
    "l1tex__m_xbar2l1tex_read_bytes.sum": "l2_to_sm_bytes",
    "lts__t_sectors_op_read.sum": "l2_read_sectors",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor_pipe_active_pct",
    "gpu__time_duration.sum": "duration_ns",
}
UNIT_SCALE = {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6}
TIMEOUT_SECONDS = 120


class CountersUnavailable(RuntimeError):
    """There are no counters; the message is the reason a record gives."""


def profile(implementation: str, workload: Workload) -> dict[str, float]:
    """Counters of one call with a cold L2, by our names. Raises CountersUnavailable."""
    if (ncu := shutil.which("ncu")) is None:
        raise CountersUnavailable("ncu (Nsight Compute) is not on PATH")
    script = [sys.executable, "-m", __name__, "--implementation", implementation]
    script += ["--workload", workload.model_dump_json()]
    metrics = dict(METRICS)
    while metrics:
        # Clocks stay as they are. ncu flushes caches before a pass by default: a cold L2, like a rotation.
        options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
        options += ["--csv", "--print-units", "base", "--metrics", ",".join(metrics)]
        text = _run([ncu, *options, *script])
        missing = [name for name in metrics if re.search(rf"Failed to find metric.*{re.escape(name)}", text)]
        if not missing:
            return parse_csv(text)
        for name in missing:  # this ncu or this GPU lacks it: ask for the others
            del metrics[name]
    raise CountersUnavailable("ncu knows none of the metrics asked for")


def _run(command: list[str]) -> str:
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CountersUnavailable(f"ncu: {type(error).__name__} after at most {TIMEOUT_SECONDS} s") from error
    text = result.stdout + result.stderr
    if result.returncode != 0 and "Failed to find metric" not in text:
        raise CountersUnavailable(f"ncu exited with {result.returncode}: {_complaint(text)}")
    return text


def _complaint(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line]
    return (errors or lines[-1:] or ["no output"])[0][:300]


def parse_csv(text: str) -> dict[str, float]:
    """Counters from the output of ``ncu --csv``, in bytes, sectors, ns and percent, by our names.

    Lines of ncu and the program may surround the table. Raises CountersUnavailable where it holds no number.
    """
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if header is None:
        raise CountersUnavailable(f"ncu printed no table: {_complaint(text)}")
    table = [line for line in lines[header:] if line.startswith('"')]
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(table))):
        name = METRICS.get(row["Metric Name"])
        value = _to_number(row["Metric Value"], row["Metric Unit"])
        if name is not None and value is not None:
            launches.setdefault(row["ID"], {})[name] = value
    if not launches:
        raise CountersUnavailable("ncu measured none of the metrics asked for")
    return _add_up(list(launches.values()))


def _to_number(value: str, unit: str) -> float | None:
    try:
        return float(value.replace(",", "")) * UNIT_SCALE.get(unit, 1.0)
    except ValueError:  # "n/a"
        return None


def _add_up(launches: list[dict[str, float]]) -> dict[str, float]:
    """Sum over the kernels of a call, percentages weighted by duration; of metrics that all of them have."""
    names = set.intersection(*(set(launch) for launch in launches))
    weights = [launch.get("duration_ns", 1.0) for launch in launches]
    total = {}
    for name in sorted(names):
        if name.endswith("_pct"):
            total[name] = sum(w * x[name] for w, x in zip(weights, launches, strict=True)) / sum(weights)
        else:
            total[name] = sum(launch[name] for launch in launches)
    return total | {"kernels": float(len(launches))}


def main() -> None:
    """The profiled script: one call of an implementation between the profiler's start and stop."""
    parser = argparse.ArgumentParser(prog="python -m mla_kernels.measure.counters", description=main.__doc__)
    parser.add_argument("--implementation", required=True)
    parser.add_argument("--workload", required=True, type=Workload.model_validate_json, help="JSON")
    arguments = parser.parse_args()

    import torch

    from .points import bind
    from .workloads import materialize

    call = bind(arguments.implementation, materialize(arguments.workload)).calls[0]
    call()  # compiles, loads, allocates
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
