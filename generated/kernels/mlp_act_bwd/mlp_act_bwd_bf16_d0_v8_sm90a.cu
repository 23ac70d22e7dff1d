// mlp_act_bwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/mlp_act_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// mlp_act_bwd, bf16, vector 8, sm90a

// Backward of mlp_act_fwd: GeGLU d_value = d_out gelu(gate), d_gate = d_out value gelu'(gate); GELU d = d_out gelu'.
// d_pre may be pre. Floor: pre and d_out read, d_pre written once.
#include "dsv/math.cuh"
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 40;
// END CONFIG

struct Params {
    const Element* pre;    // [rows, 2 hidden] (GeGLU) or [rows, hidden], 16-byte aligned; hidden a multiple of the vector
    const Element* d_out;  // [rows, hidden]
    Element* d_pre;        // like pre, written
    int64 rows;
    int32 hidden;
    int32 is_glu;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::MlpActBwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) mlp_act_bwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    for_each_vector<kVector>(p.rows * p.hidden, true, [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float d[kWidth], gate[kWidth];
        load_vector(p.d_out + first, d);
        if (p.is_glu) {
            const int64 at = first + first / p.hidden * p.hidden;
            float value[kWidth];
            load_vector(p.pre + at, value);
            load_vector(p.pre + at + p.hidden, gate);
    #pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const ValueAndDerivative g = gelu_with_derivative(gate[i]);
                gate[i] = d[i] * value[i] * g.derivative;
                value[i] = d[i] * g.value;
            }
            store_vector(p.d_pre + at, value);
            store_vector(p.d_pre + at + p.hidden, gate);
        } else {
            load_vector(p.pre + first, gate);
    #pragma unroll
            for (int i = 0; i < kWidth; ++i) d[i] *= gelu_with_derivative(gate[i]).derivative;
            store_vector(p.d_pre + first, d);
        }
    });
}
