// nm_prune on the CPU: each group ranked on its own, in parallel over output rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "dtypes.h"
#include "team.h"

namespace issp {
namespace {

// Element (group, member, row) of a grouped weight [outer, rows, groups, m, inner] lies at
// outer * rows * groups * m * inner + ((row * groups + group) * m + member) * inner + kernel.
struct Grouping {
  int64_t outer, rows, groups, m, inner;

  int64_t at(int64_t o, int64_t row, int64_t group, int64_t member, int64_t kernel) const {
    return (((o * rows + row) * groups + group) * m + member) * inner + kernel;
  }
};

Grouping grouping(const Tensor& weight, int64_t m, int64_t v, const std::string& layout) {
  if (layout == "flat") return {1, 1, weight.numel() / m, m, 1};
  const int64_t rows = weight.size(0), channels = weight.size(1);
  return {rows / v, v, channels / m, m, weight.numel() / (rows * channels)};
}

template <typename T>
Key<T> widest_key(typename T::Wide sum) {
  using Bits = std::conditional_t<sizeof(sum) == 8, uint64_t, uint32_t>;
  using Wide = std::conditional_t<sizeof(sum) == 8, Float64, Float32>;
  const Bits k = key<Wide>(bit_as<Bits>(sum));
  return k > kInfinity<Wide> ? Limits<Wide>::magnitude : k;
}

// The key of a single weight; for v > 1 that of the summed magnitudes, added in row order.
template <typename T>
Key<T> score(const typename T::Bits* w, const Grouping& by, int64_t o, int64_t group,
             int64_t member, int64_t kernel) {
  if (by.rows == 1) return key<T>(w[by.at(o, 0, group, member, kernel)]);
  typename T::Wide sum = 0;
  for (int64_t row = 0; row < by.rows; ++row) {
    const auto bits = typename T::Bits(key<T>(w[by.at(o, row, group, member, kernel)]));
    sum = row ? sum + widen(T{}, bits) : widen(T{}, bits);
  }
  return widest_key<T>(sum);
}

template <typename T>
void prune_outer(const typename T::Bits* w, typename T::Bits* out, uint8_t* kept,
                 const Grouping& by, int64_t n, int64_t o, int64_t group, typename T::Wide shrink) {
  std::vector<std::pair<Key<T>, int64_t>> order(size_t(by.m));
  for (int64_t kernel = 0; kernel < by.inner; ++kernel) {
    for (int64_t member = 0; member < by.m; ++member) {
      order[size_t(member)] = {score<T>(w, by, o, group, member, kernel), member};
    }
    // pairs order ties by the lowest member
    std::nth_element(order.begin(), order.begin() + (by.m - n), order.end());
    for (int64_t rank = 0; rank < by.m; ++rank) {
      for (int64_t row = 0; row < by.rows; ++row) {
        const int64_t at = by.at(o, row, group, order[size_t(rank)].second, kernel);
        kept[at] = rank >= by.m - n;
        out[at] = kept[at] ? w[at] : shrunk<T>(w[at], shrink);
      }
    }
  }
}

std::tuple<Tensor, Tensor> nm_prune(const Tensor& weight, int64_t n, int64_t m, int64_t v,
                                    std::string layout, double shrink) {
  const Item item = check_nm_prune(weight, n, m, v, layout, shrink);
  const Grouping by = grouping(weight, m, v, layout);
  Tensor out = torch::stable::empty_like(weight);
  const Tensor mask = torch::stable::new_zeros(weight, {mask_words(item.numel)}, ScalarType::Int);
  std::vector<uint8_t> kept(size_t(item.numel));
  const Team team = item.numel < 16384 ? Team{1} : whole_team();
  for_dtype(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* const to = static_cast<typename T::Bits*>(out.mutable_data_ptr());
    const int64_t units = by.outer * by.groups;
    team.each([&](int64_t p) {
      for (int64_t u = units * p / team.size; u < units * (p + 1) / team.size; ++u) {
        prune_outer<T>(static_cast<const typename T::Bits*>(item.data), to, kept.data(), by, n,
                       u / by.groups, u % by.groups, typename T::Wide(shrink));
      }
    });
  });
  auto* const words = static_cast<uint32_t*>(mask.mutable_data_ptr());
  for (int64_t i = 0; i < item.numel; ++i) words[i / 32] |= uint32_t(kept[size_t(i)]) << (i % 32);
  return {out, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("nm_prune", TORCH_BOX(&nm_prune));
}

}  // namespace issp
