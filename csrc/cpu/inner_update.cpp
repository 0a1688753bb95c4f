// sgd_update on the CPU. A row is cut into tiles (units of parallel work), a tile into spans that
// share one learning rate or read it per column, a span of the backward pass into blocks that stay
// in the L1 cache while one plain loop computes each result. The cuts depend on the shapes alone,
// so results do not depend on the number of threads.

#include "math/inner_update.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/cpu.h"
#include "common/tensor.h"

namespace fastmeta {
namespace {

constexpr int64_t kTile = 16384;  // columns of a parallel unit
constexpr int64_t kBlock = 1024;  // columns that stay in the L1 cache
constexpr int kLanes = 16;

template <typename A>
struct Constant {
  A value;
  FM_HD A operator[](int64_t) const { return value; }
};

// ---- loops over adjacent columns; lr is a Constant or a pointer ----

template <typename P, typename G, typename A, typename L>
FM_CLONES void update_span(P* out, const P* p, const G* g, int64_t n, L lr, Sgd<A> rule) {
  FM_IVDEP
  for (int64_t i = 0; i < n; ++i) out[i] = P(rule.forward(A(p[i]), A(g[i]), lr[i]));
}

template <typename P, typename A, typename L>
FM_CLONES void d_params_span(P* out, const P* v, int64_t n, L lr, Sgd<A> rule) {
  FM_IVDEP
  for (int64_t i = 0; i < n; ++i) out[i] = P(rule.d_params(A(v[i]), lr[i]));
}

template <typename P, typename G, typename A, typename L>
FM_CLONES void d_grads_span(G* out, const P* v, int64_t n, L lr, Sgd<A> rule) {
  FM_IVDEP
  for (int64_t i = 0; i < n; ++i) out[i] = G(rule.d_grads(A(v[i]), lr[i]));
}

template <typename P, typename G, typename A>
FM_CLONES void d_lr_span(A* out, const P* v, const P* p, const G* g, int64_t n, Sgd<A> rule) {
  FM_IVDEP
  for (int64_t i = 0; i < n; ++i) out[i] = rule.d_lr(A(v[i]), A(p[i]), A(g[i]));
}

template <typename A>
FM_CLONES void add_span(double* sums, const A* x, int64_t n) {
  FM_IVDEP
  for (int64_t i = 0; i < n; ++i) sums[i] += x[i];
}

template <typename A>
FM_CLONES double sum_span(const A* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
  }
  for (; i < n; ++i) lanes[i % kLanes] += x[i];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// ---- tiles ----

// Runs f(begin, end, lr, segment) over the spans of a tile.
template <typename A, typename F>
void for_each_span(const Rate<A>& rate, const Tile& tile, const F& f) {
  if (rate.kind == RateKind::kRow) {
    return f(tile.begin, tile.end, Constant<A>{rate.of_row(tile.row)}, int64_t(0));
  }
  if (rate.kind == RateKind::kColumn) {
    return f(tile.begin, tile.end, rate.data + tile.row * rate.row_stride + tile.begin, int64_t(0));
  }
  int64_t segment = segment_of(rate.offsets, rate.columns, tile.begin);
  for (int64_t begin = tile.begin; begin < tile.end; ++segment) {
    const bool last = segment + 1 >= rate.columns;
    const int64_t end = last ? tile.end : least(rate.offsets[segment + 1], tile.end);
    if (end <= begin) continue;
    f(begin, end, Constant<A>{rate.at(tile.row, segment)}, segment);
    begin = end;
  }
}

template <typename P, typename G>
void update_rows(Rows<P> out, Rows<const P> p, Rows<const G> g, int64_t tasks, int64_t columns,
                 const Rate<acc_t<P>>& rate, const bool* active, Sgd<acc_t<P>> rule) {
  const int64_t tiles = ceil_div(columns, kTile);
  parallel_units(tasks * tiles, least(columns, kTile), [&](int64_t unit) {
    const Tile tile = tile_at(unit, tiles, kTile, columns);
    P* to = out.row(tile.row);
    const P* from = p.row(tile.row);
    const G* grads = g.row(tile.row);
    if (active != nullptr && !active[tile.row]) {
      if (to != from) std::copy(from + tile.begin, from + tile.end, to + tile.begin);
      return;
    }
    for_each_span(rate, tile, [&](int64_t begin, int64_t end, auto lr, int64_t) {
      update_span(to + begin, from + begin, grads + begin, end - begin, lr, rule);
    });
  });
}

// The backward pass; null outputs are not wanted.
template <typename P, typename G>
struct Backward {
  using A = acc_t<P>;

  int64_t tasks, columns;
  Rows<const P> v, p;
  Rows<const G> g;
  Rate<A> rate;
  const bool* active;
  Sgd<A> rule;
  Rows<P> d_params;
  Rows<G> d_grads;
  A* d_lr;            // [rate_rows, rate.columns]
  int64_t rate_rows;  // 1 or tasks
  double* partials;   // [tasks, slots]: sums per (tile, segment), see rows.h
  int64_t tiles, slots;

  bool frozen(int64_t t) const { return active != nullptr && !active[t]; }

  // One tile of d_params and d_grads. give(begin, n, x, segment) receives the terms of d_lr.
  template <typename F>
  void tile(const Tile& tile, const F& give) const {
    const P* from = v.row(tile.row);
    if (frozen(tile.row)) {
      if (d_params)
        std::copy(from + tile.begin, from + tile.end, d_params.row(tile.row) + tile.begin);
      if (d_grads)
        std::fill(d_grads.row(tile.row) + tile.begin, d_grads.row(tile.row) + tile.end, G(0));
      return;
    }
    for_each_span(rate, tile, [&](int64_t span_begin, int64_t span_end, auto lr, int64_t segment) {
      A terms[kBlock];
      for (int64_t b = span_begin; b < span_end; b += kBlock) {
        const int64_t n = least(kBlock, span_end - b);
        auto here = lr;
        if constexpr (std::is_pointer_v<decltype(lr)>) here = lr + (b - span_begin);
        if (d_params) d_params_span(d_params.row(tile.row) + b, from + b, n, here, rule);
        if (d_grads) d_grads_span(d_grads.row(tile.row) + b, from + b, n, here, rule);
        if (d_lr != nullptr) {
          const P* params = (p ? p.row(tile.row) : from) + b;
          d_lr_span(terms, from + b, params, g.row(tile.row) + b, n, rule);
          give(b, n, static_cast<const A*>(terms), segment);
        }
      }
    });
  }

  // Without d_lr, or with one entry of it for each (task, column).
  void elementwise() const {
    parallel_units(tasks * tiles, least(columns, kTile), [&](int64_t unit) {
      const Tile at = tile_at(unit, tiles, kTile, columns);
      if (d_lr != nullptr && frozen(at.row)) {
        std::fill(d_lr + at.row * columns + at.begin, d_lr + at.row * columns + at.end, A(0));
      }
      tile(at, [&](int64_t begin, int64_t n, const A* terms, int64_t) {
        std::copy(terms, terms + n, d_lr + at.row * columns + begin);
      });
    });
  }

  // One rate per column for all tasks: a unit owns a block of columns and walks down the rows.
  void column_sums() const {
    parallel_units(ceil_div(columns, kBlock), tasks * least(columns, kBlock), [&](int64_t unit) {
      const Tile block = tile_at(unit, ceil_div(columns, kBlock), kBlock, columns);
      double sums[kBlock] = {};
      for (int64_t t = 0; t < tasks; ++t) {
        tile({t, block.index, block.begin, block.end},
             [&](int64_t, int64_t n, const A* terms, int64_t) { add_span(sums, terms, n); });
      }
      for (int64_t c = block.begin; c < block.end; ++c) d_lr[c] = A(sums[c - block.begin]);
    });
  }

  // One rate per row or segment: sums per tile first, then in a fixed order over the tiles.
  void tile_sums() const {
    parallel_units(tasks * tiles, least(columns, kTile), [&](int64_t unit) {
      const Tile at = tile_at(unit, tiles, kTile, columns);
      double* sums = partials + at.row * slots;
      for_each_span(rate, at, [&](int64_t, int64_t, auto, int64_t segment) {
        sums[partial_slot(at.index, segment)] = 0;
      });
      tile(at, [&](int64_t, int64_t n, const A* terms, int64_t segment) {
        sums[partial_slot(at.index, segment)] += sum_span(terms, n);
      });
    });
    for (int64_t row = 0; row < rate_rows; ++row) {
      for (int64_t s = 0; s < rate.columns; ++s) d_lr[row * rate.columns + s] = A(total(row, s));
    }
  }

  double total(int64_t rate_row, int64_t s) const {
    const int64_t first_row = rate_rows == 1 ? 0 : rate_row;
    const int64_t end_row = rate_rows == 1 ? tasks : rate_row + 1;
    const bool whole = rate.kind == RateKind::kRow;
    const int64_t begin = whole ? 0 : rate.offsets[s];
    const int64_t end = whole ? columns : rate.offsets[s + 1];
    double sum = 0;
    if (begin >= end) return sum;
    for (int64_t t = first_row; t < end_row; ++t) {
      if (frozen(t)) continue;
      for (int64_t i = begin / kTile; i <= (end - 1) / kTile; ++i) {
        sum += partials[t * slots + partial_slot(i, s)];
      }
    }
    return sum;
  }

  void run() {
    tiles = ceil_div(columns, kTile);
    if (d_lr == nullptr) return elementwise();
    if (rate.kind == RateKind::kColumn) return rate_rows == 1 ? column_sums() : elementwise();
    slots = partial_slots(tiles, rate.columns);
    std::vector<double> sums(static_cast<size_t>(tasks * most(slots, 0)));
    partials = sums.data();
    tile_sums();
  }
};

// ---- raw operators ----

void run_update(const Tensor& out, const Tensor& params, const Tensor& grads,
                const std::optional<Tensor>& lr, const std::optional<Tensor>& offsets,
                const std::optional<Tensor>& active, double lr_value, double weight_decay,
                bool maximize) {
  const Tensor p = dense_columns(params), g = dense_columns(grads);
  dispatch_params_grads(p.scalar_type(), g.scalar_type(), [&](auto p_zero, auto g_zero) {
    using P = decltype(p_zero);
    using G = decltype(g_zero);
    using A = acc_t<P>;
    std::optional<Tensor> keep;
    const Rate<A> rate = rate_of<A>(lr, offsets, lr_value, keep);
    update_rows<P, G>(mutable_rows_of<P>(out), rows_of<P>(p), rows_of<G>(g), p.size(0), p.size(1),
                      rate, pointer_or_null<bool>(active), {A(maximize ? -1 : 1), A(weight_decay)});
  });
}

Tensor sgd_update(Tensor params, Tensor grads, std::optional<Tensor> lr,
                  std::optional<Tensor> offsets, std::optional<Tensor> active, double lr_value,
                  double weight_decay, bool maximize) {
  Tensor out = empty_rows({params.size(0), params.size(1)}, params.scalar_type(), params);
  run_update(out, params, grads, lr, offsets, active, lr_value, weight_decay, maximize);
  return out;
}

void sgd_update_(Tensor params, Tensor grads, std::optional<Tensor> lr,
                 std::optional<Tensor> offsets, std::optional<Tensor> active, double lr_value,
                 double weight_decay, bool maximize) {
  const bool dense = params.size(1) <= 1 || params.stride(1) == 1;
  Tensor out = dense ? params : torch::stable::contiguous(params);
  run_update(out, out, grads, lr, offsets, active, lr_value, weight_decay, maximize);
  if (!dense) torch::stable::copy_(params, out);
}

std::tuple<Tensor, Tensor, Tensor> sgd_update_backward(
    Tensor d_out, std::optional<Tensor> params, std::optional<Tensor> grads,
    std::optional<Tensor> lr, std::optional<Tensor> offsets, std::optional<Tensor> active,
    double lr_value, double weight_decay, bool maximize, ScalarType grads_dtype, bool need_params,
    bool need_grads, bool need_lr) {
  const int64_t tasks = d_out.size(0), columns = d_out.size(1);
  const ScalarType dtype = d_out.scalar_type();
  const auto result = [&](bool needed, ScalarType type) {
    return needed ? empty_rows({tasks, columns}, type, d_out) : empty_rows({0}, dtype, d_out);
  };
  Tensor d_params = result(need_params, dtype);
  Tensor d_grads = result(need_grads, grads_dtype);
  Tensor d_lr = need_lr ? empty_rows({lr->size(0), lr->size(1)}, lr->scalar_type(), d_out)
                        : empty_rows({0}, dtype, d_out);
  const Tensor v = dense_columns(d_out);
  dispatch_params_grads(dtype, grads_dtype, [&](auto p_zero, auto g_zero) {
    using P = decltype(p_zero);
    using G = decltype(g_zero);
    using A = acc_t<P>;
    std::optional<Tensor> keep_lr, p, g;
    Backward<P, G> pass{};
    pass.tasks = tasks;
    pass.columns = columns;
    pass.v = rows_of<P>(v);
    pass.rate = rate_of<A>(lr, offsets, lr_value, keep_lr);
    pass.active = pointer_or_null<bool>(active);
    pass.rule = {A(maximize ? -1 : 1), A(weight_decay)};
    if (need_params) pass.d_params = mutable_rows_of<P>(d_params);
    if (need_grads) pass.d_grads = mutable_rows_of<G>(d_grads);
    if (need_lr) {
      g = dense_columns(*grads);
      pass.g = rows_of<G>(*g);
      if (params) {
        p = dense_columns(*params);
        pass.p = rows_of<P>(*p);
      }
      pass.d_lr = static_cast<A*>(d_lr.mutable_data_ptr());
      pass.rate_rows = lr->size(0);
    }
    pass.run();
  });
  return {d_params, d_grads, d_lr};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("sgd_update", TORCH_BOX(&sgd_update));
  m.impl("sgd_update_", TORCH_BOX(&sgd_update_));
  m.impl("sgd_update_backward", TORCH_BOX(&sgd_update_backward));
}

}  // namespace fastmeta
