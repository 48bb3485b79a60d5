// Query rows into shared memory, by the consumers themselves: boxes of kRows x 64 columns, 128-byte swizzle.
#pragma once
#include "schedule.cuh"

// Rows past the block's last are zero. Ends with a barrier of all consumers.
template <int kRows>
__device__ __forceinline__ void load_query(const DecodeParams& p, const WorkItem& w, u16 (&q)[kBoxes][kRows * kBoxColumns]) {
    constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks a row
    const int rows = min(kRows, p.s_q * p.h_q - w.row_block * kRows);
    const long long first_row = static_cast<long long>(w.request) * p.s_q * p.h_q + w.row_block * kRows;
    const uint4* source = reinterpret_cast<const uint4*>(p.q + first_row * kHeadDim);
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kChunks; i += kConsumers) {
        const int row = i / kChunks, chunk = i - row * kChunks;
        const uint4 value = row < rows ? load_streaming(source + i) : make_uint4(0, 0, 0, 0);
        char* box = reinterpret_cast<char*>(q[chunk / 8]);
        *reinterpret_cast<uint4*>(box + swizzled_offset(row, chunk % 8)) = value;
    }
    fence_proxy_async();
    named_barrier_sync(kBarrierConsumers, kConsumers);
}
