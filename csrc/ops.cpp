// torch.ops.fastrnn.*: schemas, checks, allocation, and which sums the weight gradients are.
//
//   check()           arguments -> Problem: a problem.h Layer, the tensors that keep its pointers alive, the sizes
//   layer()           allocates the results, fills Forward, runs the kernel
//   layer_backward()  fills Backward, runs the kernel, sums up the weight gradients
//
// Letters for sizes are problem.h's. Errors name the argument, what was expected and what came.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cells.h"
#include "cpu/dispatch.h"
#include "stable.h"

namespace fastrnn {
namespace {

// ---------------------------------------------------------------------------------------------- arguments and checks

// What both ops begin with, in the schema's order.
struct Arguments {
  std::string cell;
  Tensor input;
  std::optional<Tensor> h0, c0;
  std::vector<Tensor> weights;
  std::optional<Tensor> batch_sizes, lengths, reset;
};

Arguments take_arguments(Reader& reader) {
  Arguments a;  // the members are in the schema's order
  a.cell = reader.take_string();
  a.input = reader.take<Tensor>();
  a.h0 = reader.take_optional();
  a.c0 = reader.take_optional();
  a.weights = reader.take<std::vector<Tensor>>();
  a.batch_sizes = reader.take_optional();
  a.lengths = reader.take_optional();
  a.reset = reader.take_optional();
  return a;
}

// Layer is what the kernel sees; the rest is what the ops themselves need, and what keeps its pointers valid.
struct Problem {
  Layer layer;
  const CellTraits* cell = nullptr;
  bool packed = false, projection = false, bias = false;
  int64_t N = 0;             // stored rows
  int32_t dtype = 0;         // torch's code of the storage dtype
  int32_t compute = 0;       // and of the compute dtype
  size_t per_direction = 0;  // weights of one direction
  Tensor input;              // last dimension contiguous
  std::vector<Tensor> kept;
  std::vector<int64_t> first_row, lengths;
};

void check_tensor(const Tensor& t, const char* name, int32_t dtype, const Sizes& sizes, const char* shape) {
  if (!t.defined() || !t.is_cpu()) fail(name, ": expected a CPU tensor, got a tensor on another device");
  if (dtype_of(t) != dtype) fail(name, ": expected dtype ", dtype_name(dtype), ", got ", dtype_name(dtype_of(t)));
  if (static_cast<size_t>(t.dim()) != sizes.size() || !std::equal(sizes.begin(), sizes.end(), t.sizes().begin()))
    fail(name, ": expected shape ", shape, " = ", text_of(sizes.data(), sizes.size()), ", got ", shape_of(t));
}

// Checks, makes contiguous, keeps alive, returns the data; null when absent.
const void* keep(Problem& p, const std::optional<Tensor>& t, const char* name, const Sizes& sizes, const char* shape,
                 int32_t dtype) {
  if (!t) return nullptr;
  check_tensor(*t, name, dtype, sizes, shape);
  p.kept.push_back(dense(*t));
  return p.kept.back().data_ptr();
}

// [T, B, features] or packed [N, features], its last dimension contiguous; reads the strides that a kernel needs.
ConstRows rows_of(const Tensor& t, bool packed) {
  ConstRows rows{t.data_ptr(), 0, t.stride(packed ? 0 : 1)};
  if (!packed) rows.step = t.stride(0);
  return rows;
}

Tensor rows_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : stable::contiguous(t);
}

const CellTraits& find_cell(const std::string& name) {
  const CellTraits* found = nullptr;
  std::string known;
  for_each_cell([&](auto cell) {
    if (name == cell.name) found = &traits(cell.kind);
    known += std::string(known.empty() ? "'" : ", '") + cell.name + "'";
  });
  if (!found) fail("cell: expected one of ", known, ", got '", name, "'");
  return *found;
}

void check_input(Problem& p, const Arguments& a) {
  const Tensor& x = a.input;
  if (!x.defined() || !x.is_cpu()) fail("input: expected a CPU tensor, got a tensor on another device");
  p.dtype = dtype_of(x);
  const DtypeInfo* floating = dtypes();  // the first four, in the order of enum Dtype
  constexpr Dtype kinds[] = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};
  int kind = 0;
  while (kind < 4 && floating[kind].code != p.dtype) ++kind;
  if (kind == 4) fail("input: expected dtype float32, float64, bfloat16 or float16, got ", dtype_name(p.dtype));
  p.layer.dtype = kinds[kind];
  p.compute = p.layer.dtype == Dtype::f64 ? p.dtype : aoti_torch_dtype_float32();

  p.packed = a.batch_sizes.has_value();
  if (x.dim() != (p.packed ? 2 : 3))
    fail("input: expected ",
         p.packed ? "2 dimensions (rows, input_size) with batch_sizes" : "3 dimensions (T, B, input_size)",
         ", got shape ", shape_of(x));
  p.layer.I = x.size(x.dim() - 1);
  p.input = rows_contiguous(x);
  p.layer.x = rows_of(p.input, p.packed);
}

// Rows of each step from batch_sizes: sorted, so row b is there for as many steps as have more than b rows.
void check_batch_sizes(Problem& p, const Tensor& sizes) {
  if (!sizes.is_cpu() || dtype_of(sizes) != aoti_torch_dtype_int64() || sizes.dim() != 1 || sizes.size(0) == 0)
    fail("batch_sizes: expected a CPU int64 tensor of shape (T,), T >= 1, got ", dtype_name(dtype_of(sizes)),
         " of shape ", shape_of(sizes));
  const Tensor counts = dense(sizes);
  const auto* size = static_cast<const int64_t*>(counts.data_ptr());
  const int64_t T = counts.size(0);
  p.first_row.assign(1, 0);
  for (int64_t t = 0; t < T; ++t) {
    if (size[t] < 0 || (t && size[t] > size[t - 1]))
      fail("batch_sizes: expected sizes >= 0 that never grow, got ", size[t], " at step ", t, t ? " after " : "",
           t ? std::to_string(size[t - 1]) : "");
    p.first_row.push_back(p.first_row.back() + size[t]);
  }
  p.N = p.input.size(0);
  if (p.first_row.back() != p.N)
    fail("batch_sizes: expected a sum equal to input's rows = ", p.N, ", got ", p.first_row.back());
  p.lengths.assign(size[0], 0);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t b = 0; b < size[t]; ++b) p.lengths[b] = t + 1;
  p.layer.T = T;
  p.layer.B = size[0];
  p.layer.first_row = p.first_row.data();
  p.layer.lengths = p.lengths.data();
}

void check_lengths(Problem& p, const Tensor& lengths) {
  if (p.packed) fail("lengths: expected None with batch_sizes, got a tensor");
  const bool wide = dtype_of(lengths) == aoti_torch_dtype_int64();
  if (!lengths.is_cpu() || !(wide || dtype_of(lengths) == aoti_torch_dtype_int32()) || lengths.dim() != 1 ||
      lengths.size(0) != p.layer.B)
    fail("lengths: expected a CPU int64 or int32 tensor of shape (B,) = (", p.layer.B, ",), got ",
         dtype_name(dtype_of(lengths)), " of shape ", shape_of(lengths));
  const int64_t stride = lengths.stride(0);
  const void* data = lengths.data_ptr();
  for (int64_t b = 0; b < p.layer.B; ++b) {
    const int64_t length =
        wide ? static_cast<const int64_t*>(data)[b * stride] : static_cast<const int32_t*>(data)[b * stride];
    if (length < 0 || length > p.layer.T)
      fail("lengths: expected values from 0 to T = ", p.layer.T, ", got ", length, " for row ", b);
    p.lengths.push_back(length);
  }
  p.layer.lengths = p.lengths.data();
}

void check_weights(Problem& p, const Arguments& a) {
  const CellTraits& cell = *p.cell;
  Layer& l = p.layer;
  const size_t n = p.per_direction = a.weights.size() / l.D;
  if (a.weights.size() % l.D || n < 2 || n > 5)
    fail("weights: expected 2 to 5 tensors for each of ", l.D, " direction(s), got ", a.weights.size());
  p.bias = n >= 4;
  p.projection = n % 2 == 1;
  if (p.projection && !cell.has_c)
    fail("weights: expected no projection for cell '", cell.name, "', got ", n, " weights");
  if (!a.weights[1].defined() || a.weights[1].dim() != 2 || a.weights[1].size(0) == 0 ||
      a.weights[1].size(0) % cell.gates)
    fail("weights[1] (w_hh): expected shape (", cell.gates, "*H, P), H >= 1, got ", shape_of(a.weights[1]));
  l.H = a.weights[1].size(0) / cell.gates;
  l.P = p.projection ? a.weights[1].size(1) : l.H;
  if (l.P == 0) fail("weights[1] (w_hh): expected shape (", cell.gates, "*H, P), P >= 1, got ", shape_of(a.weights[1]));

  const std::string gates = std::to_string(cell.gates) + "*H";
  const std::string shapes[5] = {"(" + gates + ", I)", "(" + gates + ", P)", "(" + gates + ",)", "(" + gates + ",)",
                                 "(P, H)"};
  const char* names[5] = {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"};
  const int64_t GH = cell.gates * l.H;
  const Sizes sizes[5] = {{GH, l.I}, {GH, l.P}, {GH}, {GH}, {l.P, l.H}};
  for (int d = 0; d < l.D; ++d) {
    Weights& w = l.weights[d];
    const void** slots[5] = {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.w_hr};
    for (size_t k = 0; k < n; ++k) {
      const size_t role = p.projection && k == n - 1 ? 4 : k;
      const std::string name = "weights[" + std::to_string(d * n + k) + "] (" + names[role] + ")";
      *slots[role] = keep(p, a.weights[d * n + k], name.c_str(), sizes[role], shapes[role].c_str(), p.dtype);
    }
  }
}

Problem check(const Arguments& a, bool bidirectional) {
  Problem p;
  p.cell = &find_cell(a.cell);
  Layer& l = p.layer;
  l.cell = p.cell->kind;
  l.D = bidirectional ? 2 : 1;
  check_input(p, a);
  if (p.packed) {
    check_batch_sizes(p, *a.batch_sizes);
  } else {
    l.T = a.input.size(0);
    l.B = a.input.size(1);
    p.N = l.T * l.B;
    if (l.T == 0) fail("input: expected at least one time step, got shape ", shape_of(a.input));
  }
  check_weights(p, a);
  if (a.c0 && !p.cell->has_c) fail("c0: expected None for cell '", p.cell->name, "', got a tensor");
  l.h0 = keep(p, a.h0, "h0", {l.D, l.B, l.P}, "(D, B, P)", p.dtype);
  l.c0 = keep(p, a.c0, "c0", {l.D, l.B, l.H}, "(D, B, H)", p.dtype);
  if (a.lengths) check_lengths(p, *a.lengths);
  if (a.reset) {
    check_tensor(*a.reset, "reset", aoti_torch_dtype_bool(), {l.T, l.B}, "(T, B)");
    p.kept.push_back(*a.reset);
    l.reset = static_cast<const bool*>(a.reset->data_ptr());
    l.reset_step = a.reset->stride(0);
    l.reset_row = a.reset->stride(1);
  }
  return p;
}

// Zeroes the rows of a dense [T, B] block that lie past their length.
void clear_past_lengths(const Problem& p, void* data, size_t row_bytes) {
  const Layer& l = p.layer;
  if (p.packed || !l.lengths) return;
  for (int64_t b = 0; b < l.B; ++b)
    for (int64_t t = l.lengths[b]; t < l.T; ++t)
      std::memset(static_cast<char*>(data) + (t * l.B + b) * row_bytes, 0, row_bytes);
}

int64_t tape_width(const Problem& p) { return p.cell->tape * p.layer.H + (p.projection ? p.layer.P : 0); }

// --------------------------------------------------------------------------------------------------------- forward

void layer(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  const Arguments a = take_arguments(reader);
  const bool bidirectional = reader.take<bool>(), batch_major = reader.take<bool>();
  const bool all_states = reader.take<bool>(), save = reader.take<bool>();

  const SerialInForkedChild serial;
  const Problem p = check(a, bidirectional);
  const bool has_c = p.cell->has_c;
  Forward f;
  static_cast<Layer&>(f) = p.layer;
  const auto none = [](int32_t dtype) { return empty({0}, dtype); };
  const Tensor y = p.packed ? empty({p.N, f.D * f.P}, p.dtype) : empty_rows(f.T, f.B, f.D * f.P, batch_major, p.dtype);
  const Tensor h_n = empty({f.D, f.B, f.P}, p.dtype);
  const Tensor c_n = has_c ? empty({f.D, f.B, f.H}, p.dtype) : none(p.dtype);
  const Tensor h_all = all_states ? empty({f.D, f.T, f.B, f.P}, p.dtype) : none(p.dtype);
  const Tensor c_all = all_states && has_c ? empty({f.D, f.T, f.B, f.H}, p.dtype) : none(p.dtype);
  const Tensor tape = save ? empty({f.D, p.N, tape_width(p)}, p.compute) : none(p.compute);

  const ConstRows rows = rows_of(y, p.packed);
  f.y = {y.data_ptr(), rows.step, rows.row};
  f.h_n = h_n.data_ptr();
  if (has_c) f.c_n = c_n.data_ptr();
  if (all_states) f.h_all = h_all.data_ptr();
  if (all_states && has_c) f.c_all = c_all.data_ptr();
  if (save) {
    f.tape = tape.data_ptr();
    const size_t row_bytes = tape_width(p) * tape.element_size();  // the kernel leaves those rows alone
    for (int d = 0; d < f.D; ++d) clear_past_lengths(p, static_cast<char*>(f.tape) + d * p.N * row_bytes, row_bytes);
  }
  if (f.B) current().forward(f, team());

  const Tensor* results[] = {&y, &h_n, &c_n, &h_all, &c_all, &tape};
  for (int i = 0; i < 6; ++i) stack[i] = stable::detail::from(*results[i]);
}

// -------------------------------------------------------------------------------------------------------- backward

// The input as an [N, I] matrix of the compute dtype. Rows past a length are zero: a NaN there would survive a product
// with the zero that dgates holds.
Tensor input_matrix(const Problem& p) {
  const Layer& l = p.layer;
  const int64_t row = !p.packed && l.B == 1 ? l.x.step : l.x.row;
  const bool one_stride = p.packed || l.T == 1 || l.x.step == l.B * row;
  if (p.dtype == p.compute && one_stride && row >= std::max<int64_t>(l.I, 1) && (p.packed || !l.lengths))
    return view(p.input, {p.N, l.I}, {row, 1}, 0);
  Tensor copy = empty(p.packed ? Sizes{p.N, l.I} : Sizes{l.T, l.B, l.I}, p.compute);
  stable::copy_(copy, p.input);
  clear_past_lengths(p, copy.data_ptr(), l.I * copy.element_size());
  return view(copy, {p.N, l.I}, {std::max<int64_t>(l.I, 1), 1}, 0);
}

Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

// Calls f(slot, gate, count) for every run of slots that hold consecutive gates of w_hh.
template <class F>
void for_each_hidden_run(const CellTraits& cell, F&& f) {
  for (int slot = 0, end = 0; slot < cell.gates; slot = end) {
    for (end = slot + 1; end < cell.gates && cell.hidden_gate[end] == cell.hidden_gate[end - 1] + 1;) ++end;
    f(slot, cell.hidden_gate[slot], end - slot);
  }
}

// What the kernel leaves for the weight gradients, and the sums they are. Absent members: not wanted.
struct WeightGradients {
  Tensor dgates;
  std::optional<Tensor> h_prev, dh_out, h_raw, x;
  std::vector<RowSum> sums;

  // Sums of input weights and bias, hidden weights and bias, projection of direction d; null for what is not wanted.
  void add_input(const Problem& p, int64_t d, void* w_ih, void* b_ih) {
    const CellTraits& cell = *p.cell;
    const int64_t H = p.layer.H;
    if (w_ih || b_ih) add(p, cell.gates * H, dgates, d, cell.x_first * H, x, 0, w_ih, b_ih);
  }
  void add_hidden(const Problem& p, int64_t d, void* w_hh, void* b_hh) {
    const int64_t H = p.layer.H, size = dgates.element_size();
    const auto at = [&](void* result, int64_t values) {
      return result ? static_cast<char*>(result) + values * size : nullptr;
    };
    if (w_hh || b_hh)
      for_each_hidden_run(*p.cell, [&](int slot, int gate, int count) {
        add(p, count * H, dgates, d, slot * H, h_prev, d, at(w_hh, gate * H * p.layer.P), at(b_hh, gate * H));
      });
  }
  void add_projection(const Problem& p, int64_t d, void* w_hr) {
    if (w_hr) add(p, p.layer.P, *dh_out, d, 0, h_raw, d, w_hr, nullptr);
  }

 private:
  // a: columns [column, column + rows) of left[left_direction], b: right[right_direction]; operands are [D, N,
  // columns], or a matrix.
  void add(const Problem& p, int64_t rows, const Tensor& left, int64_t left_direction, int64_t column,
           const std::optional<Tensor>& right, int64_t right_direction, void* weight, void* bias) {
    RowSum s;
    s.rows = rows;
    s.ld_a = left.size(2);
    s.a = static_cast<const char*>(left.data_ptr()) + (left_direction * p.N * s.ld_a + column) * left.element_size();
    if (weight) {
      s.columns = right->size(right->dim() - 1);
      s.ld_b = right->stride(right->dim() - 2);
      s.b = static_cast<const char*>(right->data_ptr()) + right_direction * p.N * s.ld_b * left.element_size();
    }
    s.weight = weight;
    s.bias = bias;
    sums.push_back(s);
  }
};

void layer_backward(StableIValue* stack, uint64_t, uint64_t) {
  Reader reader(stack);
  const Arguments a = take_arguments(reader);
  const Tensor tape = reader.take<Tensor>();
  std::optional<Tensor> d_output = reader.take_optional();
  const std::optional<Tensor> d_h_n = reader.take_optional(), d_c_n = reader.take_optional();
  const std::optional<Tensor> d_h_all = reader.take_optional(), d_c_all = reader.take_optional();
  const bool bidirectional = reader.take<bool>(), batch_major = reader.take<bool>();
  const std::vector<bool> needs = reader.take<std::vector<bool>>();

  const SerialInForkedChild serial;
  Problem p = check(a, bidirectional);
  Backward b;
  static_cast<Layer&>(b) = p.layer;
  if (needs.size() != 3 + a.weights.size())
    fail("needs: expected one value for input, h0, c0 and each of ", a.weights.size(), " weights, got ", needs.size());
  if (!p.cell->has_c && (d_c_n || d_c_all || needs[2]))
    fail("d_c_n, d_c_all, needs[2]: expected None, None, False for cell '", p.cell->name, "', got a request");
  b.tape = keep(p, tape, "tape", {b.D, p.N, tape_width(p)}, "(D, N, tape width)", p.compute);
  if (d_output) {
    const Sizes sizes = p.packed ? Sizes{p.N, b.D * b.P} : Sizes{b.T, b.B, b.D * b.P};
    check_tensor(*d_output, "d_output", p.dtype, sizes, p.packed ? "(N, D*P)" : "(T, B, D*P)");
    d_output = rows_contiguous(*d_output);
    b.dy = rows_of(*d_output, p.packed);
  }
  b.dh_n = keep(p, d_h_n, "d_h_n", {b.D, b.B, b.P}, "(D, B, P)", p.dtype);
  b.dc_n = keep(p, d_c_n, "d_c_n", {b.D, b.B, b.H}, "(D, B, H)", p.dtype);
  b.dh_all = keep(p, d_h_all, "d_h_all", {b.D, b.T, b.B, b.P}, "(D, T, B, P)", p.dtype);
  b.dc_all = keep(p, d_c_all, "d_c_all", {b.D, b.T, b.B, b.H}, "(D, T, B, H)", p.dtype);

  std::vector<Tensor> results;
  for (size_t i = 0; i < needs.size(); ++i) results.push_back(empty({0}, p.dtype));
  if (needs[0]) {
    results[0] = p.packed ? empty({p.N, b.I}, p.dtype) : empty_rows(b.T, b.B, b.I, batch_major, p.dtype);
    const ConstRows rows = rows_of(results[0], p.packed);
    b.dx = {results[0].data_ptr(), rows.step, rows.row};
  }
  if (needs[1]) b.dh0 = (results[1] = empty({b.D, b.B, b.P}, p.dtype)).data_ptr();
  if (needs[2]) b.dc0 = (results[2] = empty({b.D, b.B, b.H}, p.dtype)).data_ptr();

  const auto role_of = [&](size_t k) {
    return p.projection && k % p.per_direction == p.per_direction - 1 ? 4 : k % p.per_direction;
  };
  bool wanted[5] = {};
  for (size_t k = 0; k < a.weights.size(); ++k) wanted[role_of(k)] |= needs[3 + k];
  WeightGradients gradients{empty({b.D, p.N, p.cell->slots * b.H}, p.compute), {}, {}, {}, {}, {}};
  b.dgates = gradients.dgates.data_ptr();
  const auto operand = [&](bool is_wanted, std::optional<Tensor>& tensor, int64_t columns) {
    if (!is_wanted) return static_cast<void*>(nullptr);
    tensor = empty({b.D, p.N, columns}, p.compute);
    return tensor->data_ptr();
  };
  b.h_prev = operand(wanted[1], gradients.h_prev, b.P);
  b.dh_out = operand(wanted[4], gradients.dh_out, b.P);
  b.h_raw = operand(wanted[4], gradients.h_raw, b.H);
  if (b.B) current().backward(b, team());

  if (wanted[0]) gradients.x = input_matrix(p);
  for (int64_t d = 0; d < b.D; ++d) {
    void* result[5] = {};
    for (size_t k = d * p.per_direction; k < (d + 1) * p.per_direction; ++k)
      if (needs[3 + k]) result[role_of(k)] = (results[3 + k] = empty(sizes_of(a.weights[k]), p.compute)).data_ptr();
    gradients.add_input(p, d, result[0], result[2]);
    gradients.add_hidden(p, d, result[1], result[3]);
    gradients.add_projection(p, d, result[4]);
  }
  const Dtype compute = b.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  current().row_sums(gradients.sums.data(), static_cast<int>(gradients.sums.size()), p.N, compute, team());
  if (p.dtype != p.compute)
    for (size_t k = 0; k < a.weights.size(); ++k)
      if (needs[3 + k]) results[3 + k] = stable::to(results[3 + k], p.input.scalar_type());
  stack[0] = stable::detail::from(results);
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def(
      "layer(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset, bool bidirectional, bool batch_major, bool all_states, bool save) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor h_all, Tensor c_all, Tensor tape)");
  m.def(
      "layer_backward(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? reset, Tensor tape, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_h_all, "
      "Tensor? d_c_all, bool bidirectional, bool batch_major, bool[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("layer", &fastrnn::layer);
  m.impl("layer_backward", &fastrnn::layer_backward);
}
