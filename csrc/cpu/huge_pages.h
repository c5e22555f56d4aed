// Fresh memory of some megabytes costs a page fault every 4 KiB when it is first written: for an elementwise
// pass, as much as the pass itself. Linux maps 2 MiB at a fault where it is asked to.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace bbb_fast {

// Asks for huge pages behind a tensor that is about to be written as a whole. Only a hint: nothing depends on
// the answer, and memory that is mapped already stays as it is.
inline void hint_huge_pages(const at::Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (!t.device().is_cpu() || t.nbytes() < 2 * kPage) return;
  const auto data = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + t.nbytes()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace bbb_fast
