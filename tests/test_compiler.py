"""The cubin cache: what rebuilds, what does not, and what a damaged file does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_kernels import compiler

HEADER = "#pragma once\n__device__ inline float twice(float x) { return 2.f * x; }  // exact\n"
KERNEL = '#include "twice.cuh"\nextern "C" __global__ void kernel(float* out) { out[0] = twice(out[1]); }\n'


@pytest.fixture
def project(monkeypatch, tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "twice.cuh").write_text(HEADER)
    (tmp_path / "cuda" / "kernel.cu").write_text(KERNEL)
    monkeypatch.setattr(compiler, "CUDA_DIR", tmp_path / "cuda")
    monkeypatch.setenv("MLA_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def config(**defines: int) -> compiler.KernelConfig:
    return compiler.KernelConfig("kernel.cu", tuple(defines.items()), "kernel", shared_bytes=0, threads=32)


def test_compiles_once(project):
    first, second = compiler.compile_kernel(config()), compiler.compile_kernel(config())
    assert (first.cached, second.cached) == (False, True)
    assert first.path == second.path and first.sha256 == second.sha256
    assert first.path.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("part", ["kernel.cu", "twice.cuh"])
def test_an_edit_rebuilds(project, part):
    before = compiler.compile_kernel(config())
    path = project / "cuda" / part
    path.write_text(path.read_text().replace("twice", "thrice").replace("thrice.cuh", "twice.cuh"))
    other = project / "cuda" / ({"kernel.cu", "twice.cuh"} - {part}).pop()
    other.write_text(other.read_text().replace("twice(", "thrice("))
    after = compiler.compile_kernel(config())
    assert not after.cached and after.path != before.path


def test_other_macros_are_another_cubin(project):
    assert compiler.compile_kernel(config(A=1)).path != compiler.compile_kernel(config(A=2)).path


def _damage_truncate(cubin: Path) -> None:
    cubin.write_bytes(cubin.read_bytes()[:100])


def _damage_flip(cubin: Path) -> None:
    content = bytearray(cubin.read_bytes())
    content[len(content) // 2] ^= 1
    cubin.write_bytes(content)


def _damage_manifest(cubin: Path) -> None:
    cubin.with_suffix(".json").write_text('{"sha256": ')


@pytest.mark.parametrize("damage", [_damage_truncate, _damage_flip, Path.unlink, _damage_manifest])
def test_a_damaged_cubin_is_compiled_again(project, damage):
    first = compiler.compile_kernel(config())
    damage(first.path)
    again = compiler.compile_kernel(config())
    assert not again.cached and again.sha256 == first.sha256
    assert compiler.compile_kernel(config()).cached


def test_concurrent_processes_compile_once(project):
    script = (
        "import sys; from pathlib import Path; from mla_kernels import compiler\n"
        f"compiler.CUDA_DIR = Path({str(project / 'cuda')!r})\n"
        "kernel = compiler.compile_kernel(compiler.KernelConfig('kernel.cu', (), 'kernel', 0, 32))\n"
        "print(int(kernel.cached), kernel.sha256)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    results = [process.communicate(timeout=120)[0].split() for process in running]
    assert sorted(cached for cached, _ in results) == ["0", "1", "1", "1"]
    assert len({sha256 for _, sha256 in results}) == 1


def test_errors_carry_the_log(project):
    (project / "cuda" / "kernel.cu").write_text("__global__ void kernel() { undefined_name(); }\n")
    with pytest.raises(compiler.CompileError, match="undefined_name"):
        compiler.compile_kernel(config())


def test_a_missing_header_is_named(project):
    (project / "cuda" / "twice.cuh").unlink()
    with pytest.raises(compiler.CompileError, match=r"twice\.cuh"):
        compiler.compile_kernel(config())


def test_digest_ignores_comments_and_white_space_only(project):
    before = compiler.source_digest("kernel.cu")
    header = project / "cuda" / "twice.cuh"
    header.write_text(HEADER.replace("// exact", "/* exactly\n twice */\n\n").replace("2.f * x", "2.f*x"))
    assert compiler.source_digest("kernel.cu") == before
    header.write_text(HEADER.replace("2.f", "3.f"))
    assert compiler.source_digest("kernel.cu") != before


@given(st.text(alphabet='ab/*"\\ \n', max_size=40))
def test_digest_keeps_strings(text):
    """A string literal survives whatever it holds: an asm template is code."""
    literal = json.dumps(text)
    assert literal in compiler._NOISE.sub(lambda match: match[1] or "", f"asm( {literal} ); // gone")


def test_manifest_tells_what_was_done(project):
    kernel = compiler.compile_kernel(config())
    manifest = json.loads(kernel.path.with_suffix(".json").read_text())
    assert manifest["sha256"] == kernel.sha256 and "registers" in manifest["log"]
    assert kernel.options == ("-arch=sm_90a", "-std=c++17")
