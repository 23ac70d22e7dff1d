// attn_bwd_dq_bf16_d128_qg64_kb64_spany_m64n64_g1c1s2x1_grid_det_sm90a
// Generated from templates/kernels/attn_bwd_dq.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd_dq, bf16, head_dim 128, query_group 64, kv_block 64, any sparsity, deterministic, sm90a;
// block_m 64, block_n 64, groups per CTA 1, consumers 1, stages 2, cluster 1, schedule grid

// dQ alone, for a tile of queries over the keys its group lists, so that every sum has a fixed order:
//   P = exp2(c Q K^T - LSE log2 e),  dP = dO V^T,  dS = P (dP - delta),  dQ = scale * sum over tiles of dS K.
//
// Floors: 6 * pairs * head_dim FLOP at 750 TF, and 4 * head_dim bytes a KV token and CTA from L2 at 7 TB/s: with 64
// query rows 96 FLOP a byte, so 670 TF.
// Registers of a consumer: dQ head_dim / 2, S and dP block_n, dS as operand block_n / 4, Q and dO as operands head_dim / 4 each,
// and about 32 more.
// Shared memory: Q (dQ in the epilogue), dO, and the ring of K and V.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/tma.cuh"
#include "dsv/types.cuh"
#include "dsv/wgmma.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 128;
constexpr int kQueryGroup = 64;  // tokens sharing one list; 0 = dense
constexpr int kKvBlock = 64;        // tokens of one listed unit; 0 = dense
constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kConsumers = 1;  // warpgroups of 64 query rows
constexpr int kStages = 2;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kConsumerRegisters = 232;  // 0: left as compiled
constexpr int kProducerRegisters = 24;
constexpr int kSmemBytes = 100352;
constexpr int kParamsBytes = 768;
// END CONFIG

constexpr bool kDense = kKvBlock == 0;
constexpr int kRows = 64;  // query rows of one consumer
constexpr int kConsumerThreads = 128 * kConsumers;
constexpr dsv::uint32 kTileBytesQ = dsv::tile_bytes(kRows, kHeadDim);
constexpr dsv::uint32 kTileBytesKv = dsv::tile_bytes(kBlockN, kHeadDim);

// Products of 64 keys with both operands in shared memory fill its port, 128 bytes a clock: Q, and then dO, wait in registers
// where there are enough.
constexpr int kOperandRegisters = kHeadDim / 4;
constexpr int kSpareRegisters = kConsumerRegisters - (kHeadDim / 2 + kBlockN + kBlockN / 4 + 32);
constexpr bool kQInRegisters = kBlockN == 64 && kSpareRegisters >= kOperandRegisters;
constexpr bool kDoInRegisters = kBlockN == 64 && kSpareRegisters >= 2 * kOperandRegisters;

static_assert(kBlockM == kRows * kConsumers, "one wgmma M of 64 rows a consumer");
static_assert(kHeadDim % 16 == 0, "whole K steps of the products");
static_assert(kStages > 1, "K of the tile before is read while the next K arrives");
static_assert(kDense || kKvBlock % kBlockN == 0, "a listed block is whole tiles");
static_assert(kDense || kQueryGroup % kBlockM == 0, "a CTA lies within one group");

struct Params {
    dsv::TensorMap map_q;         // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_do;        // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_k;         // [B, Skv, Hkv, D], box kBlockN rows
    dsv::TensorMap map_v;         // [B, Skv, Hkv, D], box kBlockN rows
    dsv::TensorMap map_dq;        // [B, Sq, H, D], box 64 rows
    const float* lse_log2;        // [B, H, Sq_padded]
    const float* delta;           // [B, H, Sq_padded]
    const dsv::int32* q2k_index;  // [B, H, G, max_selected]
    const dsv::int32* q2k_count;  // [B, H, G]
    dsv::int32* error_flag;       // [1]
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

struct SharedStorage {
    dsv::uint8 q[kConsumers][kTileBytesQ];  // dQ in the epilogue
    dsv::uint8 d_o[kConsumers][kTileBytesQ];
    dsv::uint8 k[kStages][kTileBytesKv];
    dsv::uint8 v[kStages][kTileBytesKv];
    dsv::uint64 full_q;
    dsv::uint64 full_k[kStages], empty_k[kStages];
    dsv::uint64 full_v[kStages], empty_v[kStages];
};
static_assert(sizeof(SharedStorage) + 1024 <= kSmemBytes, "shared memory with slack to align it");

// Named barriers: one for each consumer's epilogue.
constexpr int kEpilogueBarrier = 1;

using Walk = dsv::KvWalk<kQueryGroup, kKvBlock, kBlockN>;

__device__ __forceinline__ void produce(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int first_row = cta.x * kBlockM, head = cta.y, batch = cta.z;
    Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);
    const int kv_head = head / (p.sizes.num_heads / p.sizes.num_kv_heads);
    const bool leader = threadIdx.x % 32 == 0;
    if (walk.tiles == 0) return;
    if (leader) {
        dsv::mbarrier_arrive_expect(&smem.full_q, 2 * kConsumers * kTileBytesQ);
        for (int c = 0; c < kConsumers; ++c) {
            dsv::tma_load_tile<kHeadDim, kRows>(smem.q[c], &p.map_q, &smem.full_q, first_row + c * kRows, head, batch);
            dsv::tma_load_tile<kHeadDim, kRows>(smem.d_o[c], &p.map_do, &smem.full_q, first_row + c * kRows, head, batch);
        }
    }
    dsv::RingState<kStages> ring;
#pragma unroll 1
    for (int t = 0; t < walk.tiles; ++t) {
        const int start = walk.tile_start(t);
        if (leader) {
            // V first: its stage is free one product earlier than K's, which dQ still reads.
            dsv::mbarrier_wait(&smem.empty_v[ring.index], ring.phase ^ 1);
            dsv::mbarrier_arrive_expect(&smem.full_v[ring.index], kTileBytesKv);
            dsv::tma_load_tile<kHeadDim, kBlockN>(smem.v[ring.index], &p.map_v, &smem.full_v[ring.index], start, kv_head,
                                                  batch);
            dsv::mbarrier_wait(&smem.empty_k[ring.index], ring.phase ^ 1);
            dsv::mbarrier_arrive_expect(&smem.full_k[ring.index], kTileBytesKv);
            dsv::tma_load_tile<kHeadDim, kBlockN>(smem.k[ring.index], &p.map_k, &smem.full_k[ring.index], start, kv_head,
                                                  batch);
        }
        ring.advance();
        __syncwarp();
    }
}

__device__ __forceinline__ void consume(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int first_row = cta.x * kBlockM, head = cta.y, batch = cta.z;
    const int consumer = dsv::warpgroup_index();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const int row0 = first_row + consumer * kRows;
    const Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);
    const float scale_log2 = p.sizes.scale_log2;

    float dq[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq[i] = 0.0f;

    // A consumer wholly past the padded sequence has nothing to do, but must keep the ring turning.
    float lse_log2[2] = {dsv::kInf, dsv::kInf};
    float delta[2] = {0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = row0 + 16 * warp + lane / 4 + 8 * r;
        if (row < p.sizes.seqlen_q_padded) {
            const dsv::int64 at = (dsv::int64{batch} * p.sizes.num_heads + head) * p.sizes.seqlen_q_padded + row;
            lse_log2[r] = p.lse_log2[at];
            delta[r] = p.delta[at];
        }
    }

    if (walk.tiles > 0) {
        int valid = walk.valid_in_first(p.sizes.seqlen_kv);
        dsv::RingState<kStages> ring;       // of the scores
        dsv::uint32 previous_stage = 0;     // whose K the pending dQ reads
        float s[kBlockN / 2];
        float dp[kBlockN / 2];
        dsv::uint32 ds_operand[kBlockN / 16][4];
        const auto release = [&](dsv::uint64* barrier) {
            if (lane == 0) dsv::mbarrier_arrive(barrier);
        };
        dsv::uint32 q[kHeadDim / 16][4], d_o[kHeadDim / 16][4];
        const auto wait_for_values = [&] { dsv::mbarrier_wait(&smem.full_v[ring.index], ring.phase); };
        const auto issue_scores = [&] {
            dsv::mbarrier_wait(&smem.full_k[ring.index], ring.phase);
            dsv::wgmma_fence();
            if constexpr (kQInRegisters) {
                dsv::gemm_rs_kk<Element, kBlockN, kHeadDim, kBlockN>(s, q, smem.k[ring.index]);
            } else {
                dsv::gemm_ss_kk<Element, kBlockN, kHeadDim, kRows, kBlockN>(s, smem.q[consumer], smem.k[ring.index]);
            }
            dsv::wgmma_commit();
            dsv::wgmma_fence();
            if constexpr (kDoInRegisters) {
                dsv::gemm_rs_kk<Element, kBlockN, kHeadDim, kBlockN>(dp, d_o, smem.v[ring.index]);
            } else {
                dsv::gemm_ss_kk<Element, kBlockN, kHeadDim, kRows, kBlockN>(dp, smem.d_o[consumer], smem.v[ring.index]);
            }
            dsv::wgmma_commit();
        };
        const auto issue_dq = [&](dsv::uint32 stage) {
            dsv::pin(dq);
            dsv::wgmma_fence();
            dsv::gemm_rs_mn<Element, kHeadDim, kBlockN>(dq, ds_operand, smem.k[stage]);
            dsv::wgmma_commit();
        };
        // S and dP become dS, in dp.
        const auto finish_scores = [&](int tile) {
            release(&smem.empty_v[ring.index]);
#pragma unroll
            for (int i = 0; i < kBlockN / 2; ++i) {
                const float probability = dsv::exp2_fast(s[i] * scale_log2 - lse_log2[i / 2 % 2]);
                dp[i] = probability * (dp[i] - delta[i / 2 % 2]);
            }
            if (tile < Walk::kTilesPerBlock && valid < kBlockN) dsv::mask_tail<kBlockN>(dp, valid, 0.0f);
            valid += kBlockN;
        };

        dsv::mbarrier_wait(&smem.full_q, 0);
        if constexpr (kQInRegisters) dsv::load_fragment<kHeadDim, kRows>(q, smem.q[consumer], 0);
        if constexpr (kDoInRegisters) dsv::load_fragment<kHeadDim, kRows>(d_o, smem.d_o[consumer], 0);
        wait_for_values();
        issue_scores();
        dsv::wgmma_wait<0>();
        dsv::pin(s);
        dsv::pin(dp);
        finish_scores(0);
        dsv::to_operand<Element, kBlockN>(ds_operand, dp);
        previous_stage = ring.index;
        ring.advance();
        if (walk.tiles > 1) wait_for_values();
        for (int t = 1; t < walk.tiles; ++t) {
            issue_scores();
            issue_dq(previous_stage);
            // dQ of the tile before runs under this tile's exponentials.
            dsv::wgmma_wait<1>();
            dsv::pin(s);
            dsv::pin(dp);
            finish_scores(t);
            dsv::pin(dp);
            const dsv::uint32 stage = ring.index;
            ring.advance();
            // The next V is awaited here because the loop of that wait keeps the compiler from moving the exponentials
            // behind the wait for dQ, where no product would run under them. Not the next K: with two stages it comes
            // only when this dQ is done.
            if (t + 1 < walk.tiles) wait_for_values();
            dsv::wgmma_wait<0>();
            dsv::pin(dq);
            release(&smem.empty_k[previous_stage]);
            dsv::to_operand<Element, kBlockN>(ds_operand, dp);
            previous_stage = stage;
        }
        issue_dq(previous_stage);
        dsv::wgmma_wait<0>();
        dsv::pin(dq);
    }

#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq[i] *= p.sizes.scale;
    dsv::uint32 packed[kHeadDim / 16][4];
    dsv::to_operand<Element, kHeadDim>(packed, dq);
    dsv::store_fragment<kHeadDim, kRows>(smem.q[consumer], 0, packed);
    dsv::fence_async_proxy();
    dsv::named_sync(kEpilogueBarrier + consumer, 128);
    if (threadIdx.x % 128 == 0 && row0 < p.sizes.seqlen_q) {
        dsv::tma_store_tile<kHeadDim, kRows>(&p.map_dq, smem.q[consumer], row0, head, batch);
        dsv::bulk_commit();
        dsv::bulk_wait_read();
    }
}

// Grid: (ceil(seqlen_q / kBlockM), H, B), tiles of a head adjacent so that its K and V stay in L2.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_dq_bf16_d128_qg64_kb64_spany_m64n64_g1c1s2x1_grid_det_sm90a(const __grid_constant__ Params p) {
    // Swizzle atoms are 1024 bytes; a driver that aligned shared memory less would have to be told from here.
    extern __shared__ __align__(1024) dsv::uint8 raw[];
    if (dsv::smem_address(raw) % 1024 != 0) __trap();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(raw);

    if (threadIdx.x == 0) {
        dsv::mbarrier_init(&smem.full_q, 1);
        for (int i = 0; i < kStages; ++i) {
            dsv::mbarrier_init(&smem.full_k[i], 1);
            dsv::mbarrier_init(&smem.full_v[i], 1);
            dsv::mbarrier_init(&smem.empty_k[i], kConsumerThreads / 32);
            dsv::mbarrier_init(&smem.empty_v[i], kConsumerThreads / 32);
        }
        dsv::mbarrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x >= kConsumerThreads) {
        dsv::registers_shrink<kProducerRegisters>();
        if (threadIdx.x < kConsumerThreads + 32) produce(p, smem);
    } else {
        dsv::registers_grow<kConsumerRegisters>();
        consume(p, smem);
    }
}
