// Results, and items that are split between CTAs: parts in global memory, merged in the same launch.
//
// A part is O (unnormalised) and, per row, its RowStats. Part 0 is the last item of its CTA's share, every other part the
// first of its own. So with few parts the others are long done when part 0 is: its CTA streams them through its ring like
// tiles and writes the result. With many parts (few, long sequences) every CTA leaves its part, and when its share is done merges
// 1/n-th of the rows. Always in the same order: results do not depend on timing. The launch is cooperative: every CTA
// waited for is resident.
#pragma once
#include "producer.cuh"
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
    float4 o[2][kVectors<kRows>][kWarpgroup];  // by value warpgroup
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
    return w.parts > 1 && w.parts <= kAbsorbedParts && part_of_this_cta(p, w) == 0;
}

// A part to be absorbed comes through the ring, in pieces that follow the item's tiles: a value warpgroup's half of it (rows
// of 64: a quarter) in the place of its group of boxes, and with its first piece the stats in that of the rotary box.
template <int kRows>
struct PartPieces {
    static constexpr int kBytes = kVectors<kRows> * kWarpgroup * 16;  // of a part, for one value warpgroup
    static constexpr int kCount = kBytes > kGroupBoxes * kBoxBytes ? kBytes / (kGroupBoxes * kBoxBytes) : 1;
    static constexpr int kPieceBoxes = kBytes / kCount / kBoxBytes;
    static constexpr int kPieceVectors = kVectors<kRows> / kCount;
    static_assert(kPieceBoxes * kBoxBytes * kCount == kBytes, "whole boxes");

    __device__ static u32 ordinal(const WorkItem& w, int piece, int part) {
        return w.ordinal + (w.end - w.begin) + (part - 1) * kCount + piece;
    }
};

__device__ __forceinline__ void spin_until(const u32* counter, int count) {
    while (load_acquire(counter) < static_cast<u32>(count)) {
    }
}

// Loader, one thread: waits for the other parts of `w` and streams them.
template <int kRows>
__device__ __forceinline__ void load_parts(const DecodeParams& p, TileRing& ring, const WorkItem& w) {
    using Pieces = PartPieces<kRows>;
    u32* arrived = &p.arrivals[2 * w.first_cta];
    spin_until(arrived, w.parts - 1);
    *arrived = 0;  // as the next launch expects it
    fence_proxy_async_global();  // what others wrote by ordinary stores is read by copies
#pragma unroll 1
    for (int k = 1; k < w.parts; ++k) {
        const auto& part = partial_slot<kRows>(p, w.first_cta, k);
        ring.load_rotary(Pieces::ordinal(w, 0, k), part.stats, sizeof(part.stats));
    }
#pragma unroll 1
    for (int i = 0; i < (w.parts - 1) * Pieces::kCount * kGroups; ++i) {
        const int k = 1 + i / (Pieces::kCount * kGroups), piece = i / kGroups % Pieces::kCount, g = i % kGroups;
        const auto& half = partial_slot<kRows>(p, w.first_cta, k).o[g];
        ring.load_group(Pieces::ordinal(w, piece, k), g, half[piece * Pieces::kPieceVectors], Pieces::kPieceBoxes);
    }
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
__device__ __forceinline__ void write_stats(const DecodeParams& p, const WorkItem& w, int row, const RowStats& stats, RowStats* absorber) {
    if (absorbs(p, w)) absorber[row] = stats;
    else if (w.parts > 1) partial_slot<kRows>(p, w.first_cta, part_of_this_cta(p, w)).stats[row] = stats;
    else if (row < valid_rows<kRows>(p, w)) store_lse(p, w.request, w.row_block * kRows + row, natural_lse(stats.m, stats.l));
}

// Leaves this CTA's part of `w` for whoever merges it.
template <int kRows, class Values>
__device__ __forceinline__ void write_part(const DecodeParams& p, const WorkItem& w, Values& values) {
    const u32 thread = launder(threadIdx.x);
    auto& o = partial_slot<kRows>(p, w.first_cta, part_of_this_cta(p, w)).o[thread / kWarpgroup];
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; ++j) o[j][thread % kWarpgroup] = values.vector(j);
}

// Adds to part 0, which this CTA holds, the others that the loader brings, and normalises; writes the LSE. `own`: the stats
// of part 0.
template <int kRows, class Values>
__device__ __forceinline__ void absorb_parts(const DecodeParams& p, const WorkItem& w, Values& values, const RowStats* own, TileRing& ring) {
    using Fragment = typename Values::Fragment;
    using Pieces = PartPieces<kRows>;
    const u32 thread = launder(threadIdx.x), g = thread / kWarpgroup;
    const int rows = valid_rows<kRows>(p, w), parts = w.parts;
    const auto stats_of = [&](int k, int row) {
        return k == 0 ? own[row] : reinterpret_cast<const RowStats*>(ring.box(Pieces::ordinal(w, 0, k), kRotaryBox))[row];
    };
    float m[Fragment::kThreadRows], weight[Fragment::kThreadRows], inverse[Fragment::kThreadRows];
    for (int k = 1; k < parts; ++k) ring.wait_box(Pieces::ordinal(w, 0, k), kRotaryBox);
#pragma unroll
    for (int i = 0; i < Fragment::kThreadRows; ++i) {
        const int row = Fragment::row(thread, i);
        float l = 0.f, n = 0.f;
        m[i] = -kInfinity;
#pragma unroll 1
        for (int k = 0; k < parts; ++k) m[i] = fmaxf(m[i], stats_of(k, row).m);
#pragma unroll 1
        for (int k = 0; k < parts; ++k) {
            const RowStats stats = stats_of(k, row);
            const float factor = rescale_factor(stats.m, m[i]);
            l += stats.l * factor;
            n += stats.n * factor;
        }
        inverse[i] = inverse_sum(n);
        weight[i] = rescale_factor(own[row].m, m[i]) * inverse[i];
        if (Fragment::has_stats(thread) && row < rows) store_lse(p, w.request, w.row_block * kRows + row, natural_lse(m[i], l));
    }
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; ++j)
        values.set_vector(j, scaled(values.vector(j), weight[Fragment::slot(j, 0)], weight[Fragment::slot(j, 1)],
                                    weight[Fragment::slot(j, 2)], weight[Fragment::slot(j, 3)]));
#pragma unroll 1
    for (int k = 1; k < parts; ++k) {
#pragma unroll
        for (int i = 0; i < Fragment::kThreadRows; ++i)
            weight[i] = rescale_factor(stats_of(k, Fragment::row(thread, i)).m, m[i]) * inverse[i];
#pragma unroll
        for (int piece = 0; piece < Pieces::kCount; ++piece) {
            const u32 ordinal = Pieces::ordinal(w, piece, k);
            for (int c = 0; c < Pieces::kPieceBoxes; ++c) ring.wait_box(ordinal, g * kGroupBoxes + c);
            const auto* part = reinterpret_cast<const float4*>(ring.box(ordinal, g * kGroupBoxes)) + thread % kWarpgroup;
#pragma unroll
            for (int i = 0; i < Pieces::kPieceVectors; ++i) {
                const int j = piece * Pieces::kPieceVectors + i;
                values.set_vector(j, weighted(values.vector(j), part[i * kWarpgroup], weight[Fragment::slot(j, 0)],
                                              weight[Fragment::slot(j, 1)], weight[Fragment::slot(j, 2)],
                                              weight[Fragment::slot(j, 3)]));
            }
            ring.release_group(ordinal, g);
        }
    }
}

// The result of an item. `weight`: what O is multiplied with.
template <int kRows, class Values>
__device__ __forceinline__ void write_out(const DecodeParams& p, const WorkItem& w, Values& values, const float (&weight)[Values::Fragment::kThreadRows]) {
    using Fragment = typename Values::Fragment;
    constexpr int kTogether = Fragment::kStoreVectors;
    const u32 thread = launder(threadIdx.x);
    u16* out = out_row(p, w.request, w.row_block * kRows);
    const int rows = valid_rows<kRows>(p, w);
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; j += kTogether) {
        float4 v[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
            v[i] = scaled(values.vector(j + i), weight[Fragment::slot(j + i, 0)], weight[Fragment::slot(j + i, 1)],
                          weight[Fragment::slot(j + i, 2)], weight[Fragment::slot(j + i, 3)]);
        Fragment::store(out, rows, thread, j, v);
    }
}

// The split items of many parts that this CTA takes part in, to be merged when its share is done. In shared memory: a
// run-time index would put them on the stack.
struct PendingMerges {
    WorkItem item[2];
    int count;
};

// Run by one warp: tells the other CTAs of the parts that this one leaves, so that nobody waits for the writes to land.
__device__ __forceinline__ void announce_parts(const DecodeParams& p, ItemQueue& queue, u64* part_written) {
    u32 phase = 0;
    for (u32 index = 0;; ++index) {
        const WorkItem& w = queue.wait(index);
        if (w.request < 0) break;
        if (w.parts > 1 && !absorbs(p, w)) {
            mbarrier_wait(part_written, phase);
            phase ^= 1;
            if ((threadIdx.x & 31) == 0) atomic_add_acq_rel(&p.arrivals[2 * w.first_cta], 1);
        }
        queue.release(index);
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
                    const float4 o = partial_slot<kRows>(p, w.first_cta, k).o[owner / kWarpgroup][j][owner % kWarpgroup];
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
            if (works && team == 0) Fragment::store_one(out_row(p, w.request, w.row_block * kRows), rows, owner, j, sum);
        }
        named_barrier_sync(kBarrierValues, kValueThreads);
    }
    if (threadIdx.x == 0) {  // the last to leave resets the counters for the next launch
        if (atomic_add_acq_rel(arrived + 1, 1) == static_cast<u32>(w.parts - 1)) arrived[0] = arrived[1] = 0;
    }
}
