"""What MLA decode computes, in fp64: the oracle of every test and record. Read this before any kernel.

(And what appending to the cache computes, ``mla_append_reference``, and prefill over it,
``mla_prefill_paged_reference``.)

Multi-head Latent Attention (DeepSeek-V2, section 2.1) caches one line per token instead of keys and
values per head:

    c_t = [ latent_t (512) | rope_t (64) ]                   576 numbers a token, shared by all heads

A model up-projects the latent to keys and values of each head h, k_t,h = W_UK,h latent_t and
v_t,h = W_UV,h latent_t. Decoding never does that. Since

    q_nope,h . (W_UK,h latent_t)  =  (W_UK,h^T q_nope,h) . latent_t
    sum_t p_t (W_UV,h latent_t)   =  W_UV,h (sum_t p_t latent_t)

both matrices move out of the loop over tokens ("absorbed" into the projections before and after). With
q_h = [ W_UK,h^T q_nope,h | q_rope,h ] what is left per query row is attention with one key-value head,
in which the first 512 numbers of the key are the value:

    s_t = softmax_scale * q_h . c_t         p = softmax(s)         lse = log(sum_t exp(s_t))
    out_h = sum_t p_t c_t[:512]

Every cache line is read once for all heads, which is why the arithmetic grows with s_q * h_q while the
traffic does not. Lines live in pages: token t of sequence i is line t % page_size of page
block_table[i, t // page_size].

Rules all implementations here share:
  * causal: row s of s_q sees positions < len - s_q + 1 + s (the last row sees everything);
  * sequences may have query tokens of their own number (cu_seqlens_q), which is then s_q in the rule above;
  * a row that sees nothing: out = 0, lse = -inf, so that it vanishes in a merge;
  * a length < 0 or beyond the table, or a page id outside the pool on a page in use: NaN in out and lse of
    that whole sequence, of no other, and no read outside the pool;
  * slots past the length, pages and table entries not in use are never looked at: they may hold anything.
"""

import itertools
from collections.abc import Iterator

import torch

CHUNK_BYTES = 4 << 30  # of fp64 scratch; the longest sequence alone may need more


def mla_decode_reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA decode in fp64, on the device of its inputs.

    Args:
        q: (b, s_q, h_q, d) of any float dtype; d is 576 in DeepSeek's models.
        kv_cache: (num_pages, page_size, 1, d) or (num_pages, page_size, d), any page size and strides.
        block_table: (b, max_pages) integer page ids.
        cache_seqlens: (b,) integer lengths in tokens.
        head_dim_v: leading numbers of a cache line that are the value.
        softmax_scale: factor on the logits, d ** -0.5 when None.
        causal: bottom-right aligned causal mask over the s_q query tokens.
        cu_seqlens_q: (b + 1,) where the query tokens of each sequence begin in a q of (total_q, h_q, d).

    Returns:
        out (b, s_q, h_q, head_dim_v) and lse (b, h_q, s_q), natural logarithm, both fp64. With cu_seqlens_q
        (total_q, h_q, head_dim_v) and (h_q, total_q).
    """
    if cu_seqlens_q is not None:
        return _ragged_reference(
            q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, head_dim_v, softmax_scale, causal
        )
    b, s_q, h_q, d = q.shape
    pool = kv_cache.squeeze(2) if kv_cache.dim() == 4 else kv_cache
    num_pages, page_size, _ = pool.shape
    scale = d**-0.5 if softmax_scale is None else softmax_scale

    capacity = block_table.shape[1] * page_size
    table, lengths = block_table.long(), cache_seqlens.long()
    page_in_use = torch.arange(table.shape[1], device=q.device) * page_size < lengths[:, None]
    page_outside = (table < 0) | (table >= num_pages)
    invalid = (lengths < 0) | (lengths > capacity) | (page_in_use & page_outside).any(1)
    lengths = lengths.masked_fill(invalid, 0)

    out = torch.zeros(b, s_q, h_q, head_dim_v, dtype=torch.float64, device=q.device)
    lse = torch.full((b, h_q, s_q), float("-inf"), dtype=torch.float64, device=q.device)
    for chunk, longest in _chunks_by_length(lengths, bytes_per_token=8 * (2 * d + 3 * s_q * h_q)):
        position = torch.arange(longest, device=q.device)
        in_use = position < lengths[chunk, None]  # (n, longest)
        page = table[chunk][:, position // page_size].where(in_use, 0)
        lines = pool[page, position % page_size].where(in_use[..., None], 0).double()  # (n, longest, d)

        rows = q[chunk].double().flatten(1, 2)  # (n, s_q * h_q, d)
        logits = (rows @ lines.mT).mul_(scale).unflatten(1, (s_q, h_q))  # (n, s_q, h_q, longest)
        sees = lengths[chunk, None].expand(-1, s_q)
        if causal:
            sees = sees - s_q + 1 + torch.arange(s_q, device=q.device)
        hidden = position >= sees[..., None]  # (n, s_q, longest)
        logits.masked_fill_(hidden[:, :, None], float("-inf"))

        row_lse = logits.logsumexp(-1)  # (n, s_q, h_q)
        finite_lse = row_lse.masked_fill(row_lse == float("-inf"), 0)  # a blind row: exp(-inf - 0) = 0
        p = logits.sub_(finite_lse[..., None]).exp_().flatten(1, 2)
        out[chunk] = (p @ lines[..., :head_dim_v]).unflatten(1, (s_q, h_q))
        lse[chunk] = row_lse.transpose(1, 2)
    out[invalid] = float("nan")
    lse[invalid] = float("nan")
    return out, lse


def _ragged_reference(
    q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, head_dim_v, softmax_scale, causal
):
    out = torch.zeros(*q.shape[:2], head_dim_v, dtype=torch.float64, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float64, device=q.device)
    starts = cu_seqlens_q.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        if begin < end:
            own = slice(i, i + 1)
            options = {"head_dim_v": head_dim_v, "softmax_scale": softmax_scale, "causal": causal}
            one_out, one_lse = mla_decode_reference(
                q[None, begin:end], kv_cache, block_table[own], cache_seqlens[own], **options
            )
            out[begin:end], lse[:, begin:end] = one_out[0], one_lse[0]
    return out, lse


def mla_prefill_paged_reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill over a latent cache in fp64, in the absorbed form: no key and no value is ever made.

    Args:
        q: (total_q, h, d + rope) of any float dtype: the query of each head as a model projects it.
        kv_cache, block_table: as above, of lines of latent + rope.
        w_uk, w_uv: (h, d, latent), (h, d_v, latent).
        cu_seqlens_q, cache_seqlens: as above; the queries are each sequence's last tokens, causal.
        softmax_scale: factor on the logits, (d + rope) ** -0.5 when None.

    Returns:
        out (total_q, h, d_v) and lse (h, total_q), both fp64.
    """
    _, nope, latent = w_uk.shape
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    absorbed = torch.einsum("thd,hdl->thl", q[..., :nope].double(), w_uk.double())
    out, lse = mla_decode_reference(
        torch.cat([absorbed, q[..., nope:].double()], -1),
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v=latent,
        softmax_scale=scale,
        causal=True,
        cu_seqlens_q=cu_seqlens_q,
    )
    return torch.einsum("thl,hdl->thd", out, w_uv.double()), lse


def merge_partials_reference(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of n disjoint sets of tokens, from the results over each, in fp64.

        lse = log(sum_i exp(lse_i))        out = sum_i exp(lse_i - lse) out_i

    Args:
        outs: (n, b, s_q, h_q, head_dim_v).
        lses: (n, b, h_q, s_q), natural logarithm; a part with -inf has no weight.

    Returns:
        out (b, s_q, h_q, head_dim_v) and lse (b, h_q, s_q), both fp64.
    """
    lses = lses.double()
    lse = lses.logsumexp(0)
    weight = (lses - lse.masked_fill(lse == float("-inf"), 0)).exp()  # (n, b, h_q, s_q)
    return (weight.transpose(2, 3)[..., None] * outs.double()).sum(0), lse


def mla_append_reference(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    interleaved: bool = True,
) -> torch.Tensor:
    """What a pool holds after ``mla_append``, in fp64; the pool itself stays as it is.

        latent = kv_c / sqrt(mean(kv_c ** 2) + norm_eps) * norm_weight
        rope_a + i rope_b = (k_pe_a + i k_pe_b) * (cos + i sin)[position]      for 32 pairs (a, b) of columns

    The pairs are (2 j, 2 j + 1) if interleaved, else (j, j + 32).

    Args:
        kv_cache: (num_pages, page_size, 1, 576) or (num_pages, page_size, 576), of any float dtype.
        slot_mapping: (n,) integer, page * page_size + line; a token of a slot outside the pool is dropped.
        kv_c, k_pe: (n, 512), (n, 64), of any float dtype.
        norm_weight: (512,); None: no norm.
        norm_eps: added to the mean square.
        cos, sin: (max_positions, 32); None: no rotation.
        positions: (n,) integer; one outside [0, max_positions) gives a NaN rotary part.
        interleaved: how columns pair up.

    Returns:
        (num_pages, page_size, 576) fp64.
    """
    pool = kv_cache.flatten(2).to(torch.float64, copy=True)
    latent, rope = kv_c.double(), k_pe.double()
    if norm_weight is not None:
        latent = latent / (latent.square().mean(1, keepdim=True) + norm_eps).sqrt() * norm_weight.double()
    if cos is not None:
        known = (positions >= 0) & (positions < len(cos))
        turn = torch.complex(cos.double(), sin.double())[positions.where(known, 0)]  # (n, 32)
        pairs = rope.unflatten(1, (32, 2)) if interleaved else rope.unflatten(1, (2, 32)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)  # (n, 32, 2)
        rope = (turned if interleaved else turned.mT).flatten(1)
        rope = rope.masked_fill(~known[:, None], float("nan"))
    inside = (slot_mapping >= 0) & (slot_mapping < pool.shape[0] * pool.shape[1])
    pool.flatten(0, 1)[slot_mapping[inside]] = torch.cat([latent, rope], 1)[inside]
    return pool


def _chunks_by_length(lengths: torch.Tensor, bytes_per_token: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Groups of sequences of similar length, as (indices, longest length); empty sequences are left out."""
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    longest_first = sorted_lengths.tolist()
    start = 0
    while start < len(longest_first) and longest_first[start] > 0:
        longest = longest_first[start]
        in_memory = max(1, CHUNK_BYTES // (bytes_per_token * longest))
        similar = sum(length * 2 > longest for length in longest_first[start : start + in_memory])
        yield order[start : start + similar], longest
        start += similar
