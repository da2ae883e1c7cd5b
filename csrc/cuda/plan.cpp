// The plan: what is possible on a card, and which of that costs least, by a model.
#include "plan.h"

#include <algorithm>
#include <cmath>

namespace fastrnn {
namespace cuda {
namespace {

int ceil_div(int64_t n, int64_t by) { return int((n + by - 1) / by); }
int round_up(int64_t n, int64_t to) { return int((n + to - 1) / to * to); }

Factors factors_of(const Layer& layer, bool tf32) {
  if (layer.dtype == Dtype::f32) return tf32 ? Factors::tf32 : Factors::f32;
  return layer.dtype == Dtype::bf16 ? Factors::bf16 : Factors::f16;
}

// Clock cycles of one step, roughly: what the parts of it cost on a Hopper card by published measurements (latency of a
// product of tiles, of a push, of a flag; widths of shared memory and of the way to the L2 cache). Not measured here,
// and good for choosing among ways to share out, no more.
double cycles_of_step(const Sharing& s, Path path) {
  constexpr double tile_latency = 30, tile_cycles = 6, to_shared = 128, to_l2 = 27, push_latency = 250;
  constexpr double flag_latency = 1000, barrier = 40, cell = 350, more_cells = 400;
  const FragmentSizes sizes = s.sizes();
  const int per_scheduler = ceil_div(s.warps(), 4), passes = ceil_div(s.rows, sizes.columns);
  double units, from_shared = double(s.warps()) * s.in_shared() * sizes.quads * 512 * passes;
  if (s.factors == Factors::f32) {
    units = per_scheduler * s.rows * (16.0 * s.depth + 64);
    from_shared += double(s.warps()) * s.depth * s.rows * 128;
  } else {
    units = 0;
    for (int pass = 0; pass < passes; ++pass) {
      const int tiles = s.rows - pass * sizes.columns > 8 ? 2 : 1;
      units += s.depth * std::max(tile_latency, per_scheduler * (sizes.rows / 16) * tiles * tile_cycles);
      from_shared += double(s.warps()) * s.depth * tiles * 256;
    }
  }
  const double multiply = std::max(units, from_shared / to_shared);
  const double cells =
      cell + more_cells * (ceil_div(int64_t(s.rows) * s.units, s.threads()) - 1) + 8.0 * s.G * s.splits;
  const double received = double(s.rows) * s.K() * sizes.element;
  double exchange = 2 * barrier;
  if (path == Path::cluster) {
    const double pushes = std::ceil(double(s.blocks) * s.rows * s.width() * sizes.element / 16 / s.threads());
    exchange += push_latency + 60 * pushes + received / 32;
  } else if (path == Path::grid) {
    const double pieces = s.piece ? double(passes) * ceil_div(s.depth, s.piece) : 1;
    exchange += flag_latency + 3 * barrier + pieces * 400 + received / to_l2;
  }
  return multiply + cells + exchange;
}

// The cheapest way to share a layer out on a path; false, and why, if there is none.
bool try_path(Choice& choice, Path path, const Layer& layer, bool tf32, bool backward, const Card& card,
              std::string& why) {
  const Factors factors = factors_of(layer, tf32);
  const int step = factors == Factors::f32 ? 1 : 8, most_rows = factors == Factors::f32 ? 16 : 64;
  const int least = path == Path::block ? 1 : 2;
  const int most = path == Path::block ? 1 : path == Path::cluster ? 16 : card.processors / layer.D;
  double best = 0;
  // From few blocks to many, so that of equal ways the one with fewer is taken. A cluster's number is a power of two.
  for (int blocks = least; blocks <= most; blocks = path == Path::cluster ? blocks * 2 : blocks + 1) {
    int last = 0;
    for (int wanted = step; last < layer.B && wanted <= most_rows; wanted += wanted < 4 * step ? step : 4 * step) {
      // As many groups as that needs, equally large.
      const int groups = ceil_div(layer.B, wanted);
      const int rows = std::min<int64_t>(round_up(ceil_div(layer.B, groups), step), layer.B);
      if (rows == last) continue;
      last = rows;
      // Groups of each direction. Clusters leave processors over, since theirs have to be neighbours: of 132 at most 15
      // clusters of 8 were seen at once.
      const int usable = path == Path::cluster ? card.processors * 10 / 11 : card.processors;
      const int at_once = usable / (blocks * layer.D);
      if (at_once == 0 || (path == Path::grid && groups > at_once)) {
        if (why.empty()) why = "more blocks than processors";
        continue;
      }
      Sharing s;
      if (!share_out(s, path, layer, tf32, backward, blocks, rows, card.shared_bytes, why)) continue;
      const double cycles = cycles_of_step(s, path) * ceil_div(groups, at_once);
      if (choice.path == path && cycles >= best) continue;
      best = cycles;
      choice.path = path;
      choice.sharing = s;
      choice.groups = ceil_div(layer.B, s.rows);
      choice.cycles = cycles;
    }
  }
  return choice.path == path;
}

}  // namespace

LaunchShape Choice::shape() const {
  LaunchShape shape;
  shape.x = groups * sharing.blocks;
  shape.y = D;
  shape.threads = sharing.threads();
  shape.shared_bytes = sharing.shared_bytes();
  shape.cluster = path == Path::cluster ? sharing.blocks : 1;
  shape.cooperative = path == Path::grid;
  return shape;
}

bool share_out(Sharing& s, Path path, const Layer& layer, bool tf32, bool backward, int blocks, int rows,
               int shared_bytes, std::string& why) {
  const CellTraits& cell = traits(layer.cell);
  s = Sharing();
  s.factors = factors_of(layer, tf32);
  s.backward = backward;
  s.resets = layer.reset != nullptr;
  s.packed = layer.packed;
  s.H = int(layer.H);
  s.G = cell.gates;
  s.units = round_up(ceil_div(layer.H, blocks), 8);
  s.blocks = blocks;
  s.rows = rows;
  const FragmentSizes sizes = s.sizes();
  s.row_tiles = ceil_div(s.M(), sizes.rows);
  if (s.row_tiles > max_warps) {
    why = "a block would have more rows of weights than its warps";
    return false;
  }
  const int tiles = ceil_div(s.K(), sizes.depth);
  s.splits = std::min(max_warps / s.row_tiles, tiles);
  s.depth = ceil_div(tiles, s.splits);
  s.buffers = path == Path::cluster ? 2 : 1;
  s.slice_quads = Divisor(s.width() * sizes.element / 16);
  s.row_quads = Divisor(s.K() * sizes.element / 16);
  s.by_blocks = Divisor(s.blocks);
  const int unit = piece_unit(s.factors);
  if (s.shared_bytes() > shared_bytes && unit && path == Path::grid)  // piece by piece, as large as they can be
    for (s.piece = s.depth / unit * unit; s.piece > unit && s.shared_bytes() > shared_bytes;) s.piece -= unit;
  if (s.shared_bytes() > shared_bytes) {
    why = "weights and states do not fit into a block's registers and shared memory";
    return false;
  }
  return true;
}

Choice choose(const Layer& layer, bool tf32, bool backward, const Card& card, const std::string& forced) {
  Choice choice;
  choice.D = layer.D;
  const auto step = [&](const std::string& why) {
    choice.path = Path::step;
    choice.why = why;
    return choice;
  };
  if (forced.empty()) return step("no resident kernel has been checked on a card yet");
  if (forced == "step") return step("forced");
  if (layer.dtype == Dtype::f64) return step("float64 goes step by step");
  if (layer.projected) return step("a projection goes step by step");
  if (card.processors == 0) return step("there is no card");
  std::string all;
  for (const Path path : {Path::block, Path::cluster, Path::grid}) {
    if (forced != "auto" && forced != path_names[int(path)]) continue;
    std::string why;
    Choice found;
    found.D = layer.D;
    if (path == Path::cluster && card.arch < 90) {
      why = "clusters need compute capability 9.0";
    } else if (try_path(found, path, layer, tf32, backward, card, why)) {
      if (choice.path == Path::step || found.cycles < choice.cycles) choice = found;
      continue;
    }
    all += (all.empty() ? "" : "; ") + std::string(path_names[int(path)]) + ": " + why;
  }
  if (choice.path == Path::step) return step(all);
  choice.why = forced == "auto" ? "the least cycles a step, by the plan's estimate" : "forced";
  return choice;
}

int64_t packed_bytes(const Choice& choice) {
  return choice.path == Path::step ? 0 : choice.sharing.packed_quads() * 16 * choice.D;
}

int64_t exchange_bytes(const Choice& choice) {
  return choice.path == Path::grid ? choice.sharing.exchange_bytes(choice.groups, choice.D) : 0;
}

}  // namespace cuda
}  // namespace fastrnn
