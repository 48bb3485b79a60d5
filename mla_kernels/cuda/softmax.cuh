// Online softmax with a lazy reference.
//
// p = 2^(s * scale_log2 - m). Any m near the running maximum gives the same quotient, so m moves only when a new score
// passes it by more than kSlack (then O and l are rescaled): p <= 2^8, far from overflow in bf16, fp16 and fp32, and
// after a sequence's first tile the rescaling almost never happens.
//
// Scores are summed in several chains. The tensor core truncates when it adds to its accumulator: over the 36 steps of a
// 576-long dot product that takes up to 8e-7 of a score away, and not evenly (an LSE of 47 was off by 4e-5). Chains of 4 to
// 9 steps, added in fp32, keep the LSE within 1e-5 at scores of 50; where chains have to be longer, scores past kLargeScore
// are summed again (decode_rows.cu). What truncation takes on average is given back through the scale (decode.py). Worst LSE
// of the fp64 grid: 8.6e-6 with 4 steps, bf16 8.4e-6 and fp16 1.1e-5 with 8, 1.5e-5 with 12, 1.5e-5 and 2.3e-5 with 20.
#pragma once
#include "layout.cuh"

constexpr float kSlack = 8.f;
constexpr float kLargeScore = 14.f;  // log2 units; 10 in natural units
constexpr int kChainBoxes = MLA_BF16 ? 2 : 1;  // of a chain for large scores

__device__ __forceinline__ bool passes_reference(float score, float scale_log2, float m) {
    return fmaf(score, scale_log2, -m) > kSlack;
}

// Factor that takes sums from reference `before` to `after`; both -inf while nothing was seen.
__device__ __forceinline__ float rescale_factor(float before, float after) {
    return after == -kInfinity ? 1.f : exp2_approx(before - after);
}

// Reference to subtract: a row that has seen nothing has only -inf scores, which must give p = 0.
__device__ __forceinline__ float finite_reference(float m) { return m == -kInfinity ? 0.f : m; }

// First position that query row `row` (s * h_q + h) does not see, where `queries` follow on what `kv_len` tells of them all;
// where they are ragged, what all see is known, and the first of them stands for it.
template <class Params>
__device__ __forceinline__ int visible_end(const Params& p, int kv_len, int queries, int row) {
    return p.causal ? kv_len - queries + 1 + row / p.h_q : kv_len;
}
