/* SPDX-License-Identifier: Apache-2.0
 * What a user's first program does: a plan, a workspace, one forward call. Constant values come back. */
#include <power_attention.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 7, D = 4 };

int main(void) {
  static float q[T * D], k[T * D], v[T * D], y[T * D];
  powerattn_desc desc;
  powerattn_plan *plan = NULL;
  powerattn_plan_info info;
  powerattn_forward_args args;
  powerattn_status status;
  int i;

  for (i = 0; i < T * D; ++i) {
    q[i] = 1.0f + 0.1f * (float)(i % 5);
    k[i] = 1.0f - 0.1f * (float)(i % 3);
    v[i] = 2.0f;
  }
  memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc;
  desc.dtype = POWERATTN_FLOAT32;
  desc.degree = 2;
  desc.batch = 1;
  desc.seq_len = T;
  desc.heads_q = desc.heads_kv = 1;
  desc.head_dim = D;
  status = powerattn_plan_create(&desc, &plan);
  if (status == POWERATTN_OK) {
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    status = powerattn_plan_query(plan, &info);
  }
  if (status == POWERATTN_OK) {
    const powerattn_tensor shape = {NULL, T * D, D, D};
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.q = args.k = args.v = args.y = shape;
    args.q.data = q;
    args.k.data = k;
    args.v.data = v;
    args.y.data = y;
    args.workspace_bytes = (info.workspace_forward + 255) / 256 * 256;
    args.workspace = args.workspace_bytes > 0 ? aligned_alloc(256, args.workspace_bytes) : NULL;
    status = powerattn_forward(plan, &args);
    free(args.workspace);
  }
  powerattn_plan_destroy(plan);
  if (status != POWERATTN_OK) {
    fprintf(stderr, "%s: %s\n", powerattn_status_string(status), powerattn_last_error());
    return 1;
  }
  for (i = 0; i < T * D; ++i) {
    if (y[i] < 1.9999f || y[i] > 2.0001f) {
      fprintf(stderr, "y[%d] is %g, not 2\n", i, (double)y[i]);
      return 1;
    }
  }
  printf("libpowerattn %u: ok\n", (unsigned)powerattn_version());
  return 0;
}
