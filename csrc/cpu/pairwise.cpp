// Sums over the coordinates of all pairs of rows, and their derivatives, on the CPU.

#include <memory>
#include <tuple>
#include <vector>

#include "cpu/pairwise.h"

namespace fastmeta {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kChunkRows = 64;         // rows of x in one unit of parallel work
constexpr int64_t kX = 1, kY = 2, kW = 4;  // bits of `needs`

// f(functor, a vector of the widest registers) for every unit of work, in parallel.
template <typename A, typename F>
void for_units(Kind kind, double p, int64_t units, int64_t elements, const F& f) {
  parallel_units(units, elements, [&](int64_t unit) {
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      using L = Lanes<A, bytes()>;
      with_kind(kind, p, [&](auto functor) FM_INLINE_LAMBDA { f(functor, L{}, unit); });
    });
  });
}

// Unit `unit` as a task and a range of its rows.
struct Chunk {
  int64_t task, begin, end;
  Chunk(int64_t unit, int64_t rows) {
    const int64_t chunks = ceil_div(rows, kChunkRows);
    task = unit / chunks;
    begin = unit % chunks * kChunkRows;
    end = least(begin + kChunkRows, rows);
  }
};

// For a maximum, its weight divided by the number of coordinates that attain it; else w itself.
template <typename A>
Tensor shared_weights(const Tensor& w, const Tensor& x, const Tensor& y, const Optional& s,
                      Kind kind) {
  if (kind != Kind::kMaximum) return w;
  const int64_t N = x.size(1), M = y.size(1), D = x.size(2);
  const Tensor out = empty_rows({x.size(0), N, M}, x.scalar_type(), x);
  const int64_t units = x.size(0) * ceil_div(N, kChunkRows);
  parallel_units(units, least(N, kChunkRows) * M * D, [&](int64_t unit) {
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      const Chunk c(unit, N);
      const Rows<A> ties = rows_of<A>(out, c.task);
      const Rows<const A> given = rows_of<const A>(w, c.task), none;
      along_pairs<Lanes<A, bytes()>>(Ties{}, rows_of<const A>(x, c.task),
                                     rows_of<const A>(y, c.task), none, none,
                                     rows_of<const A>(s, c.task), c.begin, c.end, M, D, ties);
      for (int64_t i = c.begin; i < c.end; ++i) {
        for (int64_t j = 0; j < M; ++j) ties[i][j] = given[i][j] / ties[i][j];
      }
    });
  });
  return out;
}

// What a pair adds to dx and dy.
template <typename F, bool kSecond>
struct StripTerm {
  using Functor = F;
  F f;
  static constexpr int kScale = F::kScale;
  static constexpr bool kUsesSums = std::is_same_v<F, Maximum>;
  template <typename L>
  FM_HD void operator()(const L& w, const L& s, const L& x, const L& y, const L& a, const L& b,
                        L& dx, L& dy) const {
    if constexpr (kSecond) {
      f.second(w, x, y, a, b, dx, dy);
    } else {
      f.gradient(w, s, x, y, dx, dy);
    }
  }
};

// The gradient (no a and b), or the part of its derivative that goes to x and y.
template <bool kSecond>
void strips(const Optional& a, const Optional& b, const Tensor& w, const Tensor& x, const Tensor& y,
            const Optional& s, Kind kind, double p, const bool* skip, const Tensor& dx,
            const Tensor& dy) {
  const int64_t B = x.size(0), N = x.size(1), M = y.size(1), D = x.size(2);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    constexpr int64_t kCount = 64 / sizeof(A);
    const Tensor weights = kSecond ? w : shared_weights<A>(w, x, y, s, kind);
    const int64_t columns = strip_columns<A>(M), whole = D / kCount * kCount;
    const int64_t count = ceil_div(whole, columns), all = count + (D > whole);
    for_units<A>(kind, p, B * all, N * M * columns,
                 [&](auto f, auto zeros, int64_t unit) FM_INLINE_LAMBDA {
                   using L = decltype(zeros);
                   using F = decltype(f);
                   const int64_t t = unit / all, strip = unit % all;
                   Strip<A> g;
                   g.w = rows_of<const A>(weights, t), g.s = rows_of<const A>(s, t);
                   g.x = rows_of<const A>(x, t), g.y = rows_of<const A>(y, t);
                   g.a = rows_of<const A>(a, t), g.b = rows_of<const A>(b, t);
                   if (dx.numel() > 0) g.dx = rows_of<A>(dx, t);
                   if (dy.numel() > 0) g.dy = rows_of<A>(dy, t);
                   g.skip = skip == nullptr ? nullptr : skip + t * N;
                   g.n = N, g.m = M;
                   g.k = strip == count ? whole : strip * columns;
                   g.count = strip == count ? D - whole : least(columns, whole - g.k);
                   alignas(64) L memory[4 * kStripCells];
                   const StripTerm<F, kSecond> term{f};
                   if (strip == count) {
                     strip_pass<L, true, false, kSecond>(g, 1, memory, term);
                   } else if (g.count == kCount) {
                     strip_pass<L, true, true, kSecond>(g, 1, memory, term);
                   } else {
                     strip_pass<L, false, true, kSecond>(g, g.count / kCount, memory, term);
                   }
                 });
  });
}

}  // namespace

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

void pair_gradient(const Tensor& w, const Tensor& x, const Tensor& y, const Optional& s, Kind kind,
                   double p, const bool* skip, const Tensor& dx, const Tensor& dy) {
  strips<false>({}, {}, w, x, y, s, kind, p, skip, dx, dy);
}

namespace {

Tensor if_wanted(bool wanted, const Tensor& like) {
  if (!wanted) return empty_rows({0}, like.scalar_type(), like);
  return empty_rows({like.size(0), like.size(1), like.size(2)}, like.scalar_type(), like);
}

std::tuple<Tensor, Tensor> backward(Tensor w, Tensor x, Tensor y, Optional s, int64_t kind,
                                    double p, int64_t needs) {
  const Tensor dx = if_wanted(needs & kX, x), dy = if_wanted(needs & kY, y);
  pair_gradient(w, x, y, s, Kind(kind), p, nullptr, dx, dy);
  return {dx, dy};
}

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

// How much smaller than |x|^2 + |y|^2 a square may be before it is evaluated as a difference: five
// bits of it are lost by then.
constexpr int kCancels = 32;

// dots x y^T -> |x|^2 + |y|^2 - 2 dots.
void squares(Tensor dots, Tensor x, Tensor y, Tensor xx, Tensor yy) {
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
  m.impl("pairwise_sums_backward", TORCH_BOX(&backward));
  m.impl("pairwise_sums_double_backward", TORCH_BOX(&double_backward));
  m.impl("pairwise_squares_", TORCH_BOX(&squares));
}

}  // namespace fastmeta
