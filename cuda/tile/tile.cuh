// The vocabulary in which jaxkern's kernels are written. Device code only.
//
//   types.cuh      element types, pairs packed in registers
//   reg.cuh        register tiles of a warpgroup, row vectors, maps over them
//   smem.cuh       swizzled shared tiles, register <-> shared
//   tma.cuh        tile copies global <-> shared
//   mma.cuh        products of tiles (wgmma)
//   pipeline.cuh   mbarriers, rings of stages
//   cluster.cuh    blocks that share tiles
//   scheduler.cuh  the order of tiles over a persistent grid
//   four_bit.cuh   values of four bits as pairs of 16-bit ones
//   reduce.cuh     sums and maxima over the threads of a warp and of a row of threads
//   ptx/           one instruction a function; the only place with inline assembly
#pragma once

#include "cuda/tile/cluster.cuh"
#include "cuda/tile/four_bit.cuh"
#include "cuda/tile/mma.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/reduce.cuh"
#include "cuda/tile/reg.cuh"
#include "cuda/tile/scheduler.cuh"
#include "cuda/tile/smem.cuh"
#include "cuda/tile/tma.cuh"
