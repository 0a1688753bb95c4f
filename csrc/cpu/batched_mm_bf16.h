// Products of matrices that are rounded to bfloat16 first; sums are of the matrices' own type.
// Where the CPU multiplies pairs of bfloat16 (AVX-512 BF16, twice as many products an instruction),
// both factors are repacked as pairs of adjacent steps of k; elsewhere as rounded numbers.
#pragma once

#include "cpu/batched_mm.h"

namespace fastmeta {
namespace batched {

// Columns of a panel of B, and how many pairs are in one: [k / 2 and room, kPairs].
constexpr int64_t kPairs = 32;
FM_HD constexpr int64_t pair_panel(int64_t k) { return ceil_div(k, 32) * 16 * kPairs; }

#if defined(__x86_64__) && defined(__GNUC__)

using Floats = Lanes<float, 64>;
using Words = Lanes<int32_t, 64>;

// 16 pairs: of the numbers of `first`, then of `second`.
FM_HD Words::Vector pairs(const Floats& first, const Floats& second) {
  Words::Vector out;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(out) : "v"(second.v[0]), "v"(first.v[0]));
  return out;
}

// 16 pairs of a number of `first` and the one of `second` below it.
FM_HD Words::Vector interleaved(const Floats& first, const Floats& second) {
  typedef int16_t Places __attribute__((vector_size(64)));
  constexpr Places kPlaces = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Words::Vector out;
  asm("vpermw %2, %1, %0" : "=v"(out) : "v"(kPlaces), "v"(pairs(first, second)));
  return out;
}

FM_HD Floats some(const float* from, int64_t count) {
  if (count >= 16) return Floats::load<true>(from, 16);
  return count > 0 ? Floats::load<false>(from, count) : Floats::all(0);
}

// `count` numbers of adjacent steps of k, at most 32, as pairs.
FM_HD Words::Vector along(const float* from, int64_t count) {
  return pairs(some(from, count), some(from + 16, count - 16));
}

// [rows, k] with adjacent steps of k -> [rows, k / 2] pairs, with room for 16 more.
FM_HD void pack_along(const float* from, int64_t from_row, int64_t rows, int64_t k, int32_t* to) {
  const int64_t steps = ceil_div(k, 2);
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += steps) {
    for (int64_t q = 0; q < k; q += 32) {
      const Words::Vector found = along(from + q, k - q);
      std::memcpy(to + q / 2, &found, 64);
    }
  }
}

// [k, width] with adjacent columns -> [k / 2, lanes] pairs, with room for 16 more.
FM_HD void pack_across(const float* from, int64_t from_row, int64_t k, int64_t width, int32_t* to,
                       int64_t lanes) {
  for (int64_t q = 0; q < k; q += 2, from += 2 * from_row, to += lanes) {
    for (int64_t v = 0; v < width; v += 16) {
      const Floats second = q + 1 < k ? some(from + from_row + v, width - v) : Floats::all(0);
      const Words::Vector found = interleaved(some(from + v, width - v), second);
      std::memcpy(to + v, &found, 64);
    }
  }
}

// `width` columns of [k, width] with adjacent steps of k -> [k / 2, lanes] pairs, with room for 16
// more rows.
FM_HD void pack_columns(const float* from, int64_t column, int64_t k, int64_t width, int32_t* to,
                        int64_t lanes) {
  for (int64_t q = 0; q < k; q += 32) {
    for (int64_t v = 0; v < width; v += 16) {
      Words::Vector found[16];
      for (int64_t i = 0; i < 16; ++i) {
        found[i] = v + i < width ? along(from + q + (v + i) * column, k - q) : Words::Vector{};
      }
      transpose(found, to + q / 2 * lanes + v, lanes);
    }
  }
}

// `width` columns of a product's B from j on: [k / 2, lanes] pairs, with room for 16 more rows.
FM_HD void pack_pairs(const Product<float>& p, int64_t j, int64_t width, int32_t* to,
                      int64_t lanes) {
  const float* from = p.b + j * p.b_column;
  if (p.b_column == 1) return pack_across(from, p.b_row, p.k, width, to, lanes);
  pack_columns(from, p.b_column, p.k, width, to, lanes);
}

// Columns [first, last) of a product; `panels`, unless null, is its B from `repack_pairs`.
inline void run_pairs(const Product<float>& p, int64_t first, int64_t last, Memory<float>& memory,
                      Ahead ahead, const int32_t* panels) {
  in_64_bytes([&](auto) FM_INLINE_LAMBDA {
    const int64_t steps = ceil_div(p.k, 2);
    memory.a_pairs.resize(p.m * steps + 16);
    if (panels == nullptr) memory.b_pairs.resize((steps + 16) * kPairs);
    int32_t *const a = memory.a_pairs.data(), *const b = memory.b_pairs.data();
    const bool along = p.a_column == 1 || p.k == 1;
    if (along) {
      pack_along(p.a, p.a_row, p.m, p.k, a);
    } else {
      pack_across(p.a, p.a_column, p.k, p.m, a, p.m);
    }
    const int64_t row = along ? steps : 1, column = along ? 1 : p.m;
    const Product<float, int32_t> own{p.m, p.n, steps,  a,          row,  column,  b,
                                      0,   1,   p.base, p.base_row, p.to, p.to_row};
    const auto at = [&](int64_t j, int64_t width, int64_t lanes, int64_t* step) FM_INLINE_LAMBDA {
      *step = kPairs;
      if (panels != nullptr) return panels + j / kPairs * pair_panel(p.k) + j % kPairs;
      pack_pairs(p, j, width, b, lanes);
      *step = lanes;
      return const_cast<const int32_t*>(b);
    };
    int64_t step, j = first;
    for (; j + kPairs <= last; j += kPairs) {
      const int32_t* from = at(j, kPairs, kPairs, &step);
      columns<Floats, 12, 2, true, 64>(own, j, from, step, 16, ahead);
    }
    for (; j < last; j += 16) {
      const int64_t width = least(16, last - j);
      const int32_t* from = at(j, width, 16, &step);
      columns<Floats, 12, 1, false, 64>(own, j, from, step, width, ahead);
    }
  });
}

#endif

// Whether this CPU multiplies pairs.
inline bool has_pairs() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool found =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
  return found;
#else
  return false;
#endif
}

// The B of a product as pairs, by all threads, for a CPU that has them; `to` has room for
// `pair_panels_size(n, k)` of them.
inline int64_t pair_panels_size(int64_t n, int64_t k) {
  return ceil_div(n, kPairs) * pair_panel(k);
}
inline void repack_pairs([[maybe_unused]] const Product<float>& p, [[maybe_unused]] int32_t* to) {
#if defined(__x86_64__) && defined(__GNUC__)
  parallel_ranges(ceil_div(p.n, kPairs), p.k * kPairs, [&](int64_t begin, int64_t end) {
    in_64_bytes([&](auto) FM_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i * kPairs;
        pack_pairs(p, j, least(kPairs, p.n - j), to + i * pair_panel(p.k), kPairs);
      }
    });
  });
#endif
}

template <typename A>
A rounded(A x) {
  return A(float(BFloat16(float(x))));
}

// Rounds the B of a product that `repack` has repacked to `panels`.
template <typename A>
void round(const Product<A>& p, A* panels) {
  const int64_t size = panels_size<A>(p.n, p.k);
  parallel_ranges(size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) panels[i] = rounded(panels[i]);
  });
}

// Columns [first, last) of a product by numbers of which the lower bits are 0; a repacked B has
// been rounded.
template <typename A>
void run_rounded(const Product<A>& p, int64_t first, int64_t last, Memory<A>& memory, Ahead ahead) {
  constexpr int64_t kColumns = 512;  // of B that are rounded at a time
  memory.a.resize(p.m * p.k);
  for (int64_t i = 0; i < p.m; ++i) {
    const A* from = p.a + i * p.a_row;
    for (int64_t q = 0; q < p.k; ++q) memory.a[i * p.k + q] = rounded(from[q * p.a_column]);
  }
  Product<A> own = p;
  own.a = memory.a.data();
  own.a_row = p.k;
  own.a_column = 1;
  if (p.panel_step > 0) return run(&own, 1, first, last, memory, ahead);
  for (int64_t j = first; j < last; j += kColumns) {
    const int64_t width = least(kColumns, last - j);
    memory.b.resize(p.k * width);
    for (int64_t q = 0; q < p.k; ++q) {
      const A* from = p.b + q * p.b_row + j * p.b_column;
      for (int64_t i = 0; i < width; ++i) memory.b[q * width + i] = rounded(from[i * p.b_column]);
    }
    own.n = width;
    own.b = memory.b.data();
    own.b_row = width;
    own.b_column = 1;
    own.base = p.base == nullptr ? nullptr : p.base + j;
    own.to = p.to + j;
    run(&own, 1, 0, width, memory, ahead);
  }
}

// Columns [first, last) of a product whose factors are rounded to bfloat16; `panels`: of B, if it
// was repacked.
template <typename A>
void run_bf16(const Product<A>& p, int64_t first, int64_t last, Memory<A>& memory, Ahead ahead,
              [[maybe_unused]] const int32_t* panels = nullptr) {
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (sizeof(A) == 4) {
    if (has_pairs()) return run_pairs(p, first, last, memory, ahead, panels);
  }
#endif
  run_rounded(p, first, last, memory, ahead);
}

}  // namespace batched
}  // namespace fastmeta
