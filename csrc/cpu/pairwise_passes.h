// How sums of pairs and their derivatives are divided on the CPU: into rows of x, or for
// derivatives into strips of columns.
#pragma once

#include "cpu/pairwise.h"

namespace fastmeta {

constexpr int64_t kChunkRows = 64;  // rows of x in one unit of parallel work

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

constexpr int64_t kX = 1, kY = 2, kW = 4;  // bits of `needs`

// For a maximum, its weight divided by the number of coordinates that attain it; else w itself.
template <typename A>
Tensor shared_weights(const Tensor& w, const Tensor& x, const Tensor& y,
                      const std::optional<Tensor>& s, Kind kind) {
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
void strips(const std::optional<Tensor>& a, const std::optional<Tensor>& b, const Tensor& w,
            const Tensor& x, const Tensor& y, const std::optional<Tensor>& s, Kind kind, double p,
            const bool* skip, const Tensor& dx, const Tensor& dy) {
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

inline Tensor if_wanted(bool wanted, const Tensor& like) {
  return if_wanted(wanted, {like.size(0), like.size(1), like.size(2)}, like);
}

}  // namespace fastmeta
