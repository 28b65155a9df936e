// The product of a block of rows with the vectors of all sequences.
//
// Rows are the 16 of mma.m16n8k16, sequences its 8 columns; up to 16 are two instructions' columns.
// All warps work on the same rows, or of a large block each half of them on half of the rows:
// slices of 32 columns go round among them, and their sums are added up at the end of the block.
// Lane c of four takes columns 8 c to 8 c + 7 of a slice, of both operands, for the k of two
// instructions: which of the columns is which k does not matter to a sum.
#pragma once

#include <algorithm>

#include "cuda/decode/slices.cuh"
#include "cuda/decode/stream.cuh"

namespace jaxkern::decode {

// By whichever of the functions of slices.cuh.
template <int kStep, class Weight, int kTiles, int kSlices, int kAll, int kBatch, class Taken>
__device__ __forceinline__ void multiply_some(const Vectors<kBatch>& x,
                                              const Reading<Weight, kBatch>& reading, int first,
                                              const char* const (&from)[kSlices],
                                              Accumulators<kBatch, kTiles> (&sum)[kAll],
                                              const Taken& taken) {
  using R = Reading<Weight, kBatch>;
  if constexpr (R::kBlocks) {
    multiply_blocks<Weight, kStep, kTiles>(x, reading, first, from, sum, taken);
  } else if constexpr (R::kScales) {
    multiply_scaled<Weight, kStep, kTiles>(x, reading, first, from, sum, taken);
  } else {
    multiply_slices<Weight, kStep, kTiles>(x, first, from, sum, taken);
  }
}

// Of eight arrivals, those of the i-th of `count` warps that share a chunk: as even as can be.
__device__ __forceinline__ int share_of_arrivals(int count, int i) {
  static_assert(kWarps == 8);
  constexpr uint64_t kQuotients = 0x0101010102020408, kRests = 0x0001020300020000;  // 8 by count
  const int bits = 8 * (count - 1);
  return static_cast<int>(kQuotients >> bits & 15) + (i < static_cast<int>(kRests >> bits & 15));
}

// A block of many rows, of whose chunks no warp has more than a slice: each warp goes from one of
// its own to the next, and leaves no others.
// NOTE: the parity of a stage tells whether a chunk has come only if the one before it there has.
// From one of a warp's chunks to the next there are four at most, and when that has come so have
// all from kUnderWay before it on: there have to be 4 + kUnderWay stages.
template <class Weight, class Division, int kTiles, int kBatch, class Stream, class Slot>
__device__ __forceinline__ void multiply_own(Stream& stream, Slot& slot, const Vectors<kBatch>& x,
                                             const Reading<Weight, kBatch>& reading,
                                             const Chunks& chunks, int slices,
                                             Accumulators<kBatch, kTiles> (&sum)[1]) {
  const int lane = threadIdx.x % tile::kWarpSize;
  const int offset = Division::first_row() * kSliceBytes + 16 * lane;
#pragma unroll 1
  for (int slice = Division::index(); slice < slices; slice += Division::kEach) {
    const int chunk = __umulhi(slice, chunks.magic), at = slice - chunk * chunks.slices;
    const Slot own = {slot.count + chunk};
    own.wait_full(stream.ring);
    const char* const from[] = {stream.chunks[own.stage()] + at * chunks.slice_bytes + offset};
    multiply_some<Division::kEach>(x, reading, slice, from, sum, [&] {
      __syncwarp();
      const int count = min(chunks.slices, slices - chunk * chunks.slices);
      if (lane == 0) {
        stream.ring.empty[own.stage()].arrive(share_of_arrivals(
            count * Division::kHalves, at * Division::kHalves + Division::half()));
      }
    });
  }
  slot.count += __umulhi(slices - 1, chunks.magic) + 1;
}

// A block of fewer rows: all warps go through all chunks.
template <class Weight, class Division, int kTiles, int kSlices, int kBatch, class Stream,
          class Slot>
__device__ __forceinline__ void multiply_all(Stream& stream, Slot& slot, const Vectors<kBatch>& x,
                                             const Reading<Weight, kBatch>& reading,
                                             const Chunks& chunks, int slices,
                                             Accumulators<kBatch, kTiles> (&sum)[kSlices]) {
  constexpr int kEach = Division::kEach;
  const int offset =
      Division::first_row() * kSliceBytes + 16 * static_cast<int>(threadIdx.x % tile::kWarpSize);
  bool ready = slot.is_full(stream.ring);
  for (int first = 0; first < slices; first += chunks.slices, slot.advance()) {
    if (!ready) slot.wait_full(stream.ring);
    const char* chunk = stream.chunks[slot.stage()] + offset;
    const int count = min(chunks.slices, slices - first);
    const auto multiply = [&]<int kCount>(int i) {
      const char* from[kCount];
#pragma unroll
      for (int s = 0; s < kCount; ++s) from[s] = chunk + (i + s * kEach) * chunks.slice_bytes;
      multiply_some<kEach>(x, reading, first + i, from, sum, [] {});
    };
    int i = (Division::index() - first) & (kEach - 1);
    for (; i + (kSlices - 1) * kEach < count; i += kSlices * kEach) {
      multiply.template operator()<kSlices>(i);
    }
    if (kSlices > 1 && i < count) multiply.template operator()<1>(i);
    ready = slot.next().is_full(stream.ring);
    stream.ring.empty[slot.stage()].arrive_warp();
  }
}

template <class Weight, int kTiles, int kBatch, int kMaxRows, class Stream, class Slot>
__device__ __forceinline__ void multiply_tiles(Stream& stream, Slot& slot, const Vectors<kBatch>& x,
                                               const ScaleCode& code, int rows,
                                               const Chunks& chunks, int slices,
                                               Sums<kBatch, kMaxRows>& sums, bool more) {
  using Division = decode::Division<kTiles>;
  // Instructions that wait for none of each other. A block of few rows has few: after a dependency
  // it lies in the ring already, and its products are what others wait for.
  constexpr int kSlices = kTiles <= 2 ? 2 : 1;
  Accumulators<kBatch, Division::kOwn> sum[kSlices] = {};
  const Reading<Weight, kBatch> reading(code, rows, Division::first_row());
  // More than 64 rows: a chunk has two to four slices.
  if constexpr (kTiles > 4 && Stream::kStages >= 4 + Stream::kUnderWay) {
    multiply_own<Weight, Division>(stream, slot, x, reading, chunks, slices, sum);
  } else {
    multiply_all<Weight, Division>(stream, slot, x, reading, chunks, slices, sum);
  }
  if constexpr (Reading<Weight, kBatch>::kBlocks) add_blocks(sum);
  put<kTiles>(sum, sums, more);
}

// What registers multiply of a block of up to kOctets times 8 rows: a warp's slices of bfloat16.
template <int kOctets, int kSlices>
struct HeldOperands {
  static constexpr int kTiles = (kOctets + 1) / 2;
  uint4 data[kSlices][kOctets];

  template <int kBatch, int kMaxRows>
  __device__ __forceinline__ void multiply(const Vectors<kBatch>& x, const Rows& rows, int block,
                                           Sums<kBatch, kMaxRows>& sums) const {
    const int warp = threadIdx.x / tile::kWarpSize;
    const int slices = rows.units(block) > 0 ? rows.K / kSlice : 0;
    Accumulators<kBatch, kTiles> sum[2] = {};
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
#pragma unroll
      for (int n = 0; n < kSequenceTiles<kBatch>; ++n) {
        const uint4 b = x.operand(min(warp * kSlices + i, max(slices - 1, 0)), n);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 low = data[i][2 * t];
          const uint4 high = 2 * t + 1 < kOctets ? data[i][2 * t + 1] : uint4{};
          tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(sum[0][t][n], low.x, high.x, low.y,
                                                                 high.y, b.x, b.y);
          tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(sum[1][t][n], low.z, high.z, low.w,
                                                                 high.w, b.z, b.w);
        }
      }
    }
    put<kTiles>(sum, sums, false);
  }
};

// Weights of a block of up to kOctets times 8 rows, taken from the ring before the vectors are
// there: registers hold them while others come in their place.
template <class Weight, int kOctets, int kSlices>  // slices of bfloat16 of a warp
struct HeldWeights {
  using W = Weights<Weight>;
  static constexpr int kParts = W::kParts, kTaken = kSlices / kParts, kScaleBytes = W::kScaleBytes;
  static constexpr int kSliceBytesMost = slice_bytes(8 * kOctets, kScaleBytes);
  // Whether they are held as they came: those of four bits, which leave attention its registers.
  static constexpr bool kPacked = kScaleBytes > 0;
  static_assert(kSlices % kParts == 0);
  uint4 weights[kPacked ? kTaken : kSlices][kOctets];
  typename W::Scales scales[kTaken][kOctets];

  // `part`: columns of vectors that shared memory has room for.
  static bool fit(const Rows& rows, int part) {
    return rows.unit_rows == 1 && rows.most <= 8 * kOctets &&
           rows.K <= std::min(part, kSlices * kWarps * kSlice);
  }

  // A warp takes slices that lie together, so it waits for two chunks at most, and leaves the
  // others at once. That is so before they are there: the ring has room for all of them.
  template <class Stream, class Slot>
  __device__ __forceinline__ void take(Stream& stream, Slot& slot, const Rows& rows, int block) {
    constexpr int kChunkSlices = Stream::kChunkBytes / kSliceBytesMost;  // or more
    static_assert(kChunkSlices >= kTaken && kTaken * kWarps <= kChunkSlices * Stream::kStages);
    const int lane = threadIdx.x % tile::kWarpSize;
    const int units = rows.units(block);
    const int slices = units > 0 ? rows.K / W::kColumns : 0;
    const auto [at_once, chunks, magic, bytes] = rows.chunks_of(block);
    const int begin = warp() * kTaken, count = min(kTaken, slices - begin);
    const int chunk = __umulhi(begin, magic);  // the warp's first
    const int beyond = (chunk + 1) * at_once;  // the slice that the next one begins at
    const bool both = count > 0 && begin + count > beyond;
    const Slot one = {slot.count + chunk}, next = one.next();
    if (count > 0) one.wait_full(stream.ring);
    if (both) next.wait_full(stream.ring);
    // Slice i of the warp.
    const char* in_one = stream.chunks[one.stage()] + (begin - beyond + at_once) * bytes;
    const char* in_next = stream.chunks[next.stage()] + (begin - beyond) * bytes;
#pragma unroll
    for (int i = 0; i < kTaken; ++i) {
      const char* from = (begin + i < beyond ? in_one : in_next) + i * bytes;
      const char* from_scales = from + units * kSliceBytes + lane / 4 * kScaleBytes;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        uint4 raw = {};  // or the compiler keeps what there was in the last layer
        if (i < count) {
          raw = *reinterpret_cast<const uint4*>(from + 8 * o * kSliceBytes + 16 * lane);
        }
        if constexpr (kPacked) {
          weights[i][o] = raw;
          scales[i][o] = {};
          if (i < count) {
            scales[i][o] = *reinterpret_cast<const uint2*>(from_scales + 8 * o * kScaleBytes);
          }
        } else {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            uint4& operand = weights[i * kParts + part][o];
            operand = W::unpack(raw, part);
            // Or they are unpacked when the vectors are there, which others wait for.
            if (kParts > 1) tile::ptx::work_out_here(operand);
          }
        }
      }
    }
    __syncwarp();
    if (lane < chunks) {
      stream.ring.empty[Slot{slot.count + lane}.stage()].arrive();
    }
    slot.count += chunks;
  }

  // As they are multiplied; to be called before the vectors are there, which others wait for.
  __device__ __forceinline__ HeldOperands<kOctets, kSlices> operands(const ScaleCode& code) const {
    HeldOperands<kOctets, kSlices> operands;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        uint4& operand = operands.data[i][o];
        if constexpr (kPacked) {
          const int part = i % kParts;
          operand = W::unpack(weights[i / kParts][o], part, W::bits_of(scales[i / kParts][o], part),
                              code);
          tile::ptx::work_out_here(operand);
        } else {
          operand = weights[i][o];
        }
      }
    }
    return operands;
  }

 private:
  __device__ __forceinline__ static int warp() { return threadIdx.x / tile::kWarpSize; }
};

// Into sums, once the consumers have synchronised; `more`: to what is there.
template <class Weight, int kBatch, int kMaxRows, class Stream, class Slot>
__device__ __forceinline__ void multiply(Stream& stream, Slot& slot, const Vectors<kBatch>& x,
                                         const ScaleCode& code, const Rows& rows, int block,
                                         int slices, Sums<kBatch, kMaxRows>& sums, bool more) {
  const int count = rows.units(block) * rows.unit_rows;
  const auto tiles = [&]<int kTiles>() {
    multiply_tiles<Weight, kTiles>(stream, slot, x, code, count, rows.chunks_of(block), slices,
                                   sums, more);
  };
  if (count == 0) return;
  // Other numbers of tiles take the next one's code, and multiply what lies behind their rows.
  constexpr bool kLarge = Stream::kMaxRows > 128;
  if (count <= 16) {
    tiles.template operator()<1>();
  } else if (count <= 32) {
    tiles.template operator()<2>();
  } else if (count <= 64) {
    tiles.template operator()<4>();
  } else if (kLarge && count <= 112) {
    tiles.template operator()<7>();
  } else {
    tiles.template operator()<kLarge ? 9 : 8>();
  }
}

}  // namespace jaxkern::decode
