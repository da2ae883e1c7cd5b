// Intel's AMX tile instructions in software, so that kernels built for AMX are tested on x86-64 Linux machines without
// it. There the instructions raise SIGILL; the handler here decodes the one at fault, does its work and steps over it.
//
//   g++ -std=c++17 -O2 -shared -fPIC -DFASTRNN_PRELOAD amx_emulator.cpp -o libamx.so -ldl    for LD_PRELOAD
//   g++ -std=c++17 -O2 -c amx_emulator.cpp                                      to link into a driver, sanitized or not
//
// A program that uses tiles wrongly, where a processor would raise an exception, is told so on stderr and aborted.
// Where the machine has AMX its instructions run as ever, and nothing is counted.
//
// A signal costs many times what the work does, so an instruction that has raised one is overwritten by a jump to code
// that does the same without (FASTRNN_AMX_REWRITE=0: never, as where memory cannot be made writable and executable).
//
// FASTRNN_AMX_MULTIPLY=avx512, avx2 or plain picks the code that multiplies; all give the same bits.
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <immintrin.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of gcc 12's own avx512fintrin.h

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

// The library under test refers to this weakly and takes AMX for present where it is bound.
FASTRNN_EXPORT int fastrnn_emulates_amx;
int fastrnn_emulates_amx = 1;

namespace {

enum Kind { kConfig, kRelease, kZero, kLoad, kStore, kMultiply, kStoreConfig, kKinds };
const char* const kNames[kKinds] = {"ldtilecfg",  "tilerelease", "tilezero", "tileloadd",
                                    "tilestored", "tdpbf16ps",   "sttilecfg"};

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;  // palette 1

std::atomic<long> counts[kKinds];
bool native = false;  // the machine has AMX and this process may use it

// ------------------------------------------------------------------------------------------------- a thread's tiles

// Laid out as ldtilecfg and sttilecfg have it in memory.
struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "");

// What lies beyond a tile's configured rows and columns is zero at all times.
struct Tiles {
  alignas(64) uint8_t data[kTiles][kMaxRows][kMaxBytes];
  Config config;  // all zero: not configured
};

// Initial-exec: a handler must not allocate, as the first use of another model may.
thread_local Tiles tiles __attribute__((tls_model("initial-exec")));

// ------------------------------------------------------------------------------------------------- a wrong program

__attribute__((noreturn, format(printf, 1, 2))) void fail(const char* format, ...) {
  char line[512] = "AMX emulator: ";
  const size_t start = strlen(line);
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line + start, sizeof(line) - start - 1, format, arguments);
  va_end(arguments);
  length = length < 0 ? 0 : length > int(sizeof(line) - start - 2) ? int(sizeof(line) - start - 2) : length;
  line[start + length] = '\n';
  if (write(2, line, start + length + 1) < 0) abort();
  abort();
}

void check_tile(Kind kind, int tile) {
  const Config& c = tiles.config;
  if (c.palette == 0) fail("%s tmm%d: no tiles are configured (ldtilecfg)", kNames[kind], tile);
  if (c.rows[tile] == 0) fail("%s tmm%d: this tile has no rows in the configuration", kNames[kind], tile);
  if (c.colsb[tile] % 4 != 0)
    fail("%s tmm%d (%d rows of %d bytes): rows are of a multiple of 4 bytes", kNames[kind], tile, c.rows[tile],
         c.colsb[tile]);
}

// ------------------------------------------------------------------------------------------------- the arithmetic

// As Intel's manual has tdpbf16ps: for each element of the destination, the even and the odd products of bfloat16 pairs
// are summed apart, in order of k, by float32 fused multiply-adds from zero; then the two sums are added, and their sum
// to the destination. Every step rounds to nearest even, takes denormals for zero and flushes them to zero (MXCSR is
// set so around it). a is [rows][pairs], b [pairs][columns]; rows are 16 words wide in all three.
// Not instrumented by sanitizers, which see only the tiles' own memory here: they would make it slow.
typedef uint32_t __attribute__((may_alias)) Word;
typedef float __attribute__((may_alias)) Float;
using Words = const Word (*)[16];
using Floats = Float (*)[16];
#define FASTRNN_ARITHMETIC __attribute__((noinline, no_sanitize_address, no_sanitize_thread, no_sanitize_undefined))

constexpr uint32_t kOdd = 0xffff0000;

FASTRNN_ARITHMETIC __attribute__((target("avx512f"))) void multiply_avx512(Floats c, Words a, Words b, int rows,
                                                                           int pairs, int columns) {
  const __mmask16 present = __mmask16((1u << columns) - 1);
  const __m512i odd = _mm512_set1_epi32(int(kOdd));
  for (int m = 0; m < rows; m += 4) {  // four rows at once: enough sums to hide the latency
    __m512 sums[4][2] = {};
    for (int k = 0; k < pairs; ++k) {
      const __m512i y = _mm512_load_si512(b[k]);
      const __m512 y_even = _mm512_castsi512_ps(_mm512_slli_epi32(y, 16));
      const __m512 y_odd = _mm512_castsi512_ps(_mm512_and_si512(y, odd));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i x = _mm512_set1_epi32(int(a[m + i][k]));
        sums[i][0] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), y_even, sums[i][0]);
        sums[i][1] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, odd)), y_odd, sums[i][1]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(c[m + i]), _mm512_add_ps(sums[i][0], sums[i][1]));
      // Beyond the tile there is infinity times zero: not stored.
      if (m + i < rows) _mm512_mask_store_ps(c[m + i], present, sum);
    }
  }
}

FASTRNN_ARITHMETIC __attribute__((target("avx2,fma"))) void multiply_avx2(Floats c, Words a, Words b, int rows,
                                                                          int pairs, int columns) {
  const __m256i odd = _mm256_set1_epi32(int(kOdd));
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int n = 0; n < columns; n += 8) {
    const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(columns - n), lanes);
    for (int m = 0; m < rows; m += 4) {
      __m256 sums[4][2] = {};
      for (int k = 0; k < pairs; ++k) {
        const __m256i y = _mm256_load_si256(reinterpret_cast<const __m256i*>(b[k] + n));
        const __m256 y_even = _mm256_castsi256_ps(_mm256_slli_epi32(y, 16));
        const __m256 y_odd = _mm256_castsi256_ps(_mm256_and_si256(y, odd));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i x = _mm256_set1_epi32(int(a[m + i][k]));
          sums[i][0] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), y_even, sums[i][0]);
          sums[i][1] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, odd)), y_odd, sums[i][1]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 sum = _mm256_add_ps(_mm256_load_ps(c[m + i] + n), _mm256_add_ps(sums[i][0], sums[i][1]));
        if (m + i < rows) _mm256_maskstore_ps(c[m + i] + n, present, sum);
      }
    }
  }
}

// x * y + z rounded once. The product of two bfloat16 is exact in double; the sum is rounded to odd there (its last bit
// set where something was lost), which makes the rounding to float the only one.
inline float fused_multiply_add(float x, float y, float z) {
  const double product = double(x) * double(y), addend = z;
  double sum = product + addend;
  const double back = sum - product;
  const double lost = (product - (sum - back)) + (addend - back);
  if (lost < 0 || lost > 0) {  // not where the sum is not finite: lost is NaN
    int64_t bits;
    memcpy(&bits, &sum, 8);
    if (bits % 2 == 0) bits += (lost > 0) == (sum > 0) ? 1 : -1;
    memcpy(&sum, &bits, 8);
  }
  return float(sum);
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

FASTRNN_ARITHMETIC void multiply_plain(Floats c, Words a, Words b, int rows, int pairs, int columns) {
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < pairs; ++k) {
        even = fused_multiply_add(float_of(a[m][k] << 16), float_of(b[k][n] << 16), even);
        odd = fused_multiply_add(float_of(a[m][k] & kOdd), float_of(b[k][n] & kOdd), odd);
      }
      c[m][n] += even + odd;
    }
}

using Multiply = void (*)(Floats, Words, Words, int, int, int);
Multiply multiply_tiles = multiply_plain;

Multiply choose_multiply() {
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const char* wanted = getenv("FASTRNN_AMX_MULTIPLY");
  if (wanted && !strcmp(wanted, "plain")) return multiply_plain;
  if (wanted && !strcmp(wanted, "avx2") && avx2) return multiply_avx2;
  return avx512 ? multiply_avx512 : avx2 ? multiply_avx2 : multiply_plain;
}

// ------------------------------------------------------------------------------------------------- the instructions

// Registers are by their number in an instruction: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
struct Instruction {
  Kind kind;
  int length;
  int reg, rm, vvvv;   // tiles
  int base, index;     // registers of a memory operand; -1: none
  int scale;           // the index is shifted left by it
  uint64_t offset;     // added to the base: the displacement, or the whole address where that is relative to RIP
  bool thread_offset;  // to the thread's base (a thread_local variable)
};

// Code is read and written by threads at once, in an order of their own (see rewrite).
#define FASTRNN_CODE __attribute__((no_sanitize_thread, no_sanitize_address, no_sanitize_undefined))

FASTRNN_CODE int32_t load_int32(const uint8_t* p) {
  return int32_t(p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24);
}

// Whether an instruction emulated here lies at code. Reads no further than it reaches: a page may end behind.
FASTRNN_CODE bool decode(const uint8_t* code, Instruction* out) {
  const uint8_t* p = code;
  Instruction i = {};
  i.base = i.index = -1;
  for (; p < code + 4; ++p) {  // segment prefixes: fs, and those that mean nothing, used to pad code
    if (*p == 0x64)
      i.thread_offset = true;
    else if (*p != 0x26 && *p != 0x2e && *p != 0x36 && *p != 0x3e)
      break;
  }
  if (*p != 0xc4) return false;                                          // VEX of three bytes
  const int r = !(p[1] & 0x80), x = !(p[1] & 0x40), b = !(p[1] & 0x20);  // these are stored inverted
  if ((p[1] & 0x1f) != 2 || (p[2] & 0x84) != 0) return false;            // map 0F38, W0, 128 bits
  i.vvvv = ~(p[2] >> 3) & 15;
  enum { kNone, k66, kF3, kF2 };
  const int prefix = p[2] & 3, opcode = p[3], modrm = p[4];
  const int mod = modrm >> 6, rm = modrm & 7;
  i.reg = (modrm >> 3 & 7) | r << 3;
  i.rm = rm | b << 3;
  if (opcode == 0x5c && prefix == kF3 && mod == 3) {
    if (i.reg > 7 || i.rm > 7 || i.vvvv > 7) return false;
    i.kind = kMultiply;
  } else if (i.vvvv != 0) {
    return false;
  } else if (opcode == 0x49 && mod == 3) {
    if (prefix == kNone && modrm == 0xc0)
      i.kind = kRelease;
    else if (prefix == kF2 && rm == 0 && i.reg < 8)
      i.kind = kZero;
    else
      return false;
  } else if (opcode == 0x49 && i.reg == 0 && (prefix == kNone || prefix == k66)) {
    i.kind = prefix == kNone ? kConfig : kStoreConfig;
  } else if (opcode == 0x4b && mod != 3 && rm == 4 && prefix != kNone && i.reg < 8) {
    i.kind = prefix == kF3 ? kStore : kLoad;  // F2 is tileloadd, 66 tileloaddt1
  } else {
    return false;
  }
  p += 5;
  if (mod != 3) {
    bool relative = false, wide = mod == 2;
    if (rm == 4) {  // a SIB byte
      const int sib = *p++, index = (sib >> 3 & 7) | x << 3;
      i.scale = sib >> 6;
      if (index != 4) i.index = index;
      if (mod == 0 && (sib & 7) == 5)
        wide = true;
      else
        i.base = (sib & 7) | b << 3;
    } else if (mod == 0 && rm == 5) {
      wide = relative = true;
    } else {
      i.base = i.rm;
    }
    if (wide) {
      i.offset = uint64_t(int64_t(load_int32(p)));
      p += 4;
    } else if (mod == 1) {
      i.offset = uint64_t(int64_t(int8_t(*p++)));
    }
    if (relative) i.offset += uint64_t(p);
  }
  i.length = int(p - code);
  *out = i;
  return true;
}

void check_config(const Config& c) {
  if (c.palette > 1) fail("ldtilecfg: palette %d, of 0 and 1", c.palette);
  if (c.start_row != 0)
    fail("ldtilecfg: start_row %d is for interrupted instructions; it is not emulated", c.start_row);
  for (uint8_t byte : c.reserved)
    if (byte != 0) fail("ldtilecfg: reserved bytes 2 to 15 are zero");
  for (int t = 0; t < 16; ++t) {
    const int rows = c.rows[t], bytes = c.colsb[t];
    if (t >= kTiles && (rows != 0 || bytes != 0))
      fail("ldtilecfg: tile %d (%d rows of %d bytes), of tiles 0 to 7", t, rows, bytes);
    if (rows > kMaxRows || bytes > kMaxBytes)
      fail("ldtilecfg: tile %d (%d rows of %d bytes): there are at most 16 rows of 64 bytes", t, rows, bytes);
    if ((rows == 0) != (bytes == 0))
      fail("ldtilecfg: tile %d (%d rows of %d bytes): both are zero or neither", t, rows, bytes);
  }
}

void configure(const void* address) {
  Config config;
  memcpy(&config, address, sizeof config);
  if (config.palette == 0) {  // as tilerelease
    memset(&tiles, 0, sizeof tiles);
    return;
  }
  check_config(config);
  memset(&tiles, 0, sizeof tiles);
  tiles.config = config;
}

void load(int tile, const char* address, int64_t stride) {
  const int rows = tiles.config.rows[tile];
  const size_t bytes = tiles.config.colsb[tile];
  for (int row = 0; row < rows; ++row) memcpy(tiles.data[tile][row], address + row * stride, bytes);
}

void store(int tile, char* address, int64_t stride) {
  const int rows = tiles.config.rows[tile];
  const size_t bytes = tiles.config.colsb[tile];
  for (int row = 0; row < rows; ++row) memcpy(address + row * stride, tiles.data[tile][row], bytes);
}

void multiply(int c, int a, int b) {
  for (int tile : {c, a, b}) check_tile(kMultiply, tile);
  const uint8_t* const rows = tiles.config.rows;
  const uint16_t* const bytes = tiles.config.colsb;
  const char* broken = c == a || c == b || a == b     ? "the three tiles differ"
                       : rows[c] != rows[a]           ? "the destination has the rows of the first source"
                       : bytes[c] != bytes[b]         ? "the destination has the columns of the second source"
                       : int(bytes[a]) / 4 != rows[b] ? "the first source has a pair for each row of the second"
                                                      : nullptr;
  if (broken)
    fail("tdpbf16ps tmm%d (%d rows of %d bytes), tmm%d (%d rows of %d bytes), tmm%d (%d rows of %d bytes): %s", c,
         rows[c], bytes[c], a, rows[a], bytes[a], b, rows[b], bytes[b], broken);
  const unsigned control = _mm_getcsr();
  // Exceptions masked, rounding to nearest even, denormals taken for zero and flushed to zero.
  _mm_setcsr(_MM_MASK_MASK | _MM_ROUND_NEAREST | _MM_FLUSH_ZERO_ON | 0x0040);
  multiply_tiles(reinterpret_cast<Floats>(tiles.data[c]), reinterpret_cast<Words>(tiles.data[a]),
                 reinterpret_cast<Words>(tiles.data[b]), rows[c], rows[b], bytes[c] / 4);
  _mm_setcsr(control);
}

void execute(const Instruction& i, const uint64_t* registers) {
  uint64_t address = i.offset + (i.base < 0 ? 0 : registers[i.base]);
  const uint64_t index = i.index < 0 ? 0 : registers[i.index] << i.scale;
  if (i.thread_offset) {
    uint64_t thread;  // fs points at itself
    asm("mov %%fs:0, %0" : "=r"(thread));
    address += thread;
  }
  counts[i.kind].fetch_add(1, std::memory_order_relaxed);
  switch (i.kind) {
    case kConfig:
      return configure(reinterpret_cast<const void*>(address + index));
    case kStoreConfig:
      memcpy(reinterpret_cast<void*>(address + index), &tiles.config, sizeof(Config));
      return;
    case kRelease:
      memset(&tiles, 0, sizeof tiles);
      return;
    case kZero:
      check_tile(kZero, i.reg);
      memset(tiles.data[i.reg], 0, sizeof tiles.data[i.reg]);
      return;
    case kLoad:
      check_tile(kLoad, i.reg);
      return load(i.reg, reinterpret_cast<const char*>(address), int64_t(index));
    case kStore:
      check_tile(kStore, i.reg);
      return store(i.reg, reinterpret_cast<char*>(address), int64_t(index));
    case kMultiply:
      return multiply(i.reg, i.rm, i.vvvv);
    case kKinds:
      break;
  }
}

// ------------------------------------------------------------------------------------------------- rewritten code

// An instruction that was rewritten, and the code its place now jumps to. Every tile instruction has at least the five
// bytes of a jump.
struct Site {
  const uint8_t* at;  // first: the entry below reads it
  Instruction instruction;
  uint8_t code[64];
};

}  // namespace

extern "C" {
__attribute__((visibility("hidden"))) void fastrnn_amx_entry();
__attribute__((visibility("hidden"))) uint64_t fastrnn_amx_state_bytes = 0;

__attribute__((visibility("hidden"), used)) void fastrnn_amx_execute(const Site* site, const uint64_t* registers) {
  const int error = errno;
  execute(site->instruction, registers);
  errno = error;
}
}

// Called by a site's code with the site in rdi, below the interrupted code's red zone and its rax and rdi. Saves all
// else that C++ may change: the flags, the general registers, which it lays out by their numbers, and the vector state
// (0xe6: SSE, AVX, AVX-512). The frame it makes has a debugger or sanitizer see the instruction as the caller.
asm(R"(
.pushsection .text
.p2align 4
.type fastrnn_amx_entry, @function
fastrnn_amx_entry:
  pushfq
  cld
  push %r15
  push %r14
  push %r13
  push %r12
  push %r11
  push %r10
  push %r9
  push %r8
  push 80(%rsp)         # rdi: above eight registers, the flags and the return address
  push %rsi
  push %rbp
  lea 248(%rsp), %rax   # rsp as it was: above eleven registers, flags, return address, rdi, rax and the red zone
  push %rax
  push %rbx
  push %rdx
  push %rcx
  push 144(%rsp)        # rax: above fifteen registers, the flags, the return address and rdi
  mov %rsp, %rsi
  push (%rdi)
  push 40(%rsi)         # rbp
  mov %rsp, %rbp
  sub fastrnn_amx_state_bytes(%rip), %rsp
  and $-64, %rsp
  xor %eax, %eax        # the header of the saved state starts as zeros
  mov %rax, 512(%rsp)
  mov %rax, 520(%rsp)
  mov %rax, 528(%rsp)
  mov %rax, 536(%rsp)
  mov %rax, 544(%rsp)
  mov %rax, 552(%rsp)
  mov %rax, 560(%rsp)
  mov %rax, 568(%rsp)
  mov $0xe6, %eax
  xor %edx, %edx
  xsave64 (%rsp)
  call fastrnn_amx_execute
  mov $0xe6, %eax
  xor %edx, %edx
  xrstor64 (%rsp)
  lea 24(%rbp), %rsp
  pop %rcx
  pop %rdx
  pop %rbx
  lea 8(%rsp), %rsp
  pop %rbp
  pop %rsi
  lea 8(%rsp), %rsp
  pop %r8
  pop %r9
  pop %r10
  pop %r11
  pop %r12
  pop %r13
  pop %r14
  pop %r15
  popfq
  ret
.size fastrnn_amx_entry, . - fastrnn_amx_entry
.popsection
)");

namespace {

// Odd while code is being rewritten: what was read meanwhile is read again.
std::atomic<unsigned> generation{0};
bool may_rewrite = false;

bool try_lock() {
  unsigned g = generation.load(std::memory_order_relaxed);
  return g % 2 == 0 && generation.compare_exchange_strong(g, g + 1);
}

void lock() {
  while (!try_lock()) sched_yield();
}

void unlock() { generation.fetch_add(1); }

// All threads of the process have executed a serializing instruction since, so none has stale code at hand.
bool synchronize() { return syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) == 0; }

// Room for a site that code at this address can jump to; under the lock.
Site* allocate_site(const uint8_t* at) {
  constexpr size_t kBytes = 1 << 16;
  constexpr int64_t kReach = int64_t(1) << 30;
  struct Area {
    Site* next;
    Site* end;
  };
  static Area areas[256];
  static int used = 0;
  const auto near = [at](const Site* site) {
    return std::llabs(int64_t(uint64_t(site)) - int64_t(uint64_t(at))) < kReach;
  };
  for (int i = 0; i < used; ++i)
    if (areas[i].next != areas[i].end && near(areas[i].next)) return areas[i].next++;
  if (used == 256) return nullptr;
  for (int64_t distance = 1 << 20; distance < kReach - (1 << 20); distance += 1 << 20)
    for (int64_t offset : {-distance, distance}) {
      const uint64_t wanted = (uint64_t(at) + uint64_t(offset)) & ~uint64_t(0xfff);
      void* const area = mmap(reinterpret_cast<void*>(wanted), kBytes, PROT_READ | PROT_WRITE | PROT_EXEC,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
      if (area == MAP_FAILED) {
        if (errno != EEXIST && errno != ENOMEM && errno != EPERM && errno != EINVAL) return nullptr;
        continue;
      }
      Site* const first = static_cast<Site*>(area);
      if (!near(first)) {  // a kernel that does not know MAP_FIXED_NOREPLACE puts it anywhere
        munmap(area, kBytes);
        return nullptr;
      }
      areas[used++] = {first + 1, first + kBytes / sizeof(Site)};
      return first;
    }
  return nullptr;
}

FASTRNN_CODE void write_code(Site* site, const uint8_t* behind) {
  uint8_t* p = site->code;
  const auto bytes = [&p](std::initializer_list<int> list) {
    for (int byte : list) *p++ = uint8_t(byte);
  };
  const auto number = [&p](uint64_t x, int size) {
    for (int i = 0; i < size; ++i) *p++ = uint8_t(x >> 8 * i);
  };
  bytes({0x48, 0x8d, 0x64, 0x24, 0x80});  // lea -128(%rsp), %rsp: below the red zone; flags stay
  bytes({0x50, 0x57});                    // push %rax; push %rdi
  bytes({0x48, 0xbf});                    // mov site, %rdi
  number(uint64_t(site), 8);
  bytes({0x48, 0xb8});  // mov fastrnn_amx_entry, %rax
  number(uint64_t(&fastrnn_amx_entry), 8);
  bytes({0xff, 0xd0, 0x5f, 0x58});                          // call *%rax; pop %rdi; pop %rax
  bytes({0x48, 0x8d, 0xa4, 0x24, 0x80, 0x00, 0x00, 0x00});  // lea 128(%rsp), %rsp
  bytes({0xe9});                                            // jmp behind
  number(uint64_t(behind) - uint64_t(p + 4), 4);
}

// Has the instruction jump to code of its own from now on. Other threads may be running it: its first byte becomes one
// that raises SIGILL (0x06, no instruction in 64-bit mode) while the others change, and handlers wait for the lock.
FASTRNN_CODE void rewrite(const uint8_t* at, const Instruction& instruction) {
  if (!may_rewrite || !try_lock()) return;
  volatile uint8_t* const code = const_cast<uint8_t*>(at);
  const uint64_t page = uint64_t(sysconf(_SC_PAGESIZE)), first = uint64_t(at) & ~(page - 1);
  Instruction still;
  if (!decode(at, &still)) return unlock();  // another thread was first
  Site* const site = allocate_site(at);
  if (site != nullptr && synchronize() &&
      mprotect(reinterpret_cast<void*>(first), uint64_t(at) + 5 - first, PROT_READ | PROT_WRITE | PROT_EXEC) == 0) {
    site->at = at;
    site->instruction = instruction;
    write_code(site, at + instruction.length);
    const uint64_t distance = uint64_t(site->code) - uint64_t(at + 5);
    code[0] = 0x06;
    synchronize();
    for (int i = 0; i < 4; ++i) code[1 + i] = uint8_t(distance >> 8 * i);
    synchronize();
    code[0] = 0xe9;
  } else {
    may_rewrite = false;  // it would fail each time
  }
  unlock();
}

enum Found { kNothing, kInstruction, kJump };

// What lies at code once nobody is rewriting any.
FASTRNN_CODE Found find(const uint8_t* code, Instruction* out) {
  for (;;) {
    const unsigned before = generation.load();
    const Found found = decode(code, out) ? kInstruction : *code == 0xe9 ? kJump : kNothing;
    std::atomic_thread_fence(std::memory_order_acquire);
    if (before % 2 == 0 && generation.load() == before) return found;
    sched_yield();
  }
}

void prepare_to_rewrite() {
  const char* wanted = getenv("FASTRNN_AMX_REWRITE");
  unsigned a, b, c, d;
  if ((wanted && !strcmp(wanted, "0")) || !__get_cpuid_count(0xd, 0, &a, &b, &c, &d)) return;
  fastrnn_amx_state_bytes = b;  // of all the state that the system has enabled
  if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) != 0) return;
  may_rewrite = pthread_atfork(lock, unlock, unlock) == 0;  // a child must not find code half rewritten
}

// ------------------------------------------------------------------------------------------------- the signal

// Who else handles SIGILL: what was there before, or, preloaded, what the program asked for since.
// Written by whoever calls sigaction(), read in the handler: as unordered as calls of sigaction() themselves.
struct sigaction chained = {};

// The kernel's own form. Its call is made directly: sanitizers have a sigaction() of their own, which may delay a
// handler or replace it, and other libraries' calls are diverted here.
struct KernelAction {
  void* handler;
  unsigned long flags;
  void (*restorer)();
  uint64_t mask;
};
constexpr unsigned long kRestorer = 0x04000000;  // SA_RESTORER

// Where a handler returns to. These very bytes are how unwinders know a signal's frame.
asm(".pushsection .text\n"
    ".type fastrnn_amx_restorer, @function\n"
    "fastrnn_amx_restorer:\n"
    "  movq $15, %rax\n"
    "  syscall\n"
    ".size fastrnn_amx_restorer, . - fastrnn_amx_restorer\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) void fastrnn_amx_restorer();

long set_action(const KernelAction* action, KernelAction* old) {
  return syscall(SYS_rt_sigaction, SIGILL, action, old, sizeof(uint64_t));
}

// Not for us: what would have been done without us.
void pass_on(int number, siginfo_t* info, void* context) {
  const struct sigaction action = chained;
  const bool sent = info->si_code <= 0;  // by kill() or raise(), not by an instruction
  if (action.sa_handler == SIG_IGN && sent) return;
  if (action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN) {
    // An instruction is run again upon return, and ends the process; a signal that was sent is sent again.
    KernelAction fallback = {};
    fallback.flags = kRestorer;
    fallback.restorer = fastrnn_amx_restorer;
    set_action(&fallback, nullptr);
    if (sent) syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number);
    return;
  }
  if (action.sa_flags & SA_RESETHAND) chained.sa_handler = SIG_DFL;
  sigset_t mask = action.sa_mask;
  if (!(action.sa_flags & SA_NODEFER)) sigaddset(&mask, number);
  pthread_sigmask(SIG_BLOCK, &mask, nullptr);  // the return from the signal restores it
  if (action.sa_flags & SA_SIGINFO)
    action.sa_sigaction(number, info, context);
  else
    action.sa_handler(number);
}

void handle(int number, siginfo_t* info, void* context) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  if (info->si_code > 0) {
    auto& state = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    auto at = reinterpret_cast<const uint8_t*>(state[REG_RIP]);
    Instruction instruction;
    const Found found = find(at, &instruction);
    if (found == kJump) return;  // rewritten meanwhile by another thread: run it again
    if (found == kInstruction) {
      const int error = errno;
      uint64_t registers[16];
      for (int i = 0; i < 16; ++i) registers[i] = uint64_t(state[order[i]]);
      rewrite(at, instruction);
      do {  // a signal costs far more than an instruction: all that follow at once are done
        execute(instruction, registers);
        at += instruction.length;
      } while (find(at, &instruction) == kInstruction);
      state[REG_RIP] = reinterpret_cast<greg_t>(at);
      errno = error;
      return;
    }
  }
  pass_on(number, info, context);
}

// Whether the machine has AMX for bfloat16 and Linux lets this process use it (it has to be asked).
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & bf16) && (d & tile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

__attribute__((constructor)) void install() {
  static bool installed = false;
  if (installed) return;
  installed = true;
  native = has_amx();
  if (native) return;
  multiply_tiles = choose_multiply();
  prepare_to_rewrite();
  KernelAction action = {}, old = {};
  action.handler = reinterpret_cast<void*>(&handle);
  action.flags = SA_SIGINFO | SA_NODEFER | kRestorer;  // no deferring: a handler behind this one may raise it again
  action.restorer = fastrnn_amx_restorer;
  if (set_action(nullptr, &old) != 0) fail("rt_sigaction: %s", strerror(errno));
  chained.sa_handler = reinterpret_cast<__sighandler_t>(old.handler);
  chained.sa_flags = int(old.flags & ~kRestorer);
  sigemptyset(&chained.sa_mask);
  memcpy(&chained.sa_mask, &old.mask, sizeof old.mask);
  if (set_action(&action, nullptr) != 0) fail("rt_sigaction: %s", strerror(errno));
}

}  // namespace

// How many instructions of a kind were emulated, in all threads; kinds in the order of Kind. -1: the machine runs them.
FASTRNN_EXPORT long fastrnn_amx_count(int kind) {
  if (native || kind < 0 || kind >= kKinds) return -1;
  return counts[kind].load(std::memory_order_relaxed);
}

#ifdef FASTRNN_PRELOAD
// Handlers that come later (Python's faulthandler has one) must not replace ours: they are put behind it.

namespace {

struct sigaction exchange(const struct sigaction* action) {
  const struct sigaction old = chained;
  if (action) chained = *action;
  return old;
}

template <class F>
F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

FASTRNN_EXPORT int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  static const auto real = next<int(int, const struct sigaction*, struct sigaction*)>("sigaction");
  install();
  if (number != SIGILL || native) return real(number, action, old);
  const struct sigaction before = exchange(action);
  if (old) *old = before;
  return 0;
}

FASTRNN_EXPORT __sighandler_t signal(int number, __sighandler_t handler) noexcept {
  static const auto real = next<__sighandler_t(int, __sighandler_t)>("signal");
  install();
  if (number != SIGILL || native) return real(number, handler);
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  return exchange(&action).sa_handler;
}
#endif
