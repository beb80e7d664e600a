// The low-rank update of a gated LoRA on a CPU: shrink and expand of the mask rows in one call, added in place.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "rows.h"

namespace vllm_mtp {
namespace {

constexpr int64_t kRows = kTileRows;  // mask rows that a piece of work has
constexpr int64_t kBlock = 32;        // columns of a block of A or B

template <typename T>
struct Factors {
  const T *a, *b;
  const int64_t* spans;
  int64_t in, a_blocks, slices, rank;
};

template <typename T>
void update_rows(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t rows, const Factors<T>& f, std::vector<float>& memory) {
  const int64_t ranks = f.a_blocks * kBlock;
  memory.assign(rows * (f.in + ranks), 0.f);
  float* xs = memory.data();
  float* h = xs + rows * f.in;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t i = 0; i < f.in; ++i) xs[m * f.in + i] = x[m * x_stride + i];
  for (int64_t block = 0; block < f.a_blocks; ++block)
    rows_times(xs, f.in, f.a + block * f.in * kBlock, kBlock, rows, f.in, kBlock, h + block * kBlock, ranks);
  const T* b = f.b;
  for (int64_t s = 0; s < f.slices; ++s)
    for (int64_t first = f.spans[2 * s]; first < f.spans[2 * s + 1]; first += kBlock, b += f.rank * kBlock) {
      float sums[kRows * kBlock] = {};
      rows_times(h + s * f.rank, ranks, b, kBlock, rows, f.rank, kBlock, sums, kBlock);
      const int64_t outputs = std::min(kBlock, f.spans[2 * s + 1] - first);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t o = 0; o < outputs; ++o) {
          T& to = y[m * y_stride + first + o];
          to = static_cast<T>(static_cast<float>(to) + sums[m * kBlock + o]);
        }
    }
}

template <typename T>
void update(at::Tensor& y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& spans, int64_t n) {
  const int64_t masks = y.size(0) - n, pieces = (masks + kRows - 1) / kRows;
  T* to = y.data_ptr<T>() + n * y.stride(0);
  const T* from = x.const_data_ptr<T>() + n * x.stride(0);
  const Factors<T> factors{
      a.const_data_ptr<T>(), b.const_data_ptr<T>(), spans.const_data_ptr<int64_t>(), a.size(1), a.size(0), spans.size(0), b.size(1)};
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t m = piece * kRows;
      update_rows(to + m * y.stride(0), y.stride(0), from + m * x.stride(0), x.stride(0), std::min(kRows, masks - m), factors, memory);
    }
  });
}

// y [M, out] += (x [M, in] A) B on rows from num_real on. A [in, S rank] and, slice by slice, B [rank, outputs of the slice] come in
// blocks of 32 columns filled up with zeros: a [blocks, in, 32], b [blocks, rank, 32]. The outputs of slice s are those from
// spans[s, 0] to spans[s, 1]; they take the s-th `rank` columns of x A.
void gated_lora_cpu_(
    at::Tensor& y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& spans, const at::Tensor& num_real) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.stride(1) == 1 && y.stride(1) == 1, "x and y must be rows");
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(2) == kBlock && b.size(2) == kBlock, "A or B is not packed");
  TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && spans.is_contiguous(), "A or B is not packed");
  TORCH_CHECK(x.size(1) == a.size(1) && a.size(0) * kBlock >= spans.size(0) * b.size(1), "A or B does not fit x");
  TORCH_CHECK(x.scalar_type() == y.scalar_type() && a.scalar_type() == x.scalar_type() && b.scalar_type() == x.scalar_type(), "dtypes differ");
  const int64_t n = num_real.const_data_ptr<int64_t>()[0];
  if (n >= y.size(0)) return;
  if (x.scalar_type() == at::kFloat)
    update<float>(y, x, a, b, spans, n);
  else if (x.scalar_type() == at::kBFloat16)
    update<c10::BFloat16>(y, x, a, b, spans, n);
  else
    TORCH_CHECK(false, "float32 and bfloat16 only");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_mtp, m) {
  m.def("gated_lora_cpu_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor spans, Tensor num_real) -> ()");
}
TORCH_LIBRARY_IMPL(vllm_mtp, CPU, m) { m.impl("gated_lora_cpu_", gated_lora_cpu_); }

}  // namespace vllm_mtp
