// The scheduler of blocks.h, and the ops by which tests steer it.
#include <torch/library.h>
#include <ucontext.h>

#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/platform.h"

namespace bbb_fast::blocks {

Index thread_index, block_index, grid_size;
int64_t block_serial = 0;

namespace {

using cuda::kThreads;
using cuda::kWarp;

enum class State { ready, at_barrier, at_shuffle, finished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::finished;
  int shuffles = 0;
  // A lane may be one shuffle ahead of the one that reads its value.
  uint64_t value[2] = {0, 0};
};

constexpr size_t kStack = 128 << 10;

std::mutex one_launch_at_a_time;
std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* running = nullptr;
std::exception_ptr failure;
std::string order = "forward";
bool barriers = true;
int64_t launch_count = 0;

void enter_fiber() {
  try {
    (*running)();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[thread_index.x].state = State::finished;
}

void wait_as(State state) {
  const unsigned self = thread_index.x;
  fibers[self].state = state;
  swapcontext(&fibers[self].context, &scheduler);
}

// Lets the threads [begin, end) go on if those that have not finished all wait in this state.
bool release(int begin, int end, State state) {
  bool waiting = false;
  for (int t = begin; t < end; ++t) {
    if (fibers[t].state == state) {
      waiting = true;
    } else if (fibers[t].state != State::finished) {
      return false;
    }
  }
  if (!waiting) return false;
  for (int t = begin; t < end; ++t) {
    if (fibers[t].state == state) fibers[t].state = State::ready;
  }
  return true;
}

// Runs a warp until its threads have finished or wait for the block.
void run_warp(int warp, std::mt19937& random) {
  std::vector<int> turn(kWarp);
  std::iota(turn.begin(), turn.end(), warp * kWarp);
  if (order == "reverse") std::reverse(turn.begin(), turn.end());
  do {
    if (order == "shuffled") std::shuffle(turn.begin(), turn.end(), random);
    for (int t : turn) {
      if (fibers[t].state != State::ready) continue;
      thread_index.x = static_cast<unsigned>(t);
      swapcontext(&scheduler, &fibers[t].context);
    }
  } while (release(warp * kWarp, (warp + 1) * kWarp, State::at_shuffle));
}

void run_block(std::mt19937& random) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter_fiber, 0);
    fiber.state = State::ready;
    fiber.shuffles = 0;
  }
  // Each warp goes as far as it can before the next one starts: one that no barrier holds back is then far
  // ahead of those whose numbers it needs, or whose numbers it overwrites.
  std::vector<int> turn(kThreads / kWarp);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == "reverse") std::reverse(turn.begin(), turn.end());
  do {
    if (order == "shuffled") std::shuffle(turn.begin(), turn.end(), random);
    for (int warp : turn) run_warp(warp, random);
  } while (release(0, kThreads, State::at_barrier));
  for (const Fiber& fiber : fibers) {
    TORCH_INTERNAL_ASSERT(
        fiber.state == State::finished, "threads of a block wait for each other in different places");
  }
}

}  // namespace

void sync_threads() {
  if (barriers) wait_as(State::at_barrier);
}

uint64_t exchange(uint64_t bits, int lane) {
  const int self = static_cast<int>(thread_index.x);
  const int parity = fibers[self].shuffles++ % 2;
  fibers[self].value[parity] = bits;
  wait_as(State::at_shuffle);
  return fibers[self / kWarp * kWarp + lane].value[parity];
}

void run(int64_t blocks, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (fibers.empty()) {
    fibers = std::vector<Fiber>(kThreads);
    for (Fiber& fiber : fibers) fiber.stack = std::make_unique<char[]>(kStack);
  }
  running = &kernel;
  grid_size.x = static_cast<unsigned>(blocks);
  std::mt19937 random(static_cast<unsigned>(launch_count++));
  for (block_index.x = 0; block_index.x < grid_size.x; ++block_index.x) {
    ++block_serial;
    run_block(random);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  }
}

int64_t launches() {
  return launch_count;
}

void set_order(std::string name) {
  TORCH_CHECK_VALUE(
      name == "forward" || name == "reverse" || name == "shuffled",
      "order must be forward, reverse or shuffled, got ", name);
  order = std::move(name);
}

void set_barriers(bool on) {
  barriers = on;
}

TORCH_LIBRARY(bbb_fast_blocks, m) {
  m.def("launches() -> int", &launches);
  m.def("set_order(str order) -> ()", &set_order);
  m.def("set_barriers(bool on) -> ()", &set_barriers);
}

}  // namespace bbb_fast::blocks
