// SPDX-License-Identifier: Apache-2.0
// Thin wrapper over power_attention.h. Addresses and streams are integers, a failed status is an exception
// that carries the library's message, and the GIL is released while the library runs (-threads).
//
// The description, the plan and the queries are wrapped as they stand in the header. The execute calls take
// their argument structs flattened into integers: filling a struct member by member through Python would cost
// more than the call. A tensor is (address, stride_b, stride_t, stride_h), 0 being an absent tensor; a state is
// (s, z, s_stride_n, s_stride_h, z_stride_n, z_stride_h).
%module(package="power_attention") _power_attention

%{
#include "power_attention.h"
#include <string.h>
#include <stdlib.h>

// Sets the exception that power_attention._errors makes of a status. Called with the GIL held, on the thread
// of the failed call, whose message is still there.
static void powerattn_py_raise(powerattn_status status) {
  PyObject *module = PyImport_ImportModule("power_attention._errors");
  if (!module) return;
  PyObject *error = PyObject_CallMethod(module, "from_status", "iss", (int)status,
                                        powerattn_status_string(status), powerattn_last_error());
  Py_DECREF(module);
  if (!error) return;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
}
%}

%include <stdint.i>

// ---- Addresses as integers -----------------------------------------------------------------------------
%typemap(in) void * {
  $1 = PyLong_AsVoidPtr($input);
  if (!$1 && PyErr_Occurred()) SWIG_fail;
}
%typemap(out) void * { $result = PyLong_FromVoidPtr($1); }
%apply void * { const void *, int32_t *indices_address };
%typemap(in) const int64_t * {
  $1 = ($1_ltype)PyLong_AsVoidPtr($input);
  if (!$1 && PyErr_Occurred()) SWIG_fail;
}

// ---- Statuses as exceptions ----------------------------------------------------------------------------
%typemap(out) powerattn_status {
  if ($1 != POWERATTN_OK) {
    powerattn_py_raise($1);
    SWIG_fail;
  }
  $result = Py_None;
  Py_INCREF(Py_None);
}

// ---- The header ----------------------------------------------------------------------------------------
#define POWERATTN_API
%rename("%(strip:[powerattn_])s", %$isfunction) "";
%rename("%(strip:[powerattn_])s", %$isclass) "";
%rename("%(strip:[POWERATTN_])s", %$isenumitem) "";
%rename("%(strip:[POWERATTN_])s", %$isconstant) "";

%immutable;  // structs are filled by keyword at construction, below
%nodefaultctor;
%nodefaultdtor;

// Wrapped by hand below, or of no use from Python.
%ignore powerattn_plan_create;
%ignore powerattn_plan_destroy;
%ignore powerattn_plan_query;
%ignore powerattn_plan_describe;
%ignore powerattn_state_rows;
%ignore powerattn_state_bytes;
%ignore powerattn_state_monomial;
%ignore powerattn_state_pack_size;
%ignore powerattn_state_pack;
%ignore powerattn_state_unpack;
%ignore powerattn_state_convert;
%ignore powerattn_state_compose;
%ignore powerattn_device_count;
%ignore powerattn_forward;
%ignore powerattn_backward;
%ignore powerattn_step;
%ignore powerattn_summary;
%ignore powerattn_summary_reverse;
%ignore powerattn_desc;
%ignore powerattn_tensor;
%ignore powerattn_state;
%ignore powerattn_forward_args;
%ignore powerattn_backward_args;
%ignore powerattn_step_args;
%ignore powerattn_summary_args;
%ignore powerattn_summary_reverse_args;
%ignore powerattn_compose_args;
%ignore powerattn_convert_args;
%ignore powerattn_pack_args;
%ignore powerattn_plan;
%ignore powerattn_plan_info::struct_size;
%ignore POWERATTN_VERSION_MAJOR;
%ignore POWERATTN_VERSION_MINOR;
%ignore POWERATTN_VERSION_PATCH;

%extend powerattn_plan_info {
  ~powerattn_plan_info() { free($self); }
}
%newobject plan_query;

%include "power_attention.h"

// Outputs by pointer become return values.
%typemap(in, numinputs=0) int64_t *result (int64_t value) { $1 = &value; }
%typemap(argout) int64_t *result {
  Py_DECREF($result);
  $result = PyLong_FromLongLong(*$1);
}
%typemap(in, numinputs=0) uint64_t *result (uint64_t value) { $1 = &value; }
%typemap(argout) uint64_t *result {
  Py_DECREF($result);
  $result = PyLong_FromUnsignedLongLong(*$1);
}
%typemap(in, numinputs=0) int32_t *result (int32_t value) { $1 = &value; }
%typemap(argout) int32_t *result {
  Py_DECREF($result);
  $result = PyLong_FromLong(*$1);
}
%typemap(in, numinputs=0) double *result (double value) { $1 = &value; }
%typemap(argout) double *result {
  Py_DECREF($result);
  $result = PyFloat_FromDouble(*$1);
}
%typemap(in, numinputs=0) void **result (void *value) { $1 = &value; }
%typemap(argout) void **result {
  Py_DECREF($result);
  $result = PyLong_FromVoidPtr(*$1);
}

%inline %{
// A plan as an integer handle. power_attention._plan.Plan owns it.
static powerattn_status plan_create(int32_t device_type, int32_t device_index, int32_t dtype,
                                    int32_t state_dtype, int32_t degree, int32_t flags, int32_t form,
                                    int64_t batch, int64_t seq_len, int64_t heads_q, int64_t heads_kv,
                                    int64_t head_dim, int64_t value_dim, int64_t sequences,
                                    int64_t max_seq_len, int64_t chunk_size, double scale, double eps,
                                    double rope_base, int64_t rope_dim, int32_t rope_style,
                                    int32_t num_threads, uint64_t state_limit, void **result) {
  powerattn_desc desc;
  powerattn_plan *plan = NULL;
  powerattn_status status;
  memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc;
  desc.device_type = device_type;
  desc.device_index = device_index;
  desc.dtype = dtype;
  desc.state_dtype = state_dtype;
  desc.degree = degree;
  desc.flags = flags;
  desc.form = form;
  desc.batch = batch;
  desc.seq_len = seq_len;
  desc.heads_q = heads_q;
  desc.heads_kv = heads_kv;
  desc.head_dim = head_dim;
  desc.value_dim = value_dim;
  desc.sequences = sequences;
  desc.max_seq_len = max_seq_len;
  desc.chunk_size = chunk_size;
  desc.scale = scale;
  desc.eps = eps;
  desc.rope_base = rope_base;
  desc.rope_dim = rope_dim;
  desc.rope_style = rope_style;
  desc.num_threads = num_threads;
  desc.state_limit = state_limit;
  status = powerattn_plan_create(&desc, &plan);
  *result = plan;
  return status;
}

static void plan_destroy(void *plan) { powerattn_plan_destroy((powerattn_plan *)plan); }
%}

// The info struct is allocated here and freed with its Python object.
%exception plan_query {
  $action
  if (!result) {
    powerattn_py_raise(POWERATTN_ERROR_INVALID_ARGUMENT);
    SWIG_fail;
  }
}
%inline %{
static powerattn_plan_info *plan_query(void *plan) {
  powerattn_plan_info *info = (powerattn_plan_info *)calloc(1, sizeof *info);
  if (!info) return NULL;
  info->struct_size = sizeof *info;
  if (powerattn_plan_query((const powerattn_plan *)plan, info) != POWERATTN_OK) {
    free(info);
    return NULL;
  }
  return info;
}
%}

// Text of a plan: two calls, the first for the size.
%typemap(out) char *plan_describe_text {
  if (!$1) {
    powerattn_py_raise(POWERATTN_ERROR_INVALID_ARGUMENT);
    SWIG_fail;
  }
  $result = PyUnicode_FromString($1);
  free($1);
}
%inline %{
static char *plan_describe_text(void *plan) {
  size_t needed = 0;
  char *text;
  if (powerattn_plan_describe((const powerattn_plan *)plan, NULL, 0, &needed) != POWERATTN_OK) return NULL;
  text = (char *)calloc(needed + 1, 1);
  if (text && powerattn_plan_describe((const powerattn_plan *)plan, text, needed, &needed) != POWERATTN_OK) {
    free(text);
    text = NULL;
  }
  return text;
}

static powerattn_status state_rows(int64_t head_dim, int32_t degree, int64_t *result) {
  return powerattn_state_rows(head_dim, degree, result);
}
static powerattn_status state_bytes(int64_t head_dim, int64_t value_dim, int32_t degree, int32_t state_dtype,
                                    int64_t count, uint64_t *result) {
  return powerattn_state_bytes(head_dim, value_dim, degree, state_dtype, count, result);
}
// `indices_address`: memory for `degree` int32.
static powerattn_status state_monomial(int64_t head_dim, int32_t degree, int64_t row, int32_t *indices_address,
                                       double *result) {
  return powerattn_state_monomial(head_dim, degree, row, indices_address, result);
}
static powerattn_status device_count(int32_t device_type, int32_t *result) {
  return powerattn_device_count(device_type, result);
}
static powerattn_status state_pack_size(void *plan, int32_t dtype, int64_t count, uint64_t *result) {
  return powerattn_state_pack_size((const powerattn_plan *)plan, dtype, count, result);
}
%}

// ---- Execute calls, flattened --------------------------------------------------------------------------
%inline %{
#define PA_TENSOR_PARAMS(n) void *n, int64_t n##_b, int64_t n##_t, int64_t n##_h
#define PA_STATE_PARAMS(n) \
  void *n##_s, void *n##_z, int64_t n##_sn, int64_t n##_sh, int64_t n##_zn, int64_t n##_zh
%}
%{
#define PA_SET_TENSOR(n) \
  args.n.data = n; args.n.stride_b = n##_b; args.n.stride_t = n##_t; args.n.stride_h = n##_h
#define PA_SET_STATE(n)                                                                  \
  args.n.s = n##_s; args.n.z = n##_z; args.n.s_stride_n = n##_sn; args.n.s_stride_h = n##_sh; \
  args.n.z_stride_n = n##_zn; args.n.z_stride_h = n##_zh
#define PA_ARGS(type) type args; memset(&args, 0, sizeof args); args.struct_size = sizeof args
%}

%inline %{
static powerattn_status forward(void *plan, PA_TENSOR_PARAMS(q), PA_TENSOR_PARAMS(k), PA_TENSOR_PARAMS(v),
                                PA_TENSOR_PARAMS(log_g), PA_TENSOR_PARAMS(y), PA_TENSOR_PARAMS(row_norm),
                                PA_STATE_PARAMS(initial_state), PA_STATE_PARAMS(final_state),
                                const int64_t *cu_seqlens, const int64_t *rope_offset, void *saved,
                                uint64_t saved_bytes, void *workspace, uint64_t workspace_bytes,
                                void *stream) {
  PA_ARGS(powerattn_forward_args);
  PA_SET_TENSOR(q);
  PA_SET_TENSOR(k);
  PA_SET_TENSOR(v);
  PA_SET_TENSOR(log_g);
  PA_SET_TENSOR(y);
  PA_SET_TENSOR(row_norm);
  PA_SET_STATE(initial_state);
  PA_SET_STATE(final_state);
  args.cu_seqlens = cu_seqlens;
  args.rope_offset = rope_offset;
  args.saved = saved;
  args.saved_bytes = saved_bytes;
  args.workspace = workspace;
  args.workspace_bytes = workspace_bytes;
  args.stream = stream;
  return powerattn_forward((const powerattn_plan *)plan, &args);
}

static powerattn_status backward(void *plan, PA_TENSOR_PARAMS(q), PA_TENSOR_PARAMS(k), PA_TENSOR_PARAMS(v),
                                 PA_TENSOR_PARAMS(log_g), PA_TENSOR_PARAMS(y), PA_TENSOR_PARAMS(row_norm),
                                 PA_TENSOR_PARAMS(d_y), PA_TENSOR_PARAMS(d_q), PA_TENSOR_PARAMS(d_k),
                                 PA_TENSOR_PARAMS(d_v), PA_TENSOR_PARAMS(d_log_g),
                                 PA_STATE_PARAMS(initial_state), PA_STATE_PARAMS(d_final_state),
                                 PA_STATE_PARAMS(d_initial_state), const int64_t *cu_seqlens,
                                 const int64_t *rope_offset, const void *saved, uint64_t saved_bytes,
                                 void *workspace, uint64_t workspace_bytes, void *stream) {
  PA_ARGS(powerattn_backward_args);
  PA_SET_TENSOR(q);
  PA_SET_TENSOR(k);
  PA_SET_TENSOR(v);
  PA_SET_TENSOR(log_g);
  PA_SET_TENSOR(y);
  PA_SET_TENSOR(row_norm);
  PA_SET_TENSOR(d_y);
  PA_SET_TENSOR(d_q);
  PA_SET_TENSOR(d_k);
  PA_SET_TENSOR(d_v);
  PA_SET_TENSOR(d_log_g);
  PA_SET_STATE(initial_state);
  PA_SET_STATE(d_final_state);
  PA_SET_STATE(d_initial_state);
  args.cu_seqlens = cu_seqlens;
  args.rope_offset = rope_offset;
  args.saved = saved;
  args.saved_bytes = saved_bytes;
  args.workspace = workspace;
  args.workspace_bytes = workspace_bytes;
  args.stream = stream;
  return powerattn_backward((const powerattn_plan *)plan, &args);
}

static powerattn_status step(void *plan, PA_TENSOR_PARAMS(q), PA_TENSOR_PARAMS(k), PA_TENSOR_PARAMS(v),
                             PA_TENSOR_PARAMS(log_g), PA_TENSOR_PARAMS(y), PA_STATE_PARAMS(state),
                             int64_t num_slots, const int64_t *slots, const int64_t *lengths,
                             const int64_t *rope_offset, void *workspace, uint64_t workspace_bytes,
                             void *stream) {
  PA_ARGS(powerattn_step_args);
  PA_SET_TENSOR(q);
  PA_SET_TENSOR(k);
  PA_SET_TENSOR(v);
  PA_SET_TENSOR(log_g);
  PA_SET_TENSOR(y);
  PA_SET_STATE(state);
  args.num_slots = num_slots;
  args.slots = slots;
  args.lengths = lengths;
  args.rope_offset = rope_offset;
  args.workspace = workspace;
  args.workspace_bytes = workspace_bytes;
  args.stream = stream;
  return powerattn_step((const powerattn_plan *)plan, &args);
}

static powerattn_status summary(void *plan, PA_TENSOR_PARAMS(k), PA_TENSOR_PARAMS(v), PA_TENSOR_PARAMS(log_g),
                                PA_STATE_PARAMS(state), void *total_log_g, const int64_t *cu_seqlens,
                                const int64_t *rope_offset, void *workspace, uint64_t workspace_bytes,
                                void *stream) {
  PA_ARGS(powerattn_summary_args);
  PA_SET_TENSOR(k);
  PA_SET_TENSOR(v);
  PA_SET_TENSOR(log_g);
  PA_SET_STATE(state);
  args.total_log_g = total_log_g;
  args.cu_seqlens = cu_seqlens;
  args.rope_offset = rope_offset;
  args.workspace = workspace;
  args.workspace_bytes = workspace_bytes;
  args.stream = stream;
  return powerattn_summary((const powerattn_plan *)plan, &args);
}

static powerattn_status summary_reverse(void *plan, PA_TENSOR_PARAMS(q), PA_TENSOR_PARAMS(log_g),
                                        PA_TENSOR_PARAMS(y), PA_TENSOR_PARAMS(row_norm), PA_TENSOR_PARAMS(d_y),
                                        PA_STATE_PARAMS(d_state), void *total_log_g, const int64_t *cu_seqlens,
                                        const int64_t *rope_offset, void *workspace, uint64_t workspace_bytes,
                                        void *stream) {
  PA_ARGS(powerattn_summary_reverse_args);
  PA_SET_TENSOR(q);
  PA_SET_TENSOR(log_g);
  PA_SET_TENSOR(y);
  PA_SET_TENSOR(row_norm);
  PA_SET_TENSOR(d_y);
  PA_SET_STATE(d_state);
  args.total_log_g = total_log_g;
  args.cu_seqlens = cu_seqlens;
  args.rope_offset = rope_offset;
  args.workspace = workspace;
  args.workspace_bytes = workspace_bytes;
  args.stream = stream;
  return powerattn_summary_reverse((const powerattn_plan *)plan, &args);
}

static powerattn_status state_compose(void *plan, int64_t count, PA_STATE_PARAMS(segments),
                                      int64_t s_stride_segment, int64_t z_stride_segment, const void *log_g,
                                      int64_t log_g_stride_segment, int64_t log_g_stride_n,
                                      int64_t log_g_stride_h, PA_STATE_PARAMS(out), void *out_log_g,
                                      void *stream) {
  PA_ARGS(powerattn_compose_args);
  args.count = count;
  PA_SET_STATE(segments);
  args.s_stride_segment = s_stride_segment;
  args.z_stride_segment = z_stride_segment;
  args.log_g = log_g;
  args.log_g_stride_segment = log_g_stride_segment;
  args.log_g_stride_n = log_g_stride_n;
  args.log_g_stride_h = log_g_stride_h;
  PA_SET_STATE(out);
  args.out_log_g = out_log_g;
  args.stream = stream;
  return powerattn_state_compose((const powerattn_plan *)plan, &args);
}

static powerattn_status state_convert(void *plan, int32_t src_dtype, int32_t dst_dtype, PA_STATE_PARAMS(src),
                                      PA_STATE_PARAMS(dst), int64_t count, const int64_t *src_slots,
                                      const int64_t *dst_slots, int64_t src_num_slots, int64_t dst_num_slots,
                                      void *stream) {
  PA_ARGS(powerattn_convert_args);
  args.src_dtype = src_dtype;
  args.dst_dtype = dst_dtype;
  PA_SET_STATE(src);
  PA_SET_STATE(dst);
  args.count = count;
  args.src_slots = src_slots;
  args.dst_slots = dst_slots;
  args.src_num_slots = src_num_slots;
  args.dst_num_slots = dst_num_slots;
  args.stream = stream;
  return powerattn_state_convert((const powerattn_plan *)plan, &args);
}

static powerattn_status state_pack(void *plan, int32_t dtype, PA_STATE_PARAMS(state), int64_t count,
                                   void *packed, uint64_t packed_bytes, void *stream) {
  PA_ARGS(powerattn_pack_args);
  args.dtype = dtype;
  PA_SET_STATE(state);
  args.count = count;
  args.packed = packed;
  args.packed_bytes = packed_bytes;
  args.stream = stream;
  return powerattn_state_pack((const powerattn_plan *)plan, &args);
}

static powerattn_status state_unpack(void *plan, PA_STATE_PARAMS(state), int64_t count, void *packed,
                                     uint64_t packed_bytes, void *stream) {
  PA_ARGS(powerattn_pack_args);
  PA_SET_STATE(state);
  args.count = count;
  args.packed = packed;
  args.packed_bytes = packed_bytes;
  args.stream = stream;
  return powerattn_state_unpack((const powerattn_plan *)plan, &args);
}
%}
