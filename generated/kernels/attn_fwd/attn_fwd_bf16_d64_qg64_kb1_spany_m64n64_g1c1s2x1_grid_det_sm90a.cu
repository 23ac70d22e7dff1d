// attn_fwd_bf16_d64_qg64_kb1_spany_m64n64_g1c1s2x1_grid_det_sm90a
// Generated from templates/kernels/attn_fwd_gather.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_fwd, bf16, head_dim 64, query_group 64, kv_block 1, any sparsity, deterministic, sm90a;
// block_m 64, block_n 64, groups per CTA 1, consumers 1, stages 2, cluster 1, schedule grid

// out = softmax(scale * Q K^T) V over the keys a query group lists in units smaller than a tile (kKvBlock tokens), and
// LSE = ln sum exp(scale * Q K^T): online softmax, m the running row maximum, l the running row sum. K and V are gathered
// unit by unit into tiles of kBlockN tokens.
//
// Floors: 4 * pairs * head_dim FLOP at 750 TF, and 4 * head_dim bytes a listed token and CTA from L2 at 7 TB/s: with 64
// query rows that is 64 FLOP a byte, so 450 TF; from 128 rows on the tensor cores are the limit.
// Registers of a consumer: O head_dim / 2, S block_n / 2, P block_n / 4, and about 40 more.
// Shared memory: Q (out in the epilogue) and the ring of K and V.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/gather/load.cuh"
#include "dsv/gather/tile.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/softmax.cuh"
#include "dsv/tma.cuh"
#include "dsv/types.cuh"
#include "dsv/wgmma.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 64;
constexpr int kQueryGroup = 64;  // tokens sharing one list
constexpr int kKvBlock = 1;        // tokens of one listed unit; 1 = tokens
constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kConsumers = 1;  // warpgroups of 64 query rows
constexpr int kStages = 2;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kConsumerRegisters = 208;  // 0: left as compiled
constexpr int kProducerRegisters = 48;
constexpr int kSmemBytes = 43008;
constexpr int kParamsBytes = 704;
// END CONFIG

constexpr int kRows = 64;                   // query rows of one consumer
constexpr int kConsumerThreads = 128 * kConsumers;
constexpr bool kPingPong = kConsumers > 1;  // consumers take turns at the tensor cores
constexpr dsv::uint32 kTileBytesQ = dsv::tile_bytes(kRows, kHeadDim);
constexpr dsv::uint32 kTileBytesKv = dsv::tile_bytes(kBlockN, kHeadDim);

static_assert(kBlockM == kRows * kConsumers, "one wgmma M of 64 rows a consumer");
static_assert(kHeadDim % 16 == 0, "whole K steps of the products");
static_assert(kQueryGroup % kBlockM == 0, "a CTA lies within one group");

struct Params {
    dsv::TensorMap map_q;         // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_k;         // [B, Skv, Hkv, D], box 8 rows; unused for tokens
    dsv::TensorMap map_v;         // [B, Skv, Hkv, D], box 8 rows; unused for tokens
    dsv::TensorMap map_o;         // [B, Sq, H, D], box 64 rows
    dsv::TensorView k;            // [B, Skv, Hkv, D]
    dsv::TensorView v;            // [B, Skv, Hkv, D]
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

using Gather = dsv::Gather<Element, kHeadDim, kQueryGroup, kKvBlock, kBlockN>;
using Walk = Gather::Walk;

// Feeds Q once, then K and V tile by tile, K one tile ahead so that the next Q K^T never waits for a V. Ids are read one
// tile ahead of K.
__device__ __forceinline__ void produce(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int first_row = cta.x * kBlockM, head = cta.y, batch = cta.z;
    const Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);
    const int kv_head = head / (p.sizes.num_heads / p.sizes.num_kv_heads);
    if (walk.tiles == 0) return;
    if (threadIdx.x == kConsumerThreads) {
        dsv::mbarrier_arrive_expect(&smem.full_q, kConsumers * kTileBytesQ);
        for (int c = 0; c < kConsumers; ++c) {
            dsv::tma_load_tile<kHeadDim, kRows>(smem.q[c], &p.map_q, &smem.full_q, first_row + c * kRows, head, batch);
        }
    }
    __syncwarp();

    dsv::RingState<kStages> ring_k, ring_v;
    int next = Gather::fetch(walk, 0, p.sizes.seqlen_kv);
    int values = next;
#pragma unroll 1
    for (int t = 0; t <= walk.tiles; ++t) {
        const int keys = next;
        if (t + 1 < walk.tiles) next = Gather::fetch(walk, t + 1, p.sizes.seqlen_kv);
        if (t < walk.tiles) {
            dsv::mbarrier_wait(&smem.empty_k[ring_k.index], ring_k.phase ^ 1);
            Gather::load(smem.k[ring_k.index], {&p.map_k, &p.k}, &smem.full_k[ring_k.index], keys, kv_head, batch);
            ring_k.advance();
        }
        if (t > 0) {
            dsv::mbarrier_wait(&smem.empty_v[ring_v.index], ring_v.phase ^ 1);
            Gather::load(smem.v[ring_v.index], {&p.map_v, &p.v}, &smem.full_v[ring_v.index], values, kv_head, batch);
            ring_v.advance();
        }
        values = keys;
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
        const int valid = walk.valid_in_first(p.sizes.seqlen_kv);
        dsv::RingState<kStages> ring_k, ring_v;
        dsv::mbarrier_wait(&smem.full_q, 0);
        if constexpr (kPingPong) {
            if (consumer == 0) dsv::named_arrive(kTurnBarrier, 256);
        }

        float s[kBlockN / 2];
        dsv::uint32 probabilities[kBlockN / 16][4];
        float rescale[2];
        const auto wait_for_keys = [&] { Gather::acquire(&smem.full_k[ring_k.index], ring_k.phase); };
        const auto issue_scores = [&] {
            if constexpr (kPingPong) dsv::named_sync(kTurnBarrier + consumer, 256);
            dsv::pin(s);
            dsv::wgmma_fence();
            dsv::product_of_rows<Element, kBlockN, kHeadDim, dsv::PlainTile<kRows>, Gather::Tile>(s, smem.q[consumer],
                                                                                         smem.k[ring_k.index]);
            dsv::wgmma_commit();
        };
        const auto issue_output = [&] {
            Gather::acquire(&smem.full_v[ring_v.index], ring_v.phase);
            dsv::pin(o);
            dsv::wgmma_fence();
            dsv::product_over_rows<Element, kHeadDim, kBlockN, Gather::Tile>(o, probabilities, smem.v[ring_v.index], true);
            dsv::wgmma_commit();
        };
        const auto pass_turn = [&](bool last_turn) {
            if constexpr (kPingPong) {
                if (!(last_turn && consumer == kConsumers - 1)) {
                    dsv::named_arrive(kTurnBarrier + (consumer + 1) % kConsumers, 256);
                }
            }
        };
        const auto release = [&](dsv::uint64* barrier) {
            if (warp_leader) dsv::mbarrier_arrive(barrier);
        };

        wait_for_keys();
        issue_scores();
        pass_turn(walk.tiles == 1);
        dsv::wgmma_wait<0>();
        dsv::pin(s);
        release(&smem.empty_k[ring_k.index]);
        ring_k.advance();
        if (valid < kBlockN) dsv::mask_tail<kBlockN>(s, valid, -dsv::kInf);
        softmax.step(s, scale_log2, rescale);
        dsv::to_operand<Element, kBlockN>(probabilities, s);
        if (walk.tiles > 1) wait_for_keys();

        for (int t = 1; t < walk.tiles; ++t) {
            issue_scores();
            issue_output();
            pass_turn(t == walk.tiles - 1);
            dsv::wgmma_wait<1>();
            dsv::pin(s);
            release(&smem.empty_k[ring_k.index]);
            ring_k.advance();
            softmax.step(s, scale_log2, rescale);
            dsv::pin(s);
            // The next keys are awaited here because the loop of that wait keeps the compiler from moving the
            // exponentials behind the wait for P V, where no product would run under them.
            if (t + 1 < walk.tiles) wait_for_keys();
            dsv::wgmma_wait<0>();
            dsv::pin(o);
            release(&smem.empty_v[ring_v.index]);
            ring_v.advance();
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= rescale[i / 2 % 2];
            dsv::to_operand<Element, kBlockN>(probabilities, s);
        }
        issue_output();
        dsv::wgmma_wait<0>();
        dsv::pin(o);
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
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_fwd_bf16_d64_qg64_kb1_spany_m64n64_g1c1s2x1_grid_det_sm90a(const __grid_constant__ Params p) {
    // Swizzle atoms are 1024 bytes; a driver that aligned shared memory less would have to be told from here.
    extern __shared__ __align__(1024) dsv::uint8 raw[];
    if (dsv::smem_address(raw) % 1024 != 0) __trap();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(raw);

    if (threadIdx.x == 0) {
        dsv::mbarrier_init(&smem.full_q, 1);
        for (int i = 0; i < kStages; ++i) {
            dsv::mbarrier_init(&smem.full_k[i], Gather::kArrivals);
            dsv::mbarrier_init(&smem.full_v[i], Gather::kArrivals);
            dsv::mbarrier_init(&smem.empty_k[i], kConsumerThreads / 32);
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
