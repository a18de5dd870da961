// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <sched.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "check.h"
#include "cost.h"
#include "state_layout.h"
#include "status.h"
#include "text.h"

namespace powerattn {
namespace {

// "39 MB" as the literature prints it: decimal units, two or three digits.
std::string human(uint64_t bytes) {
  if (bytes == kBytesOverflow) return "more than 18 EB";
  static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB", "PB", "EB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 999.5 && unit < 6) {
    value /= 1000;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof(text), unit > 0 && value < 9.95 ? "%.1f %s" : "%.0f %s", value, units[unit]);
  return text;
}

const char *name_of(Dtype t) {
  switch (t) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kFloat16:
      return "float16";
    case Dtype::kBfloat16:
      return "bfloat16";
    case Dtype::kFloat64:
      return "float64";
  }
  return "?";
}

const char *name_of(Form f) { return f == Form::kAttention ? "attention" : "chunked"; }

// Threads of a CPU plan: the description, else POWERATTN_NUM_THREADS, else the cores of this process.
int resolve_threads(int32_t asked) {
  if (asked > 0) return asked;
  if (const char *text = std::getenv("POWERATTN_NUM_THREADS")) {
    char *end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (end != text && *end == '\0' && n >= 1) return static_cast<int>(std::min<long>(n, kMaxThreads));
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::clamp(CPU_COUNT(&set), 1, kMaxThreads);
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

Problem resolve(const powerattn_desc &d, uint64_t memory) {
  Problem p;
  p.device_type = d.device_type;
  p.device_index = d.device_index;
  p.dtype = static_cast<Dtype>(d.dtype);
  p.stat_dtype = p.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  p.state_dtype = d.state_dtype == 0 ? p.stat_dtype : static_cast<Dtype>(d.state_dtype);
  p.degree = d.degree;
  p.normalize = (d.flags & POWERATTN_UNNORMALIZED) == 0;
  p.use_state = (d.flags & POWERATTN_USE_STATE) != 0;
  p.allow_tf32 = (d.flags & POWERATTN_ALLOW_TF32) != 0;
  p.packed = d.sequences > 0;
  p.batch = d.batch;
  p.sequences = p.packed ? d.sequences : d.batch;
  p.seq_len = d.seq_len;
  p.max_seq_len = p.packed && d.max_seq_len > 0 ? d.max_seq_len : d.seq_len;
  p.heads_q = d.heads_q;
  p.heads_kv = d.heads_kv;
  p.head_dim = d.head_dim;
  p.value_dim = d.value_dim == 0 ? d.head_dim : d.value_dim;
  p.state_rows = state_rows(p.head_dim, p.degree);
  int64_t states = 0;
  p.state_bytes = __builtin_mul_overflow(p.sequences, p.heads_kv, &states)
                      ? kBytesOverflow
                      : state_bytes(p.state_rows, p.value_dim, p.state_dtype, states);
  p.state_limit = d.state_limit == 0 ? memory : d.state_limit;
  p.scale =
      (d.flags & POWERATTN_CUSTOM_SCALE) != 0 ? d.scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  p.eps = d.eps;
  p.rope.style = d.rope_style;
  p.rope.dim = d.rope_style == POWERATTN_ROPE_NONE ? 0 : d.rope_dim == 0 ? p.head_dim : d.rope_dim;
  p.rope.base = d.rope_base == 0 ? 10000.0 : d.rope_base;
  p.threads = d.device_type == POWERATTN_CPU ? resolve_threads(d.num_threads) : 1;
  return p;
}

const char *name_of(Op op) {
  switch (op) {
    case Op::kForward:
      return "forward";
    case Op::kBackward:
      return "backward";
    case Op::kStep:
      return "step";
    case Op::kSummary:
      return "summary";
  }
  return "?";
}

// The first implementation of the ordered table that takes the operation; else null and every reason. Those
// passed over before it are noted in *passed, so that nothing slower runs unseen.
const Implementation *choose(const Backend &backend, Op op, const Problem &p, const Pins &pins, Tiling *tiling,
                             std::string *refusal, std::string *passed) {
  std::string reasons;
  for (const Implementation *const *i = backend.implementations; *i != nullptr; ++i) {
    std::string why;
    Tiling candidate;
    if ((*i)->choose(op, p, pins, &candidate, &why)) {
      *tiling = candidate;
      if (!reasons.empty()) {
        passed->append("          passed over for ")
            .append(name_of(op))
            .append(": ")
            .append(reasons)
            .append("\n");
      }
      return *i;
    }
    if (!reasons.empty()) reasons.append("; ");
    reasons.append((*i)->name).append(": ").append(why);
  }
  *refusal = reasons.empty() ? "this build has no implementation for the device" : reasons;
  return nullptr;
}

// States at all chunk starts, in 8-byte elements twice over: beyond this, sizes would not fit in 64 bits.
constexpr unsigned __int128 kMaxChunkStates = static_cast<unsigned __int128>(1) << 60;

bool chunk_states_fit(const Problem &p, const Tiling &t) {
  if (t.form == Form::kAttention) return true;
  const int64_t chunk = std::max<int64_t>(t.chunk, 1);
  const int64_t per_sequence = p.max_seq_len / chunk + 2;
  const auto chunks = static_cast<unsigned __int128>(p.packed ? p.seq_len / chunk + 2 * p.sequences
                                                              : p.sequences * per_sequence);
  const uint64_t one = state_bytes(p.state_rows, p.value_dim, Dtype::kFloat64, 2);
  return one != kBytesOverflow && chunks * static_cast<uint64_t>(p.heads_kv) < kMaxChunkStates / (one + 1);
}

const char *name_or_none(const Implementation *i) { return i != nullptr ? i->name : "none"; }

// Why the cost model took the form it did: the time that the same implementation predicts for the other one.
std::string alternative(const Implementation &i, const Problem &p, const Tiling &chosen) {
  const Form form = chosen.form == Form::kAttention ? Form::kChunked : Form::kAttention;
  Tiling other;
  std::string text = "the cost model's choice", why;
  if (!i.choose(Op::kForward, p, {static_cast<int32_t>(form), 0}, &other, &why))
    return text + "; no " + name_of(form) + " form: " + why;
  append(&text, ": %.3g ms forward and backward predicted, %.3g ms in the %s form",
         (chosen.forward_s + chosen.backward_s) * 1e3, (other.forward_s + other.backward_s) * 1e3,
         name_of(form));
  if (form == Form::kChunked) append(&text, " with chunk %" PRId64, other.chunk);
  return text;
}

void describe(const powerattn_desc &d, const std::string &form_reason, const std::string &passed,
              powerattn_plan *plan) {
  const Problem &p = plan->problem;
  const Tiling &t = plan->tiling;
  std::string &text = plan->text;

  append(&text, "libpowerattn %d.%d.%d on %s:%d\n", POWERATTN_VERSION_MAJOR, POWERATTN_VERSION_MINOR,
         POWERATTN_VERSION_PATCH, plan->backend->name, p.device_index);
  append(&text,
         "problem   %s degree %d%s, batch %" PRId64 ", seq_len %" PRId64 ", heads %" PRId64 "/%" PRId64
         ", head_dim %" PRId64 ", value_dim %" PRId64 "\n",
         name_of(p.dtype), p.degree, p.normalize ? "" : " unnormalised", p.batch, p.seq_len, p.heads_q,
         p.heads_kv, p.head_dim, p.value_dim);
  if (p.packed) {
    append(&text, "          packed: %" PRId64 " sequences, longest %s %" PRId64 "\n", p.sequences,
           d.max_seq_len > 0 ? "given as" : "unknown, at most", p.max_seq_len);
  }
  append(&text, "          scale %.9g, eps %.9g", p.scale, p.eps);
  if (p.rope.style != POWERATTN_ROPE_NONE) {
    append(&text, ", rope %s dim %" PRId64 " base %.9g",
           p.rope.style == POWERATTN_ROPE_HALF ? "half" : "interleaved", p.rope.dim, p.rope.base);
  }
  if (p.device_type == POWERATTN_CPU) append(&text, ", %d threads", p.threads);
  text.append("\n");

  if (plan->forward != nullptr) {
    append(&text, "form      %s, chunk %" PRId64 " (", name_of(t.form),
           t.form == Form::kAttention ? p.seq_len : t.chunk);
    text.append(form_reason).append(")\n");
  }
  append(&text, "runs      forward %s, backward %s, step %s, summary %s\n", name_or_none(plan->forward),
         name_or_none(plan->backward), name_or_none(plan->step), name_or_none(plan->summary));
  text.append(passed);
  const struct {
    const char *name;
    const std::string *why;
  } refusals[] = {{"forward", &plan->forward_refusal},
                  {"backward", &plan->backward_refusal},
                  {"step", &plan->step_refusal},
                  {"summary", &plan->summary_refusal}};
  for (const auto &r : refusals) {
    if (!r.why->empty()) text.append("          no ").append(r.name).append(": ").append(*r.why).append("\n");
  }

  const uint64_t one = state_bytes(p.state_rows, p.value_dim, p.state_dtype, 1);
  if (p.state_rows == kRowsOverflow) {
    append(&text, "state     more rows than 64 bits hold\n");
  } else {
    append(&text,
           "state     %" PRId64 " rows, %s %s each, %s for %" PRId64 " sequences x %" PRId64
           " kv heads; limit %s\n",
           p.state_rows, human(one).c_str(), name_of(p.state_dtype), human(p.state_bytes).c_str(), p.sequences,
           p.heads_kv, human(p.state_limit).c_str());
  }
  const Sizes &s = plan->sizes;
  append(&text, "memory    workspace: forward %s, backward %s (%s with saved), step %s, summary %s; saved %s\n",
         human(s.forward).c_str(), human(s.backward).c_str(), human(s.backward_saved).c_str(),
         human(s.step).c_str(), human(s.summary).c_str(), human(s.saved).c_str());

  if (plan->forward != nullptr) {
    const Work attention = attention_forward_work(p);
    append(&text, "cost      forward %.3g ms, backward %.3g ms predicted; attention form %.3g GFLOP forward",
           t.forward_s * 1e3, t.backward_s * 1e3, attention.flops * 1e-9);
    if (p.state_rows != kRowsOverflow && p.max_seq_len > 0) {
      const int64_t chunk = t.form == Form::kChunked ? t.chunk : 1024;
      const Work chunked = chunked_forward_work(p, chunk, 4);
      append(&text, ", chunked form %.3g GFLOP with chunk %" PRId64, chunked.flops * 1e-9, chunk);
    }
    text.append("\n");
  }

  // The implementations in use, each once.
  const Implementation *used[] = {plan->forward, plan->backward, plan->step, plan->summary};
  for (int i = 0; i < 4; ++i) {
    if (used[i] == nullptr || std::find(used, used + i, used[i]) != used + i) continue;
    append(&text, "%s\n", used[i]->name);
    used[i]->describe(p, t, &text);
    if (!text.empty() && text.back() != '\n') text.append("\n");
  }
}

}  // namespace

powerattn_status make_plan(const powerattn_desc &d, std::unique_ptr<powerattn_plan> *made) {
  const Backend *backend = d.device_type == POWERATTN_CPU ? &cpu_backend() : cuda_backend();
  if (backend == nullptr) {
    return fail(POWERATTN_ERROR_NO_DEVICE,
                "device_type is CUDA, but this build of the library has no CUDA backend");
  }
  int32_t devices = 0;
  powerattn_status status = backend->device_count(&devices);
  if (status != POWERATTN_OK) return status;
  if (d.device_index < 0 || d.device_index >= devices) {
    return fail(POWERATTN_ERROR_NO_DEVICE, "device_index is %" PRId32 "; there are %" PRId32 " %s devices here",
                d.device_index, devices, backend->name);
  }
  uint64_t memory = 0;
  status = backend->open(d.device_index, &memory);
  if (status != POWERATTN_OK) return status;

  auto plan = std::make_unique<powerattn_plan>();
  plan->backend = backend;
  plan->problem = resolve(d, memory);
  const Problem &p = plan->problem;

  const bool fits =
      p.state_bytes <= p.state_limit && p.state_bytes != kBytesOverflow && p.state_rows != kRowsOverflow;
  if (!fits && (p.use_state || d.form == POWERATTN_FORM_CHUNKED)) {
    const std::string need = human(p.state_bytes), limit = human(p.state_limit);
    return fail(POWERATTN_ERROR_STATE_TOO_LARGE,
                "%s needs states of %s (%" PRIu64 " bytes: %" PRId64 " sequences x %" PRId64
                " kv heads x %" PRId64 " rows x %" PRId64 " x %" PRId64 " bytes); allowed are %s (%" PRIu64
                " bytes, %s)",
                p.use_state ? "USE_STATE" : "form CHUNKED", need.c_str(), p.state_bytes, p.sequences,
                p.heads_kv, p.state_rows, p.value_dim + 1, size_of(p.state_dtype), limit.c_str(), p.state_limit,
                d.state_limit != 0 ? "desc.state_limit" : "the device's memory");
  }

  // The form: pinned, or forced where the states do not fit, or asked for by a chunk size, or the cost model's.
  Pins pins{d.form, d.chunk_size};
  std::string reason;  // none: the cost model's choice
  const bool asked = fits && d.form == POWERATTN_FORM_AUTO && d.chunk_size > 0;
  if (d.form != POWERATTN_FORM_AUTO) {
    reason = "pinned by the description";
  } else if (!fits) {
    pins = {POWERATTN_FORM_ATTENTION, 0};
    reason = "the states of the chunked form need " + human(p.state_bytes) + ", the limit is " +
             human(p.state_limit);
  } else if (asked) {
    pins.form = POWERATTN_FORM_CHUNKED;
    reason = "chunk_size asks for chunks";
  }
  std::string passed;
  plan->forward = choose(*backend, Op::kForward, p, pins, &plan->tiling, &plan->forward_refusal, &passed);
  if (plan->forward == nullptr && asked) {  // asked for, not pinned: what has no chunks may run
    passed.append("          no chunks: ").append(plan->forward_refusal).append("\n");
    reason = "chunk_size asks for chunks, which nothing here runs";
    plan->forward_refusal.clear();
    plan->forward = choose(*backend, Op::kForward, p, Pins{}, &plan->tiling, &plan->forward_refusal, &passed);
  }

  if (plan->forward != nullptr && !chunk_states_fit(p, plan->tiling)) {
    if (d.form != POWERATTN_FORM_AUTO || d.chunk_size != 0) {
      return fail(POWERATTN_ERROR_STATE_TOO_LARGE,
                  "chunk_size %" PRId64 " needs more states than 2^60 bytes hold", plan->tiling.chunk);
    }
    reason = "the states at the chunk starts would need more than 2^60 bytes";
    plan->forward = choose(*backend, Op::kForward, p, {POWERATTN_FORM_ATTENTION, 0}, &plan->tiling,
                           &plan->forward_refusal, &passed);
  }

  if (plan->forward != nullptr && reason.empty()) reason = alternative(*plan->forward, p, plan->tiling);

  // Backward shares the forward's form and chunk.
  if (plan->forward != nullptr) {
    Tiling tiling;
    const Pins same{static_cast<int32_t>(plan->tiling.form),
                    plan->tiling.form == Form::kChunked ? plan->tiling.chunk : 0};
    plan->backward = choose(*backend, Op::kBackward, p, same, &tiling, &plan->backward_refusal, &passed);
    if (plan->backward != nullptr) plan->tiling.backward_s = tiling.backward_s;
  } else {
    plan->backward_refusal = "no forward";
  }

  // Step and summary keep states.
  Tiling unused;
  if (!fits) {
    plan->step_refusal = plan->summary_refusal =
        "the states need " + human(p.state_bytes) + ", the limit is " + human(p.state_limit);
  } else {
    plan->summary = choose(*backend, Op::kSummary, p, Pins{}, &unused, &plan->summary_refusal, &passed);
    if (!p.use_state) {
      plan->step_refusal = "needs POWERATTN_USE_STATE";
    } else if (p.packed) {
      plan->step_refusal = "not for packed sequences";
    } else {
      plan->step = choose(*backend, Op::kStep, p, Pins{}, &unused, &plan->step_refusal, &passed);
    }
  }
  if (plan->forward == nullptr && plan->step == nullptr) {
    return fail(POWERATTN_ERROR_UNSUPPORTED, "no implementation runs this: %s", plan->forward_refusal.c_str());
  }

  Sizes &s = plan->sizes;
  if (plan->forward != nullptr) {
    const Sizes f = plan->forward->sizes(p, plan->tiling);
    s.forward = f.forward;
    s.saved = plan->forward == plan->backward ? f.saved : 0;  // another implementation reads it otherwise
  }
  if (plan->backward != nullptr) {
    const Sizes b = plan->backward->sizes(p, plan->tiling);
    s.backward = b.backward;
    s.backward_saved = s.saved > 0 ? b.backward_saved : b.backward;
  }
  if (plan->step != nullptr) s.step = plan->step->sizes(p, plan->tiling).step;
  if (plan->summary != nullptr) s.summary = plan->summary->sizes(p, plan->tiling).summary;

  describe(d, reason, passed, plan.get());
  *made = std::move(plan);
  return POWERATTN_OK;
}

void query_plan(const powerattn_plan &plan, powerattn_plan_info *info) {
  const Problem &p = plan.problem;
  *info = {};
  info->struct_size = sizeof(*info);
  info->form = static_cast<int32_t>(plan.tiling.form);
  info->chunk_size = plan.tiling.form == Form::kAttention ? p.seq_len : plan.tiling.chunk;
  info->sequences = p.sequences;
  info->state_rows = p.state_rows;
  info->state_bytes = p.state_bytes;
  info->workspace_forward = plan.sizes.forward;
  info->workspace_backward = plan.sizes.backward;
  info->workspace_backward_saved = plan.sizes.backward_saved;
  info->workspace_step = plan.sizes.step;
  info->workspace_summary = plan.sizes.summary;
  info->saved_bytes = plan.sizes.saved;
  info->scale = p.scale;
  info->predicted_forward_s = plan.tiling.forward_s;
  info->predicted_backward_s = plan.tiling.backward_s;
}

#if !defined(POWERATTN_HAVE_CUDA)
const Backend *cuda_backend() { return nullptr; }
#endif

}  // namespace powerattn
