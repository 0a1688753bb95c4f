// Distances of rows to all classes: logits, loss and derivatives.
#pragma once

#include <limits>

#include "cpu/pairs.h"

namespace fastmeta {

// exp(x) for x <= 0, without branches so that loops of it take vectors: 2^n times a polynomial
// (Cephes' expf; one unit in the last place). 0 below the smallest normal number; NaN stays.
FM_HD float exp_of(float x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float least_x = x < -87.0f ? -87.0f : x;
  const float shifted = least_x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = least_x - n * 0.693359375f - n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : y * power;
}
FM_HD double exp_of(double x) { return std::exp(x); }

// log(x) for normal x > 0, likewise (Cephes' logf). NaN stays.
FM_HD float log_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t above = bits - 0x3f3504f3;  // how far over the root of 1/2
  const float n = float(int32_t(above) >> 23);
  bits = (above & 0x007fffff) + 0x3f3504f3;
  float z;
  std::memcpy(&z, &bits, 4);
  z -= 1.0f;
  float y = 7.0376836292e-2f;
  y = y * z - 1.1514610310e-1f;
  y = y * z + 1.1676998740e-1f;
  y = y * z - 1.2420140846e-1f;
  y = y * z + 1.4249322787e-1f;
  y = y * z - 1.6668057665e-1f;
  y = y * z + 2.0000714765e-1f;
  y = y * z - 2.4999993993e-1f;
  y = y * z + 3.3333331174e-1f;
  const float square = z * z;
  y = y * z * square + n * -2.12194440e-4f - 0.5f * square;
  return x == x ? n * 0.693359375f + (z + y) : x;
}
FM_HD double log_of(double x) { return std::log(x); }

// How sums become logits: -scale sum^(1 / root), or scale times a product.
template <typename A>
struct Logits {
  A root;
  bool product;

  FM_HD A of(A sum, A scale) const {
    if (product) return scale * sum;
    if (root == A(1)) return -scale * sum;
    return -scale * (root == A(2) ? std::sqrt(sum) : std::pow(sum, A(1) / root));
  }
  // Derivative by the sum of v times the loss, whose derivative by the logit x is e.
  FM_HD A derivative(A x, A e, A scale, A v) const {
    if (product || root == A(1)) return normal((product ? v * scale : -v * scale) * e);
    const A d = -x / scale;  // distance d = sum^(1/root): d' = d^(1 - root) / root
    const A slope = root == A(2) ? A(1) / d : std::pow(d, A(1) - root);
    return d == A(0) || e == A(0) ? A(0) : normal(-v * scale * e * slope / root);
  }
  // x, but 0 for numbers below the normal ones: products with those take many times as long, and
  // the softmax of distant classes is full of them.
  FM_HD static A normal(A x) {
    return x < std::numeric_limits<A>::min() && x > -std::numeric_limits<A>::min() ? A(0) : x;
  }
};

// As many rows as a vector has lanes, with few classes: row l is lane l.
template <typename A>
struct FewClasses {
  static constexpr int kRows = 64 / sizeof(A), kMost = 32;
  A x[kMost][kRows];  // sums, then logits, then derivatives by the sums
  A e[kMost][kRows];  // exponentials, then softmax
  A label[kRows], scale[kRows], v[kRows];
  A largest[kRows], total[kRows];
  int n;
  Logits<A> logits;

#define FM_ROWS \
  FM_IVDEP      \
  for (int l = 0; l < kRows; ++l)
  FM_HD void read(const A* from, int64_t rows) {
    for (int l = 0; l < rows; ++l) {
      for (int c = 0; c < n; ++c) x[c][l] = from[l * n + c];
    }
    for (int l = int(rows); l < kRows; ++l) {  // the first row again, which no result reads
      for (int c = 0; c < n; ++c) x[c][l] = from[c];
      label[l] = label[0], scale[l] = scale[0], v[l] = v[0];
    }
  }
  FM_HD void write(A* to, int64_t rows) const {
    for (int l = 0; l < rows; ++l) {
      for (int c = 0; c < n; ++c) to[l * n + c] = x[c][l];
    }
  }
  FM_HD void to_logits() {
    for (int c = 0; c < n; ++c) {
      if (logits.product || logits.root == A(1)) {
        FM_ROWS x[c][l] = (logits.product ? scale[l] : -scale[l]) * x[c][l];
      } else if (logits.root == A(2)) {
        FM_ROWS x[c][l] = -scale[l] * std::sqrt(x[c][l]);
      } else {
        for (int l = 0; l < kRows; ++l) x[c][l] = logits.of(x[c][l], scale[l]);
      }
    }
  }
  // Row l has no classes but the `present`.
  FM_HD void leave_out(int l, const bool* present) {
    for (int c = 0; c < n; ++c) {
      if (!present[c]) x[c][l] = -std::numeric_limits<A>::infinity();
    }
  }
  FM_HD void exponentials() {
    FM_ROWS largest[l] = x[0][l];
    for (int c = 1; c < n; ++c) FM_ROWS largest[l] = x[c][l] > largest[l] ? x[c][l] : largest[l];
    FM_ROWS total[l] = 0;
    for (int c = 0; c < n; ++c) {
      FM_ROWS e[c][l] = exp_of(x[c][l] - largest[l]);
      FM_ROWS total[l] += e[c][l];
    }
  }
  // Loss, and 1 where the label is the first of the largest logits, else 0.
  FM_HD void losses(A* loss, A* right) const {
    A own[kRows], better[kRows] = {};
    own_logits(own);
    FM_ROWS loss[l] = log_of(total[l]) - (own[l] - largest[l]);
    for (int c = 0; c < n; ++c) {
      FM_ROWS better[l] += (A(c) < label[l] ? x[c][l] < own[l] : x[c][l] <= own[l]) ? A(0) : A(1);
    }
    FM_ROWS right[l] = better[l] == A(0) ? A(1) : A(0);  // NaN is never the best
  }
  // Logits to derivatives by the sums of v times the loss; the derivative by the scale.
  FM_HD void to_derivatives(A* d_scale) {
    A own[kRows], expected[kRows] = {};  // of the logit, over the largest
    A others[kRows] = {};                // share of the other classes: 1 - own would cancel
    own_logits(own);
    for (int c = 0; c < n; ++c) {
      FM_ROWS e[c][l] = e[c][l] / total[l];
      FM_ROWS others[l] += A(c) == label[l] ? A(0) : e[c][l];
      FM_ROWS expected[l] += e[c][l] == A(0) ? A(0) : e[c][l] * (x[c][l] - largest[l]);
    }
    FM_ROWS d_scale[l] = v[l] * (expected[l] - (own[l] - largest[l])) / scale[l];
    for (int c = 0; c < n; ++c) {
      FM_ROWS e[c][l] = A(c) == label[l] ? -others[l] : e[c][l];
      if (logits.product || logits.root == A(1)) {
        FM_ROWS x[c][l] = logits.normal((logits.product ? v[l] : -v[l]) * scale[l] * e[c][l]);
      } else {
        for (int l = 0; l < kRows; ++l) {
          x[c][l] = logits.derivative(x[c][l], e[c][l], scale[l], v[l]);
        }
      }
    }
  }

 private:
  FM_HD void own_logits(A* own) const {
    FM_ROWS own[l] = x[0][l];
    for (int c = 1; c < n; ++c) FM_ROWS own[l] = A(c) == label[l] ? x[c][l] : own[l];
  }
#undef FM_ROWS
};

template <typename L, typename A>
FM_HD A sum_row(const A* x, int64_t n) {
  L sum = L::all(0);
  int64_t j = 0;
  for (; j + L::kCount <= n; j += L::kCount) sum = sum + L::template load<true>(x + j, 0);
  if (j < n) sum = sum + L::template load<false>(x + j, n - j);
  return sum.sum();
}
template <typename A>
FM_HD A largest_of(const A* x, int64_t n) {
  constexpr int kSome = 16;
  A m[kSome];
  for (A& v : m) v = -std::numeric_limits<A>::infinity();
  int64_t j = 0;
  for (; j + kSome <= n; j += kSome) {
    for (int l = 0; l < kSome; ++l) m[l] = x[j + l] > m[l] ? x[j + l] : m[l];
  }
  for (int l = 0; j < n; ++j, ++l) m[l] = x[j] > m[l] ? x[j] : m[l];
  A out = m[0];
  for (A v : m) out = v > out ? v : out;
  return out;
}

// One row with many classes: class j is lane j.
template <typename L, typename A>
struct ManyClasses {
  A* x;  // as above, [n]
  A* e;
  int64_t n, label;
  A scale, v;
  Logits<A> logits;
  A largest, total;

  FM_HD void to_logits() const {
    if (logits.product || logits.root == A(1)) {
      const A factor = logits.product ? scale : -scale;
      FM_IVDEP
      for (int64_t j = 0; j < n; ++j) x[j] = factor * x[j];
    } else if (logits.root == A(2)) {
      FM_IVDEP
      for (int64_t j = 0; j < n; ++j) x[j] = -scale * std::sqrt(x[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) x[j] = logits.of(x[j], scale);
    }
  }
  FM_HD void leave_out(const bool* present) const {
    for (int64_t j = 0; j < n; ++j) {
      if (!present[j]) x[j] = -std::numeric_limits<A>::infinity();
    }
  }
  FM_HD void exponentials() {
    largest = largest_of(x, n);
    FM_IVDEP
    for (int64_t j = 0; j < n; ++j) e[j] = exp_of(x[j] - largest);
    total = sum_row<L>(e, n);
  }
  FM_HD void losses(A* loss, A* right) const {
    const A own = x[label];
    *loss = log_of(total) - (own - largest);
    int32_t better = !(own == own);
    FM_IVDEP
    for (int64_t j = 0; j < label; ++j) better |= !(x[j] < own);
    FM_IVDEP
    for (int64_t j = label + 1; j < n; ++j) better |= !(x[j] <= own);
    *right = better == 0 ? A(1) : A(0);
  }
  FM_HD void to_derivatives(A* d_scale) const {
    const A own = x[label];
    FM_IVDEP
    for (int64_t j = 0; j < n; ++j) e[j] = e[j] / total;
    A expected = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (e[j] != A(0)) expected += e[j] * (x[j] - largest);
    }
    *d_scale = v * (expected - (own - largest)) / scale;
    e[label] = 0;
    e[label] = -sum_row<L>(e, n);  // 1 - its share would cancel
    if (logits.product || logits.root == A(1)) {
      const A factor = logits.product ? v * scale : -v * scale;
      FM_IVDEP
      for (int64_t j = 0; j < n; ++j) x[j] = logits.normal(factor * e[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) x[j] = logits.derivative(x[j], e[j], scale, v);
    }
  }
};

}  // namespace fastmeta
