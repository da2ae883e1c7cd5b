// Tests of the torch-free kernels, for sanitizers: no Python, no torch, std::thread as the team.
//
//   driver ulp [STRIDE]   sigmoid and tanh of every tier, every STRIDE-th float: at most 2 ulp; NaN, inf and zero exact
//   driver gradient       every gradient against central differences in double, every cell and tier
//   driver layers [N]     N random layers (ragged, packed, reset, projected, 16-bit): exact-size buffers filled with
//                         garbage, finite results, tiers agree, one thread and many give the same bits however the work
//                         is shared out, and where states are written over, as do weights that are kept packed; and N/2
//                         stacks of layers, one by one and as a wavefront
// Exits 0 when all holds; else says what failed and exits 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cells.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/plan.h"

using namespace fastrnn;

namespace {

int failures = 0;

#define EXPECT(condition, ...)                \
  do {                                        \
    if (!(condition)) {                       \
      std::printf("FAILED %s: ", #condition); \
      std::printf(__VA_ARGS__);               \
      std::printf("\n");                      \
      if (++failures > 20) std::exit(1);      \
    }                                         \
  } while (0)

std::mt19937_64 generator(20);
int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
double normal() { return std::normal_distribution<double>()(generator); }

// ------------------------------------------------------------------------------------------------------------- ulp

template <class T, class Exact>
double ulps(T got, Exact exact) {
  const T nearest = T(exact);
  const T step = std::nextafter(std::fabs(nearest), std::numeric_limits<T>::infinity()) - std::fabs(nearest);
  return double(std::fabs(Exact(got) - exact) / Exact(step));
}

template <class T, class Exact>
void check_ulp(const Kernels& k, int function, const std::vector<T>& x) {
  const Dtype dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
  std::vector<T> y(x.size(), T(7));
  k.activation(function, dtype, x.data(), y.data(), int64_t(x.size()));
  double worst = 0;
  T worst_x = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const Exact v = x[i];
    const Exact exact = function ? std::tanh(v) : v < 0 ? std::exp(v) / (1 + std::exp(v)) : 1 / (1 + std::exp(-v));
    if (std::fabs(exact) < Exact(std::numeric_limits<T>::min())) {
      EXPECT(
          std::fabs(Exact(y[i]) - exact) <= 2 * Exact(std::numeric_limits<T>::denorm_min()) + std::fabs(exact) / 1000,
          "%s function %d at %g: %g", k.isa, function, double(v), double(y[i]));
      continue;
    }
    const double error = ulps(y[i], exact);
    if (!(error <= worst)) worst = error, worst_x = x[i];
  }
  std::printf("%-7s %s %-7s worst %.3f ulp at %.9g (%zu values)\n", k.isa, sizeof(T) == 8 ? "float64" : "float32",
              function ? "tanh" : "sigmoid", worst, double(worst_x), x.size());
  EXPECT(worst <= 2, "%s function %d", k.isa, function);
}

template <class T>
void check_special(const Kernels& k) {
  const Dtype dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T x[] = {0, T(-0.0), inf, -inf, nan, -nan, 1000, -1000};
  const T want[2][8] = {{T(0.5), T(0.5), 1, 0, nan, nan, 1, 0}, {0, T(-0.0), 1, -1, nan, nan, 1, -1}};
  for (int function = 0; function < 2; ++function) {
    T y[8];
    k.activation(function, dtype, x, y, 8);
    for (int i = 0; i < 8; ++i) {
      const bool same = std::isnan(want[function][i])
                            ? std::isnan(y[i])
                            : y[i] == want[function][i] && std::signbit(y[i]) == std::signbit(want[function][i]);
      EXPECT(same, "%s function %d at %g: %g", k.isa, function, double(x[i]), double(y[i]));
    }
  }
}

void test_ulp(uint64_t stride) {
  std::vector<float> floats;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += stride) {
    const uint32_t b = uint32_t(bits);
    float x;
    std::memcpy(&x, &b, 4);
    if (std::fabs(x) < 110) floats.push_back(x);
  }
  std::vector<double> doubles;
  for (int i = 0; i < 1000000; ++i) {
    const double size = std::exp2(double(integer(-30000000, 9500000)) / 1e6);
    doubles.push_back(integer(0, 1) ? size : -size);
    doubles.push_back(normal() * 3);
  }
  const Kernels* tables[8];
  const int count = available(tables);
  for (int i = 0; i < count; ++i) {
    for (int function = 0; function < 2; ++function) {
      check_ulp<float, double>(*tables[i], function, floats);
      check_ulp<double, long double>(*tables[i], function, doubles);
    }
    check_special<float>(*tables[i]);
    check_special<double>(*tables[i]);
  }
}

// ------------------------------------------------------------------------------------------------------------ layers

// Exactly as many bytes as asked for, so that a sanitizer sees a read or write too far; filled with garbage.
struct Buffer {
  std::vector<char> bytes;
  explicit Buffer(int64_t n = 0) : bytes(size_t(n), char(0x7f)) {}
  void* data() { return bytes.empty() ? nullptr : bytes.data(); }
};

int64_t width_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

uint16_t bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(bits >> 16);  // the tests' own numbers need no rounding
}
// Halves of magnitude below 2, multiples of 2^-8: exact in float16.
uint16_t f16(float x) {
  const int n = int(std::lround(std::fmin(std::fmax(x, -1.9f), 1.9f) * 256));
  if (n == 0) return 0;
  int exponent = 0;
  unsigned m = unsigned(std::abs(n));
  while (m >> (exponent + 1)) ++exponent;
  const unsigned fraction = (m << (10 - exponent)) & 0x3ff;
  return uint16_t((n < 0 ? 0x8000u : 0u) | unsigned(exponent - 8 + 15) << 10 | fraction);
}

Buffer random_values(Dtype dtype, int64_t n, double scale) {
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

double value(const Buffer& b, Dtype dtype, int64_t i) {
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
  bool all_states = false, operands = false;
  Buffer x, h0, c0, reset, h_reset, c_reset, weights[2][5], dy, dh_n, dc_n, dh_all, dc_all;
  std::vector<int64_t> lengths, first_row, steps_above, order;
  int64_t rows = 0;    // of x and y: stored rows when packed
  int64_t stored = 0;  // of the tape

  int64_t tape() const { return tape_width(cell, layer.H, layer.P, layer.projected); }
  Dtype compute() const { return layer.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
};

Case random_case(bool tiny) {
  Case c;
  const CellKind kinds[] = {CellKind::rnn_tanh, CellKind::rnn_relu, CellKind::lstm, CellKind::gru};
  c.cell = traits(kinds[integer(0, 3)]);
  Layer& p = c.layer;
  p.cell = c.cell.kind;
  p.dtype = tiny ? Dtype::f64 : Dtype(integer(0, 3));
  const bool wide_states = integer(0, 1);
  p.state = wide_states ? c.compute() : p.dtype;
  const Dtype dt = p.dtype, state = p.state;
  p.T = integer(0, 3) ? integer(1, tiny ? 4 : 23) : 1;  // one step has a path of its own
  p.B = integer(1, tiny ? 3 : 19);
  if (!tiny && integer(0, 15) == 0) p.B = integer(100, 140);  // more rows than one tile of the projection
  p.I = integer(1, tiny ? 4 : 40);
  p.H = integer(1, tiny ? 5 : 70);
  p.P = p.H;
  p.D = int(integer(1, 2));
  p.projected = c.cell.has_c && p.H > 1 && integer(0, 2) == 0;
  if (p.projected) p.P = integer(1, p.H - 1);
  const bool ragged = integer(0, 1), packed = ragged && integer(0, 1);
  if (ragged) {
    for (int64_t b = 0; b < p.B; ++b) c.lengths.push_back(integer(packed ? 1 : 0, p.T));
    if (packed) std::sort(c.lengths.rbegin(), c.lengths.rend());
    if (packed) p.T = c.lengths[0];
    p.lengths = c.lengths.data();
  }
  c.rows = c.stored = p.T * p.B;
  if (ragged) {
    c.first_row.assign(1, 0);
    for (int64_t t = 0; t < p.T; ++t)
      c.first_row.push_back(c.first_row.back() + std::count_if(c.lengths.begin(), c.lengths.end(),
                                                               [&](int64_t length) { return length > t; }));
    c.stored = c.first_row.back();
    p.first_row = c.first_row.data();
    p.packed = packed;
    if (packed) c.rows = c.stored;
    for (int64_t b = 0; b < p.B; ++b) c.order.push_back(b);
    std::stable_sort(c.order.begin(), c.order.end(),
                     [&](int64_t a, int64_t b) { return c.lengths[size_t(a)] > c.lengths[size_t(b)]; });
    p.order = packed ? nullptr : c.order.data();
    c.steps_above.assign(1, 0);
    for (const int64_t b : c.order) c.steps_above.push_back(c.steps_above.back() + c.lengths[size_t(b)]);
    p.steps_above = c.steps_above.data();
  }
  if (integer(0, 1)) {
    c.reset = Buffer(p.T * p.B);
    for (char& r : c.reset.bytes) r = integer(0, 4) == 0;
    p.reset = static_cast<bool*>(c.reset.data());
    p.reset_step = p.B;
    p.reset_row = 1;
    if (integer(0, 1)) {
      p.one_reset = !tiny && integer(0, 2) == 0;  // its gradient is every row's, to be added up by the caller
      const int64_t rows = p.one_reset ? 1 : p.B;
      c.h_reset = random_values(state, p.D * rows * p.P, 1);
      p.h_reset = c.h_reset.data();
      if (c.cell.has_c) c.c_reset = random_values(state, p.D * rows * p.H, 1);
      p.c_reset = c.c_reset.data();
    }
  }
  c.x = random_values(dt, c.rows * p.I, 1);
  p.x = {c.x.data(), p.B * p.I, p.I};
  const bool bias = integer(0, 1);
  const double scale = 1 / std::sqrt(double(p.H));
  const int64_t GH = c.cell.gates * p.H;
  for (int d = 0; d < p.D; ++d) {
    Buffer* w = c.weights[d];
    w[0] = random_values(dt, GH * p.I, scale);
    w[1] = random_values(dt, GH * p.P, scale);
    if (bias) w[2] = random_values(dt, GH, scale), w[3] = random_values(dt, GH, scale);
    if (p.projected) w[4] = random_values(dt, p.P * p.H, scale);
    p.weights[d] = {w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data()};
  }
  if (integer(0, 1)) {
    c.h0 = random_values(state, p.D * p.B * p.P, 1);
    p.h0 = c.h0.data();
    if (c.cell.has_c) c.c0 = random_values(state, p.D * p.B * p.H, 1);
    p.c0 = c.c0.data();
  }
  c.all_states = integer(0, 1);
  c.operands = integer(0, 3) == 0;
  c.dy = random_values(dt, c.rows * p.D * p.P, 1);
  c.dh_n = random_values(state, p.D * p.B * p.P, 1);
  c.dc_n = random_values(state, p.D * p.B * p.H, 1);
  c.dh_all = random_values(dt, p.D * p.T * p.B * p.P, 1);
  c.dc_all = random_values(dt, p.D * p.T * p.B * p.H, 1);
  return c;
}

// The results of both passes, in a fixed order; the first `states` of them are what the loss reads.
struct Results {
  std::vector<Buffer> buffers;
  std::vector<Dtype> dtypes;
  enum { Y, HN, CN, HALL, CALL, TAPE, DX, DH0, DC0, DHRESET, DCRESET, WEIGHTS };
  enum { OPERANDS = WEIGHTS + 10, COUNT = OPERANDS + 4 };  // 5 weights for each direction
};

Team threads(int size) {
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

// in_place: the states that a pass begins with are overwritten by those that it ends with.
Results run(const Kernels& k, Case& c, const Team& team, bool in_place = false) {
  const Layer& p = c.layer;
  const Dtype dt = p.dtype, compute = c.compute();
  const int64_t s = width_of(dt), z = width_of(p.state), w = width_of(compute), DB = p.D * p.B, GH = c.cell.gates * p.H;
  const bool wide_dx = p.D == 2 && s == 2, bias = p.weights[0].b_ih != nullptr;
  const bool has_c = c.cell.has_c;
  Results r;
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
  Forward f;
  static_cast<Layer&>(f) = p;
  f.y = {at(Results::Y), p.B * p.D * p.P, p.D * p.P};
  f.h_n = at(Results::HN);
  f.c_n = at(Results::CN);
  if (in_place && p.h0) {
    std::memcpy(f.h_n, p.h0, size_t(DB * p.P * z));
    f.h0 = f.h_n;
    if (has_c) std::memcpy(f.c_n, p.c0, size_t(DB * p.H * z));
    if (has_c) f.c0 = f.c_n;
  }
  f.h_all = at(Results::HALL);
  f.c_all = at(Results::CALL);
  f.tape = at(Results::TAPE);
  k.forward(f, team);
  // What pads the tape's blocks is nobody's: make it comparable.
  const int64_t block = padded_to_tape_block(p.H);
  for (int64_t row = 0; row < p.D * c.stored; ++row)
    for (int64_t k = 0; k <= c.cell.tape; ++k) {
      const int64_t width = k < c.cell.tape ? p.H : p.P, end = k < c.cell.tape ? block : c.tape() - k * block;
      if (end > 0)
        std::memset(static_cast<char*>(f.tape) + (row * c.tape() + k * block + width) * w, 0,
                    size_t((end - width) * w));
    }
  Backward g;
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
  k.backward(g, team);
  return r;
}

std::string describe(const Case& c) {
  const Layer& p = c.layer;
  char text[200];
  std::snprintf(text, sizeof text,
                "%s dtype %d state %d T %ld B %ld I %ld H %ld P %ld D %d lengths %d packed %d reset %d to %d hx %d",
                c.cell.name, int(p.dtype), int(p.state), long(p.T), long(p.B), long(p.I), long(p.H), long(p.P), p.D,
                p.lengths != nullptr, p.packed, p.reset != nullptr, p.h_reset != nullptr, p.h0 != nullptr);
  return text;
}

// Weights that are kept packed: the same bits forward, but for one step of few rows, which is else summed otherwise.
void test_kept(const Kernels& k, Case& c, const Results& expected) {
  Layer& p = c.layer;
  const int64_t size = k.packed_size(p);
  std::vector<void*> kept;
  for (int d = 0; d < p.D; ++d) {
    kept.push_back(std::aligned_alloc(64, size_t(size)));
    std::memset(kept.back(), 0x7f, size_t(size));
    k.pack(p, d, kept.back());
  }
  for (int d = 0; d < p.D; ++d) p.weights[d].packed = kept[size_t(d)];
  const Results found = run(k, c, threads(int(integer(1, 4))));
  for (int d = 0; d < p.D; ++d) p.weights[d].packed = nullptr;
  for (void* block : kept) std::free(block);
  if (p.T == 1 && p.B <= 4) return;
  for (int b = 0; b < Results::DX; ++b)
    EXPECT(expected.buffers[size_t(b)].bytes == found.buffers[size_t(b)].bytes,
           "%s result %d: kept weights change bits: %s", k.isa, b, describe(c).c_str());
}

void test_layers(int64_t n) {
  const Kernels* tables[8];
  const int count = available(tables);
  for (int64_t i = 0; i < n; ++i) {
    Case c = random_case(false);
    Results first;
    for (int k = 0; k < count; ++k) {
      Results one = run(*tables[k], c, threads(1));
      const char* splits[] = {"serial", "batch", "hidden", "ahead", ""};
      force_split(splits[integer(0, 4)]);
      Results many = run(*tables[k], c, threads(int(integer(2, 6))), integer(0, 1));
      force_split("");
      test_kept(*tables[k], c, one);
      for (int b = 0; b < Results::COUNT; ++b) {
        const size_t at = size_t(b);
        EXPECT(one.buffers[at].bytes == many.buffers[at].bytes, "%s result %d: threads change bits: %s", tables[k]->isa,
               b, describe(c).c_str());
        const int64_t values = int64_t(one.buffers[at].bytes.size()) / width_of(one.dtypes[at]);
        double difference = 0, norm = 1e-30;
        for (int64_t v = 0; v < values; ++v) {
          const double x = value(one.buffers[at], one.dtypes[at], v);
          EXPECT(std::isfinite(x), "%s result %d is not finite: %s", tables[k]->isa, b, describe(c).c_str());
          if (k == 0) continue;
          const double y = value(first.buffers[at], one.dtypes[at], v);
          difference += (x - y) * (x - y);
          norm += y * y;
        }
        // Rounding a 16-bit state or a sign near relu's kink may fall either way, and is carried on from there.
        const double bound = c.layer.dtype == Dtype::f64 ? 1e-12 : c.layer.dtype == Dtype::f32 ? 1e-4 : 0.3;
        EXPECT(std::sqrt(difference / norm) <= bound, "%s result %d is %g from scalar: %s", tables[k]->isa, b,
               std::sqrt(difference / norm), describe(c).c_str());
      }
      if (k == 0) first = std::move(one);
    }
  }
  std::printf("%ld layers, %d tiers\n", long(n), count);
}

// Layers on top of each other: one after the other, and as a wavefront, whose threads read what others write; forward,
// and back with the dx of each layer as the dy of the one below.
void test_stack(const Kernels& k, Case& c) {
  const Layer& p = c.layer;
  const Dtype compute = c.compute();
  const int64_t count = integer(2, 5), s = width_of(p.dtype), z = width_of(p.state), w = width_of(compute),
                GH = c.cell.gates * p.H;
  std::vector<Buffer> weights, results[2];
  std::vector<Forward> forward[2];
  std::vector<Backward> backward[2];  // the last layer first
  constexpr int64_t each = 13;        // results of a layer
  weights.reserve(size_t(count * 2));
  for (int64_t i = 0; i < count; ++i) {
    Forward f;
    static_cast<Layer&>(f) = p;
    if (i > 0) {
      f.I = p.P;
      weights.push_back(random_values(p.dtype, GH * p.P, 1 / std::sqrt(double(p.H))));
      f.weights[0].w_ih = weights.back().data();
      weights.push_back(random_values(p.dtype, GH * p.P, 1 / std::sqrt(double(p.H))));
      f.weights[0].w_hh = weights.back().data();
    }
    for (int way = 0; way < 2; ++way) {
      std::vector<Buffer>& r = results[way];
      r.reserve(size_t(count * each));
      if (i > 0) f.x = {r[size_t((i - 1) * each)].data(), p.B * p.P, p.P};
      const auto result = [&](int64_t bytes) {
        r.emplace_back(bytes);
        return r.back().data();
      };
      f.y = {result(p.T * p.B * p.P * s), p.B * p.P, p.P};
      f.h_n = result(p.B * p.P * z);
      f.c_n = result(c.cell.has_c ? p.B * p.H * z : 0);
      f.tape = result(c.stored * c.tape() * w);
      forward[way].push_back(f);
      Backward b;
      static_cast<Layer&>(b) = f;
      b.tape = f.tape;
      b.dh_n = c.dh_n.data();
      if (c.cell.has_c) b.dc_n = c.dc_n.data();
      b.dx = {result(p.T * p.B * f.I * s), p.B * f.I, f.I};
      b.dh0 = result(p.B * p.P * z);
      b.dc0 = result(c.cell.has_c ? p.B * p.H * z : 0);
      b.dh_reset = result(p.h_reset ? p.B * p.P * z : 0);
      b.dc_reset = result(p.c_reset ? p.B * p.H * z : 0);
      auto& g = b.gradients[0];
      g.w_ih = result(GH * f.I * w);
      g.w_hh = result(GH * p.P * w);
      const bool bias = p.weights[0].b_ih != nullptr;
      g.b_ih = result(bias ? GH * w : 0);
      g.w_hr = result(p.projected ? p.P * p.H * w : 0);
      backward[way].insert(backward[way].begin(), b);
    }
  }
  for (auto& layers : backward) {
    layers[0].dy = {c.dy.data(), p.B * p.P, p.P};
    for (size_t i = 1; i < layers.size(); ++i)
      layers[i].dy = {layers[i - 1].dx.data, layers[i - 1].dx.step, layers[i - 1].dx.row};
  }
  for (const Forward& f : forward[0]) k.forward(f, threads(1));
  for (const Backward& b : backward[0]) k.backward(b, threads(1));
  Wavefront wave;
  wave.groups = int(integer(2, count));
  wave.steps = integer(1, p.T);
  k.forward_wavefront(forward[1].data(), int(count), wave, threads(integer(0, 3) ? wave.groups : 1));
  wave.steps = 1;
  k.backward_wavefront(backward[1].data(), int(count), wave, threads(integer(0, 3) ? wave.groups : 1));
  for (int64_t i = 0; i < int64_t(results[0].size()); ++i)
    if (i % each != 3)  // what pads the tape is whatever was there
      EXPECT(results[0][size_t(i)].bytes == results[1][size_t(i)].bytes,
             "%s layer %ld result %ld: a wavefront changes bits: %s", k.isa, long(i / each), long(i % each),
             describe(c).c_str());
}

void test_stacks(int64_t n) {
  const Kernels* tables[8];
  const int count = available(tables);
  for (int64_t i = 0; i < n;) {
    Case c = random_case(false);
    if (c.layer.D == 2 || c.layer.first_row) continue;
    for (int k = 0; k < count; ++k) test_stack(*tables[k], c);
    ++i;
  }
  std::printf("%ld stacks, %d tiers\n", long(n), count);
}

// --------------------------------------------------------------------------------------------------------- gradient

double loss(const Kernels& k, Case& c) {
  Results r = run(k, c, threads(1));
  double sum = 0;
  auto dot = [&](int at, const Buffer& g) {
    const int64_t n = int64_t(r.buffers[size_t(at)].bytes.size()) / 8;
    for (int64_t i = 0; i < n; ++i) sum += value(r.buffers[size_t(at)], Dtype::f64, i) * value(g, Dtype::f64, i);
  };
  dot(Results::Y, c.dy);
  dot(Results::HN, c.dh_n);
  dot(Results::CN, c.dc_n);
  dot(Results::HALL, c.dh_all);
  dot(Results::CALL, c.dc_all);
  return sum;
}

void test_gradient(int64_t n) {
  const Kernels* tables[8];
  const int count = available(tables);
  double worst = 0;
  int64_t compared = 0;
  for (int64_t i = 0; i < n; ++i) {
    Case c = random_case(true);
    // Gradients past a length belong to outputs that are constant zero; relu has no derivative at its kink.
    const bool kinked = c.cell.kind == CellKind::rnn_relu;
    const Kernels& k = *tables[i % count];
    Results r = run(k, c, threads(1));
    std::vector<Buffer*> inputs = {&c.x, &c.h0, &c.c0, &c.h_reset, &c.c_reset};
    std::vector<int> gradients = {Results::DX, Results::DH0, Results::DC0, Results::DHRESET, Results::DCRESET};
    for (int q = 0; q < 10; ++q) inputs.push_back(&c.weights[q / 5][q % 5]), gradients.push_back(Results::WEIGHTS + q);
    for (size_t q = 0; q < inputs.size(); ++q)
      for (int64_t v = 0; v < int64_t(inputs[q]->bytes.size()) / 8; ++v) {
        double* at = reinterpret_cast<double*>(inputs[q]->bytes.data()) + v;
        const double kept = *at, step = 1e-6;
        *at = kept + step;
        const double above = loss(k, c);
        *at = kept - step;
        const double below = loss(k, c);
        *at = kept;
        const double numeric = (above - below) / (2 * step),
                     got = value(r.buffers[size_t(gradients[q])], Dtype::f64, v);
        const double error = std::fabs(numeric - got) / (1 + std::fabs(got));
        if (kinked && error > 1e-6) continue;  // a kink within the step
        if (error > worst) worst = error;
        ++compared;
        EXPECT(error < 1e-6, "%s gradient %d[%ld]: %.12g, differences say %.12g: %s", k.isa, int(q), long(v), got,
               numeric, describe(c).c_str());
      }
  }
  std::printf("%ld gradients, worst relative difference %.2e\n", long(compared), worst);
  EXPECT(compared > 10 * n, "hardly anything was compared");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const long n = argc > 2 ? std::atol(argv[2]) : 0;
  if (what == "ulp")
    test_ulp(n > 0 ? uint64_t(n) : 257);
  else if (what == "gradient")
    test_gradient(n > 0 ? n : 60);
  else if (what == "layers")
    test_layers(n > 0 ? n : 100), test_stacks(n > 0 ? n / 2 : 50);
  else
    return std::printf("usage: driver ulp | gradient | layers [N]\n"), 2;
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
