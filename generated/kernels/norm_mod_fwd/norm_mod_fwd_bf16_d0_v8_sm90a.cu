// norm_mod_fwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/norm_mod_fwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// norm_mod_fwd, bf16, vector 8, sm90a

// LayerNorm without affine weights, then AdaLN modulation of the token's sequence b:
//   n = (x - mean(x)) / sqrt(var(x) + eps);  out = n (1 + scale_b) + shift_b
// A warp owns a row; the variance is of centred values, from a second pass over the row, which the L1 holds.
// Floor: x read, out written once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 72;
// END CONFIG

constexpr int kWarps = kThreads / 32;

struct Params {
    const Element* x;         // [B, S, dim], 16-byte aligned; dim a multiple of the vector
    Element* out;             // [B, S, dim], written
    const float* modulation;  // [B, chunks, dim]
    float* mean;              // [B, S], written
    float* rstd;              // [B, S], written: 1 / sqrt(var + eps)
    int32 batch;
    int32 seqlen;
    int32 dim;
    int32 chunks;
    int32 shift;  // chunk of the shift
    int32 scale;  // chunk of the scale
    float eps;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::NormModFwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) norm_mod_fwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const int64 row = static_cast<int64>(blockIdx.x) * kWarps + warp_index();
    if (row >= static_cast<int64>(p.batch) * p.seqlen) return;
    const Element* x = p.x + row * p.dim;
    const int first = lane_index() * kVector;
    float value[kVector];
    float sum = 0.0f;
    for (int c = first; c < p.dim; c += 32 * kVector) {
        load_vector(x + c, value);
    #pragma unroll
        for (int i = 0; i < kVector; ++i) sum += value[i];
    }
    const float mean = warp_sum(sum) / p.dim;
    float squares = 0.0f;
    for (int c = first; c < p.dim; c += 32 * kVector) {
        load_vector(x + c, value);
    #pragma unroll
        for (int i = 0; i < kVector; ++i) squares += (value[i] - mean) * (value[i] - mean);
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / p.dim + p.eps);
    if (lane_index() == 0) {
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
    const float* modulation = p.modulation + row / p.seqlen * p.chunks * p.dim;
    const float* shift = modulation + static_cast<int64>(p.shift) * p.dim;
    const float* scale = modulation + static_cast<int64>(p.scale) * p.dim;
    Element* out = p.out + row * p.dim;
    for (int c = first; c < p.dim; c += 32 * kVector) {
        float add[kVector], times[kVector];
        load_vector(x + c, value);
        load_vector(shift + c, add);
        load_vector(scale + c, times);
    #pragma unroll
        for (int i = 0; i < kVector; ++i) value[i] = (value[i] - mean) * rstd * (1.0f + times[i]) + add[i];
        store_vector(out + c, value);
    }
}
