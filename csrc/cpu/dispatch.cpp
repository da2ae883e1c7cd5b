// Chooses the kernel table: what the machine can run (CPUID), what FASTRNN_ISA asks for, what force() demands.
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "../cells.h"

#if defined(FASTRNN_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Bound where a test has brought an emulator of AMX's instructions, which CPUID knows nothing of.
extern "C" __attribute__((weak)) int fastrnn_emulates_amx;
#endif

// The library hides its symbols; these are the ones that the Python module links against.
#define FASTRNN_EXPORT __attribute__((visibility("default")))

namespace fastrnn {
namespace {

#ifdef FASTRNN_X86
#ifdef __linux__
constexpr long tile_data = 18;  // the state that tiles are, among those that the kernel saves for a process

// Whether the machine has tiles and bfloat16 products of them, and Linux knows of them.
bool has_amx() {
  if (&fastrnn_emulates_amx) return true;
  unsigned a, b, c, d;
  constexpr unsigned tile = 1u << 24, bf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile) == 0 || (d & bf16) == 0) return false;
  constexpr long which_are_supported = 0x1021;
  uint64_t states = 0;
  return syscall(SYS_arch_prctl, which_are_supported, &states) == 0 && (states >> tile_data & 1);
}

// Asks for the room to save tiles in, which a process is given on request: only where they are to be used, because it
// makes every signal's frame larger from then on.
bool permit_amx() {
  constexpr long request_permission = 0x1023;
  return &fastrnn_emulates_amx || syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
bool has_amx() { return false; }
bool permit_amx() { return false; }
#endif

bool may_run(const Kernels* table) { return table != &amx::table || permit_amx(); }
#else
bool may_run(const Kernels*) { return true; }
#endif

bool runs_here(const char* isa) {
#ifdef FASTRNN_X86
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!std::strcmp(isa, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(isa, "avx512")) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(isa, "avx512_bf16")) return bf16;
  static const bool amx = bf16 && has_amx();
  if (!std::strcmp(isa, "amx")) return amx;
#endif
  return !std::strcmp(isa, "scalar");
}

const Kernels* find(const char* isa) {
  const Kernels* tables[8];
  for (int i = 0, n = available(tables); i < n; ++i)
    if (!std::strcmp(tables[i]->isa, isa)) return tables[i];
  return nullptr;
}

// The environment is read once, at first use.
struct Default {
  const Kernels* table = nullptr;
  std::string rejected;

  Default() {
    const char* wanted = std::getenv("FASTRNN_ISA");
    if (wanted && *wanted) {
      table = find(wanted);
      if (table && !may_run(table)) table = nullptr;
      if (!table) rejected = wanted;
    }
    if (!table) {
      const Kernels* tables[8];
      int widest = available(tables) - 1;
      while (!tables[widest]->by_default) --widest;
      table = tables[widest];
    }
  }
};

const Default& standard() {
  static const Default value;
  return value;
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

FASTRNN_EXPORT int available(const Kernels** out) {
  const Kernels* const compiled[] = {
      &scalar::table,
#ifdef FASTRNN_X86
      &avx2::table,   &avx512::table, &avx512::table_bf16, &amx::table,
#endif
  };
  int n = 0;
  for (const Kernels* table : compiled)
    if (runs_here(table->isa)) out[n++] = table;
  return n;
}

FASTRNN_EXPORT const Kernels& current() {
  const Kernels* table = forced.load(std::memory_order_acquire);
  return table ? *table : *standard().table;
}

FASTRNN_EXPORT Split plan_split(const Layer& layer, int threads) {
  return choose_split(layer, false, traits(layer.cell), threads, current().units(layer));
}

FASTRNN_EXPORT Wavefront plan_wavefront(const Layer& first, const Layer& upper, int count, bool backward, int threads) {
  return choose_wavefront(first, upper, count, backward, traits(first.cell), threads, current().units(first));
}

FASTRNN_EXPORT Precision allowed_precision(const char* asked) {
  const auto one_of = [isa = current().isa](std::initializer_list<const char*> tiers) {
    return std::any_of(tiers.begin(), tiers.end(), [isa](const char* tier) { return !std::strcmp(isa, tier); });
  };
  if (!std::strcmp(asked, "bf16") && one_of({"avx512_bf16", "amx"})) return Precision::bf16;
  if (!std::strcmp(asked, "tf32") && one_of({"amx"})) return Precision::tf32;
  return Precision::exact;
}

FASTRNN_EXPORT bool force(const char* isa) {
  const Kernels* table = *isa ? find(isa) : nullptr;
  if (*isa && (!table || !may_run(table))) return false;
  forced.store(table, std::memory_order_release);
  return true;
}

FASTRNN_EXPORT const char* rejected_environment() {
  const std::string& rejected = standard().rejected;
  return rejected.empty() ? nullptr : rejected.c_str();
}

FASTRNN_EXPORT const CellTraits& traits(CellKind kind) {
  static const std::vector<CellTraits> all = [] {
    std::vector<CellTraits> list;
    for_each_cell([&](auto cell) { list.push_back(traits_of<decltype(cell)>()); });
    return list;
  }();
  for (const CellTraits& cell : all)
    if (cell.kind == kind) return cell;
  std::abort();  // every CellKind has a cell in cells.h
}

}  // namespace fastrnn
