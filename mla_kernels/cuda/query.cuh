// Query rows into shared memory, by the consumers themselves: boxes of kRows x 64 columns, 128-byte swizzle.
#pragma once
#include "schedule.cuh"

// A warp takes four rows of a box at a time, so that a thread's nine boxes differ by constants and all its loads are
// in flight together. Rows past the block's last are zero. Ends with a barrier of all consumers.
template <int kRows>
__device__ __forceinline__ void load_query(const DecodeParams& p, const WorkItem& w, u16 (&q)[kBoxes][kRows * kBoxColumns]) {
    constexpr int kWarps = kConsumers / 32, kRowGroups = kRows / 4;
    constexpr int kWarpsPerGroup = kRowGroups < kWarps ? kWarps / kRowGroups : 1;
    constexpr int kBoxesAWarp = (kBoxes + kWarpsPerGroup - 1) / kWarpsPerGroup;
    const int rows = min(kRows, p.s_q * p.h_q - w.row_block * kRows);
    const long long first_row = static_cast<long long>(w.request) * p.s_q * p.h_q + w.row_block * kRows;
    const int thread = launder(threadIdx.x), warp = thread / 32, lane = thread % 32, chunk = lane & 7;
#pragma unroll
    for (int group = warp % kRowGroups; group < kRowGroups; group += kWarps) {
        const int row = group * 4 + lane / 8, first_box = warp / kRowGroups;
        const u16* source = p.q + (first_row + row) * kHeadDim + chunk * 8;
        uint4 value[kBoxesAWarp];
#pragma unroll
        for (int i = 0; i < kBoxesAWarp; ++i) {
            const int c = first_box + i * kWarpsPerGroup;
            value[i] = row < rows && c < kBoxes ? load_streaming(reinterpret_cast<const uint4*>(source + c * kBoxColumns))
                                                : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < kBoxesAWarp; ++i) {
            const int c = first_box + i * kWarpsPerGroup;
            if (c < kBoxes)
                *reinterpret_cast<uint4*>(reinterpret_cast<char*>(q[c]) + swizzled_offset(row, chunk)) = value[i];
        }
    }
    fence_proxy_async();
    named_barrier_sync(kBarrierConsumers, kConsumers);
}
