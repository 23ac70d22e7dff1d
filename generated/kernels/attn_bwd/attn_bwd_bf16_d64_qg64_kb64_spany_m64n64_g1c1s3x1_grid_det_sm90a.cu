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
// Registers of a consumer: dK and dV head_dim, S and dP 64, their operands 32, a dQ chunk 32; about 220. At head_dim 256
// two consumers share 64 KV rows: dK and dV 128 (half the columns), S and dP 32 (half the queries), a dQ chunk 32.
// Shared memory: K and V (dK and dV in the epilogue), the ring of Q, dO and row statistics, dS, and dQ on its way out; at
// head_dim 256 P beside dS, and no dQ.
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
constexpr int kConsumers = 1;  // warpgroups of 64 KV rows; two with kBlockN 64 split head_dim
constexpr int kStages = 3;
constexpr bool kDeterministic = true;  // leaves dQ to attn_bwd_dq
constexpr bool kRing = false;  // of its list a CTA takes what is next from where those of its head are by now
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kConsumerRegisters = 224;  // 0: left as compiled
constexpr int kProducerRegisters = 32;
constexpr int kSmemBytes = 68096;
constexpr int kParamsBytes = 1024;
// END CONFIG

constexpr bool kDense = kKvBlock == 0;
constexpr int kRows = 64;                                             // KV rows of one consumer
constexpr bool kByColumns = kBlockN < kRows * kConsumers;             // consumers share them, and split the columns
constexpr int kTilesPerBlock = kDense ? 1 : kKvBlock / kBlockN;       // KV tiles of one listed block
constexpr int kTilesPerGroup = kDense ? 1 : kQueryGroup / kBlockM;    // query tiles of one listing group
constexpr int kHalves = kBlockM / 64;                                 // 64 queries: of the copies and of dQ's accumulator
constexpr int kConsumerThreads = 128 * kConsumers;
constexpr int kDsBuffers = kConsumers == 1 ? 1 : 2;
// Of dQ a consumer makes its share of the columns, a slab each where the last is short, or, with as many halves as
// consumers, all columns of its half.
constexpr bool kShortSlab = kHeadDim % dsv::kSlabColumns != 0;
constexpr bool kDqByRows = kHalves > 1;
constexpr bool kDqUneven = !kDeterministic && kConsumers > 1 && !kDqByRows && kShortSlab;
constexpr int kDqColumns = kDqByRows || kConsumers == 1 ? kHeadDim : kShortSlab ? dsv::kSlabColumns : kHeadDim / 2;  // of the first
constexpr dsv::uint32 kTileBytesKv = dsv::tile_bytes(kBlockN, kHeadDim);
constexpr dsv::uint32 kTileBytesQ = dsv::tile_bytes(kBlockM, kHeadDim);
constexpr dsv::uint32 kStatBytes = kBlockM * 4;
constexpr dsv::uint32 kDsBytes = kDeterministic && !kByColumns ? 16 : kBlockN * kBlockM * 2;
constexpr dsv::uint32 kPBytes = kByColumns ? kBlockN * kBlockM * 2 : 16;
// dQ goes to the copy engine, which adds it while the consumers go on, where shared memory has two rooms for it, beside a
// second CTA if there is one: the copy engine reads the one at L2's pace while the other is written. Else it is added from
// the registers.
constexpr int kDqBuffers = 2;
constexpr dsv::uint32 kDqRoom = 64 * kDqColumns * 4;  // of one consumer
constexpr dsv::uint32 kTilesBytes = 2 * kTileBytesKv + 2 * kStages * (kTileBytesQ + kStatBytes) + kDsBuffers * kDsBytes;
constexpr bool kStagedDq = !kDeterministic && !kByColumns && (kConsumers > 1 || kHeadDim <= 64) &&
                           kTilesBytes + kDqBuffers * kConsumers * kDqRoom + 1024 <= kSmemBytes;
constexpr dsv::uint32 kDqBytes = kStagedDq ? kDqRoom : 16;
// Consumers make dQ of a tile while they are at the next: neither waits for the other's dS. At head_dim 128 it costs 4 to 7 %.
constexpr bool kDqLater = kStagedDq && kDqByRows;
// S of the next tile is issued behind dQ of this one, so that the tensor cores have work while dQ is staged and, dP being
// behind it, while P is made. dK goes ahead of dQ then: its registers are S's.
constexpr bool kEarlyS = !kDeterministic && !kByColumns && !kDqLater && kStages > 1 && (kStagedDq || kConsumers > 1);
// Where dP has registers beside dQ, dQ is staged under both.
constexpr bool kDpBesideDq = kHeadDim <= 64;
// dK may run into the next tile, which then needs a stage of its own; with dQ of 96 columns beside it registers are too few
// (C7512).
constexpr bool kDkAcross = kStages > 1 && !kDqLater && !kEarlyS && (kDeterministic || !kShortSlab);

// dV beside dP keeps every accumulator and both operands alive at once: 226 registers at head_dim 128.
constexpr bool kEarlyDv = kHalves == 1 && (kHeadDim < 128 || kConsumers > 1);

// LSE and delta are read ahead of S and dP, which else wait for a shared memory that is busy with products. With 128 queries
// there are no registers for them.
constexpr bool kStatisticsEarly = kHalves == 1;
// dQ staged under S is sent when P is made: until then the copy engine may not read it, and no one waits for that. With a
// short slab (head_dim 96) what it needs is short of registers there (C7512).
constexpr bool kSendAfterP = !kShortSlab;

// Of a ring: the CTAs at a time of an H100 or H200 (where they are fewer, its clock is as much slower than they are), a CTA's tiles
// between two ticks of the clock, and the groups it chooses from.
constexpr int kWalkers = 132 * kCtasPerSm;
constexpr int kTick = 4;
constexpr int kWindow = kRing ? 2048 : 32;

static_assert(kHalves == 1 || (kHalves == kConsumers && kHeadDim == 64), "64 queries, or 128 as one 64-column slab");
static_assert(kBlockN == kRows * kConsumers || (kByColumns && kConsumers == 2 && kHeadDim % 128 == 0 && kStages > 1),
              "one wgmma M of 64 rows a consumer, or one for two that take half the columns each");
static_assert(kHeadDim % 16 == 0, "whole K steps");
static_assert(kDense || kKvBlock % kBlockN == 0, "a listed block is whole tiles");
static_assert(kDense || kQueryGroup % kBlockM == 0, "a query tile lies within one group");

struct Params {
    dsv::TensorMap map_q;          // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_do;         // [B, Sq, H, D], box 64 rows
    dsv::TensorMap map_k;          // [B, Skv, Hkv, D], box kBlockN rows
    dsv::TensorMap map_v;          // [B, Skv, Hkv, D], box kBlockN rows
    dsv::TensorMap map_dk;         // [B, Skv, Hkv, D], box 64 rows
    dsv::TensorMap map_dv;         // [B, Skv, Hkv, D], box 64 rows
    dsv::TensorMap map_rows;       // [2, B * H * Sq_padded]: lse_log2 and delta, box 64 of one
    float* dq_accum;               // [B, H, Sq_padded / 64, D / 8, 128, 4], see reduce_dq; before it the ring's clocks
    const dsv::int32* k2q_offset;  // [B, H, N + 1]
    const dsv::int32* k2q_index;   // [B, H, G * max_selected]
    const dsv::int32* kv_order;    // [B, Hkv, N] of attn_bwd_prep: KV blocks, the longest list first; null when dense
    dsv::int32* error_flag;        // [1]
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

struct SharedStorage {
    dsv::uint8 k[kTileBytesKv];  // dK in the epilogue
    dsv::uint8 v[kTileBytesKv];  // dV in the epilogue
    dsv::uint8 q[kStages][kTileBytesQ];
    dsv::uint8 d_o[kStages][kTileBytesQ];
    dsv::uint8 ds[kDsBuffers][kDsBytes];  // dS^T, [KV rows][64 queries]; unused when kDeterministic, but by kByColumns
    dsv::uint8 p[kDsBuffers][kPBytes];    // P^T likewise; unused unless kByColumns
    dsv::uint8 dq[kDqBuffers][kConsumers][kDqBytes];  // f32, in the accumulator's order; unused unless kStagedDq
    alignas(128) float lse_log2[kStages][kBlockM];
    alignas(128) float delta[kStages][kBlockM];
    dsv::uint64 full_kv;
    dsv::uint64 full_q[kStages], empty_q[kStages];
    dsv::uint64 full_do[kStages], empty_do[kStages];
    dsv::uint64 full_ds[kDsBuffers], empty_ds[kDsBuffers];  // dS of all consumers, when kDqLater
    int kv_tile;              // of this CTA
    int query_tile[kStages];  // of a stage, in 64 queries over batch and heads; -1 ends the walk
    // When kRing, of the head at hand: its clock, the ticks in which all go round once, and a bit for each group that is left.
    dsv::uint32* clock;
    float round;
    dsv::uint32 left[kWindow / 32];
};
static_assert(sizeof(SharedStorage) <= kSmemBytes, "the host asks for less shared memory");

// Named barriers: all consumers on a written dS, all consumers before the epilogue, each consumer on its written dQ.
constexpr int kDsBarrier = 1;
constexpr int kEpilogueBarrier = 2;
constexpr int kDqBarrier = 3;

// Hands stage after stage to the consumers: Q with LSE, then dO with delta. Keeps little, since the producer has 24
// registers: where the CTA lies is read again for each tile.
struct Producer {
    const Params& p;
    SharedStorage& smem;
    dsv::uint32 fed = 0;  // tiles

    // One thread. A head's clock counts the tiles of its CTAs; kWalkers at a time each go round once in as many as a list has on
    // average. It may begin anywhere, so it is never set.
    __device__ __forceinline__ void read_clock(int head) const {
        const int slab = dsv::cta_index().z * p.sizes.num_heads + head;
        smem.clock = reinterpret_cast<dsv::uint32*>(p.dq_accum) - 1 - slab;
        const int listed = p.k2q_offset[dsv::int64{slab + 1} * (p.sizes.num_kv_blocks + 1) - 1];  // in the whole head
        smem.round = fmaxf(static_cast<float>(listed) / p.sizes.num_kv_blocks, 1.0f) * (kTilesPerGroup * kWalkers);
    }
    // One thread. The group at which the CTAs of the head are by now.
    __device__ __forceinline__ int now() const {
        const float rounds = __fdividef(static_cast<float>(*const_cast<volatile dsv::uint32*>(smem.clock)), smem.round);
        return static_cast<int>((rounds - floorf(rounds)) * p.sizes.num_groups);
    }

    __device__ __forceinline__ dsv::uint32 stage() const { return fed % kStages; }
    // Of the barrier of a stage that is to be free.
    __device__ __forceinline__ dsv::uint32 phase() const { return fed / kStages % 2 ^ 1; }

    // One thread.
    __device__ __forceinline__ void feed(int tile, int head) {
        // 32 bits: 2^31 rows of Q would be 256 GiB.
        const int batch = dsv::cta_index().z;
        const int row = (batch * p.sizes.num_heads + head) * p.sizes.seqlen_q_padded + tile * kBlockM;
        const dsv::uint32 s = stage();
        dsv::mbarrier_wait(&smem.empty_q[s], phase());
        smem.query_tile[s] = row / 64;
        if (kRing && fed % kTick == 0) atomicAdd(smem.clock, kTick);
        dsv::mbarrier_arrive_expect(&smem.full_q[s], kTileBytesQ + kStatBytes);
        load(smem.q[s], p.map_q, smem.lse_log2[s], 0, &smem.full_q[s], tile * kBlockM, head, batch, row);
        dsv::mbarrier_wait(&smem.empty_do[s], phase());
        dsv::mbarrier_arrive_expect(&smem.full_do[s], kTileBytesQ + kStatBytes);
        load(smem.d_o[s], p.map_do, smem.delta[s], 1, &smem.full_do[s], tile * kBlockM, head, batch, row);
    }

    // A tile and its row statistics, 64 queries a copy.
    __device__ __forceinline__ void load(dsv::uint8* to, const dsv::TensorMap& map, float* statistics, int which,
                                         dsv::uint64* barrier, int query, int head, int batch, int row) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            dsv::tma_load_tile<kHeadDim, 64>(to + half * 64 * dsv::kRowBytes, &map, barrier, query + 64 * half, head, batch);
            dsv::tma_load_row(statistics + half * 64, &p.map_rows, barrier, row + 64 * half, which);
        }
    }

    __device__ __forceinline__ void finish() {
        dsv::mbarrier_wait(&smem.empty_q[stage()], phase());
        smem.query_tile[stage()] = -1;
        dsv::mbarrier_arrive(&smem.full_q[stage()]);
    }
};

// The groups that list this CTA's KV block in a head; none, and a flag, where the offsets are no offsets.
struct List {
    const dsv::int32* groups;
    int edges;
};
__device__ __forceinline__ List list_of(const Params& p, const SharedStorage& smem, int head) {
    const dsv::int64 slab = dsv::cta_index().z * p.sizes.num_heads + head;
    const dsv::int32* offset = p.k2q_offset + slab * (p.sizes.num_kv_blocks + 1) + smem.kv_tile / kTilesPerBlock;
    const dsv::int64 width = dsv::int64{p.sizes.num_groups} * p.sizes.max_selected;
    const int begin = offset[0];
    int edges = offset[1] - begin;
    if (begin < 0 || edges < 0 || begin + dsv::int64{edges} > width) {
        if (threadIdx.x % 32 == 0) atomicOr(p.error_flag, dsv::kCountOutOfRange);
        edges = 0;
    }
    return {p.k2q_index + slab * width + begin, edges};
}

// One warp. Notes which groups of a window a list has.
__device__ __forceinline__ void note_left(const Params& p, SharedStorage& smem, List list, int window) {
    const int lane = dsv::lane_id();
    for (int i = lane; i < kWindow / 32; i += 32) smem.left[i] = 0;
    __syncwarp();
#pragma unroll 1
    for (int edge = lane; edge < list.edges; edge += 32) {
        int group = list.groups[edge];
        if (static_cast<unsigned>(group) >= static_cast<unsigned>(p.sizes.num_groups)) {
            atomicOr(p.error_flag, dsv::kIndexOutOfRange);
            group = p.sizes.num_groups - 1;
        }
        group -= window;
        if (group >= 0 && group < kWindow) atomicOr(&smem.left[group / 32], 1u << group % 32);
    }
    __syncwarp();
}

// One warp. Takes the first group from `from` on that is left, round the end of the window; -1 where none is.
__device__ __forceinline__ int take_next(const Params& p, SharedStorage& smem, int from) {
    const int lane = threadIdx.x % 32;
    const int words = min(p.sizes.num_groups + 31, kWindow) / 32;
    dsv::uint32 mask = ~0u << from % 32;
    // 32 words at a time: on to the end, and then all.
    int word = from / 32;
#pragma unroll 1
    for (bool again = true; word < words || again; word += 32) {
        if (word >= words) {
            again = false;
            word = 0;
            mask = ~0u;
        }
        dsv::uint32 bits = word + lane < words ? smem.left[word + lane] : 0;
        if (lane == 0) bits &= mask;
        mask = ~0u;
        const unsigned found = __ballot_sync(0xFFFFFFFF, bits != 0);
        if (found != 0) {
            const int owner = __ffs(found) - 1;
            if (lane == owner) smem.left[word + lane] &= ~(bits & -bits);
            __syncwarp();
            return 32 * (word + owner) + __ffs(__shfl_sync(0xFFFFFFFF, bits, owner)) - 1;
        }
    }
    return -1;
}

// One warp. The tiles of a head's list, in the order of a ring. Where the list lies is found again for each window: registers.
__device__ __forceinline__ void produce_ring(Producer& producer, int head) {
    const Params& p = producer.p;
    const bool leader = threadIdx.x % 32 == 0;
    if (leader) producer.read_clock(head);
#pragma unroll 1
    for (int window = 0; window < p.sizes.num_groups; window += kWindow) {
        note_left(p, producer.smem, list_of(p, producer.smem, head), window);
#pragma unroll 1
        for (;;) {
            int group = leader ? min(max(producer.now() - window, 0), kWindow - 1) : 0;
            group = take_next(p, producer.smem, __shfl_sync(0xFFFFFFFF, group, 0));
            if (group < 0) break;
            group += window;
#pragma unroll 1
            for (int tile = group * kTilesPerGroup; tile < (group + 1) * kTilesPerGroup; ++tile) {
                if (tile >= p.sizes.seqlen_q_padded / kBlockM) break;  // the last group may be short
                if (leader) producer.feed(tile, head);
                ++producer.fed;
            }
        }
    }
}

__device__ __forceinline__ void produce(const Params& p, SharedStorage& smem) {
    const int3 cta = dsv::cta_index();
    const int kv_tile = smem.kv_tile, kv_head = cta.y;
    const int lane = threadIdx.x % 32;
    const bool leader = lane == 0;
    if (leader) {
        dsv::mbarrier_arrive_expect(&smem.full_kv, 2 * kTileBytesKv);
        dsv::tma_load_tile<kHeadDim, kBlockN, dsv::L2::kEvictFirst>(smem.k, &p.map_k, &smem.full_kv, kv_tile * kBlockN, kv_head,
                                                                    cta.z);
        dsv::tma_load_tile<kHeadDim, kBlockN, dsv::L2::kEvictFirst>(smem.v, &p.map_v, &smem.full_kv, kv_tile * kBlockN, kv_head,
                                                                    cta.z);
    }
    Producer producer{p, smem};
    const auto heads_per_kv = [&] { return p.sizes.num_heads / p.sizes.num_kv_heads; };
#pragma unroll 1
    for (int head = kv_head * heads_per_kv(); head < (dsv::cta_index().y + 1) * heads_per_kv(); ++head) {
        if constexpr (kDense) {
            const int tiles = p.sizes.seqlen_q_padded / kBlockM;
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile) {
                if (leader) producer.feed(tile, head);
                ++producer.fed;
            }
        } else if constexpr (kRing) {
            produce_ring(producer, head);
        } else {
            const List list = list_of(p, smem, head);
            int fetched = 0;  // lane i holds the i-th of the next 32 groups
#pragma unroll 1
            for (int step = 0; step < list.edges * kTilesPerGroup; ++step) {
                const int e = step / kTilesPerGroup;
                if (step % (32 * kTilesPerGroup) == 0 && e + lane < list.edges) {
                    fetched = list.groups[e + lane];
                    if (static_cast<unsigned>(fetched) >= static_cast<unsigned>(p.sizes.num_groups)) {
                        atomicOr(p.error_flag, dsv::kIndexOutOfRange);
                        fetched = p.sizes.num_groups - 1;
                    }
                }
                const int tile = __shfl_sync(0xFFFFFFFF, fetched, e % 32) * kTilesPerGroup + step % kTilesPerGroup;
                if (tile < p.sizes.seqlen_q_padded / kBlockM) {  // the last group may be short
                    if (leader) producer.feed(tile, head);
                    ++producer.fed;
                }
                __syncwarp();
            }
        }
    }
    if (leader) producer.finish();
}

// Adds a fragment of 64 rows, whose columns begin at `column`, to the accumulator of 64 queries. The accumulator
// keeps fragments as they are, [D / 8][128 threads][4], so that a warp adds 512 contiguous bytes; attn_bwd_post puts
// elements in their places.
template <int count>
__device__ __forceinline__ void reduce_dq(float* tile, int column, const float (&dq)[count]) {
    float* target = tile + (column / 8 * 128 + threadIdx.x % 128) * 4;
#pragma unroll
    for (int j = 0; j < count / 4; ++j) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target + j * 512), "f"(dq[4 * j]),
                     "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                     : "memory");
    }
}

// The same by way of shared memory, in the same order: written first,
template <int count>
__device__ __forceinline__ void stage_dq(float* staged, const float (&dq)[count]) {
    float4* target = reinterpret_cast<float4*>(staged) + threadIdx.x % 128;
#pragma unroll
    for (int j = 0; j < count / 4; ++j) {
        target[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
}
// and some time later, when no one waits for the writes, sent; `staged` is read until a bulk_wait_read of the consumer's
// thread 0.
template <int count>
__device__ __forceinline__ void send_dq(float* tile, int column, float* staged, int barrier) {
    dsv::fence_async_proxy();
    dsv::named_sync(barrier, 128);
    if (threadIdx.x % 128 == 0) {
        dsv::bulk_reduce_add(tile + column / 8 * 512, staged, count * 128 * 4);
        dsv::bulk_commit();
    }
}

// A consumer of 64 KV rows, which makes dQ of dq_columns columns from dq_column on.
template <int dq_columns>
__device__ __forceinline__ void consume(const Params& p, SharedStorage& smem, int dq_column) {
    constexpr int kChunk = dq_columns % 64 == 0 ? 64 : dq_columns;  // columns of one product
    constexpr int kChunks = dq_columns / kChunk;
    static_assert(!kStagedDq || kChunks == 1, "dQ of a consumer leaves as one piece");
    const int3 cta = dsv::cta_index();
    const int kv_tile = smem.kv_tile, kv_head = cta.y, batch = cta.z;
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
    using Statistic = float2[kBlockM / 8];             // LSE or delta of the thread's queries
    const auto read = [&](Statistic& of, const float* row) {
#pragma unroll
        for (int j = 0; j < kBlockM / 8; ++j) of[j] = *reinterpret_cast<const float2*>(row + 8 * j + 2 * (lane % 4));
    };
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
    const auto make_p = [&](Scores& s, Statistic& lse, int stage) {
        dsv::pin(s);
        if constexpr (!kStatisticsEarly) read(lse, smem.lse_log2[stage]);
#pragma unroll
        for (int i = 0; i < kBlockM / 2; ++i) {
            s[i] = dsv::exp2_fast(s[i] * scale_log2 - (i % 2 == 0 ? lse[i / 4].x : lse[i / 4].y));
        }
        if (cut) {
#pragma unroll
            for (int i = 0; i < kBlockM / 2; ++i) {
                if (my_row + i / 2 % 2 * 8 >= valid) s[i] = 0.0f;
            }
        }
    };
    // dP becomes dS, as operand.
    const auto make_ds = [&](Operand& ds_operand, Scores& dp, const Scores& s, Statistic& delta, int stage) {
        dsv::pin(dp);
        if constexpr (!kStatisticsEarly) read(delta, smem.delta[stage]);
#pragma unroll
        for (int i = 0; i < kBlockM / 2; ++i) dp[i] = s[i] * (dp[i] - (i % 2 == 0 ? delta[i / 4].x : delta[i / 4].y));
        dsv::to_operand<Element, kBlockM>(ds_operand, dp);
    };
    // dS into shared memory, for dQ; a fence_async_proxy comes before the tensor cores read it.
    const auto share_ds = [&](const Operand& ds_operand, int buffer, dsv::uint32 phase) {
        if constexpr (kDqLater) dsv::mbarrier_wait(&smem.empty_ds[buffer], phase ^ 1);
        if constexpr (!kDeterministic) {
            // A lone buffer may still be read by another warp's dQ of the step before.
            if constexpr (kDsBuffers == 1) dsv::named_sync(kDsBarrier, kConsumerThreads);
            dsv::store_fragment<kBlockM, kBlockN>(smem.ds[buffer], kv_row, ds_operand);
        }
    };

    // Until the room that dQ is staged in next has been read.
    const auto wait_for_staged = [&] {
        if (kStagedDq && threadIdx.x % 128 == 0) dsv::bulk_wait_read<kDqBuffers - 1>();
    };
    const auto dq_room = [&](int turn) { return reinterpret_cast<float*>(smem.dq[turn % kDqBuffers][consumer]); };
    const auto dq_of = [&](int tile) {
        return p.dq_accum + dsv::int64{tile + (kDqByRows ? consumer : 0)} * (64 * kHeadDim);
    };
    // dQ of a tile, the `turn`th, whose dS lies in `buffer`; `after` runs while its product does.
    const auto add_dq = [&](int tile, int turn, int buffer, auto&& after) {
        float* dq_tile = dq_of(tile);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int column = dq_column + chunk * kChunk;
            float dq[kChunk / 2];
            issue_dq(dq, buffer, column);
            if (chunk == 0) {
                after();
            } else {
                dsv::wgmma_wait<0>();
            }
            dsv::pin(dq);
            if constexpr (kStagedDq) {
                if constexpr (kDqLater) {
                    wait_for_staged();
                    dsv::named_sync(kDqBarrier + consumer, 128);
                }
                stage_dq(dq_room(turn), dq);
                if constexpr (!kDqLater) send_dq<kChunk / 2>(dq_tile, column, dq_room(turn), kDqBarrier + consumer);
            } else {
                reduce_dq(dq_tile, column, dq);
            }
        }
    };

    dsv::mbarrier_wait(&smem.full_kv, 0);
    dsv::RingState<kStages> ring;
    // The query tile of the ring's stage once its Q is there; -1 after the last.
    const auto await_tile = [&] {
        dsv::mbarrier_wait(&smem.full_q[ring.index], ring.phase);
        // Read by the lane whose arrival frees the stage.
        int tile = 0;
        if (warp_leader) tile = smem.query_tile[ring.index];
        return __shfl_sync(0xFFFFFFFF, tile, 0);
    };
    if constexpr (kEarlyS) {
        // The loop begins where dV and dK alone are under way: of what crosses its end nothing may be read but by
        // products (C7514).
        const auto until_dk = [&](Scores& s, Scores& dp, Statistic& lse, int buffer, auto&& beside_dv) {
            const int stage = ring.index;
            Operand p_operand, ds_operand;
            Statistic delta;
            dsv::wgmma_wait<1>();
            make_p(s, lse, stage);
            dsv::to_operand<Element, kBlockM>(p_operand, s);
            issue_dv(p_operand, stage);
            if constexpr (kStatisticsEarly) read(delta, smem.delta[stage]);
            beside_dv();
            dsv::wgmma_wait<1>();
            make_ds(ds_operand, dp, s, delta, stage);
            share_ds(ds_operand, buffer, 0);
            issue_dk(ds_operand, stage);
        };
        int tile = await_tile();
        if (tile >= 0) {
            Scores s, dp;
            Statistic lse;
            issue_s(s, ring.index);
            if constexpr (kStatisticsEarly) read(lse, smem.lse_log2[ring.index]);
            dsv::mbarrier_wait(&smem.full_do[ring.index], ring.phase);
            issue_dp(dp, ring.index);
            until_dk(s, dp, lse, 0, [] {});
            // Once: what is under way where paths meet is taken for read.
            dsv::wgmma_wait<0>();
            dsv::pin(dv);
            dsv::pin(dk);
        }
        for (int step = 0; tile >= 0; ++step) {
            const int stage = ring.index;
            ring.advance();
            const int next = await_tile();
            // dS before the tensor cores read it, and this stage's LSE and delta before the copy engine overwrites them.
            dsv::fence_async_proxy();
            wait_for_staged();
            dsv::named_sync(kDsBarrier, kConsumerThreads);
            float dq[kChunk / 2];
            const auto put_dq = [&] {
                dsv::pin(dq);
                if constexpr (kStagedDq) {
                    stage_dq(dq_room(step), dq);
                } else {
                    reduce_dq(dq_of(tile), dq_column, dq);
                }
            };
            const auto finish_dq = [&] {
                if constexpr (kStagedDq) send_dq<kChunk / 2>(dq_of(tile), dq_column, dq_room(step), kDqBarrier + consumer);
            };
            // Issued on two paths: where one leaves the loop, none whose registers are read may be under way (C7514).
            if (next < 0) {
                issue_dq(dq, step % kDsBuffers, dq_column);
                dsv::wgmma_wait<0>();
                dsv::pin(dv);
                dsv::pin(dk);
                put_dq();
                finish_dq();
                break;
            }
            issue_dq(dq, step % kDsBuffers, dq_column);
            dsv::wgmma_wait<1>();
            dsv::pin(dv);
            dsv::pin(dk);
            release(&smem.empty_do[stage]);
            release(&smem.empty_q[stage]);
            Scores s, dp;
            issue_s(s, ring.index);
            // LSE ahead of dP, which would keep shared memory from answering just when all wait for P.
            Statistic lse;
            if constexpr (kStatisticsEarly) read(lse, smem.lse_log2[ring.index]);
            dsv::mbarrier_wait(&smem.full_do[ring.index], ring.phase);
            if constexpr (kDpBesideDq) issue_dp(dp, ring.index);
            dsv::wgmma_wait<kDpBesideDq ? 2 : 1>();
            put_dq();
            if constexpr (!kSendAfterP) finish_dq();
            if constexpr (!kDpBesideDq) issue_dp(dp, ring.index);
            until_dk(s, dp, lse, (step + 1) % kDsBuffers, [&] {
                if constexpr (kSendAfterP) finish_dq();
            });
            tile = next;
        }
    } else {
        dsv::RingState<2> ds_ring, dq_ring;  // of dS written, and of dS read, when kDqLater
        int pending = -1;                    // tile whose dQ is still to be made, when kDqLater
        int previous = -1;                   // stage of the tile before, if its dK still runs
        int unsent = -1;                     // tile whose dQ is staged, when kDqLater
        int step = 0;
        const auto send_staged = [&] {
            if (unsent >= 0) send_dq<kChunk / 2>(dq_of(unsent), dq_column, dq_room(step - 1), kDqBarrier + consumer);
            unsent = -1;
        };
        for (;; ++step) {
            const int tile = await_tile();
            if (tile < 0) break;
            const int stage = ring.index;
            // Of this tile alone: what a name outlives takes registers from dQ.
            Scores s, dp;
            Operand p_operand, ds_operand;
            Statistic lse, delta;
            issue_s(s, stage);
            if constexpr (kStatisticsEarly) read(lse, smem.lse_log2[stage]);
            dsv::mbarrier_wait(&smem.full_do[stage], ring.phase);
            if constexpr (kDkAcross) {
                dsv::wgmma_wait<1>();  // dK of the tile before, whose operand lies where dP goes
                dsv::pin(dk);
                if (previous >= 0) release(&smem.empty_q[previous]);
            }
            issue_dp(dp, stage);
            if constexpr (kDqLater) send_staged();
            dsv::wgmma_wait<1>();
            make_p(s, lse, stage);
            dsv::to_operand<Element, kBlockM>(p_operand, s);
            if constexpr (kEarlyDv) issue_dv(p_operand, stage);
            if constexpr (kStatisticsEarly) read(delta, smem.delta[stage]);
            dsv::wgmma_wait<kEarlyDv ? 1 : 0>();  // dP; an early dV runs while dS is made
            make_ds(ds_operand, dp, s, delta, stage);
            share_ds(ds_operand, kDqLater ? ds_ring.index : step % kDsBuffers, ds_ring.phase);
            // dS before the tensor cores read it, and this stage's LSE and delta before the copy engine overwrites them.
            dsv::fence_async_proxy();
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
                    add_dq(pending, step, dq_ring.index, [&] {
                        dsv::wgmma_wait<1>();
                        free_stage();
                        dsv::wgmma_wait<0>();
                        release(&smem.empty_ds[dq_ring.index]);
                    });
                    dq_ring.advance();
                    unsent = pending;
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
                add_dq(tile, step, step % kDsBuffers, issue_dk_and_free_do);
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
        if constexpr (kDqLater) {
            send_staged();
            if (pending >= 0) {
                dsv::mbarrier_wait(&smem.full_ds[dq_ring.index], dq_ring.phase);
                add_dq(pending, step, dq_ring.index, [] { dsv::wgmma_wait<0>(); });
                unsent = pending;
                ++step;
                send_staged();
            }
        }
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

// One of two consumers of the same 64 KV rows. Each makes S, P, dP and dS of 32 of the tile's 64 queries, and, once P and
// dS of both lie in shared memory, dV, dK and dQ of its `columns` columns.
template <int columns>
__device__ __forceinline__ void consume_columns(const Params& p, SharedStorage& smem) {
    constexpr int kQueries = kBlockM / 2;
    constexpr int kChunk = columns / 2;  // columns of one product of dQ
    const int3 cta = dsv::cta_index();
    const int kv_tile = smem.kv_tile, kv_head = cta.y, batch = cta.z;
    const int consumer = dsv::warpgroup_index();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const bool warp_leader = lane == 0;
    const int query = consumer * kQueries;  // in the tile
    const float scale_log2 = p.sizes.scale_log2;
    // Keys of this CTA that exist; only the last tile is short.
    const int valid = p.sizes.seqlen_kv - kv_tile * kBlockN;
    const int my_row = 16 * warp + lane / 4;
    // Offset of the consumer's columns in a tile of 64 rows.
    const dsv::uint32 my_slabs = consumer * (columns / 64) * dsv::slab_bytes(64);

    float dk[columns / 2];
    float dv[columns / 2];
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) dk[i] = dv[i] = 0.0f;

    const auto release = [&](dsv::uint64* barrier) {
        __syncwarp();
        if (warp_leader) dsv::mbarrier_arrive(barrier);
    };
    using Scores = float[kQueries / 2];            // S and P, or dP and dS, transposed
    using Operand = dsv::uint32[kQueries / 16][4];  // P or dS
    const auto issue_scores = [&](Scores& s, const dsv::uint8* of_keys, const dsv::uint8* of_queries) {
        dsv::wgmma_fence();
        dsv::gemm_ss_kk<Element, kQueries, kHeadDim, 64, 64>(s, of_keys, of_queries + query * dsv::kRowBytes);
        dsv::wgmma_commit();
    };
    const auto issue_sum = [&](float (&sum)[columns / 2], const dsv::uint8* of_keys, const dsv::uint8* of_queries) {
        dsv::pin(sum);
        dsv::wgmma_fence();
        dsv::gemm_ss_k_mn<Element, columns, 64>(sum, of_keys, of_queries + my_slabs);
        dsv::wgmma_commit();
    };
    const auto issue_dq = [&](float (&dq)[kChunk / 2], int buffer, int chunk) {
        dsv::wgmma_fence();
        dsv::gemm_ss_mn<Element, kChunk, 64>(dq, smem.ds[buffer], smem.k + my_slabs + chunk * (kChunk / 64) * dsv::slab_bytes(64));
        dsv::wgmma_commit();
    };
    const auto add_dq = [&](float (&dq)[kChunk / 2], int tile, int chunk) {
        dsv::pin(dq);
        reduce_dq(p.dq_accum + dsv::int64{tile} * (64 * kHeadDim), consumer * columns + chunk * kChunk, dq);
    };
    // S becomes P, here and in shared memory.
    const auto make_p = [&](Scores& s, int stage, int buffer) {
        dsv::pin(s);
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j) {
            const float2 lse = *reinterpret_cast<const float2*>(&smem.lse_log2[stage][query + 8 * j + 2 * (lane % 4)]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[4 * j + i] = dsv::exp2_fast(s[4 * j + i] * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
            }
        }
        if (valid < kBlockN) {
#pragma unroll
            for (int i = 0; i < kQueries / 2; ++i) {
                if (my_row + i / 2 % 2 * 8 >= valid) s[i] = 0.0f;
            }
        }
        Operand packed;
        dsv::to_operand<Element, kQueries>(packed, s);
        dsv::store_fragment<kQueries, 64>(smem.p[buffer], 0, packed, query);
    };
    // dP becomes dS in shared memory.
    const auto make_ds = [&](Scores& dp, const Scores& s, int stage, int buffer) {
        dsv::pin(dp);
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j) {
            const float2 delta = *reinterpret_cast<const float2*>(&smem.delta[stage][query + 8 * j + 2 * (lane % 4)]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta.x : delta.y));
            }
        }
        Operand packed;
        dsv::to_operand<Element, kQueries>(packed, dp);
        dsv::store_fragment<kQueries, 64>(smem.ds[buffer], 0, packed, query);
        // P and dS before the tensor cores read them, and this stage's LSE and delta before the copy engine overwrites
        // them.
        dsv::fence_async_proxy();
    };

    dsv::mbarrier_wait(&smem.full_kv, 0);
    dsv::RingState<kStages> ring;
    // The query tile of the ring's stage once its Q is there; -1 after the last.
    const auto await_tile = [&] {
        dsv::mbarrier_wait(&smem.full_q[ring.index], ring.phase);
        int tile = 0;
        if (warp_leader) tile = smem.query_tile[ring.index];
        return __shfl_sync(0xFFFFFFFF, tile, 0);
    };
    int tile = await_tile();
    if (tile >= 0) {
        const int stage = ring.index;
        Scores s, dp;
        issue_scores(s, smem.k, smem.q[stage]);
        dsv::mbarrier_wait(&smem.full_do[stage], ring.phase);
        issue_scores(dp, smem.v, smem.d_o[stage]);
        dsv::wgmma_wait<0>();
        make_p(s, stage, 0);
        make_ds(dp, s, stage, 0);
    }
    // Two buffers of P and dS: a consumer writes the next while the other's products still read this one's.
    for (int step = 0; tile >= 0; ++step) {
        const int stage = ring.index;
        const int buffer = step % kDsBuffers;
        ring.advance();
        const int next = await_tile();
        dsv::named_sync(kDsBarrier, kConsumerThreads);
        // Issued on two paths: where one leaves the loop, none whose registers are read may be under way (C7514).
        if (next < 0) {
            issue_sum(dv, smem.p[buffer], smem.d_o[stage]);
            issue_sum(dk, smem.ds[buffer], smem.q[stage]);
            if constexpr (!kDeterministic) {
#pragma unroll
                for (int chunk = 0; chunk < 2; ++chunk) {
                    float dq[kChunk / 2];
                    issue_dq(dq, buffer, chunk);
                    dsv::wgmma_wait<0>();
                    add_dq(dq, tile, chunk);
                }
            }
            dsv::wgmma_wait<0>();
            dsv::pin(dv);
            dsv::pin(dk);
            break;
        }
        issue_sum(dv, smem.p[buffer], smem.d_o[stage]);
        issue_sum(dk, smem.ds[buffer], smem.q[stage]);
        float dq[kChunk / 2], dq_rest[kChunk / 2];
        if constexpr (!kDeterministic) issue_dq(dq, buffer, 0);
        Scores s, dp;
        issue_scores(s, smem.k, smem.q[ring.index]);
        // All but S: the stage is free, and dQ goes out while S is made.
        dsv::wgmma_wait<1>();
        dsv::pin(dv);
        dsv::pin(dk);
        release(&smem.empty_do[stage]);
        release(&smem.empty_q[stage]);
        if constexpr (!kDeterministic) add_dq(dq, tile, 0);
        dsv::mbarrier_wait(&smem.full_do[ring.index], ring.phase);
        issue_scores(dp, smem.v, smem.d_o[ring.index]);
        // The other half of dQ runs while P and dS are made.
        if constexpr (!kDeterministic) issue_dq(dq_rest, buffer, 1);
        dsv::wgmma_wait<kDeterministic ? 1 : 2>();
        make_p(s, ring.index, (step + 1) % kDsBuffers);
        dsv::wgmma_wait<kDeterministic ? 0 : 1>();
        make_ds(dp, s, ring.index, (step + 1) % kDsBuffers);
        if constexpr (!kDeterministic) {
            dsv::wgmma_wait<0>();
            add_dq(dq_rest, tile, 1);
        }
        tile = next;
    }

    // K and V are read by no one any more once both consumers are here: their room carries dK and dV out.
    dsv::named_sync(kEpilogueBarrier, kConsumerThreads);
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) dk[i] *= p.sizes.scale;
    dsv::uint32 packed[columns / 16][4];
    dsv::to_operand<Element, columns>(packed, dk);
    dsv::store_fragment<columns, 64>(smem.k + my_slabs, 0, packed);
    dsv::to_operand<Element, columns>(packed, dv);
    dsv::store_fragment<columns, 64>(smem.v + my_slabs, 0, packed);
    dsv::fence_async_proxy();
    dsv::named_sync(kEpilogueBarrier, kConsumerThreads);
    if (threadIdx.x == 0) {
        dsv::tma_store_tile<kHeadDim, kRows>(&p.map_dk, smem.k, kv_tile * kBlockN, kv_head, batch);
        dsv::tma_store_tile<kHeadDim, kRows>(&p.map_dv, smem.v, kv_tile * kBlockN, kv_head, batch);
        dsv::bulk_commit();
        dsv::bulk_wait_read();
    }
}

// One thread. CTAs of about equally long lists run beside each other: none is left alone at the end, and those that keep step
// find in L2 what the others read.
__device__ __forceinline__ int kv_tile_of_cta(const Params& p) {
    const int3 cta = dsv::cta_index();
    if constexpr (kDense) return cta.x;
    const dsv::int64 slab = cta.z * p.sizes.num_kv_heads + cta.y;
    const int block = p.kv_order[slab * p.sizes.num_kv_blocks + cta.x / kTilesPerBlock];
    return block * kTilesPerBlock + cta.x % kTilesPerBlock;
}

// Grid: (ceil(seqlen_kv / kBlockN), with lists N * kTilesPerBlock; num_kv_heads; B), tiles of a head adjacent so that its Q, dO
// and dQ stay in L2.
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
        smem.kv_tile = kv_tile_of_cta(p);
    }
    __syncthreads();
    // The last block may have fewer tiles, and may come anywhere in the order.
    if (kTilesPerBlock > 1 && smem.kv_tile * kBlockN >= p.sizes.seqlen_kv) return;

    if (threadIdx.x >= kConsumerThreads) {
        dsv::registers_shrink<kProducerRegisters>();
        if (threadIdx.x < kConsumerThreads + 32) produce(p, smem);
    } else {
        dsv::registers_grow<kConsumerRegisters>();
        if constexpr (kByColumns) {
            consume_columns<kHeadDim / 2>(p, smem);
        } else if constexpr (kDqUneven) {
            if (dsv::warpgroup_index() == 0) {
                consume<kDqColumns>(p, smem, 0);
            } else {
                consume<kHeadDim - kDqColumns>(p, smem, kDqColumns);
            }
        } else {
            consume<kDqColumns>(p, smem, kDqByRows ? 0 : dsv::warpgroup_index() * kDqColumns);
        }
    }
}
