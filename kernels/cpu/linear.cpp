// The operations of linear.h.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "linear.h"

namespace vllm_mtp {
namespace {

#ifdef VLLM_MTP_LINEAR

void check(const at::Tensor& x, const at::Tensor& panels, const std::optional<at::Tensor>& bias, int64_t out) {
  TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1 && x.size(1) % 2 == 0, "x must be rows of an even number of bfloat16");
  TORCH_CHECK(panels.dim() == 4 && panels.is_contiguous() && panels.size(2) == kColumns && panels.size(3) == 2, "W is not in panels");
  TORCH_CHECK(panels.size(1) * 2 == x.size(1) && panels.size(0) == (out + kColumns - 1) / kColumns, "W does not fit x");
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == out), "b does not fit W");
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& panels, const std::optional<at::Tensor>& bias, int64_t out) {
  check(x, panels, bias, out);
  at::Tensor y = at::empty({x.size(0), out}, x.options());
  const Layer layer{bits(panels), bias ? bits(*bias) : nullptr, nullptr, nullptr, x.size(1), out};
  product(layer, bits(x), x.stride(0), x.size(0), nullptr, 0, reinterpret_cast<Half*>(y.data_ptr<c10::BFloat16>()), out);
  return y;
}

at::Tensor gated_linear_cpu(
    const at::Tensor& x, const at::Tensor& panels, const std::optional<at::Tensor>& bias, int64_t out, const at::Tensor& a,
    const at::Tensor& b, const at::Tensor& parts, const at::Tensor& num_real) {
  const int64_t n = num_real.const_data_ptr<int64_t>()[0], rows = x.size(0);
  if (n >= rows) return linear_cpu(x, panels, bias, out);
  check(x, panels, bias, out);
  TORCH_CHECK(a.dim() == 4 && a.is_contiguous() && a.size(1) * 2 == x.size(1) && a.size(2) == kColumns, "A is not in panels, or does not fit x");
  TORCH_CHECK(parts.is_contiguous() && parts.size(0) == panels.size(0) && b.is_contiguous(), "B does not fit W");
  const int64_t ranks = a.size(0) * kColumns;
  at::Tensor h = at::empty({rows, ranks}, x.options()), y = at::empty({rows, out}, x.options());
  Half* low = reinterpret_cast<Half*>(h.data_ptr<c10::BFloat16>());
  std::fill(low, low + n * ranks, 0);
  const Layer down{bits(a), nullptr, nullptr, nullptr, x.size(1), ranks};
  product(down, bits(x) + n * x.stride(0), x.stride(0), rows - n, nullptr, 0, low + n * ranks, ranks);
  const Layer layer{bits(panels), bias ? bits(*bias) : nullptr, bits(b), parts.const_data_ptr<int64_t>(), x.size(1), out};
  product(layer, bits(x), x.stride(0), rows, low, ranks, reinterpret_cast<Half*>(y.data_ptr<c10::BFloat16>()), out);
  return y;
}

bool has_linear() { return true; }

#else

at::Tensor linear_cpu(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t) {
  TORCH_CHECK(false, "this processor has neither AVX-512 nor AVX2");
}

at::Tensor gated_linear_cpu(
    const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&) {
  TORCH_CHECK(false, "this processor has neither AVX-512 nor AVX2");
}

bool has_linear() { return false; }

#endif

}  // namespace

// linear_cpu: y [M, out] = x [M, in] W^T + b, W in panels of 32 outputs: [panels, in / 2, 32, 2], filled up with zeros.
// gated_linear_cpu: the same, + (x A) B on rows from num_real on. A [in, ranks] in panels as W^T; B panel by panel of W, of those
// columns of x A that it needs: parts [panels, 3] = (first column, columns, where in b).
TORCH_LIBRARY_FRAGMENT(vllm_mtp, m) {
  m.def("linear_cpu(Tensor x, Tensor panels, Tensor? bias, int out) -> Tensor");
  m.def("gated_linear_cpu(Tensor x, Tensor panels, Tensor? bias, int out, Tensor a, Tensor b, Tensor parts, Tensor num_real) -> Tensor");
  m.def("has_linear_cpu() -> bool", has_linear);
}
TORCH_LIBRARY_IMPL(vllm_mtp, CPU, m) {
  m.impl("linear_cpu", linear_cpu);
  m.impl("gated_linear_cpu", gated_linear_cpu);
}

}  // namespace vllm_mtp
