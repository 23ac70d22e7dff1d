// profile_f32_d0_v1_sm90a
// Generated from templates/kernels/profile.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// profile, f32, vector 1, sm90a

// Profiler, second step, one CTA a sampled query: how few keys hold the share theta of its softmax mass, how much of the
// mass its list holds, and how many of those few are listed (paper: critical KV, profiler).
//   needed  = min n such that the n largest p_j sum to theta sum p_j, over S;   covered = sum over listed j of p_j / sum p_j
//   recall  = listed among the n largest (ties: the smaller id is larger), over n
// The n-th largest logit is found bit by bit: mass at or above a threshold is a sum in fixed order, so nothing is
// sorted and the result is the same every time; keys that tie with it count as far as they are needed.
// Floor: the row read about 24 times through L2; it runs every few hundred steps.
#include "dsv/math.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 104;
// END CONFIG

constexpr int kWarps = kThreads / 32;

struct Params {
    const float* logits;     // [gridDim.y, samples, S], base 2, of profile_logits
    const int32* samples;    // [samples]: token ids
    const int32* q2k_index;  // [B, H, G, max_selected], or null
    const int32* q2k_count;  // [B, H, G], or null
    float* needed;           // [B, samples, H], written: share of the keys
    float* covered;          // [B, samples, H], written unless there are no lists
    float* recall;           // [B, samples, H], written unless there are no lists, or null
    int32* error_flag;       // [1]
    int32 batch_index;       // the sequence of this launch
    int32 head0;             // the head of blockIdx.y = 0
    int32 num_samples;
    int32 num_heads;
    int32 seqlen_kv;
    int32 num_groups;
    int32 query_group;
    int32 kv_block;
    int32 max_selected;
    float theta;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Profile");

struct Mass {
    float sum;
    int count;
};

// A logit as an integer of the same order.
__device__ __forceinline__ uint32 ordered(float logit) {
    const uint32 bits = __float_as_uint(logit + 0.0f);
    return bits ^ (static_cast<uint32>(static_cast<int32>(bits) >> 31) | 0x80000000u);
}

// The inverse of `ordered`.
__device__ __forceinline__ float unordered(uint32 key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) profile_f32_d0_v1_sm90a(const __grid_constant__ Params p) {
    __shared__ float sFloat[kWarps];
    __shared__ int32 sInt[kWarps];
    const int sample = blockIdx.x;
    const int head = p.head0 + blockIdx.y;
    const float* row = p.logits + (static_cast<int64>(blockIdx.y) * p.num_samples + sample) * p.seqlen_kv;

    float largest = -kInf;
    for (int i = threadIdx.x; i < p.seqlen_kv; i += kThreads) largest = fmaxf(largest, row[i]);
    largest = cta_max(largest, sFloat);
    // Mass and number of the keys at or above a threshold.
    const auto at_least = [&](uint32 threshold) -> Mass {
        float sum = 0.0f;
        int count = 0;
        for (int i = threadIdx.x; i < p.seqlen_kv; i += kThreads) {
            const float logit = row[i];
            if (ordered(logit) >= threshold) {
                sum += exp2_approx(logit - largest);
                ++count;
            }
        }
        return {cta_sum(sum, sFloat), cta_sum(count, sInt)};
    };
    const float total = at_least(0).sum;
    int32 errors = total > 0.0f ? 0 : kScoreIsNan;
    const float target = p.theta * total;

    // The largest threshold whose keys hold the target.
    uint32 threshold = 0;
    for (uint32 bit = 0x80000000u; bit != 0; bit >>= 1) {
        const uint32 candidate = threshold | bit;
        // No key lies above the largest.
        if (candidate <= ordered(largest) && at_least(candidate).sum >= target) threshold = candidate;
    }
    const Mass above = at_least(threshold + 1);
    const int ties = at_least(threshold).count - above.count;
    const float each = exp2_approx(unordered(threshold) - largest);
    const float wanted = ceilf((target - above.sum) / each);
    const int taken = wanted < static_cast<float>(ties) ? max(static_cast<int>(wanted), 1) : ties;

    const int64 at = (static_cast<int64>(p.batch_index) * p.num_samples + sample) * p.num_heads + head;
    if (threadIdx.x == 0) p.needed[at] = static_cast<float>(above.count + taken) / p.seqlen_kv;
    if (p.q2k_index == nullptr) {
        raise_error(p.error_flag, errors);
        return;
    }

    const int group = min(max(p.samples[sample], 0) / p.query_group, p.num_groups - 1);
    const int64 list = (static_cast<int64>(p.batch_index) * p.num_heads + head) * p.num_groups + group;
    int count = p.q2k_count[list];
    if (count < 0 || count > p.max_selected) {
        errors |= kCountOutOfRange;
        count = min(max(count, 0), p.max_selected);
    }
    // Of the keys that tie at the threshold, those up to last_tie are needed: found by index, where not all are.
    int last_tie = p.seqlen_kv;
    if (p.recall != nullptr && taken < ties) {
        int none = -1;  // fewer than `taken` of them up to here
        while (last_tie - none > 1) {
            const int middle = none + (last_tie - none) / 2;
            int count_to = 0;
            for (int i = threadIdx.x; i <= middle; i += kThreads) count_to += ordered(row[i]) == threshold ? 1 : 0;
            (cta_sum(count_to, sInt) >= taken ? last_tie : none) = middle;
        }
    }
    float covered = 0.0f;
    int recalled = 0;
    for (int i = threadIdx.x; i < count * p.kv_block; i += kThreads) {
        const int64 key = static_cast<int64>(p.q2k_index[list * p.max_selected + i / p.kv_block]) * p.kv_block + i % p.kv_block;
        if (key < 0 || key / p.kv_block * p.kv_block >= p.seqlen_kv) {
            errors |= kIndexOutOfRange;
        } else if (key < p.seqlen_kv) {
            covered += exp2_approx(row[key] - largest);
            const uint32 logit = ordered(row[key]);
            recalled += logit > threshold || (logit == threshold && key <= last_tie) ? 1 : 0;
        }
    }
    covered = cta_sum(covered, sFloat);
    recalled = cta_sum(recalled, sInt);
    if (threadIdx.x == 0) {
        p.covered[at] = covered / total;
        if (p.recall != nullptr) p.recall[at] = static_cast<float>(recalled) / static_cast<float>(above.count + taken);
    }
    raise_error(p.error_flag, errors);
}
