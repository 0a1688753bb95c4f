// What host and device code share: function qualifiers, accumulation types, integer helpers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#if defined(__CUDACC__)
#define FM_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FM_HD __forceinline
#else
#define FM_HD inline __attribute__((always_inline))
#endif

namespace fastmeta {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Everything narrower than double is computed in float.
template <typename T>
struct AccumulationType {
  using type = float;
};
template <>
struct AccumulationType<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccumulationType<T>::type;

FM_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FM_HD constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FM_HD constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace fastmeta
