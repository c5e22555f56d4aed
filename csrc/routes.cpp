#include "routes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>

#include "cpu/matrix_product.h"

namespace bbb_fast {
namespace {

// More pairs of pixels than these are not worth trying: the weight is written once for each.
constexpr int64_t kFewPairs = 16;

constexpr const char *kIntel = "intel-avx512", *kZen5 = "amd-zen5", *kOther = "other";
constexpr const char* kRuleSets[] = {kIntel, kZen5, kOther};

struct Table {
  std::string rules;
  std::map<std::vector<int64_t>, Way> measured;
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

// Whether, in one dimension, every output pixel sees every input pixel.
bool all_meet(const ConvProblem& p, size_t d) {
  return (p.out_size(d) - 1) * p.stride[d] <= p.padding[d] && p.size[d] - 1 + p.padding[d] < p.kernel[d];
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

// Over channels_last images the library of PyTorch 2.13 gives wrong numbers or crashes, in torch.nn too,
// where images or outputs are one pixel wide and strides or dilations are more than 1.
bool safe_in_channels_last(const ConvProblem& p) {
  for (size_t d = 0; d < p.size.size(); ++d) {
    if (p.size[d] == 1 || p.out_size(d) == 1 || p.dilation[d] != 1) return false;
  }
  return true;
}

Way by_rule(const ConvProblem& p, const std::string& rules) {
  const bool intel = rules == kIntel;
  if (p.allows(Way::direct) && faster_directly(p, intel)) return Way::direct;
  if (p.allows(Way::by_pixels) && faster_by_pixels(p)) return Way::by_pixels;
  if (intel && p.allows(Way::channels_last) && faster_in_channels_last(p)) {
    return Way::channels_last;
  }
  return Way::library;
}

// Measured on a Zen 5 alone: torch multiplies float32 matrices by MKL, and oneDNN is 2.2 times as fast there,
// but each call of it costs 10 microseconds.
Way by_rule(const LinearProblem& p, const std::string& rules) {
  const bool worth_it = p.rows >= 4 && p.in >= 4 && p.out >= 4 && p.rows * p.in * p.out >= int64_t{1} << 21;
  return rules == kZen5 && worth_it && p.allows(Way::onednn) ? Way::onednn : Way::library;
}

// "a, b, c"
template <class Names, class Name>
std::string listed(const Names& names, const Name& name) {
  std::string text;
  for (const auto& each : names) text += (text.empty() ? "" : ", ") + std::string(name(each));
  return text;
}

Way parse_way(const std::string& name) {
  for (Way way : kWays) {
    if (name == way_name(way)) return way;
  }
  throw std::invalid_argument("unknown way '" + name + "'; allowed: " + listed(kWays, way_name));
}

int64_t power_of_2(int64_t n) {
  int64_t power = 0;
  while (int64_t{1} << power < n) ++power;
  return power;
}

template <class Problem>
std::optional<Way> measured_way(const Table& table, const Problem& problem) {
  if (table.measured.empty()) return std::nullopt;
  const auto found = table.measured.find(problem.key());
  return found == table.measured.end() ? std::nullopt : std::optional(found->second);
}

template <class Problem>
std::vector<std::string> allowed_ways(const Problem& problem) {
  std::vector<std::string> names;
  for (Way way : kWays) {
    if (problem.allows(way)) names.emplace_back(way_name(way));
  }
  return names;
}

}  // namespace

const char* way_name(Way way) {
  switch (way) {
    case Way::channels_last:
      return "channels_last";
    case Way::direct:
      return "direct";
    case Way::by_pixels:
      return "by_pixels";
    case Way::onednn:
      return "onednn";
    default:
      return "library";
  }
}

std::vector<int64_t> ConvProblem::key() const {
  std::vector<int64_t> numbers{static_cast<int64_t>(size.size()), power_of_2(batch), in, out, groups};
  for (const auto* list : {&size, &kernel, &stride, &padding, &dilation}) {
    numbers.insert(numbers.end(), list->begin(), list->end());
  }
  return numbers;
}

bool ConvProblem::allows(Way way) const {
  const auto empty = [](const auto& numbers) {
    return std::any_of(numbers.begin(), numbers.end(), [](int64_t n) { return n == 0; });
  };
  const bool plain = !transposed && groups == 1 && batch * in * out > 0 && !empty(size) && !empty(kernel);
  switch (way) {
    case Way::channels_last:
      return plain && !narrow && size.size() == 2 && contiguous && safe_in_channels_last(*this);
    case Way::direct:
      // The gradient of the input wants a border of kernel - 1 - padding.
      return plain && !narrow && size.size() <= 2 && contiguous && ones(stride) && ones(dilation) &&
             std::equal(padding.begin(), padding.end(), kernel.begin(), std::less<int64_t>());
    case Way::by_pixels:
      return plain && size.size() == 2 && ones(dilation) && all_meet(*this, 0) && all_meet(*this, 1) &&
             size[0] * size[1] * out_size(0) * out_size(1) <= kFewPairs;
    default:
      return way == Way::library;
  }
}

std::vector<int64_t> LinearProblem::key() const {
  return {0, power_of_2(rows), in, out};
}

bool LinearProblem::allows(Way way) const {
  return way == Way::library || (way == Way::onednn && rows * in * out > 0 && with_onednn());
}

Way choose_way(const ConvProblem& problem) {
  const auto current = table();
  if (const auto way = measured_way(*current, problem)) {
    if (problem.allows(*way)) return *way;
    // Rearranged already.
    if (*way == Way::channels_last && !problem.contiguous) return Way::library;
  }
  return by_rule(problem, current->rules);
}

Way choose_way(const LinearProblem& problem) {
  const auto current = table();
  const auto way = measured_way(*current, problem);
  return way && problem.allows(*way) ? *way : by_rule(problem, current->rules);
}

std::vector<std::string> ways_of(const ConvProblem& problem) {
  return allowed_ways(problem);
}
std::vector<std::string> ways_of(const LinearProblem& problem) {
  return allowed_ways(problem);
}

const char* rules_of_this_cpu() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f")) return kOther;
  if (__builtin_cpu_is("intel")) return kIntel;
  // By its number: compilers learn the names of CPUs later. 26 is Zen 5; what follows is taken for one.
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
  if (__builtin_cpu_is("amd") && family >= 26) return kZen5;
#endif
  return kOther;
}

Routes current_routes() {
  const auto current = table();
  Routes routes{current->rules, {}};
  for (const auto& [key, way] : current->measured) routes.measured.emplace_back(key, way_name(way));
  return routes;
}

void set_routes(const Routes& routes) {
  if (std::find(std::begin(kRuleSets), std::end(kRuleSets), routes.rules) == std::end(kRuleSets)) {
    throw std::invalid_argument(
        "unknown rules '" + routes.rules +
        "'; allowed: " + listed(kRuleSets, [](const char* name) { return name; }));
  }
  Table next{routes.rules, {}};
  for (const auto& [key, way] : routes.measured) next.measured[key] = parse_way(way);
  table(std::make_shared<const Table>(std::move(next)));
}

}  // namespace bbb_fast
