// Runs the CUDA kernels on the CPU, for the tests: block after block, each CUDA thread a fiber that runs
// until it meets a barrier or a shuffle. Fibers run in a chosen order, shared memory starts as NaN, so a
// missing barrier gives wrong numbers. Included by ../cuda/platform.h under BBB_KERNELS_ON_CPU.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define BBB_DEVICE inline
#define BBB_EXPECT(condition) TORCH_INTERNAL_ASSERT(condition)
#define BBB_DISPATCH_KEY CPU
#define BBB_SHARED(type, name, count)                              \
  static ::bbb_fast::blocks::Shared<type, (count)> name##_storage; \
  type(&name)[count] = name##_storage.enter()

namespace bbb_fast::blocks {

struct Index {
  unsigned x = 0;
};

// Of the fiber that runs.
extern Index thread_index, block_index, grid_size;
// Counts blocks, over all launches.
extern int64_t block_serial;

void run(int64_t blocks, const std::function<void()>& kernel);
void sync_threads();
uint64_t exchange(uint64_t bits, int lane);

// An array that every block finds full of NaN.
template <class T, int kCount>
class Shared {
 public:
  T (&enter())[kCount] {
    if (serial_ != block_serial) std::memset(data_, 0xFF, sizeof data_);
    serial_ = block_serial;
    return data_;
  }

 private:
  T data_[kCount];
  int64_t serial_ = -1;
};

}  // namespace bbb_fast::blocks

namespace bbb_fast::cuda {

#define threadIdx ::bbb_fast::blocks::thread_index
#define blockIdx ::bbb_fast::blocks::block_index
#define gridDim ::bbb_fast::blocks::grid_size

inline void __syncthreads() {
  blocks::sync_threads();
}

inline double __shfl_down_sync(unsigned, double x, int offset) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = blocks::exchange(bits, lane + offset < kWarp ? lane + offset : lane);
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

struct DeviceGuard {
  explicit DeviceGuard(c10::Device) {}
};

// A device of three blocks, so that blocks take several chunks, and not all as many.
template <auto kKernel, class... Args>
void launch(int64_t chunks, const Args&... args) {
  if (chunks == 0) return;
  blocks::run(std::min<int64_t>(chunks, 3), [&] { kKernel(args...); });
}

}  // namespace bbb_fast::cuda
