// What the CPU kernels have in common: vectors of float32, and a few rows of them times a matrix that lies as the model keeps it.
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

// e^x of x <= 0, relative error below 1e-6: 2^n times a polynomial of the rest (Cephes, expf).
inline Vec exp_of(Vec x) {
  typedef int32_t Int __attribute__((vector_size(64)));
  const Vec lowest = x * 0.f - 87.f;
  x = x < lowest ? lowest : x;
  const Vec n_float = x * 1.44269504088896341f;
  const Int n = __builtin_convertvector(n_float - 0.5f, Int);
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = 1.9875691500E-4f * r + 1.3981999507E-3f;
  p = p * r + 8.3334519073E-3f;
  p = p * r + 4.1665795894E-2f;
  p = p * r + 1.6666665459E-1f;
  p = p * r + 5.0000001201E-1f;
  p = p * r * r + r + 1.f;
  return p * (Vec)((n + 127) << 23);
}

inline float sum_of(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

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
