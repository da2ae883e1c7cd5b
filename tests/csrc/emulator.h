// The names of csrc/cuda/device.cuh on a CPU: kernels compile with g++ as they are, and every thread of theirs is a
// fiber of one operating system thread (emulator.cpp). Who runs next is drawn at random at every point where threads
// can notice each other, so that many seeds see many interleavings; what can go wrong on a card and would be silent
// there is an error: threads of a warp that part, barriers that not all reach, waits without end, pushes to the wrong
// place or at the wrong time. Under -fsanitize=thread each GPU thread is a thread of its own, ordered with others by
// nothing but what orders them in CUDA.
//
// Warp collectives pass values, and order nothing: CUDA's shuffles and products are no memory barriers.
//
// One OS thread launches at a time. Sanitized builds need nothing but the sanitizer's flag; ThreadSanitizer takes a
// millisecond to make a thread, once, so its tests better keep to a few hundred of them at the same time.
#pragma once

#include <cstdint>

#include "../../csrc/cuda/value.cuh"

#define FASTRNN_KERNEL(threads) void
#define FASTRNN_DEVICE static inline
// Where in the kernel: for the text of errors, and to see that threads meet at the same place.
#define FASTRNN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fastrnn {
namespace cuda {

struct alignas(16) Quad {
  uint32_t word[4];
};

namespace emulator {

// What the card is, and how threads are scheduled. Read at each launch.
struct Settings {
  int arch = 90;
  int processors = 16;
  int blocks_per_processor = 1;
  int shared_bytes = 227 << 10;  // that a block can have
  int largest_cluster = 16;
  // Each launch draws from where the one before it has left off; setting another seed begins anew.
  uint64_t seed = 1;
  bool in_order = false;  // blocks and their threads in turn, nothing is late
  // To ThreadSanitizer, load_fresh() and store_fresh() are plain accesses, which flags and barriers must order, unless
  // this says that they are relaxed atomics, which may race: for kernels that poll the data itself.
  bool fresh_may_race = false;
};
Settings& settings();
// Switches between fibers since the program began.
uint64_t switches();

// The thread that runs now.
struct Identity {
  int thread, threads;
  int x, y, z, grid_x;
  int rank;  // in the cluster
  char* shared;
};
extern const Identity* self;

// What device.cuh says of the names without the class of storage.
void sync_block(const char* file, int line);
void sync_cluster(const char* file, int line);
float shuffle_xor(float x, int mask, const char* file, int line);
enum class Factor { bf16, f16, tf32 };
void multiply_tile(Factor factor, float* c, const uint32_t* a, const uint32_t* b, const char* file, int line);
float to_tf32(float x);
void release_word(uint32_t* at, uint32_t value, const char* file, int line);
uint32_t acquire_word(const uint32_t* at, const char* file, int line);
void while_waiting(const char* file, int line);
Quad load_fresh(const Quad* at, const char* file, int line);
void store_fresh(Quad* at, Quad q, const char* file, int line);
void make_barrier(uint64_t* barrier, const char* file, int line);
void expect_bytes(uint64_t* barrier, uint32_t bytes, const char* file, int line);
void wait_for_bytes(uint64_t* barrier, uint32_t parity, const char* file, int line);
void push(Quad* at, Quad q, uint64_t* barrier, int rank, const char* file, int line);

}  // namespace emulator

FASTRNN_DEVICE int thread_index() { return emulator::self->thread; }
FASTRNN_DEVICE int thread_count() { return emulator::self->threads; }
FASTRNN_DEVICE int block_x() { return emulator::self->x; }
FASTRNN_DEVICE int block_y() { return emulator::self->y; }
FASTRNN_DEVICE int block_z() { return emulator::self->z; }
FASTRNN_DEVICE int grid_x() { return emulator::self->grid_x; }
FASTRNN_DEVICE void forget(int&) {}
FASTRNN_DEVICE char* shared_memory() { return emulator::self->shared; }
FASTRNN_DEVICE void sync_block(FASTRNN_SITE) { emulator::sync_block(file, line); }
FASTRNN_DEVICE float shuffle_xor(float x, int mask, FASTRNN_SITE) { return emulator::shuffle_xor(x, mask, file, line); }

FASTRNN_DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16, FASTRNN_SITE) {
  emulator::multiply_tile(emulator::Factor::bf16, c, a, b, file, line);
}
FASTRNN_DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F16, FASTRNN_SITE) {
  emulator::multiply_tile(emulator::Factor::f16, c, a, b, file, line);
}
FASTRNN_DEVICE void multiply_tile_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTRNN_SITE) {
  emulator::multiply_tile(emulator::Factor::tf32, c, a, b, file, line);
}
FASTRNN_DEVICE float to_tf32(float x) { return emulator::to_tf32(x); }

FASTRNN_DEVICE void release_word(uint32_t* at, uint32_t value, FASTRNN_SITE) {
  emulator::release_word(at, value, file, line);
}
FASTRNN_DEVICE uint32_t acquire_word(const uint32_t* at, FASTRNN_SITE) {
  return emulator::acquire_word(at, file, line);
}
FASTRNN_DEVICE void while_waiting(FASTRNN_SITE) { emulator::while_waiting(file, line); }
FASTRNN_DEVICE Quad load_fresh(const Quad* at, FASTRNN_SITE) { return emulator::load_fresh(at, file, line); }
FASTRNN_DEVICE void copy_fresh(Quad* to, const Quad* from, FASTRNN_SITE) {
  *to = emulator::load_fresh(from, file, line);
}
FASTRNN_DEVICE void wait_for_copies() {}
FASTRNN_DEVICE void store_fresh(Quad* at, Quad q, FASTRNN_SITE) { emulator::store_fresh(at, q, file, line); }

constexpr bool has_clusters = true;
FASTRNN_DEVICE int cluster_rank() { return emulator::self->rank; }
FASTRNN_DEVICE void sync_cluster(FASTRNN_SITE) { emulator::sync_cluster(file, line); }
FASTRNN_DEVICE void make_barrier(uint64_t* barrier, FASTRNN_SITE) { emulator::make_barrier(barrier, file, line); }
FASTRNN_DEVICE void expect_bytes(uint64_t* barrier, uint32_t bytes, FASTRNN_SITE) {
  emulator::expect_bytes(barrier, bytes, file, line);
}
FASTRNN_DEVICE void wait_for_bytes(uint64_t* barrier, uint32_t parity, FASTRNN_SITE) {
  emulator::wait_for_bytes(barrier, parity, file, line);
}
FASTRNN_DEVICE void push(Quad* at, Quad q, uint64_t* barrier, int rank, FASTRNN_SITE) {
  emulator::push(at, q, barrier, rank, file, line);
}

}  // namespace cuda
}  // namespace fastrnn
