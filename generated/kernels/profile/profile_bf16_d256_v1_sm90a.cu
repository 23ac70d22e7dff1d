// profile_bf16_d256_v1_sm90a
// Generated from templates/kernels/profile.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// profile, bf16, rows of 256, vector 1, sm90a

// Profiler (paper: critical KV): of sampled queries, how few keys hold the share theta of the softmax mass, how much of the
// mass their lists hold, and how many of those few are listed.
//   p_j = exp(scale <q, k_j> - LSE);   needed = min n such that the n largest p_j sum to theta sum p_j, over S
//   covered = sum over listed j of p_j / sum p_j;   recall = listed among the n largest, over n (ties in proportion)
// One pass over the keys where the LSE of all keys is given, else one more for it. Nothing is sorted or stored: keys fall
// into 2336 bins of even width in log p, down to (1 - theta) / S, below which no n-th largest lies. The bin of the n-th is
// divided in proportion: n is off by a fifth of a bin's width in halvings times its keys, over S at most 1/512.
// Floor: 2 D bytes of K a key and eight samples, through L2. Budget: 228 KB of shared memory, most of it bins.
#include "dsv/math.cuh"
#include "dsv/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 256;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kSmemBytes = 230432;
constexpr int kParamsBytes = 168;
// END CONFIG

constexpr int kWarps = kThreads / 32;
constexpr int kSamples = 8;  // columns of one mma.sync product; the rows are keys
constexpr int kChunk = 1024;
// Rows 4 pieces of 16 bytes apart modulo 8: no bank is met twice.
constexpr int kStride = kHeadDim % 64 == 0 ? kHeadDim + 32 : kHeadDim;
constexpr int kBinsPerLane = 73;  // odd: lanes that walk their own bins meet no bank twice
constexpr int kBins = 32 * kBinsPerLane;
constexpr int kPlaces = 1024;  // parts of a bin: the places of 2^22 keys add up in 32 bits
// Deeper keys share the last bin: a theta nearer to 1 than 2^-20 widens no bin further.
constexpr float kMostHalvings = 40.0f;

static_assert(kHeadDim % 32 == 0, "whole 16-byte pieces");
static_assert(kWarps == kSamples, "one warp follows the list of one sample");

struct Params {
    TensorView q;            // [B, S, H, D]
    TensorView k;            // [B, S, H, D]; pointers and strides multiples of 8 elements
    const int32* samples;    // [samples]: token ids
    const float* lse;        // [B, H, seqlen_q]: natural logarithm of the sum over all keys, or null
    const int32* q2k_index;  // [B, H, G, max_selected], or null
    const int32* q2k_count;  // [B, H, G], or null
    float* needed;           // [B, samples, H], written: share of the keys
    float* covered;          // [B, samples, H], written unless there are no lists
    float* recall;           // [B, samples, H], written unless there are no lists, or null
    int32* error_flag;       // [1]
    int32 num_samples;
    int32 num_heads;
    int32 seqlen_q;
    int32 seqlen_kv;         // at most 2^22
    int32 num_groups;
    int32 query_group;
    int32 kv_block;
    int32 max_selected;
    float scale_log2;
    float theta;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::Profile");

struct SharedStorage {
    alignas(16) Element query[kSamples][kStride];
    uint32 count[kSamples][kBins];   // keys
    uint32 place[kSamples][kBins];   // their places within the bin, added up
    uint32 listed[kSamples][kBins];  // how many of them are listed
    uint32 bits[kSamples][kChunk / 32];  // which keys of the chunk are listed
    float partial[2][kWarps][kSamples];
    float lse_log2[kSamples];
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "SharedStorage differs from Facts");

// Logits in base 2 of this warp's keys in [first, end): visit(key, i, logit) for i = 0, 1, this lane's samples 2 (l % 4) + i.
template <class Visit>
__device__ __forceinline__ void walk(const Params& p, const SharedStorage& shared, int first, int end, Visit visit) {
    const int lane = lane_index();
    for (int key0 = first + 16 * warp_index(); key0 < end; key0 += 16 * kWarps) {
        const int key = key0 + lane / 4;
        RowOperand<kHeadDim> k;
        k.load(key < end ? p.k.at<const Element>(blockIdx.z, key, blockIdx.y) : nullptr,
               key + 8 < end ? p.k.at<const Element>(blockIdx.z, key + 8, blockIdx.y) : nullptr);
        float d[4] = {};
        multiply_rows(d, k, &shared.query[lane / 4][0]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (key + i / 2 * 8 < end) visit(key + i / 2 * 8, i % 2, p.scale_log2 * d[i]);
        }
    }
}

// a log-sum-exp in base 2, as the largest logit and the sum relative to it.
struct LogSum {
    float largest;
    float sum;
};

__device__ __forceinline__ LogSum joined(LogSum a, LogSum b) {
    const float largest = fmaxf(a.largest, b.largest);
    if (largest == -kInf) return a;
    return {largest, a.sum * exp2_approx(a.largest - largest) + b.sum * exp2_approx(b.largest - largest)};
}

__device__ __forceinline__ float log2_of(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The pass that finds the LSE of every sample.
__device__ __forceinline__ void find_lse(const Params& p, SharedStorage& shared) {
    const int lane = lane_index();
    LogSum sums[2] = {{-kInf, 0.0f}, {-kInf, 0.0f}};
    walk(p, shared, 0, p.seqlen_kv, [&](int, int i, float logit) { sums[i] = joined(sums[i], {logit, 1.0f}); });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int apart = 4; apart < 32; apart *= 2) {
            sums[i] = joined(sums[i], {__shfl_xor_sync(kFullWarp, sums[i].largest, apart),
                                       __shfl_xor_sync(kFullWarp, sums[i].sum, apart)});
        }
        if (lane < 4) {
            shared.partial[0][warp_index()][2 * lane + i] = sums[i].largest;
            shared.partial[1][warp_index()][2 * lane + i] = sums[i].sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < kSamples) {
        LogSum sum = {-kInf, 0.0f};
        for (int warp = 0; warp < kWarps; ++warp) {
            sum = joined(sum, {shared.partial[0][warp][threadIdx.x], shared.partial[1][warp][threadIdx.x]});
        }
        shared.lse_log2[threadIdx.x] = sum.largest + log2_of(sum.sum);
    }
    __syncthreads();
}

// A list as one warp reads it, once, along the keys.
struct Cursor {
    const int32* ids;
    int count;
    int next;  // the first entry that reaches past the keys seen so far
};

// Sets the bits of the listed keys in [first, end), and goes on to the entries behind them. One warp. Gives error bits.
__device__ __forceinline__ int32 mark(const Params& p, Cursor& list, uint32* bits, int first, int end) {
    const int lane = lane_index();
    const int units = (p.seqlen_kv + p.kv_block - 1) / p.kv_block;
    int32 errors = 0;
    while (list.next < list.count) {
        const int at = list.next + lane;
        bool is_passed = false;
        if (at < list.count) {
            const int id = list.ids[at];
            const bool exists = id >= 0 && id < units;
            if (!exists) errors |= kIndexOutOfRange;
            if (at > 0 && list.ids[at - 1] >= id) errors |= kListNotAscending;
            const int unit_end = exists ? min((id + 1) * p.kv_block, p.seqlen_kv) : 0;
            is_passed = unit_end <= end;
            for (int key = exists ? max(id * p.kv_block, first) : end; key < min(unit_end, end);) {
                const int next = min(min(unit_end, end), (key / 32 + 1) * 32);
                atomicOr(&bits[(key - first) / 32], 0xffffffffu >> (32 - (next - key)) << key % 32);
                key = next;
            }
        }
        const uint32 passed = __ballot_sync(kFullWarp, is_passed);
        list.next += passed == kFullWarp ? 32 : __ffs(static_cast<int>(~passed)) - 1;
        if (passed != kFullWarp) break;
    }
    return errors;
}

struct Answer {
    float needed;
    float recall;
};

// From the bins of a sample: the n largest keys, where they hold `target`. One warp.
__device__ __forceinline__ Answer divide(const SharedStorage& shared, int sample, float total, float target,
                                         float bins_per_halving) {
    const int lane = lane_index();
    const uint32* count = shared.count[sample];
    const auto mass_of = [&](int bin) {
        const float keys = static_cast<float>(count[bin]);
        if (count[bin] == 0) return 0.0f;
        const float place = static_cast<float>(shared.place[sample][bin]) / keys + 0.5f;
        return keys * exp2_approx(-(static_cast<float>(bin) + place / kPlaces) / bins_per_halving);
    };
    const int first = kBinsPerLane * lane;
    float mass = 0.0f;
    int keys = 0;
    int listed = 0;
    for (int i = 0; i < kBinsPerLane; ++i) {
        mass += mass_of(first + i);
        keys += static_cast<int>(count[first + i]);
        listed += static_cast<int>(shared.listed[sample][first + i]);
    }
    float through = mass;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const float below = __shfl_up_sync(kFullWarp, through, offset);
        if (lane >= offset) through += below;
    }
    const int keys_through = warp_inclusive_sum(keys);
    const int listed_through = warp_inclusive_sum(listed);
    const uint32 reached = __ballot_sync(kFullWarp, through >= target);
    const int source = reached == 0 ? 31 : __ffs(static_cast<int>(reached)) - 1;
    float above = through - mass;
    int keys_above = keys_through - keys;
    int listed_above = listed_through - listed;
    int bin = first;
    for (; bin < first + kBinsPerLane - 1 && above + mass_of(bin) < target; ++bin) {
        above += mass_of(bin);
        keys_above += static_cast<int>(count[bin]);
        listed_above += static_cast<int>(shared.listed[sample][bin]);
    }
    // The last bin has no lower end: it weighs what the others leave.
    const float inside = bin == kBins - 1 ? total - above : mass_of(bin);
    const float most = static_cast<float>(count[bin]);
    const float taken = inside > 0.0f ? fminf(ceilf(most * ((target - above) / inside)), most) : most;
    const float n = fmaxf(static_cast<float>(keys_above) + taken, 1.0f);
    const float of_bin = most > 0.0f ? static_cast<float>(shared.listed[sample][bin]) * (taken / most) : 0.0f;
    return {__shfl_sync(kFullWarp, n, source),
            __shfl_sync(kFullWarp, (static_cast<float>(listed_above) + of_bin) / n, source)};
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) profile_bf16_d256_v1_sm90a(const __grid_constant__ Params p) {
    extern __shared__ uint4 dynamic[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic);
    const int lane = lane_index();
    const int warp = warp_index();
    const int64 head = static_cast<int64>(blockIdx.z) * p.num_heads + blockIdx.y;
    const int sample = blockIdx.x * kSamples + warp;  // this warp's
    const bool is_sampled = sample < p.num_samples;
    const int token = is_sampled ? min(max(p.samples[sample], 0), p.seqlen_q - 1) : 0;
    int32 errors = 0;

    for (int i = lane; i < kHeadDim / 8; i += 32) {
        const Element* row = p.q.at<const Element>(blockIdx.z, token, blockIdx.y);
        uint4 columns = {0, 0, 0, 0};
        if (is_sampled) columns = *reinterpret_cast<const uint4*>(row + 8 * i);
        *reinterpret_cast<uint4*>(&shared.query[warp][8 * i]) = columns;
    }
    uint32* bins = &shared.count[0][0];
    for (int i = threadIdx.x; i < 3 * kSamples * kBins; i += kThreads) bins[i] = 0;
    if (p.lse != nullptr && lane == 0) {
        shared.lse_log2[warp] = is_sampled ? p.lse[head * p.seqlen_q + token] * kLog2E : 0.0f;
    }
    __syncthreads();
    if (p.lse == nullptr) find_lse(p, shared);

    Cursor list = {nullptr, 0, 0};
    if (p.q2k_index != nullptr && is_sampled) {
        const int64 at = head * p.num_groups + min(token / p.query_group, p.num_groups - 1);
        list.ids = p.q2k_index + at * p.max_selected;
        list.count = p.q2k_count[at];
        if (list.count < 0 || list.count > p.max_selected) {
            errors |= kCountOutOfRange;
            list.count = min(max(list.count, 0), p.max_selected);
        }
    }
    const float halvings = log2_of(static_cast<float>(p.seqlen_kv) / (1.0f - p.theta)) + 0.25f;
    const float bins_per_halving = static_cast<float>(kBins - 1) / fminf(halvings, kMostHalvings);
    float total[2] = {};
    float covered[2] = {};
    for (int first = 0; first < p.seqlen_kv; first += kChunk) {
        const int end = min(first + kChunk, p.seqlen_kv);
        shared.bits[warp][lane] = 0;
        __syncwarp();
        errors |= mark(p, list, shared.bits[warp], first, end);
        __syncthreads();
        walk(p, shared, first, end, [&](int key, int i, float logit) {
            const int column = 2 * (lane % 4) + i;
            const float depth = shared.lse_log2[column] - logit;
            const float mass = exp2_approx(-depth);
            const bool is_listed = (shared.bits[column][(key - first) / 32] >> (key - first) % 32 & 1) != 0;
            total[i] += mass;
            if (is_listed) covered[i] += mass;
            // Saturates, and gives 0 for NaN, which is noticed in the total.
            const uint32 at = __float2uint_rd(depth * (bins_per_halving * kPlaces));
            const uint32 bin = min(at / kPlaces, static_cast<uint32>(kBins - 1));
            atomicAdd(&shared.count[column][bin], 1u);
            atomicAdd(&shared.place[column][bin], at % kPlaces);
            if (is_listed) atomicAdd(&shared.listed[column][bin], 1u);
        });
        __syncthreads();
    }

    // The lanes of a sample, then the warps, in order.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int apart = 4; apart < 32; apart *= 2) {
            total[i] += __shfl_xor_sync(kFullWarp, total[i], apart);
            covered[i] += __shfl_xor_sync(kFullWarp, covered[i], apart);
        }
        if (lane < 4) {
            shared.partial[0][warp][2 * lane + i] = total[i];
            shared.partial[1][warp][2 * lane + i] = covered[i];
        }
    }
    __syncthreads();
    if (is_sampled) {
        float sum = 0.0f;
        float part = 0.0f;
        for (int i = 0; i < kWarps; ++i) {
            sum += shared.partial[0][i][warp];
            part += shared.partial[1][i][warp];
        }
        if (!(sum > 0.0f && sum < kInf)) errors |= kScoreIsNan;
        const Answer answer = divide(shared, warp, sum, p.theta * sum, bins_per_halving);
        const int64 at = (static_cast<int64>(blockIdx.z) * p.num_samples + sample) * p.num_heads + blockIdx.y;
        if (lane == 0) {
            p.needed[at] = answer.needed / static_cast<float>(p.seqlen_kv);
            if (p.q2k_index != nullptr) {
                p.covered[at] = part / sum;
                if (p.recall != nullptr) p.recall[at] = answer.recall;
            }
        }
    }
    raise_error(p.error_flag, errors);
}
