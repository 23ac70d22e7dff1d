// silu_bwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/silu_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// silu_bwd, bf16, vector 8, sm90a

// d_x = d_out silu'(x), silu'(x) = s (1 + x (1 - s)), s = sigmoid(x). d_x may be d_out.
// Floor: x and d_out read, d_x written once.
#include "dsv/math.cuh"
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
    Flat x;      // [count]
    Flat d_out;  // [count]
    Flat d_x;    // [count], written
    int64 count;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::SiluBwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) silu_bwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const bool aligned = is_aligned(p.x) && is_aligned(p.d_out) && is_aligned(p.d_x);
    for_each_vector<kVector>(p.count, aligned, [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float x[kWidth], d[kWidth];
        load_vector<Element>(p.x, first, x);
        load_vector<Element>(p.d_out, first, d);
    #pragma unroll
        for (int i = 0; i < kWidth; ++i) d[i] *= silu_derivative(x[i]);
        store_vector<Element>(p.d_x, first, d);
    });
}
