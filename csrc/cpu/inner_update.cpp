// sgd_update on the CPU. A row is cut into tiles (units of parallel work), a tile into spans that
// share one learning rate or read it per column, a span of the backward pass into blocks that stay
// in the L1 cache while one plain loop computes each result. The cuts depend on the shapes alone,
// so results do not depend on the number of threads.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/cpu.h"
#include "common/sgd_op.h"

namespace fastmeta {
namespace {

constexpr int64_t kTile = 16384;    // columns of a parallel unit
constexpr int64_t kBlock = 1024;    // columns that stay in the L1 cache
constexpr int64_t kColumns = 4096;  // columns that a unit sums down the rows
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
void update(const UpdateArgs<P, G>& args) {
  const int64_t tiles = ceil_div(args.columns, kTile);
  parallel_units(args.tasks * tiles, least(args.columns, kTile), [&](int64_t unit) {
    const Tile tile = tile_at(unit, tiles, kTile, args.columns);
    P* out = args.out.row(tile.row);
    const P* p = args.p.row(tile.row);
    const G* g = args.g.row(tile.row);
    if (args.active != nullptr && !args.active[tile.row]) {
      if (out != p) std::copy(p + tile.begin, p + tile.end, out + tile.begin);
      return;
    }
    for_each_span(args.rate, tile, [&](int64_t begin, int64_t end, auto lr, int64_t) {
      update_span(out + begin, p + begin, g + begin, end - begin, lr, args.rule);
    });
  });
}

template <typename P, typename G>
struct Backward : BackwardArgs<P, G> {
  using Args = BackwardArgs<P, G>;
  using A = typename Args::A;
  using Args::columns, Args::d_grads, Args::d_lr, Args::d_params, Args::frozen, Args::rate,
      Args::rate_rows, Args::rule, Args::tasks;

  int64_t tiles = ceil_div(columns, kTile);
  int64_t slots = partial_slots(tiles, rate.columns);
  std::vector<double> partials;  // [tasks, slots]: sums per (tile, segment), see rows.h

  explicit Backward(const Args& args) : Args(args) {}

  void run() {
    if (d_lr == nullptr) {
      elementwise();
    } else if (rate.kind == RateKind::kColumn) {
      rate_rows == 1 ? column_sums() : elementwise();
    } else {
      tile_sums();
    }
  }

  // d_params and d_grads of one tile; give(begin, n, terms, segment) receives the terms of d_lr.
  template <typename F>
  void tile(const Tile& at, const F& give) const {
    const P* v = this->v.row(at.row);
    P* to_params = d_params ? d_params.row(at.row) : nullptr;
    G* to_grads = d_grads ? d_grads.row(at.row) : nullptr;
    if (frozen(at.row)) {
      if (to_params) std::copy(v + at.begin, v + at.end, to_params + at.begin);
      if (to_grads) std::fill(to_grads + at.begin, to_grads + at.end, G(0));
      return;
    }
    for_each_span(rate, at, [&](int64_t span_begin, int64_t span_end, auto lr, int64_t segment) {
      A terms[kBlock];
      for (int64_t b = span_begin; b < span_end; b += kBlock) {
        const int64_t n = least(kBlock, span_end - b);
        auto here = lr;
        if constexpr (std::is_pointer_v<decltype(lr)>) here = lr + (b - span_begin);
        if (to_params) d_params_span(to_params + b, v + b, n, here, rule);
        if (to_grads) d_grads_span(to_grads + b, v + b, n, here, rule);
        if (d_lr != nullptr) {
          const P* p = this->p ? this->p.row(at.row) : v;  // unread without weight decay
          d_lr_span(terms, v + b, p + b, this->g.row(at.row) + b, n, rule);
          give(b, n, static_cast<const A*>(terms), segment);
        }
      }
    });
  }

  template <typename F>
  void for_each_tile(const F& f) const {
    parallel_units(tasks * tiles, least(columns, kTile),
                   [&](int64_t unit) { f(tile_at(unit, tiles, kTile, columns)); });
  }

  // Without d_lr, or with one entry of it for each (task, column).
  void elementwise() const {
    for_each_tile([&](const Tile& at) {
      A* to = d_lr + at.row * columns;
      if (d_lr != nullptr && frozen(at.row)) std::fill(to + at.begin, to + at.end, A(0));
      tile(at, [&](int64_t begin, int64_t n, const A* terms, int64_t) {
        std::copy(terms, terms + n, to + begin);
      });
    });
  }

  // One rate per column for all tasks: a unit owns some columns and walks down the rows.
  void column_sums() const {
    const int64_t blocks = ceil_div(columns, kColumns);
    parallel_units(blocks, tasks * least(columns, kColumns), [&](int64_t unit) {
      Tile at = tile_at(unit, blocks, kColumns, columns);
      double sums[kColumns] = {};
      for (at.row = 0; at.row < tasks; ++at.row) {
        tile(at, [&](int64_t begin, int64_t n, const A* terms, int64_t) {
          add_span(sums + (begin - at.begin), terms, n);
        });
      }
      for (int64_t c = at.begin; c < at.end; ++c) d_lr[c] = A(sums[c - at.begin]);
    });
  }

  // One rate per row or segment: sums per tile first, then over the tiles in a fixed order.
  void tile_sums() {
    partials.assign(static_cast<size_t>(tasks * most(slots, 0)), 0.0);
    for_each_tile([&](const Tile& at) {
      double* sums = partials.data() + at.row * slots;
      tile(at, [&](int64_t, int64_t n, const A* terms, int64_t segment) {
        sums[partial_slot(at.index, segment)] += sum_span(terms, n);
      });
    });
    for (int64_t r = 0; r < rate_rows; ++r) {
      for (int64_t s = 0; s < rate.columns; ++s) d_lr[r * rate.columns + s] = A(total(r, s));
    }
  }

  double total(int64_t r, int64_t s) const {
    const Span across = columns_of(rate, s, columns), down = rows_sharing(rate_rows, r, tasks);
    double sum = 0;
    if (across.begin >= across.end) return sum;
    for (int64_t t = down.begin; t < down.end; ++t) {
      for (int64_t i = across.begin / kTile; i <= (across.end - 1) / kTile; ++i) {
        sum += partials[t * slots + partial_slot(i, s)];
      }
    }
    return sum;
  }
};

template <typename P, typename G>
struct CpuKernels {
  static void update(const UpdateArgs<P, G>& args, const Tensor&) { fastmeta::update(args); }
  static void backward(const BackwardArgs<P, G>& args, const Tensor&) {
    Backward<P, G>(args).run();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { SgdOp<CpuKernels>::add_to(m); }

}  // namespace fastmeta
