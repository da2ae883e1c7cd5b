// A layer on a GPU: what surrounds the recurrence. The input's products are taken for a chunk of steps at a time, as
// are those of the gradients of weights and input; between them, the recurrence goes through the chunk step by step, or
// in one launch of a kernel that keeps the weights on the chip.
#include "layer.h"

#include <algorithm>
#include <vector>

#include "../cells.h"
#include "pass.h"

namespace fastrnn {
namespace cuda {
namespace {

class ForwardPass : public Pass {
 public:
  ForwardPass(const Forward& forward, const Call& c) : Pass(forward, c, false) {
    r.y = forward.y;
    r.h_n = forward.h_n;
    r.c_n = forward.c_n;
    r.h_all = forward.h_all;
    r.c_all = forward.c_all;
    r.tape = forward.tape;
  }

  int64_t lay_out(char* memory) {
    Carve carve{memory};
    take_tables(carve);
    choose_chunk(p.D * GH * w);
    for (int d = 0; d < p.D; ++d) r.gates_x[d] = gates_x[d] = carve.take(rows * GH * w);
    r.h = carve.take(p.D * p.B * p.P * s);
    if (cell.has_c) r.c = carve.take(p.D * p.B * p.H * w);
    take_residence(carve);
    if (!resident) gates_h = carve.take(p.B * GH * w);
    if (!resident && p.projected) {
      h_raw = carve.take(p.B * p.H * s);
      projected = carve.take(p.B * p.P * w);
    }
    return carve.used;
  }

  void begin() {
    fill_tables();
    kernels.begin(r, call.stream);
    if (resident) kernels.pack(choice, r, packed, call.stream);
  }
  // Chunk k of those in the order in which they are worked through.
  void advance(int64_t k) {
    r.begin = k * steps;
    r.end = r.begin + steps < p.T ? r.begin + steps : p.T;
    for (int d = 0; d < p.D; ++d) project_input(d);
    if (resident) {
      clear(exchange, exchange_bytes(choice));
      kernels.resident_forward(choice, r, packed, exchange, call.stream);
      return;
    }
    for (int64_t q = r.begin; q < r.end; ++q)
      for (int d = 0; d < p.D; ++d) step(d, q);
  }
  void finish() {}

 private:
  void* gates_x[2] = {};
  void *gates_h = nullptr, *h_raw = nullptr, *projected = nullptr;

  void project_input(int d) {
    r.x_row[d] = first_row(d);
    product(chunk_rows(d), GH, p.I, matrix(element(p.x.data, first_row(d) * p.I, s), p.I),
            transposed(p.weights[d].w_ih, p.I), gates_x[d]);
  }

  void step(int d, int64_t q) {
    const int64_t active = rows_at(d ? p.T - 1 - q : q);
    product(active, GH, p.P, matrix(element(r.h, d * p.B * p.P, s), p.P), transposed(r.w_hh[d], p.P), gates_h);
    kernels.step(r, d, q, gates_h, h_raw, call.stream);
    if (!p.projected) return;
    product(active, p.P, p.H, matrix(h_raw, p.H), transposed(r.w_hr[d], p.H), projected);
    kernels.finish_step(r, d, q, projected, call.stream);
  }
};

bool has_bypass(CellKind kind) {
  bool bypass = false;
  for_each_cell([&](auto c) { bypass |= c.kind == kind && c.bypass; });
  return bypass;
}

class BackwardPass : public Pass {
 public:
  BackwardPass(const Backward& backward, const Call& c) : Pass(backward, c, true), g(backward) {
    SH = cell.slots * p.H;
    r.saved = g.tape;
    r.dy = g.dy;
    r.dh_n = g.dh_n;
    r.dc_n = g.dc_n;
    r.dh_all = g.dh_all;
    r.dc_all = g.dc_all;
    r.dh0 = g.dh0;
    r.dc0 = g.dc0;
    // The blocks of dgates that are the input's part: neighbouring gates in neighbouring blocks are one piece.
    for (int gate = 0; gate < cell.gates; ++gate) {
      const int slot = cell.x_first + gate, block = slot < cell.gates ? cell.hidden_gate[slot] : slot;
      if (pieces && piece[pieces - 1].block + piece[pieces - 1].gates == block)
        ++piece[pieces - 1].gates;
      else
        piece[pieces++] = {gate, block, 1};
    }
    // A sum of several products is rounded once.
    dx_dtype = g.dx_is_compute ? compute : p.dtype;
    dx_in_parts = g.dx.data && dx_dtype != compute && pieces > 1;
    for (int d = 0; d < p.D; ++d) {
      const auto& to = g.gradients[d];
      wants_x |= to.w_ih != nullptr && has_padding();
      wants_ones |= to.b_ih || to.b_hh;
    }
  }

  int64_t lay_out(char* memory) {
    Carve carve{memory};
    take_tables(carve);
    const int64_t shared = (wants_x ? p.I * s : 0) + (dx_in_parts ? p.I * w : 0) + (wants_ones ? s : 0);
    choose_chunk(p.D * (SH + p.P + (p.projected ? p.P + p.H : 0)) * s + shared);
    for (int d = 0; d < p.D; ++d) {
      r.dgates[d] = carve.take(rows * SH * s);
      r.h_prev[d] = carve.take(rows * p.P * s);
      if (p.projected) r.dh_out[d] = carve.take(rows * p.P * s);
      if (p.projected) r.h_raw[d] = carve.take(rows * p.H * s);
    }
    if (wants_x) x = carve.take(rows * p.I * s);
    if (dx_in_parts) dx = carve.take(rows * p.I * w);
    if (wants_ones) ones = carve.take(rows * s);
    const int64_t state = p.D * p.B * p.P * w, cell_state = p.D * p.B * p.H * w;
    r.dh = carve.take(state);
    if (cell.has_c) r.dc = carve.take(cell_state);
    // Sums over cuts: in the compute dtype, the caller's own memory where that is it.
    r.dh_reset = g.dh_reset && p.state != compute ? carve.take(state) : g.dh_reset;
    r.dc_reset = g.dc_reset && p.state != compute ? carve.take(cell_state) : g.dc_reset;
    take_residence(carve);
    if (!resident && has_bypass(p.cell)) bypass = carve.take(state);
    if (!resident && p.projected) dh = carve.take(p.B * p.H * w);
    return carve.used;
  }

  void begin() {
    fill_tables();
    clear_results();
    if (resident) kernels.pack(choice, r, packed, call.stream);
    if (wants_ones) fill(ones, p.dtype, 1, rows, call.stream);
  }
  // Chunks as the forward pass has them, the last one first.
  void advance(int64_t k) {
    r.begin = (chunks() - 1 - k) * steps;
    r.end = r.begin + steps < p.T ? r.begin + steps : p.T;
    for (int d = 0; d < p.D; ++d) r.g_row[d] = first_row(d);
    if (resident) {
      clear(exchange, exchange_bytes(choice));
      kernels.resident_backward(choice, r, packed, exchange, call.stream);
    } else {
      for (int64_t q = r.end; q-- > r.begin;)
        for (int d = 0; d < p.D; ++d) step(d, q);
    }
    for (int d = 0; d < p.D; ++d) {
      add_weight_gradients(d);
      if (g.dx.data) add_input_gradient(d);
      hand_out(d);
    }
  }
  void finish() {
    kernels.finish_back(r, r.dh, bypass, call.stream);
    if (r.dh_reset != g.dh_reset) narrow_values(r.dh_reset, g.dh_reset, p.state, false, p.D * p.B * p.P, call.stream);
    if (r.dc_reset != g.dc_reset) narrow_values(r.dc_reset, g.dc_reset, p.state, false, p.D * p.B * p.H, call.stream);
  }

 private:
  const Backward& g;
  int64_t SH = 0;
  struct Piece {
    int gate, block, gates;
  } piece[4];
  int pieces = 0;
  bool wants_x = false, wants_ones = false;  // input without what pads it; a column of ones
  Dtype dx_dtype = Dtype::f32;
  bool dx_in_parts = false;
  void *x = nullptr, *dx = nullptr, *ones = nullptr;
  void *bypass = nullptr, *dh = nullptr;

  bool has_padding() const { return call.lengths && !p.packed; }

  // What is added up to, and the carries that a resident kernel loads before its first step, which has none.
  void clear_results() {
    if (resident) clear(r.dh, p.D * p.B * p.P * w), clear(r.dc, p.D * p.B * p.H * w);
    for (int d = 0; d < p.D; ++d) {
      const auto& to = g.gradients[d];
      clear(to.w_ih, GH * p.I * w);
      clear(to.w_hh, GH * p.P * w);
      clear(to.b_ih, GH * w);
      clear(to.b_hh, GH * w);
      clear(to.w_hr, p.P * p.H * w);
    }
    if (p.D == 2) clear(g.dx.data, r.N * p.I * size_of(dx_dtype));
    clear(r.dh_reset, p.D * p.B * p.P * w);
    clear(r.dc_reset, p.D * p.B * p.H * w);
  }

  void step(int d, int64_t q) {
    const int64_t t = d ? p.T - 1 - q : q, active = rows_at(t), at = row(t) - r.g_row[d], state = d * p.B * p.P;
    void *const next = element(r.dh, state, w), *const rest = bypass ? element(bypass, state, w) : nullptr;
    const void* const carry = q + 1 < p.T ? next : nullptr;
    if (p.projected) {
      kernels.enter_back(r, d, q, carry, call.stream);
      product(active, p.H, p.P, matrix(element(r.dh_out[d], at * p.P, s), p.P), matrix(r.w_hr[d], p.H), dh);
    }
    kernels.step_back(r, d, q, carry, rest, dh, call.stream);
    if (q > 0 || g.dh0 || g.dh_reset)
      product(active, p.P, GH, matrix(element(r.dgates[d], at * SH, s), SH), matrix(r.w_hh[d], p.P), next);
  }

  // The sums over a chunk's rows of `count` columns of dgates, from `column` on.
  void add_bias_gradient(int d, int64_t column, int64_t count, void* to) {
    product(count, 1, chunk_rows(d), transposed(element(r.dgates[d], column, s), SH), matrix(ones, 1), to, compute, 1,
            true, false);
  }

  void add_weight_gradients(int d) {
    const auto& to = g.gradients[d];
    const int64_t n = chunk_rows(d);
    const void* input = element(p.x.data, first_row(d) * p.I, s);
    if (to.w_ih && wants_x) {
      copy_rows(input, x, int(s), r.lengths, first_step(d), last_step(d), r.B, p.I, call.stream);
      input = x;
    }
    // Where input and state feed the same sums, their biases have the same gradient.
    const bool twice = to.b_ih && to.b_hh && cell.slots == cell.gates;
    for (int i = 0; i < pieces; ++i) {
      const int64_t gate = piece[i].gate * p.H, column = piece[i].block * p.H, count = piece[i].gates * p.H;
      if (to.w_ih)
        product(count, p.I, n, transposed(element(r.dgates[d], column, s), SH), matrix(input, p.I),
                element(to.w_ih, gate * p.I, w), true);
      if (to.b_ih && !twice) add_bias_gradient(d, column, count, element(to.b_ih, gate, w));
    }
    if (to.w_hh) product(GH, p.P, n, transposed(r.dgates[d], SH), matrix(r.h_prev[d], p.P), to.w_hh, true);
    if (to.b_hh) add_bias_gradient(d, 0, GH, to.b_hh);
    if (twice && r.begin == 0) narrow_values(to.b_hh, to.b_ih, compute, false, GH, call.stream);
    if (to.w_hr) product(p.P, p.H, n, transposed(r.dh_out[d], p.P), matrix(r.h_raw[d], p.H), to.w_hr, true);
  }

  void add_input_gradient(int d) {
    const int64_t n = chunk_rows(d);
    const bool add = p.D == 2;
    void* const to = element(g.dx.data, first_row(d) * p.I, size_of(dx_dtype));
    for (int i = 0; i < pieces; ++i)
      product(n, p.I, piece[i].gates * p.H, matrix(element(r.dgates[d], piece[i].block * p.H, s), SH),
              matrix(element(p.weights[d].w_ih, piece[i].gate * p.H * p.I, s), p.I), dx_in_parts ? dx : to,
              dx_in_parts ? compute : dx_dtype, p.I, i > 0 || (add && !dx_in_parts),
              call.tf32 && p.dtype == Dtype::f32);
    if (dx_in_parts) narrow_values(dx, to, dx_dtype, add, n * p.I, call.stream);
  }

  void hand_out(int d) {
    const auto& to = g.operands;
    const int64_t n = chunk_rows(d), first = d * r.N + first_row(d);
    if (to.dgates) widen_dgates(r.dgates[d], element(to.dgates, first * SH, w), p.dtype, cell, n, r.H, call.stream);
    const auto widen_rows = [&](const void* from, void* all, int64_t width) {
      if (all) widen_values(from, element(all, first * width, w), p.dtype, n * width, call.stream);
    };
    widen_rows(r.h_prev[d], to.h_prev, p.P);
    widen_rows(r.dh_out[d], to.dh_out, p.P);
    widen_rows(r.h_raw[d], to.h_raw, p.H);
  }
};

template <class P, class Problem>
int64_t scratch_of(const Problem& problem, const Call& call) {
  return P(problem, call).lay_out(nullptr);
}

template <class P, class Problem>
void run(const Problem& problem, const Call& call, void* scratch) {
  P pass(problem, call);
  pass.lay_out(static_cast<char*>(scratch));
  pass.begin();
  for (int64_t k = 0; k < pass.chunks(); ++k) pass.advance(k);
  pass.finish();
}

// Layers in the order in which the wavefront goes through them, each with a call of its own.
template <class P, class Problem>
struct Wave {
  std::vector<const Problem*> order;
  std::vector<Call> calls;

  Wave(const Problem* layers, int n, const Call& call, bool with_streams) : calls(size_t(n), call) {
    constexpr int64_t fewest = 32, most_chunks = 16;
    const int64_t T = layers[0].T;
    int64_t steps = std::min(call.chunk_steps, std::max((T + most_chunks - 1) / most_chunks, fewest));
    int blocks = 1;
    for (int i = 0; i < n; ++i) order.push_back(layers + i);
    // A chunk of one layer needs the same steps of the layer before it, whatever room its own buffers have.
    for (int i = 0; i < n; ++i) {
      P pass(layers[i], call);
      pass.lay_out(nullptr);
      steps = std::min(steps, pass.chunk_steps());
      if (pass.is_resident()) blocks = std::max(blocks, pass.blocks());
    }
    // No more streams than layers that fit on the card: kernels all of whose blocks wait for each other must not share
    // it.
    const int streams = std::max(1, card().processors / blocks);
    for (int i = 0; i < n; ++i) {
      calls[size_t(i)].chunk_steps = steps;
      if (i % streams && with_streams) calls[size_t(i)].stream = side_stream(i % streams - 1);
    }
  }

  bool worth_while() const {
    const Problem& first = *order[0];
    if (order.size() < 2 || first.D != 1 || first.T < 2 * calls[0].chunk_steps) return false;
    int needed = 0;
    for (size_t i = 0; i < 2; ++i) {
      const P pass(*order[i], calls[i]);
      if (!pass.is_resident()) return false;
      needed += pass.blocks();
    }
    return needed <= card().processors;
  }

  int64_t scratch() const {
    int64_t bytes = 0;
    for (size_t i = 0; i < order.size(); ++i) bytes += scratch_of<P>(*order[i], calls[i]);
    return bytes;
  }

  void run(void* scratch) const {
    const int n = int(order.size());
    std::vector<P> passes;
    passes.reserve(order.size());
    char* memory = static_cast<char*>(scratch);
    for (int i = 0; i < n; ++i) {
      passes.emplace_back(*order[size_t(i)], calls[size_t(i)]);
      memory += passes.back().lay_out(memory);
    }
    const auto join = [&] {
      for (const Call& c : calls) after(calls[0], c);
    };
    try {
      advance(passes);
    } catch (...) {  // the caller frees what the streams are still at work on
      join();
      throw;
    }
    join();
  }

 private:
  void advance(std::vector<P>& passes) const {
    const int n = int(passes.size());
    for (int i = 0; i < n; ++i) {
      after(calls[size_t(i)], calls[0]);
      passes[size_t(i)].begin();
    }
    // Of one wave the last layer first: what it waits for is then the chunk that it needs, and no later one.
    const int64_t chunks = passes[0].chunks();
    for (int64_t wave = 0; wave < chunks + n - 1; ++wave)
      for (int i = n; i-- > 0;) {
        if (wave - i < 0 || wave - i >= chunks) continue;
        if (i) after(calls[size_t(i)], calls[size_t(i - 1)]);
        passes[size_t(i)].advance(wave - i);
      }
    for (P& pass : passes) pass.finish();
  }
  void after(const Call& later, const Call& earlier) const {
    if (later.stream != earlier.stream) follow(later.stream, earlier.stream);
  }
};

}  // namespace

int64_t forward_scratch(const Forward& f, const Call& call) { return scratch_of<ForwardPass>(f, call); }
void forward(const Forward& f, const Call& call, void* scratch) { run<ForwardPass>(f, call, scratch); }
int64_t backward_scratch(const Backward& b, const Call& call) { return scratch_of<BackwardPass>(b, call); }
void backward(const Backward& b, const Call& call, void* scratch) { run<BackwardPass>(b, call, scratch); }

using ForwardWave = Wave<ForwardPass, Forward>;
using BackwardWave = Wave<BackwardPass, Backward>;

bool side_by_side(const Forward* layers, int n, const Call& call) {
  return ForwardWave(layers, n, call, false).worth_while();
}
int64_t forward_scratch(const Forward* layers, int n, const Call& call) {
  return ForwardWave(layers, n, call, false).scratch();
}
void forward(const Forward* layers, int n, const Call& call, void* scratch) {
  ForwardWave(layers, n, call, true).run(scratch);
}
bool side_by_side(const Backward* layers, int n, const Call& call) {
  return BackwardWave(layers, n, call, false).worth_while();
}
int64_t backward_scratch(const Backward* layers, int n, const Call& call) {
  return BackwardWave(layers, n, call, false).scratch();
}
void backward(const Backward* layers, int n, const Call& call, void* scratch) {
  BackwardWave(layers, n, call, true).run(scratch);
}

}  // namespace cuda
}  // namespace fastrnn
