// The nearest of many candidates that pass by in tiles, on the CPU.

#include "cpu/pairwise.h"

namespace fastmeta {
namespace {

// values and indices [n, k], rising, take in alpha sums + offset [n, m] of columns named from
// `first`.
void select(Tensor values, Tensor indices, Tensor sums, std::optional<Tensor> offset, double alpha,
            int64_t first) {
  const int64_t n = values.size(0), k = values.size(1), m = sums.size(1);
  with_dtype(values, [&](auto zero) {
    using A = decltype(zero);
    const A* const more = pointer_or_null<A>(offset);
    const A factor = A(alpha);
    parallel_units(n, m, [&](int64_t i) {
      const A* const x = data_of<const A>(sums) + i * sums.stride(0);
      A* const best = data_of<A>(values) + i * values.stride(0);
      int64_t* const name = data_of<int64_t>(indices) + i * indices.stride(0);
      const auto take = [&](A value, int64_t column) {  // behind those that are not larger
        int64_t at = k - 1;
        for (; at > 0 && best[at - 1] > value; --at) {
          best[at] = best[at - 1];
          name[at] = name[at - 1];
        }
        best[at] = value;
        name[at] = first + column;
      };
      with_registers([&](auto) FM_INLINE_LAMBDA {
        constexpr int64_t kSome = 64;  // looked at together: hardly any of them is near enough
        A found[kSome];
        for (int64_t from = 0; from < m; from += kSome) {
          const int64_t count = least(kSome, m - from);
          const A worst = best[k - 1];
          int32_t near = 0;
          if (more != nullptr) {
            FM_IVDEP
            for (int64_t j = 0; j < count; ++j) {
              found[j] = factor * x[from + j] + more[from + j];
              near |= found[j] < worst;
            }
          } else {
            FM_IVDEP
            for (int64_t j = 0; j < count; ++j) {
              found[j] = factor * x[from + j];
              near |= found[j] < worst;
            }
          }
          if (!near) continue;
          for (int64_t j = 0; j < count; ++j) {
            if (found[j] < best[k - 1]) take(found[j], from + j);
          }
        }
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("nearest_select_", TORCH_BOX(&select)); }

}  // namespace fastmeta
