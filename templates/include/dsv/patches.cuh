// A latent video cut into patches: sizes, and where a token's value lies in the latents.
#pragma once
#include "dsv/types.cuh"

namespace dsv {

struct Patches {
    int32 channels;
    int32 latent[3];  // frames, rows, columns
    int32 patch[3];   // sides of a patch; each divides its latent side
    int32 reserved;

    __device__ __forceinline__ int tokens() const {
        return latent[0] / patch[0] * (latent[1] / patch[1]) * (latent[2] / patch[2]);
    }
    __device__ __forceinline__ int width() const { return channels * patch[0] * patch[1] * patch[2]; }
    __device__ __forceinline__ int64 latent_len() const {
        return static_cast<int64>(channels) * latent[0] * latent[1] * latent[2];
    }
    // `raster` is the patch's index in frames, rows, columns; `column` counts [channel, t, h, w] within it.
    __device__ __forceinline__ int64 latent_index(int raster, int column) const {
        const int grid_h = latent[1] / patch[1];
        const int grid_w = latent[2] / patch[2];
        const int w = column % patch[2];
        const int h = column / patch[2] % patch[1];
        const int t = column / (patch[2] * patch[1]) % patch[0];
        const int channel = column / (patch[2] * patch[1] * patch[0]);
        const int at_t = raster / (grid_h * grid_w) * patch[0] + t;
        const int at_h = raster / grid_w % grid_h * patch[1] + h;
        const int at_w = raster % grid_w * patch[2] + w;
        return ((static_cast<int64>(channel) * latent[0] + at_t) * latent[1] + at_h) * latent[2] + at_w;
    }
};
static_assert(sizeof(Patches) == 32, "mirrors dsv_spec::params::Patches");

}  // namespace dsv
