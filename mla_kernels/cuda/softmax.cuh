// Online softmax with a lazy reference.
//
// p = 2^(s * scale_log2 - m). Any m near the running maximum gives the same quotient, so m moves only when a new score
// passes it by more than kSlack (then O and l are rescaled): p <= 2^8, far from overflow in bf16, fp16 and fp32, and
// after a sequence's first tile the rescaling almost never happens.
#pragma once
#include "layout.cuh"

constexpr float kSlack = 8.f;

// The tensor core truncates when it adds to its accumulator. Over the 36 steps of a 576-long dot product that shrinks a
// score by about 1e-6 of itself (measured: LSE off by 4e-5 at 42). Summed a box (4 steps) at a time, with the boxes
// added in fp32, the error is a ninth, but WGMMA drains nine times a tile: 8 % of a compute-bound kernel. So scores are
// summed exactly only where it can be seen: a tile's largest above kLargeScore (log2 units), and not so far below the
// reference that it does not count.
constexpr float kLargeScore = 9.f;
constexpr float kNegligible = 20.f;

__device__ __forceinline__ bool needs_exact_sum(float top, float scale_log2, float m) {
    return fabsf(top) * scale_log2 > kLargeScore && fmaf(top, scale_log2, -m) > -kNegligible;
}

__device__ __forceinline__ bool passes_reference(float score, float scale_log2, float m) {
    return fmaf(score, scale_log2, -m) > kSlack;
}

// Factor that takes sums from reference `before` to `after`; both -inf while nothing was seen.
__device__ __forceinline__ float rescale_factor(float before, float after) {
    return after == -kInfinity ? 1.f : exp2_approx(before - after);
}

// Reference to subtract: a row that has seen nothing has only -inf scores, which must give p = 0.
__device__ __forceinline__ float finite_reference(float m) { return m == -kInfinity ? 0.f : m; }

// First position that query row `row` (s * h_q + h) does not see.
template <class Params>
__device__ __forceinline__ int visible_end(const Params& p, int kv_len, int row) {
    return p.causal ? kv_len - p.s_q + 1 + row / p.h_q : kv_len;
}
