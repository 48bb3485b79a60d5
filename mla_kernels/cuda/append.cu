// New latents into the paged pool: 512 latent and 64 rotary columns a token, with RMSNorm and RoPE on the way if asked for.
//
// Grid: a warp a token, 8 a CTA. A lane has 16 of the latent columns and, of the first eight lanes, 8 of the rotary ones; every
// access is 16 bytes. No shared memory. Where tokens go is read on the device, so a captured graph may be replayed with others.
#include "ptx.cuh"

constexpr int kWarps = 8, kLatent = 512, kRotary = 64, kVector = 8;  // elements of 16 bytes
constexpr int kRotaryLanes = kRotary / kVector, kHalfLanes = kRotaryLanes / 2;

struct AppendParams {
    u16* pool;
    const u16 *kv_c, *k_pe;          // (n, 512), (n, 64)
    const u16* norm_weight;          // (512,) or null: latents are normed already
    const float *cos, *sin;          // (max_positions, 32) or null: the rotary part is rotated already
    const long long *slots, *positions;  // (n,)
    long long page_stride, token_stride, kv_c_stride, k_pe_stride;  // elements
    long long num_slots, max_positions;
    int n, page_shift, interleaved;
    float eps;
};

struct Vector {
    float x[kVector];
    __device__ explicit Vector(const u16* from) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack_elements(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
    __device__ void store(u16* to) const {
        *reinterpret_cast<uint4*>(to) = make_uint4(pack_elements(x[0], x[1]), pack_elements(x[2], x[3]), pack_elements(x[4], x[5]),
                                                   pack_elements(x[6], x[7]));
    }
};

// x / rms(x) * weight, over the warp's 512 columns, in fp32.
__device__ __forceinline__ void normalise(const AppendParams& p, Vector (&latent)[2], int lane) {
    float sum = 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum = fmaf(latent[half].x[i], latent[half].x[i], sum);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const float factor = rsqrtf(sum / kLatent + p.eps);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Vector weight(p.norm_weight + (half * 32 + lane) * kVector);
#pragma unroll
        for (int i = 0; i < kVector; ++i) latent[half].x[i] *= factor * weight.x[i];
    }
}

// Rotates pairs of columns (2 i, 2 i + 1), or (i, i + 32), by the angle of the token's position; NaN for one that has none.
__device__ __forceinline__ void rotate(const AppendParams& p, Vector& rotary, long long position, int lane) {
    const bool known = position >= 0 && position < p.max_positions;
    const long long row = (known ? position : 0) * (kRotary / 2);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const int angle = p.interleaved ? lane * (kVector / 2) + i / 2 : lane % kHalfLanes * kVector + i;
        const float c = known ? p.cos[row + angle] : kNan, s = p.sin[row + angle];
        const float across = __shfl_xor_sync(0xffu, rotary.x[i], kHalfLanes);
        if (!p.interleaved) {
            rotary.x[i] = lane < kHalfLanes ? rotary.x[i] * c - across * s : rotary.x[i] * c + across * s;
        } else if (i % 2 == 0) {
            const float even = rotary.x[i], odd = rotary.x[i + 1];
            rotary.x[i] = even * c - odd * s;
            rotary.x[i + 1] = odd * c + even * s;
        }
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) mla_append(const __grid_constant__ AppendParams p) {
    const int lane = threadIdx.x % 32, token = blockIdx.x * kWarps + threadIdx.x / 32;
    if (token >= p.n) return;
    const long long slot = p.slots[token];
    if (slot < 0 || slot >= p.num_slots) return;  // not to be written, or outside the pool
    u16* line = p.pool + (slot >> p.page_shift) * p.page_stride + (slot & ((1 << p.page_shift) - 1)) * p.token_stride;

    const u16* kv_c = p.kv_c + token * p.kv_c_stride + lane * kVector;
    Vector latent[2] = {Vector(kv_c), Vector(kv_c + 32 * kVector)};
    if (p.norm_weight != nullptr) normalise(p, latent, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) latent[half].store(line + (half * 32 + lane) * kVector);

    if (lane >= kRotaryLanes) return;
    Vector rotary(p.k_pe + token * p.k_pe_stride + lane * kVector);
    if (p.cos != nullptr) rotate(p, rotary, p.positions[token], lane);
    rotary.store(line + kLatent + lane * kVector);
}
