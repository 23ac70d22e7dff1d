// attn_bwd_bf16_d128_qg0_kb0_sp0_m64n64_g1c1s1x1_grid_nondet_sm80
// Generated from templates/kernels/attn_bwd_sm80.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd, bf16, head_dim 128, dense, sparsity 0 %, not deterministic, sm80;
// block_m 64, block_n 64, groups per CTA 1, consumers 1, stages 1, cluster 1, schedule grid

// For a tile of keys, over the query tiles that listed it (all when kQueryGroup is 0), transposed so that keys are rows:
//   P^T = exp2(c K Q^T - LSE log2 e),  dP^T = V dO^T,  dS^T = P^T (dP^T - delta),
//   dV += P^T dO,  dK += scale dS^T Q,  dQ += scale dS K (f32, reduced in global memory; attn_bwd_post applies scale).
//
// Floors: 10 * pairs * head_dim FLOP at 312 TF (A100); per 64 query rows and warp 704 * head_dim bytes from shared memory
// at 128 bytes a clock: about 280 TF with 16 KV rows a warp (A100).
// Registers: dK and dV head_dim, S and dP 64, their operands 32, and about 40 more.
// Shared memory: K and V (dK and dV in the epilogue), Q and dO with row statistics, dS, and dQ on its way out.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/sm80/cp_async.cuh"
#include "dsv/sm80/products.cuh"
#include "dsv/types.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 128;
constexpr int kQueryGroup = 0;  // tokens sharing one list; 0 = dense
constexpr int kKvBlock = 0;        // tokens of one listed unit; 0 = dense
constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kWarpgroups = 1;  // four warps, 64 KV rows each
constexpr int kStages = 1;
constexpr int kThreads = 128;
constexpr int kCtasPerSm = 2;
constexpr int kSmemBytes = 82432;
constexpr int kParamsBytes = 288;
// END CONFIG

constexpr bool kDense = kKvBlock == 0;
constexpr int kWarps = 4 * kWarpgroups;
constexpr int kTilesPerGroup = kDense ? 1 : kQueryGroup / kBlockM;  // query tiles of one listing group
constexpr int kTilesPerBlock = kDense ? 1 : kKvBlock / kBlockN;     // CTAs of one listed block
constexpr int kColumns = kHeadDim / kWarpgroups;                    // of dQ, that a warp makes for its 16 query rows
constexpr int kChunk = 32;                                          // of them in one product
constexpr int kTileBytesKv = kBlockN * kHeadDim * 2;
constexpr int kTileBytesQ = kBlockM * kHeadDim * 2;

static_assert(kBlockM == 64, "the layout of dQ's accumulator");
static_assert(kBlockN == 16 * kWarps, "one mma M of 16 KV rows a warp");
static_assert(kThreads == 32 * kWarps, "every warp computes");
static_assert(kHeadDim % 64 == 0, "whole 128-byte swizzle columns");
static_assert(kStages == 1 || kStages == 2, "the next query tile is loaded into the same or the other stage");
static_assert(kDense || kKvBlock % kBlockN == 0, "a listed block is whole tiles");
static_assert(kDense || kQueryGroup % kBlockM == 0, "a query tile lies within one group");

struct Params {
    dsv::TensorView q;             // [B, Sq, H, D]
    dsv::TensorView d_o;           // [B, Sq, H, D]
    dsv::TensorView k;             // [B, Skv, Hkv, D]
    dsv::TensorView v;             // [B, Skv, Hkv, D]
    dsv::TensorView dk;            // [B, Skv, Hkv, D] out
    dsv::TensorView dv;            // [B, Skv, Hkv, D] out
    const float* lse_log2;         // [B, H, Sq_padded]
    const float* delta;            // [B, H, Sq_padded]
    float* dq_accum;               // [B, H, Sq_padded / 64, D / 8, 128, 4], see reduce_dq
    const dsv::int32* k2q_offset;  // [B, H, N + 1]
    const dsv::int32* k2q_index;   // [B, H, G * max_selected]
    dsv::int32* error_flag;        // [1]
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

struct SharedStorage {
    dsv::uint8 k[kTileBytesKv];  // dK in the epilogue
    dsv::uint8 v[kTileBytesKv];  // dV in the epilogue
    dsv::uint8 q[kStages][kTileBytesQ];
    dsv::uint8 d_o[kStages][kTileBytesQ];
    dsv::uint8 ds[kBlockN * kBlockM * 2];  // dS^T, [KV rows][64 queries]
    float lse_log2[kStages][kBlockM];
    float delta[kStages][kBlockM];
    float dq[kWarps][kChunk / 8 * 128];  // a warp's fragments of one chunk
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "the host asks for other shared memory");

// The query tiles that listed this CTA's KV block, over the query heads that share its KV head, always in the same order.
// Whole warps walk, each for itself. Little is kept across the products: the CTA's place is read again where it is needed.
struct QueryWalk {
    const Params& p;
    int head;         // of the tile walked last
    int last_head;
    int tile;         // walked last, of 64 rows
    int step = 0;     // into this head's tiles
    int steps = 0;    // of this head
    int begin = 0;    // of this block's groups in the head's list
    int fetched = 0;  // lane i holds the i-th of the next 32 groups

    __device__ __forceinline__ explicit QueryWalk(const Params& params) : p(params) {
        const int heads_per_kv = p.sizes.num_heads / p.sizes.num_kv_heads;
        head = dsv::cta_index().y * heads_per_kv;
        last_head = head + heads_per_kv - 1;
        open();
    }

    // Of this head among all sequences' heads.
    __device__ __forceinline__ dsv::int64 slab() const {
        return dsv::int64{dsv::cta_index().z} * p.sizes.num_heads + head;
    }

    __device__ __forceinline__ void open() {
        step = 0;
        if constexpr (kDense) {
            steps = p.sizes.seqlen_q_padded / kBlockM;
        } else {
            const int kv_block = dsv::cta_index().x / kTilesPerBlock;
            const dsv::int32* offset = p.k2q_offset + slab() * (p.sizes.num_kv_blocks + 1) + kv_block;
            begin = offset[0];
            int edges = offset[1] - begin;
            const dsv::int64 width = dsv::int64{p.sizes.num_groups} * p.sizes.max_selected;
            if (begin < 0 || edges < 0 || begin + dsv::int64{edges} > width) {
                if (threadIdx.x % 32 == 0) atomicOr(p.error_flag, dsv::kCountOutOfRange);
                edges = 0;
            }
            steps = edges * kTilesPerGroup;
        }
    }

    // The next tile, or false at the end.
    __device__ __forceinline__ bool next() {
        while (true) {
            if (step == steps) {
                if (head == last_head) return false;
                ++head;
                open();
                continue;
            }
            if constexpr (kDense) {
                tile = step++;
                return true;
            } else {
                const int lane = threadIdx.x % 32;
                const int edge = step / kTilesPerGroup;
                if (step % (32 * kTilesPerGroup) == 0 && edge + lane < steps / kTilesPerGroup) {
                    const dsv::int64 width = dsv::int64{p.sizes.num_groups} * p.sizes.max_selected;
                    fetched = p.k2q_index[slab() * width + begin + edge + lane];
                    if (static_cast<unsigned>(fetched) >= static_cast<unsigned>(p.sizes.num_groups)) {
                        atomicOr(p.error_flag, dsv::kIndexOutOfRange);
                        fetched = p.sizes.num_groups - 1;
                    }
                }
                tile = __shfl_sync(0xFFFFFFFF, fetched, edge % 32) * kTilesPerGroup + step % kTilesPerGroup;
                ++step;
                if (tile < p.sizes.seqlen_q_padded / kBlockM) return true;  // the last group may be short
            }
        }
    }
};

// Adds a warp's 16 x kChunk fragment to the accumulator of one query tile. The accumulator keeps fragments as they are,
// [D / 8][128 threads][4]; attn_bwd_post puts elements in their places. sm80 adds single floats: a detour through shared
// memory gives the 32 of an instruction 128 contiguous bytes.
__device__ __forceinline__ void reduce_dq(float* tile, int first_column, float* room, const float (&dq)[kChunk / 2]) {
    const int lane = threadIdx.x % 32;
    float* target = tile + first_column / 8 * 512 + threadIdx.x / 32 % 4 * 128 + lane;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
        *reinterpret_cast<float4*>(room + 128 * j + 4 * lane) =
            make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target + 512 * j + 32 * i), "f"(room[128 * j + 32 * i + lane])
                         : "memory");
        }
    }
}

// Grid: (ceil(seqlen_kv / kBlockN), num_kv_heads, B), tiles of a head adjacent so that its Q, dO and dQ stay in L2.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_bf16_d128_qg0_kb0_sp0_m64n64_g1c1s1x1_grid_nondet_sm80(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) dsv::uint8 raw[];
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(raw);
    const int3 cta = dsv::cta_index();
    const int first_key = cta.x * kBlockN;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warp_row = 16 * warp;  // of the KV tile
    // Keys of this CTA that exist; only the last tile is short.
    const int valid = p.sizes.seqlen_kv - first_key;

    dsv::load_tile<Element, kBlockN, kHeadDim, kThreads>(smem.k, p.k.at<const Element>(cta.z, 0, cta.y), p.k.stride_seq,
                                                         first_key, p.sizes.seqlen_kv);
    dsv::load_tile<Element, kBlockN, kHeadDim, kThreads>(smem.v, p.v.at<const Element>(cta.z, 0, cta.y), p.v.stride_seq,
                                                         first_key, p.sizes.seqlen_kv);

    QueryWalk walk(p);
    // Takes the next query tile and asks for it; false at the end.
    const auto load_next = [&](int stage) {
        const bool more = walk.next();
        if (more) {
            const int first_row = walk.tile * kBlockM, batch = dsv::cta_index().z;
            dsv::load_tile<Element, kBlockM, kHeadDim, kThreads>(smem.q[stage], p.q.at<const Element>(batch, 0, walk.head),
                                                                 p.q.stride_seq, first_row, p.sizes.seqlen_q);
            dsv::load_tile<Element, kBlockM, kHeadDim, kThreads>(smem.d_o[stage],
                                                                 p.d_o.at<const Element>(batch, 0, walk.head),
                                                                 p.d_o.stride_seq, first_row, p.sizes.seqlen_q);
            if (threadIdx.x < kBlockM / 2) {
                const int at = threadIdx.x % (kBlockM / 4) * 4;
                const dsv::int64 row = walk.slab() * p.sizes.seqlen_q_padded + first_row + at;
                const bool first = threadIdx.x < kBlockM / 4;
                dsv::copy_async(dsv::smem_address(first ? &smem.lse_log2[stage][at] : &smem.delta[stage][at]),
                                (first ? p.lse_log2 : p.delta) + row, true);
            }
        }
        dsv::copy_commit();
        return more;
    };

    float dk[1][kHeadDim / 2];
    float dv[1][kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[0][i] = dv[0][i] = 0.0f;

    bool more = load_next(0);
    int stage = 0;
#pragma unroll 1
    while (more) {
        // This tile is there, and every warp is done with the one before and its dS.
        dsv::copy_wait<0>();
        __syncthreads();
        float* dq_tile =
            p.dq_accum + (walk.slab() * (p.sizes.seqlen_q_padded / kBlockM) + walk.tile) * (kBlockM * kHeadDim);
        if constexpr (kStages == 2) more = load_next(1 - stage);

        float s[1][kBlockM / 2];
        float dp[1][kBlockM / 2];
#pragma unroll
        for (int i = 0; i < kBlockM / 2; ++i) s[0][i] = dp[0][i] = 0.0f;
        dsv::gemm_rows<Element, 1, kBlockM, kHeadDim, kBlockN, kBlockM>(s, dsv::rows_first(smem.k, warp_row),
                                                                       dsv::chunks_first(smem.q[stage], 0));
        dsv::gemm_rows<Element, 1, kBlockM, kHeadDim, kBlockN, kBlockM>(dp, dsv::rows_first(smem.v, warp_row),
                                                                       dsv::chunks_first(smem.d_o[stage], 0));
#pragma unroll
        for (int j = 0; j < kBlockM / 8; ++j) {
            const int column = 8 * j + 2 * (lane % 4);
            const float2 lse = *reinterpret_cast<const float2*>(&smem.lse_log2[stage][column]);
            const float2 delta = *reinterpret_cast<const float2*>(&smem.delta[stage][column]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool exists = warp_row + lane / 4 + 8 * (i / 2) < valid;
                const float exponent = s[0][4 * j + i] * p.sizes.scale_log2 - (i % 2 == 0 ? lse.x : lse.y);
                s[0][4 * j + i] = exists ? dsv::exp2_fast(exponent) : 0.0f;
                dp[0][4 * j + i] = s[0][4 * j + i] * (dp[0][4 * j + i] - (i % 2 == 0 ? delta.x : delta.y));
            }
        }
        dsv::uint32 p_operand[1][kBlockM / 16][4];
        dsv::uint32 ds_operand[1][kBlockM / 16][4];
        dsv::to_operand<Element, kBlockM>(p_operand[0], s[0]);
        dsv::to_operand<Element, kBlockM>(ds_operand[0], dp[0]);
        dsv::write_fragment<kBlockM, kBlockN>(smem.ds, warp_row, ds_operand[0]);
        dsv::gemm_columns<Element, 1, kHeadDim, kBlockM, kBlockM>(dv, p_operand, dsv::rows_first(smem.d_o[stage], 0), 0);
        dsv::gemm_columns<Element, 1, kHeadDim, kBlockM, kBlockM>(dk, ds_operand, dsv::rows_first(smem.q[stage], 0), 0);

        // dS of every warp is there; Q and dO have been read by all, and a lone stage takes the next while dQ is made.
        __syncthreads();
        if constexpr (kStages == 1) more = load_next(0);
        dsv::uint32 ds_rows[1][kBlockN / 16][4];  // dS of the warp's 16 query rows: columns of what was written
        dsv::LaneView ds = dsv::chunks_first(smem.ds, 0);
        ds.chunk ^= 2 * (warp % 4);
#pragma unroll
        for (int k = 0; k < kBlockN / 16; ++k) dsv::load_matrices_transposed(ds_rows[0][k], ds.at<kBlockN>(16 * k, 0));
#pragma unroll 1
        for (int chunk = 0; chunk < kColumns / kChunk; ++chunk) {
            const int column = warp / 4 * kColumns + chunk * kChunk;
            float dq[1][kChunk / 2];
#pragma unroll
            for (int i = 0; i < kChunk / 2; ++i) dq[0][i] = 0.0f;
            dsv::gemm_columns<Element, 1, kChunk, kBlockN, kBlockN>(dq, ds_rows, dsv::rows_first(smem.k, 0), column / 8);
            reduce_dq(dq_tile, column, smem.dq[warp], dq[0]);
        }
        if constexpr (kStages == 2) stage = 1 - stage;
    }

    // K and V, in memory by now even where no query listed them, are read by no one any more: their room carries dK and dV
    // to memory in whole rows, each warp its own.
    dsv::copy_wait<0>();
    __syncthreads();
    const int3 place = dsv::cta_index();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[0][i] *= p.sizes.scale;
    dsv::uint32 packed[kHeadDim / 16][4];
    dsv::to_operand<Element, kHeadDim>(packed, dk[0]);
    dsv::write_fragment<kHeadDim, kBlockN>(smem.k, warp_row, packed);
    dsv::to_operand<Element, kHeadDim>(packed, dv[0]);
    dsv::write_fragment<kHeadDim, kBlockN>(smem.v, warp_row, packed);
    __syncwarp();
    dsv::store_rows<Element, 16, kHeadDim, kBlockN>(smem.k, warp_row, p.dk.at<Element>(place.z, 0, place.y),
                                                   p.dk.stride_seq, place.x * kBlockN, p.sizes.seqlen_kv);
    dsv::store_rows<Element, 16, kHeadDim, kBlockN>(smem.v, warp_row, p.dv.at<Element>(place.z, 0, place.y),
                                                   p.dv.stride_seq, place.x * kBlockN, p.sizes.seqlen_kv);
}
