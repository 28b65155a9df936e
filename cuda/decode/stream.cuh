// Weights and keys and values on their way through shared memory: a ring of chunks that one thread
// fills without ever waiting for what blocks send each other.
//
// NOTE: copies under way share the bandwidth, and would complete together if all free stages were
// under way; then all consumers starve at once after each dependency. A few at a time complete one
// after the other, and the rest of the ring holds what has come (H200, docs/decode.md).
#pragma once

#include "cuda/decode/rows.h"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/copy.cuh"

namespace jaxkern::decode {

inline constexpr int kChunkBytes = 16 << 10;    // shorter copies are slower
inline constexpr int kUnderWay = 3;             // chunks
inline constexpr int kSliceBytes = kSlice * 2;  // of one row

// Slices of a block of so many rows that one chunk holds.
__device__ __forceinline__ int slices_of_chunk(int rows) {
  return kChunkBytes / (rows * kSliceBytes);
}

template <int kStages>
struct Stream {
  alignas(128) char chunks[kStages][kChunkBytes];
  char beyond[16 * kSliceBytes];  // read, and not used, where a chunk's last tile is not full
  tile::Ring<kStages> ring;
};

template <int kStages>
class Producer {
 public:
  __device__ __forceinline__ explicit Producer(Stream<kStages>& stream)
      : stream_(stream), policy_(tile::ptx::evict_first_policy()) {}

  // The next stage, once it is free, for copies of `bytes` in all.
  __device__ __forceinline__ void begin(int bytes) {
    if (slot_.count >= kUnderWay) {
      tile::Slot<kStages>{slot_.count - kUnderWay}.wait_full(stream_.ring);
    }
    slot_.wait_empty(stream_.ring);
    stream_.ring.full[slot_.stage()].arrive_expect(bytes);
  }
  __device__ __forceinline__ void copy(int at, const void* from, int bytes) {
    tile::ptx::bulk_load_by(policy_, stream_.chunks[slot_.stage()] + at, from, bytes,
                            &stream_.ring.full[slot_.stage()].word);
  }
  __device__ __forceinline__ void end() { slot_.advance(); }

  // Slices of a block of rows, one after the other.
  __device__ __forceinline__ void load(const char* from, int rows, int slices) {
    if (rows == 0) return;
    const int at_once = slices_of_chunk(rows);
    for (int k = 0; k < slices; k += at_once) {
      const int bytes = min(at_once, slices - k) * rows * kSliceBytes;
      begin(bytes);
      copy(0, from + int64_t{k} * rows * kSliceBytes, bytes);
      end();
    }
  }

 private:
  Stream<kStages>& stream_;
  tile::Slot<kStages> slot_;
  uint64_t policy_;
};

}  // namespace jaxkern::decode
