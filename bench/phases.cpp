// SPDX-License-Identifier: Apache-2.0
#include "phases.h"

#include <string>

#include "cpu/run.h"
#include "src/backend.h"
#include "yardsticks.h"

namespace bench {

using powerattn::cpu::Pass;
using powerattn::cpu::Run;
using powerattn::cpu::Slot;
namespace fast = powerattn::fast;

// As Forward (src/cpu/forward.cpp), with the output twice: without and with the state. Every phase ends with a
// barrier, where the forward itself lets streams pass their phases one by one.
bool forward_phases(const powerattn_plan *plan, const powerattn_forward_args &a, Phases *out) {
  const powerattn::Problem &p = plan->problem;
  if (plan->forward == nullptr || plan->backend != &powerattn::cpu_backend() ||
      p.dtype == powerattn::Dtype::kFloat64 || plan->forward->name == std::string("cpu.reference")) {
    return false;
  }
  *out = {};
  const Run<float> run(p, plan->tiling, Pass::kForward, a.workspace, a.log_g.data != nullptr);
  const auto &call = run.call;
  const auto &kernels = run.kernels;
  const auto &g = run.g;
  double last = 0;
  const auto lap = [&](double *phase) {
    const double at = now();
    *phase += at - last;
    last = at;
  };

  for (int64_t first = 0; first < g.streams; first += g.wave) {
    const int64_t count = run.start_wave(first, a.cu_seqlens, a.rope_offset);
    const int64_t chunks = run.most_chunks(count);
    for (int64_t n = 0; n < chunks; ++n) {
      last = now();
      run.units(count, g.tiles + 1, [&](Slot<float> &s, int64_t unit, void *scratch) {
        run.pack(a.k, a.v, a.log_g, s, n, unit, scratch);
      });
      lap(&out->pack);
      const auto output = [&](bool with_state) {
        run.units(count, g.groups * g.tiles, [&](Slot<float> &s, int64_t unit, void *scratch) {
          const fast::Span span = run.tile_span(s, n, g.tiles - 1 - unit / g.groups);
          if (span.count <= 0) return;
          const int64_t head = run.query_head(s, unit % g.groups);
          fast::State<float> state = with_state ? s.state : fast::State<float>{nullptr, nullptr};
          state.image = s.image;
          kernels.output(call, run.rows(a.q, s, head), s.position, s.k, s.v, s.gates, state, span,
                         run.rows(a.y, s, head), run.statistics(a.row_norm, s, head), scratch);
        });
      };
      double chunk = 0, both = 0;
      output(false);
      lap(&chunk);
      out->chunk += chunk;
      if (n > 0) {
        output(true);
        lap(&both);
        out->state += both - chunk;
      }
      if (n + 1 == chunks) continue;
      run.state_units(count, [&](Slot<float> &s, int64_t row, int64_t rows, void *scratch) {
        const fast::State<float> in = n > 0 ? s.state : fast::State<float>{nullptr, nullptr};
        fast::State<float> next = s.state;
        next.image = s.image;
        kernels.update(call, s.k, s.v, call.gated ? s.gates.to_end : nullptr, 1.0, nullptr, s.gates.decay, in,
                       next, run.tokens(s, n), row, rows, scratch);
      });
      lap(&out->update);
    }
  }
  return true;
}

}  // namespace bench
