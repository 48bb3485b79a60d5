// Items that are split between CTAs: partial results in global memory, merged in the same launch.
//
// A part is O (unnormalised) and, per row, the reference exponent m and the sum l = sum 2^(s - m). Every CTA leaves at
// most two parts: slot 0 for an item begun elsewhere, slot 1 for an item that goes on elsewhere. When its share is done
// it waits for the other parts of those items and merges its own 1/n-th of each, always in the same order, so results
// do not depend on timing. The launch is cooperative: every CTA waited for is resident.
#pragma once
#include "schedule.cuh"

constexpr float kLn2 = 0.693147180559945309f;
constexpr int kVectors = kHeadDimV / 4;  // float4 a row

template <int kRows>
struct PartialSlot {
    float4 o[kRows][kVectors];
    float2 stats[kRows];  // (m, l), m in units of log2
};

template <int kRows>
__device__ __forceinline__ PartialSlot<kRows>& partial_slot(const DecodeParams& p, int first_cta, int part) {
    auto* slots = reinterpret_cast<PartialSlot<kRows>*>(p.partials);
    return slots[2 * (first_cta + part * p.group) + (part == 0)];
}

__device__ __forceinline__ int part_of_this_cta(const DecodeParams& p, const WorkItem& w) {
    return (static_cast<int>(blockIdx.x) - w.first_cta) / p.group;
}

// 1 / l, 0 for a row that sees no token, NaN for a row that must be NaN.
__device__ __forceinline__ float inverse_sum(float l) { return l > 0.f ? 1.f / l : l; }

// Natural-log LSE of a row from its reference (log2 units) and sum.
__device__ __forceinline__ float natural_lse(float m, float l) {
    return l == 0.f ? -kInfinity : fmaf(m, kLn2, logf(l));
}

__device__ __forceinline__ void store_lse(const DecodeParams& p, int request, int row, float lse) {
    const int s = row / p.h_q, h = row - s * p.h_q;
    p.lse[(static_cast<long long>(request) * p.h_q + h) * p.s_q + s] = lse;
}

__device__ __forceinline__ u16* out_row(const DecodeParams& p, int request, int row) {
    return p.out + (static_cast<long long>(request) * p.s_q * p.h_q + row) * kHeadDimV;
}

// An item without tiles: zero and -inf for an empty sequence, NaN for a length outside the page table.
template <int kRows>
__device__ __forceinline__ void write_empty(const DecodeParams& p, const WorkItem& w) {
    const int rows = min(kRows, p.s_q * p.h_q - w.row_block * kRows);
    const float fill = w.invalid ? kNan : 0.f;
    const u32 packed = pack_elements(fill, fill);
    for (int i = threadIdx.x; i < rows * kVectors; i += kConsumers) {
        u16* row = out_row(p, w.request, w.row_block * kRows + i / kVectors);
        reinterpret_cast<uint2*>(row)[i % kVectors] = make_uint2(packed, packed);
    }
    for (int r = threadIdx.x; r < rows; r += kConsumers)
        store_lse(p, w.request, w.row_block * kRows + r, w.invalid ? kNan : -kInfinity);
}

// The split items that this CTA takes part in, to be merged when its share is done. In shared memory: a run-time index
// would put them on the stack.
struct PendingMerges {
    WorkItem item[2];
};

// Called by all consumers after they wrote their part of `w`, the `count`-th of this CTA.
__device__ __forceinline__ void announce_part(const DecodeParams& p, const WorkItem& w, PendingMerges& pending, int count) {
    __threadfence();
    if (threadIdx.x == 0) pending.item[count] = w;
    named_barrier_sync(kBarrierConsumers, kConsumers);
    if (threadIdx.x == 0) atomic_add_acq_rel(&p.arrivals[2 * w.first_cta], 1);
}

// Merges this CTA's slice of one split item. `weights` is free shared memory, kRows + 2 * parts floats.
template <int kRows>
__device__ __forceinline__ void merge_slice(const DecodeParams& p, const WorkItem& w, float* weights) {
    u32* arrived = &p.arrivals[2 * w.first_cta];
    if (threadIdx.x == 0)
        while (load_acquire(arrived) < static_cast<u32>(w.parts)) {
        }
    named_barrier_sync(kBarrierConsumers, kConsumers);

    const int rows = min(kRows, p.s_q * p.h_q - w.row_block * kRows);
    const int part = part_of_this_cta(p, w);
    const int begin = rows * kVectors * part / w.parts, end = rows * kVectors * (part + 1) / w.parts;
    const int first_row = begin / kVectors, slice_rows = (end + kVectors - 1) / kVectors - first_row;
    for (int r = threadIdx.x; r < slice_rows; r += kConsumers) {
        const int row = first_row + r;
        float m = -kInfinity, l = 0.f;
        for (int i = 0; i < w.parts; ++i) m = fmaxf(m, partial_slot<kRows>(p, w.first_cta, i).stats[row].x);
        const float reference = m == -kInfinity ? 0.f : m;
        for (int i = 0; i < w.parts; ++i) {
            const float2 stats = partial_slot<kRows>(p, w.first_cta, i).stats[row];
            l += stats.y * exp2f(stats.x - reference);
        }
        for (int i = 0; i < w.parts; ++i) {
            const float2 stats = partial_slot<kRows>(p, w.first_cta, i).stats[row];
            weights[i * slice_rows + r] = exp2f(stats.x - reference) * inverse_sum(l);
        }
        if (row * kVectors >= begin)
            store_lse(p, w.request, w.row_block * kRows + row, natural_lse(reference, l));
    }
    named_barrier_sync(kBarrierConsumers, kConsumers);

    for (int i = begin + threadIdx.x; i < end; i += kConsumers) {
        const int row = i / kVectors, column = i - row * kVectors;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
        for (int k = 0; k < w.parts; ++k) {
            const float weight = weights[k * slice_rows + row - first_row];
            const float4 o = partial_slot<kRows>(p, w.first_cta, k).o[row][column];
            sum.x = fmaf(weight, o.x, sum.x);
            sum.y = fmaf(weight, o.y, sum.y);
            sum.z = fmaf(weight, o.z, sum.z);
            sum.w = fmaf(weight, o.w, sum.w);
        }
        u16* out = out_row(p, w.request, w.row_block * kRows + row);
        reinterpret_cast<uint2*>(out)[column] = make_uint2(pack_elements(sum.x, sum.y), pack_elements(sum.z, sum.w));
    }
    named_barrier_sync(kBarrierConsumers, kConsumers);
    if (threadIdx.x == 0) {  // the last to leave resets the counters for the next launch
        if (atomic_add_acq_rel(arrived + 1, 1) == static_cast<u32>(w.parts - 1)) arrived[0] = arrived[1] = 0;
    }
}
