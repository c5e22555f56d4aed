// The noise of each of several draws, for the kernels that go over them. Text without include guard.

// Calls run(its noise, k) for each draw k. Where kOne says that there is one, its key is formed outside of
// the caller's loop.
template <bool kOne>
struct NoiseOfDraws {
  const std::vector<SeedStream>& draws;
  const Noise first;

  explicit NoiseOfDraws(const std::vector<SeedStream>& draws_)
      : draws(draws_), first(draws.empty() ? 0 : draws[0].seed, draws.empty() ? 0 : draws[0].stream) {}

  template <class Run>
  BBB_INLINE void for_each(const Run& run) const {
    if constexpr (kOne) {
      run(first, 0);
    } else {
      for (size_t k = 0; k < draws.size(); ++k) run(Noise(draws[k].seed, draws[k].stream), k);
    }
  }
};
