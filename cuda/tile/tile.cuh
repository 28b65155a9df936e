// The vocabulary in which jaxkern's kernels are written. Device code only.
//
//   types.cuh      element types, pairs packed in registers
//   reg.cuh        register tiles of a warpgroup, row vectors, maps over them
//   smem.cuh       swizzled shared tiles, register -> shared
//   tma.cuh        tile copies global <-> shared
//   mma.cuh        products of tiles (wgmma)
//   pipeline.cuh   mbarriers, rings of stages
//   cluster.cuh    clusters of blocks: their barriers and copies between them
//   scheduler.cuh  the order of tiles over a persistent grid
//   ptx/           one instruction a function; the only place with inline assembly
#pragma once

#include "cuda/tile/cluster.cuh"
#include "cuda/tile/mma.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/reg.cuh"
#include "cuda/tile/scheduler.cuh"
#include "cuda/tile/smem.cuh"
#include "cuda/tile/tma.cuh"
