// The part of a matrix product that registers hold. Sums use fused multiply-adds, in the order of
// k, a second pair of factors after the first, whatever the rows and columns of a tile.
#pragma once

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")  // setup.py turns it off for everything else
#endif

#include "cpu/lanes.h"

namespace fastmeta {
namespace batched {

// A: [m, k], any strides. B: [k, n], best with one of its strides 1. base and to: [m, n] with
// adjacent columns; base may be null (then 0), `to` itself, or one row (row stride 0). F: what the
// factors are made of.
template <typename A, typename F = A>
struct Product {
  int64_t m, n, k;
  const F* a;
  int64_t a_row, a_column;
  const F* b;
  int64_t b_row, b_column;
  const A* base;
  int64_t base_row;
  A* to;
  int64_t to_row;
  // a second pair of factors, [m, rank] and [rank, n] with adjacent columns, whose product is added
  int64_t rank = 0;
  const F* low = nullptr;
  int64_t low_row = 0;
  const F* wide = nullptr;
  int64_t wide_row = 0;
  int64_t panel_step = 0;  // unless 0, B is repacked, to panels of adjacent columns that far apart
};

// What the next product reads, fetched line by line while this one computes: its operands are as
// large as a cache, and would be waited for.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0;
  const char* then = nullptr;  // what comes after that
  int64_t then_lines = 0;

  // The next lines, at most `most`: where they begin, and how many.
  FM_HD int64_t take(int64_t most_lines, const char** from) {
    if (lines == 0) {
      at = then;
      lines = then_lines;
      then_lines = 0;
    }
    const int64_t count = least(lines, most_lines);
    *from = at;
    at += count * 64;
    lines -= count;
    return count;
  }
};

// `count` lines to fetch, one in each step of a tile, `step` bytes apart.
struct Fetch {
  const char* at;
  int64_t step, count;
  bool second;  // steps of the second pair
};

// A part of a product that registers hold: where it reads and writes, all of k.
template <typename A, typename F>
struct Tile {
  const F* a;
  int64_t a_row, a_column;
  const F* b;  // adjacent columns
  int64_t b_row;
  const A* base;
  int64_t base_row;
  A* to;
  int64_t to_row;
  int64_t columns;  // of the last lane

  // the second pair, if there is one
  const F* low;
  int64_t low_row;
  const F* wide;
  int64_t wide_row;

  static constexpr int kMost = 7;
  Fetch fetches[kMost];
  int phases = 0;
  int64_t steps;  // of k that no fetch has

  void fetch(const void* at, int64_t step, int64_t count) {
    count = least(count, steps);
    fetches[phases++] = {static_cast<const char*>(at), step, count, false};
    steps -= count;
  }
};

template <typename V, typename A>
FM_HD void add_product(V& sum, A x, const V& row) {
  sum += x * row;
}
// Of pairs of bfloat16, two steps of k.
template <typename V, typename W>
FM_HD void add_product(V& sum, int32_t x, const W& row) {
#if defined(__x86_64__) && defined(__GNUC__)
  const W all = W{} + x;
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(all), "v"(row));
#endif
}

// R rows, V lanes of columns. One loop has every step, whatever it fetches: between two loops the
// compiler moves all sums through memory, and steps would wait for them.
template <typename L, int R, int V, bool kWhole, int kBytes, typename A, typename F>
FM_HD void compute(const Tile<A, F>& tile) {
  using Row = typename L::template Of<F>;
  L sums[R][V];
  FM_UNROLL for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = L::all(0);
  }
  constexpr int kTriples = ceil_div(R, 3);  // an address in each: few registers for many rows
  const F* a[kTriples];
  int64_t a_row = tile.a_row, a_column = tile.a_column, b_row = tile.b_row;
  for (int i = 0; i < kTriples; ++i) a[i] = tile.a + 3 * i * a_row;
  const F* b = tile.b;
  const Fetch* const end = tile.fetches + tile.phases;
  for (const Fetch* fetch = tile.fetches; fetch != end; ++fetch) {
    const char* ahead = fetch->at;
    const int64_t ahead_step = fetch->step;
    if (fetch->second) {
      for (int i = 0; i < kTriples; ++i) a[i] = tile.low + 3 * i * tile.low_row;
      b = tile.wide;
      a_row = tile.low_row;
      a_column = 1;
      b_row = tile.wide_row;
    }
    for (int64_t left = fetch->count; left > 0; --left) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
      Row row[V];
      for (int v = 0; v < V; ++v) row[v] = Row::template load<true>(b + v * L::kCount, L::kCount);
      FM_UNROLL for (int r = 0; r < R; ++r) {
        const F x = a[r / 3][r % 3 * a_row];
        for (int v = 0; v < V; ++v) {
          for (int w = 0; w < L::kParts; ++w) add_product(sums[r][v].v[w], x, row[v].v[w]);
        }
      }
      for (int i = 0; i < kTriples; ++i) a[i] += a_column;
      b += b_row;
    }
  }
  if (tile.base != nullptr) {
    FM_UNROLL for (int r = 0; r < R; ++r) {
      const A* from = tile.base + r * tile.base_row;
      for (int v = 0; v < V; ++v) {
        const L there = L::template load<kWhole>(from + v * L::kCount, tile.columns);
        for (int w = 0; w < L::kParts; ++w) sums[r][v].v[w] += there.v[w];
      }
    }
  }
  FM_UNROLL for (int r = 0; r < R; ++r) {
    A* to = tile.to + r * tile.to_row;
    for (int v = 0; v < V; ++v) {
      sums[r][v].template store<kWhole>(to + v * L::kCount, tile.columns);
    }
  }
}

// The tile with R rows at most; its own function, for its registers.
template <typename L, int R, int V, bool kWhole, int kBytes, typename A, typename F>
FM_HD void compute(const Tile<A, F>& tile, int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return compute<L, R - 1, V, kWhole, kBytes>(tile, rows);
  }
  apart<kBytes>([&](auto) FM_INLINE_LAMBDA { compute<L, R, V, kWhole, kBytes>(tile); });
}

// All rows of V lanes of columns, in blocks of nearly equal height. What the next block writes and
// adds to is fetched meanwhile, not nearer than the second cache: rows lie a power of two apart,
// and would evict B from the first.
template <typename L, int R, int V, bool kWhole, int kBytes, typename A, typename F>
FM_HD void columns(const Product<A, F>& p, int64_t j, const F* b, int64_t b_row, int64_t count,
                   Ahead& ahead) {
  const int64_t blocks = ceil_div(p.m, R);
  for (int64_t block = 0, i = 0; block < blocks; ++block) {
    const int64_t height = (p.m - i) / (blocks - block);
    Tile<A, F> tile;  // member by member: clearing it would take as long as a short product
    tile.a = p.a + i * p.a_row;
    tile.a_row = p.a_row;
    tile.a_column = p.a_column;
    tile.b = b;
    tile.b_row = b_row;
    tile.base = nullptr;
    tile.to = p.to + i * p.to_row + j;
    tile.to_row = p.to_row;
    tile.columns = count;
    tile.steps = p.k;
    const bool below = block + 1 < blocks;
    const int64_t next_i = below ? i + height : 0;
    const int64_t next_j = below ? j : least(j + V * L::kCount, p.n - 1);
    const A* next = p.to + next_i * p.to_row + next_j;
    for (int v = 0; v < V; ++v) tile.fetch(next + v * L::kCount, p.to_row * sizeof(A), R);
    if (p.base != nullptr) {
      tile.base = p.base + i * p.base_row + j;
      tile.base_row = p.base_row;
      next = p.base + next_i * p.base_row + next_j;
      for (int v = 0; v < V && p.base != p.to; ++v) {
        tile.fetch(next + v * L::kCount, p.base_row * sizeof(A), R);
      }
    }
    const char* line;
    const int64_t lines = ahead.take(tile.steps, &line);
    tile.fetch(line, 64, lines);
    tile.fetch(tile.a, 0, tile.steps);  // is there already
    if (p.rank > 0) {
      tile.low = p.low + i * p.low_row;
      tile.low_row = p.low_row;
      tile.wide = p.wide + j;
      tile.wide_row = p.wide_row;
      tile.fetches[tile.phases++] = {reinterpret_cast<const char*>(tile.a), 0, p.rank, true};
    }
    compute<L, R, V, kWhole, kBytes>(tile, height);
    i += height;
  }
}

}  // namespace batched
}  // namespace fastmeta
