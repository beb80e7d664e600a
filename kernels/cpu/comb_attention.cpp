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

struct Sizes {
  int64_t heads, kv_heads, head_size, block;
  float scale, softcap;
  int64_t window, mask_window, kept;  // keys that a real row sees, and a mask row; 0: all. Mask rows see the first `kept` in any case
};

// What the rows of a request see of the cache.
struct Seen {
  int64_t row;     // in q and out
  int64_t prefix;  // the cached tokens before this one
  int64_t position;
  int64_t window;
  int64_t kept;

  // The first token in the window.
  int64_t from() const { return window ? std::max<int64_t>(0, position + 1 - window) : 0; }
};

// The rows of one request at the heads that share one KV head: first its real rows, if they are to be served, then its mask rows.
template <typename T>
struct Work {
  const Sizes& sizes;
  const at::Tensor &q, &k, &v;
  at::Tensor& out;
  const int64_t *prefix_len, *group_start, *group_of_row;
  int64_t first_mask;  // row of the first mask row

  std::vector<Seen> rows;
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

  // Request with real rows [real, real_end), of which the last is its token number `tokens`, and mask rows [first, end).
  void see(int64_t real, int64_t real_end, int64_t tokens, int64_t first, int64_t end) {
    rows.clear();
    for (int64_t row = real; row < real_end; ++row) {
      const int64_t prefix = tokens - (real_end - 1 - row);
      rows.push_back({row, prefix, prefix - 1, sizes.window, 0});
    }
    for (int64_t m = first; m < end; ++m) {
      const int64_t group = group_of_row[m], prefix = prefix_len[group];
      rows.push_back({first_mask + m, prefix, prefix + m - group_start[group], sizes.mask_window, sizes.mask_window ? sizes.kept : 0});
    }
  }

  void run(int64_t kv_head, const T* cache, int64_t block_stride, int64_t head_stride, const int32_t* table) {
    const int64_t D = sizes.head_size, shared = sizes.heads / sizes.kv_heads, count = rows.size() * shared;
    query.resize(count * D), sums.assign(count * D, 0.f), highest.assign(count, -INFINITY), total.assign(count, 0.f);
    scores.resize(count * sizes.block);
    int64_t longest = 0, first = INT64_MAX, first_of_masks = INT64_MAX, kept = 0, real = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      longest = std::max(longest, rows[i].prefix), first = std::min(first, rows[i].from()), kept = std::max(kept, rows[i].kept);
      if (rows[i].row < first_mask) real += shared;
      else first_of_masks = std::min(first_of_masks, rows[i].from());
      for (int64_t g = 0; g < shared; ++g) {
        const T* from = q.const_data_ptr<T>() + rows[i].row * q.stride(0) + (kv_head * shared + g) * D;
        for (int64_t d = 0; d < D; ++d) query[(i * shared + g) * D + d] = sizes.scale * static_cast<float>(from[d]);
      }
    }
    for (int64_t begin = 0; begin < longest; begin += sizes.block) {
      if (begin + sizes.block <= first && begin >= kept) continue;
      // Real rows come first, and may see what no mask row does.
      const int64_t seeing = begin + sizes.block <= first_of_masks && begin >= kept ? real : count;
      const int64_t tokens = std::min(sizes.block, longest - begin), padded = (tokens + kLanes - 1) / kLanes * kLanes;
      const T* keys = cache + table[begin / sizes.block] * block_stride + kv_head * head_stride;
      std::fill_n(scores.data(), seeing * sizes.block, 0.f);
      rows_times(query.data(), D, keys, sizes.block, seeing, D, padded, scores.data(), sizes.block);
      for (int64_t r = 0; r < seeing; ++r) {
        const Seen& of = rows[r / shared];
        float* score = scores.data() + r * sizes.block;
        const int64_t seen = std::clamp<int64_t>(of.prefix - begin, 0, padded);
        std::fill(score + seen, score + padded, -INFINITY);
        if (sizes.softcap)
          for (int64_t t = 0; t < seen; ++t) score[t] = capped(score[t]);
        const int64_t hidden = std::clamp<int64_t>(of.kept - begin, 0, padded), in_window = std::clamp<int64_t>(of.from() - begin, 0, padded);
        if (hidden < in_window) std::fill(score + hidden, score + in_window, -INFINITY);
        soften(r, score, padded);
      }
      rows_times(scores.data(), sizes.block, keys + D * sizes.block, D, seeing, tokens, D, sums.data(), D);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = rows[r / shared].row;
      if (row >= first_mask) own_group(row - first_mask, r, kv_head);
      T* to = out.data_ptr<T>() + row * out.stride(0) + (kv_head * shared + r % shared) * D;
      for (int64_t d = 0; d < D; ++d) to[d] = static_cast<T>(sums[r * D + d] / total[r]);
    }
  }

  void own_group(int64_t m, int64_t r, int64_t kv_head) {
    const int64_t D = sizes.head_size, start = group_start[group_of_row[m]], length = m + 1 - start;
    const int64_t padded = (length + kLanes - 1) / kLanes * kLanes;
    scores.resize(std::max<int64_t>(scores.size(), padded));
    std::fill_n(scores.data(), padded, -INFINITY);
    for (int64_t j = sizes.mask_window ? std::max<int64_t>(0, length - sizes.mask_window) : 0; j < length; ++j) {
      const T* key = k.const_data_ptr<T>() + (first_mask + start + j) * k.stride(0) + kv_head * D;
      Vec products = {};
      for (int64_t d = 0; d < D; d += kLanes) products += load(query.data() + r * D + d) * load(key + d);
      scores[j] = capped(sum_of(products));
    }
    soften(r, scores.data(), padded);
    float* sum = sums.data() + r * D;
    for (int64_t j = 0; j < length; ++j) {
      const T* value = v.const_data_ptr<T>() + (first_mask + start + j) * v.stride(0) + kv_head * D;
      for (int64_t d = 0; d < D; d += kLanes) store(sum + d, load(sum + d) + scores[j] * load(value + d));
    }
  }
};

// The groups of mask rows, as `comb_attention_cpu_` takes them; row_start empty: there are none.
struct Groups {
  const at::Tensor &prefix_len, &group_start, &group_of_row, &row_start;
};

// The real rows, where they are to be served: row_start and tokens of each request; undefined: they are not.
struct Real {
  at::Tensor row_start, tokens;
};

template <typename T>
void attend(
    at::Tensor& out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cache,
    const at::Tensor& block_table, const Groups& groups, int64_t first_mask, const Real& real, int64_t requests, const Sizes& sizes) {
  const int64_t* mask_start = groups.row_start.const_data_ptr<int64_t>();
  const int32_t* real_start = real.tokens.defined() ? real.row_start.const_data_ptr<int32_t>() : nullptr;
  const int32_t* tokens = real.tokens.defined() ? real.tokens.const_data_ptr<int32_t>() : nullptr;
  const bool masks = groups.row_start.size(0) > 0;
  at::parallel_for(0, requests * sizes.kv_heads, 1, [&](int64_t begin, int64_t end) {
    Work<T> work{
        sizes, q, k, v, out, groups.prefix_len.const_data_ptr<int64_t>(), groups.group_start.const_data_ptr<int64_t>(),
        groups.group_of_row.const_data_ptr<int64_t>(), first_mask, {}, {}, {}, {}, {}, {}};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / sizes.kv_heads;
      work.see(
          tokens ? real_start[r] : 0, tokens ? real_start[r + 1] : 0, tokens ? tokens[r] : 0, masks ? mask_start[r] : 0,
          masks ? mask_start[r + 1] : 0);
      if (!work.rows.empty())
        work.run(
            i % sizes.kv_heads, cache.const_data_ptr<T>(), cache.stride(0), cache.stride(1),
            block_table.const_data_ptr<int32_t>() + r * block_table.stride(0));
    }
  });
}

// Writes rows [first_mask:] of out [N + M, H, D]: attention of the mask rows q[first_mask:] over the cached tokens before their
// group's prefix_len [G], then over k, v of their own group up to themselves. Mask row m is in group group_of_row[m]; the mask rows of
// group g begin at group_start[g], those of request r at row_start[r]; row_start is empty where there are none.
// cache: [blocks, H_kv, block, 2 D].
//
// With `tokens` [R] it writes the real rows too, rows real_start[r] to real_start[r + 1] for request r: they are the last of its
// `tokens`, all of which are in the cache, and each sees those up to itself.
//
// Real rows see the last `window` tokens, themselves included, mask rows the last `mask_window` (left out: as real rows) and the first
// `kept`; 0: all.
void comb_attention_cpu_(
    at::Tensor& out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cache,
    const at::Tensor& block_table, const at::Tensor& prefix_len, const at::Tensor& group_start, const at::Tensor& group_of_row,
    const at::Tensor& row_start, int64_t first_mask, double scale, int64_t window, double softcap,
    const std::optional<at::Tensor>& real_start, const std::optional<at::Tensor>& tokens, std::optional<int64_t> mask_window, int64_t kept) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && out.dim() == 3 && cache.dim() == 4, "wrong number of dimensions");
  const Sizes sizes{
      q.size(1), k.size(1), q.size(2), cache.size(2), static_cast<float>(scale), static_cast<float>(softcap),
      window, mask_window.value_or(window), mask_window.has_value() ? kept : 0};
  const int64_t D = sizes.head_size;
  for (const auto& t : {q, k, v, at::Tensor(out)}) TORCH_CHECK(t.stride(2) == 1 && t.stride(1) == D && t.size(2) == D, "heads must be contiguous");
  TORCH_CHECK(D % kLanes == 0 && sizes.block % kLanes == 0 && cache.size(3) == 2 * D && cache.size(1) == sizes.kv_heads, "the cache does not fit");
  TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == 2 * D, "blocks must be contiguous");
  TORCH_CHECK(block_table.scalar_type() == at::kInt && block_table.stride(1) == 1, "the block table must be int32");
  TORCH_CHECK(q.scalar_type() == cache.scalar_type(), "a cache of another dtype is not supported");
  TORCH_CHECK(real_start.has_value() == tokens.has_value(), "real rows need both, where they begin and their requests' tokens");
  int64_t requests = std::max<int64_t>(0, row_start.size(0) - 1);
  Real real;
  if (tokens.has_value()) {
    real = {*real_start, *tokens};
    for (const auto& t : {real.row_start, real.tokens}) TORCH_CHECK(t.scalar_type() == at::kInt && t.is_contiguous(), "real rows are counted in int32");
    TORCH_CHECK(real.row_start.size(0) == real.tokens.size(0) + 1, "real rows of another number of requests");
    TORCH_CHECK(row_start.size(0) == 0 || requests == real.tokens.size(0), "mask rows and real rows of another number of requests");
    requests = real.tokens.size(0);
  }
  const Groups groups{prefix_len, group_start, group_of_row, row_start};
  if (q.scalar_type() == at::kFloat)
    attend<float>(out, q, k, v, cache, block_table, groups, first_mask, real, requests, sizes);
  else if (q.scalar_type() == at::kBFloat16)
    attend<c10::BFloat16>(out, q, k, v, cache, block_table, groups, first_mask, real, requests, sizes);
  else
    TORCH_CHECK(false, "float32 and bfloat16 only");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_mtp, m) {
  m.def(
      "comb_attention_cpu_(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor cache, Tensor block_table, Tensor prefix_len, "
      "Tensor group_start, Tensor group_of_row, Tensor row_start, int first_mask, float scale, int window, float softcap, "
      "Tensor? real_start=None, Tensor? tokens=None, int? mask_window=None, int kept=0) -> ()");
}
TORCH_LIBRARY_IMPL(vllm_mtp, CPU, m) { m.impl("comb_attention_cpu_", comb_attention_cpu_); }

}  // namespace vllm_mtp
