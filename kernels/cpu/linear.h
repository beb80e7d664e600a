// Linear layers of a few rows in bfloat16 on a CPU, with the low-rank update of mask rows in the same pass over the weights. For
// processors with AVX-512 BF16.
//
// At decode sizes such a product is bound by streaming W, so it is read once for all rows, and ahead of its use. Every element of y is
// one sum in the order of k, whatever the number of rows: a row does not feel its neighbours.
#pragma once

#ifdef __AVX512BF16__

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace vllm_mtp {
namespace {

typedef uint16_t Half;  // the bits of a bfloat16

constexpr int64_t kColumns = 32;    // of a panel: two vectors of sums
constexpr int64_t kAhead = 2048;    // bytes that weights are fetched ahead; from 1 to 3 KB does as well on a Zen 5
constexpr int64_t kRowsOfABlock = 96;  // rows of x that stay in the second-level cache while W passes by
constexpr int64_t kProductsOfAThread = 1 << 18;  // work that is worth another thread

// Rows of x [M, K] with K / 2 pairs, and P panels [pairs, 32, 2] of a matrix [K, 32 P] to multiply them with.
struct Factor {
  const Half *x, *panels;
  int64_t x_stride, pairs;
};

// sums [M][2 P] += x panels.
template <int M, int P>
inline void multiply(__m512 (&sums)[M][2 * P], const Factor& f) {
  const int64_t panel = f.pairs * 2 * kColumns;
  for (int64_t pair = 0; pair < f.pairs; ++pair) {
    __m512bh w[2 * P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const Half* at = f.panels + p * panel + pair * 2 * kColumns;
      _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead + 64, _MM_HINT_T0);
      w[2 * p] = (__m512bh)_mm512_loadu_si512(at);
      w[2 * p + 1] = (__m512bh)_mm512_loadu_si512(at + kColumns);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      int32_t both;
      std::memcpy(&both, f.x + m * f.x_stride + 2 * pair, sizeof both);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int v = 0; v < 2 * P; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], w[v], x);
    }
  }
}

// A linear layer as panels, and its low-rank update: h = x A, then h B, where h has zeros in real rows. The B of panel p takes `count`
// columns of h from `first` on and lies at `offset`: parts[p] = (first, count, offset).
struct Layer {
  const Half *panels, *bias, *b;
  const int64_t* parts;
  int64_t in, out;
};

// y of rows [M] and panels [P] from p on.
template <int M, int P>
void tile(const Layer& layer, int64_t p, const Half* x, int64_t x_stride, const Half* h, int64_t h_stride, Half* y, int64_t y_stride) {
  __m512 sums[M][2 * P];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 2 * P; ++v) sums[m][v] = _mm512_setzero_ps();
  multiply<M, P>(sums, {x, layer.panels + p * layer.in * kColumns, x_stride, layer.in / 2});
  if (h) {
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q) {
      const int64_t* part = layer.parts + 3 * (p + q);
      if (!part[1]) continue;
      __m512 own[M][2];
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) own[m][0] = sums[m][2 * q], own[m][1] = sums[m][2 * q + 1];
      multiply<M, 1>(own, {h + part[0], layer.b + part[2], h_stride, part[1] / 2});
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) sums[m][2 * q] = own[m][0], sums[m][2 * q + 1] = own[m][1];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < 2 * P; ++v) {
    const int64_t first = p * kColumns + v * 16, columns = std::min<int64_t>(16, layer.out - first);
    if (columns <= 0) return;
    const __mmask16 mask = (1u << columns) - 1;
    __m512 bias = _mm512_setzero_ps();
    if (layer.bias)
      bias = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, layer.bias + first)), 16);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
      _mm256_mask_storeu_epi16(y + m * y_stride + first, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[m][v], bias)));
  }
}

// Up to 12 rows of panels [P].
template <int P, int Most>
void rows(int64_t M, const Layer& layer, int64_t p, const Half* x, int64_t x_stride, const Half* h, int64_t h_stride, Half* y, int64_t y_stride) {
  if (M == Most)
    tile<Most, P>(layer, p, x, x_stride, h, h_stride, y, y_stride);
  else if constexpr (Most > 1)
    rows<P, Most - 1>(M, layer, p, x, x_stride, h, h_stride, y, y_stride);
}

// y [M, out] of x [M, in], with the update of h where there is one. Sums stay in registers: of 6 rows and two panels, or of 12 and one.
void product(const Layer& layer, const Half* x, int64_t x_stride, int64_t M, const Half* h, int64_t h_stride, Half* y, int64_t y_stride) {
  const int64_t panels = (layer.out + kColumns - 1) / kColumns;
  for (int64_t block = 0; block < M; block += kRowsOfABlock) {
    const int64_t rows_here = std::min(kRowsOfABlock, M - block), pieces = (rows_here + 11) / 12;
    const int64_t width = rows_here <= 6 ? 2 : 1, tasks = (panels + width - 1) / width;
    const int64_t grain = std::max<int64_t>(1, kProductsOfAThread / (layer.in * kColumns * width * rows_here));
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task * width;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t first = block + piece * rows_here / pieces, M_ = block + (piece + 1) * rows_here / pieces - first;
          const Half *from = x + first * x_stride, *low = h ? h + first * h_stride : nullptr;
          Half* to = y + first * y_stride;
          if (width == 2 && p + 1 < panels)
            rows<2, 6>(M_, layer, p, from, x_stride, low, h_stride, to, y_stride);
          else
            rows<1, 12>(M_, layer, p, from, x_stride, low, h_stride, to, y_stride);
        }
      }
    });
  }
}

inline const Half* bits(const at::Tensor& tensor) { return reinterpret_cast<const Half*>(tensor.const_data_ptr<c10::BFloat16>()); }

}  // namespace
}  // namespace vllm_mtp

#endif
