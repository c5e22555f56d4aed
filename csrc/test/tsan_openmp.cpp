// Linked into the extension in the place of libgomp's GOMP_parallel (-Wl,--wrap) where it is built with
// ThreadSanitizer. libgomp is not, and its threads meet past what ThreadSanitizer watches: here it is told
// that a parallel region comes after what was before it, and before what follows. Of the region's threads
// among each other it is told nothing.
#include <sanitizer/tsan_interface.h>

namespace {

struct Region {
  void (*body)(void*);
  void* data;
  char begun, ended;
};

void run(void* p) {
  auto* const region = static_cast<Region*>(p);
  __tsan_acquire(&region->begun);
  region->body(region->data);
  __tsan_release(&region->ended);
}

}  // namespace

extern "C" {

void __real_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  Region region{body, data, 0, 0};
  __tsan_release(&region.begun);
  __real_GOMP_parallel(run, &region, threads, flags);
  __tsan_acquire(&region.ended);
}

}  // extern "C"
