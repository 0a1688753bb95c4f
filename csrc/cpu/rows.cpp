// Rows of a matrix in another order, of any type: copies of whole rows.
#include <cstring>

#include "common/cpu.h"
#include "common/tensor.h"

namespace fastmeta {
namespace {

// x [R, C] and index [S], both contiguous -> [S, C]: row index[s], or zeros where that is -1.
Tensor take_rows(Tensor x, Tensor index) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && index.dim() == 1 && index.is_contiguous() &&
                      index.scalar_type() == ScalarType::Long,
                  "fastmeta: take_rows expects rows [R, C] and their numbers [S]");
  const int64_t rows = x.size(0), count = index.size(0);
  const int64_t bytes = x.size(1) * x.element_size();
  const Tensor to = empty_rows({count, x.size(1)}, x.scalar_type(), x);
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const target = static_cast<char*>(to.mutable_data_ptr());
  const int64_t* const chosen = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t s = 0; s < count; ++s) {
    STD_TORCH_CHECK(chosen[s] >= -1 && chosen[s] < rows, "take_rows: index must lie in -1 to ",
                    rows - 1, ", got ", chosen[s]);
  }
  if (bytes == 0) return to;  // an empty tensor has no address
  parallel_units(count, x.size(1), [&](int64_t s) {
    if (chosen[s] < 0) {
      std::memset(target + s * bytes, 0, size_t(bytes));
    } else {
      std::memcpy(target + s * bytes, from + chosen[s] * bytes, size_t(bytes));
    }
  });
  return to;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("take_rows", TORCH_BOX(&take_rows)); }

}  // namespace fastmeta
