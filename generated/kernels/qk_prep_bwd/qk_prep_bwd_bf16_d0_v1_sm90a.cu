// qk_prep_bwd_bf16_d0_v1_sm90a
// Generated from templates/kernels/qk_prep_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// qk_prep_bwd, bf16, vector 1, sm90a

// Backward of qk_prep_fwd. With n = x rstd and d the gradient of the weighted vector (d_out rotated back):
//   d_x = rstd (d w - n mean(d w n));  d_w = sum over tokens and heads of d n
// One warp a head vector as in the forward; a CTA owns a chunk of tokens and keeps its part of d_w in registers.
// sum_rows adds the chunks in order. Floor: Q and K of qkv, d_q and d_k read, two parts of d_qkv written once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 112;
// END CONFIG

constexpr int kWarps = kThreads / 32;
// Head dims to 256: 128 pairs, 64 of them a step of the warp.
constexpr int kMaxHeadDim = 256;
constexpr int kSteps = kMaxHeadDim / 128;

struct Params {
    const Element* qkv;        // [B, S, 3, H, D], 16-byte aligned; D a multiple of 4, at most 256
    const Element* weight[2];  // [D]: of Q, of K
    const float* cosine;       // [S, D/2]
    const float* sine;         // [S, D/2]
    const float* rstd[2];      // [B, S, H]: of Q, of K
    const Element* d_out[2];   // [B, S, H, D]: of q, of k
    Element* d_qkv;            // [B, S, 3, H, D], parts 0 and 1 written
    float* partial;            // [gridDim.x, 2, D], written: d_w of the chunk, of Q and of K
    int32 batch;
    int32 seqlen;
    int32 heads;
    int32 head_dim;
    int32 rows_per_chunk;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::QkPrepBwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) qk_prep_bwd_bf16_d0_v1_sm90a(const __grid_constant__ Params p) {
    __shared__ float sWeight[kWarps][kMaxHeadDim];
    const int half = p.head_dim / 2;
    const int64 rows = static_cast<int64>(p.batch) * p.seqlen;
    const int64 begin = static_cast<int64>(blockIdx.x) * p.rows_per_chunk;
    const int64 end = min(begin + p.rows_per_chunk, rows);
    for (int part = 0; part < 2; ++part) {
        float d_weight_low[kSteps][2] = {};
        float d_weight_high[kSteps][2] = {};
        for (int64 vector = begin * p.heads + warp_index(); vector < end * p.heads; vector += kWarps) {
            const int64 row = vector / p.heads;
            const int head = static_cast<int>(vector % p.heads);
            const int64 packed = ((row * 3 + part) * p.heads + head) * p.head_dim;
            const float rstd = p.rstd[part][vector];
            const float* cosine = p.cosine + row % p.seqlen * half;
            const float* sine = p.sine + row % p.seqlen * half;
            float n_low[kSteps][2], n_high[kSteps][2], d_low[kSteps][2], d_high[kSteps][2];
            float dot = 0.0f;
    #pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const int i = 64 * step + 2 * lane_index();
                if (i < half) {
                    float w_low[2], w_high[2], c[2], s[2];
                    load_vector(p.qkv + packed + i, n_low[step]);
                    load_vector(p.qkv + packed + half + i, n_high[step]);
                    load_vector(p.d_out[part] + vector * p.head_dim + i, d_low[step]);
                    load_vector(p.d_out[part] + vector * p.head_dim + half + i, d_high[step]);
                    load_vector(p.weight[part] + i, w_low);
                    load_vector(p.weight[part] + half + i, w_high);
                    load_vector(cosine + i, c);
                    load_vector(sine + i, s);
    #pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        n_low[step][j] *= rstd;
                        n_high[step][j] *= rstd;
                        const float a = d_low[step][j] * c[j] + d_high[step][j] * s[j];
                        const float b = d_high[step][j] * c[j] - d_low[step][j] * s[j];
                        d_weight_low[step][j] += a * n_low[step][j];
                        d_weight_high[step][j] += b * n_high[step][j];
                        d_low[step][j] = a * w_low[j];
                        d_high[step][j] = b * w_high[j];
                        dot += d_low[step][j] * n_low[step][j] + d_high[step][j] * n_high[step][j];
                    }
                }
            }
            dot = warp_sum(dot) / p.head_dim;
    #pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const int i = 64 * step + 2 * lane_index();
                if (i < half) {
    #pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        d_low[step][j] = rstd * (d_low[step][j] - n_low[step][j] * dot);
                        d_high[step][j] = rstd * (d_high[step][j] - n_high[step][j] * dot);
                    }
                    store_vector(p.d_qkv + packed + i, d_low[step]);
                    store_vector(p.d_qkv + packed + half + i, d_high[step]);
                }
            }
        }
    #pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int i = 64 * step + 2 * lane_index();
            if (i < half) {
    #pragma unroll
                for (int j = 0; j < 2; ++j) {
                    sWeight[warp_index()][i + j] = d_weight_low[step][j];
                    sWeight[warp_index()][half + i + j] = d_weight_high[step][j];
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < p.head_dim; i += kThreads) {
            float sum = 0.0f;
    #pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) sum += sWeight[warp][i];
            p.partial[(static_cast<int64>(blockIdx.x) * 2 + part) * p.head_dim + i] = sum;
        }
        __syncthreads();
    }
}
