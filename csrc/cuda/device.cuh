// What the kernels need of a GPU beyond C++: who a thread is, barriers, shuffles, tensor cores, flags between blocks,
// pushes within a cluster. The names are the only ones that kernels use, so that tests/csrc/emulator.h can stand in for
// a card: there every thread is a fiber, and the kernels' own sources run under g++ and its sanitizers.
//
// Fragments of tensor-core products lie in registers as PTX lays them out (mma.m16n8k16, m16n8k8): for lane l, rows l /
// 4 and l / 4 + 8 of A and of the result, columns 2 (l % 4) and one more of the result, column l / 4 of B.
#pragma once

#include "value.cuh"

#ifndef __CUDACC__
#include "../../tests/csrc/emulator.h"
#else

#define FASTRNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FASTRNN_DEVICE static __device__ __forceinline__

namespace fastrnn {
namespace cuda {

// 16 bytes that are loaded, stored and sent as one.
struct alignas(16) Quad {
  uint32_t word[4];
};

FASTRNN_DEVICE int thread_index() { return int(threadIdx.x); }
FASTRNN_DEVICE int thread_count() { return int(blockDim.x); }
FASTRNN_DEVICE int block_x() { return int(blockIdx.x); }
FASTRNN_DEVICE int block_y() { return int(blockIdx.y); }
FASTRNN_DEVICE int block_z() { return int(blockIdx.z); }
FASTRNN_DEVICE int grid_x() { return int(gridDim.x); }

FASTRNN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// The block's dynamic shared memory.
FASTRNN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char fastrnn_shared[];
  return fastrnn_shared;
}
FASTRNN_DEVICE void sync_block() { __syncthreads(); }
FASTRNN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Makes x look new to the compiler, so that it does not compute ahead of a loop, and keep in registers that the weights
// need, whatever follows from x alone.
FASTRNN_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }

// result += A B, 16 x 8 x 16, of bfloat16 or float16, sums in float32.
FASTRNN_DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FASTRNN_DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same, 16 x 8 x 8, of float32 bits rounded by to_tf32().
FASTRNN_DEVICE void multiply_tile_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// To the nearest value of 10 bits of mantissa, ties away from zero.
FASTRNN_DEVICE float to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// ------------------------------------------------------------------------------------------- between blocks of a grid

// Release and acquire of a word of global memory, for the whole device. What the block's other threads wrote before a
// sync_block() is released with it.
FASTRNN_DEVICE void release_word(uint32_t* at, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
FASTRNN_DEVICE uint32_t acquire_word(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// One round of a loop that waits for another block.
FASTRNN_DEVICE void while_waiting() {}
// What other blocks write while this kernel runs: past the caches that are not kept alike.
FASTRNN_DEVICE Quad load_fresh(const Quad* at) {
  Quad q;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
               : "l"(at)
               : "memory");
  return q;
}
// The same, to shared memory and without a register: there for the thread itself after its wait_for_copies().
FASTRNN_DEVICE void copy_fresh(Quad* to, const Quad* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
FASTRNN_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
FASTRNN_DEVICE void store_fresh(Quad* at, Quad q) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(q.word[0]), "r"(q.word[1]),
               "r"(q.word[2]), "r"(q.word[3])
               : "memory");
}

// --------------------------------------------------------------------------------------------------- within a cluster

// A barrier in shared memory that counts bytes as they arrive. Phases complete in turn: wait_for_bytes(b, k & 1) waits
// for the end of phase k. On cards without clusters none of this is reached.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool has_clusters = true;
FASTRNN_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
FASTRNN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// By one thread, before a sync_cluster().
FASTRNN_DEVICE void make_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// By one thread of the block, once for each phase, before anybody can wait for its end.
FASTRNN_DEVICE void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
FASTRNN_DEVICE void wait_for_bytes(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\tagain:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Writes 16 bytes to where `at` is in the shared memory of block `rank`, and counts them at its `barrier`.
FASTRNN_DEVICE void push(Quad* at, Quad q, uint64_t* barrier, int rank) {
  uint32_t to, counted;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(at)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(q.word[0]), "r"(q.word[1]), "r"(q.word[2]), "r"(q.word[3]), "r"(counted)
               : "memory");
}
#else
constexpr bool has_clusters = false;
FASTRNN_DEVICE int cluster_rank() { return 0; }
FASTRNN_DEVICE void sync_cluster() {}
FASTRNN_DEVICE void make_barrier(uint64_t*) {}
FASTRNN_DEVICE void expect_bytes(uint64_t*, uint32_t) {}
FASTRNN_DEVICE void wait_for_bytes(uint64_t*, uint32_t) {}
FASTRNN_DEVICE void push(Quad*, Quad, uint64_t*, int) {}
#endif

}  // namespace cuda
}  // namespace fastrnn
#endif
