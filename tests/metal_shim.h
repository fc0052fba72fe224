// A CPU stand-in for the part of Metal that tempo_mlx/model/metal.py uses, so that a test can compile the text MLX
// generates for mx.fast.metal_kernel as C++ and run it without a Mac.
//
// What MLX generates (mlx/backend/common/metal_kernel.cpp), and the test takes over unchanged:
//
//     <header>
//     template <typename OUT, int D, ...>                                    one parameter per template argument
//     [[kernel]] void custom_kernel_<name>_<arguments>_<dtypes>(
//       const device float16_t* keys [[buffer(1)]],                          `constant` where size < 8, & where ndim 0
//       const constant int* keys_shape [[buffer(2)]],                        only where the source names them
//       const constant int64_t* keys_strides [[buffer(3)]],                  in elements
//       ...
//       device float* scores [[buffer(17)]],                                 outputs, row-contiguous, uninitialised
//       uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]], only those the source names
//       ...) {
//     <source>
//     }
//     template [[host_name("...")]] [[kernel]] decltype(...) ...;
//
// before which it puts its utilities and `using namespace metal`. Float types have Metal's rounding and conversions.
//
// One threadgroup runs at a time, each thread of it on a stack of its own, so threadgroup memory is static memory.
// The lanes of a simdgroup go from one simdgroup function to the next together, in changing order; simdgroups go
// from one barrier to the next one after the other, in changing order, so that a missing barrier shows. Where not
// all lanes, or not all threads, come to the same call, that is an error (on a GPU it is silent nonsense).

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

typedef unsigned int uint;
typedef unsigned short ushort;
struct uint3 {
  uint x, y, z;
};

namespace shim {

constexpr uint LANES = 32;
constexpr size_t STACK = 64 * 1024;
inline const char* const BARRIER = "threadgroup_barrier";

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  uint3 threadgroup_position, position;
  uint index;           // in the threadgroup
  const char* waiting;  // the function it waits in, or null at the end
  int line;             // where that was called
  uint calls;           // simdgroup functions so far
};

struct State {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  Thread* current = nullptr;
  std::vector<float> lanes[2];  // what each thread brought to a simdgroup function; two, as lanes leave one by one
  std::function<void()> body;
  std::string error;
};

inline State& state() {
  static State s;
  return s;
}

inline Thread& self() {
  return *state().current;
}

inline void wait_in(const char* what, int line) {
  self().waiting = what;
  self().line = line;
  swapcontext(&self().context, &state().scheduler);
}

// Bring a number to all lanes of the simdgroup; what the 32 of them brought.
inline const float* exchange(float mine, const char* what, int line) {
  auto& lanes = state().lanes[self().calls++ % 2];
  lanes[self().index] = mine;
  wait_in(what, line);
  return &lanes[self().index / LANES * LANES];
}

inline void run_thread() {
  state().body();
  swapcontext(&self().context, &state().scheduler);
}

inline bool fail(const Thread& a, const Thread& b) {
  char message[200];
  std::snprintf(message, sizeof message, "thread %u is at %s (line %d), thread %u at %s (line %d)", a.index,
                a.waiting ? a.waiting : "the end", a.line, b.index, b.waiting ? b.waiting : "the end", b.line);
  state().error = message;
  return false;
}

// Whether threads [first, last) have all come to the same call, or all to the end.
inline bool together(uint first, uint last) {
  const auto& threads = state().threads;
  for (uint i = first + 1; i < last; i++) {
    if (threads[i].waiting != threads[first].waiting || threads[i].line != threads[first].line) {
      return fail(threads[first], threads[i]);
    }
  }
  return true;
}

// Run a simdgroup as far as it gets without the others: to a barrier, or to the end.
inline bool run_simdgroup(uint first, uint last, std::mt19937& random) {
  State& s = state();
  std::vector<uint> order(last - first);
  std::iota(order.begin(), order.end(), first);
  do {
    std::shuffle(order.begin(), order.end(), random);
    for (uint i : order) {
      s.current = &s.threads[i];
      s.current->waiting = nullptr;
      s.current->line = 0;
      swapcontext(&s.scheduler, &s.current->context);
    }
    if (!together(first, last)) {
      return false;
    }
  } while (s.current->waiting && s.current->waiting != BARRIER);
  return true;
}

inline bool run_threadgroup(uint3 position, uint3 origin, uint3 size, std::mt19937& random) {
  State& s = state();
  const uint count = size.x * size.y * size.z;
  for (uint i = 0; i < count; i++) {
    Thread& t = s.threads[i];
    t.threadgroup_position = position;
    t.index = i;
    t.position = {origin.x + i % size.x, origin.y + i / size.x % size.y, origin.z + i / size.x / size.y};
    t.calls = 0;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = STACK;
    t.context.uc_link = nullptr;
    makecontext(&t.context, run_thread, 0);
  }
  std::vector<uint> simdgroups((count + LANES - 1) / LANES);
  std::iota(simdgroups.begin(), simdgroups.end(), 0);
  do {
    std::shuffle(simdgroups.begin(), simdgroups.end(), random);
    for (uint i : simdgroups) {
      if (!run_simdgroup(i * LANES, std::min((i + 1) * LANES, count), random)) {
        return false;
      }
    }
    if (!together(0, count)) {
      return false;
    }
  } while (s.current->waiting);
  return true;
}

// Run `body` once per thread of the grid. Like Metal's dispatchThreads, cut the last threadgroups to the grid.
inline const char* launch(std::function<void()> body, const uint* grid, const uint* group, uint seed) {
  State& s = state();
  const uint3 size = {std::min(grid[0], group[0]), std::min(grid[1], group[1]), std::min(grid[2], group[2])};
  s.body = std::move(body);
  s.error.clear();
  const size_t count = (size_t(size.x) * size.y * size.z + LANES - 1) / LANES * LANES;
  if (s.threads.size() < count) {
    s.threads = std::vector<Thread>(count);
    s.lanes[0].resize(count);
    s.lanes[1].resize(count);
  }
  std::mt19937 random(seed);
  for (uint z = 0; z * size.z < grid[2]; z++) {
    for (uint y = 0; y * size.y < grid[1]; y++) {
      for (uint x = 0; x * size.x < grid[0]; x++) {
        const uint3 origin = {x * size.x, y * size.y, z * size.z};
        const uint3 cut = {std::min(size.x, grid[0] - origin.x), std::min(size.y, grid[1] - origin.y),
                           std::min(size.z, grid[2] - origin.z)};
        if (!run_threadgroup({x, y, z}, origin, cut, random)) {
          return s.error.c_str();
        }
      }
    }
  }
  return nullptr;
}

// What the generated signature asks for
inline uint3 threadgroup_position_in_grid() { return self().threadgroup_position; }
inline uint3 thread_position_in_grid() { return self().position; }
inline uint simdgroup_index_in_threadgroup() { return self().index / LANES; }
inline uint thread_index_in_simdgroup() { return self().index % LANES; }

}  // namespace shim

// Types. bfloat converts to float by itself, and from it only where asked to; half does both.

struct half {
  uint16_t bits;
  half() = default;
  half(float x) {
    const uint32_t u = shim::bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      bits = sign | 0x7e00;
    } else if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24
      bits = sign | uint16_t(std::nearbyint(std::fabs(x) * 16777216.0f));
    } else {
      const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);  // to nearest, ties to even
      bits = sign | uint16_t(std::min<uint32_t>((rounded - 0x38000000) >> 13, 0x7c00));
    }
  }
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) {
      return shim::float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    }
    if (magnitude < 0x400) {
      return (sign ? -1.0f : 1.0f) * float(magnitude) / 16777216.0f;
    }
    return shim::float_of(sign | ((magnitude << 13) + 0x38000000));
  }
};

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    const uint32_t u = shim::bits_of(x);
    bits = std::isnan(x) ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return shim::float_of(uint32_t(bits) << 16); }
};

typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {

template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
namespace precise {
inline float tanh(float x) { return std::tanh(x); }
}  // namespace precise

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  shim::wait_in(shim::BARRIER, line);
}

inline float simd_max(float x, int line = __builtin_LINE()) {
  const float* lanes = shim::exchange(x, "simd_max", line);
  return *std::max_element(lanes, lanes + shim::LANES);
}

inline float simd_sum(float x, int line = __builtin_LINE()) {
  const float* lanes = shim::exchange(x, "simd_sum", line);
  return std::accumulate(lanes, lanes + shim::LANES, 0.0f);
}

inline bool simd_any(bool x, int line = __builtin_LINE()) {
  const float* lanes = shim::exchange(x, "simd_any", line);
  return std::any_of(lanes, lanes + shim::LANES, [](float lane) { return lane != 0; });
}

inline float simd_shuffle_xor(float x, ushort mask, int line = __builtin_LINE()) {
  const float* lanes = shim::exchange(x, "simd_shuffle_xor", line);
  return lanes[shim::thread_index_in_simdgroup() ^ mask];
}

}  // namespace metal

using namespace metal;

// Address spaces: everything is memory, and what a threadgroup shares is static, as only one runs at a time.
#define device
#define constant
#define threadgroup static
