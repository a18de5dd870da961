/* SPDX-License-Identifier: Apache-2.0
 *
 * power_attention.h - the C interface of libpowerattn: symmetric power attention, forward, backward
 * and state step, on the CPU and on CUDA devices. This header is the manual.
 *
 * 1. What is computed. For every sequence b and query head h, with kv head g = h / (heads_q / heads_kv):
 *
 *      w_ij = exp(G_i - G_j) * (scale * q_i . k_j)^degree        for j <= i, else 0
 *      y_i  = sum_j w_ij v_j / (sum_j w_ij + eps)                normalised (default; even degree)
 *      y_i  = sum_j w_ij v_j                                     POWERATTN_UNNORMALIZED (any degree)
 *
 *    G is the inclusive cumulative sum of log_g over the tokens of a sequence: the gate of token j decays
 *    everything before j, not j itself. A row whose denominator is 0 (zero query, zero keys) is 0, and so
 *    are its gradients.
 *
 *    State after token T, with phi the symmetric power embedding, phi(q) . phi(k) = (q . k)^degree:
 *
 *      S = sum_j exp(G_T - G_j) phi(k_j) v_j^T   [D, value_dim]
 *      z = sum_j exp(G_T - G_j) phi(k_j)         [D]               D = C(head_dim + degree - 1, degree)
 *
 *    The scale is applied when a state is read, never stored in it. An initial state is decayed by exp(G_i).
 *    The order of the D rows is canonical: lexicographic in i1 <= i2 <= ... <= ip, each row carrying
 *    sqrt(multinomial coefficient); powerattn_state_monomial() gives it row by row.
 *
 * 2. How it is used: describe -> plan -> execute. A plan is immutable and holds no data; any number of
 *    threads may execute one plan at once, each with its own workspace and outputs.
 *
 * 3. Memory. The caller owns every byte. An execute call (forward, backward, step, summary, compose,
 *    convert) never allocates, never synchronises a device and never copies from device to host; on CUDA
 *    it only enqueues work on `stream` and can be captured in a CUDA graph. Every pointer in an argument
 *    struct is memory of the plan's device (host memory for a CPU plan, device memory for a CUDA plan)
 *    unless it says otherwise. Workspace needs 256-byte alignment, tensors the alignment of their element
 *    type. No output may overlap another tensor of the call or itself.
 *
 * 4. Layout. Tensors are strided, strides count elements, and the last dimension (head_dim, value_dim) has
 *    stride 1. [b,t,h,d], [b,h,t,d], slices of a packed qkv and Julia's (d,h,t,b) need no copy. A stride of
 *    0 broadcasts an input. Sizes and strides are 64-bit.
 *
 * 5. Packed sequences. With desc.sequences = n > 0, batch is 1 and `cu_seqlens` holds n + 1 cumulative
 *    token offsets, starting at 0, non-decreasing, the last <= seq_len. Empty sequences are legal. Rows past
 *    the last sequence are padding: their outputs are written with zeros. Otherwise every batch entry is a
 *    sequence. "sequences" below means n, or batch.
 *
 * 6. Errors. Every call returns a powerattn_status. On anything but POWERATTN_OK the thread's
 *    powerattn_last_error() names the argument, what it was and what is allowed, and arguments that are
 *    refused leave all outputs untouched. NaN and Inf in data propagate and never crash. Nothing is printed
 *    and nothing throws, aborts or exits.
 *
 * 7. Growing. Every struct starts with struct_size = sizeof(the struct). Zero is the default of every
 *    optional field; unknown trailing bytes must be zero. Enums have fixed numbers.
 *
 * 8. Determinism. The same call with the same plan on the same device gives the same bits.
 */
#ifndef POWER_ATTENTION_H_
#define POWER_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#define POWERATTN_VERSION_MAJOR 0
#define POWERATTN_VERSION_MINOR 1
#define POWERATTN_VERSION_PATCH 0

#if defined(POWERATTN_STATIC)
#define POWERATTN_API
#elif defined(_WIN32) && defined(POWERATTN_BUILDING)
#define POWERATTN_API __declspec(dllexport)
#elif defined(_WIN32)
#define POWERATTN_API __declspec(dllimport)
#elif defined(__GNUC__)
#define POWERATTN_API __attribute__((visibility("default")))
#else
#define POWERATTN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Enumerations (stored as int32_t) ------------------------------------------------------------- */

typedef int32_t powerattn_status;
enum {
  POWERATTN_OK = 0,
  POWERATTN_ERROR_INVALID_ARGUMENT = 1,    /* an argument is outside what is allowed */
  POWERATTN_ERROR_UNSUPPORTED = 2,         /* legal, but no implementation of this build or device runs it */
  POWERATTN_ERROR_STATE_TOO_LARGE = 3,     /* the state needs more memory than there is; the number is told */
  POWERATTN_ERROR_OUT_OF_MEMORY = 4,       /* the library could not allocate its own small objects */
  POWERATTN_ERROR_WORKSPACE_TOO_SMALL = 5, /* workspace_bytes or saved_bytes below what the plan needs */
  POWERATTN_ERROR_NO_DEVICE = 6,           /* no such device, no driver, or a driver that is too old */
  POWERATTN_ERROR_DEVICE = 7,              /* the device reported an error */
  POWERATTN_ERROR_VERSION = 8,             /* packed state of another format version */
  POWERATTN_ERROR_INTERNAL = 9             /* a defect of the library; please report it */
};

enum { POWERATTN_FLOAT32 = 1, POWERATTN_FLOAT16 = 2, POWERATTN_BFLOAT16 = 3, POWERATTN_FLOAT64 = 4 };

enum { POWERATTN_CPU = 0, POWERATTN_CUDA = 1 };

/* Form of the computation. Equal results within rounding; they differ in cost only. */
enum {
  POWERATTN_FORM_AUTO = 0,      /* the cost model decides */
  POWERATTN_FORM_ATTENTION = 1, /* t x t weights in tiles: O(t^2) time, any degree, no state */
  POWERATTN_FORM_CHUNKED = 2    /* attention inside chunks, state across chunks: O(t) time */
};

enum {
  POWERATTN_ROPE_NONE = 0,
  POWERATTN_ROPE_HALF = 1,       /* pairs (i, i + rope_dim/2), "NeoX" style */
  POWERATTN_ROPE_INTERLEAVED = 2 /* pairs (2i, 2i + 1), "GPT-J" style */
};

/* Bits of powerattn_desc.flags. */
enum {
  POWERATTN_UNNORMALIZED = 1, /* y = sum w v; needed for odd degrees */
  POWERATTN_CUSTOM_SCALE = 2, /* use desc.scale as it is (0 included) instead of 1/sqrt(head_dim) */
  POWERATTN_USE_STATE = 4,    /* forward/backward calls may pass initial and final states */
  POWERATTN_ALLOW_TF32 = 8    /* float32 on CUDA may round products to TF32 (2^-11) */
};

/* ---- Description and plan -------------------------------------------------------------------------- */

/* What will be computed. Zero-initialise, set struct_size and what you need. */
typedef struct powerattn_desc {
  uint32_t struct_size;  /* sizeof(powerattn_desc) */
  int32_t device_type;   /* POWERATTN_CPU (default) or POWERATTN_CUDA */
  int32_t device_index;  /* 0 .. powerattn_device_count - 1; 0 on the CPU */
  int32_t dtype;         /* of q, k, v, y and their gradients; FLOAT64 on the CPU only */
  int32_t state_dtype;   /* of S and z: 0 = FLOAT32 (FLOAT64 with FLOAT64); BFLOAT16 on request, for step */
  int32_t degree;        /* p: 1 .. 8; even unless POWERATTN_UNNORMALIZED */
  int32_t flags;         /* sum of the bits above */
  int32_t form;          /* POWERATTN_FORM_*; AUTO lets the cost model choose */
  int64_t batch;         /* b >= 0; 1 with packed sequences */
  int64_t seq_len;       /* t >= 0: tokens per batch entry, or all packed tokens with padding; in a step
                            call the tokens per sequence of one step */
  int64_t heads_q;       /* >= 1, a multiple of heads_kv */
  int64_t heads_kv;      /* >= 1 */
  int64_t head_dim;      /* d: 1 .. 256 */
  int64_t value_dim;     /* e: 1 .. 256; 0 = head_dim */
  int64_t sequences;     /* 0: every batch entry is a sequence; n > 0: n packed sequences (cu_seqlens) */
  int64_t max_seq_len;   /* packed: longest sequence if known (helps the cost model), 0 = unknown */
  int64_t chunk_size;    /* tokens per chunk, which asks for the chunked form; 0 = chosen by the cost model */
  double scale;          /* with POWERATTN_CUSTOM_SCALE; finite */
  double eps;            /* added to the denominator; >= 0, finite; default 0 */
  double rope_base;      /* > 0; 0 = 10000 */
  int64_t rope_dim;      /* even, 2 .. head_dim: leading dimensions rotated; 0 = head_dim */
  int32_t rope_style;    /* POWERATTN_ROPE_*. Token at position m (offset + index in its sequence): pair i
                            of q and k is rotated by the angle m * rope_base^(-2 i / rope_dim) */
  int32_t num_threads;   /* CPU: threads of an execute call; 0 = POWERATTN_NUM_THREADS from the environment,
                            else all cores this process may use. Results do not depend on it */
  uint64_t state_limit;  /* bytes that states may take in all; 0 = the device's memory */
  int64_t reserved[4];   /* 0 */
} powerattn_desc;

typedef struct powerattn_plan powerattn_plan;

/* What a plan chose and what it needs. */
typedef struct powerattn_plan_info {
  uint32_t struct_size;        /* in: sizeof(powerattn_plan_info) */
  int32_t form;                /* POWERATTN_FORM_ATTENTION or POWERATTN_FORM_CHUNKED */
  int64_t chunk_size;          /* tokens per chunk; the attention form reports seq_len */
  int64_t sequences;           /* number of states: batch, or the number of packed sequences */
  int64_t state_rows;          /* D; INT64_MAX where it does not fit in 64 bits */
  uint64_t state_bytes;        /* S and z of all sequences and kv heads; UINT64_MAX where it overflows */
  uint64_t workspace_forward;  /* bytes of workspace that powerattn_forward needs; also below */
  uint64_t workspace_backward; /* when args.saved is NULL */
  uint64_t workspace_backward_saved; /* when args.saved is given */
  uint64_t workspace_step;
  uint64_t workspace_summary;  /* both directions */
  uint64_t saved_bytes;        /* size of the optional `saved` buffer that lets backward skip recomputation;
                                  0: there is nothing to save */
  double scale;                /* the scale in force */
  double predicted_forward_s;  /* the cost model's time, seconds */
  double predicted_backward_s;
} powerattn_plan_info;

/* Makes a plan. *plan is written on success only. Every choice is made here; nothing is tuned later.
 * Fails with STATE_TOO_LARGE, and the number of bytes, when the requested form or POWERATTN_USE_STATE needs
 * a state that cannot fit. A plan for a step needs POWERATTN_USE_STATE. */
POWERATTN_API powerattn_status powerattn_plan_create(const powerattn_desc *desc, powerattn_plan **plan);

/* Frees a plan; NULL is allowed. No call may be executing it. */
POWERATTN_API void powerattn_plan_destroy(powerattn_plan *plan);

/* Fills *info, whose struct_size the caller has set: the choice, and the bytes to allocate for the calls. */
POWERATTN_API powerattn_status powerattn_plan_query(const powerattn_plan *plan, powerattn_plan_info *info);

/* Writes the plan as text: problem, form, chunk, kernels, tiling with reasons, costs of the alternatives,
 * memory. At most `capacity` bytes with the final NUL; *needed (may be NULL) gets the bytes of the whole
 * text with its NUL. text may be NULL when capacity is 0. */
POWERATTN_API powerattn_status powerattn_plan_describe(const powerattn_plan *plan, char *text, size_t capacity,
                                                       size_t *needed);

/* ---- Tensors --------------------------------------------------------------------------------------- */

/* A strided tensor: element (b, t, h, i) is data[b*stride_b + t*stride_t + h*stride_h + i]. With packed
 * sequences stride_b is ignored. data = NULL: absent, where a tensor is optional. Inputs are never written. */
typedef struct powerattn_tensor {
  void *data;
  int64_t stride_b;
  int64_t stride_t;
  int64_t stride_h;
} powerattn_tensor;

/* States of n sequences: S [n, heads_kv, D, value_dim] and z [n, heads_kv, D] in state_dtype, [D, value_dim]
 * and [D] contiguous. s = NULL: absent. z may be NULL when unnormalised. */
typedef struct powerattn_state {
  void *s;
  void *z;
  int64_t s_stride_n; /* elements between sequences (slots) of S */
  int64_t s_stride_h; /* elements between kv heads of S */
  int64_t z_stride_n;
  int64_t z_stride_h;
} powerattn_state;

/* ---- Forward and backward --------------------------------------------------------------------------- */

typedef struct powerattn_forward_args {
  uint32_t struct_size; /* sizeof(powerattn_forward_args) */
  uint32_t reserved;    /* 0 */
  powerattn_tensor q;         /* [b, t, heads_q, head_dim] dtype */
  powerattn_tensor k;         /* [b, t, heads_kv, head_dim] dtype */
  powerattn_tensor v;         /* [b, t, heads_kv, value_dim] dtype */
  powerattn_tensor log_g;     /* optional [b, t, heads_kv] float32 (float64 with FLOAT64), <= 0 for decay;
                                 -inf resets the state before its token */
  powerattn_tensor y;         /* out [b, t, heads_q, value_dim] dtype */
  powerattn_tensor row_norm;  /* optional out [b, t, heads_q] float32 (float64): sum_j w_ij + eps, the state's
                                 part included; backward needs it when normalised */
  powerattn_state initial_state; /* optional in, one per sequence */
  powerattn_state final_state;   /* optional out; may be the same memory as initial_state */
  const int64_t *cu_seqlens;  /* packed: [sequences + 1] */
  const int64_t *rope_offset; /* optional [sequences]: position of the first token; default 0 */
  void *saved;                /* optional out, plan_info.saved_bytes: for backward */
  uint64_t saved_bytes;
  void *workspace;            /* plan_info.workspace_forward bytes; may be NULL when that is 0 */
  uint64_t workspace_bytes;
  void *stream;               /* cudaStream_t; NULL on the CPU */
} powerattn_forward_args;

POWERATTN_API powerattn_status powerattn_forward(const powerattn_plan *plan, const powerattn_forward_args *args);

/* Gradients of a loss, given d_y and, optionally, the gradient of the final state. Inputs are the forward
 * call's; y, row_norm and saved its outputs. Gradients are overwritten, not accumulated. */
typedef struct powerattn_backward_args {
  uint32_t struct_size; /* sizeof(powerattn_backward_args) */
  uint32_t reserved;    /* 0 */
  powerattn_tensor q;
  powerattn_tensor k;
  powerattn_tensor v;
  powerattn_tensor log_g;
  powerattn_tensor y;            /* required when normalised or gated */
  powerattn_tensor row_norm;     /* required when normalised */
  powerattn_tensor d_y;          /* [b, t, heads_q, value_dim] dtype */
  powerattn_tensor d_q;          /* out, as q */
  powerattn_tensor d_k;          /* out, as k */
  powerattn_tensor d_v;          /* out, as v */
  powerattn_tensor d_log_g;      /* optional out, as log_g */
  powerattn_state initial_state; /* as in forward */
  powerattn_state d_final_state; /* optional in, gradient of final_state */
  powerattn_state d_initial_state; /* optional out, gradient of initial_state */
  const int64_t *cu_seqlens;
  const int64_t *rope_offset;
  const void *saved;             /* optional, from forward */
  uint64_t saved_bytes;
  void *workspace;               /* plan_info.workspace_backward[_saved] bytes */
  uint64_t workspace_bytes;
  void *stream;
} powerattn_backward_args;

POWERATTN_API powerattn_status powerattn_backward(const powerattn_plan *plan, const powerattn_backward_args *args);

/* ---- State step ------------------------------------------------------------------------------------- */

/* One or a few tokens (desc.seq_len) of desc.batch sequences against a pool of states, in place:
 *   S <- exp(log_g) S + phi(k) v^T,  z likewise,  y = phi(q) S / (phi(q) . z + eps),  token by token.
 * Not for packed sequences. */
typedef struct powerattn_step_args {
  uint32_t struct_size; /* sizeof(powerattn_step_args) */
  uint32_t reserved;    /* 0 */
  powerattn_tensor q;
  powerattn_tensor k;
  powerattn_tensor v;
  powerattn_tensor log_g;     /* optional */
  powerattn_tensor y;         /* out; zeros for skipped sequences and padded tokens */
  powerattn_state state;      /* in/out: pool of num_slots states, state_dtype */
  int64_t num_slots;          /* slots in the pool */
  const int64_t *slots;       /* optional [batch]: slot of each sequence, all different; negative = skip.
                                 Default: sequence b uses slot b. Out of range: an error on the CPU; on
                                 CUDA, where the host does not read it, skipped */
  const int64_t *lengths;     /* optional [batch]: valid tokens, 0 .. seq_len; the rest are padding and never
                                 touch a state */
  const int64_t *rope_offset; /* optional [batch]: position of the step's first token */
  void *workspace;            /* plan_info.workspace_step bytes */
  uint64_t workspace_bytes;
  void *stream;
} powerattn_step_args;

POWERATTN_API powerattn_status powerattn_step(const powerattn_plan *plan, const powerattn_step_args *args);

/* ---- Segments: summaries and composition (context parallelism, prefix caching) ---------------------- */

/* (S, z, L) of each sequence from its keys, values and gates alone; L = G_T is the total log gate. */
typedef struct powerattn_summary_args {
  uint32_t struct_size; /* sizeof(powerattn_summary_args) */
  uint32_t reserved;    /* 0 */
  powerattn_tensor k;
  powerattn_tensor v;
  powerattn_tensor log_g;     /* optional */
  powerattn_state state;      /* out, one per sequence */
  void *total_log_g;          /* optional out [sequences, heads_kv] contiguous, log_g's type */
  const int64_t *cu_seqlens;
  const int64_t *rope_offset;
  void *workspace;            /* plan_info.workspace_summary bytes */
  uint64_t workspace_bytes;
  void *stream;
} powerattn_summary_args;

POWERATTN_API powerattn_status powerattn_summary(const powerattn_plan *plan, const powerattn_summary_args *args);

/* The reverse: gradient of each sequence's initial state when its final state gets no gradient,
 *   dS = sum_i exp(G_i) scale^p phi(q_i) (d_y_i / row_norm_i)^T,  dz likewise. row_norm and y must be those
 * of the forward call with the true initial state. */
typedef struct powerattn_summary_reverse_args {
  uint32_t struct_size; /* sizeof(powerattn_summary_reverse_args) */
  uint32_t reserved;    /* 0 */
  powerattn_tensor q;
  powerattn_tensor log_g;     /* optional */
  powerattn_tensor y;         /* required when normalised */
  powerattn_tensor row_norm;  /* required when normalised */
  powerattn_tensor d_y;
  powerattn_state d_state;    /* out, one per sequence */
  void *total_log_g;          /* optional out [sequences, heads_kv] */
  const int64_t *cu_seqlens;
  const int64_t *rope_offset;
  void *workspace;            /* plan_info.workspace_summary bytes */
  uint64_t workspace_bytes;
  void *stream;
} powerattn_summary_reverse_args;

POWERATTN_API powerattn_status powerattn_summary_reverse(const powerattn_plan *plan,
                                                         const powerattn_summary_reverse_args *args);

/* Folds `count` segments in order: S <- 0; for m = 0 .. count-1: S <- exp(L_m) S + S_m, z likewise,
 * L <- L + L_m. The forward fold of preceding segments gives an initial state; the same fold over the
 * following segments' reverse summaries, last first (negative strides), gives a d_final_state. */
typedef struct powerattn_compose_args {
  uint32_t struct_size; /* sizeof(powerattn_compose_args) */
  uint32_t reserved;    /* 0 */
  int64_t count;              /* segments, >= 0; 0 gives zeros */
  powerattn_state segments;   /* segment 0 of [count, sequences, ...] */
  int64_t s_stride_segment;   /* elements; may be negative */
  int64_t z_stride_segment;
  const void *log_g;          /* optional: L of segment 0, [count, sequences, heads_kv], log_g's type */
  int64_t log_g_stride_segment;
  int64_t log_g_stride_n;
  int64_t log_g_stride_h;
  powerattn_state out;        /* out */
  void *out_log_g;            /* optional out [sequences, heads_kv] contiguous */
  void *stream;
} powerattn_compose_args;

POWERATTN_API powerattn_status powerattn_state_compose(const powerattn_plan *plan,
                                                       const powerattn_compose_args *args);

/* ---- States: size, order, conversion, saving -------------------------------------------------------- */

/* D = C(head_dim + degree - 1, degree). UNSUPPORTED when it does not fit in int64_t. */
POWERATTN_API powerattn_status powerattn_state_rows(int64_t head_dim, int32_t degree, int64_t *rows);

/* Bytes of S and z of `count` states (sequences x kv heads x layers): count * D * (value_dim + 1) * size.
 * Needs no plan, so sizes that fit nowhere can be printed. UNSUPPORTED when it does not fit in uint64_t. */
POWERATTN_API powerattn_status powerattn_state_bytes(int64_t head_dim, int64_t value_dim, int32_t degree,
                                                     int32_t state_dtype, int64_t count, uint64_t *bytes);

/* Row `row` of the canonical order: its `degree` indices, ascending, and its weight
 * sqrt(degree! / prod(multiplicity!)), so that phi(x)[row] = weight * prod_m x[indices[m]]. */
POWERATTN_API powerattn_status powerattn_state_monomial(int64_t head_dim, int32_t degree, int64_t row,
                                                        int32_t *indices, double *weight);

/* Copies states between pools, dtypes, strides and slots (fork, rollback, float32 <-> bfloat16). */
typedef struct powerattn_convert_args {
  uint32_t struct_size; /* sizeof(powerattn_convert_args) */
  int32_t src_dtype;          /* FLOAT32, FLOAT64 (CPU), BFLOAT16; 0 = the plan's state_dtype */
  int32_t dst_dtype;
  int32_t reserved;           /* 0 */
  powerattn_state src;
  powerattn_state dst;        /* must not overlap src */
  int64_t count;              /* states to copy */
  const int64_t *src_slots;   /* optional [count]; negative = skip */
  const int64_t *dst_slots;   /* optional [count]; negative = skip */
  int64_t src_num_slots;      /* slots in each pool */
  int64_t dst_num_slots;
  void *stream;
} powerattn_convert_args;

POWERATTN_API powerattn_status powerattn_state_convert(const powerattn_plan *plan,
                                                       const powerattn_convert_args *args);

/* A packed state is a versioned, self-describing, little-endian block of HOST memory: a 64-byte header
 * (magic "PWRATTN", format version, dtype, degree, head_dim, value_dim, heads_kv, count), then for each state
 * and kv head z [D] and S [D, value_dim] in canonical order. Saved on one device or machine, it continues on
 * another. On a CUDA plan pack and unpack wait for the stream; they are the only calls that do. */
typedef struct powerattn_pack_args {
  uint32_t struct_size; /* sizeof(powerattn_pack_args) */
  int32_t dtype;              /* pack: of the packed numbers, 0 = state_dtype. unpack: ignored */
  powerattn_state state;      /* pack: in. unpack: out, state_dtype, converted if need be */
  int64_t count;              /* states */
  void *packed;               /* host memory; read by unpack */
  uint64_t packed_bytes;
  void *stream;
} powerattn_pack_args;

POWERATTN_API powerattn_status powerattn_state_pack_size(const powerattn_plan *plan, int32_t dtype, int64_t count,
                                                         uint64_t *bytes);
POWERATTN_API powerattn_status powerattn_state_pack(const powerattn_plan *plan, const powerattn_pack_args *args);

/* Refuses a block of another version, degree, head_dim, value_dim, heads_kv or count, naming the difference,
 * before anything is written. */
POWERATTN_API powerattn_status powerattn_state_unpack(const powerattn_plan *plan, const powerattn_pack_args *args);

/* ---- Library ---------------------------------------------------------------------------------------- */

/* major * 10000 + minor * 100 + patch of the library in use. */
POWERATTN_API uint32_t powerattn_version(void);

/* Devices of a type that can be used here: 1 for the CPU; 0, and POWERATTN_OK, where CUDA has none. */
POWERATTN_API powerattn_status powerattn_device_count(int32_t device_type, int32_t *count);

/* Static text such as "invalid argument"; "unknown status" for other numbers. Never NULL. */
POWERATTN_API const char *powerattn_status_string(powerattn_status status);

/* The message of the calling thread's last failed call, "" if none failed; valid until its next call. */
POWERATTN_API const char *powerattn_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* POWER_ATTENTION_H_ */
