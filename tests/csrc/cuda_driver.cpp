// Tests of csrc/cuda without a card: its kernels' own sources and layer.cpp, run on the CPU by the emulator.
//
//   cuda_driver layers [N]            N random layers (every cell, dtype, ragged, packed, reset, projected) against the
//                                     CPU kernels in float64: outputs, states and the tape, and every gradient, of
//                                     that tape. The same bits each time, and where only the size of chunks of steps
//                                     differs. Results lie apart, surrounded by garbage, and what pads the arguments
//                                     is NaN.
//   cuda_driver resident [N [STEPS]]  the same for layers whose weights stay on the chip: on one block, a cluster, the
//                                     grid, on cards of random sizes, which share units, rows and depth out in other
//                                     ways; of at most STEPS steps
//   cuda_driver stacks [N]            layers on top of each other, one by one and as a wavefront: the same bits
//   cuda_driver plans [N]             what the plan says of N random layers: every weight in one place, pieces of
//   memory
//                                     apart and within what there is, blocks no more than the card has
//   cuda_driver long                  layers of many steps, and of more lengths than one kernel is told of
//
// Gradients are of the tape that was written, because a 16-bit state that falls to the other side of relu's kink makes
// another gradient of a layer that is just as right; the tape is held against float64 itself. 16-bit results may be 1.5
// times as far from it as the CPU's are when a caller gets them, rounded to 16 bits, and 3e-3 more.
//
// Exits 0 when all holds; else says what failed and exits 1.
#include "../../csrc/cuda/layer.h"
#include "../../csrc/cuda/value.cuh"
#include "cases.h"
#include "cuda_plans.h"
#include "emulator.h"

using namespace fastrnn;

namespace {

// ------------------------------------------------------------------------------------------------------- references

Buffer widened(const Buffer& b, Dtype dtype) {
  const int64_t n = int64_t(b.bytes.size()) / width_of(dtype);
  Buffer wide(n * 8);
  for (int64_t i = 0; i < n; ++i) {
    const double x = value(b, dtype, i);
    std::memcpy(wide.bytes.data() + i * 8, &x, 8);
  }
  return wide;
}

Case widened(const Case& c) {
  Case w = c;
  for (Buffer* b : {&w.x, &w.dy, &w.dh_all, &w.dc_all}) *b = widened(*b, c.layer.dtype);
  for (auto& weights : w.weights)
    for (Buffer& b : weights) b = widened(b, c.layer.dtype);
  for (Buffer* b : {&w.h0, &w.c0, &w.h_reset, &w.c_reset, &w.dh_n, &w.dc_n}) *b = widened(*b, c.layer.state);
  w.layer.dtype = w.layer.state = Dtype::f64;
  w.connect();
  return w;
}

// A tape as the GPU lays it out, step by step, as the CPU kernels do in float64: rank by rank.
Buffer cpu_tape(const Case& c, const Buffer& tape) {
  const Layer& p = c.layer;
  const int64_t width = c.tape(), rows = p.packed ? c.stored : p.T * p.B;
  Buffer out(p.D * c.stored * width * 8);
  for (int64_t d = 0, to = 0; d < p.D; ++d)
    for (int64_t rank = 0; rank < p.B; ++rank) {
      const int64_t b = p.order ? p.order[rank] : rank;
      for (int64_t t = 0; t < (p.lengths ? p.lengths[b] : p.T); ++t, ++to) {
        const int64_t from = d * rows + (p.packed ? p.first_row[t] : t * p.B) + b;
        for (int64_t i = 0; i < width; ++i) {
          const double x = value(tape, c.compute(), from * width + i);
          std::memcpy(out.bytes.data() + (to * width + i) * 8, &x, 8);
        }
      }
    }
  Case wide = c;
  wide.layer.dtype = Dtype::f64;
  clear_tape_padding(wide, out, p.D * c.stored);
  return out;
}

// ---------------------------------------------------------------------------------------------------- the CUDA side

// How a call is made; not what it computes.
struct Manner {
  int64_t chunk_bytes = int64_t(256) << 20;
  bool tf32 = false;
  bool tape = true;               // false: forward alone
  bool in_place = false;          // the last states overwrite the first
  bool batch_major = false;       // of y, dy and reset
  int64_t y_gap = 0, dy_gap = 0;  // values between rows
  bool wide_lengths = false;      // int64
  int64_t lengths_stride = 1;
  bool beyond = false;                                                 // lengths out of range, which are clamped
  std::vector<bool> wanted = std::vector<bool>(Results::COUNT, true);  // from DX on
  const char* path = "step";
};

// A [T, B, width] tensor, or packed [rows, width], with rows further apart.
struct Spread {
  Buffer memory;
  int64_t step = 0, row = 0, width = 0, size = 0;
  const Case* c = nullptr;

  Spread(const Case& of, int64_t columns, int64_t bytes, bool batch_major, int64_t gap)
      : width(columns), size(bytes), c(&of) {
    const Layer& p = of.layer;
    row = columns + gap;
    step = p.B * row;
    memory = Buffer(of.rows * row * size);
    if (batch_major && !p.packed) step = row, row = p.T * step;
  }
  // Calls f(where the row lies here, where it lies without gaps), in bytes.
  template <class F>
  void over_rows(const F& f) const {
    const Layer& p = c->layer;
    for (int64_t i = 0; i < c->rows; ++i)
      f((p.packed ? i * row : i / p.B * step + i % p.B * row) * size, i * width * size);
  }
  void from(const Buffer& compact) {
    over_rows([&](int64_t here, int64_t there) {
      std::memcpy(memory.bytes.data() + here, compact.bytes.data() + there, size_t(width * size));
    });
  }
  // Also clears what was read, so that what remains should be garbage still.
  void to(Buffer& compact) {
    over_rows([&](int64_t here, int64_t there) {
      std::memcpy(compact.bytes.data() + there, memory.bytes.data() + here, size_t(width * size));
      std::memset(memory.bytes.data() + here, 0x7f, size_t(width * size));
    });
  }
};

// Runs a pass in scratch memory of exactly the size asked for, all NaN but for what cuBLAS is given (the first part; it
// would take longest to fill); what lies behind it must stay.
template <class Pass>
void in_scratch(const Pass& pass, const cuda::Call& call, int64_t (*size)(const Pass&, const cuda::Call&),
                void (*run)(const Pass&, const cuda::Call&, void*), const Case& c) {
  const int64_t bytes = size(pass, call), guard = 64;
  char* const scratch = static_cast<char*>(std::aligned_alloc(256, size_t((bytes + guard + 255) / 256 * 256)));
  const int64_t first = int64_t(cuda::scratch_bytes);
  EXPECT(bytes > first, "%ld bytes of scratch memory: %s", long(bytes), describe(c).c_str());
  std::memset(scratch + first, 0xff, size_t(bytes + guard - first));
  run(pass, call, scratch);
  EXPECT(std::all_of(scratch + bytes, scratch + bytes + guard, [](char x) { return x == char(0xff); }),
         "wrote past its scratch memory: %s", describe(c).c_str());
  std::free(scratch);
}

Results run_cuda(const Case& c, const Manner& m) {
  Passes passes = prepare(c, m.in_place);
  Results& r = passes.results;
  const Layer& p = c.layer;
  const int64_t s = width_of(p.dtype);
  cuda::Call call;
  call.chunk_bytes = m.chunk_bytes;
  call.tf32 = m.tf32;
  call.forced = m.path;

  Buffer lengths;
  if (!c.lengths.empty() && !p.packed) {
    const int64_t size = m.wide_lengths ? 8 : 4;
    lengths = Buffer(((p.B - 1) * m.lengths_stride + 1) * size);
    for (int64_t b = 0; b < p.B; ++b) {
      int64_t length = c.lengths[size_t(b)];
      if (m.beyond) length = length == 0 ? -3 : length == p.T ? p.T + 5 : length;
      const int32_t narrow = int32_t(length);
      char* const to = lengths.bytes.data() + b * m.lengths_stride * size;
      std::memcpy(to, m.wide_lengths ? static_cast<const void*>(&length) : &narrow, size_t(size));
    }
    call.lengths = lengths.data();
    call.wide = m.wide_lengths;
    call.lengths_stride = m.lengths_stride;
  }
  Buffer reset = c.reset;
  if (m.batch_major)
    for (int64_t i = 0; i < int64_t(reset.bytes.size()); ++i)
      reset.bytes[size_t(i % p.B * p.T + i / p.B)] = c.reset.bytes[size_t(i)];
  const int64_t rows = p.packed ? c.stored : p.T * p.B;
  Buffer tape(p.D * rows * c.tape() * width_of(c.compute()));
  std::fill(tape.bytes.begin(), tape.bytes.end(), char(0xff));
  Spread y(c, p.D * p.P, s, m.batch_major, m.y_gap), dy(c, p.D * p.P, s, m.batch_major, m.dy_gap);
  if (c.dy.data()) dy.from(c.dy);

  for (Layer* layer : {static_cast<Layer*>(&passes.f), static_cast<Layer*>(&passes.g)}) {
    layer->lengths = layer->steps_above = layer->order = nullptr;
    if (!p.packed) layer->first_row = nullptr;
    layer->reset = static_cast<const bool*>(reset.data());
    if (m.batch_major) layer->reset_step = 1, layer->reset_row = p.T;
  }
  Forward& f = passes.f;
  f.y = {y.memory.data(), y.step, y.row};
  f.tape = m.tape ? tape.data() : nullptr;
  in_scratch(f, call, cuda::forward_scratch, cuda::forward, c);
  y.to(r.buffers[Results::Y]);
  EXPECT(std::all_of(y.memory.bytes.begin(), y.memory.bytes.end(), [](char x) { return x == char(0x7f); }),
         "wrote between the rows of y: %s", describe(c).c_str());
  r.buffers[Results::TAPE] = m.tape ? cpu_tape(c, tape) : Buffer();
  r.dtypes[Results::TAPE] = Dtype::f64;
  if (!m.tape) {
    r.buffers.resize(Results::DX);
    return std::move(r);
  }

  Backward& g = passes.g;
  g.tape = tape.data();
  if (c.dy.data()) g.dy = {dy.memory.data(), dy.step, dy.row};
  void** const pointers[] = {&g.dx.data, &g.dh0, &g.dc0, &g.dh_reset, &g.dc_reset};
  void** const operands[] = {&g.operands.dgates, &g.operands.h_prev, &g.operands.dh_out, &g.operands.h_raw};
  for (int i = Results::DX; i < Results::COUNT; ++i) {
    if (m.wanted[size_t(i)]) continue;
    const int k = i - Results::WEIGHTS;
    auto& to = g.gradients[k >= 5 ? 1 : 0];
    void** const weights[] = {&to.w_ih, &to.w_hh, &to.b_ih, &to.b_hh, &to.w_hr};
    *(k < 0 ? pointers[i - Results::DX] : k < 10 ? weights[k % 5] : operands[k - 10]) = nullptr;
    r.buffers[size_t(i)] = Buffer();
  }
  const Buffer kept = tape;
  in_scratch(g, call, cuda::backward_scratch, cuda::backward, c);
  EXPECT(kept.bytes == tape.bytes, "backward wrote to the tape: %s", describe(c).c_str());
  return std::move(r);
}

// ------------------------------------------------------------------------------------------------------------ layers

constexpr const char* result_names[] = {"y",      "h_n",    "c_n",      "h_all",    "c_all", "tape",  "dx",
                                        "dh0",    "dc0",    "dh_reset", "dc_reset", "dw_ih", "dw_hh", "db_ih",
                                        "db_hh",  "dw_hr",  "dw_ih",    "dw_hh",    "db_ih", "db_hh", "dw_hr",
                                        "dgates", "h_prev", "dh_out",   "h_raw"};

double rounded(double x, Dtype dtype) {
  if (dtype == Dtype::bf16) return cuda::widen(cuda::narrow<cuda::Bf16>(float(x)));
  if (dtype == Dtype::f16) return cuda::widen(cuda::narrow<cuda::F16>(float(x)));
  return x;
}

// How far result i of `found` is from `expected` (float64), in norm, when it is rounded to a dtype; 0 of equal ones.
double distance(const Results& found, size_t i, const Results& expected, Dtype as) {
  double difference = 0, norm = 0;
  for (int64_t v = 0; v < int64_t(expected.buffers[i].bytes.size()) / 8; ++v) {
    const double x = rounded(value(found.buffers[i], found.dtypes[i], v), as);
    const double y = value(expected.buffers[i], Dtype::f64, v);
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

struct Worst {
  double of[4] = {};  // relative errors in each dtype; of 16 bits, what is beyond 1.5 times the CPU's
  double tf32 = 0;
};

// What float64, and the CPU kernels of 16 bits, make of a case.
struct Reference {
  const Kernels& k;
  Case wide;
  Results exact, cpu;

  explicit Reference(const Case& c) : k(tables()), wide(widened(c)) {
    wide.operands = true;
    exact = run(k, wide, threads(1));
    if (width_of(c.layer.dtype) == 2) cpu = run(k, c, threads(1));
  }
  static const Kernels& tables() {
    const Kernels* out[8];
    available(out);
    return *out[0];
  }
  // Gradients of a tape, and the operands of their products.
  Results gradients(const Buffer& tape) const {
    Passes passes = prepare(wide);
    passes.results.buffers[Results::TAPE] = tape;
    passes.g.tape = passes.results.buffers[Results::TAPE].data();
    k.backward(passes.g, threads(1));
    return std::move(passes.results);
  }
};

double square_norm(const Buffer& b, int64_t row, int64_t width) {
  double sum = 0;
  for (int64_t i = row * width; i < (row + 1) * width; ++i) sum += value(b, Dtype::f64, i) * value(b, Dtype::f64, i);
  return sum;
}

// The norm that a gradient of weights would have if the products of all rows, of which it is the sum, were orthogonal:
// what errors of those add up to, however much of the sum itself cancels.
double norm_of_terms(const Results& exact, size_t i, const Case& wide) {
  const Layer& p = wide.layer;
  const int64_t k = int64_t(i) - Results::WEIGHTS, d = k / 5, what = k % 5;
  const Buffer* const operands = &exact.buffers[Results::OPERANDS];
  double sum = 0;
  for (int64_t r = 0; r < wide.rows; ++r) {
    const int64_t row = d * wide.rows + r;
    const double left =
        what == 4 ? square_norm(operands[2], row, p.P) : square_norm(operands[0], row, wide.cell.slots * p.H);
    if (left == 0) continue;  // padding, whose x is NaN
    sum += left * (what == 0   ? square_norm(wide.x, r, p.I)
                   : what == 1 ? square_norm(operands[1], row, p.P)
                   : what == 4 ? square_norm(operands[3], row, p.H)
                               : 1);
  }
  return std::sqrt(sum);
}

// peer: of what else multiplies the same rounded factors, TF32's; null: nothing.
void compare(const Results& found, const Reference& reference, const Case& c, const Manner& m, Worst& worst,
             const Results* peer = nullptr) {
  const Dtype dtype = c.layer.dtype;
  const Results gradients = reference.gradients(found.buffers[Results::TAPE]);
  for (size_t i = 0; i < found.buffers.size(); ++i) {
    if (found.buffers[i].bytes.empty()) continue;
    const Results& exact = i < Results::DX ? reference.exact : gradients;
    const double error = distance(found, i, exact, Dtype::f64);
    double own = 0, bound = dtype == Dtype::f64 ? 1e-12 : m.tf32 ? 3e-3 : 3e-6;
    if (width_of(dtype) == 2) {
      const int64_t n = int64_t(exact.buffers[i].bytes.size()) / 8;
      const bool sum = i >= Results::WEIGHTS && i < Results::OPERANDS;
      const double norm = std::sqrt(square_norm(exact.buffers[i], 0, n));
      const double cancelled = sum && norm > 0 ? std::fmax(1, norm_of_terms(exact, i, reference.wide) / norm) : 1;
      const double few = 1 + 2 / std::sqrt(double(n));  // values, whose errors do not come to their average
      own = 1.5 * few * distance(reference.cpu, i, reference.exact, dtype);
      bound = 3e-3 * few * cancelled;
    }
    if (peer && i < Results::DX) own = 1.5 * distance(*peer, i, exact, Dtype::f64);
    double& most = m.tf32 ? worst.tf32 : worst.of[int(dtype)];
    most = std::fmax(most, error - own);
    EXPECT(error <= own + bound, "%s is %g from float64 (%g allowed), chunks of %ld bytes: %s", result_names[i], error,
           own + bound, long(m.chunk_bytes), describe(c).c_str());
  }
}

void expect_same(const Results& one, const Results& other, const Case& c, const char* what) {
  for (size_t i = 0; i < other.buffers.size(); ++i)
    EXPECT(one.buffers[i].bytes == other.buffers[i].bytes, "%s: %s: %s", result_names[i], what, describe(c).c_str());
}

// What a caller may leave out, and garbage where nobody may look.
void vary(Case& c) {
  Layer& p = c.layer;
  for (Buffer* b : {&c.dy, &c.dh_n, &c.dc_n, &c.dh_all, &c.dc_all})
    if (integer(0, 7) == 0) *b = Buffer();
  if (integer(0, 7) == 0) c.h0 = Buffer();
  if (integer(0, 7) == 0) c.c0 = Buffer();
  if (width_of(p.dtype) == 2) c.wide_dx = integer(0, 1);
  if (!c.lengths.empty() && !p.packed)
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t t = c.lengths[size_t(b)]; t < p.T; ++t) {
        const auto spoil = [&](Buffer& tensor, int64_t row, int64_t width) {
          const int64_t bytes = width * width_of(p.dtype);
          if (!tensor.bytes.empty()) std::memset(tensor.bytes.data() + row * bytes, 0xff, size_t(bytes));
        };
        spoil(c.x, t * p.B + b, p.I);
        spoil(c.dy, t * p.B + b, p.D * p.P);
        for (int64_t d = 0; d < p.D; ++d) {
          spoil(c.dh_all, (d * p.T + t) * p.B + b, p.P);
          spoil(c.dc_all, (d * p.T + t) * p.B + b, p.H);
        }
      }
  c.connect();
}

Manner random_manner(const Case& c) {
  const Layer& p = c.layer;
  Manner m;
  m.tf32 = p.dtype == Dtype::f32 && integer(0, 3) == 0;
  m.in_place = integer(0, 1);
  m.batch_major = integer(0, 1);
  if (integer(0, 1)) m.y_gap = integer(0, 9), m.dy_gap = integer(0, 9);
  m.wide_lengths = integer(0, 1);
  m.lengths_stride = integer(1, 3);
  m.beyond = integer(0, 1);
  const int64_t share = integer(0, 3);
  for (size_t i = 0; i < m.wanted.size(); ++i) m.wanted[i] = share == 0 || integer(0, share) > 0;
  return m;
}

// Bytes that let a chunk have a few steps.
int64_t few_steps(const Case& c) {
  const Layer& p = c.layer;
  return integer(1, 6) * p.D * p.B * c.cell.slots * p.H * width_of(c.compute());
}

void test_layer(const Case& c, Worst& worst, const char* path = "step") {
  const Reference reference(c);
  Manner m = random_manner(c);
  m.path = path;
  const Results whole = run_cuda(c, m);
  Results peer;
  const bool has_peer = m.tf32 && path != std::string("step");
  if (has_peer) {
    Manner step = m;
    step.path = "step";
    peer = run_cuda(c, step);
  }
  compare(whole, reference, c, m, worst, has_peer ? &peer : nullptr);
  Manner inference = m;
  inference.tape = false;
  Results outputs = run_cuda(c, inference);
  outputs.buffers[Results::TAPE] = whole.buffers[Results::TAPE];
  expect_same(whole, outputs, c, "differs without a tape");
  if (integer(0, 3) == 0) expect_same(whole, run_cuda(c, m), c, "differs the second time");
  m.chunk_bytes = integer(0, 2) ? few_steps(c) : 1;
  Results pieces = run_cuda(c, m);
  compare(pieces, reference, c, m, worst, has_peer ? &peer : nullptr);
  // Sums over all steps are not summed in the same order, nor is dx of two directions.
  for (int i = Results::WEIGHTS; i < Results::OPERANDS; ++i) pieces.buffers[size_t(i)] = whole.buffers[size_t(i)];
  if (c.layer.D == 2) pieces.buffers[Results::DX] = whole.buffers[Results::DX];
  expect_same(whole, pieces, c, "depends on the size of chunks");
}

void report(const char* what, long n, const Worst& w) {
  std::printf(
      "%ld %s, relative errors up to %.1e (float64), %.1e (float32), %.1e (tf32), and %.1e (bfloat16), %.1e "
      "(float16) beyond 1.5 times the CPU's\n",
      n, what, w.of[int(Dtype::f64)], w.of[int(Dtype::f32)], w.tf32, w.of[int(Dtype::bf16)], w.of[int(Dtype::f16)]);
}

void test_layers(int64_t n) {
  Worst worst;
  for (int64_t i = 0; i < n; ++i) {
    Case c = random_case(random_sizes(false));
    vary(c);
    test_layer(c, worst);
  }
  report("layers", n, worst);
}

// Layers of random sizes on random cards; counts those that the path served, forward and backward.
void test_resident(int64_t n, int64_t most_steps) {
  const auto& settings = cuda::emulator::settings();
  const cuda::emulator::Settings before = settings;
  for (const char* path : {"block", "cluster", "grid"}) {
    Worst worst;
    int64_t served = 0, pieces = 0, in_shared = 0, waves = 0, passes = 0, tries = 0;
    while (served < n && ++tries < 20 * n) {
      Sizes sizes = random_sizes(false);
      if (sizes.dtype == Dtype::f64) continue;
      sizes.P = sizes.H;
      if (integer(0, 7) == 0) sizes.T = integer(33, 70);  // more than a window of resets
      auto& card = cuda::emulator::settings();
      card.processors = int(integer(2, 24));
      card.shared_bytes = int(integer(8, 100)) << 10;
      if (tries % 8 == 0) {  // more fragments than registers hold
        sizes.H = sizes.P = integer(225, 300);
        sizes.T = integer(1, 4);
        sizes.B = integer(1, 20);
        card.shared_bytes = int(integer(64, 227)) << 10;
      } else if (tries % 8 == 1) {  // several passes to a step
        sizes.B = integer(17, 40);
        sizes.H = sizes.P = integer(1, 30);
        card.processors = int(integer(2, 5));
      } else if (tries % 8 == 2 && sizes.dtype != Dtype::f32) {  // a vector that does not fit
        sizes.H = sizes.P = integer(225, 300);
        sizes.T = integer(2, 4);
        sizes.B = integer(9, 20);
        sizes.D = 1;
        card.processors = int(integer(6, 10));
      }
      sizes.T = std::min(sizes.T, most_steps);
      card.seed = uint64_t(integer(0, 1 << 30));
      card.in_order = false;
      Case c = random_case(sizes);
      vary(c);
      const bool tf32 = false;
      const auto choice = [&](bool back) { return cuda::choose(c.layer, tf32, back, cuda::card(), path); };
      if (tries % 8 == 2)
        for (card.shared_bytes = 160 << 10; card.shared_bytes > 16 << 10; card.shared_bytes -= 4 << 10)
          if (choice(true).sharing.piece) break;
      const cuda::Choice forward = choice(false), backward = choice(true);
      if (forward.path == cuda::Path::step || backward.path == cuda::Path::step) continue;
      ++served;
      pieces += forward.sharing.piece > 0 || backward.sharing.piece > 0;
      in_shared += forward.sharing.in_shared() > 0 || backward.sharing.in_shared() > 0;
      waves += forward.groups > 1;
      passes += forward.sharing.rows > forward.sharing.pass_rows();
      test_layer(c, worst, path);
    }
    std::printf(
        "%s: %ld with weights in shared memory, %ld piece by piece, %ld of several groups, %ld of several passes\n",
        path, long(in_shared), long(pieces), long(waves), long(passes));
    EXPECT(served == n, "%ld layers of %ld for path %s", long(served), long(n), path);
    report(path, served, worst);
  }
  cuda::emulator::settings() = before;
}

// Two to four layers, each result of each in memory of its own; dense, since x of the upper ones is y of the lower
// ones.
void test_stacks(int64_t n) {
  const cuda::emulator::Settings before = cuda::emulator::settings();
  cuda::emulator::settings().processors = 24;
  int64_t waves = 0;
  for (int64_t i = 0; i < n; ++i) {
    Sizes sizes = random_sizes(false);
    if (sizes.dtype == Dtype::f64) sizes.dtype = Dtype::f32;
    sizes.T = integer(64, 100);
    sizes.B = integer(1, 5);
    sizes.D = 1;
    sizes.P = sizes.H = integer(1, 24);
    sizes.ragged = sizes.packed = false;
    const int64_t count = integer(2, 4);
    std::vector<Case> cases;
    for (int64_t k = 0; k < count; ++k) {
      if (k) sizes.I = sizes.H;
      cases.push_back(random_case(sizes));
    }
    cuda::Call call;
    call.forced = integer(0, 1) ? "block" : "cluster";
    // Layers whose buffers would have them cut the sequence in other places than the ones beside them.
    const bool bounded = integer(0, 1), lowest_dx = integer(0, 1);
    if (bounded) call.chunk_bytes = integer(8, 24) * sizes.B * cases[0].cell.slots * sizes.H * 4;
    // All layers' results, one by one or at once.
    const auto results = [&](bool at_once) {
      std::vector<Passes> passes;
      std::vector<Forward> up;
      std::vector<Backward> down;
      for (const Case& c : cases) passes.push_back(prepare(c));
      for (size_t k = 0; k < cases.size(); ++k) {
        up.push_back(passes[k].f);
        if (k) up[k].x = {up[k - 1].y.data, up[k - 1].y.step, up[k - 1].y.row};
        passes[k].g.x = up[k].x;
        if (k == 0 && !lowest_dx) passes[k].g.dx.data = nullptr;
      }
      for (size_t k = cases.size(); k-- > 0;) {
        down.push_back(passes[k].g);
        if (k + 1 < cases.size()) down.back().dy = {passes[k + 1].g.dx.data, sizes.B * sizes.H, sizes.H};
      }
      const int layers = int(up.size());
      if (at_once) {
        waves += cuda::side_by_side(up.data(), layers, call) && cuda::side_by_side(down.data(), layers, call);
        std::vector<char> scratch(size_t(cuda::forward_scratch(up.data(), layers, call)));
        cuda::forward(up.data(), layers, call, scratch.data());
        scratch.assign(size_t(cuda::backward_scratch(down.data(), layers, call)), char(0xff));
        cuda::backward(down.data(), layers, call, scratch.data());
      } else {
        cuda::Call alone = call;
        alone.chunk_steps = 32;  // as a wavefront of so few steps has it
        for (const Forward& f : up) {
          std::vector<char> scratch(size_t(cuda::forward_scratch(f, alone)), char(0xff));
          cuda::forward(f, alone, scratch.data());
        }
        for (const Backward& g : down) {
          std::vector<char> scratch(size_t(cuda::backward_scratch(g, alone)), char(0xff));
          cuda::backward(g, alone, scratch.data());
        }
      }
      return passes;
    };
    const std::vector<Passes> alone = results(false), together = results(true);
    for (size_t k = 0; k < cases.size(); ++k)
      for (size_t r = 0; r < alone[k].results.buffers.size(); ++r) {
        // Sums over all steps depend on where those are cut.
        if (bounded && int(r) >= Results::WEIGHTS && int(r) < Results::OPERANDS) continue;
        EXPECT(alone[k].results.buffers[r].bytes == together[k].results.buffers[r].bytes,
               "%s of layer %zu of %zu differs side by side: %s", result_names[r], k, cases.size(),
               describe(cases[k]).c_str());
      }
  }
  EXPECT(waves == n, "%ld of %ld stacks are worth a wavefront", long(waves), long(n));
  std::printf("%ld stacks\n", long(n));
  cuda::emulator::settings() = before;
}

void test_long() {
  Worst worst;
  // One row; two of different lengths; more lengths than fit into a kernel's parameters; more rows than a grid can have
  // blocks along y.
  const struct {
    int64_t T, B;
    bool packed;
  } layers[] = {{1500, 1, false}, {1500, 2, true}, {300, 300, true}, {1, 66000, false}};
  for (const auto& layer : layers) {
    Sizes sizes = random_sizes(false);
    sizes.dtype = Dtype::f64;
    sizes.T = layer.T;
    sizes.B = layer.B;
    sizes.I = 1;
    sizes.H = sizes.P = 2;
    sizes.ragged = layer.B > 1;
    sizes.packed = layer.packed;
    Case c = random_case(sizes);
    vary(c);
    test_layer(c, worst);
  }
  report("long layers", 4, worst);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const long n = argc > 2 ? std::atol(argv[2]) : 100;
  if (what == "layers")
    test_layers(n);
  else if (what == "resident")
    test_resident(n, argc > 3 ? std::atol(argv[3]) : 1000);
  else if (what == "plans")
    test_plans(n);
  else if (what == "stacks")
    test_stacks(n);
  else if (what == "long")
    test_long();
  else
    return std::printf("usage: cuda_driver layers [N] | resident [N [STEPS]] | stacks [N] | plans [N] | long\n"), 2;
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
