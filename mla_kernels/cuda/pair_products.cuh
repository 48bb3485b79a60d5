// What a warpgroup of a pair of CTAs (decode_pair.cu) says to the same one of the other, and the products that it issues.
#pragma once
#include "pair_ring.cuh"

// A warpgroup of 64 rows, of this CTA's columns: what it holds.
struct PairProducts {
    const DecodeParams& p;
    SharedMemory& smem;
    const u32 id = launder(threadIdx.x);  // kept: read anew it takes 30 cycles each time
    const u32 warp = in_uniform(id / 32), warpgroup = warp / 4, peer = in_uniform(cluster_rank() ^ 1);
    u32 parities = 0;  // of the next scores, and P
    float o[kHalfColumns / 2];
    u32 q[kRegisterSteps][4];
    u32 a[4][4];           // P, the A operand of PV
    u32 own[kScores / 2];  // of it the own row's
    float m, l, n;         // RowStats of the thread's own row
    float pending;         // of l: the last tile's, which may have to be done again

    __device__ __forceinline__ PairProducts(const DecodeParams& p, SharedMemory& smem) : p(p), smem(smem) {
        if (warpgroup == 1) named_barrier_arrive(kBarrierTurn, kMergeThreads);  // the first turn is the other's
        expect(&smem.scores_ready[warp], kScoresBytes);
        expect(&smem.p_ready[warp], kPBytes);
    }
    __device__ __forceinline__ u32 lane() const { return id & 31; }
    __device__ __forceinline__ float4 vector(int j) { return make_float4(o[j * 4], o[j * 4 + 1], o[j * 4 + 2], o[j * 4 + 3]); }

    // ---- messages: a thread to the same one of the other CTA

    static constexpr u32 kScoresBytes = kScores * 4 * 32, kPBytes = kScores * 2 * 32;  // a warp's
    __device__ __forceinline__ void send(const void* place, const u64* barrier, u32 x, u32 y, u32 z, u32 w) const {
        store_async(map_shared(smem_address(place), peer), map_shared(smem_address(barrier), peer), x, y, z, w);
    }
    // What comes next is announced when the last has come: it need not wait for that.
    __device__ __forceinline__ void expect(u64* barrier, u32 bytes) const {
        if (lane() == 0) mbarrier_arrive_expect_tx(barrier, bytes);
    }
    template <int kWhich>
    __device__ __forceinline__ void receive(u64* barrier) {
        mbarrier_wait(barrier, parities >> kWhich & 1);
        parities ^= 1 << kWhich;
    }
    // Partial scores -> those of the own row, the others sent.
    __device__ __forceinline__ void send_scores(const float (&s)[kTileTokens / 2], float (&x)[kScores]) {
#pragma unroll
        for (int i = 0; i < kScores / 4; ++i)
            send(&smem.scores[i][id], &smem.scores_ready[warp], __float_as_uint(s[i * 8 + 2]), __float_as_uint(s[i * 8 + 3]),
                 __float_as_uint(s[i * 8 + 6]), __float_as_uint(s[i * 8 + 7]));
#pragma unroll
        for (int j = 0; j < kScores / 2; ++j) x[2 * j] = s[4 * j], x[2 * j + 1] = s[4 * j + 1];
    }
    __device__ __forceinline__ void add_received_scores(float (&x)[kScores]) {
        receive<0>(&smem.scores_ready[warp]);
#pragma unroll
        for (int i = 0; i < kScores / 4; ++i) {
            const uint4 v = smem.scores[i][id];
            x[i * 4] += __uint_as_float(v.x), x[i * 4 + 1] += __uint_as_float(v.y);
            x[i * 4 + 2] += __uint_as_float(v.z), x[i * 4 + 3] += __uint_as_float(v.w);
        }
        expect(&smem.scores_ready[warp], kScoresBytes);
    }
    // Probabilities are not negative, so their 16 sign bits are free: the upper ones of the first two words say that
    // the reference moved, and that scores are large; the lower ones by how much it moved.
    static constexpr u32 kFlag = 0x80000000u, kSigns = 0x80008000u;
    __device__ __forceinline__ void send_p(int vector, u32 x, u32 y, u32 z, u32 w) { send(&smem.p[vector][id], &smem.p_ready[warp], x, y, z, w); }
    __device__ __forceinline__ void receive_p(u32 (&e)[kScores / 2]) {
        receive<1>(&smem.p_ready[warp]);
        const uint4 u = smem.p[0][id], v = smem.p[1][id];
        e[0] = u.x, e[1] = u.y, e[2] = u.z, e[3] = u.w, e[4] = v.x, e[5] = v.y, e[6] = v.z, e[7] = v.w;
        expect(&smem.p_ready[warp], kPBytes);
    }

    // ---- products

    // Takes the item's queries out of the ring, where each warpgroup's are a tile.
    __device__ __forceinline__ void begin(const WorkItem& w) {
        const u32 first = in_uniform(w.ordinal) - 2, own = first + warpgroup, rank = cluster_rank();
        m = -kInfinity, l = n = 0.f;
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) o[i] = 0.f;
        smem.ring.wait(own);
        HalfTile& queries = smem.ring[own];
#pragma unroll
        for (int i = 0; i < kRegisterSteps; ++i) {
            const u32 row = warp % 4 * 16 + (lane() & 15) ^ rank * 8;
            ldmatrix_x4(q[i], smem_address(queries.box[i / kStepsPerBox]) + swizzled_offset(row, i % kStepsPerBox * 2 + lane() / 16));
        }
        const auto copy = [rank, this](u16* to, const u16* from, int bytes, u32 eight_rows) {
#pragma unroll 1
            for (int i = id % kWarpgroup; i < bytes / 16; i += kWarpgroup)
                reinterpret_cast<uint4*>(to)[i ^ rank * eight_rows] = reinterpret_cast<const uint4*>(from)[i];
        };
        auto& kept = smem.q[warpgroup];
        copy(kept.box[0], queries.box[kGroupBoxes - kQueryBoxes], kQueryBoxes * kBoxBytes, 64);
        copy(kept.rotary, queries.rotary, kBoxBytes / 2, 32);
        fence_proxy_async();
        sync_rows();
        smem.ring.wait(first + 1 - warpgroup);
        smem.ring.release(first, lane());
        smem.ring.release(first + 1, lane());
    }
    __device__ __forceinline__ void sync_rows() const { named_barrier_sync(kBarrierRows + warpgroup, kWarpgroup); }
    // Descriptors are in uniform registers, and found where products are issued: kept, they would take others' room.
    __device__ __forceinline__ u32 query_descriptor(u32 ordinal) const {
        // (An ordinal has no upper bit, but ptxas does not know: so this is not kept.)
        return in_uniform(descriptor_k_major(smem.q[0].box[0]) + warpgroup * (sizeof(smem.q[0]) >> 4) + (ordinal >> 31));
    }
    __device__ __forceinline__ u32 key_descriptor(u32 ordinal) const { return in_uniform(descriptor_k_major(smem.ring[ordinal].box[0])); }
    __device__ __forceinline__ u32 value_descriptor(u32 ordinal) const { return in_uniform(descriptor_token_major(smem.ring[ordinal].box[0])); }
    template <int kStep>
    __device__ __forceinline__ void score_step(u32 queries, u32 keys, float (&s)[kTileTokens / 2], bool accumulate) {
        constexpr int c = kStep / kStepsPerBox, step = kStep % kStepsPerBox;
        constexpr u32 kBox = kBoxBytes >> 4, kAlong = step * kAdvanceAlongRow;
        const u32 key = keys + c * kBox + kAlong, query = queries + (kQueryBoxes + c - kGroupBoxes) * kBox + kAlong;
        if constexpr (kStep < kRegisterSteps) wgmma_rs_n64(s, q[kStep], key, accumulate);
        else if constexpr (kStep < kLatentSteps) wgmma_ss<kTileTokens, 0, 0>(s, query, key, accumulate);
        else wgmma_ss_n64_narrow(s, query, key, accumulate);
    }
    // Which step is issued as number i: those with queries in registers spread among the others. One that reads both operands
    // takes all that shared memory gives, and a row of them keeps the other warpgroup from its messages.
    __device__ static constexpr int spread(int i) {
        const int before = i * kRegisterSteps / kSteps;
        return (i + 1) * kRegisterSteps / kSteps > before ? before : kRegisterSteps + i - before;
    }
    template <int kStep, int kEnd, bool kSpread>
    __device__ __forceinline__ void score_steps(u32 queries, u32 keys, float (&s)[kTileTokens / 2], bool accumulate = false) {
        if constexpr (kStep < kEnd) {
            score_step<kSpread ? spread(kStep) : kStep>(queries, keys, s, accumulate);
            score_steps<kStep + 1, kEnd, kSpread>(queries, keys, s, true);
        }
    }
    // Steps [kFirst, kEnd) of the scores of a tile, which is there; `issued()` is called when they are.
    template <int kFirst, int kEnd, class Issued>
    __device__ __forceinline__ void multiply_scores(u32 ordinal, float (&s)[kTileTokens / 2], Issued issued) {
        wgmma_fence();
        score_steps<kFirst, kEnd, kEnd - kFirst == kSteps>(query_descriptor(ordinal), key_descriptor(ordinal), s);
        wgmma_commit();
        issued();
        wgmma_wait<0>();
        wgmma_fence_operands(s);
    }
    // Values of a tile, P of which is in `a`.
    __device__ __forceinline__ void issue_values(u32 ordinal) {
        const u32 values = value_descriptor(ordinal);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma_rs_n<kHalfColumns>(o, a[step], values + step * kAdvanceDownRows, true);
        wgmma_commit();
    }
    __device__ __forceinline__ void complete_values(u32 ordinal) {
        wgmma_wait<0>();
        wgmma_fence_operands(o);
        smem.ring.release(ordinal, lane());
    }
    // One warpgroup's scores after the other's: left alone they fall into step, and both wait for messages at once.
    __device__ __forceinline__ void wait_turn() { named_barrier_sync(kBarrierTurn + warpgroup, kMergeThreads); }
    __device__ __forceinline__ void give_turn() { named_barrier_arrive(kBarrierTurn + 1 - warpgroup, kMergeThreads); }
};
