// What a kernel needs of its machine, and how it is launched. Under BBB_KERNELS_ON_CPU the same kernels
// compile as C++ and run on the CPU, block by block (../test/blocks.h): that is how they are tested where
// there is no GPU.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "../macros.h"

namespace bbb_fast::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

}  // namespace bbb_fast::cuda

#ifdef BBB_KERNELS_ON_CPU

#include "../test/blocks.h"

#else

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define BBB_DEVICE __device__ __forceinline__
#define BBB_EXPECT(condition)
#define BBB_SHARED(type, name, count) __shared__ type name[count]
#define BBB_DISPATCH_KEY CUDA

namespace bbb_fast::cuda {

using DeviceGuard = c10::cuda::CUDAGuard;

// Blocks of a kernel that the current device holds at once; asked for once a device.
template <auto kKernel>
int resident_blocks() {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<int>, kMaxDevices> known{};
  const int device = c10::cuda::current_device();
  if (device < kMaxDevices && known[device] != 0) return known[device];
  int multiprocessors = 0, blocks = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const auto status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    TORCH_CHECK(
        false, "bbb_fast was built for the GPU architectures ", BBB_STRING(BBB_FAST_CUDA_ARCHS),
        " and cuda:", device, " has ", major, ".", minor, "; reinstall with TORCH_CUDA_ARCH_LIST=", major,
        ".", minor, " or use bbb_fast.set_backend('reference')");
  }
  C10_CUDA_CHECK(status);
  const int resident = std::max(1, multiprocessors * blocks);
  if (device < kMaxDevices) known[device] = resident;
  return resident;
}

// Starts a grid-stride kernel over `chunks` pieces of work: no more blocks than the device holds at once.
template <auto kKernel, class... Args>
void launch(int64_t chunks, const Args&... args) {
  if (chunks == 0) return;
  const auto blocks = std::min<int64_t>(chunks, resident_blocks<kKernel>());
  // clang-format off
  kKernel<<<static_cast<unsigned>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(args...);
  // clang-format on
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace bbb_fast::cuda

#endif
