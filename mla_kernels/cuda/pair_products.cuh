// What a warpgroup of a pair of CTAs (decode_pair.cu) says to the same one of the other, and the products that it issues.
#pragma once
#include "pair_ring.cuh"

// A warpgroup of 64 rows, of this CTA's columns: what it holds.
struct PairProducts {
    const DecodeParams& p;
    SharedMemory& smem;
    const u32 warp = in_uniform(threadIdx.x / 32), warpgroup = warp / 4;
    u32 scores_parity = 0, p_parity = 0;
    float o[kGroupBoxes][kBoxColumns / 2];
    u32 q[kRegisterSteps][4];
    u32 a[4][4];           // P, the A operand of PV
    float m, l, n;         // RowStats of the thread's own row
    float before[2];       // l and n before the last tile

    __device__ __forceinline__ PairProducts(const DecodeParams& p, SharedMemory& smem) : p(p), smem(smem) {
        if (warpgroup == 1) named_barrier_arrive(kBarrierTurn, kMergeThreads);  // the first turn is the other's
    }
    // Found anew each time: kept, they would take accumulators' room.
    __device__ __forceinline__ static u32 thread() { return launder(threadIdx.x); }
    __device__ __forceinline__ static u32 lane() { return thread() & 31; }
    __device__ __forceinline__ float4 vector(int j) {
        const float(&v)[kBoxColumns / 2] = o[j / 8];
        return make_float4(v[j % 8 * 4], v[j % 8 * 4 + 1], v[j % 8 * 4 + 2], v[j % 8 * 4 + 3]);
    }

    // ---- messages: a thread to the same one of the other CTA

    __device__ __forceinline__ void send(const void* place, const u64* barrier, u32 x, u32 y, u32 z, u32 w) const {
        store_async(map_shared(smem_address(place), cluster_rank() ^ 1), map_shared(smem_address(barrier), cluster_rank() ^ 1), x, y, z, w);
    }
    __device__ __forceinline__ void receive(u64* barrier, u32 bytes, u32& parity) {
        if (lane() == 0) mbarrier_arrive_expect_tx(barrier, bytes);
        mbarrier_wait(barrier, parity);
        parity ^= 1;
    }
    // Partial scores -> those of the own row, the others sent.
    __device__ __forceinline__ void send_scores(const float (&s)[kTileTokens / 2], float (&x)[kScores]) {
#pragma unroll
        for (int i = 0; i < kScores / 4; ++i)
            send(&smem.scores[i][thread()], &smem.scores_ready[warp], __float_as_uint(s[i * 8 + 2]), __float_as_uint(s[i * 8 + 3]),
                 __float_as_uint(s[i * 8 + 6]), __float_as_uint(s[i * 8 + 7]));
#pragma unroll
        for (int j = 0; j < kScores / 2; ++j) x[2 * j] = s[4 * j], x[2 * j + 1] = s[4 * j + 1];
    }
    __device__ __forceinline__ void add_received_scores(float (&x)[kScores]) {
        receive(&smem.scores_ready[warp], kScores * 4 * 32, scores_parity);
#pragma unroll
        for (int i = 0; i < kScores / 4; ++i) {
            const uint4 v = smem.scores[i][thread()];
            x[i * 4] += __uint_as_float(v.x), x[i * 4 + 1] += __uint_as_float(v.y);
            x[i * 4 + 2] += __uint_as_float(v.z), x[i * 4 + 3] += __uint_as_float(v.w);
        }
    }
    // Probabilities are not negative, so their 16 sign bits are free: the upper ones of the first two words say that
    // the reference moved, and that scores are large; the lower ones by how much it moved.
    static constexpr u32 kFlag = 0x80000000u, kSigns = 0x80008000u;
    __device__ __forceinline__ void send_p(int vector, u32 x, u32 y, u32 z, u32 w) { send(&smem.p[vector][thread()], &smem.p_ready[warp], x, y, z, w); }
    __device__ __forceinline__ void receive_p(u32 (&e)[kScores / 2]) {
        receive(&smem.p_ready[warp], kScores * 2 * 32, p_parity);
        const uint4 u = smem.p[0][thread()], v = smem.p[1][thread()];
        e[0] = u.x, e[1] = u.y, e[2] = u.z, e[3] = u.w, e[4] = v.x, e[5] = v.y, e[6] = v.z, e[7] = v.w;
    }

    // ---- products

    // Takes the item's queries out of the ring, where each warpgroup's are a tile.
    __device__ __forceinline__ void begin(const WorkItem& w) {
        const u32 first = in_uniform(w.ordinal) - 2, own = first + warpgroup, rank = cluster_rank();
        m = -kInfinity, l = n = 0.f;
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) o[i / (kBoxColumns / 2)][i % (kBoxColumns / 2)] = 0.f;
        smem.ring.wait(own);
        HalfTile& queries = smem.ring[own];
#pragma unroll
        for (int i = 0; i < kRegisterSteps; ++i) {
            const u32 row = warp % 4 * 16 + (lane() & 15) ^ rank * 8;
            ldmatrix_x4(q[i], smem_address(queries.box[i / kStepsPerBox]) + swizzled_offset(row, i % kStepsPerBox * 2 + lane() / 16));
        }
        const auto copy = [rank](u16* to, const u16* from, int bytes, u32 eight_rows) {
#pragma unroll 1
            for (int i = thread() % kWarpgroup; i < bytes / 16; i += kWarpgroup)
                reinterpret_cast<uint4*>(to)[i ^ rank * eight_rows] = reinterpret_cast<const uint4*>(from)[i];
        };
        auto& kept = smem.q[warpgroup];
        copy(kept.box[0], queries.box[kGroupBoxes - kQueryBoxes], kQueryBoxes * kBoxBytes, 64);
        copy(kept.rotary, queries.rotary, kBoxBytes / 2, 32);
        fence_proxy_async();
        sync_rows();
        smem.ring.wait(first + 1 - warpgroup);
        smem.ring.release(first);
        smem.ring.release(first + 1);
    }
    __device__ __forceinline__ void sync_rows() const { named_barrier_sync(kBarrierRows + warpgroup, kWarpgroup); }
    // What the steps of a product need, in uniform registers, and found where they are issued: kept, it would take others' room.
    struct Operands {
        u32 queries, keys, values;  // descriptors of the first box
    };
    __device__ __forceinline__ Operands operands(u32 k, u32 v) {
        // (An ordinal has no upper bit, but ptxas does not know: so this is not kept either.)
        const u32 queries = descriptor_k_major(smem.q[0].box[0]) + warpgroup * (sizeof(smem.q[0]) >> 4) + (k >> 31);
        return {queries, descriptor_k_major(smem.ring[k].box[0]), descriptor_token_major(smem.ring[v].box[0])};
    }
    template <int kStep>
    __device__ __forceinline__ void score_step(const Operands& at, float (&s)[kTileTokens / 2], bool accumulate) {
        constexpr int c = kStep / kStepsPerBox, step = kStep % kStepsPerBox;
        constexpr u32 kBox = kBoxBytes >> 4, kAlong = step * kAdvanceAlongRow;
        const u32 keys = at.keys + c * kBox + kAlong, queries = at.queries + (c + kQueryBoxes - kGroupBoxes) * kBox + kAlong;
        if constexpr (kStep < kRegisterSteps) wgmma_rs_n64(s, q[kStep], keys, accumulate);
        else if constexpr (kStep < kLatentSteps) wgmma_ss<kTileTokens, 0, 0>(s, queries, keys, accumulate);
        else wgmma_ss_n64_narrow(s, queries, keys, accumulate);
    }
    template <int kStep>
    __device__ __forceinline__ void value_step(const Operands& at) {
        constexpr int c = kStep % kGroupBoxes, step = kStep / kGroupBoxes;
        wgmma_rs_n<kBoxColumns>(o[c], a[step], at.values + c * (kBoxBytes >> 4) + step * kAdvanceDownRows, true);
    }
    // Steps of both products in turn: each step of a chain waits for the one before, 74 cycles for 32 of work.
    template <int kStep, int kScoreSteps, int kValueSteps>
    __device__ __forceinline__ void issue_steps(const Operands& at, float (&s)[kTileTokens / 2]) {
        if constexpr (kStep < kValueSteps) value_step<kStep>(at);
        if constexpr (kStep < kScoreSteps) score_step<kStep>(at, s, kStep > 0);
        if constexpr (kStep + 1 < kValueSteps || kStep + 1 < kScoreSteps) issue_steps<kStep + 1, kScoreSteps, kValueSteps>(at, s);
    }
    // Scores of tile `ordinal` + 1, which is there, and values of `ordinal` - 1.
    template <bool kNext, bool kPrevious>
    __device__ __forceinline__ void issue(u32 ordinal, float (&s)[kTileTokens / 2]) {
        if constexpr (kMath && (kNext || kPrevious)) {
            const Operands at = operands(ordinal + 1, ordinal - 1);
            wgmma_fence();
            issue_steps<0, kNext ? kSteps : 0, kPrevious ? kValueSteps : 0>(at, s);
            wgmma_commit();
        }
    }
    template <bool kNext, bool kPrevious>
    __device__ __forceinline__ void complete(u32 ordinal, float (&s)[kTileTokens / 2]) {
        wgmma_wait<0>();
        if constexpr (kNext) wgmma_fence_operands(s);
        if constexpr (kPrevious) {
#pragma unroll
            for (int c = 0; c < kGroupBoxes; ++c) wgmma_fence_operands(o[c]);
            smem.ring.release(ordinal - 1);
        }
    }
    // One warpgroup issues after the other: left alone they fall into step, and both wait for messages at once.
    __device__ __forceinline__ void wait_turn() { named_barrier_sync(kBarrierTurn + warpgroup, kMergeThreads); }
    __device__ __forceinline__ void give_turn() { named_barrier_arrive(kBarrierTurn + 1 - warpgroup, kMergeThreads); }
};
