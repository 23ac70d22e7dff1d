// attn_bwd_prep_bf16_d64_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm80
// Generated from templates/kernels/attn_bwd_prep.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd_prep, bf16, head_dim 64, dense, sparsity 0 %, deterministic, sm80;
// block_m 64, block_n 0, groups per CTA 1, consumers 1, stages 0, cluster 1, schedule grid

// Row statistics of the backward: delta = rowsum(out * d_out) - d_lse and LSE in base 2, padded to whole query tiles so
// that attn_bwd loads them blindly, and a zeroed accumulator for dQ. Empty rows and padding get LSE = +inf: P is 0 there.
// Where there are lists, also the order in which attn_bwd takes the KV blocks of a head: the longest list first.
//
// Floor: reads out and d_out once and writes the f32 accumulator once, 8 * head_dim bytes a row, at 3 TB/s.
// Registers: under 40. Shared memory: none.
#include "dsv/attention.cuh"
#include "dsv/types.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 64;
constexpr int kBlockM = 64;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kParamsBytes = 168;
// END CONFIG

constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, one a thread
// A power of two; at head_dim 96, for one, four of 16 threads take part in the sum alone.
constexpr int kThreadsPerRow = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
constexpr int kRowsPerPass = kThreads / kThreadsPerRow;
static_assert(kHeadDim % 16 == 0 && kThreads <= 256, "the accumulator is whole passes");
static_assert(kChunks <= kThreadsPerRow, "a row lies within one warp");
static_assert(kBlockM % kRowsPerPass == 0, "whole passes");

struct Params {
    dsv::TensorView o;    // [B, Sq, H, D]
    dsv::TensorView d_o;  // [B, Sq, H, D]
    const float* lse;     // [B, H, Sq]
    const float* d_lse;   // [B, H, Sq], or null
    float* lse_log2;      // [B, H, Sq_padded] out
    float* delta;         // [B, H, Sq_padded] out
    float* dq_accum;      // [B, H, Sq_padded, D] out: zeros; null where attn_bwd_dq follows
    const dsv::int32* k2q_offset;  // [B, H, N + 1], or null
    dsv::int32* kv_order;          // [B, Hkv, N] out: KV blocks by the length of their lists; null where k2q_offset is
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

// Groups that list a KV block, in all heads that share a KV head.
__device__ __forceinline__ int listed(const dsv::int32* offset, int block, int heads, int blocks) {
    int groups = 0;
#pragma unroll 1
    for (int head = 0; head < heads; ++head, offset += blocks + 1) groups += offset[block + 1] - offset[block];
    return groups;
}

// Puts KV blocks into their places of the order, each CTA of a head every so manieth: a block's place is the number of those
// before it, equal ones by their index. Whatever the offsets are, it is a permutation.
__device__ __forceinline__ void place_blocks(const Params& p, int kv_head, int batch) {
    const int blocks = p.sizes.num_kv_blocks;
    const int heads = p.sizes.num_heads / p.sizes.num_kv_heads;
    const dsv::int64 slab = dsv::int64{batch} * p.sizes.num_kv_heads + kv_head;
    const dsv::int32* offset = p.k2q_offset + slab * heads * (blocks + 1);
#pragma unroll 1
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        const int length = listed(offset, block, heads, blocks);
        int place = 0;
#pragma unroll 1
        for (int first = 0; first < blocks; first += kThreads) {
            const int other = first + threadIdx.x;
            bool before = false;
            if (other < blocks) {
                const int its = listed(offset, other, heads, blocks);
                before = its > length || (its == length && other < block);
            }
            place += __syncthreads_count(before);
        }
        if (threadIdx.x == 0) p.kv_order[slab * blocks + place] = block;
    }
}

// Grid: (Sq_padded / kBlockM, H, B).
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_prep_bf16_d64_qg0_kb0_sp0_m64n0_g1c1s0x1_grid_det_sm80(const __grid_constant__ Params p) {
    // Heads from the last to the first: attn_bwd begins with the first, whose d_out and zeros L2 then has.
    const int head = gridDim.y - 1 - blockIdx.y;
    const int batch = gridDim.z - 1 - blockIdx.z;
    const int lane_in_row = threadIdx.x % kThreadsPerRow;
    const dsv::int64 slab = dsv::int64{batch} * p.sizes.num_heads + head;

    const int shared = p.sizes.num_heads / p.sizes.num_kv_heads;
    if (p.kv_order != nullptr && head % shared == 0) place_blocks(p, head / shared, batch);

    if (p.dq_accum != nullptr) {
        float4* accum = reinterpret_cast<float4*>(p.dq_accum + (slab * p.sizes.seqlen_q_padded + blockIdx.x * kBlockM) * kHeadDim);
#pragma unroll
        for (int i = 0; i < kBlockM * kHeadDim / 4 / kThreads; ++i) accum[i * kThreads + threadIdx.x] = make_float4(0, 0, 0, 0);
    }

#pragma unroll
    for (int pass = 0; pass < kBlockM / kRowsPerPass; ++pass) {
        const int row = blockIdx.x * kBlockM + pass * kRowsPerPass + threadIdx.x / kThreadsPerRow;
        const bool exists = row < p.sizes.seqlen_q;
        float dot = 0.0f;
        if (exists && lane_in_row < kChunks) {
            const uint4 o = __ldcs(reinterpret_cast<const uint4*>(p.o.at<Element>(batch, row, head) + 8 * lane_in_row));
            const uint4 d = *reinterpret_cast<const uint4*>(p.d_o.at<Element>(batch, row, head) + 8 * lane_in_row);
            const dsv::uint32 o4[4] = {o.x, o.y, o.z, o.w};
            const dsv::uint32 d4[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                dot += dsv::unpack_low<Element>(o4[i]) * dsv::unpack_low<Element>(d4[i]);
                dot += dsv::unpack_high<Element>(o4[i]) * dsv::unpack_high<Element>(d4[i]);
            }
        }
#pragma unroll
        for (int step = kThreadsPerRow / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xFFFFFFFF, dot, step);
        if (lane_in_row == 0) {
            float lse = dsv::kInf;
            float delta = 0.0f;
            if (exists) {
                const float natural = p.lse[slab * p.sizes.seqlen_q + row];
                if (natural != -dsv::kInf) {
                    lse = natural * dsv::kLog2E;
                    delta = dot - (p.d_lse != nullptr ? p.d_lse[slab * p.sizes.seqlen_q + row] : 0.0f);
                }
            }
            p.lse_log2[slab * p.sizes.seqlen_q_padded + row] = lse;
            p.delta[slab * p.sizes.seqlen_q_padded + row] = delta;
        }
    }
}
