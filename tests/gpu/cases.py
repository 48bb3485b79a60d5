"""Inputs in which everything that must not be read is poison, and the comparison with the oracle."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mla_kernels.decode import mla_decode
from mla_kernels.reference import mla_decode_reference

DEVICE = torch.device("cuda")
# Relative L2 error of an output and of each sequence in it: a wrong one cannot hide. Rounding p and out to
# bf16 costs 2.0e-3, at most 2.8e-3 in 50,000 single rows; a token lost among 4096 equal ones costs 1.6e-2.
OUT_LIMIT = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
LSE_LIMIT = 1e-5  # absolute

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOGIT_SD = {"sd 0.01": 0.01, "sd 1": 1.0, "sd 10": 10.0, "rising": 1.0}
RISE = 30.0  # "rising": added to the logits from the first token to the last
GUARD_PAGES = 2

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
by_mask = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@dataclass(frozen=True)
class Case:
    """The arguments of mla_decode; kv_cache is (num_pages, page_size, 1, 576)."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens

    def part(self, sequences: slice, s_q: int, h_q: int) -> "Case":
        """Fewer sequences, query tokens and heads over the same pool."""
        q = self.q[sequences, :s_q, :h_q].contiguous()
        return Case(q, self.kv_cache, self.block_table[sequences], self.cache_seqlens[sequences])


def paged_case(
    lengths: list[int],
    s_q: int,
    h_q: int,
    dtype: torch.dtype,
    *,
    logits: str = "sd 1",
    page_size: int = 64,
    seed: int = 0,
    guard: float = math.nan,
) -> Case:
    """Random sequences in a shuffled pool.

    Slots past a length, spare pages and the guard pages before and behind the pool are NaN (the guard pages
    ``guard``); table entries not in use are ids outside the pool or of a spare page.

    ``logits``: standard deviation of softmax_scale * q . k under the default scale, or "rising": sd 1 and a
    ramp along the tokens, so that the running maximum never settles.
    """
    host, device = torch.Generator().manual_seed(seed), torch.Generator(DEVICE).manual_seed(seed)
    b = len(lengths)
    seqlens = torch.tensor(lengths)
    pages_of = -(-seqlens // page_size)
    used, spare = int(pages_of.sum()), 5
    page_ids = torch.randperm(used + spare, generator=host)

    width = int(pages_of.max()) + 3
    garbage = torch.tensor([-(2**31), 2**31 - 1, -1, used + spare, 2147480000, int(page_ids[-1])])
    table = garbage[torch.randint(len(garbage), (b, width), generator=host)]
    owner = torch.arange(b).repeat_interleave(pages_of)
    index_in_owner = torch.arange(used) - (pages_of.cumsum(0) - pages_of)[owner]
    table[owner, index_in_owner] = page_ids[:used]

    shape = (used + spare + 2 * GUARD_PAGES, page_size, 1, 576)
    allocation = torch.full(shape, guard, dtype=dtype, device=DEVICE)
    pool = allocation[GUARD_PAGES:-GUARD_PAGES]
    pool.fill_(math.nan)
    position = (index_in_owner[:, None] * page_size + torch.arange(page_size)).to(DEVICE)  # (used, page_size)
    length = seqlens[owner, None].to(DEVICE)
    lines = torch.randn(used, page_size, 576, generator=device, device=DEVICE)
    q = torch.randn(b, s_q, h_q, 576, generator=device, device=DEVICE) * LOGIT_SD[logits]
    if logits == "rising":
        q[..., -1] = 24  # 1 / softmax_scale: the last number of a line is added to its logit
        lines[..., -1] = RISE * position / length
    lines.masked_fill_((position >= length)[..., None], math.nan)
    pool[page_ids[:used].to(DEVICE)] = lines.to(dtype)[:, :, None]
    return Case(q.to(dtype), pool, table.int().to(DEVICE), seqlens.int().to(DEVICE))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Scalar bool on the device: NaN equals NaN, -0 differs from 0."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.contiguous().view(integer) == b.contiguous().view(integer)).all()


@dataclass
class ErrorLog:
    """Errors of many results of one dtype, kept on the device until all are there."""

    dtype: torch.dtype
    labels: list[str] = field(default_factory=list)
    errors: list[torch.Tensor] = field(default_factory=list)

    def add(
        self,
        label: str,
        out: torch.Tensor,
        lse: torch.Tensor,
        ref_out: torch.Tensor,
        ref_lse: torch.Tensor,
    ) -> None:
        """out (b, s_q, h_q, 512), lse (b, h_q, s_q) against the oracle's; a NaN is an error of inf."""
        assert out.dtype == self.dtype and out.shape == ref_out.shape, (out.dtype, out.shape, ref_out.shape)
        assert lse.dtype == torch.float32 and lse.shape == ref_lse.shape, (
            lse.dtype,
            lse.shape,
            ref_lse.shape,
        )
        difference = (out.double() - ref_out).square().sum((1, 2, 3))
        norm = ref_out.square().sum((1, 2, 3))
        of_sequence = _relative(difference, norm)
        blind = ref_lse == -math.inf
        lse_error = (lse - ref_lse).abs().masked_fill(blind & (lse == -math.inf), 0)  # -inf minus -inf is NaN
        worst = [_relative(difference.sum(), norm.sum()), of_sequence.max(), lse_error.max()]
        self.labels.append(label)
        self.errors.append(
            torch.stack([*worst, of_sequence.argmax()]).nan_to_num(nan=math.inf, posinf=math.inf)
        )

    def check(self, worst: dict[str, float]) -> None:
        """Asserts that all are within the limits and names those that are not; ``worst`` keeps the maxima."""
        errors = torch.stack(self.errors).cpu()
        limit = OUT_LIMIT[self.dtype]
        limits = torch.tensor([limit, limit, LSE_LIMIT])
        name = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        maxima = errors[:, :3].max(0).values.tolist()
        for kind, value in zip(("out_rel_l2", "sequence_out_rel_l2", "lse_max_abs"), maxima, strict=True):
            worst[f"{kind}/{name}"] = max(value, worst.get(f"{kind}/{name}", 0.0))
        bad = (~(errors[:, :3] <= limits)).any(1).nonzero().flatten().tolist()
        lines = [
            f"  {self.labels[i]}: out {errors[i, 0]:.2e}, worst sequence {errors[i, 1]:.2e} "
            f"(number {int(errors[i, 3])}), lse {errors[i, 2]:.2e}"
            for i in bad
        ]
        summary = f"worst out {maxima[0]:.2e}, worst sequence {maxima[1]:.2e}, worst lse {maxima[2]:.2e}"
        assert not bad, (
            f"{len(bad)} of {len(errors)} results over the limits (out {limit:.0e}, lse {LSE_LIMIT:.0e}); "
            f"{summary}\n" + "\n".join(lines[:60])
        )


def decode_into_poison(case: Case, decode=mla_decode, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """``decode``, called as mla_decode is, with out= full of NaN, so that what it does not write shows."""
    poison = case.q.new_full((*case.q.shape[:3], 512), math.nan)
    out, lse = decode(*case.tensors(), out=poison, **options)
    assert out is poison
    return out, lse


def check_cases(
    cases: dict[str, Case], causal: bool, worst: dict[str, float], decode=mla_decode, **options
) -> None:
    """``decode`` against the oracle, by an ErrorLog."""
    log = ErrorLog(next(iter(cases.values())).q.dtype)
    for label, case in cases.items():
        out, lse = decode_into_poison(case, decode, causal=causal, **options)
        log.add(label, out, lse, *mla_decode_reference(*case.tensors(), causal=causal, **options))
    log.check(worst)


def any_shape(max_examples: int, most_sequences: int, most_s_q: int):
    """A test of lengths, s_q, h_q, dtype, causal, logits and seed, each drawn."""

    def decorate(test):
        drawn = given(
            lengths=st.lists(
                st.one_of(st.integers(0, 130), st.integers(0, 3000)), min_size=1, max_size=most_sequences
            ),
            s_q=st.integers(1, most_s_q),
            h_q=st.integers(1, 128),
            dtype=st.sampled_from(list(DTYPES.values())),
            causal=st.booleans(),
            logits=st.sampled_from(list(LOGIT_SD)),
            seed=st.integers(0, 2**31),
        )
        limits = settings(
            max_examples=max_examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # shrinking may take minutes of GPU time; the examples are small as is
        )
        return limits(drawn(test))

    return decorate


def _relative(squared_difference: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """sqrt of the quotient; where the oracle is all zero so must the result be."""
    exact = (squared_norm == 0) & (squared_difference == 0)
    return (squared_difference / squared_norm).sqrt().masked_fill(exact, 0).nan_to_num(nan=math.inf)
