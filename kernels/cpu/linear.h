// Linear layers of a few rows in bfloat16 on a CPU, with the low-rank update of mask rows in the same pass over the weights.
//
// At decode sizes such a product is bound by streaming W, so it is read once for all rows, and ahead of its use. Every element of y is
// one sum in the order of k, whatever the number of rows: a row does not feel its neighbours.
//
// For processors with AVX-512 BF16, which multiply pairs of bfloat16, and for those with AVX-512 or AVX2 alone, which multiply in float32:
// with AVX2 alone oneDNN has no product of bfloat16, and torch's own takes three times as long for one row, five times for sixteen.
#pragma once

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define VLLM_MTP_LINEAR

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "rows.h"

namespace vllm_mtp {
namespace {

typedef uint16_t Half;  // the bits of a bfloat16

constexpr int64_t kColumns = 32;    // of a panel
constexpr int64_t kAhead = 2048;    // bytes that weights are fetched ahead; from 1 to 3 KB does as well on a Zen 5
constexpr int64_t kProductsOfAThread = 1 << 18;  // work that is worth another thread

// Most rows of a tile, and its vectors of sums a row: as many as stay in registers.
struct Tile {
  int rows, vectors;
};

#ifdef __AVX512BF16__

constexpr int kWide = 16;                     // sums of a vector
constexpr Tile kTiles[] = {{6, 4}, {12, 2}};  // the first that has enough rows, else the last, piece by piece
constexpr int64_t kRowsOfABlock = 96;         // rows of x that stay in the second-level cache while W passes by
typedef __m512 Sums;
typedef Half Input;  // what rows of x are read as

inline Sums no_sums() { return _mm512_setzero_ps(); }

// sums += x w for one pair of inputs; w [V] point to the weights of that pair.
template <int M, int V>
[[gnu::always_inline]] inline void add(Sums (&sums)[M][V], const Half* const (&w)[V], const Input* x, int64_t x_stride) {
  __m512bh weights[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w[v]);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    int32_t both;
    std::memcpy(&both, x + m * x_stride, sizeof both);
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], weights[v], pair);
  }
}

// y = sums + bias, the first `columns` of them.
inline void put(Sums sums, const Half* bias, int64_t columns, Half* y) {
  const __mmask16 mask = (1u << std::min<int64_t>(kWide, columns)) - 1;
  __m512 b = _mm512_setzero_ps();
  if (bias) b = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias)), 16);
  _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums, b)));
}

// Rows [M, n] in the form that products read: they are.
inline const Input* readable(const Half* x, int64_t x_stride, int64_t M, int64_t n, std::vector<Input>& store, int64_t& stride) {
  stride = x_stride;
  return x;
}

#else

constexpr int kWide = kLanes;
#ifdef __AVX512F__
constexpr Tile kTiles[] = {{5, 4}, {12, 2}};
constexpr int kMostSums = 24;  // with the weights of two vectors beside them, and what they are multiplied by
#else
constexpr Tile kTiles[] = {{1, 8}, {3, 4}, {5, 2}};
constexpr int kMostSums = 10;
#endif
constexpr int64_t kRowsOfABlock = 48;
typedef Vec Sums;
typedef float Input;
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Sums no_sums() { return Sums{}; }

template <int M, int V>
[[gnu::always_inline]] inline void add(Sums (&sums)[M][V], const Half* const (&w)[V], const Input* x, int64_t x_stride) {
  // The weights of one vector or two at a time: sums, these and one x are what the registers hold.
  constexpr int kTogether = M * V > kMostSums ? 1 : 2;
#pragma GCC unroll 8
  for (int first = 0; first < V; first += kTogether) {
    Vec even[kTogether], odd[kTogether];
#pragma GCC unroll 2
    for (int v = 0; v < kTogether; ++v) {
      Bits both;
      std::memcpy(&both, w[first + v], sizeof both);
      even[v] = (Vec)(both << 16);
      odd[v] = (Vec)(both & 0xffff0000);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const float x_even = x[m * x_stride], x_odd = x[m * x_stride + 1];
#pragma GCC unroll 2
      for (int v = 0; v < kTogether; ++v) sums[m][first + v] = add_product(sums[m][first + v], x_even, even[v]);
#pragma GCC unroll 2
      for (int v = 0; v < kTogether; ++v) sums[m][first + v] = add_product(sums[m][first + v], x_odd, odd[v]);
    }
  }
}

// To the nearest bfloat16, the even one of two; what is not a number stays none.
inline Bits rounded(Vec x) {
  const Bits bits = (Bits)x, high = bits >> 16;
  return x == x ? (bits + (high & 1) + 0x7fff) >> 16 : high | 0x40;
}

inline void put(Sums sums, const Half* bias, int64_t columns, Half* y) {
  const size_t size = std::min<int64_t>(kWide, columns) * sizeof(Half);
  if (bias) {
    c10::BFloat16 some[kWide] = {};
    std::memcpy(some, bias, size);
    sums += load(some);
  }
  typedef Half Halves __attribute__((vector_size(kLanes * sizeof(Half))));
  const Halves halves = __builtin_convertvector(rounded(sums), Halves);
  std::memcpy(y, &halves, size);
}

// Rows [M, n] in the form that products read: in float32, in `room`.
inline const Input* readable(const Half* x, int64_t x_stride, int64_t M, int64_t n, std::vector<Input>& room, int64_t& stride) {
  if (static_cast<int64_t>(room.size()) < M * n) room.resize(M * n);
  for (int64_t m = 0; m < M; ++m) {
    const Half* from = x + m * x_stride;
    float* to = room.data() + m * n;
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide) store(to + i, load(reinterpret_cast<const c10::BFloat16*>(from + i)));
    for (; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  }
  stride = n;
  return room.data();
}

#endif

constexpr int kVectors = kColumns / kWide;  // of a panel

// Rows of x [M, K] with K / 2 pairs, and panels [pairs, 32, 2] of a matrix to multiply them with.
struct Factor {
  const Input* x;
  const Half* panels;
  int64_t x_stride, pairs;
};

// sums [M][V] += x w, of V vectors of columns that begin where `panels` points to.
template <int M, int V>
[[gnu::always_inline]] inline void multiply(Sums (&sums)[M][V], const Factor& f) {
  const int64_t panel = f.pairs * 2 * kColumns;
  for (int64_t pair = 0; pair < f.pairs; ++pair) {
    const Half* w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      w[v] = f.panels + v / kVectors * panel + (pair * kColumns + v % kVectors * kWide) * 2;
      if (v * kWide % 16 == 0) _mm_prefetch(reinterpret_cast<const char*>(w[v]) + kAhead, _MM_HINT_T0);
    }
    add<M, V>(sums, w, f.x + 2 * pair, f.x_stride);
  }
}

// A linear layer as panels, and its low-rank update: h = x A, then h B, where h has zeros in real rows. The B of panel p takes `count`
// columns of h from `first` on and lies at `offset`: parts[p] = (first, count, offset).
struct Layer {
  const Half *panels, *bias, *b;
  const int64_t* parts;
  int64_t in, out;
};

// Some rows: what they read and where they write.
struct Rows {
  const Input *x, *h;
  Half* y;
  int64_t x_stride, h_stride, y_stride;
};

// y of rows [M] and columns [V vectors] from `first` on; V vectors lie in one panel or are whole panels.
template <int M, int V>
void tile(const Layer& layer, int64_t first, const Rows& rows) {
  constexpr int kOfPanel = std::min(V, kVectors);
  const int64_t p = first / kColumns, within = first % kColumns * 2;
  Sums sums[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[m][v] = no_sums();
  multiply<M, V>(sums, {rows.x, layer.panels + p * layer.in * kColumns + within, rows.x_stride, layer.in / 2});
  if (rows.h) {
#pragma GCC unroll 2
    for (int q = 0; q < V / kOfPanel; ++q) {
      const int64_t* part = layer.parts + 3 * (p + q);
      if (!part[1]) continue;
      Sums own[M][kOfPanel];
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kOfPanel; ++v) own[m][v] = sums[m][q * kOfPanel + v];
      multiply<M, kOfPanel>(own, {rows.h + part[0], layer.b + part[2] + within, rows.h_stride, part[1] / 2});
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kOfPanel; ++v) sums[m][q * kOfPanel + v] = own[m][v];
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const int64_t column = first + v * kWide;
    if (column >= layer.out) return;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) put(sums[m][v], layer.bias ? layer.bias + column : nullptr, layer.out - column, rows.y + m * rows.y_stride + column);
  }
}

// Up to `Most` rows.
template <int V, int Most>
void tile_of(int64_t M, const Layer& layer, int64_t first, const Rows& rows) {
  if (M == Most)
    tile<Most, V>(layer, first, rows);
  else if constexpr (Most > 1)
    tile_of<V, Most - 1>(M, layer, first, rows);
}

// y of M rows in tiles: the first kind, from T on, that has enough rows.
template <size_t T = 0>
void in_tiles(const Layer& layer, const Rows& rows, int64_t M) {
  constexpr Tile kind = kTiles[T];
  if constexpr (T + 1 < std::size(kTiles))
    if (M > kind.rows) return in_tiles<T + 1>(layer, rows, M);
  constexpr int64_t kWidth = kind.vectors * kWide;
  const int64_t padded = (layer.out + kColumns - 1) / kColumns * kColumns, tasks = (padded + kWidth - 1) / kWidth;
  const int64_t pieces = (M + kind.rows - 1) / kind.rows, grain = std::max<int64_t>(1, kProductsOfAThread / (layer.in * kWidth * M));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kWidth;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t m = piece * M / pieces, count = (piece + 1) * M / pieces - m;
        const Rows some{rows.x + m * rows.x_stride, rows.h ? rows.h + m * rows.h_stride : nullptr, rows.y + m * rows.y_stride,
                        rows.x_stride, rows.h_stride, rows.y_stride};
        if (kind.vectors <= kVectors || first + kWidth <= padded)
          tile_of<kind.vectors, kind.rows>(count, layer, first, some);
        else
          tile_of<kVectors, kind.rows>(count, layer, first, some);
      }
    }
  });
}

// y [M, out] of x [M, in], with the update of h where there is one, which has as many columns as its rows are apart.
void product(const Layer& layer, const Half* x, int64_t x_stride, int64_t M, const Half* h, int64_t h_stride, Half* y, int64_t y_stride) {
  static thread_local std::vector<Input> of_x, of_h;
  for (int64_t block = 0; block < M; block += kRowsOfABlock) {
    const int64_t here = std::min(kRowsOfABlock, M - block);
    Rows rows{nullptr, nullptr, y + block * y_stride, 0, 0, y_stride};
    rows.x = readable(x + block * x_stride, x_stride, here, layer.in, of_x, rows.x_stride);
    if (h) rows.h = readable(h + block * h_stride, h_stride, here, h_stride, of_h, rows.h_stride);
    in_tiles(layer, rows, here);
  }
}

inline const Half* bits(const at::Tensor& tensor) { return reinterpret_cast<const Half*>(tensor.const_data_ptr<c10::BFloat16>()); }

}  // namespace
}  // namespace vllm_mtp

#endif
