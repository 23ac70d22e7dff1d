// attn_bwd_prep_bf16_d64_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm80
// Generated from templates/kernels/attn_bwd_prep.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd_prep, bf16, head_dim 64, dense, sparsity 0 %, deterministic, sm80;
// block_m 64, block_n 0, groups per CTA 1, consumers 1, stages 0, cluster 1, schedule grid

// Row statistics of the backward and a zeroed accumulator for dQ (query_rows.cuh: prepare_rows), of the heads that attn_bwd
// does not prepare itself; also its counters, zeroed.
//
// Floor: reads out and d_out once and writes the f32 accumulator once, 8 * head_dim bytes a row, at 3 TB/s.
// Registers: under 40. Shared memory: none.
#include "dsv/attention.cuh"
#include "dsv/query_rows.cuh"
#include "dsv/types.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 64;
constexpr int kBlockM = 64;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kParamsBytes = 208;
// END CONFIG

static_assert(kBlockM == dsv::kQueryRows, "a CTA has the rows of one tile");

struct Params {
    dsv::QueryRows rows;
    dsv::AttnSizes sizes;
    dsv::uint32 first_tile;  // of [B, H, Sq_padded / 64]
    dsv::int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

// Grid: as many tiles of 64 query rows.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_prep_bf16_d64_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm80(const __grid_constant__ Params p) {
    if (p.rows.counters != nullptr) {
        const dsv::uint32 counters = 2 * p.sizes.batch * p.sizes.num_kv_heads;
        for (dsv::uint32 i = blockIdx.x * kThreads + threadIdx.x; i < counters; i += gridDim.x * kThreads) p.rows.counters[i] = 0;
    }
    const dsv::QueryTile tile = dsv::QueryTile::of(p.first_tile + blockIdx.x, p.sizes);
    dsv::prepare_rows<Element, kHeadDim, kThreads / 32, 64>(p.rows, p.sizes, tile, dsv::warp_index(), dsv::lane_index());
}
