// Tests of the torch-free kernels, for sanitizers: no Python, no torch, std::thread as the team.
//
//   driver ulp [STRIDE]   sigmoid and tanh of every tier, every STRIDE-th float: at most 2 ulp; NaN, inf and zero exact
//   driver gradient       every gradient against central differences in double, every cell and tier
//   driver layers [N]     N random layers (ragged, packed, reset, projected, 16-bit): exact-size buffers filled with
//                         garbage, finite results, tiers agree, one thread and many give the same bits however the work
//                         is shared out, and where states are written over, as do weights that are kept packed; and N/2
//                         stacks of layers, one by one and as a wavefront
//   driver tiles [N]      the same with N layers large enough for AMX's tiles, of every precision: of that tier alone,
//                         beside scalar; where the machine has none, with an emulator (amx_emulator.cpp) linked in
// Exits 0 when all holds; else says what failed and exits 1.
#include <limits>

#include "../../csrc/cpu/plan.h"
#include "cases.h"

using namespace fastrnn;

namespace {

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

// Weights that are kept packed: the same bits forward, but for few steps of few rows, which are else summed otherwise.
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
  if (p.H < 96 || width_of(p.dtype) == 2 ? p.T == 1 && p.B <= 4 : p.T * p.B <= 8) return;
  for (int b = 0; b < Results::DX; ++b)
    EXPECT(expected.buffers[size_t(b)].bytes == found.buffers[size_t(b)].bytes,
           "%s result %d: kept weights change bits: %s", k.isa, b, describe(c).c_str());
}

// What was watched: of all steps, and the same however the work was shared out, up to the order of its sums.
void test_watched(const Kernels& k, const Case& c, const Results& one, const Results& many) {
  const int64_t steps = c.layer.D * c.layer.T;
  const int columns = watched::columns(c.cell.has_c, c.cell.watched_gates);
  double rows = 0;
  for (int column = 0; column < columns && c.watched; ++column) {
    double difference = 0, norm = 1e-300;
    for (int64_t step = 0; step < steps; ++step) {
      const size_t at = size_t(step * columns + column);
      difference += std::abs(one.watched[at] - many.watched[at]);
      norm += std::abs(one.watched[at]);
      if (column == watched::rows) rows += one.watched[at];
    }
    EXPECT(difference <= 1e-5 * norm, "%s watched column %d is %g apart: %s", k.isa, column, difference / norm,
           describe(c).c_str());
  }
  EXPECT(!c.watched || rows == double(c.layer.D * c.stored), "%s watched %g rows: %s", k.isa, rows,
         describe(c).c_str());
}

std::vector<const Kernels*> all_tables() {
  const Kernels* tables[8];
  const int count = available(tables);
  return {tables, tables + count};
}

// How far two results may be apart, in norm. Rounding a 16-bit state or a sign near relu's kink may fall either way,
// and is carried on from there.
double bound(const Layer& p) {
  if (p.dtype == Dtype::f64) return 1e-12;
  if (p.dtype != Dtype::f32 || p.precision == Precision::bf16) return 0.3;
  return p.precision == Precision::tf32 ? 0.05 : 1e-4;
}

// n random layers of such sizes by each of the tables; the first is what the others are compared with.
template <class F>
void test_layers(int64_t n, const std::vector<const Kernels*>& tables, const F& sizes) {
  const int count = int(tables.size());
  for (int64_t i = 0; i < n; ++i) {
    Case c = random_case(sizes());
    Results first;
    for (int k = 0; k < count; ++k) {
      Results one = run(*tables[k], c, threads(1));
      const char* splits[] = {"serial", "batch", "hidden", "ahead", ""};
      force_split(splits[integer(0, 4)]);
      Results many = run(*tables[k], c, threads(int(integer(2, 6))), integer(0, 1));
      force_split("");
      test_watched(*tables[k], c, one, many);
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
        EXPECT(std::sqrt(difference / norm) <= bound(c.layer), "%s result %d is %g from scalar: %s", tables[k]->isa, b,
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

// Whether back-propagation would sum band by band, which no wavefront does.
bool goes_by_bands(const Case& c) {
  Layer upper = c.layer;
  upper.I = upper.P;
  for (const Kernels* table : all_tables())
    for (const Layer& p : {c.layer, upper})
      if (bands_of(p, c.cell, table->units(p)) > 1) return true;
  return false;
}

template <class F>
void test_stacks(int64_t n, const std::vector<const Kernels*>& tables, const F& sizes) {
  for (int64_t i = 0; i < n;) {
    Case c = random_case(sizes());
    if (c.layer.D == 2 || c.layer.first_row || goes_by_bands(c)) continue;
    for (const Kernels* table : tables) test_stack(*table, c);
    ++i;
  }
  std::printf("%ld stacks, %zu tiers\n", long(n), tables.size());
}

void test_layers(int64_t n) {
  const auto sizes = [] {
    Sizes s = random_sizes(false);
    const int64_t chosen = integer(0, 9);
    if (chosen > 1) return s;
    if (chosen == 1) {  // many rows of few units: bands of them
      s.B = integer(8, 40);
      s.T = 512 / s.B + integer(1, 8);
      s.H = integer(1, 12);
      s.P = s.P < s.H ? s.P : s.H;
      s.I = integer(0, 12);
      return s;
    }
    s.T = integer(1, 8);  // few steps of few rows and many units have a path of their own
    s.B = integer(1, 8 / s.T);
    const bool projected = s.P != s.H;
    s.H = integer(96, 130);
    s.P = projected ? integer(1, s.H - 1) : s.H;
    return s;
  };
  test_layers(n, all_tables(), sizes);
  test_stacks(n / 2, all_tables(), sizes);
}

// ------------------------------------------------------------------------------------------------------------ tiles

// Defined by the emulator; so many products of tiles by now, if `kind` is 5.
extern "C" __attribute__((weak)) long fastrnn_amx_count(int kind);

void test_tiles(int64_t n) {
  const std::vector<const Kernels*> all = all_tables();
  EXPECT(!std::strcmp(all.back()->isa, "amx"), "the widest tier here is %s", all.back()->isa);
  const auto sizes = [] {
    Sizes s = random_sizes(false);
    s.dtype = integer(0, 2) ? Dtype::f32 : Dtype::bf16;
    s.precision = Precision(integer(0, 2));
    const int64_t few = integer(0, 2) ? 40 : 70;
    s.B = integer(8, few);
    s.H = s.P = integer(32, few + 32);
    if (s.cell == CellKind::lstm && integer(0, 3) == 0) s.P = integer(1, s.H - 1);
    s.T = 128 / s.B + integer(1, 8);
    return s;
  };
  const std::vector<const Kernels*> tables = {all.front(), all.back()};
  test_layers(n, tables, sizes);
  test_stacks(n / 4, {all.back()}, sizes);
  EXPECT(fastrnn_amx_count == nullptr || fastrnn_amx_count(5) > 1000 * n, "tiles were hardly used");
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
    Case c = random_case(random_sizes(true));
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
    test_layers(n > 0 ? n : 100);
  else if (what == "tiles")
    test_tiles(n > 0 ? n : 100);
  else
    return std::printf("usage: driver ulp | gradient | layers | tiles [N]\n"), 2;
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
