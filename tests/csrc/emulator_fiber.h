// Fibers for emulator.cpp: stacks, the switch between them, and what the sanitizers have to be told about both.
//
// To ThreadSanitizer every fiber is a thread, and a switch orders nothing. So the scheduler's own data would be raced
// for by all of them: what runs on fibers is not instrumented (FASTRNN_UNSEEN), and says by `tsan_release` and
// `tsan_acquire` what CUDA orders.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read8_pc(void*, void*);
void __tsan_read16_pc(void*, void*);
void __tsan_write8_pc(void*, void*);
void __tsan_write16_pc(void*, void*);
}
#define FASTRNN_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#define FASTRNN_UNSEEN_INLINE __attribute__((no_sanitize("thread"), always_inline)) inline
#else
#define FASTRNN_UNSEEN
#define FASTRNN_UNSEEN_INLINE inline
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastrnn {
namespace cuda {
namespace emulator {

// Accesses of `from`, an address in the kernel.
#ifdef __SANITIZE_THREAD__
constexpr bool with_tsan = true;
FASTRNN_UNSEEN inline void tsan_release(void* at) { __tsan_release(at); }
FASTRNN_UNSEEN inline void tsan_acquire(void* at) { __tsan_acquire(at); }
FASTRNN_UNSEEN inline void tsan_read8(void* at, void* from) { __tsan_read8_pc(at, from); }
FASTRNN_UNSEEN inline void tsan_read16(void* at, void* from) { __tsan_read16_pc(at, from); }
FASTRNN_UNSEEN inline void tsan_write8(void* at, void* from) { __tsan_write8_pc(at, from); }
FASTRNN_UNSEEN inline void tsan_write16(void* at, void* from) { __tsan_write16_pc(at, from); }
inline void* tsan_thread() { return __tsan_create_fiber(0); }
inline void tsan_end(void* thread) { __tsan_destroy_fiber(thread); }
FASTRNN_UNSEEN inline void* tsan_self() { return __tsan_get_current_fiber(); }
FASTRNN_UNSEEN inline void tsan_become(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
#else
constexpr bool with_tsan = false;
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
inline void tsan_read8(void*, void*) {}
inline void tsan_read16(void*, void*) {}
inline void tsan_write8(void*, void*) {}
inline void tsan_write16(void*, void*) {}
inline void* tsan_thread() { return nullptr; }
inline void tsan_end(void*) {}
inline void* tsan_self() { return nullptr; }
inline void tsan_become(void*) {}
#endif

// A stack and where on it somebody stopped.
struct Context {
  char* stack = nullptr;
  size_t bytes = 0;
  void* thread = nullptr;  // ThreadSanitizer's
  void* fake = nullptr;    // AddressSanitizer's
#ifdef __x86_64__
  void* top = nullptr;
#else
  ucontext_t machine;
#endif
};

#ifdef __x86_64__
extern "C" void fastrnn_emulator_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type fastrnn_emulator_switch, @function
fastrnn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size fastrnn_emulator_switch, .-fastrnn_emulator_switch
)");
#endif

// The first thing that a fiber does is to call this.
FASTRNN_UNSEEN inline void arrived(Context& here) {
  (void)here;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(here.fake, nullptr, nullptr);
#endif
}

FASTRNN_UNSEEN inline void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake, to.stack, to.bytes);
#endif
  tsan_become(to.thread);
#ifdef __x86_64__
  fastrnn_emulator_switch(&from.top, to.top);
#else
  swapcontext(&from.machine, &to.machine);
#endif
  arrived(from);
}

// The context of the operating system's own thread, the one that calls.
inline void adopt_thread(Context& context) {
  static pthread_t owner;
  if (context.stack && pthread_equal(owner, pthread_self())) return;
  owner = pthread_self();
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &context.bytes);
  pthread_attr_destroy(&attributes);
  context.stack = static_cast<char*>(stack);
  context.thread = tsan_self();
}

// Puts the context at the beginning of entry(), which never returns. `index` moves where the stack begins, so that the
// innermost frames of many fibers do not compete for the same lines of the cache.
inline void begin_context(Context& context, void (*entry)(), int index) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  const size_t bytes = 256 << 10;
#else
  const size_t bytes = 128 << 10;
#endif
  if (!context.stack) {
    void* const memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0)
      throw std::runtime_error("the emulator got no memory for the stack of a thread");
    context.stack = static_cast<char*>(memory) + page;
    context.bytes = bytes;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(context.stack, context.bytes);
#endif
  if (context.thread) tsan_end(context.thread);
  context.thread = tsan_thread();
  context.fake = nullptr;
  const size_t shift = size_t(index % 61) * 320;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(context.stack + context.bytes - shift);
  *--top = nullptr;  // where a call would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.top = top;
#else
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = context.stack;
  context.machine.uc_stack.ss_size = context.bytes - shift;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
#endif
}

}  // namespace emulator
}  // namespace cuda
}  // namespace fastrnn
