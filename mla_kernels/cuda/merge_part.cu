// Attention over some keys joins a running result over other keys, row by row: a row is a head of a token, of 128 columns.
//
//   lse' = log(exp(lse) + exp(part_lse))     result' = exp(lse - lse') result + exp(part_lse - lse') part
//
// Grid: a warp a row; a CTA has 8 neighbouring tokens of one head, whose LSEs lie side by side. The running result is fp32, so that it
// does not lose a rounding a part. But the first part of a row is a running result as it is, and the last leaves as 16-bit elements.
#include "ptx.cuh"

constexpr int kWarps = 8, kColumns = 128, kOwn = kColumns / 32;

struct MergeParams {
    const u16* part;        // (tokens, heads, 128)
    const float* part_lse;  // (heads, tokens)
    const u16* first;       // (tokens, heads, 128), the running result as far as it is one part; or null
    float* sum;             // (tokens, heads, 128), where it is otherwise. Neither is read where lse is -inf
    float* lse;             // rows of `lse_stride`, a head each: -inf where nothing was before
    u16* out;               // (tokens, heads, 128), or null: the result goes into `sum`
    long long lse_stride;
    int tokens, heads;
};

__device__ __forceinline__ float4 load_elements(const u16* from) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack_elements(words.x), high = unpack_elements(words.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) merge_part(const __grid_constant__ MergeParams p) {
    const int lane = threadIdx.x % 32, token = blockIdx.x * kWarps + threadIdx.x / 32, head = blockIdx.y;
    if (token >= p.tokens) return;
    const float other = p.part_lse[static_cast<long long>(head) * p.tokens + token];
    float* own_lse = p.lse + head * p.lse_stride + token;
    const float own = *own_lse;
    const long long at = (static_cast<long long>(token) * p.heads + head) * kColumns + lane * kOwn;

    float4 result = load_elements(p.part + at);
    float lse = other;
    if (own != -kInfinity) {
        const float top = fmaxf(own, other);
        lse = top + logf(expf(own - top) + expf(other - top));
        const float keep = expf(own - lse), take = expf(other - lse);
        const float4 sum = p.first != nullptr ? load_elements(p.first + at) : *reinterpret_cast<const float4*>(p.sum + at);
        result.x = keep * sum.x + take * result.x;
        result.y = keep * sum.y + take * result.y;
        result.z = keep * sum.z + take * result.z;
        result.w = keep * sum.w + take * result.w;
    }
    if (p.out != nullptr) {
        const uint2 packed = make_uint2(pack_elements(result.x, result.y), pack_elements(result.z, result.w));
        *reinterpret_cast<uint2*>(p.out + at) = packed;
    } else {
        *reinterpret_cast<float4*>(p.sum + at) = result;
    }
    __syncwarp();  // all lanes have read it
    if (lane == 0) *own_lse = lse;
}
