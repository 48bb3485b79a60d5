// Prefill: which tile of which head comes next, found on the device, so that lengths may change between replays of a graph.
//
// An item is kRows query rows of one head of one sequence. CTAs draw tickets; ticket -> item goes sequence by sequence, within
// one by sections of heads whose keys and values fit into L2 together, within a section by blocks of rows from the last, which
// sees most keys, to the first, and there by head. Under a causal mask the first third of all blocks comes after everything else:
// they are short, so CTAs end together, and what of their keys is read again is short, too.
#pragma once
#include "prefill_layout.cuh"

struct PrefillParams {  // launch: mla_kernels/prefill_plan.py, field by field
    TensorMap q_map, k_map, v_map;
    u16* out;                               // (b, s_q, h_q, kHeadDimV) or (total_q, h_q, kHeadDimV)
    float* lse;                             // (b, h_q, s_q) or (h_q, total_q)
    const int *cu_seqlens_q, *cu_seqlens_k;  // (b + 1,), or null: all of s_q and s_k
    u32* tickets;                           // how many were drawn beyond each CTA's first; CTAs that are done
    float softmax_scale_log2;
    int b, s_q, s_k;  // ragged: s_q and s_k are total_q and total_k
    int h_q, h_kv;
    int causal;
    int section_keys;  // keys and values of one head that are to stay in L2
};

struct Item {
    int batch, head;  // head < 0: no more items
    int kv_head;
    int row, rows;         // first row of the sequence's, how many are left from there
    int token;             // of `row`, among those that out and the tensor map have (of its batch, where that is a dimension)
    int key_begin, keys;   // the sequence's
    int tiles;             // that some row sees
    int diagonal;          // row i sees keys below diagonal + i (and `keys`)
};

struct ItemQueue {
    static constexpr int kSlots = 2;
    Item item[kSlots];
    u64 full[kSlots], empty[kSlots];
    __device__ void init_barriers() {
        for (int i = 0; i < kSlots; ++i) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], kConsumers * kWarpgroup / 32);
    }
};

// Run by one warp. Tickets must come in ascending order.
struct Schedule {
    const PrefillParams& p;
    const int lane = threadIdx.x & 31;
    int first = -32;          // sequence of lane 0
    bool short_ones = false;  // these come now
    int before = 0, end = 0;  // items of sequences before `first`, and with those of the 32 lanes
    int q_begin = 0, q_len = 0, k_begin = 0, k_len = 0;  // of this lane's sequence
    int last = 0;                                        // `before` and items up to and with it

    __device__ explicit Schedule(const PrefillParams& p) : p(p) {}

    // Lengths on the device are not checked by the host: whatever they are, nothing outside the tensors is touched.
    __device__ static void span(const int* starts, int sequence, int total, int& begin, int& length) {
        begin = min(max(starts[sequence], 0), total);
        length = min(max(starts[sequence + 1], begin), total) - begin;
    }
    // How many blocks of a sequence come now, and which is the last of them.
    __device__ int blocks_now(int rows, int& top) const {
        const int blocks = (rows + kRows - 1) / kRows, few = p.causal ? blocks / 3 : 0;
        top = (short_ones ? few : blocks) - 1;
        return short_ones ? few : blocks - few;
    }
    __device__ bool next_sequences() {
        first += 32;
        if (first >= p.b) {
            if (short_ones || !p.causal) return false;
            short_ones = true;
            first = 0;
        }
        before = end;
        const int sequence = first + lane;
        q_begin = k_begin = q_len = k_len = 0;
        if (sequence < p.b) {
            q_len = p.s_q, k_len = p.s_k;
            if (p.cu_seqlens_q != nullptr) span(p.cu_seqlens_q, sequence, p.s_q, q_begin, q_len);
            if (p.cu_seqlens_k != nullptr) span(p.cu_seqlens_k, sequence, p.s_k, k_begin, k_len);
        }
        int top;
        last = blocks_now(q_len, top) * p.h_q;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, last, step);
            if (lane >= step) last += other;
        }
        last += before;
        end = __shfl_sync(0xffffffffu, last, 31);
        return true;
    }
    // The item of a ticket; every lane gets it.
    __device__ Item find(int ticket) {
        Item item{};
        item.head = -1;
        while (ticket >= end) {
            if (!next_sequences()) return item;
        }
        const int owner = __ffs(__ballot_sync(0xffffffffu, ticket < last)) - 1;
        const auto of_owner = [owner](int value) { return __shfl_sync(0xffffffffu, value, owner); };
        const int rows = of_owner(q_len), keys = of_owner(k_len), q_first = of_owner(q_begin);
        int top;
        const int blocks = blocks_now(rows, top);
        const int place = ticket - (of_owner(last) - blocks * p.h_q);
        const int group = p.h_q / p.h_kv;
        const int most = max(p.section_keys / max(keys, 1), 1), sections = (p.h_kv + most - 1) / most;
        const int section_heads = (p.h_kv + sections - 1) / sections * group;
        const int section = place / (section_heads * blocks), in_section = place - section * section_heads * blocks;
        const int heads = min(section_heads, p.h_q - section * section_heads);
        const int block = in_section / heads;
        item.batch = first + owner;
        item.head = section * section_heads + in_section - block * heads;
        item.kv_head = item.head / group;
        item.row = (top - block) * kRows;
        item.rows = rows - item.row;
        item.token = q_first + item.row;
        item.key_begin = of_owner(k_begin);
        item.keys = keys;
        item.diagonal = p.causal ? keys - rows + 1 + item.row : keys;
        const int visible = p.causal ? min(item.diagonal + min(item.rows, kRows) - 1, keys) : keys;
        item.tiles = (max(visible, 0) + kKeys - 1) / kKeys;
        return item;
    }
};
