// The life of a CTA, the same for every kernel. Four warpgroups take their roles:
//
//   0, 1  values   each multiplies P with its own four boxes of V and holds that half of O's columns
//   2     scores   S = Q K^T, softmax, P; holds the rows' references and sums
//   3     producer: a warp schedules, one streams tiles, one announces parts, one fetches queries that are not streamed
//
// The score warpgroup is a tile or two ahead of the value warpgroups, so that one's softmax runs under the others' WGMMA.
// A kernel brings its SharedMemory (ring, queue, sums, to_merge, part_written, init_barriers(), fetch_queries()) and two roles:
//   Scores          begin, tiles, end
//   Values<half>    Fragment, reset, tile, vector, set_vector
#pragma once
#include "loader.cuh"
#include "merge.cuh"

constexpr int kValueRegisters = MLA_VALUE_REGISTERS, kScoreRegisters = MLA_SCORE_REGISTERS, kProducerRegisters = MLA_PRODUCER_REGISTERS;

// What the value warpgroups need of an item's rows: the sum of the probabilities that they multiplied.
template <int kRows>
struct ItemSums {
    float n[ItemQueue::kSlots][kRows];
    PartWeights weights[kRows];  // of the one item whose other parts are absorbed
    u64 ready[ItemQueue::kSlots];

    __device__ void init_barriers() {
        for (int i = 0; i < ItemQueue::kSlots; ++i) mbarrier_init(&ready[i], kScoreThreads / 32);
    }
    __device__ const float* wait(u32 index) {
        mbarrier_wait(&ready[index % ItemQueue::kSlots], index / ItemQueue::kSlots & 1);
        return n[index % ItemQueue::kSlots];
    }
    __device__ void publish(u32 index) {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(&ready[index % ItemQueue::kSlots]);
    }
};

template <int kRows, class Scores, class Fragment, class SharedMemory>
__device__ __forceinline__ void score_items(const DecodeParams& p, SharedMemory& smem) {
    Scores scores(p, smem);
    for (u32 index = 0;; ++index) {
        const WorkItem& w = smem.queue.wait(index);
        if (w.request < 0) break;
        if (w.tiles > 0) {
            scores.begin(w);
            scores.tiles(w, uniform(w.begin), uniform(w.end), uniform(w.ordinal));
            scores.end(w, smem.sums.n[index % ItemQueue::kSlots]);
        }
        smem.sums.publish(index);
        if (merges(w) && threadIdx.x % kScoreThreads == 0) smem.to_merge = w;  // it is the last
        smem.queue.release(index);
    }
    named_barrier_sync(kBarrierScore, kScoreThreads);
    static_assert(sizeof(MergeMemory<kRows>) <= sizeof(smem.ring.group), "merging takes the place of the tiles");
    if (smem.to_merge.request >= 0) {  // when all parts are there, this CTA's too, its tiles have been read
        merge_slice<kRows, Fragment>(p, smem.to_merge, *reinterpret_cast<MergeMemory<kRows>*>(smem.ring.group));
        leave_merge(p, smem.to_merge);
    }
}

template <int kRows, class Values, class SharedMemory>
__device__ __forceinline__ void value_items(const DecodeParams& p, SharedMemory& smem) {
    using Fragment = typename Values::Fragment;
    Values values(p, smem);
    for (u32 index = 0;; ++index) {
        const WorkItem& w = smem.queue.wait(index);
        if (w.request < 0) break;
        if (w.tiles == 0) {
            smem.sums.wait(index);  // keeps the phases apart
            write_empty<kRows>(p, w);
        } else {
            values.reset();
            u32 ordinal = uniform(w.ordinal);
            for (const u32 end = ordinal + uniform(w.end - w.begin); ordinal != end; ++ordinal) values.tile(ordinal);
            const float* sums = smem.sums.wait(index);
            if (!is_split(w) || absorbs(w)) {
                float weight[Fragment::kThreadRows];
                if (is_split(w)) absorb_parts<kRows>(w, values, smem.sums.weights, smem.ring);
#pragma unroll
                for (int i = 0; i < Fragment::kThreadRows; ++i)
                    weight[i] = is_split(w) ? 1.f : inverse_sum(sums[Fragment::row(launder(threadIdx.x), i)]);
                write_out<kRows>(p, w, values, weight);
            } else {
                write_part<kRows>(p, w, values);
                __syncwarp();
                if (threadIdx.x % 32 == 0) mbarrier_arrive(&smem.part_written);
            }
        }
        smem.queue.release(index);
    }
}

// Each role is its own instance under one if/else: otherwise ptxas serializes WGMMA or ignores setmaxnreg.
template <int kRows, class Scores, template <int> class Values, class SharedMemory>
__device__ __forceinline__ void run_cta(const DecodeParams& p, SharedMemory& smem) {
    static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "shared memory is 227 KB");
    if (threadIdx.x == 0) {
        smem.ring.init_barriers();
        smem.queue.init_barriers();
        smem.sums.init_barriers();
        smem.init_barriers();
        smem.to_merge.request = -1;
        mbarrier_init(&smem.part_written, kValueThreads / 32);
        fence_barrier_init();
    }
    __syncthreads();
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 3) {
        setmaxnreg_dec<kProducerRegisters>();
        const int warp = (threadIdx.x - (kThreads - kWarpgroup)) / 32;
        if (warp == 0) schedule_items(p, smem.queue);
        else if (warp == 1) load_items<kRows>(p, smem.ring, smem.queue);
        else if (warp == 2) announce_parts(p, smem.queue, &smem.part_written);
        else smem.fetch_queries(p);
    } else if (warpgroup == 2) {
        if (kScoreRegisters >= 128) setmaxnreg_inc<kScoreRegisters>();
        else setmaxnreg_dec<kScoreRegisters>();
        score_items<kRows, Scores, typename Values<0>::Fragment>(p, smem);
    } else if (warpgroup == 0) {
        setmaxnreg_inc<kValueRegisters>();
        value_items<kRows, Values<0>>(p, smem);
    } else {
        setmaxnreg_inc<kValueRegisters>();
        value_items<kRows, Values<1>>(p, smem);
    }
}
