// What the operators are given, for ops_*.h alone: read from the boxed call, checked, and turned into what a kernel
// sees.
//
//   check()  arguments -> Problem: a problem.h Layer, the tensors that keep its pointers alive, the sizes
//
// Letters for sizes are problem.h's. Errors name the argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cells.h"
#include "cpu/dispatch.h"
#include "packed.h"
#include "stable.h"

namespace fastrnn {
namespace {

// What the ops begin with, in their schemas' order; a step has nothing after the weights.
struct Arguments {
  std::string cell;
  Tensor input;
  std::optional<Tensor> h0, c0;
  std::vector<Tensor> weights;
  std::optional<Tensor> batch_sizes, lengths, reset;
  // The last arguments.
  Precision precision = Precision::exact;
  std::optional<Tensor> h_reset, c_reset;
};

Arguments take_arguments(Reader& reader, bool one_step = false) {
  Arguments a;
  a.cell = reader.take_string();
  a.input = reader.take<Tensor>();
  a.h0 = reader.take_optional();
  a.c0 = reader.take_optional();
  a.weights = reader.take<std::vector<Tensor>>();
  if (one_step) return a;
  a.batch_sizes = reader.take_optional();
  a.lengths = reader.take_optional();
  a.reset = reader.take_optional();
  return a;
}

Precision take_precision(Reader& reader) {
  const int64_t found = reader.take<int64_t>();
  if (found < 0 || found > 2) fail("precision: expected 0 (exact), 1 (tf32) or 2 (bf16), got ", found);
  return static_cast<Precision>(found);
}

void take_reset_states(Reader& reader, Arguments& a) {
  a.h_reset = reader.take_optional();
  a.c_reset = reader.take_optional();
}

// Layer is what the kernel sees; the rest is what the ops themselves need, and what keeps its pointers valid.
struct Problem {
  Layer layer;
  const CellTraits* cell = nullptr;
  Place place;  // input's, and so everything's, but for batch_sizes
  bool packed = false, bias = false;
  int64_t N = 0;             // rows of the tape: the stored rows, or T*B where lengths alone tell how many are used
  int32_t dtype = 0;         // torch's code of the storage dtype
  int32_t compute = 0;       // and of the compute dtype
  int32_t state = 0;         // and of the states'
  size_t per_direction = 0;  // weights of one direction
  Tensor input;              // last dimension contiguous; on a GPU all of it
  std::vector<Tensor> kept;
  std::vector<int64_t> first_row, steps_above, lengths, order;
  // On a GPU, where nobody reads them: of what values they like.
  struct {
    const void* data = nullptr;
    bool wide = false;  // int64, not int32
    int64_t stride = 0;
  } device_lengths;
};

// Whether this build has kernels for a device.
bool served(const Place& place) {
#ifdef FASTRNN_CUDA
  if (place.kind == aoti_torch_device_type_cuda()) return true;
#endif
  return place.on_cpu();
}

// A tensor whose memory was given back under it (untyped_storage().resize_(0)) has its offset for an address.
bool was_freed(const Tensor& t) {
  return t.numel() && reinterpret_cast<uintptr_t>(t.data_ptr()) == uintptr_t(t.storage_offset() * t.element_size());
}

template <class Name>
void check_memory(const Tensor& t, const Name& name) {
  if (was_freed(t))
    fail(name(), ": expected a tensor with memory, got one of shape ", shape_of(t), " whose storage is empty");
}

// name and letters are for errors alone: called when there is one.
template <class Name, class Letters>
void check_tensor(const Problem& p, const Tensor& t, const Name& name, int32_t dtype, const Shape& shape,
                  const Letters& letters) {
  if (!t.defined() || !p.place.holds(t))
    fail(name(), ": expected a tensor on ", place_name(p.place), ", got ", place_name(t));
  if (dtype_of(t) != dtype) fail(name(), ": expected dtype ", dtype_name(dtype), ", got ", dtype_name(dtype_of(t)));
  if (!(shape == t))
    fail(name(), ": expected shape ", letters(), " = ", text_of(shape.sizes, shape.dim), ", got ", shape_of(t));
  check_memory(t, name);
}
void check_tensor(const Problem& p, const Tensor& t, const char* name, int32_t dtype, const Shape& shape,
                  const char* letters) {
  check_tensor(p, t, [&] { return name; }, dtype, shape, [&] { return letters; });
}

// The data of a checked tensor, made contiguous and kept alive.
const void* kept_data(Problem& p, const Tensor& t) {
  if (t.is_contiguous()) return t.data_ptr();  // the arguments live as long as the call
  p.kept.push_back(stable::contiguous(t));
  return p.kept.back().data_ptr();
}

// Checks, makes contiguous, keeps alive, returns the data; null when absent.
const void* keep(Problem& p, const std::optional<Tensor>& t, const char* name, const Shape& shape, const char* letters,
                 int32_t dtype) {
  if (!t) return nullptr;
  check_tensor(p, *t, name, dtype, shape, letters);
  return kept_data(p, *t);
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
  for_each_cell([&](auto cell) {
    if (name == cell.name) found = &traits(cell.kind);
  });
  if (found) return *found;
  std::string known;
  for_each_cell([&](auto cell) { known += std::string(known.empty() ? "'" : ", '") + cell.name + "'"; });
  fail("cell: expected one of ", known, ", got '", name, "'");
}

// The device and the dtype that everything is to have: those of `t`.
void read_kind(Problem& p, const Tensor& t, const char* name) {
  if (!t.defined()) fail(name, ": expected a tensor, got none");
  p.place = place_of(t);
  if (!served(p.place))
    fail(name, ": expected a tensor on a device that this build has kernels for, got ", place_name(p.place));
  p.dtype = dtype_of(t);
  const DtypeInfo* floating = dtypes();  // the first four, in the order of enum Dtype
  constexpr Dtype kinds[] = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};
  int kind = 0;
  while (kind < 4 && floating[kind].code != p.dtype) ++kind;
  if (kind == 4) fail(name, ": expected dtype float32, float64, bfloat16 or float16, got ", dtype_name(p.dtype));
  p.layer.dtype = kinds[kind];
  p.compute = p.layer.dtype == Dtype::f64 ? p.dtype : aoti_torch_dtype_float32();
  p.state = p.dtype;
  p.layer.state = p.layer.dtype;
}

// The states' dtype is h0's, if that is the compute dtype; input's otherwise.
void read_state_dtype(Problem& p, const std::optional<Tensor>& h0) {
  if (p.dtype == p.compute || !h0 || dtype_of(*h0) != p.compute) return;
  p.state = p.compute;
  p.layer.state = Dtype::f32;
}

void check_input(Problem& p, const Arguments& a, bool one_step) {
  const Tensor& x = a.input;
  read_kind(p, x, "input");
  p.packed = a.batch_sizes.has_value();
  const bool flat = p.packed || one_step;
  if (x.dim() != (flat ? 2 : 3))
    fail("input: expected ",
         p.packed   ? "2 dimensions (rows, input_size) with batch_sizes"
         : one_step ? "2 dimensions (B, input_size)"
                    : "3 dimensions (T, B, input_size)",
         ", got shape ", shape_of(x));
  check_memory(x, [] { return "input"; });
  p.layer.I = x.size(x.dim() - 1);
  p.input = p.place.on_cpu() ? rows_contiguous(x) : dense(x);
  p.layer.x = rows_of(p.input, flat);
}

// The layer's first_row and steps_above, from p.first_row, p.lengths and the layer's order.
void rank_steps(Problem& p) {
  p.steps_above.assign(1, 0);
  for (int64_t r = 0; r < p.layer.B; ++r)
    p.steps_above.push_back(p.steps_above.back() + p.lengths[p.layer.order ? p.order[r] : r]);
  p.layer.first_row = p.first_row.data();
  p.layer.steps_above = p.steps_above.data();
}

// Rows of each step from batch_sizes: sorted, so row b is there for as many steps as have more than b rows.
void check_batch_sizes(Problem& p, const Tensor& sizes) {
  if (!sizes.is_cpu() || dtype_of(sizes) != aoti_torch_dtype_int64() || sizes.dim() != 1 || sizes.size(0) == 0)
    fail("batch_sizes: expected a CPU int64 tensor of shape (T,), T >= 1, got ", dtype_name(dtype_of(sizes)),
         " of shape ", shape_of(sizes));
  check_memory(sizes, [] { return "batch_sizes"; });
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
  p.layer.packed = true;
  rank_steps(p);
  p.layer.lengths = p.lengths.data();
  if (!p.place.on_cpu()) p.layer.steps_above = p.layer.lengths = nullptr;  // cuda/layer.h: first_row says it all
}

void check_lengths(Problem& p, const Tensor& lengths) {
  if (p.packed) fail("lengths: expected None with batch_sizes, got a tensor");
  if (!lengths.defined() || !p.place.holds(lengths))
    fail("lengths: expected a tensor on ", place_name(p.place), ", got ", place_name(lengths));
  const bool wide = dtype_of(lengths) == aoti_torch_dtype_int64();
  if (!(wide || dtype_of(lengths) == aoti_torch_dtype_int32()) || lengths.dim() != 1 || lengths.size(0) != p.layer.B)
    fail("lengths: expected an int64 or int32 tensor of shape (B,) = (", p.layer.B, ",), got ",
         dtype_name(dtype_of(lengths)), " of shape ", shape_of(lengths));
  check_memory(lengths, [] { return "lengths"; });
  const int64_t stride = lengths.stride(0);
  const void* data = lengths.data_ptr();
  if (!p.place.on_cpu()) {
    p.device_lengths = {data, wide, stride};
    return;
  }
  for (int64_t b = 0; b < p.layer.B; ++b) {
    const int64_t length =
        wide ? static_cast<const int64_t*>(data)[b * stride] : static_cast<const int32_t*>(data)[b * stride];
    if (length < 0 || length > p.layer.T)
      fail("lengths: expected values from 0 to T = ", p.layer.T, ", got ", length, " for row ", b);
    p.lengths.push_back(length);
  }
  p.layer.lengths = p.lengths.data();
  // Rank the rows, longest first, by counting.
  const int64_t T = p.layer.T;
  std::vector<int64_t> longer(T + 1, 0);  // rows longer than t; then the next rank of length t
  for (const int64_t length : p.lengths) ++longer[length];
  for (int64_t t = T, above = 0; t >= 0; --t) above += std::exchange(longer[t], above);
  p.first_row.assign(1, 0);
  for (int64_t t = 0; t < T; ++t) p.first_row.push_back(p.first_row.back() + longer[t]);
  p.order.resize(p.layer.B);
  for (int64_t b = 0; b < p.layer.B; ++b) p.order[longer[p.lengths[b]]++] = b;
  p.layer.order = p.order.data();
  rank_steps(p);
}

void check_weights(Problem& p, const Arguments& a) {
  const CellTraits& cell = *p.cell;
  Layer& l = p.layer;
  const size_t n = p.per_direction = a.weights.size() / l.D;
  if (a.weights.size() % l.D || n < 2 || n > 5)
    fail("weights: expected 2 to 5 tensors for each of ", l.D, " direction(s), got ", a.weights.size());
  p.bias = n >= 4;
  p.layer.projected = n % 2 == 1;
  if (p.layer.projected && !cell.has_c)
    fail("weights: expected no projection for cell '", cell.name, "', got ", n, " weights");
  if (!a.weights[1].defined() || a.weights[1].dim() != 2 || a.weights[1].size(0) == 0 ||
      a.weights[1].size(0) % cell.gates)
    fail("weights[1] (w_hh): expected shape (", cell.gates, "*H, P), H >= 1, got ", shape_of(a.weights[1]));
  l.H = a.weights[1].size(0) / cell.gates;
  l.P = p.layer.projected ? a.weights[1].size(1) : l.H;
  if (l.P == 0) fail("weights[1] (w_hh): expected shape (", cell.gates, "*H, P), P >= 1, got ", shape_of(a.weights[1]));

  const char* names[5] = {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"};
  const int64_t GH = cell.gates * l.H;
  const Shape shapes[5] = {{GH, l.I}, {GH, l.P}, {GH}, {GH}, {l.P, l.H}};
  const auto letters = [&](size_t role) {
    const std::string gates = "(" + std::to_string(cell.gates) + "*H,";
    return role == 0 ? gates + " I)" : role == 1 ? gates + " P)" : role == 4 ? "(P, H)" : gates + ")";
  };
  for (int d = 0; d < l.D; ++d) {
    Weights& w = l.weights[d];
    const void** slots[5] = {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.w_hr};
    for (size_t k = 0; k < n; ++k) {
      const size_t role = p.layer.projected && k == n - 1 ? 4 : k;
      const Tensor& weight = a.weights[d * n + k];
      check_tensor(
          p, weight, [&] { return "weights[" + std::to_string(d * n + k) + "] (" + names[role] + ")"; }, p.dtype,
          shapes[role], [&] { return letters(role); });
      *slots[role] = kept_data(p, weight);
    }
  }
}

// The header of the argument `packed`, which may be any tensor.
const PackedHeader& packed_header(const Tensor& packed) {
  const bool bytes = packed.defined() && packed.is_cpu() && dtype_of(packed) == aoti_torch_dtype_uint8() &&
                     packed.dim() == 1 && packed.is_contiguous() && !was_freed(packed);
  const PackedHeader* const header = bytes ? header_at(packed.data_ptr(), packed.size(0)) : nullptr;
  if (!header) fail("packed: expected what fastrnn::pack returned, got another tensor");
  if (std::strcmp(header->isa, current().isa))
    fail("packed: expected weights packed for ", current().isa, ", got some packed for ", header->isa);
  return *header;
}

// The weights of layer k, from those that follow the header.
void take_packed(Problem& p, const Arguments& a, const PackedHeader& header, int64_t k) {
  Layer& l = p.layer;
  const int64_t I = k ? header.D * header.P : header.I;
  if (header.dtype != l.dtype || I != l.I)
    fail("input: expected ", dtype_name(dtypes()[int(header.dtype)].code), " and ", I,
         " features, as the packed weights, got ", dtype_name(p.dtype), " of shape ", shape_of(a.input));
  l.H = header.H;
  l.P = header.P;
  l.projected = header.projected;
  p.bias = header.bias;
  for (int d = 0; d < l.D; ++d) l.weights[d].packed = reinterpret_cast<const char*>(&header) + header.place(k, d);
}

void check_no_c(const Problem& p, const std::optional<Tensor>& c, const char* name) {
  if (c && !p.cell->has_c) fail(name, ": expected None for cell '", p.cell->name, "', got a tensor");
}

// one_step: the input is (B, I), the states (B, P) and (B, H). header: of packed weights, whose layer k this is.
Problem check(const Arguments& a, bool bidirectional, bool one_step = false, const PackedHeader* header = nullptr,
              int64_t k = 0) {
  Problem p;
  p.cell = header ? &traits(header->cell) : &find_cell(a.cell);
  Layer& l = p.layer;
  l.cell = p.cell->kind;
  l.precision = header ? header->precision : a.precision;
  l.D = bidirectional ? 2 : 1;
  check_input(p, a, one_step);
  if (one_step) {
    l.T = 1;
    l.B = p.N = a.input.size(0);
  } else if (p.packed) {
    check_batch_sizes(p, *a.batch_sizes);
  } else {
    l.T = a.input.size(0);
    l.B = a.input.size(1);
    p.N = l.T * l.B;
    if (l.T == 0) fail("input: expected at least one time step, got shape ", shape_of(a.input));
  }
  if (header)
    take_packed(p, a, *header, k);
  else
    check_weights(p, a);
  check_no_c(p, a.c0, "c0");
  check_no_c(p, a.c_reset, "c_reset");
  if (one_step) {
    l.h0 = keep(p, a.h0, "h0", {l.B, l.P}, "(B, P)", p.dtype);
    l.c0 = keep(p, a.c0, "c0", {l.B, l.H}, "(B, H)", p.dtype);
    return p;
  }
  read_state_dtype(p, a.h0);
  l.h0 = keep(p, a.h0, "h0", {l.D, l.B, l.P}, "(D, B, P)", p.state);
  l.c0 = keep(p, a.c0, "c0", {l.D, l.B, l.H}, "(D, B, H)", p.state);
  l.h_reset = keep(p, a.h_reset, "h_reset", {l.D, l.B, l.P}, "(D, B, P)", p.state);
  l.c_reset = keep(p, a.c_reset, "c_reset", {l.D, l.B, l.H}, "(D, B, H)", p.state);
  if (a.lengths) check_lengths(p, *a.lengths);
  if (a.reset) {
    check_tensor(p, *a.reset, "reset", aoti_torch_dtype_bool(), {l.T, l.B}, "(T, B)");
    l.reset = static_cast<const bool*>(a.reset->data_ptr());
    l.reset_step = a.reset->stride(0);
    l.reset_row = a.reset->stride(1);
  }
  return p;
}

int64_t tape_width(const Problem& p) { return tape_width(*p.cell, p.layer.H, p.layer.P, p.layer.projected); }

int64_t state_size(const Problem& p) { return p.layer.state == Dtype::f64 ? 8 : p.layer.state == Dtype::f32 ? 4 : 2; }

int64_t compute_size(const Problem& p) { return p.layer.dtype == Dtype::f64 ? 8 : 4; }

Tensor new_tape(const Problem& p) {
  return empty_block({p.layer.D, p.N, tape_width(p)}, p.compute, compute_size(p), p.place);
}

}  // namespace
}  // namespace fastrnn
