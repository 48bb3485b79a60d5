// What becomes of an item's rows: their sums, the LSE, and the result in global memory.
//
// A kernel's `Fragment` says what a value thread's vector j of four accumulators is: its elements' rows, and where they go.
#pragma once
#include "schedule.cuh"
#include "softmax.cuh"

constexpr float kLn2 = 0.693147180559945309f;

// What is known of a row's scores: the reference m (log2 units), the sum l = sum 2^(s - m) for the LSE, and the same sum n
// of the rounded probabilities that were multiplied with V: dividing by n takes their rounding out of a sharp softmax.
struct RowStats {
    float m, l, n;
};

// Vectors of four accumulators that a value thread holds.
template <int kRows>
constexpr int kVectors = kRows * kHeadDimV / (4 * kValueThreads);

// 1 / n, 0 for a row that sees no token, NaN for a row that must be NaN.
__device__ __forceinline__ float inverse_sum(float n) { return n > 0.f ? 1.f / n : n; }

// Natural-log LSE of a row from its reference (log2 units) and sum.
__device__ __forceinline__ float natural_lse(float m, float l) {
    return l == 0.f ? -kInfinity : fmaf(m, kLn2, logf(l));
}

// `row` (s * h_q + h) of the item's sequence: into (b, h_q, s_q), of ragged queries into (h_q, total_q).
__device__ __forceinline__ void store_lse(const DecodeParams& p, int request, long long first, int row, float lse) {
    const int s = row / p.h_q, h = row - s * p.h_q;
    if constexpr (kRagged)
        if (p.cu_seqlens_q != nullptr) {
            p.lse[static_cast<long long>(h) * p.total_q + first + s] = lse;
            return;
        }
    p.lse[(static_cast<long long>(request) * p.h_q + h) * p.s_q + s] = lse;
}

// `first`: query tokens before the sequence's.
__device__ __forceinline__ u16* out_row(const DecodeParams& p, long long first, int row) {
    return p.out + (first * p.h_q + row) * kHeadDimV;
}

// This thread among all value threads of its row block.
__device__ __forceinline__ u32 value_thread() {
    if constexpr (kClusterCtas == 2) return cluster_rank() * (kValueThreads / 2) + launder(threadIdx.x);
    return launder(threadIdx.x);
}

template <int kRows>
__device__ __forceinline__ int valid_rows(const DecodeParams& p, const WorkItem& w) {
    return min(kRows, query_tokens(p, w) * p.h_q - w.row_block * kRows);
}

// An item without tiles: zero and -inf for an empty sequence, NaN for a length outside the page table.
template <int kRows>
__device__ __forceinline__ void write_empty(const DecodeParams& p, const WorkItem& w) {
    const int rows = valid_rows<kRows>(p, w);
    const float fill = w.invalid ? kNan : 0.f;
    const u32 packed = pack_elements(fill, fill);
    const u32 thread = value_thread();
    auto* out = reinterpret_cast<uint2*>(out_row(p, first_query(p, w), w.row_block * kRows));
#pragma unroll 1
    for (int i = thread; i < rows * kHeadDimV / 4; i += kValueThreads) out[i] = make_uint2(packed, packed);
#pragma unroll 1
    for (int r = thread; r < rows; r += kValueThreads)
        store_lse(p, w.request, first_query(p, w), w.row_block * kRows + r, w.invalid ? kNan : -kInfinity);
}

// v + a * weights
__device__ __forceinline__ float4 weighted(float4 v, float4 a, float x, float y, float z, float w) {
    return make_float4(fmaf(a.x, x, v.x), fmaf(a.y, y, v.y), fmaf(a.z, z, v.z), fmaf(a.w, w, v.w));
}

// The result of an item. `weight`: what O is multiplied with.
template <int kRows, class Values>
__device__ __forceinline__ void write_out(const DecodeParams& p, const WorkItem& w, Values& values, const float (&weight)[Values::Fragment::kThreadRows]) {
    using Fragment = typename Values::Fragment;
    const u32 thread = value_thread();
    u16* out = out_row(p, first_query(p, w), w.row_block * kRows);
    const int rows = valid_rows<kRows>(p, w);
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; j += Fragment::kStoreVectors)
        Fragment::store(out, rows, thread, j, [&](int i, int half) {
            const float4 v = values.vector(j + i);
            const float first = weight[Fragment::slot(j + i, 2 * half)], second = weight[Fragment::slot(j + i, 2 * half + 1)];
            return half == 0 ? pack_elements(v.x * first, v.y * second) : pack_elements(v.z * first, v.w * second);
        });
}
