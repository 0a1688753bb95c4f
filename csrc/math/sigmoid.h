// Logistic function and hyperbolic tangent of vectors of numbers. The same bits on every CPU.
#pragma once

#include "math/exponential.h"

namespace fastmeta {

// 1 / (1 + exp(-x)); the exponential is that of -|x|, so nothing overflows and small results keep
// all their digits.
template <typename A, int B>
FM_HD Lanes<A, B> sigmoid(const Lanes<A, B>& x) {
  using L = Lanes<A, B>;
  using Vector = typename L::Vector;
  const L e = exponential(-absolute(x));
  L out;
  for (int i = 0; i < L::kParts; ++i) {
    const Vector one = Vector{} + A(1);
    out.v[i] = (x.v[i] < Vector{} ? e.v[i] : one) / (one + e.v[i]);
  }
  return out;
}

// tanh(x) / x - 1 over x^2 for |x| < 0.625: coefficients of Cephes.
template <typename A>
struct Tangent;
template <>
struct Tangent<float> {
  template <typename V>
  FM_HD static V of_square(const V& z) {
    V p = -5.70498872745e-3f * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    return p * z - 3.33332819422e-1f;
  }
};
template <>
struct Tangent<double> {
  template <typename V>
  FM_HD static V of_square(const V& z) {
    V p = -9.64399179425052238628e-1 * z - 9.92877231001918586564e1;
    p = p * z - 1.61468768441708447952e3;
    V q = z + 1.12811678491632931402e2;
    q = q * z + 2.23548839060100448583e3;
    q = q * z + 4.84406305325125486048e3;
    return p / q;
  }
};

// (1 - exp(-2|x|)) / (1 + exp(-2|x|)) with the sign of x; near 0, where that cancels, a polynomial.
template <typename A, int B>
FM_HD Lanes<A, B> hyperbolic_tangent(const Lanes<A, B>& x) {
  using L = Lanes<A, B>;
  using Vector = typename L::Vector;
  using Bits = typename L::Bits;
  const L size = absolute(x), e = exponential(A(-2) * size);
  L out;
  for (int i = 0; i < L::kParts; ++i) {
    const Vector far = (A(1) - e.v[i]) / (A(1) + e.v[i]);
    const Vector signed_far = Vector(Bits(far) | (Bits(x.v[i]) & L::kSign));
    const Vector z = x.v[i] * x.v[i];
    const Vector near = x.v[i] + x.v[i] * (z * Tangent<A>::of_square(z));
    out.v[i] = size.v[i] < A(0.625) ? near : signed_far;
  }
  return out;
}

}  // namespace fastmeta
