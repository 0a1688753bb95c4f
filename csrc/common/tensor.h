// Between torch's stable ABI and plain pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <optional>

#include "common/streams.h"

namespace fastmeta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Larger CPU buffers are mapped afresh on every allocation (glibc's threshold never exceeds this).
constexpr int64_t kMappedAfresh = 32 << 20;

// Asks for huge pages under a fresh CPU buffer: its first touch then faults once per 2 MiB, which
// takes less than half the time, and nothing else shares the pages.
inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes <= size_t(kMappedAfresh)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

// A new contiguous tensor beside `like`; one C call, cheaper than the string-keyed stable ops.
inline Tensor empty_rows(std::initializer_list<int64_t> sizes, ScalarType dtype,
                         const Tensor& like) {
  int64_t strides[4];
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= most(sizes.begin()[i], 1);
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides, code, device_type,
                                                  like.get_device_index(), &handle));
  Tensor out(handle);
  if (like.is_cpu()) use_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
#if defined(FASTMETA_POISON)  // tests: what a kernel forgets to write is NaN
  std::memset(out.mutable_data_ptr(), 0xFF, out.numel() * out.element_size());
#endif
  return out;
}

// The same values with adjacent columns: the tensor itself unless its last dimension is strided.
inline Tensor dense_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kHalf;
    default:
      STD_TORCH_CHECK(false, "fastmeta: expected a floating-point tensor");
  }
}

template <typename A>
A* data_of(const Tensor& t) {
  return static_cast<A*>(const_cast<void*>(t.const_data_ptr()));
}

// Calls f(A{}) with the element type of a tensor of float32 or float64.
template <typename F>
void with_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "fastmeta: expected float32 or float64");
  f(float{});
}

// The same for any floating-point type.
template <typename F>
void with_any_dtype(const Tensor& t, const F& f) {
  const Type type = type_of(t.scalar_type());
  if (type == Type::kDouble) return f(double{});
  with_type<float>(type, f);
}

// A new tensor beside `like`, without elements where it is not wanted.
inline Tensor if_wanted(bool wanted, std::initializer_list<int64_t> sizes, const Tensor& like) {
  return empty_rows(wanted ? sizes : std::initializer_list<int64_t>{0}, like.scalar_type(), like);
}

inline Stream stream_of(const Tensor& t) {
  const int64_t stride = t.dim() > 0 ? t.stride(0) : 0;
  return {const_cast<void*>(t.const_data_ptr()), stride, type_of(t.scalar_type())};
}
inline Stream mutable_stream_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), type_of(t.scalar_type())};
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

template <typename T>
const T* pointer_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// The learning-rate arguments of a raw operator. `keep` owns the buffer of a rate that had to be
// copied to make its columns adjacent.
template <typename A>
Rate<A> rate_of(const std::optional<Tensor>& lr, const std::optional<Tensor>& offsets,
                double lr_value, std::optional<Tensor>& keep) {
  Rate<A> rate;
  rate.value = static_cast<A>(lr_value);
  if (!lr) return rate;
  keep = dense_columns(*lr);
  rate.data = static_cast<const A*>(keep->const_data_ptr());
  rate.row_stride = keep->size(0) == 1 ? 0 : keep->stride(0);
  rate.columns = keep->size(1);
  if (offsets) {
    rate.kind = RateKind::kSegment;
    rate.offsets = pointer_or_null<int64_t>(offsets);
  } else if (rate.columns > 1) {
    rate.kind = RateKind::kColumn;
  }
  return rate;
}

}  // namespace fastmeta
