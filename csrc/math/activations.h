// Activations of transformers with their first and second derivatives, a vector at a time: the
// exact GELU, x Phi(x), and those of the form x sigmoid(v(x)): SiLU, and the GELU with tanh.
#pragma once

#include "math/exponential.h"

namespace fastmeta {

enum class Activation : int64_t { kGelu = 0, kGeluTanh = 1, kSilu = 2 };

template <typename L>
FM_HD L quotient(const L& a, const L& b) {
  L out;
  for (int i = 0; i < L::kParts; ++i) out.v[i] = a.v[i] / b.v[i];
  return out;
}
template <typename L>
FM_HD L smaller(const L& a, const L& b) {
  return -larger(-a, -b);
}

// exp(-z^2) erfc(z)^-1 of z = |x| / sqrt(2) is a polynomial in t = 1 / (1 + z / 2), times t: half
// of erfc within 2.2e-7 of itself, so that the tail keeps its digits.
template <int B>
FM_HD Lanes<float, B> normal_tail(const Lanes<float, B>& x, const Lanes<float, B>& bell) {
  using L = Lanes<float, B>;
  const L t = quotient(L::all(1.0f), L::all(1.0f) + 0.353553391f * absolute(x));
  L p = L::all(-2.953460791e-2f);
  p = p * t + L::all(1.422880848e-1f);
  p = p * t + L::all(-2.436011508e-1f);
  p = p * t + L::all(1.390348947e-1f);
  p = p * t + L::all(-1.331369299e-2f);
  p = p * t + L::all(1.013437774e-1f);
  p = p * t + L::all(1.215518005e-1f);
  p = p * t + L::all(1.411876645e-1f);
  p = p * t + L::all(1.410432084e-1f);
  return p * t * bell;
}
template <int B>
FM_HD Lanes<double, B> normal_tail(const Lanes<double, B>& x, const Lanes<double, B>&) {
  using L = Lanes<double, B>;
  L out;
  for (int i = 0; i < L::kParts; ++i) {
    for (int k = 0; k < L::kPart; ++k) {
      out.v[i][k] = 0.5 * std::erfc(std::fabs(x.v[i][k]) * 0.70710678118654752440);
    }
  }
  return out;
}

// f, f' and f'' at x, as far as asked for.
template <typename L>
struct Derivatives {
  L f, first, second;
};

// The exact GELU: f' = Phi + x phi, f'' = phi (2 - x^2).
template <int kOrder, typename A, int B>
FM_HD Derivatives<Lanes<A, B>> gelu(const Lanes<A, B>& x) {
  using L = Lanes<A, B>;
  Derivatives<L> out;
  const L bell = exponential(A(-0.5) * (x * x));
  const L tail = normal_tail(x, bell), rest = L::all(1) - tail;
  L below;
  for (int i = 0; i < L::kParts; ++i) below.v[i] = x.v[i] < 0 ? tail.v[i] : rest.v[i];
  if constexpr (kOrder < 2) {
    out.f = x * below;
    out.first = below + A(0.39894228040143267794) * (x * bell);
  } else {
    const L density = A(0.39894228040143267794) * bell;
    out.first = below + x * density;
    out.second = density * (L::all(2) - x * x);
  }
  return out;
}

// f = x s(v) with s the logistic function: f' = s + x v' s', f'' = 2 v' s' + x (v'^2 s'' + v'' s').
template <typename A, int B>
FM_HD Derivatives<Lanes<A, B>> gated(const Lanes<A, B>& x, const Lanes<A, B>& v,
                                     const Lanes<A, B>& v1, const Lanes<A, B>& v2) {
  using L = Lanes<A, B>;
  const L one = L::all(1);
  // exp takes no more than 88; the logistic function is 0 there
  const L s = quotient(one, one + exponential(smaller(-v, L::all(A(87)))));
  const L s1 = s * (one - s), s2 = s1 * (one - A(2) * s);
  return {x * s, s + x * (v1 * s1), A(2) * (v1 * s1) + x * (v1 * v1 * s2 + v2 * s1)};
}

template <int kOrder, typename A, int B>
FM_HD Derivatives<Lanes<A, B>> activation(Activation kind, const Lanes<A, B>& x) {
  using L = Lanes<A, B>;
  if (kind == Activation::kGelu) return gelu<kOrder>(x);
  if (kind == Activation::kSilu) return gated(x, x, L::all(1), L::all(0));
  const A c = A(1.59576912160573071176), k = A(0.044715);  // 2 sqrt(2 / pi)
  const L square = x * x;
  return gated(x, c * (x + k * (square * x)), L::all(c) + (3 * c * k) * square, (6 * c * k) * x);
}

}  // namespace fastmeta
