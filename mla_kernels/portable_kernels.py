"""The two Triton kernels behind ``portable.mla_decode``: attention over a share of the tokens, and the merge.

Row r of a sequence is query token r // h_q, head r % h_q, so rows are contiguous in q and out. All rows of a
sequence share its KV lines. Scores are kept in base 2 (scale carries log2 e), as exp2 is what the GPU has.
Loops are ``while``: with NumPy 2.4 the interpreter of Triton 3.6 takes no tensor as a bound of ``range``.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_share(
    q_ptr,  # (b, rows, 576) bf16 | fp16
    kv_ptr,  # pages of lines of 576
    table_ptr,  # (b, max_pages) int32
    seqlens_ptr,  # (b,) int32
    part_out_ptr,  # (b, rows, shares, 512) fp32
    part_lse_ptr,  # (b, rows, shares) fp32, base 2
    scale_log2,
    s_q,
    h_q,
    num_pages,
    max_pages,
    table_stride,
    page_stride,
    line_stride,
    CAUSAL: tl.constexpr,
    PAGE: tl.constexpr,  # a power of two
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (shares, row blocks, b). A program owns ROW_BLOCK query rows and one run of KV tiles."""
    share, shares = tl.program_id(0), tl.num_programs(0)
    sequence = tl.program_id(2).to(tl.int64)
    rows = s_q * h_q
    row = tl.program_id(1) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_exists = row < rows
    latent_dim, rope_dim = tl.arange(0, 512), 512 + tl.arange(0, 64)
    # The interpreter multiplies bf16 operands as integers (their bit patterns), so it is given fp32.
    DOT: tl.constexpr = tl.float32 if INTERPRETED else q_ptr.dtype.element_ty

    length = tl.load(seqlens_ptr + sequence)
    # In pages, since max_pages * PAGE may not fit 32 bits.
    invalid = ((length < 0) | ((length - 1) // PAGE >= max_pages) & (length > 0)).to(tl.int32)
    length = tl.where(invalid != 0, 0, length)
    tiles = tl.cdiv(length, TILE)
    tiles_per_share = tl.cdiv(tiles, shares)
    tile = share * tiles_per_share
    end = tl.minimum(tile + tiles_per_share, tiles)
    sees = tl.zeros([ROW_BLOCK], tl.int32) + length
    if CAUSAL:
        sees += row // h_q + 1 - s_q

    q_row = q_ptr + (sequence * rows + row)[:, None] * 576
    q_latent = tl.load(q_row + latent_dim[None, :], mask=row_exists[:, None], other=0.0)
    q_rope = tl.load(q_row + rope_dim[None, :], mask=row_exists[:, None], other=0.0)
    q_latent, q_rope = q_latent.to(DOT), q_rope.to(DOT)
    row_max = tl.full([ROW_BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROW_BLOCK], tl.float32)
    acc = tl.zeros([ROW_BLOCK, 512], tl.float32)
    while tile < end:
        position = tile * TILE + tl.arange(0, TILE)
        in_use = position < length
        page = tl.load(table_ptr + sequence * table_stride + position // PAGE, mask=in_use, other=0)
        inside = (page >= 0) & (page < num_pages)
        invalid = tl.maximum(invalid, tl.max((in_use & (inside == 0)).to(tl.int32), 0))
        # Slots past the length may hold NaN, and a bad page id must not be followed: both read as zero.
        readable = (in_use & inside)[:, None]
        line = page.to(tl.int64) * page_stride + (position % PAGE).to(tl.int64) * line_stride
        latent = tl.load(kv_ptr + line[:, None] + latent_dim[None, :], mask=readable, other=0.0).to(DOT)
        rope = tl.load(kv_ptr + line[:, None] + rope_dim[None, :], mask=readable, other=0.0).to(DOT)

        scores = (tl.dot(q_latent, tl.trans(latent)) + tl.dot(q_rope, tl.trans(rope))) * scale_log2
        scores = tl.where(position[None, :] < sees[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - finite_max[:, None])
        rescale = tl.exp2(row_max - finite_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None] + tl.dot(p.to(DOT), latent)
        row_max = new_max
        tile += 1

    blind = row_sum == 0.0
    row_sum = tl.where(blind, 1.0, row_sum)
    lse = tl.where(blind, float("-inf"), row_max + tl.log2(row_sum))
    lse = tl.where(invalid != 0, float("nan"), lse)
    part = (sequence * rows + row) * shares + share
    tl.store(part_lse_ptr + part, lse, mask=row_exists)
    part_out = part_out_ptr + part[:, None] * 512 + latent_dim[None, :]
    tl.store(part_out, acc / row_sum[:, None], mask=row_exists[:, None])


@triton.jit
def merge_shares(
    part_out_ptr,  # (b, rows, shares, 512) fp32
    part_lse_ptr,  # (b, rows, shares) fp32, base 2
    out_ptr,  # (b, rows, 512)
    lse_ptr,  # (b, h_q, s_q) fp32, natural
    s_q,
    h_q,
    shares,
    SHARES_PADDED: tl.constexpr,
):
    """Grid (s_q * h_q, b). A program merges the shares of one query row, always in the same order."""
    row, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = (sequence * s_q * h_q + row) * shares
    share = tl.arange(0, SHARES_PADDED)
    lses = tl.load(part_lse_ptr + part + share, mask=share < shares, other=float("-inf"))
    top = tl.max(lses, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lses - top), 0)  # NaN if one share is NaN: so is the whole row then

    dim = tl.arange(0, 512)
    acc = tl.zeros([512], tl.float32)
    end = part + shares
    while part < end:
        weight = tl.exp2(tl.load(part_lse_ptr + part) - top)
        acc += weight * tl.load(part_out_ptr + part * 512 + dim)
        part += 1
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(out_ptr + (sequence * s_q * h_q + row) * 512 + dim, (acc / total).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + (sequence * h_q + row % h_q) * s_q + row // h_q, lse)
