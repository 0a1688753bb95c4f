// exp of vectors of numbers, because libm's takes one number at a time. The same bits on every CPU.
#pragma once

#include <type_traits>

#include "cpu/lanes.h"

namespace fastmeta {

// x = n ln 2 + r with an integer n: exp(x) = 2^n exp(r). ln 2 in two parts, the first of which has
// so few bits that n times it is exact. Coefficients for |r| <= ln(2) / 2 are those of Cephes.
template <typename A>
struct Exponential;

// Within 1.1 units in the last place for x in [-87.33, 88].
template <>
struct Exponential<float> {
  static constexpr float kLeast = -87.33f;  // below: 0 instead of numbers without all their bits
  static constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23;
  template <typename V>
  FM_HD static V of_rest(const V& r) {
    V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * (r * r) + r) + 1.0f;
  }
};

// Within 1.1 units in the last place for x in [-708.3, 709].
template <>
struct Exponential<double> {
  static constexpr double kLeast = -708.3;
  static constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissa = 52;
  template <typename V>
  FM_HD static V of_rest(const V& r) {
    const V rr = r * r;
    V p = 1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2;
    p = (p * rr + 9.99999999999999999910e-1) * r;
    V q = 3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3;
    q = q * rr + 2.27265548208155028766e-1;
    q = q * rr + 2.00000000000000000009e0;
    return 1.0 + 2.0 * (p / (q - p));
  }
};

// exp(x) for x up to 88 (709 for double); 0 below kLeast, NaN for NaN.
template <typename A, int B>
FM_HD Lanes<A, B> exponential(const Lanes<A, B>& x) {
  using L = Lanes<A, B>;
  using Vector = typename L::Vector;
  // Unsigned, as those of an x that is out of range wrap around before they are masked.
  typedef std::make_unsigned_t<typename L::Integer> Bits __attribute__((vector_size(B)));
  using E = Exponential<A>;
  L out;
  for (int i = 0; i < L::kParts; ++i) {
    const Vector shifted = x.v[i] * A(1.44269504088896340736) + E::kShift;
    const Vector n = shifted - E::kShift;
    const Vector r = (x.v[i] - n * E::kLn2High) - n * E::kLn2Low;
    const Bits power = (Bits(shifted) - Bits(Vector{} + E::kShift)) << E::kMantissa;
    const Bits found = Bits(E::of_rest(r)) + power;
    out.v[i] = Vector((found & Bits(x.v[i] >= E::kLeast)) | Bits(x.v[i] != x.v[i]));
  }
  return out;
}

}  // namespace fastmeta
