/* SPDX-License-Identifier: Apache-2.0
 *
 * The C99 contract: compiled with -std=c99 -pedantic -Werror. It names every function with its exact type, and
 * freezes every constant, struct size and field offset of the 64-bit ABI. A line that fails to compile here is
 * a break for every binary in use: add fields at the end of a struct, never move one.
 */
#include "power_attention.h"

#include <stdio.h>
#include <string.h>

/* An array of negative size where the condition is false. */
#define FROZEN(name, condition) typedef char frozen_##name[(condition) ? 1 : -1]
#define CONSTANT(name, value) FROZEN(name, (name) == (value))
#define SIZE(type, bytes) FROZEN(type, sizeof(type) == (bytes))
#define AT(type, field, offset) FROZEN(type##_##field, offsetof(type, field) == (offset))

CONSTANT(POWERATTN_OK, 0);
CONSTANT(POWERATTN_ERROR_INVALID_ARGUMENT, 1);
CONSTANT(POWERATTN_ERROR_UNSUPPORTED, 2);
CONSTANT(POWERATTN_ERROR_STATE_TOO_LARGE, 3);
CONSTANT(POWERATTN_ERROR_OUT_OF_MEMORY, 4);
CONSTANT(POWERATTN_ERROR_WORKSPACE_TOO_SMALL, 5);
CONSTANT(POWERATTN_ERROR_NO_DEVICE, 6);
CONSTANT(POWERATTN_ERROR_DEVICE, 7);
CONSTANT(POWERATTN_ERROR_VERSION, 8);
CONSTANT(POWERATTN_ERROR_INTERNAL, 9);
CONSTANT(POWERATTN_FLOAT32, 1);
CONSTANT(POWERATTN_FLOAT16, 2);
CONSTANT(POWERATTN_BFLOAT16, 3);
CONSTANT(POWERATTN_FLOAT64, 4);
CONSTANT(POWERATTN_CPU, 0);
CONSTANT(POWERATTN_CUDA, 1);
CONSTANT(POWERATTN_FORM_AUTO, 0);
CONSTANT(POWERATTN_FORM_ATTENTION, 1);
CONSTANT(POWERATTN_FORM_CHUNKED, 2);
CONSTANT(POWERATTN_ROPE_NONE, 0);
CONSTANT(POWERATTN_ROPE_HALF, 1);
CONSTANT(POWERATTN_ROPE_INTERLEAVED, 2);
CONSTANT(POWERATTN_UNNORMALIZED, 1);
CONSTANT(POWERATTN_CUSTOM_SCALE, 2);
CONSTANT(POWERATTN_USE_STATE, 4);
CONSTANT(POWERATTN_ALLOW_TF32, 8);


SIZE(powerattn_desc, 184);
AT(powerattn_desc, struct_size, 0);
AT(powerattn_desc, device_type, 4);
AT(powerattn_desc, device_index, 8);
AT(powerattn_desc, dtype, 12);
AT(powerattn_desc, state_dtype, 16);
AT(powerattn_desc, degree, 20);
AT(powerattn_desc, flags, 24);
AT(powerattn_desc, form, 28);
AT(powerattn_desc, batch, 32);
AT(powerattn_desc, seq_len, 40);
AT(powerattn_desc, heads_q, 48);
AT(powerattn_desc, heads_kv, 56);
AT(powerattn_desc, head_dim, 64);
AT(powerattn_desc, value_dim, 72);
AT(powerattn_desc, sequences, 80);
AT(powerattn_desc, max_seq_len, 88);
AT(powerattn_desc, chunk_size, 96);
AT(powerattn_desc, scale, 104);
AT(powerattn_desc, eps, 112);
AT(powerattn_desc, rope_base, 120);
AT(powerattn_desc, rope_dim, 128);
AT(powerattn_desc, rope_style, 136);
AT(powerattn_desc, num_threads, 140);
AT(powerattn_desc, state_limit, 144);
AT(powerattn_desc, reserved, 152);

SIZE(powerattn_plan_info, 112);
AT(powerattn_plan_info, struct_size, 0);
AT(powerattn_plan_info, form, 4);
AT(powerattn_plan_info, chunk_size, 8);
AT(powerattn_plan_info, sequences, 16);
AT(powerattn_plan_info, state_rows, 24);
AT(powerattn_plan_info, state_bytes, 32);
AT(powerattn_plan_info, workspace_forward, 40);
AT(powerattn_plan_info, workspace_backward, 48);
AT(powerattn_plan_info, workspace_backward_saved, 56);
AT(powerattn_plan_info, workspace_step, 64);
AT(powerattn_plan_info, workspace_summary, 72);
AT(powerattn_plan_info, saved_bytes, 80);
AT(powerattn_plan_info, scale, 88);
AT(powerattn_plan_info, predicted_forward_s, 96);
AT(powerattn_plan_info, predicted_backward_s, 104);

SIZE(powerattn_tensor, 32);
AT(powerattn_tensor, data, 0);
AT(powerattn_tensor, stride_b, 8);
AT(powerattn_tensor, stride_t, 16);
AT(powerattn_tensor, stride_h, 24);

SIZE(powerattn_state, 48);
AT(powerattn_state, s, 0);
AT(powerattn_state, z, 8);
AT(powerattn_state, s_stride_n, 16);
AT(powerattn_state, s_stride_h, 24);
AT(powerattn_state, z_stride_n, 32);
AT(powerattn_state, z_stride_h, 40);

SIZE(powerattn_forward_args, 352);
AT(powerattn_forward_args, struct_size, 0);
AT(powerattn_forward_args, reserved, 4);
AT(powerattn_forward_args, q, 8);
AT(powerattn_forward_args, k, 40);
AT(powerattn_forward_args, v, 72);
AT(powerattn_forward_args, log_g, 104);
AT(powerattn_forward_args, y, 136);
AT(powerattn_forward_args, row_norm, 168);
AT(powerattn_forward_args, initial_state, 200);
AT(powerattn_forward_args, final_state, 248);
AT(powerattn_forward_args, cu_seqlens, 296);
AT(powerattn_forward_args, rope_offset, 304);
AT(powerattn_forward_args, saved, 312);
AT(powerattn_forward_args, saved_bytes, 320);
AT(powerattn_forward_args, workspace, 328);
AT(powerattn_forward_args, workspace_bytes, 336);
AT(powerattn_forward_args, stream, 344);

SIZE(powerattn_backward_args, 560);
AT(powerattn_backward_args, struct_size, 0);
AT(powerattn_backward_args, reserved, 4);
AT(powerattn_backward_args, q, 8);
AT(powerattn_backward_args, k, 40);
AT(powerattn_backward_args, v, 72);
AT(powerattn_backward_args, log_g, 104);
AT(powerattn_backward_args, y, 136);
AT(powerattn_backward_args, row_norm, 168);
AT(powerattn_backward_args, d_y, 200);
AT(powerattn_backward_args, d_q, 232);
AT(powerattn_backward_args, d_k, 264);
AT(powerattn_backward_args, d_v, 296);
AT(powerattn_backward_args, d_log_g, 328);
AT(powerattn_backward_args, initial_state, 360);
AT(powerattn_backward_args, d_final_state, 408);
AT(powerattn_backward_args, d_initial_state, 456);
AT(powerattn_backward_args, cu_seqlens, 504);
AT(powerattn_backward_args, rope_offset, 512);
AT(powerattn_backward_args, saved, 520);
AT(powerattn_backward_args, saved_bytes, 528);
AT(powerattn_backward_args, workspace, 536);
AT(powerattn_backward_args, workspace_bytes, 544);
AT(powerattn_backward_args, stream, 552);

SIZE(powerattn_step_args, 272);
AT(powerattn_step_args, struct_size, 0);
AT(powerattn_step_args, reserved, 4);
AT(powerattn_step_args, q, 8);
AT(powerattn_step_args, k, 40);
AT(powerattn_step_args, v, 72);
AT(powerattn_step_args, log_g, 104);
AT(powerattn_step_args, y, 136);
AT(powerattn_step_args, state, 168);
AT(powerattn_step_args, num_slots, 216);
AT(powerattn_step_args, slots, 224);
AT(powerattn_step_args, lengths, 232);
AT(powerattn_step_args, rope_offset, 240);
AT(powerattn_step_args, workspace, 248);
AT(powerattn_step_args, workspace_bytes, 256);
AT(powerattn_step_args, stream, 264);

SIZE(powerattn_summary_args, 200);
AT(powerattn_summary_args, struct_size, 0);
AT(powerattn_summary_args, reserved, 4);
AT(powerattn_summary_args, k, 8);
AT(powerattn_summary_args, v, 40);
AT(powerattn_summary_args, log_g, 72);
AT(powerattn_summary_args, state, 104);
AT(powerattn_summary_args, total_log_g, 152);
AT(powerattn_summary_args, cu_seqlens, 160);
AT(powerattn_summary_args, rope_offset, 168);
AT(powerattn_summary_args, workspace, 176);
AT(powerattn_summary_args, workspace_bytes, 184);
AT(powerattn_summary_args, stream, 192);

SIZE(powerattn_summary_reverse_args, 264);
AT(powerattn_summary_reverse_args, struct_size, 0);
AT(powerattn_summary_reverse_args, reserved, 4);
AT(powerattn_summary_reverse_args, q, 8);
AT(powerattn_summary_reverse_args, log_g, 40);
AT(powerattn_summary_reverse_args, y, 72);
AT(powerattn_summary_reverse_args, row_norm, 104);
AT(powerattn_summary_reverse_args, d_y, 136);
AT(powerattn_summary_reverse_args, d_state, 168);
AT(powerattn_summary_reverse_args, total_log_g, 216);
AT(powerattn_summary_reverse_args, cu_seqlens, 224);
AT(powerattn_summary_reverse_args, rope_offset, 232);
AT(powerattn_summary_reverse_args, workspace, 240);
AT(powerattn_summary_reverse_args, workspace_bytes, 248);
AT(powerattn_summary_reverse_args, stream, 256);

SIZE(powerattn_compose_args, 176);
AT(powerattn_compose_args, struct_size, 0);
AT(powerattn_compose_args, reserved, 4);
AT(powerattn_compose_args, count, 8);
AT(powerattn_compose_args, segments, 16);
AT(powerattn_compose_args, s_stride_segment, 64);
AT(powerattn_compose_args, z_stride_segment, 72);
AT(powerattn_compose_args, log_g, 80);
AT(powerattn_compose_args, log_g_stride_segment, 88);
AT(powerattn_compose_args, log_g_stride_n, 96);
AT(powerattn_compose_args, log_g_stride_h, 104);
AT(powerattn_compose_args, out, 112);
AT(powerattn_compose_args, out_log_g, 160);
AT(powerattn_compose_args, stream, 168);

SIZE(powerattn_convert_args, 160);
AT(powerattn_convert_args, struct_size, 0);
AT(powerattn_convert_args, src_dtype, 4);
AT(powerattn_convert_args, dst_dtype, 8);
AT(powerattn_convert_args, reserved, 12);
AT(powerattn_convert_args, src, 16);
AT(powerattn_convert_args, dst, 64);
AT(powerattn_convert_args, count, 112);
AT(powerattn_convert_args, src_slots, 120);
AT(powerattn_convert_args, dst_slots, 128);
AT(powerattn_convert_args, src_num_slots, 136);
AT(powerattn_convert_args, dst_num_slots, 144);
AT(powerattn_convert_args, stream, 152);

SIZE(powerattn_pack_args, 88);
AT(powerattn_pack_args, struct_size, 0);
AT(powerattn_pack_args, dtype, 4);
AT(powerattn_pack_args, state, 8);
AT(powerattn_pack_args, count, 56);
AT(powerattn_pack_args, packed, 64);
AT(powerattn_pack_args, packed_bytes, 72);
AT(powerattn_pack_args, stream, 80);

/* Every function, through a pointer of its documented type. */
struct functions {
  powerattn_status (*plan_create)(const powerattn_desc *desc, powerattn_plan **plan);
  void (*plan_destroy)(powerattn_plan *plan);
  powerattn_status (*plan_query)(const powerattn_plan *plan, powerattn_plan_info *info);
  powerattn_status (*plan_describe)(const powerattn_plan *plan, char *text, size_t capacity, size_t *needed);
  powerattn_status (*forward)(const powerattn_plan *plan, const powerattn_forward_args *args);
  powerattn_status (*backward)(const powerattn_plan *plan, const powerattn_backward_args *args);
  powerattn_status (*step)(const powerattn_plan *plan, const powerattn_step_args *args);
  powerattn_status (*summary)(const powerattn_plan *plan, const powerattn_summary_args *args);
  powerattn_status (*summary_reverse)(const powerattn_plan *plan, const powerattn_summary_reverse_args *args);
  powerattn_status (*state_compose)(const powerattn_plan *plan, const powerattn_compose_args *args);
  powerattn_status (*state_rows)(int64_t head_dim, int32_t degree, int64_t *rows);
  powerattn_status (*state_bytes)(int64_t head_dim, int64_t value_dim, int32_t degree, int32_t state_dtype, int64_t count, uint64_t *bytes);
  powerattn_status (*state_monomial)(int64_t head_dim, int32_t degree, int64_t row, int32_t *indices, double *weight);
  powerattn_status (*state_convert)(const powerattn_plan *plan, const powerattn_convert_args *args);
  powerattn_status (*state_pack_size)(const powerattn_plan *plan, int32_t dtype, int64_t count, uint64_t *bytes);
  powerattn_status (*state_pack)(const powerattn_plan *plan, const powerattn_pack_args *args);
  powerattn_status (*state_unpack)(const powerattn_plan *plan, const powerattn_pack_args *args);
  uint32_t (*version)(void);
  powerattn_status (*device_count)(int32_t device_type, int32_t *count);
  const char *(*status_string)(powerattn_status status);
  const char *(*last_error)(void);
};

static const struct functions functions = {
    powerattn_plan_create,
    powerattn_plan_destroy,
    powerattn_plan_query,
    powerattn_plan_describe,
    powerattn_forward,
    powerattn_backward,
    powerattn_step,
    powerattn_summary,
    powerattn_summary_reverse,
    powerattn_state_compose,
    powerattn_state_rows,
    powerattn_state_bytes,
    powerattn_state_monomial,
    powerattn_state_convert,
    powerattn_state_pack_size,
    powerattn_state_pack,
    powerattn_state_unpack,
    powerattn_version,
    powerattn_device_count,
    powerattn_status_string,
    powerattn_last_error,
};

#define EXPECT(condition)                                              \
  do {                                                                 \
    if (!(condition)) {                                                \
      printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);   \
      failures = 1;                                                    \
    }                                                                  \
  } while (0)

int main(void) {
  int failures = 0;
  size_t i;
  powerattn_desc desc;
  powerattn_plan *plan = NULL;
  unsigned char bytes[sizeof functions];

  /* Every entry is linked to something, and no two to the same thing. */
  memcpy(bytes, &functions, sizeof bytes);
  for (i = 0; i < sizeof functions; i += sizeof(void *)) {
    static const unsigned char none[sizeof(void *)];
    size_t j;
    EXPECT(memcmp(bytes + i, none, sizeof none) != 0);
    for (j = 0; j < i; j += sizeof(void *)) EXPECT(memcmp(bytes + i, bytes + j, sizeof(void *)) != 0);
  }

  EXPECT(functions.version() ==
         POWERATTN_VERSION_MAJOR * 10000 + POWERATTN_VERSION_MINOR * 100 + POWERATTN_VERSION_PATCH);

  memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc;
  desc.dtype = POWERATTN_FLOAT32;
  desc.degree = 2;
  desc.batch = 1;
  desc.seq_len = 3;
  desc.heads_q = desc.heads_kv = 1;
  desc.head_dim = 4;
  EXPECT(functions.plan_create(&desc, &plan) == POWERATTN_OK);
  EXPECT(plan != NULL);
  EXPECT(strcmp(functions.last_error(), "") == 0);
  functions.plan_destroy(plan);
  EXPECT(functions.plan_create(NULL, &plan) == POWERATTN_ERROR_INVALID_ARGUMENT);
  EXPECT(strcmp(functions.last_error(), "desc is NULL") == 0);
  EXPECT(strcmp(functions.status_string(POWERATTN_ERROR_INVALID_ARGUMENT), "invalid argument") == 0);
  return failures;
}
