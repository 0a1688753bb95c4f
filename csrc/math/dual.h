// Forward-mode derivatives: a value and its change along one direction. The second derivatives of
// the update rules come from evaluating their first derivatives on these numbers.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace fastmeta {

template <typename A>
struct Dual {
  A v, d;

  Dual() = default;
  FM_HD Dual(A value) : v(value), d(A(0)) {}  // NOLINT: a constant is a number
  FM_HD Dual(A value, A change) : v(value), d(change) {}
  template <typename B>
  FM_HD explicit Dual(const Dual<B>& x) : v(A(x.v)), d(A(x.d)) {}
};

template <typename A>
FM_HD Dual<A> operator-(Dual<A> x) {
  return {-x.v, -x.d};
}
template <typename A>
FM_HD Dual<A> operator+(Dual<A> x, Dual<A> y) {
  return {x.v + y.v, x.d + y.d};
}
template <typename A>
FM_HD Dual<A> operator-(Dual<A> x, Dual<A> y) {
  return {x.v - y.v, x.d - y.d};
}
template <typename A>
FM_HD Dual<A> operator*(Dual<A> x, Dual<A> y) {
  return {x.v * y.v, x.d * y.v + x.v * y.d};
}
template <typename A>
FM_HD Dual<A> operator/(Dual<A> x, Dual<A> y) {
  const A quotient = x.v / y.v;
  return {quotient, (x.d - quotient * y.d) / y.v};
}

// A number as another type of number, derivative included.
template <typename To, typename From>
FM_HD To as(From x) {
  return To(x);
}

FM_HD float root(float x) { return sqrtf(x); }
FM_HD double root(double x) { return sqrt(x); }

// 1 / (2 r) for r = sqrt(x), the derivative of the root; 0 at 0, so that coordinates which never
// saw a gradient stay finite. The division is done for all, without a branch.
template <typename A>
FM_HD A root_slope(A r) {
  const A slope = A(0.5) / (r > A(0) ? r : A(1));
  return r > A(0) ? slope : A(0);
}
template <typename A>
FM_HD Dual<A> root(Dual<A> x) {
  const A r = root(x.v);
  return {r, x.d * root_slope(r)};
}
template <typename A>
FM_HD Dual<A> root_slope(Dual<A> r) {
  const A slope = root_slope(r.v);
  return {slope, A(-2) * slope * (slope * r.d)};
}

FM_HD double power(double x, double k) { return pow(x, k); }
FM_HD Dual<double> power(Dual<double> x, double k) {
  const double slope = k == 0.0 ? 0.0 : k * pow(x.v, k - 1.0);
  return {pow(x.v, k), slope * x.d};
}

FM_HD double value_of(double x) { return x; }
FM_HD double value_of(Dual<double> x) { return x.v; }

}  // namespace fastmeta
