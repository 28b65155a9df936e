// Weights and keys and values on their way through shared memory: a ring of chunks that one thread
// fills without ever waiting for what blocks send each other.
//
// NOTE: copies under way share the bandwidth, and would complete together if all free stages were
// under way; then all consumers starve at once after each dependency. A few at a time complete one
// after the other, and the rest of the ring holds what has come (H200, docs/decode.md). Weights of
// four bits have one less under way: of them a step waits for what blocks send each other, and that
// comes the same way.
#pragma once

#include "cuda/decode/rows.h"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/copy.cuh"

namespace jaxkern::decode {

template <int kStages_, int kHeadDim, int kScaleBytes>
struct Stream {
  static constexpr int kStages = kStages_, kMaxRows = max_rows(kHeadDim);
  static constexpr int kChunkBytes = chunk_bytes(kHeadDim, kScaleBytes);
  static constexpr int kUnderWay = kScaleBytes > 0 ? 2 : 3;  // chunks
  alignas(128) char chunks[kStages][kChunkBytes];
  // Read, and not used, where a chunk's last tiles are not full.
  char beyond[slice_bytes(64, kScaleBytes)];
  tile::Ring<kStages> ring;
};

template <class Stream>
class Producer {
  using Slot = tile::Slot<Stream::kStages>;

 public:
  __device__ __forceinline__ explicit Producer(Stream& stream)
      : stream_(stream), policy_(tile::ptx::evict_first_policy()) {}

  // The next stage, once it is free, for copies of `bytes` in all.
  __device__ __forceinline__ void begin(int bytes) {
    if (slot_.count >= Stream::kUnderWay) {
      Slot{slot_.count - Stream::kUnderWay}.wait_full(stream_.ring);
    }
    slot_.wait_empty(stream_.ring);
    stream_.ring.full[slot_.stage()].arrive_expect(bytes);
  }
  __device__ __forceinline__ void copy(int at, const void* from, int bytes) {
    tile::ptx::bulk_load_by(policy_, stream_.chunks[slot_.stage()] + at, from, bytes,
                            &stream_.ring.full[slot_.stage()].word);
  }
  __device__ __forceinline__ void end() { slot_.advance(); }

  // Until nothing is under way.
  __device__ __forceinline__ void drain() const {
    for (int i = min(slot_.count, Stream::kUnderWay); i > 0; --i) {
      Slot{slot_.count - i}.wait_full(stream_.ring);
    }
  }

  // Slices of a block of rows, one after the other.
  __device__ __forceinline__ void load(const char* from, int slices, const Chunks& chunks) {
    for (int k = 0; k < slices; k += chunks.slices) {
      const int bytes = min(chunks.slices, slices - k) * chunks.slice_bytes;
      begin(bytes);
      copy(0, from + int64_t{k} * chunks.slice_bytes, bytes);
      end();
    }
  }

 private:
  Stream& stream_;
  Slot slot_;
  uint64_t policy_;
};

}  // namespace jaxkern::decode
