// axpy_bf16_d0_v8_sm90a
// Generated from templates/kernels/axpy.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// axpy, bf16, vector 8, sm90a

// y += alpha x in f32, rounded once. x may be y. Floor: x and y read, y written once.
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
    Flat x;  // [count]
    Flat y;  // [count], updated
    int64 count;
    float alpha;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Axpy");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) axpy_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    for_each_vector<kVector>(p.count, is_aligned(p.x) && is_aligned(p.y), [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float x[kWidth], y[kWidth];
        load_vector<Element>(p.x, first, x);
        load_vector<Element>(p.y, first, y);
    #pragma unroll
        for (int i = 0; i < kWidth; ++i) y[i] += p.alpha * x[i];
        store_vector<Element>(p.y, first, y);
    });
}
