// Small matrix products on the CPU: to = scale A B + beta C, register-blocked, one task at a time.
// Every output adds its terms in the order of k, so neither blocking nor instruction set shows.
#pragma once

#include "cpu/lanes.h"

namespace fastmeta {

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

// Rows [i, i + R) and V lanes of columns from j; `count` columns of the last one are there.
template <typename L, int R, int V, bool kWhole, typename A>
FM_HD void gemm_tile(const Gemm<A>& g, int64_t i, int64_t j, int64_t count) {
  L sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = L::all(0);
  }
  const A* a = g.a + i * g.a_row;
  const A* b = g.b + j;
  const int64_t a_row = g.a_row, a_column = g.a_column, ldb = g.ldb;
  for (int64_t q = 0; q < g.k; ++q, a += a_column, b += ldb) {
    L row[V];
    for (int v = 0; v < V; ++v) row[v] = L::template load<kWhole>(b + v * L::kCount, count);
    for (int r = 0; r < R; ++r) {
      const L x = L::all(a[r * a_row]);
      for (int v = 0; v < V; ++v) sums[r][v] = fused(x, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const int64_t at = (i + r) * g.ldto + j;
    for (int v = 0; v < V; ++v) {
      L out = g.scale * sums[r][v];
      if (g.c != nullptr) {
        out = out + g.beta * L::template load<kWhole>(g.c + at + v * L::kCount, count);
      }
      out.template store<kWhole>(g.to + at + v * L::kCount, count);
    }
  }
}

// The tile of `height` rows, at most R.
template <typename L, int R, int V, bool kWhole, typename A>
FM_HD void lower_tile(const Gemm<A>& g, int64_t i, int64_t j, int64_t count, int64_t height) {
  if constexpr (R > 1) {
    if (height < R) return lower_tile<L, R - 1, V, kWhole>(g, i, j, count, height);
  }
  gemm_tile<L, R, V, kWhole>(g, i, j, count);
}

template <typename L, int R, int V, bool kWhole, typename A>
FM_HD void gemm_columns(const Gemm<A>& g, int64_t j, int64_t count) {
  // blocks of nearly equal height, at most R
  const int64_t blocks = ceil_div(g.m, R);
  for (int64_t block = 0, i = 0; block < blocks; ++block) {
    const int64_t height = (g.m - i) / (blocks - block);
    lower_tile<L, R, V, kWhole>(g, i, j, count, height);
    i += height;
  }
}

template <typename A>
void gemm(const Gemm<A>& g) {
  if (g.m <= 0 || g.n <= 0) return;
  with_registers([&](auto bytes) FM_INLINE_LAMBDA {
    using L = Lanes<A, bytes()>;
    // as many sums as the registers hold: 32 of 64 bytes, 16 narrower ones
    constexpr int kRows = bytes() == 16 ? 2 : 6, kWide = bytes() == 64 ? 2 : 1;
    int64_t j = 0;
    for (; j + kWide * L::kCount <= g.n; j += kWide * L::kCount) {
      gemm_columns<L, kRows, kWide, true>(g, j, L::kCount);
    }
    for (; j + L::kCount <= g.n; j += L::kCount) {
      gemm_columns<L, kRows, 1, true>(g, j, L::kCount);
    }
    if (j < g.n) gemm_columns<L, kRows, 1, false>(g, j, g.n - j);
  });
}

}  // namespace fastmeta
