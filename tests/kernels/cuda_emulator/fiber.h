// Fibers: a stack and a saved stack pointer. On x86-64 a switch is a dozen instructions without a
// system call (about 10 ns); elsewhere ucontext does it, with two system calls.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(ISSP_UCONTEXT)

struct FiberContext {
  void* stack_pointer = nullptr;
};

extern "C" void issp_switch_fiber(void** save, void* load);
// Saves what the System V calling convention says a function must preserve. The floating-point
// control words are the same in all fibers.
asm(R"(
.text
.p2align 4
.type issp_switch_fiber, @function
issp_switch_fiber:
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
  ret
.size issp_switch_fiber, .-issp_switch_fiber
)");

inline void switch_fiber(FiberContext& from, FiberContext& to) {
  issp_switch_fiber(&from.stack_pointer, to.stack_pointer);
}

inline void start_fiber(FiberContext& fiber, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
  auto** words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // entry never returns; this aligns the stack as a call would
  *--words = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  fiber.stack_pointer = words;
}

#else

#include <ucontext.h>

struct FiberContext {
  ucontext_t context;
};

inline void switch_fiber(FiberContext& from, FiberContext& to) {
  swapcontext(&from.context, &to.context);
}

inline void start_fiber(FiberContext& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif
