// kv_select_fine_bf16_r16_qg64_kb8_centre_max_topk_g64w16_sm80
// Generated from templates/kernels/kv_select_fine.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// kv_select_fine, bf16, rank 16, query_group 64, kv_block 8, centre query, max score, sm80;
// groups per CTA 64, warps 16

// Critical-KV selection at any granularity: one list of KV units (tokens or blocks of 8 to 128) a query group.
//   score(g, n) = max over queries i of the rule, keys j of unit n of <proxy_i(g), k_lr(j)>   (f32, d_lr = 16)
//   list(g)     = ids of the top_k[h] largest scores, ties to the smaller id, ascending; NaN ranks last
// Scores are never stored: a pass over the keys recomputes them, the same bits every time. Passes narrow a range of
// ordered integers around each group's k-th score by a histogram of 512 bins (9 bits a pass); the last one sets a bit a
// unit and turns the bits into ids. Tokens: two passes over every 16th key first, so that only the neighbourhood of
// the k-th score meets the atomics.
// Floors for 268M scores (H=16, S=32,768, groups of 64) on 132 SMs at 1.7 GHz: a pass 15 us of mma.sync, 18 us of max
// where units are blocks, 20 us of k_lr through L2; tokens' ids 36 us of stores. Estimates in kv.md.
// Budget: 512 threads, one CTA an SM, under 128 registers; 133 KB of shared memory, most of it bins.
#include "dsv/mma.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kRank = 16;
constexpr int kQueryGroup = 64;
constexpr int kKvBlock = 8;
constexpr int kGroups = 64;
constexpr int kQueries = 1;
constexpr int kWarps = 16;
constexpr bool kProxyIsMean = false;
constexpr int kThreads = 512;
constexpr int kCtasPerSm = 1;
constexpr int kSmemBytes = 136448;
constexpr int kParamsBytes = 152;
// END CONFIG

// A CTA's score rows are four m16 tiles: one query of 64 groups, or four queries of 16.
constexpr int kTiles = 4;
constexpr int kGroupTiles = kTiles / kQueries;
// A step is what a warp scores at once: a lane owns kLaneKeys consecutive keys, the four lanes of a quad are neighbours.
constexpr int kLaneKeys = kKvBlock < 8 ? 8 : kKvBlock;
constexpr int kChunks = kLaneKeys / 8;
constexpr int kChunkUnroll = kChunks == 2 ? 2 : 1;  // rolled, two chunks spill
constexpr int kLaneUnits = kLaneKeys / kKvBlock;
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
constexpr bool kMaySample = kKvBlock == 1;
constexpr int kSampleStride = 16;
constexpr int kSampleFrom = 8192;
constexpr int32 kAllTies = 0x7fffffff;
constexpr int32 kDone = -1;
constexpr uint32 kLowest = 0x007fffffu;  // ordered(-inf)

static_assert(kRank == 16, "one k16 step holds the whole low-rank product");
static_assert(kGroups == 16 * kGroupTiles, "every score row belongs to a group");
static_assert(kKvBlock == 1 || kKvBlock % 8 == 0, "a lane owns whole units");
static_assert(kTileWords == 2 * kWarps && kThreads == 32 * kWarps, "two words a warp fill a tile");
static_assert(kGroups % kWarps == 0, "a row of bins belongs to one warp");

struct Params {
    TensorView q_lr;     // [B, seqlen_q, H, 16]; pointer and strides multiples of 8 elements
    TensorView k_lr;     // [B, seqlen_kv, H, 16]; the same
    const int32* top_k;  // [H]
    int32* q2k_index;    // [B, H, G, max_selected], written up to the count, unless null
    int32* q2k_count;    // [B, H, G], written
    uint32* bitmap;      // [B, H, G, ceil(N / 32)], bit n % 32 of word n / 32: whether unit n is listed; unless null
    float* scores;       // [B, H, G, N], written unless null
    int32* error_flag;   // [1]
    int32 batch;
    int32 num_heads;
    int32 seqlen_q;
    int32 seqlen_kv;
    int32 num_groups;
    int32 num_kv_blocks;
    int32 max_selected;
    int32 keep_first;  // units with one of the first keep_first tokens score +inf
    int32 keep_own;    // not 0: units with a token of the group's own score +inf
    int32 reserved;
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

struct SharedStorage {
    union {
        uint32 bins[kGroups][kBinStride];
        struct {
            uint32 reach[2][kGroups][kTileWords + 1];   // bit: the score is at least the row's low
            uint32 exceed[2][kGroups][kTileWords + 1];  // bit: it is larger
            uint16 ids[kWarps][32 * kTileWords];        // listed units of a row, relative to the tile
        };
    };
    Row rows[kGroups];
    int32 above[kGroups];
    // Columns permuted like the keys: see load_keys.
    alignas(16) Element proxy[16 * kTiles][kRank];
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "SharedStorage differs from Facts");

// A score as an integer of the same order; equal scores, the two zeros included, become equal integers.
__device__ __forceinline__ uint32 ordered(float score) {
    const uint32 bits = __float_as_uint(score + 0.0f);
    return bits ^ (static_cast<uint32>(static_cast<int32>(bits) >> 31) | 0x80000000u);
}

// The float whose integer this is. No score has the integer of -0, 0x7fffffff.
__device__ __forceinline__ float unordered(uint32 value) {
    return __uint_as_float((value & 0x80000000u) != 0 ? value ^ 0x80000000u : ~value);
}

// The largest float below every score whose integer is at least `value`; a NaN where there is none.
__device__ __forceinline__ float below(uint32 value) {
    const uint32 less = value - 1;
    return unordered(less == 0x7fffffffu ? less - 1 : less);
}

// NaN wins, so that one NaN key marks its unit.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
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

// One warp writes score row `row`'s query to shared memory; groups past the end get zeros.
__device__ __forceinline__ void write_proxy(const Params& p, Element* proxy, int group0, int row) {
    const int lane = lane_index();
    const int half = lane % 2;  // which 8 of the 16 columns
    const int group = group0 + row / (16 * kQueries) * 16 + row % 16;
    const int first = group * kQueryGroup;
    const int len = min(kQueryGroup, p.seqlen_q - first);
    float sum[8] = {};
    if (len > 0) {
        const auto add = [&](int token) {
            const Element* source = p.q_lr.at<const Element>(blockIdx.z, first + token, blockIdx.y);
            const uint4 columns = *reinterpret_cast<const uint4*>(source + 8 * half);
            const uint32 pairs[4] = {columns.x, columns.y, columns.z, columns.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[2 * i] += unpack_low<Element>(pairs[i]);
                sum[2 * i + 1] += unpack_high<Element>(pairs[i]);
            }
        };
        if constexpr (kProxyIsMean) {
            for (int token = lane / 2; token < len; token += 16) add(token);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int offset = 2; offset < 32; offset *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], offset);
                sum[i] /= static_cast<float>(len);
            }
        } else {
            const int query = row / 16 % kQueries;
            add(len * (2 * query + 1) / (2 * kQueries));
        }
    }
    if (lane < 2) {
        uint4 columns;
        columns.x = pack2<Element>(sum[0], sum[1]);
        columns.y = pack2<Element>(sum[2], sum[3]);
        columns.z = pack2<Element>(sum[4], sum[5]);
        columns.w = pack2<Element>(sum[6], sum[7]);
        *reinterpret_cast<uint4*>(proxy + 8 * half) = columns;
    }
}

// Operand B of four products: columns 2c and 2c + 1 of tile j hold keys 2j and 2j + 1 of the chunk of quad lane c, so
// that each lane's scores are of consecutive keys. Lane l reads columns 4 (l % 4) .. + 3 of its key: four lanes take a
// key's 32 bytes; as inner indices those columns stand at c, c + 1, c + 8, c + 9, and the proxies are read the same way.
__device__ __forceinline__ void load_keys(const Params& p, int step, int chunk, int stride, uint2 (&keys)[4]) {
    const int column = lane_index() / 4;
    const int first = step * kStepKeys + column / 2 * kLaneKeys + 8 * chunk + column % 2;
    const Element* head = p.k_lr.at<const Element>(blockIdx.z, 0, blockIdx.y) + 4 * (lane_index() % 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int64 key = min((first + 2 * j) * stride, p.seqlen_kv - 1);
        keys[j] = __ldg(reinterpret_cast<const uint2*>(head + key * p.k_lr.stride_seq));
    }
}

// What a unit's score counts as: NaN past the last unit, so that it is never in a range nor larger than a bound; +inf
// where the unit is kept whatever its score.
__device__ __forceinline__ float judged(const Params& p, float score, int key, int group) {
    asm volatile("" : "+r"(group));  // what follows is rare: nothing of it is worth a register all along
    if (key >= p.seqlen_kv) return __uint_as_float(0x7fffffffu);
    const int own = group * kQueryGroup;
    const bool is_own = p.keep_own != 0 && key < own + kQueryGroup && min(key + kKvBlock, p.seqlen_kv) > own;
    return key < p.keep_first || is_own ? kInf : score;
}

// Scores every stride-th key. Warp w takes runs w, w + kWarps, ... of kRun steps. visit(tile, half, scores, unit) gets the
// scores of kLaneUnits consecutive units for group 16 tile + 8 half + lane / 4 of the CTA; after(turn) follows each of the
// `turns` steps of a warp, those past the end included.
template <int kRun, class Visit, class After>
__device__ __forceinline__ void walk(
    const Params& p, const uint32 (&proxies)[kTiles][4], int group0, int stride, int turns, Visit visit, After after) {
    const int lane = lane_index();
    const int warp = warp_index();
    const auto step_of = [&](int turn) { return (turn / kRun * kWarps + warp) * kRun + turn % kRun; };
    uint2 keys[4];
    load_keys(p, step_of(0), 0, stride, keys);
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const int step = step_of(turn);
        const int next_step = step_of(turn + 1);
        const int first = step * kStepKeys * stride;
        const int end = first + kStepKeys * stride;
        const int own_first = group0 * kQueryGroup;
        if (first < p.seqlen_kv) {
            const bool is_judged =
                end > p.seqlen_kv || first < p.keep_first ||
                (p.keep_own != 0 && first < own_first + kGroups * kQueryGroup && end > own_first);
            const int unit = step * kStepUnits + lane % 4 * kLaneUnits;
            float best[kGroupTiles][2];
#pragma unroll
            for (int tile = 0; tile < kGroupTiles; ++tile) best[tile][0] = best[tile][1] = -kInf;
#pragma unroll kChunkUnroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                uint2 next[4];
                const bool more = chunk + 1 < kChunks;
                load_keys(p, more ? step : next_step, more ? chunk + 1 : 0, stride, next);
#pragma unroll
                for (int tile = 0; tile < kGroupTiles; ++tile) {
                    float scores[2][8];
#pragma unroll
                    for (int query = 0; query < kQueries; ++query) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            float d[4] = {};
                            mma_16x8x16<Element>(d, proxies[tile * kQueries + query], keys[j].x, keys[j].y);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                float& score = scores[i / 2][2 * j + i % 2];
                                score = query == 0 ? d[i] : max_or_nan(score, d[i]);
                            }
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int group = group0 + 16 * tile + 8 * half + lane / 4;
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
#pragma unroll
                for (int j = 0; j < 4; ++j) keys[j] = next[j];
            }
            if constexpr (kLaneUnits == 1) {
#pragma unroll
                for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float score[1] = {best[tile][half]};
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

// Adds the scores inside each row's range to its bins; counts those above it into shared.above where asked.
__device__ __forceinline__ void fill_bins(
    const Params& p, SharedStorage& shared, const uint32 (&proxies)[kTiles][4], int group0, int stride, bool counts) {
    const int lane = lane_index();
    float low[kGroupTiles][2];
    float last[kGroupTiles][2];
    uint32 origin[kGroupTiles][2];
    int shift[kGroupTiles][2];
    int above[kGroupTiles][2] = {};
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row row = shared.rows[16 * tile + 8 * half + lane / 4];
            const bool searches = row.shift != kDone;
            low[tile][half] = searches ? unordered(max(row.low, kLowest)) : kInf;
            // The integer of -0 is nobody's: as a float it would let +0 in.
            const uint32 top = min(row.last == 0x7fffffffu ? row.last - 1 : row.last, ~kLowest);
            last[tile][half] = searches ? unordered(top) : -kInf;
            origin[tile][half] = row.low;
            shift[tile][half] = row.shift;
        }
    }
    uint32* lane_bins = shared.bins[lane / 4];
    const int steps = ((p.seqlen_kv + stride - 1) / stride + kStepKeys - 1) / kStepKeys;
    walk<1>(
        p, proxies, group0, stride, (steps + kWarps - 1) / kWarps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int) {
            const int row = 16 * tile + 8 * half + lane / 4;
            // One score a step: registers are dearer than a load.
            const uint32 from = kLaneUnits > 1 ? origin[tile][half] : shared.rows[row].low;
            const int bits = kLaneUnits > 1 ? shift[tile][half] : shared.rows[row].shift;
#pragma unroll
            for (int i = 0; i < kLaneUnits; ++i) {
                if (scores[i] >= low[tile][half] && scores[i] <= last[tile][half]) {
                    const uint32 bin = (ordered(scores[i]) - from) >> bits;
                    atomicAdd(lane_bins + bin + (16 * tile + 8 * half) * kBinStride, 1u);
                }
            }
            if (kMaySample && counts) {
                uint32 larger = 0;
#pragma unroll
                for (int i = 0; i < kLaneUnits; ++i) larger = push_larger(larger, scores[i], last[tile][half]);
                above[tile][half] += __popc(larger);
            }
        },
        [](int) {});
    if (kMaySample && counts) {
#pragma unroll
        for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int sum = above[tile][half];
                sum += __shfl_xor_sync(kFullWarp, sum, 1);
                sum += __shfl_xor_sync(kFullWarp, sum, 2);
                if (lane % 4 == 0) atomicAdd(&shared.above[16 * tile + 8 * half + lane / 4], sum);
            }
        }
    }
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

// Narrows a row's range to where, by a sample of `samples` of `units` scores, the k-th will lie. A wrong guess costs a
// pass, never a wrong list. One warp.
__device__ __forceinline__ Row bracketed(Row row, const uint32* bins, int samples, int units) {
    const float rank = static_cast<float>(row.k) * static_cast<float>(samples) / static_cast<float>(units);
    const int margin = static_cast<int>(4.5f * sqrtf(rank)) + 4;
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
        // The sample misled: start again from everything.
        row.low = 0;
        row.last = 0xffffffffu;
        row.shift = 32 - kBinBits;
        row.above = 0;
        return row;
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

// Turns a tile of 1024 units' bits into ids, for the rows of this warp.
__device__ __forceinline__ void emit_tile(const Params& p, SharedStorage& shared, int group0, int64 list0, int tile) {
    const int lane = lane_index();
    const int warp = warp_index();
    const int words = (p.num_kv_blocks + 31) / 32;
    const int word = tile * kTileWords + lane;
    const int left = p.num_kv_blocks - 32 * word;
    const uint32 exists = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
#pragma unroll 1
    for (int r = 0; r < kRowsPerWarp; ++r) {
        const int i = warp * kRowsPerWarp + r;
        if (group0 + i >= p.num_groups) break;
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
    const Params& p, SharedStorage& shared, const uint32 (&proxies)[kTiles][4], int group0, int64 list0) {
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
        p, proxies, group0, 1, tiles * 2 * kWordSteps,
        [&](int tile, int half, const float(&scores)[kLaneUnits], int unit) {
            float probe = 0.0f;
            uint32 reaches = 0;
#pragma unroll
            for (int i = kLaneUnits - 1; i >= 0; --i) {
                reaches = push_larger(reaches, scores[i], reach_bound[tile][half]);
                probe = fmaf(scores[i], 0.0f, probe);  // NaN where a score is NaN, or infinite
            }
            const int at = kLaneUnits > 1 ? 0 : unit / kStepUnits % kWordSteps;
            bits[tile][half] |= reaches << at;
            if (any_ties) {
                const float bound = unordered(shared.rows[16 * tile + 8 * half + lane / 4].low);
                uint32 exceeds = 0;
#pragma unroll
                for (int i = kLaneUnits - 1; i >= 0; --i) {
                    exceeds = push_larger(exceeds, scores[i], bound);
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
                            const int64 list = list0 + group - group0;
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
            emit_tile(p, shared, group0, list0, run / 2);
        });
    return errors;
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) kv_select_fine_bf16_r16_qg64_kb8_centre_max_topk_g64w16_sm80(const __grid_constant__ Params p) {
    extern __shared__ uint4 smem[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    const int lane = lane_index();
    const int warp = warp_index();
    const int group0 = blockIdx.x * kGroups;
    const int64 list0 = (static_cast<int64>(blockIdx.z) * p.num_heads + blockIdx.y) * p.num_groups + group0;
    const int units = p.num_kv_blocks;
    int32 errors = 0;

    int k = p.top_k[blockIdx.y];
    if (k < 0 || k > units) {
        errors |= kTopKOutOfRange;
        k = k < 0 ? 0 : units;
    }
    if (k > p.max_selected) {
        errors |= kTopKOutOfRange;
        k = p.max_selected;
    }
    for (int i = threadIdx.x; i < kGroups; i += kThreads) {
        Row row = {};
        row.last = 0xffffffffu;
        row.shift = 32 - kBinBits;
        row.k = group0 + i < p.num_groups ? k : 0;
        row.ties = kAllTies;
        if (row.k == 0 || row.k == units) {
            row.low = row.k == 0 ? 0xffffffffu : 0;  // nobody, or everybody
            row.shift = kDone;
        }
        shared.rows[i] = row;
        shared.above[i] = 0;
    }
    for (int i = warp; i < 16 * kTiles; i += kWarps) write_proxy(p, shared.proxy[i], group0, i);
    uint32* all_bins = &shared.bins[0][0];
    for (int i = threadIdx.x; i < kGroups * kBinStride; i += kThreads) all_bins[i] = 0;
    __syncthreads();

    uint32 proxies[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const uint2 low = *reinterpret_cast<const uint2*>(&shared.proxy[16 * tile + lane / 4][4 * (lane % 4)]);
        const uint2 high = *reinterpret_cast<const uint2*>(&shared.proxy[16 * tile + lane / 4 + 8][4 * (lane % 4)]);
        proxies[tile][0] = low.x;
        proxies[tile][1] = high.x;
        proxies[tile][2] = low.y;
        proxies[tile][3] = high.y;
    }

    // Rounds 0 and 1 look at a sample, round 2 at what its bracket holds, the others at what the one before left open.
    // Where nothing is searched, no round is needed.
    const bool samples = kMaySample && units >= kSampleFrom;
    bool searches = k > 0 && k < units;
#pragma unroll 1
    for (int round = samples ? 0 : 3; searches; ++round) {
        const int stride = round < 2 ? kSampleStride : 1;
        fill_bins(p, shared, proxies, group0, stride, round == 2);
        __syncthreads();
        bool is_open = false;
#pragma unroll 1
        for (int r = 0; r < kRowsPerWarp; ++r) {
            const int i = warp * kRowsPerWarp + r;
            Row row = shared.rows[i];
            uint32* bins = shared.bins[i];
            if (row.shift != kDone) {
                if (round < 2) {
                    row = bracketed(row, bins, (units + kSampleStride - 1) / kSampleStride, units);
                } else {
                    if (round == 2) row.above = shared.above[i];
                    row = narrowed(row, bins, units);
                }
                is_open |= row.shift != kDone;
                __syncwarp();
                if (lane == 0) shared.rows[i] = row;
                for (int bin = lane; bin < kBins; bin += 32) bins[bin] = 0;
            }
        }
        searches = __syncthreads_or(is_open) != 0;
    }

    errors |= emit(p, shared, proxies, group0, list0);
    __syncthreads();
    for (int i = threadIdx.x; i < kGroups && group0 + i < p.num_groups; i += kThreads) {
        p.q2k_count[list0 + i] = min(shared.rows[i].emitted, p.max_selected);
    }
    raise_error(p.error_flag, errors);
}
