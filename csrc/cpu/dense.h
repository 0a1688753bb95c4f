// Large matrix products of rows of a tensor: by our kernels where rows have the type of
// computation, else by torch's BLAS. Of weights in few bits as well, which are unpacked block by
// block.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

#include "common/tensor.h"
#include "cpu/batched_mm_bf16.h"

namespace fastmeta {

template <typename S>
inline constexpr ScalarType kTypeOf = ScalarType::Float;
template <>
inline constexpr ScalarType kTypeOf<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kTypeOf<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kTypeOf<Half> = ScalarType::Half;

// A matrix in memory that somebody else owns.
template <typename S>
struct Matrix {
  const S* data;
  int64_t row, column;  // strides

  const S* operator[](int64_t i) const { return data + i * row; }
  Matrix transposed() const { return {data, column, row}; }
  Tensor view(int64_t rows, int64_t columns) const {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {row, column};
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(kTypeOf<S>));
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_tensor_from_blob(const_cast<S*>(data), 2, sizes, strides, 0, code,
                                           aoti_torch_device_type_cpu(), -1, &handle));
    return Tensor(handle);
  }
};

// to [m, n] += a [m, k] b [k, n], factors rounded to bfloat16 where `bf16`. Within a parallel loop
// this runs in the calling thread.
template <typename S>
void add_product(int64_t m, int64_t n, int64_t k, const Matrix<S>& a, const Matrix<S>& b,
                 const Matrix<S>& to, bool bf16, batched::Memory<acc_t<S>>& memory) {
  if (m == 0 || n == 0 || k == 0) return;
  if constexpr (std::is_same_v<S, acc_t<S>>) {
    S* const y = const_cast<S*>(to.data);
    const batched::Product<S> p{m,     n,        k, a.data, a.row, a.column, b.data,
                                b.row, b.column, y, to.row, y,     to.row};
    if (bf16) return batched::run_bf16(p, 0, n, memory, batched::Ahead{});
    batched::run(p, memory);
  } else {
    const Tensor out = to.view(m, n);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.view(m, k).get(),
                                                    b.view(k, n).get(), 1.0, 1.0));
  }
}

// A weight [N, K]: as it is, or values of 8 bits, or of 4 with two in a byte, whose scales [N, G]
// hold for K / G columns each.
template <typename S>
struct Weight {
  using A = acc_t<S>;
  Matrix<S> full{nullptr, 0, 0};
  const int8_t* bytes = nullptr;
  const uint8_t* halves = nullptr;
  const A* scale = nullptr;
  int64_t n = 0, k = 0, groups = 1;
  bool bf16 = false;  // products with it round their factors

  Weight(const Tensor& weight, const std::optional<Tensor>& scales, int64_t columns, bool bf16)
      : n(weight.size(0)), k(columns), bf16(bf16) {
    const void* data = weight.const_data_ptr();
    if (!scales) {
      full = {static_cast<const S*>(data), weight.stride(0), weight.stride(1)};
      return;
    }
    scale = static_cast<const A*>(scales->const_data_ptr());
    groups = most(scales->size(1), 1);
    if (weight.scalar_type() == ScalarType::Byte) {
      halves = static_cast<const uint8_t*>(data);
    } else {
      bytes = static_cast<const int8_t*>(data);
    }
  }

  bool packed() const { return scale != nullptr; }

  // Rows [i, i + rows) and columns [j, j + columns) to a contiguous matrix.
  void unpack(int64_t i, int64_t rows, int64_t j, int64_t columns, S* to) const {
    const int64_t group = k / groups, stop = j + columns;
    for (int64_t row = i; row < i + rows; ++row) {
      for (int64_t from = j; from < stop;) {
        const int64_t last = least(stop, (from / group + 1) * group);
        const A step = scale[row * groups + from / group];
        if (bytes != nullptr) {
          const int8_t* const at = bytes + row * k;
          for (int64_t q = from; q < last; ++q) *to++ = S(step * A(at[q]));
        } else {
          const uint8_t* const at = halves + row * (k / 2);
          for (int64_t q = from; q < last; ++q) {
            *to++ = S(step * A(int(at[q / 2] >> (q % 2 * 4) & 15) - 8));
          }
        }
        from = last;
      }
    }
  }

  // y [rows, N] += x [rows, K] W^T; `alone` if no other thread is at work.
  void forward(int64_t rows, const Matrix<S>& x, const Matrix<S>& y, batched::Memory<A>& memory,
               bool alone) const {
    if (!packed()) return add_product(rows, n, k, x, full.transposed(), y, bf16, memory);
    for_blocks(n, rows * k, alone, memory, [&](int64_t i, int64_t some, batched::Memory<A>& own) {
      std::vector<S> block(size_t(some * k));
      unpack(i, some, 0, k, block.data());
      const Matrix<S> columns{block.data(), 1, k}, to{y.data + i, y.row, 1};
      add_product(rows, some, k, x, columns, to, bf16, own);
    });
  }

  // dx [rows, K] += dy [rows, N] W.
  void backward(int64_t rows, const Matrix<S>& dy, const Matrix<S>& dx, batched::Memory<A>& memory,
                bool alone) const {
    if (!packed()) return add_product(rows, k, n, dy, full, dx, bf16, memory);
    for_blocks(k, rows * n, alone, memory, [&](int64_t j, int64_t some, batched::Memory<A>& own) {
      std::vector<S> block(size_t(n * some));
      unpack(0, n, j, some, block.data());
      const Matrix<S> columns{block.data(), some, 1}, to{dx.data + j, dx.row, 1};
      add_product(rows, some, n, dy, columns, to, bf16, own);
    });
  }

 private:
  static constexpr int64_t kBlock = 64;  // outputs, or inputs, unpacked at once

  // f(first, columns, memory) for blocks of columns, in parallel where no other thread is at work.
  template <typename F>
  static void for_blocks(int64_t columns, int64_t work, bool alone, batched::Memory<A>& memory,
                         const F& f) {
    const int64_t blocks = ceil_div(columns, kBlock);
    const auto one = [&](int64_t block, batched::Memory<A>& own) {
      f(block * kBlock, least(kBlock, columns - block * kBlock), own);
    };
    if (!alone) {
      for (int64_t block = 0; block < blocks; ++block) one(block, memory);
      return;
    }
    parallel_units(blocks, work * kBlock / 16, [&](int64_t block) {
      batched::Memory<A> own;
      one(block, own);
    });
  }
};

}  // namespace fastmeta
