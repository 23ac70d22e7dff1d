// attn_bwd_post_bf16_d64_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm80
// Generated from templates/kernels/attn_bwd_post.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd_post, bf16, head_dim 64, dense, sparsity 0 %, deterministic, sm80;
// block_m 64, block_n 0, groups per CTA 1, consumers 1, stages 0, cluster 1, schedule grid

// dQ = scale * accumulator, rounded to the input dtype, each element put from the fragment order of attn_bwd into its
// place: group j of 8 columns, thread t and register i of a fragment are row 16 (t / 32) + t % 32 / 4 + 8 (i / 2) and
// column 8 j + 2 (t % 4) + i % 2.
//
// Floor: reads 4 and writes 2 bytes an element at 3 TB/s. Registers: under 40. Shared memory: the tile in the dtype.
#include "dsv/attention.cuh"
#include "dsv/types.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 64;
constexpr int kBlockM = 64;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kParamsBytes = 88;
// END CONFIG

static_assert(kBlockM == 64 && kHeadDim % 16 == 0 && kThreads <= 256, "the layout of dQ's accumulator, in whole passes");

struct Params {
    dsv::TensorView dq;     // [B, Sq, H, D] out
    const float* dq_accum;  // [B, H, Sq_padded / 64, D / 8, 128, 4]
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

constexpr int kPitch = kHeadDim / 2 + 4;  // words a row: 4 more, so that the 8 rows of a quad's column differ in bank

// Grid: (Sq_padded / kBlockM, H, B).
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_post_bf16_d64_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm80(const __grid_constant__ Params p) {
    __shared__ dsv::uint32 tile[kBlockM * kPitch];  // pairs of elements
    // Heads from the last to the first: attn_bwd ended with the last, whose sums L2 still has. Nobody reads them again.
    const int head = gridDim.y - 1 - blockIdx.y;
    const int batch = gridDim.z - 1 - blockIdx.z;
    const int tiles = p.sizes.seqlen_q_padded / kBlockM;
    const dsv::int64 index = (dsv::int64{batch} * p.sizes.num_heads + head) * tiles + blockIdx.x;
    const float4* accum = reinterpret_cast<const float4*>(p.dq_accum + index * (kBlockM * kHeadDim));

#pragma unroll
    for (int i = 0; i < kBlockM * kHeadDim / 4 / kThreads; ++i) {
        const int place = i * kThreads + threadIdx.x;
        const int j = place / 128;
        const int t = place % 128;
        const int row = 16 * (t / 32) + t % 32 / 4;
        const float4 x = __ldcs(accum + place);
        const float scale = p.sizes.scale;
        tile[row * kPitch + 4 * j + t % 4] = dsv::pack2<Element>(x.x * scale, x.y * scale);
        tile[(row + 8) * kPitch + 4 * j + t % 4] = dsv::pack2<Element>(x.z * scale, x.w * scale);
    }
    __syncthreads();
    constexpr int kChunks = kHeadDim / 8;  // 16 bytes each
    constexpr int kPlaces = kBlockM * kChunks;
#pragma unroll
    for (int i = 0; i < (kPlaces + kThreads - 1) / kThreads; ++i) {
        const int place = i * kThreads + threadIdx.x;
        if (kPlaces % kThreads != 0 && place >= kPlaces) break;
        const int row = blockIdx.x * kBlockM + place / kChunks;
        if (row < p.sizes.seqlen_q) {
            const dsv::uint32* from = tile + place / kChunks * kPitch + place % kChunks * 4;
            Element* to = p.dq.at<Element>(batch, row, head) + place % kChunks * 8;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        }
    }
}
