/* Sparse attention from C: lists for every group, forward, inversion, backward; out and lse compared with doubles. Ends with 0 where
 * they agree. Memory comes from the driver here, in a trainer from its own allocator.
 *     cargo build --release -p dsv-capi
 *     cc runtime/capi/examples/attention.c -Iruntime/capi/include -Ltarget/release -ldsv -lcuda -lm -o attention
 *     LD_LIBRARY_PATH=target/release ./attention [BUNDLE] */
#include "dsv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The few calls of the driver that this needs: cuda.h is not on every machine. */
typedef unsigned long long CUdeviceptr;
extern int cuMemAlloc_v2(CUdeviceptr *, size_t);
extern int cuMemcpyHtoD_v2(CUdeviceptr, const void *, size_t);
extern int cuMemcpyDtoH_v2(void *, CUdeviceptr, size_t);
extern int cuCtxSynchronize(void);

enum { B = 1, H = 2, S = 192, D = 64, BLOCK = 64, G = 3, N = 3, KEPT = 2 };
enum { ELEMENTS = B * S * H * D };

#define CHECK(call)                                                         \
    do {                                                                    \
        if ((call) != 0) {                                                  \
            fprintf(stderr, "%s\n  %s\n", #call, dsv_last_error());         \
            exit(1);                                                        \
        }                                                                   \
    } while (0)
#define DRIVER(call)                                                        \
    do {                                                                    \
        int code = (call);                                                  \
        if (code != 0) {                                                    \
            fprintf(stderr, "%s: %d\n", #call, code);                       \
            exit(1);                                                        \
        }                                                                   \
    } while (0)

static CUdeviceptr room(size_t bytes) {
    CUdeviceptr at;
    DRIVER(cuMemAlloc_v2(&at, bytes));
    return at;
}

static CUdeviceptr upload(const void *from, size_t bytes) {
    CUdeviceptr at = room(bytes);
    DRIVER(cuMemcpyHtoD_v2(at, from, bytes));
    return at;
}

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static float values[4][ELEMENTS]; /* Q, K, V, gradient of out, as the kernels see them */
static uint16_t packed[ELEMENTS];

static CUdeviceptr tensor(int which, uint64_t *seed) {
    for (int i = 0; i < ELEMENTS; ++i) {
        *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
        packed[i] = to_bf16((float)(*seed >> 40) / 8388608.0f - 1.0f);
        values[which][i] = of_bf16(packed[i]);
    }
    return upload(packed, sizeof packed);
}

static void say(const char *text, void *data) {
    (void)data;
    fprintf(stderr, "notice: %s\n", text);
}

/* out and lse of one query over the listed keys, in doubles. */
static double reference(int head, int query, const int32_t *list, double *out) {
    double logits[S], most = -INFINITY, sum = 0;
    const float *q = values[0] + (query * H + head) * D;
    for (int i = 0; i < KEPT * BLOCK; ++i) {
        int key = list[i / BLOCK] * BLOCK + i % BLOCK;
        logits[i] = 0;
        for (int d = 0; d < D; ++d) logits[i] += (double)q[d] * values[1][(key * H + head) * D + d];
        logits[i] /= sqrt(D);
        if (logits[i] > most) most = logits[i];
    }
    for (int d = 0; d < D; ++d) out[d] = 0;
    for (int i = 0; i < KEPT * BLOCK; ++i) {
        int key = list[i / BLOCK] * BLOCK + i % BLOCK;
        double p = exp(logits[i] - most);
        sum += p;
        for (int d = 0; d < D; ++d) out[d] += p * values[2][(key * H + head) * D + d];
    }
    for (int d = 0; d < D; ++d) out[d] /= sum;
    return most + log(sum);
}

int main(int argc, char **argv) {
    dsv_options options = {.abi_version = DSV_ABI_VERSION, .bundle = argc > 1 ? argv[1] : NULL, .notice = say};
    dsv_runtime *runtime;
    CHECK(dsv_open(&options, &runtime));

    dsv_problem problem = {.dtype = DSV_BF16, .head_dim = D, .query_group = BLOCK, .kv_block = BLOCK, .batch = B, .num_heads = H,
                           .num_kv_heads = H, .seqlen_q = S, .seqlen_kv = S, .max_selected = KEPT, .backward = 1};
    char text[2048];
    if (dsv_attention_explain(runtime, &problem, text, sizeof text) < 0) return 1;
    printf("%s\n", text);
    dsv_attention *attention;
    CHECK(dsv_attention_new(runtime, &problem, NULL, &attention));
    dsv_attention_facts facts;
    CHECK(dsv_attention_facts_of(attention, &facts));
    dsv_lists_shape shape = {B, H, facts.num_groups, facts.num_kv_blocks, KEPT};
    dsv_lists *lists;
    CHECK(dsv_lists_new(runtime, &shape, &lists));

    uint64_t seed = 1;
    CUdeviceptr q = tensor(0, &seed), k = tensor(1, &seed), v = tensor(2, &seed), d_out = tensor(3, &seed);
    int32_t index[B * H * G * KEPT], count[B * H * G], flag = 0;
    for (int list = 0; list < B * H * G; ++list) {
        index[list * KEPT] = list % 2;
        index[list * KEPT + 1] = 2;
        count[list] = KEPT;
    }
    CUdeviceptr q2k_index = upload(index, sizeof index), q2k_count = upload(count, sizeof count);
    CUdeviceptr error_flag = upload(&flag, sizeof flag);
    CUdeviceptr out = room(sizeof packed), lse = room(B * H * S * sizeof(float));
    CUdeviceptr dq = room(sizeof packed), dk = room(sizeof packed), dv = room(sizeof packed);
    CUdeviceptr k2q_offset = room(B * H * (N + 1) * 4), k2q_index = room(sizeof index);
    CUdeviceptr workspace = room(facts.workspace_bytes);

    CHECK(dsv_lists_validate(lists, NULL, q2k_index, q2k_count, error_flag));
    dsv_forward_args forward = {q, k, v, out, lse, q2k_index, q2k_count, error_flag};
    CHECK(dsv_attention_forward(attention, NULL, &forward));
    CHECK(dsv_lists_invert(lists, NULL, q2k_index, q2k_count, k2q_offset, k2q_index, error_flag));
    dsv_backward_args backward = {.q = q, .k = k, .v = v, .out = out, .lse = lse, .d_out = d_out, .dq = dq, .dk = dk, .dv = dv,
                                  .k2q_offset = k2q_offset, .k2q_index = k2q_index, .workspace = workspace,
                                  .error_flag = error_flag};
    if (facts.needs_query_lists) backward.q2k_index = q2k_index, backward.q2k_count = q2k_count;
    CHECK(dsv_attention_backward(attention, NULL, &backward));
    DRIVER(cuCtxSynchronize());
    DRIVER(cuMemcpyDtoH_v2(&flag, error_flag, sizeof flag));
    CHECK(dsv_check_error_flag(flag));

    static float lses[B * H * S];
    DRIVER(cuMemcpyDtoH_v2(packed, out, sizeof packed));
    DRIVER(cuMemcpyDtoH_v2(lses, lse, sizeof lses));
    double worst = 0, worst_lse = 0, exact[D];
    for (int head = 0; head < H; ++head) {
        for (int query = 0; query < S; ++query) {
            const double at = reference(head, query, index + (head * G + query / BLOCK) * KEPT, exact);
            worst_lse = fmax(worst_lse, fabs(lses[head * S + query] - at));
            for (int d = 0; d < D; ++d) {
                worst = fmax(worst, fabs(of_bf16(packed[(query * H + head) * D + d]) - exact[d]));
            }
        }
    }
    /* Every row of P sums to 1, so the sum over keys of dV is the sum over queries of the gradient of out, column by column. */
    double worst_sum = 0;
    DRIVER(cuMemcpyDtoH_v2(packed, dv, sizeof packed));
    for (int head = 0; head < H; ++head) {
        for (int d = 0; d < D; ++d) {
            double sum = 0;
            for (int token = 0; token < S; ++token) {
                sum += of_bf16(packed[(token * H + head) * D + d]) - values[3][(token * H + head) * D + d];
            }
            worst_sum = fmax(worst_sum, fabs(sum));
        }
    }
    printf("worst error of out %.3g, of lse %.3g, of a column's sum of dV %.3g\n", worst, worst_lse, worst_sum);

    /* A wrong problem is an answer, not a crash. */
    problem.head_dim = 72;
    dsv_attention *none;
    if (dsv_attention_new(runtime, &problem, NULL, &none) == 0 || none != NULL) return 2;
    printf("refused: %s\n", dsv_last_error());

    dsv_lists_free(lists);
    dsv_attention_free(attention);
    dsv_close(runtime);
    return worst < 0.01 && worst_lse < 1e-4 && worst_sum < 0.2 ? 0 : 3;
}
