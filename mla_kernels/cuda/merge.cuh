// Results, and items that are split between CTAs: parts in global memory, merged in the same launch.
//
// A part is O (unnormalised) and, per row, its RowStats. Part 0 is the last item of its CTA's share, every other part the
// first of its own. So with few parts the others are long done when part 0 is: its CTA absorbs them into its registers and
// writes the result. With many parts (few, long sequences) every CTA leaves its part, and when its share is done merges
// 1/n-th of the rows. Always in the same order: results do not depend on timing. The launch is cooperative: every CTA
// waited for is resident.
#pragma once
#include "schedule.cuh"
#include "softmax.cuh"

constexpr float kLn2 = 0.693147180559945309f;

// What is known of a row's scores: the reference m (log2 units), the sum l = sum 2^(s - m) for the LSE, and the same sum n
// of the rounded probabilities that were multiplied with V: dividing by n takes their rounding out of a sharp softmax.
struct RowStats {
    float m, l, n;
};

// A part lies as the accumulators do, so that every access is 16 bytes a thread and coalesced. A kernel's `Fragment`
// says what a thread's vector j of four accumulators is: its elements' rows, and where they go in the result.
template <int kRows>
constexpr int kVectors = kRows * kHeadDimV / (4 * kValueThreads);  // a thread

template <int kRows>
struct PartialSlot {
    float4 o[kVectors<kRows>][kValueThreads];
    RowStats stats[kRows];
    float pad[kRows];
};

template <int kRows>
__device__ __forceinline__ PartialSlot<kRows>& partial_slot(const DecodeParams& p, int first_cta, int part) {
    auto* slots = reinterpret_cast<PartialSlot<kRows>*>(p.partials);
    return slots[2 * (first_cta + part * p.group) + (part == 0)];
}

__device__ __forceinline__ int part_of_this_cta(const DecodeParams& p, const WorkItem& w) {
    return (static_cast<int>(blockIdx.x) - w.first_cta) / p.group;
}

// 1 / n, 0 for a row that sees no token, NaN for a row that must be NaN.
__device__ __forceinline__ float inverse_sum(float n) { return n > 0.f ? 1.f / n : n; }

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
    const u32 thread = launder(threadIdx.x);
    auto* out = reinterpret_cast<uint2*>(out_row(p, w.request, w.row_block * kRows));
    for (int i = thread; i < rows * kHeadDimV / 4; i += kValueThreads) out[i] = make_uint2(packed, packed);
    for (int r = thread; r < rows; r += kValueThreads)
        store_lse(p, w.request, w.row_block * kRows + r, w.invalid ? kNan : -kInfinity);
}

constexpr int kAbsorbedParts = 3;

// Whether this CTA finishes a split item of few parts.
__device__ __forceinline__ bool absorbs(const DecodeParams& p, const WorkItem& w) {
    return w.parts <= kAbsorbedParts && part_of_this_cta(p, w) == 0;
}

__device__ __forceinline__ void spin_until(const u32* counter, int count) {
    while (load_acquire(counter) < static_cast<u32>(count)) {
    }
}

// Called by all value threads of the CTA that absorbs `w`'s other parts.
__device__ __forceinline__ void wait_for_parts(const DecodeParams& p, const WorkItem& w) {
    if (threadIdx.x == 0) {
        spin_until(&p.arrivals[2 * w.first_cta], w.parts - 1);
        p.arrivals[2 * w.first_cta] = 0;  // as the next launch expects it
    }
    named_barrier_sync(kBarrierValues, kValueThreads);
}

__device__ __forceinline__ float4 scaled(float4 v, float x, float y, float z, float w) {
    return make_float4(v.x * x, v.y * y, v.z * z, v.w * w);
}

// v + a * weights
__device__ __forceinline__ float4 weighted(float4 v, float4 a, float x, float y, float z, float w) {
    return make_float4(fmaf(a.x, x, v.x), fmaf(a.y, y, v.y), fmaf(a.z, z, v.z), fmaf(a.w, w, v.w));
}

template <int kRows>
__device__ __forceinline__ int valid_rows(const DecodeParams& p, const WorkItem& w) {
    return min(kRows, p.s_q * p.h_q - w.row_block * kRows);
}

// Score warpgroup, one thread a row: where the row's stats go, besides to the value warpgroups.
template <int kRows>
__device__ __forceinline__ void write_stats(const DecodeParams& p, const WorkItem& w, int row, const RowStats& stats) {
    if (w.parts > 1) partial_slot<kRows>(p, w.first_cta, part_of_this_cta(p, w)).stats[row] = stats;
    else if (row < valid_rows<kRows>(p, w)) store_lse(p, w.request, w.row_block * kRows + row, natural_lse(stats.m, stats.l));
}

// Leaves this CTA's part of `w` for whoever merges it.
template <int kRows, class Values>
__device__ __forceinline__ void write_part(const DecodeParams& p, const WorkItem& w, Values& values) {
    const u32 thread = launder(threadIdx.x);
    auto& slot = partial_slot<kRows>(p, w.first_cta, part_of_this_cta(p, w));
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; ++j) slot.o[j][thread] = values.vector(j);
}

// What each part of a row weighs in the result, part 0 first; this CTA holds it, and writes the row's LSE if `reports`.
template <int kRows>
__device__ __forceinline__ void weigh_parts(const DecodeParams& p, const WorkItem& w, int row, bool reports, float (&weight)[kAbsorbedParts]) {
    RowStats stats[kAbsorbedParts];
    float m = -kInfinity, l = 0.f, n = 0.f;
#pragma unroll
    for (int k = 0; k < kAbsorbedParts; ++k) {
        stats[k] = k < w.parts ? partial_slot<kRows>(p, w.first_cta, k).stats[row] : RowStats{-kInfinity, 0.f, 0.f};
        m = fmaxf(m, stats[k].m);
    }
#pragma unroll
    for (int k = 0; k < kAbsorbedParts; ++k) {
        weight[k] = rescale_factor(stats[k].m, m);
        l += stats[k].l * weight[k];
        n += stats[k].n * weight[k];
    }
    const float inverse = inverse_sum(n);
#pragma unroll
    for (int k = 0; k < kAbsorbedParts; ++k) weight[k] *= inverse;
    if (reports && row < valid_rows<kRows>(p, w)) store_lse(p, w.request, w.row_block * kRows + row, natural_lse(m, l));
}

// The result of an item from what this CTA holds, all of it or part 0 of a few. `n`: its rows' sums.
template <int kRows, class Values>
__device__ __forceinline__ void write_out(const DecodeParams& p, const WorkItem& w, Values& values, const float* n) {
    using Fragment = typename Values::Fragment;
    const u32 thread = launder(threadIdx.x);
    u16* out = out_row(p, w.request, w.row_block * kRows);
    const int rows = valid_rows<kRows>(p, w), parts = w.parts;
    float weight[Fragment::kThreadRows][kAbsorbedParts];
#pragma unroll
    for (int i = 0; i < Fragment::kThreadRows; ++i) {
        const int row = Fragment::row(thread, i);
        if (parts > 1) weigh_parts<kRows>(p, w, row, Fragment::has_stats(thread), weight[i]);
        else weight[i][0] = inverse_sum(n[row]);
    }
    const float4* part = &partial_slot<kRows>(p, w.first_cta, 1).o[0][thread];
    const float4* last = &partial_slot<kRows>(p, w.first_cta, 2).o[0][thread];
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; ++j) {
        const auto of = [&](int k, int element) { return weight[Fragment::slot(j, element)][k]; };
        float4 v = scaled(values.vector(j), of(0, 0), of(0, 1), of(0, 2), of(0, 3));
        if (parts > 1) v = weighted(v, part[j * kValueThreads], of(1, 0), of(1, 1), of(1, 2), of(1, 3));
        if (parts > 2) v = weighted(v, last[j * kValueThreads], of(2, 0), of(2, 1), of(2, 2), of(2, 3));
        Fragment::store(out, rows, thread, j, v);
    }
}

// The split items of many parts that this CTA takes part in, to be merged when its share is done. In shared memory: a
// run-time index would put them on the stack.
struct PendingMerges {
    WorkItem item[2];
    int count;
};

// Called by all value threads after they wrote their part of `w`.
__device__ __forceinline__ void announce_part(const DecodeParams& p, const WorkItem& w, PendingMerges& pending) {
    named_barrier_sync(kBarrierValues, kValueThreads);  // with the release below: all their writes come before it
    if (threadIdx.x == 0) {
        atomic_add_acq_rel(&p.arrivals[2 * w.first_cta], 1);
        if (w.parts > kAbsorbedParts) pending.item[pending.count++] = w;
    }
}

constexpr int kMaxParts = 160;  // SMs of the largest Hopper GPU, and a few

template <int kRows>
struct MergeMemory {
    float4 sums[kValueThreads];
    float weights[kMaxParts][kRows];
};

// Merges this CTA's slice of one split item of n parts. A unit is what one warp holds of one vector; a slice is 1/n-th of
// the units, in an order in which warps of the same rows are neighbours.
template <int kRows, class Fragment>
__device__ __forceinline__ void merge_slice(const DecodeParams& p, const WorkItem& w, MergeMemory<kRows>& smem) {
    constexpr int kWarps = kValueThreads / 32, kUnits = kVectors<kRows> * kWarps;
    u32* arrived = &p.arrivals[2 * w.first_cta];
    const u32 thread = launder(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int part = part_of_this_cta(p, w), rows = valid_rows<kRows>(p, w);
    const int begin = kUnits * part / w.parts, units = kUnits * (part + 1) / w.parts - begin;
    const auto place = [](int unit) { return unit / kVectors<kRows>; };  // of a unit's warp in that order
    const int first_row = place(begin) / 2 * Fragment::kWarpStride;
    const int end_row = place(begin + max(units, 1) - 1) / 2 * Fragment::kWarpStride + Fragment::kWarpRows;
    if (units > 0) {
        if (threadIdx.x == 0) spin_until(arrived, w.parts);
        named_barrier_sync(kBarrierValues, kValueThreads);
        for (int r = first_row + warp; r < end_row; r += kWarps) {  // a warp a row, a lane a part
            RowStats stats[kMaxParts / 32];
            float m = -kInfinity, l = 0.f, n = 0.f;
#pragma unroll
            for (int k = 0; k < kMaxParts / 32; ++k) {
                const int i = k * 32 + lane;
                stats[k] = i < w.parts ? partial_slot<kRows>(p, w.first_cta, i).stats[r] : RowStats{-kInfinity, 0.f, 0.f};
                m = fmaxf(m, stats[k].m);
            }
#pragma unroll
            for (int step = 1; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
            if (m == -kInfinity) m = 0.f;
#pragma unroll
            for (int k = 0; k < kMaxParts / 32; ++k) {
                stats[k].m = exp2f(stats[k].m - m);  // its weight
                l += stats[k].l * stats[k].m;
                n += stats[k].n * stats[k].m;
            }
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                l += __shfl_xor_sync(0xffffffffu, l, step);
                n += __shfl_xor_sync(0xffffffffu, n, step);
            }
#pragma unroll
            for (int k = 0; k < kMaxParts / 32; ++k)
                if (k * 32 + lane < w.parts) smem.weights[k * 32 + lane][r] = stats[k].m * inverse_sum(n);
            // the slice that holds the first unit of these rows writes their LSE
            const int first_unit = r / Fragment::kWarpRows * 2 * kVectors<kRows>;
            if (lane == 0 && r < rows && first_unit >= begin && first_unit < begin + units)
                store_lse(p, w.request, w.row_block * kRows + r, natural_lse(m, l));
        }
        named_barrier_sync(kBarrierValues, kValueThreads);

        // With fewer units than warps, `teams` warps share a unit's parts, and the first adds their sums.
        const int teams = max(kWarps / units, 1), team = units < kWarps ? warp / units : 0;
        for (int base = 0; base < units; base += kWarps) {
            const int unit = units < kWarps ? warp % units : base + warp, j = (begin + unit) % kVectors<kRows>;
            const int order = place(begin + unit), owner = (order % 2 * 4 + order / 2) * 32 + lane;
            const bool works = unit < units && team < teams;
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
            if (works) {
#pragma unroll 8
                for (int k = team; k < w.parts; k += teams) {
                    const float* weights = smem.weights[k];
                    const float4 o = partial_slot<kRows>(p, w.first_cta, k).o[j][owner];
                    sum = weighted(sum, o, weights[Fragment::row(owner, Fragment::slot(j, 0))],
                                   weights[Fragment::row(owner, Fragment::slot(j, 1))],
                                   weights[Fragment::row(owner, Fragment::slot(j, 2))],
                                   weights[Fragment::row(owner, Fragment::slot(j, 3))]);
                }
            }
            if (teams > 1) {
                smem.sums[thread] = sum;
                named_barrier_sync(kBarrierValues, kValueThreads);
                for (int other = 1; works && team == 0 && other < teams; ++other)
                    sum = weighted(sum, smem.sums[thread + other * units * 32], 1.f, 1.f, 1.f, 1.f);
            }
            if (works && team == 0) Fragment::store(out_row(p, w.request, w.row_block * kRows), rows, owner, j, sum);
        }
        named_barrier_sync(kBarrierValues, kValueThreads);
    }
    if (threadIdx.x == 0) {  // the last to leave resets the counters for the next launch
        if (atomic_add_acq_rel(arrived + 1, 1) == static_cast<u32>(w.parts - 1)) arrived[0] = arrived[1] = 0;
    }
}
