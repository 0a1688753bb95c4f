// Dropout whose mask is a function of a seed: it is never stored, and its derivative is itself.
#include "common/tensor.h"
#include "cpu/lanes.h"
#include "math/hash.h"

namespace fastmeta {
namespace {

constexpr int64_t kBlock = 4096;  // elements of one unit of work; divides 2^32
constexpr int64_t kCost = 2;      // an element costs as much as this many moved ones

// `count` elements from number `first` on, whose numbers have the same upper 32 bits.
template <typename A>
FM_HD void drop(const A* from, A* to, int64_t count, Seed seed, uint64_t first, uint32_t dropped,
                A factor) {
  const uint32_t low = seed.low, high = seed.high + uint32_t(first >> 32) * 0x9E3779B9u;
  FM_IVDEP
  for (int64_t i = 0; i < count; ++i) {
    const A value = from[i] * factor;
    to[i] = mixed(mixed(low ^ uint32_t(first + uint64_t(i))) + high) < dropped ? A(0) : value;
  }
}

// x in samples of `period` elements, which all drop the same ones.
Tensor dropout(Tensor x, Tensor seed, double p, int64_t period) {
  STD_TORCH_CHECK(x.is_contiguous() && seed.numel() == 1 &&
                      seed.scalar_type() == ScalarType::Long && period > 0 &&
                      x.numel() % period == 0,
                  "fastmeta: dropout takes contiguous samples and an int64 seed");
  const Tensor y = torch::stable::empty_like(x);
  const Seed key(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const uint32_t dropped = dropped_words(p);
  const int64_t blocks = ceil_div(period, kBlock);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A factor = A(1 / (1 - p));
    const A* const from = data_of<const A>(x);
    A* const to = data_of<A>(y);
    parallel_units(x.numel() / period * blocks, kBlock * kCost, [&](int64_t unit) {
      const int64_t first = unit % blocks * kBlock, at = unit / blocks * period + first;
      const int64_t count = least(kBlock, period - first);
      with_registers([=](auto) FM_INLINE_LAMBDA {
        drop(from + at, to + at, count, key, uint64_t(first), dropped, factor);
      });
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }

}  // namespace fastmeta
