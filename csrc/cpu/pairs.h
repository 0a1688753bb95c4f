// All pairs of rows of x and y on the CPU: sums over their coordinates, which lie in vector lanes,
// the gradient of those, and its derivative. One functor per kind of sum, the same names as in
// Triton.
#pragma once

#include "cpu/lanes.h"

namespace fastmeta {

enum class Kind : int64_t { kSquares, kAbsolute, kPower, kMaximum, kProduct };

// A functor has, for coordinates x and y of a pair, the sum s of the pair and its weight w:
//   add(sum, x, y)                      the sum with one more term f(x, y)
//   total(lanes)                        the sum over all lanes
//   gradient(w, s, x, y, dx, dy)        dx += w f_x, dy += w f_y
//   along(sum, s, x, y, a, b)           sum + f_x a + f_y b
//   second(w, x, y, a, b, dx, dy)       dx += w (f_xx a + f_xy b), dy += w (f_xy a + f_yy b)
#define FM_F            \
  template <typename L> \
  FM_HD

struct Squares {
  FM_F L add(const L& sum, const L& x, const L& y) const {
    const L z = x - y;
    return fused(z, z, sum);
  }
  FM_F typename L::Number total(const L& lanes) const { return lanes.sum(); }
  FM_F void gradient(const L& w, const L&, const L& x, const L& y, L& dx, L& dy) const {
    const L z = x - y;  // half of it: see kScale
    dx = fused(w, z, dx);
    dy = fused_less(w, z, dy);
  }
  FM_F L along(const L& sum, const L&, const L& x, const L& y, const L& a, const L& b) const {
    return fused(x - y, a - b, sum);
  }
  FM_F void second(const L& w, const L&, const L&, const L& a, const L& b, L& dx, L& dy) const {
    const L z = a - b;
    dx = fused(w, z, dx);
    dy = fused_less(w, z, dy);
  }
  static constexpr int kScale = 2;  // of derivatives, applied to the weights and to `along` sums
};

struct Product {
  FM_F L add(const L& sum, const L& x, const L& y) const { return fused(x, y, sum); }
  FM_F typename L::Number total(const L& lanes) const { return lanes.sum(); }
  FM_F void gradient(const L& w, const L&, const L& x, const L& y, L& dx, L& dy) const {
    dx = fused(w, y, dx);
    dy = fused(w, x, dy);
  }
  FM_F L along(const L& sum, const L&, const L& x, const L& y, const L& a, const L& b) const {
    return fused(y, a, fused(x, b, sum));
  }
  FM_F void second(const L& w, const L&, const L&, const L& a, const L& b, L& dx, L& dy) const {
    dx = fused(w, b, dx);
    dy = fused(w, a, dy);
  }
  static constexpr int kScale = 1;
};

struct Absolute {
  FM_F L add(const L& sum, const L& x, const L& y) const { return sum + absolute(x - y); }
  FM_F typename L::Number total(const L& lanes) const { return lanes.sum(); }
  FM_F void gradient(const L& w, const L&, const L& x, const L& y, L& dx, L& dy) const {
    const L t = times_sign(w, x - y);
    dx = dx + t;
    dy = dy - t;
  }
  FM_F L along(const L& sum, const L&, const L& x, const L& y, const L& a, const L& b) const {
    return sum + times_sign(a - b, x - y);
  }
  FM_F void second(const L&, const L&, const L&, const L&, const L&, L&, L&) const {}  // zero
  static constexpr int kScale = 1;
};

struct Maximum {
  FM_F L add(const L& sum, const L& x, const L& y) const { return larger(sum, absolute(x - y)); }
  FM_F typename L::Number total(const L& lanes) const { return lanes.largest(); }
  // w is shared by the coordinates that attain the maximum s already
  FM_F void gradient(const L& w, const L& s, const L& x, const L& y, L& dx, L& dy) const {
    const L z = x - y;
    const L t = where_equal(absolute(z), s, times_sign(w, z));
    dx = dx + t;
    dy = dy - t;
  }
  FM_F L along(const L& sum, const L& s, const L& x, const L& y, const L& a, const L& b) const {
    const L z = x - y;
    return sum + where_equal(absolute(z), s, times_sign(a - b, z));
  }
  FM_F void second(const L&, const L&, const L&, const L&, const L&, L&, L&) const {}  // zero
  static constexpr int kScale = 1;
};

// The number of coordinates that attain the maximum s.
struct Ties : Maximum {
  FM_F L along(const L& sum, const L& s, const L& x, const L& y, const L&, const L&) const {
    return sum + where_equal(absolute(x - y), s, L::all(1));
  }
};

struct Power {
  double p;
  // factor |z|^exponent, 0 at 0; lane by lane, as there is no vector of powers
  FM_F L power(const L& z, double factor, double exponent) const {
    using A = typename L::Number;
    A x[L::kCount];
    absolute(z).template store<true>(x, L::kCount);
    for (A& v : x) {
      v = v == A(0) ? A(0) : A(factor) * static_cast<A>(std::pow(v, static_cast<A>(exponent)));
    }
    return L::template load<true>(x, L::kCount);
  }
  FM_F L add(const L& sum, const L& x, const L& y) const { return sum + power(x - y, 1, p); }
  FM_F typename L::Number total(const L& lanes) const { return lanes.sum(); }
  FM_F void gradient(const L& w, const L&, const L& x, const L& y, L& dx, L& dy) const {
    const L z = x - y, t = times_sign(w * power(z, p, p - 1), z);
    dx = dx + t;
    dy = dy - t;
  }
  FM_F L along(const L& sum, const L&, const L& x, const L& y, const L& a, const L& b) const {
    const L z = x - y;
    return sum + times_sign((a - b) * power(z, p, p - 1), z);
  }
  FM_F void second(const L& w, const L& x, const L& y, const L& a, const L& b, L& dx, L& dy) const {
    const L t = w * (a - b) * power(x - y, p * (p - 1), p - 2);
    dx = dx + t;
    dy = dy - t;
  }
  static constexpr int kScale = 1;
};
#undef FM_F

// Calls f with the functor of `kind`.
template <typename F>
FM_HD void with_kind(Kind kind, double p, const F& f) {
  switch (kind) {
    case Kind::kSquares:
      return f(Squares{});
    case Kind::kAbsolute:
      return f(Absolute{});
    case Kind::kPower:
      return f(Power{p});
    case Kind::kMaximum:
      return f(Maximum{});
    default:
      return f(Product{});
  }
}

// Rows of D adjacent numbers; a missing array has no data.
template <typename A>
struct Rows {
  A* data = nullptr;
  int64_t stride = 0;
  FM_HD A* operator[](int64_t i) const { return data + i * stride; }
};

// Rows of x and of y that a kernel takes at once: what is read of one serves all of the other, and
// the registers hold their sums.
template <typename F, typename L>
constexpr int kTogether = L::kParts == 1 && !std::is_same_v<F, Power> ? 4 : 1;
template <typename L>
constexpr int kAcross = L::kParts == 4 ? 2 : 5;

// sums[i + r][j + c] of the pairs of R rows of x and J rows of y. kAhead fetches the next R rows of
// x, which are short for a prefetcher of the hardware.
template <int R, int J, bool kAhead, typename L, typename A, typename F>
FM_HD void sums_of(const F& f, const Rows<const A>& x, const Rows<const A>& y, int64_t i, int64_t j,
                   int64_t width, const Rows<A>& sums) {
  L lanes[R][J];
  for (auto& row : lanes) {
    for (L& lane : row) lane = L::all(0);
  }
  const auto step = [&](auto whole, int64_t k) FM_INLINE_LAMBDA {
    constexpr bool kWhole = decltype(whole)::value;
    L here[R];
    FM_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (kAhead) __builtin_prefetch(x[i + R + r] + k);
      here[r] = L::template load<kWhole>(x[i + r] + k, width - k);
    }
    FM_UNROLL
    for (int c = 0; c < J; ++c) {
      const L there = L::template load<kWhole>(y[j + c] + k, width - k);
      FM_UNROLL
      for (int r = 0; r < R; ++r) lanes[r][c] = f.add(lanes[r][c], here[r], there);
    }
  };
  int64_t k = 0;
  for (; k + L::kCount <= width; k += L::kCount) step(std::true_type{}, k);
  if (k < width) step(std::false_type{}, k);
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < J; ++c) sums[i + r][j + c] = f.total(lanes[r][c]);
  }
}

// At most J rows of y.
template <int R, int J, bool kAhead, typename L, typename A, typename F>
FM_HD void sums_of_some(const F& f, const Rows<const A>& x, const Rows<const A>& y, int64_t i,
                        int64_t j, int64_t count, int64_t width, const Rows<A>& sums) {
  if constexpr (J > 1) {
    if (count < J) return sums_of_some<R, J - 1, kAhead, L>(f, x, y, i, j, count, width, sums);
  }
  sums_of<R, J, kAhead, L>(f, x, y, i, j, width, sums);
}

constexpr int64_t kNear = 16384;  // bytes of y that stay in the first cache while x passes

// sums [n, m] of rows [begin, end) of x with all m of y.
template <typename L, typename A, typename F>
FM_HD void sums_of_pairs(const F& f, const Rows<const A>& x, const Rows<const A>& y, int64_t begin,
                         int64_t end, int64_t m, int64_t width, const Rows<A>& sums) {
  constexpr int R = kTogether<F, L>, J = kAcross<L>;
  const int64_t block = J * most(1, kNear / (J * most(1, width) * int64_t(sizeof(A))));
  for (int64_t from = 0; from < m; from += block) {
    const int64_t to = least(from + block, m);
    const auto rows = [&](auto some, int64_t i) FM_INLINE_LAMBDA {
      constexpr int kSome = decltype(some)::value;
      if (m <= J) return sums_of_some<kSome, J, true, L>(f, x, y, i, 0, m, width, sums);
      for (int64_t j = from; j < to; j += J) {
        sums_of_some<kSome, J, false, L>(f, x, y, i, j, to - j, width, sums);
      }
    };
    int64_t i = begin;
    for (; R > 1 && i + R <= end; i += R) rows(std::integral_constant<int, R>{}, i);
    for (; i < end; ++i) rows(std::integral_constant<int, 1>{}, i);
  }
}

// out [n, m] = sum over coordinates of f_x a + f_y b.
template <typename L, typename A, typename F>
FM_HD void along_pairs(const F& f, const Rows<const A>& x, const Rows<const A>& y,
                       const Rows<const A>& a, const Rows<const A>& b, const Rows<const A>& s,
                       int64_t begin, int64_t end, int64_t m, int64_t width, const Rows<A>& out) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const L sum_of_pair = L::all(s.data ? s[i][j] : A(0));
      L sum = L::all(0);
      const auto step = [&](auto whole, int64_t k) FM_INLINE_LAMBDA {
        constexpr bool kWhole = decltype(whole)::value;
        const auto get = [&](const Rows<const A>& t, int64_t row) FM_INLINE_LAMBDA {
          return t.data ? L::template load<kWhole>(t[row] + k, width - k) : L::all(0);
        };
        sum = f.along(sum, sum_of_pair, get(x, i), get(y, j), get(a, i), get(b, j));
      };
      int64_t k = 0;
      for (; k + L::kCount <= width; k += L::kCount) step(std::true_type{}, k);
      if (k < width) step(std::false_type{}, k);
      out[i][j] = A(F::kScale) * sum.sum();
    }
  }
}

// A strip of columns [k, k + count) of everything: each strip owns its part of dx and dy, so that
// threads share nothing and every sum has one order.
template <typename A>
struct Strip {
  Rows<const A> w, s, x, y, a, b;  // w, s [n, m]; x, a [n, D]; y, b [m, D]
  Rows<A> dx, dy;                  // missing where not wanted
  const bool* skip;                // [n] rows of x that reach nothing, or null
  int64_t n, m, k, count;
};

// Rows of y at a time, and lanes of them: as much as stays in the first cache.
constexpr int64_t kStripRows = 128, kStripCells = 160, kMostLanes = 32;

// R rows of x, `rows`, with J rows of y from cell `from` of the buffers; dx[r] gets or, unless
// `fresh`, already has a part of row r's. Weights stay in registers.
template <typename L, int R, int J, bool kSingle, bool kWhole, bool kCotangents, typename A,
          typename Term>
FM_HD void strip_rows(const Strip<A>& g, int64_t given, const int64_t* rows, int64_t j,
                      int64_t cell, const L* y, const L* b, L* dy, A* const* dx, const Term& term) {
  const int64_t lanes = kSingle ? 1 : given;
  L w[R][J], s[R][J];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < J; ++c) {
      w[r][c] = L::all(A(Term::kScale) * g.w[rows[r]][j + c]);
      s[r][c] = Term::kUsesSums ? L::all(g.s[rows[r]][j + c]) : L::all(0);
    }
  }
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t k = g.k + l * L::kCount, count = least(L::kCount, g.count - l * L::kCount);
    L x[R], a[R], dx_here[R];
    FM_UNROLL
    for (int r = 0; r < R; ++r) {
      x[r] = L::template load<kWhole>(g.x[rows[r]] + k, count);
      a[r] = dx_here[r] = L::all(0);
      if (kCotangents && g.a.data) a[r] = L::template load<kWhole>(g.a[rows[r]] + k, count);
      if (j > 0) dx_here[r] = L::template load<true>(dx[r] + l * L::kCount, 0);
    }
    FM_UNROLL
    for (int c = 0; c < J; ++c) {
      const int64_t at = cell + c * lanes + l;
      const L y_here = y[at];
      L dy_here = dy[at];
      FM_UNROLL
      for (int r = 0; r < R; ++r) {
        term(w[r][c], s[r][c], x[r], y_here, a[r], kCotangents ? b[at] : a[r], dx_here[r], dy_here);
      }
      dy[at] = dy_here;
    }
    FM_UNROLL
    for (int r = 0; r < R; ++r) dx_here[r].template store<true>(dx[r] + l * L::kCount, 0);
  }
}

// At most J rows of y.
template <typename L, int R, int J, bool kSingle, bool kWhole, bool kCotangents, typename... Rest>
FM_HD void strip_rows_of(int64_t count, const Rest&... rest) {
  if constexpr (J > 1) {
    if (count < J) {
      return strip_rows_of<L, R, J - 1, kSingle, kWhole, kCotangents>(count, rest...);
    }
  }
  strip_rows<L, R, J, kSingle, kWhole, kCotangents>(rest...);
}

// term(w, s, x, y, a, b, dx, dy) for every pair; Term::kScale multiplies the weights. `memory`
// holds 4 kStripCells lanes.
template <typename L, bool kSingle, bool kWhole, bool kCotangents, typename A, typename Term>
FM_HD void strip_pass(const Strip<A>& g, int64_t given, L* memory, const Term& term) {
  constexpr int R = kSingle || kCotangents ? 1 : kTogether<typename Term::Functor, L>;
  constexpr int J = L::kParts == 4 ? 1 : R > 1 ? 5 : 4;
  const int64_t lanes = kSingle ? 1 : given;
  L* const y = memory;
  L* const b = memory + kStripCells;
  L* const dy = memory + 2 * kStripCells;
  A* const spare = reinterpret_cast<A*>(memory + 3 * kStripCells);
  const int64_t cells = least(kStripRows, most(1, kStripCells / lanes));
  const auto at = [&](int64_t l) { return g.k + l * L::kCount; };
  const auto here = [&](int64_t l) { return least(L::kCount, g.count - l * L::kCount); };
  for (int64_t i = 0; g.dx.data && i < g.n; ++i) {
    if (g.m == 0 || (g.skip != nullptr && g.skip[i])) {
      std::memset(g.dx[i] + g.k, 0, g.count * sizeof(A));
    }
  }
  for (int64_t from = 0; from < g.m; from += cells) {
    const int64_t to = least(from + cells, g.m);
    for (int64_t j = from; j < to; ++j) {
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t cell = (j - from) * lanes + l;
        y[cell] = L::template load<kWhole>(g.y[j] + at(l), here(l));
        if (kCotangents && g.b.data) b[cell] = L::template load<kWhole>(g.b[j] + at(l), here(l));
        if (kCotangents && !g.b.data) b[cell] = L::all(0);
        dy[cell] = L::all(0);
      }
    }
    const auto pass = [&](auto some, const int64_t* rows) FM_INLINE_LAMBDA {
      constexpr int kSome = decltype(some)::value;
      A* dx[kSome];  // whole lanes are summed where they belong
      for (int r = 0; r < kSome; ++r) {
        dx[r] = spare + r * kMostLanes * L::kCount;
        if (kWhole && g.dx.data) dx[r] = g.dx[rows[r]] + g.k;
        if (!kWhole && from > 0 && g.dx.data) {
          std::memcpy(dx[r], g.dx[rows[r]] + g.k, g.count * sizeof(A));
        }
      }
      for (int64_t j = from; j < to; j += J) {
        strip_rows_of<L, kSome, J, kSingle, kWhole, kCotangents>(
            to - j, g, lanes, rows, j, (j - from) * lanes, y, b, dy, dx, term);
      }
      for (int r = 0; !kWhole && g.dx.data && r < kSome; ++r) {
        std::memcpy(g.dx[rows[r]] + g.k, dx[r], g.count * sizeof(A));
      }
    };
    int64_t rows[R];
    int count = 0;
    for (int64_t i = 0; i < g.n; ++i) {
      if (g.skip != nullptr && g.skip[i]) continue;
      rows[count++] = i;
      if (count < R) continue;
      pass(std::integral_constant<int, R>{}, rows);
      count = 0;
    }
    for (int r = 0; R > 1 && r < count; ++r) pass(std::integral_constant<int, 1>{}, rows + r);
    for (int64_t j = from; g.dy.data && j < to; ++j) {
      for (int64_t l = 0; l < lanes; ++l) {
        dy[(j - from) * lanes + l].template store<kWhole>(g.dy[j] + at(l), here(l));
      }
    }
  }
}

// Columns of a strip for m rows of y: whole lanes, wider the fewer there are.
template <typename A>
int64_t strip_columns(int64_t m) {
  constexpr int64_t kCount = 64 / sizeof(A);
  return kCount * most(1, least(kMostLanes, kStripCells / most(1, least(m, kStripRows))));
}

}  // namespace fastmeta
