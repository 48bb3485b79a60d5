// Decode for many query rows: 64 of them a CTA.
//
//   S = Q K^T  (64 x 64 tokens)        O = P V  (64 x 512, each consumer warpgroup 64 x 256)
//
// Grid: one persistent CTA an SM; each walks its share of the batch (schedule.cuh). KV streams through two 72 KB tile
// buffers. Warpgroup 0 leads: it owns the even tiles of an item, warpgroup 1 the odd ones. The
// owner computes S and P of its tile, keeps P in registers for its own half of O and leaves a copy for the other in
// the tile's rotary box, which nobody needs after QK. So one warpgroup's softmax runs under the other's WGMMA.
// Warps: 0-3 and 4-7 consume (232 registers), 8 streams KV (40), 9 loads Q, 10-11 idle.
// Shared memory: 18 boxes of 8 KB, Q (72 KB).
#include "persistent.cuh"

constexpr int kRows = MLA_ROWS;
static_assert(kRows == 64, "one WGMMA's rows");
constexpr int kHalfBoxes = kBoxesV / 2;             // boxes of V that a warpgroup multiplies
constexpr int kHalfColumns = kHalfBoxes * kBoxColumns;

struct SharedMemory {
    BoxRing<kBoxes> ring[2];  // a ring is a tile buffer
    QueryBuffer<kRows> q;
    u64 p_ready[2];             // P of the lead's (0), the trail's (1) tile lies in its rotary box
    float reference[2][kRows];  // the rows' reference after that tile,
    int moved[2][4];            // and whether it moved, per warp of 16 rows
    float sums[2][kRows];
    ItemQueue queue;
    PendingMerges pending;

    __device__ void init_barriers() {
        mbarrier_init(&p_ready[0], kWarpgroup);
        mbarrier_init(&p_ready[1], kWarpgroup);
    }
};

// What a thread's accumulators are: vector j holds columns 8 j, 8 j + 1 (from its own first) of rows r and r + 8.
struct RowsFragment {
    static constexpr int kThreadRows = 2, kWarpRows = 16, kWarpStride = 16;

    __device__ static constexpr int slot(int, int element) { return element / 2; }
    __device__ static int row(int thread, int slot) { return thread / 32 % 4 * 16 + thread % 32 / 4 + slot * 8; }
    __device__ static bool has_stats(int thread) { return thread < kWarpgroup && thread % 4 == 0; }
    __device__ static void store(u16* out, int rows, int thread, int j, float4 v) {
        const int r = row(thread, 0);
        u16* place = out + r * kHeadDimV + thread / kWarpgroup * kHalfColumns + thread % 4 * 2 + j * 8;
        if (r < rows) *reinterpret_cast<u32*>(place) = pack_elements(v.x, v.y);
        if (r + 8 < rows) *reinterpret_cast<u32*>(place + 8 * kHeadDimV) = pack_elements(v.z, v.w);
    }
};

template <int kWg>
struct Consumer {
    using Fragment = RowsFragment;
    const DecodeParams& p;
    SharedMemory& smem;
    const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32;
    const int row = warp * 16 + lane / 4;  // and row + 8
    float o[kHalfColumns / 2];
    float m[2], l[2];
    u32 p_phase = 0;  // of the other's p_ready

    // A tile in flight is known by its ordinal in the CTA's share: that gives its ring and the parity of its boxes.
    __device__ BoxRing<kBoxes>& ring_of(u32 ordinal) { return smem.ring[launder(ordinal & 1)]; }
    __device__ static u32 phase_of(u32 ordinal) { return ordinal >> 1 & 1; }
    __device__ u16* box(u32 ordinal, int c) { return ring_of(ordinal).box[c]; }

    __device__ void reset() {
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) o[i] = 0.f;
#pragma unroll
        for (int r = 0; r < 2; ++r) m[r] = -kInfinity, l[r] = 0.f;
    }

    __device__ void issue_chain(u32 ordinal, int first, float (&s)[kTileTokens / 2]) {
#pragma unroll
        for (int c = first; c < first + kChainBoxes && c < kBoxes; ++c) {
            if (kLoads) mbarrier_wait(&ring_of(ordinal).full[c], phase_of(ordinal));
            wgmma_fence();
            const u64 q = descriptor_k_major(smem.q.box[c]), k = descriptor_k_major(box(ordinal, c));
#pragma unroll
            for (int step = 0; step < kStepsPerBox; ++step)
                wgmma_ss<kTileTokens, 0, 0>(s, q + step * kAdvanceAlongRow, k + step * kAdvanceAlongRow, c > first || step > 0);
        }
        wgmma_commit();
    }

    // Masked scores of an owned tile, complete on return: a chain after the other (softmax.cuh), the first two together.
    __device__ void scores(const WorkItem& w, int tile, u32 ordinal, float (&s)[kTileTokens / 2]) {
        float part[kTileTokens / 2];
        issue_chain(ordinal, 0, s);
#pragma unroll
        for (int first = kChainBoxes; first < kBoxes; first += kChainBoxes) {
            issue_chain(ordinal, first, part);
            wgmma_wait<0>();
            wgmma_fence_operands(s);
            wgmma_fence_operands(part);
#pragma unroll
            for (int i = 0; i < kTileTokens / 2; ++i) s[i] += part[i];
        }
        if (kSoftmax && (tile + 1) * kTileTokens > w.kv_len - (p.causal ? p.s_q - 1 : 0)) mask(w, tile, s);
    }

    __device__ void mask(const WorkItem& w, int tile, float (&s)[kTileTokens / 2]) {
        const int lane = launder(this->lane), row = launder(warp) * 16 + lane / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int end = visible_end(p, w.kv_len, w.row_block * kRows + row + r * 8) - tile * kTileTokens - (lane & 3) * 2;
#pragma unroll
            for (int i = 0; i < kTileTokens / 2; ++i)
                if ((i / 2 & 1) == r && i / 4 * 8 + (i & 1) >= end) s[i] = -kInfinity;
        }
    }

    __device__ void issue_pv(u32 ordinal, const u32 (&probabilities)[4][4]) {
        const u64 v = descriptor_token_major(box(ordinal, kWg * kHalfBoxes));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma_rs_n256<1>(o, probabilities[step], v + step * kAdvanceDownRows, true);
        wgmma_commit();
    }

    // The same with P from the other warpgroup's copy.
    __device__ void issue_pv_shared(u32 ordinal) {
        const u64 v = descriptor_token_major(box(ordinal, kWg * kHalfBoxes)), copy = descriptor_k_major(box(ordinal, kRotaryBox));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            wgmma_ss<kHalfColumns, 0, 1>(o, copy + step * kAdvanceAlongRow, v + step * kAdvanceDownRows, true);
        wgmma_commit();
    }

    __device__ void wait_all() {
        wgmma_wait<0>();
        wgmma_fence_operands(o);
    }

    // This warpgroup's half of V; the reader of P's copy also gives back the rotary box.
    __device__ void release(u32 ordinal, bool with_copy) {
        if (!kLoads) return;
        const int lane = launder(this->lane);
        if (lane < kHalfBoxes) mbarrier_arrive(&ring_of(ordinal).empty[kWg * kHalfBoxes + lane]);
        if (with_copy && lane == kHalfBoxes) mbarrier_arrive(&ring_of(ordinal).empty[kRotaryBox]);
    }

    __device__ void rescale(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) o[i] *= factor[i / 2 & 1];
    }

    // Scores -> probabilities, in place. Returns whether this warp's references moved; `factor` is for O.
    __device__ bool softmax(float (&s)[kTileTokens / 2], float (&factor)[2]) {
        const int warp = launder(this->warp), row = warp * 16 + lane / 4;
        const float scale = p.softmax_scale_log2;
        float top[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int i = 0; i < kTileTokens / 2; ++i) top[i / 2 & 1] = fmaxf(top[i / 2 & 1], s[i]);
        const bool passes = passes_reference(top[0], scale, m[0]) || passes_reference(top[1], scale, m[1]);
        const bool moved = __any_sync(0xffffffffu, passes);
        if (moved) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
                top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
                const float after = fmaxf(m[r], top[r] * scale);
                factor[r] = rescale_factor(m[r], after);
                m[r] = after;
                l[r] *= factor[r];
                if ((lane & 3) == 0) smem.reference[kWg][row + r * 8] = after;
            }
        }
        if (lane == 0) smem.moved[kWg][warp] = moved;
        const float reference[2] = {finite_reference(m[0]), finite_reference(m[1])};
#pragma unroll
        for (int i = 0; i < kTileTokens / 2; ++i) {
            s[i] = exp2_approx(fmaf(s[i], scale, -reference[i / 2 & 1]));
            l[i / 2 & 1] += s[i];
        }
        return moved;
    }

    // S of an owned tile -> P in registers and its copy in the tile's rotary box.
    __device__ void publish(const WorkItem& w, int tile, u32 ordinal, const float (&s)[kTileTokens / 2], u32 (&probabilities)[4][4]) {
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) probabilities[step][i] = pack_elements(s[step * 8 + i * 2], s[step * 8 + i * 2 + 1]);
        if constexpr (kSoftmax) {
            const int lane = launder(this->lane);
            const u32 copy = smem_address(box(ordinal, kRotaryBox));
            const int copy_row = warp * 16 + (lane / 8 & 1) * 8 + (lane & 7);
#pragma unroll
            for (int step = 0; step < 4; ++step)
                stmatrix_x4(copy + swizzled_offset(copy_row, step * 2 + lane / 16), probabilities[step][0],
                            probabilities[step][1], probabilities[step][2], probabilities[step][3]);
            const int valid = w.kv_len - tile * kTileTokens;
            if (valid < kTileTokens) zero_token_rows([&](int c) { return box(ordinal, c); }, valid, launder(thread));
            fence_proxy_async();
            if (valid < kTileTokens) named_barrier_sync(kBarrierWarpgroup + kWg, kWarpgroup);
        }
        if constexpr (kLoads) mbarrier_arrive(&smem.p_ready[kWg]);  // also: QK no longer reads the tile
    }

    // Waits for the other's P and follows its reference.
    __device__ void take_copy() {
        const int warp = launder(this->warp), row = warp * 16 + lane / 4;
        if constexpr (kLoads) {
            mbarrier_wait(&smem.p_ready[1 - kWg], p_phase);
            p_phase ^= 1;
        }
        if constexpr (kSoftmax) {
            if (smem.moved[1 - kWg][warp]) {
                float factor[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float after = smem.reference[1 - kWg][row + r * 8];
                    factor[r] = rescale_factor(m[r], after);
                    m[r] = after;
                    l[r] *= factor[r];
                }
                rescale(factor);
            }
        }
    }

    // Tiles `tile` (lead's) and `tile + 1` (trail's, if `pair`), of ordinals `even` and `even + 1`.
    __device__ void lead(const WorkItem& w, int tile, u32 even, bool pair) {
        float s[kTileTokens / 2], factor[2];
        u32 probabilities[4][4];
        scores(w, tile, even, s);
        const bool moved = kSoftmax && softmax(s, factor);
        publish(w, tile, even, s, probabilities);
        if (moved) rescale(factor);
        issue_pv(even, probabilities);
        wait_all();
        release(even, false);
        if (pair) {
            take_copy();
            issue_pv_shared(even + 1);
            wait_all();
            release(even + 1, true);
        }
    }

    __device__ void trail(const WorkItem& w, int tile, u32 even, bool pair) {
        float s[kTileTokens / 2], factor[2];
        u32 probabilities[4][4];
        if (pair) scores(w, tile + 1, even + 1, s);
        take_copy();
        issue_pv_shared(even);  // runs under the softmax below
        if (!pair) {
            wait_all();
            release(even, true);
            return;
        }
        const bool moved = kSoftmax && softmax(s, factor);
        publish(w, tile + 1, even + 1, s, probabilities);
        wait_all();
        release(even, true);
        if (moved) rescale(factor);
        issue_pv(even + 1, probabilities);
        wait_all();
        release(even + 1, false);
    }

    // Loads alone: each warpgroup waits for the boxes that it gives back, and for no others: those may be refilled.
    __device__ void drain(u32 ordinal) {
        for (int c = 0; c < kBoxes; ++c) {
            if (c / kHalfBoxes % 2 != kWg) continue;
            mbarrier_wait(&ring_of(ordinal).full[c], phase_of(ordinal));
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&ring_of(ordinal).empty[c]);
        }
    }

    __device__ void tiles(const WorkItem& w) {
        for (int tile = w.begin; tile < w.end; tile += 2) {
            const bool pair = tile + 1 < w.end;
            const u32 even = launder(w.tiles_before + tile - w.begin);
            if constexpr (!kMath) {
                drain(even);
                if (pair) drain(even + 1);
            } else if constexpr (kWg == 0) {
                lead(w, tile, even, pair);
            } else {
                trail(w, tile, even, pair);
            }
        }
    }

    // Row sums over the tile's columns and both warpgroups.
    __device__ void join(const WorkItem& w) {
        const int lane = launder(this->lane), row = launder(warp) * 16 + lane / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
            l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
            if ((lane & 3) == 0) smem.sums[kWg][row + r * 8] = l[r];
        }
        named_barrier_sync(kBarrierConsumers, kConsumers);
#pragma unroll
        for (int r = 0; r < 2; ++r) l[r] = w.invalid ? kNan : smem.sums[0][row + r * 8] + smem.sums[1][row + r * 8];
    }

    __device__ float4 vector(int j) const { return make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]); }
    __device__ void set_vector(int j, float4 v) { o[4 * j] = v.x, o[4 * j + 1] = v.y, o[4 * j + 2] = v.z, o[4 * j + 3] = v.w; }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) char shared[];
    run_cta<kRows, Consumer>(p, *reinterpret_cast<SharedMemory*>(shared));
}
