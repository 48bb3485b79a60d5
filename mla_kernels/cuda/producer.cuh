// The producer warps: one walks the CTA's work items, one streams their KV tiles into a ring, as far ahead of the others as
// the ring is deep, across item borders.
#pragma once
#include "schedule.cuh"

// What a cubin does: all of it, or one of the building blocks that the study measures alone.
enum class Work {
    kDecode,    // everything
    kStream,    // the loads and the handing over of buffers, no arithmetic
    kMma,       // the WGMMA sequence on whatever lies in shared memory, no loads
    kSkeleton,  // loads and WGMMA, without softmax and the exchange of P
};
constexpr Work kWork = static_cast<Work>(MLA_WORK);
constexpr bool kLoads = kWork != Work::kMma;
constexpr bool kMath = kWork != Work::kStream;
constexpr bool kSoftmax = kWork == Work::kDecode;

constexpr int kGroupSlots = MLA_GROUP_SLOTS, kRotarySlots = MLA_ROTARY_SLOTS;
static_assert(kGroupSlots >= kGroups + 1 && kRotarySlots >= 2, "a tile and what comes after it");

// Tiles in flight, known by their ordinal in the CTA's stream. A tile is two groups of four boxes and a rotary box, each
// a slot of its own, so that a group's slot is free again when its value warpgroup is done. The score warpgroup waits
// for every box; when a tile is scored, P takes the place of its rotary box, which nobody else needs.
struct TileRing {  // at a multiple of 1,024 bytes, the swizzle's atom
    static constexpr int kBytes = (kGroupSlots * kGroupBoxes + kRotarySlots) * kBoxBytes;  // of boxes

    u16 group[kGroupSlots][kGroupBoxes][kBoxElements];
    u16 rotary[kRotarySlots][kBoxElements];
    u64 group_full[kGroupSlots][kGroupBoxes];  // the box has landed
    u64 group_empty[kGroupSlots];              // four warps have read the group for the last time
    u64 rotary_full[kRotarySlots];
    u64 rotary_empty[kRotarySlots];  // eight warps have read P
    u64 scored[kRotarySlots];        // P lies there, and QK no longer reads the tile

    __device__ void init_barriers() {
        for (int i = 0; i < kGroupSlots; ++i) {
            for (int c = 0; c < kGroupBoxes; ++c) mbarrier_init(&group_full[i][c], kGathers ? kGatherThreads : 1);
            mbarrier_init(&group_empty[i], kWarpgroup / 32);
        }
        for (int i = 0; i < kRotarySlots; ++i) {
            mbarrier_init(&rotary_full[i], kGathers ? kGatherThreads + 1 : 1);
            mbarrier_init(&rotary_empty[i], kValueThreads / 32);
            mbarrier_init(&scored[i], kScoreThreads / 32);
        }
    }

    __device__ static u32 group_slot(u32 ordinal, u32 g) { return (ordinal * kGroups + g) % kGroupSlots; }
    __device__ static u32 group_phase(u32 ordinal, u32 g) { return (ordinal * kGroups + g) / kGroupSlots & 1; }
    __device__ static u32 rotary_slot(u32 ordinal) { return ordinal % kRotarySlots; }
    __device__ static u32 rotary_phase(u32 ordinal) { return ordinal / kRotarySlots & 1; }

    __device__ u16* box(u32 ordinal, int c) {
        if (!kPieces || c == kRotaryBox) return query_box(ordinal, c);
        return group[group_slot(ordinal, c / kGroupBoxes)][0] + c % kGroupBoxes * (kBoxStride / 2);
    }
    __device__ u16* query_box(u32 ordinal, int c) {
        return c == kRotaryBox ? rotary[rotary_slot(ordinal)] : group[group_slot(ordinal, c / kGroupBoxes)][c % kGroupBoxes];
    }
    __device__ void wait_box(u32 ordinal, int c) {
        if (c == kRotaryBox) mbarrier_wait(&rotary_full[rotary_slot(ordinal)], rotary_phase(ordinal));
        else mbarrier_wait(&group_full[group_slot(ordinal, c / kGroupBoxes)][kPieces ? 0 : c % kGroupBoxes], group_phase(ordinal, c / kGroupBoxes));
        if constexpr (kGathers) fence_proxy_async();  // threads wrote the box, WGMMA reads it
    }
    // Score warpgroup, every thread, after its writes to the tile: hands the tile to the value warpgroups.
    __device__ void publish(u32 ordinal) {
        if (!kLoads) return;
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(&scored[rotary_slot(ordinal)]);
    }
    __device__ void wait_scored(u32 ordinal) {
        if (kLoads) mbarrier_wait(&scored[rotary_slot(ordinal)], rotary_phase(ordinal));
    }
    // Value warpgroup g, every thread, when it has read its group and P.
    __device__ void release(u32 ordinal, int g) {
        if (!kLoads) return;
        const u32 lane = launder(threadIdx.x) & 31;
        if (lane == 0) mbarrier_arrive(&group_empty[group_slot(ordinal, g)]);
        if (lane == 1) mbarrier_arrive(&rotary_empty[rotary_slot(ordinal)]);
    }
    // Score warpgroup, every thread, when it has read a tile that no value warpgroup reads.
    __device__ void release_unscored(u32 ordinal) {
        if (!kLoads) return;
        publish(ordinal);  // keeps the phases in step
        const u32 lane = launder(threadIdx.x & 31);
        if (lane < kGroups) mbarrier_arrive(&group_empty[group_slot(ordinal, lane)]);
        if (lane == kGroups) mbarrier_arrive(&rotary_empty[rotary_slot(ordinal)], kValueThreads / kScoreThreads);
    }
    // Until the group's slot is this ordinal's. Who has not waited for the slot's use before (it was the other warpgroup's)
    // would otherwise take the parity of the one before that for this one's.
    __device__ void wait_free(u32 ordinal, u32 g) { mbarrier_wait(&group_empty[group_slot(ordinal, g)], group_phase(ordinal, g) ^ 1); }
    // Until a tile has been read.
    __device__ void wait_read(u32 ordinal) {
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g) mbarrier_wait(&group_empty[group_slot(ordinal, g)], group_phase(ordinal, g));
    }
    // One thread: the nine boxes at row `y` of page or sequence `z`.
    __device__ void load(u32 ordinal, const TensorMap* map, int y, int z) {
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g) {
            const u32 slot = group_slot(ordinal, g);
            mbarrier_wait(&group_empty[slot], group_phase(ordinal, g) ^ 1);
#pragma unroll 1
            for (int c = 0; c < kGroupBoxes; ++c) {
                mbarrier_arrive_expect_tx(&group_full[slot][c], kBoxBytes);
                tma_load_3d(group[slot][c], map, &group_full[slot][c], (g * kGroupBoxes + c) * kBoxColumns, y, z);
            }
        }
        const u32 slot = rotary_slot(ordinal);
        mbarrier_wait(&rotary_empty[slot], rotary_phase(ordinal) ^ 1);
        mbarrier_arrive_expect_tx(&rotary_full[slot], kBoxBytes);
        tma_load_3d(rotary[slot], map, &rotary_full[slot], kRotaryBox * kBoxColumns, y, z);
    }
    // `kLoaders` warps, each with slots of its own (so that it has waited for every use of them: a parity cannot tell a phase
    // from the one two before), the last also with the rotary boxes: what `warp` loads of a tile, in pieces of `rows` rows.
    // `find(first, y, z)`: where in the pages the piece from row `first` on is.
    template <class Find>
    __device__ void load_pieces(u32 ordinal, int warp, const TensorMap* map, const TensorMap* rotary_map, int rows, Find find) {
        const bool leads = (threadIdx.x & 31) == 0;
        int y, z;
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g) {
            const u32 slot = group_slot(ordinal, g);
            if (loader_of(slot) != warp) continue;
            if (leads) begin_group(ordinal, g);
#pragma unroll 1
            for (int first = 0; first < kTileTokens; first += rows) {
                find(first, y, z);
                char* to = reinterpret_cast<char*>(group[slot]) + first / 8 * kRowsStride;
                if (leads) tma_load_5d(to, map, group_full[slot], 0, 0, g * kGroupBoxes, y / 8, z);
            }
        }
        if (warp != kLoaders - 1) return;
        if (leads) begin_rotary(ordinal);
        const u32 slot = rotary_slot(ordinal);
#pragma unroll 1
        for (int first = 0; first < kTileTokens; first += rows) {
            find(first, y, z);
            if (leads) tma_load_3d(rotary[slot] + first * kBoxColumns, rotary_map, &rotary_full[slot], kRotaryBox * kBoxColumns, y, z);
        }
    }
    // The same of 64 query rows from row `y` of plane `z` on, in whole boxes.
    __device__ void load_queries(u32 ordinal, int warp, const TensorMap* map, int y, int z) {
        if ((threadIdx.x & 31) != 0) return;
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g) {
            const u32 slot = group_slot(ordinal, g);
            if (loader_of(slot) != warp) continue;
            begin_group(ordinal, g);
#pragma unroll 1
            for (int c = 0; c < kGroupBoxes; ++c)
                tma_load_3d(group[slot][c], map, group_full[slot], (g * kGroupBoxes + c) * kBoxColumns, y, z);
        }
        if (warp != kLoaders - 1) return;
        begin_rotary(ordinal);
        const u32 slot = rotary_slot(ordinal);
        tma_load_3d(rotary[slot], map, &rotary_full[slot], kRotaryBox * kBoxColumns, y, z);
    }
    __device__ static int loader_of(u32 slot) { return static_cast<int>(slot) * kLoaders / kGroupSlots; }
    __device__ void begin_group(u32 ordinal, int g) {
        const u32 slot = group_slot(ordinal, g);
        mbarrier_wait(&group_empty[slot], group_phase(ordinal, g) ^ 1);
        mbarrier_arrive_expect_tx(group_full[slot], kGroupBoxes * kBoxBytes);
    }
    __device__ void begin_rotary(u32 ordinal) {
        const u32 slot = rotary_slot(ordinal);
        mbarrier_wait(&rotary_empty[slot], rotary_phase(ordinal) ^ 1);
        mbarrier_arrive_expect_tx(&rotary_full[slot], kBoxBytes);
    }
    // `kGatherThreads` threads, `warp` of their warps: the nine boxes, a row of 1,152 bytes by eight neighbours.
    // `find(row)`: where row `row` is, or null for zeros. (Every lane asks, four rows at a time.)
    template <class Find>
    __device__ void gather(u32 ordinal, int warp, Find find) {
        const int lane = threadIdx.x & 31, chunk = lane % 8;
        const u32 last = rotary_slot(ordinal), slots[kGroups] = {group_slot(ordinal, 0), group_slot(ordinal, 1)};
        if (lane == 0) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) mbarrier_wait(&group_empty[slots[g]], group_phase(ordinal, g) ^ 1);
            mbarrier_wait(&rotary_empty[last], rotary_phase(ordinal) ^ 1);
        }
        __syncwarp();
#pragma unroll(kLoaders < 3 ? 2 : 1)
        for (int quad = warp; quad < kTileTokens / 4; quad += kGatherThreads / 32) {
            const int row = quad * 4 + lane / 8;
            const u16* from = find(row);
            const u32 bytes = from == nullptr ? 0 : 16, to = swizzled_offset(row, chunk);
#pragma unroll
            for (int c = 0; c < kBoxes; ++c) {
                u16* box = c == kRotaryBox ? rotary[last] : group[slots[c / kGroupBoxes % kGroups]][c % kGroupBoxes];
                copy_async_or_zero(reinterpret_cast<char*>(box) + to, from + c * kBoxColumns + chunk * 8, bytes);
            }
        }
#pragma unroll
        for (int c = 0; c < kBoxesV; ++c) copy_async_arrive(&group_full[slots[c / kGroupBoxes]][c % kGroupBoxes]);
        copy_async_arrive(&rotary_full[last]);
        if (warp == 0 && lane == 0) mbarrier_arrive(&rotary_full[last]);  // also for what this thread wrote besides
    }
};

// Work items on their way from the producer to the other roles. `request` < 0 ends the share.
struct ItemQueue {
    static constexpr int kSlots = 3;
    // Warps that read it: values, scores, loader (several where pages are no tiles), and where queries do not come through the ring
    // theirs.
    static constexpr int kReaders = kMergeThreads / 32 + 1 + (MLA_ROWS < kTileTokens) + kLoaders - 1;
    WorkItem item[kSlots];
    u64 full[kSlots], empty[kSlots];

    __device__ void init_barriers() {
        for (int i = 0; i < kSlots; ++i) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], kReaders);
        }
    }
    __device__ WorkItem& open(u32 index) {  // to be written, by one warp
        mbarrier_wait(&empty[index % kSlots], (index / kSlots & 1) ^ 1);
        return item[index % kSlots];
    }
    __device__ void close(u32 index) {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(&full[index % kSlots]);
    }
    __device__ WorkItem& wait(u32 index) {
        mbarrier_wait(&full[index % kSlots], index / kSlots & 1);
        return item[index % kSlots];
    }
    __device__ void release(u32 index) {  // by every warp that waits
        __syncwarp();  // no lane reads the item any more
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(&empty[index % kSlots]);
    }
};

// Run by one warp: walks the CTA's share and hands its items to the others.
__device__ __forceinline__ void schedule_items(WorkRange& range, ItemQueue& queue) {
    u32 index = 0;
    for (bool more = true; more; ++index) {
        more = range.next(queue.open(index));
        queue.close(index);
    }
}
__device__ __forceinline__ void schedule_items(const DecodeParams& p, ItemQueue& queue) {
    WorkRange range(p);
    schedule_items(range, queue);
}
