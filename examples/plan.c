/* SPDX-License-Identifier: Apache-2.0
 * What a power costs, and what the planner makes of it, before anything is allocated:
 *
 *   plan [HEAD_DIM [SEQ_LEN [LAYERS [HEADS]]]]        default: 64 16384 12 12
 *
 * The first table has the states of a whole model with 2-byte elements; then each even power is planned for one
 * layer in float32, in the form that the cost model chooses, and in the chunked form, which needs the states to
 * fit.
 */
#include <power_attention.h>
#include <stdio.h>
#include <stdlib.h>

/* "39 MB": decimal units, two or three digits. */
static const char *human(uint64_t bytes, char text[32]) {
  static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB", "PB", "EB"};
  double value = (double)bytes;
  int unit = 0;
  while (value >= 999.5 && unit < 6) {
    value /= 1000;
    ++unit;
  }
  snprintf(text, 32, unit > 0 && value < 9.95 ? "%.1f %s" : "%.0f %s", value, units[unit]);
  return text;
}

static void size_of_states(int64_t head_dim, int64_t layers, int64_t heads) {
  printf("states of head_dim %lld, %lld layers x %lld heads, S and z, 2-byte elements\n", (long long)head_dim,
         (long long)layers, (long long)heads);
  for (int32_t degree = 1; degree <= 8; ++degree) {
    int64_t rows = 0;
    uint64_t one = 0, all = 0;
    char a[32], b[32];
    if (powerattn_state_rows(head_dim, degree, &rows) ||
        powerattn_state_bytes(head_dim, head_dim, degree, POWERATTN_BFLOAT16, 1, &one) ||
        powerattn_state_bytes(head_dim, head_dim, degree, POWERATTN_BFLOAT16, layers * heads, &all)) {
      printf("  p = %d: %s\n", degree, powerattn_last_error());
      continue;
    }
    printf("  p = %d: %14lld rows, one state %8s, all %8s\n", degree, (long long)rows, human(one, a),
           human(all, b));
  }
}

static void plan(powerattn_desc desc, const char *what) {
  powerattn_plan *made = NULL;
  printf("\n-- p = %d, %s\n", desc.degree, what);
  if (powerattn_plan_create(&desc, &made)) {
    printf("refused: %s\n", powerattn_last_error());
    return;
  }
  size_t needed = 0;
  if (powerattn_plan_describe(made, NULL, 0, &needed) == POWERATTN_OK) {
    char *text = malloc(needed);
    if (text != NULL && powerattn_plan_describe(made, text, needed, NULL) == POWERATTN_OK) fputs(text, stdout);
    free(text);
  }
  powerattn_plan_destroy(made);
}

static int64_t number(int argc, char **argv, int index, int64_t otherwise) {
  return argc > index ? strtoll(argv[index], NULL, 10) : otherwise;
}

int main(int argc, char **argv) {
  const int64_t head_dim = number(argc, argv, 1, 64), seq_len = number(argc, argv, 2, 16384),
                layers = number(argc, argv, 3, 12), heads = number(argc, argv, 4, 12);
  size_of_states(head_dim, layers, heads);
  for (int32_t degree = 2; degree <= 6; degree += 2) {
    powerattn_desc desc = {
        .struct_size = sizeof desc, .dtype = POWERATTN_FLOAT32, .degree = degree, .batch = 1};
    desc.seq_len = seq_len;
    desc.heads_q = desc.heads_kv = heads;
    desc.head_dim = head_dim;
    plan(desc, "the cost model's choice");
    desc.form = POWERATTN_FORM_CHUNKED;
    plan(desc, "chunked");
  }
  return 0;
}
