// Small matrix products on the CPU: to = scale A B + beta C, register-blocked, one task at a time.
// Every output adds its terms in the order of k, so neither blocking nor instruction set shows.
#pragma once

#include <cstring>

#include "common/cpu.h"

namespace fastmeta {

// A vector of 64 bytes, whatever the instruction set makes of it.
template <typename A>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(A);
#if defined(__GNUC__)
  typedef A Vector __attribute__((vector_size(64)));
  Vector v;
  FM_HD void zero() { v = Vector{}; }
  FM_HD void add_product(A a, const Lanes& b) { v = v + a * b.v; }
  FM_HD void scaled(A scale, const Lanes& c, A beta) { v = scale * v + beta * c.v; }
  FM_HD void scaled(A scale) { v = scale * v; }
#else
  A v[kCount];
  FM_HD void zero() {
    for (A& x : v) x = 0;
  }
  FM_HD void add_product(A a, const Lanes& b) {
    for (int i = 0; i < kCount; ++i) v[i] = v[i] + a * b.v[i];
  }
  FM_HD void scaled(A scale, const Lanes& c, A beta) {
    for (int i = 0; i < kCount; ++i) v[i] = scale * v[i] + beta * c.v[i];
  }
  FM_HD void scaled(A scale) {
    for (A& x : v) x = scale * x;
  }
#endif
  // `count` adjacent numbers, zeros after them.
  template <bool kWhole>
  FM_HD void load(const A* from, int64_t count) {
    if constexpr (kWhole) {
      std::memcpy(&v, from, sizeof v);
    } else {
      zero();
      std::memcpy(&v, from, size_t(count) * sizeof(A));
    }
  }
  template <bool kWhole>
  FM_HD void store(A* to, int64_t count) const {
    if constexpr (kWhole) {
      std::memcpy(to, &v, sizeof v);
    } else {
      std::memcpy(to, &v, size_t(count) * sizeof(A));
    }
  }
};

// A: [m, k], element (i, j) at a[i * a_row + j * a_column]. B: [k, n] and C: [m, n] with adjacent
// columns. c may be null (then 0) or the output itself.
template <typename A>
struct Gemm {
  int64_t m, n, k;
  const A* a;
  int64_t a_row, a_column;
  const A* b;
  int64_t ldb;
  A* to;
  int64_t ldto;
  A scale;
  const A* c;
  A beta;
};

// Rows [i, i + R) and V vectors of columns from j; `count` columns of the last one are there.
template <int R, int V, bool kWhole, typename A>
FM_HD void gemm_tile(const Gemm<A>& g, int64_t i, int64_t j, int64_t count) {
  constexpr int L = Lanes<A>::kCount;
  Lanes<A> sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v].zero();
  }
  const A* a = g.a + i * g.a_row;
  const A* b = g.b + j;
  const int64_t a_row = g.a_row, a_column = g.a_column, ldb = g.ldb;
  for (int64_t q = 0; q < g.k; ++q, a += a_column, b += ldb) {
    Lanes<A> row[V];
    for (int v = 0; v < V; ++v) row[v].template load<kWhole>(b + v * L, count);
    for (int r = 0; r < R; ++r) {
      const A x = a[r * a_row];
      for (int v = 0; v < V; ++v) sums[r][v].add_product(x, row[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    A* to = g.to + (i + r) * g.ldto + j;
    for (int v = 0; v < V; ++v) {
      if (g.c == nullptr) {
        sums[r][v].scaled(g.scale);
      } else {
        Lanes<A> old;
        old.template load<kWhole>(g.c + (i + r) * g.ldto + j + v * L, count);
        sums[r][v].scaled(g.scale, old, g.beta);
      }
      sums[r][v].template store<kWhole>(to + v * L, count);
    }
  }
}

template <int V, bool kWhole, typename A>
FM_HD void gemm_columns(const Gemm<A>& g, int64_t j, int64_t count) {
  // blocks of nearly equal height, at most 6
  const int64_t blocks = ceil_div(g.m, 6);
  for (int64_t block = 0, i = 0; block < blocks; ++block) {
    const int64_t height = (g.m - i) / (blocks - block);
    switch (height) {
      case 1:
        gemm_tile<1, V, kWhole>(g, i, j, count);
        break;
      case 2:
        gemm_tile<2, V, kWhole>(g, i, j, count);
        break;
      case 3:
        gemm_tile<3, V, kWhole>(g, i, j, count);
        break;
      case 4:
        gemm_tile<4, V, kWhole>(g, i, j, count);
        break;
      case 5:
        gemm_tile<5, V, kWhole>(g, i, j, count);
        break;
      default:
        gemm_tile<6, V, kWhole>(g, i, j, count);
    }
    i += height;
  }
}

// W vectors side by side: 2 where 32 registers hold them, else 1.
template <int W, typename A>
FM_CLONES void gemm_clones(const Gemm<A>& g) {
  constexpr int L = Lanes<A>::kCount;
  int64_t j = 0;
  for (; j + W * L <= g.n; j += W * L) gemm_columns<W, true>(g, j, L);
  for (; W > 1 && j + L <= g.n; j += L) gemm_columns<1, true>(g, j, L);
  if (j < g.n) gemm_columns<1, false>(g, j, g.n - j);
}

inline bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool wide = __builtin_cpu_supports("avx512f") != 0;
  return wide;
#else
  return false;
#endif
}

template <typename A>
void gemm(const Gemm<A>& g) {
  if (g.m <= 0 || g.n <= 0) return;
  has_wide_registers() ? gemm_clones<2>(g) : gemm_clones<1>(g);
}

}  // namespace fastmeta
