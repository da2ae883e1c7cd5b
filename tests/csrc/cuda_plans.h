// Tests of how the CUDA side shares layers out (csrc/cuda/plan.h, layout.h), for cuda_driver.cpp: plain arithmetic,
// which kernels and host have in common.
#pragma once

#include "../../csrc/cuda/plan.h"
#include "cases.h"

namespace fastrnn {

// That [begin, end) of a number of ranges do not overlap and end by `end`; says which do.
inline void expect_apart(std::vector<std::pair<int64_t, int64_t>> ranges, int64_t end, const char* what,
                         const Case& c) {
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 0; i < ranges.size(); ++i) {
    const int64_t until = i + 1 < ranges.size() ? ranges[i + 1].first : end;
    EXPECT(ranges[i].first >= 0 && ranges[i].second <= until, "%s: bytes %ld to %ld reach into %ld: %s", what,
           long(ranges[i].first), long(ranges[i].second), long(until), describe(c).c_str());
  }
}

inline void test_sharing(const cuda::Choice& choice, const Case& c, const cuda::Card& card) {
  const cuda::Sharing& s = choice.sharing;
  const cuda::FragmentSizes sizes = s.sizes();
  const int64_t H = c.layer.H, G = c.cell.gates;
  EXPECT(s.rows >= 1 && int64_t(choice.groups) * s.rows >= c.layer.B && int64_t(choice.groups - 1) * s.rows < c.layer.B,
         "%d groups of %d rows: %s", choice.groups, s.rows, describe(c).c_str());
  EXPECT(s.warps() >= 1 && s.warps() <= cuda::max_warps, "%d warps: %s", s.warps(), describe(c).c_str());
  EXPECT(s.shared_bytes() <= card.shared_bytes, "%d bytes: %s", s.shared_bytes(), describe(c).c_str());
  if (choice.path == cuda::Path::grid)
    EXPECT(choice.shape().x * choice.shape().y <= card.processors, "%d blocks: %s", choice.shape().x,
           describe(c).c_str());
  if (choice.path == cuda::Path::cluster)
    EXPECT((s.blocks & (s.blocks - 1)) == 0 && s.blocks <= 16, "%d blocks: %s", s.blocks, describe(c).c_str());

  // Every weight in one fragment of one block, and nothing else than weights and padding anywhere.
  std::vector<int> seen(size_t(G * H * H));
  for (int block = 0; block < s.blocks; ++block)
    for (int warp = 0; warp < s.warps(); ++warp)
      for (int kk = 0; kk < s.depth; ++kk)
        for (int m = 0; m < sizes.rows; ++m)
          for (int k = 0; k < sizes.depth; ++k) {
            int row, column;
            s.weight_at(block, warp / s.splits * sizes.rows + m, (kk * s.splits + warp % s.splits) * sizes.depth + k,
                        row, column);
            if (row < 0) continue;
            EXPECT(row < G * H && column >= 0 && column < H, "weight (%d, %d): %s", row, column, describe(c).c_str());
            ++seen[size_t(row * H + column)];
          }
  EXPECT(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }), "a weight is lost or there twice: %s",
         describe(c).c_str());
  std::vector<bool> packed(size_t(s.packed_quads()));
  for (int block = 0; block < s.blocks; ++block)
    for (int warp = 0; warp < s.warps(); ++warp)
      for (int kk = 0; kk < s.depth; ++kk)
        for (int quad = 0; quad < sizes.quads; ++quad)
          for (int lane = 0; lane < 32; ++lane) packed.at(size_t(s.packed_at(block, warp, kk, quad, lane))) = true;
  EXPECT(std::all_of(packed.begin(), packed.end(), [](bool x) { return x; }), "a hole among packed weights: %s",
         describe(c).c_str());

  const int64_t vector = int64_t(s.vector_rows()) * s.pitch(), element = sizes.element;
  std::vector<std::pair<int64_t, int64_t>> pieces{{s.barriers_at(), s.barriers_at() + 16}};
  for (int k = 0; k < s.buffers; ++k) pieces.emplace_back(s.vector_at(k), s.vector_at(k) + vector);
  pieces.emplace_back(s.sums_at(), s.sums_at() + int64_t(s.splits) * s.pass_rows() * s.sums_pitch() * 4);
  pieces.emplace_back(s.states_at(), s.states_at() + 2ll * s.rows * s.units * 4);
  if (!s.backward) pieces.emplace_back(s.bias_at(), s.bias_at() + 2ll * s.G * s.units * 4);
  pieces.emplace_back(s.lengths_at(), s.lengths_at() + s.rows * 4ll);
  if (s.packed) pieces.emplace_back(s.first_rows_at(), s.first_rows_at() + (cuda::window_steps + 4) * 8ll);
  if (s.resets) pieces.emplace_back(s.resets_at(), s.resets_at() + (cuda::window_steps + 1ll) * s.rows);
  pieces.emplace_back(s.slice_at(), s.slice_at() + int64_t(s.rows) * s.width() * element);
  pieces.emplace_back(s.weights_at(), s.weights_at() + int64_t(s.warps()) * s.in_shared() * sizes.quads * 512);
  for (const auto& piece : pieces)
    EXPECT(piece.first % 16 == 0, "memory at %ld: %s", long(piece.first), describe(c).c_str());
  expect_apart(pieces, s.shared_bytes(), "shared memory", c);
  EXPECT(s.pitch() % 16 == 0 && s.width() * element % 16 == 0 && s.padded_K() >= s.K() && s.padded_M() >= s.M(),
         "pitch %d, width %d: %s", s.pitch(), s.width(), describe(c).c_str());

  if (choice.path != cuda::Path::grid) return;
  pieces.clear();
  for (int slot = 0; slot < 2; ++slot)
    for (int d = 0; d < choice.D; ++d)
      for (int group = 0; group < choice.groups; ++group) {
        const int64_t at = s.exchanged_at(slot, choice.groups, choice.D, d, group, 0);
        pieces.emplace_back(at, at + int64_t(s.rows) * s.K() * element);
      }
  for (int d = 0; d < choice.D; ++d)
    for (int group = 0; group < choice.groups; ++group)
      for (int block = 0; block < s.blocks; ++block) {
        const int64_t at = s.flag_at(choice.groups, choice.D, d, group, block);
        pieces.emplace_back(at, at + 4);
      }
  expect_apart(pieces, cuda::exchange_bytes(choice), "exchange", c);
}

inline void test_plans(int64_t n) {
  for (int by : {1, 2, 3, 5, 7, 12, 16, 48, 96, 2047, 4096})
    for (int64_t i = 0; i < 3000; ++i) {
      const int x = int(i < 1000 ? i : integer(0, (int64_t(1) << 32) / by / by - 1));
      EXPECT(cuda::Divisor(by).quotient(x) == x / by, "%d / %d", x, by);
    }
  int64_t served = 0;
  for (int64_t i = 0; i < n; ++i) {
    Sizes sizes = random_sizes(false);
    if (sizes.dtype == Dtype::f64) continue;
    sizes.P = sizes.H = integer(1, integer(0, 1) ? 40 : 300);
    sizes.I = sizes.T = 1;
    sizes.B = integer(1, 300);
    const Case c = random_case(sizes);
    const cuda::Card card{integer(0, 3) ? 90 : 80, int(integer(1, 148)), int(integer(8, 227)) << 10};
    for (const char* path : {"block", "cluster", "grid", "auto"})
      for (const bool backward : {false, true}) {
        const cuda::Choice choice = cuda::choose(c.layer, integer(0, 1), backward, card, path);
        EXPECT(choice.path == cuda::Path::step || path == std::string("auto") ||
                   path == std::string(cuda::path_names[int(choice.path)]),
               "another path than %s: %s", path, describe(c).c_str());
        EXPECT(!choice.why.empty(), "no reason: %s", describe(c).c_str());
        EXPECT(choice.path != cuda::Path::cluster || card.arch >= 90, "clusters: %s", describe(c).c_str());
        if (choice.path == cuda::Path::step) continue;
        ++served;
        test_sharing(choice, c, card);
      }
    const cuda::Choice unforced = cuda::choose(c.layer, false, false, card, "");
    EXPECT(unforced.path == cuda::Path::step, "unforced: %s", describe(c).c_str());
  }
  EXPECT(served > n, "%ld choices of %ld layers", long(served), long(n));
  std::printf("%ld plans\n", long(served));
}

}  // namespace fastrnn
