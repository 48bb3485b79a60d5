// The lines of a chunk of sequences, out of their pages: end to end, and the rotary part once more into the keys of every head.
//
// Grid: a warp a token, 8 a CTA. Every access is 16 bytes: a lane has 16 of the latent columns; 8 lanes hold the 64 rotary ones,
// and the warp's four groups of them share the heads. A page outside the pool is not read: its tokens are NaN.
#include "ptx.cuh"

constexpr int kWarps = 8, kLatent = 512, kVector = 8;  // elements of 16 bytes
constexpr int kRotaryLanes = 8, kLatentVectors = kLatent / kVector;
constexpr u32 kNanPair = 0x7fff7fffu;  // of either element type

struct Part {
    int sequence, begin, line;  // a sequence's tokens from position `begin` on are lines of the chunk from `line` on
};

struct GatherParams {
    const uint4* pool;       // pages of lines of 576
    uint4 *lines, *rotary;   // (tokens, 576); the rotary columns of keys (tokens, heads, .)
    const int* table;        // page ids of each sequence
    const Part* parts;       // in order of `line`, the first from 0
    long long page_stride, token_stride, table_stride, key_stride, head_stride;  // in vectors; of the table in ids
    int num_parts, tokens, num_pages, page_size, heads;
};

// The last part that begins at `token` or before.
__device__ __forceinline__ Part part_of(const GatherParams& p, int token) {
    int low = 0, high = p.num_parts;  // the part is in [low, high)
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (p.parts[middle].line <= token) low = middle;
        else high = middle;
    }
    return p.parts[low];
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) gather_latents(const __grid_constant__ GatherParams p) {
    const int lane = threadIdx.x % 32, token = blockIdx.x * kWarps + threadIdx.x / 32;
    if (token >= p.tokens) return;
    const Part part = part_of(p, token);
    const int position = part.begin + token - part.line, place = position % p.page_size;
    const int page = p.table[part.sequence * p.table_stride + position / p.page_size];
    const bool inside = page >= 0 && page < p.num_pages;
    const uint4* line = p.pool + page * p.page_stride + place * p.token_stride;

    uint4 latent[2], rotary;
    latent[0] = latent[1] = rotary = make_uint4(kNanPair, kNanPair, kNanPair, kNanPair);
    if (inside) {
        latent[0] = line[lane];
        latent[1] = line[32 + lane];
        rotary = line[kLatentVectors + lane % kRotaryLanes];
    }
    uint4* to = p.lines + static_cast<long long>(token) * (kLatentVectors + kRotaryLanes);
    to[lane] = latent[0];
    to[32 + lane] = latent[1];
    if (lane < kRotaryLanes) to[kLatentVectors + lane] = rotary;
    uint4* keys = p.rotary + token * p.key_stride + lane % kRotaryLanes;
    for (int head = lane / kRotaryLanes; head < p.heads; head += 32 / kRotaryLanes) keys[head * p.head_stride] = rotary;
}
