// How kernels go over tensors: dense memory in chunks, a chunk in vectors of 16 bytes.
//
// A block takes a chunk of kChunk elements at a time, its threads vectors of it, neighbours next to each
// other. What a chunk holds does not depend on the grid, so neither do the sums over it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>
#include <vector>

#include "../gaussian_double.h"
#include "../scalar.h"
#include "platform.h"

namespace bbb_fast::cuda {

// The mathematics of float and double under one name.
using f64::softplus;
using f64::softplus_derivative;
using scalar::softplus;
using scalar::softplus_derivative;

constexpr int kChunk = 4096;

// The type the mathematics runs in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements a thread takes at once: 16 bytes of the widest operand, and whole noise blocks.
template <class... T>
constexpr int kVector = std::max<int>(4, 16 / std::max({sizeof(T)...}));

template <class T, int N>
struct alignas(std::min<size_t>(16, sizeof(T) * N)) Pack {
  T x[N];

  BBB_INLINE Wide<T> wide(int j) const { return static_cast<Wide<T>>(x[j]); }
};

// Whether vectors of N elements can start at this address.
template <int N, class T>
BBB_INLINE bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, N>) == 0;
}

// One store of 8 bytes, or as many of 16 as it takes: left to itself, the compiler stores members one by one.
// No memory is clobbered as far as it knows, so that it may move later loads, of other elements, ahead.
template <class T, int N>
BBB_DEVICE void store(Pack<T, N>* to, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
  uint32_t w[sizeof pack / 4];
  memcpy(w, &pack, sizeof pack);
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (sizeof pack == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(address), "r"(w[0]), "r"(w[1]));
  } else {
#pragma unroll
    for (size_t i = 0; i < sizeof pack / 4; i += 4) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(address + 4 * i), "r"(w[i]), "r"(w[i + 1]), "r"(w[i + 2]), "r"(w[i + 3]));
    }
  }
#else
  *to = pack;
#endif
}

// Reads N elements, or `left` of them padded with zeros. kWhole promises N aligned ones. They are widened
// where they are used: until then a vector of bfloat16 takes half the registers.
template <bool kWhole, int N, class T>
BBB_DEVICE void read(const T* data, int left, Pack<T, N>& pack) {
  if constexpr (kWhole) {
    BBB_EXPECT(is_aligned<N>(data));
    pack = *reinterpret_cast<const Pack<T, N>*>(data);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) pack.x[j] = j < left ? data[j] : static_cast<T>(0.0f);
  }
}

template <bool kWhole, int N, class T>
BBB_DEVICE void write(T* data, int left, const Wide<T> (&x)[N]) {
  if constexpr (kWhole) {
    BBB_EXPECT(is_aligned<N>(data));
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.x[j] = static_cast<T>(x[j]);
    store(reinterpret_cast<Pack<T, N>*>(data), pack);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < left) data[j] = static_cast<T>(x[j]);
    }
  }
}

// The noise of one tensor. rng lies on the device and is read there: nothing waits for the host.
struct Noise {
  scalar::PhiloxKey key;
  uint64_t stream;

  Noise() = default;
  BBB_DEVICE Noise(const int64_t* rng, uint64_t tensor)
      : key(scalar::philox_key(static_cast<uint64_t>(rng[0]))),
        stream(static_cast<uint64_t>(rng[1]) + tensor) {}

  // Elements at ... at + N - 1 of the chunk that begins with element begin; at is a multiple of 4. Normal
  // numbers, or the generator's words.
  template <int N, class T>
  BBB_DEVICE void fill(int64_t begin, unsigned at, T (&z)[N]) const {
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      // begin is a multiple of kChunk, so nothing carries.
      const uint64_t number = static_cast<uint64_t>(begin) / 4 | (at + j) / 4;
      std::conditional_t<std::is_same_v<T, uint32_t>, uint32_t, float> block[4];
      if constexpr (std::is_same_v<T, uint32_t>) {
        scalar::philox_block(key, number, stream, block);
      } else {
        scalar::noise_block(key, number, stream, block);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) z[j + i] = block[i];
    }
  }
};

// Entries (a tensor and what belongs to it) of one launch, which takes chunks of all of them in turn. As
// many as fit the 4 KiB that every CUDA version passes to a kernel.
template <class Entry>
constexpr int kTableCapacity = static_cast<int>(3584 / (sizeof(Entry) + sizeof(int64_t)));

template <class Entry, int kCapacity = kTableCapacity<Entry>>
struct Table {
  int count = 0;
  int64_t first_chunk[kCapacity + 1] = {0};
  Entry entries[kCapacity];

  bool full() const { return count == kCapacity; }
  int64_t chunks() const { return first_chunk[count]; }
  void add(const Entry& entry) {
    entries[count] = entry;
    first_chunk[count + 1] = first_chunk[count] + (entry.numel + kChunk - 1) / kChunk;
    ++count;
  }
};

// Calls run(table, chunks before it) for as many tables as the entries need, usually one.
template <class Entry, class Run>
void for_each_table(const std::vector<Entry>& entries, const Run& run) {
  Table<Entry> table;
  int64_t before = 0;
  for (const Entry& entry : entries) {
    if (table.full()) {
      run(table, before);
      before += table.chunks();
      table = {};
    }
    table.add(entry);
  }
  run(table, before);
}

template <class Entry>
int64_t chunk_count(const std::vector<Entry>& entries) {
  int64_t chunks = 0;
  for (const Entry& entry : entries) chunks += (entry.numel + kChunk - 1) / kChunk;
  return chunks;
}

// Calls body(entry, chunk, first element of the chunk, elements in it) for every chunk that falls to this
// block.
template <class Entry, int kCapacity, class Body>
BBB_DEVICE void for_each_chunk(const Table<Entry, kCapacity>& table, const Body& body) {
  int k = 0;
  for (int64_t chunk = blockIdx.x; chunk < table.first_chunk[table.count]; chunk += gridDim.x) {
    if constexpr (kCapacity > 1) {
      while (chunk >= table.first_chunk[k + 1]) ++k;
    }
    const auto& entry = table.entries[k];
    const int64_t begin = (chunk - table.first_chunk[k]) * kChunk;
    const int64_t left = entry.numel - begin;
    body(entry, chunk, begin, left < kChunk ? static_cast<int>(left) : kChunk);
  }
}

// This thread's vectors of a chunk of `count` elements: load(whole, at, left, operands), then use(...) with
// the same arguments. at is the vector's first element, counted in the chunk, left how many the chunk has
// from there, whole is std::true_type where vectors are whole and aligned. Loads of a second vector are
// under way before the first is used, where registers allow: while some threads compute, the others' loads
// shall keep the memory busy.
template <int N, class Operands, class Load, class Use>
BBB_DEVICE void for_each_vector(bool aligned, int count, const Load& load, const Use& use) {
  constexpr int kStep = kThreads * N;
  constexpr int kUnderWay = sizeof(Operands) <= (N == 4 ? 48 : 32) ? 2 : 1;
  const unsigned first = threadIdx.x * N;
  if (aligned && count == kChunk) {
#pragma unroll 1
    for (unsigned at = first; at < kChunk; at += kUnderWay * kStep) {
      Operands operands[kUnderWay];
#pragma unroll
      for (int k = 0; k < kUnderWay; ++k) load(std::true_type{}, at + k * kStep, N, operands[k]);
#pragma unroll
      for (int k = 0; k < kUnderWay; ++k) use(std::true_type{}, at + k * kStep, N, operands[k]);
    }
  } else {
#pragma unroll 1
    for (unsigned at = first; at < static_cast<unsigned>(count); at += kStep) {
      Operands operands;
      load(std::false_type{}, at, count - static_cast<int>(at), operands);
      use(std::false_type{}, at, count - static_cast<int>(at), operands);
    }
  }
}

}  // namespace bbb_fast::cuda
