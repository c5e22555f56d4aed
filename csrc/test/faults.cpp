// What the sanitizers have to report, and what they must not: .ci/sanitizers.py calls these by ctypes.
#include <unistd.h>

#include <cstdint>

extern "C" {

// The element after the last one.
float read_past(const float* values, int64_t count) {
  return values[count];
}

int32_t add_one(int32_t number) {
  return number + 1;
}

int32_t to_integer(float number) {
  return static_cast<int32_t>(number);
}

static int64_t calls = 0;

// Not for two threads at once.
void count_a_call() {
  const int64_t before = calls;
  usleep(100'000);
  calls = before + 1;
}

// Threads of a parallel region that write to one place.
int64_t add_together() {
  int64_t sum = 0;
#pragma omp parallel for num_threads(4)
  for (int i = 0; i < 1000; ++i) sum += i;
  return sum;
}

// And no fault: each has a place of its own, written before the region, in it, and read after it.
int64_t add_apart() {
  int64_t parts[8] = {1, 1, 1, 1, 1, 1, 1, 1};
#pragma omp parallel for num_threads(4)
  for (int i = 0; i < 8; ++i) parts[i] += i;
  int64_t sum = 0;
  for (const int64_t part : parts) sum += part;
  return sum;
}

}  // extern "C"
