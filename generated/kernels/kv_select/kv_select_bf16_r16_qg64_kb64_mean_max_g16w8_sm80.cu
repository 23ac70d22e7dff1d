// kv_select_bf16_r16_qg64_kb64_mean_max_g16w8_sm80
// Generated from templates/kernels/kv_select.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// kv_select, bf16, rank 16, query_group 64, kv_block 64, mean query, max score, sm80;
// groups per CTA 16, warps 8

// Critical-KV selection, one list per query group g of 64-256 tokens (paper: critical-KV estimation).
//   proxy(g)    = q_lr of the group's centre token, or the f32 mean of the group's q_lr rounded to the element once
//   score(g, n) = max over keys j of KV block n of <proxy(g), k_lr(j)>                      (f32, d_lr 16 to 64)
//   list(g)     = ids of the top_k[h] largest scores, ties to the smaller id, ascending; kept blocks score +inf
// Floors for 16 groups and each 16 of d_lr: 32 B of k_lr a key through L2; one m16n8k16 step for 8 keys (tensor cores
// idle otherwise).
// Budget: scores of 16 groups x N blocks in shared memory, 64 B a block; under 96 registers a thread.
#include "dsv/mma.cuh"
#include "dsv/select/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kRank = 16;
constexpr int kQueryGroup = 64;
constexpr int kKvBlock = 64;
constexpr int kGroupsPerCta = 16;
constexpr int kWarps = 8;
constexpr bool kProxyIsCentre = false;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 152;
// END CONFIG

constexpr int kSteps = kRank / 16;
// Columns of 8 keys whose operands a lane holds at once: at most 32 registers.
constexpr int kColumns = kSteps == 1 ? kKvBlock / 8 : kSteps == 2 ? 8 : 4;

static_assert(kRank % 16 == 0 && kRank <= 64, "one to four k16 steps");
static_assert(kGroupsPerCta == 16, "the rows of one mma.sync product");
static_assert(kKvBlock % 8 == 0, "whole mma.sync column tiles");
static_assert(kThreads == 32 * kWarps, "every warp scores KV blocks");

struct Params {
    TensorView q_lr;    // [B, seqlen_q, H, d_lr]; pointer and strides multiples of 8 elements
    TensorView k_lr;    // [B, seqlen_kv, H, d_lr]; the same
    const int32* top_k;  // [H]
    int32* q2k_index;   // [B, H, G, max_selected], written up to the count
    int32* q2k_count;   // [B, H, G], written
    float* scores;      // [B, H, G, N], written unless null
    const uint32* keep_mask;  // [G, ceil(N / 32)], bit n % 32 of word n / 32: whether block n scores +inf; unless null
    int32* error_flag;  // [1]
    int32 batch;
    int32 num_heads;
    int32 seqlen_q;
    int32 seqlen_kv;
    int32 num_groups;
    int32 num_kv_blocks;
    int32 score_stride;  // num_kv_blocks rounded up to 32, plus 4: rows 4 banks apart
    int32 max_selected;
    int32 keep_first;  // blocks with one of the first keep_first tokens score +inf
    int32 keep_own;    // not 0: blocks with a token of the group's own score +inf
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::KvSelect");

struct SharedStorage {
    alignas(16) QueryOperand<kRank> proxies;
};

// Scores KV block `block` for all groups of the CTA; the result sits in lanes with lane % 4 == 0, for groups
// lane / 4 and lane / 4 + 8.
__device__ __forceinline__ float2 score_block(const Params& p, const uint32 (&proxies)[kSteps][4], int block) {
    const int lane = lane_index();
    float2 best = {-kInf, -kInf};
#pragma unroll 1
    for (int chunk = 0; chunk < kKvBlock / 8 / kColumns; ++chunk) {
        const int first = block * kKvBlock + 8 * kColumns * chunk;
        uint2 keys[kColumns][kSteps];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int key = min(first + 8 * i + lane / 4, p.seqlen_kv - 1);
            load_key(keys[i], p.k_lr.at<const Element>(blockIdx.z, key, blockIdx.y));
        }
        const int valid = p.seqlen_kv - first;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            float d[4] = {};
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                mma_16x8x16<Element>(d, proxies[step], keys[i][step].x, keys[i][step].y);
            }
            if (valid < 8 * kColumns) {
                const int column = 8 * i + 2 * (lane % 4);
                if (column >= valid) d[0] = d[2] = -kInf;
                if (column + 1 >= valid) d[1] = d[3] = -kInf;
            }
            best.x = max_or_nan(best.x, max_or_nan(d[0], d[1]));
            best.y = max_or_nan(best.y, max_or_nan(d[2], d[3]));
        }
    }
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
        best.x = max_or_nan(best.x, __shfl_xor_sync(kFullWarp, best.x, offset));
        best.y = max_or_nan(best.y, __shfl_xor_sync(kFullWarp, best.y, offset));
    }
    return best;
}

// Elements of the row at or above `threshold`. One warp.
__device__ __forceinline__ int count_at_least(const uint32* row, int len, uint32 threshold) {
    int count = 0;
    for (int i = lane_index(); i < len; i += 32) count += row[i] >= threshold;
    return warp_sum(count);
}

// The largest value that at least `k` elements of the row reach, 1 <= k <= len. One warp. Bits are decided from the
// highest in which the row's extremes differ, and no further once exactly k elements remain.
__device__ __forceinline__ uint32 kth_largest(const uint32* row, int len, int k) {
    uint32 low = 0xffffffffu;
    uint32 high = 0;
    for (int i = lane_index(); i < len; i += 32) {
        low = min(low, row[i]);
        high = max(high, row[i]);
    }
    low = __reduce_min_sync(kFullWarp, low);
    high = __reduce_max_sync(kFullWarp, high);
    if (low == high) return high;
    uint32 bit = 0x80000000u >> __clz(low ^ high);
    uint32 threshold = high & ~(2 * bit - 1);
    for (; bit != 0; bit >>= 1) {
        const int count = count_at_least(row, len, threshold | bit);
        if (count >= k) threshold |= bit;
        if (count == k) break;
    }
    return threshold;
}

// Writes the ids of the k largest elements of the row, ascending, ties to the smaller id. One warp.
__device__ __forceinline__ void emit_largest(const uint32* row, int len, int k, int32* list) {
    const uint32 threshold = kth_largest(row, len, k);
    // Saturation: no score's integer reaches 2^32 - 1, which is a NaN.
    int ties = k - count_at_least(row, len, threshold + 1);
    int emitted = 0;
    for (int first = 0; first < len; first += 32) {
        const int i = first + lane_index();
        const uint32 value = i < len ? row[i] : 0;
        const bool equal = i < len && value == threshold;
        const uint32 equals = __ballot_sync(kFullWarp, equal);
        const bool take = i < len && (value > threshold || (equal && bits_below(equals) < ties));
        const uint32 takes = __ballot_sync(kFullWarp, take);
        if (take) list[emitted + bits_below(takes)] = i;
        emitted += __popc(takes);
        ties -= __popc(equals);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) kv_select_bf16_r16_qg64_kb64_mean_max_g16w8_sm80(const __grid_constant__ Params p) {
    extern __shared__ uint32 sScore[];  // [16][score_stride], ordered integers
    __shared__ SharedStorage shared;
    const int lane = lane_index();
    const int warp = warp_index();
    const int group0 = blockIdx.x * kGroupsPerCta;
    const int head = blockIdx.z * p.num_heads + blockIdx.y;
    int32 errors = 0;

    for (int i = warp; i < kGroupsPerCta; i += kWarps) {
        const int first = (group0 + i) * kQueryGroup;
        const int len = min(kQueryGroup, p.seqlen_q - first);
        write_query<Element, !kProxyIsCentre>(shared.proxies, i, p.q_lr, first, len, len / 2);
    }
    __syncthreads();

    uint32 proxies[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) read_operand(shared.proxies, step, proxies[step]);
    for (int block = warp; block < p.num_kv_blocks; block += kWarps) {
        const float2 best = score_block(p, proxies, block);
        if (lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = lane / 4 + 8 * i;
                const int group = group0 + row;
                float score = i == 0 ? best.x : best.y;
                if (is_kept<kQueryGroup, kKvBlock>(p, block * kKvBlock, group)) {
                    score = kInf;
                }
                if (score != score) {
                    if (group < p.num_groups) errors |= kScoreIsNan;
                    score = -kInf;
                }
                sScore[row * p.score_stride + block] = ordered(score);
                if (p.scores != nullptr && group < p.num_groups) {
                    p.scores[(static_cast<int64>(head) * p.num_groups + group) * p.num_kv_blocks + block] = score;
                }
            }
        }
    }
    __syncthreads();

    int k = p.top_k[blockIdx.y];
    if (k < 0 || k > p.num_kv_blocks) {
        errors |= kTopKOutOfRange;
        k = k < 0 ? 0 : p.num_kv_blocks;
    }
    if (k > p.max_selected) {
        errors |= kTopKOutOfRange;
        k = p.max_selected;
    }
    for (int row = warp; row < kGroupsPerCta && group0 + row < p.num_groups; row += kWarps) {
        const int64 list = static_cast<int64>(head) * p.num_groups + group0 + row;
        if (lane == 0) p.q2k_count[list] = k;
        if (k > 0) emit_largest(sScore + row * p.score_stride, p.num_kv_blocks, k, p.q2k_index + list * p.max_selected);
    }
    raise_error(p.error_flag, errors);
}
