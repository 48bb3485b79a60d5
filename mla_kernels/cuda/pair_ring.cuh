// What a pair of CTAs has in shared memory (decode_pair.cu), and the warp that fills its ring.
#pragma once
#include "loader.cuh"

constexpr int kRows = MLA_ROWS;
static_assert(kRows == kPairRows && kPageIsTile, "pages are tiles, or several");
constexpr int kSteps = kHeadDim / 2 / kStepK;  // of Q K^T in a CTA: 16 of its latent columns, 2 of its rotary ones
constexpr int kLatentSteps = kGroupBoxes * kStepsPerBox;
constexpr int kRegisterSteps = MLA_REGISTER_STEPS;  // of Q K^T, the first: their queries are in registers
static_assert(kRegisterSteps % kStepsPerBox == 0 && kRegisterSteps < kLatentSteps, "whole boxes");
constexpr int kQueryBoxes = kGroupBoxes - kRegisterSteps / kStepsPerBox;  // in shared memory
constexpr int kHalfColumns = kGroupBoxes * kBoxColumns;
constexpr int kScores = kTileTokens / 4;  // of a thread's own row in a tile
constexpr u32 kBarrierTurn = 3, kBarrierRows = 5;  // and the next: one for each warpgroup

// 64 tokens or queries: half of their columns.
struct HalfTile {
    u16 box[kGroupBoxes][kBoxElements];
    u16 rotary[kBoxElements / 2];  // rows of 64 bytes, 64-byte swizzle
};

// By ordinal in the pair's stream; given back as a whole.
struct HalfTileRing {
    static constexpr u32 kSlots = MLA_GROUP_SLOTS;
    HalfTile tile[kSlots];
    u64 full[kSlots];   // it has landed
    u64 empty[kSlots];  // eight warps have read it for the last time

    __device__ __forceinline__ void init_barriers() {
        for (u32 i = 0; i < kSlots; ++i) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], kMergeThreads / 32);
    }
    __device__ __forceinline__ HalfTile& operator[](u32 ordinal) { return tile[ordinal % kSlots]; }
    __device__ __forceinline__ void wait(u32 ordinal) {
        if (kLoads) mbarrier_wait(&full[ordinal % kSlots], ordinal / kSlots & 1);
    }
    __device__ __forceinline__ void release(u32 ordinal, u32 lane) {
        if (!kLoads) return;
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&empty[ordinal % kSlots]);
    }
    // One warp: 64 rows from row `y` of plane `z` on.
    __device__ __forceinline__ void load(u32 ordinal, const TensorMap* map, const TensorMap* rotary_map, u32 rank, int y, int z) {
        const u32 slot = ordinal % kSlots;
        mbarrier_wait(&empty[slot], (ordinal / kSlots & 1) ^ 1);
        if ((threadIdx.x & 31) != 0) return;
        mbarrier_arrive_expect_tx(&full[slot], sizeof(HalfTile));
#pragma unroll
        for (int c = 0; c < kGroupBoxes; ++c) tma_load_3d(tile[slot].box[c], map, &full[slot], (rank * kGroupBoxes + c) * kBoxColumns, y, z);
        tma_load_3d(tile[slot].rotary, rotary_map, &full[slot], kHeadDimV + rank * (kBoxColumns / 2), y, z);
    }
};

struct SharedMemory {
    struct {
        u16 box[kQueryBoxes][kBoxElements];
        u16 rotary[kBoxElements / 2];
    } q[2];  // of each warpgroup
    HalfTileRing ring;
    uint4 scores[kScores / 4][kMergeThreads];  // what the other CTA sends, by vector and thread
    uint4 p[kScores / 8][kMergeThreads];
    u32 again[2];  // of a warpgroup: its last tile with large scores, by ordinal
    u64 scores_ready[kMergeThreads / 32], p_ready[kMergeThreads / 32];  // by warp
    ItemQueue queue;
    WorkItem to_merge;  // the last, if this pair merges a slice of it
    alignas(8) char range[32][sizeof(WorkRange)];  // of each lane that schedules: 24 registers are not enough for it

    __device__ __forceinline__ void init_barriers() {
        ring.init_barriers();
        queue.init_barriers();
        for (int i = 0; i < kMergeThreads / 32; ++i) mbarrier_init(&scores_ready[i], 1), mbarrier_init(&p_ready[i], 1);
        to_merge.request = -1;
        again[0] = again[1] = ~0u;
    }
};

// Run by one warp.
__device__ __forceinline__ void load_half_tiles(const DecodeParams& p, SharedMemory& smem) {
    const u32 rank = in_uniform(cluster_rank());
    for (u32 index = 0;; ++index) {
        WorkItem& w = smem.queue.wait(index);
        const int request = in_uniform(w.request);
        if (request < 0) break;
        int tile = in_uniform(w.begin);
        const int end = in_uniform(w.end);
        if (kLoads && tile < end) {
            const int* pages = p.block_table + static_cast<long long>(request) * p.table_stride;
            u32 ordinal = in_uniform(w.ordinal) - 2;
            const int row = in_uniform(w.row_block) * kRows;
#pragma unroll 1
            for (int half = 0; half < 2; ++half) smem.ring.load(ordinal++, &p.q_map, &p.q_rotary_map, rank, row + half * kTileTokens, request);
            int next = pages[tile / kPageTiles];  // known before its slot is free
#pragma unroll 1
            for (; tile < end; ++tile, ++ordinal) {
                const int page = in_uniform(next);
                if (tile + 1 < end) next = pages[(tile + 1) / kPageTiles];
                if (page < 0 || page >= p.num_pages) w.invalid = true;  // seen with the tiles' barriers
                smem.ring.load(ordinal, &p.kv_map, &p.rotary_map, rank, tile % kPageTiles * kTileTokens, page);
            }
        }
        smem.queue.release(index);
    }
}
