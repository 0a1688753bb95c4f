// 64 bytes of numbers, in as many registers as the instruction set needs. What is computed in a
// lane does not depend on their width, so every CPU gives the same bits.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/cpu.h"

#if defined(__GNUC__) && !defined(__clang__)
// How vectors would be returned is of no concern: everything here is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastmeta {

// kBytes: the width of a register, 64, 32 or 16. (A vector wider than a register lives in memory.)
// kAll: of all numbers, 64 but for products of few columns.
template <typename A, int kBytes, int kAll = 64>
struct Lanes {
  static constexpr int kCount = kAll / sizeof(A);
  static constexpr int kParts = kAll / kBytes, kPart = kBytes / sizeof(A);
  template <typename F>
  using Of = Lanes<F, kBytes, kAll>;
  using Number = A;
  using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A Vector __attribute__((vector_size(kBytes)));
  typedef Integer Bits __attribute__((vector_size(kBytes)));
  static constexpr Integer kSign = Integer(uint64_t(1) << (sizeof(A) * 8 - 1));
  Vector v[kParts];

  FM_HD static Lanes all(A x) {
    Lanes out;
    for (int i = 0; i < kParts; ++i) out.v[i] = Vector{} + x;
    return out;
  }
  // `count` adjacent numbers, zeros after them; all of them if kWhole. Register by register: one
  // copy of 64 bytes would go through memory.
  template <bool kWhole>
  FM_HD static Lanes load(const A* from, int64_t count) {
    A buffer[kCount] = {};
    if constexpr (!kWhole) {
      std::memcpy(buffer, from, size_t(count) * sizeof(A));
      from = buffer;
    }
    Lanes out;
    for (int i = 0; i < kParts; ++i) std::memcpy(&out.v[i], from + i * kPart, kBytes);
    return out;
  }
  template <bool kWhole>
  FM_HD void store(A* to, int64_t count) const {
    A buffer[kCount];
    A* target = kWhole ? to : buffer;
    for (int i = 0; i < kParts; ++i) std::memcpy(target + i * kPart, &v[i], kBytes);
    if constexpr (!kWhole) std::memcpy(to, buffer, size_t(count) * sizeof(A));
  }

  // Halves onto each other, as a tree; from 16 bytes on number by number.
  FM_HD A sum() const {
    static_assert(kAll == 64);
    Quarter q[4];
    store<true>(reinterpret_cast<A*>(q), kCount);
    const Quarter x = (q[0] + q[2]) + (q[1] + q[3]);
    if constexpr (sizeof(A) == 8) {
      return x[0] + x[1];
    } else {
      return (x[0] + x[2]) + (x[1] + x[3]);
    }
  }
  // The largest; NaN if one is.
  FM_HD A largest() const {
    static_assert(kAll == 64);
    Quarter q[4];
    store<true>(reinterpret_cast<A*>(q), kCount);
    Quarter x = q[0];
    for (int i = 1; i < 4; ++i) x = (q[i] > x) | (q[i] != q[i]) ? q[i] : x;
    A out = x[0];
    for (int i = 1; i < int(16 / sizeof(A)); ++i) out = x[i] > out || x[i] != x[i] ? x[i] : out;
    return out;
  }
  // The largest of those that are numbers, if any is above -inf.
  FM_HD A top() const {
    static_assert(kAll == 64);
    Quarter q[4];
    store<true>(reinterpret_cast<A*>(q), kCount);
    for (int i = 0; i < 2; ++i) q[i] = q[i] > q[i + 2] ? q[i] : q[i + 2];
    const Quarter x = q[0] > q[1] ? q[0] : q[1];
    A out = x[0];
    for (int i = 1; i < int(16 / sizeof(A)); ++i) out = x[i] > out ? x[i] : out;
    return out;
  }

 private:
  typedef A Quarter __attribute__((vector_size(16)));
};

// a * b + c and c - a * b rounded once. The compiler fuses nothing by itself (setup.py), so that
// all CPUs give the same bits; these have one result everywhere, and cost one instruction but on
// CPUs without it, of which none has AVX2. (An intrinsic cannot be inlined through a function that
// is not compiled for its instruction set, as all of FM_HD are.)
#if defined(__x86_64__) && defined(__GNUC__)
#define FM_FUSED(instruction)                                    \
  if constexpr (sizeof(V) >= 32 && sizeof(a[0]) == 4) {          \
    asm(instruction "ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); \
    return c;                                                    \
  } else if constexpr (sizeof(V) >= 32) {                        \
    asm(instruction "pd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); \
    return c;                                                    \
  }
#else
#define FM_FUSED(instruction)
#endif
template <typename V>
FM_HD V fused_part(const V& a, const V& b, V c) {
  FM_FUSED("vfmadd231")
  for (size_t k = 0; k < sizeof(V) / sizeof(a[0]); ++k) c[k] = std::fma(a[k], b[k], c[k]);
  return c;
}
template <typename V>
FM_HD V fused_less_part(const V& a, const V& b, V c) {
  FM_FUSED("vfnmadd231")
  for (size_t k = 0; k < sizeof(V) / sizeof(a[0]); ++k) c[k] = std::fma(-a[k], b[k], c[k]);
  return c;
}
#undef FM_FUSED

// name(arguments): `expression` of register i.
#define FM_LANES(name, arguments, expression)                    \
  template <typename A, int B>                                   \
  FM_HD Lanes<A, B> name arguments {                             \
    using L = Lanes<A, B>;                                       \
    using Vector [[maybe_unused]] = typename L::Vector;          \
    using Bits [[maybe_unused]] = typename L::Bits;              \
    L out;                                                       \
    for (int i = 0; i < L::kParts; ++i) out.v[i] = (expression); \
    return out;                                                  \
  }
FM_LANES(operator+, (const Lanes<A, B>& a, const Lanes<A, B>& b), a.v[i] + b.v[i])
FM_LANES(operator-, (const Lanes<A, B>& a, const Lanes<A, B>& b), a.v[i] - b.v[i])
FM_LANES(operator*, (const Lanes<A, B>& a, const Lanes<A, B>& b), a.v[i] * b.v[i])
FM_LANES(operator-, (const Lanes<A, B>& a), -a.v[i])
FM_LANES(operator*, (A a, const Lanes<A, B>& b), a* b.v[i])
FM_LANES(fused, (const Lanes<A, B>& a, const Lanes<A, B>& b, const Lanes<A, B>& c),
         fused_part(a.v[i], b.v[i], c.v[i]))
FM_LANES(fused_less, (const Lanes<A, B>& a, const Lanes<A, B>& b, const Lanes<A, B>& c),
         fused_less_part(a.v[i], b.v[i], c.v[i]))
FM_LANES(absolute, (const Lanes<A, B>& a), Vector(Bits(a.v[i]) & ~L::kSign))
// a times the sign of z, which is 0 at 0.
FM_LANES(times_sign, (const Lanes<A, B>& a, const Lanes<A, B>& z),
         Vector((Bits(a.v[i]) ^ (Bits(z.v[i]) & L::kSign)) & Bits(z.v[i] != Vector{})))
// The larger of each; NaN if either is.
FM_LANES(larger, (const Lanes<A, B>& a, const Lanes<A, B>& b),
         Vector((Bits(a.v[i]) & ~(Bits(b.v[i] > a.v[i]) | Bits(b.v[i] != b.v[i]))) |
                (Bits(b.v[i]) & (Bits(b.v[i] > a.v[i]) | Bits(b.v[i] != b.v[i])))))
// b where it is larger, else a; no NaN of b.
FM_LANES(above, (const Lanes<A, B>& a, const Lanes<A, B>& b), b.v[i] > a.v[i] ? b.v[i] : a.v[i])
// x where a == b, else 0.
FM_LANES(where_equal, (const Lanes<A, B>& a, const Lanes<A, B>& b, const Lanes<A, B>& x),
         Vector(Bits(a.v[i] == b.v[i]) & Bits(x.v[i])))
#undef FM_LANES

// Runs f(whole, j, count) over a row of numbers: a whole vector, or its first `count` numbers.
template <typename L, typename F>
FM_HD void each_vector(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + L::kCount <= width; j += L::kCount) f(std::true_type{}, j, int64_t(L::kCount));
  if (j < width) f(std::false_type{}, j, width - j);
}

// Runs f(std::integral_constant<int, register width>) in code compiled for the widest registers
// this CPU has. Everything f calls must be FM_HD, to be compiled with it.
#if defined(__x86_64__) && defined(__GNUC__)
template <typename F>
__attribute__((noinline, target("avx512f"))) void in_64_bytes(const F& f) {
  f(std::integral_constant<int, 64>{});
}
template <typename F>
__attribute__((noinline, target("avx2,fma"))) void in_32_bytes(const F& f) {
  f(std::integral_constant<int, 32>{});
}
#endif
template <typename F>
__attribute__((noinline)) void in_16_bytes(const F& f) {
  f(std::integral_constant<int, 16>{});
}
template <typename F>
void with_registers(const F& f) {
#if defined(__x86_64__) && defined(__GNUC__)
  static const int width = __builtin_cpu_supports("avx512f")                                 ? 64
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 32
                                                                                             : 16;
  if (width == 64) return in_64_bytes(f);
  if (width == 32) return in_32_bytes(f);
#endif
  in_16_bytes(f);
}
// The same where the width is known: a function of its own, whose loops get all registers.
template <int kBytes, typename F>
FM_HD void apart(const F& f) {
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (kBytes == 64) return in_64_bytes(f);
  if constexpr (kBytes == 32) return in_32_bytes(f);
#endif
  if constexpr (kBytes == 16) in_16_bytes(f);
}
#define FM_INLINE_LAMBDA __attribute__((always_inline))

}  // namespace fastmeta
