// Counter-based noise: element e of a tensor depends on the tensor's key and e alone.
#pragma once
#include "dsv/types.cuh"

namespace dsv {

// Ten rounds of Philox 4x32 (Salmon et al., SC'11) of counter (quad, 0, 0, 0).
__device__ __forceinline__ uint4 philox(uint32 quad, uint32 key0, uint32 key1) {
    uint4 c = {quad, 0, 0, 0};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32 high0 = __umulhi(0xD2511F53u, c.x);
        const uint32 low0 = 0xD2511F53u * c.x;
        const uint32 high1 = __umulhi(0xCD9E8D57u, c.z);
        const uint32 low1 = 0xCD9E8D57u * c.z;
        c = {high1 ^ c.y ^ key0, low1, high0 ^ c.w ^ key1, low0};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// Elements 4 quad .. 4 quad + 3 of the standard normal tensor of this key (Box-Muller).
__device__ __forceinline__ void normal4(uint32 quad, uint32 key0, uint32 key1, float (&out)[4]) {
    const uint4 r = philox(quad, key0, key1);
    const uint32 bits[4] = {r.x, r.y, r.z, r.w};
    float u[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = (__uint2float_rn(bits[i]) + 0.5f) * 0x1p-32f;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const float radius = sqrtf(-2.0f * logf(u[i]));
        float sine, cosine;
        sincospif(2.0f * u[i + 1], &sine, &cosine);
        out[i] = radius * cosine;
        out[i + 1] = radius * sine;
    }
}

}  // namespace dsv
