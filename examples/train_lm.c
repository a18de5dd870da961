/* SPDX-License-Identifier: Apache-2.0
 *
 * train_lm.c - a small causal language model with power attention, in one C file: trained on the characters of
 * a text, then generating from a state of constant size.
 *
 * Everything that is not attention (embedding, RMS norm, MLP, AdamW) is written out here. Attention comes from
 * libpowerattn through its C header alone, by the three calls that such a program needs:
 *
 *   powerattn_forward    training, and reading a prompt into a state
 *   powerattn_backward   gradients of queries, keys, values and gates
 *   powerattn_step       one token against the state
 *
 * One layer, x being [tokens, DIM]:
 *
 *   a = norm(x)             [q k v] = a Wqkv        log_g = log sigmoid(a Wg + bg)
 *   x <- x + attention(q, k, v, log_g) Wo
 *   m = norm(x)             x <- x + relu(m Wup)^2 Wdown
 *
 * usage: train_lm [--text FILE] [--steps N] [--seconds N] [--prompt TEXT] [--tokens N] [--short]
 * [--check-gradients]
 */
#include <dirent.h>
#include <math.h>
#include <power_attention.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* The model, and what one training step sees. */
enum {
  DIM = 128,
  LAYERS = 2,
  HEADS = 4,
  HEAD_DIM = DIM / HEADS,
  HIDDEN = 4 * DIM,
  DEGREE = 2,
  CONTEXT = 512, /* tokens of a training sequence, and of a piece of a prompt */
  SEQUENCES = 1, /* sequences of one worker */
  WORKERS = 2,   /* threads; each computes the gradient of its own sequences */
  TOKENS = SEQUENCES * CONTEXT
};

static const float kNormEps = 1e-5f;
static const double kAttentionEps = 1e-3; /* added to the denominator; keeps the first rows tame */

static void die(const char *what) {
  fprintf(stderr, "train_lm: %s\n", what);
  exit(1);
}

/* Every call of the library says what was wrong, in words. */
static void check(powerattn_status status) {
  if (status != POWERATTN_OK) die(powerattn_last_error());
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* What this thread has used of a processor: the time of a call on a machine that others use too. */
static double processor_time(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Zeroed, and aligned as the library wants its workspace. */
static void *allocate(size_t bytes) {
  size_t rounded = (bytes + 256) / 256 * 256;
  void *p = aligned_alloc(256, rounded);
  if (!p) die("out of memory");
  memset(p, 0, rounded);
  return p;
}

static float *floats(size_t count) { return allocate(count * sizeof(float)); }

static uint64_t random_state = 42;

static uint64_t random_bits(void) { /* splitmix64 */
  uint64_t x = random_state += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static double uniform(void) { return (double)(random_bits() >> 11) * 0x1p-53; }

static float normal(void) {
  return (float)(sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()));
}

/* ---- Matrices --------------------------------------------------------------------------------------- */

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define FOR_EACH_CPU
#endif

/* out [m, n] (+)= a [m, k] b [k, n], row-major, k a multiple of 4: four rows of b serve four rows of the
 * result. */
FOR_EACH_CPU static void matmul(float *out, const float *a, const float *b, int m, int k, int n, bool add) {
  if (!add) memset(out, 0, (size_t)m * (size_t)n * sizeof(float));
  int i = 0;
  for (; i + 4 <= m; i += 4) {
    float *o0 = out + (size_t)i * n, *o1 = o0 + n, *o2 = o1 + n, *o3 = o2 + n;
    for (int l = 0; l < k; l += 4) {
      const float *x0 = a + (size_t)i * k + l, *x1 = x0 + k, *x2 = x1 + k, *x3 = x2 + k;
      const float *y = b + (size_t)l * n;
#pragma GCC ivdep
      for (int c = 0; c < n; ++c) {
        float y0 = y[c], y1 = y[n + c], y2 = y[2 * n + c], y3 = y[3 * n + c];
        o0[c] += x0[0] * y0 + x0[1] * y1 + x0[2] * y2 + x0[3] * y3;
        o1[c] += x1[0] * y0 + x1[1] * y1 + x1[2] * y2 + x1[3] * y3;
        o2[c] += x2[0] * y0 + x2[1] * y1 + x2[2] * y2 + x2[3] * y3;
        o3[c] += x3[0] * y0 + x3[1] * y1 + x3[2] * y2 + x3[3] * y3;
      }
    }
  }
  for (; i < m; ++i) { /* a single token */
    float *o = out + (size_t)i * n;
    for (int l = 0; l < k; l += 4) {
      const float *x = a + (size_t)i * k + l, *y = b + (size_t)l * n;
#pragma GCC ivdep
      for (int c = 0; c < n; ++c)
        o[c] += x[0] * y[c] + x[1] * y[n + c] + x[2] * y[2 * n + c] + x[3] * y[3 * n + c];
    }
  }
}

static void transpose(float *out, const float *in, int rows, int columns) {
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j += 16)
      for (int r = i; r < rows && r < i + 16; ++r)
        for (int c = j; c < columns && c < j + 16; ++c) out[(size_t)c * rows + r] = in[(size_t)r * columns + c];
}

/* Gradients of out = a w:  d_a = d_out w^T,  d_w += a^T d_out.  `scratch` holds the transposed matrix. */
static void matmul_backward(float *d_a, float *d_w, const float *d_out, const float *a, const float *w, int m,
                            int k, int n, float *scratch) {
  transpose(scratch, w, k, n);
  matmul(d_a, d_out, scratch, m, n, k, false);
  transpose(scratch, a, m, k);
  matmul(d_w, scratch, d_out, k, m, n, true);
}

/* ---- Root-mean-square norm:  y = x r gain,  r = 1 / sqrt(mean(x^2) + eps) ---------------------------- */

static void norm(float *y, float *r, const float *x, const float *gain, int rows) {
  for (int i = 0; i < rows; ++i, x += DIM, y += DIM) {
    float squares = 0;
    for (int c = 0; c < DIM; ++c) squares += x[c] * x[c];
    r[i] = 1 / sqrtf(squares / DIM + kNormEps);
    for (int c = 0; c < DIM; ++c) y[c] = x[c] * r[i] * gain[c];
  }
}

/* d_x += r (gain d_y - x r^2 mean(gain d_y x)),  d_gain += d_y x r */
static void norm_backward(float *d_x, float *d_gain, const float *d_y, const float *x, const float *r,
                          const float *gain, int rows) {
  for (int i = 0; i < rows; ++i, x += DIM, d_x += DIM, d_y += DIM) {
    float mean = 0;
    for (int c = 0; c < DIM; ++c) mean += gain[c] * d_y[c] * x[c] / DIM;
    for (int c = 0; c < DIM; ++c) {
      d_x[c] += r[i] * (gain[c] * d_y[c] - x[c] * r[i] * r[i] * mean);
      d_gain[c] += d_y[c] * x[c] * r[i];
    }
  }
}

/* ---- Parameters ------------------------------------------------------------------------------------- */

typedef struct {
  float *norm1, *qkv, *gate, *gate_bias, *out, *norm2, *up, *down;
} Layer;

/* Named views into one array; gradients and both moments of the optimizer have the same shape. */
typedef struct {
  float *all;
  float *embedding, *final_norm, *head;
  Layer layer[LAYERS];
  struct {
    const char *name;
    float *data;
    int count;
    float init; /* standard deviation; < 0: the constant -init */
    bool decay; /* weight decay: matrices only */
  } tensor[3 + 8 * LAYERS];
  int tensors, count;
} Parameters;

static float *tensor(Parameters *p, const char *name, int rows, int columns, float init, bool decay) {
  float *data = p->all ? p->all + p->count : NULL;
  p->tensor[p->tensors].name = name;
  p->tensor[p->tensors].data = data;
  p->tensor[p->tensors].count = rows * columns;
  p->tensor[p->tensors].init = init;
  p->tensor[p->tensors++].decay = decay;
  p->count += (rows * columns + 63) / 64 * 64;
  return data;
}

static void lay_out(Parameters *p, int vocabulary) {
  const float in = 1 / sqrtf(DIM), residual = in / sqrtf(2 * LAYERS);
  p->tensors = p->count = 0;
  p->embedding = tensor(p, "embedding", vocabulary, DIM, 0.5f, false);
  for (int l = 0; l < LAYERS; ++l) {
    p->layer[l].norm1 = tensor(p, "norm 1", 1, DIM, -1, false);
    p->layer[l].qkv = tensor(p, "query, key, value", DIM, 3 * DIM, in, true);
    p->layer[l].gate = tensor(p, "gate", DIM, HEADS, 0.1f * in, true);
    p->layer[l].gate_bias = tensor(p, "gate bias", 1, HEADS, -5, false); /* forgets 0.7 % a token */
    p->layer[l].out = tensor(p, "output", DIM, DIM, residual, true);
    p->layer[l].norm2 = tensor(p, "norm 2", 1, DIM, -1, false);
    p->layer[l].up = tensor(p, "up", DIM, HIDDEN, in, true);
    p->layer[l].down = tensor(p, "down", HIDDEN, DIM, residual / 2, true);
  }
  p->final_norm = tensor(p, "final norm", 1, DIM, -1, false);
  p->head = tensor(p, "head", DIM, vocabulary, 0.2f * in, true);
}

static Parameters make_parameters(int vocabulary) {
  Parameters p = {0};
  lay_out(&p, vocabulary);
  p.all = floats((size_t)p.count);
  lay_out(&p, vocabulary);
  return p;
}

static void initialise(Parameters *p) {
  for (int i = 0; i < p->tensors; ++i)
    for (int j = 0; j < p->tensor[i].count; ++j)
      p->tensor[i].data[j] = p->tensor[i].init < 0 ? -p->tensor[i].init : p->tensor[i].init * normal();
}

/* ---- Attention, from the library -------------------------------------------------------------------- */

typedef struct {
  powerattn_plan *plan;
  powerattn_plan_info info;
} Plan;

/* sequences x length tokens; `state`: the calls carry a state in and out. */
static Plan make_plan(int sequences, int length, bool state) {
  Plan plan = {.info = {.struct_size = sizeof(powerattn_plan_info)}};
  powerattn_desc desc = {.struct_size = sizeof desc};
  desc.dtype = POWERATTN_FLOAT32;
  desc.degree = DEGREE;
  desc.batch = sequences;
  desc.seq_len = length;
  desc.heads_q = desc.heads_kv = HEADS;
  desc.head_dim = HEAD_DIM;
  desc.eps = kAttentionEps;
  desc.rope_style = POWERATTN_ROPE_HALF;
  desc.num_threads = 1; /* the workers are the threads; one plan serves them all */
  if (state) desc.flags = POWERATTN_USE_STATE;
  check(powerattn_plan_create(&desc, &plan.plan));
  check(powerattn_plan_query(plan.plan, &plan.info));
  return plan;
}

static uint64_t largest(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* [tokens, stride] seen as [sequences, length, HEADS, ...] without a copy. */
static powerattn_tensor view(float *data, int length, int stride, int stride_head) {
  return (powerattn_tensor){data, (int64_t)length * stride, stride, stride_head};
}

/* The states of all layers of one sequence: per layer S [HEADS, D, HEAD_DIM] and z [HEADS, D]. */
typedef struct {
  float *s[LAYERS], *z[LAYERS];
  int64_t rows, position; /* D, and the tokens read so far */
} State;

static State make_state(void) {
  State state = {0};
  check(powerattn_state_rows(HEAD_DIM, DEGREE, &state.rows));
  for (int l = 0; l < LAYERS; ++l) {
    state.s[l] = floats((size_t)(HEADS * state.rows * HEAD_DIM));
    state.z[l] = floats((size_t)(HEADS * state.rows));
  }
  return state;
}

static powerattn_state layer_state(const State *state, int l) {
  int64_t d = state->rows;
  return (powerattn_state){state->s[l], state->z[l], HEADS * d * HEAD_DIM, d * HEAD_DIM, HEADS * d, d};
}

/* ---- The model: forward ----------------------------------------------------------------------------- */

/* What the forward pass of `TOKENS` tokens leaves for the backward pass. */
typedef struct {
  float *x[LAYERS + 1], *middle[LAYERS]; /* the residual stream before attention and before the MLP */
  float *a[LAYERS], *m[LAYERS], *r1[LAYERS], *r2[LAYERS];
  float *qkv[LAYERS], *gate[LAYERS], *log_g[LAYERS], *y[LAYERS], *row_norm[LAYERS];
  float *up[LAYERS], *act[LAYERS];
  float *final, *r_final, *logits;
  void *workspace;
  uint64_t workspace_bytes;
} Activations;

static Activations make_activations(int tokens, int vocabulary, uint64_t workspace_bytes) {
  Activations t = {0};
  size_t n = (size_t)tokens;
  for (int l = 0; l < LAYERS; ++l) {
    t.x[l] = floats(n * DIM), t.middle[l] = floats(n * DIM);
    t.a[l] = floats(n * DIM), t.m[l] = floats(n * DIM), t.r1[l] = floats(n), t.r2[l] = floats(n);
    t.qkv[l] = floats(n * 3 * DIM), t.gate[l] = floats(n * HEADS), t.log_g[l] = floats(n * HEADS);
    t.y[l] = floats(n * DIM), t.row_norm[l] = floats(n * HEADS);
    t.up[l] = floats(n * HIDDEN), t.act[l] = floats(n * HIDDEN);
  }
  t.x[LAYERS] = floats(n * DIM), t.final = floats(n * DIM), t.r_final = floats(n);
  t.logits = floats(n * (size_t)vocabulary);
  t.workspace = allocate(workspace_bytes);
  t.workspace_bytes = workspace_bytes;
  return t;
}

/* y = attention(q, k, v, log_g) of one layer. Without a state: whole sequences. With one: the tokens that
 * follow it; a single token by powerattn_step, more by powerattn_forward. */
static void attention(const Plan *plan, Activations *t, int l, int length, State *state) {
  powerattn_tensor q = view(t->qkv[l], length, 3 * DIM, HEAD_DIM);
  powerattn_tensor k = view(t->qkv[l] + DIM, length, 3 * DIM, HEAD_DIM);
  powerattn_tensor v = view(t->qkv[l] + 2 * DIM, length, 3 * DIM, HEAD_DIM);
  powerattn_tensor log_g = view(t->log_g[l], length, HEADS, 1);
  powerattn_tensor y = view(t->y[l], length, DIM, HEAD_DIM);
  if (state && length == 1) {
    powerattn_step_args args = {.struct_size = sizeof args, .q = q, .k = k, .v = v, .log_g = log_g, .y = y};
    args.state = layer_state(state, l);
    args.num_slots = 1;
    args.rope_offset = &state->position;
    args.workspace = t->workspace;
    args.workspace_bytes = t->workspace_bytes;
    check(powerattn_step(plan->plan, &args));
  } else {
    powerattn_forward_args args = {.struct_size = sizeof args, .q = q, .k = k, .v = v, .log_g = log_g, .y = y};
    args.row_norm = view(t->row_norm[l], length, HEADS, 1);
    if (state) {
      args.initial_state = args.final_state = layer_state(state, l);
      args.rope_offset = &state->position;
    }
    args.workspace = t->workspace;
    args.workspace_bytes = t->workspace_bytes;
    check(powerattn_forward(plan->plan, &args));
  }
}

/* Logits of every token of `sequences` x `length` tokens. */
static void forward(const Parameters *p, const Plan *plan, Activations *t, const int *token, int sequences,
                    int length, int vocabulary, State *state) {
  const int n = sequences * length;
  for (int i = 0; i < n; ++i) memcpy(t->x[0] + i * DIM, p->embedding + token[i] * DIM, DIM * sizeof(float));
  for (int l = 0; l < LAYERS; ++l) {
    const Layer *w = &p->layer[l];
    norm(t->a[l], t->r1[l], t->x[l], w->norm1, n);
    matmul(t->qkv[l], t->a[l], w->qkv, n, DIM, 3 * DIM, false);
    matmul(t->gate[l], t->a[l], w->gate, n, DIM, HEADS, false);
    for (int i = 0; i < n * HEADS; ++i)
      t->log_g[l][i] = -log1pf(expf(-(t->gate[l][i] + w->gate_bias[i % HEADS])));
    attention(plan, t, l, length, state);
    memcpy(t->middle[l], t->x[l], (size_t)n * DIM * sizeof(float));
    matmul(t->middle[l], t->y[l], w->out, n, DIM, DIM, true);
    norm(t->m[l], t->r2[l], t->middle[l], w->norm2, n);
    matmul(t->up[l], t->m[l], w->up, n, DIM, HIDDEN, false);
    for (int i = 0; i < n * HIDDEN; ++i) t->act[l][i] = t->up[l][i] > 0 ? t->up[l][i] * t->up[l][i] : 0;
    memcpy(t->x[l + 1], t->middle[l], (size_t)n * DIM * sizeof(float));
    matmul(t->x[l + 1], t->act[l], w->down, n, HIDDEN, DIM, true);
  }
  norm(t->final, t->r_final, t->x[LAYERS], p->final_norm, n);
  matmul(t->logits, t->final, p->head, n, DIM, vocabulary, false);
  if (state) state->position += length;
}

/* Mean of -log softmax(logits)[target], in nats; the logits become their own gradient. */
static double cross_entropy(float *logits, const int *target, int n, int vocabulary) {
  double loss = 0;
  for (int i = 0; i < n; ++i, logits += vocabulary) {
    float top = logits[0];
    for (int c = 1; c < vocabulary; ++c) top = logits[c] > top ? logits[c] : top;
    double sum = 0;
    float at_target = logits[target[i]];
    for (int c = 0; c < vocabulary; ++c) sum += logits[c] = expf(logits[c] - top);
    loss += log(sum) + top - at_target;
    for (int c = 0; c < vocabulary; ++c) logits[c] /= (float)sum * (float)n;
    logits[target[i]] -= 1 / (float)n;
  }
  return loss / n;
}

/* ---- The model: backward ---------------------------------------------------------------------------- */

typedef struct {
  float *x, *wide, *narrow, *qkv, *log_g, *scratch;
} Gradients;

static Gradients make_gradients(int tokens, int vocabulary) {
  size_t n = (size_t)tokens, widest = (size_t)(HIDDEN > vocabulary ? HIDDEN : vocabulary);
  size_t matrix = (n > DIM ? n : DIM) * widest;
  return (Gradients){floats(n * DIM),     floats(n * HIDDEN), floats(n * DIM),
                     floats(n * 3 * DIM), floats(n * HEADS),  floats(matrix)};
}

/* Adds to d (laid out as the parameters) the gradient of the loss whose gradient of the logits is in t->logits.
 */
static void backward(const Parameters *p, Parameters *d, const Plan *plan, Activations *t, Gradients *g,
                     const int *token, int sequences, int length, int vocabulary) {
  const int n = sequences * length;
  matmul_backward(g->narrow, d->head, t->logits, t->final, p->head, n, DIM, vocabulary, g->scratch);
  memset(g->x, 0, (size_t)n * DIM * sizeof(float));
  norm_backward(g->x, d->final_norm, g->narrow, t->x[LAYERS], t->r_final, p->final_norm, n);
  for (int l = LAYERS - 1; l >= 0; --l) {
    const Layer *w = &p->layer[l];
    Layer *dw = &d->layer[l];
    /* The MLP; g->x is the gradient of the residual stream and goes through every addition unchanged. */
    matmul_backward(g->wide, dw->down, g->x, t->act[l], w->down, n, HIDDEN, DIM, g->scratch);
    for (int i = 0; i < n * HIDDEN; ++i) g->wide[i] *= t->up[l][i] > 0 ? 2 * t->up[l][i] : 0;
    matmul_backward(g->narrow, dw->up, g->wide, t->m[l], w->up, n, DIM, HIDDEN, g->scratch);
    norm_backward(g->x, dw->norm2, g->narrow, t->middle[l], t->r2[l], w->norm2, n);
    /* Attention. */
    matmul_backward(g->narrow, dw->out, g->x, t->y[l], w->out, n, DIM, DIM, g->scratch);
    powerattn_backward_args args = {.struct_size = sizeof args};
    args.q = view(t->qkv[l], length, 3 * DIM, HEAD_DIM);
    args.k = view(t->qkv[l] + DIM, length, 3 * DIM, HEAD_DIM);
    args.v = view(t->qkv[l] + 2 * DIM, length, 3 * DIM, HEAD_DIM);
    args.log_g = view(t->log_g[l], length, HEADS, 1);
    args.y = view(t->y[l], length, DIM, HEAD_DIM);
    args.row_norm = view(t->row_norm[l], length, HEADS, 1);
    args.d_y = view(g->narrow, length, DIM, HEAD_DIM);
    args.d_q = view(g->qkv, length, 3 * DIM, HEAD_DIM);
    args.d_k = view(g->qkv + DIM, length, 3 * DIM, HEAD_DIM);
    args.d_v = view(g->qkv + 2 * DIM, length, 3 * DIM, HEAD_DIM);
    args.d_log_g = view(g->log_g, length, HEADS, 1);
    args.workspace = t->workspace;
    args.workspace_bytes = t->workspace_bytes;
    check(powerattn_backward(plan->plan, &args));
    /* d log sigmoid(u) / du = 1 - sigmoid(u) = 1 - exp(log_g) */
    for (int i = 0; i < n * HEADS; ++i) {
      g->log_g[i] *= -expm1f(t->log_g[l][i]);
      dw->gate_bias[i % HEADS] += g->log_g[i];
    }
    matmul_backward(g->narrow, dw->qkv, g->qkv, t->a[l], w->qkv, n, DIM, 3 * DIM, g->scratch);
    norm_backward(g->x, dw->norm1, g->narrow, t->x[l], t->r1[l], w->norm1, n);
    matmul_backward(g->narrow, dw->gate, g->log_g, t->a[l], w->gate, n, DIM, HEADS, g->scratch);
    norm_backward(g->x, dw->norm1, g->narrow, t->x[l], t->r1[l], w->norm1, n);
  }
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < DIM; ++c) d->embedding[token[i] * DIM + c] += g->x[i * DIM + c];
}

/* ---- Text ------------------------------------------------------------------------------------------- */

typedef struct {
  int *train, *held; /* tokens; every 16th stretch of 2048 characters is held out */
  int trains, helds;
  int vocabulary; /* characters that occur, rounded up to a multiple of 16 for matmul */
  int characters;
  unsigned char of_token[256];
  int to_token[256];
  double unigram_bits; /* of the held-out text under the character frequencies of the training text */
} Text;

static unsigned char *append_file(unsigned char *bytes, size_t *size, const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) {
    fprintf(stderr, "train_lm: cannot read '%s'\n", path);
    exit(1);
  }
  for (size_t got = 1; got;) {
    bytes = realloc(bytes, *size + 65536);
    if (!bytes) die("out of memory");
    *size += got = fread(bytes + *size, 1, 65536, f);
  }
  fclose(f);
  return bytes;
}

/* A file, or all regular files of a folder, in the order of their names. */
static unsigned char *read_text(const char *path, size_t *size) {
  unsigned char *bytes = NULL;
  *size = 0;
  struct dirent **entry;
  int entries = scandir(path, &entry, NULL, alphasort);
  if (entries < 0) return append_file(bytes, size, path);
  for (int i = 0; i < entries; ++i) {
    char name[4096];
    struct stat status;
    snprintf(name, sizeof name, "%s/%s", path, entry[i]->d_name);
    if (lstat(name, &status) == 0 && S_ISREG(status.st_mode)) bytes = append_file(bytes, size, name);
    free(entry[i]);
  }
  free(entry);
  return bytes;
}

static Text load_text(const char *path) {
  size_t size;
  unsigned char *bytes = read_text(path, &size);
  if (size < 64 * CONTEXT) die("the text is too short: at least 32768 characters are needed (--text FILE)");
  Text text = {0};
  size_t count[256] = {0}, in_train[256] = {0};
  for (size_t i = 0; i < size; ++i) ++count[bytes[i]];
  for (int c = 0; c < 256; ++c) {
    text.to_token[c] = -1;
    if (count[c]) {
      text.to_token[c] = text.characters;
      text.of_token[text.characters++] = (unsigned char)c;
    }
  }
  text.vocabulary = (text.characters + 15) / 16 * 16;
  text.train = allocate(size * sizeof(int));
  text.held = allocate(size * sizeof(int));
  for (size_t i = 0; i < size; ++i) {
    bool held = i / 2048 % 16 == 15;
    int *to = held ? &text.held[text.helds++] : &text.train[text.trains++];
    *to = text.to_token[bytes[i]];
    if (!held) ++in_train[bytes[i]];
  }
  for (int i = 0; i < text.helds; ++i) {
    double frequency = (double)(in_train[text.of_token[text.held[i]]] + 1) / (text.trains + text.characters);
    text.unigram_bits -= log2(frequency) / text.helds;
  }
  free(bytes);
  return text;
}

/* A sequence of CONTEXT tokens and its targets, the same shifted by one, from a random or given place. */
static void take(const int *from, int place, int *token, int *target) {
  memcpy(token, from + place, CONTEXT * sizeof(int));
  memcpy(target, from + place + 1, CONTEXT * sizeof(int));
}

/* ---- Training --------------------------------------------------------------------------------------- */

typedef struct {
  const Parameters *p;
  const Plan *plan;
  Parameters d;
  Activations t;
  Gradients g;
  int token[TOKENS], target[TOKENS], vocabulary;
  double loss;
  bool gradient;
} Worker;

static void *work(void *arg) {
  Worker *w = arg;
  forward(w->p, w->plan, &w->t, w->token, SEQUENCES, CONTEXT, w->vocabulary, NULL);
  w->loss = cross_entropy(w->t.logits, w->target, TOKENS, w->vocabulary);
  if (w->gradient) {
    memset(w->d.all, 0, (size_t)w->d.count * sizeof(float));
    backward(w->p, &w->d, w->plan, &w->t, &w->g, w->token, SEQUENCES, CONTEXT, w->vocabulary);
  }
  return NULL;
}

/* All workers at once: the mean loss, and the mean gradient in worker[0].d. */
static double run_workers(Worker *worker, bool gradient) {
  pthread_t thread[WORKERS];
  double loss = 0;
  for (int i = 0; i < WORKERS; ++i) worker[i].gradient = gradient;
  for (int i = 1; i < WORKERS; ++i)
    if (pthread_create(&thread[i], NULL, work, &worker[i])) die("cannot start a thread");
  work(&worker[0]);
  for (int i = 1; i < WORKERS; ++i) pthread_join(thread[i], NULL);
  for (int i = 0; i < WORKERS; ++i) loss += worker[i].loss / WORKERS;
  for (int j = 0; gradient && j < worker[0].d.count; ++j) {
    float sum = worker[0].d.all[j];
    for (int i = 1; i < WORKERS; ++i) sum += worker[i].d.all[j];
    worker[0].d.all[j] = sum / WORKERS;
  }
  return loss;
}

/* AdamW with the gradient clipped to norm 1:
 *   m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - rate (m' / (sqrt(v') + eps) + decay p) */
static void adamw(Parameters *p, const Parameters *d, Parameters *m, Parameters *v, int step, float rate) {
  const float b1 = 0.9f, b2 = 0.98f, decay = 0.1f, eps = 1e-8f;
  double squares = 0;
  for (int j = 0; j < d->count; ++j) squares += (double)d->all[j] * d->all[j];
  const float clip = squares > 1 ? (float)(1 / sqrt(squares)) : 1;
  const float unbias1 = 1 / (1 - powf(b1, (float)step)), unbias2 = 1 / (1 - powf(b2, (float)step));
  for (int i = 0; i < p->tensors; ++i) {
    const size_t start = (size_t)(p->tensor[i].data - p->all), end = start + (size_t)p->tensor[i].count;
    for (size_t j = start; j < end; ++j) {
      float g = clip * d->all[j];
      m->all[j] = b1 * m->all[j] + (1 - b1) * g;
      v->all[j] = b2 * v->all[j] + (1 - b2) * g * g;
      float update = m->all[j] * unbias1 / (sqrtf(v->all[j] * unbias2) + eps);
      p->all[j] -= rate * (update + (p->tensor[i].decay ? decay * p->all[j] : 0));
    }
  }
}

/* Bits per character over the first `batches` batches of the held-out text. */
static double held_out_bits(Worker *worker, const Text *text, int batches) {
  double bits = 0;
  const int places = text->helds - CONTEXT - 1;
  for (int b = 0; b < batches; ++b) {
    for (int s = 0; s < WORKERS * SEQUENCES; ++s) {
      int place = (int)((int64_t)places * (b * WORKERS * SEQUENCES + s) / (batches * WORKERS * SEQUENCES));
      Worker *w = &worker[s / SEQUENCES];
      take(text->held, place, w->token + s % SEQUENCES * CONTEXT, w->target + s % SEQUENCES * CONTEXT);
    }
    bits += run_workers(worker, false) / log(2) / batches;
  }
  return bits;
}

/* Returns the held-out loss in bits per character. */
static double train(Parameters *p, Worker *worker, const Text *text, int steps, double seconds) {
  Parameters m = make_parameters(text->vocabulary), v = make_parameters(text->vocabulary);
  const double begin = now();
  double shown = begin, smooth = 0, weight = 0;
  for (int step = 1; step <= steps; ++step) {
    for (int s = 0; s < WORKERS * SEQUENCES; ++s) {
      int place = (int)(uniform() * (text->trains - CONTEXT - 1));
      Worker *w = &worker[s / SEQUENCES];
      take(text->train, place, w->token + s % SEQUENCES * CONTEXT, w->target + s % SEQUENCES * CONTEXT);
    }
    const double loss = run_workers(worker, true);
    if (!isfinite(loss)) die("the loss is not finite");
    /* Warm up, then half a cosine; on a slow machine the clock, not the count, decides how far we are. */
    double done = fmax((double)step / steps, (now() - begin) / seconds);
    double rate = 4e-3 * fmin(step / 20.0, 1) * (0.05 + 0.95 * (0.5 + 0.5 * cos(3.14159265 * fmin(done, 1))));
    adamw(p, &worker[0].d, &m, &v, step, (float)rate);
    smooth = 0.95 * smooth + 0.05 * loss / log(2);
    weight = 0.95 * weight + 0.05;
    if (step == 1 || done >= 1 || now() - shown > 4) {
      char bar[25] = "........................";
      for (int i = 0; i < 24 && i < done * 24; ++i) bar[i] = '#';
      printf("  [%s] %3.0f %%  step %4d  %5.3f bits/char  %5.0f characters/s\n", bar, 100 * fmin(done, 1), step,
             smooth / weight, step * WORKERS * TOKENS / (now() - begin));
      fflush(stdout);
      shown = now();
    }
    if (done >= 1) break;
  }
  free(m.all);
  free(v.all);
  return held_out_bits(worker, text, 8);
}

/* ---- Generation ------------------------------------------------------------------------------------- */

/* A model that reads and writes one sequence. */
typedef struct {
  const Parameters *p;
  const Text *text;
  Plan piece, one; /* CONTEXT tokens against a state, and one token */
  Activations t;
} Reader;

static Reader make_reader(const Parameters *p, const Text *text) {
  Reader r = {.p = p, .text = text, .piece = make_plan(1, CONTEXT, true), .one = make_plan(1, 1, true)};
  r.t = make_activations(CONTEXT, text->vocabulary,
                         largest(r.piece.info.workspace_forward, r.one.info.workspace_step));
  return r;
}

/* Reads tokens into the state, whole pieces by powerattn_forward and the rest by powerattn_step; returns the
 * logits of the last one. */
static float *read_tokens(Reader *r, State *state, const int *token, int count) {
  int last = 0;
  for (int i = 0; i < count;) {
    int length = count - i >= CONTEXT ? CONTEXT : 1;
    forward(r->p, length == 1 ? &r->one : &r->piece, &r->t, token + i, 1, length, r->text->vocabulary, state);
    i += length;
    last = length - 1;
  }
  return r->t.logits + last * r->text->vocabulary;
}

static int sample(const float *logits, int characters, double temperature) {
  double p[256], sum = 0;
  float top = logits[0];
  for (int c = 1; c < characters; ++c) top = logits[c] > top ? logits[c] : top;
  for (int c = 0; c < characters; ++c) sum += p[c] = exp((logits[c] - top) / temperature);
  double left = uniform() * sum;
  for (int c = 0; c < characters - 1; ++c)
    if ((left -= p[c]) < 0) return c;
  return characters - 1;
}

static void generate(Reader *r, const char *prompt, int count) {
  State state = make_state();
  float *logits = NULL;
  printf("\n> %s", prompt);
  for (const char *c = prompt; *c; ++c) {
    int token = r->text->to_token[(unsigned char)*c];
    if (token >= 0) logits = read_tokens(r, &state, &token, 1);
  }
  if (!logits) die("no character of the prompt occurs in the text");
  for (int i = 0; i < count; ++i) {
    int token = sample(logits, r->text->characters, 0.6);
    putchar(r->text->of_token[token]);
    fflush(stdout);
    logits = read_tokens(r, &state, &token, 1);
  }
  printf("\n");
}

/* ---- What a token costs at a short and at a long context ---------------------------------------------- */

/* What softmax attention does for one token instead: every cached key and value is read again.
 *   y = sum_j exp(q . k_j / sqrt(d)) v_j / sum_j exp(q . k_j / sqrt(d)),  keys [head][d][context] */
FOR_EACH_CPU static void cached_attention(float *y, const float *q, const float *keys, const float *values,
                                          int context, float *weight) {
  for (int h = 0; h < HEADS; ++h) {
    const float *k = keys + (size_t)h * HEAD_DIM * context, *v = values + (size_t)h * HEAD_DIM * context;
    float top = -INFINITY, sum = 0;
    memset(weight, 0, (size_t)context * sizeof(float));
    for (int block = 0; block < context; block += 512) /* weights of a block stay in the L1 cache */
      for (int c = 0; c < HEAD_DIM; ++c)
        for (int j = block; j < context && j < block + 512; ++j)
          weight[j] += q[h * HEAD_DIM + c] * k[(size_t)c * context + j];
    for (int j = 0; j < context; ++j) top = weight[j] > top ? weight[j] : top;
    for (int j = 0; j < context; ++j) sum += weight[j] = expf((weight[j] - top) / sqrtf(HEAD_DIM));
    for (int c = 0; c < HEAD_DIM; ++c) y[h * HEAD_DIM + c] = 0;
    for (int j = 0; j < context; ++j)
      for (int c = 0; c < HEAD_DIM; ++c) y[h * HEAD_DIM + c] += weight[j] / sum * v[(size_t)j * HEAD_DIM + c];
  }
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *x, int count) {
  qsort(x, (size_t)count, sizeof *x, by_value);
  return x[count / 2];
}

/* Median microseconds that a cache of this length adds to a token, all layers. */
static double cached_microseconds(int context) {
  enum { REPEATS = 15 };
  size_t n = (size_t)context * DIM;
  double us[REPEATS];
  float *keys = floats(n * LAYERS), *values = floats(n * LAYERS), *weight = floats((size_t)context), q[DIM],
        y[DIM];
  for (size_t i = 0; i < n * LAYERS; ++i) keys[i] = values[i] = (float)uniform() - 0.5f;
  for (int c = 0; c < DIM; ++c) q[c] = normal();
  for (int i = 0; i < REPEATS; ++i) {
    double begin = processor_time();
    for (int l = 0; l < LAYERS; ++l)
      cached_attention(y, q, keys + (size_t)l * n, values + (size_t)l * n, context, weight);
    us[i] = 1e6 * (processor_time() - begin);
  }
  free(keys), free(values), free(weight);
  return median(us, REPEATS);
}

static void compare_contexts(Reader *r) {
  enum { SHORT = 1024, LONG = 16384, TIMED = 200 };
  const int context[2] = {SHORT, LONG};
  State state[2] = {make_state(), make_state()};
  int next[2];
  double us[2][TIMED];
  uint64_t state_bytes;
  check(powerattn_state_bytes(HEAD_DIM, HEAD_DIM, DEGREE, POWERATTN_FLOAT32, HEADS * LAYERS, &state_bytes));
  int *prompt = allocate(LONG * sizeof(int));
  for (int i = 0; i < LONG; ++i) prompt[i] = r->text->train[i % r->text->trains];
  for (int c = 0; c < 2; ++c) {
    double begin = processor_time();
    float *logits = read_tokens(r, &state[c], prompt, context[c]);
    next[c] = sample(logits, r->text->characters, 0.6);
    printf("  read a prompt of %5d characters in %6.1f ms\n", context[c], 1e3 * (processor_time() - begin));
  }
  for (int i = 0; i < TIMED; ++i) { /* in turns, so that whatever else the machine does meets both alike */
    for (int c = 0; c < 2; ++c) {
      double begin = processor_time();
      float *logits = read_tokens(r, &state[c], &next[c], 1);
      us[c][i] = 1e6 * (processor_time() - begin);
      next[c] = sample(logits, r->text->characters, 0.6);
    }
  }
  printf("\n  context   time per token     state      a key/value cache instead: size, and softmax over it\n");
  for (int c = 0; c < 2; ++c) {
    double cache = 2.0 * DIM * sizeof(float) * LAYERS * context[c];
    printf("  %7d   %7.0f us     %7.2f MiB   %7.2f MiB   + %.0f us\n", context[c], median(us[c], TIMED),
           (double)state_bytes / (1 << 20), cache / (1 << 20), cached_microseconds(context[c]));
  }
  printf("  a token at context %d takes %.2f times a token at context %d\n", LONG,
         median(us[1], TIMED) / median(us[0], TIMED), SHORT);
  free(prompt);
}

/* ---- Self-checks ------------------------------------------------------------------------------------- */

/* The gradient of every parameter tensor against a five-point finite difference along a direction that is half
 * gradient, half noise; and reading by pieces against reading token by token. */
static bool check_gradients(Parameters *p, Worker *worker, const Text *text) {
  static const double offset[4] = {-2, -1, 1, 2}, weight[4] = {1.0 / 12, -8.0 / 12, 8.0 / 12, -1.0 / 12};
  bool good = true;
  for (int s = 0; s < SEQUENCES; ++s)
    take(text->train, 1000 + 7919 * s, worker->token + s * CONTEXT, worker->target + s * CONTEXT);
  worker->gradient = true;
  work(worker);
  float *gradient = floats((size_t)p->count), *kept = floats((size_t)p->count);
  memcpy(gradient, worker->d.all, (size_t)p->count * sizeof(float));
  memcpy(kept, p->all, (size_t)p->count * sizeof(float));
  worker->gradient = false;
  printf("  %-22s %12s %12s %9s\n", "tensor", "gradient", "difference", "error");
  for (int i = 0; i < p->tensors; ++i) {
    const size_t start = (size_t)(p->tensor[i].data - p->all), n = (size_t)p->tensor[i].count;
    float *direction = floats(n);
    double squares = 0, along = 0, difference = 0, length = 0;
    for (size_t j = 0; j < n; ++j) squares += (double)gradient[start + j] * gradient[start + j];
    for (size_t j = 0; j < n; ++j) {
      direction[j] = (float)(gradient[start + j] / sqrt(squares)) + normal() / sqrtf((float)n);
      length += (double)direction[j] * direction[j];
      along += (double)direction[j] * gradient[start + j];
    }
    const double step = 0.01;
    for (int k = 0; k < 4; ++k) {
      for (size_t j = 0; j < n; ++j)
        p->all[start + j] = kept[start + j] + (float)(offset[k] * step / sqrt(length)) * direction[j];
      work(worker);
      difference += weight[k] * worker->loss / step;
    }
    memcpy(p->all, kept, (size_t)p->count * sizeof(float));
    along /= sqrt(length);
    double error = fabs(along - difference) / sqrt(squares);
    bool ok = error < 0.01;
    good = good && ok;
    printf("  %-22s %12.6f %12.6f %9.5f%s\n", p->tensor[i].name, along, difference, error, ok ? "" : "  WRONG");
    free(direction);
  }
  free(gradient), free(kept);

  Reader r = make_reader(p, text);
  State by_piece = make_state(), by_token = make_state();
  float *logits = floats((size_t)text->vocabulary);
  double largest_error = 0, largest_logit = 0;
  memcpy(logits, read_tokens(&r, &by_piece, text->held, 2 * CONTEXT), (size_t)text->vocabulary * sizeof(float));
  float *one = NULL;
  for (int i = 0; i < 2 * CONTEXT; ++i) one = read_tokens(&r, &by_token, text->held + i, 1);
  for (int c = 0; c < text->vocabulary; ++c) {
    largest_error = fmax(largest_error, fabs(one[c] - logits[c]));
    largest_logit = fmax(largest_logit, fabs(logits[c]));
  }
  bool same = largest_error < 1e-3 * largest_logit;
  printf("  %d tokens in pieces of %d and one by one: logits differ by %.1e of %.1f%s\n", 2 * CONTEXT, CONTEXT,
         largest_error, largest_logit, same ? "" : "  WRONG");
  free(logits);
  return good && same;
}

/* ---- Main ------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
  const char *path = "/usr/share/common-licenses", *prompt = "The licensee may ";
  int steps = 1000, characters = 600;
  double seconds = 110;
  bool checks = false;
  for (int i = 1; i < argc; ++i) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (!strcmp(argv[i], "--short")) {
      steps = 120, characters = 80;
    } else if (!strcmp(argv[i], "--check-gradients")) {
      checks = true;
    } else if (value && !strcmp(argv[i], "--text")) {
      path = value, ++i;
    } else if (value && !strcmp(argv[i], "--prompt")) {
      prompt = value, ++i;
    } else if (value && !strcmp(argv[i], "--steps") && atoi(value) > 0) {
      steps = atoi(value), ++i;
    } else if (value && !strcmp(argv[i], "--seconds") && atof(value) > 0) {
      seconds = atof(value), ++i;
    } else if (value && !strcmp(argv[i], "--tokens") && atoi(value) > 0) {
      characters = atoi(value), ++i;
    } else {
      die("usage: train_lm [--text FILE] [--steps N] [--seconds N] [--prompt TEXT] [--tokens N] [--short] "
          "[--check-gradients]");
    }
  }

  const Text text = load_text(path);
  Parameters p = make_parameters(text.vocabulary);
  initialise(&p);
  Plan plan = make_plan(SEQUENCES, CONTEXT, false);
  static Worker worker[WORKERS];
  for (int i = 0; i < WORKERS; ++i) {
    worker[i].p = &p;
    worker[i].plan = &plan;
    worker[i].vocabulary = text.vocabulary;
    worker[i].d = make_parameters(text.vocabulary);
    worker[i].t = make_activations(TOKENS, text.vocabulary,
                                   largest(plan.info.workspace_forward, plan.info.workspace_backward));
    worker[i].g = make_gradients(TOKENS, text.vocabulary);
  }
  printf("text:  %s, %d characters to learn from, %d held out, %d different ones\n", path, text.trains,
         text.helds, text.characters);
  printf("model: %d parameters, %d layers of width %d, %d heads of %d, degree %d, gated, RoPE\n", p.count,
         LAYERS, DIM, HEADS, HEAD_DIM, DEGREE);
  printf("plan:  %s form, chunks of %lld tokens; a state has %lld rows\n",
         plan.info.form == POWERATTN_FORM_CHUNKED ? "chunked" : "attention", (long long)plan.info.chunk_size,
         (long long)plan.info.state_rows);
  if (checks) {
    bool good = check_gradients(&p, worker, &text);
    printf(good ? "gradients agree with finite differences\n" : "WRONG\n");
    return good ? 0 : 1;
  }

  printf("\ntraining, %d threads; the unigram entropy of the held-out text is %.3f bits/char\n", WORKERS,
         text.unigram_bits);
  const double bits = train(&p, worker, &text, steps, seconds);
  printf("  held out: %.3f bits/char; unigram entropy: %.3f\n", bits, text.unigram_bits);

  printf("\ngenerating, token by token from the state\n");
  Reader reader = make_reader(&p, &text);
  generate(&reader, prompt, characters);
  printf("\nprocessor time per token, one thread\n");
  compare_contexts(&reader);
  if (bits > 0.93 * text.unigram_bits)
    die("the model has not learnt: its loss is not well below the unigram entropy");
  return 0;
}
