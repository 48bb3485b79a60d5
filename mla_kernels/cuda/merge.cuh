// The end of split items: every CTA that has one as its last item merges a slice of it, so that nobody merges twice.
//
// A unit is 512 bytes of a part, of one value warp; a slice is a run of units, of neighbouring warps.
// All is latency here, and code that runs once is not in the instruction cache: copies bring every part's piece of the slice
// at once into the place of the tiles, and what follows is short. (Bulk copies take 100 cycles each to issue from the lanes
// of a warp: 4 us for 64 parts.)
#pragma once
#include "parts.cuh"

// Whether this CTA merges a slice of the item.
__device__ __forceinline__ bool merges(const WorkItem& w) { return is_split(w) && w.part < w.slices; }

// All warpgroups but the producer's merge this CTA's slice of `w` in `memory`, of kBytes.
template <int kRows, class Fragment, int kBytes>
struct Merge {
    // Where warps have rows of their own: one a half of the columns, and of a pair of CTAs each merges its half.
    static constexpr int kRuns = Fragment::kWarpStride > 0 && kClusterCtas == 1 ? kGroups : 1;
    static constexpr int kOwnWarps = kValueThreads / 32 / kClusterCtas;  // value warps whose share this CTA merges
    static constexpr int kUnits = kWarpUnits<kRows> * kOwnWarps / kRuns;
    static constexpr int kWarps = kMergeThreads / 32, kUnitBytes = 512;
    struct Sum {
        float4 vector[kUnitVectors];
    };

    const DecodeParams& p;
    const WorkItem w;
    char* memory;
    // (Kept here: every copy's asm is said to change memory, after which nothing is known of p and w.)
    const PartialSlot<kRows>* slots = &partial_slot<kRows>(p, w.first_cta, 0);
    const int stride = 2 * grid_blocks();  // of the other parts' slots, from the one before part 0's
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, parts = w.parts;
    const int begin = kUnits * w.part / w.slices, end = kUnits * (w.part + 1) / w.slices;
    const int first_row = warp_of(begin) * Fragment::kWarpStride;
    const int rows = (warp_of(end - 1) - warp_of(begin)) * Fragment::kWarpStride + Fragment::kWarpRows;
    // Units at a time: all of them, unless there are many parts and few slices.
    const int chunk = min(end - begin, (kBytes - parts * (rows * static_cast<int>(sizeof(RowStats)) + kOwnWarps * 4)) / (parts * kRuns * kUnitBytes));

    __device__ static int half_of(int run) { return kClusterCtas == 2 ? cluster_rank() : run; }
    __device__ static int warp_of(int unit) { return unit / kWarpUnits<kRows>; }
    __device__ static int value_warp(int unit, int run) { return half_of(run) * (kUnits / kWarpUnits<kRows>) + warp_of(unit); }
    __device__ float* ones(int part) const { return reinterpret_cast<float*>(memory + parts * chunk * kRuns * kUnitBytes) + part * kOwnWarps; }
    __device__ RowStats* stats() const { return reinterpret_cast<RowStats*>(ones(parts)); }
    __device__ uint4* piece(int part_and_run, int units) const { return reinterpret_cast<uint4*>(memory + part_and_run * units * kUnitBytes); }

    __device__ const PartialSlot<kRows>& slot(int part) const { return slots[part == 0 ? 0 : part * stride - 1]; }

    __device__ void load_units(int first, int units) const {
#pragma unroll 1
        for (int i = warp; i < parts * kRuns; i += kWarps) {
            const uint4* o = slot(i / kRuns).o[0][0] + (half_of(i % kRuns) * kUnits + first) * 32 + lane;
            uint4* to = piece(i, units) + lane;
#pragma unroll 1
            for (int u = 0; u < units; ++u) copy_async(to + u * 32, o + u * 32);
        }
    }
    __device__ void load_stats() const {
        const int vectors = rows * static_cast<int>(sizeof(RowStats)) / 16;
#pragma unroll 1
        for (int k = warp; k < parts; k += kWarps) {
            const auto* from = reinterpret_cast<const float4*>(&slot(k).stats[first_row]);
            auto* to = reinterpret_cast<float4*>(stats() + k * rows);
#pragma unroll 1
            for (int i = lane; i < vectors; i += 32) copy_async(to + i, from + i);
            if (lane < kOwnWarps / 4) copy_async(ones(k) + lane * 4, slot(k).one + (kClusterCtas == 2 ? half_of(0) * kOwnWarps : 0) + lane * 4);
        }
    }

    // m of every part's stats becomes what the part weighs. The slice that holds a row's first unit writes its LSE.
    __device__ void weigh() const {
        constexpr int kLanes = 16;  // that share a row
        const int own = thread % kLanes;
#pragma unroll 1
        for (int row = thread / kLanes; row < rows; row += kMergeThreads / kLanes) {
            RowStats* of_row = stats() + row;
            float m = -kInfinity, l = 0.f, n = 0.f;
#pragma unroll 1
            for (int k = own; k < parts; k += kLanes) m = fmaxf(m, of_row[k * rows].m);
#pragma unroll
            for (int step = 1; step < kLanes; step *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
#pragma unroll 1
            for (int k = own; k < parts; k += kLanes) {
                const float weight = rescale_factor(of_row[k * rows].m, m);
                l += of_row[k * rows].l * weight;
                n += of_row[k * rows].n * weight;
            }
#pragma unroll
            for (int step = 1; step < kLanes; step *= 2) {
                l += __shfl_xor_sync(0xffffffffu, l, step);
                n += __shfl_xor_sync(0xffffffffu, n, step);
            }
            const float inverse = inverse_sum(n);
#pragma unroll 1
            for (int k = own; k < parts; k += kLanes) of_row[k * rows].m = rescale_factor(of_row[k * rows].m, m) * inverse;
            const int r = first_row + row, first_unit = r / Fragment::kWarpRows * kWarpUnits<kRows>;
            if (own == 0 && r < valid_rows<kRows>(p, w) && first_unit >= begin && first_unit < end)
                store_lse(p, w.request, first_query(p, w), w.row_block * kRows + r, natural_lse(m, l));
        }
    }

    // One warp: unit `first + u` of run `run`, over parts `team`, `team + teams`, ...
    __device__ Sum sum(int first, int u, int run, int units, int team, int teams) const {
        const int warp = value_warp(first + u, run), owner = warp * 32 + lane;
        const RowStats* weights[kUnitVectors][2];
#pragma unroll
        for (int i = 0; i < kUnitVectors; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e)  // an element's slot repeats: 0 0 1 1 or 0 1 0 1
                weights[i][e] = stats() + Fragment::row(owner, Fragment::slot(vector_of(first + u) + i, e * Fragment::kSlotStep)) - first_row;
        Sum v = {};
#pragma unroll 2
        for (int k = team; k < parts; k += teams) {
            float4 o[kUnitVectors];
            unpack_unit(piece(k * kRuns + run, units)[u * 32 + lane], o);
            const float one = ones(k)[warp % kOwnWarps];
#pragma unroll
            for (int i = 0; i < kUnitVectors; ++i) {
                const float x = weights[i][0][k * rows].m * one, y = weights[i][1][k * rows].m * one;
                v.vector[i] = Fragment::kSlotStep == 2 ? weighted(v.vector[i], o[i], x, x, y, y) : weighted(v.vector[i], o[i], x, y, x, y);
            }
        }
        return v;
    }
    __device__ static int vector_of(int unit) { return unit % kWarpUnits<kRows> * kUnitVectors; }

    __device__ void store(int unit, int run, const Sum& v) const {
#pragma unroll
        for (int i = 0; i < kUnitVectors; ++i)
            Fragment::store_one(out_row(p, first_query(p, w), w.row_block * kRows), valid_rows<kRows>(p, w), value_warp(unit, run) * 32 + lane,
                                vector_of(unit) + i, v.vector[i]);
    }

    __device__ void operator()() const {
        if (begin == end) return;
        if (thread == 0) spin_until(&p.arrivals[2 * w.first_cta], all_arrivals(w));
        named_barrier_sync(kBarrierMerge, kMergeThreads);
#pragma unroll 1
        for (int first = begin; first < end; first += chunk) {
            const int units = min(chunk, end - first), jobs = units * kRuns;
            if (first == begin) {
                load_stats();
                copy_async_commit();
            }
            load_units(first, units);
            copy_async_commit();
            if (first == begin) {
                copy_async_wait<1>();
                named_barrier_sync(kBarrierMerge, kMergeThreads);
                weigh();
            }
            copy_async_wait<0>();
            named_barrier_sync(kBarrierMerge, kMergeThreads);
            // Where units are few, warps share a unit's parts, and the first adds what the others have.
            const int teams = max(kWarps / jobs, 1), team = warp / jobs;
#pragma unroll 1
            for (int job = teams > 1 ? warp % jobs : warp; job < jobs; job += kWarps) {
                Sum v = {};
                if (team < teams) v = sum(first, job / kRuns, job % kRuns, units, team, teams);
                if (teams > 1) {
                    auto* sums = reinterpret_cast<Sum*>(memory) + lane;
                    named_barrier_sync(kBarrierMerge, kMergeThreads);  // all have read the parts
                    sums[warp * 32] = v;
                    named_barrier_sync(kBarrierMerge, kMergeThreads);
                    if (team > 0) break;
#pragma unroll 1
                    for (int other = 1; other < teams; ++other)
#pragma unroll
                        for (int i = 0; i < kUnitVectors; ++i) v.vector[i] = weighted(v.vector[i], sums[(warp + other * jobs) * 32].vector[i], 1.f, 1.f, 1.f, 1.f);
                }
                store(first + job / kRuns, job % kRuns, v);
            }
            named_barrier_sync(kBarrierMerge, kMergeThreads);  // all have read the chunk
        }
    }
};

// When a CTA has merged: the last CTA resets the item's counters for the next launch.
__device__ __forceinline__ void leave_merge(const DecodeParams& p, const WorkItem& w) {
    u32* arrived = &p.arrivals[2 * w.first_cta];
    if (threadIdx.x == 0 && atomic_add_relaxed(arrived + 1, 1) == static_cast<u32>(w.slices * kClusterCtas - 1)) arrived[0] = arrived[1] = 0;
}
