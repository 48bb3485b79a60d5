// Decode for few query rows (s_q * h_q small): operands swapped, so that tensor work follows the real heads.
//
//   S^T = K Q^T   (64 tokens x kRows)        O^T = V^T P^T   (512 x kRows)
//
// Grid: one persistent CTA an SM; each walks its share of the batch (schedule.cuh). KV streams through two rings of
// 8 KB boxes. Consumer warpgroup w takes every other 64-token tile, whole: QK, softmax and PV with its own
// 512 x kRows accumulators, so no P crosses warpgroups; the two halves are joined at the end of an item.
// Warps: 0-3 and 4-7 consume (232 registers), 8 streams KV (40), 9 loads Q, 10-11 idle.
// Shared memory: 2 x kRing boxes (10 to 12), Q (kRows x 1152 B), P (2 x kRows x 128 B), 16 KB to join the two halves.
#include "persistent.cuh"

constexpr int kRows = MLA_ROWS;
static_assert(kRows == 8 || kRows == 16 || kRows == 32, "accumulators of 512 x kRows must fit a warpgroup's registers");
constexpr int kChains = (kBoxes + kChainBoxes - 1) / kChainBoxes;
constexpr int kInFlight = kRows == 32 ? 1 : 2;  // chains of QK: what the registers allow
constexpr int kColumns = kRows / 4;  // query rows (columns of S^T) a thread holds
constexpr int kExchanged = kRows == 32 ? 2 : 4;  // vectors of O that a thread passes to the other warpgroup at a time
constexpr int kReservedBytes = kRows * (kHeadDim * 2 + 2 * kTileTokens * 2 + 2 * 4 * 8 + 4 * 4) +
                               2 * kExchanged * kWarpgroup * 16 + 4 * 1024;
constexpr int kRing = (kMaxSharedBytes - kReservedBytes) / (2 * (kBoxBytes + 16));
static_assert(kRing > kBoxes, "a tile and what comes after it");

struct SharedMemory {
    BoxRing<kRing> ring[2];  // warpgroup w consumes ring w
    QueryBuffer<kRows> q;
    alignas(1024) u16 p[2][kRows * kTileTokens];
    float4 exchange[2][kExchanged][kWarpgroup];
    float maxima[2][4][kRows];  // a warp's column maxima
    float sums[2][4][kRows];    // and sums
    float reference[2][kRows];
    ItemQueue queue;
    PendingMerges pending;

    __device__ void init_barriers() {}  // none of its own
};

// Query row (column of S^T) of accumulator element i: two neighbours in each group of eight.
__device__ __forceinline__ constexpr int column_slot(int i) { return (i / 4) * 2 + (i & 1); }
__device__ __forceinline__ int column_of(int slot, int lane) { return (slot / 2) * 8 + (lane & 3) * 2 + (slot & 1); }

// What a thread's accumulators are once joined: vector j holds dims d and d + 8 of two neighbouring query rows.
struct SwappedFragment {
    static constexpr int kThreadRows = kColumns, kWarpRows = kRows, kWarpStride = 0;
    static constexpr int kVectorsPerBox = kRows / 8;

    __device__ static constexpr int slot(int j, int element) { return j % kVectorsPerBox * 2 + (element & 1); }
    __device__ static int row(int thread, int slot) { return column_of(slot, thread % 32); }
    __device__ static bool has_stats(int thread) { return thread < 4; }
    __device__ static void store(u16* out, int rows, int thread, int j, float4 v) {  // by whole warps
        const u32 low = movmatrix_trans(pack_elements(v.x, v.y)), high = movmatrix_trans(pack_elements(v.z, v.w));
        const int lane = thread % 32, r = j % kVectorsPerBox * 8 + lane / 4;
        u16* place = out + r * kHeadDimV + (thread / kWarpgroup * 4 + j / kVectorsPerBox) * kBoxColumns +
                     thread % kWarpgroup / 32 * 16 + lane % 4 * 2;
        if (r >= rows) return;
        *reinterpret_cast<u32*>(place) = low;
        *reinterpret_cast<u32*>(place + 8) = high;
    }
};

template <int kWg>
struct Consumer {
    using Fragment = SwappedFragment;
    const DecodeParams& p;
    SharedMemory& smem;
    const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32;
    float o[kBoxesV][kRows / 2];
    float m[kColumns], l[kColumns];

    __device__ void reset() {
#pragma unroll
        for (int c = 0; c < kBoxesV; ++c)
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i) o[c][i] = 0.f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) m[i] = -kInfinity, l[i] = 0.f;
    }

    __device__ void release(int slot) {
        if (kLoads && lane == 0) mbarrier_arrive(&smem.ring[kWg].empty[slot]);
    }

    __device__ void tile(const WorkItem& w, int tile, RingPlace first) {
        const auto slot_of = [slot = first.slot](int c) { return slot + c < kRing ? slot + c : slot + c - kRing; };
        float s[kRows / 2], chain[kInFlight][kRows / 2];
#pragma unroll
        for (int k = 0; k < kChains + kInFlight - 1; ++k) {  // a chain is added while the next one runs (softmax.cuh)
            if (k < kChains) {
                const int begin = k * kChainBoxes;
#pragma unroll
                for (int c = begin; c < begin + kChainBoxes && c < kBoxes; ++c) {
                    if (kLoads) mbarrier_wait(&smem.ring[kWg].full[slot_of(c)], first.phase ^ (slot_of(c) < first.slot));
                    if constexpr (kMath) {
                        wgmma_fence();
                        const u64 kv = descriptor_k_major(smem.ring[kWg].box[slot_of(c)]), q = descriptor_k_major(smem.q.box[c]);
#pragma unroll
                        for (int step = 0; step < kStepsPerBox; ++step)
                            wgmma_ss<kRows, 0, 0>(chain[k % kInFlight], kv + step * kAdvanceAlongRow, q + step * kAdvanceAlongRow,
                                                  c > begin || step > 0);
                    }
                }
                if (kMath) wgmma_commit();
            }
            const int done = k - (kInFlight - 1);
            if (!kMath || done < 0) continue;
            if (k < kChains) wgmma_wait<kInFlight - 1>();
            else wgmma_wait<0>();
            wgmma_fence_operands(chain[done % kInFlight]);
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i) s[i] = done == 0 ? chain[0][i] : s[i] + chain[done % kInFlight][i];
        }
        if constexpr (!kMath) {
            __syncwarp();
#pragma unroll
            for (int c = 0; c < kBoxes; ++c) release(slot_of(c));
            return;
        }
        release(slot_of(kRotaryBox));
        if constexpr (kSoftmax) {
            if ((tile + 1) * kTileTokens > w.kv_len - (p.causal ? p.s_q - 1 : 0)) mask(w, tile, s);
            if ((tile + 1) * kTileTokens > w.kv_len)
                zero_token_rows([&](int c) { return smem.ring[kWg].box[slot_of(c)]; }, w.kv_len - tile * kTileTokens, launder(thread));
            softmax(s);
        }
        store_p(s);
        fence_proxy_async();
        named_barrier_sync(kBarrierWarpgroup + kWg, kWarpgroup);

        const u64 probabilities = descriptor_k_major(smem.p[kWg]);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < kBoxesV; ++c) {
            const u64 v = descriptor_token_major(smem.ring[kWg].box[slot_of(c)]);
#pragma unroll
            for (int step = 0; step < kStepsPerBox; ++step)
                wgmma_ss<kRows, 1, 0>(o[c], v + step * kAdvanceDownRows, probabilities + step * kAdvanceAlongRow, true);
            if (c == kBoxesV / 2 - 1 || c == kBoxesV - 1) wgmma_commit();
        }
        wgmma_wait<1>();
#pragma unroll
        for (int c = 0; c < kBoxesV / 2; ++c) release(slot_of(c));
        wgmma_wait<0>();
#pragma unroll
        for (int c = kBoxesV / 2; c < kBoxesV; ++c) release(slot_of(c));
#pragma unroll
        for (int c = 0; c < kBoxesV; ++c) wgmma_fence_operands(o[c]);
    }

    __device__ void mask(const WorkItem& w, int tile, float (&s)[kRows / 2]) {
        const int thread = launder(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
            const int token = tile * kTileTokens + warp * 16 + lane / 4 + (i & 2) * 4;
            const int row = w.row_block * kRows + column_of(column_slot(i), lane);
            if (token >= visible_end(p, w.kv_len, row)) s[i] = -kInfinity;
        }
    }

    // Scores -> probabilities, in place. Column maxima cross the four warps only when the reference has to move.
    __device__ void softmax(float (&s)[kRows / 2]) {
        const float scale = p.softmax_scale_log2;
        bool passes = false;
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) passes |= passes_reference(s[i], scale, m[column_slot(i)]);
        if (named_barrier_any(kBarrierWarpgroup + kWg, kWarpgroup, passes)) move_reference(s);
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
            const int column = column_slot(i);
            s[i] = exp2_approx(fmaf(s[i], scale, -finite_reference(m[column])));
            l[column] += s[i];
        }
    }

    __device__ void move_reference(const float (&s)[kRows / 2]) {
        const int thread = launder(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
        float top[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int i = (j / 2) * 4 + (j & 1);
            top[j] = fmaxf(s[i], s[i + 2]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) top[j] = fmaxf(top[j], __shfl_xor_sync(0xffffffffu, top[j], step));
            if (lane < 4) smem.maxima[kWg][warp][column_of(j, lane)] = top[j];
        }
        named_barrier_sync(kBarrierWarpgroup + kWg, kWarpgroup);
        float factor[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int column = column_of(j, lane);
#pragma unroll
            for (int other = 0; other < 4; ++other) top[j] = fmaxf(top[j], smem.maxima[kWg][other][column]);
            const float moved = fmaxf(m[j], top[j] * p.softmax_scale_log2);
            factor[j] = rescale_factor(m[j], moved);
            m[j] = moved;
            l[j] *= factor[j];
        }
#pragma unroll
        for (int c = 0; c < kBoxesV; ++c)
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i) o[c][i] *= factor[column_slot(i)];
    }

    // P^T, rows = query rows, 64 tokens (128 bytes) a row, swizzled: the B operand of PV.
    __device__ void store_p(const float (&s)[kRows / 2]) {
        const u32 base = smem_address(smem.p[kWg]);
        if constexpr (kRows == 8) {
            const int chunk = warp * 2 + (lane / 8 & 1);
            stmatrix_x2_trans(base + swizzled_offset(lane & 7, chunk), pack_elements(s[0], s[1]), pack_elements(s[2], s[3]));
        } else {
#pragma unroll
            for (int i = 0; i < kRows / 2; i += 8) {
                const int row = i * 2 + lane / 16 * 8 + (lane & 7), chunk = warp * 2 + (lane / 8 & 1);
                stmatrix_x4_trans(base + swizzled_offset(row, chunk), pack_elements(s[i], s[i + 1]),
                                  pack_elements(s[i + 2], s[i + 3]), pack_elements(s[i + 4], s[i + 5]),
                                  pack_elements(s[i + 6], s[i + 7]));
            }
        }
    }

    __device__ void tiles(const WorkItem& w) {
        for (int i = w.begin; i < w.end; ++i) {
            const u32 ordinal = w.tiles_before + i - w.begin;
            if ((ordinal & 1) == kWg) tile(w, i, ring_place<kRing>(ordinal, 0));
        }
    }

    // Joins the two warpgroups' halves: afterwards this one holds the sums of latent columns [256 kWg, 256 kWg + 256)
    // in o[4 kWg ...], and m, l are those of the whole.
    __device__ void join(const WorkItem& w) {
        const int thread = launder(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int step = 4; step < 32; step *= 2) l[j] += __shfl_xor_sync(0xffffffffu, l[j], step);
            if (lane < 4) smem.sums[kWg][warp][column_of(j, lane)] = l[j];
            if (thread < 4) smem.reference[kWg][column_of(j, lane)] = m[j];
        }
        named_barrier_sync(kBarrierConsumers, kConsumers);
        float factor[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int column = column_of(j, lane);
            const float other = smem.reference[1 - kWg][column], joint = fmaxf(m[j], other);
            factor[j] = rescale_factor(m[j], joint);
            float own_sum = 0.f, other_sum = 0.f;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                own_sum += smem.sums[kWg][i][column];
                other_sum += smem.sums[1 - kWg][i][column];
            }
            const float own_part = own_sum * factor[j], other_part = other_sum * rescale_factor(other, joint);
            l[j] = w.invalid ? kNan : kWg == 0 ? own_part + other_part : other_part + own_part;
            m[j] = joint;
        }
#pragma unroll
        for (int first = 0; first < kVectors<kRows>; first += kExchanged) {
            if (first > 0) named_barrier_sync(kBarrierConsumers, kConsumers);
#pragma unroll
            for (int k = 0; k < kExchanged; ++k) {
                const int j = first + k;
                smem.exchange[kWg][k][thread] = scaled(half(1 - kWg, j), factor[Fragment::slot(j, 0)], factor[Fragment::slot(j, 1)],
                                                       factor[Fragment::slot(j, 2)], factor[Fragment::slot(j, 3)]);
            }
            named_barrier_sync(kBarrierConsumers, kConsumers);
#pragma unroll
            for (int k = 0; k < kExchanged; ++k) {
                const int j = first + k;
                set_vector(j, weighted(smem.exchange[1 - kWg][k][thread], vector(j), factor[Fragment::slot(j, 0)],
                                       factor[Fragment::slot(j, 1)], factor[Fragment::slot(j, 2)], factor[Fragment::slot(j, 3)]));
            }
        }
    }

    // Vector j of boxes [4 warpgroup, 4 warpgroup + 4).
    __device__ float4 half(int warpgroup, int j) const {
        const float* v = &o[warpgroup * 4 + j / Fragment::kVectorsPerBox][j % Fragment::kVectorsPerBox * 4];
        return make_float4(v[0], v[1], v[2], v[3]);
    }
    __device__ float4 vector(int j) const { return half(kWg, j); }
    __device__ void set_vector(int j, float4 v) {
        float* place = &o[kWg * 4 + j / Fragment::kVectorsPerBox][j % Fragment::kVectorsPerBox * 4];
        place[0] = v.x, place[1] = v.y, place[2] = v.z, place[3] = v.w;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) char shared[];
    run_cta<kRows, Consumer>(p, *reinterpret_cast<SharedMemory*>(shared));
}
