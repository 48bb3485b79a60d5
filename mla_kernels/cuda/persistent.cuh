// The life of a CTA, the same for every kernel: three warpgroups take their roles, the consumers go through the items
// of the share, and merge at its end what they share with other CTAs.
//
// A kernel brings its SharedMemory (ring, queue, pending, q and what it needs itself, with init_barriers()) and a
// Consumer<warpgroup>: Fragment, reset, tiles, join, vector, set_vector.
#pragma once
#include "merge.cuh"
#include "producer.cuh"
#include "query.cuh"

constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;

template <int kRows, class Consumer, class SharedMemory>
__device__ __forceinline__ void consume(const DecodeParams& p, SharedMemory& smem, Consumer& consumer) {
    for (u32 index = 0;;) {
        const WorkItem& w = smem.queue.wait(index);
        if (w.request < 0) break;
        mbarrier_wait(&smem.q.full, index & 1);
        if (w.tiles == 0) {
            if ((threadIdx.x & 31) == 0) mbarrier_arrive(&smem.q.empty);
            write_empty<kRows>(p, w);
        } else {
            consumer.reset();
            consumer.tiles(w);
            if ((threadIdx.x & 31) == 0) mbarrier_arrive(&smem.q.empty);
            consumer.join(w);
            if (w.parts == 1 || absorbs(p, w)) {
                if (w.parts > 1) wait_for_parts(p, w);
                write_out<kRows>(p, w, consumer, w.parts - 1);
            } else {
                write_part<kRows>(p, w, consumer);
                announce_part(p, w, smem.pending);
            }
        }
        index = smem.queue.release(w);
    }
    auto& memory = *reinterpret_cast<MergeMemory<kRows>*>(smem.ring[0].box[0]);  // all boxes have been read
    for (int i = 0; i < smem.pending.count; ++i) merge_slice<kRows, typename Consumer::Fragment>(p, smem.pending.item[i], memory);
}

// Each role is its own instance under one if/else: otherwise ptxas serializes WGMMA or ignores setmaxnreg.
template <int kRows, template <int> class Consumer, class SharedMemory>
__device__ __forceinline__ void run_cta(const DecodeParams& p, SharedMemory& smem) {
    static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "shared memory is 227 KB");
    if (threadIdx.x == 0) {
        smem.ring[0].init_barriers();
        smem.ring[1].init_barriers();
        smem.q.init_barriers();
        smem.queue.init_barriers();
        smem.init_barriers();
        smem.pending.count = 0;
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
        setmaxnreg_dec<kProducerRegisters>();
        if (threadIdx.x < kConsumers + 32) produce(p, smem.ring, smem.queue);
        else if (threadIdx.x < kConsumers + 64) fetch_queries<kRows>(p, smem.q, smem.queue);
    } else if (threadIdx.x < kWarpgroup) {
        setmaxnreg_inc<kConsumerRegisters>();
        Consumer<0> consumer{p, smem};
        consume<kRows>(p, smem, consumer);
    } else {
        setmaxnreg_inc<kConsumerRegisters>();
        Consumer<1> consumer{p, smem};
        consume<kRows>(p, smem, consumer);
    }
}
