// How kernels go over tensors: dense memory in chunks, a chunk in vectors of 16 bytes.
//
// A block takes a chunk of kChunk elements at a time, a thread kSteps vectors of it, neighbours next to each
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
};

// Whether vectors of N elements can start at this address.
template <int N, class T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack<T, N>) == 0;
}

// Reads N elements, or `left` of them padded with zeros. kWhole promises N aligned ones.
template <bool kWhole, int N, class T>
BBB_DEVICE void read(const T* data, int64_t left, Wide<T> (&x)[N]) {
  if constexpr (kWhole) {
    const auto pack = *reinterpret_cast<const Pack<T, N>*>(data);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = static_cast<Wide<T>>(pack.x[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = j < left ? static_cast<Wide<T>>(data[j]) : Wide<T>{};
  }
}

template <bool kWhole, int N, class T>
BBB_DEVICE void write(T* data, int64_t left, const Wide<T> (&x)[N]) {
  if constexpr (kWhole) {
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.x[j] = static_cast<T>(x[j]);
    *reinterpret_cast<Pack<T, N>*>(data) = pack;
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

  // Elements index ... index + N - 1; index is a multiple of 4.
  template <int N, class T>
  BBB_DEVICE void fill(int64_t index, T (&z)[N]) const {
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      float block[4];
      scalar::noise_block(key, static_cast<uint64_t>(index + j) / 4, stream, block);
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

  bool full() const {
    return count == kCapacity;
  }
  int64_t chunks() const {
    return first_chunk[count];
  }
  void add(const Entry& entry) {
    entries[count] = entry;
    first_chunk[count + 1] = first_chunk[count] + (entry.numel + kChunk - 1) / kChunk;
    ++count;
  }
};

// The table of an op that works on one tensor.
template <class Entry>
Table<Entry, 1> table_of(const Entry& entry) {
  Table<Entry, 1> table;
  table.add(entry);
  return table;
}

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

// Calls body(entry, chunk, first element of the chunk) for every chunk that falls to this block.
template <class Entry, int kCapacity, class Body>
BBB_DEVICE void for_each_chunk(const Table<Entry, kCapacity>& table, const Body& body) {
  int k = 0;
  for (int64_t chunk = blockIdx.x; chunk < table.first_chunk[table.count]; chunk += gridDim.x) {
    if constexpr (kCapacity > 1) {
      while (chunk >= table.first_chunk[k + 1]) ++k;
    }
    body(table.entries[k], chunk, (chunk - table.first_chunk[k]) * kChunk);
  }
}

// This thread's vectors of a chunk: load(whole, index, left, operands), then use(...) with the same
// arguments. index is the vector's first element, left how many the tensor has from there, whole is
// std::true_type where vectors are whole and aligned. Several loads are under way before the first use.
template <int N, class Operands, class Load, class Use>
BBB_DEVICE void for_each_vector(
    bool aligned, int64_t numel, int64_t begin, const Load& load, const Use& use) {
  constexpr int kStep = kThreads * N;
  constexpr int kUnderWay = 8 / N;
  const int64_t first = begin + static_cast<int>(threadIdx.x) * N;
  if (aligned && numel - begin >= kChunk) {
#pragma unroll 1
    for (int i = 0; i < kChunk; i += kUnderWay * kStep) {
      Operands operands[kUnderWay];
#pragma unroll
      for (int k = 0; k < kUnderWay; ++k) load(std::true_type{}, first + i + k * kStep, N, operands[k]);
#pragma unroll
      for (int k = 0; k < kUnderWay; ++k) use(std::true_type{}, first + i + k * kStep, N, operands[k]);
    }
  } else {
#pragma unroll 1
    for (int64_t i = first; i < std::min(begin + kChunk, numel); i += kStep) {
      Operands operands;
      load(std::false_type{}, i, numel - i, operands);
      use(std::false_type{}, i, numel - i, operands);
    }
  }
}

}  // namespace bbb_fast::cuda
