// qk_prep_fwd_bf16_d0_v1_sm90a
// Generated from templates/kernels/qk_prep_fwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// qk_prep_fwd, bf16, vector 1, sm90a

// Q and K for attention, from packed QKV: RMS normalisation over a head with a learned weight, then 3D RoPE.
//   n = x / sqrt(mean(x^2) + eps) w;  (out_i, out_{i + D/2}) = (n_i cos_i - n_{i + D/2} sin_i, n_{i + D/2} cos_i + n_i sin_i)
// One CTA a token, one warp a head vector; a lane owns adjacent pairs i, i + 1 and their partners, so the rotation
// needs no exchange. The token's cosines and sines serve all heads from L1.
// Floor: Q and K parts of qkv read, q and k written once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 96;
// END CONFIG

constexpr int kWarps = kThreads / 32;
// Head dims to 256: 128 pairs, 64 of them a step of the warp.
constexpr int kSteps = 2;

struct Params {
    const Element* qkv;       // [B, S, 3, H, D], 16-byte aligned; D a multiple of 4, at most 256
    const Element* weight[2]; // [D]: of Q, of K
    const float* cosine;      // [S, D/2]
    const float* sine;        // [S, D/2]
    Element* out[2];          // [B, S, H, D], written: q, k
    float* rstd[2];           // [B, S, H], written: of Q, of K
    int32 batch;
    int32 seqlen;
    int32 heads;
    int32 head_dim;
    float eps;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::QkPrepFwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) qk_prep_fwd_bf16_d0_v1_sm90a(const __grid_constant__ Params p) {
    const int64 row = blockIdx.x;
    const int half = p.head_dim / 2;
    const float* cosine = p.cosine + row % p.seqlen * half;
    const float* sine = p.sine + row % p.seqlen * half;
    for (int vector = warp_index(); vector < 2 * p.heads; vector += kWarps) {
        const int part = vector / p.heads;
        const int head = vector % p.heads;
        const Element* x = p.qkv + ((row * 3 + part) * p.heads + head) * p.head_dim;
        float low[kSteps][2], high[kSteps][2];
        float squares = 0.0f;
    #pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int i = 64 * step + 2 * lane_index();
            if (i < half) {
                load_vector(x + i, low[step]);
                load_vector(x + half + i, high[step]);
    #pragma unroll
                for (int j = 0; j < 2; ++j) squares += low[step][j] * low[step][j] + high[step][j] * high[step][j];
            }
        }
        const float rstd = 1.0f / sqrtf(warp_sum(squares) / p.head_dim + p.eps);
        const int64 at = row * p.heads + head;
        if (lane_index() == 0) p.rstd[part][at] = rstd;
        Element* out = p.out[part] + at * p.head_dim;
    #pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int i = 64 * step + 2 * lane_index();
            if (i < half) {
                float w_low[2], w_high[2], c[2], s[2];
                load_vector(p.weight[part] + i, w_low);
                load_vector(p.weight[part] + half + i, w_high);
                load_vector(cosine + i, c);
                load_vector(sine + i, s);
    #pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float a = low[step][j] * rstd * w_low[j];
                    const float b = high[step][j] * rstd * w_high[j];
                    low[step][j] = a * c[j] - b * s[j];
                    high[step][j] = b * c[j] + a * s[j];
                }
                store_vector(out + i, low[step]);
                store_vector(out + half + i, high[step]);
            }
        }
    }
}
