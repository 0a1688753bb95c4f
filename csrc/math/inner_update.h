// The maths of the inner updates, one struct per rule, shared by csrc/cpu and csrc/cuda.
#pragma once

#include "common/host_device.h"

namespace fastmeta {

// p' = p - lr (sign g + decay p), with sign = -1 to maximise.
template <typename A>
struct Sgd {
  A sign;
  A decay;

  // Without decay p is not read, so an infinite p stays out of the derivatives.
  FM_HD A direction(A p, A g) const { return decay == A(0) ? sign * g : sign * g + decay * p; }
  FM_HD A forward(A p, A g, A lr) const { return p - lr * direction(p, g); }
  // Vector-Jacobian products for an output cotangent v.
  FM_HD A d_params(A v, A lr) const { return v - lr * decay * v; }
  FM_HD A d_grads(A v, A lr) const { return v * (-sign * lr); }
  FM_HD A d_lr(A v, A p, A g) const { return -v * direction(p, g); }
};

}  // namespace fastmeta
