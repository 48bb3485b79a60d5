// Items that are split between CTAs: every CTA leaves its part in global memory, and those that have one as their last item
// merge it in the same launch (merge.cuh), always in the same order: results do not depend on timing. The launch is
// cooperative: every CTA waited for is resident.
#pragma once
#include "producer.cuh"
#include "result.cuh"

// Vectors of O in 16 bytes of a part: writing parts and reading them again is most of what merging takes, so that beside
// bf16 elements they are fp16 (64 rows' more in 1 us less, and nothing in the result's error). Beside fp16 ones that would show:
// an error of 2.6e-4 instead of 2.3e-4.
constexpr int kUnitVectors = MLA_BF16 ? 2 : 1;
// Of a value warp.
template <int kRows>
constexpr int kWarpUnits = kVectors<kRows> / kUnitVectors;

// A part: O, unnormalised, as the accumulators lie, so that every access is 16 bytes a thread and coalesced, and its rows'
// stats. Each value warp's O times a power of two, so that fp16 has room for it.
template <int kRows>
struct alignas(128) PartialSlot {
    uint4 o[kValueThreads / 32][kWarpUnits<kRows>][32];  // by value warp
    float one[kValueThreads / 32];                       // what a one in its O stands for
    RowStats stats[kRows];
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

__device__ __forceinline__ uint4 pack_unit(const float4 (&v)[kUnitVectors], float scale) {
    if constexpr (kUnitVectors == 1) {
        return make_uint4(__float_as_uint(v[0].x), __float_as_uint(v[0].y), __float_as_uint(v[0].z), __float_as_uint(v[0].w));
    } else {
        return make_uint4(pack_halves(v[0].x * scale, v[0].y * scale), pack_halves(v[0].z * scale, v[0].w * scale),
                          pack_halves(v[1].x * scale, v[1].y * scale), pack_halves(v[1].z * scale, v[1].w * scale));
    }
}
__device__ __forceinline__ void unpack_unit(uint4 u, float4 (&v)[kUnitVectors]) {
    if constexpr (kUnitVectors == 1) {
        v[0] = make_float4(__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w));
    } else {
        const float2 a = unpack_halves(u.x), b = unpack_halves(u.y), c = unpack_halves(u.z), d = unpack_halves(u.w);
        v[0] = make_float4(a.x, a.y, b.x, b.y), v[1] = make_float4(c.x, c.y, d.x, d.y);
    }
}

// The power of two (its exponent, as fp32 has it) that brings what is at most `top` under 2^15; of infinity, one.
__device__ __forceinline__ u32 exponent_to_fit(float top) {
    constexpr u32 kOne = 127, kMost = 253;  // whose inverse is a normal number, too
    const u32 own = __float_as_uint(top) >> 23;
    return own == 255 ? kOne : min(2 * kOne + 14 - own, kMost);
}
__device__ __forceinline__ float power_of_two(u32 exponent) { return __uint_as_float(exponent << 23); }
template <int kRows, class Values>
__device__ __forceinline__ float largest(Values& values) {
    float top = 0.f;
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; ++j) {
        const float4 v = values.vector(j);
        top = fmaxf(fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w)));
    }
    return __uint_as_float(__reduce_max_sync(0xffffffffu, static_cast<int>(__float_as_uint(top))));  // of the warp
}

// Value warpgroups, when the stats are written: leaves this CTA's part of `w` and tells those who merge it, warp by warp.
template <int kRows, class Values>
__device__ __forceinline__ void write_part(const DecodeParams& p, const WorkItem& w, Values& values) {
    const u32 thread = value_thread(), warp = thread / 32, lane = thread % 32;
    auto& slot = partial_slot<kRows>(p, w.first_cta, w.part);
    const u32 exponent = kUnitVectors == 1 ? 127 : exponent_to_fit(largest<kRows>(values));
#pragma unroll
    for (int i = 0; i < kWarpUnits<kRows>; ++i) {
        float4 v[kUnitVectors];
#pragma unroll
        for (int k = 0; k < kUnitVectors; ++k) v[k] = values.vector(i * kUnitVectors + k);
        slot.o[warp][i][lane] = pack_unit(v, power_of_two(exponent));
    }
    if (lane == 0) slot.one[warp] = power_of_two(254 - exponent);
    __syncwarp();
    if (lane == 0) red_add_release(&p.arrivals[2 * w.first_cta], 1);
}
