// Matrix products of a batch of small and middling matrices on the CPU: to = A B + base.
// A library's product packs both operands for a size where packing is cheap; here both are read
// where they lie, unless their rows evict each other or B's columns are not adjacent. Long sums are
// taken in parts that depend on k alone: with blocking and the number of threads results do not
// change.
#pragma once

#include "cpu/batched_mm_tile.h"

namespace fastmeta {
namespace batched {

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
    if (b_column == 1) std::memcpy(to + q * lanes, b + q * b_row, size_t(width) * sizeof(A));
    for (int64_t v = 0; v < width && b_column != 1; ++v) {
      to[q * lanes + v] = b[q * b_row + v * b_column];
    }
    for (int64_t v = width; v < lanes; ++v) to[q * lanes + v] = 0;
  }
}

// Where a thread keeps repacked factors, and products whose rows it takes together.
template <typename A>
struct Memory {
  std::vector<A> panel, rows, a, b;
  std::vector<int32_t> a_pairs, b_pairs;
  std::vector<Product<A>> products, together;
};

// Steps of k that are summed at a time: the rows of a panel and a few of B's columns stay in the
// second cache.
template <typename A>
constexpr int64_t kDepth = 3072 / sizeof(A);
// Rows that are taken together.
constexpr int64_t kTogether = 768;
// Columns of a panel of B.
template <typename A>
constexpr int64_t kPanel = 2 * Lanes<A, 64>::kCount;

// Rows this far apart evict each other from the first cache.
template <typename A>
bool collides(int64_t stride) {
  return stride * int64_t(sizeof(A)) % 4096 == 0;
}

// Whether B is read where it lies, for so many rows in all: a single tile reads it but once.
template <typename A>
bool in_place(const Product<A>& p, int64_t rows) {
  constexpr int64_t kTile = 12;
  return p.panel_step > 0 || (p.b_column == 1 && (rows <= kTile || !collides<A>(p.b_row)));
}

// Copies A where its rows evict each other; it is read again for every panel of B.
template <typename A>
void spread(std::vector<Product<A>>& products, std::vector<A>& rows) {
  const Product<A>& p = products[0];
  if (p.k == 0 || p.a_column != 1 || !collides<A>(p.a_row) || p.n < 2 * kPanel<A>) return;
  const int64_t row = p.k + Lanes<A, 64>::kCount;
  int64_t all = 0;
  for (const Product<A>& own : products) all += own.m;
  rows.resize(size_t(all * row));
  A* to = rows.data();
  for (Product<A>& own : products) {
    const A* from = own.a;
    own.a = to;
    for (int64_t i = 0; i < own.m; ++i, from += own.a_row, to += row) {
      std::memcpy(to, from, size_t(own.k) * sizeof(A));
    }
    own.a_row = row;
  }
}

// Columns [first, last) of products by the same B, a part of their steps.
template <typename A>
void run_steps(const std::vector<Product<A>>& products, int64_t first, int64_t last,
               std::vector<A>& panel, Ahead& ahead) {
  const Product<A>& p = products[0];
  int64_t rows = 0;
  for (const Product<A>& own : products) rows += own.m;
  with_registers([&](auto bytes) FM_INLINE_LAMBDA {
    constexpr int kBytes = bytes();
    using L = Lanes<A, kBytes>;
    // as many sums as the registers hold: 32 of 64 bytes, 16 narrower ones
    constexpr int kRows = kBytes == 64 ? 12 : kBytes == 32 ? 6 : 2, kWide = kBytes == 64 ? 2 : 1;
    constexpr int64_t kLanes = kWide * L::kCount;
    const bool stays = in_place(p, rows);
    if (!stays || (last - first) % kLanes != 0) panel.resize(p.k * kLanes);
    const auto at = [&](int64_t j, int64_t width, int64_t lanes, int64_t* row) FM_INLINE_LAMBDA {
      *row = p.b_row;
      if (p.panel_step > 0) return p.b + j / kPanel<A> * p.panel_step + j % kPanel<A>;
      if (stays && width == lanes) return p.b + j;
      pack<kBytes>(p, j, width, lanes, panel.data());
      *row = lanes;
      return const_cast<const A*>(panel.data());
    };
    int64_t row, j = first;
    for (; j + kLanes <= last; j += kLanes) {
      const A* b = at(j, kLanes, kLanes, &row);
      for (const Product<A>& own : products) {
        columns<L, kRows, kWide, true, kBytes>(own, j, b, row, L::kCount, ahead);
      }
    }
    for (; j < last; j += L::kCount) {
      const int64_t width = least(L::kCount, last - j);
      const A* b = at(j, width, L::kCount, &row);
      if constexpr (kBytes == 64) {
        if (width <= L::kCount / 2) {  // CPUs take two products of half the width at a time
          for (const Product<A>& own : products) {
            columns<Lanes<A, 32, 32>, kRows, 1, false, 32>(own, j, b, row, width, ahead);
          }
          continue;
        }
      }
      for (const Product<A>& own : products) {
        columns<L, kRows, 1, false, kBytes>(own, j, b, row, width, ahead);
      }
    }
  });
}

// Columns [first, last) of `memory.together`, part by part of k.
template <typename A>
void run_together(int64_t first, int64_t last, Memory<A>& memory, Ahead& ahead) {
  auto& own = memory.products;
  const int64_t k = memory.together[0].k, parts = most(1, ceil_div(k, kDepth<A>));
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = k * part / parts, end = k * (part + 1) / parts;
    own = memory.together;
    for (Product<A>& p : own) {
      p.a += begin * p.a_column;
      p.b += begin * p.b_row;
      p.k = end - begin;
      if (part > 0) {
        p.base = p.to;
        p.base_row = p.to_row;
      }
      if (part + 1 < parts) p.rank = 0;
    }
    spread(own, memory.rows);
    run_steps(own, first, last, memory.panel, ahead);
  }
}

// Columns [first, last) of products of the same sizes, but for their rows, and the same B.
template <typename A>
void run(const Product<A>* products, int64_t count, int64_t first, int64_t last, Memory<A>& memory,
         Ahead ahead) {
  auto& together = memory.together;
  together.clear();
  int64_t room = kTogether;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < products[t].m;) {
      Product<A> p = products[t];
      p.m = least(p.m - i, room);
      p.a += i * p.a_row;
      if (p.base != nullptr) p.base += i * p.base_row;
      p.to += i * p.to_row;
      if (p.rank > 0) p.low += i * p.low_row;
      together.push_back(p);
      i += p.m;
      room -= p.m;
      if (room > 0) continue;
      run_together(first, last, memory, ahead);
      together.clear();
      room = kTogether;
    }
  }
  if (!together.empty()) run_together(first, last, memory, ahead);
}

// The B of a product, repacked as a whole by all threads to [n / kPanel, k, kPanel]; `to` has room
// for `panels_size(n, k)` numbers.
template <typename A>
int64_t panels_size(int64_t n, int64_t k) {
  return ceil_div(n, kPanel<A>) * kPanel<A> * k;
}
template <typename A>
void repack(Product<A>& p, A* to) {
  parallel_ranges(ceil_div(p.n, kPanel<A>), p.k * kPanel<A>, [&](int64_t begin, int64_t end) {
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i * kPanel<A>;
        pack<bytes()>(p, j, least(kPanel<A>, p.n - j), kPanel<A>, to + j * p.k);
      }
    });
  });
  p.b = to;
  p.panel_step = p.k * kPanel<A>;
  p.b_row = kPanel<A>;
  p.b_column = 1;
}

// A product alone.
template <typename A>
void run(const Product<A>& product, Memory<A>& memory) {
  run(&product, 1, 0, product.n, memory, Ahead{});
}

}  // namespace batched
}  // namespace fastmeta
