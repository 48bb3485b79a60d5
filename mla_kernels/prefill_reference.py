"""What prefill computes, in fp64: the oracle of its tests and records (decode's: ``reference.py``).

    s_ij = softmax_scale * q_i . k_j   p_i = softmax over the keys that row i sees   out_i = sum_j p_ij v_j

Rules:
  * causal: row i of s_q sees keys j <= i + s_k - s_q (bottom-right aligned: the last row sees everything);
  * h_q is a multiple of h_kv, head h sees the keys and values of head h // (h_q / h_kv);
  * sequences may have tokens of their own number (cu_seqlens_q, cu_seqlens_k), laid end to end;
  * a row that sees nothing: out = 0, lse = -inf, so that it vanishes in a merge;
  * no sequence sees another's keys, whatever they hold.
"""

from __future__ import annotations

import itertools

import torch

CHUNK_BYTES = 4 << 30  # of fp64 scores


def mla_prefill_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill in fp64, on the device of its inputs.

    Args:
        q: (b, s_q, h_q, d_qk) of any float dtype, or (total_q, h_q, d_qk) with cu_seqlens.
        k, v: (b, s_k, h_kv, d_qk) and (b, s_k, h_kv, d_v), or (total_k, h_kv, d_qk) and (total_k, h_kv, d_v).
        causal: whether rows see only what the rule above says.
        softmax_scale: factor on the scores, d_qk ** -0.5 when None.
        cu_seqlens_q, cu_seqlens_k: (b + 1,) integers, where each sequence begins, and the end.

    Returns:
        out (b, s_q, h_q, d_v) and lse (b, h_q, s_q), natural logarithm, both fp64; of ragged sequences
        (total_q, h_q, d_v) and (h_q, total_q).
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    *batch, s_q, h_q, _ = q.shape
    out = torch.zeros(*batch, s_q, h_q, v.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.full((*batch, h_q, s_q), float("-inf"), dtype=torch.float64, device=q.device)
    if cu_seqlens_q is None:
        for i in range(len(q)):
            out[i], lse[i] = _one_sequence(q[i], k[i], v[i], causal, scale)
        return out, lse
    spans_q, spans_k = (itertools.pairwise(starts.tolist()) for starts in (cu_seqlens_q, cu_seqlens_k))
    for (begin, end), (k_begin, k_end) in zip(spans_q, spans_k, strict=True):
        keys = slice(k_begin, k_end)
        out[begin:end], lse[:, begin:end] = _one_sequence(q[begin:end], k[keys], v[keys], causal, scale)
    return out, lse


def _one_sequence(q, k, v, causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(s_q, h_q, d_v) and (h_q, s_q), some heads at a time."""
    s_q, (s_k, h_kv, _) = len(q), k.shape
    sees = torch.full((s_q,), s_k, device=q.device)
    if causal:
        sees = torch.arange(s_q, device=q.device) + s_k - s_q + 1
    hidden = torch.arange(s_k, device=q.device) >= sees[:, None]  # (s_q, s_k)
    outs, lses = [], []
    for head in range(h_kv):
        keys, values = k[:, head].double(), v[:, head].double()
        group = q.unflatten(1, (h_kv, -1))[:, head].transpose(0, 1)  # (h_q / h_kv, s_q, d)
        for rows in group.split(max(1, CHUNK_BYTES // (8 * max(s_q * s_k, 1)))):
            scores = (rows.double() @ keys.mT).mul_(scale).masked_fill_(hidden, float("-inf"))
            row_lse = scores.logsumexp(-1)  # -inf of no keys at all, too
            finite_lse = row_lse.masked_fill(row_lse == float("-inf"), 0)  # a blind row: exp(-inf - 0) = 0
            outs.append(scores.sub_(finite_lse[..., None]).exp_() @ values)
            lses.append(row_lse)
    return torch.cat(outs).transpose(0, 1), torch.cat(lses)
