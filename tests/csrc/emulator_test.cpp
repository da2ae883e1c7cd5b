// Tests of the emulator itself: what CUDA promises holds under every seed, what it forbids is reported.
//
//   emulator_test works SEEDS   everything that must work, in order and under so many seeds
//   emulator_test errors SEEDS  every error by its text; kernels that lack an order go wrong under one of the seeds
//   emulator_test race NAME     one of those kernels, for ThreadSanitizer to find it; or one that reads past its shared
//                               memory, for AddressSanitizer
// Exits 0 when all holds; else says what failed and exits 1.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.cuh"
#include "../../csrc/cuda/runtime.h"

using namespace fastrnn;
using namespace fastrnn::cuda;

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

LaunchShape shape_of(int x, int threads, int shared_bytes = 0, int cluster = 1, bool cooperative = false) {
  LaunchShape s;
  s.x = x;
  s.threads = threads;
  s.shared_bytes = shared_bytes;
  s.cluster = cluster;
  s.cooperative = cooperative;
  return s;
}

// Reproducible values of few bits, so that sums are exact in any order.
float value_of(int i, int salt) {
  uint32_t z = uint32_t(i) * 2654435761u + uint32_t(salt) * 40503u;
  z ^= z >> 15;
  return float(int(z % 33) - 16) / 8;
}

// --------------------------------------------------------------------------------------------------- sums in a block

// Each block sums its part of x, in a tree through shared memory.
template <bool Synced>
FASTRNN_KERNEL(128)
sum_block(const float* x, float* sums) {
  float* const part = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  part[i] = x[block_x() * thread_count() + i];
  for (int half = thread_count() / 2; half; half /= 2) {
    if (Synced || half > 16) sync_block();
    if (i < half) part[i] += part[i + half];
  }
  if (i == 0) sums[block_x()] = part[0];
}

void test_block_sums() {
  const int blocks = 7, threads = 128;
  std::vector<float> x(blocks * threads), sums(blocks, NAN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = value_of(int(i), 1);
  launch(sum_block<true>, shape_of(blocks, threads, threads * 4), nullptr, x.data(), sums.data());
  for (int b = 0; b < blocks; ++b) {
    float want = 0;
    for (int i = 0; i < threads; ++i) want += x[b * threads + i];
    EXPECT(sums[b] == want, "block %d: %g, not %g", b, sums[b], want);
  }
}

// More blocks than run at the same time, in three dimensions; a thread that returns early is not waited for.
FASTRNN_KERNEL(64) count_blocks(int* counts, int y, int z) {
  if (thread_index() == 63) return;
  sync_block();
  if (thread_index() == 0) ++counts[(block_z() * y + block_y()) * grid_x() + block_x()];
  if (block_z() >= z) counts[0] = 1000;
}
void test_waves() {
  std::vector<int> counts(5 * 4 * 3, 0);
  LaunchShape s = shape_of(5, 64);
  s.y = 4;
  s.z = 3;
  launch(count_blocks, s, nullptr, counts.data(), 4, 3);
  for (size_t i = 0; i < counts.size(); ++i) EXPECT(counts[i] == 1, "block %zu ran %d times", i, counts[i]);
}

// ------------------------------------------------------------------------------------------------------------- warps

FASTRNN_KERNEL(64) shuffle_all(float* out) {
  const int i = thread_index();
  for (int mask = 0; mask < 32; ++mask) out[mask * 64 + i] = shuffle_xor(float(i * 100 + mask), mask);
}
void test_shuffles() {
  std::vector<float> out(32 * 64, NAN);
  launch(shuffle_all, shape_of(1, 64), nullptr, out.data());
  for (int mask = 0; mask < 32; ++mask)
    for (int i = 0; i < 64; ++i)
      EXPECT(out[mask * 64 + i] == float((i ^ mask) * 100 + mask), "lane %d, mask %d: %g", i, mask, out[mask * 64 + i]);
}

// One tile for each warp. a [16, K], b [K, 8], c [16, 8] row-major.
template <class Storage>
FASTRNN_KERNEL(64)
one_tile(const Storage* a, const Storage* b, float* c) {
  const int warp = thread_index() / 32, l = thread_index() % 32, row = l / 4, k = l % 4;
  float sums[4];
  uint32_t x[4], y[2];
  float* const to = c + warp * 16 * 8;
  for (int i = 0; i < 4; ++i) sums[i] = to[(row + (i >= 2 ? 8 : 0)) * 8 + 2 * k + i % 2];
  if constexpr (sizeof(Storage) == 4) {
    const float* const from = a + warp * 16 * 8;
    x[0] = bits_as<uint32_t>(to_tf32(from[row * 8 + k]));
    x[1] = bits_as<uint32_t>(to_tf32(from[(row + 8) * 8 + k]));
    x[2] = bits_as<uint32_t>(to_tf32(from[row * 8 + k + 4]));
    x[3] = bits_as<uint32_t>(to_tf32(from[(row + 8) * 8 + k + 4]));
    y[0] = bits_as<uint32_t>(to_tf32(b[warp * 64 + k * 8 + row]));
    y[1] = bits_as<uint32_t>(to_tf32(b[warp * 64 + (k + 4) * 8 + row]));
    multiply_tile_tf32(sums, x, y);
  } else {
    const Storage* const from = a + warp * 16 * 16;
    const Storage* const with = b + warp * 16 * 8;
    const auto pair = [](Storage low, Storage high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; };
    const auto a_at = [&](int r, int j) { return pair(from[r * 16 + j], from[r * 16 + j + 1]); };
    x[0] = a_at(row, 2 * k);
    x[1] = a_at(row + 8, 2 * k);
    x[2] = a_at(row, 2 * k + 8);
    x[3] = a_at(row + 8, 2 * k + 8);
    y[0] = pair(with[2 * k * 8 + row], with[(2 * k + 1) * 8 + row]);
    y[1] = pair(with[(2 * k + 8) * 8 + row], with[(2 * k + 9) * 8 + row]);
    multiply_tile(sums, x, y, Storage{});
  }
  for (int i = 0; i < 4; ++i) to[(row + (i >= 2 ? 8 : 0)) * 8 + 2 * k + i % 2] = sums[i];
}
template <class Storage>
void test_tiles() {
  const int depth = sizeof(Storage) == 4 ? 8 : 16;
  std::vector<Storage> a(2 * 16 * depth), b(2 * depth * 8);
  std::vector<float> c(2 * 16 * 8);
  for (size_t i = 0; i < a.size(); ++i) a[i] = narrow<Storage>(value_of(int(i), 2));
  for (size_t i = 0; i < b.size(); ++i) b[i] = narrow<Storage>(value_of(int(i), 3));
  for (size_t i = 0; i < c.size(); ++i) c[i] = value_of(int(i), 4);
  std::vector<float> want = c;
  for (int t = 0; t < 2; ++t)
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j)
        for (int k = 0; k < depth; ++k)
          want[(t * 16 + i) * 8 + j] += widen(a[(t * 16 + i) * depth + k]) * widen(b[(t * depth + k) * 8 + j]);
  launch(one_tile<Storage>, shape_of(1, 64), nullptr, a.data(), b.data(), c.data());
  for (size_t i = 0; i < c.size(); ++i) EXPECT(c[i] == want[i], "depth %d, %zu: %g, not %g", depth, i, c[i], want[i]);
}

void test_rounding() {
  const auto check = [](float x, float want) {
    const float got = to_tf32(x);
    EXPECT(bits_as<uint32_t>(got) == bits_as<uint32_t>(want), "%a: %a, not %a", x, got, want);
  };
  check(1 + 0x1p-11f, 1 + 0x1p-10f);  // a tie, away from zero
  check(-1 - 0x1p-11f, -1 - 0x1p-10f);
  check(1 + 0x1.ffcp-12f, 1);
  check(INFINITY, INFINITY);
  check(-0.0f, -0.0f);
  check(0x1.fffffep127f, INFINITY);
  EXPECT(std::isnan(to_tf32(NAN)), "%g", to_tf32(NAN));
}

// ---------------------------------------------------------------------------------------------- flags between blocks

enum class Flags { right, unsynced, ahead, one_buffer };
// Every block writes a value for each step, and reads those of all others, through two buffers.
template <Flags Kind>
FASTRNN_KERNEL(64)
exchange(Quad* state, uint32_t* flags, uint32_t* out, int steps) {
  const int blocks = grid_x(), me = block_x(), i = thread_index(), n = thread_count();
  for (int t = 0; t < steps; ++t) {
    Quad* const now = state + (Kind == Flags::one_buffer ? 0 : t % 2) * blocks * n;
    Quad q;
    for (uint32_t& word : q.word) word = uint32_t(t * 1000 + me * 64 + i);
    store_fresh(now + me * n + i, q);
    if (Kind != Flags::unsynced) sync_block();
    if (i == 0) release_word(flags + me, uint32_t(t + 1));
    if (i < blocks)
      while (acquire_word(flags + i) < uint32_t(t + 1)) while_waiting();
    if (Kind != Flags::ahead) sync_block();
    uint32_t sum = 0;
    for (int b = 0; b < blocks; ++b) {
      const Quad other = load_fresh(now + b * n + i);
      for (uint32_t word : other.word) sum += word;
    }
    out[(t * blocks + me) * n + i] = sum;
  }
}
template <Flags Kind>
int wrong_exchanges() {
  const int blocks = 4, threads = 64, steps = 6;
  Quad zero = {};
  std::vector<Quad> state(2 * blocks * threads, zero);
  std::vector<uint32_t> flags(blocks, 0), out(steps * blocks * threads, 0);
  launch(exchange<Kind>, shape_of(blocks, threads, 0, 1, true), nullptr, state.data(), flags.data(), out.data(), steps);
  int wrong = 0;
  for (int t = 0; t < steps; ++t)
    for (int b = 0; b < blocks; ++b)
      for (int i = 0; i < threads; ++i) {
        uint32_t want = 0;
        for (int other = 0; other < blocks; ++other) want += 4 * uint32_t(t * 1000 + other * 64 + i);
        wrong += out[(t * blocks + b) * threads + i] != want;
      }
  return wrong;
}

// --------------------------------------------------------------------------------------------------------- a cluster

enum class Ring { right, no_wait, no_first_sync, no_sync, too_many };
// Each block pushes its quads to the next in the ring, adds what came from the one before, and so on: two buffers and
// barriers, each waited for before anybody writes there again.
template <Ring Kind>
FASTRNN_KERNEL(64)
ring(uint32_t* out, int steps) {
  const int i = thread_index(), n = thread_count(), size = grid_x(), next = (cluster_rank() + 1) % size;
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  Quad* const inbox = reinterpret_cast<Quad*>(shared_memory() + 16);
  const int buffers = 2;
  if (i == 0)
    for (int k = 0; k < buffers; ++k) {
      make_barrier(barrier + k);
      expect_bytes(barrier + k, uint32_t(n * sizeof(Quad)));
    }
  if (Kind != Ring::no_first_sync) sync_cluster();
  Quad mine;
  for (int w = 0; w < 4; ++w) mine.word[w] = uint32_t(cluster_rank() * 10000 + i * 10 + w);
  for (int t = 0; t < steps; ++t) {
    const int k = t % buffers;
    push(inbox + k * n + i, mine, barrier + k, next);
    if (Kind == Ring::too_many && t == steps - 1 && i == 5) push(inbox + k * n + i, mine, barrier + k, next);
    if (Kind != Ring::no_wait || t != 3) wait_for_bytes(barrier + k, uint32_t(t / buffers & 1));
    // What a neighbour thread was sent: all of it has arrived.
    const Quad q = inbox[k * n + (i ^ 1)];
    for (int w = 0; w < 4; ++w) mine.word[w] = q.word[w] + uint32_t(t);
    sync_block();
    if (i == 0 && t + buffers < steps) expect_bytes(barrier + k, uint32_t(n * sizeof(Quad)));
    // A ring alone does not hold back who is ahead of it: all have read before anybody writes there again.
    if (k == 1 && Kind != Ring::no_sync) sync_cluster();
  }
  for (int w = 0; w < 4; ++w) out[(cluster_rank() * n + i) * 4 + w] = mine.word[w];
}
template <Ring Kind>
void run_ring(std::vector<uint32_t>& out, int size, int steps) {
  const int threads = 64;
  out.assign(size_t(size * threads * 4), 0);
  launch(ring<Kind>, shape_of(size, threads, 16 + 2 * threads * int(sizeof(Quad)), size), nullptr, out.data(), steps);
}
template <Ring Kind>
int wrong_rings() {
  const int size = 4, threads = 64, steps = 7;
  std::vector<uint32_t> out;
  run_ring<Kind>(out, size, steps);
  int wrong = 0;
  for (int b = 0; b < size; ++b)
    for (int i = 0; i < threads; ++i)
      for (int w = 0; w < 4; ++w) {
        const int from = ((b - steps) % size + size) % size;
        const uint32_t want = uint32_t(from * 10000 + (steps % 2 ? i ^ 1 : i) * 10 + w + steps * (steps - 1) / 2);
        wrong += out[size_t((b * threads + i) * 4 + w)] != want;
      }
  return wrong;
}

// ------------------------------------------------------------------------------------------------------------ errors

FASTRNN_KERNEL(64) deadlock_on_flag(const uint32_t* flag) {
  if (thread_index() == 7)
    while (acquire_word(flag) == 0) while_waiting();
  sync_block();
}
FASTRNN_KERNEL(64) spin_on_flag(const uint32_t* flag) {
  if (thread_index() == 7)
    while (acquire_word(flag) == 0) {
    }
  sync_block();
}
FASTRNN_KERNEL(64) divided_warp(float* out) {
  if (thread_index() != 40) out[thread_index()] = shuffle_xor(1, 1);
  sync_block();
}
FASTRNN_KERNEL(64) left_warp(float* out) {
  if (thread_index() == 40) return;
  out[thread_index()] = shuffle_xor(1, 1);
}
FASTRNN_KERNEL(64) two_places(float*) {
  if (thread_index() < 32)
    sync_block();
  else
    sync_block();
}
FASTRNN_KERNEL(64) unrounded(float*) {
  float c[4] = {};
  const uint32_t a[4] = {bits_as<uint32_t>(0.1f)}, b[2] = {};
  multiply_tile_tf32(c, a, b);
}
FASTRNN_KERNEL(64) never_comes(float*) {
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  if (thread_index() == 0) {
    make_barrier(barrier);
    expect_bytes(barrier, 48);
  }
  sync_cluster();
  if (thread_index() == 1) push(reinterpret_cast<Quad*>(shared_memory() + 16), Quad{}, barrier, cluster_rank());
  wait_for_bytes(barrier, 0);
}
FASTRNN_KERNEL(64) outside(float*) {
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  push(reinterpret_cast<Quad*>(shared_memory() + 1024), Quad{}, barrier, 0);
}
FASTRNN_KERNEL(64) nothing(float*) {}
FASTRNN_KERNEL(64) past_shared(float* out) {
  out[thread_index()] = reinterpret_cast<const float*>(shared_memory())[thread_index() + 1];
}

// Block 0 pushes to block 1, which does not wait for it.
FASTRNN_KERNEL(64) late_push(float*) {
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  if (thread_index() == 0) {
    make_barrier(barrier);
    expect_bytes(barrier, sizeof(Quad));
  }
  sync_cluster();
  if (cluster_rank() == 0 && thread_index() == 1)
    push(reinterpret_cast<Quad*>(shared_memory() + 16), Quad{}, barrier, 1);
}

void expect_error(const char* name, const std::vector<std::string>& texts, const std::function<void()>& body) {
  try {
    body();
    EXPECT(false, "%s: nothing was reported", name);
  } catch (const std::runtime_error& e) {
    for (const std::string& part : texts)
      EXPECT(std::strstr(e.what(), part.c_str()), "%s: no '%s' in: %s", name, part.c_str(), e.what());
  }
}

void test_errors() {
  std::vector<float> out(64);
  const LaunchShape one = shape_of(1, 64, 1024), many = shape_of(9, 64), cluster = shape_of(4, 64, 1024, 4);
  const uint32_t flag = 0;
  float* const to = out.data();
  expect_error("flag", {"deadlock", "threads 0-6 8-63: sync_block at emulator_test.cpp:", "threads 7: while_waiting"},
               [&] { launch(deadlock_on_flag, one, nullptr, &flag); });
  expect_error("waves", {"deadlock", "5 blocks have not begun"},
               [&] { launch(deadlock_on_flag, many, nullptr, &flag); });
  expect_error("spin", {"polls and nothing else has happened", "thread 7 of block (0, 0, 0)", "acquire_word"},
               [&] { launch(spin_on_flag, one, nullptr, &flag); });
  expect_error("divided", {"deadlock", "warp 1 is divided: 31 of 32 lanes are in shuffle_xor"},
               [&] { launch(divided_warp, one, nullptr, to); });
  expect_error("left", {"the warp is divided"}, [&] { launch(left_warp, one, nullptr, to); });
  expect_error("places", {"sync_block at emulator_test.cpp", "others that it is to meet are at"},
               [&] { launch(two_places, one, nullptr, to); });
  expect_error("lanes", {"its warp has 16 threads, not 32"},
               [&] { launch(shuffle_all, shape_of(1, 16), nullptr, to); });
  expect_error("unrounded", {"register 0 is not rounded by to_tf32(): 3dcccccd"},
               [&] { launch(unrounded, one, nullptr, to); });
  expect_error("bytes", {"deadlock", "parity 0: the barrier at shared + 0 is in phase 0, 32 bytes to come"},
               [&] { launch(never_comes, cluster, nullptr, to); });
  expect_error("outside", {"push at emulator_test.cpp", "shared + 1024 is no place for 16 bytes"},
               [&] { launch(outside, cluster, nullptr, to); });
  expect_error("too large", {"too many blocks in cooperative launch", "4 can run"},
               [&] { launch(nothing, shape_of(5, 64, 0, 1, true), nullptr, to); });
  expect_error("threads", {"invalid configuration"}, [&] { launch(nothing, shape_of(1, 1025), nullptr, to); });
  expect_error("shared", {"invalid configuration"},
               [&] { launch(nothing, shape_of(1, 64, (227 << 10) + 1), nullptr, to); });
  expect_error("cluster", {"invalid configuration"}, [&] { launch(nothing, shape_of(6, 64, 0, 4), nullptr, to); });
  launch(nothing, shape_of(4, 64, 0, 1, true), nullptr, to);
}

// A kernel that lacks an order: with some seed its results are wrong, or it is reported.
void expect_wrong(const char* name, int seeds, const std::function<int()>& wrong_values) {
  for (int seed = 1; seed <= seeds; ++seed) {
    emulator::settings().seed = uint64_t(seed);
    try {
      if (wrong_values()) return;
    } catch (const std::runtime_error&) {
      return;
    }
  }
  EXPECT(false, "%s: right with each of %d seeds", name, seeds);
}

// Errors that come with some seeds: each text with one of them.
void expect_errors(const char* name, int seeds, const std::vector<std::string>& texts,
                   const std::function<void()>& body) {
  std::string all;
  for (int seed = 1; seed <= seeds; ++seed) {
    emulator::settings().seed = uint64_t(seed);
    try {
      body();
    } catch (const std::runtime_error& e) {
      all += std::string(e.what()) + "\n";
    }
  }
  for (const std::string& part : texts)
    EXPECT(all.find(part) != std::string::npos, "%s: no '%s' in: %.2000s", name, part.c_str(), all.c_str());
}
void test_pushes_too_many(int seeds) {
  std::vector<uint32_t> sums;
  float* const none = nullptr;
  expect_errors("too many", seeds, {"that nobody expected", "which has ended before it arrived"},
                [&] { run_ring<Ring::too_many>(sums, 4, 7); });
  expect_errors("late", seeds, {"push at emulator_test.cpp", "which has ended", "which has ended before it arrived"},
                [&] { launch(late_push, shape_of(2, 64, 32, 2), nullptr, none); });
}

// ---------------------------------------------------------------------------------------------------------- products

template <class Storage, class Out>
void test_product(Dtype dtype, Dtype out, bool a_transposed, bool b_transposed, bool add, bool tf32) {
  const int m = 5, n = 7, k = 33, wide = 40;
  std::vector<Storage> a(size_t((a_transposed ? k : m) * wide)), b(size_t((b_transposed ? n : k) * wide));
  std::vector<Out> c(size_t(m * wide));
  // A value that tf32 rounds down, to see whether it does.
  const float sixteenth = tf32 ? 0x1p-4f + 0x1p-16f : 0x1p-4f;
  for (size_t i = 0; i < a.size(); ++i)
    a[i] = narrow<Storage>(value_of(int(i), 5) == 0 ? sixteenth : value_of(int(i), 5));
  for (size_t i = 0; i < b.size(); ++i) b[i] = narrow<Storage>(value_of(int(i), 6));
  for (size_t i = 0; i < c.size(); ++i) c[i] = narrow<Out>(value_of(int(i), 7));
  const std::vector<Out> before = c;
  Product p{m,    n,   k,   {a.data(), dtype, wide, a_transposed}, {b.data(), dtype, wide, b_transposed}, c.data(), out,
            wide, add, tf32};
  multiply(p, nullptr, nullptr);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < wide; ++j) {
      double want = widen(before[size_t(i * wide + j)]);
      if (j < n) {
        if (!add) want = 0;
        for (int q = 0; q < k; ++q) {
          double x = widen(a[size_t(a_transposed ? q * wide + i : i * wide + q)]);
          if (tf32 && x == double(sixteenth)) x = 0x1p-4;
          want += x * widen(b[size_t(b_transposed ? j * wide + q : q * wide + j)]);
        }
      }
      const double got = widen(c[size_t(i * wide + j)]);
      EXPECT(got == double(widen(narrow<Out>(Compute<Out>(want)))), "dtype %d, (%d, %d): %g, not %g", int(dtype), i, j,
             got, want);
    }
}
void test_products() {
  for (int bits = 0; bits < 8; ++bits) {
    const bool a = bits & 1, b = bits & 2, add = bits & 4;
    test_product<float, float>(Dtype::f32, Dtype::f32, a, b, add, false);
    test_product<float, float>(Dtype::f32, Dtype::f32, a, b, add, true);
    test_product<double, double>(Dtype::f64, Dtype::f64, a, b, add, false);
    test_product<Bf16, Bf16>(Dtype::bf16, Dtype::bf16, a, b, add, false);
    test_product<Bf16, float>(Dtype::bf16, Dtype::f32, a, b, add, false);
    test_product<F16, F16>(Dtype::f16, Dtype::f16, a, b, add, false);
    test_product<F16, float>(Dtype::f16, Dtype::f32, a, b, add, false);
  }
}

// -------------------------------------------------------------------------------------------------------------- main

int wrong_sums() {
  std::vector<float> x(128, 1), sums(1);
  launch(sum_block<false>, shape_of(1, 128, 512), nullptr, x.data(), sums.data());
  return sums[0] != 128;
}
struct {
  const char* name;
  int (*wrong_values)();
} const wrong_kernels[] = {
    {"sync_block", wrong_sums},
    {"release after sync_block", wrong_exchanges<Flags::unsynced>},
    {"sync_block after acquire", wrong_exchanges<Flags::ahead>},
    {"second buffer", wrong_exchanges<Flags::one_buffer>},
    {"wait_for_bytes", wrong_rings<Ring::no_wait>},
    {"sync_cluster after make_barrier", wrong_rings<Ring::no_first_sync>},
    {"sync_cluster before pushing there again", wrong_rings<Ring::no_sync>},
};

void test_everything() {
  test_block_sums();
  test_waves();
  test_shuffles();
  test_tiles<Bf16>();
  test_tiles<F16>();
  test_tiles<float>();
  const int exchanged = wrong_exchanges<Flags::right>(), pushed = wrong_rings<Ring::right>();
  EXPECT(exchanged == 0, "%d values that others have not written", exchanged);
  EXPECT(pushed == 0, "%d words that others have not pushed", pushed);
}

int usage() {
  std::puts("emulator_test works SEEDS | errors SEEDS | race NAME");
  return 2;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return usage();
  const std::string what = words[1];
  emulator::settings().processors = 4;
  if (what == "race") {
    if (words[2] == std::string("end of shared memory")) {
      std::vector<float> out(64);
      launch(past_shared, shape_of(1, 64, 256), nullptr, out.data());
      return 0;
    }
    for (const auto& kernel : wrong_kernels)
      if (kernel.name == std::string(words[2])) {
        try {
          kernel.wrong_values();
        } catch (const std::runtime_error& e) {
          std::puts(e.what());
        }
        return 0;
      }
    return usage();
  }
  const int seeds = std::atoi(words[2]);
  if (what == "works") {
    for (int seed = 0; seed <= seeds; ++seed) {
      emulator::settings().in_order = seed == 0;
      emulator::settings().seed = uint64_t(seed);
      test_everything();
      if (failures) std::printf("... with seed %d\n", seed);
    }
    test_rounding();
    test_products();
  } else if (what == "errors") {
    test_errors();
    test_pushes_too_many(seeds);
    for (const auto& kernel : wrong_kernels) expect_wrong(kernel.name, seeds, kernel.wrong_values);
    test_everything();
  } else {
    return usage();
  }
  std::puts(failures ? "FAILED" : "ok");
  return failures != 0;
}
