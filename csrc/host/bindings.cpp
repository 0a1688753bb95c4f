// fastmeta._host: work on Python objects that the torch dispatcher cannot carry. No torch headers.
//
// The episode index sampler. fastmeta/_sampler.py is its specification and checks every argument
// before calling it; both give identical indices.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <unordered_map>

namespace py = pybind11;

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

// The random numbers of one episode; see _Stream in fastmeta/_sampler.py.
class Stream {
 public:
  Stream(uint64_t seed, uint64_t episode) : state_(mix(mix(seed + kGolden) + episode)) {}

  int64_t below(uint64_t n) {
    const uint64_t threshold = (0 - n) % n;
    for (;;) {
      state_ += kGolden;
      const uint64_t value = mix(state_);
      if (value >= threshold) return static_cast<int64_t>(value % n);
    }
  }

  template <typename Write>
  void choose(int64_t n, int64_t k, const Write& write) {
    moved_.clear();
    for (int64_t i = 0; i < k; ++i) {
      const int64_t j = i + below(static_cast<uint64_t>(n - i));
      write(i, at(j));
      moved_[j] = at(i);
    }
  }

 private:
  int64_t at(int64_t i) const {
    const auto found = moved_.find(i);
    return found == moved_.end() ? i : found->second;
  }

  uint64_t state_;
  std::unordered_map<int64_t, int64_t> moved_;
};

using Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

py::tuple sample_episodes(const Array& class_starts, int64_t num_episodes, int64_t n_way,
                          int64_t k_shot, int64_t q_query, uint64_t seed, uint64_t first_episode) {
  Array classes({num_episodes, n_way});
  Array support({num_episodes, n_way, k_shot});
  Array query({num_episodes, n_way, q_query});
  const int64_t num_classes = class_starts.size() - 1;
  const int64_t* starts = class_starts.data();
  int64_t* classes_out = classes.mutable_data();
  int64_t* support_out = support.mutable_data();
  int64_t* query_out = query.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t e = 0; e < num_episodes; ++e) {
      Stream stream(seed, first_episode + static_cast<uint64_t>(e));
      int64_t* way = classes_out + e * n_way;
      stream.choose(num_classes, n_way, [&](int64_t i, int64_t c) { way[i] = c; });
      for (int64_t w = 0; w < n_way; ++w) {
        const int64_t begin = starts[way[w]];
        const int64_t row = e * n_way + w;
        stream.choose(starts[way[w] + 1] - begin, k_shot + q_query, [&](int64_t i, int64_t x) {
          int64_t* out = i < k_shot ? support_out + row * k_shot + i
                                    : query_out + row * q_query + (i - k_shot);
          *out = begin + x;
        });
      }
    }
  }
  return py::make_tuple(classes, support, query);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Compiled helpers for work on Python objects (see fastmeta/_sampler.py).";
  m.def("sample_episodes", &sample_episodes, py::arg("class_starts"), py::arg("num_episodes"),
        py::arg("n_way"), py::arg("k_shot"), py::arg("q_query"), py::arg("seed"),
        py::arg("first_episode"));
}
