// normal_f32_d0_v1_sm90a
// Generated from templates/kernels/normal.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// normal, f32, vector 1, sm90a

// Standard normal values from a key: the noise of flow_prepare. Floor: dst written once.
#include "dsv/philox.cuh"
#include "dsv/types.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 24;
// END CONFIG

struct Params {
    const uint32* keys;  // [2]
    float* dst;          // [count], written
    int64 count;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Normal");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) normal_f32_d0_v1_sm90a(const __grid_constant__ Params p) {
    const int64 threads = static_cast<int64>(gridDim.x) * kThreads;
    for (int64 quad = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x; 4 * quad < p.count; quad += threads) {
        float noise[4];
        normal4(static_cast<uint32>(quad), p.keys[0], p.keys[1], noise);
    #pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (4 * quad + i < p.count) p.dst[4 * quad + i] = noise[i];
        }
    }
}
