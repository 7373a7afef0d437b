#pragma once

namespace zp {

// f(0), f(1) ... f(N - 1) with constant arguments, so that arrays indexed by them stay in registers. (g++ keeps an
// array in memory as soon as one loop over it is not unrolled.)
#define INLINE __attribute__((always_inline))
template <int I>
struct Index {
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class Function>
static inline INLINE void unroll(const Function& f) {
  if constexpr (I < N) {
    f(Index<I>());
    unroll<N, I + 1>(f);
  }
}

}  // namespace zp
