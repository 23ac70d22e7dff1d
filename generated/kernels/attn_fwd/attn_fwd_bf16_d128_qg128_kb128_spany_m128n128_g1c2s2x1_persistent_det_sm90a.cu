// attn_fwd_bf16_d128_qg128_kb128_spany_m128n128_g1c2s2x1_persistent_det_sm90a
// Generated from templates/kernels/attn_fwd_persistent.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_fwd, bf16, head_dim 128, query_group 128, kv_block 128, any sparsity, deterministic, sm90a;
// block_m 128, block_n 128, groups per CTA 1, consumers 2, stages 2, cluster 1, schedule persistent

// attn_fwd over KV lists by CTAs that stay: each takes every so-manieth tile of queries. The lists, Q and first keys of the
// next are loaded while the products of this one run. Of two groups in a CTA the blocks that both list are loaded once,
// those of one group alone for its consumer; no product is masked but at the sequence's end.
//
// Floors: those of attn_fwd; with two groups that have a share s of their blocks in common (1 - s / 2) of its bytes from L2, at
// head_dim 128 and 80 % 750 TF for 450.
// Registers of a consumer: those of attn_fwd.
// Shared memory: Q, the ring of K and that of V, out where there is room beside them, and the sets of two tasks.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/persistent/lists.cuh"
#include "dsv/softmax.cuh"
#include "dsv/tma.cuh"
#include "dsv/types.cuh"
#include "dsv/wgmma.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 128;
constexpr int kQueryGroup = 128;  // tokens sharing one list
constexpr int kKvBlock = 128;        // tokens of one listed unit
constexpr int kBlockM = 128;
constexpr int kBlockN = 128;
constexpr int kGroups = 1;        // neighbouring query groups, each with its consumer, or one
constexpr int kConsumers = 2;  // warpgroups of 64 query rows
constexpr int kStages = 2;
constexpr int kThreads = 384;
constexpr int kCtasPerSm = 1;
constexpr int kConsumerRegisters = 232;
constexpr int kProducerRegisters = 40;
constexpr int kSmemBytes = 197632;
constexpr int kParamsBytes = 640;
constexpr bool kOutApart = true;  // out has room of its own
// END CONFIG

constexpr int kRows = 64;  // query rows of one consumer
constexpr int kConsumerThreads = 128 * kConsumers;
constexpr int kStagesV = kGroups > 1 && kStages < 3 ? 3 : kStages;  // two groups have one in use each
// Without room of its own out takes Q's, or of two groups that of the consumer's last V, which is its own; where a group has
// no tile, Q's.
constexpr bool kOutInV = kGroups > 1;
// As in attn_fwd. Two groups need two stages of K each for it.
constexpr bool kQInRegisters = kBlockN == 64 && kConsumerRegisters >= 136 && kConsumers <= 2 && kHeadDim <= 128;
constexpr int kScoresRegisters = kHeadDim / 2 + kBlockN + kBlockN / 4 + (kQInRegisters ? kHeadDim / 4 : 0) + 36;
constexpr bool kTwoScores =
    (kHeadDim == 64 || kConsumers == 2) && (kGroups == 1 || kStages >= 4) && kScoresRegisters <= kConsumerRegisters;
constexpr dsv::uint32 kTileBytesQ = dsv::tile_bytes(kRows, kHeadDim);
constexpr dsv::uint32 kTileBytesKv = dsv::tile_bytes(kBlockN, kHeadDim);
// Consumers take turns at the tensor cores, those of two groups for the tiles that they share.
constexpr bool kTurns = kConsumers > 1 && !kTwoScores;
constexpr int kBlocksPerTile = kBlockN > kKvBlock ? kBlockN / kKvBlock : 1;
constexpr int kTilesPerBlock = kKvBlock > kBlockN ? kKvBlock / kBlockN : 1;

static_assert(kBlockM == kRows * kConsumers, "one wgmma M of 64 rows a consumer");
static_assert(kHeadDim % 16 == 0, "whole K steps of the products");
static_assert(kKvBlock % kBlockN == 0 || kBlockN % kKvBlock == 0, "a block is whole tiles or a tile whole blocks");
static_assert(kBlocksPerTile <= 2, "a tile is two blocks at most");
static_assert(kQueryGroup * kGroups % kBlockM == 0, "a CTA lies within one group, or has whole groups");
static_assert(kGroups == 1 || (kGroups == 2 && kConsumers == 2 && kQueryGroup == kRows && kTilesPerBlock == 1),
              "of two groups each has its consumer");

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

using Task = dsv::Task<kGroups>;
constexpr int kWhose = kGroups == 1 ? 1 : 3;  // whose tile it is: all groups', or one's own

struct SharedStorage {
    dsv::uint8 q[kConsumers][kTileBytesQ];
    dsv::uint8 k[kStages][kTileBytesKv];
    dsv::uint8 v[kStagesV][kTileBytesKv];
    dsv::uint8 out[kOutApart ? kConsumers : 1][kOutApart ? kTileBytesQ : 16];
    dsv::uint64 full_q, empty_q;
    dsv::uint64 full_k[kWhose][kStages], empty_k[kStages];
    dsv::uint64 full_v[kWhose][kStagesV], empty_v[kStagesV];
    dsv::uint64 full_lists[2], empty_lists[2];
    dsv::BlockSets<kGroups> sets[2];
    Task made[2];  // of the sets
    Task task;     // the consumers', with Q
};
static_assert(sizeof(SharedStorage) <= kSmemBytes, "the host asks for less shared memory");

// Named barriers: one turn for each consumer, then one for each consumer's epilogue.
constexpr int kTurnBarrier = 1;
constexpr int kEpilogueBarrier = kTurnBarrier + kConsumers;

// The queries and the window of KV blocks that a CTA is at, from one to the next in the same order in every role.
struct Place {
    const dsv::AttnSizes& sizes;
    int tile;    // of queries, of all heads
    int window;  // of KV blocks, the last first

    __device__ __forceinline__ explicit Place(const dsv::AttnSizes& sizes)
        : sizes(sizes), tile(dsv::cta_index().x), window(last_window()) {}

    __device__ __forceinline__ int last_window() const { return max(0, sizes.num_kv_blocks - 1) / dsv::kWindowBlocks; }
    __device__ __forceinline__ int tiles_of_head() const { return (sizes.seqlen_q + kBlockM - 1) / kBlockM; }
    __device__ __forceinline__ bool exists() const { return tile < tiles_of_head() * sizes.num_heads * sizes.batch; }
    __device__ __forceinline__ void advance() {
        if (--window < 0) {
            window = last_window();
            tile += gridDim.x;
        }
    }
    __device__ __forceinline__ int first_row() const { return tile % tiles_of_head() * kBlockM; }
    __device__ __forceinline__ int head() const { return tile / tiles_of_head() % sizes.num_heads; }
    __device__ __forceinline__ int batch() const { return tile / tiles_of_head() / sizes.num_heads; }
};

// Makes the sets of task after task, up to two ahead of the loads. One warp.
__device__ __forceinline__ void read_lists(const Params& p, SharedStorage& smem) {
    using List = dsv::KvWalk<kQueryGroup, kKvBlock, kKvBlock>;
    dsv::RingState<2> ring;
    for (Place at(p.sizes); at.exists(); at.advance()) {
        dsv::mbarrier_wait(&smem.empty_lists[ring.index], ring.phase ^ 1);
        List lists[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const int row = at.first_row() + g * kQueryGroup;
            const bool there = g == 0 || row < p.sizes.seqlen_q;
            lists[g] = List(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, there ? row : 0, at.head(), at.batch());
            if (!there) lists[g].tiles = 0;
        }
        dsv::make_task<kQueryGroup, kKvBlock, kBlockN, kGroups>(smem.sets[ring.index], smem.made[ring.index], lists,
                                                                at.window * dsv::kWindowBlocks, p.sizes.seqlen_kv,
                                                                p.sizes.num_kv_blocks);
        dsv::mbarrier_arrive(&smem.full_lists[ring.index]);
        ring.advance();
    }
}

// What is copied at once: a tile, or a block where a tile is two. Two numbers of such in a window, the second in the upper half.
constexpr int kUnit = kBlocksPerTile > 1 ? kKvBlock : kBlockN;
using Units = dsv::uint32;

// Starts to load one tile of K or V.
__device__ __forceinline__ void load_keys(dsv::uint8* tile, const dsv::TensorMap* map, dsv::uint64* full, Units units, int window,
                                          int kv_head, int batch) {
    const int start = window * dsv::kWindowBlocks * kKvBlock;
    dsv::mbarrier_arrive_expect(full, kTileBytesKv);
    if constexpr (kBlocksPerTile == 1) {
        dsv::tma_load_tile<kHeadDim, kBlockN>(tile, map, full, start + units * kUnit, kv_head, batch);
    } else {
#pragma unroll
        for (int i = 0; i < kBlocksPerTile; ++i) {
            dsv::tma_load_rows<kHeadDim, kBlockN>(tile + i * kUnit * dsv::kRowBytes, map, full,
                                                  start + (units >> 16 * i & 0xFFFF) * kUnit, kv_head, batch);
        }
    }
}

// Feeds K with Q ahead of it, or V, tile by tile, task after task. One thread each: one that feeds both is late for own tiles,
// which come twice as often as shared ones.
template <bool with_q, int stages>
__device__ __forceinline__ void load(const Params& p, SharedStorage& smem, const dsv::TensorMap* map,
                                     dsv::uint8 (&ring_tiles)[stages][kTileBytesKv], dsv::uint64 (&full)[kWhose][stages],
                                     dsv::uint64 (&empty)[stages]) {
    dsv::RingState<2> ring_lists;
    dsv::RingState<stages> ring;
    dsv::uint32 phase_q = 1;
    for (Place at(p.sizes); at.exists(); at.advance()) {
        const int head = at.head(), batch = at.batch();
        const int kv_head = head / (p.sizes.num_heads / p.sizes.num_kv_heads);
        dsv::mbarrier_wait(&smem.full_lists[ring_lists.index], ring_lists.phase);
        const Task& made = smem.made[ring_lists.index];
        const int shared = made.shared;
        const int turns_end = shared + 2 * min(made.own[0], made.own[kGroups - 1]);  // as long as both groups have own tiles
        const int tiles = shared + made.own[0] + made.own[kGroups - 1];
        if constexpr (with_q) {
            dsv::mbarrier_wait(&smem.empty_q, phase_q);
            smem.task = made;
            if (tiles > 0) {
                dsv::mbarrier_arrive_expect(&smem.full_q, kConsumers * kTileBytesQ);
                for (int c = 0; c < kConsumers; ++c) {
                    dsv::tma_load_tile<kHeadDim, kRows>(smem.q[c], &p.map_q, &smem.full_q, at.first_row() + c * kRows, head,
                                                        batch);
                }
            } else {
                dsv::mbarrier_arrive(&smem.full_q);
            }
        }
        phase_q ^= 1;

        const int used = (min(p.sizes.num_kv_blocks - at.window * dsv::kWindowBlocks, dsv::kWindowBlocks) + 31) / 32;
        const dsv::uint32* words = smem.sets[ring_lists.index].words[0];
        dsv::SetWalk of_all(0, used), of_first(1, used), of_second(2, used);
        const int longest = made.own[kGroups - 1] > made.own[0] ? 2 : 1;
        int block = 0;
        for (int t = 0; t < tiles; ++t) {
            const int whose = kGroups == 1 || t < shared ? 0 : t < turns_end ? 1 + (t - shared) % 2 : longest;
            const auto next = [&] {
                return kGroups == 1 || whose == 0 ? of_all.next(words)
                     : whose == 1                 ? of_first.next(words)
                                                  : of_second.next(words);
            };
            Units units;
            if constexpr (kTilesPerBlock > 1) {
                if (t % kTilesPerBlock == 0) block = next();
                units = block * kTilesPerBlock + kTilesPerBlock - 1 - t % kTilesPerBlock;
            } else if constexpr (kBlocksPerTile == 1) {
                units = next();
            } else {
                // Where the last tile lacks a block, one that it has stands in its place: masked, but finite.
                const int group = kGroups == 1 ? 0 : whose - 1;
                const bool to_the_end = kGroups == 1 || (whose == longest && turns_end < tiles);
                const int last = to_the_end ? tiles - 1 : turns_end - 2 + group;
                const bool lone = group >= 0 && t == last && made.last_valid[group] < kBlockN;
                units = next();
                units = units << 16 | (lone ? units : next());
            }
            dsv::mbarrier_wait(&empty[ring.index], ring.phase ^ 1);
            load_keys(ring_tiles[ring.index], map, &full[whose][ring.index], units, at.window, kv_head, batch);
            ring.advance();
        }
        dsv::mbarrier_arrive(&smem.empty_lists[ring_lists.index]);
        ring_lists.advance();
    }
}

// A tile of a consumer's walk.
struct Tile {
    int place;         // in the rings, counted from the task's first
    bool shared;       // all groups walk it
};

// A consumer's place in a ring of K or V.
template <int stages>
struct Reader {
    dsv::uint32 first = 0;  // tile of the ring that is the task's first
    dsv::uint32 seen = 0;   // with two groups: a parity for each stage of shared tiles, and from bit 16 on of own ones

    __device__ __forceinline__ dsv::uint32 stage(Tile tile) const { return (first + tile.place) % stages; }

    __device__ __forceinline__ void wait(dsv::uint64 (&full)[kWhose][stages], Tile tile, int group) {
        const dsv::uint32 stage = this->stage(tile);
        if constexpr (kGroups == 1) {
            dsv::mbarrier_wait(&full[0][stage], (first + tile.place) / stages % 2);
        } else {
            // The other group's tiles come and go unseen, so each kind has barriers and parities of its own.
            const dsv::uint32 bit = 1u << (stage + (tile.shared ? 0 : 16));
            dsv::mbarrier_wait(&full[tile.shared ? 0 : 1 + group][stage], (seen & bit) != 0);
            seen ^= bit;
        }
    }
};

__device__ __forceinline__ void consume(const Params& p, SharedStorage& smem) {
    const int consumer = dsv::warpgroup_index();
    const int group = kGroups == 1 ? 0 : consumer;
    const bool warp_leader = threadIdx.x % 32 == 0;
    const float scale_log2 = p.sizes.scale_log2;
    Reader<kStages> keys;
    Reader<kStagesV> values;
    dsv::uint32 phase_q = 0;

    float o[kHeadDim / 2];
    dsv::Softmax<kBlockN> softmax;

    for (Place at(p.sizes); at.exists(); at.advance()) {
        if (at.window == at.last_window()) {
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
            softmax = dsv::Softmax<kBlockN>();
        }
        dsv::mbarrier_wait(&smem.full_q, phase_q);
        phase_q ^= 1;
        const auto of_task = [&](const int& number) { return __shfl_sync(0xFFFFFFFF, number, 0); };
        const int shared = of_task(smem.task.shared);
        const int own = of_task(smem.task.own[group]);
        const int own_of_first = of_task(smem.task.own[0]), own_of_last = of_task(smem.task.own[kGroups - 1]);
        const int turns = min(own_of_first, own_of_last), all = shared + own_of_first + own_of_last;
        const int tail = of_task(smem.task.tail[group]), tail_valid = of_task(smem.task.tail_valid[group]);
        const int last_valid = of_task(smem.task.last_valid[group]);
        const int tiles = shared + own;
        dsv::uint32 last_stage = 0;  // of V
        // Every thread has read the task, so every thread says that it has.
        const auto leave_q = [&] { dsv::mbarrier_arrive(&smem.empty_q); };

        if (tiles > 0) {
            const auto tile = [&](int t) {
                const int j = t - shared;
                if (kGroups == 1 || j < 0) return Tile{t, true};
                return Tile{t + (j < turns ? j + group : turns), false};
            };
            if constexpr (kTurns) {
                if (consumer == 0 && shared > 0) dsv::named_arrive(kTurnBarrier, 256);
            }
            dsv::uint32 q[kHeadDim / 16][4];
            if constexpr (kQInRegisters) dsv::load_fragment<kHeadDim, kRows>(q, smem.q[consumer], 0);
            using Scores = float[kBlockN / 2];
            Scores s;
            dsv::uint32 probabilities[kBlockN / 16][4];
            float rescale[2];
            const auto wait_for_keys = [&](Tile tile) { keys.wait(smem.full_k, tile, group); };
            const auto issue_scores = [&](Scores& s, Tile tile) {
                if constexpr (kTurns) {
                    if (tile.shared) dsv::named_sync(kTurnBarrier + consumer, 256);
                }
                const dsv::uint8* k = smem.k[keys.stage(tile)];
                dsv::pin(s);
                dsv::wgmma_fence();
                if constexpr (kQInRegisters) {
                    dsv::gemm_rs_kk<Element, kBlockN, kHeadDim, kBlockN>(s, q, k);
                } else {
                    dsv::gemm_ss_kk<Element, kBlockN, kHeadDim, kRows, kBlockN>(s, smem.q[consumer], k);
                }
                dsv::wgmma_commit();
            };
            const auto issue_output = [&](Tile tile) {
                values.wait(smem.full_v, tile, group);
                const dsv::uint8* v = smem.v[values.stage(tile)];
                dsv::pin(o);
                dsv::wgmma_fence();
                dsv::gemm_rs_mn<Element, kHeadDim, kBlockN>(o, probabilities, v);
                dsv::wgmma_commit();
            };
            const auto pass_turn = [&](Tile tile) {
                if constexpr (kTurns) {
                    if (tile.shared && (tile.place + 1 < shared || consumer < kConsumers - 1)) {
                        dsv::named_arrive(kTurnBarrier + (consumer + 1) % kConsumers, 256);
                    }
                }
            };
            // A stage awaits an arrival of each warp of every consumer; of a group's own tile two of each of its own.
            const auto release = [&](dsv::uint64* barrier, Tile tile) {
                if (warp_leader) {
                    dsv::mbarrier_arrive(barrier);
                    if (!tile.shared) dsv::mbarrier_arrive(barrier);
                }
            };
            const auto pass_keys = [&](Tile tile) { release(&smem.empty_k[keys.stage(tile)], tile); };
            const auto pass_values = [&](Tile tile) { release(&smem.empty_v[values.stage(tile)], tile); };
            const auto rescale_output = [&] {
#pragma unroll
                for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= rescale[i / 2 % 2];
            };
            // Keys of tile t that do not exist, or that a lone block repeats, weigh nothing.
            const auto mask = [&](Scores& s, int t) {
                int valid = kBlockN;
                if (tail >= 0 && t >= tail && t < tail + kTilesPerBlock) valid = tail_valid + (t - tail) * kBlockN;
                if (kBlocksPerTile > 1 && t == tiles - 1) valid = min(valid, last_valid);
                if (valid < kBlockN) {
                    // Volatile, so that this stays a branch: as selects it would be two instructions for every score.
                    asm volatile("mov.b32 %0, %0;" : "+r"(valid));
                    dsv::mask_tail<kBlockN>(s, valid, -dsv::kInf);
                }
            };

            // Of tile t, the one before and the one after.
            Tile now = tile(0), before = now, next = tile(1);
            const auto step_on = [&] {
                before = now;
                now = next;
            };
            wait_for_keys(now);
            issue_scores(s, now);
            if constexpr (!kTwoScores) pass_turn(now);
            dsv::wgmma_wait<0>();
            dsv::pin(s);
            pass_keys(now);
            if constexpr (kQInRegisters && (kOutApart || kOutInV)) leave_q();
            mask(s, 0);
            if constexpr (kTwoScores) {
                Scores other;
                // P of tile t, made while S of the next one and O of the one before are.
                const auto step = [&](Scores& s_now, Scores& s_next, int t) {
                    issue_scores(s_next, next);
                    if (t > 0) issue_output(before);
                    const Tile after = tile(t + 2);
                    softmax.step(s_now, scale_log2, rescale);
                    dsv::pin(s_now);
                    // A loop here keeps the compiler from moving the exponentials behind the wait for the products.
                    if (t + 2 < tiles) wait_for_keys(after);
                    dsv::wgmma_wait<0>();
                    dsv::pin(s_next);
                    dsv::pin(o);
                    pass_keys(next);
                    if (t > 0) pass_values(before);
                    mask(s_next, t + 1);
                    rescale_output();
                    dsv::to_operand<Element, kBlockN>(probabilities, s_now);
                    step_on();
                    next = after;
                };
                if (tiles > 1) {
                    wait_for_keys(next);
                    step(s, other, 0);
                    int t = 1;
                    while (t + 1 < tiles) {
                        step(other, s, t++);
                        if (t + 1 == tiles) break;
                        step(s, other, t++);
                    }
                    if (tiles % 2 == 0) {
#pragma unroll
                        for (int i = 0; i < kBlockN / 2; ++i) s[i] = other[i];
                    }
                    issue_output(before);
                }
                if constexpr (!kQInRegisters && (kOutApart || kOutInV)) leave_q();
                softmax.step(s, scale_log2, rescale);
                dsv::pin(s);
                dsv::wgmma_wait<0>();
                dsv::pin(o);
                if (tiles > 1) pass_values(before);
                rescale_output();
                dsv::to_operand<Element, kBlockN>(probabilities, s);
            } else {
                softmax.step(s, scale_log2, rescale);
                rescale_output();  // of the windows before
                dsv::to_operand<Element, kBlockN>(probabilities, s);
                if (tiles > 1) wait_for_keys(next);
                for (int t = 1; t < tiles; ++t) {
                    step_on();
                    issue_scores(s, now);
                    issue_output(before);
                    pass_turn(now);
                    next = tile(t + 1);
                    dsv::wgmma_wait<1>();
                    dsv::pin(s);
                    pass_keys(now);
                    mask(s, t);
                    softmax.step(s, scale_log2, rescale);
                    dsv::pin(s);
                    // The next keys are awaited here because the loop of that wait keeps the compiler from moving the
                    // exponentials behind the wait for P V, where no product would run under them.
                    if (t + 1 < tiles) wait_for_keys(next);
                    dsv::wgmma_wait<0>();
                    dsv::pin(o);
                    pass_values(before);
                    rescale_output();
                    dsv::to_operand<Element, kBlockN>(probabilities, s);
                }
                if constexpr (!kQInRegisters && (kOutApart || kOutInV)) leave_q();
            }
            issue_output(now);
            dsv::wgmma_wait<0>();
            dsv::pin(o);
            last_stage = values.stage(now);
            if (!kOutInV || at.window > 0) pass_values(now);
        } else if (kOutApart || (kOutInV && at.window > 0)) {
            leave_q();
        }
        keys.first += all;
        values.first += all;

        if (at.window == 0) {
            // out = O / l; a row that saw no key keeps zeros and LSE = -inf.
            const int head = at.head(), batch = at.batch();
            const int row0 = at.first_row() + consumer * kRows;
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
            dsv::uint8* out = kOutApart               ? smem.out[kOutApart ? consumer : 0]
                              : kOutInV && tiles > 0 ? smem.v[last_stage]
                                                     : smem.q[consumer];
            const bool stores = threadIdx.x % 128 == 0;
            if constexpr (kOutApart) {
                // The tile before has left.
                if (stores) dsv::bulk_wait_read();
            }
            // All warps of this consumer have left what was there.
            dsv::named_sync(kEpilogueBarrier + consumer, 128);
            dsv::store_fragment<kHeadDim, kRows>(out, 0, packed);
            dsv::fence_async_proxy();
            dsv::named_sync(kEpilogueBarrier + consumer, 128);
            if (stores && row0 < p.sizes.seqlen_q) {
                dsv::tma_store_tile<kHeadDim, kRows>(&p.map_o, out, row0, head, batch);
                dsv::bulk_commit();
            }
            if constexpr (!kOutApart) {
                if (stores) dsv::bulk_wait_read();
                if (kOutInV && tiles > 0) {
                    // For all warps of both consumers: the other one never sees this V.
                    for (int i = 0; stores && i < kConsumerThreads / 32; ++i) dsv::mbarrier_arrive(&smem.empty_v[last_stage]);
                } else {
                    dsv::named_sync(kEpilogueBarrier + consumer, 128);
                    leave_q();
                }
            }
        } else if constexpr (!kOutApart && !kOutInV) {
            leave_q();
        }
    }
    if (threadIdx.x % 128 == 0) dsv::bulk_wait_read();
}

// Grid: as many CTAs as run at once, or as there are tiles of queries; tiles of a head come one after the other so that its K
// and V stay in L2.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_fwd_bf16_d128_qg128_kb128_spany_m128n128_g1c2s2x1_persistent_det_sm90a(const __grid_constant__ Params p) {
    // Swizzle atoms are 1024 bytes; a driver that aligned shared memory less would have to be told from here.
    extern __shared__ __align__(1024) dsv::uint8 raw[];
    if (dsv::smem_address(raw) % 1024 != 0) __trap();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(raw);

    if (threadIdx.x == 0) {
        constexpr int kWarps = kConsumerThreads / 32;
        dsv::mbarrier_init(&smem.full_q, 1);
        dsv::mbarrier_init(&smem.empty_q, kConsumerThreads);
        for (int i = 0; i < kStages; ++i) {
            for (int whose = 0; whose < kWhose; ++whose) dsv::mbarrier_init(&smem.full_k[whose][i], 1);
            dsv::mbarrier_init(&smem.empty_k[i], kWarps);
        }
        for (int i = 0; i < kStagesV; ++i) {
            for (int whose = 0; whose < kWhose; ++whose) dsv::mbarrier_init(&smem.full_v[whose][i], 1);
            dsv::mbarrier_init(&smem.empty_v[i], kWarps);
        }
        for (int i = 0; i < 2; ++i) {
            dsv::mbarrier_init(&smem.full_lists[i], 32);
            dsv::mbarrier_init(&smem.empty_lists[i], 2);
        }
        dsv::mbarrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x >= kConsumerThreads) {
        dsv::registers_shrink<kProducerRegisters>();
        if (threadIdx.x < kConsumerThreads + 32) {
            read_lists(p, smem);
        } else if (threadIdx.x == kConsumerThreads + 32) {
            load<true>(p, smem, &p.map_k, smem.k, smem.full_k, smem.empty_k);
        } else if (threadIdx.x == kConsumerThreads + 64) {
            load<false>(p, smem, &p.map_v, smem.v, smem.full_v, smem.empty_v);
        }
    } else {
        dsv::registers_grow<kConsumerRegisters>();
        consume(p, smem);
    }
}
