// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include <algorithm>
#include <cinttypes>

#include "checker.h"
#include "state_layout.h"

namespace powerattn {
namespace {

constexpr int32_t kAllFlags =
    POWERATTN_UNNORMALIZED | POWERATTN_CUSTOM_SCALE | POWERATTN_USE_STATE | POWERATTN_ALLOW_TF32;
constexpr int64_t kMaxChunk = INT32_MAX;
constexpr int64_t kMaxHeads = 1 << 20;
constexpr __int128 kMaxBytes = static_cast<__int128>(1) << 48;  // of one tensor: a whole address space

Need required_if(bool condition) { return condition ? Need::kRequired : Need::kOptional; }

bool is_state_dtype(int32_t dtype, bool cpu) {
  return dtype == POWERATTN_FLOAT32 || dtype == POWERATTN_BFLOAT16 || (cpu && dtype == POWERATTN_FLOAT64);
}

}  // namespace

powerattn_status check_desc(const powerattn_desc &d) {
  Checker c;
  const bool normalized = (d.flags & POWERATTN_UNNORMALIZED) == 0, wide = d.dtype == POWERATTN_FLOAT64;
  const bool cpu = d.device_type == POWERATTN_CPU, rope = d.rope_style != POWERATTN_ROPE_NONE;

  c.require(cpu || d.device_type == POWERATTN_CUDA,
            "device_type is %" PRId32 "; allowed are CPU (0) and CUDA (1)", d.device_type);
  c.at_least("device_index", d.device_index, 0);
  c.require(d.dtype >= POWERATTN_FLOAT32 && d.dtype <= POWERATTN_FLOAT64,
            "dtype is %" PRId32 "; allowed are FLOAT32 (1), FLOAT16 (2), BFLOAT16 (3) and FLOAT64 (4)",
            d.dtype);
  if (wide && !cpu) c.refuse(POWERATTN_ERROR_UNSUPPORTED, "dtype is FLOAT64; it is supported on the CPU only");
  c.require(d.state_dtype == 0 || d.state_dtype == (wide ? POWERATTN_FLOAT64 : POWERATTN_FLOAT32) ||
                (!wide && d.state_dtype == POWERATTN_BFLOAT16),
            "state_dtype is %" PRId32 "; allowed here are 0 and %s", d.state_dtype,
            wide ? "FLOAT64 (4)" : "FLOAT32 (1) and BFLOAT16 (3)");
  c.range("degree", d.degree, 1, kMaxDegree);
  c.require((d.flags & ~kAllFlags) == 0, "flags is 0x%" PRIx32 "; allowed are the bits of 0x%" PRIx32,
            static_cast<uint32_t>(d.flags), static_cast<uint32_t>(kAllFlags));
  c.require(!normalized || d.degree % 2 == 0,
            "degree is %" PRId32 "; it must be even unless flags has POWERATTN_UNNORMALIZED", d.degree);
  c.require(d.form >= POWERATTN_FORM_AUTO && d.form <= POWERATTN_FORM_CHUNKED,
            "form is %" PRId32 "; allowed are AUTO (0), ATTENTION (1) and CHUNKED (2)", d.form);

  c.at_least("batch", d.batch, 0);
  c.at_least("seq_len", d.seq_len, 0);
  c.range("heads_q", d.heads_q, 1, kMaxHeads);
  c.range("heads_kv", d.heads_kv, 1, kMaxHeads);
  c.require(c.failed() || d.heads_q % d.heads_kv == 0,
            "heads_q is %" PRId64 "; it must be a multiple of heads_kv %" PRId64, d.heads_q, d.heads_kv);
  c.range("head_dim", d.head_dim, 1, kMaxDim);
  c.range("value_dim", d.value_dim, 0, kMaxDim);
  c.at_least("sequences", d.sequences, 0);
  c.require(d.sequences == 0 || d.batch == 1, "batch is %" PRId64 "; it must be 1 with packed sequences",
            d.batch);
  c.range("max_seq_len", d.max_seq_len, 0, std::max<int64_t>(d.seq_len, 0));
  c.range("chunk_size", d.chunk_size, 0, kMaxChunk);
  c.require(d.chunk_size == 0 || d.form != POWERATTN_FORM_ATTENTION,
            "chunk_size is %" PRId64 "; it must be 0 with form ATTENTION, which has no chunks", d.chunk_size);
  if (!c.failed()) {
    // One saturating product: everything below may multiply shapes in 64 bits without looking.
    const int64_t factors[] = {std::max<int64_t>(d.batch, 1), std::max<int64_t>(d.seq_len, 1), d.heads_q,
                               std::max(d.head_dim, d.value_dim), 8};
    __int128 bytes = 1;
    for (const int64_t f : factors) bytes = std::min(bytes * f, kMaxBytes);
    c.require(bytes < kMaxBytes,
              "batch %" PRId64 " x seq_len %" PRId64 " x heads_q %" PRId64
              " x head_dim is too much: a tensor may have 2^48 bytes",
              d.batch, d.seq_len, d.heads_q);
    const __int128 states = static_cast<__int128>(d.sequences) * d.heads_q;
    c.require(states < kMaxBytes / (8 * kMaxDim),
              "sequences %" PRId64 " x heads_q %" PRId64 " is too much: allowed are 2^37 in all", d.sequences,
              d.heads_q);
  }

  if ((d.flags & POWERATTN_CUSTOM_SCALE) != 0) {
    c.finite("scale", d.scale);
  } else {
    c.require(d.scale == 0,
              "scale is %g without POWERATTN_CUSTOM_SCALE; set the flag, or 0 for 1/sqrt(head_dim)", d.scale);
  }
  c.finite("eps", d.eps);
  c.require(d.eps >= 0, "eps is %g; it must be >= 0", d.eps);
  c.finite("rope_base", d.rope_base);
  c.require(d.rope_base >= 0, "rope_base is %g; it must be > 0, or 0 for 10000", d.rope_base);
  c.require(d.rope_style >= POWERATTN_ROPE_NONE && d.rope_style <= POWERATTN_ROPE_INTERLEAVED,
            "rope_style is %" PRId32 "; allowed are NONE (0), HALF (1) and INTERLEAVED (2)", d.rope_style);
  c.require(d.rope_dim >= 0 && d.rope_dim <= d.head_dim && d.rope_dim % 2 == 0,
            "rope_dim is %" PRId64 "; it must be even and 2 .. head_dim %" PRId64 ", or 0 for head_dim",
            d.rope_dim, d.head_dim);
  c.require(!rope || d.rope_dim != 0 || d.head_dim % 2 == 0,
            "rope_dim is 0, that is head_dim %" PRId64 "; rotated dimensions must be even in number",
            d.head_dim);
  c.range("num_threads", d.num_threads, 0, kMaxThreads);
  for (const int64_t r : d.reserved) c.zero("reserved", r);
  return c.status();
}

powerattn_status check_forward(const powerattn_plan &plan, const powerattn_forward_args &a) {
  const Problem &p = plan.problem;
  ArgsChecker c(plan);
  c.runs("forward", plan.forward, plan.forward_refusal);
  c.zero("reserved", a.reserved);
  c.query("q", a.q, Role::kInput);
  c.key("k", a.k, Role::kInput);
  c.value("v", a.v, Role::kInput);
  c.gate("log_g", a.log_g, Role::kInput);
  c.output("y", a.y, Role::kOutput);
  c.row_norm("row_norm", a.row_norm, Role::kOutput, Need::kOptional);
  c.use_state("initial_state", a.initial_state);
  c.use_state("final_state", a.final_state);
  c.state("initial_state", a.initial_state, p.sequences, p.state_dtype, Role::kInput, Need::kOptional);
  c.state("final_state", a.final_state, p.sequences, p.state_dtype, Role::kOutput, Need::kOptional);
  c.sequences(a.cu_seqlens, a.rope_offset);
  if (a.saved != nullptr)
    c.buffer("saved", "saved_bytes", a.saved, a.saved_bytes, plan.sizes.saved, Role::kOutput);
  c.buffer("workspace", "workspace_bytes", a.workspace, a.workspace_bytes, plan.sizes.forward, Role::kOutput);
  c.stream(a.stream);
  c.no_overlap("initial_state", "final_state");
  return c.status();
}

powerattn_status check_backward(const powerattn_plan &plan, const powerattn_backward_args &a) {
  const Problem &p = plan.problem;
  const bool gated = a.log_g.data != nullptr;
  const uint64_t workspace = a.saved != nullptr ? plan.sizes.backward_saved : plan.sizes.backward;
  ArgsChecker c(plan);
  c.runs("backward", plan.backward, plan.backward_refusal);
  c.zero("reserved", a.reserved);
  c.query("q", a.q, Role::kInput);
  c.key("k", a.k, Role::kInput);
  c.value("v", a.v, Role::kInput);
  c.gate("log_g", a.log_g, Role::kInput);
  c.output("y", a.y, Role::kInput, required_if(p.normalize || gated));
  c.row_norm("row_norm", a.row_norm, Role::kInput, required_if(p.normalize));
  c.output("d_y", a.d_y, Role::kInput);
  c.query("d_q", a.d_q, Role::kOutput);
  c.key("d_k", a.d_k, Role::kOutput);
  c.value("d_v", a.d_v, Role::kOutput);
  c.require(gated || a.d_log_g.data == nullptr, "d_log_g is given without log_g");
  c.gate("d_log_g", a.d_log_g, Role::kOutput);
  c.use_state("initial_state", a.initial_state);
  c.use_state("d_final_state", a.d_final_state);
  c.use_state("d_initial_state", a.d_initial_state);
  c.state("initial_state", a.initial_state, p.sequences, p.state_dtype, Role::kInput, Need::kOptional);
  c.state("d_final_state", a.d_final_state, p.sequences, p.state_dtype, Role::kInput, Need::kOptional);
  c.state("d_initial_state", a.d_initial_state, p.sequences, p.state_dtype, Role::kOutput, Need::kOptional);
  c.sequences(a.cu_seqlens, a.rope_offset);
  if (a.saved != nullptr)
    c.buffer("saved", "saved_bytes", a.saved, a.saved_bytes, plan.sizes.saved, Role::kInput);
  c.buffer("workspace", "workspace_bytes", a.workspace, a.workspace_bytes, workspace, Role::kOutput);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

powerattn_status check_step(const powerattn_plan &plan, const powerattn_step_args &a) {
  const Problem &p = plan.problem;
  ArgsChecker c(plan);
  c.runs("step", plan.step, plan.step_refusal);
  c.zero("reserved", a.reserved);
  c.query("q", a.q, Role::kInput);
  c.key("k", a.k, Role::kInput);
  c.value("v", a.v, Role::kInput);
  c.gate("log_g", a.log_g, Role::kInput);
  c.output("y", a.y, Role::kOutput);
  c.at_least("num_slots", a.num_slots, 0);
  c.state("state", a.state, a.num_slots, p.state_dtype, Role::kOutput, Need::kRequired);
  c.slots("slots", a.slots, p.batch, a.num_slots, true);
  c.lengths(a.lengths);
  c.array("rope_offset", a.rope_offset, p.batch, 8, Role::kInput, Need::kOptional);
  c.buffer("workspace", "workspace_bytes", a.workspace, a.workspace_bytes, plan.sizes.step, Role::kOutput);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

powerattn_status check_summary(const powerattn_plan &plan, const powerattn_summary_args &a) {
  const Problem &p = plan.problem;
  ArgsChecker c(plan);
  c.runs("summary", plan.summary, plan.summary_refusal);
  c.zero("reserved", a.reserved);
  c.key("k", a.k, Role::kInput);
  c.value("v", a.v, Role::kInput);
  c.gate("log_g", a.log_g, Role::kInput);
  c.state("state", a.state, p.sequences, p.state_dtype, Role::kOutput, Need::kRequired);
  c.array("total_log_g", a.total_log_g, p.sequences * p.heads_kv, size_of(p.stat_dtype), Role::kOutput,
          Need::kOptional);
  c.sequences(a.cu_seqlens, a.rope_offset);
  c.buffer("workspace", "workspace_bytes", a.workspace, a.workspace_bytes, plan.sizes.summary, Role::kOutput);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

powerattn_status check_summary_reverse(const powerattn_plan &plan, const powerattn_summary_reverse_args &a) {
  const Problem &p = plan.problem;
  ArgsChecker c(plan);
  c.runs("summary_reverse", plan.summary, plan.summary_refusal);
  c.zero("reserved", a.reserved);
  c.query("q", a.q, Role::kInput);
  c.gate("log_g", a.log_g, Role::kInput);
  c.output("y", a.y, Role::kInput, required_if(p.normalize));
  c.row_norm("row_norm", a.row_norm, Role::kInput, required_if(p.normalize));
  c.output("d_y", a.d_y, Role::kInput);
  c.state("d_state", a.d_state, p.sequences, p.state_dtype, Role::kOutput, Need::kRequired);
  c.array("total_log_g", a.total_log_g, p.sequences * p.heads_kv, size_of(p.stat_dtype), Role::kOutput,
          Need::kOptional);
  c.sequences(a.cu_seqlens, a.rope_offset);
  c.buffer("workspace", "workspace_bytes", a.workspace, a.workspace_bytes, plan.sizes.summary, Role::kOutput);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

powerattn_status check_compose(const powerattn_plan &plan, const powerattn_compose_args &a) {
  const Problem &p = plan.problem;
  ArgsChecker c(plan);
  c.zero("reserved", a.reserved);
  c.at_least("count", a.count, 0);
  c.segments("segments", a.segments, a.count, a.s_stride_segment, a.z_stride_segment);
  c.strided_gates("log_g", a.log_g, a.count, a.log_g_stride_segment, a.log_g_stride_n, a.log_g_stride_h);
  c.state("out", a.out, p.sequences, p.state_dtype, Role::kOutput, Need::kRequired);
  c.array("out_log_g", a.out_log_g, p.sequences * p.heads_kv, size_of(p.stat_dtype), Role::kOutput,
          Need::kOptional);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

powerattn_status check_convert(const powerattn_plan &plan, const powerattn_convert_args &a) {
  const Problem &p = plan.problem;
  const bool cpu = p.device_type == POWERATTN_CPU;
  const char *allowed = cpu ? "FLOAT32 (1), BFLOAT16 (3) and FLOAT64 (4)" : "FLOAT32 (1) and BFLOAT16 (3)";
  const Dtype src = a.src_dtype == 0 ? p.state_dtype : static_cast<Dtype>(a.src_dtype);
  const Dtype dst = a.dst_dtype == 0 ? p.state_dtype : static_cast<Dtype>(a.dst_dtype);
  ArgsChecker c(plan);
  c.require(a.src_dtype == 0 || is_state_dtype(a.src_dtype, cpu), "src_dtype is %" PRId32 "; allowed are 0, %s",
            a.src_dtype, allowed);
  c.require(a.dst_dtype == 0 || is_state_dtype(a.dst_dtype, cpu), "dst_dtype is %" PRId32 "; allowed are 0, %s",
            a.dst_dtype, allowed);
  c.zero("reserved", a.reserved);
  c.at_least("count", a.count, 0);
  c.at_least("src_num_slots", a.src_num_slots, 0);
  c.at_least("dst_num_slots", a.dst_num_slots, 0);
  c.state("src", a.src, a.src_num_slots, src, Role::kInput, required_if(a.count > 0));
  c.state("dst", a.dst, a.dst_num_slots, dst, Role::kOutput, required_if(a.count > 0));
  c.slots("src_slots", a.src_slots, a.count, a.src_num_slots, false);
  c.slots("dst_slots", a.dst_slots, a.count, a.dst_num_slots, true);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

powerattn_status check_pack_dtype(const Problem &p, int32_t dtype, Dtype *packed) {
  const bool cpu = p.device_type == POWERATTN_CPU;
  Checker c;
  c.require(dtype == 0 || is_state_dtype(dtype, cpu), "dtype is %" PRId32 "; allowed are 0, %s", dtype,
            cpu ? "FLOAT32 (1), BFLOAT16 (3) and FLOAT64 (4)" : "FLOAT32 (1) and BFLOAT16 (3)");
  if (!c.failed()) *packed = dtype == 0 ? p.state_dtype : static_cast<Dtype>(dtype);
  return c.status();
}

powerattn_status check_pack_count(const Problem &p, Dtype packed, int64_t count, uint64_t *bytes) {
  Checker c;
  c.at_least("count", count, 0);
  if (c.failed()) return c.status();
  const uint64_t size = packed_bytes(p, packed, count);
  if (size == kBytesOverflow) {
    c.refuse(POWERATTN_ERROR_UNSUPPORTED,
             "%" PRId64 " packed states of %" PRId64 " kv heads, head_dim %" PRId64 " and degree %" PRId32
             " take more bytes than uint64_t holds",
             count, p.heads_kv, p.head_dim, p.degree);
  } else {
    *bytes = size;
  }
  return c.status();
}

powerattn_status check_pack(const powerattn_plan &plan, const powerattn_pack_args &a) {
  const Problem &p = plan.problem;
  Dtype dtype{};
  uint64_t size = 0;
  powerattn_status status = check_pack_dtype(p, a.dtype, &dtype);
  if (status == POWERATTN_OK) status = check_pack_count(p, dtype, a.count, &size);
  if (status != POWERATTN_OK) return status;
  ArgsChecker c(plan);
  c.state("state", a.state, a.count, p.state_dtype, Role::kInput, required_if(a.count > 0));
  c.require(a.packed != nullptr, "packed is NULL; %" PRIu64 " bytes of host memory are required here", size);
  c.require(a.packed_bytes >= size, "packed_bytes is %" PRIu64 "; these states need %" PRIu64, a.packed_bytes,
            size);
  c.host_block("packed", a.packed, size, Role::kOutput);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

powerattn_status check_unpack(const powerattn_plan &plan, const powerattn_pack_args &a) {
  const Problem &p = plan.problem;
  ArgsChecker c(plan);
  c.at_least("count", a.count, 0);
  c.require(a.packed != nullptr, "packed is NULL; it must be a packed state in host memory");
  if (c.failed()) return c.status();
  PackedHeader header;
  const powerattn_status status = read_packed_header(p, a.count, a.packed, a.packed_bytes, &header);
  if (status != POWERATTN_OK) return status;
  c.state("state", a.state, a.count, p.state_dtype, Role::kOutput, required_if(a.count > 0));
  c.host_block("packed", a.packed, header.payload_bytes + kPackedHeaderBytes, Role::kInput);
  c.stream(a.stream);
  c.no_overlap();
  return c.status();
}

}  // namespace powerattn
