// The emulator's scheduler: what it knows of threads, warps, blocks and clusters, who of them runs next, and how it
// says that something is wrong. A part of emulator.cpp.
//
// All resident blocks of a launch run at the same time, interleaved as the seed has it: threads drawn evenly, or in
// bursts of one block or warp, or with one block before or behind all others, for that is how they get far apart.
// Pushes are on their way for a random time. A loop that polls words sleeps in while_waiting() until somebody writes
// one of those it has looked at, so that when all sleep nothing can go on: that is reported, with who waits for what.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/runtime.h"
#include "emulator.h"
#include "emulator_fiber.h"

namespace fastrnn {
namespace cuda {
namespace emulator {

namespace {

constexpr int warp_size = 32, most_threads = 1024, most_blocks = 16, most_barriers = 32;
// ThreadSanitizer knows 8128 threads.
constexpr int most_fibers = with_tsan ? 7680 : 1 << 15;
constexpr uint64_t most_polls = uint64_t(1) << 24;

struct Site {
  const char* file = "";
  int line = 0;
};
FASTRNN_UNSEEN bool same(Site a, Site b) {
  if (a.line != b.line) return false;
  const char *x = a.file, *y = b.file;
  while (x != y && *x && *x == *y) ++x, ++y;
  return x == y || *x == *y;
}

enum class Wait { nothing, block, cluster, lanes, word, bytes };
struct Block;
struct Barrier;

struct Fiber : Identity {
  Context context;
  int index = 0;
  Block* block = nullptr;
  bool done = true;
  Wait wait = Wait::nothing;
  const char* what = "";
  Site site;
  Barrier* barrier = nullptr;  // that it waits for
  // Words that it has looked at since it last waited: where, as a mask of hashes, and since when.
  const void* watched = nullptr;  // the last
  uint64_t watches = 0, since = 0;
};

// Where threads wait for each other: of a block, or of a cluster.
struct Meeting {
  int arrived = 0;
  unsigned turn = 0;
  Site site;
  char order[2] = {};  // happens-before, of even and odd turns
};

enum class Collective { shuffle, bf16, f16, tf32 };
const char* const collective_names[] = {"shuffle_xor", "multiply_tile (bf16)", "multiply_tile (f16)",
                                        "multiply_tile_tf32"};
struct Warp {
  int lanes = 0, arrived = 0, exited = 0;
  Collective kind = Collective::shuffle;
  Site site;
  Fiber* fiber[warp_size];
  float given[warp_size], taken[warp_size];
  int mask[warp_size];
  float* c[warp_size];
  const uint32_t *a[warp_size], *b[warp_size];
};

// An mbarrier of count 1. Its word in shared memory says which of the block's it is.
struct Barrier {
  char* at = nullptr;
  int pending = 1;
  int64_t bytes = 0;
  uint64_t phase = 0;
  void* courier = nullptr;  // ThreadSanitizer's thread, which has seen what pushed and nothing else
  char order[2] = {};
};
constexpr uint64_t barrier_mark = 0xba441e4500000000;

// Of a block and a cluster: what fibers read, in arrays of fixed places, for ThreadSanitizer must not see it.
struct Cluster {
  Block* block[most_blocks];
  int size = 0, live = 0, running = 0;  // blocks, threads and blocks that have not ended
  Meeting meeting;
};

struct Block {
  int x = 0, y = 0, z = 0, rank = 0, threads = 0, live = 0;
  Cluster* cluster = nullptr;
  char* shared = nullptr;
  int shared_bytes = 0;
  char start = 0;
  Meeting meeting;
  Fiber* fiber[most_threads];
  Warp warp[most_threads / warp_size];
  Barrier barriers[most_barriers];
  int barrier_count = 0;
  Fiber* ready[most_threads];  // a ring: those that can run
  unsigned head = 0, count = 0;
};

struct Push {
  Quad q;
  Block* to;
  char* at;
  Barrier* barrier;
  const Fiber* from;
  char order;
};
constexpr unsigned most_pushes = 1 << 20;

// ------------------------------------------------------------------------------------------------- what is going on

Context main_context;
Fiber* current = nullptr;  // null: launch() itself
uint64_t random_state = 0, seeded_with = 0, switch_count = 0;
bool seeded = false;

// Of the launch that runs.
const void* kernel = nullptr;
KernelCall kernel_call = nullptr;
void** kernel_arguments = nullptr;
Block* ended = nullptr;  // a block that has, until launch() sees it
char launch_end = 0, error_order = 0;
std::string error;
bool failed = false;
size_t blocks_to_come = 0;

Fiber* idle_fibers[most_fibers];
int fiber_count = 0, idle_count = 0;
Block* active[most_fibers];  // blocks that run
unsigned active_count = 0, ready_count = 0, turn = 0, turn_left = 0;

// How this launch schedules: change of block once in so many times, first and last of all blocks or none, in a block
// mostly who has become ready last (so that a warp gets far ahead of others), a push delivered once in so many times.
bool in_order = false, newest_first = false, fresh_may_race = false;
unsigned stay = 0, deliver_once_in = 1;
int favourite = -1, laggard = -1;

Push* pushes = nullptr;  // most_pushes of them
unsigned* push_order = nullptr;
unsigned push_count = 0;

// Sleepers in while_waiting(), and when words were last written, by hash.
Fiber* sleepers[most_fibers];
unsigned sleeper_count = 0;
uint64_t sleepers_watch = 0, now = 1, written[64] = {}, polls = 0;

FASTRNN_UNSEEN uint64_t random_bits() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}
FASTRNN_UNSEEN unsigned random_below(uint64_t bits, unsigned n) { return unsigned((bits & 0xffffffff) * n >> 32); }

// ----------------------------------------------------------------------------------------------------------- errors

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[600];
  va_list values;
  va_start(values, format);
  vsnprintf(buffer, sizeof buffer, format, values);
  va_end(values);
  return buffer;
}
std::string name_of(const Block& b) { return text("block (%d, %d, %d)", b.x, b.y, b.z); }
std::string name_of(const Fiber& f) { return text("thread %d of ", f.thread) + name_of(*f.block); }
std::string name_of(Site s) {
  const char* const slash = strrchr(s.file, '/');
  return text("%s:%d", slash ? slash + 1 : s.file, s.line);
}

// Ends the launch, by way of fiber_body().
[[noreturn]] __attribute__((noinline)) void fail(const std::string& what) { throw std::runtime_error(what); }
[[noreturn]] void fail_here(const char* what, Site site, const std::string& why) {
  fail(std::string(what) + " at " + name_of(site) + " by " + name_of(*current) + ": " + why);
}

std::string state_of(const Fiber& f) {
  std::string s = std::string(f.what) + " at " + name_of(f.site);
  if (f.wait == Wait::word)
    s += text(" of word %p, which is %u", f.watched, *static_cast<const volatile uint32_t*>(f.watched));
  if (f.wait == Wait::bytes) {
    const Barrier& b = *f.barrier;
    s +=
        text(" for the end of a phase of parity %d: the barrier at shared + %td is in phase %llu, %lld bytes to come%s",
             int(b.phase & 1), b.at - f.shared, static_cast<unsigned long long>(b.phase),
             static_cast<long long>(b.bytes), b.pending ? ", none expected yet by anybody" : "");
  }
  return s;
}

// Who waits for what, threads that wait alike together.
std::string deadlock() {
  std::string s = "deadlock: no thread can go on";
  for (unsigned i = 0; i < active_count; ++i) {
    std::map<std::string, std::vector<int>> groups;
    const Block& block = *active[i];
    for (int t = 0; t < block.threads; ++t)
      if (!block.fiber[t]->done) groups[state_of(*block.fiber[t])].push_back(t);
    if (groups.empty()) continue;
    s += "\n" + name_of(block) + ":";
    for (const auto& group : groups) {
      const std::vector<int>& t = group.second;
      s += "\n  threads";
      size_t ranges = 0;
      for (size_t from = 0, to; from < t.size(); from = to) {
        for (to = from + 1; to < t.size() && t[to] == t[to - 1] + 1; ++to) {
        }
        if (++ranges > 8) {
          s += text(" ... (%zu in all)", t.size());
          break;
        }
        s += to - from > 1 ? text(" %d-%d", t[from], t[to - 1]) : text(" %d", t[from]);
      }
      s += ": " + group.first;
    }
    for (int w = 0; w * warp_size < block.threads; ++w)
      if (block.warp[w].arrived)
        s += text("\n  warp %d is divided: %d of %d lanes are in ", w, block.warp[w].arrived, block.warp[w].lanes) +
             collective_names[int(block.warp[w].kind)] + " at " + name_of(block.warp[w].site);
  }
  if (blocks_to_come) s += text("\n%zu blocks have not begun, for want of room", blocks_to_come);
  return s;
}

// -------------------------------------------------------------------------------------------------------- scheduling

FASTRNN_UNSEEN void make_ready(Fiber* f) {
  Block& b = *f->block;
  f->wait = Wait::nothing;
  b.ready[(b.head + b.count++) % most_threads] = f;
  ++ready_count;
}

FASTRNN_UNSEEN Fiber* take(Block& b, uint64_t bits) {
  if (newest_first && bits >> 58) {
    --ready_count;
    return b.ready[(b.head + --b.count) % most_threads];
  }
  if (!in_order) {
    const unsigned other = (b.head + random_below(bits, b.count)) % most_threads;
    Fiber* const f = b.ready[other];
    b.ready[other] = b.ready[b.head];
    b.ready[b.head] = f;
  }
  Fiber* const f = b.ready[b.head];
  b.head = (b.head + 1) % most_threads;
  --b.count;
  --ready_count;
  return f;
}

// The next fiber to run, no longer among the ready ones; null where none is ready.
FASTRNN_UNSEEN Fiber* pick() {
  if (ready_count == 0) return nullptr;
  if (turn >= active_count) turn = turn_left = 0;
  if (in_order) {
    while (turn_left == 0 || active[turn]->count == 0) {
      turn = (turn + 1) % active_count;
      turn_left = active[turn]->count;
    }
    --turn_left;
    return take(*active[turn], 0);
  }
  const uint64_t bits = random_bits(), more = bits >> 32;
  if ((more & 0xfff) == 0 && (favourite >= 0 || laggard >= 0)) {
    const int block = int(random_below(random_bits(), active_count));
    (favourite >= 0 ? favourite : laggard) = block;
  }
  if (favourite >= 0 && unsigned(favourite) < active_count && active[favourite]->count && (more >> 12 & 63)) {
    turn = unsigned(favourite);
  } else if (active[turn]->count == 0 || (more >> 12 & stay) == 0) {
    turn = random_below(random_bits(), active_count);
    const bool avoid =
        laggard >= 0 && unsigned(laggard) < active_count && ready_count > active[laggard]->count && (more >> 12 & 63);
    while (active[turn]->count == 0 || (avoid && turn == unsigned(laggard)))
      turn = turn + 1 == active_count ? 0 : turn + 1;
  }
  return take(*active[turn], bits);
}

// What is known of a barrier after a change: where a phase is complete, those go on that wait for it.
FASTRNN_UNSEEN void complete_phase(Block& block, Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = 1;
  for (int i = 0; i < block.threads; ++i)
    if (block.fiber[i]->wait == Wait::bytes && block.fiber[i]->barrier == &b) make_ready(block.fiber[i]);
}

// Lets a random one of the pushes that are on their way arrive: its data first, then its bytes at the barrier.
FASTRNN_UNSEEN void deliver(uint64_t bits) {
  const unsigned which = in_order ? 0 : random_below(bits, push_count);
  const unsigned record = push_order[which];
  push_order[which] = push_order[--push_count];
  push_order[push_count] = record;
  Push& p = pushes[record];
  Barrier& b = *p.barrier;
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(p.at)[i] = p.q.word[i];
  if (with_tsan) {
    void* const here = tsan_self();
    tsan_become(b.courier);
    tsan_acquire(&p.order);
    tsan_release(&b.order[b.phase & 1]);
    tsan_become(here);
  }
  b.bytes -= sizeof(Quad);
  polls = 0;
  complete_phase(*p.to, b);
}

FASTRNN_UNSEEN void run(Fiber* f, Context& from) {
  ++switch_count;
  current = f;
  self = f;
  switch_context(from, f->context);
}

[[noreturn]] __attribute__((noinline)) void report_deadlock() { fail(deadlock()); }
[[noreturn]] __attribute__((noinline)) void report_polls(const Fiber& f) {
  fail(text("%llu polls and nothing else has happened; the last: ", static_cast<unsigned long long>(most_polls)) +
       f.what + " at " + name_of(f.site) + " by " + name_of(f) + ", of " + text("word %p", f.watched));
}

// The current fiber waits or is ready; goes on when it is its turn.
FASTRNN_UNSEEN void reschedule() {
  Fiber* const here = current;
  const uint64_t bits = push_count ? random_bits() : 0;
  if (push_count && (in_order || random_below(bits >> 32, deliver_once_in) == 0)) deliver(bits);
  Fiber* next = pick();
  while (!next && push_count) {
    deliver(random_bits());
    next = pick();
  }
  if (!next) report_deadlock();
  if (next != here) run(next, here->context);
}
FASTRNN_UNSEEN void give_way() {
  make_ready(current);
  reschedule();
}

// Somebody has written to a word.
FASTRNN_UNSEEN unsigned hash_of(const void* at) {
  return unsigned((reinterpret_cast<uintptr_t>(at) >> 4) * 0x9e3779b97f4a7c15 >> 58);
}
FASTRNN_UNSEEN void changed(const void* at) {
  const unsigned hash = hash_of(at);
  written[hash] = ++now;
  polls = 0;
  if ((sleepers_watch >> hash & 1) == 0) return;
  sleepers_watch = 0;
  for (unsigned i = 0; i < sleeper_count;) {
    Fiber* const f = sleepers[i];
    if (f->watches >> hash & 1) {
      sleepers[i] = sleepers[--sleeper_count];
      f->watches = 0;
      make_ready(f);
    } else {
      sleepers_watch |= f->watches;
      ++i;
    }
  }
}
FASTRNN_UNSEEN void watch(const void* at) {
  Fiber& f = *current;
  if (!f.watches) f.since = now;
  f.watches |= uint64_t(1) << hash_of(at);
  f.watched = at;
  if (++polls > most_polls) report_polls(f);
}

}  // namespace
}  // namespace emulator
}  // namespace cuda
}  // namespace fastrnn
