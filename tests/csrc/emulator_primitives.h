// What a thread can do, as emulator.h declares it: meet others, compute with its warp, exchange words with other
// blocks, push to those of its cluster. A part of emulator.cpp.
#pragma once

#include "emulator_products.h"
#include "emulator_scheduler.h"

namespace fastrnn {
namespace cuda {
namespace emulator {

namespace {
// --------------------------------------------------------------------------------------------------- threads that meet

[[noreturn]] __attribute__((noinline)) void report_places(const char* what, Site site, Site other) {
  fail_here(what, site, "others that it is to meet are at " + name_of(other));
}

FASTRNN_UNSEEN void wake(Block& block, Wait wait) {
  for (int i = 0; i < block.threads; ++i)
    if (block.fiber[i]->wait == wait) make_ready(block.fiber[i]);
}
// Opens the meeting where all that are left have arrived.
FASTRNN_UNSEEN void open_block(Block& b) {
  if (b.meeting.arrived == 0 || b.meeting.arrived < b.live) return;
  b.meeting.arrived = 0;
  ++b.meeting.turn;
  wake(b, Wait::block);
}
FASTRNN_UNSEEN void open_cluster(Cluster& c) {
  if (c.meeting.arrived == 0 || c.meeting.arrived < c.live) return;
  c.meeting.arrived = 0;
  ++c.meeting.turn;
  for (int i = 0; i < c.size; ++i) wake(*c.block[i], Wait::cluster);
}

FASTRNN_UNSEEN void meet(Meeting& m, Wait wait, const char* what, Site site) {
  Fiber& f = *current;
  if (m.arrived == 0)
    m.site = site;
  else if (!same(m.site, site))
    report_places(what, site, m.site);
  char* const order = &m.order[m.turn & 1];
  tsan_release(order);
  polls = 0;
  ++m.arrived;
  f.wait = wait;
  f.what = what;
  f.site = site;
  if (wait == Wait::block)
    open_block(*f.block);
  else
    open_cluster(*f.block->cluster);
  reschedule();
  tsan_acquire(order);
}

[[noreturn]] __attribute__((noinline)) void report_lanes(const Warp& w, const char* what, Site site) {
  if (w.lanes < warp_size) fail_here(what, site, text("its warp has %d threads, not %d", w.lanes, warp_size));
  if (w.exited) fail_here(what, site, text("the warp is divided: %d of its threads have returned", w.exited));
  fail_here(
      what, site,
      std::string("the warp is divided: others are in ") + collective_names[int(w.kind)] + " at " + name_of(w.site));
}

// Row-major factors out of the lanes' registers, and the result into them (PTX: mma.m16n8k16, mma.m16n8k8).
FASTRNN_UNSEEN float of_bits(Collective kind, uint32_t bits) {
  return kind == Collective::bf16 ? widen(Bf16{uint16_t(bits)}) : widen(F16{uint16_t(bits)});
}
FASTRNN_UNSEEN void multiply_lanes(Warp& w) {
  float a[16 * 16], b[16 * 8], c[16 * 8];
  const int depth = w.kind == Collective::tf32 ? 8 : 16;
  for (int l = 0; l < warp_size; ++l) {
    const int row = l / 4, k = l % 4;
    for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + 2 * k + i % 2] = w.c[l][i];
    if (w.kind == Collective::tf32) {
      for (int i = 0; i < 4; ++i) a[(row + i % 2 * 8) * depth + k + i / 2 * 4] = bits_as<float>(w.a[l][i]);
      for (int i = 0; i < 2; ++i) b[(k + i * 4) * 8 + row] = bits_as<float>(w.b[l][i]);
      continue;
    }
    for (int i = 0; i < 8; ++i)
      a[(row + i / 2 % 2 * 8) * depth + 2 * k + i % 2 + i / 4 * 8] = of_bits(w.kind, w.a[l][i / 2] >> i % 2 * 16);
    for (int i = 0; i < 4; ++i) b[(2 * k + i % 2 + i / 2 * 8) * 8 + row] = of_bits(w.kind, w.b[l][i / 2] >> i % 2 * 16);
  }
  multiply_one_tile(depth, a, b, c);
  for (int l = 0; l < warp_size; ++l)
    for (int i = 0; i < 4; ++i) w.c[l][i] = c[(l / 4 + i / 2 * 8) * 8 + 2 * (l % 4) + i % 2];
}

// The lane has given what it gives; returns when all have and the last has worked it out.
FASTRNN_UNSEEN void gather(Warp& w, Collective kind, Site site) {
  Fiber& f = *current;
  if (w.lanes < warp_size || w.exited || (w.arrived && (w.kind != kind || !same(w.site, site))))
    report_lanes(w, collective_names[int(kind)], site);
  w.kind = kind;
  w.site = site;
  polls = 0;
  f.wait = Wait::lanes;
  f.what = collective_names[int(kind)];
  f.site = site;
  if (++w.arrived == warp_size) {
    w.arrived = 0;
    if (kind == Collective::shuffle)
      for (int l = 0; l < warp_size; ++l) w.taken[l] = w.given[l ^ w.mask[l]];
    else
      multiply_lanes(w);
    for (int l = 0; l < warp_size; ++l) make_ready(w.fiber[l]);
  }
  reschedule();
}
FASTRNN_UNSEEN Warp& warp_of(Fiber& f) { return f.block->warp[f.thread / warp_size]; }

}  // namespace

// ----------------------------------------------------------------------------------------------- what a thread can do

FASTRNN_UNSEEN void sync_block(const char* file, int line) {
  meet(current->block->meeting, Wait::block, "sync_block", {file, line});
}
FASTRNN_UNSEEN void sync_cluster(const char* file, int line) {
  meet(current->block->cluster->meeting, Wait::cluster, "sync_cluster", {file, line});
}

FASTRNN_UNSEEN float shuffle_xor(float x, int mask, const char* file, int line) {
  if (mask < 0 || mask >= warp_size) fail_here("shuffle_xor", {file, line}, text("the mask is %d", mask));
  Warp& w = warp_of(*current);
  const int lane = current->thread % warp_size;
  w.given[lane] = x;
  w.mask[lane] = mask;
  gather(w, Collective::shuffle, {file, line});
  return w.taken[lane];
}

FASTRNN_UNSEEN void multiply_tile(Factor factor, float* c, const uint32_t* a, const uint32_t* b, const char* file,
                                  int line) {
  Warp& w = warp_of(*current);
  const int lane = current->thread % warp_size;
  if (factor == Factor::tf32)
    for (int i = 0; i < 6; ++i) {
      const uint32_t bits = i < 4 ? a[i] : b[i - 4];
      if (bits & 0x1fff && (bits & 0x7fffffff) <= 0x7f800000)
        fail_here("multiply_tile_tf32", {file, line}, text("register %d is not rounded by to_tf32(): %08x", i, bits));
    }
  w.c[lane] = c;
  w.a[lane] = a;
  w.b[lane] = b;
  gather(w,
         factor == Factor::bf16  ? Collective::bf16
         : factor == Factor::f16 ? Collective::f16
                                 : Collective::tf32,
         {file, line});
}

float to_tf32(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), size = bits & 0x7fffffff;
  if (size > 0x7f800000) return bits_as<float>(uint32_t(0x7fffffff));
  if (size == 0x7f800000) return x;
  return bits_as<float>((bits + 0x1000) & 0xffffe000);
}

// The accesses themselves ThreadSanitizer is to see.
namespace {
__attribute__((noinline)) void store_release(uint32_t* at, uint32_t value) {
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
__attribute__((noinline)) uint32_t load_acquire(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
__attribute__((noinline)) void load_relaxed(const Quad* at, Quad& q) {
  for (int i = 0; i < 4; ++i) q.word[i] = __atomic_load_n(&at->word[i], __ATOMIC_RELAXED);
}
__attribute__((noinline)) void store_relaxed(Quad* at, const Quad& q) {
  for (int i = 0; i < 4; ++i) __atomic_store_n(&at->word[i], q.word[i], __ATOMIC_RELAXED);
}
// Unlike tsan_release() it forgets who has released there before.
__attribute__((noinline)) void publish(char* order) { __atomic_store_n(order, 1, __ATOMIC_RELEASE); }

FASTRNN_UNSEEN void check_aligned(const void* at, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(at) % bytes)
    fail_here(what, site, text("%p is not a multiple of %zu bytes", at, bytes));
}
FASTRNN_UNSEEN void note(const char* what, Site site) {
  current->what = what;
  current->site = site;
}
}  // namespace

FASTRNN_UNSEEN void release_word(uint32_t* at, uint32_t value, const char* file, int line) {
  check_aligned(at, 4, "release_word", {file, line});
  note("release_word", {file, line});
  give_way();
  store_release(at, value);
  changed(at);
}
FASTRNN_UNSEEN uint32_t acquire_word(const uint32_t* at, const char* file, int line) {
  check_aligned(at, 4, "acquire_word", {file, line});
  note("acquire_word", {file, line});
  give_way();
  watch(at);
  return load_acquire(at);
}
FASTRNN_UNSEEN void while_waiting(const char* file, int line) {
  Fiber& f = *current;
  note("while_waiting", {file, line});
  bool news = f.watches == 0;
  for (uint64_t left = f.watches; left; left &= left - 1) news = news || written[__builtin_ctzll(left)] > f.since;
  if (news) {
    f.watches = 0;
    give_way();
    return;
  }
  f.wait = Wait::word;
  sleepers[sleeper_count++] = &f;
  sleepers_watch |= f.watches;
  reschedule();
}
FASTRNN_UNSEEN Quad load_fresh(const Quad* at, const char* file, int line) {
  check_aligned(at, 16, "load_fresh", {file, line});
  note("load_fresh", {file, line});
  if (!in_order && random_bits() % 8 == 0) give_way();
  watch(at);
  Quad q;
  if (with_tsan && fresh_may_race) {
    load_relaxed(at, q);
  } else {
    tsan_read16(const_cast<Quad*>(at), __builtin_return_address(0));
    for (int i = 0; i < 4; ++i) q.word[i] = at->word[i];
  }
  return q;
}
FASTRNN_UNSEEN void store_fresh(Quad* at, Quad q, const char* file, int line) {
  check_aligned(at, 16, "store_fresh", {file, line});
  note("store_fresh", {file, line});
  if (!in_order && random_bits() % 8 == 0) give_way();
  if (with_tsan && fresh_may_race) {
    store_relaxed(at, q);
  } else {
    tsan_write16(at, __builtin_return_address(0));
    for (int i = 0; i < 4; ++i) at->word[i] = q.word[i];
  }
  changed(at);
}

// ------------------------------------------------------------------------------------------------ barriers and pushes

namespace {
// Where `at` is in the block's shared memory.
FASTRNN_UNSEEN ptrdiff_t offset_of(const void* at, ptrdiff_t bytes, const char* what, Site site) {
  const Block& b = *current->block;
  const ptrdiff_t offset = static_cast<const char*>(at) - b.shared;
  if (offset < 0 || offset + bytes > b.shared_bytes || offset % bytes)
    fail_here(
        what, site,
        text("shared + %td is no place for %td bytes in %d bytes of shared memory", offset, bytes, b.shared_bytes));
  return offset;
}
FASTRNN_UNSEEN Barrier& barrier_at(Block& b, ptrdiff_t offset, const char* what, Site site, void* from) {
  uint64_t* const word = reinterpret_cast<uint64_t*>(b.shared + offset);
  tsan_read8(word, from);
  const uint64_t which = *word ^ barrier_mark;
  if (which >= uint64_t(b.barrier_count) || b.barriers[which].at != b.shared + offset)
    fail_here(what, site,
              text("no barrier has been made at shared + %td of ", offset) + name_of(b) +
                  ", or something was written over it");
  return b.barriers[which];
}
}  // namespace

FASTRNN_UNSEEN void make_barrier(uint64_t* barrier, const char* file, int line) {
  const ptrdiff_t offset = offset_of(barrier, 8, "make_barrier", {file, line});
  Block& b = *current->block;
  for (int i = 0; i < b.barrier_count; ++i)
    if (b.barriers[i].at == b.shared + offset) fail_here("make_barrier", {file, line}, "there is one already");
  if (b.barrier_count == most_barriers)
    fail_here("make_barrier", {file, line}, text("the emulator has %d for a block", most_barriers));
  Barrier& made = b.barriers[b.barrier_count];
  made.at = b.shared + offset;
  made.pending = 1;
  made.bytes = 0;
  made.phase = 0;
  if (!made.courier) made.courier = tsan_thread();
  tsan_write8(barrier, __builtin_return_address(0));
  *barrier = barrier_mark | uint64_t(b.barrier_count++);
}

FASTRNN_UNSEEN void expect_bytes(uint64_t* barrier, uint32_t bytes, const char* file, int line) {
  const Site site{file, line};
  const ptrdiff_t offset = offset_of(barrier, 8, "expect_bytes", site);
  note("expect_bytes", site);
  give_way();
  Block& block = *current->block;
  Barrier& b = barrier_at(block, offset, "expect_bytes", site, __builtin_return_address(0));
  if (b.pending == 0) fail_here("expect_bytes", site, "for the second time in one phase");
  tsan_release(&b.order[b.phase & 1]);
  b.pending = 0;
  b.bytes += bytes;
  if (bytes >= 1u << 20 || b.bytes >= 1 << 20)
    fail_here("expect_bytes", site, text("%lld bytes are more than a barrier counts", static_cast<long long>(b.bytes)));
  polls = 0;
  complete_phase(block, b);
}

FASTRNN_UNSEEN void wait_for_bytes(uint64_t* barrier, uint32_t parity, const char* file, int line) {
  const Site site{file, line};
  const ptrdiff_t offset = offset_of(barrier, 8, "wait_for_bytes", site);
  if (parity > 1) fail_here("wait_for_bytes", site, text("the parity is %u", parity));
  Fiber& f = *current;
  note("wait_for_bytes", site);
  give_way();
  Barrier& b = barrier_at(*f.block, offset, "wait_for_bytes", site, __builtin_return_address(0));
  while ((b.phase & 1) == parity) {
    note("wait_for_bytes", site);
    f.wait = Wait::bytes;
    f.barrier = &b;
    reschedule();
  }
  tsan_acquire(&b.order[parity]);
}

FASTRNN_UNSEEN void push(Quad* at, Quad q, uint64_t* barrier, int rank, const char* file, int line) {
  const Site site{file, line};
  const ptrdiff_t to = offset_of(at, 16, "push", site), counted = offset_of(barrier, 8, "push", site);
  note("push", site);
  Cluster& c = *current->block->cluster;
  if (rank < 0 || rank >= c.size) fail_here("push", site, text("to block %d of a cluster of %d", rank, c.size));
  if (!in_order && random_bits() % 8 == 0) give_way();
  Block& block = *c.block[rank];
  if (block.live == 0) fail_here("push", site, "to " + name_of(block) + ", which has ended");
  Barrier& b = barrier_at(block, counted, "push", site, __builtin_return_address(0));
  if (push_count == most_pushes) fail_here("push", site, text("%u others are on their way", most_pushes));
  Push& p = pushes[push_order[push_count++]];
  p.q = q;
  p.to = &block;
  p.at = block.shared + to;
  p.barrier = &b;
  p.from = current;
  // Whoever touches the place must be ordered with this thread, and is with who waits for the barrier.
  tsan_write16(p.at, __builtin_return_address(0));
  if (with_tsan) publish(&p.order);
}

}  // namespace emulator
}  // namespace cuda
}  // namespace fastrnn
