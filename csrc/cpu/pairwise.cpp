// Sums over the coordinates of all pairs of rows on the CPU.

#include "cpu/pairwise_passes.h"

namespace fastmeta {

Tensor pair_sums(Tensor x, Tensor y, int64_t kind, double p) {
  const int64_t B = x.size(0), N = x.size(1), M = y.size(1), D = x.size(2);
  const Tensor out = empty_rows({B, N, M}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const int64_t units = B * ceil_div(N, kChunkRows), work = least(N, kChunkRows) * M * D;
    for_units<A>(Kind(kind), p, units, work,
                 [&](auto f, auto lanes, int64_t unit) FM_INLINE_LAMBDA {
                   const Chunk c(unit, N);
                   sums_of_pairs<decltype(lanes)>(f, rows_of<const A>(x, c.task),
                                                  rows_of<const A>(y, c.task), c.begin, c.end, M, D,
                                                  rows_of<A>(out, c.task));
                 });
  });
  return out;
}

namespace {

// How much smaller than |x|^2 + |y|^2 a square may be before it is evaluated as a difference: five
// bits of it are lost by then.
constexpr int kCancels = 32;

// dots x y^T -> |x|^2 + |y|^2 - 2 dots.
void squares(Tensor dots, Tensor x, Tensor y, Tensor xx, Tensor yy) {
  for (const Tensor& t : {dots, y, xx, yy}) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "fastmeta: expected tensors of one dtype");
  }
  const int64_t N = x.size(1), M = y.size(1), D = x.size(2);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    constexpr int64_t kSome = 1024;
    parallel_units(x.size(0) * N, M, [&](int64_t unit) {
      const int64_t t = unit / N, i = unit % N;
      const Rows<const A> ys = rows_of<const A>(y, t);
      const A* const x_row = rows_of<const A>(x, t)[i];
      const A* const y_norms = static_cast<const A*>(yy.const_data_ptr()) + t * M;
      const A x_norm = static_cast<const A*>(xx.const_data_ptr())[t * N + i];
      A* const out = rows_of<A>(dots, t)[i];
      with_registers([&](auto bytes) FM_INLINE_LAMBDA {
        using L = Lanes<A, bytes()>;
        for (int64_t from = 0; from < M; from += kSome) {
          const int64_t to = least(from + kSome, M);
          A doubtful = 0;  // their number; without branches, so that it takes vectors
          FM_IVDEP
          for (int64_t j = from; j < to; ++j) {
            const A norms = x_norm + y_norms[j], square = norms - 2 * out[j];
            doubtful += square * kCancels >= norms ? A(0) : A(1);  // NaN is doubtful
            out[j] = square;
          }
          if (doubtful == 0) continue;
          for (int64_t j = from; j < to; ++j) {
            if (out[j] * kCancels >= x_norm + y_norms[j]) continue;
            sums_of<1, 1, false, L>(Squares{}, {x_row, 0}, ys, 0, j, D, Rows<A>{out, 0});
          }
        }
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("pairwise_sums", TORCH_BOX(&pair_sums));
  m.impl("pairwise_squares_", TORCH_BOX(&squares));
}

}  // namespace fastmeta
