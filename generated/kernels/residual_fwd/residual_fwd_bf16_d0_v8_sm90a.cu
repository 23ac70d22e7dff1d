// residual_fwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/residual_fwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// residual_fwd, bf16, vector 8, sm90a

// Gated residual of sequence b: out = x + gate_b y, or x + y without a gate. out may be x.
// Floor: x and y read, out written once. Grid x walks a sequence's values in vectors, grid y the sequences.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 56;
// END CONFIG

struct Params {
    const Element* x;   // [B, S, dim], 16-byte aligned; dim a multiple of the vector
    const Element* y;   // [B, S, dim]
    Element* out;       // [B, S, dim], written
    const float* gate;  // [dim] of sequence 0, or null
    int64 gate_stride;  // between sequences
    int32 batch;
    int32 seqlen;
    int32 dim;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::ResidualFwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) residual_fwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const int64 count = static_cast<int64>(p.seqlen) * p.dim;
    const int64 base = blockIdx.y * count;
    for_each_vector<kVector>(count, true, [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float x[kWidth], y[kWidth];
        load_vector(p.x + base + first, x);
        load_vector(p.y + base + first, y);
        if (p.gate != nullptr) {
            float gate[kWidth];
            load_vector(p.gate + blockIdx.y * p.gate_stride + first % p.dim, gate);
    #pragma unroll
            for (int i = 0; i < kWidth; ++i) x[i] += gate[i] * y[i];
        } else {
    #pragma unroll
            for (int i = 0; i < kWidth; ++i) x[i] += y[i];
        }
        store_vector(p.out + base + first, x);
    });
}
