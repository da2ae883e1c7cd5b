// The operators of packed weights, and of states that the caller owns, for ops.cpp alone.
//
//   pack(), frozen()  weights packed once, and stack() or step() by them
//   step_onto()       step_: one step of layers, onto states that the caller owns
//
// Letters for sizes are problem.h's. Errors name the argument, what was expected and what came.
#pragma once

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "ops_forward.h"

namespace fastrnn {
namespace {

void pack(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a, part;
  a.cell = part.cell = reader.take_string();
  a.weights = reader.take<std::vector<Tensor>>();
  const bool bidirectional = reader.take<bool>();
  const int64_t count = reader.take<int64_t>();
  const Precision precision = take_precision(reader);
  const SerialInForkedChild serial;
  const size_t per_layer = weights_per_layer(a, count);
  std::vector<Problem> problems;
  for (int64_t k = 0; k < count; ++k) {
    part.weights.assign(a.weights.begin() + k * per_layer, a.weights.begin() + (k + 1) * per_layer);
    Problem p;
    p.cell = &find_cell(a.cell);
    p.layer.cell = p.cell->kind;
    p.layer.precision = precision;
    p.layer.D = bidirectional ? 2 : 1;
    read_kind(p, part.weights[0], "weights[0] (w_ih)");
    if (part.weights[0].dim() != 2)
      fail("weights[0] (w_ih): expected shape (", p.cell->gates, "*H, I), got ", shape_of(part.weights[0]));
    p.layer.I = part.weights[0].size(1);
    check_weights(p, part);
    problems.push_back(std::move(p));
    check_alike(problems.back(), problems[0], k);
    const int64_t expected = problems[0].layer.D * problems[0].layer.P;
    if (k && problems.back().layer.I != expected)
      fail("weights: expected layer ", k, " to have inputs of D*P = ", expected, " features, got ",
           problems.back().layer.I);
  }
  const Kernels& kernels = current();
  const Layer& first = problems[0].layer;
  PackedHeader header{};
  std::memcpy(header.magic, packed_magic, sizeof packed_magic);
  std::strncpy(header.isa, kernels.isa, sizeof header.isa - 1);
  header.cell = first.cell, header.dtype = first.dtype, header.precision = precision, header.D = first.D,
  header.projected = first.projected;
  header.bias = problems[0].bias, header.layers = count, header.I = first.I, header.H = first.H, header.P = first.P;
  header.first_size = kernels.packed_size(first);
  header.size = kernels.packed_size(problems.back().layer);
  const Tensor packed = empty_block({header.bytes()}, aoti_torch_dtype_uint8(), 1, problems[0].place);
  auto* const to = static_cast<char*>(packed.data_ptr());
  std::memcpy(to, &header, sizeof header);
  for (int64_t k = 0; k < count; ++k)
    for (int d = 0; d < first.D; ++d) kernels.pack(problems[k].layer, d, to + header.place(k, d));
  stack[0] = stable::detail::from(packed);
}

void frozen(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  Arguments a;
  const Tensor packed = reader.take<Tensor>();
  a.input = reader.take<Tensor>();
  a.h0 = reader.take_optional();
  a.c0 = reader.take_optional();
  const bool batch_first = reader.take<bool>();
  a.batch_sizes = reader.take_optional();
  a.lengths = reader.take_optional();
  a.reset = reader.take_optional();
  take_reset_states(reader, a);
  const PackedHeader& header = packed_header(packed);
  const bool flat = a.input.defined() && a.input.dim() == 2;
  if (flat && !a.batch_sizes && (header.D > 1 || header.layers > 1 || a.lengths || a.reset || a.h_reset || a.c_reset))
    fail(
        "input: expected 3 dimensions (T, B, input_size), or for one step one layer and direction, lengths, reset and "
        "reset states absent, got shape ",
        shape_of(a.input));
  if (flat && batch_first) fail("batch_first: expected False for an input of 2 dimensions, got True");
  if (batch_first) a.input = stable::transpose(a.input, 0, 1);
  auto results = run_stack(a, header.D == 2, batch_first, header.layers, &header);
  if (batch_first) results[0] = stable::transpose(results[0], 0, 1);
  for (int i = 0; i < 3; ++i) stack[i] = stable::detail::from(results[i]);
}

// Whether the memory of two tensors, from the first to the last value, has bytes in common.
bool overlap(const Tensor& a, const Tensor& b) {
  const auto end = [](const Tensor& t) {
    int64_t values = 1;
    for (int64_t i = 0; i < t.dim(); ++i) values += (t.size(i) - 1) * t.stride(i);
    return static_cast<const char*>(t.data_ptr()) + values * t.element_size();
  };
  return a.numel() && b.numel() && a.data_ptr() < end(b) && b.data_ptr() < end(a);
}

// One step of layers on top of each other, onto the states that the caller owns: nothing else is allocated. All is
// checked before anything is written.
void step_onto(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  const Tensor h = reader.take<Tensor>();
  const std::optional<Tensor> c = reader.take_optional();
  Arguments a;
  a.cell = reader.take_string();
  a.input = reader.take<Tensor>();
  a.weights = reader.take<std::vector<Tensor>>();
  const auto packed = reader.take_optional();
  const int64_t count = reader.take<int64_t>();
  const auto reset = reader.take_optional();
  take_reset_states(reader, a);
  a.precision = take_precision(reader);

  const SerialInForkedChild serial;
  const PackedHeader* const header = packed ? &packed_header(*packed) : nullptr;
  if (header && (header->D > 1 || header->layers != count))
    fail("packed: expected ", count, " layer(s) of one direction, got ", header->layers, " of ", header->D);
  const size_t per_layer = header ? 0 : weights_per_layer(a, count);
  Arguments part = a;
  part.h_reset = part.c_reset = std::nullopt;
  std::vector<Problem> problems;
  problems.reserve(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) {
    if (!header) part.weights.assign(a.weights.begin() + k * per_layer, a.weights.begin() + (k + 1) * per_layer);
    if (k == 1) {  // the input of each layer is the state of the one below
      if (h.dim() != 3 || h.size(0) != count)
        fail("h: expected shape (L, B, P) with L = ", count, ", got ", shape_of(h));
    }
    if (k) part.input = stable::select(h, 0, k - 1);
    problems.push_back(check(part, false, true, header, k));
    if (k) check_alike(problems.back(), problems[0], k);
  }
  Problem& first = problems[0];
  const int64_t B = first.layer.B, P = first.layer.P, H = first.layer.H;
  const bool flat = h.defined() && h.dim() == 2 && count == 1;
  const auto shape = [&](int64_t rows, int64_t width) { return flat ? Shape{rows, width} : Shape{count, rows, width}; };
  const auto check_state = [&](const Tensor& t, const char* name, int64_t width, const char* letters) {
    check_tensor(first, t, name, first.dtype, shape(B, width), letters);
    if (!t.is_contiguous()) fail(name, ": expected a contiguous tensor to write to, got one with other strides");
  };
  check_no_c(first, c, "c");
  check_no_c(first, a.c_reset, "c_reset");
  if (first.cell->has_c && !c) fail("c: expected a tensor for cell '", first.cell->name, "', got None");
  check_state(h, "h", P, "(L, B, P)");
  if (c) check_state(*c, "c", H, "(L, B, H)");
  if (c && overlap(*c, h)) fail("c: expected memory of its own, got some of h's");
  if (reset) check_tensor(first, *reset, "reset", aoti_torch_dtype_bool(), {B}, "(B,)");
  const auto apart = [&](const Tensor& t) { return overlap(h, t) || (c && overlap(*c, t)) ? stable::clone(t) : t; };
  // The same for every row, or for each its own.
  const bool one = a.h_reset && B != 1 && a.h_reset->defined() && a.h_reset->dim() >= 2 &&
                   a.h_reset->size(a.h_reset->dim() - 2) == 1;
  const auto start_of = [&](std::optional<Tensor>& start, const char* name, int64_t width) {
    if (!start) return static_cast<const void*>(nullptr);
    check_tensor(first, *start, name, first.dtype, shape(one ? 1 : B, width), "(L, B or 1, width)");
    start = apart(*start);
    return kept_data(first, *start);
  };
  const void* const h_reset = start_of(a.h_reset, "h_reset", P);
  const void* const c_reset = start_of(a.c_reset, "c_reset", H);
  const Tensor input = apart(a.input);
  first.input = rows_contiguous(input);
  first.layer.x = rows_of(first.input, true);

  const int64_t size = h.element_size(), state = B * P * size, cell = B * H * size;
  for (int64_t k = 0; B && k < count; ++k) {
    Forward f;
    static_cast<Layer&>(f) = problems[static_cast<size_t>(k)].layer;
    f.h_n = of_layer(h.data_ptr(), k, state);
    f.h0 = f.h_n;
    f.y = {f.h_n, 0, P};
    if (c) f.c_n = of_layer(c->data_ptr(), k, cell);
    f.c0 = f.c_n;
    f.one_reset = one;
    f.h_reset = of_layer(h_reset, k, one ? P * size : state);
    f.c_reset = of_layer(c_reset, k, one ? H * size : cell);
    if (reset) {
      f.reset = static_cast<const bool*>(reset->data_ptr());
      f.reset_row = reset->stride(0);
    }
    current().forward(f, team());
  }
}

}  // namespace
}  // namespace fastrnn
