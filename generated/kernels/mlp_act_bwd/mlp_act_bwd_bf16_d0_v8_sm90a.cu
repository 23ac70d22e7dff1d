// mlp_act_bwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/mlp_act_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// mlp_act_bwd, bf16, vector 8, sm90a

// Backward of mlp_act_fwd: GeGLU d_value = d_out gelu(gate), d_gate = d_out value gelu'(gate); GELU d = d_out gelu'. In the
// same pass the forward's output, which the product before it wants for its weights' gradient, over d_out, and the column
// sums of d_pre, the gradient of a bias. A CTA owns a chunk of rows, a thread a column vector; sum_rows adds the chunks.
// Floor: pre and d_out read, d_pre and out written once.
#include "dsv/math.cuh"
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
    Element* pre;    // [rows, 2 hidden] (GeGLU) or [rows, hidden], 16-byte aligned; d_pre is written over it
    Element* out;    // [rows, hidden]: d_out, out is written over it; hidden a multiple of the vector
    float* partial;  // [gridDim.y, row length of pre], written: column sums of d_pre
    int64 rows;
    int32 hidden;
    int32 is_glu;
    int32 rows_per_chunk;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::MlpActBwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) mlp_act_bwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const int c = (blockIdx.x * kThreads + threadIdx.x) * kVector;
    if (c >= p.hidden) return;
    const int64 begin = static_cast<int64>(blockIdx.y) * p.rows_per_chunk;
    const int64 end = min(begin + p.rows_per_chunk, p.rows);
    const int width = p.is_glu ? 2 * p.hidden : p.hidden;
    float sum_value[kVector] = {}, sum_gate[kVector] = {};
    for (int64 row = begin; row < end; ++row) {
        Element* pre = p.pre + row * width + c;
        Element* out = p.out + row * p.hidden + c;
        float d[kVector], gate[kVector];
        load_vector(out, d);
        if (p.is_glu) {
            float value[kVector];
            load_vector(pre, value);
            load_vector(pre + p.hidden, gate);
    #pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const ValueAndDerivative g = gelu_with_derivative(gate[i]);
                const float v = value[i];
                value[i] = d[i] * g.value;
                gate[i] = d[i] * v * g.derivative;
                d[i] = v * g.value;
                sum_value[i] += value[i];
                sum_gate[i] += gate[i];
            }
            store_vector(pre, value);
            store_vector(pre + p.hidden, gate);
        } else {
            load_vector(pre, gate);
    #pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const ValueAndDerivative g = gelu_with_derivative(gate[i]);
                gate[i] = d[i] * g.derivative;
                d[i] = g.value;
                sum_value[i] += gate[i];
            }
            store_vector(pre, gate);
        }
        store_vector(out, d);
    }
    float* partial = p.partial + static_cast<int64>(blockIdx.y) * width + c;
    store_vector(partial, sum_value);
    if (p.is_glu) store_vector(partial + p.hidden, sum_gate);
}
