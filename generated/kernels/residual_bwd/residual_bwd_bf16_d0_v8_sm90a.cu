// residual_bwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/residual_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// residual_bwd, bf16, vector 8, sm90a

// Backward of a gated residual: d_y = gate_b d_out;  d_gate_b = sum over tokens of d_out y.
// A CTA owns a chunk of one sequence's tokens, a thread a column vector of it; sum_rows adds the chunks in order.
// Floor: y and d_out read, d_y written once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 64;
// END CONFIG

struct Params {
    const Element* y;      // [B, S, dim], 16-byte aligned; dim a multiple of the vector
    const Element* d_out;  // [B, S, dim]
    Element* d_y;          // [B, S, dim], written
    const float* gate;     // [dim] of sequence 0
    float* partial;        // [B, gridDim.x, dim], written: sums of d_out y
    int64 gate_stride;     // between sequences
    int32 batch;
    int32 seqlen;
    int32 dim;
    int32 rows_per_chunk;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::ResidualBwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) residual_bwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const int begin = blockIdx.x * p.rows_per_chunk;
    const int end = min(begin + p.rows_per_chunk, p.seqlen);
    const int64 row0 = static_cast<int64>(blockIdx.y) * p.seqlen;
    float* partial = p.partial + (static_cast<int64>(blockIdx.y) * gridDim.x + blockIdx.x) * p.dim;
    for (int c = threadIdx.x * kVector; c < p.dim; c += kThreads * kVector) {
        float gate[kVector];
        float sum[kVector] = {};
        load_vector(p.gate + blockIdx.y * p.gate_stride + c, gate);
    #pragma unroll 4
        for (int token = begin; token < end; ++token) {
            const int64 at = (row0 + token) * p.dim + c;
            float y[kVector], d[kVector];
            load_vector(p.y + at, y);
            load_vector(p.d_out + at, d);
    #pragma unroll
            for (int i = 0; i < kVector; ++i) {
                sum[i] += d[i] * y[i];
                d[i] *= gate[i];
            }
            store_vector(p.d_y + at, d);
        }
        store_vector(partial + c, sum);
    }
}
