// What the CPU kernels have in common: vectors of float32, and a few rows of them times a matrix that lies as the model keeps it.
#pragma once

#include <c10/util/BFloat16.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace vllm_mtp {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;   // of a vector
constexpr int kTileRows = 8;     // of two vectors of sums each: as many as stay in registers, which AVX-512 has 32 of, others 16
#else
constexpr int64_t kLanes = 8;
constexpr int kTileRows = 6;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const c10::BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Full __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return (Vec)(__builtin_convertvector(half, Full) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// e^x of x <= 0, relative error below 1e-6: 2^n times a polynomial of the rest (Cephes, expf).
inline Vec exp_of(Vec x) {
  typedef int32_t Int __attribute__((vector_size(kLanes * sizeof(int32_t))));
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

// sum + x w, rounded once. Left to the compiler it is rounded once or twice, by what it thinks of chains of such sums, and a row's sum
// would depend on how many rows there are (GCC: avoid-fma-max-bits, for AMD's processors).
inline Vec add_product(Vec sum, float x, Vec w) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)w, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)w, (__m256)sum);
#else
  return sum + x * w;
#endif
}

inline float sum_of(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// y [M, kLanes V] += x [M, K] w [K, kLanes V]; M rows and V vectors of sums stay in registers.
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
      for (int v = 0; v < V; ++v) sum[m][v] = add_product(sum[m][v], x[m * x_stride + k], row[v]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(y + m * y_stride + v * kLanes, sum[m][v]);
}

// Up to `Most` rows.
template <int Most, typename T>
inline void rows_of(
    int64_t M, const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t K, int64_t N, float* y, int64_t y_stride) {
  if constexpr (Most > 1)
    if (M < Most) return rows_of<Most - 1>(M, x, x_stride, w, w_stride, K, N, y, y_stride);
  int64_t n = 0;
  for (; n + 2 * kLanes <= N; n += 2 * kLanes) tile<Most, 2>(x, x_stride, w + n, w_stride, K, y + n, y_stride);
  if (n < N) tile<Most, 1>(x, x_stride, w + n, w_stride, K, y + n, y_stride);
}

// y [M, N] += x [M, K] w [K, N]; N a multiple of kLanes, strides in elements.
template <typename T>
void rows_times(
    const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t M, int64_t K, int64_t N, float* y, int64_t y_stride) {
  for (int64_t m = 0; m < M; m += kTileRows)
    rows_of<kTileRows>(std::min<int64_t>(kTileRows, M - m), x + m * x_stride, x_stride, w, w_stride, K, N, y + m * y_stride, y_stride);
}

}  // namespace vllm_mtp
