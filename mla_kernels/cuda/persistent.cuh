// The life of a CTA, the same for every kernel. Four warpgroups take their roles:
//
//   0, 1  values   each multiplies P with its own four boxes of V and holds that half of O's columns
//   2     scores   S = Q K^T, softmax, P; holds the rows' references and sums
//   3     producer: a warp schedules, one streams tiles (where pages are no tiles kLoaders do), one fetches queries that are
//         not streamed
//
// At the end the first three merge what this CTA has to (merge.cuh).
// The score warpgroup is a tile or two ahead of the value warpgroups, so that one's softmax runs under the others' WGMMA.
// A kernel brings its SharedMemory (ring, queue, sums, to_merge, init_barriers(), fetch_queries()) and two roles:
//   Scores          begin, tiles, end, and for finish_tile mask, softmax, store_p, keep
//   Values          Fragment, reset, tile, vector
#pragma once
#include "loader.cuh"
#include "merge.cuh"

constexpr int kValueRegisters = MLA_VALUE_REGISTERS, kScoreRegisters = MLA_SCORE_REGISTERS, kProducerRegisters = MLA_PRODUCER_REGISTERS;

// What the value warpgroups need of an item's rows: the sum of the probabilities that they multiplied.
template <int kRows>
struct ItemSums {
    float n[ItemQueue::kSlots][kRows];
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

// Score warpgroup: a tile's scores -> P in the place of its rotary box, and the tile to the value warpgroups.
template <class Scores, int kCount>
__device__ __forceinline__ void finish_tile(Scores& scores, TileRing& ring, const WorkItem& w, int tile, u32 ordinal, float (&s)[kCount]) {
    if constexpr (kSoftmax) {
        const DecodeParams& p = scores.p;
        if ((tile + 1) * kTileTokens > seen_by_all(p, w)) scores.mask(w, tile, s);
        scores.softmax(ordinal, s);
        scores.store_p(ordinal, s);
        const int valid = w.kv_len - tile * kTileTokens;
        if (valid < kTileTokens) zero_token_rows([&](int c) { return ring.box(ordinal, c); }, valid, launder(threadIdx.x) % kWarpgroup);
        fence_proxy_async();
    } else {
        scores.keep(s);
    }
    ring.publish(ordinal);
}

template <int kRows, class Scores, class SharedMemory>
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
}

template <int kRows, class Values, class SharedMemory>
__device__ __forceinline__ void value_items(const DecodeParams& p, SharedMemory& smem, u32 half) {
    using Fragment = typename Values::Fragment;
    Values values(p, smem, half);
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
            if (is_split(w)) {
                write_part<kRows>(p, w, values);
            } else {
                float weight[Fragment::kThreadRows];
#pragma unroll
                for (int i = 0; i < Fragment::kThreadRows; ++i) weight[i] = inverse_sum(sums[Fragment::row(launder(threadIdx.x), i)]);
                write_out<kRows>(p, w, values, weight);
            }
        }
        smem.queue.release(index);
    }
}

// Each role is its own instance under one if/else: otherwise ptxas serializes WGMMA or ignores setmaxnreg. (The two value
// warpgroups are one: two take 28 KB more with 64 rows, and what runs once has to stay in the instruction cache.)
template <int kRows, class Scores, class Values, class SharedMemory>
__device__ __forceinline__ void run_cta(const DecodeParams& p, SharedMemory& smem) {
    static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "shared memory is 227 KB");
    if (threadIdx.x == 0) {
        smem.ring.init_barriers();
        smem.queue.init_barriers();
        smem.sums.init_barriers();
        smem.init_barriers();
        smem.to_merge.request = -1;
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
        else if (warp == 1) {
            if constexpr (kPageIsTile) load_items(p, smem.ring, smem.queue);
            else if constexpr (kGathers) gather_items(p, smem.ring, smem.queue, 0);
            else load_items_in_pieces(p, smem.ring, smem.queue, 0);
        } else if (warp == 2 && kLoaders < 3) smem.fetch_queries(p);
        else if constexpr (kGathers) gather_items(p, smem.ring, smem.queue, kLoaders < 3 ? 1 : warp - 1);
        else if constexpr (!kPageIsTile) load_items_in_pieces(p, smem.ring, smem.queue, kLoaders < 3 ? 1 : warp - 1);
        return;
    } else if (warpgroup == 2) {
        if (kScoreRegisters >= 128) setmaxnreg_inc<kScoreRegisters>();
        else setmaxnreg_dec<kScoreRegisters>();
        score_items<kRows, Scores>(p, smem);
    } else {
        setmaxnreg_inc<kValueRegisters>();
        value_items<kRows, Values>(p, smem, in_uniform(warpgroup));
    }
    named_barrier_sync(kBarrierMerge, kMergeThreads);
    if (smem.to_merge.request >= 0) {  // when all parts are there, this CTA's too, its tiles have been read
        Merge<kRows, typename Values::Fragment, TileRing::kBytes>{p, smem.to_merge, reinterpret_cast<char*>(smem.ring.group)}();
        leave_merge(p, smem.to_merge);
    }
}
