// attn_fwd_bf16_d128_qg0_kb0_sp0_m128n176_g1c2s2x1_grid_det_sm90a
// Generated from templates/kernels/attn_fwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_fwd, bf16, head_dim 128, dense, sparsity 0 %, deterministic, sm90a;
// block_m 128, block_n 176, groups per CTA 1, consumers 2, stages 2, cluster 1, schedule grid

// out = softmax(scale * Q K^T) V over the keys a query group lists (all keys when kQueryGroup is 0), and
// LSE = ln sum exp(scale * Q K^T): online softmax, m the running row maximum, l the running row sum.
//
// Floors: 4 * pairs * head_dim FLOP at 750 TF, and 4 * head_dim bytes a KV token and CTA from L2 at 7 TB/s: with 64
// query rows that is 64 FLOP a byte, so 450 TF; from 128 rows on the tensor cores are the limit.
// Registers of a consumer: O head_dim / 2, one S or two of block_n / 2, P block_n / 4, with tiles of 64 keys Q head_dim / 4,
// and about 40 more.
// Shared memory: Q (out in the epilogue) and the ring of K and V.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/softmax.cuh"
#include "dsv/tma.cuh"
#include "dsv/types.cuh"
#include "dsv/wgmma.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 128;
constexpr int kQueryGroup = 0;  // tokens sharing one list; 0 = dense
constexpr int kKvBlock = 0;        // tokens of one listed unit; 0 = dense
constexpr int kBlockM = 128;
constexpr int kBlockN = 176;
constexpr int kConsumers = 2;  // warpgroups of 64 query rows
constexpr int kStages = 2;
constexpr int kThreads = 384;
constexpr int kCtasPerSm = 1;
constexpr int kConsumerRegisters = 240;  // 0: left as compiled
constexpr int kProducerRegisters = 24;
constexpr int kSmemBytes = 215040;
constexpr int kParamsBytes = 640;
// END CONFIG

constexpr bool kDense = kKvBlock == 0;
constexpr int kRows = 64;                                         // query rows of one consumer
constexpr int kConsumerThreads = 128 * kConsumers;
// S of 64 keys with both operands in shared memory fills its port, 128 bytes a clock: Q waits in registers where there are
// head_dim / 4 for it.
constexpr bool kQInRegisters = kBlockN == 64 && kConsumerRegisters >= 136 && kConsumers <= 2 && kHeadDim <= 128;
// S of the next tile is made while P of this one is, where there are registers for two S: no consumer waits for a product.
// K is then needed a tile earlier, which costs two CTAs at head_dim 128 more than it gives: their rings have no third stage.
constexpr int kScoresRegisters = kHeadDim / 2 + kBlockN + kBlockN / 4 + (kQInRegisters ? kHeadDim / 4 : 0) + 36;
constexpr bool kTwoScores = (kHeadDim == 64 || kConsumers == 2) && kScoresRegisters <= kConsumerRegisters;
constexpr dsv::uint32 kTileBytesQ = dsv::tile_bytes(kRows, kHeadDim);
constexpr dsv::uint32 kTileBytesKv = dsv::tile_bytes(kBlockN, kHeadDim);
// Consumers take turns at the tensor cores.
constexpr bool kTurns = kConsumers > 1 && !kTwoScores;

static_assert(kBlockM == kRows * kConsumers, "one wgmma M of 64 rows a consumer");
static_assert(kHeadDim % 16 == 0, "whole K steps of the products");
static_assert(kDense || kKvBlock % kBlockN == 0 || kBlockN % kKvBlock == 0, "a block is whole tiles or a tile whole blocks");
static_assert(kDense || kQueryGroup % kBlockM == 0, "a CTA lies within one group");

struct Params {
    dsv::TensorMap map_q;         // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_k;         // [B, Skv, Hkv, D], box kBlockN rows, or kKvBlock if fewer
    dsv::TensorMap map_v;         // [B, Skv, Hkv, D], as map_k
    dsv::TensorMap map_o;         // [B, Sq, H, D], box 64 rows
    float* lse;                   // [B, H, Sq]
    const dsv::int32* q2k_index;  // [B, H, G, max_selected]
    const dsv::int32* q2k_count;  // [B, H, G]
    dsv::int32* error_flag;       // [1]
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

struct SharedStorage {
    dsv::uint8 q[kConsumers][kTileBytesQ];  // out in the epilogue
    dsv::uint8 k[kStages][kTileBytesKv];
    dsv::uint8 v[kStages][kTileBytesKv];
    dsv::uint64 full_q;
    dsv::uint64 full_k[kStages], empty_k[kStages];
    dsv::uint64 full_v[kStages], empty_v[kStages];
};
static_assert(sizeof(SharedStorage) + 1024 <= kSmemBytes, "shared memory with slack to align it");

// Named barriers: one turn for each consumer, then one for each consumer's epilogue.
constexpr int kTurnBarrier = 1;
constexpr int kEpilogueBarrier = kTurnBarrier + kConsumers;

using Walk = dsv::KvWalk<kQueryGroup, kKvBlock, kBlockN>;

// Starts to load one tile of K or V, block by block where it is several.
__device__ __forceinline__ void load_keys(dsv::uint8* tile, const dsv::TensorMap* map, dsv::uint64* full,
                                          const int (&start)[Walk::kBlocksPerTile], int kv_head, int batch) {
    dsv::mbarrier_arrive_expect(full, kTileBytesKv);
    if constexpr (Walk::kBlocksPerTile == 1) {
        dsv::tma_load_tile<kHeadDim, kBlockN>(tile, map, full, start[0], kv_head, batch);
    } else {
#pragma unroll
        for (int i = 0; i < Walk::kBlocksPerTile; ++i) {
            dsv::tma_load_rows<kHeadDim, kBlockN>(tile + i * kKvBlock * dsv::kRowBytes, map, full, start[i], kv_head, batch);
        }
    }
}

// Feeds Q once, then K and V tile by tile, K one tile ahead so that the next Q K^T never waits for a V.
__device__ __forceinline__ void produce(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int first_row = cta.x * kBlockM, head = cta.y, batch = cta.z;
    Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);
    const int kv_head = head / (p.sizes.num_heads / p.sizes.num_kv_heads);
    const bool leader = threadIdx.x % 32 == 0;
    if (walk.tiles == 0) return;
    if (leader) {
        dsv::mbarrier_arrive_expect(&smem.full_q, kConsumers * kTileBytesQ);
        for (int c = 0; c < kConsumers; ++c) {
            dsv::tma_load_tile<kHeadDim, kRows>(smem.q[c], &p.map_q, &smem.full_q, first_row + c * kRows, head, batch);
        }
    }

    dsv::RingState<kStages> ring_k, ring_v;
    int start_v[Walk::kBlocksPerTile] = {};
    for (int t = 0; t <= walk.tiles; ++t) {
        int start_k[Walk::kBlocksPerTile] = {};
        if (t < walk.tiles) {
#pragma unroll
            for (int i = 0; i < Walk::kBlocksPerTile; ++i) start_k[i] = walk.tile_start(t, i);
            if (leader) {
                dsv::mbarrier_wait(&smem.empty_k[ring_k.index], ring_k.phase ^ 1);
                load_keys(smem.k[ring_k.index], &p.map_k, &smem.full_k[ring_k.index], start_k, kv_head, batch);
            }
            ring_k.advance();
        }
        if (t > 0) {
            if (leader) {
                dsv::mbarrier_wait(&smem.empty_v[ring_v.index], ring_v.phase ^ 1);
                load_keys(smem.v[ring_v.index], &p.map_v, &smem.full_v[ring_v.index], start_v, kv_head, batch);
            }
            ring_v.advance();
        }
#pragma unroll
        for (int i = 0; i < Walk::kBlocksPerTile; ++i) start_v[i] = start_k[i];
        __syncwarp();
    }
}

__device__ __forceinline__ void consume(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int first_row = cta.x * kBlockM, head = cta.y, batch = cta.z;
    const int consumer = dsv::warpgroup_index();
    const bool warp_leader = threadIdx.x % 32 == 0;
    const int row0 = first_row + consumer * kRows;
    const Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);
    const float scale_log2 = p.sizes.scale_log2;

    float o[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
    dsv::Softmax<kBlockN> softmax;

    if (walk.tiles > 0) {
        int valid = walk.valid_in_first(p.sizes.seqlen_kv);
        dsv::RingState<kStages> ring_k, ring_v;
        dsv::mbarrier_wait(&smem.full_q, 0);
        if constexpr (kTurns) {
            if (consumer == 0) dsv::named_arrive(kTurnBarrier, 256);
        }

        dsv::uint32 q[kHeadDim / 16][4];
        if constexpr (kQInRegisters) dsv::load_fragment<kHeadDim, kRows>(q, smem.q[consumer], 0);
        using Scores = float[kBlockN / 2];
        Scores s;
        dsv::uint32 probabilities[kBlockN / 16][4];
        float rescale[2];
        const auto wait_for_keys = [&] { dsv::mbarrier_wait(&smem.full_k[ring_k.index], ring_k.phase); };
        const auto issue_scores = [&](Scores& s) {
            if constexpr (kTurns) dsv::named_sync(kTurnBarrier + consumer, 256);
            dsv::pin(s);
            dsv::wgmma_fence();
            if constexpr (kQInRegisters) {
                dsv::gemm_rs_kk<Element, kBlockN, kHeadDim, kBlockN>(s, q, smem.k[ring_k.index]);
            } else {
                dsv::gemm_ss_kk<Element, kBlockN, kHeadDim, kRows, kBlockN>(s, smem.q[consumer], smem.k[ring_k.index]);
            }
            dsv::wgmma_commit();
        };
        const auto issue_output = [&] {
            dsv::mbarrier_wait(&smem.full_v[ring_v.index], ring_v.phase);
            dsv::pin(o);
            dsv::wgmma_fence();
            dsv::gemm_rs_mn<Element, kHeadDim, kBlockN>(o, probabilities, smem.v[ring_v.index]);
            dsv::wgmma_commit();
        };
        const auto pass_turn = [&](bool last_turn) {
            if constexpr (kTurns) {
                if (!(last_turn && consumer == kConsumers - 1)) {
                    dsv::named_arrive(kTurnBarrier + (consumer + 1) % kConsumers, 256);
                }
            }
        };
        const auto release = [&](dsv::uint64* barrier) {
            if (warp_leader) dsv::mbarrier_arrive(barrier);
        };

        const auto rescale_output = [&] {
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= rescale[i / 2 % 2];
        };
        const auto pass_keys = [&] {
            release(&smem.empty_k[ring_k.index]);
            ring_k.advance();
        };
        const auto pass_values = [&] {
            release(&smem.empty_v[ring_v.index]);
            ring_v.advance();
        };

        // Keys of tile t that do not exist, or that a lone block repeats, weigh nothing.
        const auto mask = [&](Scores& s, int t) {
            // With tiles smaller than the listed block, the tail may span several of them.
            if constexpr (Walk::kTilesPerBlock > 1) {
                if (t > 0) valid += kBlockN;
                if (t < Walk::kTilesPerBlock && valid < kBlockN) dsv::mask_tail<kBlockN>(s, valid, -dsv::kInf);
            } else {
                if (t == 0 && valid < kBlockN) dsv::mask_tail<kBlockN>(s, valid, -dsv::kInf);
            }
            // With tiles of several blocks, the last tile may lack some.
            if constexpr (Walk::kBlocksPerTile > 1) {
                if (t > 0 && t == walk.tiles - 1 && walk.valid_in_last() < kBlockN) {
                    dsv::mask_tail<kBlockN>(s, walk.valid_in_last(), -dsv::kInf);
                }
            }
        };

        if constexpr (kTwoScores) {
            Scores other;
            // P of tile t, made while S of the next one and O of the one before are.
            const auto step = [&](Scores& now, Scores& next, int t) {
                issue_scores(next);
                if (t > 0) issue_output();
                softmax.step(now, scale_log2, rescale);
                dsv::pin(now);
                // A loop here keeps the compiler from moving the exponentials behind the wait for the products.
                if (t + 2 < walk.tiles) {
                    auto ring = ring_k;
                    ring.advance();
                    dsv::mbarrier_wait(&smem.full_k[ring.index], ring.phase);
                }
                dsv::wgmma_wait<0>();
                dsv::pin(next);
                dsv::pin(o);
                pass_keys();
                if (t > 0) pass_values();
                mask(next, t + 1);
                rescale_output();
                dsv::to_operand<Element, kBlockN>(probabilities, now);
            };
            wait_for_keys();
            issue_scores(s);
            dsv::wgmma_wait<0>();
            dsv::pin(s);
            pass_keys();
            mask(s, 0);
            if (walk.tiles > 1) {
                wait_for_keys();
                step(s, other, 0);
                int t = 1;
                while (t + 1 < walk.tiles) {
                    step(other, s, t++);
                    if (t + 1 == walk.tiles) break;
                    step(s, other, t++);
                }
                if (walk.tiles % 2 == 0) {
#pragma unroll
                    for (int i = 0; i < kBlockN / 2; ++i) s[i] = other[i];
                }
                issue_output();
            }
            softmax.step(s, scale_log2, rescale);
            dsv::pin(s);
            dsv::wgmma_wait<0>();
            dsv::pin(o);
            if (walk.tiles > 1) pass_values();
            rescale_output();
            dsv::to_operand<Element, kBlockN>(probabilities, s);
            issue_output();
            dsv::wgmma_wait<0>();
            dsv::pin(o);
        } else {
            wait_for_keys();
            issue_scores(s);
            pass_turn(walk.tiles == 1);
            dsv::wgmma_wait<0>();
            dsv::pin(s);
            pass_keys();
            mask(s, 0);
            softmax.step(s, scale_log2, rescale);
            dsv::to_operand<Element, kBlockN>(probabilities, s);
            if (walk.tiles > 1) wait_for_keys();

            for (int t = 1; t < walk.tiles; ++t) {
                issue_scores(s);
                issue_output();
                pass_turn(t == walk.tiles - 1);
                dsv::wgmma_wait<1>();
                dsv::pin(s);
                pass_keys();
                mask(s, t);
                softmax.step(s, scale_log2, rescale);
                dsv::pin(s);
                // The next keys are awaited here because the loop of that wait keeps the compiler from moving the
                // exponentials behind the wait for P V, where no product would run under them.
                if (t + 1 < walk.tiles) wait_for_keys();
                dsv::wgmma_wait<0>();
                dsv::pin(o);
                pass_values();
                rescale_output();
                dsv::to_operand<Element, kBlockN>(probabilities, s);
            }
            issue_output();
            dsv::wgmma_wait<0>();
            dsv::pin(o);
        }
    }

    // out = O / l; a row that saw no key keeps zeros and LSE = -inf.
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = dsv::quad_sum(softmax.row_sum[r]);
        inverse[r] = sum > 0.0f ? 1.0f / sum : 0.0f;
        const int row = row0 + 16 * warp + lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < p.sizes.seqlen_q) {
            const float lse = sum > 0.0f ? softmax.row_max[r] * p.sizes.scale + logf(sum) : -dsv::kInf;
            p.lse[(dsv::int64{batch} * p.sizes.num_heads + head) * p.sizes.seqlen_q + row] = lse;
        }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= inverse[i / 2 % 2];
    dsv::uint32 packed[kHeadDim / 16][4];
    dsv::to_operand<Element, kHeadDim>(packed, o);
    // This consumer's Q is read by no one any more: its room carries out to the copy engine.
    dsv::store_fragment<kHeadDim, kRows>(smem.q[consumer], 0, packed);
    dsv::fence_async_proxy();
    dsv::named_sync(kEpilogueBarrier + consumer, 128);
    if (threadIdx.x % 128 == 0 && row0 < p.sizes.seqlen_q) {
        dsv::tma_store_tile<kHeadDim, kRows>(&p.map_o, smem.q[consumer], row0, head, batch);
        dsv::bulk_commit();
        dsv::bulk_wait_read();
    }
}

// Grid: (ceil(seqlen_q / kBlockM), H, B), tiles of a head adjacent so that its K and V stay in L2.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_fwd_bf16_d128_qg0_kb0_sp0_m128n176_g1c2s2x1_grid_det_sm90a(const __grid_constant__ Params p) {
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
        if (threadIdx.x < kConsumerThreads + 32) {
            produce(p, smem);
        }
    } else {
        dsv::registers_grow<kConsumerRegisters>();
        consume(p, smem);
    }
}
