// Two numbers worked on in turn, every operation on both: the formulas of gaussian.h, written for one F, then
// give the CPU independent instructions to run while a chain of dependent ones waits. (One vector after
// another does not: a chain of 40 instructions fills the CPU's list of waiting instructions.)
// Text without include guard, like simd.h.

template <class T>
struct Pair {
  T a, b;
};

template <class T>
struct Lanes<Pair<T>> {
  using Int = Pair<typename Lanes<T>::Int>;
};

#define BBB_PAIRWISE(op)                                                   \
  template <class T>                                                       \
  BBB_INLINE Pair<T> operator op(const Pair<T>& x, const Pair<T>& y) {     \
    return {x.a op y.a, x.b op y.b};                                       \
  }                                                                        \
  template <class T, class Number>                                         \
  BBB_INLINE PairWith<T, Number> operator op(const Pair<T>& x, Number y) { \
    return {x.a op y, x.b op y};                                           \
  }
template <class T, class Number>
using PairWith = std::enable_if_t<std::is_arithmetic_v<Number>, Pair<T>>;
BBB_PAIRWISE(+)
BBB_PAIRWISE(-)
BBB_PAIRWISE(*)
BBB_PAIRWISE(&)
BBB_PAIRWISE(^)
BBB_PAIRWISE(<<)
#undef BBB_PAIRWISE

template <class T>
BBB_INLINE Pair<T>& operator+=(Pair<T>& x, const Pair<T>& y) {
  return x = x + y;
}
template <class T>
BBB_INLINE auto operator<(const Pair<T>& x, float y) -> Pair<decltype(x.a < y)> {
  return {x.a < y, x.b < y};
}
template <class T>
BBB_INLINE auto operator==(const Pair<T>& x, float y) -> Pair<decltype(x.a == y)> {
  return {x.a == y, x.b == y};
}
template <class T>
BBB_INLINE auto operator>(const Pair<T>& x, float y) -> Pair<decltype(x.a > y)> {
  return {x.a > y, x.b > y};
}

#define BBB_PAIRWISE(function)                                                  \
  template <class T>                                                            \
  BBB_INLINE auto function(const Pair<T>& x) -> Pair<decltype(function(x.a))> { \
    return {function(x.a), function(x.b)};                                      \
  }
BBB_PAIRWISE(as_int)
BBB_PAIRWISE(as_float)
BBB_PAIRWISE(as_signed)
BBB_PAIRWISE(to_float)
BBB_PAIRWISE(square_root)
BBB_PAIRWISE(square_root_normal)
BBB_PAIRWISE(reciprocal)
BBB_PAIRWISE(reciprocal_root)
BBB_PAIRWISE(negative_abs)
#undef BBB_PAIRWISE

template <class T>
BBB_INLINE Pair<T> at_least(const Pair<T>& x, float least) {
  return {at_least(x.a, least), at_least(x.b, least)};
}
template <class T>
BBB_INLINE Pair<T> times_power_of_2(const Pair<T>& p, const Pair<T>& n, const Pair<T>& shifted) {
  return {times_power_of_2(p.a, n.a, shifted.a), times_power_of_2(p.b, n.b, shifted.b)};
}
template <class Mask, class T>
BBB_INLINE Pair<T> select(const Pair<Mask>& mask, const Pair<T>& x, const Pair<T>& y) {
  return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)};
}
