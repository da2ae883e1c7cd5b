// The emulator: threads from their start to their end, blocks, and csrc/cuda/runtime.h on the CPU. Only this file is
// compiled; the rest of the emulator are its headers.
//
// An error inside a kernel is thrown from where it is seen to the top of the fiber, and again by launch(). All other
// fibers stay where they are and never go on.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/runtime.h"
#include "emulator_fiber.h"
#include "emulator_primitives.h"
#include "emulator_products.h"
#include "emulator_scheduler.h"

namespace fastrnn {
namespace cuda {
namespace emulator {

const Identity* self = nullptr;

Settings& settings() {
  static Settings settings;
  return settings;
}
uint64_t switches() { return switch_count; }

namespace {
// ------------------------------------------------------------------------------------------------------------- fibers

[[noreturn]] __attribute__((noinline)) void report_late_push(const Push& p) {
  fail("push by " + name_of(*p.from) + text(" to shared + %td of ", p.at - p.to->shared) + name_of(*p.to) +
       ", which has ended before it arrived");
}
[[noreturn]] __attribute__((noinline)) void report_bytes(const Block& block, const Barrier& b) {
  fail(name_of(block) + text(" ends, and at its barrier at shared + %td %lld bytes have arrived that nobody expected",
                             b.at - block.shared, static_cast<long long>(-b.bytes)));
}

// The current thread has returned from the kernel; comes back when the fiber is given another.
FASTRNN_UNSEEN void leave() {
  Fiber& f = *current;
  Block& b = *f.block;
  Warp& w = warp_of(f);
  ++w.exited;
  polls = 0;
  if (w.arrived) report_lanes(w, "return", f.site);
  f.done = true;
  f.wait = Wait::nothing;
  --b.live;
  --b.cluster->live;
  open_block(b);
  open_cluster(*b.cluster);
  if (b.live) {
    reschedule();
    return;
  }
  for (unsigned i = 0; i < push_count; ++i)
    if (pushes[push_order[i]].to == &b) report_late_push(pushes[push_order[i]]);
  for (int i = 0; i < b.barrier_count; ++i)
    if (b.barriers[i].bytes < 0) report_bytes(b, b.barriers[i]);
  ended = &b;
  current = nullptr;
  self = nullptr;
  switch_context(f.context, main_context);
}

// Runs one thread; false where something is wrong.
bool run_thread() {
  try {
    tsan_acquire(&current->block->start);
    kernel_call(kernel, kernel_arguments);
    tsan_release(&launch_end);
    leave();
    return true;
  } catch (const std::exception& e) {
    error = e.what();
    return false;
  }
}
FASTRNN_UNSEEN void fiber_body() {
  arrived(current->context);
  for (;;) {
    if (run_thread()) continue;
    failed = true;
    tsan_release(&error_order);
    Fiber& f = *current;
    current = nullptr;
    self = nullptr;
    switch_context(f.context, main_context);
  }
}

// ------------------------------------------------------------------------------------------------------------- blocks

// What is written here fibers read, and no order between them and launch() is to be invented.
FASTRNN_UNSEEN void begin_block(Block& b, const LaunchShape& shape, int x, int y, int z, Cluster& cluster) {
  b.x = x;
  b.y = y;
  b.z = z;
  b.rank = cluster.size;
  b.threads = b.live = shape.threads;
  b.cluster = &cluster;
  b.shared_bytes = shape.shared_bytes;
  b.meeting = Meeting();
  b.barrier_count = 0;
  b.head = b.count = 0;
  cluster.block[cluster.size++] = &b;
  cluster.live += b.threads;
  ++cluster.running;
  active[active_count++] = &b;
  for (int i = 0; i < b.threads; ++i) {
    if (!in_order) {
      const int other = int(random_below(random_bits(), unsigned(idle_count)));
      Fiber* const f = idle_fibers[other];
      idle_fibers[other] = idle_fibers[idle_count - 1];
      idle_fibers[idle_count - 1] = f;
    }
    Fiber& f = *idle_fibers[--idle_count];
    static_cast<Identity&>(f) = {i, b.threads, x, y, z, shape.x, b.rank, b.shared};
    f.block = &b;
    f.done = false;
    f.what = "start";
    f.site = Site();
    f.watches = 0;
    b.fiber[i] = &f;
    Warp& w = b.warp[i / warp_size];
    if (i % warp_size == 0) w.lanes = w.arrived = w.exited = 0;
    w.fiber[w.lanes++] = &f;
    make_ready(&f);
  }
  tsan_release(&b.start);
}

FASTRNN_UNSEEN void end_block(Block& b) {
  for (unsigned i = 0; i < active_count; ++i)
    if (active[i] == &b) active[i--] = active[--active_count];
  --b.cluster->running;
}
FASTRNN_UNSEEN void give_back_fibers(const Block& b) {
  for (int i = 0; i < b.threads; ++i) idle_fibers[idle_count++] = b.fiber[i];
}

// What a fiber that goes no further has done comes before all that follows the launch.
FASTRNN_UNSEEN void abandon(const Fiber& f) {
  tsan_become(f.context.thread);
  tsan_release(&launch_end);
  tsan_become(main_context.thread);
}

// Runs fibers until a block ends (true), or all have (false), or something is wrong.
FASTRNN_UNSEEN bool run_blocks() {
  if (active_count == 0) return false;
  Fiber* next = pick();
  while (!next && push_count) {
    deliver(random_bits());
    next = pick();
  }
  if (!next) report_deadlock();
  ended = nullptr;
  run(next, main_context);
  current = nullptr;
  self = nullptr;
  return true;
}

FASTRNN_UNSEEN void begin_launch(const void* function, KernelCall call, void** arguments) {
  const Settings& s = settings();
  kernel = function;
  kernel_call = call;
  kernel_arguments = arguments;
  if (!seeded || seeded_with != s.seed) random_state = seeded_with = s.seed;
  seeded = true;
  in_order = s.in_order;
  fresh_may_race = s.fresh_may_race;
  constexpr unsigned stays[] = {0, 15, 255}, deliveries[] = {1, 4, 32, 1024, 1u << 30};
  stay = stays[random_below(random_bits(), 3)];
  deliver_once_in = deliveries[random_below(random_bits(), 5)];
  const unsigned order = random_below(random_bits(), 4);
  favourite = order == 0 ? 0 : -1;
  laggard = order == 1 ? 0 : -1;
  newest_first = !in_order && random_below(random_bits(), 3) == 0;
  turn = turn_left = 0;
  active_count = ready_count = push_count = sleeper_count = 0;
  sleepers_watch = polls = 0;
  failed = false;
}

}  // namespace
}  // namespace emulator

// ---------------------------------------------------------------------------------------------------------- runtime.h

using namespace emulator;

const Card& card() {
  static Card card;
  card.arch = settings().arch;
  card.processors = settings().processors;
  card.shared_bytes = settings().shared_bytes;
  return card;
}

int resident(const void*, const LaunchShape& shape) {
  const Settings& s = settings();
  if (shape.threads < 1 || shape.threads > most_threads || shape.shared_bytes > s.shared_bytes) return 0;
  if (shape.cluster < 1 || shape.cluster > (s.arch >= 90 ? std::min(s.largest_cluster, most_blocks) : 1)) return 0;
  const int by_memory = (s.shared_bytes + 1024) / (shape.shared_bytes + 1024);
  const int blocks = s.processors * std::min({s.blocks_per_processor, 2048 / shape.threads, by_memory});
  return std::min(blocks, most_fibers / shape.threads) / shape.cluster;
}

void launch(const void* function, KernelCall call, const LaunchShape& shape, Stream, void** arguments) {
  const int at_once = resident(function, shape);
  const auto refuse = [&](const char* why) {
    throw std::runtime_error(
        text("CUDA: %s (%d x %d x %d blocks of %d threads and %d bytes, clusters of %d, of which "
             "%d can run at the same time)",
             why, shape.x, shape.y, shape.z, shape.threads, shape.shared_bytes, shape.cluster, at_once));
  };
  if (kernel) throw std::runtime_error("the emulator runs one kernel at a time");
  if (shape.x < 1 || shape.y < 1 || shape.z < 1 || shape.y > 65535 || shape.z > 65535 || shape.shared_bytes < 0 ||
      shape.x % std::max(shape.cluster, 1) || at_once == 0)
    refuse("invalid configuration argument");
  const int64_t clusters = int64_t(shape.x) * shape.y * shape.z / shape.cluster;
  if (shape.cooperative && clusters > at_once) refuse("too many blocks in cooperative launch");

  if (!pushes) {
    const auto reserve = [](size_t bytes) {
      void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("the emulator got no memory for pushes");
      return p;
    };
    push_order = static_cast<unsigned*>(reserve(sizeof(unsigned) * most_pushes));
    pushes = static_cast<Push*>(reserve(sizeof(Push) * most_pushes));
    for (unsigned i = 0; i < most_pushes; ++i) push_order[i] = i;
  }
  adopt_thread(main_context);
  const int wanted = int(std::min<int64_t>(clusters, at_once)) * shape.cluster * shape.threads;
  for (; fiber_count < wanted; ++fiber_count) {
    Fiber* const f = new Fiber;
    f->index = fiber_count;
    begin_context(f->context, fiber_body, f->index);
    idle_fibers[idle_count++] = f;
  }

  begin_launch(function, call, arguments);
  std::vector<int64_t> order(static_cast<size_t>(clusters));
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = int64_t(i);
    if (!in_order) std::swap(order[i], order[random_bits() % (i + 1)]);
  }
  // An ended cluster's memory serves the next, but under ThreadSanitizer, which would take that for an order.
  static std::vector<std::unique_ptr<Block>> idle_blocks;
  static std::vector<std::unique_ptr<Cluster>> idle_clusters;
  std::vector<Cluster*> running, ended_clusters;
  const auto recycle = [&](Cluster* c) {
    for (int i = 0; i < c->size; ++i) {
      std::free(c->block[i]->shared);
      idle_blocks.emplace_back(c->block[i]);
    }
    idle_clusters.emplace_back(c);
  };
  const auto begin_cluster = [&](int64_t which) {
    if (idle_clusters.empty()) idle_clusters.emplace_back(new Cluster);
    Cluster* const c = idle_clusters.back().release();
    idle_clusters.pop_back();
    running.push_back(c);
    c->size = c->live = c->running = 0;
    c->meeting.arrived = 0;
    for (int i = 0; i < shape.cluster; ++i) {
      if (idle_blocks.empty()) idle_blocks.emplace_back(new Block);
      Block* const b = idle_blocks.back().release();
      idle_blocks.pop_back();
      const int64_t at = which * shape.cluster + i;
      void* shared = nullptr;
      if (posix_memalign(&shared, 128, size_t(shape.shared_bytes)) != 0) std::abort();
      std::memset(shared, 0xff, size_t(shape.shared_bytes));
      b->shared = static_cast<char*>(shared);
      begin_block(*b, shape, int(at % shape.x), int(at / shape.x % shape.y), int(at / shape.x / shape.y), *c);
    }
  };
  const auto end_launch = [&] {
    for (Cluster* c : ended_clusters) recycle(c);
    kernel = nullptr;
  };
  try {
    do {
      if (failed) {
        tsan_acquire(&error_order);
        throw std::runtime_error(error);
      }
      if (ended) {
        Cluster* const c = ended->cluster;
        end_block(*ended);
        if (c->running == 0) {
          for (int i = 0; i < c->size; ++i) give_back_fibers(*c->block[i]);
          running.erase(std::find(running.begin(), running.end(), c));
          if (with_tsan)
            ended_clusters.push_back(c);
          else
            recycle(c);
        }
      }
      for (; !order.empty() && int(running.size()) < at_once; order.pop_back()) begin_cluster(order.back());
      blocks_to_come = order.size() * size_t(shape.cluster);
    } while (run_blocks());
  } catch (...) {
    // Fibers that stopped midway begin anew.
    for (Cluster* c : running) {
      for (int i = 0; i < c->size; ++i) {
        Block& b = *c->block[i];
        for (int t = 0; t < b.threads; ++t) {
          abandon(*b.fiber[t]);
          begin_context(b.fiber[t]->context, fiber_body, b.fiber[t]->index);
        }
        give_back_fibers(b);
      }
      ended_clusters.push_back(c);
    }
    tsan_acquire(&launch_end);
    end_launch();
    throw;
  }
  tsan_acquire(&launch_end);
  end_launch();
}

void set_zero(void* data, size_t bytes, Stream) { std::memset(data, 0, bytes); }

// Everything is done at once, in the order in which it is asked for.
Stream side_stream(int) { return nullptr; }
void follow(Stream, Stream) {}

void multiply(const Product& p, void*, Stream) {
  const bool half = p.a.dtype == Dtype::bf16 || p.a.dtype == Dtype::f16;
  if (p.a.dtype != p.b.dtype || (p.c_dtype != p.a.dtype && !(half && p.c_dtype == Dtype::f32)))
    throw std::runtime_error("CUDA: cublasGemmEx does not multiply these dtypes");
  if (p.a.dtype == Dtype::f64)
    multiply_as<double>(p);
  else
    multiply_as<float>(p);
}

}  // namespace cuda
}  // namespace fastrnn
