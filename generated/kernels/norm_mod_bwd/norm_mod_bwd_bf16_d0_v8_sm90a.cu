// norm_mod_bwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/norm_mod_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// norm_mod_bwd, bf16, vector 8, sm90a

// Backward of norm_mod_fwd. With g = d_out (1 + scale_b):
//   d_x += rstd (g - mean(g) - n mean(g n));  d_shift_b = sum over tokens of d_out;  d_scale_b = sum of d_out n
// A CTA owns a chunk of one sequence's tokens: first a warp a row for d_x, then a thread a column vector for the
// chunk's sums, which re-reads the chunk through L2. sum_rows adds the chunks in order.
// Floor: x, d_out and d_x read, d_x written once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 80;
// END CONFIG

constexpr int kWarps = kThreads / 32;

struct Params {
    const Element* x;         // [B, S, dim], 16-byte aligned; dim a multiple of the vector
    const Element* d_out;     // [B, S, dim]
    Element* d_x;             // [B, S, dim], added to, rounded once
    const float* modulation;  // [B, chunks, dim]
    const float* mean;        // [B, S]
    const float* rstd;        // [B, S]
    float* partial;           // [B, gridDim.x, 2, dim], written: sums of d_out, of d_out n
    int32 batch;
    int32 seqlen;
    int32 dim;
    int32 chunks;
    int32 scale;  // chunk of the scale
    int32 rows_per_chunk;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::NormModBwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) norm_mod_bwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const int begin = blockIdx.x * p.rows_per_chunk;
    const int end = min(begin + p.rows_per_chunk, p.seqlen);
    const int64 row0 = static_cast<int64>(blockIdx.y) * p.seqlen;
    const float* scale = p.modulation + (static_cast<int64>(blockIdx.y) * p.chunks + p.scale) * p.dim;
    float x[kVector], d[kVector];

    for (int token = begin + warp_index(); token < end; token += kWarps) {
        const int64 row = row0 + token;
        const float mean = p.mean[row];
        const float rstd = p.rstd[row];
        const int first = lane_index() * kVector;
        float times[kVector];
        float sum = 0.0f;
        float sum_n = 0.0f;
        for (int c = first; c < p.dim; c += 32 * kVector) {
            load_vector(p.x + row * p.dim + c, x);
            load_vector(p.d_out + row * p.dim + c, d);
            load_vector(scale + c, times);
    #pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const float g = d[i] * (1.0f + times[i]);
                sum += g;
                sum_n += g * (x[i] - mean) * rstd;
            }
        }
        const float mean_g = warp_sum(sum) / p.dim;
        const float mean_gn = warp_sum(sum_n) / p.dim;
        for (int c = first; c < p.dim; c += 32 * kVector) {
            float d_x[kVector];
            load_vector(p.x + row * p.dim + c, x);
            load_vector(p.d_out + row * p.dim + c, d);
            load_vector(scale + c, times);
            load_vector(p.d_x + row * p.dim + c, d_x);
    #pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const float n = (x[i] - mean) * rstd;
                d_x[i] += rstd * (d[i] * (1.0f + times[i]) - mean_g - n * mean_gn);
            }
            store_vector(p.d_x + row * p.dim + c, d_x);
        }
    }

    float* partial = p.partial + (static_cast<int64>(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * p.dim;
    for (int c = threadIdx.x * kVector; c < p.dim; c += kThreads * kVector) {
        float sum[kVector] = {};
        float sum_n[kVector] = {};
        for (int token = begin; token < end; ++token) {
            const int64 row = row0 + token;
            const float mean = p.mean[row];
            const float rstd = p.rstd[row];
            load_vector(p.x + row * p.dim + c, x);
            load_vector(p.d_out + row * p.dim + c, d);
    #pragma unroll
            for (int i = 0; i < kVector; ++i) {
                sum[i] += d[i];
                sum_n[i] += d[i] * (x[i] - mean) * rstd;
            }
        }
        store_vector(partial + c, sum);
        store_vector(partial + p.dim + c, sum_n);
    }
}
