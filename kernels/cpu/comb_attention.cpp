// Comb attention on a CPU, over vLLM's CPU cache: K of a block lies as [D, tokens], V as [tokens, D] (csrc/cpu/cpu_attn_vec.hpp).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace vllm_mtp {
namespace {

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

struct Sizes {
  int64_t heads, kv_heads, head_size, block, window;
  float scale, softcap;
};

// The mask rows of one request at the heads that share one KV head. A "row" is a mask row at one of these heads.
template <typename T>
struct Work {
  const Sizes& sizes;
  const at::Tensor &q, &k, &v;
  at::Tensor& out;
  const int64_t *prefix_len, *group_start, *group_of_row;
  int64_t first_real;  // real rows before the mask rows

  std::vector<float> query, scores, sums, highest, total;

  float capped(float score) const { return sizes.softcap ? sizes.softcap * std::tanh(score / sizes.softcap) : score; }

  // Takes `count` scores of row r into its softmax and leaves their weights where they stood, `padded` of them.
  void soften(int64_t r, float* score, int64_t padded) {
    Vec most = load(score);
    for (int64_t t = kLanes; t < padded; t += kLanes) {
      const Vec next = load(score + t);
      most = most > next ? most : next;
    }
    float high = highest[r];
    for (int i = 0; i < kLanes; ++i) high = std::max(high, most[i]);
    if (high == -INFINITY) return std::fill_n(score, padded, 0.f), void();
    const float shrink = std::exp(highest[r] - high);
    Vec weights = {};
    for (int64_t t = 0; t < padded; t += kLanes) {
      const Vec score_ = load(score + t);
      const Vec weight = score_ == -INFINITY ? Vec{} : exp_of(score_ - high);
      store(score + t, weight);
      weights += weight;
    }
    total[r] = total[r] * shrink + sum_of(weights);
    highest[r] = high;
    if (shrink != 1.f)
      for (int64_t d = 0; d < sizes.head_size; ++d) sums[r * sizes.head_size + d] *= shrink;
  }

  void run(int64_t first, int64_t end, int64_t kv_head, const T* cache, int64_t block_stride, int64_t head_stride, const int32_t* table) {
    const int64_t D = sizes.head_size, shared = sizes.heads / sizes.kv_heads, rows = (end - first) * shared;
    query.resize(rows * D), sums.assign(rows * D, 0.f), highest.assign(rows, -INFINITY), total.assign(rows, 0.f);
    scores.resize(rows * sizes.block);
    int64_t longest = 0;
    for (int64_t m = first; m < end; ++m) {
      longest = std::max(longest, prefix_len[group_of_row[m]]);
      for (int64_t g = 0; g < shared; ++g) {
        const T* from = q.const_data_ptr<T>() + (first_real + m) * q.stride(0) + (kv_head * shared + g) * D;
        for (int64_t d = 0; d < D; ++d) query[((m - first) * shared + g) * D + d] = sizes.scale * static_cast<float>(from[d]);
      }
    }
    int64_t begin = 0;
    if (sizes.window) begin = std::max<int64_t>(0, prefix_len[group_of_row[first]] + 1 - sizes.window) / sizes.block * sizes.block;
    for (; begin < longest; begin += sizes.block) {
      const int64_t tokens = std::min(sizes.block, longest - begin), padded = (tokens + kLanes - 1) / kLanes * kLanes;
      const T* keys = cache + table[begin / sizes.block] * block_stride + kv_head * head_stride;
      std::fill_n(scores.data(), rows * sizes.block, 0.f);
      rows_times(query.data(), D, keys, sizes.block, rows, D, padded, scores.data(), sizes.block);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t m = first + r / shared, group = group_of_row[m];
        float* score = scores.data() + r * sizes.block;
        const int64_t seen = std::clamp<int64_t>(prefix_len[group] - begin, 0, padded);
        std::fill(score + seen, score + padded, -INFINITY);
        if (sizes.softcap)
          for (int64_t t = 0; t < seen; ++t) score[t] = capped(score[t]);
        if (sizes.window) {
          const int64_t position = prefix_len[group] + m - group_start[group];
          std::fill_n(score, std::clamp<int64_t>(position + 1 - sizes.window - begin, 0, padded), -INFINITY);
        }
        soften(r, score, padded);
      }
      rows_times(scores.data(), sizes.block, keys + D * sizes.block, D, rows, tokens, D, sums.data(), D);
    }
    for (int64_t m = first; m < end; ++m)
      for (int64_t g = 0; g < shared; ++g) own_group(m, (m - first) * shared + g, kv_head, kv_head * shared + g);
  }

  void own_group(int64_t m, int64_t r, int64_t kv_head, int64_t head) {
    const int64_t D = sizes.head_size, start = group_start[group_of_row[m]], length = m + 1 - start;
    const int64_t padded = (length + kLanes - 1) / kLanes * kLanes;
    scores.resize(std::max<int64_t>(scores.size(), padded));
    std::fill_n(scores.data(), padded, -INFINITY);
    for (int64_t j = sizes.window ? std::max<int64_t>(0, length - sizes.window) : 0; j < length; ++j) {
      const T* key = k.const_data_ptr<T>() + (first_real + start + j) * k.stride(0) + kv_head * D;
      Vec products = {};
      for (int64_t d = 0; d < D; d += kLanes) products += load(query.data() + r * D + d) * load(key + d);
      scores[j] = capped(sum_of(products));
    }
    soften(r, scores.data(), padded);
    float* sum = sums.data() + r * D;
    for (int64_t j = 0; j < length; ++j) {
      const T* value = v.const_data_ptr<T>() + (first_real + start + j) * v.stride(0) + kv_head * D;
      for (int64_t d = 0; d < D; d += kLanes) store(sum + d, load(sum + d) + scores[j] * load(value + d));
    }
    T* to = out.data_ptr<T>() + (first_real + m) * out.stride(0) + head * D;
    for (int64_t d = 0; d < D; ++d) to[d] = static_cast<T>(sum[d] / total[r]);
  }
};

template <typename T>
void attend(
    at::Tensor& out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cache,
    const at::Tensor& block_table, const at::Tensor& prefix_len, const at::Tensor& group_start, const at::Tensor& group_of_row,
    const at::Tensor& row_start, int64_t num_real, const Sizes& sizes) {
  const int64_t* starts = row_start.const_data_ptr<int64_t>();
  const int64_t requests = row_start.size(0) - 1;
  at::parallel_for(0, requests * sizes.kv_heads, 1, [&](int64_t begin, int64_t end) {
    Work<T> work{
        sizes, q, k, v, out, prefix_len.const_data_ptr<int64_t>(), group_start.const_data_ptr<int64_t>(),
        group_of_row.const_data_ptr<int64_t>(), num_real, {}, {}, {}, {}, {}};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t request = i / sizes.kv_heads;
      if (starts[request] == starts[request + 1]) continue;
      work.run(
          starts[request], starts[request + 1], i % sizes.kv_heads, cache.const_data_ptr<T>(), cache.stride(0), cache.stride(1),
          block_table.const_data_ptr<int32_t>() + request * block_table.stride(0));
    }
  });
}

// Writes rows [num_real:] of out [N + M, H, D]: attention of the mask rows q[num_real:] over the cached tokens before their group's
// prefix_len [G], then over k, v of their own group up to themselves. Mask row m is in group group_of_row[m]; the mask rows of group g
// begin at group_start[g], those of request r at row_start[r]. cache: [blocks, H_kv, block, 2 D].
void comb_attention_cpu_(
    at::Tensor& out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cache,
    const at::Tensor& block_table, const at::Tensor& prefix_len, const at::Tensor& group_start, const at::Tensor& group_of_row,
    const at::Tensor& row_start, int64_t num_real, double scale, int64_t window, double softcap) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && out.dim() == 3 && cache.dim() == 4, "wrong number of dimensions");
  const Sizes sizes{q.size(1), k.size(1), q.size(2), cache.size(2), window, static_cast<float>(scale), static_cast<float>(softcap)};
  const int64_t D = sizes.head_size;
  for (const auto& t : {q, k, v, at::Tensor(out)}) TORCH_CHECK(t.stride(2) == 1 && t.stride(1) == D && t.size(2) == D, "heads must be contiguous");
  TORCH_CHECK(D % kLanes == 0 && sizes.block % kLanes == 0 && cache.size(3) == 2 * D && cache.size(1) == sizes.kv_heads, "the cache does not fit");
  TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == 2 * D, "blocks must be contiguous");
  TORCH_CHECK(block_table.scalar_type() == at::kInt && block_table.stride(1) == 1, "the block table must be int32");
  TORCH_CHECK(q.scalar_type() == cache.scalar_type(), "a cache of another dtype is not supported");
  if (q.scalar_type() == at::kFloat)
    attend<float>(out, q, k, v, cache, block_table, prefix_len, group_start, group_of_row, row_start, num_real, sizes);
  else if (q.scalar_type() == at::kBFloat16)
    attend<c10::BFloat16>(out, q, k, v, cache, block_table, prefix_len, group_start, group_of_row, row_start, num_real, sizes);
  else
    TORCH_CHECK(false, "float32 and bfloat16 only");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_mtp, m) {
  m.def(
      "comb_attention_cpu_(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor cache, Tensor block_table, Tensor prefix_len, "
      "Tensor group_start, Tensor group_of_row, Tensor row_start, int num_real, float scale, int window, float softcap) -> ()");
}
TORCH_LIBRARY_IMPL(vllm_mtp, CPU, m) { m.impl("comb_attention_cpu_", comb_attention_cpu_); }

}  // namespace vllm_mtp
