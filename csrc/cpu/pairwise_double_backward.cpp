// Derivatives of the gradients of sums over the coordinates of all pairs of rows, on the CPU.

#include <tuple>

#include "cpu/pairwise_passes.h"

namespace fastmeta {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional a, Optional b, Tensor w, Tensor x,
                                                   Tensor y, Optional s, int64_t kind, double p,
                                                   int64_t needs) {
  const int64_t B = x.size(0), N = x.size(1), M = y.size(1), D = x.size(2);
  const Tensor dw = if_wanted(needs & kW, w), dx = if_wanted(needs & kX, x),
               dy = if_wanted(needs & kY, y);
  if (needs & (kX | kY)) strips<true>(a, b, w, x, y, s, Kind(kind), p, nullptr, dx, dy);
  if (!(needs & kW)) return {dw, dx, dy};
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const int64_t units = B * ceil_div(N, kChunkRows), work = least(N, kChunkRows) * M * D;
    for_units<A>(
        Kind(kind), p, units, work, [&](auto f, auto lanes, int64_t unit) FM_INLINE_LAMBDA {
          const Chunk c(unit, N);
          along_pairs<decltype(lanes)>(f, rows_of<const A>(x, c.task), rows_of<const A>(y, c.task),
                                       rows_of<const A>(a, c.task), rows_of<const A>(b, c.task),
                                       rows_of<const A>(s, c.task), c.begin, c.end, M, D,
                                       rows_of<A>(dw, c.task));
        });
    if (Kind(kind) == Kind::kMaximum &&
        D > 0) {  // dw so far is that of all coordinates that attain it
      const Tensor ones = empty_rows({B, N, M}, x.scalar_type(), x);
      A* one = static_cast<A*>(ones.mutable_data_ptr());
      std::fill_n(one, B * N * M, A(1));
      const Tensor shares = shared_weights<A>(ones, x, y, s, Kind::kMaximum);
      A* to = static_cast<A*>(dw.mutable_data_ptr());
      const A* share = static_cast<const A*>(shares.const_data_ptr());
      for (int64_t i = 0; i < B * N * M; ++i) to[i] *= share[i];
    }
  });
  return {dw, dx, dy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("pairwise_sums_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
