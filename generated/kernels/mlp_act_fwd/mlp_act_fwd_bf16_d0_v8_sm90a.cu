// mlp_act_fwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/mlp_act_fwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// mlp_act_fwd, bf16, vector 8, sm90a

// Activation of the MLP: GeGLU out[r, j] = pre[r, j] gelu(pre[r, hidden + j]), or GELU out = gelu(pre), tanh form.
// Floor: pre read, out written once.
#include "dsv/math.cuh"
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 32;
// END CONFIG

struct Params {
    const Element* pre;  // [rows, 2 hidden] (GeGLU) or [rows, hidden], 16-byte aligned; hidden a multiple of the vector
    Element* out;        // [rows, hidden], written
    int64 rows;
    int32 hidden;
    int32 is_glu;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::MlpActFwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) mlp_act_fwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    for_each_vector<kVector>(p.rows * p.hidden, true, [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float gate[kWidth];
        if (p.is_glu) {
            const Element* pre = p.pre + first + first / p.hidden * p.hidden;
            float value[kWidth];
            load_vector(pre, value);
            load_vector(pre + p.hidden, gate);
    #pragma unroll
            for (int i = 0; i < kWidth; ++i) gate[i] = value[i] * gelu(gate[i]);
        } else {
            load_vector(p.pre + first, gate);
    #pragma unroll
            for (int i = 0; i < kWidth; ++i) gate[i] = gelu(gate[i]);
        }
        store_vector(p.out + first, gate);
    });
}
