// What dropout and uniform noise make of the generator's words: the same bits on every backend.
//
// Text without include guard, like philox.h: Uint is a 32-bit word or a vector of them.

// A number in (0, 1), exact where the type has one binary digit more than bits.
template <class Uint>
BBB_INLINE auto uniform_of(Uint word, int bits) {
  return (to_float(as_signed(word >> (32 - bits))) + 0.5f) * (1.0f / static_cast<float>(1 << bits));
}

// What an element is multiplied by.
template <class Uint, class F>
BBB_INLINE F dropout_factor(Uint word, uint32_t least, F scale) {
  return word >= least ? scale : F{};
}
