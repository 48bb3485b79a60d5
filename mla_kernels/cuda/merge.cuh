// Items of many parts: every CTA that has one as its last item merges a slice of it, so that nobody merges twice.
#pragma once
#include "parts.cuh"

constexpr int kMaxParts = 160;  // SMs of the largest Hopper GPU, and a few

// Whether this CTA merges a slice of the item.
__device__ __forceinline__ bool merges(const WorkItem& w) { return is_split(w) && w.parts > kAbsorbedParts && w.part < w.parts - 1; }

template <int kRows>
struct MergeMemory {
    float4 sums[kScoreThreads];
    RowStats stats[kMaxParts][kRows];  // of the slice's rows; then m is what the part weighs
};

// One warp: the sums of units [first, first + kTogether), of those below `end`, over parts `team`, `team + teams`, ...: kDeep
// parts of each unit on their way at once.
template <int kTogether, int kDeep, int kRows, class Fragment>
__device__ __forceinline__ void sum_units(const DecodeParams& p, const WorkItem& w, const MergeMemory<kRows>& smem, int first, int end,
                                          int team, int teams, float4 (&sum)[kTogether]) {
    constexpr int kStride = sizeof(smem.stats[0]) / sizeof(float);
    const int lane = threadIdx.x % 32, parts = w.parts;
    const auto vector_of = [&](int u) { return (first + u) % kVectors<kRows>; };
    const auto owner_of = [&](int u) {  // the thread that held it
        const int order = (first + u) / kVectors<kRows>;
        return (order % 2 * 4 + order / 2) * 32 + lane;
    };
#pragma unroll
    for (int u = 0; u < kTogether; ++u) sum[u] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int begin = team; begin < parts; begin += kDeep * teams) {
        float4 o[kTogether][kDeep];
#pragma unroll
        for (int u = 0; u < kTogether; ++u)
#pragma unroll
            for (int i = 0; i < kDeep; ++i) {
                const int k = begin + i * teams, owner = owner_of(u);
                o[u][i] = k < parts && first + u < end
                              ? partial_slot<kRows>(p, w.first_cta, k).o[owner / kWarpgroup][vector_of(u)][owner % kWarpgroup]
                              : make_float4(0.f, 0.f, 0.f, 0.f);
            }
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            const float* weights[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) weights[e] = &smem.stats[0][Fragment::row(owner_of(u), Fragment::slot(vector_of(u), e))].m;
#pragma unroll
            for (int i = 0; i < kDeep; ++i) {
                const int k = min(begin + i * teams, parts - 1) * kStride;
                sum[u] = weighted(sum[u], o[u][i], weights[0][k], weights[1][k], weights[2][k], weights[3][k]);
            }
        }
    }
}

// One warp: a unit of the result.
template <int kRows, class Fragment>
__device__ __forceinline__ void store_unit(const DecodeParams& p, const WorkItem& w, int unit, float4 v) {
    const int order = unit / kVectors<kRows>, owner = (order % 2 * 4 + order / 2) * 32 + static_cast<int>(threadIdx.x) % 32;
    Fragment::store_one(out_row(p, w.request, w.row_block * kRows), valid_rows<kRows>(p, w), owner, unit % kVectors<kRows>, v);
}

// Score warpgroup: units [begin, end), kTogether of them a warp at a time.
template <int kTogether, int kDeep, int kRows, class Fragment>
__device__ __forceinline__ void merge_units(const DecodeParams& p, const WorkItem& w, const MergeMemory<kRows>& smem, int begin, int end) {
    const int warp = threadIdx.x % kScoreThreads / 32;
#pragma unroll 1
    for (int first = begin + warp * kTogether; first < end; first += kScoreThreads / 32 * kTogether) {
        float4 sum[kTogether];
        sum_units<kTogether, kDeep, kRows, Fragment>(p, w, smem, first, end, 0, 1, sum);
#pragma unroll
        for (int u = 0; u < kTogether; ++u)
            if (first + u < end) store_unit<kRows, Fragment>(p, w, first + u, sum[u]);
    }
}

// Score warpgroup: merges this CTA's slice of an item. A unit is what one value warp holds of one vector; a slice is its
// share of the units, in an order in which warps of the same rows are neighbours. All is latency here: every load that can
// be is under way at once, and the code is short (it is not in the instruction cache) and there once.
template <int kRows, class Fragment>
__device__ __forceinline__ void merge_slice(const DecodeParams& p, const WorkItem& w, MergeMemory<kRows>& smem) {
    constexpr int kOwners = kValueThreads / 32, kUnits = kVectors<kRows> * kOwners, kWarps = kScoreThreads / 32;
    const int thread = threadIdx.x % kScoreThreads, warp = thread / 32;
    const int parts = w.parts, slices = parts - 1;
    const int begin = kUnits * w.part / slices, units = kUnits * (w.part + 1) / slices - begin;
    if (units == 0) return;
    const auto rows_of = [](int unit) { return unit / kVectors<kRows> / 2 * Fragment::kWarpStride; };  // the first
    const int first_row = rows_of(begin), end_row = rows_of(begin + units - 1) + Fragment::kWarpRows;
    if (thread == 0) spin_until(&p.arrivals[2 * w.first_cta], parts);
    named_barrier_sync(kBarrierScore, kScoreThreads);

    const int slice_rows = end_row - first_row;
#pragma unroll 4
    for (int i = thread; i < parts * slice_rows; i += kScoreThreads)
        smem.stats[i / slice_rows][first_row + i % slice_rows] = partial_slot<kRows>(p, w.first_cta, i / slice_rows).stats[first_row + i % slice_rows];
    named_barrier_sync(kBarrierScore, kScoreThreads);

    constexpr int kLanes = 8;  // that share a row
    for (int row = first_row + thread / kLanes; row < end_row; row += kScoreThreads / kLanes) {
        float m = -kInfinity, l = 0.f, n = 0.f;
        for (int k = thread % kLanes; k < parts; k += kLanes) m = fmaxf(m, smem.stats[k][row].m);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
        for (int k = thread % kLanes; k < parts; k += kLanes) {
            RowStats& stats = smem.stats[k][row];
            const float weight = rescale_factor(stats.m, m);
            l += stats.l * weight;
            n += stats.n * weight;
            stats.m = weight;
        }
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            l += __shfl_xor_sync(0xffffffffu, l, step);
            n += __shfl_xor_sync(0xffffffffu, n, step);
        }
        const float inverse = inverse_sum(n);
        for (int k = thread % kLanes; k < parts; k += kLanes) smem.stats[k][row].m *= inverse;
        // the slice that holds the first unit of these rows writes their LSE
        const int first_unit = row / Fragment::kWarpRows * 2 * kVectors<kRows>;
        if (thread % kLanes == 0 && row < valid_rows<kRows>(p, w) && first_unit >= begin && first_unit < begin + units)
            store_lse(p, w.request, w.row_block * kRows + row, natural_lse(m, l));
    }
    named_barrier_sync(kBarrierScore, kScoreThreads);

    const int end = begin + units;
    if (units > 2 * kWarps) {
        merge_units<4, 4, kRows, Fragment>(p, w, smem, begin, end);
    } else if (units > kWarps) {
        merge_units<2, 8, kRows, Fragment>(p, w, smem, begin, end);
    } else {  // warps share a unit's parts, and the first adds their sums
        const int teams = kWarps / units, team = warp / units, unit = begin + warp % units;
        const bool works = team < teams;
        float4 sum[1] = {};
        if (works) sum_units<1, 16, kRows, Fragment>(p, w, smem, unit, end, team, teams, sum);
        smem.sums[thread] = sum[0];
        named_barrier_sync(kBarrierScore, kScoreThreads);
        if (works && team == 0) {
            for (int other = 1; other < teams; ++other) sum[0] = weighted(sum[0], smem.sums[thread + other * units * 32], 1.f, 1.f, 1.f, 1.f);
            store_unit<kRows, Fragment>(p, w, unit, sum[0]);
        }
    }
}

// Score warpgroup, when it has merged: the last CTA resets the item's counters for the next launch.
__device__ __forceinline__ void leave_merge(const DecodeParams& p, const WorkItem& w) {
    u32* arrived = &p.arrivals[2 * w.first_cta];
    if (threadIdx.x % kScoreThreads == 0 && atomic_add_relaxed(arrived + 1, 1) == static_cast<u32>(w.parts - 2)) arrived[0] = arrived[1] = 0;
}
