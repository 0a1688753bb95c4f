// sgd_update on CUDA devices. A row is cut into tiles; a block takes tiles in turn, each thread
// moves kSteps packs of 16 bytes. Sums for d_lr are taken per (tile, segment) and then added in a
// second launch, in an order that depends on the shapes alone: no atomics, equal bits on every run.

#include "common/cuda.h"
#include "common/sgd_op.h"

namespace fastmeta {
namespace {

constexpr int64_t kRowsPerChunk = 32;  // rows that one thread adds for a rate shared by all tasks

// Packs in flight per thread: 64 bytes of float, 32 of half-width parameters (registers).
template <int V>
constexpr int kSteps = V > 4 ? 2 : 4;

template <int V>
constexpr int64_t tile_columns() {
  return int64_t(kThreads) * V * kSteps<V>;
}

// Learning rates of the V columns from c on. `segment` is where the search starts: at or before
// c's.
template <RateKind kind, int V, typename A>
__device__ __forceinline__ void load_rates(A (&lr)[V], const Rate<A>& rate, int64_t row, int64_t c,
                                           A row_rate, int64_t segment) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if constexpr (kind == RateKind::kRow) {
      lr[i] = row_rate;
    } else if constexpr (kind == RateKind::kColumn) {
      lr[i] = rate.at(row, c + i);
    } else {
      while (segment + 1 < rate.columns && rate.offsets[segment + 1] <= c + i) ++segment;
      lr[i] = rate.at(row, segment);
    }
  }
}

template <RateKind kind, typename A>
__device__ __forceinline__ int64_t first_segment(const Rate<A>& rate, const Tile& tile) {
  return kind == RateKind::kSegment ? segment_of(rate.offsets, rate.columns, tile.begin) : 0;
}

template <typename P, typename G, int V, RateKind kind>
__global__ void __launch_bounds__(kThreads, 4) sgd_update_kernel(UpdateArgs<P, G> args) {
  using A = acc_t<P>;
  const int64_t tiles = ceil_div(args.columns, tile_columns<V>());
  for (int64_t unit = blockIdx.x; unit < args.tasks * tiles; unit += gridDim.x) {
    const Tile tile = tile_at(unit, tiles, tile_columns<V>(), args.columns);
    const int64_t start = tile.begin + int64_t(threadIdx.x) * V;
    constexpr int64_t stride = int64_t(kThreads) * V;
    const P* p = args.p.row(tile.row);
    const G* g = args.g.row(tile.row);
    P* out = args.out.row(tile.row);
    const bool frozen = args.active != nullptr && !args.active[tile.row];
    if (frozen && out == p) continue;
    const A row_rate = kind == RateKind::kRow ? args.rate.of_row(tile.row) : A(0);
    const int64_t segment = first_segment<kind>(args.rate, tile);
    Pack<P, V> ps[kSteps<V>];
    Pack<G, V> gs[kSteps<V>];
#pragma unroll
    for (int k = 0; k < kSteps<V>; ++k) {
      const int64_t c = start + k * stride;
      if (c < tile.end) {
        ps[k] = load<P, V>(p + c);
        if (!frozen) gs[k] = load<G, V>(g + c);
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps<V>; ++k) {
      const int64_t c = start + k * stride;
      if (c >= tile.end) break;
      if (!frozen) {
        A lr[V];
        load_rates<kind, V>(lr, args.rate, tile.row, c, row_rate, segment);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          ps[k].v[i] = P(args.rule.forward(A(ps[k].v[i]), A(gs[k].v[i]), lr[i]));
        }
      }
      store<P, V>(out + c, ps[k]);
    }
  }
}

// d_params and d_grads of V columns; terms receives their contributions to d_lr.
template <typename P, typename G, int V, typename A>
__device__ __forceinline__ void backward_pack(const BackwardArgs<P, G>& args, int64_t row,
                                              int64_t c, bool frozen, const A (&lr)[V],
                                              A (&terms)[V]) {
  const Pack<P, V> v = load<P, V>(args.v.row(row) + c);
  if (args.d_params) {
    Pack<P, V> out = v;
    if (!frozen) {
#pragma unroll
      for (int i = 0; i < V; ++i) out.v[i] = P(args.rule.d_params(A(v.v[i]), lr[i]));
    }
    store<P, V>(args.d_params.row(row) + c, out);
  }
  if (args.d_grads) {
    Pack<G, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out.v[i] = frozen ? G(A(0)) : G(args.rule.d_grads(A(v.v[i]), lr[i]));
    }
    store<G, V>(args.d_grads.row(row) + c, out);
  }
  if (args.d_lr != nullptr && !frozen) {
    const Pack<G, V> g = load<G, V>(args.g.row(row) + c);
    Pack<P, V> p = v;  // unread without weight decay
    if (args.p) p = load<P, V>(args.p.row(row) + c);
#pragma unroll
    for (int i = 0; i < V; ++i) terms[i] = args.rule.d_lr(A(v.v[i]), A(p.v[i]), A(g.v[i]));
  }
}

// Everything but a rate per column shared by all tasks. partials [tasks, slots], see math/rows.h.
template <typename P, typename G, int V, RateKind kind>
__global__ void __launch_bounds__(kThreads, 4)
    sgd_backward_kernel(BackwardArgs<P, G> args, acc_t<P>* partials, int64_t slots) {
  using A = acc_t<P>;
  const int64_t tiles = ceil_div(args.columns, tile_columns<V>());
  constexpr int64_t stride = int64_t(kThreads) * V;
  for (int64_t unit = blockIdx.x; unit < args.tasks * tiles; unit += gridDim.x) {
    const Tile tile = tile_at(unit, tiles, tile_columns<V>(), args.columns);
    const int64_t start = tile.begin + int64_t(threadIdx.x) * V;
    const bool frozen = args.frozen(tile.row);
    const A row_rate = kind == RateKind::kRow ? args.rate.of_row(tile.row) : A(0);
    const int64_t first = first_segment<kind>(args.rate, tile);
    A terms[kSteps<V>][V];
#pragma unroll
    for (int k = 0; k < kSteps<V>; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) terms[k][i] = A(0);
      const int64_t c = start + k * stride;
      if (c < tile.end) {
        A lr[V];
        load_rates<kind, V>(lr, args.rate, tile.row, c, row_rate, first);
        backward_pack<P, G, V>(args, tile.row, c, frozen, lr, terms[k]);
        if (kind == RateKind::kColumn && args.d_lr != nullptr) {
#pragma unroll
          for (int i = 0; i < V; ++i) args.d_lr[tile.row * args.columns + c + i] = terms[k][i];
        }
      }
    }
    if (kind == RateKind::kColumn || args.d_lr == nullptr) continue;
    for (int64_t s = first; s < args.rate.columns; ++s) {
      const Span span = columns_of(args.rate, s, args.columns);
      if (s > first && span.begin >= tile.end) break;
      A sum = A(0);
#pragma unroll
      for (int k = 0; k < kSteps<V>; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int64_t c = start + k * stride + i;
          if (kind == RateKind::kRow || (c >= span.begin && c < span.end)) sum += terms[k][i];
        }
      }
      sum = block_sum(sum);
      if (threadIdx.x == 0) partials[tile.row * slots + partial_slot(tile.index, s)] = sum;
    }
  }
}

// The second stage: one block per entry of d_lr adds its tiles' partial sums.
template <typename P, typename G, int V>
__global__ void __launch_bounds__(kThreads, 4)
    sgd_rate_sums_kernel(BackwardArgs<P, G> args, const acc_t<P>* partials, int64_t slots) {
  for (int64_t entry = blockIdx.x; entry < args.rate_rows * args.rate.columns; entry += gridDim.x) {
    const int64_t r = entry / args.rate.columns, s = entry - r * args.rate.columns;
    const Span across = columns_of(args.rate, s, args.columns);
    const Span down = rows_sharing(args.rate_rows, r, args.tasks);
    const int64_t first = across.begin / tile_columns<V>();
    const int64_t tiles =
        across.begin < across.end ? (across.end - 1) / tile_columns<V>() - first + 1 : 0;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < (down.end - down.begin) * tiles; i += kThreads) {
      const int64_t row = down.begin + i / tiles, tile = first + i % tiles;
      sum += partials[row * slots + partial_slot(tile, s)];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) args.d_lr[entry] = acc_t<P>(sum);
  }
}

// One rate per column for all tasks: a thread owns V columns and walks down a chunk of rows.
// partials [chunks, columns].
template <typename P, typename G, int V>
__global__ void __launch_bounds__(kThreads, 4)
    sgd_column_kernel(BackwardArgs<P, G> args, acc_t<P>* partials) {
  using A = acc_t<P>;
  constexpr int64_t width = int64_t(kThreads) * V;
  const int64_t tiles = ceil_div(args.columns, width);
  const int64_t chunks = ceil_div(args.tasks, kRowsPerChunk);
  for (int64_t unit = blockIdx.x; unit < chunks * tiles; unit += gridDim.x) {
    const Tile tile = tile_at(unit, tiles, width, args.columns);  // its row is the chunk
    const int64_t c = tile.begin + int64_t(threadIdx.x) * V;
    if (c >= tile.end) continue;
    A lr[V], sums[V] = {};
    load_rates<RateKind::kColumn, V>(lr, args.rate, 0, c, A(0), 0);
    const int64_t end = least((tile.row + 1) * kRowsPerChunk, args.tasks);
    for (int64_t row = tile.row * kRowsPerChunk; row < end; ++row) {
      A terms[V] = {};
      backward_pack<P, G, V>(args, row, c, args.frozen(row), lr, terms);
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] += terms[i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) partials[tile.row * args.columns + c + i] = sums[i];
  }
}

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads, 4)
    sgd_column_sums_kernel(BackwardArgs<P, G> args, const acc_t<P>* partials) {
  const int64_t chunks = ceil_div(args.tasks, kRowsPerChunk);
  for (int64_t c = blockIdx.x * int64_t(kThreads) + threadIdx.x; c < args.columns;
       c += gridDim.x * int64_t(kThreads)) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; ++i) sum += partials[i * args.columns + c];
    args.d_lr[c] = acc_t<P>(sum);
  }
}

template <typename P, typename G>
struct CudaKernels {
  using A = acc_t<P>;
  static constexpr int kPack = 16 / sizeof(P);

  // Calls f with the pack size and the kind of rate as compile-time constants.
  template <typename F>
  static void specialize(bool packed, RateKind kind, const F& f) {
    const auto with_pack = [&](auto pack) {
      if (kind == RateKind::kRow)
        return f(pack, std::integral_constant<RateKind, RateKind::kRow>{});
      if (kind == RateKind::kColumn) {
        return f(pack, std::integral_constant<RateKind, RateKind::kColumn>{});
      }
      return f(pack, std::integral_constant<RateKind, RateKind::kSegment>{});
    };
    if (packed) return with_pack(std::integral_constant<int, kPack>{});
    return with_pack(std::integral_constant<int, 1>{});
  }

  static void update(const UpdateArgs<P, G>& args, const Tensor& on) {
    const OnDevice device(on);
    const bool packed = args.columns % kPack == 0 && packs(args.out, kPack) &&
                        packs(args.p, kPack) && packs(args.g, kPack);
    specialize(packed, args.rate.kind, [&](auto pack, auto kind) {
      constexpr int V = decltype(pack)::value;
      const int64_t tiles = ceil_div(args.columns, tile_columns<V>());
      device.launch(sgd_update_kernel<P, G, V, decltype(kind)::value>, args.tasks * tiles, args);
    });
  }

  static void backward(const BackwardArgs<P, G>& args, const Tensor& on) {
    const OnDevice device(on);
    const bool packed = args.columns % kPack == 0 && packs(args.v, kPack) && packs(args.p, kPack) &&
                        packs(args.g, kPack) && packs(args.d_params, kPack) &&
                        packs(args.d_grads, kPack);
    const bool columns_shared =
        args.d_lr != nullptr && args.rate.kind == RateKind::kColumn && args.rate_rows == 1;
    specialize(packed, args.rate.kind, [&](auto pack, auto kind) {
      constexpr int V = decltype(pack)::value;
      columns_shared ? column_sums<V>(args, on, device)
                     : tile_sums<V, decltype(kind)::value>(args, on, device);
    });
  }

  static Tensor scratch(int64_t rows, int64_t columns, const Tensor& on) {
    constexpr auto dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    return empty_rows({rows, columns}, dtype, on);
  }

  template <int V>
  static void column_sums(const BackwardArgs<P, G>& args, const Tensor& on,
                          const OnDevice& device) {
    const int64_t chunks = ceil_div(args.tasks, kRowsPerChunk);
    const int64_t tiles = ceil_div(args.columns, int64_t(kThreads) * V);
    if (args.columns == 0) return;
    const Tensor partials = scratch(chunks, args.columns, on);
    auto* sums = static_cast<A*>(partials.mutable_data_ptr());
    if (chunks > 0) device.launch(sgd_column_kernel<P, G, V>, chunks * tiles, args, sums);
    device.launch(sgd_column_sums_kernel<P, G>, ceil_div(args.columns, kThreads), args, sums);
  }

  template <int V, RateKind kind>
  static void tile_sums(const BackwardArgs<P, G>& args, const Tensor& on, const OnDevice& device) {
    const int64_t tiles = ceil_div(args.columns, tile_columns<V>());
    const bool sums_wanted = args.d_lr != nullptr && kind != RateKind::kColumn;
    const int64_t slots = sums_wanted ? most(partial_slots(tiles, args.rate.columns), 0) : 0;
    const Tensor partials = scratch(args.tasks, slots, on);
    auto* sums = static_cast<A*>(partials.mutable_data_ptr());
    const int64_t units = args.tasks * tiles;
    if (units > 0) device.launch(sgd_backward_kernel<P, G, V, kind>, units, args, sums, slots);
    const int64_t entries = args.rate_rows * args.rate.columns;
    if (sums_wanted && entries > 0) {
      device.launch(sgd_rate_sums_kernel<P, G, V>, entries, args, sums, slots);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_LIBRARY, FASTMETA_KEY, m) { SgdOp<CudaKernels>::add_to(m); }

}  // namespace fastmeta
