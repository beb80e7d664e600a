// The product that the CPU kernels are made of: a few rows of float32 times a matrix whose rows lie in memory as the model keeps them.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

namespace vllm_mtp {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const c10::BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Full __attribute__((vector_size(64)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return (Vec)(__builtin_convertvector(half, Full) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// y [M, 16 V] += x [M, K] w [K, 16 V]; M rows and V vectors of sums stay in registers.
template <int M, int V, typename T>
inline void tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t K, float* y, int64_t y_stride) {
  Vec sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = load(y + m * y_stride + v * kLanes);
  for (int64_t k = 0; k < K; ++k) {
    Vec row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(w + k * w_stride + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] += x[m * x_stride + k] * row[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(y + m * y_stride + v * kLanes, sum[m][v]);
}

template <int M, typename T>
inline void rows_of(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t K, int64_t N, float* y, int64_t y_stride) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= N; n += 2 * kLanes) tile<M, 2>(x, x_stride, w + n, w_stride, K, y + n, y_stride);
  if (n < N) tile<M, 1>(x, x_stride, w + n, w_stride, K, y + n, y_stride);
}

// y [M, N] += x [M, K] w [K, N]; N a multiple of 16, strides in elements.
template <typename T>
void rows_times(
    const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t M, int64_t K, int64_t N, float* y, int64_t y_stride) {
  int64_t m = 0;
  for (; m + 8 <= M; m += 8) rows_of<8>(x + m * x_stride, x_stride, w, w_stride, K, N, y + m * y_stride, y_stride);
  x += m * x_stride, y += m * y_stride;
  switch (M - m) {
    case 7: return rows_of<7>(x, x_stride, w, w_stride, K, N, y, y_stride);
    case 6: return rows_of<6>(x, x_stride, w, w_stride, K, N, y, y_stride);
    case 5: return rows_of<5>(x, x_stride, w, w_stride, K, N, y, y_stride);
    case 4: return rows_of<4>(x, x_stride, w, w_stride, K, N, y, y_stride);
    case 3: return rows_of<3>(x, x_stride, w, w_stride, K, N, y, y_stride);
    case 2: return rows_of<2>(x, x_stride, w, w_stride, K, N, y, y_stride);
    case 1: return rows_of<1>(x, x_stride, w, w_stride, K, N, y, y_stride);
  }
}

}  // namespace vllm_mtp
