// silu_fwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/silu_fwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// silu_fwd, bf16, vector 8, sm90a

// out = x sigmoid(x), rounded once. Floor: x read, out written once.
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
    Flat x;    // [count]
    Flat out;  // [count], written
    int64 count;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::SiluFwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) silu_fwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    for_each_vector<kVector>(p.count, is_aligned(p.x) && is_aligned(p.out), [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float x[kWidth];
        load_vector<Element>(p.x, first, x);
    #pragma unroll
        for (int i = 0; i < kWidth; ++i) x[i] *= sigmoid(x[i]);
        store_vector<Element>(p.out, first, x);
    });
}
