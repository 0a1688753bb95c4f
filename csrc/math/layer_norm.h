// Normalisation of one row, h = (x - mean) s with s = 1 / sqrt(var + eps), and its derivatives;
// without the mean (RMSNorm) every mean below that is not one of products with h is left out.
//
// With a = dy w: dx = P(a), P(u) = s (u - mean(u) - h mean(u h)), which is symmetric. The
// derivative of sum(u dx) + sum(gw dy h) + sum(gb dy) is w P(u) + gw h + gb to dy, dy P(u) to w,
// and to x
//   P(e) - s^2 h q,  e = gw dy - s (u mean(a h) + a mean(u h)),
//   q = mean(u a) - mean(u) mean(a) - mean(u h) mean(a h).
#pragma once

#include "cpu/lanes.h"

namespace fastmeta {

// P(u) of one vector of a row.
template <typename L, typename A>
FM_HD L projected(const L& u, const L& h, A s, A mean, A mean_h) {
  return s * (u - L::all(mean) - mean_h * h);
}

// What the derivative of the derivative takes from a whole row; first the sums, then the means.
template <typename T>
struct NormSums {
  T u, uh, a, ah, ua, c, ch;
};

template <typename A>
struct NormSecond {
  A s, mu, muh, ma, mah, q, me, meh;
  FM_HD NormSecond(const NormSums<A>& sum, A s_, A width, bool rms) : s(s_) {
    const A n = A(1) / width;
    mu = rms ? A(0) : sum.u * n;
    ma = rms ? A(0) : sum.a * n;
    muh = sum.uh * n;
    mah = sum.ah * n;
    q = sum.ua * n - mu * ma - muh * mah;
    me = rms ? A(0) : sum.c * n - s * (mu * mah + ma * muh);
    meh = sum.ch * n - s * (A(2) * muh * mah);
  }
  template <typename L>
  FM_HD L of_x(const L& u, const L& a, const L& c, const L& h) const {
    const L e = c - s * (mah * u + muh * a);
    return projected(e, h, s, me, meh) - (s * s * q) * h;
  }
};

}  // namespace fastmeta
