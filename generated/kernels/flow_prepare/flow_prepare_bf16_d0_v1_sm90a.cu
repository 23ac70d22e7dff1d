// flow_prepare_bf16_d0_v1_sm90a
// Generated from templates/kernels/flow_prepare.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// flow_prepare, bf16, vector 1, sm90a

// Patches of a latent video in the contract's token order, noised for flow matching, and the velocity to learn:
//   x0 = patch values;  x_t = (1 - t_b) x0 + t_b noise;  target = noise - x0
// noise is counter-based: a value depends on the sequence's key and on its patch and column alone, not on the token order.
// Floor: latents read; x_t and target written once. A thread makes four consecutive elements: one Philox block where the width
// is a multiple of four.
#include "dsv/patches.cuh"
#include "dsv/philox.cuh"
#include "dsv/types.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 88;
// END CONFIG

struct Params {
    const float* latents;  // [B, C, T, H, W]
    const int32* order;    // [S]: token -> raster patch index
    const float* t;        // [B]
    const uint32* keys;    // [B, 2]
    Element* x_t;          // [B, S, width], written
    float* target;         // [B, S, width], written
    Patches patches;
    int32 batch;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::FlowPrepare");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) flow_prepare_bf16_d0_v1_sm90a(const __grid_constant__ Params p) {
    const int width = p.patches.width();
    const int64 count = static_cast<int64>(p.patches.tokens()) * width;
    const int b = blockIdx.y;
    const float t = p.t[b];
    const float* latents = p.latents + b * p.patches.latent_len();
    const int64 threads = static_cast<int64>(gridDim.x) * kThreads;
    for (int64 quad = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x; 4 * quad < count; quad += threads) {
        float block[4];
        int64 made = -1;
    #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64 e = 4 * quad + i;
            if (e < count) {
                const int raster = p.order[e / width];
                const int column = static_cast<int>(e % width);
                const int64 place = static_cast<int64>(raster) * width + column;
                if (place / 4 != made) {
                    made = place / 4;
                    normal4(static_cast<uint32>(made), p.keys[2 * b], p.keys[2 * b + 1], block);
                }
                const int at = static_cast<int>(place % 4);
                // Selected, not indexed: the block stays in registers.
                const float noise = at < 2 ? (at == 0 ? block[0] : block[1]) : (at == 2 ? block[2] : block[3]);
                const float x0 = latents[p.patches.latent_index(raster, column)];
                p.x_t[b * count + e] = from_float<Element>((1.0f - t) * x0 + t * noise);
                p.target[b * count + e] = noise - x0;
            }
        }
    }
}
