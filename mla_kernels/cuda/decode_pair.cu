// Decode for many query rows: 128 of them a pair of CTAs, half of the columns each.
//
//   S = Q K^T  (128 x 64 tokens)       O = P V  (128 x 512)
//
// A tile takes 36 KB of a CTA's shared memory instead of 72, so four of them fit beside the queries, and the L2 gives it once
// for 128 rows. (What binds decode_rows.cu is the room for tiles: with half a tile less it takes a quarter longer.) The price: each
// CTA multiplies only its columns of Q and K, so partial scores have to be added, and each needs all of P.
//
// Grid: clusters of two CTAs, one on an SM; each pair walks its share of the batch (schedule.cuh).
// Warps: 0-3 and 4-7 attend, 64 rows each: scores, softmax and values; 8 schedules, 9 streams, 10 and 11 idle.
// Columns of CTA c: 256 c to 256 c + 255 of the latent, which are also its values, and half of the rotary ones.
// Of each 16 rows the two CTAs take the softmax of 8: CTA 1 holds its queries with rows r and r + 8 swapped, so that a thread's
// first row is its own in either. It sends the partial scores of its second row to the same thread of the other CTA, gets those of
// its first, and sends back what becomes of them: packed, they are half of its A operand of PV. Messages of 2 KB and 1 KB a
// warp, in turn, so that one buffer each is enough: who has got P of a tile knows that its scores have been read, and who has
// got the scores of the next that P has.
// Shared memory: a ring of 4 tiles (144 KB), queries but for those of the first steps (56 KB), messages (24 KB).
#include "fragment.cuh"
#include "merge.cuh"
#include "pair_products.cuh"

// A warpgroup that attends.
struct Attention : PairProducts {
    using Fragment = RowsFragment;
    using PairProducts::PairProducts;

    // ---- softmax (softmax.cuh) of the thread's own row

    __device__ __forceinline__ u32 own_row() const { return Fragment::row(value_thread(), 0); }
    __device__ __forceinline__ void mask(const WorkItem& w, int tile, float (&x)[kScores]) {
        const int end = visible_end(p, w.kv_len, p.s_q, w.row_block * kRows + own_row()) - tile * kTileTokens - lane() % 4 * 2;
#pragma unroll
        for (int i = 0; i < kScores; ++i)
            if (i / 2 * 8 + (i & 1) >= end) x[i] = -kInfinity;
    }
    // What is past the sequence's end, hidden from scores and values.
    __device__ __forceinline__ void hide(const WorkItem& w, int kv_len, int tile, u32 ordinal, float (&x)[kScores]) {
        if ((tile + 1) * kTileTokens > kv_len - (p.causal ? p.s_q - 1 : 0)) mask(w, tile, x);
        const int valid = kv_len - tile * kTileTokens;
        if (valid >= kTileTokens) return;
        // by either warpgroup, which need not wait for each other so
        zero_token_rows<kGroupBoxes>([&](int c) { return smem.ring[ordinal].box[c]; }, valid, id % kWarpgroup);
        fence_proxy_async();
    }
    __device__ __forceinline__ static float max_of(const float (&x)[kScores]) {
        float top[kScores / 2];
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i) top[i] = fmaxf(x[i], x[i + kScores / 2]);
#pragma unroll
        for (int half = kScores / 4; half > 0; half /= 2)
#pragma unroll
            for (int i = 0; i < half; ++i) top[i] = fmaxf(top[i], top[i + half]);
        return top[0];
    }
    // The reference follows a new maximum by whole powers of two, for which P's sign bits have room: their exponent.
    __device__ __forceinline__ int follow(float top) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float after = fmaxf(m, ceilf(top * p.softmax_scale_log2));
        const int by = after == -kInfinity ? 0 : static_cast<int>(fminf(after - m, 255.f));
        m = after;
        l *= power(-by), n *= power(-by);
        return by;
    }
    __device__ __forceinline__ static float power(int exponent) { return exp2_approx(static_cast<float>(exponent)); }
    __device__ __forceinline__ void rescale(int by, int by_other) {
        const float factor = power(-by), factor_other = power(-by_other);
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) o[i] *= (i & 2) ? factor_other : factor;
    }
    // Scores of a tile, of both CTAs -> P in `a`, O as its references want it. With kMayBeLarge the warpgroup is told to do the tile
    // `again` where a row of either CTA has scores past kLargeScore. `complete()` is called when P has been
    // sent, `deliver()` when the other's has come, so that scores may be sent.
    template <bool kMayBeLarge, class Complete, class Deliver>
    __device__ __forceinline__ void softmax(float (&x)[kScores], u32 ordinal, Complete complete, Deliver deliver) {
        u32 e[kScores / 2], other[kScores / 2];
        const float top = max_of(x), scale = p.softmax_scale_log2;
        const bool too_large = kMayBeLarge && top * scale > kLargeScore;
        const bool special = __any_sync(0xffffffffu, passes_reference(top, scale, m) || too_large);
        bool large = false;
        int by = 0, by_other = 0;
        if (special) {
            large = __any_sync(0xffffffffu, too_large);
            if (!large) by = follow(top);
        }
        float exact[2] = {};
        if (large) {
#pragma unroll
            for (int i = 0; i < kScores / 2; ++i) e[i] = 0;
            send_p(0, 0, kFlag, 0, 0);
            send_p(1, 0, 0, 0, 0);
        } else {
            const float reference = finite_reference(m);
#pragma unroll
            for (int v = 0; v < 2; ++v) {
#pragma unroll
                for (int i = v * 4; i < v * 4 + 4; ++i) {
                    x[2 * i] = exp2_approx(fmaf(x[2 * i], scale, -reference)), x[2 * i + 1] = exp2_approx(fmaf(x[2 * i + 1], scale, -reference));
                    e[i] = pack_elements(x[2 * i], x[2 * i + 1]);
                }
                u32 signs[4] = {};
                if (special) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) signs[i] = (by >> (v * 4 + i) & 1) << 15;
                    if (v == 0) signs[0] |= kFlag;
                }
                send_p(v, e[v * 4] | signs[0], e[v * 4 + 1] | signs[1], e[v * 4 + 2] | signs[2], e[v * 4 + 3] | signs[3]);
#pragma unroll
                for (int i = v * 4; i < v * 4 + 4; ++i) exact[0] += x[2 * i], exact[1] += x[2 * i + 1];
            }
        }
        pending = exact[0] + exact[1];
        complete();
        receive_p(other);
        const bool told = __any_sync(0xffffffffu, large || ((other[0] | other[1]) & kFlag) != 0);
        if (told) {
            if (kMayBeLarge && __any_sync(0xffffffffu, large || (other[1] & kFlag) != 0)) smem.again[warpgroup] = ordinal;
#pragma unroll
            for (int i = 0; i < kScores / 2; ++i) by_other |= (other[i] >> 15 & 1) << i, other[i] &= ~kSigns;
        }
        deliver();
        if (special || told) rescale(by, by_other);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            a[step][0] = moved(e[step * 2]), a[step][2] = moved(e[step * 2 + 1]);
            own[step * 2] = e[step * 2], own[step * 2 + 1] = e[step * 2 + 1];
            a[step][1] = moved(other[step * 2]), a[step][3] = moved(other[step * 2 + 1]);
        }
    }
    // The sums of the last tile, which is not to be done again. (Under its values, from a copy of P: PTX does not promise what is
    // read of `a` while WGMMA reads it, too. Under the scores of the next tile instead, s_q 2 takes 4 % longer.)
    __device__ __forceinline__ void settle() {
        float rounded[2] = {};
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i) {
            const float2 r = unpack_elements(own[i]);
            rounded[0] += r.x, rounded[1] += r.y;
        }
        l += pending, n += rounded[0] + rounded[1];
    }

    // ---- an item

    // Whether a tile has to be done again, when every warp of the warpgroup has come here since. (Its number, so that a warp that
    // is late does not take a later tile's for it.)
    __device__ __forceinline__ bool is_done_again(u32 ordinal) {
        sync_rows();
        return __any_sync(0xffffffffu, *static_cast<volatile u32*>(&smem.again[warpgroup]) == ordinal);
    }
    // A tile: values of the one before, under them its softmax, then scores of the next. Each product hides a message: values the
    // other CTA's scores, scores its P. False, and nothing done, if the one before has to be done again.
    template <bool kNext, bool kPrevious>
    __device__ __forceinline__ bool step(const WorkItem& w, int kv_len, float (&x)[kScores], int tile, u32 ordinal) {
        float s[kTileTokens / 2];
        if constexpr (kPrevious) {
            if (kSoftmax && is_done_again(ordinal - 1)) return false;
            issue_values(ordinal - 1);
            if (kSoftmax) settle();
        }
        const auto products = [&] {
            if constexpr (kPrevious) complete_values(ordinal - 1);
            if constexpr (kNext) {
                smem.ring.wait(ordinal + 1);
                wait_turn();
                multiply_scores<0, kSteps>(ordinal + 1, s, [&] { give_turn(); });
            }
        };
        if constexpr (kSoftmax) {
            add_received_scores(x);
            hide(w, kv_len, tile, ordinal, x);
            softmax<true>(x, ordinal, products, [&] {
                if constexpr (kNext) send_scores(s, x);
            });
        } else {
            products();
#pragma unroll
            for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = pack_elements(x[i % kScores], x[i % kScores]);
            if constexpr (kNext) {
#pragma unroll
                for (int i = 0; i < kScores; ++i) x[i] = s[2 * i] + s[2 * i + 1];
            }
        }
        return true;
    }
    template <int kFirst>
    __device__ __forceinline__ void add_chains(u32 ordinal, float (&s)[kTileTokens / 2], float (&part)[kTileTokens / 2]) {
        if constexpr (kFirst < kSteps) {
            constexpr int kEnd = kFirst + kChainBoxes * kStepsPerBox < kSteps ? kFirst + kChainBoxes * kStepsPerBox : kSteps;
            multiply_scores<kFirst, kEnd>(ordinal, part, [] {});
#pragma unroll
            for (int i = 0; i < kTileTokens / 2; ++i) s[i] += part[i];
            add_chains<kEnd>(ordinal, s, part);
        }
    }
    // A tile of large scores: summed in short chains, nothing under anything.
    __device__ __forceinline__ void precise(const WorkItem& w, int kv_len, int tile, u32 ordinal) {
        float x[kScores];
        {
            float s[kTileTokens / 2] = {}, part[kTileTokens / 2];
            smem.ring.wait(ordinal);
            add_chains<0>(ordinal, s, part);
            send_scores(s, x);
        }
        add_received_scores(x);
        hide(w, kv_len, tile, ordinal, x);
        softmax<false>(x, ordinal, [] {}, [] {});
        settle();
        sync_rows();  // what `hide` wrote is there
        multiply_values(ordinal);
    }
    __device__ __forceinline__ void multiply_values(u32 ordinal) {
        issue_values(ordinal);
        complete_values(ordinal);
    }
    __device__ __forceinline__ void tiles(const WorkItem& w) {
        int tile = in_uniform(w.begin);
        const int end = in_uniform(w.end), kv_len = in_uniform(w.kv_len);
        u32 ordinal = in_uniform(w.ordinal);
        if constexpr (!kMath) {
            for (; tile < end; ++tile, ++ordinal) smem.ring.wait(ordinal), smem.ring.release(ordinal, lane());
            return;
        }
        // A sequence of a tile may have a score or two for a row, which nothing averages, and a small sum of large halves: in one
        // chain an LSE was off by 1.2e-5.
        if (kSoftmax && kv_len <= kTileTokens) smem.again[warpgroup] = ordinal;
        float x[kScores];
        {
            float s[kTileTokens / 2];
            smem.ring.wait(ordinal);
            multiply_scores<0, kSteps>(ordinal, s, [] {});
            if constexpr (kSoftmax) send_scores(s, x);
            else {
#pragma unroll
                for (int i = 0; i < kScores; ++i) x[i] = s[2 * i];
            }
        }
        bool done = true;
        if (tile + 1 == end) {
            step<false, false>(w, kv_len, x, tile, ordinal);
        } else {
            step<true, false>(w, kv_len, x, tile, ordinal);
#pragma unroll 1
            while (done && tile + 2 < end) done = step<true, true>(w, kv_len, x, ++tile, ++ordinal);
            if (done) done = step<false, true>(w, kv_len, x, ++tile, ++ordinal);
        }
        if constexpr (kSoftmax) {
            if (done) {
                done = !is_done_again(ordinal);
            } else {
                add_received_scores(x);  // they are of no use,
                acknowledge();           // and others follow
                --tile, --ordinal;
            }
            if (!done) return go_on_precisely(w, kv_len, tile, end, ordinal);
            settle();
        }
        multiply_values(ordinal);
    }
    // From a tile on that has been begun. (Of this and the next the turns are over, or there is no next.)
    __device__ __forceinline__ void go_on_precisely(const WorkItem& w, int kv_len, int tile, int end, u32 ordinal) {
        const int turns = tile + 1;
#pragma unroll 1
        for (; tile < end; ++tile, ++ordinal) {
            if (tile > turns) wait_turn(), give_turn();  // as in the other warpgroup
            precise(w, kv_len, tile, ordinal);
        }
    }
    __device__ __forceinline__ void end(const WorkItem& w) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            l += __shfl_xor_sync(0xffffffffu, l, step);
            n += __shfl_xor_sync(0xffffffffu, n, step);
        }
        if (w.invalid) l = n = kNan;
        const u32 row = own_row();
        const bool writes = (lane() & 3) == 0;
        if (is_split(w)) {
            if (writes) partial_slot<kRows>(p, w.first_cta, w.part).stats[row] = {m, l, n};
            write_part<kRows>(p, w, *this);
            return;
        }
        if (writes && row < valid_rows<kRows>(p, w)) store_lse(p, w.request, first_query(p, w), w.row_block * kRows + row, natural_lse(m, l));
        const float weight[2] = {inverse_sum(n), inverse_sum(kSoftmax ? exchanged(n) : n)};
        write_out<kRows>(p, w, *this, weight);
    }
    // What the other CTA's thread gives.
    __device__ __forceinline__ float exchanged(float value) {
        float s[kTileTokens / 2] = {}, x[kScores];
        s[2] = value;
        send_scores(s, x);
        add_received_scores(x);
        acknowledge();
        return x[0];
    }
    // Where scores follow on scores: that these have been read, by both.
    __device__ __forceinline__ void acknowledge() {
        u32 none[kScores / 2];
        send_p(0, 0, 0, 0, 0);
        send_p(1, 0, 0, 0, 0);
        receive_p(none);
    }
};

__device__ __forceinline__ void attend(const DecodeParams& p, SharedMemory& smem) {
    Attention attention(p, smem);
    for (u32 index = 0;; ++index) {
        const WorkItem& w = smem.queue.wait(index);
        if (static_cast<int>(in_uniform(w.request)) < 0) break;
        if (in_uniform(w.tiles) == 0) {
            write_empty<kRows>(p, w);
        } else {
            attention.begin(w);
            attention.tiles(w);
            attention.end(w);
        }
        if (merges(w) && threadIdx.x == 0) smem.to_merge = w;  // it is the last
        smem.queue.release(index);
    }
}

extern "C" __global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kThreads, 1) mla_decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) char shared[];
    auto& smem = *reinterpret_cast<SharedMemory*>(shared);
    static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "shared memory is 227 KB");
    if (threadIdx.x == 0) {
        smem.init_barriers();
        fence_barrier_init();
    }
    __syncthreads();
    cluster_sync();  // the other may send
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    if (threadIdx.x >= kMergeThreads) {
        setmaxnreg_dec<MLA_PRODUCER_REGISTERS>();
        const int warp = (threadIdx.x - kMergeThreads) / 32;
        if (warp == 0) schedule_items(*new (smem.range[threadIdx.x & 31]) WorkRange(p), smem.queue);
        else if (warp == 1) load_half_tiles(p, smem);
        return;
    }
    setmaxnreg_inc<MLA_VALUE_REGISTERS>();
    attend(p, smem);
    named_barrier_sync(kBarrierMerge, kMergeThreads);
    if (smem.to_merge.request >= 0) {
        Merge<kRows, RowsFragment, sizeof(smem.ring.tile)>{p, smem.to_merge, reinterpret_cast<char*>(smem.ring.tile)}();
        leave_merge(p, smem.to_merge);
    }
}
