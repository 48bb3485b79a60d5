// Decode for many query rows: 64 of them a CTA.
//
//   S = Q K^T  (64 x 64 tokens)        O = P V  (64 x 512, each value warpgroup 64 x 256)
//
// Grid: one persistent CTA an SM; each walks its share of the batch (schedule.cuh). An item's queries come through the ring
// like a tile. The first MLA_REGISTER_STEPS of the 36 steps of QK^T then take theirs from the score warpgroup's registers:
// shared memory is what binds. Two tiles (144 KB) and all queries (72 KB) leave no room for loads in flight, and QK with both
// operands in shared memory reads it at the full 128 B/clk.
// Warps: 0-3 and 4-7 values, 8-11 scores, 12 schedules, 13 streams, 14 and 15 idle.
// Shared memory: a ring of 2 1/2 tiles (5 groups of four boxes, 3 rotary boxes), 5 boxes of queries.
#include "fragment.cuh"
#include "persistent.cuh"

constexpr int kRows = MLA_ROWS;
static_assert(kRows == 64, "one WGMMA's rows");
constexpr int kRegisterSteps = MLA_REGISTER_STEPS;  // steps of Q K^T whose queries come from registers, the first
constexpr int kAheadBoxes = MLA_AHEAD_BOXES;  // of a tile that are multiplied under the softmax of the one before
static_assert(1 <= kAheadBoxes && kAheadBoxes < kBoxes, "both chains have a part");
constexpr int kRegisterBoxes = kRegisterSteps / kStepsPerBox;
constexpr int kQueryBoxes = kBoxes - kRegisterBoxes;  // in shared memory, one of them perhaps in part
constexpr int kHalfColumns = kGroupBoxes * kBoxColumns;
// One WGMMA's columns of O. 256 would read P half as often, but with 512 threads ptxas counts 128 registers at entry and
// refuses an instruction that needs more, whatever setmaxnreg says later (C7602).
constexpr int kPvColumns = 128;
constexpr int kPvParts = kHalfColumns / kPvColumns;

struct SharedMemory {
    u16 q[kQueryBoxes][kBoxElements];
    TileRing ring;
    ItemSums<kRows> sums;
    float factor[kRotarySlots][kRows];  // what O is to be multiplied with before this tile,
    int moved[kRotarySlots][4];         // where it is not one, per warp of 16 rows
    ItemQueue queue;
    WorkItem to_merge;  // the last, if this CTA merges a slice of it

    __device__ void init_barriers() {}             // none of its own
    __device__ void fetch_queries(const DecodeParams&) {}  // they come through the ring
};

struct Scores {
    const DecodeParams& p;
    SharedMemory& smem;
    const u32 warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    u32 q[kRegisterSteps][4];
    float m[2], l[2], n[2];  // RowStats of rows warp * 16 + lane / 4 and 8 below

    __device__ Scores(const DecodeParams& p, SharedMemory& smem) : p(p), smem(smem) {}
    __device__ u32 row() const { return launder(warp) * 16 + launder(lane) / 4; }

    // Takes the queries out of the ring.
    __device__ void begin(const WorkItem& w) {
        const u32 ordinal = w.ordinal - 1;
        const u32 lane = launder(this->lane), thread = launder(threadIdx.x) % kWarpgroup;
#pragma unroll
        for (int r = 0; r < 2; ++r) m[r] = -kInfinity, l[r] = n[r] = 0.f;
#pragma unroll
        for (int i = 0; i < kRegisterSteps; ++i) {
            const int c = i / kStepsPerBox, step = i % kStepsPerBox;
            if (kLoads && step == 0) smem.ring.wait_box(ordinal, c);
            const u32 box = smem_address(smem.ring.query_box(ordinal, c));
            ldmatrix_x4(q[i], box + swizzled_offset(warp * 16 + (lane & 15), step * 2 + lane / 16));
        }
        named_barrier_sync(kBarrierScore, kScoreThreads);  // no warp multiplies the queries before
#pragma unroll
        for (int c = 0; c < kQueryBoxes; ++c) {
            if (kLoads) smem.ring.wait_box(ordinal, kRegisterBoxes + c);
            const auto* from = reinterpret_cast<const uint4*>(smem.ring.query_box(ordinal, kRegisterBoxes + c));
            auto* to = reinterpret_cast<uint4*>(smem.q[c]);
#pragma unroll
            for (int i = 0; i < kBoxBytes / 16; i += kScoreThreads) to[i + thread] = from[i + thread];
        }
        fence_proxy_async();
        named_barrier_sync(kBarrierScore, kScoreThreads);
        smem.ring.release_unscored(ordinal);
    }

    // Issues the WGMMA of boxes [kFirst, kEnd), step by step in turn on `even` and `odd`, which may be the same. (Each step
    // waits for the one before on the same accumulators, 70 cycles for 32 of work: one chain alone leaves half unused.)
    template <int kFirst, int kEnd>
    __device__ void issue(u32 ordinal, float (&even)[kTileTokens / 2], float (&odd)[kTileTokens / 2], bool fresh_even, bool fresh_odd) {
#pragma unroll
        for (int c = kFirst; c < kEnd; ++c) {
            if (kLoads) smem.ring.wait_box(ordinal, c);
            wgmma_fence();
            const u32 k = descriptor_k_major(smem.ring.box(ordinal, c));
            const u32 query = descriptor_k_major(smem.q[c < kRegisterBoxes ? 0 : c - kRegisterBoxes]);
#pragma unroll
            for (int step = 0; step < kStepsPerBox; ++step) {
                const int i = c * kStepsPerBox + step;
                float (&s)[kTileTokens / 2] = step % 2 == 0 ? even : odd;
                const bool accumulate = c > kFirst || step > 1 || !(step == 0 ? fresh_even : fresh_odd);
                const u32 stride = c == kRotaryBox ? 1024 : kRowsStride;
                if (i < kRegisterSteps) wgmma_rs_n64(s, q[i < kRegisterSteps ? i : 0], k + step * kAdvanceAlongRow, accumulate, stride);
                else wgmma_ss<kTileTokens, 0, 0>(s, query + step * kAdvanceAlongRow, k + step * kAdvanceAlongRow, accumulate, 1024, stride);
            }
        }
        wgmma_commit();
    }

    // Completes what is in flight and adds `part` to `s`.
    __device__ static void add(float (&s)[kTileTokens / 2], float (&part)[kTileTokens / 2]) {
        wgmma_wait<0>();
        wgmma_fence_operands(s);
        wgmma_fence_operands(part);
#pragma unroll
        for (int i = 0; i < kTileTokens / 2; ++i) s[i] += part[i];
    }

    // s += scores over the chains from kFirst on, each through `part`.
    template <int kFirst>
    __device__ void add_chains(u32 ordinal, float (&s)[kTileTokens / 2], float (&part)[kTileTokens / 2]) {
        if constexpr (kFirst < kBoxes) {
            constexpr int kEnd = kFirst + kChainBoxes < kBoxes ? kFirst + kChainBoxes : kBoxes;
            issue<kFirst, kEnd>(ordinal, part, part, true, false);
            add(s, part);
            add_chains<kEnd>(ordinal, s, part);
        }
    }

    // Scores are summed in two chains that run in turn, the first of which begins under the softmax of the tile before.
    // An item whose scores grow large goes on in short chains, one after the other (softmax.cuh).
    __device__ void tiles(const WorkItem& w, int tile, int end, u32 ordinal) {
        if constexpr (!kMath) {
            for (; tile < end; ++tile, ++ordinal) {
                for (int c = 0; c < kBoxes; ++c) smem.ring.wait_box(ordinal, c);
                smem.ring.publish(ordinal);
            }
            return;
        }
        float s[kTileTokens / 2], part[kTileTokens / 2];
        bool large = false;
        issue<0, kAheadBoxes>(ordinal, part, part, true, false);
#pragma unroll 1
        for (; tile < end; ++tile, ++ordinal) {
            issue<kAheadBoxes, kBoxes>(ordinal, s, part, true, false);
            add(s, part);
            issue<0, kAheadBoxes>(tile + 1 < end ? ordinal + 1 : ordinal, part, part, true, false);  // after the last for nothing
            if constexpr (kSoftmax) {
                const float top = fmaxf(row_max(s, 0), row_max(s, 1));
                large = named_barrier_any(kBarrierScore, kScoreThreads, top * p.softmax_scale_log2 > kLargeScore);
                if (large) break;
            }
            finish_tile(*this, smem.ring, w, tile, ordinal, s);
        }
        wgmma_wait<0>();
        if (!large) return;
#pragma unroll 1
        for (; tile < end; ++tile, ++ordinal) {
#pragma unroll
            for (int i = 0; i < kTileTokens / 2; ++i) s[i] = 0.f;
            add_chains<0>(ordinal, s, part);
            named_barrier_sync(kBarrierScore, kScoreThreads);  // every warp has read the rotary box
            finish_tile(*this, smem.ring, w, tile, ordinal, s);
        }
    }

    __device__ void keep(const float (&s)[kTileTokens / 2]) {  // else ptxas drops the multiplications
#pragma unroll
        for (int i = 0; i < kTileTokens / 2; ++i) l[i / 2 & 1] += s[i];
    }

    __device__ void mask(const WorkItem& w, int tile, float (&s)[kTileTokens / 2]) {
        const u32 row = this->row(), column = launder(lane) % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int end = visible_end(p, kRagged ? seen_by_all(p, w) : w.kv_len, kRagged ? 1 : p.s_q, w.row_block * kRows + row + r * 8) - tile * kTileTokens - column;
#pragma unroll
            for (int i = 0; i < kTileTokens / 2; ++i)
                if ((i / 2 & 1) == r && i / 4 * 8 + (i & 1) >= end) s[i] = -kInfinity;
        }
    }

    // Scores -> probabilities, in place.
    __device__ void softmax(u32 ordinal, float (&s)[kTileTokens / 2]) {
        const float scale = p.softmax_scale_log2;
        float top[2] = {row_max(s, 0), row_max(s, 1)};
        const bool passes = passes_reference(top[0], scale, m[0]) || passes_reference(top[1], scale, m[1]);
        const bool moved = __any_sync(0xffffffffu, passes);
        const int slot = TileRing::rotary_slot(ordinal);
        if (moved) {
            const u32 row = this->row();
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
                top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
                const float after = fmaxf(m[r], top[r] * scale), factor = rescale_factor(m[r], after);
                m[r] = after;
                l[r] *= factor;
                n[r] *= factor;
                if ((launder(lane) & 3) == 0) smem.factor[slot][row + r * 8] = factor;
            }
        }
        if (launder(lane) == 0) smem.moved[slot][launder(warp)] = moved;
        const float reference[2] = {finite_reference(m[0]), finite_reference(m[1])};
        float sum[2][2] = {};
#pragma unroll
        for (int i = 0; i < kTileTokens / 2; ++i) {
            s[i] = exp2_approx(fmaf(s[i], scale, -reference[i / 2 & 1]));
            sum[i / 2 & 1][i & 1] += s[i];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) l[r] += sum[r][0] + sum[r][1];
    }

    // Largest of this thread's scores of row r (0, 1), as a tree: nothing else hides the latency of a chain here.
    __device__ static float row_max(const float (&s)[kTileTokens / 2], int r) {
        float top[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) top[k] = fmaxf(s[4 * k + 2 * r], s[4 * k + 2 * r + 1]);
#pragma unroll
        for (int half = 4; half > 0; half /= 2)
#pragma unroll
            for (int k = 0; k < half; ++k) top[k] = fmaxf(top[k], top[k + half]);
        return top[0];
    }

    // P in the place of the tile's rotary box: the A operand of PV.
    __device__ void store_p(u32 ordinal, const float (&s)[kTileTokens / 2]) {
        const u32 lane = launder(this->lane);
        const u32 box = smem_address(smem.ring.box(ordinal, kRotaryBox));
        float sum[2][2] = {};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            u32 packed[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                packed[i] = pack_elements(s[step * 8 + i * 2], s[step * 8 + i * 2 + 1]);
                const float2 rounded = unpack_elements(packed[i]);
                sum[i & 1][i / 2] += rounded.x + rounded.y;
            }
            stmatrix_x4(box + swizzled_offset(warp * 16 + (lane & 15), step * 2 + lane / 16), packed[0], packed[1], packed[2], packed[3]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) n[r] += sum[r][0] + sum[r][1];
    }

    __device__ void end(const WorkItem& w, float* sums) {
        const u32 row = this->row();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                l[r] += __shfl_xor_sync(0xffffffffu, l[r], step);
                n[r] += __shfl_xor_sync(0xffffffffu, n[r], step);
            }
            if ((launder(lane) & 3) != 0) continue;
            if (w.invalid) l[r] = n[r] = kNan;
            write_stats<kRows>(p, w, row + r * 8, {m[r], l[r], n[r]}, sums);
        }
    }
};

struct Values {
    using Fragment = RowsFragment;
    const DecodeParams& p;
    SharedMemory& smem;
    float o[kPvParts][kPvColumns / 2];
    const u32 half;  // of the columns: the warpgroup's boxes

    __device__ Values(const DecodeParams& p, SharedMemory& smem, u32 half) : p(p), smem(smem), half(half) {}

    __device__ void reset() {
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) at(i) = 0.f;
    }

    __device__ void tile(u32 ordinal) {
        smem.ring.wait_scored(ordinal);
        if constexpr (kSoftmax) {
            const u32 slot = TileRing::rotary_slot(ordinal), thread = launder(threadIdx.x) % kWarpgroup;
            if (smem.moved[slot][thread / 32]) {
                const float factor[2] = {smem.factor[slot][Fragment::row(thread, 0)], smem.factor[slot][Fragment::row(thread, 1)]};
#pragma unroll
                for (int i = 0; i < kHalfColumns / 2; ++i) at(i) *= factor[i / 2 & 1];
            }
        }
        if constexpr (kMath) {
            const u32 probabilities = descriptor_k_major(smem.ring.box(ordinal, kRotaryBox));
            const u32 v = descriptor_token_major(smem.ring.box(ordinal, half * kGroupBoxes));
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step)
#pragma unroll
                for (int part = 0; part < kPvParts; ++part)
                    wgmma_ss<kPvColumns, 0, 1>(o[part], probabilities + step * kAdvanceAlongRow,
                                               v + part * (kPvColumns / kBoxColumns * kBoxStride >> 4) + step * kAdvanceDownRows, true, 1024, kRowsStride);
            wgmma_commit();
            wgmma_wait<0>();
        }
#pragma unroll
        for (int part = 0; part < kPvParts; ++part) wgmma_fence_operands(o[part]);
        smem.ring.release(ordinal, half);
    }

    __device__ float& at(int i) { return o[i / (kPvColumns / 2)][i % (kPvColumns / 2)]; }
    __device__ float4 vector(int j) { return make_float4(at(4 * j), at(4 * j + 1), at(4 * j + 2), at(4 * j + 3)); }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) char shared[];
    run_cta<kRows, Scores, Values>(p, *reinterpret_cast<SharedMemory*>(shared));
}
