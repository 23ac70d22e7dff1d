#pragma once
// The online softmax on accumulator fragments.
#include "dsv/fragment.cuh"
#include "dsv/types.cuh"

namespace dsv {

// Row statistics of one thread over tiles of N columns: rows lane / 4 and lane / 4 + 8 of its warp.
template <int N>
struct Softmax {
    float row_max[2] = {-kInf, -kInf};
    float row_sum[2] = {0.0f, 0.0f};  // this thread's columns only; reduced once at the end

    // S becomes P = exp2(c S - c m); returns what O has to be scaled with.
    __device__ __forceinline__ void step(float (&s)[N / 2], float scale_log2, float (&rescale)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float m = row_max[r];
#pragma unroll
            for (int j = 0; j < N / 8; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            m = quad_max(m);
            const float m_log2 = m == -kInf ? 0.0f : m * scale_log2;
            // The difference first: exactly 1 where the maximum stays, so that hundreds of tiles add no bias to l.
            rescale[r] = m == -kInf ? 1.0f : exp2_fast((row_max[r] - m) * scale_log2);
            row_max[r] = m;
            float sum = row_sum[r] * rescale[r];
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) {
                    s[4 * j + i] = exp2_fast(s[4 * j + i] * scale_log2 - m_log2);
                    sum += s[4 * j + i];
                }
            }
            row_sum[r] = sum;
        }
    }
};

}  // namespace dsv
