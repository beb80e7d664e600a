// The drafter (vllm_mtp/drafter.py) in one call, in bfloat16: candidates of the plain head for all states, and the sampler head's choice
// among them, one draft after the other.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "linear.h"
#include "rows.h"

namespace vllm_mtp {
namespace {

#ifdef VLLM_MTP_LINEAR

using Bf16 = c10::BFloat16;

Half* bits(std::vector<Bf16>& values) { return reinterpret_cast<Half*>(values.data()); }

// y [M, out] of x [M, in], W in panels.
void linear(const Half* x, int64_t M, const at::Tensor& panels, const at::Tensor* bias, int64_t out, Half* y) {
  const int64_t in = 2 * panels.size(1);
  product({bits(panels), bias ? bits(*bias) : nullptr, nullptr, nullptr, in, out}, x, in, M, nullptr, 0, y, out);
}

// Which of the values are larger, a bit each.
inline uint32_t larger_than(float least, Vec v) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(least), _CMP_GT_OQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(least), _CMP_GT_OQ));
#endif
}

// The `most` largest of scores [n], their places in ascending order.
void largest(const Bf16* scores, int64_t n, int64_t most, std::vector<int64_t>& places) {
  std::vector<std::pair<float, int64_t>> found;
  found.reserve(4 * most);
  float least = -INFINITY;
  const auto keep = [&] {
    std::nth_element(found.begin(), found.begin() + most - 1, found.end(), [](auto& a, auto& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); });
    found.resize(most);
    least = found[most - 1].first;
  };
  const auto take = [&](int64_t i, float score) {
    if (!(score > least)) return;
    found.emplace_back(score, i);
    if (static_cast<int64_t>(found.size()) == 4 * most) keep();
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(scores + i);
    const uint32_t larger = larger_than(least, v);
    if (!larger) continue;
    for (int lane = 0; lane < kLanes; ++lane)
      if (larger >> lane & 1) take(i + lane, v[lane]);
  }
  for (; i < n; ++i) take(i, scores[i]);
  if (static_cast<int64_t>(found.size()) > most) keep();
  places.clear();
  for (const auto& [score, place] : found) places.push_back(place);
  std::sort(places.begin(), places.end());
}

// y = LayerNorm(SiLU(x + more)), `more` and `after`, what is added to y, may be missing; [n], a multiple of 16.
void activate(
    const Bf16* x, const Bf16* more, const Bf16* weight, const Bf16* bias, double eps, const Bf16* after, int64_t n, float* work, Bf16* y) {
  Vec sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = more ? load(x + i) + load(more + i) : load(x + i);
    const Vec e = exp_of(v < 0.f ? v : -v);
    const Vec silu = v * (v < 0.f ? e : e * 0.f + 1.f) / (e + 1.f);
    store(work + i, silu);
    sum += silu;
  }
  const float mean = sum_of(sum) / n;
  Vec squares = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec centred = load(work + i) - mean;
    squares += centred * centred;
  }
  const float scale = 1.f / std::sqrt(sum_of(squares) / n + static_cast<float>(eps));
  for (int64_t i = 0; i < n; ++i) {
    const float out = (work[i] - mean) * scale * static_cast<float>(weight[i]) + static_cast<float>(bias[i]);
    y[i] = after ? out + static_cast<float>(after[i]) : out;
  }
}

// Scores of candidates: their rows of W times a state [d]. Some at a time, for their sums do not wait for each other, and the rows of the
// next ones are on their way meanwhile.
void score(const Bf16* W, int64_t stride, const std::vector<int64_t>& tokens, const Bf16* state, int64_t d, float* scores) {
  constexpr int kTogether = 4;
  const int64_t count = tokens.size();
  const auto row = [&](int64_t c) { return W + tokens[std::min(c, count - 1)] * stride; };
  for (int64_t c = 0; c < count; c += kTogether) {
    const Bf16* of[kTogether];
    for (int t = 0; t < kTogether; ++t) {
      of[t] = row(c + t);
      const Bf16* next = row(c + kTogether + t);
      for (int64_t i = 0; i < d; i += 32) __builtin_prefetch(next + i);  // a line each
    }
    Vec sum[kTogether] = {};
    for (int64_t i = 0; i < d; i += kLanes) {
      const Vec x = load(state + i);
#pragma GCC unroll 4
      for (int t = 0; t < kTogether; ++t) sum[t] += load(of[t] + i) * x;
    }
    for (int t = 0; t < kTogether && c + t < count; ++t) scores[c + t] = sum_of(sum[t]);
  }
}

std::tuple<at::Tensor, at::Tensor> draft_cpu(
    const at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& sampled, const at::Tensor& head, const at::Tensor& unembedding,
    const at::Tensor& embedding, const at::Tensor& from_previous, const at::Tensor& from_state, const at::Tensor& bias_1,
    const at::Tensor& norm_1, const at::Tensor& norm_bias_1, double eps_1, const at::Tensor& linear_2, const at::Tensor& bias_2,
    const at::Tensor& norm_2, const at::Tensor& norm_bias_2, double eps_2, bool residual, int64_t vocab, int64_t candidates) {
  const int64_t R = rows.size(0), k = rows.size(1), d = hidden.size(1), n = R * k;
  TORCH_CHECK(hidden.dim() == 2 && hidden.stride(1) == 1 && d % kLanes == 0, "states must be rows of a multiple of 16 bfloat16");
  TORCH_CHECK(rows.is_contiguous() && sampled.is_contiguous() && sampled.size(0) == R, "rows and sampled tokens do not fit");
  TORCH_CHECK(unembedding.stride(1) == 1 && unembedding.size(1) == d && unembedding.size(0) >= vocab, "W does not fit the states");
  TORCH_CHECK(embedding.stride(1) == 1 && embedding.size(1) == d && embedding.size(0) >= vocab, "E does not fit the states");
  TORCH_CHECK(head.size(1) * 2 == d && head.size(0) * kColumns >= vocab, "the head's panels do not fit the states");
  for (const at::Tensor* panels : {&from_previous, &from_state, &linear_2})
    TORCH_CHECK(panels->is_contiguous() && panels->size(1) * 2 == d && panels->size(0) * kColumns == (d + kColumns - 1) / kColumns * kColumns, "the sampler head does not fit the states");
  for (const at::Tensor* row : {&bias_1, &norm_1, &norm_bias_1, &bias_2, &norm_2, &norm_bias_2})
    TORCH_CHECK(row->is_contiguous() && row->numel() == d, "the sampler head does not fit the states");
  const int64_t* from = rows.const_data_ptr<int64_t>();
  const Bf16* states = hidden.const_data_ptr<Bf16>();

  std::vector<Bf16> z(n * d), logits(n * vocab), projected(n * d);
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_INDEX(from[i] >= 0 && from[i] < hidden.size(0), "there is no row ", from[i]);
    std::copy_n(states + from[i] * hidden.stride(0), d, z.data() + i * d);
  }
  linear(bits(z), n, head, nullptr, vocab, bits(logits));
  linear(bits(z), n, from_state, &bias_1, d, bits(projected));
  std::vector<std::vector<int64_t>> places(n);
  at::parallel_for(0, n, std::max<int64_t>(1, (1 << 16) / vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) largest(logits.data() + i * vocab, vocab, candidates, places[i]);
  });

  at::Tensor drafts = at::empty({R, k}, rows.options());
  at::Tensor probabilities = at::empty({R, k}, rows.options().dtype(at::kFloat));
  int64_t* out = drafts.data_ptr<int64_t>();
  float* sure = probabilities.data_ptr<float>();
  const Bf16 *W = unembedding.const_data_ptr<Bf16>(), *E = embedding.const_data_ptr<Bf16>();
  const auto vector = [](const at::Tensor& tensor) { return tensor.const_data_ptr<Bf16>(); };
  std::vector<Bf16> previous(R * d), first(R * d), second(R * d);
  std::vector<float> work(d), scores((candidates + kLanes - 1) / kLanes * kLanes);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t r = 0; r < R; ++r) {
      const int64_t token = i ? out[r * k + i - 1] : sampled.const_data_ptr<int64_t>()[r];
      TORCH_CHECK_INDEX(token >= 0 && token < vocab, "there is no token ", token);
      std::copy_n(E + token * embedding.stride(0), d, previous.data() + r * d);
    }
    linear(bits(previous), R, from_previous, nullptr, d, bits(first));
    for (int64_t r = 0; r < R; ++r)
      activate(first.data() + r * d, projected.data() + (r * k + i) * d, vector(norm_1), vector(norm_bias_1), eps_1, nullptr, d, work.data(), first.data() + r * d);
    linear(bits(first), R, linear_2, &bias_2, d, bits(second));
    for (int64_t r = 0; r < R; ++r) {
      Bf16* state = second.data() + r * d;
      activate(state, nullptr, vector(norm_2), vector(norm_bias_2), eps_2, residual ? z.data() + (r * k + i) * d : nullptr, d, work.data(), state);
      const std::vector<int64_t>& here = places[r * k + i];
      std::fill(scores.begin(), scores.end(), -1e30f);  // of no candidate
      score(W, unembedding.stride(0), here, state, d, scores.data());
      const auto best = std::max_element(scores.begin(), scores.begin() + here.size());
      Vec sum = {};
      for (size_t c = 0; c < scores.size(); c += kLanes) sum += exp_of(load(scores.data() + c) - *best);
      out[r * k + i] = here[best - scores.begin()];
      sure[r * k + i] = 1.f / sum_of(sum);
    }
  }
  return {drafts, probabilities};
}

#else

std::tuple<at::Tensor, at::Tensor> draft_cpu(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, double, bool, int64_t, int64_t) {
  TORCH_CHECK(false, "this processor has neither AVX-512 nor AVX2");
}

#endif

}  // namespace

// Drafts and their probabilities among the candidates, [R, k], from mask states hidden [M, d] at rows [R, k], behind the tokens sampled [R]. head: the unembedding W in panels, for the
// candidates; `unembedding` [V, d], for their scores; `embedding` [V, d]. The sampler head: linear_1 as from_previous and from_state, in
// panels, with bias_1; linear_2 likewise; their LayerNorms.
TORCH_LIBRARY_FRAGMENT(vllm_mtp, m) {
  m.def(
      "draft_cpu(Tensor hidden, Tensor rows, Tensor sampled, Tensor head, Tensor unembedding, Tensor embedding, Tensor from_previous, "
      "Tensor from_state, Tensor bias_1, Tensor norm_1, Tensor norm_bias_1, float eps_1, Tensor linear_2, Tensor bias_2, "
      "Tensor norm_2, Tensor norm_bias_2, float eps_2, bool residual, int vocab, int candidates) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(vllm_mtp, CPU, m) { m.impl("draft_cpu", draft_cpu); }

}  // namespace vllm_mtp
