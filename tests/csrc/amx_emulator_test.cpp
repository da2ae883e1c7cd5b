// Tests of the AMX emulator: every instruction against arithmetic written apart from it, every form of address, threads
// with tiles of their own, what the interrupted code must find unchanged, and each wrong use in a child that must
// abort.
//
//   amx_emulator_test       everything; prints "ok" and exits 0 where all holds, else says what failed and exits 1
//   amx_emulator_test time  what an instruction costs, in microseconds
//
// On a machine with AMX the same is asked of its own instructions, save for counts and for wrong use.
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

extern "C" int fastrnn_emulates_amx __attribute__((weak));
extern "C" long fastrnn_amx_count(int kind);

namespace {

enum Kind { kConfig, kRelease, kZero, kLoad, kStore, kMultiply };

std::atomic<int> failures{0};
bool native = false;

#define EXPECT(condition, ...)                \
  do {                                        \
    if (!(condition)) {                       \
      std::printf("FAILED %s: ", #condition); \
      std::printf(__VA_ARGS__);               \
      std::printf("\n");                      \
      if (++failures > 20) std::exit(1);      \
    }                                         \
  } while (0)

struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  Config& tile(int i, int rows_, int bytes) {
    rows[i] = uint8_t(rows_);
    colsb[i] = uint16_t(bytes);
    return *this;
  }
};
static_assert(sizeof(Config) == 64, "");

void configure(const Config& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
void release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
}
template <int T>
void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}

// The same for tiles that do not differ, which an assembler refuses.
template <int C, int A, int B>
void multiply_encoded() {
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~B & 15) << 3 | 2), "i"(0xc0 | C << 3 | A) : "memory");
}

// ------------------------------------------------------------------------------------------------- multiplication

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Denormals are zeros of the same sign.
float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float of_bf16(uint16_t x) { return flush(float_of(uint32_t(x) << 16)); }

// c += a b, as the manual has it: even and odd products summed apart, with one rounding each.
void reference(std::vector<float>& c, const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, int M, int N,
               int K) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float sum[2] = {0, 0};
      for (int k = 0; k < K; ++k)
        for (int j = 0; j < 2; ++j)
          sum[j] = flush(std::fma(of_bf16(a[(m * K + k) * 2 + j]), of_bf16(b[(k * N + n) * 2 + j]), sum[j]));
      float& out = c[m * N + n];
      out = flush(flush(out) + flush(sum[0] + sum[1]));
    }
}

struct Random {
  std::mt19937 engine;
  explicit Random(int seed) : engine(seed) {}
  int below(int n) { return int(engine() % unsigned(n)); }

  // kind 0: small numbers, which cancel; 1: any bits; 2: numbers whose products are about the smallest;
  // 3: small numbers and, seldom, infinities, NaN, zeros of both signs, denormals and the largest.
  uint16_t bf16(int kind) {
    static const uint16_t special[] = {0x7f80, 0xff80, 0x7fc0, 0x0000, 0x8000, 0x0001, 0x807f, 0x7f7f, 0xff7f, 0x0080};
    const uint16_t sign_and_fraction = uint16_t(engine() & 0x807f);
    if (kind == 1) return uint16_t(engine());
    if (kind == 2) return sign_and_fraction | uint16_t((58 + below(12)) << 7);
    if (kind == 3 && below(60) == 0) return special[below(10)];
    return sign_and_fraction | uint16_t((120 + below(8)) << 7);
  }
  float fp32(int kind) {
    if (kind == 2) return float_of((engine() & 0x81ffffff));  // denormals too
    return float_of(uint32_t(bf16(kind)) << 16 | (engine() & 0xffff));
  }
};

bool same(float x, float y) { return std::isnan(x) ? std::isnan(y) : bits_of(x) == bits_of(y); }

void check_product(Random& random, int M, int N, int K, int kind) {
  Config config;
  config.tile(2, M, 4 * N).tile(5, M, 4 * K).tile(7, K, 4 * N);
  std::vector<float> c(M * N), got(M * N);
  std::vector<uint16_t> a(M * K * 2), b(K * N * 2);
  for (float& x : c) x = random.fp32(kind);
  for (uint16_t& x : a) x = random.bf16(kind);
  for (uint16_t& x : b) x = random.bf16(kind);
  configure(config);
  load<2>(c.data(), 4 * N);
  load<5>(a.data(), 4 * K);
  load<7>(b.data(), 4 * N);
  for (int i = 0; i < 2; ++i) {
    multiply<2, 5, 7>();
    reference(c, a, b, M, N, K);
  }
  store<2>(got.data(), 4 * N);
  release();
  for (int i = 0; i < M * N; ++i)
    EXPECT(same(got[i], c[i]), "%d x %d x %d, kind %d, element %d: %a, not %a", M, N, K, kind, i, got[i], c[i]);
}

void test_products(int seed, int times) {
  Random random(seed);
  for (int kind = 0; kind < 4; ++kind) {
    for (int i = 0; i < times; ++i) check_product(random, 16, 16, 16, kind);
    for (int i = 0; i < times; ++i)
      check_product(random, 1 + random.below(16), 1 + random.below(16), 1 + random.below(16), kind);
  }
}

// The sums are in the manual's order, to the bit: 2^24 + 1 - 2^24 is 0 in one order and 1 in others.
void test_order() {
  Config config;
  config.tile(0, 1, 4).tile(1, 1, 12).tile(2, 3, 4);
  const auto bf16 = [](float x) { return uint16_t(bits_of(x) >> 16); };
  const float large = 16777216;
  const auto product = [&](std::vector<float> a, float c) {
    uint16_t x[6], ones[6];
    for (int i = 0; i < 6; ++i) x[i] = bf16(a[i]), ones[i] = bf16(1);
    configure(config);
    load<0>(&c, 4);
    load<1>(x, 12);
    load<2>(ones, 4);
    multiply<0, 1, 2>();
    store<0>(&c, 4);
    return c;
  };
  EXPECT(product({large, 0, 1, 0, -large, 0}, 0) == 0, "even products are summed in order");
  EXPECT(product({large, 1, -large, 0, 0, 0}, 0) == 1, "odd products are summed apart");
  EXPECT(product({1, 0, 0, 0, 0, 0}, large) == large, "the destination is added last");
  EXPECT(product({1, 0, 0, 1, 0, 0}, large) == large + 2, "the two sums are added before the destination");
  release();
}

// ------------------------------------------------------------------------------------------------- loads and stores

struct Bytes {
  std::vector<uint8_t> all;
  explicit Bytes(int size, int salt = 1) : all(size) {
    for (int i = 0; i < size; ++i) all[i] = uint8_t((i * 37 + i / 251 + salt) & 0xff);
  }
};

void test_loads_and_stores() {
  const int sizes[][2] = {{16, 64}, {1, 4}, {16, 4}, {1, 64}, {7, 20}, {13, 60}};
  for (auto [rows, bytes] : sizes)
    for (int stride : {0, 64, 67, 128, 1001, -64, -77}) {
      Config config;
      config.tile(6, rows, bytes);
      const int reach = (rows - 1) * std::abs(stride) + bytes, first = stride < 0 ? -stride * (rows - 1) : 0;
      const Bytes from(reach);  // of exactly the right size, for AddressSanitizer
      std::vector<uint8_t> to(reach, 0xee), wanted(reach, 0xee);
      configure(config);
      load<6>(from.all.data() + first, stride);
      store<6>(to.data() + first, stride);
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < bytes; ++i) wanted[first + r * stride + i] = from.all[first + r * stride + i];
      EXPECT(to == wanted, "%d rows of %d bytes, stride %d", rows, bytes, stride);
      zero<6>();
      store<6>(to.data() + first, stride);
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < bytes; ++i) wanted[first + r * stride + i] = 0;
      EXPECT(to == wanted, "zero: %d rows of %d bytes, stride %d", rows, bytes, stride);
    }
  release();
}

void test_configuration() {
  Config config, got;
  config.tile(0, 16, 64).tile(3, 7, 20).tile(7, 1, 4);
  std::vector<uint8_t> from(1024, 7), to(1024, 9);
  configure(config);
  asm volatile("sttilecfg %0" : "=m"(got));
  EXPECT(!std::memcmp(&got, &config, 64), "the configuration is read back");
  load<0>(from.data(), 64);
  configure(config);  // zeroes the tiles
  store<0>(to.data(), 64);
  EXPECT(to == std::vector<uint8_t>(1024), "tiles are zero when configured");
  const Config none = [] {
    Config c;
    c.palette = 0;
    return c;
  }();
  configure(none);
  asm volatile("sttilecfg %0" : "=m"(got));
  EXPECT(!std::memcmp(&got, &none, 64), "palette 0 releases");
  configure(config);
  release();
  asm volatile("sttilecfg %0" : "=m"(got));
  EXPECT(!std::memcmp(&got, &none, 64), "tilerelease releases");
}

// ------------------------------------------------------------------------------------------------- addresses

// Every load below reads the same tile, of two rows of 8 bytes, stride 24; what is loaded is stored plainly.
alignas(64) uint8_t source[64];
alignas(64) Config relative_config;
thread_local Config thread_config;

void expect_loaded(const char* form, int64_t stride = 24) {
  uint8_t got[16];
  store<1>(got, 8);
  EXPECT(!std::memcmp(got, source, 8) && !std::memcmp(got + 8, source + stride, 8), "%s", form);
  zero<1>();
}

// base and index go through the registers named; the address is base + displacement.
#define LOAD(base, index, scale, displacement)                                   \
  do {                                                                           \
    asm volatile("mov %0, %%" base                                               \
                 "\n"                                                            \
                 "mov %1, %%" index                                              \
                 "\n"                                                            \
                 "tileloadd " #displacement "(%%" base ",%%" index "," #scale    \
                 "), %%tmm1" ::"r"(uint64_t(source) - (displacement)),           \
                 "r"(int64_t(24) / scale)                                        \
                 : base, index, "memory");                                       \
    expect_loaded("tileloadd " #displacement "(" base "," index "," #scale ")"); \
  } while (0)

// rsp and rbp as the base: exchanged with another register around the instruction.
#define LOAD_FRAME(frame, displacement)                                                                             \
  do {                                                                                                              \
    uint64_t base = uint64_t(source) - (displacement);                                                              \
    asm volatile("xchg %0, %%" frame "\n tileloadd " #displacement "(%%" frame ",%1,8), %%tmm1\n xchg %0, %%" frame \
                 : "+r"(base)                                                                                       \
                 : "r"(int64_t(3))                                                                                  \
                 : "memory");                                                                                       \
    expect_loaded("tileloadd " #displacement "(" frame ",reg,8)");                                                  \
  } while (0)

#define CONFIGURE(operand, ...)                                                     \
  do {                                                                              \
    Config got;                                                                     \
    asm volatile("ldtilecfg " operand "\n sttilecfg %0" : "=m"(got) : __VA_ARGS__); \
    EXPECT(!std::memcmp(&got, wanted, 64), "%s", "ldtilecfg " operand);             \
    release();                                                                      \
  } while (0)

void test_addresses() {
  for (int i = 0; i < 64; ++i) source[i] = uint8_t(3 * i + 1);
  Config config;
  config.tile(1, 2, 8);
  configure(config);
  zero<1>();
  LOAD("rax", "rcx", 1, 0);
  LOAD("rdx", "rbx", 2, 0);
  LOAD("rsi", "rdi", 4, 1);
  LOAD("r8", "r9", 8, -1);
  LOAD("r10", "r11", 1, 127);
  LOAD("r12", "r13", 2, 0);
  LOAD("r13", "r12", 4, 0);
  LOAD("r14", "r15", 8, -128);
  LOAD("r15", "rax", 1, 128);
  LOAD("r12", "r14", 1, 4096);
  LOAD("r13", "rsi", 1, -1000000);
  LOAD("rcx", "r8", 8, 1000000);
  LOAD("r9", "rdx", 8, 64);
  LOAD_FRAME("rbp", 0);
  LOAD_FRAME("rbp", 16);
  if (native) LOAD_FRAME("rsp", 0);  // a signal would be delivered onto the data
  {
    // rsp, as it is: the stack holds the data, above the red zone.
    uint8_t* const p = source;
    asm volatile(
        "mov %%rsp, %%rdx\n sub $1024, %%rsp\n and $-64, %%rsp\n"
        "vmovdqu (%0), %%xmm0\n vmovdqu %%xmm0, 40(%%rsp)\n vmovdqu 16(%0), %%xmm0\n vmovdqu %%xmm0, 56(%%rsp)\n"
        "tileloadd 40(%%rsp,%1,1), %%tmm1\n mov %%rdx, %%rsp" ::"r"(p),
        "r"(int64_t(24))
        : "rdx", "xmm0", "memory");
    expect_loaded("tileloadd 40(rsp,reg,1)");
  }
  asm volatile("tileloadd (%0), %%tmm1" ::"r"(source) : "memory");
  expect_loaded("tileloadd without an index", 0);
  asm volatile("tileloadd 5(%0), %%tmm1" ::"r"(uint64_t(source) - 5) : "memory");
  expect_loaded("tileloadd without an index, with a displacement", 0);
  asm volatile("tileloaddt1 (%0,%1), %%tmm1" ::"r"(source), "r"(int64_t(24)) : "memory");
  expect_loaded("tileloaddt1");
  asm volatile("tileloadd (%0,%1), %%tmm1" ::"r"(source), "r"(int64_t(24)) : "memory");
  uint8_t stored[32] = {};
  asm volatile("tilestored %%tmm1, -7(%0,%1,4)" ::"r"(stored + 7), "r"(int64_t(4)) : "memory");
  EXPECT(!std::memcmp(stored, source, 8) && !std::memcmp(stored + 16, source + 24, 8), "tilestored scaled");
  // No base: the address is the displacement.
  void* const low = mmap(reinterpret_cast<void*>(0x10000000), 4096, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (low != MAP_FAILED) {
    std::memcpy(low, source, 64);
    asm volatile("tileloadd 0x10000000(,%0,2), %%tmm1" ::"r"(int64_t(12)) : "memory");
    expect_loaded("tileloadd without a base");
    munmap(low, 4096);
  }
  release();

  const Config* const wanted = &config;
  relative_config = thread_config = config;
  CONFIGURE("%1", "m"(relative_config));
  CONFIGURE("(%1)", "r"(&config));
  CONFIGURE("8(%1)", "r"(uint64_t(&config) - 8));
  CONFIGURE("-4096(%1,%2,4)", "r"(uint64_t(&config) + 4096 - 40), "r"(int64_t(10)));
  CONFIGURE("(,%1,8)", "r"(uint64_t(&config) / 8));
  asm volatile("" ::: "memory");
  uint64_t thread;
  asm("mov %%fs:0, %0" : "=r"(thread));
  CONFIGURE("%%fs:(%1)", "r"(uint64_t(&thread_config) - thread));
#define CONFIGURE_AT(base, displacement)                                                       \
  do {                                                                                         \
    Config got;                                                                                \
    asm volatile("mov %1, %%" base "\n ldtilecfg " #displacement "(%%" base ")\n sttilecfg %0" \
                 : "=m"(got)                                                                   \
                 : "r"(uint64_t(&config) - (displacement))                                     \
                 : base, "memory");                                                            \
    EXPECT(!std::memcmp(&got, wanted, 64), "ldtilecfg " #displacement "(" base ")");           \
    release();                                                                                 \
  } while (0)
  CONFIGURE_AT("rax", 0);
  CONFIGURE_AT("r12", 0);
  CONFIGURE_AT("r13", 0);
  CONFIGURE_AT("r13", 100);
  CONFIGURE_AT("r15", 100000);
  configure(config);
  relative_config = Config();
  asm volatile("sttilecfg %0" : "=m"(relative_config));
  EXPECT(!std::memcmp(&relative_config, wanted, 64), "sttilecfg relative to RIP");
  release();
}

// ------------------------------------------------------------------------------------------------- what is interrupted

// Registers, flags, the rounding mode and the red zone are as before after the instructions, run often enough that any
// way of emulating them has come into use.
void test_nothing_else_changes() {
  Config config;
  config.tile(0, 16, 64).tile(1, 16, 64).tile(2, 16, 64);
  configure(config);
  const bool avx512 = __builtin_cpu_supports("avx512f");
  alignas(64) static uint8_t before[512], after[512], data[1024];
  for (int i = 0; i < 512; ++i) before[i] = uint8_t(i * 11 + 3);
  for (int round = 0; round < 20; ++round) {
    uint64_t general[8] = {}, red[3] = {}, flags = 0;
    uint32_t control = 0x1f80 | 0x6000, control_after = 0, usual = 0x1f80;  // towards zero
    if (avx512)
      asm volatile(
          "vmovdqu64 (%0), %%zmm0\n vmovdqu64 64(%0), %%zmm15\n vmovdqu64 128(%0), %%zmm31\n"
          "kmovw (%0), %%k1\n" ::"r"(before)
          : "memory");
    else
      asm volatile("vmovdqu (%0), %%ymm0\n vmovdqu 64(%0), %%ymm15\n" ::"r"(before) : "memory");
    asm volatile(
        "ldmxcsr %[control]\n"
        "movq $0x1111, -8(%%rsp)\n movq $0x2222, -64(%%rsp)\n movq $0x3333, -128(%%rsp)\n"
        "mov $0x11, %%rax\n mov $0x22, %%rcx\n mov $0x33, %%rdx\n mov $0x44, %%r8\n mov $0x55, %%r11\n"
        "mov $64, %%r9\n"
        "mov $0x7fffffff, %%r10d\n add $1, %%r10d\n stc\n"  // overflow and carry
        "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n"
        "tileloadd (%[data],%%r9,1), %%tmm1\n"
        "nop\n"
        "tilezero %%tmm2\n"
        "nop\n"
        "tilestored %%tmm1, (%[data],%%r9,1)\n"
        "mov %%rax, (%[general])\n mov %%rcx, 8(%[general])\n mov %%rdx, 16(%[general])\n"
        "mov %%r8, 24(%[general])\n mov %%r11, 32(%[general])\n mov %%r9, 40(%[general])\n"
        "mov %%r10, 48(%[general])\n"
        "mov -8(%%rsp), %%rax\n mov %%rax, (%[red])\n mov -64(%%rsp), %%rax\n mov %%rax, 8(%[red])\n"
        "mov -128(%%rsp), %%rax\n mov %%rax, 16(%[red])\n"
        "mov %%rsp, %%rax\n lea -256(%%rsp), %%rsp\n pushfq\n popq %%rcx\n mov %%rax, %%rsp\n"
        "mov %%rcx, (%[flags])\n"
        "stmxcsr (%[after])\n ldmxcsr %[usual]\n"
        :
        : [control] "m"(control), [usual] "m"(usual), [data] "r"(data), [general] "r"(general), [red] "r"(red),
          [flags] "r"(&flags), [after] "r"(&control_after)
        : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "memory", "cc");
    uint16_t mask = 0;
    if (avx512)
      asm volatile(
          "vmovdqu64 %%zmm0, (%0)\n vmovdqu64 %%zmm15, 64(%0)\n vmovdqu64 %%zmm31, 128(%0)\n kmovw %%k1, (%1)\n"
          "vzeroupper" ::"r"(after),
          "r"(&mask)
          : "memory");
    else
      asm volatile("vmovdqu %%ymm0, (%0)\n vmovdqu %%ymm15, 64(%0)\n vzeroupper" ::"r"(after) : "memory");
    const int width = avx512 ? 64 : 32;
    EXPECT(!std::memcmp(before, after, width) && !std::memcmp(before + 64, after + 64, width), "vector registers");
    if (avx512) EXPECT(!std::memcmp(before + 128, after + 128, 64) && !std::memcmp(&mask, before, 2), "AVX-512's");
    const uint64_t wanted[7] = {0x11, 0x22, 0x33, 0x44, 0x55, 64, 0x80000000};
    for (int i = 0; i < 7; ++i) EXPECT(general[i] == wanted[i], "general register %d: %#lx", i, long(general[i]));
    EXPECT(red[0] == 0x1111 && red[1] == 0x2222 && red[2] == 0x3333, "the red zone");
    EXPECT((flags & 0x8c5) == 0x885, "flags: %#lx", long(flags));  // overflow, sign, parity and carry, not zero
    EXPECT((control_after & 0xffc0) == (control & 0xffc0), "MXCSR: %#x", control_after);
  }
  release();
}

// ------------------------------------------------------------------------------------------------- threads

void test_threads() {
  std::vector<std::thread> threads;
  Config config;
  config.tile(0, 16, 64);
  configure(config);
  std::vector<uint8_t> mine(1024, 42), got(1024);
  load<0>(mine.data(), 64);
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([i] {
      Config none, seen;
      none.palette = 0;
      asm volatile("sttilecfg %0" : "=m"(seen));
      EXPECT(!std::memcmp(&seen, &none, 64), "a new thread has no tiles");
      test_products(100 + i, 15);
    });
  for (auto& thread : threads) thread.join();
  store<0>(got.data(), 64);
  EXPECT(got == mine, "other threads' tiles are their own");
  release();
}

// Instructions that no thread has run yet, run by all at once: whatever the emulator does to them, all go right.
template <int... Displacements>
void test_first_uses() {
  static uint8_t data[8192 + 1024];
  for (int i = 0; i < int(sizeof data); ++i) data[i] = uint8_t(i * 31 + i / 256);
  std::atomic<int> arrived{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&arrived] {
      Config config;
      config.tile(4, 16, 64);
      configure(config);
      ++arrived;
      while (arrived < 4) {
      }
      const auto once = [](int displacement, auto load_it) {
        uint8_t got[1024];
        load_it();
        store<4>(got, 64);
        EXPECT(!std::memcmp(got, data + displacement, 1024), "load at %d among threads", displacement);
      };
      (once(Displacements,
            [] {
              asm volatile("tileloadd %c2(%0,%1,1), %%tmm4" ::"r"(data), "r"(int64_t(64)), "i"(Displacements)
                           : "memory");
            }),
       ...);
      release();
    });
  for (auto& thread : threads) thread.join();
}

template <int... I>
void test_first_uses(std::integer_sequence<int, I...>) {
  test_first_uses<I * 61 ...>();
}

// ------------------------------------------------------------------------------------------------- wrong use

// Runs f in a child; returns its signal (0 where it went on to its end) and what it wrote to stderr.
int signal_of(const std::function<void()>& f, std::string* said) {
  int pipe_ends[2];
  if (pipe(pipe_ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    const rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    dup2(pipe_ends[1], 2);
    f();
    _exit(0);
  }
  close(pipe_ends[1]);
  char buffer[4096];
  said->clear();
  for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof buffer)) > 0;) said->append(buffer, size_t(n));
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

void expect_abort(const char* text, const std::function<void()>& f) {
  std::string said;
  const int number = signal_of(f, &said);
  const bool one_line = said.find('\n') == said.size() - 1;
  EXPECT(number == SIGABRT && said.rfind("AMX emulator: ", 0) == 0 && one_line && said.find(text) != std::string::npos,
         "wanted \"%s\", got signal %d and \"%s\"", text, number, said.c_str());
}

void use(const Config& c) {
  configure(c);
  multiply<0, 1, 2>();
}

void test_wrong_use() {
  alignas(64) static uint8_t data[1024];
  const auto full = [] {
    Config c;
    return c.tile(0, 16, 64).tile(1, 16, 64).tile(2, 16, 64);
  };
  expect_abort("tilezero tmm3: no tiles are configured", [] { zero<3>(); });
  expect_abort("tileloadd tmm0: no tiles are configured", [] { load<0>(data, 64); });
  expect_abort("tilestored tmm0: no tiles are configured", [] { store<0>(data, 64); });
  expect_abort("tdpbf16ps tmm0: no tiles are configured", [] { multiply<0, 1, 2>(); });
  expect_abort("no tiles are configured", [&] {
    configure(full());
    release();
    load<0>(data, 64);
  });
  expect_abort("tileloadd tmm5: this tile has no rows", [&] {
    configure(full());
    load<5>(data, 64);
  });
  expect_abort("tmm5: this tile has no rows", [&] {
    configure(full());
    multiply<0, 1, 5>();
  });
  expect_abort("tilestored tmm0 (2 rows of 6 bytes): rows are of a multiple of 4 bytes", [&] {
    configure(full().tile(0, 2, 6));
    store<0>(data, 64);
  });
  expect_abort("multiple of 4 bytes", [&] { use(full().tile(2, 16, 62)); });
  expect_abort(
      "tdpbf16ps tmm0 (15 rows of 64 bytes), tmm1 (16 rows of 64 bytes), tmm2 (16 rows of 64 bytes): the "
      "destination has the rows of the first source",
      [&] { use(full().tile(0, 15, 64)); });
  expect_abort("the destination has the columns of the second source", [&] { use(full().tile(2, 16, 60)); });
  expect_abort("the first source has a pair for each row of the second", [&] { use(full().tile(1, 16, 60)); });
  expect_abort("the three tiles differ", [&] {
    configure(full());
    multiply_encoded<0, 0, 2>();
  });
  expect_abort("the three tiles differ", [&] {
    configure(full());
    multiply_encoded<0, 1, 0>();
  });
  expect_abort("the three tiles differ", [&] {
    configure(full());
    multiply_encoded<0, 1, 1>();
  });
  expect_abort("ldtilecfg: palette 2", [&] {
    Config c = full();
    c.palette = 2;
    configure(c);
  });
  expect_abort("start_row 3", [&] {
    Config c = full();
    c.start_row = 3;
    configure(c);
  });
  expect_abort("reserved bytes", [&] {
    Config c = full();
    c.reserved[13] = 1;
    configure(c);
  });
  expect_abort("tile 4 (17 rows of 64 bytes)", [&] { configure(full().tile(4, 17, 64)); });
  expect_abort("tile 4 (16 rows of 68 bytes)", [&] { configure(full().tile(4, 16, 68)); });
  expect_abort("tile 4 (0 rows of 64 bytes)", [&] { configure(full().tile(4, 0, 64)); });
  expect_abort("tile 4 (8 rows of 0 bytes)", [&] { configure(full().tile(4, 8, 0)); });
  expect_abort("tile 8 (1 rows of 4 bytes), of tiles 0 to 7", [&] { configure(full().tile(8, 1, 4)); });
}

// What is not AMX goes to whoever handles it, or ends the process as it would have.
void test_other_signals() {
  std::string said;
  EXPECT(signal_of([] { asm volatile("ud2"); }, &said) != 0 || !said.empty(), "ud2 goes unnoticed");
  EXPECT(signal_of([] { raise(SIGILL); }, &said) != 0 || !said.empty(), "raise(SIGILL) goes unnoticed");
  // An AMX instruction with W1, which does not exist.
  EXPECT(signal_of([] { asm volatile(".byte 0xc4, 0xe2, 0xe2, 0x5c, 0xca"); }, &said) != 0 || !said.empty(), "W1");
}

// ------------------------------------------------------------------------------------------------- all

void test_counts() {
  if (native) return;
  long before[6];
  for (int i = 0; i < 6; ++i) before[i] = fastrnn_amx_count(i);
  Random random(3);
  check_product(random, 16, 16, 16, 0);
  const long wanted[6] = {1, 1, 0, 3, 1, 2};
  for (int i = 0; i < 6; ++i)
    EXPECT(fastrnn_amx_count(i) - before[i] == wanted[i], "kind %d was counted %ld times, not %ld", i,
           fastrnn_amx_count(i) - before[i], wanted[i]);
  EXPECT(fastrnn_amx_count(-1) == -1 && fastrnn_amx_count(1000) == -1, "kinds that are not");
}

template <class F>
double microseconds(F f) {
  const int times = 20000;
  for (int i = 0; i < 100; ++i) f();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < times; ++i) f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() * 1e6 / times;
}

void time_instructions() {
  Config config;
  config.tile(0, 16, 64).tile(1, 16, 64).tile(2, 16, 64);
  alignas(64) static uint8_t data[1024];
  configure(config);
  std::printf("%s\n", native ? "the machine's own" : "emulated");
  std::printf("tilezero   %.3f us\n", microseconds(zero<0>));
  std::printf("tileloadd  %.3f us\n", microseconds([] { load<0>(data, 64); }));
  std::printf("tilestored %.3f us\n", microseconds([] { store<0>(data, 64); }));
  std::printf("tdpbf16ps  %.3f us\n", microseconds([] { multiply<0, 1, 2>(); }));
  std::printf(
      "two loads and a tdpbf16ps in a row %.3f us\n", microseconds([] {
        asm volatile(
            "tileloadd (%0,%1,1), %%tmm1\n tileloadd (%0,%1,1), %%tmm2\n tdpbf16ps %%tmm2, %%tmm1, %%tmm0" ::"r"(data),
            "r"(int64_t(64))
            : "memory");
      }));
  release();
}

}  // namespace

int main(int count, char** arguments) {
  native = fastrnn_amx_count(0) < 0;
  if (count > 1 && std::string(arguments[1]) == "time") {
    time_instructions();
    return 0;
  }
  EXPECT(&fastrnn_emulates_amx != nullptr && fastrnn_emulates_amx == 1, "the library is told");
  test_configuration();
  test_loads_and_stores();
  test_addresses();
  test_order();
  test_products(1, 60);
  test_nothing_else_changes();
  test_threads();
  test_first_uses(std::make_integer_sequence<int, 100>());
  test_counts();
  if (!native) test_wrong_use();
  test_other_signals();
  if (failures != 0) return 1;
  std::printf("%sok\n", native ? "on the machine's own AMX: " : "");
  return 0;
}
