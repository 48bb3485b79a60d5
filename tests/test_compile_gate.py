"""What every shipped kernel became, proved without a GPU: none spills, none loses its tensor cores."""

import os

import pytest

from mla_kernels import append, chunk_steps, compiler, decode, plan
from mla_kernels.tuning import PAIR_ROWS, VARIANTS

BLOCKS = ("stream", "mma", "skeleton")
# A tile's groups and its rotary box; queries by themselves, or as a tile of their own.
TMA_LOADS = {"decode_swapped.cu": 2 + 1, "decode_rows.cu": 2 + 2}
# In pieces: a group by one instruction, the other by another, and the rotary box. Queries by
# themselves, or the same way. Gathered tokens: none.
IN_PIECES = {"decode_swapped.cu": 1 + 2 + 1, "decode_rows.cu": 2 * (1 + 2)}
QUERY_LOADS = {"decode_swapped.cu": 1, "decode_rows.cu": 0}  # of the block that loads no tiles
MOST_CODE_BYTES = 125 * 1024  # 64 rows' 154 KB left the instruction cache between launches (04's log)


PAIRS = [config for config in decode.shipped_configs() if config.source == "decode_pair.cu"]
OTHERS = [config for config in decode.shipped_configs() if config not in PAIRS]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.name)
def test_shipped_kernel(config):
    kernel = compiler.compile_kernel(config)
    report = compiler.resource_report(kernel)
    assert report.stack_bytes == 0, "a register array with a run-time index, or spills"
    assert (report.local_loads, report.local_stores) == (0, 0)
    assert report.hgmma > 0, "no tensor-core instruction"
    loads = {0: IN_PIECES, 1: QUERY_LOADS}.get(dict(config.defines)["MLA_PAGE_SIZE"], TMA_LOADS)
    assert report.utmaldg == loads[config.source]
    assert report.registers <= 128, "512 threads leave 128 registers each at launch"
    assert report.code_bytes <= MOST_CODE_BYTES, "code that runs once has to be short"
    assert report.shared_bytes <= 228 * 1024
    assert "C75" not in kernel.log, f"ptxas serialized WGMMA or ignored setmaxnreg: {kernel.log}"


PAIR_BLOCKS = [VARIANTS[PAIR_ROWS].kernel_config("bf16", work) for work in BLOCKS]


@pytest.mark.parametrize("config", [*PAIRS, *PAIR_BLOCKS], ids=lambda config: config.name)
def test_pair_of_ctas(config):
    kernel = compiler.compile_kernel(config)
    report = compiler.resource_report(kernel)
    assert (report.stack_bytes, report.local_loads, report.local_stores) == (0, 0, 0)
    work = dict(config.defines)["MLA_WORK"]
    assert (report.hgmma > 0) == (work != 1)
    assert report.utmaldg == (0 if work == 2 else 2 * 5), "tiles and queries: four boxes and half a box each"
    assert report.registers == 168, "384 threads leave so many each at launch"
    assert report.code_bytes <= MOST_CODE_BYTES, "code that runs once has to be short"
    assert report.shared_bytes <= 228 * 1024
    assert "C75" not in kernel.log, f"ptxas serialized WGMMA or ignored setmaxnreg: {kernel.log}"


COPYING = [*append.APPEND.values(), chunk_steps.GATHER, *chunk_steps.MERGE.values()]


@pytest.mark.parametrize("config", COPYING, ids=lambda config: config.name)
def test_kernels_that_copy(config):
    report = compiler.resource_report(compiler.compile_kernel(config))
    assert (report.stack_bytes, report.local_loads, report.local_stores) == (0, 0, 0)
    assert report.registers <= 64, "four CTAs of 256 threads an SM, or bandwidth suffers"


@pytest.mark.parametrize("query_rows", [16, 64])
@pytest.mark.parametrize("work", BLOCKS)
def test_building_block(work, query_rows):
    import torch

    config = plan.kernel_config(torch.bfloat16, query_rows, b=128, pages=64, variant=work)
    assert dict(config.defines)["MLA_ROWS"] == query_rows
    report = compiler.resource_report(compiler.compile_kernel(config))
    assert report.stack_bytes == 0 and report.local_loads == 0
    assert (report.hgmma > 0) == (work != "stream")
    assert report.utmaldg == (QUERY_LOADS if work == "mma" else TMA_LOADS)[config.source]


def test_plain_sm_90_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "ARCH", "sm_90")
    with pytest.raises(compiler.CompileError, match=r"wgmma|setmaxnreg"):
        compiler.compile_kernel(decode.shipped_configs()[0])
    assert not list(tmp_path.glob("*.cubin"))


def test_a_stack_frame_is_seen(monkeypatch, tmp_path):
    """The gate's own eyes: an array of registers indexed at run time must not pass."""
    (tmp_path / "indexed.cu").write_text(
        'extern "C" __global__ void indexed(float* out, int n) {\n'
        "    float values[64];\n"
        "    for (int i = 0; i < 64; ++i) values[i] = 0;\n"
        "    for (int i = 0; i < n; ++i) values[int(out[i]) & 63] += out[i];\n"
        "    for (int i = 0; i < 64; ++i) out[i] = values[i];\n"
        "}\n"
    )
    monkeypatch.setattr(compiler, "CUDA_DIR", tmp_path)
    monkeypatch.setenv("MLA_KERNELS_CACHE", os.fspath(tmp_path / "cache"))
    config = compiler.KernelConfig("indexed.cu", (), "indexed", shared_bytes=0, threads=32)
    report = compiler.resource_report(compiler.compile_kernel(config))
    assert report.stack_bytes > 0 and report.local_loads > 0 and report.local_stores > 0
    assert report.hgmma == report.utmaldg == 0
