// time_embed_bf16_d0_v1_sm90a
// Generated from templates/kernels/time_embed.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// time_embed, bf16, vector 1, sm90a

// Sinusoidal embedding of a timestep: out[b, i] = cos(1000 t_b w_i), out[b, half + i] = sin(1000 t_b w_i),
// w_i = 10000^(-i / half). Angles reach 1000 rad: they are reduced to one turn in f64. A few thousand values a step.
#include "dsv/types.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 24;
// END CONFIG

struct Params {
    const float* t;  // [B]
    Element* out;    // [B, width], written
    int32 batch;
    int32 width;     // even
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::TimeEmbed");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) time_embed_bf16_d0_v1_sm90a(const __grid_constant__ Params p) {
    constexpr double kLn10000 = 9.210340371976184;
    constexpr double kTurnsPerRadian = 0.15915494309189535;
    const int half = p.width / 2;
    for (int at = blockIdx.x * kThreads + threadIdx.x; at < p.batch * half; at += gridDim.x * kThreads) {
        const int b = at / half;
        const int i = at % half;
        const double turns = 1000.0 * p.t[b] * exp(-kLn10000 * i / half) * kTurnsPerRadian;
        float sine, cosine;
        sincospif(static_cast<float>(2.0 * (turns - floor(turns))), &sine, &cosine);
        p.out[static_cast<int64>(b) * p.width + i] = from_float<Element>(cosine);
        p.out[static_cast<int64>(b) * p.width + half + i] = from_float<Element>(sine);
    }
}
