// Gradients of sums over the coordinates of all pairs of rows, on the CPU.

#include <tuple>

#include "cpu/pairwise_passes.h"

namespace fastmeta {

void pair_gradient(const Tensor& w, const Tensor& x, const Tensor& y,
                   const std::optional<Tensor>& s, Kind kind, double p, const bool* skip,
                   const Tensor& dx, const Tensor& dy) {
  strips<false>({}, {}, w, x, y, s, kind, p, skip, dx, dy);
}

namespace {

std::tuple<Tensor, Tensor> backward(Tensor w, Tensor x, Tensor y, std::optional<Tensor> s,
                                    int64_t kind, double p, int64_t needs) {
  const Tensor dx = if_wanted(needs & kX, x), dy = if_wanted(needs & kY, y);
  pair_gradient(w, x, y, s, Kind(kind), p, nullptr, dx, dy);
  return {dx, dy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("pairwise_sums_backward", TORCH_BOX(&backward));
}

}  // namespace fastmeta
