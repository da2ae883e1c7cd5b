// The operators that run layers forward, for ops.cpp alone.
//
//   layer()  allocates the results, fills Forward, runs the kernel
//   step()   the same for one step of a cell
//   stack()  the same as layer() for several layers
//
// Letters for sizes are problem.h's. Errors name the argument, what was expected and what came.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "ops_run.h"

namespace fastrnn {
namespace {

void layer(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a = take_arguments(reader);
  const bool bidirectional = reader.take<bool>(), batch_major = reader.take<bool>();
  const bool all_states = reader.take<bool>(), save = reader.take<bool>();
  a.precision = take_precision(reader);
  take_reset_states(reader, a);

  const SerialInForkedChild serial;
  const Problem p = check(a, bidirectional);
  const bool has_c = p.cell->has_c;
  Forward f;
  static_cast<Layer&>(f) = p.layer;
  const auto fresh = [&](bool wanted, const Shape& shape, int32_t dtype) {
    return empty(wanted ? shape : Shape{0}, dtype, p.place);
  };
  const Tensor y = p.packed ? fresh(true, {p.N, f.D * f.P}, p.dtype)
                            : empty_rows(f.T, f.B, f.D * f.P, batch_major, p.dtype, p.place);
  const Tensor h_n = fresh(true, {f.D, f.B, f.P}, p.state);
  const Tensor c_n = fresh(has_c, {f.D, f.B, f.H}, p.state);
  const Tensor h_all = fresh(all_states, {f.D, f.T, f.B, f.P}, p.dtype);
  const Tensor c_all = fresh(all_states && has_c, {f.D, f.T, f.B, f.H}, p.dtype);
  const Tensor tape = save ? new_tape(p) : fresh(false, {0}, p.compute);

  const ConstRows rows = rows_of(y, p.packed);
  f.y = {y.data_ptr(), rows.step, rows.row};
  f.h_n = h_n.data_ptr();
  if (has_c) f.c_n = c_n.data_ptr();
  if (all_states) f.h_all = h_all.data_ptr();
  if (all_states && has_c) f.c_all = c_all.data_ptr();
  if (save) f.tape = tape.data_ptr();
  run(p, f);

  const Tensor* results[] = {&y, &h_n, &c_n, &h_all, &c_all, &tape};
  for (int i = 0; i < 6; ++i) stack[i] = stable::detail::from(*results[i]);
}

// One step of one layer and direction, for cells and control loops: nothing but the new state, and a tape if asked for.
void step(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a = take_arguments(reader, true);
  const bool save = reader.take<bool>();
  a.precision = take_precision(reader);

  const SerialInForkedChild serial;
  const Problem p = check(a, false, true);
  Forward f;
  static_cast<Layer&>(f) = p.layer;
  const Tensor h = empty({f.B, f.P}, p.dtype, p.place);
  const Tensor c = empty(p.cell->has_c ? Shape{f.B, f.H} : Shape{0}, p.dtype, p.place);
  const Tensor tape = save ? new_tape(p) : empty({0}, p.compute, p.place);
  f.y = {h.data_ptr(), 0, f.P};
  // Output and last state are one on the CPU; on a GPU different threads may write them.
  const Tensor h_n = p.place.on_cpu() ? h : empty({f.B, f.P}, p.dtype, p.place);
  f.h_n = h_n.data_ptr();
  if (p.cell->has_c) f.c_n = c.data_ptr();
  if (save) f.tape = tape.data_ptr();
  run(p, f);
  stack[0] = stable::detail::from(h);
  stack[1] = stable::detail::from(c);
  stack[2] = stable::detail::from(tape);
}

// The weights of `count` layers, of so many a layer; fails where there is not the same number for each.
size_t weights_per_layer(const Arguments& a, int64_t count) {
  if (count < 1 || a.weights.empty() || a.weights.size() % static_cast<size_t>(count))
    fail("num_layers: expected a number of layers that the ", a.weights.size(), " weights can be shared out to, got ",
         count);
  return a.weights.size() / static_cast<size_t>(count);
}

// A layer above the first differs from it in the width of its input alone.
void check_alike(const Problem& p, const Problem& first, int64_t k) {
  if (p.dtype != first.dtype)
    fail("weights: expected the dtype of the first layer, ", dtype_name(first.dtype), ", in layer ", k, ", got ",
         dtype_name(p.dtype));
  if (p.layer.H != first.layer.H || p.layer.P != first.layer.P || p.bias != first.bias)
    fail("weights: expected every layer to have the shapes of the first, but for the input's, got H = ", p.layer.H,
         ", P = ", p.layer.P, " in layer ", k, " after H = ", first.layer.H, ", P = ", first.layer.P);
}

// What stack_backward() needs of `count` layers: nothing of those below `from`. Backward's inputs of layer k are
// inputs[k - from], but the caller's where that is layer 0.
struct Saved {
  int64_t from;
  std::vector<Tensor> tapes, inputs;

  // As one list, the tapes first. The number of its tensors, odd only where `from` is 0, tells what they are.
  std::vector<Tensor> list() const {
    std::vector<Tensor> all = tapes;
    all.insert(all.end(), inputs.begin() + (from == 0 && !inputs.empty()), inputs.end());
    return all;
  }
  Saved(const std::vector<Tensor>& list, int64_t count) {
    const auto n = static_cast<int64_t>(list.size() + 1) / 2;
    from = count - n;
    if (from < 0 || (from == 0) != (list.size() % 2 == 1))
      fail("saved: expected what stack returned for ", count, " layers, got ", list.size(), " tensors");
    tapes.assign(list.begin(), list.begin() + n);
    if (from == 0) inputs.emplace_back();
    inputs.insert(inputs.end(), list.begin() + n, list.end());
  }
  explicit Saved(int64_t from) : from(from) {}
};

const void* of_layer(const void* all, int64_t k, int64_t bytes) {
  return all ? static_cast<const char*>(all) + k * bytes : nullptr;
}
void* of_layer(void* all, int64_t k, int64_t bytes) { return all ? static_cast<char*>(all) + k * bytes : nullptr; }

// Layers on top of each other: one call for all, and as a wavefront where that is faster. A one-step input (B, I) gives
// h, an empty h_n, and c. header: of packed weights, which then stand for a.weights. saved: to be filled, or null.
std::array<Tensor, 3> run_stack(const Arguments& a, bool bidirectional, bool batch_major, int64_t count,
                                const PackedHeader* header = nullptr, Saved* saved = nullptr) {
  const SerialInForkedChild serial;
  const bool one_step = header && a.input.defined() && a.input.dim() == 2 && !a.batch_sizes;
  const size_t per_layer = header ? 0 : weights_per_layer(a, count);
  // The layers' sizes follow from the weights; each is checked with the input that it will have.
  Arguments part = a;
  part.h0 = part.c0 = part.h_reset = part.c_reset = std::nullopt;
  std::vector<Problem> problems;
  std::vector<Forward> layers(static_cast<size_t>(count));
  Tensor y, h_n, c_n;
  std::vector<Tensor> between;
  const void *h0 = nullptr, *c0 = nullptr, *h_reset = nullptr, *c_reset = nullptr;
  Wavefront wave;
  bool at_once = false;  // on a GPU
  problems.reserve(layers.size());
  for (int64_t k = 0; k < count; ++k) {
    if (!header) part.weights.assign(a.weights.begin() + k * per_layer, a.weights.begin() + (k + 1) * per_layer);
    problems.push_back(check(part, bidirectional, one_step, header, k));
    Problem& p = problems.back();
    if (!one_step && !header) read_state_dtype(p, a.h0);
    Forward& f = layers[k];
    static_cast<Layer&>(f) = p.layer;
    const int64_t D = f.D, size = state_size(p), state = D * f.B * f.P * size, cell = D * f.B * f.H * size;
    if (k == 0) {
      const bool has_c = p.cell->has_c;
      check_no_c(p, a.c0, "c0");
      check_no_c(p, a.c_reset, "c_reset");
      const Shape h_shape = one_step ? Shape{f.B, f.P} : Shape{count * D, f.B, f.P};
      const Shape c_shape = one_step ? Shape{f.B, f.H} : Shape{count * D, f.B, f.H};
      const char *h_letters = one_step ? "(B, P)" : "(L*D, B, P)", *c_letters = one_step ? "(B, H)" : "(L*D, B, H)";
      h0 = keep(p, a.h0, "h0", h_shape, h_letters, p.state);
      c0 = keep(p, a.c0, "c0", c_shape, c_letters, p.state);
      h_reset = keep(p, a.h_reset, "h_reset", h_shape, h_letters, p.state);
      c_reset = keep(p, a.c_reset, "c_reset", c_shape, c_letters, p.state);
      h_n = empty(one_step ? Shape{0} : h_shape, p.state, p.place);
      c_n = empty(has_c ? c_shape : Shape{0}, p.state, p.place);
      Layer upper = f;  // the others differ in the width of their input alone
      upper.I = D * f.P;
      if (count > 1 && p.place.on_cpu()) wave = plan_wavefront(f, upper, static_cast<int>(count), false, team().size);
      Forward above;
      static_cast<Layer&>(above) = upper;
      if (count > 1) at_once = side_by_side(p, f, above);
    } else {
      check_alike(p, problems[0], k);
    }
    f.h0 = of_layer(h0, k, state);
    f.c0 = of_layer(c0, k, cell);
    f.h_reset = of_layer(h_reset, k, state);
    f.c_reset = of_layer(c_reset, k, cell);
    if (p.cell->has_c) f.c_n = static_cast<char*>(c_n.data_ptr()) + k * cell;
    y = p.packed || one_step ? empty({p.N, D * f.P}, p.dtype, p.place)
                             : empty_rows(f.T, f.B, D * f.P, batch_major && k == count - 1, p.dtype, p.place);
    f.h_n = one_step ? y.data_ptr() : static_cast<char*>(h_n.data_ptr()) + k * state;
    const ConstRows rows = rows_of(y, p.packed || one_step);
    f.y = {y.data_ptr(), rows.step, rows.row};
    if (saved && k >= saved->from) {
      saved->tapes.push_back(new_tape(p));
      saved->inputs.push_back(part.input);
      f.tape = saved->tapes.back().data_ptr();
    }
    part.input = y;
    if (wave.groups > 1 || at_once) {
      between.push_back(y);
      continue;
    }
    run(p, f);
    p.input = Tensor();  // memory for two layers' outputs will do
  }
  if (at_once) run_side_by_side(problems[0], layers);
  if (layers[0].B && wave.groups > 1) current().forward_wavefront(layers.data(), static_cast<int>(count), wave, team());
  return {y, h_n, c_n};
}

void stack(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a = take_arguments(reader);
  const bool bidirectional = reader.take<bool>(), batch_major = reader.take<bool>();
  const int64_t count = reader.take<int64_t>(), from = reader.take<int64_t>();
  a.precision = take_precision(reader);
  take_reset_states(reader, a);
  if (from < 0 || from > count) fail("saved_from: expected 0 to num_layers = ", count, ", got ", from);
  Saved saved(from);
  const auto results = run_stack(a, bidirectional, batch_major, count, nullptr, &saved);
  for (int i = 0; i < 3; ++i) stack[i] = stable::detail::from(results[i]);
  stack[3] = stable::detail::from(saved.list());
}

}  // namespace
}  // namespace fastrnn
