// A panel of coordinates in vector lanes: rows of a tensor turned into lanes and back, and the two
// products with small shared matrices that lie between.
#pragma once

#include "common/tensor.h"
#include "cpu/lanes.h"

namespace fastmeta {

constexpr int64_t kPanelLanes = 8;  // vectors of 64 bytes; a few dozen rows of them stay in L2
template <typename A>
constexpr int64_t kPanelWidth = kPanelLanes * 64 / int64_t(sizeof(A));

#if defined(__clang__)
#define FM_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#elif defined(__GNUC__)
#define FM_PICK(a, b, ...) __builtin_shuffle(a, b, typename Quarter<A>::Places{__VA_ARGS__})
#endif

// 16 bytes of numbers; a square of them is transposed in registers.
template <typename A>
struct Quarter {
  static constexpr int kCount = 16 / sizeof(A);
  typedef A Vector __attribute__((vector_size(16)));
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Places
      __attribute__((vector_size(16)));

  FM_HD static void transposed(const A* from, int64_t from_step, A* to, int64_t to_step) {
    Vector v[kCount], w[kCount];
    for (int i = 0; i < kCount; ++i) std::memcpy(&v[i], from + i * from_step, 16);
    if constexpr (kCount == 2) {
      w[0] = FM_PICK(v[0], v[1], 0, 2);
      w[1] = FM_PICK(v[0], v[1], 1, 3);
    } else {
      const Vector a = FM_PICK(v[0], v[1], 0, 4, 1, 5), b = FM_PICK(v[2], v[3], 0, 4, 1, 5);
      const Vector c = FM_PICK(v[0], v[1], 2, 6, 3, 7), d = FM_PICK(v[2], v[3], 2, 6, 3, 7);
      w[0] = FM_PICK(a, b, 0, 1, 4, 5);
      w[1] = FM_PICK(a, b, 2, 3, 6, 7);
      w[2] = FM_PICK(c, d, 0, 1, 4, 5);
      w[3] = FM_PICK(c, d, 2, 3, 6, 7);
    }
    for (int i = 0; i < kCount; ++i) std::memcpy(to + i * to_step, &w[i], 16);
  }
};
#undef FM_PICK

// to [j * to_step + i] = from [i * from_step + j].
template <typename S, typename A>
FM_HD void transpose(int64_t rows, int64_t columns, const S* from, int64_t from_step, A* to,
                     int64_t to_step) {
  int64_t whole = 0, square = 0;
  if constexpr (std::is_same_v<S, A>) {
    constexpr int64_t q = Quarter<A>::kCount;
    whole = rows / q * q;
    square = columns / q * q;
    for (int64_t i = 0; i < whole; i += q) {
      for (int64_t j = 0; j < square; j += q) {
        Quarter<A>::transposed(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole ? square : 0; j < columns; ++j) {
      to[j * to_step + i] = A(from[i * from_step + j]);
    }
  }
}

// Rows [count, columns] of a tensor to lanes [columns][panel], zeros after them; without a tensor
// all zeros.
template <typename S, typename A>
FM_HD void to_lanes(const S* from, int64_t count, int64_t columns, A* to) {
  constexpr int64_t width = kPanelWidth<A>;
  if (from == nullptr || count < width) std::fill_n(to, columns * width, A(0));
  if (from != nullptr) transpose(count, columns, from, columns, to, width);
}

template <typename A, typename S>
FM_HD void from_lanes(const A* from, int64_t count, int64_t columns, S* to) {
  if (to != nullptr) transpose(columns, count, from, kPanelWidth<A>, to, columns);
}

// How many vectors a tile of a product is wide: as many as registers hold.
template <int kBytes>
constexpr int kTile = kBytes == 64   ? 4
                      : kBytes == 32 ? 2
                                     : 1;

template <int kRows, int kWide, bool kAdd, typename A, int B>
FM_HD void mix_tile(int64_t inner, const A* matrix, const A* in, A* out) {
  using L = Lanes<A, B>;
  L sum[kRows][kWide];
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWide; ++w) {
      A* const at = out + r * kPanelWidth<A> + w * L::kCount;
      sum[r][w] = kAdd ? L::template load<true>(at, 0) : L::all(A(0));
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    L x[kWide];
    for (int w = 0; w < kWide; ++w) {
      x[w] = L::template load<true>(in + k * kPanelWidth<A> + w * L::kCount, 0);
    }
    for (int r = 0; r < kRows; ++r) {
      const L m = L::all(matrix[r * inner + k]);
      for (int w = 0; w < kWide; ++w) sum[r][w] = fused(m, x[w], sum[r][w]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWide; ++w) {
      sum[r][w].template store<true>(out + r * kPanelWidth<A> + w * L::kCount, 0);
    }
  }
}

// out [rows][panel] = (+) matrix [rows, inner] in [inner][panel].
template <int B, bool kAdd, typename A>
FM_HD void mix(int64_t rows, int64_t inner, const A* matrix, const A* in, A* out) {
  constexpr int64_t width = kPanelWidth<A>;
  constexpr int kHigh = B == 32 ? 2 : 4, kWide = kTile<B>;
  constexpr int64_t step = kWide * Lanes<A, B>::kCount;
  for (int64_t at = 0; at < width; at += step) {
    int64_t r = 0;
    for (; r + kHigh <= rows; r += kHigh) {
      mix_tile<kHigh, kWide, kAdd, A, B>(inner, matrix + r * inner, in + at, out + r * width + at);
    }
    for (; r < rows; ++r) {
      mix_tile<1, kWide, kAdd, A, B>(inner, matrix + r * inner, in + at, out + r * width + at);
    }
  }
}

template <int kRows, int kColumns, typename A, int B>
FM_HD void outer_tile(int64_t columns, const A* left, const A* right, A* sums) {
  using L = Lanes<A, B>;
  L sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kColumns; ++k) {
      sum[r][k] = L::template load<true>(sums + (r * columns + k) * L::kCount, 0);
    }
  }
  for (int64_t at = 0; at < kPanelWidth<A>; at += L::kCount) {
    L x[kColumns];
    for (int k = 0; k < kColumns; ++k) {
      x[k] = L::template load<true>(right + k * kPanelWidth<A> + at, 0);
    }
    for (int r = 0; r < kRows; ++r) {
      const L y = L::template load<true>(left + r * kPanelWidth<A> + at, 0);
      for (int k = 0; k < kColumns; ++k) sum[r][k] = fused(y, x[k], sum[r][k]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kColumns; ++k) {
      sum[r][k].template store<true>(sums + (r * columns + k) * L::kCount, 0);
    }
  }
}

// sums [rows, columns][lane] += left [rows][panel] right [columns][panel], lane by lane.
template <int B, typename A>
FM_HD void outer(int64_t rows, int64_t columns, const A* left, const A* right, A* sums) {
  constexpr int64_t width = kPanelWidth<A>, lane = Lanes<A, B>::kCount;
  constexpr int kSide = kTile<B>;
  int64_t r = 0;
  const auto strip = [&](auto high) FM_INLINE_LAMBDA {
    constexpr int kHigh = decltype(high)::value;
    int64_t k = 0;
    for (; k + kSide <= columns; k += kSide) {
      outer_tile<kHigh, kSide, A, B>(columns, left + r * width, right + k * width,
                                     sums + (r * columns + k) * lane);
    }
    for (; k < columns; ++k) {
      outer_tile<kHigh, 1, A, B>(columns, left + r * width, right + k * width,
                                 sums + (r * columns + k) * lane);
    }
    r += kHigh;
  };
  while (r + kSide <= rows) strip(std::integral_constant<int, kSide>{});
  while (r < rows) strip(std::integral_constant<int, 1>{});
}

}  // namespace fastmeta
