// gate_grad_bf16_d0_v8_sm90a
// Generated from templates/kernels/gate_grad.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gate_grad, bf16, vector 8, sm90a

// Gradients of y_t = gate (w a_t + bias) over tokens t, from P = sum_t d_y_t a_t^T and s = sum_t d_y_t:
//   d_w += gate P;  d_bias += gate s;  d_gate = <w, P> + bias s, row by row
// The last line is why y need not be kept, nor made anew in the backward: <w, P> = sum_t d_y_t <w, a_t>.
// A CTA owns a row of the weight. Floor: P, w and d_w read, d_w written once.
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

struct Params {
    const float* product;   // [rows, columns]: P, 16-byte aligned; columns a multiple of the vector
    const float* sum;       // [rows]: s
    const Element* weight;  // [rows, columns]
    const Element* bias;    // [rows]
    const float* gate;      // [rows]
    float* d_weight;        // [rows, columns], added to
    float* d_bias;          // [rows], added to
    float* d_gate;          // [rows], written
    int32 columns;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GateGrad");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gate_grad_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    __shared__ float sDot[kThreads / 32];
    const float gate = p.gate[blockIdx.x];
    const int64 row = static_cast<int64>(blockIdx.x) * p.columns;
    float dot = 0.0f;
    for (int c = threadIdx.x * kVector; c < p.columns; c += kThreads * kVector) {
        float product[kVector], w[kVector], d[kVector];
        load_vector(p.product + row + c, product);
        load_vector(p.weight + row + c, w);
        load_vector(p.d_weight + row + c, d);
    #pragma unroll
        for (int i = 0; i < kVector; ++i) {
            dot += w[i] * product[i];
            d[i] += gate * product[i];
        }
        store_vector(p.d_weight + row + c, d);
    }
    dot = cta_sum(dot, sDot);
    if (threadIdx.x == 0) {
        const float s = p.sum[blockIdx.x];
        p.d_gate[blockIdx.x] = dot + to_float(p.bias[blockIdx.x]) * s;
        p.d_bias[blockIdx.x] += gate * s;
    }
}
