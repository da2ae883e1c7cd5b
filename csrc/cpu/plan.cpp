// The cost model behind choose_split, and what it knows of the machine.
//
// The constants are measured (AVX-512 and AVX2 machines, two cores; benchmarks --roofline shows this machine's). They
// need not be exact: they only rank the ways of sharing a layer out.
#include "plan.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>

#define FASTRNN_EXPORT __attribute__((visibility("default")))

namespace fastrnn {
namespace {

constexpr double start_us = 4;  // fork and join of a team that is awake, and its first looks at shared memory
// Two threads that exchange a state: 0.1 on one cache, 0.6 on two; each doubling of the threads adds it.
constexpr double barrier_us = 0.5;
constexpr double pack_gbs = 12;        // writing packed weights
constexpr double share_gbs = 8;        // reading what another core has packed
constexpr double step_us = 0.03;       // a step's own bookkeeping
constexpr double handover_us = 0.06;   // reading, in a wavefront, what another core has just written for a step
constexpr double tile_us = 2.5;        // handing over a tile of projected input
constexpr double vector_gflops = 100;  // one core, float; half of it in double
constexpr double scalar_gflops = 3;
constexpr double l1_bytes = 28 * 1024, l1_gbs = 200, l2_gbs = 110, beyond_gbs = 40;
constexpr double activation_ns = 8;  // a vector of sigmoid or tanh

double l2_bytes() {
  static const double size = [] {
    long found = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? double(found) : 1024.0 * 1024.0;
  }();
  return size;
}

std::atomic<int> forced{0};  // index into names
const char* const names[] = {"", "serial", "batch", "hidden", "wavefront", "ahead"};
enum Forced { by_model, serial, batch, hidden, wavefront, ahead };

struct Cost {
  double us;
  const char* limit;
};

// Of a step: without the projection of its input, and that.
struct StepCost {
  double us, input_us;
  const char* limit;
};

// One step of `rows` rows of a share of `blocks` vectors of hidden units.
StepCost step_cost(const Layer& p, const CellTraits& cell, double rows, double blocks, int parts, const Units& units) {
  const int lanes = units.lanes;
  const double gates = double(cell.gates) * blocks * lanes;
  const double rate = (lanes > 1 ? vector_gflops : scalar_gflops) * units.speed * 1e3;  // operations per us
  const double weights = gates * double(p.P) * units.weight_bytes;
  const double touched = weights + rows * double(p.P) * units.weight_bytes;
  const bool in_l1 = touched < l1_bytes, in_l2 = touched < 0.8 * l2_bytes();
  const double stream = weights / ((in_l1 ? l1_gbs : in_l2 ? l2_gbs : beyond_gbs) * 1e3);
  const double arithmetic = 2 * rows * gates * double(p.P) / rate;
  const int per_unit = cell.has_c ? 5 : cell.gates;
  const double activations = rows * blocks * per_unit * activation_ns * 1e-3 * (lanes > 1 ? 1 : 0.4);
  const double wait = parts > 1 ? barrier_us * std::log2(double(parts)) : 0;
  const double input = 2 * rows * gates * double(p.I) / rate;
  const double recurrent = std::max(stream, arithmetic);
  const double largest = std::max({recurrent, activations, wait, input, step_us});
  const char* limit = largest == wait                            ? "waiting at the barrier"
                      : largest == activations                   ? "activations"
                      : largest == step_us                       ? "a step's bookkeeping"
                      : largest == input || arithmetic >= stream ? (units.tiled ? "products of tiles" : "arithmetic")
                      : in_l1                                    ? "streaming the weights from L1"
                      : in_l2                                    ? "streaming the weights from L2"
                                                                 : "streaming the weights from beyond L2";
  return {recurrent + activations + wait + step_us, input, limit};
}

int read_quota() {
  const auto ratio = [](const char* path, const char* second) {
    double quota = -1, period = 100000;
    char word[32];
    if (FILE* file = std::fopen(path, "r")) {
      if (std::fscanf(file, "%31s", word) == 1 && std::strcmp(word, "max")) std::sscanf(word, "%lf", &quota);
      if (second == nullptr && std::fscanf(file, "%lf", &period) != 1) period = 100000;
      std::fclose(file);
    }
    if (second)
      if (FILE* file = std::fopen(second, "r")) {
        if (std::fscanf(file, "%lf", &period) != 1) period = 100000;
        std::fclose(file);
      }
    return quota > 0 && period > 0 ? quota / period : -1.0;
  };
  double cpus = ratio("/sys/fs/cgroup/cpu.max", nullptr);
  if (cpus < 0) cpus = ratio("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  return cpus < 0 ? 1 << 20 : std::max(1, int(std::floor(cpus + 0.5)));
}

}  // namespace

FASTRNN_EXPORT int cpu_quota() {
  static const int quota = read_quota();
  return quota;
}

void yield_thread() { sched_yield(); }

FASTRNN_EXPORT bool force_split(const char* name) {
  for (int i = by_model; i <= ahead; ++i)
    if (!std::strcmp(names[i], name)) {
      forced.store(i, std::memory_order_relaxed);
      return true;
    }
  return false;
}

// Measured: bands pay for sums that a core's cache holds, and that are little beside the rows, for they are written and
// added up once more. Taller bands cost a row the less, more of them feed more threads.
int bands_of(const Layer& p, const CellTraits& cell, const Units& units) {
  constexpr int64_t sums_in_cache = 576 * 1024, sums_in_memory = 8 << 20, of_a_row = 512;
  if (units.tiled) return 1;
  const int64_t N = p.first_row ? p.first_row[p.T] : p.T * p.B;
  const int64_t weights = cell.gates * p.H * (p.I + p.P) + (p.projected ? p.P * p.H : 0);
  const int64_t sums = weights * (p.dtype == Dtype::f64 ? 8 : 4);
  if (sums > sums_in_cache) return 1;
  int64_t most = 1;
  const int64_t so_many_of_rows[][2] = {{2, 4}, {4, 8}, {8, 16}, {64, 32}};
  for (const auto& [bands, rows] : so_many_of_rows) most = std::max(most, std::min(bands, p.B / rows));
  most = std::min({most, N / chunk_rows, std::min(sums_in_memory, of_a_row * N) / std::max<int64_t>(sums, 1)});
  int bands = 1;
  while (2 * bands <= most) bands *= 2;
  return bands;
}

Split choose_split(const Layer& p, bool backward, const CellTraits& cell, int threads, const Units& units) {
  const int lanes = units.lanes, group = units.group;
  const double blocks = std::ceil(double(p.H) / lanes);
  const int most_parts = int(std::max(1.0, std::ceil(blocks / group)));
  const double B = double(p.B), T = double(p.T);
  const auto can_be_ahead = [&](int slices, int parts) {
    return !backward && parts == 1 && p.T > 1 && p.I > folded_input && std::ceil(B / slices) <= double(ahead_rows);
  };
  const auto evaluate = [&](int directions, int slices, int parts, bool ahead) {
    const StepCost step =
        step_cost(p, cell, std::ceil(B / slices), std::ceil(blocks / group / parts) * group, parts, units);
    const int workers = directions * slices * parts * (ahead ? 2 : 1);
    const double weights =
        double(cell.gates) * double(p.H) * double(p.I + p.P) * units.weight_bytes * 1e-3;  // a direction's
    const bool kept = p.weights[0].packed;
    const double packing =
        kept ? 0 : weights / (slices * parts) / pack_gbs + weights / parts * (1 - 1.0 / slices) / share_gbs;
    double us = (step.us + step.input_us) * T + packing;
    if (ahead) {
      const double steps = std::max(1.0, std::floor(double(ahead_rows) / std::ceil(B / slices)));  // of a tile
      us = std::max({step.us, step.input_us, tile_us / steps}) * T + step.input_us * std::min(T, steps) + packing / 2;
    }
    return Cost{us * p.D / directions + (workers > 1 ? start_us : 0), step.limit};
  };
  Split best;
  Cost cost = evaluate(1, 1, 1, false);
  const auto consider = [&](int directions, int slices, int parts, bool ahead, bool must) {
    const Cost found = evaluate(directions, slices, parts, ahead);
    if (!must && found.us >= 0.95 * cost.us) return;
    cost = found;
    best.directions = directions;
    best.slices = slices;
    best.parts = parts;
    best.ahead = ahead;
  };
  threads = std::max(1, threads);
  best.bands = backward ? bands_of(p, cell, units) : 1;
  if (best.bands > 1) {
    if (threads > 1 && (cost.us > 2 * start_us || forced.load(std::memory_order_relaxed) > serial))
      best.workers = best.slices = threads < best.bands ? threads : threads / best.bands * best.bands;
    cost = evaluate(1, best.slices, 1, false);
    best.limit = cost.limit;
    best.us = cost.us;
    return best;
  }
  const int side_by_side = p.D == 2 && threads % 2 == 0 ? 2 : 1, share = threads / side_by_side;
  const int wanted = forced.load(std::memory_order_relaxed);
  if (wanted == by_model && threads > 1 && cost.us > 2 * start_us) {
    best.workers = threads;
    for (int directions = side_by_side; directions >= 1; --directions)
      for (int parts = 1; parts <= std::min(share, most_parts); ++parts)
        for (int slices = 1; slices * parts <= share && slices <= p.B; ++slices) {
          consider(directions, slices, parts, false, false);
          if (2 * slices <= share && can_be_ahead(slices, parts)) consider(directions, slices, parts, true, false);
        }
  } else if ((wanted == batch || wanted == hidden) && threads > 1) {
    best.workers = threads;
    consider(side_by_side, wanted == batch ? int(std::min<int64_t>(share, p.B)) : 1,
             wanted == hidden ? std::min(share, most_parts) : 1, false, true);
  } else if (wanted == ahead && threads > 1) {
    best.workers = threads;
    const int directions = share > 1 ? side_by_side : 1;
    const int slices = int(std::clamp<int64_t>(threads / directions / 2, 1, std::max<int64_t>(p.B, 1)));
    consider(directions, slices, 1, can_be_ahead(slices, 1), true);
  }
  // Measured: worth it where a cache holds a good part of the weights but not all of them.
  const double vectors = std::ceil(blocks / best.parts);
  const double read = double(cell.gates) * vectors * lanes * double(p.P) * units.weight_bytes;
  const bool partly = (read > 1.25 * l1_bytes && read < 3 * l1_bytes) || read > 0.8 * l2_bytes();
  best.alternate = partly && vectors >= 2 * group;
  best.limit = cost.limit;
  best.us = cost.us;
  return best;
}

Wavefront choose_wavefront(const Layer& first, const Layer& upper, int count, bool backward, const CellTraits& cell,
                           int threads, const Units& units) {
  const int wanted = forced.load(std::memory_order_relaxed);
  Wavefront best;
  if (count < 2 || threads < 2 || first.T < 2 || first.D == 2 || first.first_row ||
      (wanted != by_model && wanted != wavefront))
    return best;
  if (backward && (bands_of(first, cell, units) > 1 || bands_of(upper, cell, units) > 1)) return best;
  const auto cost = [&](const Layer& layer, int n) { return choose_split(layer, backward, cell, n, units).us; };
  const double first_alone = cost(first, 1), upper_alone = cost(upper, 1);
  double us = cost(first, threads) + (count - 1) * cost(upper, threads);  // one after the other, each by all threads
  const int64_t steps = backward ? std::max<int64_t>(chunk_rows / std::max<int64_t>(first.B, 1), 1)
                                 : std::clamp<int64_t>(first.T / 16, 8, 64);
  const double pieces = std::ceil(double(first.T) / double(steps));
  for (int groups = 2; groups <= std::min(threads, count); ++groups) {
    double slowest = 0;
    for (int g = 0; g < groups; ++g) {
      const int layers = count * (g + 1) / groups - count * g / groups;
      slowest = std::max(slowest, (g == 0 ? first_alone : upper_alone) + (layers - 1) * upper_alone);
    }
    const double found = slowest * (1 + (groups - 1) / pieces) + barrier_us * (pieces + groups) + start_us +
                         handover_us * double(first.T);
    if (wanted != wavefront && found >= us) continue;
    us = wanted == wavefront ? us : found;
    best = {groups, backward ? 1 : steps};
  }
  return best;
}

}  // namespace fastrnn
