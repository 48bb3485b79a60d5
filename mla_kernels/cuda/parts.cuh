// Items that are split between CTAs: every CTA leaves its part in global memory, and those that have one as their last item
// merge it in the same launch (merge.cuh), always in the same order: results do not depend on timing. The launch is
// cooperative: every CTA waited for is resident.
#pragma once
#include "producer.cuh"
#include "result.cuh"

// A part: O, unnormalised, as the accumulators lie, so that every access is 16 bytes a thread and coalesced, and its rows'
// stats.
template <int kRows>
struct PartialSlot {
    float4 o[kValueThreads / 32][kVectors<kRows>][32];  // by value warp
    RowStats stats[kRows];
    float pad[kRows];
};

template <int kRows>
__device__ __forceinline__ PartialSlot<kRows>& partial_slot(const DecodeParams& p, int first_cta, int part) {
    auto* slots = reinterpret_cast<PartialSlot<kRows>*>(p.partials);
    return slots[2 * (first_cta + part * grid_blocks()) + (part == 0)];
}

// Whether parts of it are to be merged. (Of a block without loads or arithmetic they have no meaning.)
__device__ __forceinline__ bool is_split(const WorkItem& w) { return kLoads && kMath && w.parts > 1; }

// Score warpgroup, one thread a row, at an item's end: where the row's stats go. `n` is the value warpgroups'.
template <int kRows>
__device__ __forceinline__ void write_stats(const DecodeParams& p, const WorkItem& w, int row, const RowStats& stats, float* n) {
    n[row] = stats.n;
    if (is_split(w)) partial_slot<kRows>(p, w.first_cta, w.part).stats[row] = stats;
    else if (row < valid_rows<kRows>(p, w)) store_lse(p, w.request, first_query(p, w), w.row_block * kRows + row, natural_lse(stats.m, stats.l));
}

__device__ __forceinline__ void spin_until(const u32* counter, u32 count) {
    while (load_acquire(counter) < count) {
    }
}

// What an item's counter of arrivals shows when all parts are there.
__device__ __forceinline__ u32 all_arrivals(const WorkItem& w) { return w.parts * (kValueThreads / 32); }

// Value warpgroups, when the stats are written: leaves this CTA's part of `w` and tells those who merge it, warp by warp.
template <int kRows, class Values>
__device__ __forceinline__ void write_part(const DecodeParams& p, const WorkItem& w, Values& values) {
    const u32 thread = value_thread();
    auto& o = partial_slot<kRows>(p, w.first_cta, w.part).o[thread / 32];
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; ++j) o[j][thread % 32] = values.vector(j);
    __syncwarp();
    if ((threadIdx.x & 31) == 0) red_add_release(&p.arrivals[2 * w.first_cta], 1);
}
