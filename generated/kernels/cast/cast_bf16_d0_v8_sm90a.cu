// cast_bf16_d0_v8_sm90a
// Generated from templates/kernels/cast.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// cast, bf16, vector 8, sm90a

// dst = src, converting between f32 and the compute dtype (to nearest even). Floor: src read, dst written once.
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
    Flat src;  // [count]
    Flat dst;  // [count], written
    int64 count;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Cast");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) cast_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    for_each_vector<kVector>(p.count, is_aligned(p.src) && is_aligned(p.dst), [&](auto width, int64 first) {
        float x[decltype(width)::value];
        load_vector<Element>(p.src, first, x);
        store_vector<Element>(p.dst, first, x);
    });
}
