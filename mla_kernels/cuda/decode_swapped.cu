// Decode for few query rows (s_q * h_q small): operands swapped, so that tensor work follows the real heads.
//
//   S^T = K Q^T   (64 tokens x kRows)        O^T = V^T P^T   (512 x kRows, each value warpgroup 256 x kRows)
//
// Grid: one persistent CTA an SM; each walks its share of the batch (schedule.cuh).
// Warps: 0-3 and 4-7 values, 8-11 scores, 12 schedules, 13 streams KV, 14 loads Q, 15 idle.
// Shared memory: 5 or 6 groups of four boxes of V, 3 or 4 boxes of rotary columns (then P), Q (kRows x 1152 B).
#include "persistent.cuh"
#include "query.cuh"

constexpr int kRows = MLA_ROWS;
static_assert(kRows == 8 || kRows == 16 || kRows == 32, "a box of P holds 64 rows, but registers bind before");
constexpr int kChainSets = MLA_BF16 ? 1 : 2;
constexpr int kChains = kChainSets * kStepsPerBox;  // of QK, side by side
constexpr int kColumns = kRows / 4;  // query rows (columns of S^T) a thread holds

struct SharedMemory {
    TileRing ring;
    alignas(1024) QueryBuffer<kRows> q;
    ItemSums<kRows> sums;
    float factor[kRotarySlots][kRows];  // what O is to be multiplied with before this tile,
    int moved[kRotarySlots];            // where it is not one
    float maxima[4][kRows];             // a score warp's column maxima
    float2 parts[4][kRows];             // and sums
    float reference[kRows];
    ItemQueue queue;
    WorkItem to_merge;  // the last, if this CTA merges a slice of it

    __device__ void init_barriers() { q.init_barriers(); }
    __device__ void fetch_queries(const DecodeParams& p) { ::fetch_queries<kRows>(p, q, queue); }
};

// Query row (column of S^T) of accumulator element i: two neighbours in each group of eight.
__device__ __forceinline__ constexpr int column_slot(int i) { return (i / 4) * 2 + (i & 1); }
__device__ __forceinline__ u32 column_of(u32 slot, u32 lane) { return (slot / 2) * 8 + (lane & 3) * 2 + (slot & 1); }

// What a thread's accumulators are: vector j holds dims d and d + 8 of two neighbouring query rows.
struct SwappedFragment {
    static constexpr int kThreadRows = kColumns, kWarpRows = kRows, kWarpStride = 0, kSlotStep = 1;
    static constexpr int kVectorsPerBox = kRows / 8;

    __device__ static constexpr int slot(int j, int element) { return j % kVectorsPerBox * 2 + (element & 1); }
    __device__ static u32 row(u32 thread, u32 slot) { return column_of(slot, thread % 32); }
    // By whole warps. `pair(0, half)`: the two query rows of dim d (0) or d + 8 (1) of vector j, packed.
    static constexpr int kStoreVectors = 1;
    template <class Pair>
    __device__ static void store(u16* out, u32 rows, u32 thread, int j, Pair pair) {
        const u32 low = movmatrix_trans(pair(0, 0)), high = movmatrix_trans(pair(0, 1));
        const u32 lane = thread % 32, r = j % kVectorsPerBox * 8 + lane / 4;
        u16* place = out + r * kHeadDimV + (thread / kWarpgroup * kGroupBoxes + j / kVectorsPerBox) * kBoxColumns +
                     thread % kWarpgroup / 32 * 16 + lane % 4 * 2;
        if (r >= rows) return;
        *reinterpret_cast<u32*>(place) = low;
        *reinterpret_cast<u32*>(place + 8) = high;
    }
    __device__ static void store_one(u16* out, u32 rows, u32 thread, int j, float4 v) {
        store(out, rows, thread, j, [v](int, int half) { return half == 0 ? pack_elements(v.x, v.y) : pack_elements(v.z, v.w); });
    }
};

struct Scores {
    const DecodeParams& p;
    SharedMemory& smem;
    const u32 warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    u32 items = 0;  // whose queries were taken
    float m[kColumns], l[kColumns], n[kColumns];  // RowStats, l and n of this thread's tokens

    __device__ Scores(const DecodeParams& p, SharedMemory& smem) : p(p), smem(smem) {}

    __device__ void begin(const WorkItem&) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) m[i] = -kInfinity, l[i] = n[i] = 0.f;
        mbarrier_wait(&smem.q.full, items++ & 1);
    }

    // Scores of a tile, complete on return. Step k of every box goes to chain k: the chains run in turn (a step waits for the
    // one before on the same accumulators, longer than it works) and are short enough (softmax.cuh).
    __device__ void scores(u32 ordinal, float (&s)[kRows / 2]) {
        float chain[kChains][kRows / 2];
#pragma unroll
        for (int c = 0; c < kBoxes; ++c) {
            if (kLoads) smem.ring.wait_box(ordinal, c);
            wgmma_fence();
            const u32 kv = descriptor_k_major(smem.ring.box(ordinal, c)), q = descriptor_k_major(smem.q.box[c]);
            constexpr int kBoxesAChain = (kBoxes + kChainSets - 1) / kChainSets;
#pragma unroll
            for (int step = 0; step < kStepsPerBox; ++step)
                wgmma_ss<kRows, 0, 0>(chain[c / kBoxesAChain * kStepsPerBox + step], kv + step * kAdvanceAlongRow,
                                      q + step * kAdvanceAlongRow, c % kBoxesAChain > 0, c == kRotaryBox ? 1024 : kRowsStride);
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int k = 0; k < kChains; ++k) wgmma_fence_operands(chain[k]);
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
            s[i] = chain[0][i] + chain[1][i];
#pragma unroll
            for (int k = 2; k < kChains; k += 2) s[i] += chain[k][i] + chain[k + 1][i];
        }
    }

    __device__ void tiles(const WorkItem& w, int tile, int end, u32 ordinal) {
        for (; tile < end; ++tile, ++ordinal) {
            if constexpr (kMath) {
                float s[kRows / 2];
                scores(ordinal, s);
                finish_tile(*this, smem.ring, w, tile, ordinal, s);
            } else {
                for (int c = 0; c < kBoxes; ++c) smem.ring.wait_box(ordinal, c);
                smem.ring.publish(ordinal);
            }
        }
    }

    __device__ void keep(const float (&s)[kRows / 2]) {  // else ptxas drops the multiplications
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) l[column_slot(i)] += s[i];
    }

    __device__ void mask(const WorkItem& w, int tile, float (&s)[kRows / 2]) {
        const u32 warp = launder(this->warp), lane = launder(this->lane);
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
            const int token = tile * kTileTokens + warp * 16 + lane / 4 + (i & 2) * 4;
            const int row = w.row_block * kRows + column_of(column_slot(i), lane);
            if (token >= visible_end(p, kRagged ? seen_by_all(p, w) : w.kv_len, kRagged ? 1 : p.s_q, row)) s[i] = -kInfinity;
        }
    }

    // Scores -> probabilities, in place. Column maxima cross the four warps only when the reference has to move.
    __device__ void softmax(u32 ordinal, float (&s)[kRows / 2]) {
        const float scale = p.softmax_scale_log2;
        bool passes = false;
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) passes |= passes_reference(s[i], scale, m[column_slot(i)]);
        const bool moved = named_barrier_any(kBarrierScore, kScoreThreads, passes);
        const int slot = TileRing::rotary_slot(ordinal);
        if (moved) move_reference(slot, s);
        if (threadIdx.x % kWarpgroup == 0) smem.moved[slot] = moved;
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
            const int column = column_slot(i);
            s[i] = exp2_approx(fmaf(s[i], scale, -finite_reference(m[column])));
            l[column] += s[i];
        }
    }

    __device__ void move_reference(int slot, const float (&s)[kRows / 2]) {
        const u32 warp = launder(this->warp), lane = launder(this->lane);
        float top[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int i = (j / 2) * 4 + (j & 1);
            top[j] = fmaxf(s[i], s[i + 2]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) top[j] = fmaxf(top[j], __shfl_xor_sync(0xffffffffu, top[j], step));
            if (lane < 4) smem.maxima[warp][column_of(j, lane)] = top[j];
        }
        named_barrier_sync(kBarrierScore, kScoreThreads);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const u32 column = column_of(j, lane);
#pragma unroll
            for (int other = 0; other < 4; ++other) top[j] = fmaxf(top[j], smem.maxima[other][column]);
            const float after = fmaxf(m[j], top[j] * p.softmax_scale_log2), factor = rescale_factor(m[j], after);
            m[j] = after;
            l[j] *= factor;
            n[j] *= factor;
            if (warp == 0 && lane < 4) smem.factor[slot][column] = factor;
        }
    }

    // P^T, rows = query rows, 64 tokens (128 bytes) a row, in the place of the rotary box: the B operand of PV.
    __device__ void store_p(u32 ordinal, const float (&s)[kRows / 2]) {
        const u32 warp = launder(this->warp), lane = launder(this->lane), chunk = warp * 2 + (lane / 8 & 1);
        const u32 base = smem_address(smem.ring.box(ordinal, kRotaryBox));
        u32 packed[kRows / 4];
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) {
            packed[i] = pack_elements(s[2 * i], s[2 * i + 1]);
            const float2 rounded = unpack_elements(packed[i]);
            n[column_slot(2 * i)] += rounded.x;
            n[column_slot(2 * i + 1)] += rounded.y;
        }
        if constexpr (kRows == 8) {
            stmatrix_x2_trans(base + swizzled_offset(lane & 7, chunk), packed[0], packed[1]);
        } else {
#pragma unroll
            for (int i = 0; i < kRows / 4; i += 4)
                stmatrix_x4_trans(base + swizzled_offset(i * 4 + lane / 16 * 8 + (lane & 7), chunk), packed[i], packed[i + 1],
                                  packed[i + 2], packed[i + 3]);
        }
    }

    // Gives the queries back and joins the four warps' sums.
    __device__ void end(const WorkItem& w, float* sums) {
        const u32 warp = launder(this->warp), lane = launder(this->lane);
        if (lane == 0) mbarrier_arrive(&smem.q.empty);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
                l[j] += __shfl_xor_sync(0xffffffffu, l[j], step);
                n[j] += __shfl_xor_sync(0xffffffffu, n[j], step);
            }
            if (lane < 4) smem.parts[warp][column_of(j, lane)] = make_float2(l[j], n[j]);
        }
        if (warp == 0 && lane < 4) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) smem.reference[column_of(j, lane)] = m[j];
        }
        named_barrier_sync(kBarrierScore, kScoreThreads);
        const u32 row = warp * 32 + lane;
        if (row >= kRows) return;
        RowStats stats{smem.reference[row], 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 4; ++i) stats.l += smem.parts[i][row].x, stats.n += smem.parts[i][row].y;
        if (w.invalid) stats.l = stats.n = kNan;
        write_stats<kRows>(p, w, row, stats, sums);
    }
};

struct Values {
    using Fragment = SwappedFragment;
    const DecodeParams& p;
    SharedMemory& smem;
    float o[kGroupBoxes][kRows / 2];
    const u32 half;  // of the columns: the warpgroup's boxes

    __device__ Values(const DecodeParams& p, SharedMemory& smem, u32 half) : p(p), smem(smem), half(half) {}

    __device__ void reset() {
#pragma unroll
        for (int c = 0; c < kGroupBoxes; ++c)
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i) o[c][i] = 0.f;
    }

    __device__ void tile(u32 ordinal) {
        smem.ring.wait_scored(ordinal);
        if constexpr (kSoftmax) {
            const u32 slot = TileRing::rotary_slot(ordinal), lane = launder(threadIdx.x) % 32;
            if (smem.moved[slot]) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    const float factor = smem.factor[slot][column_of(j, lane)];
#pragma unroll
                    for (int c = 0; c < kGroupBoxes; ++c)
#pragma unroll
                        for (int i = 0; i < kRows / 2; ++i)
                            if (column_slot(i) == j) o[c][i] *= factor;
                }
            }
        }
        if constexpr (kMath) {
            const u32 probabilities = descriptor_k_major(smem.ring.box(ordinal, kRotaryBox));
            wgmma_fence();
            const u32 v = descriptor_token_major(smem.ring.box(ordinal, half * kGroupBoxes));
#pragma unroll
            for (int step = 0; step < kStepsPerBox; ++step)
#pragma unroll
                for (int c = 0; c < kGroupBoxes; ++c)
                    wgmma_ss<kRows, 1, 0>(o[c], v + c * (kBoxStride >> 4) + step * kAdvanceDownRows,
                                          probabilities + step * kAdvanceAlongRow, true, kRowsStride);
            wgmma_commit();
            wgmma_wait<0>();
        }
#pragma unroll
        for (int c = 0; c < kGroupBoxes; ++c) wgmma_fence_operands(o[c]);
        smem.ring.release(ordinal, half);
    }

    __device__ float4 vector(int j) const {
        const float* v = &o[j / Fragment::kVectorsPerBox][j % Fragment::kVectorsPerBox * 4];
        return make_float4(v[0], v[1], v[2], v[3]);
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) char shared[];
    run_cta<kRows, Scores, Values>(p, *reinterpret_cast<SharedMemory*>(shared));
}
