// torch.ops.fastrnn.*: schemas, allocation, the calls of the kernels. Arguments and their checks: arguments.h.
//
//   layer()           allocates the results, fills Forward, runs the kernel
//   step()            the same for one step of a cell
//   step_()           one step of layers, onto states that the caller owns
//   stack()           the same as layer() for several layers
//   pack(), frozen()  weights packed once, and stack() or step() by them
//   layer_backward()  allocates the gradients, fills Backward, runs the kernel; of layer() and, with a 2-D input,
//                     step()
//   stack_backward()  the same for several layers
//
// Letters for sizes are problem.h's. Errors name the argument, what was expected and what came.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"

namespace fastrnn {
namespace {

// --------------------------------------------------------------------------------------------------------- forward

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
  const auto none = [](int32_t dtype) { return empty({0}, dtype); };
  const Tensor y = p.packed ? empty({p.N, f.D * f.P}, p.dtype) : empty_rows(f.T, f.B, f.D * f.P, batch_major, p.dtype);
  const Tensor h_n = empty({f.D, f.B, f.P}, p.state);
  const Tensor c_n = has_c ? empty({f.D, f.B, f.H}, p.state) : none(p.state);
  const Tensor h_all = all_states ? empty({f.D, f.T, f.B, f.P}, p.dtype) : none(p.dtype);
  const Tensor c_all = all_states && has_c ? empty({f.D, f.T, f.B, f.H}, p.dtype) : none(p.dtype);
  const Tensor tape = save ? new_tape(p) : none(p.compute);

  const ConstRows rows = rows_of(y, p.packed);
  f.y = {y.data_ptr(), rows.step, rows.row};
  f.h_n = h_n.data_ptr();
  if (has_c) f.c_n = c_n.data_ptr();
  if (all_states) f.h_all = h_all.data_ptr();
  if (all_states && has_c) f.c_all = c_all.data_ptr();
  if (save) f.tape = tape.data_ptr();
  if (f.B) current().forward(f, team());

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
  const Tensor h = empty({f.B, f.P}, p.dtype);
  const Tensor c = p.cell->has_c ? empty({f.B, f.H}, p.dtype) : empty({0}, p.dtype);
  const Tensor tape = save ? new_tape(p) : empty({0}, p.compute);
  f.y = {h.data_ptr(), 0, f.P};
  f.h_n = h.data_ptr();
  if (p.cell->has_c) f.c_n = c.data_ptr();
  if (save) f.tape = tape.data_ptr();
  if (f.B) current().forward(f, team());
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
  const void *h0 = nullptr, *c0 = nullptr, *h_reset = nullptr, *c_reset = nullptr;
  Wavefront wave;
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
      h_n = empty(one_step ? Shape{0} : h_shape, p.state);
      c_n = empty(has_c ? c_shape : Shape{0}, p.state);
      Layer upper = f;  // the others differ in the width of their input alone
      upper.I = D * f.P;
      if (count > 1) wave = plan_wavefront(f, upper, static_cast<int>(count), false, team().size);
    } else {
      check_alike(p, problems[0], k);
    }
    f.h0 = of_layer(h0, k, state);
    f.c0 = of_layer(c0, k, cell);
    f.h_reset = of_layer(h_reset, k, state);
    f.c_reset = of_layer(c_reset, k, cell);
    if (p.cell->has_c) f.c_n = static_cast<char*>(c_n.data_ptr()) + k * cell;
    y = p.packed || one_step ? empty({p.N, D * f.P}, p.dtype)
                             : empty_rows(f.T, f.B, D * f.P, batch_major && k == count - 1, p.dtype);
    f.h_n = one_step ? y.data_ptr() : static_cast<char*>(h_n.data_ptr()) + k * state;
    const ConstRows rows = rows_of(y, p.packed || one_step);
    f.y = {y.data_ptr(), rows.step, rows.row};
    if (saved && k >= saved->from) {
      saved->tapes.push_back(new_tape(p));
      saved->inputs.push_back(part.input);
      f.tape = saved->tapes.back().data_ptr();
    }
    part.input = y;
    if (wave.groups > 1) continue;
    if (f.B) current().forward(f, team());
    p.input = Tensor();  // memory for two layers' outputs will do
  }
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

// ------------------------------------------------------------------------------------------------- packed weights

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
    read_dtype(p, part.weights[0], "weights[0] (w_ih)");
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
  const Tensor packed = empty_block({header.bytes()}, aoti_torch_dtype_uint8(), 1);
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
    check_tensor(t, name, first.dtype, shape(B, width), letters);
    if (!t.is_contiguous()) fail(name, ": expected a contiguous tensor to write to, got one with other strides");
  };
  check_no_c(first, c, "c");
  check_no_c(first, a.c_reset, "c_reset");
  if (first.cell->has_c && !c) fail("c: expected a tensor for cell '", first.cell->name, "', got None");
  check_state(h, "h", P, "(L, B, P)");
  if (c) check_state(*c, "c", H, "(L, B, H)");
  if (c && overlap(*c, h)) fail("c: expected memory of its own, got some of h's");
  if (reset) check_tensor(*reset, "reset", aoti_torch_dtype_bool(), {B}, "(B,)");
  const auto apart = [&](const Tensor& t) { return overlap(h, t) || (c && overlap(*c, t)) ? stable::clone(t) : t; };
  // The same for every row, or for each its own.
  const bool one = a.h_reset && B != 1 && a.h_reset->defined() && a.h_reset->dim() >= 2 &&
                   a.h_reset->size(a.h_reset->dim() - 2) == 1;
  const auto start_of = [&](std::optional<Tensor>& start, const char* name, int64_t width) {
    if (!start) return static_cast<const void*>(nullptr);
    check_tensor(*start, name, first.dtype, shape(one ? 1 : B, width), "(L, B or 1, width)");
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

// -------------------------------------------------------------------------------------------------------- backward

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
    result = empty_block(Shape(weights[i]), p.compute, compute_size(p));
    *places[p.layer.projected && role == p.per_direction - 1 ? 4 : role] = result.data_ptr();
    if (!b.B) std::memset(result.data_ptr(), 0, result.numel() * result.element_size());
  }
}

// Memory for what the weights' gradients are products of.
std::vector<Tensor> allocate_operands(const Problem& p, Backward& b) {
  const bool flat = p.packed || p.input.dim() == 2;
  std::vector<Tensor> operands;
  const auto add = [&](void*& place, int64_t columns) {
    operands.push_back(flat ? empty_block({b.D, p.N, columns}, p.compute, compute_size(p))
                            : empty_block({b.D, b.T, b.B, columns}, p.compute, compute_size(p)));
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

// Layers on top of each other, the last one first. needs, and the result: input, h0, c0, the weights of all layers, and
// h_reset and c_reset if that is asked.
// operands: to be filled, of one layer; or null.
std::vector<Tensor> run_backward(const Arguments& a, const Saved& saved, const Incoming& incoming, bool bidirectional,
                                 bool batch_major, int64_t count, const std::vector<bool>& needs,
                                 std::vector<Tensor>* operands = nullptr) {
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
      for (size_t i = 0; i < needs.size(); ++i) results.push_back(empty({0}, p.dtype));
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
        results[places[i]] = empty(i % 2 ? c_shape : h_shape, p.state);
        states[i] = results[places[i]].data_ptr();
      }
      // Of one layer alone.
      b.dh_all = keep(p, incoming.d_h_all, "d_h_all", {b.D, b.T, b.B, b.P}, "(D, T, B, P)", p.dtype);
      b.dc_all = keep(p, incoming.d_c_all, "d_c_all", {b.D, b.T, b.B, b.H}, "(D, T, B, H)", p.dtype);
      Layer first = b;
      if (lowest == 0) first.I = a.input.size(a.input.dim() - 1);
      if (layers.size() > 1) wave = plan_wavefront(first, b, static_cast<int>(layers.size()), true, team().size);
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
      check_tensor(*dy, "d_output", p.dtype, shape, p.packed ? "(N, D*P)" : "(T, B, D*P)");
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
      dx = flat ? empty({p.N, b.I}, dtype) : empty_rows(b.T, b.B, b.I, batch_major && k == 0, dtype);
      const ConstRows rows = rows_of(dx, flat);
      b.dx = {dx.data_ptr(), rows.step, rows.row};
    }
    allocate_gradients(p, b, part.weights, first_weight(k), results.begin() + 3 + k * static_cast<int64_t>(per_layer));
    if (operands) *operands = allocate_operands(p, b);
    if (wave.groups > 1) {
      if (dy) between.push_back(*dy);
    } else {
      if (b.B) current().backward(b, team());
      if (b.dx_is_compute && !wide) dx = stable::to(dx, p.input.scalar_type());
    }
    if (k == 0 && needs[0]) results[0] = dx;
    dy = dx;  // memory for two layers' will do, unless they are worked on side by side
  }
  if (layers[0].B && wave.groups > 1)
    current().backward_wavefront(layers.data(), static_cast<int>(layers.size()), wave, team());
  const Problem& p = problems[0];
  if (p.dtype != p.compute && p.state == p.dtype)
    for (size_t i = 3; i < weights_end; ++i)
      if (needs[i]) results[i] = stable::to(results[i], a.input.scalar_type());
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
  stack[0] = stable::detail::from(run_backward(a, saved, incoming, bidirectional, batch_major, 1, needs));
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
  const Saved saved(list, count);
  stack[0] = stable::detail::from(run_backward(a, saved, incoming, bidirectional, batch_major, count, needs));
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def(
      "layer(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset, bool bidirectional, bool batch_major, bool all_states, bool save, int precision=0, "
      "Tensor? h_reset=None, Tensor? c_reset=None) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor h_all, Tensor "
      "c_all, Tensor tape)");
  m.def(
      "stack(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset, bool bidirectional, bool batch_major, int num_layers, int saved_from, int precision=0, "
      "Tensor? h_reset=None, Tensor? c_reset=None) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] saved)");
  m.def("pack(str cell, Tensor[] weights, bool bidirectional, int num_layers, int precision=0) -> Tensor");
  m.def(
      "frozen(Tensor packed, Tensor input, Tensor? h0=None, Tensor? c0=None, bool batch_first=False, Tensor? "
      "batch_sizes=None, Tensor? lengths=None, Tensor? reset=None, Tensor? h_reset=None, Tensor? c_reset=None) "
      "-> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def(
      "step(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, bool save, int precision=0) "
      "-> (Tensor h, Tensor c, Tensor tape)");
  m.def(
      "step_(Tensor(a!) h, Tensor(b!)? c, str cell, Tensor input, Tensor[] weights, Tensor? packed, int num_layers, "
      "Tensor? reset=None, Tensor? h_reset=None, Tensor? c_reset=None, int precision=0) -> ()");
  m.def(
      "layer_backward(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? reset, Tensor tape, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_h_all, "
      "Tensor? d_c_all, bool bidirectional, bool batch_major, bool[] needs, int precision=0, Tensor? h_reset=None, "
      "Tensor? c_reset=None) -> Tensor[]");
  m.def(
      "layer_operands(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? reset, Tensor tape, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_h_all, "
      "Tensor? d_c_all, bool bidirectional, bool batch_major, bool[] needs, Tensor? h_reset=None, "
      "Tensor? c_reset=None) -> Tensor[]");
  m.def(
      "stack_backward(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? reset, Tensor[] saved, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, "
      "bool bidirectional, bool batch_major, int num_layers, bool[] needs, int precision=0, Tensor? h_reset=None, "
      "Tensor? c_reset=None) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("layer", &fastrnn::layer);
  m.impl("stack", &fastrnn::stack);
  m.impl("pack", &fastrnn::pack);
  m.impl("frozen", &fastrnn::frozen);
  m.impl("step", &fastrnn::step);
  m.impl("step_", &fastrnn::step_onto);
  m.impl("layer_backward", &fastrnn::layer_backward);
  m.impl("layer_operands", &fastrnn::layer_operands);
  m.impl("stack_backward", &fastrnn::stack_backward);
}
