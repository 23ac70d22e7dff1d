/* Sparse attention for video DiTs on Hopper, for C and for whoever calls C. Link libdsv.so (or libdsv.a with -ldl -lpthread -lm).
 *
 * In this order: dsv_open, a plan for each shape (dsv_attention_new, dsv_selection_new, dsv_lists_new), then the hot calls, which
 * queue kernels on a stream, allocate no device memory, wait for nothing and may be captured in a CUDA graph:
 * dsv_select -> dsv_attention_forward -> dsv_lists_invert -> dsv_attention_backward. At the next natural synchronisation read the
 * error flag and give it to dsv_check_error_flag.
 *
 * Functions that can fail return 0, or -1 and then dsv_last_error says what was wrong, with which value, what is allowed, and what
 * to do. Structures are plain; set them to zero first. Addresses are device addresses (CUdeviceptr) of the GPU's primary context,
 * which PyTorch and the CUDA runtime use, and which every call leaves as the current one of its thread; 0 where a field is optional.
 * Streams are CUstream (cudaStream_t), NULL is the default stream. A handle may be used by several threads at once, but not while it is
 * freed; plans may outlive the dsv_runtime they came from, and must outlive the CUDA graphs that captured them.
 *
 * Letters: B sequences, H query heads, Hkv KV heads (H a multiple of them), D = head_dim, G = ceil(seqlen_q / query_group) query
 * groups, N = ceil(seqlen_kv / kv_block) KV units. */
#ifndef DSV_H
#define DSV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DSV_ABI_VERSION 1

typedef struct dsv_runtime dsv_runtime;
typedef struct dsv_attention dsv_attention;
typedef struct dsv_selection dsv_selection;
typedef struct dsv_lists dsv_lists;

/* dtype; f16 kernels do not ship, README.md says how to add them */
enum { DSV_BF16 = 0, DSV_F16 = 1 };
/* group_rule: the low-rank query that decides for its group is the middle one, the mean of all, or four, of which each unit has the
 * largest score or the mean softmax mass (of these two no kernel ships) */
enum { DSV_CENTRE = 0, DSV_MEAN = 1, DSV_MAX4 = 2, DSV_MASS4 = 3 };
/* budget: a number of units a head, or a share of the predicted softmax mass (ships with DSV_CENTRE and kv_block 8) */
enum { DSV_TOP_K = 0, DSV_TOP_P = 1 };

typedef struct {
    int32_t abi_version; /* DSV_ABI_VERSION */
    int32_t device;      /* ordinal of the GPU */
    const char *bundle;  /* folder made by `dsv-codegen build --out DIR`; NULL: kernels are compiled by NVRTC when first asked for */
    const char *table;   /* dispatch table made by dsv-autotune; NULL: the one shipped for this GPU */
    void (*notice)(const char *text, void *data); /* told what the user should know, from any thread; calls nothing here; may be NULL */
    void *notice_data;
} dsv_options;

/* Elements between neighbours, all of them set; the innermost stride is 1. In bytes all are multiples of 16. */
typedef struct {
    int64_t batch, seq, head;
} dsv_strides;

typedef struct {
    uint32_t dtype;
    uint32_t head_dim;      /* 64, 96, 128, 256 */
    uint32_t query_group;   /* consecutive tokens that share a list; 0 with kv_block 0: dense */
    uint32_t kv_block;      /* consecutive tokens listed together; 1: single tokens */
    uint32_t batch;
    uint32_t num_heads;
    uint32_t num_kv_heads;
    uint32_t seqlen_q;
    uint32_t seqlen_kv;
    uint32_t max_selected;  /* width of the lists, in KV units; 0 when dense */
    uint32_t backward;      /* 1: plan the backward as well */
    uint32_t deterministic; /* 1: the backward gives the same bits every time; not with kv_block below 64 */
    float scale;            /* of the logits; 0: 1 / sqrt(head_dim) */
} dsv_problem;

/* q, out, d_out, dq are [B, seqlen_q, H, D], the others [B, seqlen_kv, Hkv, D]; those of the backward are not read without it. */
typedef struct {
    dsv_strides q, k, v, out, d_out, dq, dk, dv;
} dsv_layouts;

typedef struct {
    uint64_t workspace_bytes;   /* of the backward */
    uint32_t num_groups;        /* G; 0 when dense */
    uint32_t num_kv_blocks;     /* N; 0 when dense */
    uint32_t needs_query_lists; /* whether the backward reads q2k_index and q2k_count */
    uint32_t needs_key_lists;   /* whether it reads k2q_offset and k2q_index */
} dsv_attention_facts;

typedef struct {
    uint64_t q, k, v;
    uint64_t out;       /* written */
    uint64_t lse;       /* f32 [B, H, seqlen_q], written: natural logarithm of the sum; -inf where nothing is listed */
    uint64_t q2k_index; /* i32 [B, H, G, max_selected], ascending and unique; 0 exactly when dense */
    uint64_t q2k_count; /* i32 [B, H, G] */
    uint64_t error_flag; /* i32 [1], set to 0 by the caller */
} dsv_forward_args;

typedef struct {
    uint64_t q, k, v;
    uint64_t out, lse;   /* of the forward */
    uint64_t d_out;
    uint64_t d_lse;      /* f32 [B, H, seqlen_q], gradient of lse; 0: none */
    uint64_t dq, dk, dv; /* written */
    uint64_t q2k_index, q2k_count;  /* where needs_query_lists */
    uint64_t k2q_offset, k2q_index; /* where needs_key_lists: what dsv_lists_invert wrote */
    uint64_t workspace;  /* workspace_bytes bytes, aligned to 256; contents are lost */
    uint64_t error_flag;
} dsv_backward_args;

typedef struct {
    uint32_t rank;         /* columns of the low-rank queries and keys; 16 ships */
    uint32_t query_group;
    uint32_t kv_block;
    uint32_t group_rule;
    uint32_t budget;
    uint32_t keep_first;   /* units with one of the first tokens (text) are listed before all others: how many tokens */
    uint32_t keep_own;     /* 1: so are units with a token of the group's own (key token i is query token i) */
    uint32_t batch;
    uint32_t num_heads;
    uint32_t seqlen_q;
    uint32_t seqlen_kv;
    uint32_t max_selected; /* width of the lists, 1 to N */
    float scale;           /* predicted logits are this times the products; read where masses are; 0: 1 */
} dsv_selection_problem;

typedef struct {
    uint64_t q_lr, k_lr; /* bf16 [B, seqlen, H, rank] */
    uint64_t budget;     /* one a head; DSV_TOP_K: i32, 0 to min(N, max_selected), units listed before all others among them;
                          * DSV_TOP_P: f32, 0 to 1, those on top */
    uint64_t keep_mask;  /* u32 [G, ceil(N / 32)]: bit n % 32 of word n / 32: unit n is listed before all others too; 0: none */
    uint64_t q2k_index, q2k_count; /* written */
    uint64_t error_flag;
} dsv_selection_args;

typedef struct {
    uint32_t batch, num_heads;
    uint32_t num_groups;    /* G */
    uint32_t num_kv_blocks; /* N, of units of 64 tokens or more */
    uint32_t max_selected;
} dsv_lists_shape;

/* DSV_ABI_VERSION of the library. */
int32_t dsv_abi_version(void);

/* Why the last call of this thread that failed did; valid until its next failure. */
const char *dsv_last_error(void);

/* Opens a GPU. */
int32_t dsv_open(const dsv_options *options, dsv_runtime **runtime);
void dsv_close(dsv_runtime *runtime); /* NULL is allowed, as in all that free */

/* Checks shapes and strides, chooses and loads kernels. layouts NULL: all contiguous [B, S, H, D]. */
int32_t dsv_attention_new(const dsv_runtime *runtime, const dsv_problem *problem, const dsv_layouts *layouts,
                          dsv_attention **attention);
void dsv_attention_free(dsv_attention *attention);
int32_t dsv_attention_facts_of(const dsv_attention *attention, dsv_attention_facts *facts);

/* Which kernel serves a problem and why, as a text of at most `bytes` bytes with its NUL. Returns the bytes the whole text needs, or
 * -1. */
int64_t dsv_attention_explain(const dsv_runtime *runtime, const dsv_problem *problem, char *text, size_t bytes);

/* out = softmax(scale Q K^T) V over the listed keys, and lse. */
int32_t dsv_attention_forward(const dsv_attention *attention, void *stream, const dsv_forward_args *args);

/* dq, dk, dv. */
int32_t dsv_attention_backward(const dsv_attention *attention, void *stream, const dsv_backward_args *args);

/* Strides of the low-rank tensors; NULL: contiguous [B, S, H, rank]. */
int32_t dsv_selection_new(const dsv_runtime *runtime, const dsv_selection_problem *problem, const dsv_strides *q_lr,
                          const dsv_strides *k_lr, dsv_selection **selection);
void dsv_selection_free(dsv_selection *selection);

/* Lists of the largest scores, exact; ids ascending, ties to the smaller id, the same bits every time. */
int32_t dsv_select(const dsv_selection *selection, void *stream, const dsv_selection_args *args);

int32_t dsv_lists_new(const dsv_runtime *runtime, const dsv_lists_shape *shape, dsv_lists **lists);
void dsv_lists_free(dsv_lists *lists);

/* Of the forward's lists those the backward reads: k2q_offset i32 [B, H, N + 1], k2q_index i32 [B, H, G * max_selected], written. */
int32_t dsv_lists_invert(const dsv_lists *lists, void *stream, uint64_t q2k_index, uint64_t q2k_count, uint64_t k2q_offset,
                         uint64_t k2q_index, uint64_t error_flag);

/* Raises the error flag where a list is not ascending, unique and in range: for lists made elsewhere. */
int32_t dsv_lists_validate(const dsv_lists *lists, void *stream, uint64_t q2k_index, uint64_t q2k_count, uint64_t error_flag);

/* 0 for a flag of 0; else -1, and dsv_last_error has a line for each bit. */
int32_t dsv_check_error_flag(int32_t flag);

#ifdef __cplusplus
}
#endif

#endif
