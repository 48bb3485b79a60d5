"""mla_append on CPU tensors against double precision, and its checks."""

import pytest
import torch

from mla_kernels import mla_append


def tensors(n=5, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(4, 4, 1, 576, generator=generator).to(dtype)
    slots = torch.tensor([3, 15, 0, 8, 9][:n])
    kv_c = torch.randn(n, 512, generator=generator).to(dtype)
    k_pe = torch.randn(n, 64, generator=generator).to(dtype)
    return pool, slots, kv_c, k_pe


@pytest.mark.parametrize("interleaved", [True, False])
def test_norm_and_rope_in_double_precision(interleaved):
    pool, slots, kv_c, k_pe = tensors(dtype=torch.float16)
    weight = torch.linspace(-2, 2, 512).half()
    angles = torch.arange(40)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    positions = torch.tensor([0, 1, 39, 7, 7])
    mla_append(
        pool, slots, kv_c, k_pe, norm_weight=weight, cos=angles.cos(), sin=angles.sin(),
        positions=positions, interleaved=interleaved,
    )  # fmt: skip
    x = kv_c.double()
    latent = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    rotary = k_pe.double()
    pairs = rotary.view(5, 32, 2) if interleaved else rotary.view(5, 2, 32).transpose(1, 2)
    turned = (
        torch.view_as_complex(pairs.contiguous())
        * torch.polar(torch.ones(()).double(), angles.double())[positions]
    )
    turned = torch.view_as_real(turned)
    turned = turned.flatten(1) if interleaved else turned.transpose(1, 2).flatten(1)
    found = pool.view(-1, 576)[slots].double()
    torch.testing.assert_close(found, torch.cat([latent, turned], 1), rtol=1e-3, atol=1e-3)


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
