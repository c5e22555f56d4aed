/* Linked into a wheel that is built on a newer C library than glibc 2.28, so that it runs with that one.

   glibc 2.29 gave exp, log and pow new versions, which set errno in another way, and 2.32 a variable that lets
   libstdc++ count references without atomics while there is one thread. A library that was linked with these
   asks for them by version and does not load without. Hidden definitions of its own come first. */

#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLDEST "GLIBC_2.17"
#endif

#define HIDDEN __attribute__((visibility("hidden")))

double old_exp(double);
double old_log(double);
double old_pow(double, double);
__asm__(".symver old_exp, exp@" OLDEST);
__asm__(".symver old_log, log@" OLDEST);
__asm__(".symver old_pow, pow@" OLDEST);

HIDDEN double exp(double x) { return old_exp(x); }
HIDDEN double log(double x) { return old_log(x); }
HIDDEN double pow(double x, double y) { return old_pow(x, y); }

HIDDEN char __libc_single_threaded = 0;
