// The per-thread scratch arena, and the cut of a batch into slices of rows.
#include "workspace.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace fastrnn {

namespace {

constexpr size_t kept_bytes = size_t(64) << 20;

struct Arena {
  void* data = nullptr;
  size_t size = 0;

  void resize(size_t bytes) {
    std::free(data);
    data = nullptr;
    size = 0;
    if (bytes == 0) return;
    data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (data == nullptr) throw std::bad_alloc();
    size = bytes;
  }
  ~Arena() { std::free(data); }
};

thread_local Arena arena;

}  // namespace

void* workspace(size_t bytes) {
  if (arena.size < bytes) arena.resize(std::max(bytes, std::min(2 * arena.size, kept_bytes)));
  return arena.data;
}

void trim_workspace() {
  if (arena.size > kept_bytes) arena.resize(0);
}

int slice_count(const Layer& p, const CellTraits& cell, int team_size) {
  // Starting a team costs about a microsecond: below this much arithmetic one thread is done sooner.
  constexpr double worthwhile = 4e5;
  const double operations =
      2.0 * double(p.T) * double(p.B) * double(p.D) * double(cell.gates) * double(p.H) * double(p.I + p.P);
  if (team_size <= 1 || p.B == 0 || operations < worthwhile) return 1;
  const int per_direction = team_size % p.D == 0 ? team_size / p.D : team_size;
  return int(std::min<int64_t>(per_direction, p.B));
}

size_t slices_size(const Layer& p, int count) {
  return sizeof(int64_t) * size_t(count + 1 + 2 * p.B + (p.lengths ? p.T + 2 : 0));
}

Slices cut_slices(const Layer& p, int count, void* memory) {
  Slices s;
  s.count = count;
  s.first = static_cast<int64_t*>(memory);
  s.order = s.first + count + 1;
  s.longest = 0;
  for (int i = 0; i <= count; ++i) s.first[i] = p.B * i / count;
  for (int i = 0; i < count; ++i) s.longest = std::max(s.longest, s.first[i + 1] - s.first[i]);
  if (p.lengths == nullptr) {
    for (int64_t b = 0; b < p.B; ++b) s.order[b] = b;
    return s;
  }
  // Longest first by counting, then dealt out in turn so that every slice gets its share of long rows.
  int64_t* sorted = s.order + p.B;
  int64_t* place = sorted + p.B;  // [T + 2]
  std::fill(place, place + p.T + 2, 0);
  for (int64_t b = 0; b < p.B; ++b) ++place[p.T - p.lengths[b] + 1];
  for (int64_t i = 1; i < p.T + 2; ++i) place[i] += place[i - 1];
  for (int64_t b = 0; b < p.B; ++b) sorted[place[p.T - p.lengths[b]]++] = b;
  int64_t dealt = 0;
  for (int64_t round = 0; dealt < p.B; ++round)
    for (int i = 0; i < count; ++i)
      if (s.first[i] + round < s.first[i + 1]) s.order[s.first[i] + round] = sorted[dealt++];
  return s;
}

}  // namespace fastrnn
