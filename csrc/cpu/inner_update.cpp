// The inner updates on the CPU. A row is cut into tiles (units of parallel work), a tile into spans
// that share one learning rate or read it per column, a span into blocks that stay in the L1 cache
// while one plain loop runs the pass. The cuts depend on the shapes alone, so results do not depend
// on the number of threads.

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "common/cpu.h"
#include "common/update_op.h"

namespace fastmeta {
namespace {

constexpr int64_t kTile = 16384;    // columns of a parallel unit
constexpr int64_t kColumns = 4096;  // the same where a unit sums down the rows
constexpr int64_t kBlock = 512;     // columns in flight
constexpr int kLanes = 16;

// ---- loops over the adjacent columns of a block ----

// The pass itself. Every stream is of the accumulation type here.
template <typename Pass, bool kSums, typename A, size_t... I, size_t... O, size_t... S, size_t... K>
FM_CLONES void run_block(const A* const* in, A* const* out, const A* const* lr, A* terms, int64_t n,
                         const typename Pass::Row& given, std::index_sequence<I...>,
                         std::index_sequence<O...>, std::index_sequence<S...>,
                         std::index_sequence<K...>) {
  const A* const x[] = {in[I]...};
  A* const y[] = {out[O]...};
  const A* const rates[] = {lr[S]...};
  const typename Pass::Row row = given;
  FM_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const A values[] = {x[I][i]...};
    const A rate[] = {rates[S][i]...};
    A results[sizeof...(O)], sums[sizeof...(K) + 1];
    Pass::run(values, rate, row, results, sums);
    ((y[O][i] = results[O]), ...);
    if constexpr (kSums) ((terms[int64_t(K) * kBlock + i] = sums[K]), ...);
  }
}

template <typename To, typename From>
FM_CLONES void convert(To* to, const From* from, int64_t n) {
  FM_IVDEP
  for (int64_t i = 0; i < n; ++i) to[i] = To(from[i]);
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

// Whether the squares of all are finite too. The numbers that are not have an exponent from that of
// kSquareable on; integers keep the loop free of rounding and order.
template <typename A>
FM_CLONES bool all_finite(const A* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  constexpr Bits kMagnitude = ~Bits(0) >> 1;
  Bits limit, bad = 0;
  const A bound = kSquareable<A>;
  std::memcpy(&limit, &bound, sizeof(A));
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof(A));
    bad |= (bits & kMagnitude) >= limit ? Bits(1) : Bits(0);
  }
  return bad == 0;
}

// ---- blocks ----

// The columns [begin, begin + n) of a row as the accumulation type: in place, or converted.
template <typename A>
const A* load(const Stream& stream, int64_t row, int64_t begin, int64_t n, A* buffer) {
  static const A zeros[kBlock] = {};
  if (!stream) return zeros;
  const A* found = buffer;
  with_type<A>(stream.type, [&](auto zero) {
    using T = decltype(zero);
    const T* from = stream.row<T>(row) + begin;
    if constexpr (std::is_same_v<T, A>) {
      found = from;
    } else {
      convert(buffer, from, n);
    }
  });
  return found;
}

template <typename Pass>
struct Run : PassArgs<Pass> {
  using Args = PassArgs<Pass>;
  using A = typename Pass::A;
  using Args::checked, Args::columns, Args::columns_shared, Args::d_hypers, Args::d_lr,
      Args::finite, Args::frozen, Args::hyper_rows, Args::in, Args::out, Args::rate,
      Args::rate_rows, Args::tasks;
  static constexpr int kIn = Pass::kIn, kOut = Pass::kOut, kSets = Pass::kSets,
                       kTerms = Pass::kTerms, kHypers = most(kTerms - 1, 0);

  const int64_t width = columns_shared() ? kColumns : kTile;
  const int64_t tiles = ceil_div(columns, width);
  const int64_t slots = partial_slots(tiles, rate[0].columns);
  const bool sums_wanted = d_lr != nullptr || d_hypers != nullptr;
  const bool spans_summed = d_lr != nullptr && rate[0].kind != RateKind::kColumn;
  std::vector<double> partials;        // [tasks, slots]: d_lr per (tile, segment), see rows.h
  std::vector<double> hyper_partials;  // [tasks, tiles, kHypers]
  std::vector<char> broken;            // [tasks, tiles]: a gradient that is not finite

  explicit Run(const Args& args) : Args(args) {}

  void operator()() {
    if (spans_summed) partials.assign(size_t(tasks * most(slots, 0)), 0.0);
    if (d_hypers != nullptr) hyper_partials.assign(size_t(tasks * tiles * kHypers), 0.0);
    if (watches()) broken.assign(size_t(tasks * tiles), 0);
    const int64_t rows = columns_shared() ? tasks : 1;  // of one unit, which sums down them
    if (columns_shared() && tasks == 0) std::fill_n(d_lr, columns, A(0));
    if (rows > 0 && columns > 0) {
      parallel_units(tasks / rows * tiles, rows * least(columns, width), [&](int64_t unit) {
        Tile tile = tile_at(unit, tiles, width, columns);
        if (!columns_shared()) return this->tile(tile, nullptr);
        double sums[kColumns] = {};
        for (tile.row = 0; tile.row < tasks; ++tile.row) this->tile(tile, sums);
        for (int64_t c = tile.begin; c < tile.end; ++c) d_lr[c] = A(sums[c - tile.begin]);
      });
    }
    if (watches()) restore();
    if (spans_summed) add_rates();
    if (d_hypers != nullptr) add_hypers();
  }

  // ---- one tile; `down` gathers d_lr per column where all rows share it ----

  void tile(const Tile& at, double* down) {
    if (frozen(at.row)) {
      if (d_lr != nullptr && rate[0].kind == RateKind::kColumn && down == nullptr) {
        std::fill_n(d_lr + at.row * columns + at.begin, at.end - at.begin, A(0));
      }
      return copy(at);
    }
    tile(at, this->row(at.row), down);
  }

  void tile(const Tile& at, const typename Pass::Row& row, double* down) {
    A rates[kSets][kBlock];
    int64_t segment = 0;
    const bool segmented = rate[0].kind == RateKind::kSegment;
    if (segmented) segment = segment_of(rate[0].offsets, rate[0].columns, at.begin);
    bool good = true;
    for (int64_t begin = at.begin; begin < at.end; ++segment) {
      const bool last = !segmented || segment + 1 >= rate[0].columns;
      const int64_t end = last ? at.end : least(rate[0].offsets[segment + 1], at.end);
      if (end <= begin) continue;
      if (rate[0].kind != RateKind::kColumn) {
        for (int s = 0; s < kSets; ++s) {
          const A value = rate[s].at(at.row, segmented ? segment : 0);
          std::fill_n(rates[s], least(kBlock, end - begin), value);
        }
      }
      double sum = 0;
      for (int64_t b = begin; b < end; b += kBlock) {
        sum += block(at, b, least(kBlock, end - b), rates, row, down, good);
      }
      if (spans_summed) partials[at.row * slots + partial_slot(at.index, segment)] = sum;
      begin = end;
    }
    if (!good) broken[size_t(at.row * tiles + at.index)] = 1;
  }

  // Returns the block's part of d_lr where that is one number per span.
  double block(const Tile& at, int64_t begin, int64_t n, A (&rates)[kSets][kBlock],
               const typename Pass::Row& row, double* down, bool& good) {
    A loaded[kIn][kBlock], made[kOut][kBlock], terms[most(kTerms, 1)][kBlock];
    const A *x[kIn], *lr[kSets];
    A* y[kOut];
    for (int i = 0; i < kIn; ++i) x[i] = load(in[i], at.row, begin, n, loaded[i]);
    for (int s = 0; s < kSets; ++s) {
      const bool per_column = rate[0].kind == RateKind::kColumn && rate[s].data != nullptr;
      lr[s] = per_column ? rate[s].data + at.row * rate[s].row_stride + begin : rates[s];
      if (rate[0].kind == RateKind::kColumn && !per_column) {
        std::fill_n(rates[s], n, rate[s].value);
      }
    }
    for (int o = 0; o < kOut; ++o) {
      const bool direct = out[o] && (sizeof(A) == 8 || out[o].type == Type::kFloat);
      y[o] = direct ? out[o].template row<A>(at.row) + begin : made[o];
    }
    if (watches()) good = good && all_finite(x[1], n);
    loop(x, y, lr, terms[0], n, row);
    for (int o = 0; o < kOut; ++o) {
      if (out[o] && y[o] == made[o]) store(out[o], at.row, begin, n, made[o]);
    }
    if constexpr (kTerms > 0) {
      for (int k = 0; d_hypers != nullptr && k < kHypers; ++k) {
        hyper_partials[(at.row * tiles + at.index) * kHypers + k] += sum_span(terms[k + 1], n);
      }
      if (d_lr == nullptr) return 0;
      if (spans_summed) return sum_span(terms[0], n);
      if (down != nullptr) {
        add_span(down + (begin - at.begin), terms[0], n);
      } else {
        std::copy_n(terms[0], n, d_lr + at.row * columns + begin);
      }
    }
    return 0;
  }

  void loop(const A* const* x, A* const* y, const A* const* lr, A* terms, int64_t n,
            const typename Pass::Row& row) const {
    using std::make_index_sequence;
    const make_index_sequence<kIn> i;
    const make_index_sequence<kOut> o;
    const make_index_sequence<kSets> s;
    const make_index_sequence<kTerms> k;
    if (kTerms > 0 && sums_wanted)
      return run_block<Pass, true>(x, y, lr, terms, n, row, i, o, s, k);
    run_block<Pass, false>(x, y, lr, terms, n, row, i, o, s, k);
  }

  static void store(const Stream& stream, int64_t row, int64_t begin, int64_t n, const A* from) {
    with_type<A>(stream.type,
                 [&](auto zero) { convert(stream.row<decltype(zero)>(row) + begin, from, n); });
  }

  // ---- frozen rows: every output is a copy of an input, or 0 ----

  void copy(const Tile& at) const {
    A buffer[kBlock];
    const Stream none;
    for (int o = 0; o < kOut; ++o) {
      const int source = Pass::frozen(o);
      const Stream& from = source < 0 ? none : in[source < 0 ? 0 : source];
      if (!out[o] || (from && from.data == out[o].data)) continue;
      for (int64_t b = at.begin; b < at.end; b += kBlock) {
        const int64_t n = least(kBlock, at.end - b);
        store(out[o], at.row, b, n, load(from, at.row, b, n, buffer));
      }
    }
  }

  // Whether gradients are checked on the way. In place that would be too late: see check().
  bool watches() const { return finite != nullptr && !checked; }

  // Rows whose gradient turned out not to be finite get back what they had.
  void restore() const {
    for (int64_t row = 0; row < tasks; ++row) {
      const auto first = broken.begin() + row * tiles;
      if (std::find(first, first + tiles, 1) == first + tiles) continue;
      finite[row] = false;
      copy({row, 0, 0, columns});
    }
  }

  // ---- sums over tiles and rows, in a fixed order ----

  void add_rates() const {
    for (int64_t r = 0; r < rate_rows; ++r) {
      for (int64_t s = 0; s < rate[0].columns; ++s) {
        const Span across = columns_of(rate[0], s, columns);
        const Span down = rows_sharing(rate_rows, r, tasks);
        double sum = 0;
        for (int64_t t = down.begin; across.begin < across.end && t < down.end; ++t) {
          for (int64_t i = across.begin / width; i <= (across.end - 1) / width; ++i) {
            sum += partials[t * slots + partial_slot(i, s)];
          }
        }
        d_lr[r * rate[0].columns + s] = A(sum);
      }
    }
  }

  void add_hypers() const {
    std::fill_n(d_hypers, hyper_rows * kMaxHypers, 0.0);
    for (int64_t r = 0; r < hyper_rows; ++r) {
      const Span down = rows_sharing(hyper_rows, r, tasks);
      for (int64_t i = down.begin * tiles; i < down.end * tiles; ++i) {
        for (int k = 0; k < kHypers; ++k) {
          d_hypers[r * kMaxHypers + k] += hyper_partials[i * kHypers + k];
        }
      }
    }
  }
};

template <typename Pass>
struct CpuKernels {
  using A = typename Pass::A;

  static void run(const PassArgs<Pass>& args, const Tensor&) { Run<Pass>{args}(); }

  static void all_true(bool* rows, int64_t count, const Tensor&) { std::fill_n(rows, count, true); }

  // Tiles of all tensors are one range of units, so that many small ones occupy all threads.
  static void run_list(const PassArgs<Pass>& args, std::vector<ListItem<Pass>>& items,
                       const Tensor&) {
    int64_t units = 0, elements = 0;
    for (auto& item : items) {
      item.first_tile = units;
      units += ceil_div(item.columns, kTile);
      elements += item.columns;
    }
    const typename Pass::Row row = args.row(0);
    parallel_units(units, elements / most(units, 1), [&](int64_t unit) {
      const auto later = [](int64_t u, const ListItem<Pass>& item) { return u < item.first_tile; };
      const auto& item = *(std::upper_bound(items.begin(), items.end(), unit, later) - 1);
      PassArgs<Pass> own = args;
      for (int i = 0; i < Pass::kIn; ++i) own.in[i].data = item.data[i];
      for (int o = 0; o < Pass::kOut; ++o) own.out[o].data = item.data[o == 0 ? 0 : o + 1];
      const int64_t begin = (unit - item.first_tile) * kTile;
      Run<Pass>(own).tile({0, 0, begin, least(begin + kTile, item.columns)}, row, nullptr);
    });
  }

  // Reads the gradients of the active rows before anything is written.
  static void check(const PassArgs<Pass>& args, const Tensor&) {
    parallel_units(args.tasks, args.columns, [&](int64_t row) {
      if (args.active != nullptr && !args.active[row]) return;
      A buffer[kBlock];
      bool good = true;
      for (int64_t b = 0; good && b < args.columns; b += kBlock) {
        const int64_t n = least(kBlock, args.columns - b);
        good = all_finite(load(args.in[1], row, b, n, buffer), n);
      }
      args.finite[row] = good;
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { add_updates<CpuKernels>(m); }

}  // namespace fastmeta
