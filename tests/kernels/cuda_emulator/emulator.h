// Runs CUDA kernels on a CPU: what csrc/cuda/device.cuh and launch.cuh offer, for a C++ compiler.
//
// Every CUDA thread is a fiber on one OS thread. A fiber gives way at barriers, warp operations,
// spin waits, and at random at atomics and shared accesses; which fiber runs next, how many blocks
// are resident and in which order they start is drawn from a seed. Reported as errors:
//   - global accesses outside the buffers the test has registered, shared ones outside the block's;
//   - shared words read before they are written;
//   - two threads touching a shared word, one of them writing, with nothing ordering them (a shadow
//     of every word remembers who, after which barrier, how), and the same for global memory, where
//     blocks are ordered by fences, atomics, acquire and release alone (order.h);
//   - shared words read or overwritten while an asynchronous copy is on its way to them;
//   - a launch that wants more blocks together than the machine has room for;
//   - threads of a block at different barriers, lanes of a warp at different operations;
//   - deadlock, and waiting that never ends.
// Any barrier or fence can be taken out by its number, to show that the tests would notice.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define ISSP_DEVICE inline
#define ISSP_PARAM
#define ISSP_KERNEL(threads, blocks_per_sm) void

namespace issp {
namespace emulator {

struct Options {
  uint64_t seed = 0;
  uint32_t resident = 0;                               // blocks at a time; 0: drawn from the seed
  int removed = -1;                                    // a barrier or a fence, by its number
  uint32_t processors = 4, shared_bytes = 228 * 1024;  // per processor
};
Options& options();

// Buffers that kernels may touch; everything else is out of bounds.
void allow(const void* begin, uint64_t bytes);
void forget_buffers();

// Barriers and fences are numbered in the order they are first met; names are file:line.
int site_count();
std::string site_name(int number);
uint64_t switch_count();

// `together`: all blocks are resident from the start, if there is room for them.
void run(uint32_t blocks, uint32_t threads, uint32_t shared_bytes, bool together,
         const std::function<void()>& kernel);
uint32_t blocks_per_processor(uint32_t threads, uint32_t shared_bytes);
uint64_t launch_count();

uint32_t thread_number();
uint32_t block_number();
uint32_t block_total();
void wait_at_barrier(const char* file, int line);
void wait_in_turn();   // gives way now
void perhaps_yield();  // gives way at random
// What an access to global memory is, for order.h.
enum class Global { load, store, load_acquire, store_release, atomic };
void touch_global(const void* p, uint64_t bytes, Global how);
bool is_ordered(const void* p, uint64_t bytes);
void pass_fence(const char* file, int line);
// Every lane of the warp hands in a value and gets all 32.
const std::array<uint32_t, 32>& exchange(uint32_t value, int kind);

enum class Access { read, write, atomic };
uint32_t* shared_word(uint32_t i, Access access);
// Elements of `bytes` bytes on their way to `words` shared words, four or one; null: zeros are.
void start_copy(uint32_t first, const void* from, uint32_t bytes, uint32_t words = 4);
void finish_copies(const char* file, int line);

}  // namespace emulator

inline uint32_t thread() {
  return emulator::thread_number();
}
inline uint32_t lane() {
  return thread() & 31u;
}
inline uint32_t warp() {
  return thread() >> 5;
}
inline uint32_t block() {
  return emulator::block_number();
}
inline uint32_t blocks() {
  return emulator::block_total();
}

inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wait_at_barrier(file, line);
}
inline void fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::pass_fence(file, line);
}
inline uint32_t ballot(bool vote) {
  const auto& votes = emulator::exchange(vote, 0);
  uint32_t word = 0;
  for (uint32_t i = 0; i < 32; ++i) word |= votes[i] << i;
  return word;
}
inline uint32_t shuffle_up(uint32_t value, uint32_t delta) {
  const auto& values = emulator::exchange(value, 1);
  return lane() >= delta ? values[lane() - delta] : value;
}
inline uint32_t shuffle(uint32_t value, uint32_t from) {
  return emulator::exchange(value, 2)[from & 31u];
}

inline uint32_t popcount(uint32_t x) {
  return uint32_t(__builtin_popcount(x));
}
inline int bit_length(uint32_t x) {
  return x ? 32 - __builtin_clz(x) : 0;
}
inline int bit_length(uint64_t x) {
  return x ? 64 - __builtin_clzll(x) : 0;
}

inline double fused(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
inline float error_function(float x) {
  return __builtin_erff(x);
}
inline double error_function(double x) {
  return __builtin_erf(x);
}

inline void relax() {
  emulator::wait_in_turn();
}

template <typename T>
T load(const T* p) {
  emulator::touch_global(p, sizeof(T), emulator::Global::load);
  return *p;
}
template <typename T>
void store(T* p, T value) {
  emulator::touch_global(p, sizeof(T), emulator::Global::store);
  *p = value;
}
// A value that nothing orders is replaced by noise, so that its use shows.
template <typename T>
T load_early(const T* p) {
  return emulator::is_ordered(p, sizeof(T)) ? *p : T(0x5a5a5a5a5a5a5a5aull);
}
inline uint32_t load_fresh(const uint32_t* p) {
  emulator::perhaps_yield();
  return load(p);
}
inline uint32_t load_acquire(const uint32_t* p) {
  emulator::perhaps_yield();
  emulator::touch_global(p, sizeof(*p), emulator::Global::load_acquire);
  return *p;
}
inline void store_release(uint32_t* p, uint32_t value) {
  emulator::perhaps_yield();
  emulator::touch_global(p, sizeof(*p), emulator::Global::store_release);
  *p = value;
}
// An atomic: the old value; nothing comes between this access and the caller's store.
template <typename T>
T exclusive(T* p) {
  emulator::perhaps_yield();
  emulator::touch_global(p, sizeof(T), emulator::Global::atomic);
  return *p;
}
inline uint32_t add(uint32_t* p, uint32_t value) {
  const uint32_t old = exclusive(p);
  *p = old + value;
  return old;
}
inline void add(int64_t* p, int64_t value) {
  *p = exclusive(p) + value;
}
inline void flip(uint32_t* p, uint32_t bits) {
  *p = exclusive(p) ^ bits;
}
inline void raise(uint32_t* p, uint32_t value) {
  *p = std::max(exclusive(p), value);
}
inline void raise(uint64_t* p, uint64_t value) {
  *p = std::max(exclusive(p), value);
}

struct Shared {
  uint32_t first = 0;
  uint32_t get(uint32_t i) const {
    return *emulator::shared_word(first + i, emulator::Access::read);
  }
  void set(uint32_t i, uint32_t value) const {
    *emulator::shared_word(first + i, emulator::Access::write) = value;
  }
  void add(uint32_t i, uint32_t value) const {
    *emulator::shared_word(first + i, emulator::Access::atomic) += value;
  }
  Shared from(uint32_t i) const { return {first + i}; }
};
inline Shared shared_memory() {
  return {};
}

template <typename T>
void copy_async(Shared to, const T* from) {
  emulator::start_copy(to.first, from, sizeof(T));
}
inline void copy_word_async(Shared to, const void* from, bool there) {
  emulator::start_copy(to.first, there ? from : nullptr, 4, 1);
}
inline void wait_for_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::finish_copies(file, line);
}

using Stream = void*;

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
            Stream, const Args&... args) {
  static_assert((std::is_same_v<Params, Args> && ...), "an argument needs a conversion");
  emulator::run(blocks, threads, shared_bytes, false, [&] { kernel(args...); });
}

template <typename... Params, typename... Args>
void launch_together(void (*kernel)(Params...), uint32_t blocks, uint32_t threads,
                     uint32_t shared_bytes, Stream, const Args&... args) {
  static_assert((std::is_same_v<Params, Args> && ...), "an argument needs a conversion");
  emulator::run(blocks, threads, shared_bytes, true, [&] { kernel(args...); });
}

struct Room {
  uint32_t processors, per_processor, per_block, reserved_per_block;
};
inline Room room_of_device() {
  const emulator::Options& machine = emulator::options();
  return {machine.processors, machine.shared_bytes, machine.shared_bytes, 0};
}
template <typename... Params>
uint32_t blocks_per_processor(void (*)(Params...), uint32_t threads, uint32_t shared_bytes) {
  return emulator::blocks_per_processor(threads, shared_bytes);
}
template <typename Probe, typename Kernel>
auto once_per_device(Kernel kernel, const Probe& probe) {
  return probe(kernel);  // every test has its own machine
}

}  // namespace issp
