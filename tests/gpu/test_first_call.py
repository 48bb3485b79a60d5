"""How long a process's first call takes: with nothing compiled, and with the cubins of another process."""

import os
import subprocess
import sys

import pytest

COLD, WARM = 3.0, 0.3  # seconds

PROCESS = """
import time
import torch
from mla_kernels import mla_decode
q = torch.zeros(1, 1, 128, 576, dtype=torch.bfloat16, device="cuda")
kv_cache = torch.zeros(64, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
table = torch.arange(64, dtype=torch.int32, device="cuda")[None]
lengths = torch.full((1,), 4096, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
mla_decode(q, kv_cache, table, lengths)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call(cache) -> float:
    environment = os.environ | {"MLA_KERNELS_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.fixture(scope="module")
def times(tmp_path_factory, worst) -> tuple[float, float]:
    cache = tmp_path_factory.mktemp("cubins")
    cold, warm = first_call(cache), first_call(cache)
    worst |= {"first call, nothing compiled (s)": cold, "first call, cubins there (s)": warm}
    return cold, warm


def test_first_call_compiles_quickly(times):
    assert times[0] <= COLD


def test_first_call_with_compiled_kernels(times):
    assert times[1] <= WARM
