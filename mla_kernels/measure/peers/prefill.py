"""Other people's attention over whole sequences behind the peers' interface: FA3, FA2, cuDNN, PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from ..bound import Bound
from ..prefill_inputs import PrefillInputs, starts
from .fa3 import FA3, LIBRARY
from .interface import Peer, load_operators, no_gpu, require

SCORE_BYTES = 12  # a score of plain PyTorch: bf16, float32 before and after softmax, bf16
MOST_SCORE_BYTES = 16 << 30
SWEEPS_L2 = 1 << 30  # bytes of scores that leave nothing of the inputs in any L2


def _bound(inputs: PrefillInputs, call: Callable, unpack: Callable, out: torch.Tensor | None = None) -> Bound:
    return Bound([functools.partial(call, *tensors) for tensors in inputs.sets], out=out, unpack=unpack)


class PrefillFA3(FA3):
    """Through cu_seqlens whatever the lengths: the wheel was built for that form alone."""

    def bind(self, inputs: PrefillInputs) -> Bound:
        workload, operators = inputs.workload, load_operators(LIBRARY, "_vllm_fa3_C")
        out = inputs.sets[0][0].new_empty(inputs.out_shape)
        in_rows = out.view(-1, *out.shape[-2:])
        starts_q, starts_k = starts(inputs)

        def call(q, k, v):
            return operators.fwd(
                q.view(-1, *q.shape[-2:]),
                k.view(-1, *k.shape[-2:]),
                v.view(-1, *v.shape[-2:]),
                None,  # k_new
                None,  # v_new
                None,  # q_v
                in_rows,
                starts_q,
                starts_k,
                None,  # cu_seqlens_k_new
                None,  # seqused_q
                None,  # seqused_k
                *inputs.longest,
                None,  # block_table
                None,  # kv_batch_idx
                None,  # leftpad_k
                None,  # rotary_cos
                None,  # rotary_sin
                None,  # seqlens_rotary
                None,  # q_descale
                None,  # k_descale
                None,  # v_descale
                workload.d_qk**-0.5,
                workload.causal,
                -1,  # window_size_left
                -1,  # window_size_right
                0.0,  # softcap
                True,  # is_rotary_interleaved
                None,  # scheduler_metadata
                1,  # num_splits, as its own Python interface has it
                None,  # pack_gqa
                0,  # sm_margin
                None,  # s_aux
                1,  # cp_world_size
                0,  # cp_rank
                None,  # cp_tot_seqused_k
            )

        def unpack(result):
            lse = result[1]  # (h, total)
            return out, lse if workload.ragged else lse.unflatten(1, (workload.b, -1)).transpose(0, 1)

        return _bound(inputs, call, unpack, out)


class PrefillFA2(Peer):
    """The flash backend of torch's scaled_dot_product_attention, which is FA2, called below the interface:
    that one has no ragged form and aligns a causal mask at the top left.

    It takes one head dim: smaller values are padded with zeros to the keys', which is timed (not the padding
    itself).
    """

    source = "FlashAttention 2, as torch has it"

    def available(self) -> str | None:
        return no_gpu()

    def bind(self, inputs: PrefillInputs) -> Bound:
        workload = inputs.workload
        s_q, s_k = inputs.longest
        sets = tuple(
            (q, k, torch.nn.functional.pad(v, (0, workload.d_qk - workload.d_v))) for q, k, v in inputs.sets
        )

        def call(q, k, v):
            lengths = (inputs.starts_q, inputs.starts_k, s_q, s_k)
            scale = workload.d_qk**-0.5
            attend = torch.ops.aten._flash_attention_forward
            return attend(q, k, v, *lengths, 0.0, workload.causal, False, scale=scale)

        padded = PrefillInputs(workload, sets, inputs.starts_q, inputs.starts_k)
        return _bound(padded, call, lambda result: (result[0][..., : workload.d_v], result[1]))


class PrefillCuDNN(Peer):
    """The cuDNN backend of torch's scaled_dot_product_attention.

    Of ragged sequences, as nested tensors bring them (``aten._cudnn_attention_forward``), torch 2.11 computes
    the right result, but what it does on the way invalidates the capture of a CUDA graph.
    """

    source = "cuDNN, as torch has it"

    def available(self) -> str | None:
        return no_gpu()

    def bind(self, inputs: PrefillInputs) -> Bound:
        workload = inputs.workload
        require(
            not workload.causal or workload.lengths_q == workload.lengths_k,
            "torch aligns cuDNN's causal mask at the top left",
        )
        require(not workload.ragged, "torch's cuDNN on ragged sequences cannot be captured in a CUDA graph")
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention

        def call(q, k, v):
            heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return attend(*heads_first, None, False, 0.0, workload.causal, False, scale=workload.d_qk**-0.5)

        return _bound(inputs, call, lambda result: (result[0].transpose(1, 2), None))


class PrefillMath(Peer):
    """Two matrix products and a float32 softmax between; ragged sequences one after the other."""

    source = "plain PyTorch"

    def available(self) -> str | None:
        return no_gpu()

    def bind(self, inputs: PrefillInputs) -> Bound:
        workload = inputs.workload
        sizes = [s_q * s_k for s_q, s_k in zip(workload.lengths_q, workload.lengths_k, strict=True)]
        scores = (max(sizes) if workload.ragged else sum(sizes)) * workload.h_q
        require(
            scores * SCORE_BYTES <= MOST_SCORE_BYTES,
            f"its {scores:,} scores would take {scores * SCORE_BYTES / 1e9:.0f} GB",
        )
        if scores * SCORE_BYTES > SWEEPS_L2:
            inputs = replace(inputs, sets=inputs.sets[:1])
        out = inputs.sets[0][0].new_empty(inputs.out_shape)
        if not workload.ragged:
            hidden = _hidden(workload.lengths_q[0], workload.lengths_k[0], workload.causal, out.device)
            return _bound(inputs, functools.partial(_attend, out, hidden), lambda result: (out, None), out)
        hidden = [
            _hidden(s_q, s_k, workload.causal, out.device)
            for s_q, s_k in zip(workload.lengths_q, workload.lengths_k, strict=True)
        ]

        def call(q, k, v):
            parts = (t.split(lengths) for t, lengths in zip((out, q, k, v), split, strict=True))
            for own, mask, *tensors in zip(next(parts), hidden, *parts, strict=True):
                _attend(own[None], mask, *(tensor[None] for tensor in tensors))

        queries, keys = list(workload.lengths_q), list(workload.lengths_k)
        split = (queries, queries, keys, keys)
        return _bound(inputs, call, lambda result: (out, None), out)


def _hidden(s_q: int, s_k: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """(s_q, s_k) bool: the keys that a query must not see; None where it sees all."""
    if not causal:
        return None
    return ~torch.ones(s_q, s_k, dtype=torch.bool, device=device).tril_(s_k - s_q)


def _attend(out: torch.Tensor, hidden: torch.Tensor | None, q, k, v) -> None:
    """Of (b, s, h, d) tensors into ``out``."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (
        t.transpose(1, 2) for t in (q, *(t.repeat_interleave(group, 2) if group > 1 else t for t in (k, v)))
    )
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    out.copy_((scores.softmax(-1).to(q.dtype) @ v).transpose(1, 2))
