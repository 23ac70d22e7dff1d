// rope_bf16_d0_v1_sm90a
// Generated from templates/kernels/rope.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// rope, bf16, vector 1, sm90a

// Rotary embedding in place: elements i and i + dim/2 of every vector turn by the token's angle i; backwards (the
// gradient) when inverse. Floor: x read and written once.
#include "dsv/types.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 48;
// END CONFIG

struct Params {
    Element* x;           // [B, S, vectors, dim], updated
    const float* cosine;  // [S, dim/2]
    const float* sine;    // [S, dim/2]
    int32 batch;
    int32 seqlen;
    int32 vectors;
    int32 dim;
    int32 inverse;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Rope");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) rope_bf16_d0_v1_sm90a(const __grid_constant__ Params p) {
    const int half = p.dim / 2;
    const int64 pairs = static_cast<int64>(p.batch) * p.seqlen * p.vectors * half;
    const int64 threads = static_cast<int64>(gridDim.x) * kThreads;
    for (int64 at = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x; at < pairs; at += threads) {
        const int i = static_cast<int>(at % half);
        const int64 vector = at / half;
        const int64 angle = vector / p.vectors % p.seqlen * half + i;
        Element* low = p.x + vector * p.dim + i;
        Element* high = low + half;
        const float c = p.cosine[angle];
        const float s = p.inverse ? -p.sine[angle] : p.sine[angle];
        const float a = to_float(*low);
        const float b = to_float(*high);
        *low = from_float<Element>(a * c - b * s);
        *high = from_float<Element>(b * c + a * s);
    }
}
