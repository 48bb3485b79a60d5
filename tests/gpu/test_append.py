"""mla_append against the portable path in double precision: what is written, where, and nothing else."""

import pytest
import torch

from mla_kernels import append
from mla_kernels.append import mla_append
from tests.gpu.cases import DTYPES, same_bits

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
POSITIONS = 5000


def inputs(n, dtype, page_size, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    pages = -(-3 * n // page_size) + 2
    pool = torch.randn(pages, page_size, 1, 576, generator=generator, device="cuda").to(dtype)
    slots = torch.randperm(pages * page_size, generator=generator, device="cuda")[:n]
    kv_c = (3 * torch.randn(n, 512, generator=generator, device="cuda")).to(dtype)
    k_pe = torch.randn(n, 64, generator=generator, device="cuda").to(dtype)
    angles = torch.rand(POSITIONS, 32, generator=generator, device="cuda") * 6.28
    options = {
        "norm_weight": torch.randn(512, generator=generator, device="cuda").to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(POSITIONS, (n,), generator=generator, device="cuda"),
    }
    return pool, slots, kv_c, k_pe, options


def expected(pool, slots, kv_c, k_pe, options, interleaved=True):
    """By torch's operators, which tests/test_append.py holds against fp64."""
    wanted = pool.clone()
    own = {"norm_weight": None, "cos": None, "sin": None, "positions": None} | options
    append._append_portable(
        wanted,
        slots,
        kv_c,
        k_pe,
        own["norm_weight"],
        1e-6,
        own["cos"],
        own["sin"],
        own["positions"],
        interleaved,
    )
    return wanted


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("n", [1, 7, 8, 1000])
@by_dtype
def test_plain_copies_are_exact(dtype, n, page_size):
    pool, slots, kv_c, k_pe, _ = inputs(n, dtype, page_size)
    wanted = expected(pool, slots, kv_c, k_pe, {})
    mla_append(pool, slots, kv_c, k_pe)
    assert same_bits(pool, wanted)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("chosen", [("norm_weight",), ("cos", "sin", "positions"), None])
@by_dtype
def test_norm_and_rope(dtype, chosen, interleaved):
    pool, slots, kv_c, k_pe, options = inputs(333, dtype, 64)
    options = {name: options[name] for name in chosen or options}
    wanted = expected(pool, slots, kv_c, k_pe, options, interleaved)
    before = pool.clone()
    mla_append(pool, slots, kv_c, k_pe, interleaved=interleaved, **options)
    written = torch.zeros(pool.shape[0] * pool.shape[1], dtype=torch.bool, device="cuda")
    written[slots] = True
    lines, wanted_lines = pool.view(-1, 576), wanted.view(-1, 576)
    assert same_bits(lines[~written], before.view(-1, 576)[~written])
    step = torch.finfo(dtype).eps  # a rounding may fall the other way
    torch.testing.assert_close(lines.float(), wanted_lines.float(), rtol=2 * step, atol=2 * step)


@by_dtype
def test_slots_that_are_none_are_not_written(dtype):
    pool, slots, kv_c, k_pe, _ = inputs(100, dtype, 16)
    size = pool.shape[0] * pool.shape[1]
    bad = torch.tensor([-1, size, -(2**62), 2**62, size + 7], device="cuda")
    mixed = slots.clone()
    mixed[::20] = bad
    wanted = pool.clone()
    good = (mixed >= 0) & (mixed < size)
    wanted.view(-1, 576)[mixed[good]] = torch.cat([kv_c, k_pe], 1)[good]
    mla_append(pool, mixed, kv_c, k_pe)
    assert same_bits(pool, wanted)


def test_an_unknown_position_is_nan_in_its_rotary_part_alone():
    pool, slots, kv_c, k_pe, options = inputs(9, torch.bfloat16, 64)
    options["positions"][3], options["positions"][5] = -1, POSITIONS
    mla_append(pool, slots, kv_c, k_pe, **options)
    lines = pool.view(-1, 576)[slots]
    assert lines[[3, 5], 512:].isnan().all() and not lines[[3, 5], :512].isnan().any()
    assert not lines[[0, 1, 2, 4, 6, 7, 8]].isnan().any()


def test_replays_follow_the_slots():
    pool, slots, kv_c, k_pe, options = inputs(64, torch.bfloat16, 64)
    mla_append(pool, slots, kv_c, k_pe, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_append(pool, slots, kv_c, k_pe, **options)
    kv_c.mul_(2), k_pe.neg_(), slots.copy_(slots.flip(0))
    wanted = expected(pool, slots, kv_c, k_pe, options)
    graph.replay()
    torch.testing.assert_close(pool.float(), wanted.float(), rtol=2**-6, atol=2**-6)


def test_a_pool_past_two_to_the_31_elements():
    pool = torch.zeros(60_000, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    _, _, kv_c, k_pe, _ = inputs(6, torch.bfloat16, 64)
    slots = torch.tensor([0, 1, 2**21, 60_000 * 64 - 2, 60_000 * 64 - 1, 3_000_000], device="cuda")
    mla_append(pool, slots, kv_c, k_pe)
    assert same_bits(pool.view(-1, 576)[slots], torch.cat([kv_c, k_pe], 1))
    assert pool.view(-1, 576).count_nonzero(dim=1).count_nonzero() == 6
