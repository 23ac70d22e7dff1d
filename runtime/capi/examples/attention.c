/* Sparse attention from C: selection, forward, inversion, backward; out and lse compared with doubles, gradients with what their sums
 * must be. Ends with 0 where they agree. Memory comes from the driver here, in a trainer from its own allocator.
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

enum { B = 1, H = 2, S = 192, D = 64, RANK = 16, BLOCK = 64, G = 3, N = 3, KEPT = 2 };
enum { ELEMENTS = B * S * H * D, LOW = B * S * H * RANK };

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

static CUdeviceptr noise(int elements, uint64_t *seed) {
    for (int i = 0; i < elements; ++i) {
        *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
        packed[i] = to_bf16((float)(*seed >> 40) / 8388608.0f - 1.0f);
    }
    return upload(packed, elements * sizeof packed[0]);
}

static CUdeviceptr tensor(int which, uint64_t *seed) {
    CUdeviceptr at = noise(ELEMENTS, seed);
    for (int i = 0; i < ELEMENTS; ++i) values[which][i] = of_bf16(packed[i]);
    return at;
}

/* The sum over tokens of x - minus, its largest of all columns. */
static double column_sum(const uint16_t *x, const float *minus) {
    double worst = 0;
    for (int column = 0; column < H * D; ++column) {
        double sum = 0;
        for (int token = 0; token < S; ++token) {
            sum += of_bf16(x[token * H * D + column]) - (minus ? minus[token * H * D + column] : 0.0f);
        }
        worst = fmax(worst, fabs(sum));
    }
    return worst;
}

static double inner(const uint16_t *x, const float *y) {
    double sum = 0;
    for (int i = 0; i < ELEMENTS; ++i) sum += (double)of_bf16(x[i]) * y[i];
    return sum;
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
    dsv_selection_problem selected = {.rank = RANK, .query_group = BLOCK, .kv_block = BLOCK, .group_rule = DSV_MEAN,
                                      .budget = DSV_TOP_K, .keep_own = 1, .batch = B, .num_heads = H, .seqlen_q = S,
                                      .seqlen_kv = S, .max_selected = KEPT};
    dsv_selection *selection;
    CHECK(dsv_selection_new(runtime, &selected, NULL, NULL, &selection));

    uint64_t seed = 1;
    CUdeviceptr q = tensor(0, &seed), k = tensor(1, &seed), v = tensor(2, &seed), d_out = tensor(3, &seed);
    CUdeviceptr q_lr = noise(LOW, &seed), k_lr = noise(LOW, &seed);
    int32_t index[B * H * G * KEPT], top_k[H] = {KEPT, KEPT}, flag = 0;
    CUdeviceptr budget = upload(top_k, sizeof top_k);
    CUdeviceptr q2k_index = room(sizeof index), q2k_count = room(B * H * G * 4);
    CUdeviceptr error_flag = upload(&flag, sizeof flag);
    CUdeviceptr out = room(sizeof packed), lse = room(B * H * S * sizeof(float));
    CUdeviceptr dq = room(sizeof packed), dk = room(sizeof packed), dv = room(sizeof packed);
    CUdeviceptr k2q_offset = room(B * H * (N + 1) * 4), k2q_index = room(sizeof index);
    CUdeviceptr workspace = room(facts.workspace_bytes);

    dsv_selection_args select = {.q_lr = q_lr, .k_lr = k_lr, .budget = budget, .q2k_index = q2k_index, .q2k_count = q2k_count,
                                 .error_flag = error_flag};
    CHECK(dsv_select(selection, NULL, &select));
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

    DRIVER(cuMemcpyDtoH_v2(index, q2k_index, sizeof index));
    for (int list = 0; list < B * H * G; ++list) {
        const int32_t *ids = index + list * KEPT, own = list % G;
        if (ids[0] >= ids[1] || (ids[0] != own && ids[1] != own)) return 4;
    }
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
    /* Every row of P sums to 1 and of dS to 0: over keys dV sums to what the gradient of out sums to over queries, and dK to 0. And
     * dS times S, summed, is both dQ times Q and dK times K. */
    static uint16_t of_k[ELEMENTS];
    DRIVER(cuMemcpyDtoH_v2(packed, dv, sizeof packed));
    const double sum_dv = column_sum(packed, values[3]);
    DRIVER(cuMemcpyDtoH_v2(of_k, dk, sizeof of_k));
    DRIVER(cuMemcpyDtoH_v2(packed, dq, sizeof packed));
    const double sum_dk = column_sum(of_k, NULL), by_q = inner(packed, values[0]), by_k = inner(of_k, values[1]);
    printf("worst error of out %.3g, of lse %.3g; sums of dV - dO %.3g, of dK %.3g; dQ Q %.4g, dK K %.4g\n", worst, worst_lse, sum_dv,
           sum_dk, by_q, by_k);

    /* A wrong problem is an answer, not a crash. */
    problem.head_dim = 72;
    dsv_attention *none;
    if (dsv_attention_new(runtime, &problem, NULL, &none) == 0 || none != NULL) return 2;
    printf("refused: %s\n", dsv_last_error());

    dsv_selection_free(selection);
    dsv_lists_free(lists);
    dsv_attention_free(attention);
    dsv_close(runtime);
    const int agrees = worst < 0.01 && worst_lse < 1e-4 && sum_dv < 0.1 && sum_dk < 0.1;
    return agrees && fabs(by_q - by_k) < 0.01 * fabs(by_q) ? 0 : 3;
}
