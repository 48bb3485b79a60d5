// Accumulators of 64 rows x 256 columns a warpgroup (decode_rows.cu, decode_pair.cu): what a thread holds, and how it stores it.
#pragma once
#include "result.cuh"

// What a thread's accumulators are: vector j holds columns 8 j, 8 j + 1 (from its own first) of rows r and r + 8.
struct RowsFragment {
    static constexpr int kThreadRows = 2, kWarpRows = 16, kWarpStride = 16, kSlotStep = 2;

    __device__ static constexpr int slot(int, int element) { return element / 2; }
    __device__ static u32 row(u32 thread, u32 slot) {
        if constexpr (kClusterCtas == 2) return thread / 32 % 8 * 16 + (thread % 32 / 4 + slot * 8 ^ half(thread) * 8);
        return thread / 32 % 4 * 16 + thread % 32 / 4 + slot * 8;
    }
    __device__ static u32 half(u32 thread) { return thread / (kValueThreads / 2); }  // of the columns
    // From a thread's first row to its second.
    __device__ static int row_step(u32 thread) { return kClusterCtas == 2 && half(thread) == 1 ? -8 : 8; }
    // Four vectors, so that a thread writes 16 bytes: the four threads of a row swap their pairs of columns. `pair(i, r)`:
    // the elements of row r (0, 1) of vector j + i, packed.
    static constexpr int kStoreVectors = 4;
    template <class Pair>
    __device__ static void store(u16* out, u32 rows, u32 thread, int j, Pair pair) {
        u16* place = out + row(thread, 0) * kHeadDimV + half(thread) * (kGroupBoxes * kBoxColumns) + (j + thread % 4) * 8;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint4 columns = transposed(thread, pair(0, r), pair(1, r), pair(2, r), pair(3, r));
            __syncwarp();  // or ptxas gathers the packed pairs of many vectors in registers that it has not
            if (row(thread, r) < rows) *reinterpret_cast<uint4*>(place + r * row_step(thread) * kHeadDimV) = columns;
        }
    }
    __device__ static void store_one(u16* out, u32 rows, u32 thread, int j, float4 v) {
        const u32 r = row(thread, 0);
        u16* place = out + r * kHeadDimV + half(thread) * (kGroupBoxes * kBoxColumns) + thread % 4 * 2 + j * 8;
        if (r < rows) *reinterpret_cast<u32*>(place) = pack_elements(v.x, v.y);
        if (r + row_step(thread) < rows) *reinterpret_cast<u32*>(place + row_step(thread) * kHeadDimV) = pack_elements(v.z, v.w);
    }
};
