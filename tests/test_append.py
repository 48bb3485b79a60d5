"""mla_append on CPU tensors against double precision, and its checks."""

import math

import pytest
import torch

from mla_kernels import mla_append
from mla_kernels.append import takes_rows
from mla_kernels.reference import mla_append_reference


def tensors(n=5, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(4, 4, 1, 576, generator=generator).to(dtype)
    slots = torch.tensor([3, 15, 0, 8, 9][:n])
    kv_c = torch.randn(n, 512, generator=generator).to(dtype)
    k_pe = torch.randn(n, 64, generator=generator).to(dtype)
    return pool, slots, kv_c, k_pe


def rope_tables(positions=40):
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_oracle_is_the_formula_number_by_number(interleaved):
    pool, slots, kv_c, k_pe = tensors()
    weight, (cos, sin) = torch.linspace(-2, 2, 512).bfloat16(), rope_tables()
    positions = torch.tensor([0, 1, 39, 7, 40])
    slots[3] = 16
    options = {"norm_weight": weight, "norm_eps": 0.25, "cos": cos, "sin": sin, "positions": positions}
    found = mla_append_reference(pool, slots, kv_c, k_pe, **options, interleaved=interleaved).view(16, 576)
    assert found.dtype == torch.float64
    expected = pool.view(16, 576).double().tolist()
    for token in (0, 1, 2, 4):
        line = expected[int(slots[token])]
        x, r = kv_c[token].tolist(), k_pe[token].tolist()
        rms = math.sqrt(sum(value * value for value in x) / 512 + 0.25)
        line[:512] = [value / rms * float(w) for value, w in zip(x, weight, strict=True)]
        for j in range(32):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + 32)
            angle = int(positions[token]), j
            c, s = (float(cos[angle]), float(sin[angle])) if token != 4 else (math.nan, math.nan)
            line[512 + a], line[512 + b] = r[a] * c - r[b] * s, r[b] * c + r[a] * s
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("chosen", [(), ("norm_weight",), ("cos", "sin", "positions"), None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_the_oracle_but_for_one_rounding(dtype, chosen, interleaved):
    pool, slots, kv_c, k_pe = tensors(dtype=dtype)
    cos, sin = rope_tables()
    options = {"norm_weight": torch.linspace(-2, 2, 512).to(dtype), "cos": cos, "sin": sin}
    options["positions"] = torch.tensor([0, 1, 39, 7, -1])
    options = {name: options[name] for name in (options if chosen is None else chosen)}
    wanted = mla_append_reference(pool, slots, kv_c, k_pe, **options, interleaved=interleaved)
    mla_append(pool, slots, kv_c, k_pe, **options, interleaved=interleaved)
    rounding = 0.51 * torch.finfo(dtype).eps  # half a unit, and what fp32 leaves
    torch.testing.assert_close(pool[:, :, 0].double(), wanted, rtol=rounding, atol=1e-6, equal_nan=True)


def test_rows_of_a_wider_tensor_are_taken_as_they_are():
    pool, slots, _, _ = tensors()
    lines = torch.randn(5, 576).bfloat16()
    mla_append(pool, slots, lines[:, :512], lines[:, 512:])
    assert torch.equal(pool.view(-1, 576)[slots], lines)


def test_only_slots_of_the_pool_are_written():
    pool, slots, kv_c, k_pe = tensors()
    before = pool.clone()
    slots[1], slots[2] = -1, 16
    mla_append(pool, slots, kv_c, k_pe)
    lines, old = pool.view(-1, 576), before.view(-1, 576)
    untouched = [i for i in range(16) if i not in (3, 8, 9)]
    assert torch.equal(lines[untouched], old[untouched])
    assert torch.equal(lines[[3, 8, 9]], torch.cat([kv_c, k_pe], 1)[[0, 3, 4]])


def test_torch_compile_takes_it_whole():
    pool, slots, kv_c, k_pe = tensors()
    other = pool.clone()
    mla_append(pool, slots, kv_c, k_pe)
    compiled = torch.compile(lambda *arguments: mla_append(*arguments), fullgraph=True, backend="eager")
    compiled(other, slots, kv_c, k_pe)
    assert torch.equal(pool, other)


def test_checked_mode_names_the_slot(monkeypatch):
    monkeypatch.setenv("MLA_KERNELS_CHECK", "1")
    pool, slots, kv_c, k_pe = tensors()
    slots[2] = 16
    with pytest.raises(ValueError, match="slot_mapping has 16, must be below 16"):
        mla_append(pool, slots, kv_c, k_pe)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(slot_mapping=a["slot_mapping"].int()), TypeError, "slot_mapping is torch.int32"),
        (lambda a: a.update(kv_c=a["kv_c"][:, :256]), ValueError, r"kv_c has shape \(5, 256\)"),
        (
            lambda a: a.update(k_pe=a["k_pe"].half()),
            TypeError,
            "k_pe is torch.float16, must be torch.bfloat16",
        ),
        (lambda a: a.update(cos=torch.ones(3, 32)), ValueError, "belong together"),
        (lambda a: a.update(kv_cache=a["kv_cache"][:, :3]), ValueError, "pages of 3 tokens"),
        (lambda a: a.update(kv_cache=a["kv_cache"].float()), TypeError, "kv_cache is torch.float32"),
        (lambda a: a.update(kv_c=a["kv_c"].T.contiguous().T), ValueError, "rows must be contiguous"),
    ],
)
def test_bad_arguments_name_value_limit_and_remedy(change, error, message):
    arguments = dict(zip(("kv_cache", "slot_mapping", "kv_c", "k_pe"), tensors(), strict=True))
    change(arguments)
    with pytest.raises(error, match=message):
        mla_append(**arguments)


def test_what_rows_the_kernel_can_read():
    lines = torch.zeros(8, 576, dtype=torch.bfloat16)
    assert takes_rows(lines) and takes_rows(lines[:, 512:]) and takes_rows(lines.view(2, 4, 1, 576))
    assert not takes_rows(lines.view(-1)[1:577].view(1, 576)), "begins at 2 bytes"
    assert not takes_rows(torch.zeros(8, 580, dtype=torch.bfloat16)[:, :576]), "rows of 1160 bytes"
    assert not takes_rows(torch.zeros(8, 1152, dtype=torch.bfloat16)[:, ::2]), "every other column"
