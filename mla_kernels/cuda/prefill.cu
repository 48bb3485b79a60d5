// Attention over whole sequences: out = softmax(scale Q K^T) V, causal or not.
//
//   S = Q K^T  (64 x kKeys a warpgroup)        O = P V  (64 x kHeadDimV)
//
// Grid: a persistent CTA an SM, that draws items of kRows query rows of a head (prefill_schedule.cuh).
// Warpgroups: 0 the producer's (one warp: schedules, and loads by TMA); the others consume, 64 rows each, S, P and O in registers.
// Shared memory: Q of one or two items, rings of K and of V tiles (prefill_layout.cuh; sizes: mla_kernels/prefill_tuning.py).
//
// Tiles go from the last to the first, so that masks come first. A consumer issues the scores of tile j - 1, then P V of tile j, and
// computes the softmax of those scores while the others' WGMMA run: they take turns in issuing (FlashAttention-3, arXiv 2407.08608,
// 3.1-3.2). Three loops over tiles, so that the one for tiles that all rows see whole has nothing else in it (332 instructions):
// tile_alone, the first; tile_compared, with masks and the running maximum; tile_unchecked.
#include "prefill_schedule.cuh"
#include "prefill_softmax.cuh"

constexpr int kCount = kKeys / 2, kCountV = kHeadDimV / 2;  // accumulators of a thread
constexpr int kSteps = kKeys / kStepK;                      // WGMMA of P V

struct SharedMemory {  // at a multiple of 1,024 bytes, the swizzle's atom
    u16 q[kQueries][kConsumers][kBoxes][kWarpgroupRows * kBoxColumns];
    TileRing<kBoxes> k;
    TileRing<kBoxesV> v;
    TileRing<kBoxes>::Barriers k_barriers;
    TileRing<kBoxesV>::Barriers v_barriers;
    u64 q_full[kQueries][kConsumers], q_empty[kQueries][kConsumers];
    ItemQueue queue;
    u32 too_large[kConsumers][2];  // a probability of the tile at hand is, by the tile's parity: one warp may be a tile ahead
};

__device__ __forceinline__ bool leads_warp() { return (launder(threadIdx.x) & 31) == 0; }
// By every warp of the consumers.
__device__ __forceinline__ void release(u64* empty) {
    if (leads_warp()) mbarrier_arrive(empty);
}

struct Producer {
    const PrefillParams& p;
    SharedMemory& smem;
    Place<kStages> k, v;
    u32 q_uses = 0;  // two bits a consumer

    // Tile `tile` of the item's keys -> next slot. Rows past the sequence's end must be zero: 0 * NaN is NaN in P V. Of ragged
    // sequences the tensor map has the key twice, in a dimension of kKeys rows that ends where the other dimension points to.
    template <int kTileBoxes, class Barriers>
    __device__ void load(TileRing<kTileBoxes>& ring, Barriers& barriers, Place<kStages>& place, const TensorMap* map, const Item& item,
                         int tile) {
        u64* full = &barriers.full[place.slot];
        mbarrier_wait(&barriers.empty[place.slot], place.phase ^ 1);
        mbarrier_arrive_expect_tx(full, ring.kBytes);
        const int first = tile * kKeys, end = min(first + kKeys, item.keys);
        const bool ragged = p.cu_seqlens_k != nullptr;
        const int y = ragged ? kKeys - (end - first) : first, z = ragged ? item.key_begin + end : item.kv_head;
        const int w = ragged ? item.kv_head : item.batch;
#pragma unroll
        for (int c = 0; c < kTileBoxes; ++c) tma_load_4d(ring.box[place.slot][c], map, full, c * kBoxColumns, y, z, w);
        place.next();
    }
    // The rows of each consumer by themselves, so that one need not wait for another to begin the next item.
    __device__ void load_queries(const Item& item) {
        const int batch = p.cu_seqlens_q != nullptr ? 0 : item.batch;
#pragma unroll 1
        for (int i = 0; i < kConsumers && i * kWarpgroupRows < item.rows; ++i) {
            const u32 use = q_uses >> 2 * i & 3, slot = use % kQueries;
            q_uses = (q_uses & ~(3u << 2 * i)) | (use + 1 & 3) << 2 * i;
            mbarrier_wait(&smem.q_empty[slot][i], (use / kQueries & 1) ^ 1);
            mbarrier_arrive_expect_tx(&smem.q_full[slot][i], kBoxes * kQueryBoxBytes);
#pragma unroll
            for (int c = 0; c < kBoxes; ++c)
                tma_load_4d(smem.q[slot][i][c], &p.q_map, &smem.q_full[slot][i], c * kBoxColumns, item.token + i * kWarpgroupRows,
                            item.head, batch);
        }
    }
    __device__ void load_item(const Item& item) {
        load(smem.k, smem.k_barriers, k, &p.k_map, item, item.tiles - 1);
        load(smem.v, smem.v_barriers, v, &p.v_map, item, item.tiles - 1);  // needs no slot that waits for these queries
        load_queries(item);
#pragma unroll 1
        for (int tile = item.tiles - 2; tile >= 0; --tile) {
            load(smem.k, smem.k_barriers, k, &p.k_map, item, tile);
            load(smem.v, smem.v_barriers, v, &p.v_map, item, tile);
        }
    }
    __device__ void run() {
        const int lane = threadIdx.x & 31;
        griddepcontrol_wait();  // whoever comes before may write the tensors or count tickets; consumers wait for items
        Schedule schedule(p);
        Place<ItemQueue::kSlots> slot;
        u32 ticket = blockIdx.x;
        while (true) {
            const Item item = schedule.find(ticket);
            mbarrier_wait(&smem.queue.empty[slot.slot], slot.phase ^ 1);
            if (lane == 0) {
                smem.queue.item[slot.slot] = item;
                mbarrier_arrive(&smem.queue.full[slot.slot]);
            }
            slot.next();
            if (item.head < 0) break;
            if (item.tiles > 0 && lane == 0) load_item(item);
            __syncwarp();
            if (lane == 0) ticket = gridDim.x + atomic_add_relaxed(&p.tickets[0], 1);
            ticket = __shfl_sync(0xffffffffu, ticket, 0);
        }
        // The last CTA leaves the counters as it found them, for the next launch.
        if (lane == 0 && atomic_add_relaxed(&p.tickets[1], 1) == gridDim.x - 1) p.tickets[0] = p.tickets[1] = 0;
    }
};

struct Consumer {
    const PrefillParams& p;
    SharedMemory& smem;
    const u32 self;  // 0 .. kConsumers - 1
    Place<kStages> k, v;
    Place<kQueries> q;

    __device__ u32 row() const { return self * kWarpgroupRows + launder(threadIdx.x) % kWarpgroup / 32 * 16 + launder(threadIdx.x) % 32 / 4; }

    __device__ void wait_turn() const { named_barrier_sync(kBarrierTurn + self, 2 * kWarpgroup); }
    __device__ void pass_turn() const {
        named_barrier_arrive(kBarrierTurn + (self + 1 == kConsumers ? 0 : self + 1), 2 * kWarpgroup);
    }

    __device__ void release_keys() {
        release(&smem.k_barriers.empty[k.slot]);
        k.next();
    }
    __device__ void release_values() {
        release(&smem.v_barriers.empty[v.slot]);
        v.next();
    }

    __device__ void issue_scores(float (&s)[kCount]) {
        mbarrier_wait(&smem.k_barriers.full[k.slot], k.phase);
        const u32 query = descriptor_along_row(smem.q) + (q.slot * kConsumers + self) * (kBoxes * kQueryBoxBytes >> 4);
        const u32 key = descriptor_along_row(smem.k.box) + k.slot * (TileRing<kBoxes>::kBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < kBoxes; ++c)
#pragma unroll
            for (int step = 0; step < kStepsPerBox; ++step)
                wgmma_ss_n<kKeys>(s, query + c * (kQueryBoxBytes >> 4) + step * kAdvanceAlongRow,
                                  key + c * (kKeyBoxBytes >> 4) + step * kAdvanceAlongRow, c > 0 || step > 0);
        wgmma_commit();
    }
    __device__ void issue_values(float (&o)[kCountV], const u32 (&packed)[kSteps][4]) {
        mbarrier_wait(&smem.v_barriers.full[v.slot], v.phase);
        const u32 value = descriptor_down_rows(smem.v.box) + v.slot * (TileRing<kBoxesV>::kBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) wgmma_rs_n<kHeadDimV>(o, packed[step], value + step * kAdvanceDownRows, true);
        wgmma_commit();
    }

    // Hides keys that a row does not see, of a tile that has any.
    __device__ void mask(const Item& item, int tile, float (&s)[kCount]) const {
        const int rows_from = row(), columns_from = tile * kKeys + launder(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int end = (p.causal ? min(item.keys, item.diagonal + rows_from + r * 8) : item.keys) - columns_from;
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if ((i / 2 & 1) == r && i / 4 * 8 + (i & 1) >= end) s[i] = -kInfinity;
        }
    }

    // Keys that all rows see: those that the first one does.
    __device__ int sees(const Item& item) const {
        return p.causal ? min(item.keys, item.diagonal + static_cast<int>(self) * kWarpgroupRows) : item.keys;
    }
    // Where rows may see little or nothing so far: hides some keys, and finds or moves the reference; whether it moved.
    __device__ bool refer(const Item& item, int tile, RowStats& stats, float (&s)[kCount], float (&factor)[2]) const {
        if ((tile + 1) * kKeys > sees(item)) mask(item, tile, s);
        return stats.follow(s, p.softmax_scale_log2, factor);
    }
    __device__ void finish_tile(bool moved, const float (&factor)[2], RowStats& stats, const float (&s)[kCount], float (&o)[kCountV],
                                u32 (&packed)[kSteps][4]) const {
        float sum[2];
        if (moved) {
#pragma unroll
            for (int i = 0; i < kCountV; ++i) o[i] *= factor[i / 2 & 1];
        }
        stats.exponentiate(s, p.softmax_scale_log2, sum, packed);
        stats.add(sum);
    }

    // A tile's probabilities, nothing else: the first tile's, or again with another reference.
    __device__ void tile_alone(const Item& item, int tile, RowStats& stats, float (&o)[kCountV], u32 (&packed)[kSteps][4]) {
        float s[kCount], factor[2];
        issue_scores(s);
        wgmma_wait<0>();
        wgmma_fence_operands(s);
        release_keys();
        const bool moved = refer(item, tile, stats, s, factor);
        finish_tile(moved, factor, stats, s, o, packed);
    }
    // The others issue a tile's scores, then P V of the tile after, whose probabilities are `packed`; they leave this one's there.
    __device__ void issue_step(float (&s)[kCount], float (&o)[kCountV], const u32 (&packed)[kSteps][4]) {
        issue_scores(s);
        issue_values(o, packed);
        if (kTurns) pass_turn();
    }
    __device__ void tile_compared(const Item& item, int tile, RowStats& stats, float (&o)[kCountV], u32 (&packed)[kSteps][4]) {
        float s[kCount], factor[2];
        issue_step(s, o, packed);
        wgmma_wait<1>();
        wgmma_fence_operands(s);
        release_keys();
        const bool moved = refer(item, tile, stats, s, factor);
        wgmma_wait<0>();
        wgmma_fence_operands(s);
        wgmma_fence_operands(o);
        release_values();
        finish_tile(moved, factor, stats, s, o, packed);
        if (kTurns && tile > 0) wait_turn();
    }
    // False if the tile must be done again, by tile_alone.
    __device__ bool tile_unchecked(int tile, RowStats& stats, float (&o)[kCountV], u32 (&packed)[kSteps][4]) {
        float s[kCount], sum[2];
        issue_step(s, o, packed);
        wgmma_wait<0>();
        wgmma_fence_operands(s);
        wgmma_fence_operands(o);
        release_values();
        stats.exponentiate(s, p.softmax_scale_log2, sum, packed);
        if (fmaxf(sum[0], sum[1]) > kLargest) smem.too_large[self][tile & 1] = 1;
        if (kTurns && tile > 0) wait_turn();  // all of the warpgroup meet here
        else named_barrier_sync(kBarrierMeet + self, kWarpgroup);
        if (*static_cast<volatile u32*>(&smem.too_large[self][tile & 1]) != 0) return false;
        stats.add(sum);
        release_keys();
        return true;
    }

    // Of an item that ends before the consumer's rows: tiles and turns go by.
    __device__ void idle(const Item& item) {
        for (int tile = item.tiles; tile >= 0; --tile) {
            if (kTurns && tile > 0 && tile < item.tiles) wait_turn(), pass_turn();
            if (tile > 0) {
                mbarrier_wait(&smem.k_barriers.full[k.slot], k.phase);
                release_keys();
            }
            if (tile < item.tiles) {
                mbarrier_wait(&smem.v_barriers.full[v.slot], v.phase);
                release_values();
            }
        }
    }

    __device__ void attend(const Item& item) {
        if (static_cast<int>(self) * kWarpgroupRows >= item.rows) {
            idle(item);
            return;
        }
        float o[kCountV];
        RowStats stats;
#pragma unroll
        for (int i = 0; i < kCountV; ++i) o[i] = 0.f;  // (A first step apart, that sets it, costs 32 registers.)
        if (item.tiles == 0) {
            store(item, stats, o);
            return;
        }
        u32 packed[kSteps][4];
        int tile = item.tiles - 1;
        bool again = false;
        mbarrier_wait(&smem.q_full[q.slot][self], q.phase);
#pragma unroll 1
        do {
            tile_alone(item, tile, stats, o, packed);
            if (kTurns && tile > 0 && !again) wait_turn();
            again = false;
#pragma unroll 1
            while (tile > 0 && (kCompares || tile * kKeys >= sees(item))) {  // or rows saw nothing of the tiles after
                --tile;
                tile_compared(item, tile, stats, o, packed);
            }
            if constexpr (!kCompares) {
#pragma unroll 1
                while (tile > 0 && !again) {
                    --tile;
                    again = !tile_unchecked(tile, stats, o, packed);
                }
                if (again) {
                    named_barrier_sync(kBarrierMeet + self, kWarpgroup);
                    smem.too_large[self][tile & 1] = 0;
                    named_barrier_sync(kBarrierMeet + self, kWarpgroup);
                }
            }
        } while (again);
        release(&smem.q_empty[q.slot][self]);
        q.next();
        issue_values(o, packed);
        wgmma_wait<0>();
        wgmma_fence_operands(o);
        release_values();
        store(item, stats, o);
    }

    // Four neighbours have 32 columns of a row in pairs; swapped among them, each writes 16 bytes.
    __device__ void store(const Item& item, RowStats& stats, const float (&o)[kCountV]) const {
        stats.finish();
        const u32 thread = launder(threadIdx.x), row = this->row();
        const size_t token = item.token + (p.cu_seqlens_q != nullptr ? 0 : static_cast<size_t>(item.batch) * p.s_q) + row;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool inside = static_cast<int>(row + r * 8) < item.rows;
            const float weight = stats.inverse(r);
            u16* place = p.out + ((token + r * 8) * p.h_q + item.head) * kHeadDimV + thread % 4 * 8;
#pragma unroll
            for (int j = 0; j < kHeadDimV / 8; j += 4) {
                u32 pair[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) pair[i] = pack_elements(o[(j + i) * 4 + r * 2] * weight, o[(j + i) * 4 + r * 2 + 1] * weight);
                const uint4 columns = transposed(thread, pair[0], pair[1], pair[2], pair[3]);
                if (inside) *reinterpret_cast<uint4*>(place + j * 8) = columns;
            }
            if (inside && thread % 4 == 0) {
                const size_t line = p.cu_seqlens_q != nullptr ? item.head : static_cast<size_t>(item.batch) * p.h_q + item.head;
                p.lse[line * p.s_q + item.token + row + r * 8] = stats.lse(r);
            }
        }
    }

    __device__ void run() {
        Place<ItemQueue::kSlots> slot;
        if (kTurns && self == 0) named_barrier_arrive(kBarrierTurn, 2 * kWarpgroup);  // the first turn is its own
        while (true) {
            mbarrier_wait(&smem.queue.full[slot.slot], slot.phase);
            const Item& from = smem.queue.item[slot.slot];
            Item item;
            item.head = uniform(from.head), item.batch = uniform(from.batch);
            item.row = uniform(from.row), item.rows = uniform(from.rows), item.token = uniform(from.token);
            item.keys = uniform(from.keys), item.tiles = uniform(from.tiles), item.diagonal = uniform(from.diagonal);
            __syncwarp();
            release(&smem.queue.empty[slot.slot]);
            slot.next();
            if (item.head < 0) break;
            attend(item);
        }
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) mla_prefill(const __grid_constant__ PrefillParams p) {
    extern __shared__ __align__(1024) char shared[];
    SharedMemory& smem = *reinterpret_cast<SharedMemory*>(shared);
    if (threadIdx.x == 0) {
        smem.k_barriers.init(), smem.v_barriers.init(), smem.queue.init_barriers();
        for (int slot = 0; slot < kQueries; ++slot)
            for (int i = 0; i < kConsumers; ++i) mbarrier_init(&smem.q_full[slot][i], 1), mbarrier_init(&smem.q_empty[slot][i], kWarpgroup / 32);
        for (auto& flags : smem.too_large) flags[0] = flags[1] = 0;
        fence_barrier_init();
    }
    __syncthreads();
    griddepcontrol_launch_dependents();
    if (threadIdx.x < kWarpgroup) {
        setmaxnreg_dec<MLA_PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) Producer{p, smem}.run();
    } else {
        setmaxnreg_inc<MLA_CONSUMER_REGISTERS>();
        Consumer{p, smem, uniform(threadIdx.x / kWarpgroup) - 1}.run();
    }
}
