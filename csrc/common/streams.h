// The arguments of one pass of an inner update (math/passes.h) over rows [T, P], the same for the
// CPU and CUDA drivers.
#pragma once

#include "math/passes.h"
#include "math/rows.h"

namespace fastmeta {

enum class Type : int { kFloat, kDouble, kBFloat16, kHalf };

// Rows [T, P] of any floating-point type; null: zeros (input) or not wanted (output).
struct Stream {
  void* data = nullptr;
  int64_t stride = 0;  // elements; 0 for one row shared by all tasks
  Type type = Type::kFloat;
  FM_HD explicit operator bool() const { return data != nullptr; }
  template <typename T>
  FM_HD T* row(int64_t t) const {
    return static_cast<T*>(data) + t * stride;
  }
};

// Calls f(T{}) with the stream's element type; float64 streams meet float64 passes only.
template <typename A, typename F>
FM_HD void with_type(Type type, const F& f) {
  if constexpr (sizeof(A) == 8) {
    f(double{});
  } else {
    if (type == Type::kFloat) return f(float{});
    if (type == Type::kBFloat16) return f(BFloat16{});
    f(Half{});
  }
}

// Numbers per row: `value` for all, or data [1 or T, kMaxHypers] (row stride 0 for one row).
struct Hypers {
  const double* data = nullptr;
  int64_t row_stride = 0;
  double value[kMaxHypers] = {};
  FM_HD void read(int64_t t, double (&h)[kMaxHypers]) const {
    for (int i = 0; i < kMaxHypers; ++i)
      h[i] = data == nullptr ? value[i] : data[t * row_stride + i];
  }
};

template <typename Pass>
struct PassArgs {
  using A = typename Pass::A;
  int64_t tasks = 0, columns = 0;
  Stream in[Pass::kIn], out[Pass::kOut];
  Rate<A> rate[Pass::kSets];  // the learning rate; double backward: then its cotangent
  Hypers hypers[Pass::kSets];
  int flags = 0;
  const bool* active = nullptr;  // null: all
  // Forward: all true, set to false where an active row's gradient is not finite. `checked`: that
  // was done beforehand, as updates in place need it; else the pass does it on the way.
  bool* finite = nullptr;
  bool checked = false;
  // results; null: not wanted
  A* d_lr = nullptr;  // [rate_rows, rate.columns], rate_rows being 1 or tasks
  int64_t rate_rows = 1;
  double* d_hypers = nullptr;  // [hyper_rows, kMaxHypers], hyper_rows being 1 or tasks
  int64_t hyper_rows = 1;

  FM_HD bool frozen(int64_t t) const {
    return (active != nullptr && !active[t]) || (checked && !finite[t]);
  }
  FM_HD bool columns_shared() const {
    return d_lr != nullptr && rate[0].kind == RateKind::kColumn && rate_rows == 1;
  }
  FM_HD typename Pass::Row row(int64_t t) const {
    double h[Pass::kSets][kMaxHypers];
    for (int s = 0; s < Pass::kSets; ++s) hypers[s].read(t, h[s]);
    return Pass::row(h, flags);
  }
};

// One tensor of a list, updated as a row of its own: its streams, and how many tiles lie before it.
template <typename Pass>
struct ListItem {
  void* data[Pass::kIn] = {};
  int64_t columns = 0, first_tile = 0;
};

// The part of a row that entry s of the rate covers, and the rows that share the rate row r.
struct Span {
  int64_t begin, end;
};
template <typename A>
FM_HD Span columns_of(const Rate<A>& rate, int64_t s, int64_t columns) {
  if (rate.kind != RateKind::kSegment) return {0, columns};
  return {rate.offsets[s], rate.offsets[s + 1]};
}
FM_HD Span rows_sharing(int64_t rate_rows, int64_t r, int64_t tasks) {
  if (rate_rows == 1) return {0, tasks};
  return {r, r + 1};
}

}  // namespace fastmeta
