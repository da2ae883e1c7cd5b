// The operators of back-propagation through time, for ops.cpp alone.
//
//   layer_backward()  allocates the gradients, fills Backward, runs the kernel; of layer() and, with a 2-D input,
//                     step()
//   layer_operands()  the same without the weights' gradients: what they are products of
//   stack_backward()  the same for several layers
//
// Letters for sizes are problem.h's. Errors name the argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "ops_forward.h"

namespace fastrnn {
namespace {

// The gradients that come from outside.
struct Incoming {
  std::optional<Tensor> d_output, d_h_n, d_c_n, d_h_all, d_c_all;
};

// Memory for the gradients of a layer's weights that are needed, into results and b; zero where no row will add to it.
template <class Needs, class Results>
void allocate_gradients(const Problem& p, Backward& b, const std::vector<Tensor>& weights, Needs needs,
                        Results results) {
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!needs[i]) continue;
    auto& to = b.gradients[i / p.per_direction];
    const size_t role = i % p.per_direction;
    void** places[5] = {&to.w_ih, &to.w_hh, &to.b_ih, &to.b_hh, &to.w_hr};
    Tensor& result = results[i];
    result = empty_block(Shape(weights[i]), p.compute, compute_size(p), p.place);
    *places[p.layer.projected && role == p.per_direction - 1 ? 4 : role] = result.data_ptr();
    if (!b.B) stable::zero_(result);
  }
}

// Memory for what the weights' gradients are products of.
std::vector<Tensor> allocate_operands(const Problem& p, Backward& b) {
  const bool flat = p.packed || p.input.dim() == 2;
  std::vector<Tensor> operands;
  const auto add = [&](void*& place, int64_t columns) {
    const Shape shape = flat ? Shape{b.D, p.N, columns} : Shape{b.D, b.T, b.B, columns};
    operands.push_back(empty_block(shape, p.compute, compute_size(p), p.place));
    place = operands.back().data_ptr();
  };
  add(b.operands.dgates, p.cell->slots * b.H);
  add(b.operands.h_prev, b.P);
  if (b.projected) {
    add(b.operands.dh_out, b.P);
    add(b.operands.h_raw, b.H);
  }
  return operands;
}

// Whether steps are watched, of a sequence that goes on after them (problem.h: watched, watched_goes_on), and the sums.
struct Watching {
  bool wanted = false, goes_on = false;
  Tensor sums;
};

Watching take_watching(Reader& reader) {
  const int64_t found = reader.take<int64_t>();
  if (found < 0 || found > 2) fail("watch: expected 0 (no), 1 (yes) or 2 (of a sequence that goes on), got ", found);
  return {found > 0, found == 2, Tensor()};
}

// Layers on top of each other, the last one first. needs, and the result: input, h0, c0, the weights of all layers, and
// h_reset and c_reset if that is asked.
// operands: to be filled, of one layer; or null. What is watched comes after the gradients.
std::vector<Tensor> run_backward(const Arguments& a, const Saved& saved, const Incoming& incoming, bool bidirectional,
                                 bool batch_major, int64_t count, const std::vector<bool>& needs,
                                 std::vector<Tensor>* operands = nullptr, Watching watch = {}) {
  const SerialInForkedChild serial;
  const bool one_step = a.input.defined() && a.input.dim() == 2 && !a.batch_sizes;  // of step()
  const size_t per_layer = weights_per_layer(a, count), weights_end = 3 + a.weights.size();
  if (needs.size() != weights_end && needs.size() != weights_end + 2)
    fail("needs: expected one value for input, h0, c0, each of ", a.weights.size(),
         " weights, and perhaps h_reset and c_reset, got ", needs.size());
  const bool resets = needs.size() > weights_end && (needs[weights_end] || needs[weights_end + 1]);
  const auto first_weight = [&](int64_t k) { return needs.begin() + 3 + k * static_cast<int64_t>(per_layer); };
  // Below this layer nothing is wanted.
  int64_t lowest = 0;
  if (!needs[0] && !needs[1] && !needs[2] && !resets)
    while (lowest + 1 < count &&
           std::find(first_weight(lowest), first_weight(lowest + 1), true) == first_weight(lowest + 1))
      ++lowest;
  if (lowest < saved.from)
    fail("needs: expected nothing for the layers below ", saved.from, ", of which nothing was saved, got a request");

  Arguments part = a;
  part.h0 = part.c0 = part.h_reset = part.c_reset = std::nullopt;
  std::vector<Problem> problems;
  std::vector<Backward> layers(static_cast<size_t>(count - lowest));
  std::vector<Tensor> results, between;
  const void *h0 = nullptr, *c0 = nullptr, *h_reset = nullptr, *c_reset = nullptr, *d_h_n = nullptr, *d_c_n = nullptr;
  void* states[4] = {};  // gradients of h0, c0, h_reset, c_reset
  std::optional<Tensor> dy = incoming.d_output;
  Wavefront wave;
  bool at_once = false;  // on a GPU
  int64_t columns = 0;   // of what is watched
  problems.reserve(layers.size());
  for (int64_t k = count - 1; k >= lowest; --k) {
    part.input = k == 0 ? a.input : saved.inputs[static_cast<size_t>(k - saved.from)];
    part.weights.assign(a.weights.begin() + k * per_layer, a.weights.begin() + (k + 1) * per_layer);
    if (k > 0 && (part.input.dim() != a.input.dim() || part.weights[0].dim() != 2 ||
                  part.input.size(part.input.dim() - 1) != part.weights[0].size(1)))
      fail("saved: expected an input of layer ", k, " that fits its weights, got shape ", shape_of(part.input));
    problems.push_back(check(part, bidirectional, one_step));
    Problem& p = problems.back();
    if (!one_step) read_state_dtype(p, a.h0);
    Backward& b = layers[problems.size() - 1];
    static_cast<Layer&>(b) = p.layer;
    const bool flat = p.packed || one_step;
    const int64_t size = state_size(p), state = b.D * b.B * b.P * size, cell = b.D * b.B * b.H * size;
    if (k == count - 1) {
      if (!p.cell->has_c &&
          (a.c0 || a.c_reset || incoming.d_c_n || incoming.d_c_all || needs[2] || (resets && needs[weights_end + 1])))
        fail("c0, c_reset, d_c_n, d_c_all and their needs: expected None and False for cell '", p.cell->name,
             "', got a request");
      for (size_t i = 0; i < needs.size(); ++i) results.push_back(empty({0}, p.dtype, p.place));
      const Shape h_shape = one_step ? Shape{b.B, b.P} : Shape{count * b.D, b.B, b.P};
      const Shape c_shape = one_step ? Shape{b.B, b.H} : Shape{count * b.D, b.B, b.H};
      const char* h_letters = one_step ? "(B, P)" : count > 1 ? "(L*D, B, P)" : "(D, B, P)";
      const char* c_letters = one_step ? "(B, H)" : count > 1 ? "(L*D, B, H)" : "(D, B, H)";
      h0 = keep(p, a.h0, "h0", h_shape, h_letters, p.state);
      c0 = keep(p, a.c0, "c0", c_shape, c_letters, p.state);
      h_reset = keep(p, a.h_reset, "h_reset", h_shape, h_letters, p.state);
      c_reset = keep(p, a.c_reset, "c_reset", c_shape, c_letters, p.state);
      d_h_n = keep(p, incoming.d_h_n, "d_h_n", h_shape, h_letters, p.state);
      d_c_n = keep(p, incoming.d_c_n, "d_c_n", c_shape, c_letters, p.state);
      const size_t places[4] = {1, 2, weights_end, weights_end + 1};
      for (int i = 0; i < (resets ? 4 : 2); ++i) {
        if (!needs[places[i]]) continue;
        results[places[i]] = empty(i % 2 ? c_shape : h_shape, p.state, p.place);
        states[i] = results[places[i]].data_ptr();
      }
      // Of one layer alone.
      b.dh_all = keep(p, incoming.d_h_all, "d_h_all", {b.D, b.T, b.B, b.P}, "(D, T, B, P)", p.dtype);
      b.dc_all = keep(p, incoming.d_c_all, "d_c_all", {b.D, b.T, b.B, b.H}, "(D, T, B, H)", p.dtype);
      if (watch.wanted) {
        if (!p.place.on_cpu()) fail("watch: expected 0 but on the CPU, got another value on ", place_name(p.place));
        columns = watched::columns(p.cell->has_c, p.cell->watched_gates);
        watch.sums = empty({count * b.D, b.T, columns}, aoti_torch_dtype_float64(), p.place);
        if (lowest > 0 || !b.B)  // not all of it will be written
          std::memset(watch.sums.data_ptr(), 0, size_t(count * b.D * b.T * columns) * sizeof(double));
      }
      Layer first = b;
      if (lowest == 0) first.I = a.input.size(a.input.dim() - 1);
      if (layers.size() > 1 && p.place.on_cpu())
        wave = plan_wavefront(first, b, static_cast<int>(layers.size()), true, team().size);
      Backward below;
      static_cast<Layer&>(below) = first;
      if (layers.size() > 1) at_once = side_by_side(p, b, below);
    } else {
      check_alike(p, problems[0], k);
      if (b.T != layers[0].T || b.B != layers[0].B || p.N != problems[0].N)
        fail("saved: expected the inputs of all layers to have T = ", layers[0].T, ", B = ", layers[0].B, ", got ",
             shape_of(part.input), " for layer ", k);
    }
    b.tape = keep(p, saved.tapes[static_cast<size_t>(k - saved.from)], count > 1 ? "saved (tape)" : "tape",
                  {b.D, p.N, tape_width(p)}, "(D, N, tape width)", p.compute);
    if (dy) {
      const Shape shape = flat ? Shape{p.N, b.D * b.P} : Shape{b.T, b.B, b.D * b.P};
      check_tensor(p, *dy, "d_output", p.dtype, shape, p.packed ? "(N, D*P)" : "(T, B, D*P)");
      dy = rows_contiguous(*dy);
      b.dy = rows_of(*dy, flat);
    }
    b.h0 = of_layer(h0, k, state);
    b.c0 = of_layer(c0, k, cell);
    b.h_reset = of_layer(h_reset, k, state);
    b.c_reset = of_layer(c_reset, k, cell);
    b.dh_n = of_layer(d_h_n, k, state);
    b.dc_n = of_layer(d_c_n, k, cell);
    b.dh0 = of_layer(states[0], k, state);
    b.dc0 = of_layer(states[1], k, cell);
    b.dh_reset = of_layer(states[2], k, state);
    b.dc_reset = of_layer(states[3], k, cell);

    Tensor dx;
    const bool wide = k == 0 && p.state != p.dtype;  // for a caller who adds up more of them
    if (k > lowest || needs[0]) {
      b.dx_is_compute = wide || (b.D == 2 && p.dtype != p.compute);
      const int32_t dtype = b.dx_is_compute ? p.compute : p.dtype;
      dx = flat ? empty({p.N, b.I}, dtype, p.place)
                : empty_rows(b.T, b.B, b.I, batch_major && k == 0 && p.place.on_cpu(), dtype, p.place);
      const ConstRows rows = rows_of(dx, flat);
      b.dx = {dx.data_ptr(), rows.step, rows.row};
    }
    allocate_gradients(p, b, part.weights, first_weight(k), results.begin() + 3 + k * static_cast<int64_t>(per_layer));
    if (operands) *operands = allocate_operands(p, b);
    if (watch.wanted) {
      b.watched = static_cast<double*>(watch.sums.data_ptr()) + k * b.D * b.T * columns;
      b.watched_goes_on = watch.goes_on;
    }
    if (wave.groups > 1 || at_once) {
      if (dy) between.push_back(*dy);
    } else {
      run(p, b);
      if (b.dx_is_compute && !wide) dx = stable::to(dx, p.input.scalar_type());
    }
    if (k == 0 && needs[0]) results[0] = dx;
    dy = dx;  // memory for two layers' will do, unless they are worked on side by side
  }
  if (at_once) run_side_by_side(problems[0], layers);
  if (layers[0].B && wave.groups > 1)
    current().backward_wavefront(layers.data(), static_cast<int>(layers.size()), wave, team());
  const Problem& p = problems[0];
  if (needs[0] && batch_major && results[0].dim() == 3 && !p.place.on_cpu())
    results[0] = batch_major_copy(results[0], p);
  if (p.dtype != p.compute && p.state == p.dtype)
    for (size_t i = 3; i < weights_end; ++i)
      if (needs[i]) results[i] = stable::to(results[i], a.input.scalar_type());
  if (watch.wanted) results.push_back(watch.sums);
  return results;
}

void layer_backward(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a = take_arguments(reader);
  const Saved saved({reader.take<Tensor>()}, 1);
  Incoming incoming;
  for (auto* gradient : {&incoming.d_output, &incoming.d_h_n, &incoming.d_c_n, &incoming.d_h_all, &incoming.d_c_all})
    *gradient = reader.take_optional();
  const bool bidirectional = reader.take<bool>(), batch_major = reader.take<bool>();
  if (a.input.defined() && a.input.dim() == 2 && !a.batch_sizes &&
      (bidirectional || incoming.d_output || incoming.d_h_all || incoming.d_c_all || a.lengths || a.reset))
    fail(
        "input: expected 3 dimensions (T, B, input_size), or for one step two directions, d_output, d_h_all, d_c_all, ",
        "lengths and reset absent, got shape ", shape_of(a.input));
  const auto needs = reader.take<std::vector<bool>>();
  a.precision = take_precision(reader);
  take_reset_states(reader, a);
  const Watching watch = take_watching(reader);
  stack[0] =
      stable::detail::from(run_backward(a, saved, incoming, bidirectional, batch_major, 1, needs, nullptr, watch));
}

void layer_operands(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a = take_arguments(reader);
  const Saved saved({reader.take<Tensor>()}, 1);
  Incoming incoming;
  for (auto* gradient : {&incoming.d_output, &incoming.d_h_n, &incoming.d_c_n, &incoming.d_h_all, &incoming.d_c_all})
    *gradient = reader.take_optional();
  const bool bidirectional = reader.take<bool>(), batch_major = reader.take<bool>();
  if (a.input.defined() && a.input.dim() == 2 && !a.batch_sizes)
    fail("input: expected 3 dimensions (T, B, input_size), got shape ", shape_of(a.input));
  auto needs = reader.take<std::vector<bool>>();
  take_reset_states(reader, a);
  if (needs.size() != 3 && needs.size() != 5)
    fail("needs: expected one value for input, h0 and c0 each, and perhaps h_reset and c_reset, got ", needs.size());
  needs.insert(needs.begin() + 3, a.weights.size(), false);
  std::vector<Tensor> operands;
  auto results = run_backward(a, saved, incoming, bidirectional, batch_major, 1, needs, &operands);
  results.erase(results.begin() + 3, results.begin() + 3 + static_cast<int64_t>(a.weights.size()));
  results.insert(results.end(), operands.begin(), operands.end());
  stack[0] = stable::detail::from(results);
}

void stack_backward(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a = take_arguments(reader);
  const auto list = reader.take<std::vector<Tensor>>();
  Incoming incoming;
  for (auto* gradient : {&incoming.d_output, &incoming.d_h_n, &incoming.d_c_n}) *gradient = reader.take_optional();
  const bool bidirectional = reader.take<bool>(), batch_major = reader.take<bool>();
  const int64_t count = reader.take<int64_t>();
  const auto needs = reader.take<std::vector<bool>>();
  a.precision = take_precision(reader);
  take_reset_states(reader, a);
  weights_per_layer(a, count);  // which checks that count is one
  if (a.input.defined() && a.input.dim() == 2 && !a.batch_sizes)
    fail("input: expected 3 dimensions (T, B, input_size), got shape ", shape_of(a.input));
  const Watching watch = take_watching(reader);
  const Saved saved(list, count);
  stack[0] =
      stable::detail::from(run_backward(a, saved, incoming, bidirectional, batch_major, count, needs, nullptr, watch));
}

}  // namespace
}  // namespace fastrnn
