// One unit of an LSTM cell and its derivatives, for many coordinates at once: V is a vector.
#pragma once

#include "math/sigmoid.h"

namespace fastmeta {

// Gates i, f, g, o of a unit, its cell state before (c) and after (cell), and t = tanh(cell).
template <typename V>
struct LstmUnit {
  V i, f, g, o, c, cell, t;

  // From the sums that enter the gates.
  FM_HD static LstmUnit of(const V& si, const V& sf, const V& sg, const V& so, const V& c) {
    LstmUnit u{sigmoid(si), sigmoid(sf), hyperbolic_tangent(sg), sigmoid(so), c, c, c};
    u.cell = u.f * c + u.i * u.g;
    u.t = hyperbolic_tangent(u.cell);
    return u;
  }
  FM_HD V h() const { return o * t; }
};

// One number for each thing that a unit is a function of.
template <typename V>
struct LstmParts {
  V i, f, g, o, c;
};

// The gradient of gh h + gc cell to the gates' sums and to c; q is that to the cell state after.
template <typename V>
FM_HD LstmParts<V> lstm_gradient(const LstmUnit<V>& u, const V& one, const V& gh, const V& gc,
                                 V& q) {
  q = gc + gh * u.o * (one - u.t * u.t);
  return {q * u.g * u.i * (one - u.i), q * u.c * u.f * (one - u.f), q * u.i * (one - u.g * u.g),
          gh * u.t * u.o * (one - u.o), q * u.f};
}

// That gradient's derivative along a direction: `d` of the gates' sums and c. Also the directional
// derivatives of h and the cell state, which are the derivatives to gh and gc.
template <typename V>
FM_HD LstmParts<V> lstm_second(const LstmUnit<V>& u, const V& one, const V& gh, const V& q,
                               const LstmParts<V>& d, V& dh, V& dcell) {
  const V ii = u.i * (one - u.i), ff = u.f * (one - u.f), oo = u.o * (one - u.o);
  const V gg = one - u.g * u.g, tt = one - u.t * u.t;
  const V di = ii * d.i, df = ff * d.f, dg = gg * d.g, dout = oo * d.o;
  dcell = df * u.c + u.f * d.c + di * u.g + u.i * dg;
  const V dt = tt * dcell;
  dh = dout * u.t + u.o * dt;
  const V ot = u.o * u.t * dt;
  const V dq = gh * (dout * tt - (ot + ot));
  const V ig = u.i * u.g * dg;
  return {dq * u.g * ii + q * (dg * ii + u.g * di * (one - u.i - u.i)),
          dq * u.c * ff + q * (d.c * ff + u.c * df * (one - u.f - u.f)),
          dq * u.i * gg + q * (di * gg - (ig + ig)),
          gh * (dt * oo + u.t * dout * (one - u.o - u.o)), dq * u.f + q * df};
}

}  // namespace fastmeta
