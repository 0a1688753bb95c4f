// The inner updates on CUDA devices. A row is cut into tiles; a block takes tiles in turn, each
// thread moves one pack of adjacent columns per stream. Sums for the learning rate and the
// hyperparameters are taken per tile and then added in a second launch, in an order that depends on
// the shapes alone: no atomics, equal bits on every run.

#include "common/cuda.h"
#include "common/update_op.h"

namespace fastmeta {
namespace {

constexpr int64_t kRowsPerChunk = 32;  // rows that one thread adds for a rate shared by all tasks

// V adjacent columns of a stream as the accumulation type.
template <typename T, int V, typename A>
__device__ __forceinline__ void load_as(A (&to)[V], const Stream& stream, int64_t row, int64_t c) {
  const Pack<T, V> pack = load<T, V>(stream.row<T>(row) + c);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = A(pack.v[i]);
}
template <typename T, int V, typename A>
__device__ __forceinline__ void store_as(const A (&from)[V], const Stream& stream, int64_t row,
                                         int64_t c) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.v[i] = T(from[i]);
  store<T, V>(stream.row<T>(row) + c, pack);
}

template <int V>
__device__ __forceinline__ void load_columns(double (&to)[V], const Stream& stream, int64_t row,
                                             int64_t c) {
  if (stream) return load_as<double, V>(to, stream, row, c);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = 0;
}
template <int V>
__device__ __forceinline__ void load_columns(float (&to)[V], const Stream& stream, int64_t row,
                                             int64_t c) {
  if (!stream) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = 0;
  } else if (stream.type == Type::kFloat) {
    load_as<float, V>(to, stream, row, c);
  } else if (stream.type == Type::kBFloat16) {
    load_as<BFloat16, V>(to, stream, row, c);
  } else {
    load_as<Half, V>(to, stream, row, c);
  }
}
template <int V>
__device__ __forceinline__ void store_columns(const double (&from)[V], const Stream& stream,
                                              int64_t row, int64_t c) {
  store_as<double, V>(from, stream, row, c);
}
template <int V>
__device__ __forceinline__ void store_columns(const float (&from)[V], const Stream& stream,
                                              int64_t row, int64_t c) {
  if (stream.type == Type::kFloat) {
    store_as<float, V>(from, stream, row, c);
  } else if (stream.type == Type::kBFloat16) {
    store_as<BFloat16, V>(from, stream, row, c);
  } else {
    store_as<Half, V>(from, stream, row, c);
  }
}

// Learning rates of the V columns from c on; `segment` is where the search starts: at or before
// c's.
template <int V, typename A>
__device__ __forceinline__ void load_rates(A (&lr)[V], const Rate<A>& rate, RateKind kind,
                                           int64_t row, int64_t c, int64_t segment) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    int64_t entry = 0;
    if (kind == RateKind::kColumn) entry = c + i;
    if (kind == RateKind::kSegment) {
      while (segment + 1 < rate.columns && rate.offsets[segment + 1] <= c + i) ++segment;
      entry = segment;
    }
    lr[i] = rate.at(row, entry);
  }
}

template <typename A>
__device__ __forceinline__ bool is_finite(A x) {
  return x < kSquareable<A> && x > -kSquareable<A>;
}

// What a launch needs beside its arguments.
template <typename Pass>
struct Plan {
  using Row = typename Pass::Row;
  Row row;                    // the hyperparameters of all rows, worked out on the host, or
  const Row* rows = nullptr;  // of one or of each, worked out on the device
  int64_t rows_stride = 0;
  int64_t rows_per_unit = 1;
  // where sums go on their way: per tile, or per chunk of rows for a rate per column
  typename Pass::A* lr = nullptr;  // [tasks, slots] (math/rows.h), or [chunks, columns]
  int64_t slots = 0;
  double* hypers = nullptr;  // [tasks, tiles, kTerms - 1]

  __device__ const Row& at(int64_t t) const { return rows ? rows[t * rows_stride] : row; }
};

// Powers and roots of the hyperparameters, once per row.
template <typename Pass>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(PassArgs<Pass> args, typename Pass::Row* rows, int64_t count) {
  for (int64_t t = blockIdx.x * int64_t(kThreads) + threadIdx.x; t < count;
       t += gridDim.x * int64_t(kThreads)) {
    rows[t] = args.row(t);
  }
}

// One unit is a tile of one row, or of a chunk of rows where a rate per column is shared by all.
template <typename Pass, int V>
__global__ void __launch_bounds__(kThreads, sizeof(typename Pass::A) == 8 ? 1 : 2)
    pass_kernel(PassArgs<Pass> args, Plan<Pass> plan) {
  using A = typename Pass::A;
  constexpr int64_t width = int64_t(kThreads) * V;
  constexpr int kHypers = Pass::kTerms > 0 ? Pass::kTerms - 1 : 0;
  const RateKind kind = args.rate[0].kind;
  const int64_t tiles = ceil_div(args.columns, width);
  const int64_t units = ceil_div(args.tasks, plan.rows_per_unit) * tiles;
  const bool down = args.columns_shared();
  const bool spans_summed = args.d_lr != nullptr && kind != RateKind::kColumn;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const Tile tile = tile_at(unit, tiles, width, args.columns);  // its row is the chunk
    const int64_t c = tile.begin + int64_t(threadIdx.x) * V;
    const bool inside = c < tile.end;
    const int64_t first = kind == RateKind::kSegment
                              ? segment_of(args.rate[0].offsets, args.rate[0].columns, tile.begin)
                              : 0;
    A sums[V] = {};
    const int64_t end = least((tile.row + 1) * plan.rows_per_unit, args.tasks);
    for (int64_t row = tile.row * plan.rows_per_unit; row < end; ++row) {
      const bool frozen = args.frozen(row);
      A terms[Pass::kTerms + 1][V] = {};
      if (inside && frozen) {
#pragma unroll
        for (int o = 0; o < Pass::kOut; ++o) {
          const int source = Pass::frozen(o);
          const Stream from = source < 0 ? Stream{} : args.in[source < 0 ? 0 : source];
          if (!args.out[o] || (from && from.data == args.out[o].data)) continue;
          A kept[V];
          load_columns<V>(kept, from, row, c);
          store_columns<V>(kept, args.out[o], row, c);
        }
      } else if (inside) {
        const typename Pass::Row numbers = plan.at(row);
        A in[Pass::kIn][V], lr[Pass::kSets][V], out[Pass::kOut][V];
#pragma unroll
        for (int i = 0; i < Pass::kIn; ++i) load_columns<V>(in[i], args.in[i], row, c);
#pragma unroll
        for (int s = 0; s < Pass::kSets; ++s) {
          load_rates<V>(lr[s], args.rate[s], kind, row, c, first);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          A x[Pass::kIn], rate[Pass::kSets], y[Pass::kOut], t[Pass::kTerms + 1];
#pragma unroll
          for (int k = 0; k < Pass::kIn; ++k) x[k] = in[k][i];
#pragma unroll
          for (int k = 0; k < Pass::kSets; ++k) rate[k] = lr[k][i];
          Pass::run(x, rate, numbers, y, t);
#pragma unroll
          for (int k = 0; k < Pass::kOut; ++k) out[k][i] = y[k];
#pragma unroll
          for (int k = 0; k < Pass::kTerms; ++k) terms[k][i] = t[k];
        }
#pragma unroll
        for (int o = 0; o < Pass::kOut; ++o) {
          if (args.out[o]) store_columns<V>(out[o], args.out[o], row, c);
        }
        if (args.finite != nullptr && !args.checked) {
          bool good = true;
#pragma unroll
          for (int i = 0; i < V; ++i) good = good && is_finite(in[1][i]);
          if (!good) args.finite[row] = false;  // every writer writes the same
        }
      }
      if constexpr (Pass::kTerms > 0) {
        if (args.d_lr != nullptr && kind == RateKind::kColumn) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (down) {
              sums[i] += terms[0][i];
            } else if (inside) {
              args.d_lr[row * args.columns + c + i] = terms[0][i];
            }
          }
        }
        for (int64_t s = first; spans_summed && s < args.rate[0].columns; ++s) {
          const Span span = columns_of(args.rate[0], s, args.columns);
          if (s > first && span.begin >= tile.end) break;
          A sum = A(0);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (c + i >= span.begin && c + i < span.end) sum += terms[0][i];
          }
          sum = block_sum(sum);
          if (threadIdx.x == 0) plan.lr[row * plan.slots + partial_slot(tile.index, s)] = sum;
        }
        for (int k = 0; args.d_hypers != nullptr && k < kHypers; ++k) {
          double sum = 0;
#pragma unroll
          for (int i = 0; i < V; ++i) sum += double(terms[k + 1][i]);
          sum = block_sum(sum);
          if (threadIdx.x == 0) plan.hypers[(row * tiles + tile.index) * kHypers + k] = sum;
        }
      }
    }
    if (down && inside) {
#pragma unroll
      for (int i = 0; i < V; ++i) plan.lr[tile.row * args.columns + c + i] = sums[i];
    }
  }
}

// The second stage: one block per entry of d_lr adds its tiles' partial sums.
template <typename Pass>
__global__ void __launch_bounds__(kThreads)
    rate_sums_kernel(PassArgs<Pass> args, Plan<Pass> plan, int64_t width) {
  const int64_t entries = args.rate_rows * args.rate[0].columns;
  for (int64_t entry = blockIdx.x; entry < entries; entry += gridDim.x) {
    const int64_t r = entry / args.rate[0].columns, s = entry - r * args.rate[0].columns;
    const Span across = columns_of(args.rate[0], s, args.columns);
    const Span down = rows_sharing(args.rate_rows, r, args.tasks);
    const int64_t first = across.begin / width;
    const int64_t tiles = across.begin < across.end ? (across.end - 1) / width - first + 1 : 0;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < (down.end - down.begin) * tiles; i += kThreads) {
      const int64_t row = down.begin + i / tiles, tile = first + i % tiles;
      sum += plan.lr[row * plan.slots + partial_slot(tile, s)];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) args.d_lr[entry] = typename Pass::A(sum);
  }
}

// The second stage of a rate per column for all tasks.
template <typename Pass>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(PassArgs<Pass> args, Plan<Pass> plan) {
  const int64_t chunks = ceil_div(args.tasks, kRowsPerChunk);
  for (int64_t c = blockIdx.x * int64_t(kThreads) + threadIdx.x; c < args.columns;
       c += gridDim.x * int64_t(kThreads)) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; ++i) sum += plan.lr[i * args.columns + c];
    args.d_lr[c] = typename Pass::A(sum);
  }
}

// The second stage of the hyperparameters: one block per entry.
template <typename Pass>
__global__ void __launch_bounds__(kThreads)
    hyper_sums_kernel(PassArgs<Pass> args, Plan<Pass> plan, int64_t tiles) {
  constexpr int kHypers = Pass::kTerms - 1;
  for (int64_t entry = blockIdx.x; entry < args.hyper_rows * kMaxHypers; entry += gridDim.x) {
    const int64_t r = entry / kMaxHypers, k = entry - r * kMaxHypers;
    const Span down = rows_sharing(args.hyper_rows, r, args.tasks);
    double sum = 0;
    for (int64_t i = down.begin * tiles + threadIdx.x; k < kHypers && i < down.end * tiles;
         i += kThreads) {
      sum += plan.hypers[i * kHypers + k];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) args.d_hypers[entry] = sum;
  }
}

// Tensors of one launch of list_kernel: what fits the 4 KiB of a kernel's arguments.
template <typename Pass>
struct List {
  static constexpr int kMost = 56;
  ListItem<Pass> items[kMost];
  int count = 0;
};

// One unit is a tile of one tensor of a list; in place.
template <typename Pass, int V>
__global__ void __launch_bounds__(kThreads)
    list_kernel(PassArgs<Pass> args, Plan<Pass> plan, List<Pass> list, int64_t units) {
  using A = typename Pass::A;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    int low = 0, high = list.count - 1;  // the last item that starts at or before the unit
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (list.items[middle].first_tile <= unit) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const ListItem<Pass>& item = list.items[low];
    const int64_t c = ((unit - item.first_tile) * kThreads + int64_t(threadIdx.x)) * V;
    if (c >= item.columns) continue;
    A in[Pass::kIn][V], out[Pass::kOut][V];
#pragma unroll
    for (int i = 0; i < Pass::kIn; ++i) {
      load_columns<V>(in[i], Stream{item.data[i], 0, args.in[i].type}, 0, c);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      A x[Pass::kIn], y[Pass::kOut];
#pragma unroll
      for (int k = 0; k < Pass::kIn; ++k) x[k] = in[k][i];
      Pass::run(x, &args.rate[0].value, plan.row, y, nullptr);
#pragma unroll
      for (int k = 0; k < Pass::kOut; ++k) out[k][i] = y[k];
    }
#pragma unroll
    for (int o = 0; o < Pass::kOut; ++o) {
      const int i = o == 0 ? 0 : o + 1;
      store_columns<V>(out[o], Stream{item.data[i], 0, args.in[i].type}, 0, c);
    }
  }
}

__global__ void __launch_bounds__(kThreads) all_true_kernel(bool* rows, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < count;
       i += gridDim.x * int64_t(kThreads)) {
    rows[i] = true;
  }
}

// finite[t] for the active rows; one block takes tiles of rows in turn.
template <typename Pass>
__global__ void __launch_bounds__(kThreads) check_kernel(PassArgs<Pass> args) {
  using A = typename Pass::A;
  const int64_t tiles = ceil_div(args.columns, kThreads);
  for (int64_t unit = blockIdx.x; unit < args.tasks * tiles; unit += gridDim.x) {
    const Tile tile = tile_at(unit, tiles, kThreads, args.columns);
    const int64_t c = tile.begin + threadIdx.x;
    if (c >= tile.end || (args.active != nullptr && !args.active[tile.row])) continue;
    A g[1];
    load_columns<1>(g, args.in[1], tile.row, c);
    if (!is_finite(g[0])) args.finite[tile.row] = false;
  }
}

// Rows whose gradient turned out not to be finite get back what they had.
template <typename Pass>
__global__ void __launch_bounds__(kThreads) restore_kernel(PassArgs<Pass> args) {
  using A = typename Pass::A;
  for (int64_t row = blockIdx.x; row < args.tasks; row += gridDim.x) {
    if (args.finite[row]) continue;
    for (int64_t c = threadIdx.x; c < args.columns; c += kThreads) {
#pragma unroll
      for (int o = 0; o < Pass::kOut; ++o) {
        A kept[1];
        load_columns<1>(kept, args.in[Pass::frozen(o)], row, c);
        store_columns<1>(kept, args.out[o], row, c);
      }
    }
  }
}

template <typename Pass>
struct CudaKernels {
  using A = typename Pass::A;
  static constexpr int kPack = 16 / sizeof(A);

  static void all_true(bool* rows, int64_t count, const Tensor& on) {
    OnDevice(on).launch(all_true_kernel, ceil_div(count, kThreads), rows, count);
  }

  static void check(const PassArgs<Pass>& args, const Tensor& on) {
    const int64_t units = args.tasks * ceil_div(args.columns, kThreads);
    if (units > 0) OnDevice(on).launch(check_kernel<Pass>, units, args);
  }

  static void run_list(const PassArgs<Pass>& args, std::vector<ListItem<Pass>>& items,
                       const Tensor& on) {
    bool packed = true;
    for (const auto& item : items) {
      packed = packed && item.columns % kPack == 0;
      for (int i = 0; i < Pass::kIn; ++i) {
        packed = packed && packs({item.data[i], 0, args.in[i].type});
      }
    }
    const OnDevice device(on);
    packed ? launch_lists<kPack>(args, items, device) : launch_lists<1>(args, items, device);
  }

  template <int V>
  static void launch_lists(const PassArgs<Pass>& args, const std::vector<ListItem<Pass>>& items,
                           const OnDevice& device) {
    Plan<Pass> plan;
    plan.row = args.row(0);
    for (size_t first = 0; first < items.size(); first += List<Pass>::kMost) {
      List<Pass> list;
      int64_t units = 0;
      for (size_t i = first; i < items.size() && list.count < List<Pass>::kMost; ++i) {
        ListItem<Pass>& item = list.items[list.count++] = items[i];
        item.first_tile = units;
        units += ceil_div(item.columns, int64_t(kThreads) * V);
      }
      if (units > 0) device.launch(list_kernel<Pass, V>, units, args, plan, list, units);
    }
  }

  static bool packs(const Stream& stream) {
    const int64_t size = stream.type == Type::kDouble ? 8 : stream.type == Type::kFloat ? 4 : 2;
    const auto address = reinterpret_cast<uintptr_t>(stream.data);
    return address % uintptr_t(size * kPack) == 0 && stream.stride % kPack == 0;
  }

  static void run(const PassArgs<Pass>& args, const Tensor& on) {
    bool packed = args.columns % kPack == 0;
    for (const Stream& stream : args.in) packed = packed && packs(stream);
    for (const Stream& stream : args.out) packed = packed && packs(stream);
    const OnDevice device(on);
    packed ? run_packed<kPack>(args, on, device) : run_packed<1>(args, on, device);
  }

  static Tensor scratch(int64_t count, ScalarType dtype, const Tensor& on) {
    return empty_rows({count}, dtype, on);
  }

  // The hyperparameters of the rows; the result owns those made on the device.
  static Tensor set_rows(Plan<Pass>& plan, const PassArgs<Pass>& args, const Tensor& on,
                         const OnDevice& device) {
    using Row = typename Pass::Row;
    int64_t count = 0;
    for (const Hypers& hypers : args.hypers) {
      if (hypers.data != nullptr) count = most(count, hypers.row_stride == 0 ? 1 : args.tasks);
    }
    constexpr int64_t words = ceil_div(sizeof(Row), sizeof(double));
    const Tensor rows = scratch(count * words, ScalarType::Double, on);
    if (count == 0) {
      plan.row = args.row(0);
    } else {
      auto* made = reinterpret_cast<Row*>(rows.mutable_data_ptr());
      plan.rows = made;
      plan.rows_stride = count == 1 ? 0 : 1;
      device.launch(rows_kernel<Pass>, ceil_div(count, kThreads), args, made, count);
    }
    return rows;
  }

  template <int V>
  static void run_packed(const PassArgs<Pass>& args, const Tensor& on, const OnDevice& device) {
    constexpr int64_t width = int64_t(kThreads) * V;
    constexpr auto dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    constexpr int kHypers = Pass::kTerms > 0 ? Pass::kTerms - 1 : 0;
    const bool down = args.columns_shared();
    const bool spans_summed = args.d_lr != nullptr && args.rate[0].kind != RateKind::kColumn;
    const int64_t rows_per_unit = down ? kRowsPerChunk : 1;
    const int64_t chunks = ceil_div(args.tasks, rows_per_unit);
    const int64_t tiles = ceil_div(args.columns, width);
    Plan<Pass> plan;
    plan.rows_per_unit = rows_per_unit;
    plan.slots = spans_summed ? most(partial_slots(tiles, args.rate[0].columns), 0) : 0;
    const int64_t rate_sums = down ? chunks * args.columns : args.tasks * plan.slots;
    const int64_t hyper_sums = args.d_hypers != nullptr ? args.tasks * tiles * kHypers : 0;
    const Tensor rates = scratch(rate_sums, dtype, on);
    const Tensor hypers = scratch(hyper_sums, ScalarType::Double, on);
    plan.lr = static_cast<A*>(rates.mutable_data_ptr());
    plan.hypers = static_cast<double*>(hypers.mutable_data_ptr());
    const Tensor rows = set_rows(plan, args, on, device);
    const int64_t units = chunks * tiles;
    if (units > 0) device.launch(pass_kernel<Pass, V>, units, args, plan);
    if constexpr (Pass::kTerms == 0) {
      const bool watched = args.finite != nullptr && !args.checked;
      if (watched && units > 0) device.launch(restore_kernel<Pass>, args.tasks, args);
    } else {
      const int64_t entries = args.rate_rows * args.rate[0].columns;
      if (down && args.columns > 0) {
        device.launch(column_sums_kernel<Pass>, ceil_div(args.columns, kThreads), args, plan);
      }
      if (spans_summed && entries > 0) {
        device.launch(rate_sums_kernel<Pass>, entries, args, plan, width);
      }
      if (args.d_hypers != nullptr && args.hyper_rows > 0) {
        device.launch(hyper_sums_kernel<Pass>, args.hyper_rows * kMaxHypers, args, plan, tiles);
      }
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_LIBRARY, FASTMETA_KEY, m) { add_updates<CudaKernels>(m); }

}  // namespace fastmeta
