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
    return sum + z * z;
  }
  FM_F typename L::Number total(const L& lanes) const { return lanes.sum(); }
  FM_F void gradient(const L& w, const L&, const L& x, const L& y, L& dx, L& dy) const {
    const L t = w * (x - y);  // half of it: see kScale
    dx = dx + t;
    dy = dy - t;
  }
  FM_F L along(const L& sum, const L&, const L& x, const L& y, const L& a, const L& b) const {
    return sum + (x - y) * (a - b);
  }
  FM_F void second(const L& w, const L&, const L&, const L& a, const L& b, L& dx, L& dy) const {
    const L t = w * (a - b);
    dx = dx + t;
    dy = dy - t;
  }
  static constexpr int kScale = 2;  // of derivatives, applied to the weights and to `along` sums
};

struct Product {
  FM_F L add(const L& sum, const L& x, const L& y) const { return sum + x * y; }
  FM_F typename L::Number total(const L& lanes) const { return lanes.sum(); }
  FM_F void gradient(const L& w, const L&, const L& x, const L& y, L& dx, L& dy) const {
    dx = dx + w * y;
    dy = dy + w * x;
  }
  FM_F L along(const L& sum, const L&, const L& x, const L& y, const L& a, const L& b) const {
    return sum + (y * a + x * b);
  }
  FM_F void second(const L& w, const L&, const L&, const L& a, const L& b, L& dx, L& dy) const {
    dx = dx + w * b;
    dy = dy + w * a;
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

// out[j] = sum of f over the coordinates of (x, y_j) for J rows of y.
template <int J, typename L, typename A, typename F>
FM_HD void sums_of(const F& f, const A* x, const Rows<const A>& y, int64_t j, int64_t width,
                   A* out) {
  L sums[J];
  for (int c = 0; c < J; ++c) sums[c] = L::all(0);
  int64_t k = 0;
  for (; k + L::kCount <= width; k += L::kCount) {
    const L here = L::template load<true>(x + k, 0);
    for (int c = 0; c < J; ++c) {
      sums[c] = f.add(sums[c], here, L::template load<true>(y[j + c] + k, 0));
    }
  }
  if (k < width) {
    const L here = L::template load<false>(x + k, width - k);
    for (int c = 0; c < J; ++c) {
      sums[c] = f.add(sums[c], here, L::template load<false>(y[j + c] + k, width - k));
    }
  }
  for (int c = 0; c < J; ++c) out[c] = f.total(sums[c]);
}

// At most J rows of y.
template <int J, typename L, typename A, typename F>
FM_HD void sums_of_some(const F& f, const A* x, const Rows<const A>& y, int64_t j, int64_t count,
                        int64_t width, A* out) {
  if constexpr (J > 1) {
    if (count < J) return sums_of_some<J - 1, L>(f, x, y, j, count, width, out);
  }
  sums_of<J, L>(f, x, y, j, width, out);
}

// Sums that the registers hold at once.
template <typename L>
constexpr int kAcross = L::kParts == 4 ? 2 : 5;
constexpr int64_t kNear = 16384;  // bytes of y that stay in the first cache while x passes

// sums [n, m] of rows [begin, end) of x with all m of y.
template <typename L, typename A, typename F>
FM_HD void sums_of_pairs(const F& f, const Rows<const A>& x, const Rows<const A>& y, int64_t begin,
                         int64_t end, int64_t m, int64_t width, const Rows<A>& sums) {
  constexpr int J = kAcross<L>;
  const int64_t block = J * most(1, kNear / (J * most(1, width) * int64_t(sizeof(A))));
  for (int64_t from = 0; from < m; from += block) {
    const int64_t to = least(from + block, m);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = from; j < to; j += J) {
        sums_of_some<J, L>(f, x[i], y, j, least(J, to - j), width, sums[i] + j);
      }
    }
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
constexpr int64_t kStripRows = 128, kStripCells = 160;

// One row of x with J rows of y from cell `from` of the buffers: its weights stay in registers.
template <typename L, int J, bool kSingle, bool kWhole, bool kCotangents, typename A, typename Term>
FM_HD void strip_row(const Strip<A>& g, int64_t given, int64_t i, int64_t j, int64_t cell,
                     bool fresh, const L* y, const L* b, L* dy, A* dx_row, const Term& term) {
  const int64_t lanes = kSingle ? 1 : given;
  L w[J], s[J];
  for (int c = 0; c < J; ++c) {
    w[c] = L::all(A(Term::kScale) * g.w[i][j + c]);
    s[c] = Term::kUsesSums ? L::all(g.s[i][j + c]) : L::all(0);
  }
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t k = g.k + l * L::kCount, count = least(L::kCount, g.count - l * L::kCount);
    const L x = L::template load<kWhole>(g.x[i] + k, count);
    L a = L::all(0), dx = L::all(0);
    if (kCotangents && g.a.data) a = L::template load<kWhole>(g.a[i] + k, count);
    if (!fresh) dx = L::template load<true>(dx_row + l * L::kCount, 0);
    for (int c = 0; c < J; ++c) {
      const int64_t at = cell + c * lanes + l;
      term(w[c], s[c], x, y[at], a, kCotangents ? b[at] : a, dx, dy[at]);
    }
    dx.template store<true>(dx_row + l * L::kCount, 0);
  }
}

// At most J rows of y.
template <typename L, int J, bool kSingle, bool kWhole, bool kCotangents, typename... Rest>
FM_HD void strip_row_of(int64_t rows, const Rest&... rest) {
  if constexpr (J > 1) {
    if (rows < J) return strip_row_of<L, J - 1, kSingle, kWhole, kCotangents>(rows, rest...);
  }
  strip_row<L, J, kSingle, kWhole, kCotangents>(rest...);
}

// term(w, s, x, y, a, b, dx, dy) for every pair; Term::kScale multiplies the weights. `memory`
// holds 4 kStripCells lanes.
template <typename L, bool kSingle, bool kWhole, bool kCotangents, typename A, typename Term>
FM_HD void strip_pass(const Strip<A>& g, int64_t given, L* memory, const Term& term) {
  constexpr int J = L::kParts == 4 ? 1 : 4;
  const int64_t lanes = kSingle ? 1 : given;
  L* const y = memory;
  L* const b = memory + kStripCells;
  L* const dy = memory + 2 * kStripCells;
  A* const dx = reinterpret_cast<A*>(memory + 3 * kStripCells);
  const int64_t rows = least(kStripRows, most(1, kStripCells / lanes));
  const auto at = [&](int64_t l) { return g.k + l * L::kCount; };
  const auto here = [&](int64_t l) { return least(L::kCount, g.count - l * L::kCount); };
  const auto zeros = [&](const Rows<A>& t, int64_t n) {
    for (int64_t i = 0; t.data && i < n; ++i) std::memset(t[i] + g.k, 0, g.count * sizeof(A));
  };
  if (g.m == 0) return zeros(g.dx, g.n);
  for (int64_t from = 0; from < g.m; from += rows) {
    const int64_t to = least(from + rows, g.m);
    for (int64_t j = from; j < to; ++j) {
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t cell = (j - from) * lanes + l;
        y[cell] = L::template load<kWhole>(g.y[j] + at(l), here(l));
        if (kCotangents && g.b.data) b[cell] = L::template load<kWhole>(g.b[j] + at(l), here(l));
        if (kCotangents && !g.b.data) b[cell] = L::all(0);
        dy[cell] = L::all(0);
      }
    }
    for (int64_t i = 0; i < g.n; ++i) {
      if (g.skip != nullptr && g.skip[i]) continue;
      if (from > 0 && g.dx.data) std::memcpy(dx, g.dx[i] + g.k, g.count * sizeof(A));
      for (int64_t j = from; j < to; j += J) {
        strip_row_of<L, J, kSingle, kWhole, kCotangents>(to - j, g, lanes, i, j, (j - from) * lanes,
                                                         j == 0, y, b, dy, dx, term);
      }
      if (g.dx.data) std::memcpy(g.dx[i] + g.k, dx, g.count * sizeof(A));
    }
    for (int64_t j = from; g.dy.data && j < to; ++j) {
      for (int64_t l = 0; l < lanes; ++l) {
        dy[(j - from) * lanes + l].template store<kWhole>(g.dy[j] + at(l), here(l));
      }
    }
  }
  for (int64_t i = 0; g.skip != nullptr && i < g.n; ++i) {
    if (g.skip[i] && g.dx.data) std::memset(g.dx[i] + g.k, 0, g.count * sizeof(A));
  }
}

// Columns of a strip for m rows of y: whole lanes, wider the fewer there are.
template <typename A>
int64_t strip_columns(int64_t m) {
  constexpr int64_t kCount = 64 / sizeof(A);
  return kCount * most(1, least(32, kStripCells / most(1, least(m, kStripRows))));
}

}  // namespace fastmeta
