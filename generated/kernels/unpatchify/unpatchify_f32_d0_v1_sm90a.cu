// unpatchify_f32_d0_v1_sm90a
// Generated from templates/kernels/unpatchify.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// unpatchify, f32, vector 1, sm90a

// Tokens in the contract's order back to latents; the inverse of the patching in flow_prepare.
// Floor: tokens read, latents written once.
#include "dsv/patches.cuh"
#include "dsv/types.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 64;
// END CONFIG

struct Params {
    const int32* order;   // [S]: token -> raster patch index
    const float* tokens;  // [B, S, width]
    float* latents;       // [B, C, T, H, W], written
    Patches patches;
    int32 batch;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Unpatchify");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) unpatchify_f32_d0_v1_sm90a(const __grid_constant__ Params p) {
    const int width = p.patches.width();
    const int64 count = static_cast<int64>(p.patches.tokens()) * width;
    const int b = blockIdx.y;
    float* latents = p.latents + b * p.patches.latent_len();
    const int64 threads = static_cast<int64>(gridDim.x) * kThreads;
    for (int64 e = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x; e < count; e += threads) {
        latents[p.patches.latent_index(p.order[e / width], static_cast<int>(e % width))] = p.tokens[b * count + e];
    }
}
