// How CPU kernels loop: vector clones per instruction set, and one parallel loop over units.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/host_device.h"

// One clone per instruction set, chosen once when the library is loaded. Floating-point contraction
// is off (setup.py), so all clones compute the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FM_CLONES
#endif

// Iterations are independent even where an output is also an input (in-place forms).
#if defined(__clang__)
#define FM_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FM_IVDEP _Pragma("GCC ivdep")
#else
#define FM_IVDEP
#endif

// Unrolls a short loop of constant length, so that arrays of registers stay registers.
#if defined(__clang__)
#define FM_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define FM_UNROLL _Pragma("GCC unroll 16")
#else
#define FM_UNROLL
#endif

namespace fastmeta {

constexpr int64_t kGrain = 32768;  // elements worth waking a thread for

// Runs f(first, last) over ranges of units, in parallel where there is work for more than one
// thread.
template <typename F>
void parallel_ranges(int64_t units, int64_t elements_per_unit, const F& f) {
  const int64_t grain = most(1, kGrain / most(1, elements_per_unit));
  if (units <= grain) return f(0, units);
  torch::stable::parallel_for(0, units, grain, f);
}

// Runs f(unit) for each unit.
template <typename F>
void parallel_units(int64_t units, int64_t elements_per_unit, const F& f) {
  parallel_ranges(units, elements_per_unit, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) f(unit);
  });
}

}  // namespace fastmeta
