// attn_bwd_bf16_d96_qg128_kb8_spany_m128n128_g1c2s2x1_grid_nondet_sm90a
// Generated from templates/kernels/attn_bwd_gather.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd, bf16, head_dim 96, query_group 128, kv_block 8, any sparsity, not deterministic, sm90a;
// block_m 128, block_n 128, groups per CTA 1, consumers 2, stages 2, cluster 1, schedule grid

// For a tile of queries, over the keys its group lists in units smaller than a tile (kKvBlock tokens), gathered into tiles
// of kBlockN tokens; transposed so that keys are rows:
//   P^T = exp2(c K Q^T - LSE log2 e),  dP^T = V dO^T,  dS^T = P^T (dP^T - delta),  dQ += dS K (in registers),
//   dV += P^T dO,  dK += dS^T Q (f32, reduced in global memory; attn_bwd_post_kv rounds them, and scales dK).
//
// Floors: 10 * pairs * head_dim FLOP at 750 TF; from and to L2 a listed token costs 4 * head_dim bytes of K and V at
// 7 TB/s and 8 * head_dim bytes of f32 sums at 3.3 TB/s, so about 214 TF with 64 query rows, 427 TF with 128.
// Registers of a consumer: dQ head_dim / 2, S and dP block_m, later P and dS as operands block_m / 2 and two chunks of dV
// or dK 64; with 128 rows and head_dim 128 about 225.
// Shared memory: Q (dQ in the epilogue), dO and their statistics, the rings of K and V, and dS.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/gather/accumulator.cuh"
#include "dsv/gather/load.cuh"
#include "dsv/gather/tile.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/tma.cuh"
#include "dsv/types.cuh"
#include "dsv/wgmma.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 96;
constexpr int kQueryGroup = 128;  // tokens sharing one list
constexpr int kKvBlock = 8;        // tokens of one listed unit; 1 = tokens
constexpr int kBlockM = 128;
constexpr int kBlockN = 128;
constexpr int kConsumers = 2;  // warpgroups of 64 KV rows, and of 64 rows of dQ
constexpr int kStages = 2;        // of K; V is read by one product early in a step and has one stage less
constexpr int kThreads = 384;
constexpr int kCtasPerSm = 1;
constexpr int kConsumerRegisters = 232;  // 0: left as compiled
constexpr int kProducerRegisters = 40;
constexpr int kSmemBytes = 199680;
constexpr int kParamsBytes = 832;
// END CONFIG

constexpr int kRows = 64;
constexpr int kConsumerThreads = 128 * kConsumers;
constexpr dsv::uint32 kTileBytesQ = dsv::tile_bytes(kBlockM, kHeadDim);
constexpr dsv::uint32 kTileBytesKv = dsv::tile_bytes(kBlockN, kHeadDim);
constexpr int kChunks = dsv::slabs(kHeadDim);  // dV and dK are made, and leave, slab by slab

static_assert(kBlockN == kRows * kConsumers, "one wgmma M of 64 KV rows a consumer");
static_assert(kBlockM == kRows * kConsumers, "one wgmma M of 64 rows of dQ a consumer");
static_assert(kStages > 1, "K of the tile before is read while the next K arrives");
static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128, "whole K steps, and dQ of 64 rows in registers");
static_assert(kQueryGroup % kBlockM == 0, "a CTA lies within one group");

struct Params {
    dsv::TensorMap map_q;         // [B, Sq, H, D], box kBlockM rows
    dsv::TensorMap map_do;        // [B, Sq, H, D], box kBlockM rows
    dsv::TensorMap map_k;         // [B, Skv, Hkv, D], box 8 rows; unused for tokens
    dsv::TensorMap map_v;         // [B, Skv, Hkv, D], box 8 rows; unused for tokens
    dsv::TensorMap map_dq;        // [B, Sq, H, D], box 64 rows
    dsv::TensorView k;            // [B, Skv, Hkv, D]
    dsv::TensorView v;            // [B, Skv, Hkv, D]
    const float* lse_log2;        // [B, H, Sq_padded]
    const float* delta;           // [B, H, Sq_padded]
    float* dkv_accum;             // [B, Hkv, Skv_padded / 8, 2, D / 16, 8, 16], see dsv/gather/accumulator.cuh
    const dsv::int32* q2k_index;  // [B, H, G, max_selected]
    const dsv::int32* q2k_count;  // [B, H, G]
    dsv::int32* error_flag;       // [1]
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

struct SharedStorage {
    dsv::uint8 q[kTileBytesQ];  // dQ in the epilogue
    dsv::uint8 d_o[kTileBytesQ];
    dsv::uint8 k[kStages][kTileBytesKv];
    dsv::uint8 v[kStages - 1][kTileBytesKv];
    dsv::uint8 ds[kBlockN * kBlockM * 2];  // dS^T: [queries / 64][KV rows][64 queries]
    alignas(16) float lse_log2[kBlockM];
    alignas(16) float delta[kBlockM];
    dsv::uint64 full_q;
    dsv::uint64 full_k[kStages], empty_k[kStages];
    dsv::uint64 full_v[kStages - 1], empty_v[kStages - 1];
};
static_assert(sizeof(SharedStorage) + 1024 <= kSmemBytes, "shared memory with slack to align it");

// Named barriers: all consumers before dS is overwritten, on a written dS, and before the epilogue; then each consumer on
// its written dQ.
constexpr int kDsFreeBarrier = 1;
constexpr int kDsFullBarrier = 2;
constexpr int kEpilogueBarrier = 3;

using Gather = dsv::Gather<Element, kHeadDim, kQueryGroup, kKvBlock, kBlockN>;
using Walk = Gather::Walk;
using QueryTile = dsv::PlainTile<kBlockM>;
using ScoreTile = dsv::PlainTile<kBlockN>;

// Feeds Q and dO once, then K and V tile by tile. Ids are read one tile ahead.
__device__ __forceinline__ void produce(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int first_row = cta.x * kBlockM, head = cta.y, batch = cta.z;
    const Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);
    const int kv_head = head / (p.sizes.num_heads / p.sizes.num_kv_heads);
    if (walk.tiles == 0) return;
    if (threadIdx.x == kConsumerThreads) {
        dsv::mbarrier_arrive_expect(&smem.full_q, 2 * kTileBytesQ);
        dsv::tma_load_tile<kHeadDim, kBlockM>(smem.q, &p.map_q, &smem.full_q, first_row, head, batch);
        dsv::tma_load_tile<kHeadDim, kBlockM>(smem.d_o, &p.map_do, &smem.full_q, first_row, head, batch);
    }
    __syncwarp();

    dsv::RingState<kStages> ring_k;
    dsv::RingState<kStages - 1> ring_v;
    int next = Gather::fetch(walk, 0, p.sizes.seqlen_kv);
#pragma unroll 1
    for (int t = 0; t < walk.tiles; ++t) {
        const int fetched = next;
        if (t + 1 < walk.tiles) next = Gather::fetch(walk, t + 1, p.sizes.seqlen_kv);
        dsv::mbarrier_wait(&smem.empty_k[ring_k.index], ring_k.phase ^ 1);
        Gather::load(smem.k[ring_k.index], {&p.map_k, &p.k}, &smem.full_k[ring_k.index], fetched, kv_head, batch);
        ring_k.advance();
        dsv::mbarrier_wait(&smem.empty_v[ring_v.index], ring_v.phase ^ 1);
        Gather::load(smem.v[ring_v.index], {&p.map_v, &p.v}, &smem.full_v[ring_v.index], fetched, kv_head, batch);
        ring_v.advance();
    }
}

__device__ __forceinline__ void consume(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int first_row = cta.x * kBlockM, head = cta.y, batch = cta.z;
    const int consumer = dsv::warpgroup_index();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);
    const float scale_log2 = p.sizes.scale_log2;

    float dq[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq[i] = 0.0f;

    if (walk.tiles > 0) {
        if (threadIdx.x < kBlockM) {
            const dsv::int64 row = (dsv::int64{batch} * p.sizes.num_heads + head) * p.sizes.seqlen_q_padded + first_row;
            smem.lse_log2[threadIdx.x] = p.lse_log2[row + threadIdx.x];
            smem.delta[threadIdx.x] = p.delta[row + threadIdx.x];
        }
        const int valid = walk.valid_in_first(p.sizes.seqlen_kv);
        const int my_row = consumer * kRows + 16 * warp + lane / 4;  // of keys, in the tile; and 8 further
        const int kv_head = head / (p.sizes.num_heads / p.sizes.num_kv_heads);
        const dsv::Accumulator<kHeadDim> accumulator(p.dkv_accum, p.sizes, kv_head, batch);
        constexpr dsv::uint32 kMyRows = kRows / 8 * Gather::Tile::kGroup;  // bytes of a consumer's rows of K or V

        const auto release = [&](dsv::uint64* barrier) {
            if (lane == 0) dsv::mbarrier_arrive(barrier);
        };
        dsv::mbarrier_wait(&smem.full_q, 0);
        dsv::named_sync(kDsFullBarrier, kConsumerThreads);  // the statistics

        dsv::RingState<kStages> ring_k;
        dsv::RingState<kStages - 1> ring_v;
        float s[kBlockM / 2];  // of the next tile while sums of this one leave
        const auto issue_scores = [&](int stage) {
            dsv::pin(s);
            dsv::wgmma_fence();
            dsv::product_of_rows<Element, kBlockM, kHeadDim, Gather::Tile, QueryTile>(s, smem.k[stage] + consumer * kMyRows,
                                                                                     smem.q);
            dsv::wgmma_commit();
        };
        // Of tokens the values too: one fence for both, while few sums are under way that it may have to wait for.
        const auto acquire_tile = [&] {
            if constexpr (Gather::kByToken) dsv::mbarrier_wait(&smem.full_v[ring_v.index], ring_v.phase);
            Gather::acquire(&smem.full_k[ring_k.index], ring_k.phase);
        };
        acquire_tile();
        issue_scores(0);
        dsv::wgmma_wait<0>();
        dsv::pin(s);
        for (int t = 0; t < walk.tiles; ++t) {
            // Where the sums of this thread's two rows of keys go; null past the list.
            float* sums[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = my_row + 8 * r;
                const int start = walk.unit_start(walk.first_place(t) + row / kKvBlock, -1);
                sums[r] = start < 0 ? nullptr : accumulator.of(start + row % kKvBlock);
            }

            const int stage = ring_k.index;
            ring_k.advance();
            float dp[kBlockM / 2];
            dsv::uint32 p_operand[kBlockM / 16][4];
            dsv::uint32 ds_operand[kBlockM / 16][4];
            dsv::mbarrier_wait(&smem.full_v[ring_v.index], ring_v.phase);
            dsv::wgmma_fence();
            dsv::product_of_rows<Element, kBlockM, kHeadDim, Gather::Tile, QueryTile>(
                dp, smem.v[ring_v.index] + consumer * kMyRows, smem.d_o);
            dsv::wgmma_commit();

            // S becomes P; keys past the list or the sequence get zeros.
#pragma unroll
            for (int j = 0; j < kBlockM / 8; ++j) {
                const float2 lse = *reinterpret_cast<const float2*>(&smem.lse_log2[8 * j + 2 * (lane % 4)]);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[4 * j + i] = dsv::exp2_fast(s[4 * j + i] * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
                }
            }
            if (t == 0 && valid < kBlockN) {
#pragma unroll
                for (int i = 0; i < kBlockM / 2; ++i) {
                    if (my_row + i / 2 % 2 * 8 >= valid) s[i] = 0.0f;
                }
            }
            dsv::wgmma_wait<0>();
            dsv::pin(dp);
            release(&smem.empty_v[ring_v.index]);
            ring_v.advance();
            // dP becomes dS.
#pragma unroll
            for (int j = 0; j < kBlockM / 8; ++j) {
                const float2 delta = *reinterpret_cast<const float2*>(&smem.delta[8 * j + 2 * (lane % 4)]);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta.x : delta.y));
                }
            }
            dsv::to_operand<Element, kBlockM>(p_operand, s);
            dsv::to_operand<Element, kBlockM>(ds_operand, dp);
            // Every consumer is past dQ of the tile before, which read dS.
            dsv::named_sync(kDsFreeBarrier, kConsumerThreads);
            dsv::store_fragment<kBlockM, kBlockN>(smem.ds, consumer * kRows, ds_operand);
            dsv::fence_async_proxy();

            // The chunks of dV, then of dK: one leaves for global memory while the next is made.
            float chunk[2][32];
            const auto issue_chunk = [&](int i) {
                const dsv::uint32 slab = i % kChunks * QueryTile::kSlab;
                dsv::wgmma_fence();
                if (i < kChunks) {
                    dsv::product_over_rows<Element, 64, kBlockM, QueryTile>(chunk[i % 2], p_operand, smem.d_o + slab, false);
                } else {
                    dsv::product_over_rows<Element, 64, kBlockM, QueryTile>(chunk[i % 2], ds_operand, smem.q + slab, false);
                }
                dsv::wgmma_commit();
            };
            const auto reduce_chunk = [&](int i) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (sums[r] != nullptr) accumulator.add(sums[r], r, i < kChunks, i % kChunks, chunk[i % 2]);
                }
            };
            issue_chunk(0);
            issue_chunk(1);
#pragma unroll
            for (int i = 2; i < 2 * kChunks; ++i) {
                dsv::wgmma_wait<1>();
                dsv::pin(chunk[i % 2]);
                reduce_chunk(i - 2);
                issue_chunk(i);
            }
            dsv::named_sync(kDsFullBarrier, kConsumerThreads);
            dsv::pin(dq);
            dsv::wgmma_fence();
            dsv::add_product_over_rows<Element, kHeadDim, kBlockN, ScoreTile, Gather::Tile>(
                dq, smem.ds + consumer * ScoreTile::kSlab, smem.k[stage]);
            dsv::wgmma_commit();
            // dQ and the next scores run while the last chunks leave.
            dsv::wgmma_wait<1>();
            dsv::pin(chunk[0]);
            dsv::pin(chunk[1]);
            // After the last tile its own scores once more, which no one reads: a product under a condition is serialised.
            if (t + 1 < walk.tiles) acquire_tile();
            issue_scores(t + 1 < walk.tiles ? ring_k.index : stage);
            reduce_chunk(2 * kChunks - 2);
            reduce_chunk(2 * kChunks - 1);
            dsv::wgmma_wait<0>();
            dsv::pin(dq);
            dsv::pin(s);
            release(&smem.empty_k[stage]);
        }
    }

    // Q is read by no one any more once every consumer is here: its room carries dQ out.
    dsv::named_sync(kEpilogueBarrier, kConsumerThreads);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dq[i] *= p.sizes.scale;
    dsv::uint32 packed[kHeadDim / 16][4];
    dsv::to_operand<Element, kHeadDim>(packed, dq);
    dsv::uint8* dq_tile = smem.q + consumer * dsv::tile_bytes(kRows, kHeadDim);
    dsv::store_fragment<kHeadDim, kRows>(dq_tile, 0, packed);
    dsv::fence_async_proxy();
    dsv::named_sync(kEpilogueBarrier + 1 + consumer, 128);
    const int3 again = dsv::cta_index();  // kept over the walk it would be spilled
    const int row0 = again.x * kBlockM + consumer * kRows;
    if (threadIdx.x % 128 == 0 && row0 < p.sizes.seqlen_q) {
        dsv::tma_store_tile<kHeadDim, kRows>(&p.map_dq, dq_tile, row0, again.y, again.z);
        dsv::bulk_commit();
        dsv::bulk_wait_read();
    }
}

// Grid: (ceil(seqlen_q / kBlockM), H, B), tiles of a head adjacent so that its K, V and their f32 gradients stay in L2.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_bf16_d96_qg128_kb8_spany_m128n128_g1c2s2x1_grid_nondet_sm90a(const __grid_constant__ Params p) {
    // Swizzle atoms are 1024 bytes; a driver that aligned shared memory less would have to be told from here.
    extern __shared__ __align__(1024) dsv::uint8 raw[];
    if (dsv::smem_address(raw) % 1024 != 0) __trap();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(raw);

    if (threadIdx.x == 0) {
        dsv::mbarrier_init(&smem.full_q, 1);
        for (int i = 0; i < kStages; ++i) {
            dsv::mbarrier_init(&smem.full_k[i], Gather::kArrivals);
            dsv::mbarrier_init(&smem.empty_k[i], kConsumerThreads / 32);
        }
        for (int i = 0; i < kStages - 1; ++i) {
            dsv::mbarrier_init(&smem.full_v[i], Gather::kArrivals);
            dsv::mbarrier_init(&smem.empty_v[i], kConsumerThreads / 32);
        }
        dsv::mbarrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x >= kConsumerThreads) {
        dsv::registers_shrink<kProducerRegisters>();
        if (threadIdx.x < kConsumerThreads + Gather::kThreads) produce(p, smem);
    } else {
        dsv::registers_grow<kConsumerRegisters>();
        consume(p, smem);
    }
}
