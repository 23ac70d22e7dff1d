// attn_bwd_bf16_d64_qg64_kb64_spany_m64n64_g1c1s3x1_grid_det_sm90a
// Generated from templates/kernels/attn_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_bwd, bf16, head_dim 64, query_group 64, kv_block 64, any sparsity, deterministic, sm90a;
// block_m 64, block_n 64, groups per CTA 1, consumers 1, stages 3, cluster 1, schedule grid

// For a tile of keys, over the query tiles that listed it (all when kQueryGroup is 0), transposed so that keys are rows:
//   P^T = exp2(c K Q^T - LSE log2 e),  dP^T = V dO^T,  dS^T = P^T (dP^T - delta),
//   dV += P^T dO,  dK += scale dS^T Q,  dQ += scale dS K (f32, reduced in global memory; attn_bwd_post applies scale).
//
// Floors: 10 * pairs * head_dim FLOP at 750 TF; per 64 query rows from and to L2 256 * head_dim bytes of Q and dO and
// 256 * head_dim bytes of f32 dQ: about 359 TF with 64 KV rows, 718 TF with 128 (head_dim 128).
// Registers of a consumer: dK and dV head_dim, S and dP 64, their operands 32, a dQ chunk 32; about 220.
// Shared memory: K and V (dK and dV in the epilogue), the ring of Q, dO and row statistics, and dS.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/tma.cuh"
#include "dsv/types.cuh"
#include "dsv/wgmma.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 64;
constexpr int kQueryGroup = 64;  // tokens sharing one list; 0 = dense
constexpr int kKvBlock = 64;        // tokens of one listed unit; 0 = dense
constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kConsumers = 1;  // warpgroups of 64 KV rows
constexpr int kStages = 3;
constexpr bool kDeterministic = true;  // leaves dQ to attn_bwd_dq
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kConsumerRegisters = 224;  // 0: left as compiled
constexpr int kProducerRegisters = 32;
constexpr int kSmemBytes = 69120;
constexpr int kParamsBytes = 1024;
// END CONFIG

constexpr bool kDense = kKvBlock == 0;
constexpr int kRows = 64;                                             // KV rows of one consumer
constexpr int kTilesPerGroup = kDense ? 1 : kQueryGroup / kBlockM;    // query tiles of one listing group
constexpr int kHalves = kBlockM / 64;                                 // 64 queries: of the copies and of dQ's accumulator
constexpr int kConsumerThreads = 128 * kConsumers;
constexpr int kDsBuffers = kConsumers == 1 ? 1 : 2;
// Of dQ a consumer makes its share of the columns, or, with as many halves as consumers, all columns of its half.
constexpr bool kDqByRows = kHalves > 1;
constexpr int kDqColumns = kDqByRows ? kHeadDim : kHeadDim / kConsumers;
constexpr int kChunk = kDqColumns < 64 ? kDqColumns : 64;  // columns of one product
constexpr int kChunks = kDqColumns / kChunk;
constexpr dsv::uint32 kTileBytesKv = dsv::tile_bytes(kBlockN, kHeadDim);
constexpr dsv::uint32 kTileBytesQ = dsv::tile_bytes(kBlockM, kHeadDim);
constexpr dsv::uint32 kStatBytes = kBlockM * 4;
// dQ goes to the copy engine, which adds it while the consumers go on; where shared memory has no room for it beside a
// second CTA, from the registers.
constexpr bool kStagedDq = !kDeterministic && (kConsumers > 1 || kHeadDim <= 64);
constexpr dsv::uint32 kDqBytes = kStagedDq ? 64 * kDqColumns * 4 : 128;  // of one consumer
// Consumers make dQ of a tile while they are at the next: neither waits for the other's dS. At head_dim 128 it costs 4 to 7 %.
constexpr bool kDqLater = kStagedDq && kDqByRows;
// dK may run into the next tile, which then needs a stage of its own; at head_dim 128 with dQ beside it registers are too
// few (C7512).
constexpr bool kDkAcross = kStages > 1 && !kDqLater && (kHeadDim < 128 || !kStagedDq);
constexpr dsv::uint32 kDsBytes = kDeterministic ? 128 : kBlockN * kBlockM * 2;

// dV beside dP keeps every accumulator and both operands alive at once: 226 registers at head_dim 128.
constexpr bool kEarlyDv = kHalves == 1 && (kHeadDim < 128 || kConsumers > 1);

static_assert(kHalves == 1 || (kHalves == kConsumers && kHeadDim == 64), "64 queries, or 128 as one 64-column slab");
static_assert(!kStagedDq || kChunks == 1, "dQ of a consumer leaves as one piece");
static_assert(kBlockN == kRows * kConsumers, "one wgmma M of 64 rows a consumer");
static_assert(kHeadDim % 64 == 0, "whole 128-byte swizzle columns");
static_assert(kDense || kKvBlock == kBlockN, "a CTA serves one listed block");
static_assert(kDense || kQueryGroup % kBlockM == 0, "a query tile lies within one group");

struct Params {
    dsv::TensorMap map_q;          // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_do;         // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_k;          // [B, Skv, Hkv, D], box kBlockN rows
    dsv::TensorMap map_v;          // [B, Skv, Hkv, D], box kBlockN rows
    dsv::TensorMap map_dk;         // [B, Skv, Hkv, D], box 64 rows
    dsv::TensorMap map_dv;         // [B, Skv, Hkv, D], box 64 rows
    dsv::TensorMap map_rows;       // [2, B * H * Sq_padded]: lse_log2 and delta, box 64 of one
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
    dsv::uint8 ds[kDsBuffers][kDsBytes];  // dS^T, [KV rows][64 queries]; unused when kDeterministic
    dsv::uint8 dq[kConsumers][kDqBytes];         // f32, in the accumulator's order; unused unless kStagedDq
    alignas(128) float lse_log2[kStages][kBlockM];
    alignas(128) float delta[kStages][kBlockM];
    dsv::uint64 full_kv;
    dsv::uint64 full_q[kStages], empty_q[kStages];
    dsv::uint64 full_do[kStages], empty_do[kStages];
    dsv::uint64 full_ds[kDsBuffers], empty_ds[kDsBuffers];  // dS of all consumers, when kDqLater
    int query_tile[kStages];  // of a stage, in 64 queries over batch and heads; -1 ends the walk
};
static_assert(sizeof(SharedStorage) + 1024 <= kSmemBytes, "shared memory with slack to align it");

// Named barriers: all consumers on a written dS, all consumers before the epilogue, each consumer on its written dQ.
constexpr int kDsBarrier = 1;
constexpr int kEpilogueBarrier = 2;
constexpr int kDqBarrier = 3;

// Hands stage after stage to the consumers: Q with LSE, then dO with delta.
struct Producer {
    const Params& p;
    SharedStorage& smem;
    int batch;
    dsv::RingState<kStages> ring;

    // One thread.
    __device__ __forceinline__ void feed(int tile, int head) {
        // 32 bits: 2^31 rows of Q would be 256 GiB.
        const int row = (batch * p.sizes.num_heads + head) * p.sizes.seqlen_q_padded + tile * kBlockM;
        const int s = ring.index;
        dsv::mbarrier_wait(&smem.empty_q[s], ring.phase ^ 1);
        smem.query_tile[s] = row / 64;
        dsv::mbarrier_arrive_expect(&smem.full_q[s], kTileBytesQ + kStatBytes);
        load(smem.q[s], p.map_q, smem.lse_log2[s], 0, &smem.full_q[s], tile * kBlockM, head, row);
        dsv::mbarrier_wait(&smem.empty_do[s], ring.phase ^ 1);
        dsv::mbarrier_arrive_expect(&smem.full_do[s], kTileBytesQ + kStatBytes);
        load(smem.d_o[s], p.map_do, smem.delta[s], 1, &smem.full_do[s], tile * kBlockM, head, row);
    }

    // A tile and its row statistics, 64 queries a copy.
    __device__ __forceinline__ void load(dsv::uint8* to, const dsv::TensorMap& map, float* statistics, int which,
                                         dsv::uint64* barrier, int query, int head, int row) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            dsv::tma_load_tile<kHeadDim, 64>(to + half * 64 * dsv::kRowBytes, &map, barrier, query + 64 * half, head, batch);
            dsv::tma_load_row(statistics + half * 64, &p.map_rows, barrier, row + 64 * half, which);
        }
    }

    __device__ __forceinline__ void finish() {
        dsv::mbarrier_wait(&smem.empty_q[ring.index], ring.phase ^ 1);
        smem.query_tile[ring.index] = -1;
        dsv::mbarrier_arrive(&smem.full_q[ring.index]);
    }
};

__device__ __forceinline__ void produce(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int kv_tile = cta.x, kv_head = cta.y, batch = cta.z;
    const int lane = threadIdx.x % 32;
    const bool leader = lane == 0;
    if (leader) {
        dsv::mbarrier_arrive_expect(&smem.full_kv, 2 * kTileBytesKv);
        dsv::tma_load_tile<kHeadDim, kBlockN>(smem.k, &p.map_k, &smem.full_kv, kv_tile * kBlockN, kv_head, batch);
        dsv::tma_load_tile<kHeadDim, kBlockN>(smem.v, &p.map_v, &smem.full_kv, kv_tile * kBlockN, kv_head, batch);
    }
    Producer producer{p, smem, batch, {}};
    const int heads_per_kv = p.sizes.num_heads / p.sizes.num_kv_heads;
#pragma unroll 1
    for (int head = kv_head * heads_per_kv; head < (kv_head + 1) * heads_per_kv; ++head) {
        if constexpr (kDense) {
#pragma unroll 1
            for (int tile = 0; tile < p.sizes.seqlen_q_padded / kBlockM; ++tile) {
                if (leader) producer.feed(tile, head);
                producer.ring.advance();
            }
        } else {
            // Little is kept across the loop: the producer has few registers.
            const int slab = batch * p.sizes.num_heads + head;
            const dsv::int32* offset = p.k2q_offset + dsv::int64{slab} * (p.sizes.num_kv_blocks + 1) + kv_tile;
            const int begin = offset[0];
            int edges = offset[1] - begin;
            const dsv::int64 width = dsv::int64{p.sizes.num_groups} * p.sizes.max_selected;
            if (begin < 0 || edges < 0 || begin + dsv::int64{edges} > width) {
                if (leader) atomicOr(p.error_flag, dsv::kCountOutOfRange);
                edges = 0;
            }
            int fetched = 0;  // lane i holds the i-th of the next 32 groups
#pragma unroll 1
            for (int step = 0; step < edges * kTilesPerGroup; ++step) {
                const int e = step / kTilesPerGroup;
                if (step % (32 * kTilesPerGroup) == 0 && e + lane < edges) {
                    fetched = p.k2q_index[slab * (dsv::int64{p.sizes.num_groups} * p.sizes.max_selected) + begin + e + lane];
                    if (static_cast<unsigned>(fetched) >= static_cast<unsigned>(p.sizes.num_groups)) {
                        atomicOr(p.error_flag, dsv::kIndexOutOfRange);
                        fetched = p.sizes.num_groups - 1;
                    }
                }
                const int tile = __shfl_sync(0xFFFFFFFF, fetched, e % 32) * kTilesPerGroup + step % kTilesPerGroup;
                if (tile < p.sizes.seqlen_q_padded / kBlockM) {  // the last group may be short
                    if (leader) producer.feed(tile, head);
                    producer.ring.advance();
                }
                __syncwarp();
            }
        }
    }
    if (leader) producer.finish();
}

// Adds a 64 x kChunk fragment of columns [column, column + kChunk) to the accumulator of 64 queries. The accumulator
// keeps fragments as they are, [D / 8][128 threads][4], so that a warp adds 512 contiguous bytes; attn_bwd_post puts
// elements in their places.
__device__ __forceinline__ void reduce_dq(float* tile, int column, const float (&dq)[kChunk / 2]) {
    float* target = tile + (column / 8 * 128 + threadIdx.x % 128) * 4;
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target + j * 512), "f"(dq[4 * j]),
                     "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                     : "memory");
    }
}

// The same by way of shared memory, in the same order; `staged` is read until bulk_wait_read of the consumer's thread 0.
__device__ __forceinline__ void reduce_dq_staged(float* tile, int column, float* staged, int barrier,
                                                 const float (&dq)[kChunk / 2]) {
    float4* target = reinterpret_cast<float4*>(staged) + threadIdx.x % 128;
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
        target[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
    dsv::fence_async_proxy();
    dsv::named_sync(barrier, 128);
    if (threadIdx.x % 128 == 0) {
        dsv::bulk_reduce_add(tile + column / 8 * 512, staged, kDqBytes);
        dsv::bulk_commit();
    }
}

__device__ __forceinline__ void consume(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int kv_tile = cta.x, kv_head = cta.y, batch = cta.z;
    const int consumer = dsv::warpgroup_index();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const bool warp_leader = lane == 0;
    const int kv_row = consumer * kRows;  // in the tile
    const float scale_log2 = p.sizes.scale_log2;
    // Keys of this CTA that exist; only the last tile is short.
    const int valid = p.sizes.seqlen_kv - kv_tile * kBlockN;
    const bool cut = valid < kBlockN;
    const int my_row = kv_row + 16 * warp + lane / 4;

    float dk[kHeadDim / 2];
    float dv[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.0f;

    // Every lane has read the stage's statistics by ordinary loads: all of them before the leader's word.
    const auto release = [&](dsv::uint64* barrier) {
        __syncwarp();
        if (warp_leader) dsv::mbarrier_arrive(barrier);
    };

    using Scores = float[kBlockM / 2];                 // S and P, or dP and dS, transposed
    using Operand = dsv::uint32[kBlockM / 16][4];      // P or dS
    const auto issue_s = [&](Scores& s, int stage) {
        dsv::wgmma_fence();
        dsv::gemm_ss_kk<Element, kBlockM, kHeadDim, kBlockN, kBlockM>(s, smem.k + kv_row * dsv::kRowBytes, smem.q[stage]);
        dsv::wgmma_commit();
    };
    const auto issue_dp = [&](Scores& dp, int stage) {
        dsv::wgmma_fence();
        dsv::gemm_ss_kk<Element, kBlockM, kHeadDim, kBlockN, kBlockM>(dp, smem.v + kv_row * dsv::kRowBytes, smem.d_o[stage]);
        dsv::wgmma_commit();
    };
    const auto issue_dv = [&](const Operand& p_operand, int stage) {
        dsv::pin(dv);
        dsv::wgmma_fence();
        dsv::gemm_rs_mn<Element, kHeadDim, kBlockM>(dv, p_operand, smem.d_o[stage]);
        dsv::wgmma_commit();
    };
    const auto issue_dk = [&](const Operand& ds_operand, int stage) {
        dsv::pin(dk);
        dsv::wgmma_fence();
        dsv::gemm_rs_mn<Element, kHeadDim, kBlockM>(dk, ds_operand, smem.q[stage]);
        dsv::wgmma_commit();
    };
    const auto issue_dq = [&](float (&dq)[kChunk / 2], int buffer, int column) {
        const dsv::uint32 k_offset = column / 64 * dsv::slab_bytes(kBlockN) + column % 64 * 2;
        const dsv::uint32 ds_offset = kDqByRows ? consumer * dsv::slab_bytes(kBlockN) : 0;
        dsv::wgmma_fence();
        dsv::gemm_ss_mn<Element, kChunk, kBlockN>(dq, smem.ds[buffer] + ds_offset, smem.k + k_offset);
        dsv::wgmma_commit();
    };
    // S becomes P.
    const auto make_p = [&](Scores& s, int stage) {
        dsv::pin(s);
#pragma unroll
        for (int j = 0; j < kBlockM / 8; ++j) {
            const float2 lse = *reinterpret_cast<const float2*>(&smem.lse_log2[stage][8 * j + 2 * (lane % 4)]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[4 * j + i] = dsv::exp2_fast(s[4 * j + i] * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
            }
        }
        if (cut) {
#pragma unroll
            for (int i = 0; i < kBlockM / 2; ++i) {
                if (my_row + i / 2 % 2 * 8 >= valid) s[i] = 0.0f;
            }
        }
    };
    // dP becomes dS, as operand and in shared memory.
    const auto make_ds = [&](Operand& ds_operand, Scores& dp, const Scores& s, int stage, int buffer, dsv::uint32 phase) {
        dsv::pin(dp);
#pragma unroll
        for (int j = 0; j < kBlockM / 8; ++j) {
            const float2 delta = *reinterpret_cast<const float2*>(&smem.delta[stage][8 * j + 2 * (lane % 4)]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta.x : delta.y));
            }
        }
        dsv::to_operand<Element, kBlockM>(ds_operand, dp);
        if constexpr (kDqLater) dsv::mbarrier_wait(&smem.empty_ds[buffer], phase ^ 1);
        if constexpr (!kDeterministic) {
            // A lone buffer may still be read by another warp's dQ of the step before.
            if constexpr (kDsBuffers == 1) dsv::named_sync(kDsBarrier, kConsumerThreads);
            dsv::store_fragment<kBlockM, kBlockN>(smem.ds[buffer], kv_row, ds_operand);
        }
        // dS before the tensor cores read it, and this stage's LSE and delta before the copy engine overwrites them.
        dsv::fence_async_proxy();
    };

    // Until the dQ staged last has left.
    const auto wait_for_staged = [&] {
        if (kStagedDq && threadIdx.x % 128 == 0) dsv::bulk_wait_read();
    };
    // dQ of a tile whose dS lies in `buffer`; `after` runs while its product does.
    const auto add_dq = [&](int tile, int buffer, auto&& after) {
        float* dq_tile = p.dq_accum + dsv::int64{tile + (kDqByRows ? consumer : 0)} * (64 * kHeadDim);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int column = (kDqByRows ? 0 : consumer * kDqColumns) + chunk * kChunk;
            float dq[kChunk / 2];
            issue_dq(dq, buffer, column);
            if (chunk == 0) {
                after();
            } else {
                dsv::wgmma_wait<0>();
            }
            dsv::pin(dq);
            if constexpr (kStagedDq) {
                float* staged = reinterpret_cast<float*>(smem.dq[consumer]);
                if constexpr (kDqLater) {
                    wait_for_staged();
                    dsv::named_sync(kDqBarrier + consumer, 128);
                }
                reduce_dq_staged(dq_tile, column, staged, kDqBarrier + consumer, dq);
            } else {
                reduce_dq(dq_tile, column, dq);
            }
        }
    };

    dsv::mbarrier_wait(&smem.full_kv, 0);
    dsv::RingState<kStages> ring;
    dsv::RingState<2> ds_ring, dq_ring;  // of dS written, and of dS read, when kDqLater
    int pending = -1;                    // tile whose dQ is still to be made, when kDqLater
    int previous = -1;  // stage of the tile before, if its dK still runs
    for (int step = 0;; ++step) {
        const int stage = ring.index;
        dsv::mbarrier_wait(&smem.full_q[stage], ring.phase);
        // Read by the lane whose arrival frees the stage.
        int tile = 0;
        if (warp_leader) tile = smem.query_tile[stage];
        tile = __shfl_sync(0xFFFFFFFF, tile, 0);
        if (tile < 0) break;

        // Of this tile alone: what a name outlives takes registers from dQ.
        Scores s, dp;
        Operand p_operand, ds_operand;
        issue_s(s, stage);
        dsv::mbarrier_wait(&smem.full_do[stage], ring.phase);
        if constexpr (kDkAcross) {
            dsv::wgmma_wait<1>();  // dK of the tile before, whose operand lies where dP goes
            dsv::pin(dk);
            if (previous >= 0) release(&smem.empty_q[previous]);
        }
        issue_dp(dp, stage);
        dsv::wgmma_wait<1>();
        make_p(s, stage);
        dsv::to_operand<Element, kBlockM>(p_operand, s);
        if constexpr (kEarlyDv) issue_dv(p_operand, stage);
        dsv::wgmma_wait<kEarlyDv ? 1 : 0>();  // dP; an early dV runs while dS is made
        make_ds(ds_operand, dp, s, stage, kDqLater ? ds_ring.index : step % kDsBuffers, ds_ring.phase);
        if constexpr (!kEarlyDv) issue_dv(p_operand, stage);
        // dK runs while dQ is reduced.
        const auto issue_dk_and_free_do = [&] {
            issue_dk(ds_operand, stage);
            dsv::wgmma_wait<1>();
            dsv::pin(dv);
            release(&smem.empty_do[stage]);
        };
        if constexpr (kDqLater) {
            release(&smem.full_ds[ds_ring.index]);
            ds_ring.advance();
            issue_dk(ds_operand, stage);
            const auto free_stage = [&] {
                dsv::pin(dv);
                dsv::pin(dk);
                release(&smem.empty_do[stage]);
                release(&smem.empty_q[stage]);
            };
            if (pending >= 0) {
                dsv::mbarrier_wait(&smem.full_ds[dq_ring.index], dq_ring.phase);
                add_dq(pending, dq_ring.index, [&] {
                    dsv::wgmma_wait<1>();
                    free_stage();
                    dsv::wgmma_wait<0>();
                    release(&smem.empty_ds[dq_ring.index]);
                });
                dq_ring.advance();
            } else {
                dsv::wgmma_wait<0>();
                free_stage();
            }
            pending = tile;
        } else if constexpr (kDeterministic) {
            issue_dk_and_free_do();
        } else {
            wait_for_staged();
            dsv::named_sync(kDsBarrier, kConsumerThreads);
            add_dq(tile, step % kDsBuffers, issue_dk_and_free_do);
        }
        if constexpr (kDkAcross) {
            previous = stage;
        } else if constexpr (!kDqLater) {
            dsv::wgmma_wait<0>();
            dsv::pin(dk);
            release(&smem.empty_q[stage]);
        }
        ring.advance();
    }
    dsv::wgmma_wait<0>();
    dsv::pin(dk);
    if (pending >= 0) {
        dsv::mbarrier_wait(&smem.full_ds[dq_ring.index], dq_ring.phase);
        add_dq(pending, dq_ring.index, [] { dsv::wgmma_wait<0>(); });
    }

    // K and V are read by no one any more once every consumer is here: their room carries dK and dV out.
    dsv::named_sync(kEpilogueBarrier, kConsumerThreads);
    dsv::uint8* dk_tile = smem.k + consumer * int{dsv::tile_bytes(kRows, kHeadDim)};
    dsv::uint8* dv_tile = smem.v + consumer * int{dsv::tile_bytes(kRows, kHeadDim)};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] *= p.sizes.scale;
    dsv::uint32 packed[kHeadDim / 16][4];
    dsv::to_operand<Element, kHeadDim>(packed, dk);
    dsv::store_fragment<kHeadDim, kRows>(dk_tile, 0, packed);
    dsv::to_operand<Element, kHeadDim>(packed, dv);
    dsv::store_fragment<kHeadDim, kRows>(dv_tile, 0, packed);
    dsv::fence_async_proxy();
    dsv::named_sync(kEpilogueBarrier, kConsumerThreads);
    if (threadIdx.x % 128 == 0 && kv_row < valid) {
        dsv::tma_store_tile<kHeadDim, kRows>(&p.map_dk, dk_tile, kv_tile * kBlockN + kv_row, kv_head, batch);
        dsv::tma_store_tile<kHeadDim, kRows>(&p.map_dv, dv_tile, kv_tile * kBlockN + kv_row, kv_head, batch);
        dsv::bulk_commit();
    }
    dsv::bulk_wait_read();
}

// Grid: (ceil(seqlen_kv / kBlockN), num_kv_heads, B), tiles of a head adjacent so that its Q, dO and dQ stay in L2.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_bwd_bf16_d64_qg64_kb64_spany_m64n64_g1c1s3x1_grid_det_sm90a(const __grid_constant__ Params p) {
    // Swizzle atoms are 1024 bytes; a driver that aligned shared memory less would have to be told from here.
    extern __shared__ __align__(1024) dsv::uint8 raw[];
    if (dsv::smem_address(raw) % 1024 != 0) __trap();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(raw);

    if (threadIdx.x == 0) {
        dsv::mbarrier_init(&smem.full_kv, 1);
        for (int i = 0; i < kStages; ++i) {
            dsv::mbarrier_init(&smem.full_q[i], 1);
            dsv::mbarrier_init(&smem.full_do[i], 1);
            dsv::mbarrier_init(&smem.empty_q[i], kConsumerThreads / 32);
            dsv::mbarrier_init(&smem.empty_do[i], kConsumerThreads / 32);
        }
        for (int i = 0; i < kDsBuffers; ++i) {
            dsv::mbarrier_init(&smem.full_ds[i], kConsumerThreads / 32);
            dsv::mbarrier_init(&smem.empty_ds[i], kConsumerThreads / 32);
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
