// Matrix products of a batch of small and middling matrices on the CPU: to = A B + base.
// A library's product packs both operands for a size where packing is cheap; here A is read where
// it lies, B only repacked where its columns are not adjacent. Sums use fused multiply-adds, in the
// order of k whatever the blocking; with the number of threads they do not change.
#pragma once

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")  // setup.py turns it off for everything else
#endif

#include <vector>

#include "cpu/lanes.h"

namespace fastmeta {
namespace batched {

// A: [m, k], any strides. B: [k, n] with one of its strides 1. base and to: [m, n] with adjacent
// columns; base may be null (then 0), `to` itself, or one row (row stride 0). F: what the factors
// are made of.
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

  static constexpr int kMost = 6;
  Fetch fetches[kMost];
  int phases = 0;
  int64_t steps;  // of k that no fetch has

  void fetch(const void* at, int64_t step, int64_t count) {
    count = least(count, steps);
    fetches[phases++] = {static_cast<const char*>(at), step, count};
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
  using Row = Lanes<F, kBytes>;
  L sums[R][V];
  FM_UNROLL for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = L::all(0);
  }
  constexpr int kTriples = ceil_div(R, 3);  // an address in each: few registers for many rows
  const F* a[kTriples];
  const int64_t a_row = tile.a_row, a_column = tile.a_column, b_row = tile.b_row;
  for (int i = 0; i < kTriples; ++i) a[i] = tile.a + 3 * i * a_row;
  const F* b = tile.b;
  const Fetch* const end = tile.fetches + tile.phases;
  for (const Fetch* fetch = tile.fetches; fetch != end; ++fetch) {
    const char* ahead = fetch->at;
    const int64_t ahead_step = fetch->step;
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
        sums[r][v] = sums[r][v] + L::template load<kWhole>(from + v * L::kCount, tile.columns);
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
    Tile<A, F> tile{p.a + i * p.a_row,       p.a_row,  p.a_column, b, b_row, nullptr, p.base_row,
                    p.to + i * p.to_row + j, p.to_row, count};
    tile.steps = p.k;
    const bool below = block + 1 < blocks;
    const int64_t next_i = below ? i + height : 0;
    const int64_t next_j = below ? j : least(j + V * L::kCount, p.n - 1);
    const A* next = p.to + next_i * p.to_row + next_j;
    for (int v = 0; v < V; ++v) tile.fetch(next + v * L::kCount, p.to_row * sizeof(A), R);
    if (p.base != nullptr) {
      tile.base = p.base + i * p.base_row + j;
      next = p.base + next_i * p.base_row + next_j;
      for (int v = 0; v < V && p.base != p.to; ++v) {
        tile.fetch(next + v * L::kCount, p.base_row * sizeof(A), R);
      }
    }
    const char* line;
    const int64_t lines = ahead.take(tile.steps, &line);
    tile.fetch(line, 64, lines);
    tile.fetch(tile.a, 0, tile.steps);  // is there already
    compute<L, R, V, kWhole, kBytes>(tile, height);
    i += height;
  }
}

// Writes 16 rows of 16 numbers of 4 bytes transposed; r is lost.
template <typename V, typename F>
FM_HD void transpose(V (&r)[16], F* to, int64_t to_row) {
#if __has_builtin(__builtin_shuffle)
  using I = typename Lanes<float, 64>::Bits;
  V t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shuffle(r[i], r[i + 1],
                             (I){0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29});
    t[i + 1] = __builtin_shuffle(r[i], r[i + 1],
                                 (I){2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = __builtin_shuffle(
          t[i + j], t[i + j + 2], (I){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
      r[i + 2 * j + 1] = __builtin_shuffle(
          t[i + j], t[i + j + 2], (I){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = i; j < i + 4; ++j) {
      t[j] = __builtin_shuffle(r[j], r[j + 4],
                               (I){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27});
      t[j + 4] = __builtin_shuffle(r[j], r[j + 4],
                                   (I){4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
    }
  }
  // columns come out as 0-3, 8-11 in the low halves of t[0..3], and so on
  for (int j = 0; j < 8; ++j) {
    const V low = __builtin_shuffle(t[j], t[j + 8],
                                    (I){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
    const V high = __builtin_shuffle(
        t[j], t[j + 8], (I){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    std::memcpy(to + j * to_row, &low, sizeof(V));
    std::memcpy(to + (j + 8) * to_row, &high, sizeof(V));
  }
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j * to_row + i] = r[i][j];
  }
#endif
}

// 16 x 16 floats, transposed in registers: a strided copy would cost as much as the product of
// some ten rows. Only the first `rows` are there, the others count as zeros.
template <int kBytes>
FM_HD void transpose(const float* from, int64_t from_row, int64_t rows, float* to, int64_t to_row) {
  if constexpr (kBytes == 64 && __has_builtin(__builtin_shuffle)) {
    using V = typename Lanes<float, 64>::Vector;
    V r[16];
    for (int i = 0; i < 16; ++i) {
      r[i] = V{};
      if (i < rows) std::memcpy(&r[i], from + i * from_row, sizeof(V));
    }
    transpose(r, to, to_row);
  } else {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) to[j * to_row + i] = i < rows ? from[i * from_row + j] : 0;
    }
  }
}

// `width` columns of B from j on, with adjacent columns: [k, lanes], zeros after `width`.
template <int kBytes, typename A>
FM_HD void pack(const Product<A>& p, int64_t j, int64_t width, int64_t lanes, A* to) {
  const A* b = p.b + j * p.b_column;
  const int64_t rows = p.k, b_row = p.b_row, b_column = p.b_column;
  if constexpr (sizeof(A) == 4) {
    if (b_row == 1) {
      int64_t q = 0;
      for (; q + 16 <= rows; q += 16) {
        for (int64_t v = 0; v < lanes; v += 16) {
          transpose<kBytes>(b + q + v * b_column, b_column, width - v, to + q * lanes + v, lanes);
        }
      }
      for (; q < rows; ++q) {
        for (int64_t v = 0; v < lanes; ++v) to[q * lanes + v] = v < width ? b[q + v * b_column] : 0;
      }
      return;
    }
  }
  for (int64_t q = 0; q < rows; ++q) {
    for (int64_t v = 0; v < width; ++v) to[q * lanes + v] = b[q * b_row + v * b_column];
    for (int64_t v = width; v < lanes; ++v) to[q * lanes + v] = 0;
  }
}

// Columns [first, last) of products of the same sizes and the same B, which is repacked once.
// `panel` holds k * 32 numbers of 4 bytes or k * 16 of 8.
template <typename A>
void run(const Product<A>* products, int64_t count, int64_t first, int64_t last,
         std::vector<A>& panel, Ahead ahead) {
  const Product<A>& p = products[0];
  with_registers([&](auto bytes) FM_INLINE_LAMBDA {
    constexpr int kBytes = bytes();
    using L = Lanes<A, kBytes>;
    // as many sums as the registers hold: 32 of 64 bytes, 16 narrower ones
    constexpr int kRows = kBytes == 64 ? 12 : kBytes == 32 ? 6 : 2, kWide = kBytes == 64 ? 2 : 1;
    constexpr int64_t kLanes = kWide * L::kCount;
    const bool in_place = p.b_column == 1;
    if (!in_place || (last - first) % kLanes != 0) panel.resize(p.k * kLanes);
    int64_t j = first;
    for (; j + kLanes <= last; j += kLanes) {
      const A* b = p.b + j;
      if (!in_place) {
        pack<kBytes>(p, j, kLanes, kLanes, panel.data());
        b = panel.data();
      }
      for (int64_t t = 0; t < count; ++t) {
        columns<L, kRows, kWide, true, kBytes>(products[t], j, b, in_place ? p.b_row : kLanes,
                                               L::kCount, ahead);
      }
    }
    for (; j < last; j += L::kCount) {
      const int64_t width = least(L::kCount, last - j);
      pack<kBytes>(p, j, width, L::kCount, panel.data());
      for (int64_t t = 0; t < count; ++t) {
        columns<L, kRows, 1, false, kBytes>(products[t], j, panel.data(), L::kCount, width, ahead);
      }
    }
  });
}

}  // namespace batched
}  // namespace fastmeta
