// What the drivers of the torch-free kernels share: random layers with all that can be asked of them, buffers of
// exactly the right size, and expectations that are counted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cells.h"
#include "../../csrc/cpu/dispatch.h"

namespace fastrnn {

inline int failures = 0;

#define EXPECT(condition, ...)                \
  do {                                        \
    if (!(condition)) {                       \
      std::printf("FAILED %s: ", #condition); \
      std::printf(__VA_ARGS__);               \
      std::printf("\n");                      \
      if (++failures > 20) std::exit(1);      \
    }                                         \
  } while (0)

inline std::mt19937_64 generator(20);
inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline double normal() { return std::normal_distribution<double>()(generator); }

// Exactly as many bytes as asked for, so that a sanitizer sees a read or write too far; filled with garbage.
struct Buffer {
  std::vector<char> bytes;
  explicit Buffer(int64_t n = 0) : bytes(size_t(n), char(0x7f)) {}
  void* data() { return bytes.empty() ? nullptr : bytes.data(); }
  const void* data() const { return bytes.empty() ? nullptr : bytes.data(); }
};

inline int64_t width_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline uint16_t bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(bits >> 16);  // the tests' own numbers need no rounding
}
// Halves of magnitude below 2, multiples of 2^-8: exact in float16.
inline uint16_t f16(float x) {
  const int n = int(std::lround(std::fmin(std::fmax(x, -1.9f), 1.9f) * 256));
  if (n == 0) return 0;
  int exponent = 0;
  unsigned m = unsigned(std::abs(n));
  while (m >> (exponent + 1)) ++exponent;
  const unsigned fraction = (m << (10 - exponent)) & 0x3ff;
  return uint16_t((n < 0 ? 0x8000u : 0u) | unsigned(exponent - 8 + 15) << 10 | fraction);
}

inline Buffer random_values(Dtype dtype, int64_t n, double scale) {
  Buffer b(n * width_of(dtype));
  for (int64_t i = 0; i < n; ++i) {
    const double x = normal() * scale;
    char* at = b.bytes.data() + i * width_of(dtype);
    const float f = float(x);
    const uint16_t half = dtype == Dtype::bf16 ? bf16(f) : f16(f);
    if (dtype == Dtype::f64) std::memcpy(at, &x, 8);
    if (dtype == Dtype::f32) std::memcpy(at, &f, 4);
    if (width_of(dtype) == 2) std::memcpy(at, &half, 2);
  }
  return b;
}

inline double value(const Buffer& b, Dtype dtype, int64_t i) {
  const char* at = b.bytes.data() + i * width_of(dtype);
  if (dtype == Dtype::f64) {
    double x;
    std::memcpy(&x, at, 8);
    return x;
  }
  float x = 0;
  uint16_t half;
  if (dtype == Dtype::f32) {
    std::memcpy(&x, at, 4);
    return double(x);
  }
  std::memcpy(&half, at, 2);
  if (dtype == Dtype::bf16) {
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(&x, &bits, 4);
    return double(x);
  }
  const int exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return fraction ? NAN : (half & 0x8000 ? -INFINITY : INFINITY);
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return half & 0x8000 ? -size : size;
}

struct Case {
  CellTraits cell;
  Layer layer;
  bool all_states = false, operands = false, watched = false;
  bool wide_dx = false;  // gradient of x in the compute dtype
  Buffer x, h0, c0, reset, h_reset, c_reset, weights[2][5], dy, dh_n, dc_n, dh_all, dc_all;
  std::vector<int64_t> lengths, first_row, steps_above, order;
  int64_t rows = 0;    // of x and y: stored rows when packed
  int64_t stored = 0;  // of the tape

  // The layer's pointers, to the buffers as they are now.
  void connect() {
    Layer& p = layer;
    p.lengths = lengths.empty() ? nullptr : lengths.data();
    p.first_row = first_row.empty() ? nullptr : first_row.data();
    p.steps_above = steps_above.empty() ? nullptr : steps_above.data();
    p.order = order.empty() || p.packed ? nullptr : order.data();
    p.reset = static_cast<bool*>(reset.data());
    p.h_reset = h_reset.data();
    p.c_reset = c_reset.data();
    p.x = {x.data(), p.B * p.I, p.I};
    for (int d = 0; d < p.D; ++d) {
      Buffer* w = weights[d];
      p.weights[d] = {w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data()};
    }
    p.h0 = h0.data();
    p.c0 = c0.data();
  }
  int64_t tape() const { return tape_width(cell, layer.H, layer.P, layer.projected); }
  Dtype compute() const { return layer.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
};

// What the rest of a random layer is drawn for.
struct Sizes {
  CellKind cell = CellKind::lstm;
  Dtype dtype = Dtype::f64;
  Precision precision = Precision::exact;
  int64_t T = 1, B = 1, I = 1, H = 1, P = 1;
  int D = 1;
  bool ragged = false, packed = false;
  bool one_reset = true;  // a reset state for all rows may be drawn
};

inline Sizes random_sizes(bool tiny) {
  Sizes s;
  const CellKind kinds[] = {CellKind::rnn_tanh, CellKind::rnn_relu, CellKind::lstm, CellKind::gru};
  s.cell = kinds[integer(0, 3)];
  s.dtype = tiny ? Dtype::f64 : Dtype(integer(0, 3));
  s.T = integer(0, 3) ? integer(1, tiny ? 4 : 23) : 1;  // one step has a path of its own
  s.B = integer(1, tiny ? 3 : 19);
  if (!tiny && integer(0, 15) == 0) s.B = integer(100, 140);  // more rows than one tile of the projection
  s.I = integer(0, tiny ? 4 : 40);
  s.H = s.P = integer(1, tiny ? 5 : 70);
  s.D = int(integer(1, 2));
  if (traits(s.cell).has_c && s.H > 1 && integer(0, 2) == 0) s.P = integer(1, s.H - 1);
  s.ragged = integer(0, 1);
  s.packed = s.ragged && integer(0, 1);
  s.one_reset = !tiny;  // its gradient is every row's, to be added up by the caller
  return s;
}

inline Case random_case(const Sizes& sizes) {
  Case c;
  c.cell = traits(sizes.cell);
  Layer& p = c.layer;
  p.cell = sizes.cell;
  p.dtype = sizes.dtype;
  p.precision = sizes.precision;
  p.T = sizes.T;
  p.B = sizes.B;
  p.I = sizes.I;
  p.H = sizes.H;
  p.P = sizes.P;
  p.D = sizes.D;
  p.projected = p.P != p.H;
  p.state = integer(0, 1) ? c.compute() : p.dtype;
  const Dtype dt = p.dtype, state = p.state;
  const bool ragged = sizes.ragged, packed = sizes.packed;
  if (ragged) {
    for (int64_t b = 0; b < p.B; ++b) c.lengths.push_back(integer(packed ? 1 : 0, p.T));
    if (packed) std::sort(c.lengths.rbegin(), c.lengths.rend());
    if (packed) p.T = c.lengths[0];
  }
  c.rows = c.stored = p.T * p.B;
  if (ragged) {
    c.first_row.assign(1, 0);
    for (int64_t t = 0; t < p.T; ++t)
      c.first_row.push_back(c.first_row.back() + std::count_if(c.lengths.begin(), c.lengths.end(),
                                                               [&](int64_t length) { return length > t; }));
    c.stored = c.first_row.back();
    p.packed = packed;
    if (packed) c.rows = c.stored;
    for (int64_t b = 0; b < p.B; ++b) c.order.push_back(b);
    std::stable_sort(c.order.begin(), c.order.end(),
                     [&](int64_t a, int64_t b) { return c.lengths[size_t(a)] > c.lengths[size_t(b)]; });
    c.steps_above.assign(1, 0);
    for (const int64_t b : c.order) c.steps_above.push_back(c.steps_above.back() + c.lengths[size_t(b)]);
  }
  if (integer(0, 1)) {
    c.reset = Buffer(p.T * p.B);
    for (char& r : c.reset.bytes) r = integer(0, 4) == 0;
    p.reset_step = p.B;
    p.reset_row = 1;
    if (integer(0, 1)) {
      p.one_reset = sizes.one_reset && integer(0, 2) == 0;
      const int64_t rows = p.one_reset ? 1 : p.B;
      c.h_reset = random_values(state, p.D * rows * p.P, 1);
      if (c.cell.has_c) c.c_reset = random_values(state, p.D * rows * p.H, 1);
    }
  }
  c.x = random_values(dt, c.rows * p.I, 1);
  const bool bias = integer(0, 1);
  const double scale = 1 / std::sqrt(double(p.H));
  const int64_t GH = c.cell.gates * p.H;
  for (int d = 0; d < p.D; ++d) {
    Buffer* w = c.weights[d];
    w[0] = random_values(dt, GH * p.I, scale);
    w[1] = random_values(dt, GH * p.P, scale);
    if (bias) w[2] = random_values(dt, GH, scale), w[3] = random_values(dt, GH, scale);
    if (p.projected) w[4] = random_values(dt, p.P * p.H, scale);
  }
  if (integer(0, 1)) {
    c.h0 = random_values(state, p.D * p.B * p.P, 1);
    if (c.cell.has_c) c.c0 = random_values(state, p.D * p.B * p.H, 1);
  }
  c.all_states = integer(0, 1);
  c.operands = integer(0, 3) == 0;
  c.watched = integer(0, 3) == 0;
  c.wide_dx = p.D == 2 && width_of(dt) == 2;
  c.dy = random_values(dt, c.rows * p.D * p.P, 1);
  c.dh_n = random_values(state, p.D * p.B * p.P, 1);
  c.dc_n = random_values(state, p.D * p.B * p.H, 1);
  c.dh_all = random_values(dt, p.D * p.T * p.B * p.P, 1);
  c.dc_all = random_values(dt, p.D * p.T * p.B * p.H, 1);
  c.connect();
  return c;
}

// The results of both passes, in a fixed order; the first `states` of them are what the loss reads.
struct Results {
  std::vector<Buffer> buffers;
  std::vector<Dtype> dtypes;
  std::vector<double> watched;  // by themselves: sums over rows, not the same bits for every split
  enum { Y, HN, CN, HALL, CALL, TAPE, DX, DH0, DC0, DHRESET, DCRESET, WEIGHTS };
  enum { OPERANDS = WEIGHTS + 10, COUNT = OPERANDS + 4 };  // 5 weights for each direction
};

inline Team threads(int size) {
  static int context;
  return {size,
          [](void* n, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
            const int size = *static_cast<int*>(n);
            std::vector<std::thread> workers;
            for (int i = 0; i < size; ++i)
              workers.emplace_back([=] { body(argument, count * i / size, count * (i + 1) / size); });
            for (std::thread& worker : workers) worker.join();
          },
          (context = size, &context)};
}

// Both passes of a case, all that they can give asked for.
struct Passes {
  Results results;
  Forward f;
  Backward g;
};

// in_place: the states that a pass begins with are overwritten by those that it ends with.
inline Passes prepare(const Case& c, bool in_place = false) {
  const Layer& p = c.layer;
  const Dtype dt = p.dtype, compute = c.compute();
  const int64_t s = width_of(dt), z = width_of(p.state), w = width_of(compute), DB = p.D * p.B, GH = c.cell.gates * p.H;
  const bool wide_dx = c.wide_dx, bias = p.weights[0].b_ih != nullptr;
  const bool has_c = c.cell.has_c;
  Passes passes;
  Results& r = passes.results;
  const int64_t sizes[] = {c.rows * p.D * p.P * s,
                           DB * p.P * z,
                           has_c ? DB * p.H * z : 0,
                           c.all_states ? DB * p.T * p.P * s : 0,
                           c.all_states && has_c ? DB * p.T * p.H * s : 0,
                           p.D * c.stored * c.tape() * w,
                           c.rows * p.I * (wide_dx ? w : s),
                           DB * p.P * z,
                           has_c ? DB * p.H * z : 0,
                           p.h_reset ? DB * p.P * z : 0,
                           p.c_reset ? DB * p.H * z : 0};
  const int64_t weights[] = {GH * p.I * w, GH * p.P * w, bias ? GH * w : 0, bias ? GH * w : 0,
                             p.projected ? p.P * p.H * w : 0};
  const int64_t values = c.operands ? p.D * c.rows * w : 0;
  const int64_t operands[] = {values * c.cell.slots * p.H, values * p.P, p.projected ? values * p.P : 0,
                              p.projected ? values * p.H : 0};
  for (int i = 0; i < Results::COUNT; ++i) {
    const int64_t k = i - Results::WEIGHTS;
    r.buffers.emplace_back(k < 0 ? sizes[i] : k >= 10 ? operands[k - 10] : k / 5 < p.D ? weights[k % 5] : 0);
    const bool state = i == Results::HN || i == Results::CN || (i >= Results::DH0 && k < 0);
    r.dtypes.push_back(state ? p.state : i == Results::TAPE || k >= 0 || (i == Results::DX && wide_dx) ? compute : dt);
  }
  auto at = [&](int i) { return r.buffers[size_t(i)].data(); };
  Forward& f = passes.f;
  static_cast<Layer&>(f) = p;
  f.y = {at(Results::Y), p.B * p.D * p.P, p.D * p.P};
  f.h_n = at(Results::HN);
  f.c_n = at(Results::CN);
  if (in_place && p.h0) {
    std::memcpy(f.h_n, p.h0, size_t(DB * p.P * z));
    f.h0 = f.h_n;
  }
  if (in_place && p.c0) {
    std::memcpy(f.c_n, p.c0, size_t(DB * p.H * z));
    f.c0 = f.c_n;
  }
  f.h_all = at(Results::HALL);
  f.c_all = at(Results::CALL);
  f.tape = at(Results::TAPE);
  Backward& g = passes.g;
  static_cast<Layer&>(g) = p;
  g.tape = at(Results::TAPE);
  g.dy = {c.dy.data(), p.B * p.D * p.P, p.D * p.P};
  g.dh_n = c.dh_n.data();
  if (has_c) g.dc_n = c.dc_n.data();
  if (c.all_states) g.dh_all = c.dh_all.data();
  if (c.all_states && has_c) g.dc_all = c.dc_all.data();
  g.dx = {at(Results::DX), p.B * p.I, p.I};
  g.dh0 = at(Results::DH0);
  g.dc0 = at(Results::DC0);
  g.dh_reset = at(Results::DHRESET);
  g.dc_reset = at(Results::DCRESET);
  g.dx_is_compute = wide_dx;
  for (int d = 0; d < p.D; ++d) {
    const int first = Results::WEIGHTS + 5 * d;
    g.gradients[d] = {at(first), at(first + 1), at(first + 2), at(first + 3), at(first + 4)};
  }
  const int first = Results::OPERANDS;
  g.operands = {at(first), at(first + 1), at(first + 2), at(first + 3)};
  if (c.watched) r.watched.assign(size_t(p.D * p.T * watched::columns(c.cell.has_c, c.cell.watched_gates)), NAN);
  g.watched = c.watched ? r.watched.data() : nullptr;
  return passes;
}

// What pads the blocks of a tape of `rows` rows is nobody's: make it comparable.
inline void clear_tape_padding(const Case& c, Buffer& tape, int64_t rows) {
  const Layer& p = c.layer;
  const int64_t w = width_of(c.compute()), block = padded_to_tape_block(p.H);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k <= c.cell.tape; ++k) {
      const int64_t width = k < c.cell.tape ? p.H : p.P, end = k < c.cell.tape ? block : c.tape() - k * block;
      if (end > 0)
        std::memset(tape.bytes.data() + (row * c.tape() + k * block + width) * w, 0, size_t((end - width) * w));
    }
}

inline Results run(const Kernels& k, const Case& c, const Team& team, bool in_place = false) {
  Passes passes = prepare(c, in_place);
  k.forward(passes.f, team);
  clear_tape_padding(c, passes.results.buffers[Results::TAPE], c.layer.D * c.stored);
  k.backward(passes.g, team);
  return std::move(passes.results);
}

inline std::string describe(const Case& c) {
  const Layer& p = c.layer;
  char text[200];
  std::snprintf(text, sizeof text,
                "%s dtype %d state %d T %ld B %ld I %ld H %ld P %ld D %d lengths %d packed %d reset %d to %d hx %d",
                c.cell.name, int(p.dtype), int(p.state), long(p.T), long(p.B), long(p.I), long(p.H), long(p.P), p.D,
                p.lengths != nullptr, p.packed, p.reset != nullptr, p.h_reset != nullptr, p.h0 != nullptr);
  return text;
}

}  // namespace fastrnn
