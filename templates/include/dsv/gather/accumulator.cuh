#pragma once
// The f32 sums of dK and dV of one KV head, in units of 8 tokens: [tokens / 8][dK, dV][D / 16][8 tokens][16], the last
// axis in the order a thread quad holds 16 columns of an accumulator fragment: thread c of the quad has columns 2 c,
// 2 c + 1, 2 c + 8, 2 c + 9 at places 4 c to 4 c + 3. A warp whose 8 rows are one unit adds 512 contiguous bytes an
// instruction, rows of other tokens 64 bytes each.
#include "dsv/attention.cuh"
#include "dsv/types.cuh"

namespace dsv {

// Tokens the sums are padded to: attn_bwd_post_kv reads whole tiles.
constexpr int32 kAccumulatorTokens = 64;

template <int head_dim>
struct Accumulator {
    static constexpr int kHalf = 8 * head_dim;  // floats of a unit's dK, or dV
    static_assert(head_dim % 16 == 0, "whole groups of 16 columns");

    float* head;  // this KV head's

    __device__ __forceinline__ Accumulator(float* all, const AttnSizes& sizes, int kv_head, int batch) {
        const int64 tokens = (sizes.seqlen_kv + kAccumulatorTokens - 1) / kAccumulatorTokens * kAccumulatorTokens;
        head = all + (int64{batch} * sizes.num_kv_heads + kv_head) * tokens * (2 * head_dim);
    }

    // Where this thread adds to a token's sums.
    __device__ __forceinline__ float* of(int token) const {
        return head + int64{token / 8} * (2 * kHalf) + token % 8 * 16 + threadIdx.x % 4 * 4;
    }

    // Adds row `r` (0: lane / 4, 1: + 8) of a fragment of 64 columns, the `chunk`-th 64 of dV or dK as far as they exist.
    __device__ __forceinline__ void add(float* of_token, int r, bool dv, int chunk, const float (&d)[32]) const {
        float* to = of_token + (dv ? kHalf : 0) + chunk * (4 * 128);
#pragma unroll
        for (int i = 0; i < 4 && chunk * 4 + i < head_dim / 16; ++i) {
            asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + i * 128), "f"(d[8 * i + 2 * r]),
                         "f"(d[8 * i + 2 * r + 1]), "f"(d[8 * i + 2 * r + 4]), "f"(d[8 * i + 2 * r + 5])
                         : "memory");
        }
    }
};

}  // namespace dsv
