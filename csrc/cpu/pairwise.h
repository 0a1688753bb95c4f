// What other operators use of csrc/cpu/pairwise*.cpp, and how tensors of rows are read.
#pragma once

#include "common/tensor.h"
#include "cpu/pairs.h"

namespace fastmeta {

// sums [B, N, M] of one kind over the coordinates of x [B, N, D] and y [B, M, D].
Tensor pair_sums(Tensor x, Tensor y, int64_t kind, double p);

// dx and dy, each where it has elements, of sum(w * sums). `s` are the sums, for a maximum. Rows of
// x with skip [B, N] set get zeros and reach nothing.
void pair_gradient(const Tensor& w, const Tensor& x, const Tensor& y,
                   const std::optional<Tensor>& s, Kind kind, double p, const bool* skip,
                   const Tensor& dx, const Tensor& dy);

// Rows of task t of a tensor [B, n, D], which may be missing.
template <typename A>
Rows<A> rows_of(const Tensor& t, int64_t task) {
  auto* data = static_cast<A*>(const_cast<void*>(t.const_data_ptr()));
  return {data + task * t.stride(0), t.stride(1)};
}
template <typename A>
Rows<A> rows_of(const std::optional<Tensor>& t, int64_t task) {
  return t && t->numel() > 0 ? rows_of<A>(*t, task) : Rows<A>{};
}

}  // namespace fastmeta
