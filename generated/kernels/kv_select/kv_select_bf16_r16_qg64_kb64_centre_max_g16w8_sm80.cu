// kv_select_bf16_r16_qg64_kb64_centre_max_g16w8_sm80
// Generated from templates/kernels/kv_select.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// kv_select, bf16, rank 16, query_group 64, kv_block 64, centre query, max score, sm80;
// groups per CTA 16, warps 8

// Critical-KV selection, one list per query group g of 64-256 tokens (paper: critical-KV estimation).
//   proxy(g)    = q_lr of the group's centre token, or the f32 mean of the group's q_lr rounded to the element once
//   score(g, n) = max over keys j of KV block n of <proxy(g), k_lr(j)>                      (f32, d_lr = 16)
//   list(g)     = ids of the top_k[h] largest scores, ties to the smaller id, ascending
// Floors for 16 groups: 32 B of k_lr a key through L2; one m16n8k16 step for 8 keys (tensor cores idle otherwise).
// Budget: scores of 16 groups x N blocks in shared memory, 64 B a block; under 96 registers a thread.
#include "dsv/mma.cuh"
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
constexpr bool kProxyIsCentre = true;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 136;
// END CONFIG

static_assert(kRank == 16, "one k16 step holds the whole low-rank product");
static_assert(kGroupsPerCta == 16, "the rows of one mma.sync product");
static_assert(kKvBlock % 8 == 0, "whole mma.sync column tiles");
static_assert(kThreads == 32 * kWarps, "every warp scores KV blocks");

struct Params {
    TensorView q_lr;    // [B, seqlen_q, H, 16]; pointer and strides multiples of 8 elements
    TensorView k_lr;    // [B, seqlen_kv, H, 16]; the same
    const int32* top_k;  // [H]
    int32* q2k_index;   // [B, H, G, max_selected], written up to the count
    int32* q2k_count;   // [B, H, G], written
    float* scores;      // [B, H, G, N], written unless null
    int32* error_flag;  // [1]
    int32 batch;
    int32 num_heads;
    int32 seqlen_q;
    int32 seqlen_kv;
    int32 num_groups;
    int32 num_kv_blocks;
    int32 score_stride;  // num_kv_blocks rounded up to 32, plus 4: rows 4 banks apart
    int32 max_selected;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::KvSelect");

struct SharedStorage {
    // Columns permuted like the keys: see load_keys.
    alignas(16) Element proxy[kGroupsPerCta][kRank];
};

// A score as an integer of the same order; equal scores, the two zeros included, become equal integers.
__device__ __forceinline__ uint32 ordered(float score) {
    const uint32 bits = __float_as_uint(score + 0.0f);
    return bits ^ (static_cast<uint32>(static_cast<int32>(bits) >> 31) | 0x80000000u);
}

// NaN wins, so that one NaN key marks its block.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// One warp writes the proxy of group `group` to shared memory; groups past the end get zeros.
__device__ __forceinline__ void write_proxy(const Params& p, Element* proxy, int group) {
    const int lane = lane_index();
    const int half = lane % 2;  // which 8 of the 16 columns
    const int first = group * kQueryGroup;
    const int len = min(kQueryGroup, p.seqlen_q - first);
    float sum[8] = {};
    if (len > 0) {
        const auto add = [&](int token) {
            const Element* row = p.q_lr.at<const Element>(blockIdx.z, first + token, blockIdx.y);
            const uint4 columns = *reinterpret_cast<const uint4*>(row + 8 * half);
            const uint32 pairs[4] = {columns.x, columns.y, columns.z, columns.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[2 * i] += unpack_low<Element>(pairs[i]);
                sum[2 * i + 1] += unpack_high<Element>(pairs[i]);
            }
        };
        if constexpr (kProxyIsCentre) {
            add(len / 2);
        } else {
            for (int token = lane / 2; token < len; token += 16) add(token);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int offset = 2; offset < 32; offset *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], offset);
                sum[i] /= static_cast<float>(len);
            }
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

// Scores KV block `block` for all groups of the CTA; the result sits in lanes with lane % 4 == 0, for groups
// lane / 4 and lane / 4 + 8.
__device__ __forceinline__ float2 score_block(const Params& p, const uint32 (&proxies)[4], int block) {
    constexpr int kTiles = kKvBlock / 8;
    const int lane = lane_index();
    const int first = block * kKvBlock;
    // Lane l reads columns 4 (l % 4) .. + 3 of key l / 4: four lanes take a key's 32 bytes in one instruction. As
    // operand B those columns stand at inner indices c, c + 1, c + 8, c + 9; the proxies are read the same way.
    uint2 keys[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const int key = min(first + 8 * tile + lane / 4, p.seqlen_kv - 1);
        const Element* row = p.k_lr.at<const Element>(blockIdx.z, key, blockIdx.y);
        keys[tile] = __ldg(reinterpret_cast<const uint2*>(row + 4 * (lane % 4)));
    }
    float2 best = {-kInf, -kInf};
    const int valid = p.seqlen_kv - first;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        float d[4] = {};
        mma_16x8x16<Element>(d, proxies, keys[tile].x, keys[tile].y);
        if (valid < kKvBlock) {
            const int column = 8 * tile + 2 * (lane % 4);
            if (column >= valid) d[0] = d[2] = -kInf;
            if (column + 1 >= valid) d[1] = d[3] = -kInf;
        }
        best.x = max_or_nan(best.x, max_or_nan(d[0], d[1]));
        best.y = max_or_nan(best.y, max_or_nan(d[2], d[3]));
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

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) kv_select_bf16_r16_qg64_kb64_centre_max_g16w8_sm80(const __grid_constant__ Params p) {
    extern __shared__ uint32 sScore[];  // [16][score_stride], ordered integers
    __shared__ SharedStorage shared;
    const int lane = lane_index();
    const int warp = warp_index();
    const int group0 = blockIdx.x * kGroupsPerCta;
    const int head = blockIdx.z * p.num_heads + blockIdx.y;
    int32 errors = 0;

    for (int i = warp; i < kGroupsPerCta; i += kWarps) write_proxy(p, shared.proxy[i], group0 + i);
    __syncthreads();

    uint32 proxies[4];
    {
        const uint2 low = *reinterpret_cast<const uint2*>(&shared.proxy[lane / 4][4 * (lane % 4)]);
        const uint2 high = *reinterpret_cast<const uint2*>(&shared.proxy[lane / 4 + 8][4 * (lane % 4)]);
        proxies[0] = low.x;
        proxies[1] = high.x;
        proxies[2] = low.y;
        proxies[3] = high.y;
    }
    for (int block = warp; block < p.num_kv_blocks; block += kWarps) {
        const float2 best = score_block(p, proxies, block);
        if (lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = lane / 4 + 8 * i;
                const int group = group0 + row;
                float score = i == 0 ? best.x : best.y;
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
    if (k < 0) {
        errors |= kTopKOutOfRange;
        k = 0;
    }
    k = min(k, p.num_kv_blocks);
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
