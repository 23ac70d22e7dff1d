// gate_weight_bf16_d0_v8_sm90a
// Generated from templates/kernels/gate_weight.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gate_weight, bf16, vector 8, sm90a

// Weights of a gated linear map: gate (w a + bias) = (gate w) a + gate bias, so the product that adds the residual in its
// epilogue needs no pass over the tokens for the gate. A CTA owns a row of the weight.
// Floor: weight read, gated_weight written once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 48;
// END CONFIG

struct Params {
    const Element* weight;  // [rows, columns], 16-byte aligned; columns a multiple of the vector
    const Element* bias;    // [rows]
    const float* gate;      // [rows]
    Element* gated_weight;  // [rows, columns], written
    Element* gated_bias;    // [rows], written
    int32 columns;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GateWeight");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gate_weight_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const float gate = p.gate[blockIdx.x];
    const int64 row = static_cast<int64>(blockIdx.x) * p.columns;
    for (int c = threadIdx.x * kVector; c < p.columns; c += kThreads * kVector) {
        float w[kVector];
        load_vector(p.weight + row + c, w);
    #pragma unroll
        for (int i = 0; i < kVector; ++i) w[i] *= gate;
        store_vector(p.gated_weight + row + c, w);
    }
    if (threadIdx.x == 0) p.gated_bias[blockIdx.x] = from_float<Element>(gate * to_float(p.bias[blockIdx.x]));
}
