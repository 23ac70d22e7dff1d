// kv_select_fine_bf16_r16_qg128_kb8_centre_max_topp_g64w16_sm90a
// Generated from templates/kernels/kv_select_fine.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// kv_select_fine, bf16, rank 16, query_group 128, kv_block 8, centre query, max score, sm90a;
// groups per CTA 64, warps 16

// Critical-KV selection at any granularity: one list of KV units (tokens or blocks of 8 to 128) a query group.
//   s_i(j)      = <proxy_i(g), k_lr(j)> for the queries i of the rule and the keys j of unit n   (f32, d_lr 16 to 64)
//   score(g, n) = max over i and j of s_i(j)
//   or, block score mass    = ln(sum over j of exp(scale max over i of s_i(j))) / scale
//   or, rule mass4          = ln(sum over i and j of exp(scale s_i(j)) / sum over all keys j' of exp(scale s_i(j'))) / scale
//   list(g)     = ids of the top_k[h] largest scores, ties to the smaller id, ascending; NaN ranks last
//   or, by top_p = ids of the fewest largest whose masses w(n) = 2^31 exp(scale (score(n) - largest)), rounded to integers,
//                 hold the share top_p[h] of all units' mass; at most max_selected
// Floors for 268M scores (H=16, S=32,768, groups of 64) on 132 SMs at 1.7 GHz: a pass 15 us of mma.sync and 20 us of k_lr
// through L2 for each 16 of d_lr, 18 us of max where units are blocks; tokens' ids 36 us of stores. Estimates in kv.md.
// Of mass4, 0.3 ms of exponentials a pass. Budget: 512 threads, one CTA an SM, under 128 registers; 133 to 140 KB of shared
// memory, most of it bins; of mass4 up to 226 KB, most of it scores.
#include "dsv/math.cuh"
#include "dsv/mma.cuh"
#include "dsv/select/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kRank = 16;
constexpr int kQueryGroup = 128;
constexpr int kKvBlock = 8;
constexpr int kGroups = 64;
constexpr int kQueries = 1;
constexpr int kWarps = 16;
constexpr bool kProxyIsMean = false;
constexpr bool kTopP = true;
constexpr bool kBlockMass = false;
constexpr bool kQueryMass = false;
constexpr int kStoredSteps = 0;
constexpr int kKept = 0;
constexpr int kThreads = 512;
constexpr int kCtasPerSm = 1;
constexpr int kSmemBytes = 143632;
constexpr int kParamsBytes = 176;
// END CONFIG

// Scores are stored for kStoredSteps steps at most, where exponentials make them dear (the rule mass4, units that are blocks);
// a pass over the keys recomputes the others, the same bits every time. Passes narrow a range of ordered integers around each
// group's k-th score by a histogram of 512 bins (9 bits a pass); the last one sets a bit a unit and turns the bits into ids.
// Tokens: two passes over every 16th key guess a bracket, one pass counts its scores in 512 even bins, one collects the scores
// of the bin that holds the k-th; a wrong guess goes back to the narrowing.

// A CTA's score rows are four m16 tiles: one query of 64 groups, or four queries of 16.
constexpr int kTiles = 4;
constexpr int kGroupTiles = kTiles / kQueries;
// A step is what a warp scores at once: a lane owns kLaneKeys consecutive keys, the four lanes of a quad are neighbours.
constexpr int kLaneKeys = kKvBlock < 8 ? 8 : kKvBlock;
constexpr int kChunks = kLaneKeys / 8;
constexpr int kLaneUnits = kLaneKeys / kKvBlock;
constexpr int kSteps = kRank / 16;  // of a product
// Where much arithmetic makes one score, a row's bounds are loaded for it: registers are dearer.
constexpr bool kBoundsInShared = kLaneUnits == 1 && (kChunks > 1 || kBlockMass || kTopP || kSteps > 3);
// Queries of one step stay in registers; of more, or beside exponentials, they are read from shared memory for each product.
constexpr bool kHoldsQueries = kSteps == 1 && !kQueryMass;
// Where exponentials or keys take the registers, other warps hide a load.
constexpr bool kPrefetches = !kBlockMass && kSteps == 1;
constexpr int kStepKeys = 4 * kLaneKeys;
constexpr int kStepUnits = 4 * kLaneUnits;
// Steps that fill a word of 32 units; a tile of the last pass is two words a warp.
constexpr int kWordSteps = 32 / kStepUnits;
constexpr int kTileWords = 32;
constexpr int kBins = 512;
constexpr int kBinBits = 9;
constexpr int kBinStride = kBins + 4;  // rows 4 banks apart: the eight rows of a warp's score registers do not collide
constexpr int kRowsPerWarp = kGroups / kWarps;
// A sample pays where every key is a unit, and enough of them.
constexpr bool kMaySample = kKvBlock == 1 && !kTopP;
constexpr int kSampleStride = 16;
constexpr int kSampleFrom = 8192;
// A bracketed row's score as a float whose integer part is a place among its lane's bins: see Line.
constexpr float kFirstPlace = 8388608.0f;  // 2^23: from here on floats are integers
constexpr int kLanePlaces = 8 * kBinStride;  // from one row of a lane to the next
constexpr int kWaiting = 32;                 // places a lane keeps before it counts them
constexpr int kWaitingWarps = kMaySample ? kWarps : 1;
// Where a pass is dear (the rule mass4) and a bracket's scores have room, kKept a row, one pass keeps them, and no other looks
// for the k-th. Of blocks, the stored scores are the sample.
constexpr bool kMayKeep = kKept > 0;
// Top-p: how far a score lies below the largest, its depth, in 2^-27 of a halving of mass; deeper ones have no mass.
constexpr float kDepthsPerHalving = 134217728.0f;
constexpr uint32 kDepths = 31u << 27;
constexpr int kMassBins = kBins / 2;  // a bin is two words
constexpr int kMassBinBits = 8;
// Of the rule mass4: units of one chunk sum their keys' masses relative to LSE. A unit of several has a score of each query
// first, which needs no LSE: find_lse leaves those of the first steps in the room of what is stored, four times a score's.
constexpr bool kHasQueryScores = kQueryMass && kChunks > 1;
constexpr int kStepScores = 2 * 32 * kGroupTiles;
constexpr int kSharedSteps = kHasQueryScores ? kStoredSteps / kQueries / kWarps * kWarps : 0;
// A sum lighter than this may lack masses that ex2.approx.ftz took for zero: it is made again relative to its largest.
constexpr float kLightest = 0x1p-96f;
// A sum's reference may be this much lighter than what is added: one exponential less than following the largest.
constexpr float kHeadroomLog2 = 8.0f;
constexpr float kHeadroom = 256.0f;
// A unit's sum heavier than this, relative to its first keys, is made again: its logarithm would be rounded too coarsely.
constexpr float kHeaviest = 65536.0f;
constexpr int32 kAllTies = 0x7fffffff;
constexpr int32 kDone = -1;
constexpr uint32 kLowest = 0x007fffffu;  // ordered(-inf)

static_assert(kRank % 16 == 0 && kRank <= 64, "one to four k16 steps");
static_assert(kGroups == 16 * kGroupTiles, "every score row belongs to a group");
static_assert(kKvBlock == 1 || kKvBlock % 8 == 0, "a lane owns whole units");
static_assert(kTileWords == 2 * kWarps && kThreads == 32 * kWarps, "two words a warp fill a tile");
static_assert(!kQueryMass || kBlockMass, "masses of queries are summed over keys too");
static_assert(!kQueryMass || kGroupTiles == 1, "a lane has all queries of its two groups");
static_assert(kStoredSteps % kWarps == 0 && kSharedSteps % kWarps == 0, "a turn of the warps is stored or it is not");
static_assert(kGroups % kWarps == 0, "a row of bins belongs to one warp");

struct Params {
    TensorView q_lr;     // [B, seqlen_q, H, d_lr]; pointer and strides multiples of 8 elements
    TensorView k_lr;     // [B, seqlen_kv, H, d_lr]; the same
    const int32* top_k;  // [H]; of the budget top_k
    const float* top_p;  // [H]; of the budget top_p
    int32* q2k_index;    // [B, H, G, max_selected], written up to the count, unless null
    int32* q2k_count;    // [B, H, G], written
    uint32* bitmap;      // [B, H, G, ceil(N / 32)], bit n % 32 of word n / 32: whether unit n is listed; unless null
    float* scores;       // [B, H, G, N], written unless null
    const uint32* keep_mask;  // [G, ceil(N / 32)], bit n % 32 of word n / 32: whether unit n scores +inf; unless null
    int32* error_flag;   // [1]
    int32* capped;       // [1], increased by the lists that max_selected cut below top_p, unless null
    int32 batch;
    int32 num_heads;
    int32 seqlen_q;
    int32 seqlen_kv;
    int32 num_groups;
    int32 num_kv_blocks;
    int32 max_selected;
    int32 keep_first;  // units with one of the first keep_first tokens score +inf
    int32 keep_own;    // not 0: units with a token of the group's own score +inf
    float scale_log2;  // where masses are taken: logits in base 2 are scale_log2 times the scores
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::KvSelectFine");

// The search for one group's k-th largest score, in ordered integers. While it goes on, the k-th lies in [low, last].
struct Row {
    uint32 low;     // done: the smallest that may be listed
    uint32 last;    // inclusive
    int32 shift;    // a bin holds 2^shift values; kDone at the end
    int32 above;    // scores above last
    int32 k;
    int32 ties;     // done: how many scores equal to low are listed; kAllTies: no count is needed
    int32 emitted;  // ids written by the last pass
    int32 reserved;
};

// A score's place, which never falls as the score rises: fma(score, slope, offset). The bins of row i hold the places
// kFirstPlace + i / 8 * kLanePlaces + 0 .. 511; `bin` is the place of the bin that holds the row's k-th score.
struct Line {
    float slope;  // 0: the row has no bracket
    float offset;
    float bin;     // NaN, which is no place, unless the row waits for its bin to be collected
    int32 needed;  // how many of the bin's scores are listed; 0 with no bin
};

// The search for the smallest set of scores that holds a group's target: its last member lies in the depths first ..
// first + 2^shift - 1 once `ready`, else in the 256 times as many from first on.
struct Mass {
    uint32 largest_bits;  // ordered integer of the largest finite score; 0 with none
    float largest;        // the score itself; 0 with none
    uint32 first;
    int32 shift;
    int32 ready;
    int32 above;    // scores above the range, infinite ones included
    uint64 target;  // the mass the range must bring; 0: the group has none at all
};

struct SharedStorage {
    union {
        uint32 bins[kGroups][kBinStride];
        // (a product near the largest, sum of 2^(logit - its logit)) of each warp's keys, of each query.
        float partial[2][kQueryMass ? kWarps : 1][16 * kTiles];
        struct {
            uint32 reach[2][kGroups][kTileWords + 1];   // bit: the score is at least the row's low
            uint32 exceed[2][kGroups][kTileWords + 1];  // bit: it is larger
            uint16 ids[kWarps][32 * kTileWords];        // listed units of a row, relative to the tile
        };
    };
    Row rows[kGroups];
    int32 above[kGroups];
    Line lines[kGroups];
    Mass masses[kTopP ? kGroups : 1];
    union {
        float waiting[kWaitingWarps][kWaiting][32];
        float kept[kMayKeep ? kGroups : 1][kMayKeep ? kKept : 1];
    };
    // Of each query over all keys: a product, or unit's score, near the largest, and LSE less its logit, in base 2.
    float2 lse[kQueryMass ? 16 * kTiles : 1];
    float stored[kStoredSteps > 0 ? kStoredSteps * kStepScores : 1];
    int32 num_kept[kMayKeep ? kGroups : 1];
    alignas(16) QueryOperand<kRank> queries[kTiles];
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "SharedStorage differs from Facts");

// The float whose integer this is. No score has the integer of -0, 0x7fffffff.
__device__ __forceinline__ float unordered(uint32 value) {
    return __uint_as_float((value & 0x80000000u) != 0 ? value ^ 0x80000000u : ~value);
}

// The largest float below every score whose integer is at least `value`; a NaN where there is none.
__device__ __forceinline__ float below(uint32 value) {
    const uint32 less = value - 1;
    return unordered(less == 0x7fffffffu ? less - 1 : less);
}

// Shifts `score > bound` into the lowest bit. The sign of a difference decides, exactly; NaN is larger than nothing
// because the NaN of an addition is positive.
__device__ __forceinline__ uint32 push_larger(uint32 mask, float score, float bound) {
    return __funnelshift_l(__float_as_uint(bound - score), mask, 1);
}

// A lane's eight bits of a word of units: eight consecutive units, or every fourth.
__device__ __forceinline__ uint32 place(uint32 bits) {
    bits &= 0xffu;
    if constexpr (kLaneUnits > 1) return bits << (lane_index() % 4 * 8);
    bits = (bits | bits << 12) & 0x000f000fu;
    bits = (bits | bits << 6) & 0x03030303u;
    return ((bits | bits << 3) & 0x11111111u) << (lane_index() % 4);
}

// The queries of score rows, where they are held: registers of each tile's operand. And of masses, what a score rises by as
// its mass doubles.
struct Queries {
    uint32 held[kHoldsQueries ? kTiles : 1][4];
    float per_doubling;
};

// Operand B of four products: columns 2c and 2c + 1 of tile j hold keys 2j and 2j + 1 of the chunk of quad lane c, so
// that each lane's scores are of consecutive keys.
__device__ __forceinline__ void load_keys(const Params& p, int step, int chunk, int stride, uint2 (&keys)[4][kSteps]) {
    const int column = lane_index() / 4;
    const int first = step * kStepKeys + column / 2 * kLaneKeys + 8 * chunk + column % 2;
    const Element* head = p.k_lr.at<const Element>(blockIdx.z, 0, blockIdx.y);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int64 key = min((first + 2 * j) * stride, p.seqlen_kv - 1);
        load_key(keys[j], head + key * p.k_lr.stride_seq);
    }
}

// Products of the 16 score rows of `tile` with four tiles of keys.
template <bool kHeld = kHoldsQueries>
__device__ __forceinline__ void multiply(const SharedStorage& shared, const Queries& queries, int tile,
                                         const uint2 (&keys)[4][kSteps], float (&products)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) products[j][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        uint32 query[4];
        if constexpr (kHeld) {
#pragma unroll
            for (int i = 0; i < 4; ++i) query[i] = queries.held[tile][i];
        } else {
            read_operand(shared.queries[tile], step, query);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_16x8x16<Element>(products[j], query, keys[j][step].x, keys[j][step].y);
    }
}

// What a unit's score counts as: NaN past the last unit, so that it is never in a range nor larger than a bound; +inf
// where the unit is kept whatever its score.
__device__ __forceinline__ float judged(const Params& p, float score, int key, int group) {
    asm volatile("" : "+r"(group));  // what follows is rare: nothing of it is worth a register all along
    if (key >= p.seqlen_kv) return __uint_as_float(0x7fffffffu);
    return is_kept<kQueryGroup, kKvBlock>(p, key, group) ? kInf : score;
}

// The sums below are written rounding by rounding: every pass must find the same bits.

__device__ __forceinline__ float sum_of(const float (&terms)[8]) {
    const float even = __fadd_rn(__fadd_rn(terms[0], terms[4]), __fadd_rn(terms[2], terms[6]));
    const float odd = __fadd_rn(__fadd_rn(terms[1], terms[5]), __fadd_rn(terms[3], terms[7]));
    return __fadd_rn(even, odd);
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Adds the masses of eight scores relative to a reference, which is raised where one of them is much heavier: by themselves
// many would fall below 2^-126, which is zero to ex2.approx.ftz, and yet be of weight together.
__device__ __forceinline__ void add_mass(const Params& p, float& reference, float& sum, const float (&scores)[8]) {
    float most = scores[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) most = max_or_nan(most, scores[i]);
    most = max_or_nan(most, reference);
    // Also with the first scores, whose reference is -inf. An infinite or NaN reference is the score whatever the sum: see
    // score_of_mass.
    if (!(__fmul_rn(__fadd_rn(most, -reference), p.scale_log2) <= kHeadroomLog2)) {
        sum = reference == -kInf ? 0.0f : __fmul_rn(sum, exp2_approx(__fmul_rn(__fadd_rn(reference, -most), p.scale_log2)));
        reference = most;
    }
    float terms[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        terms[i] = exp2_approx(__fmul_rn(__fadd_rn(scores[i], -reference), p.scale_log2));
    }
    sum = __fadd_rn(sum, sum_of(terms));
}

// The score whose mass is 2^(scale_log2 reference) sum.
__device__ __forceinline__ float score_of_mass(const Queries& queries, float reference, float sum) {
    if (!(reference > -kInf && reference < kInf)) return reference;
    return __fmaf_rn(log2_approx(sum), queries.per_doubling, reference);
}

// The score whose mass is 2^most sum.
__device__ __forceinline__ float score_of_log2(const Queries& queries, float most, float sum) {
    if (!(most > -kInf && most < kInf)) return most;
    return __fmul_rn(__fadd_rn(most, log2_approx(sum)), queries.per_doubling);
}

// Of the rule mass4: the logarithm of a query's mass in base 2, from its score alone. Scores are compared before they are
// scaled: f32 holds their difference where it does not hold logits and LSE well enough.
__device__ __forceinline__ float mass_log2(const Params& p, float score, float2 lse) {
    return __fmaf_rn(__fadd_rn(score, -lse.x), p.scale_log2, -lse.y);
}

// LSE of query `query` of group 8 half + lane / 4.
__device__ __forceinline__ float2 lse_of(const SharedStorage& shared, int query, int half) {
    return shared.lse[(16 * query + 8 * half + lane_index() / 4) % (kQueryMass ? 16 * kTiles : 1)];
}

// Of a lane's products with its eight keys, that of row 8 half + lane / 4 with key i.
__device__ __forceinline__ float product_of(const float (&products)[4][4], int half, int i) {
    return products[i / 2][2 * half + i % 2];
}

// Of the rule mass4, units of one chunk: the scores whose sums were too light, relative to their heaviest mass. Rare.
__device__ __forceinline__ void score_light(
    const Params& p, const SharedStorage& shared, const Queries& queries, const uint2 (&keys)[4][kSteps], int key,
    const float (&sums)[2][8], float (&scores)[2][kLaneUnits]) {
    const auto each_mass = [&](int half, auto f) {
#pragma unroll 1
        for (int query = 0; query < kQueries; ++query) {
            float products[4][4];
            multiply<false>(shared, queries, query, keys, products);
            const float2 lse = lse_of(shared, query, half);
#pragma unroll
            for (int i = 0; i < 8; ++i) f(i, mass_log2(p, product_of(products, half, i), lse));
        }
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most[8];
        float sum[8] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) most[i] = -kInf;
        each_mass(half, [&](int i, float mass) { most[i] = max_or_nan(most[i], mass); });
        if constexpr (kLaneUnits == 1) {
            // Keys past the end are the last key once more: no maximum is changed.
#pragma unroll
            for (int i = 1; i < 8; ++i) most[0] = max_or_nan(most[0], most[i]);
        }
        each_mass(half, [&](int i, float mass) {
            const bool counts = kLaneUnits > 1 || key + i < p.seqlen_kv;
            const float above = __fadd_rn(mass, -most[i % kLaneUnits]);
            if (counts) sum[i] = __fadd_rn(sum[i], exp2_approx(above));
        });
        if constexpr (kLaneUnits == 1) sum[0] = sum_of(sum);
#pragma unroll
        for (int i = 0; i < kLaneUnits; ++i) {
            if (!(sums[half][i] >= kLightest)) scores[half][i] = score_of_log2(queries, most[i], sum[i]);
        }
    }
}

// The same, units of one chunk: scores of a step's units for groups 8 half + lane / 4. No mass relative to LSE is above 1,
// whose sums need no reference.
__device__ __forceinline__ void score_chunk(
    const Params& p, const SharedStorage& shared, const Queries& queries, int step, int stride,
    float (&scores)[2][kLaneUnits]) {
    uint2 keys[4][kSteps];
    load_keys(p, step, 0, stride, keys);
    float sums[2][8];
#pragma unroll
    for (int query = 0; query < kQueries; ++query) {
        float products[4][4];
        multiply(shared, queries, query, keys, products);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 lse = lse_of(shared, query, half);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float mass = exp2_approx(mass_log2(p, product_of(products, half, i), lse));
                sums[half][i] = query == 0 ? mass : __fadd_rn(sums[half][i], mass);
            }
        }
    }
    const int key = step * kStepKeys + lane_index() % 4 * kLaneKeys;
    if constexpr (kLaneUnits == 1) {
        if (key + 8 > p.seqlen_kv) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                // The last key once more: no mass.
                if (key + i >= p.seqlen_kv) sums[0][i] = sums[1][i] = 0.0f;
            }
        }
        sums[0][0] = sum_of(sums[0]);
        sums[1][0] = sum_of(sums[1]);
    }
    bool is_light = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kLaneUnits; ++i) {
            is_light |= !(sums[half][i] >= kLightest);
            scores[half][i] = __fmul_rn(log2_approx(sums[half][i]), queries.per_doubling);
        }
    }
    if (__any_sync(kFullWarp, is_light)) score_light(p, shared, queries, keys, key, sums, scores);
}

// The same, units of several chunks, where sums of score_queries were too heavy or no numbers. Rare, but for the last step.
__device__ __forceinline__ void score_heavy(
    const Params& p, const SharedStorage& shared, const Queries& queries, int step, const float (&sums)[kTiles][2],
    float (&scores)[kTiles][2]) {
    const int first = step * kStepKeys + lane_index() % 4 * kLaneKeys;
    const bool is_end = (step + 1) * kStepKeys > p.seqlen_kv;
#pragma unroll 1
    for (int query = 0; query < kTiles; ++query) {
        float reference[2] = {-kInf, -kInf};
        float sum[2] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            uint2 keys[4][kSteps];
            load_keys(p, step, chunk, 1, keys);
            float products[4][4];
            multiply<false>(shared, queries, query, keys, products);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float terms[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    // The last key once more: no mass.
                    terms[i] = first + 8 * chunk + i < p.seqlen_kv ? product_of(products, half, i) : -kInf;
                }
                add_mass(p, reference[half], sum[half], terms);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
            const int half = i % 2;
            if (i / 2 == query && (is_end || !(sums[i / 2][half] < kHeaviest))) {
                scores[i / 2][half] = score_of_mass(queries, reference[half], sum[half]);
            }
        }
    }
}

// Adds the masses of a chunk's keys to the sums of each query, relative to the largest product of the unit's first chunk.
template <bool kFirst>
__device__ __forceinline__ void add_chunk(
    const Params& p, const SharedStorage& shared, const Queries& queries, int step, int chunk, float (&reference)[kTiles][2],
    float (&sums)[kTiles][2]) {
    uint2 keys[4][kSteps];
    load_keys(p, step, chunk, 1, keys);
#pragma unroll
    for (int query = 0; query < kTiles; ++query) {
        float products[4][4];
        multiply(shared, queries, query, keys, products);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (kFirst) {
                float most = product_of(products, half, 0);
#pragma unroll
                for (int i = 1; i < 8; ++i) most = max_or_nan(most, product_of(products, half, i));
                reference[query][half] = most;
            }
            float terms[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float above = __fadd_rn(product_of(products, half, i), -reference[query][half]);
                terms[i] = exp2_approx(__fmul_rn(above, p.scale_log2));
            }
            sums[query][half] = kFirst ? sum_of(terms) : __fadd_rn(sums[query][half], sum_of(terms));
        }
    }
}

// The same, units of several chunks: the score of a step's units by each query alone.
__device__ __forceinline__ void score_queries(
    const Params& p, const SharedStorage& shared, const Queries& queries, int step, float (&scores)[kTiles][2]) {
    float reference[kTiles][2];
    float sums[kTiles][2];
    add_chunk<true>(p, shared, queries, step, 0, reference, sums);
#pragma unroll 1
    for (int chunk = 1; chunk < kChunks; ++chunk) add_chunk<false>(p, shared, queries, step, chunk, reference, sums);
    bool is_heavy = (step + 1) * kStepKeys > p.seqlen_kv;
#pragma unroll
    for (int query = 0; query < kTiles; ++query) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            is_heavy |= !(sums[query][half] < kHeaviest);
            scores[query][half] = score_of_mass(queries, reference[query][half], sums[query][half]);
        }
    }
    if (__any_sync(kFullWarp, is_heavy)) score_heavy(p, shared, queries, step, sums, scores);
}

// The score of a unit from its scores by each query.
__device__ __forceinline__ float score_of_queries(
    const Params& p, const SharedStorage& shared, const Queries& queries, const float (&scores)[kTiles][2], int half) {
    float masses[kQueries];
    float most = -kInf;
#pragma unroll
    for (int query = 0; query < kQueries; ++query) {
        masses[query] = mass_log2(p, scores[query][half], lse_of(shared, query, half));
        most = max_or_nan(most, masses[query]);
    }
    float sum = exp2_approx(__fadd_rn(masses[0], -most));
#pragma unroll
    for (int query = 1; query < kQueries; ++query) {
        sum = __fadd_rn(sum, exp2_approx(__fadd_rn(masses[query], -most)));
    }
    return score_of_log2(queries, most, sum);
}

// Where a step's scores are stored, of the first kSharedSteps or of turns of the warps spread over all keys; -1 for nowhere.
__device__ __forceinline__ int slot_of(const Params& p, int step) {
    if constexpr (kStoredSteps == 0) return -1;
    constexpr uint32 kStoredTurns = kStoredSteps / kWarps;
    const uint32 turns = (p.seqlen_kv + kWarps * kStepKeys - 1) / (kWarps * kStepKeys);
    if (kHasQueryScores || turns <= kStoredTurns) return step < kStoredSteps ? step : -1;
    const uint32 share = (65536 * kStoredTurns + turns - 1) / turns;
    const uint32 turn = step / kWarps;
    const uint32 slot = turn * share >> 16;
    return (turn + 1) * share >> 16 == slot ? -1 : static_cast<int>(slot) * kWarps + step % kWarps;
}

// The steps of a walk. Scores are read where they are stored, unless they are to be.
enum class Part { kAll, kStored, kToStore };

// Scores every stride-th key. Warp w takes runs w, w + kWarps, ... of kRun steps. visit(tile, half, scores, unit) gets the
// scores of kLaneUnits consecutive units for group 16 tile + 8 half + lane / 4 of the CTA; after(turn) follows each of the
// `turns` steps of a warp, those past the end included.
template <int kRun, Part kPart = Part::kAll, class Visit, class After>
__device__ __forceinline__ void walk(
    const Params& p, const SharedStorage& shared, const Queries& queries, int group0, int stride, int turns,
    Visit visit, After after, int first_turn = 0) {
    const int lane = lane_index();
    const int warp = warp_index();
    const auto step_of = [&](int turn) { return (turn / kRun * kWarps + warp) * kRun + turn % kRun; };
    uint2 keys[4][kSteps];
    if constexpr (kPrefetches) load_keys(p, step_of(first_turn), 0, stride, keys);
#pragma unroll 1
    for (int turn = first_turn; turn < turns; ++turn) {
        const int step = step_of(turn);
        const int next_step = step_of(turn + 1);
        const int first = step * kStepKeys * stride;
        const int end = first + kStepKeys * stride;
        const int own_first = group0 * kQueryGroup;
        const int slot = slot_of(p, step);
        if (first < p.seqlen_kv && (kPart == Part::kAll || slot >= 0)) {
            const bool is_judged =
                end > p.seqlen_kv || first < p.keep_first || p.keep_mask != nullptr ||
                (p.keep_own != 0 && first < own_first + kGroups * kQueryGroup && end > own_first);
            const int unit = step * kStepUnits + lane % 4 * kLaneUnits;
            if constexpr (kQueryMass) {
                float scores[2][kLaneUnits];
                if (kPart != Part::kToStore && slot >= 0) {
                    scores[0][0] = shared.stored[slot * kStepScores + lane];
                    scores[1][0] = shared.stored[slot * kStepScores + 32 + lane];
                } else if constexpr (kHasQueryScores) {
                    float of_queries[kTiles][2];
                    score_queries(p, shared, queries, step, of_queries);
                    scores[0][0] = score_of_queries(p, shared, queries, of_queries, 0);
                    scores[1][0] = score_of_queries(p, shared, queries, of_queries, 1);
                } else {
                    score_chunk(p, shared, queries, step, stride, scores);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (is_judged) {
                        const int group = group0 + 8 * half + lane / 4;
#pragma unroll
                        for (int i = 0; i < kLaneUnits; ++i) {
                            scores[half][i] = judged(p, scores[half][i], (unit + i) * kKvBlock * stride, group);
                        }
                    }
                    visit(0, half, scores[half], unit);
                }
                after(turn);
                continue;
            }
            float best[kGroupTiles][2];
            float sum[kGroupTiles][2] = {};  // of masses
#pragma unroll
            for (int tile = 0; tile < kGroupTiles; ++tile) best[tile][0] = best[tile][1] = -kInf;
            const auto add_masses = [&](int tile, int half, int chunk, float(&scores)[8]) {
                const int key = unit * kKvBlock + 8 * chunk;
                if (end > p.seqlen_kv) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        // The last key once more: no mass.
                        if (key + i >= p.seqlen_kv) scores[i] = -kInf;
                    }
                }
                add_mass(p, best[tile][half], sum[tile][half], scores);
            };
#pragma unroll 1
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                uint2 next[4][kSteps];
                const bool more = chunk + 1 < kChunks;
                if constexpr (kPrefetches) {
                    load_keys(p, more ? step : next_step, more ? chunk + 1 : 0, stride, next);
                } else {
                    load_keys(p, step, chunk, stride, keys);
                }
#pragma unroll
                for (int tile = 0; tile < kGroupTiles; ++tile) {
                    float scores[2][8];
#pragma unroll
                    for (int query = 0; query < kQueries; ++query) {
                        float d[4][4];
                        multiply(shared, queries, tile * kQueries + query, keys, d);
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                float& score = scores[i / 2][2 * j + i % 2];
                                score = query == 0 ? d[j][i] : max_or_nan(score, d[j][i]);
                            }
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int group = group0 + 16 * tile + 8 * half + lane / 4;
                        if constexpr (kBlockMass && kLaneUnits == 1) {
                            add_masses(tile, half, chunk, scores[half]);
                            continue;
                        }
                        if constexpr (kLaneUnits > 1) {
                            if (is_judged) {
#pragma unroll
                                for (int i = 0; i < 8; ++i) {
                                    scores[half][i] = judged(p, scores[half][i], (unit + i) * stride, group);
                                }
                            }
                            visit(tile, half, scores[half], unit);
                        } else {
                            // Keys past the end are the last key once more: no maximum is changed.
#pragma unroll
                            for (int apart = 4; apart > 0; apart /= 2) {
#pragma unroll
                                for (int i = 0; i < apart; ++i) {
                                    scores[half][i] = max_or_nan(scores[half][i], scores[half][i + apart]);
                                }
                            }
                            best[tile][half] = max_or_nan(best[tile][half], scores[half][0]);
                        }
                    }
                }
                if constexpr (kPrefetches) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) keys[j][0] = next[j][0];
                }
            }
            if constexpr (kLaneUnits == 1) {
#pragma unroll
                for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float score[1] = {best[tile][half]};
                        if constexpr (kBlockMass) score[0] = score_of_mass(queries, score[0], sum[tile][half]);
                        const int group = group0 + 16 * tile + 8 * half + lane / 4;
                        if (is_judged) score[0] = judged(p, score[0], unit * kKvBlock, group);
                        visit(tile, half, score, unit);
                    }
                }
            }
        }
        after(turn);
    }
}

// LSE of every query over all finite logits. Of units of several chunks, also the first units' scores by each query.
__device__ __forceinline__ void find_lse(
    const Params& p, SharedStorage& shared, const Queries& queries) {
    const int lane = lane_index();
    const int warp = warp_index();
    float reference[kTiles][2];
    float sum[kTiles][2] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) reference[tile][0] = reference[tile][1] = -kInf;
    // A chunk's finite products, relative to the largest so far.
    const auto add_finite = [&](const uint2(&keys)[4][kSteps], int key) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float products[4][4];
            multiply<false>(shared, queries, tile, keys, products);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float terms[8];
                float most = reference[tile][half];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float product = product_of(products, half, i);
                    terms[i] = product < kInf && key + i < p.seqlen_kv ? product : -kInf;
                    most = fmaxf(most, terms[i]);
                }
                if (most == -kInf) continue;
                sum[tile][half] *= exp2_approx((reference[tile][half] - most) * p.scale_log2);
                reference[tile][half] = most;
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[tile][half] += exp2_approx((terms[i] - most) * p.scale_log2);
            }
        }
    };
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
#pragma unroll 1
    for (int step = warp; step < steps; step += kWarps) {
        const int key = step * kStepKeys + lane % 4 * kLaneKeys;
        bool counts = true;
        if constexpr (kHasQueryScores) {
            float scores[kTiles][2];
            score_queries(p, shared, queries, step, scores);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float score = scores[tile][half];
                    if (step < kSharedSteps) shared.stored[((step * kTiles + tile) * 2 + half) * 32 + lane] = score;
                    counts &= score < kInf;  // not NaN either
                }
            }
            if (__all_sync(kFullWarp, counts)) {
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float most = fmaxf(reference[tile][half], scores[tile][half]);
                        if (most == -kInf) continue;
                        sum[tile][half] = sum[tile][half] * exp2_approx((reference[tile][half] - most) * p.scale_log2) +
                                          exp2_approx((scores[tile][half] - most) * p.scale_log2);
                        reference[tile][half] = most;
                    }
                }
            } else {
#pragma unroll 1
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    uint2 keys[4][kSteps];
                    load_keys(p, step, chunk, 1, keys);
                    add_finite(keys, key + 8 * chunk);
                }
            }
        } else {
            uint2 keys[4][kSteps];
            load_keys(p, step, 0, 1, keys);
            float more[kTiles][2];
            // Infinite with a first reference, and with an infinite product; too large with one that is much larger.
            counts = (step + 1) * kStepKeys <= p.seqlen_kv;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                float products[4][4];
                multiply(shared, queries, tile, keys, products);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float terms[8];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        terms[i] = exp2_approx((product_of(products, half, i) - reference[tile][half]) * p.scale_log2);
                    }
                    more[tile][half] = sum_of(terms);
                    counts &= more[tile][half] < kHeadroom;
                }
            }
            if (__all_sync(kFullWarp, counts)) {
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    sum[tile][0] += more[tile][0];
                    sum[tile][1] += more[tile][1];
                }
            } else {
                add_finite(keys, key);
            }
        }
    }
    // The lanes of a quad, then the warps, in order.
    const auto join = [&](float& a, float& b, float c, float d) {
        const float most = fmaxf(a, c);
        if (most == -kInf) return;
        b = b * exp2_approx((a - most) * p.scale_log2) + d * exp2_approx((c - most) * p.scale_log2);
        a = most;
    };
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float a = reference[tile][half];
            float b = sum[tile][half];
#pragma unroll
            for (int apart = 1; apart < 4; apart *= 2) {
                const float c = __shfl_xor_sync(kFullWarp, a, apart);
                const float d = __shfl_xor_sync(kFullWarp, b, apart);
                join(a, b, c, d);
            }
            if (lane % 4 == 0) {
                shared.partial[0][warp % (kQueryMass ? kWarps : 1)][16 * tile + 8 * half + lane / 4] = a;
                shared.partial[1][warp % (kQueryMass ? kWarps : 1)][16 * tile + 8 * half + lane / 4] = b;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < 16 * kTiles) {
        float a = -kInf;
        float b = 0.0f;
        for (int i = 0; i < (kQueryMass ? kWarps : 1); ++i) {
            join(a, b, shared.partial[0][i][threadIdx.x], shared.partial[1][i][threadIdx.x]);
        }
        float log;
        asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(b));
        // A query without a finite logit gives every key the same.
        const float2 lse = a == -kInf ? make_float2(0.0f, 0.0f) : make_float2(a, log);
        shared.lse[threadIdx.x % (kQueryMass ? 16 * kTiles : 1)] = lse;
    }
    __syncthreads();
}

// Stores scores, as walk reads them.
__device__ __forceinline__ void store_scores(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int lane = lane_index();
    const int warp = warp_index();
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
    if constexpr (kHasQueryScores) {
        // In place: a turn of the warps writes where no later turn reads.
#pragma unroll 1
        for (int first = 0; first < min(steps, kSharedSteps); first += kWarps) {
            const int step = first + warp;
            float score[2] = {};
            if (step < steps) {
                float of_queries[kTiles][2];
#pragma unroll
                for (int i = 0; i < 2 * kTiles; ++i) {
                    of_queries[i / 2][i % 2] = shared.stored[(step * 2 * kTiles + i) * 32 + lane];
                }
                score[0] = score_of_queries(p, shared, queries, of_queries, 0);
                score[1] = score_of_queries(p, shared, queries, of_queries, 1);
            }
            __syncthreads();
            shared.stored[step * kStepScores + lane] = score[0];
            shared.stored[step * kStepScores + 32 + lane] = score[1];
        }
    }
    walk<1, Part::kToStore>(
        p, shared, queries, group0, 1, (steps + kWarps - 1) / kWarps,
        [&](int, int half, const float(&scores)[kLaneUnits], int unit) {
            shared.stored[slot_of(p, unit / kStepUnits) * kStepScores + 32 * half + lane] = scores[0];
        },
        [](int) {}, kSharedSteps / kWarps);
    __syncthreads();
}

// A row's range as scores; empty once the search is done.
struct Range {
    float low;
    float last;
};

__device__ __forceinline__ Range range_of(const Row& row) {
    if (row.shift == kDone) return {kInf, -kInf};
    // The integer of -0 is nobody's: as a float it would let +0 in.
    const uint32 top = min(row.last == 0x7fffffffu ? row.last - 1 : row.last, ~kLowest);
    return {unordered(max(row.low, kLowest)), unordered(top)};
}

// Adds the scores inside each row's range to its bins.
template <Part kPart = Part::kAll>
__device__ __forceinline__ void fill_bins(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0, int stride) {
    const int lane = lane_index();
    float low[kGroupTiles][2];
    float last[kGroupTiles][2];
    uint32 origin[kGroupTiles][2];
    int shift[kGroupTiles][2];
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row row = shared.rows[16 * tile + 8 * half + lane / 4];
            const Range range = range_of(row);
            low[tile][half] = range.low;
            last[tile][half] = range.last;
            origin[tile][half] = row.low;
            shift[tile][half] = row.shift;
        }
    }
    uint32* lane_bins = shared.bins[lane / 4];
    const int steps = ((p.seqlen_kv + stride - 1) / stride + kStepKeys - 1) / kStepKeys;
    walk<1, kPart>(
        p, shared, queries, group0, stride, (steps + kWarps - 1) / kWarps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int) {
            uint32* row_bins = lane_bins + (16 * tile + 8 * half) * kBinStride;
            if constexpr (kBoundsInShared) {
                const Row& row = shared.rows[16 * tile + 8 * half + lane / 4];
                const uint32 score = ordered(scores[0]);
                if (row.shift != kDone && score >= row.low && score <= min(row.last, ~kLowest)) {
                    atomicAdd(row_bins + ((score - row.low) >> row.shift), 1u);
                }
                return;
            }
            // One score a chunk: the same.
            const int row = 16 * tile + 8 * half + lane / 4;
            const uint32 from = kLaneUnits > 1 ? origin[tile][half] : shared.rows[row].low;
            const int bits = kLaneUnits > 1 ? shift[tile][half] : shared.rows[row].shift;
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                if (scores[i] >= low[tile][half] && scores[i] <= last[tile][half]) {
                    atomicAdd(row_bins + ((ordered(scores[i]) - from) >> bits), 1u);
                }
            }
        },
        [](int) {});
}

// No bracket.
__device__ __forceinline__ Line no_line() { return {0.0f, 0.0f, __uint_as_float(0x7fffffffu), 0}; }

// The bracket as bins of even width; none where it has no finite ends, or no width to speak of.
__device__ __forceinline__ Line line_of(const Row& row, int i) {
    const float low = unordered(max(row.low, kLowest));
    const float last = unordered(min(row.last, ~kLowest));
    const float largest = fmaxf(fabsf(low), fabsf(last));
    // One bin is left free at each end for what rounding moves. Bins need not be finer than the numbers themselves.
    const float slope = fminf(static_cast<float>(kBins - 3) / (last - low), 4194304.0f / largest);
    Line line = no_line();
    if (largest < 1e30f && slope > 0.0f && slope < 1e30f) {
        line.slope = slope;
        line.offset = kFirstPlace + static_cast<float>(i / 8 * kLanePlaces + 1) - low * slope;
    }
    return line;
}

// Counts what the lanes of a warp have waiting.
__device__ __forceinline__ void count_waiting(const float (&waiting)[kWaiting][32], uint32* lane_bins, int count) {
    const int lane = lane_index();
    const int most = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<uint32>(count)));
#pragma unroll 2
    for (int n = 0; n < most; ++n) {
        if (n < count) {
            const uint32 place = __float_as_uint(waiting[n][lane]) - __float_as_uint(kFirstPlace);
            atomicAdd(lane_bins + place, 1u);
        }
    }
}

// Counts the scores of every row's bracket in its bins, and those at or above its first bin in shared.above. A score costs
// the same wherever it lies: what falls into the bracket waits in shared memory until a lane has no room.
__device__ __forceinline__ void fill_bracket(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int lane = lane_index();
    float slope[kGroupTiles][2];
    float offset[kGroupTiles][2];
    int reached[kGroupTiles][2] = {};
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Line& line = shared.lines[16 * tile + 8 * half + lane / 4];
            slope[tile][half] = line.slope;
            offset[tile][half] = line.offset;
        }
    }
    uint32* lane_bins = shared.bins[lane / 4];
    const auto& waiting = shared.waiting[warp_index() % kWaitingWarps];
    const uint32 floor = static_cast<uint32>(__cvta_generic_to_shared(&waiting[0][lane]));
    uint32 top = floor;
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
    walk<1>(
        p, shared, queries, group0, 1, (steps + kWarps - 1) / kWarps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int) {
            const float first = kFirstPlace + static_cast<float>((2 * tile + half) * kLanePlaces);
            const float last = first + static_cast<float>(kBins - 1);
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                const float place = fmaf(scores[i], slope[tile][half], offset[tile][half]);
                // Branches would be taken for most scores by some lane of the warp.
                asm volatile(
                    "{\n"
                    ".reg .pred reaches, inside;\n"
                    "setp.ge.f32 reaches, %2, %3;\n"
                    "setp.le.and.f32 inside, %2, %4, reaches;\n"
                    "@reaches add.s32 %0, %0, 1;\n"
                    "@inside st.shared.f32 [%1], %2;\n"
                    "@inside add.u32 %1, %1, 128;\n"
                    "}\n"
                    : "+r"(reached[tile][half]), "+r"(top)
                    : "f"(place), "f"(first), "f"(last)
                    : "memory");
            }
            // Always room for what a tile brings.
            if (half == 1 && __any_sync(kFullWarp, top - floor > (kWaiting - 2 * kLaneUnits) * 128)) {
                count_waiting(waiting, lane_bins, static_cast<int>(top - floor) / 128);
                top = floor;
            }
        },
        [](int) {});
    count_waiting(waiting, lane_bins, static_cast<int>(top - floor) / 128);
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int sum = reached[tile][half];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            if (lane % 4 == 0) atomicAdd(&shared.above[16 * tile + 8 * half + lane / 4], sum);
        }
    }
}

// Keeps the scores inside each row's range, counted by shared.num_kept, and counts those above it in shared.above.
__device__ __forceinline__ void keep_range(const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int lane = lane_index();
    Range range[2];
    int above[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) range[half] = range_of(shared.rows[8 * half + lane / 4]);
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
    walk<1>(
        p, shared, queries, group0, 1, (steps + kWarps - 1) / kWarps,
        [&](int, int half, const float(&scores)[kLaneUnits], int) {
            const float low = range[half].low;
            const float last = range[half].last;
            int reached = 0;
            int larger = 0;
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                reached += scores[i] >= low ? 1 : 0;
                larger += scores[i] > last ? 1 : 0;
            }
            above[half] += larger;
            if (reached == larger) return;
            const int row = (8 * half + lane / 4) % (kMayKeep ? kGroups : 1);
            const int slot = atomicAdd(&shared.num_kept[row], reached - larger);
            if (slot + reached - larger > kKept) return;
            uint32 to = static_cast<uint32>(__cvta_generic_to_shared(&shared.kept[row][slot]));
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                // Branches would be taken by some lane of the warp.
                asm volatile(
                    "{\n"
                    ".reg .pred inside;\n"
                    "setp.ge.f32 inside, %1, %2;\n"
                    "setp.le.and.f32 inside, %1, %3, inside;\n"
                    "@inside st.shared.f32 [%0], %1;\n"
                    "@inside add.u32 %0, %0, 4;\n"
                    "}\n"
                    : "+r"(to)
                    : "f"(scores[i]), "f"(low), "f"(last)
                    : "memory");
            }
        },
        [](int) {});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int sum = above[half];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        if (lane % 4 == 0) atomicAdd(&shared.above[8 * half + lane / 4], sum);
    }
}

// fill_bins from what is kept.
__device__ __forceinline__ void fill_bins_from_kept(SharedStorage& shared) {
#pragma unroll 1
    for (int r = 0; r < kRowsPerWarp; ++r) {
        const int i = (warp_index() * kRowsPerWarp + r) % (kMayKeep ? kGroups : 1);
        const Row row = shared.rows[i];
        if (row.shift == kDone) continue;
        for (int n = lane_index(); n < shared.num_kept[i]; n += 32) {
            const uint32 score = ordered(shared.kept[i][n]);
            if (score >= row.low && score <= row.last) atomicAdd(&shared.bins[i][(score - row.low) >> row.shift], 1u);
        }
    }
}

// Collects, as ordered integers in the bins' room, the scores of each row's bin; shared.above counts them.
__device__ __forceinline__ void collect(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int lane = lane_index();
    float slope[kGroupTiles][2];
    float offset[kGroupTiles][2];
    float bin[kGroupTiles][2];
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Line& line = shared.lines[16 * tile + 8 * half + lane / 4];
            slope[tile][half] = line.slope;
            offset[tile][half] = line.offset;
            bin[tile][half] = line.bin;
        }
    }
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
    walk<1>(
        p, shared, queries, group0, 1, (steps + kWarps - 1) / kWarps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int) {
            bool any = false;
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                any |= fmaf(scores[i], slope[tile][half], offset[tile][half]) == bin[tile][half];
            }
            if (any) {
                const int row = 16 * tile + 8 * half + lane / 4;
#pragma unroll
                for (int i = 0; i < kLaneUnits; ++i) {
                    if (fmaf(scores[i], slope[tile][half], offset[tile][half]) == bin[tile][half]) {
                        shared.bins[row][atomicAdd(&shared.above[row], 1) % kBins] = ordered(scores[i]);
                    }
                }
            }
        },
        [](int) {});
}

struct Bin {
    int index;
    int above;   // elements in higher bins
    int inside;  // elements in it
};

// The highest bin with which, from the top, `rank` elements are reached; the lowest where they never are. One warp.
__device__ __forceinline__ Bin find_bin(const uint32* bins, int rank) {
    constexpr int kBinsPerLane = kBins / 32;
    int index = kBins - 1 - kBinsPerLane * lane_index();
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) sum += static_cast<int>(bins[index - i]);
    const int through = warp_inclusive_sum(sum);
    const uint32 reached = __ballot_sync(kFullWarp, through >= rank);
    const int source = reached == 0 ? 31 : __ffs(static_cast<int>(reached)) - 1;
    int above = through - sum;
    int inside = static_cast<int>(bins[index]);
    for (int i = 1; i < kBinsPerLane && above + inside < rank; ++i) {
        above += inside;
        --index;
        inside = static_cast<int>(bins[index]);
    }
    Bin bin;
    bin.index = __shfl_sync(kFullWarp, index, source);
    bin.above = __shfl_sync(kFullWarp, above, source);
    bin.inside = __shfl_sync(kFullWarp, inside, source);
    return bin;
}

__device__ __forceinline__ int count_bins(const uint32* bins) {
    int sum = 0;
    for (int i = lane_index(); i < kBins; i += 32) sum += static_cast<int>(bins[i]);
    return warp_sum(sum);
}

// How many ranks of a sample lie between the k-th's and an end of its bracket.
__device__ __forceinline__ int margin_of(float rank) { return static_cast<int>(4.5f * sqrtf(rank)) + 4; }

// Narrows a row's range to where, by a sample of `samples` of `units` scores, the k-th will lie. A wrong guess costs a
// pass, never a wrong list. One warp.
__device__ __forceinline__ Row bracketed(Row row, const uint32* bins, int samples, int units) {
    const float rank = static_cast<float>(row.k) * static_cast<float>(samples) / static_cast<float>(units);
    const int margin = margin_of(rank);
    const int upper = static_cast<int>(rank) - margin - row.above;
    const int lower = static_cast<int>(rank) + margin - row.above;
    const uint32 origin = row.low;
    if (lower <= count_bins(bins)) row.low = origin + (static_cast<uint32>(find_bin(bins, lower).index) << row.shift);
    if (upper >= 1) {
        const Bin bin = find_bin(bins, upper);
        row.last = min(row.last, origin + (static_cast<uint32>(bin.index + 1) << row.shift) - 1);
        row.above += bin.above;
    }
    row.shift = max(0, 32 - kBinBits - __clz(static_cast<int>(row.last - row.low)));
    return row;
}

// A row that starts again from everything: the sample misled.
__device__ __forceinline__ Row restarted(Row row) {
    row.low = 0;
    row.last = 0xffffffffu;
    row.shift = 32 - kBinBits;
    row.above = 0;
    return row;
}

// Narrows a row's range to the bin of its k-th largest score, by bins that hold every score of the range. One warp.
__device__ __forceinline__ Row narrowed(Row row, uint32* bins, int units) {
    int inside = count_bins(bins);
    if (row.low <= kLowest && row.last >= kLowest) {
        // Nothing lies below -inf: what no compare counted is NaN, and ranks with -inf.
        const int missing = units - row.above - inside;
        __syncwarp();
        if (lane_index() == 0) bins[(kLowest - row.low) >> row.shift] += static_cast<uint32>(missing);
        __syncwarp();
        inside += missing;
    }
    const int rank = row.k - row.above;
    if (rank < 1 || rank > inside) {
        return restarted(row);
    }
    const Bin bin = find_bin(bins, rank);
    row.above += bin.above;
    row.low += static_cast<uint32>(bin.index) << row.shift;
    row.last = min(row.last, row.low + ((1u << row.shift) - 1));
    const int needed = rank - bin.above;
    if (needed == bin.inside || row.shift == 0) {
        row.ties = needed == bin.inside ? kAllTies : needed;
        row.shift = kDone;
    } else {
        row.shift = max(0, row.shift - kBinBits);
    }
    return row;
}

// The bin of row i's k-th score; none where the bracket missed it, or the bin is too full to be collected.
__device__ __forceinline__ Line located(Line line, const uint32* bins, int reached, int k, int i) {
    const int inside = count_bins(bins);
    const int rank = k - (reached - inside);
    if (rank < 1 || rank > inside) return line;
    const Bin bin = find_bin(bins, rank);
    if (bin.inside <= kBins) {
        line.bin = kFirstPlace + static_cast<float>(i / 8 * kLanePlaces + bin.index);
        line.needed = rank - bin.above;
    }
    return line;
}

// Done: the `needed`-th largest of `count` collected scores, found bit by bit. One warp.
__device__ __forceinline__ Row resolved(Row row, const uint32* collected, int count, int needed) {
    const int lane = lane_index();
    const auto at_least = [&](uint32 bound) {
        int sum = 0;
        for (int n = lane; n < count; n += 32) sum += collected[n] >= bound ? 1 : 0;
        return warp_sum(sum);
    };
    uint32 value = 0;
#pragma unroll 1
    for (uint32 bit = 0x80000000u; bit != 0; bit >>= 1) {
        if (at_least(value | bit) >= needed) value |= bit;
    }
    // No score has the largest integer: that is a NaN's.
    const int larger = at_least(value + 1);
    const int reaching = at_least(value);
    row.low = value;
    row.ties = reaching == needed ? kAllTies : needed - larger;
    row.shift = kDone;
    return row;
}

// row = f(row, i) for each unfinished row; afterwards its bins are empty. Gives whether the CTA still has one.
template <class Function>
__device__ __forceinline__ bool each_open_row(SharedStorage& shared, Function f) {
    const int lane = lane_index();
    bool is_open = false;
#pragma unroll 1
    for (int r = 0; r < kRowsPerWarp; ++r) {
        const int i = warp_index() * kRowsPerWarp + r;
        Row row = shared.rows[i];
        if (row.shift == kDone) continue;
        row = f(row, i);
        is_open |= row.shift != kDone;
        __syncwarp();
        if (lane == 0) shared.rows[i] = row;
        for (int bin = lane; bin < kBins; bin += 32) shared.bins[i][bin] = 0;
    }
    return __syncthreads_or(is_open) != 0;
}

// Halvings of mass between the largest score and this one; one rounding after the other, so that every use agrees.
__device__ __forceinline__ float halvings(const Params& p, float largest, float score) {
    return __fmul_rn(largest - score, p.scale_log2);
}

// The same as an integer.
__device__ __forceinline__ uint32 depth_of(float d) { return __float2uint_rn(d * kDepthsPerHalving); }

// The mass of a score d halvings below the largest.
__device__ __forceinline__ uint32 mass_of(float d) { return __float2uint_rn(exp2_approx(31.0f - d)); }

// The largest finite score of every group.
__device__ __forceinline__ void find_largest(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int lane = lane_index();
    float largest[kGroupTiles][2];
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) largest[tile][0] = largest[tile][1] = -kInf;
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
    walk<1>(
        p, shared, queries, group0, 1, (steps + kWarps - 1) / kWarps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int) {
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                // fmaxf passes NaN over.
                largest[tile][half] = fmaxf(largest[tile][half], scores[i] < kInf ? scores[i] : -kInf);
            }
        },
        [](int) {});
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = largest[tile][half];
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
            if (lane % 4 == 0 && most > -kInf) {
                atomicMax(&shared.masses[(16 * tile + 8 * half + lane / 4) % (kTopP ? kGroups : 1)].largest_bits, ordered(most));
            }
        }
    }
}

// Adds the masses of the scores inside each row's range to its bins: the low words, then the high ones.
__device__ __forceinline__ void fill_masses(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
    walk<1>(
        p, shared, queries, group0, 1, (steps + kWarps - 1) / kWarps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int) {
            const int row = 16 * tile + 8 * half + lane_index() / 4;
            const Mass& mass = shared.masses[row % (kTopP ? kGroups : 1)];
            const uint32 first = mass.first;
            const int shift = mass.shift;
            const float largest = mass.largest;
            if (mass.ready != 0) return;
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                const float d = halvings(p, largest, scores[i]);
                const uint32 depth = depth_of(d);
                const uint32 bin = (depth - first) >> shift;
                if (scores[i] < kInf && depth < kDepths && bin < kMassBins) {
                    const uint32 weight = mass_of(d);
                    const uint32 before = atomicAdd(&shared.bins[row][bin], weight);
                    if (before + weight < before) atomicAdd(&shared.bins[row][kMassBins + bin], 1u);
                }
            }
        },
        [](int) {});
}

__device__ __forceinline__ uint64 warp_sum_64(uint64 x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    return x;
}

// Narrows a row's range to the bin with which the target is reached. The first time, the range is everything and the target
// the share `share` of it. One warp.
__device__ __forceinline__ Mass mass_narrowed(const Params& p, Mass mass, const uint32* bins, float share, bool is_first) {
    constexpr int kBinsPerLane = kMassBins / 32;
    const int lane = lane_index();
    const auto inside = [&](int bin) { return static_cast<uint64>(bins[kMassBins + bin]) << 32 | bins[bin]; };
    int index = kBinsPerLane * lane;
    uint64 sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) sum += inside(index + i);
    uint64 through = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64 below = __shfl_up_sync(kFullWarp, through, offset);
        if (lane >= offset) through += below;
    }
    if (is_first) {
        const uint64 total = __shfl_sync(kFullWarp, through, 31);
        // The share as an integer of 2^-32; the product rounded up.
        const uint64 part = max(__float2uint_rz(share * 4294967296.0f), 1u);
        const uint64 low = (total & 0xffffffffu) * part;
        mass.target = (total >> 32) * part + (low >> 32) + ((low & 0xffffffffu) != 0 ? 1 : 0);
        if (mass.target == 0) {
            // No mass anywhere: an empty range.
            mass.shift = 0;
            mass.ready = 1;
            return mass;
        }
    }
    const uint32 reached = __ballot_sync(kFullWarp, through >= mass.target);
    const int source = reached == 0 ? 31 : __ffs(static_cast<int>(reached)) - 1;
    uint64 above = through - sum;
    for (int i = 1; i < kBinsPerLane && above + inside(index) < mass.target; ++i) above += inside(index++);
    index = __shfl_sync(kFullWarp, index, source);
    mass.target -= __shfl_sync(kFullWarp, above, source);
    mass.first += static_cast<uint32>(index) << mass.shift;
    // The bin's lightest score bounds how many there are; where it is so light that rounding counts, they go on.
    const float deepest = static_cast<float>(mass.first + (1u << mass.shift)) / kDepthsPerHalving;
    const float lightest = exp2_approx(31.0f - deepest);
    const bool few = lightest > 256.0f && static_cast<float>(inside(index)) < 0.95f * static_cast<float>(kBins) * lightest;
    mass.ready = few || mass.shift == 0;
    if (mass.ready == 0) mass.shift -= kMassBinBits;
    return mass;
}

// Collects, as ordered integers in the bins' room, the scores of each row's range, and counts those above it. shared.above
// says how many were in the range, if there was room or not.
__device__ __forceinline__ void collect_range(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int lane = lane_index();
    int above[kGroupTiles][2] = {};
    const int steps = (p.seqlen_kv + kStepKeys - 1) / kStepKeys;
    walk<1>(
        p, shared, queries, group0, 1, (steps + kWarps - 1) / kWarps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int) {
            const int row = 16 * tile + 8 * half + lane / 4;
            const Mass& mass = shared.masses[row % (kTopP ? kGroups : 1)];
            const uint32 first = mass.first;
            const int shift = mass.shift;
            const float largest = mass.largest;
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                const uint32 depth = depth_of(halvings(p, largest, scores[i]));
                if (scores[i] == kInf || (scores[i] < kInf && depth < first)) ++above[tile][half];
                if (scores[i] < kInf && depth < kDepths && depth >= first && (depth - first) >> shift == 0) {
                    const int slot = atomicAdd(&shared.above[row], 1);
                    if (slot < kBins) shared.bins[row][slot] = ordered(scores[i]);
                }
            }
        },
        [](int) {});
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int sum = above[tile][half];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            if (lane % 4 == 0) atomicAdd(&shared.masses[(16 * tile + 8 * half + lane / 4) % (kTopP ? kGroups : 1)].above, sum);
        }
    }
}

// Done: the last of the collected scores that the target needs, found bit by bit. Not done, but of a known number k: where
// there were too many to collect (they weigh the same), and where max_selected is less than the target needs. One warp.
__device__ __forceinline__ Row mass_resolved(const Params& p, Row row, const uint32* collected, int count, const Mass& mass) {
    const int lane = lane_index();
    const auto weight = [&](uint32 value) { return mass_of(halvings(p, mass.largest, unordered(value))); };
    uint64 wanted = 0;  // so many are listed
    if (mass.target == 0) {
        row.low = ~kLowest;  // +inf alone
        row.ties = kAllTies;
        row.shift = kDone;
        wanted = static_cast<uint64>(mass.above);
    } else if (count > kBins) {
        const float d = static_cast<float>(mass.first) / kDepthsPerHalving;
        const uint64 each = max(mass_of(d), 1u);
        const uint64 needed = min((mass.target + each - 1) / each, static_cast<uint64>(count));
        wanted = static_cast<uint64>(mass.above) + needed;
        row = restarted(row);
    } else {
        const auto mass_from = [&](uint32 bound) {
            uint64 sum = 0;
            for (int n = lane; n < count; n += 32) sum += collected[n] >= bound ? weight(collected[n]) : 0;
            return warp_sum_64(sum);
        };
        const auto count_from = [&](uint32 bound) {
            int sum = 0;
            for (int n = lane; n < count; n += 32) sum += collected[n] >= bound ? 1 : 0;
            return warp_sum(sum);
        };
        uint32 value = 0;
#pragma unroll 1
        for (uint32 bit = 0x80000000u; bit != 0; bit >>= 1) {
            if (mass_from(value | bit) >= mass.target) value |= bit;
        }
        const int larger = count_from(value + 1);
        const int equal = count_from(value) - larger;
        const uint64 each = weight(value);
        const int needed = static_cast<int>((mass.target - mass_from(value + 1) + each - 1) / each);
        row.low = value;
        row.ties = needed >= equal ? kAllTies : needed;
        row.shift = kDone;
        wanted = static_cast<uint64>(mass.above + larger + min(needed, equal));
    }
    row.k = static_cast<int32>(wanted);
    if (wanted > static_cast<uint64>(p.max_selected)) {
        row = restarted(row);
        row.k = p.max_selected;
        if (lane == 0 && p.capped != nullptr) atomicAdd(p.capped, 1);
    }
    return row;
}

// The list of the CTA's first group. Computed where it is needed, which is seldom, and not kept in registers.
__device__ __forceinline__ int64 first_list(const Params& p) {
    int head = blockIdx.y;
    asm volatile("" : "+r"(head));
    return (static_cast<int64>(blockIdx.z) * p.num_heads + head) * p.num_groups + blockIdx.x * kGroups;
}

// Turns a tile of 1024 units' bits into ids, for the rows of this warp.
__device__ __forceinline__ void emit_tile(const Params& p, SharedStorage& shared, int tile) {
    const int64 list0 = first_list(p);
    const int groups = p.num_groups - static_cast<int>(blockIdx.x) * kGroups;
    const int lane = lane_index();
    const int warp = warp_index();
    const int words = (p.num_kv_blocks + 31) / 32;
    const int word = tile * kTileWords + lane;
    const int left = p.num_kv_blocks - 32 * word;
    const uint32 exists = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
#pragma unroll 1
    for (int r = 0; r < kRowsPerWarp; ++r) {
        const int i = warp * kRowsPerWarp + r;
        if (i >= groups) break;
        Row& row = shared.rows[i];
        const int emitted = row.emitted;
        const int ties = row.ties;
        uint32 listed = row.low <= kLowest ? exists : shared.reach[tile % 2][i][lane];
        int ties_seen = 0;
        if (ties != kAllTies) {
            const uint32 larger = shared.exceed[tile % 2][i][lane];
            uint32 equal = listed & ~larger;
            const int count = __popc(equal);
            const int through = warp_inclusive_sum(count);
            const int kept = min(max(ties - (through - count), 0), count);
            for (int n = count; n > kept; --n) equal &= ~(0x80000000u >> __clz(static_cast<int>(equal)));
            ties_seen = __shfl_sync(kFullWarp, through, 31);
            listed = larger | equal;
        }
        const int count = __popc(listed);
        const int through = warp_inclusive_sum(count);
        const int total = __shfl_sync(kFullWarp, through, 31);
        const int64 list = list0 + i;
        if (p.bitmap != nullptr && word < words) p.bitmap[list * words + word] = listed;
        if (p.q2k_index != nullptr) {
            // Through shared memory, so that ids are stored a warp at a time and not one by one.
            uint16* ids = shared.ids[warp];
            int next = through - count;
            for (uint32 bits = listed; bits != 0; bits &= bits - 1) {
                ids[next++] = static_cast<uint16>(32 * lane + __ffs(static_cast<int>(bits)) - 1);
            }
            __syncwarp();
            int32* out = p.q2k_index + list * p.max_selected + emitted;
            const int room = min(total, p.max_selected - emitted);
            for (int n = lane; n < room; n += 32) out[n] = 32 * kTileWords * tile + ids[n];
        }
        __syncwarp();
        if (lane == 0) {
            row.emitted = emitted + total;
            if (ties != kAllTies) row.ties = max(ties - ties_seen, 0);
        }
        __syncwarp();
    }
}

// The last pass: two bits a unit, turned into ids tile by tile. Gives error bits.
__device__ __forceinline__ int32 emit(
    const Params& p, SharedStorage& shared, const Queries& queries, int group0) {
    const int lane = lane_index();
    const int warp = warp_index();
    float reach_bound[kGroupTiles][2];
    uint32 bits[kGroupTiles][2] = {};  // this lane's of the word: reach in the lowest byte, exceed in the next
    int32 errors = 0;
    bool any_ties = false;
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row& row = shared.rows[16 * tile + 8 * half + lane / 4];
            reach_bound[tile][half] = below(row.low);
            any_ties |= row.ties != kAllTies;
        }
    }
    any_ties = __any_sync(kFullWarp, any_ties);
    const int words = (p.num_kv_blocks + 31) / 32;
    const int tiles = (words + kTileWords - 1) / kTileWords;
    walk<kWordSteps>(
        p, shared, queries, group0, 1, tiles * 2 * kWordSteps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int unit) {
            const float bound = kBoundsInShared ? below(shared.rows[16 * tile + 8 * half + lane / 4].low) : reach_bound[tile][half];
            float probe = 0.0f;
            uint32 reaches = 0;
#pragma unroll
            for (int i = kLaneUnits - 1; i >= 0; --i) {
                reaches = push_larger(reaches, scores[i], bound);
                probe = fmaf(scores[i], 0.0f, probe);  // NaN where a score is NaN, or infinite
            }
            const int at = kLaneUnits > 1 ? 0 : unit / kStepUnits % kWordSteps;
            bits[tile][half] |= reaches << at;
            if (any_ties) {
                const float low = unordered(shared.rows[16 * tile + 8 * half + lane / 4].low);
                uint32 exceeds = 0;
#pragma unroll
                for (int i = kLaneUnits - 1; i >= 0; --i) {
                    exceeds = push_larger(exceeds, scores[i], low);
                }
                bits[tile][half] |= exceeds << (at + 8);
            }
            if (probe != probe || p.scores != nullptr) {
                int group = group0 + 16 * tile + 8 * half + lane / 4;
                asm volatile("" : "+r"(group));  // as in judged
#pragma unroll
                for (int i = 0; i < kLaneUnits; ++i) {
                    if (unit + i < p.num_kv_blocks && group < p.num_groups) {
                        const bool is_nan = scores[i] != scores[i];
                        if (is_nan) errors |= kScoreIsNan;
                        if (p.scores != nullptr) {
                            const int64 list = first_list(p) + group - group0;
                            p.scores[list * p.num_kv_blocks + unit + i] = is_nan ? -kInf : scores[i];
                        }
                    }
                }
            }
        },
        [&](int turn) {
            if (turn % kWordSteps != kWordSteps - 1) return;
            const int run = turn / kWordSteps;
            const int buffer = run / 2 % 2;
#pragma unroll
            for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32 reach = place(bits[tile][half]);
                    reach |= __shfl_xor_sync(kFullWarp, reach, 1);
                    reach |= __shfl_xor_sync(kFullWarp, reach, 2);
                    const int row = 16 * tile + 8 * half + lane / 4;
                    const int slot = run % 2 * kWarps + warp;
                    if (lane % 4 == 0) shared.reach[buffer][row][slot] = reach;
                    if (any_ties) {
                        uint32 exceed = place(bits[tile][half] >> 8);
                        exceed |= __shfl_xor_sync(kFullWarp, exceed, 1);
                        exceed |= __shfl_xor_sync(kFullWarp, exceed, 2);
                        if (lane % 4 == 0) shared.exceed[buffer][row][slot] = exceed;
                    }
                    bits[tile][half] = 0;
                }
            }
            if (run % 2 == 0) return;
            // One barrier a tile: the buffer written next was read before the barrier before this one.
            __syncthreads();
            emit_tile(p, shared, run / 2);
        });
    return errors;
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) kv_select_fine_bf16_r16_qg128_kb8_centre_max_topp_g64w16_sm90a(const __grid_constant__ Params p) {
    extern __shared__ uint4 smem[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    const int lane = lane_index();
    const int warp = warp_index();
    const int group0 = blockIdx.x * kGroups;
    const int units = p.num_kv_blocks;
    int32 errors = 0;

    // Of the budget top_p: all, none, or to be found for each group.
    float share = 0.0f;
    int k = 0;
    if constexpr (kTopP) {
        share = p.top_p[blockIdx.y];
        if (!(share >= 0.0f && share <= 1.0f)) errors |= kTopKOutOfRange;
        k = share >= 1.0f ? min(units, p.max_selected) : 0;
        if (k < units && share >= 1.0f && threadIdx.x == 0 && p.capped != nullptr) {
            atomicAdd(p.capped, min(kGroups, p.num_groups - group0));
        }
    } else {
        k = p.top_k[blockIdx.y];
        if (k < 0 || k > units) {
            errors |= kTopKOutOfRange;
            k = k < 0 ? 0 : units;
        }
        if (k > p.max_selected) {
            errors |= kTopKOutOfRange;
            k = p.max_selected;
        }
    }
    const bool by_mass = kTopP && share > 0.0f && share < 1.0f;
    if (warp == 0) raise_error(p.error_flag, errors);
    for (int i = threadIdx.x; i < kGroups; i += kThreads) {
        Row row = {};
        row.last = 0xffffffffu;
        row.shift = 32 - kBinBits;
        const bool exists = group0 + i < p.num_groups;
        row.k = exists ? k : 0;
        row.ties = kAllTies;
        if constexpr (kTopP) {
            Mass mass = {};
            mass.shift = 32 - kMassBinBits;
            mass.ready = !exists;
            shared.masses[i] = mass;
        }
        if (!(by_mass && exists) && (row.k == 0 || row.k == units)) {
            row.low = row.k == 0 ? 0xffffffffu : 0;  // nobody, or everybody
            row.shift = kDone;
        }
        shared.rows[i] = row;
        shared.above[i] = 0;
        shared.lines[i] = no_line();
        if constexpr (kMayKeep) shared.num_kept[i] = 0;
    }
    for (int i = warp; i < 16 * kTiles; i += kWarps) {
        // Tile i / 16 is of query i / 16 % kQueries of 16 groups.
        const int first = (group0 + i / (16 * kQueries) * 16 + i % 16) * kQueryGroup;
        const int len = min(kQueryGroup, p.seqlen_q - first);
        const int centre = len * (2 * (i / 16 % kQueries) + 1) / (2 * kQueries);
        write_query<Element, kProxyIsMean>(shared.queries[i / 16], i % 16, p.q_lr, first, len, centre);
    }
    __syncthreads();

    Queries queries;
    if constexpr (kHoldsQueries) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) read_operand(shared.queries[tile], 0, queries.held[tile]);
    }

    queries.per_doubling = kBlockMass ? __fdiv_rn(1.0f, p.scale_log2) : 1.0f;

    if constexpr (kQueryMass) find_lse(p, shared, queries);
    if constexpr (kStoredSteps > 0) store_scores(p, shared, queries, group0);
    uint32* all_bins = &shared.bins[0][0];
    for (int i = threadIdx.x; i < kGroups * kBinStride; i += kThreads) all_bins[i] = 0;
    __syncthreads();

    bool searches = k > 0 && k < units;
    if constexpr (kTopP) if (by_mass) {
        find_largest(p, shared, queries, group0);
        __syncthreads();
        for (int i = threadIdx.x; i < kGroups; i += kThreads) {
            Mass& mass = shared.masses[i];
            mass.largest = mass.largest_bits == 0 ? 0.0f : unordered(mass.largest_bits);
        }
        __syncthreads();
        bool is_first = true;
        bool is_open = true;
#pragma unroll 1
        while (is_open) {
            fill_masses(p, shared, queries, group0);
            __syncthreads();
            is_open = false;
            each_open_row(shared, [&](Row row, int i) {
                Mass mass = shared.masses[i];
                if (mass.ready == 0) {
                    mass = mass_narrowed(p, mass, shared.bins[i], p.top_p[blockIdx.y], is_first);
                    is_open |= mass.ready == 0;
                    __syncwarp();
                    if (lane == 0) shared.masses[i] = mass;
                }
                return row;
            });
            is_open = __syncthreads_or(is_open) != 0;
            is_first = false;
        }
        collect_range(p, shared, queries, group0);
        __syncthreads();
        searches = each_open_row(shared, [&](Row row, int i) {
            return mass_resolved(p, row, shared.bins[i], shared.above[i], shared.masses[i]);
        });
    }
    int samples = 0;
    if constexpr (kMaySample) {
        if (units >= kSampleFrom) samples = (units + kSampleStride - 1) / kSampleStride;
    } else if constexpr (kMayKeep) {
        // The last turn is always stored.
        const int turns = (units + kWarps * kStepUnits - 1) / (kWarps * kStepUnits);
        if (turns * kWarps > kStoredSteps) samples = units - (turns * kWarps - kStoredSteps) * kStepUnits;
    }
    bool keeps = false;
    if constexpr (kMayKeep) {
        const float share = static_cast<float>(samples) / static_cast<float>(units);
        const float rank = static_cast<float>(k) * share;
        const int margin = margin_of(rank);
        // The first k are bracketed on one side only.
        keeps = margin < static_cast<int>(rank) && static_cast<float>(2 * margin) < share * static_cast<float>(kKept / 10 * 9);
    }
    if constexpr (kMaySample || kMayKeep) if (searches && samples > 0 && (kMaySample || keeps)) {
#pragma unroll 1
        for (int round = 0; round < 2; ++round) {
            if constexpr (kMaySample) {
                fill_bins(p, shared, queries, group0, kSampleStride);
            } else {
                fill_bins<Part::kStored>(p, shared, queries, group0, 1);
            }
            __syncthreads();
            each_open_row(shared, [&](Row row, int i) { return bracketed(row, shared.bins[i], samples, units); });
        }
        if (keeps) {
            keep_range(p, shared, queries, group0);
            __syncthreads();
            bool all = true;
            each_open_row(shared, [&](Row row, int i) {
                row.above = shared.above[i];
                const int count = shared.num_kept[i % (kMayKeep ? kGroups : 1)];
                const bool has_it = row.k > row.above && row.k - row.above <= count && count <= kKept;
                all &= has_it;
                return has_it ? row : restarted(row);
            });
            // Of all rows, or the keys are passed again for all.
            keeps = __syncthreads_and(all) != 0;
            while (keeps && searches) {
                fill_bins_from_kept(shared);
                __syncthreads();
                searches = each_open_row(shared, [&](Row row, int i) { return narrowed(row, shared.bins[i], units); });
            }
        } else if constexpr (kMaySample) {
            each_open_row(shared, [&](Row row, int i) {
                const Line line = line_of(row, i);
                if (lane == 0) shared.lines[i] = line;
                return row;
            });
            fill_bracket(p, shared, queries, group0);
            __syncthreads();
            each_open_row(shared, [&](Row row, int i) {
                const Line line = located(shared.lines[i], shared.bins[i], shared.above[i], row.k, i);
                __syncwarp();
                if (lane == 0) {
                    shared.lines[i] = line;
                    shared.above[i] = 0;
                }
                return row;
            });
            collect(p, shared, queries, group0);
            __syncthreads();
            searches = each_open_row(shared, [&](Row row, int i) {
                const Line line = shared.lines[i];
                if (line.needed == 0) return restarted(row);
                return resolved(row, shared.bins[i], min(shared.above[i], kBins), line.needed);
            });
        }
    }
    // What is still open. Where nothing is searched, no round is needed.
    while (searches) {
        fill_bins(p, shared, queries, group0, 1);
        __syncthreads();
        searches = each_open_row(shared, [&](Row row, int i) { return narrowed(row, shared.bins[i], units); });
    }

    errors = emit(p, shared, queries, group0);
    __syncthreads();
    for (int i = threadIdx.x; i < kGroups && group0 + i < p.num_groups; i += kThreads) {
        p.q2k_count[first_list(p) + i] = min(shared.rows[i].emitted, p.max_selected);
    }
    raise_error(p.error_flag, errors);
}
