// What a latent vector, a tile and a box are, and how WGMMA finds them in shared memory.
#pragma once
#include "ptx.cuh"

constexpr int kHeadDim = 576;   // latent (512) + rotary (64): what a query is compared with
constexpr int kHeadDimV = 512;  // the latent alone: what is averaged
constexpr int kTileTokens = 64;
constexpr int kPageTokens = MLA_PAGE_SIZE;  // a multiple of 64; or 0: known at run time, a power of two; or 1: likewise, under 8

// How pages come into tiles. (No variables: one more of them, and ptxas arranges the whole kernel otherwise.)
enum : int { kPageTiles = kPageTokens >= kTileTokens ? kPageTokens / kTileTokens : 1 };
enum : bool {
    kPageIsTile = kPageTokens >= kTileTokens,  // one, or several
    kGathers = kPageTokens == 1,  // warps bring tokens one by one; otherwise TMA, a tile, or a piece of one or a page, at a time
    kPieces = !kPageIsTile && !kGathers,
    kRagged = !kPageIsTile,       // sequences may have query tokens of their own number
};

// A box is 64 latent columns of a 64-token tile: 64 rows of 128 bytes, 128-byte swizzle, one TMA instruction.
// Boxes 0-7 are read twice (as K, then as V), box 8, the rotary part, once.
constexpr int kBoxColumns = 64;
constexpr int kBoxElements = kTileTokens * kBoxColumns;
constexpr int kBoxBytes = kBoxElements * 2;
constexpr int kBoxes = kHeadDim / kBoxColumns;
constexpr int kBoxesV = kHeadDimV / kBoxColumns;
constexpr int kRotaryBox = kBoxesV;
constexpr int kStepK = 16;  // the K extent of one WGMMA
constexpr int kStepsPerBox = kBoxColumns / kStepK;

// The four boxes of V that one value warpgroup multiplies lie side by side.
constexpr int kGroupBoxes = kBoxesV / 2;
constexpr int kGroups = 2;  // a tile

// How a group's boxes lie: one after the other; or, so that one TMA instruction brings a piece of all four, eight rows of each
// side by side. (A box at a time, a tile of pages of 16 takes 36 instructions, and the TMA unit more than a tile's time: with
// 64 rows 315 us instead of 297; one H100, h_q 128, b 128, kv 4096.)
enum : u32 {
    kRowsStride = kPieces ? kGroupBoxes * 1024 : 1024,  // bytes from eight rows of a box to its next eight
    kBoxStride = kPieces ? 1024 : kBoxBytes,            // from a box to the next
};

// Roles, a warpgroup each: two of values, one of scores, the producer's.
constexpr int kWarpgroup = 128;
// (decode_pair.cu: two that do both, in each of a row block's two CTAs, and the producer's.)
enum : int { kPairRows = 128, kClusterCtas = MLA_ROWS == kPairRows ? 2 : 1 };
constexpr int kValueThreads = 2 * kWarpgroup * kClusterCtas;  // of a row block
constexpr int kScoreThreads = kWarpgroup;
constexpr int kMergeThreads = (kClusterCtas == 2 ? 2 : 3) * kWarpgroup;  // all of a CTA but the producer's, from thread 0 on
constexpr int kThreads = kMergeThreads + kWarpgroup;
// Warps that bring pieces or tokens: what the producer's has, where queries come another way (decode_rows.cu) one more.
enum : int { kLoaders = kPageIsTile ? 1 : MLA_ROWS == kTileTokens ? 3 : 2, kGatherThreads = kLoaders * 32 };
constexpr int kMaxSharedBytes = 227 * 1024;

// Named barriers (0 is __syncthreads).
constexpr u32 kBarrierMerge = 1;
constexpr u32 kBarrierScore = 2;

// Matrix descriptors (PTX ISA, "asynchronous warpgroup level matrix shared memory layout"), 128-byte swizzle: eight rows of
// 128 bytes make a 1,024-byte atom. The upper word is the same for all (ptx.cuh), so the lower one stands for it: the
// address and, where operands have several boxes side by side, their distance.
__device__ __forceinline__ u32 descriptor(const void* smem, u32 leading_bytes) {
    return (leading_bytes >> 4) << 16 | (smem_address(smem) & 0x3FFFF) >> 4;
}

// Rows x 64 columns, the contraction runs along the 128-byte row (K and Q in QK^T, P in PV).
__device__ __forceinline__ u32 descriptor_k_major(const void* smem) { return descriptor(smem, 16); }

// Tokens x 64 columns, the contraction runs down the rows (V); boxes side by side lie kBoxStride apart.
__device__ __forceinline__ u32 descriptor_token_major(const void* smem) { return descriptor(smem, kBoxStride); }

constexpr u32 kAdvanceAlongRow = (kStepK * 2) >> 4;     // next 16 columns, in descriptor units of 16 bytes
constexpr u32 kAdvanceDownRows = (kStepK / 8 * kRowsStride) >> 4;  // next 16 rows

// Byte offset of 16-byte chunk `chunk` (0-7) of row `row` in a swizzled box.
__device__ __forceinline__ u32 swizzled_offset(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Zeroes rows [first_row, 64) of the `kCount` V boxes that a CTA has of a tile: slots past the sequence may hold NaN, and
// 0 * NaN is NaN. Whole rows, so the swizzle does not matter. Called by one warpgroup; `box_of(c)` gives box c.
template <int kCount = kBoxesV, class BoxOf>
__device__ __forceinline__ void zero_token_rows(BoxOf box_of, int first_row, int thread) {
    const int chunks = (kTileTokens - first_row) * 8;
#pragma unroll 1
    for (int c = 0; c < kCount; ++c) {
        if constexpr (kPieces) {
            uint4* box = reinterpret_cast<uint4*>(box_of(c));
            for (int i = first_row * 8 + thread; i < kTileTokens * 8; i += kWarpgroup) box[i / 64 * (kRowsStride / 16) + i % 64] = make_uint4(0, 0, 0, 0);
        } else {
            uint4* box = reinterpret_cast<uint4*>(box_of(c)) + first_row * 8;
            for (int i = thread; i < chunks; i += kWarpgroup) box[i] = make_uint4(0, 0, 0, 0);
        }
    }
}
