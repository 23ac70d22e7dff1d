// attn_bwd_post_kv_bf16_d96_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm90a
// Generated from templates/kernels/attn_bwd_post_kv.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd_post_kv, bf16, head_dim 96, dense, sparsity 0 %, deterministic, sm90a;
// block_m 64, block_n 0, groups per CTA 1, consumers 1, stages 0, cluster 1, schedule grid

// dK = scale * its sums, and dV = its sums, rounded to the input dtype, each element put from the order of
// dsv/gather/accumulator.cuh into its place.
//
// Floor: reads 8 and writes 4 bytes an element of K at 3 TB/s. Registers: about 80, for eight loads in flight. Shared
// memory: the tile in the dtype.
#include "dsv/attention.cuh"
#include "dsv/gather/accumulator.cuh"
#include "dsv/types.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 96;
constexpr int kBlockN = 64;  // tokens of a CTA
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kParamsBytes = 120;
// END CONFIG

using Accumulator = dsv::Accumulator<kHeadDim>;
static_assert(kBlockN == dsv::kAccumulatorTokens, "the sums are padded to whole tiles");

struct Params {
    dsv::TensorView dk;      // [B, Skv, Hkv, D] out
    dsv::TensorView dv;      // [B, Skv, Hkv, D] out
    float* dkv_accum;        // [B, Hkv, Skv_padded / 8, 2, D / 16, 8, 16]; read
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

constexpr int kPitch = kHeadDim / 2 + 4;  // words a row: 4 more, so that the 8 rows of a quad's column differ in bank

// Grid: (ceil(Skv / kBlockN), Hkv, B).
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_post_kv_bf16_d96_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm90a(const __grid_constant__ Params p) {
    __shared__ dsv::uint32 tile[kBlockN * kPitch];  // pairs of elements
    const int kv_head = blockIdx.y;
    const int batch = blockIdx.z;
    const Accumulator accumulator(p.dkv_accum, p.sizes, kv_head, batch);
    const float4* units = reinterpret_cast<const float4*>(accumulator.head) +
                          dsv::int64{blockIdx.x} * (kBlockN / 8 * 2 * Accumulator::kHalf / 4);

#pragma unroll 1
    for (int which = 0; which < 2; ++which) {  // dK, dV
        const float scale = which == 0 ? p.sizes.scale : 1.0f;
        const dsv::TensorView& out = which == 0 ? p.dk : p.dv;
        constexpr int kUnit = Accumulator::kHalf / 4;  // float4
#pragma unroll
        for (int i = 0; i < kBlockN / 8 * kUnit / kThreads; ++i) {
            const int place = i * kThreads + threadIdx.x;
            const int rest = place % kUnit;
            const float4 x = units[(place / kUnit * 2 + which) * kUnit + rest];
            const int row = place / kUnit * 8 + rest % 32 / 4;
            dsv::uint32* to = tile + row * kPitch + rest / 32 * 8 + rest % 4;
            to[0] = dsv::pack2<Element>(x.x * scale, x.y * scale);
            to[4] = dsv::pack2<Element>(x.z * scale, x.w * scale);
        }
        __syncthreads();
        constexpr int kChunks = kHeadDim / 8;  // 16 bytes each
        constexpr int kPlaces = kBlockN * kChunks;
#pragma unroll
        for (int i = 0; i < (kPlaces + kThreads - 1) / kThreads; ++i) {
            const int place = i * kThreads + threadIdx.x;
            if (kPlaces % kThreads != 0 && place >= kPlaces) break;
            const int row = blockIdx.x * kBlockN + place / kChunks;
            if (row < p.sizes.seqlen_kv) {
                const dsv::uint32* from = tile + place / kChunks * kPitch + place % kChunks * 4;
                Element* to = out.at<Element>(batch, row, kv_head) + place % kChunks * 8;
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            }
        }
        __syncthreads();
    }
}
