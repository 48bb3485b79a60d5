// Prefill: online softmax over the scores of a thread, two query rows of it (r = 0, 1: the second eight rows below the first).
//
// Element i of an accumulator is of row r = i / 2 % 2 and column i / 4 * 8 + i % 2 (from the thread's own first).
#pragma once
#include "prefill_layout.cuh"

// Probabilities are 2 ^ (score - reference): the reference follows the largest score only when that passes it by this much, since
// then O must be scaled anew. (Rounding is relative, so the size of probabilities does not matter; fp16 holds up to 65,504.)
constexpr float kHeadroom = 8.f;
// Where all rows have a reference, it is not even compared: that takes as long as a third of the rest. If it was too low after all,
// sums tell, and the tile is done again. (O stays finite for values below 2 ^ 63.)
constexpr float kLargest = MLA_BF16 ? 0x1p64f : 0x1p15f;

// Of every eight exponentials this many are evaluated by polynomial on the FMA pipe, not by the exponential unit: that does 16 a
// clock, and at head dim 64 the tensor cores do the products of 16 scores a clock. (It is slower all the same, 4 % at one of
// eight on an H100: neither unit is busy more than two thirds of the time, and the polynomial is nine instructions for one.)
constexpr int kPolynomials = MLA_POLYNOMIALS;

// 2 ^ x for x < 128 (at most 2 ^ -126 below that), to 8e-5 of itself: the integer part into the exponent (Cody and Waite), the
// rest, within 1/2 of 0, by a polynomial of least relative error.
__device__ __forceinline__ float exp2_polynomial(float x) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2 ^ 23: numbers around it are integers
    x = fmaxf(x, -126.f);
    const float shifted = x + kRound;
    const float rest = x - (shifted - kRound);
    float y = fmaf(rest, 0.0551716685f, 0.242611125f);
    y = fmaf(y, rest, 0.693260968f);
    y = fmaf(y, rest, 0.999928057f);
    return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

struct RowStats {
    float reference[2] = {-kInfinity, -kInfinity};  // in powers of two
    float sum[2] = {0.f, 0.f};                      // of this thread's columns

    // Largest of this thread's scores of each row.
    template <int kCount>
    __device__ static void row_max(const float (&s)[kCount], float (&top)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float part[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
            for (int i = 4; i < kCount; i += 4)
#pragma unroll
                for (int k = 0; k < 2; ++k) part[k] = fmaxf(part[k], s[i + 2 * r + k]);
            top[r] = fmaxf(part[0], part[1]);
        }
    }
    // Whether the reference moved, for any row of the warp; then `factor` is what O must be multiplied by.
    template <int kCount>
    __device__ bool follow(const float (&s)[kCount], float scale, float (&factor)[2]) {
        float top[2];
        row_max(s, top);
        const bool passes = top[0] * scale > reference[0] + kHeadroom || top[1] * scale > reference[1] + kHeadroom;
        if (!__any_sync(0xffffffffu, passes)) return false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
            const float after = fmaxf(reference[r], top[r] * scale);
            factor[r] = after == -kInfinity ? 1.f : exp2_approx(reference[r] - after);
            reference[r] = after;
            sum[r] *= factor[r];
        }
        return true;
    }
    // Scores -> probabilities, as the A operand of PV, and their sums.
    template <int kCount>
    __device__ void exponentiate(const float (&s)[kCount], float scale, float (&row_sum)[2], u32 (&packed)[kCount / 8][4]) const {
        float part[2][2] = {};
        float offset[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) offset[r] = reference[r] == -kInfinity ? 0.f : -reference[r];  // no -inf + inf
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            float y[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float x = fmaf(s[i + k], scale, offset[i / 2 & 1]);
                y[k] = i / 4 % 8 < kPolynomials ? exp2_polynomial(x) : exp2_approx(x);
                part[i / 2 & 1][k] += y[k];
            }
            packed[i / 8][i / 2 % 4] = pack_elements(y[0], y[1]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) row_sum[r] = part[r][0] + part[r][1];
    }
    __device__ void add(const float (&row_sum)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] += row_sum[r];
    }
    // When all tiles are seen: sums of whole rows.
    __device__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        }
    }
    __device__ bool blind(int r) const { return reference[r] == -kInfinity && sum[r] == sum[r]; }  // and no score was NaN
    __device__ float inverse(int r) const { return blind(r) ? 0.f : 1.f / sum[r]; }
    __device__ float lse(int r) const {
        const float log2_sum = log2f(sum[r]);  // NaN if a score was
        return blind(r) ? -kInfinity : (reference[r] + log2_sum) * 0.6931471805599453f;
    }
};
