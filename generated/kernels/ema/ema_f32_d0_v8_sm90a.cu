// ema_f32_d0_v8_sm90a
// Generated from templates/kernels/ema.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// ema, f32, vector 8, sm90a

// Averaged weights: ema = decay ema + (1 - decay) master. Floor: both read, ema written once, 12 bytes a weight.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 32;
// END CONFIG

struct Params {
    const float* master;  // [count]
    float* ema;           // [count], updated
    int64 count;
    float decay;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Ema");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) ema_f32_d0_v8_sm90a(const __grid_constant__ Params p) {
    for_each_vector<kVector>(p.count, is_aligned(p.master) && is_aligned(p.ema), [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float w[kWidth], e[kWidth];
        load_vector(p.master + first, w);
        load_vector(p.ema + first, e);
    #pragma unroll
        for (int i = 0; i < kWidth; ++i) e[i] = p.decay * e[i] + (1.0f - p.decay) * w[i];
        store_vector(p.ema + first, e);
    });
}
