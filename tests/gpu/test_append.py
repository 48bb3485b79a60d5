"""mla_append against the oracle: what is written, where, and nothing else."""

import pytest
import torch

from mla_kernels.append import mla_append
from mla_kernels.reference import mla_append_reference
from tests.gpu.cases import by_dtype, same_bits

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


def check(pool, before, arguments, options):
    """The pool against the oracle: written lines but for one rounding, the others bit by bit as before."""
    wanted = mla_append_reference(before, *arguments, **options).flatten(0, 1)
    lines, old, slots = pool.view(-1, 576), before.view(-1, 576), arguments[0]
    written = torch.zeros(len(lines), dtype=torch.bool, device="cuda")
    written[slots[(slots >= 0) & (slots < len(lines))]] = True
    assert same_bits(lines[~written], old[~written])
    step = 0.51 * torch.finfo(pool.dtype).eps  # half a unit, and what fp32 leaves
    torch.testing.assert_close(lines[written].double(), wanted[written], rtol=step, atol=2e-6)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("n", [1, 7, 8, 1000])
@by_dtype
def test_plain_copies_are_exact(dtype, n, page_size):
    pool, slots, kv_c, k_pe, _ = inputs(n, dtype, page_size)
    wanted = mla_append_reference(pool, slots, kv_c, k_pe).to(dtype).unsqueeze(2)
    mla_append(pool, slots, kv_c, k_pe)
    assert same_bits(pool, wanted)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("chosen", [("norm_weight",), ("cos", "sin", "positions"), None])
@by_dtype
def test_norm_and_rope(dtype, chosen, interleaved):
    pool, *arguments, options = inputs(333, dtype, 64)
    options = {name: options[name] for name in chosen or options} | {"interleaved": interleaved}
    before = pool.clone()
    mla_append(pool, *arguments, **options)
    check(pool, before, arguments, options)


@by_dtype
def test_rows_of_a_wider_tensor_and_pages_apart(dtype):
    """Strides of their own: latents as columns of a projection's output, pages as part of larger ones."""
    pool, slots, kv_c, k_pe, options = inputs(70, dtype, 16)
    wide = torch.full((*pool.shape[:2], 1, 1152), float("nan"), dtype=dtype, device="cuda")
    part = wide[..., :576]
    part.copy_(pool)
    both = torch.cat([kv_c, k_pe], 1)
    mla_append(pool, slots, kv_c, k_pe, **options)
    mla_append(part, slots, both[:, :512], both[:, 512:], **options)
    assert same_bits(part, pool) and wide[..., 576:].isnan().all()


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
    arguments = slots, kv_c, k_pe
    size = pool.shape[0] * pool.shape[1]
    mla_append(pool, *arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_append(pool, *arguments, **options)
    generator = torch.Generator("cuda").manual_seed(1)
    for step in range(4):
        slots.copy_(torch.randperm(size, generator=generator, device="cuda")[:64])
        slots[step], slots[40 + step] = -1, size + step
        options["positions"].copy_(torch.randint(POSITIONS, (64,), generator=generator, device="cuda"))
        kv_c.mul_(-1.5), k_pe.neg_()
        before = pool.clone()
        graph.replay()
        check(pool, before, arguments, options)


def test_a_pool_past_two_to_the_31_elements():
    pool = torch.zeros(60_000, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    _, _, kv_c, k_pe, _ = inputs(6, torch.bfloat16, 64)
    slots = torch.tensor([0, 1, 2**21, 60_000 * 64 - 2, 60_000 * 64 - 1, 3_000_000], device="cuda")
    mla_append(pool, slots, kv_c, k_pe)
    assert same_bits(pool.view(-1, 576)[slots], torch.cat([kv_c, k_pe], 1))
    assert pool.view(-1, 576).count_nonzero(dim=1).count_nonzero() == 6
