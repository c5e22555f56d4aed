// A failed check prints its line and makes the program, whose main returns report(), exit with 1.
#pragma once

#include <cstdio>

inline int failures = 0;

#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                         \
    }                                                                     \
  } while (false)

inline int report() {
  std::printf(failures == 0 ? "all tests passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
