// What the passes of attention share on the CPU: operands read head by head into padded rows in the
// accumulation type, the weights of a block of queries, masks and dropout.
#pragma once

#include <limits>

#include "common/tensor.h"
#include "cpu/gemm.h"
#include "math/exponential.h"
#include "math/hash.h"

namespace fastmeta {

// [B, H, L, width] with adjacent entries in the last axis, of any type; strides in elements.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, width = 0;
  Type type = Type::kFloat;
  const char* ahead = nullptr;  // the first row of the head after this one, or null
  explicit operator bool() const { return data != nullptr; }

  int64_t size() const { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }
  char* at(int64_t b, int64_t h, int64_t i) const {
    return static_cast<char*>(data) + (b * batch + h * head + i * row) * size();
  }
  // Those of one text.
  Heads from(int64_t b, int64_t i) const {
    Heads own = *this;
    if (data != nullptr) own.data = at(b, 0, i);
    own.batch = 0;
    return own;
  }
};
inline Heads heads_of(const Tensor& t) {
  if (t.dim() != 4) return {};
  return {const_cast<void*>(t.const_data_ptr()),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.size(3),
          type_of(t.scalar_type())};
}
inline Heads heads_of(const std::optional<Tensor>& t) { return t ? heads_of(*t) : Heads{}; }

// Row i of the head that comes next, fetched from memory while this one is worked on.
FM_HD void fetch_ahead(const Heads& of, int64_t i) {
  if (of.ahead == nullptr) return;
  const char* const row = of.ahead + i * of.row * of.size();
  for (int64_t byte = 0; byte < of.width * of.size(); byte += 64) {
    __builtin_prefetch(row + byte, 0, 2);
  }
}

constexpr int64_t padded(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Rows [first, first + rows) of one head as [rows, width padded with zeros].
template <typename A>
void pack(const Heads& from, int64_t b, int64_t h, int64_t first, int64_t rows, A* to) {
  with_type<A>(from.type, [&](auto example) {
    using T = decltype(example);
    const T* x =
        static_cast<const T*>(from.data) + b * from.batch + h * from.head + first * from.row;
    const int64_t width = from.width, step = from.row;
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      using L = Lanes<A, bytes()>;
      const int64_t ld = padded(width, L::kCount);
      A* y = to;
      const T* row = x;
      for (int64_t i = 0; i < rows; ++i, row += step, y += ld) {
        fetch_ahead(from, first + i);
        if constexpr (std::is_same_v<T, A>) {
          int64_t j = 0;
          for (; j + L::kCount <= width; j += L::kCount) {
            L::template load<true>(row + j, 0).template store<true>(y + j, 0);
          }
          if (j < width) L::template load<false>(row + j, width - j).template store<true>(y + j, 0);
        } else {
          for (int64_t j = 0; j < width; ++j) y[j] = static_cast<A>(row[j]);
          for (int64_t j = width; j < ld; ++j) y[j] = 0;
        }
      }
    });
  });
}

// The other way: rows [rows, padded width] to those of one head.
template <typename A>
void unpack(const A* from, const Heads& to, int64_t b, int64_t h, int64_t first, int64_t rows) {
  with_type<A>(to.type, [&](auto example) {
    using T = decltype(example);
    T* y = static_cast<T*>(to.data) + b * to.batch + h * to.head + first * to.row;
    const int64_t width = to.width, step = to.row;
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      using L = Lanes<A, bytes()>;
      const int64_t ld = padded(width, L::kCount);
      const A* row = from;
      T* target = y;
      for (int64_t i = 0; i < rows; ++i, row += ld, target += step) {
        fetch_ahead(to, first + i);
        if constexpr (std::is_same_v<T, A>) {
          int64_t j = 0;
          for (; j + L::kCount <= width; j += L::kCount) {
            L::template load<true>(row + j, 0).template store<true>(target + j, 0);
          }
          if (j < width) {
            L::template load<true>(row + j, 0).template store<false>(target + j, width - j);
          }
        } else {
          for (int64_t j = 0; j < width; ++j) target[j] = static_cast<T>(row[j]);
        }
      }
    });
  });
}

#if defined(__clang__)
#define FM_SHUFFLE(V, M, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FM_SHUFFLE(V, M, x, y, ...) __builtin_shuffle(x, y, M{__VA_ARGS__})
#endif

// to [columns, rows] = from [rows, columns]^T, both multiples of a tile of 16 bytes square.
template <typename A>
void transpose(const A* from, int64_t rows, int64_t columns, A* to) {
  typedef A V __attribute__((vector_size(16)));
  using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef I M [[maybe_unused]] __attribute__((vector_size(16)));
  constexpr int64_t n = 16 / sizeof(A);
  for (int64_t i = 0; i < rows; i += n) {
    for (int64_t j = 0; j < columns; j += n) {
      V x[n], y[n];
      for (int64_t r = 0; r < n; ++r) std::memcpy(&x[r], from + (i + r) * columns + j, 16);
      if constexpr (n == 4) {
        const V a = FM_SHUFFLE(V, M, x[0], x[1], 0, 4, 1, 5),
                b = FM_SHUFFLE(V, M, x[0], x[1], 2, 6, 3, 7),
                c = FM_SHUFFLE(V, M, x[2], x[3], 0, 4, 1, 5),
                d = FM_SHUFFLE(V, M, x[2], x[3], 2, 6, 3, 7);
        y[0] = FM_SHUFFLE(V, M, a, c, 0, 1, 4, 5);
        y[1] = FM_SHUFFLE(V, M, a, c, 2, 3, 6, 7);
        y[2] = FM_SHUFFLE(V, M, b, d, 0, 1, 4, 5);
        y[3] = FM_SHUFFLE(V, M, b, d, 2, 3, 6, 7);
      } else {
        y[0] = FM_SHUFFLE(V, M, x[0], x[1], 0, 2);
        y[1] = FM_SHUFFLE(V, M, x[0], x[1], 1, 3);
      }
      for (int64_t r = 0; r < n; ++r) std::memcpy(to + (j + r) * rows + i, &y[r], 16);
    }
  }
}

// to [m, n] = scale x y (+ to), rows of lengths given.
template <typename A>
void multiply(int64_t m, int64_t n, int64_t k, const A* x, int64_t ldx, const A* y, int64_t ldy,
              A* to, int64_t ldto, A scale, bool add) {
  gemm(Gemm<A>{m, n, k, x, ldx, 1, y, ldy, to, ldto, scale, add ? to : nullptr, A(1)});
}
// to [m, n] = scale x^T y (+ to) with x [k, m].
template <typename A>
void multiply_transposed(int64_t m, int64_t n, int64_t k, const A* x, int64_t ldx, const A* y,
                         int64_t ldy, A* to, int64_t ldto, A scale, bool add) {
  gemm(Gemm<A>{m, n, k, x, 1, ldx, y, ldy, to, ldto, scale, add ? to : nullptr, A(1)});
}

// What dropout drops of a row of weights: with reference/attention.py, its definition.
struct Dropout {
  double p = 0;
  Seed seed;
  uint32_t dropped = 0;
  int64_t period = 1;
  uint32_t head_key(int64_t b, int64_t h) const {
    return mixed(mixed(mixed(seed.low ^ uint32_t(b % period)) + seed.high) ^ uint32_t(h));
  }
};

// What is added to the scores of a row: a mask, and -inf outside of the band i + lower <= j <= i +
// upper and behind the last key; and the factors of dropout.
template <typename A>
struct RowTerms {
  const void* mask = nullptr;
  bool boolean = false;
  int64_t strides[4] = {};  // 0 where all share
  int64_t keys = 0, whole = 0;
  int64_t lower = 0, upper = 0;
  bool banded = false;
  Dropout dropout;
  A* bias = nullptr;  // [whole], of the last row asked for
  A* keep = nullptr;  // [whole]
  bool filled = false;
  const int64_t* position = nullptr;  // of rows and keys in the mask; null: their own numbers
  int64_t b = 0, h = 0;
  uint32_t key = 0;

  FM_HD int64_t first(int64_t i) const { return most(0, least(i + lower, keys)); }
  FM_HD int64_t end(int64_t i) const { return most(first(i), least(i + upper + 1, keys)); }

  // Buffers of `whole` elements for one row each.
  void use(A* bias_row, A* keep_row) {
    bias = bias_row, keep = keep_row;
    std::fill_n(keep, whole, A(1));
  }
  void at(int64_t batch, int64_t head) {
    if ((batch != b && strides[0] != 0) || (head != h && strides[1] != 0)) filled = false;
    b = batch, h = head;
    if (dropout.p > 0) key = dropout.head_key(b, h);
  }

  FM_HD const A* bias_of(int64_t i) {
    if (filled) return bias;
    constexpr A kNone = -std::numeric_limits<A>::infinity();
    const int64_t from = banded ? first(i) : 0, to = banded ? end(i) : keys;
    for (int64_t j = 0; j < from; ++j) bias[j] = kNone;
    for (int64_t j = to; j < whole; ++j) bias[j] = kNone;
    const int64_t row = position == nullptr ? i : position[i];
    const int64_t offset = b * strides[0] + h * strides[1] + row * strides[2], step = strides[3];
    if (mask == nullptr) {
      for (int64_t j = from; j < to; ++j) bias[j] = 0;
    } else if (boolean) {
      const auto* m = static_cast<const uint8_t*>(mask) + offset;
      if (position != nullptr) {
        for (int64_t j = from; j < to; ++j) bias[j] = m[position[j] * step] != 0 ? A(0) : kNone;
      } else if (step == 1) {
        for (int64_t j = from; j < to; ++j) bias[j] = m[j] != 0 ? A(0) : kNone;
      } else {
        for (int64_t j = from; j < to; ++j) bias[j] = m[j * step] != 0 ? A(0) : kNone;
      }
    } else {
      const auto* m = static_cast<const A*>(mask) + offset;
      for (int64_t j = from; j < to; ++j) bias[j] = m[(position ? position[j] : j) * step];
    }
    filled = !banded && strides[2] == 0;
    return bias;
  }

  FM_HD const A* keep_of(int64_t i) {
    if (!(dropout.p > 0)) return keep;
    const uint32_t word = mixed(key + uint32_t(position == nullptr ? i : position[i]));
    const A factor = A(1 / (1 - dropout.p));
    for (int64_t j = 0; j < whole; ++j) {
      const auto column = uint32_t(position == nullptr || j >= keys ? j : position[j]);
      keep[j] = mixed(word + column * 0x9E3779B9u) >= dropout.dropped ? factor : A(0);
    }
    return keep;
  }
};

// Hands out parts of one buffer; with no buffer yet, only counts.
template <typename A>
struct Arena {
  A* base = nullptr;
  int64_t used = 0;
  A* take(int64_t count) {
    A* part = base == nullptr ? nullptr : base + used;
    used += padded(count, 64 / sizeof(A));
    return part;
  }
};

}  // namespace fastmeta
