#include "routes.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace bbb_fast {
namespace {

// More products than this squared are not worth trying.
constexpr int64_t kFewPixels = 16;

constexpr const char* kRuleSets[] = {"intel-avx512", "other"};

struct Table {
  std::string rules;
  std::map<std::vector<int64_t>, ConvWay> measured;
};

// Replaced as a whole, so that a call sees one table from beginning to end. Returns the one before.
std::shared_ptr<const Table> table(std::shared_ptr<const Table> next = nullptr) {
  static std::mutex mutex;
  static auto current = std::make_shared<const Table>(Table{rules_of_this_cpu(), {}});
  const std::lock_guard<std::mutex> lock(mutex);
  const auto before = current;
  if (next) current = std::move(next);
  return before;
}

template <class Numbers>
bool ones(const Numbers& numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](int64_t n) { return n == 1; });
}

// Measured on an Ice Lake Xeon (benchmarks/results/formats-*.json): the library takes up to twice as long
// over contiguous images of many pixels and channels, more than it takes to rearrange them. On a Zen 4, it
// takes as long.
bool faster_in_channels_last(const ConvProblem& p) {
  return ones(p.stride) && ones(p.dilation) && p.in >= 32 && p.out >= 32 && p.kernel[0] * p.kernel[1] >= 9 &&
         p.size[0] * p.size[1] >= 49;
}

// The library's kernels want channels by the 16. Measured: the Xeon's lose up to there, the Zen 4's up to 4.
bool faster_directly(const ConvProblem& p, bool intel) {
  return p.in <= (intel ? 15 : 4) && p.in * p.out <= 512;
}

// Measured on the Zen 4; on the Xeon for the weight's gradient alone: over so few pixels most taps of a
// kernel meet the padding, which the library multiplies too.
bool faster_by_pixels(const ConvProblem& p) {
  return p.batch >= 16 && p.in >= 32 && p.out >= 32 && p.size[0] * p.size[1] <= 4 &&
         p.out_size(0) * p.out_size(1) <= 4 && p.kernel[0] * p.kernel[1] > 1;
}

ConvWay by_rule(const ConvProblem& p, const std::string& rules) {
  const bool intel = rules == kRuleSets[0];
  if (p.allows(ConvWay::direct) && faster_directly(p, intel)) return ConvWay::direct;
  if (p.allows(ConvWay::by_pixels) && faster_by_pixels(p)) return ConvWay::by_pixels;
  if (intel && p.allows(ConvWay::channels_last) && faster_in_channels_last(p)) {
    return ConvWay::channels_last;
  }
  return ConvWay::library;
}

ConvWay parse_way(const std::string& name) {
  for (ConvWay way : kConvWays) {
    if (name == way_name(way)) return way;
  }
  throw std::invalid_argument(
      "unknown way '" + name + "'; allowed: library, channels_last, direct, by_pixels");
}

}  // namespace

const char* way_name(ConvWay way) {
  switch (way) {
    case ConvWay::channels_last:
      return "channels_last";
    case ConvWay::direct:
      return "direct";
    case ConvWay::by_pixels:
      return "by_pixels";
    default:
      return "library";
  }
}

std::vector<int64_t> ConvProblem::key() const {
  int64_t power = 0;
  while (int64_t{1} << power < batch) ++power;
  std::vector<int64_t> numbers{static_cast<int64_t>(size.size()), power, in, out, groups};
  for (const auto* list : {&size, &kernel, &stride, &padding, &dilation}) {
    numbers.insert(numbers.end(), list->begin(), list->end());
  }
  return numbers;
}

bool ConvProblem::allows(ConvWay way) const {
  const auto empty = [](const auto& numbers) {
    return std::any_of(numbers.begin(), numbers.end(), [](int64_t n) { return n == 0; });
  };
  const bool plain = !transposed && groups == 1 && batch * in * out > 0 && !empty(size) && !empty(kernel);
  switch (way) {
    case ConvWay::channels_last:
      return plain && !narrow && size.size() == 2 && contiguous;
    case ConvWay::direct:
      // The gradient of the input wants a border of kernel - 1 - padding.
      return plain && !narrow && size.size() <= 2 && contiguous && ones(stride) && ones(dilation) &&
             std::equal(padding.begin(), padding.end(), kernel.begin(), std::less<int64_t>());
    case ConvWay::by_pixels:
      return plain && size.size() == 2 && ones(dilation) && size[0] * size[1] <= kFewPixels &&
             out_size(0) * out_size(1) <= kFewPixels;
    default:
      return true;
  }
}

ConvWay choose_way(const ConvProblem& problem) {
  const auto current = table();
  if (!current->measured.empty()) {
    const auto found = current->measured.find(problem.key());
    if (found != current->measured.end()) {
      if (problem.allows(found->second)) return found->second;
      // Rearranged already.
      if (found->second == ConvWay::channels_last && !problem.contiguous) return ConvWay::library;
    }
  }
  return by_rule(problem, current->rules);
}

std::vector<std::string> ways_of(const ConvProblem& problem) {
  std::vector<std::string> names;
  for (ConvWay way : kConvWays) {
    if (problem.allows(way)) names.emplace_back(way_name(way));
  }
  return names;
}

const char* rules_of_this_cpu() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f")) return kRuleSets[0];
#endif
  return kRuleSets[1];
}

Routes current_routes() {
  const auto current = table();
  Routes routes{current->rules, {}};
  for (const auto& [key, way] : current->measured) routes.measured.emplace_back(key, way_name(way));
  return routes;
}

void set_routes(const Routes& routes) {
  if (std::find(std::begin(kRuleSets), std::end(kRuleSets), routes.rules) == std::end(kRuleSets)) {
    throw std::invalid_argument("unknown rules '" + routes.rules + "'; allowed: intel-avx512, other");
  }
  Table next{routes.rules, {}};
  for (const auto& [key, way] : routes.measured) next.measured[key] = parse_way(way);
  table(std::make_shared<const Table>(std::move(next)));
}

}  // namespace bbb_fast
