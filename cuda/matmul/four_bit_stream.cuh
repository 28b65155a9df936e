// How products with weights of four bits and few rows of x (tokens) read both: panels of 128
// columns of some strips of weights, and of all tokens, go through a ring of stages.
//
// A strip is 16 rows of weights with all their columns; a tile of out^T is some strips by all
// tokens. Persistent blocks go from tile to tile and keep on reading. Or two blocks in a cluster
// have one tile: strips of their own, and strips between these that they share, each for half of K.
// How many strips a block has, and panels a stage, are parameters. Where little is read, what is
// not reading shows. So weights of the first stage go from memory to registers, without a barrier
// or a place in the ring, and the next are on their way before the barriers of all else are there.
// And of copies there are only some on their way at once: with all of a ring requested at the start
// its stages arrive together, and until then nobody works.
#pragma once

#include "cuda/matmul/four_bit.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

// kClusters: whether blocks can share strips.
template <bool kClusters>
struct FourBitStream {
  static constexpr int kMaxStages = 16;

  struct Params {
    CUtensorMap x;  // (B * M, K); boxes: 64 columns of tokens, x_box of them
    CUtensorMap w;  // (B * strips, panels, bytes of a tile); boxes: a stage, strips of its own
    CUtensorMap w_shared;  // boxes: a stage, of shared strips
    FourBitWeight weight;
    int x_box;
    int strips, panels;       // of a stage
    int own, shared;          // of its strips, of which own ones come first; shared: in clusters
    int stages, stage_bytes;  // of the ring
    int ahead;                // stages on their way at once
    int x_bytes;              // of 64 columns; weights come after all tokens of a stage
    int w_place;              // where they begin in a stage
    int own_bytes, shared_bytes;
    int tile_bytes;  // of weights
    int B, M, N, K;
    int tiles, tile_strips;  // of a matrix, and how many strips each has
    int steps;               // stages of a tile, all of K
  };

  // A place in the ring.
  struct Slot {
    int stage = 0, bytes = 0;  // from the first stage
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(const Params& p) {
      ++stage, bytes += p.stage_bytes;
      if (stage == p.stages) stage = 0, bytes = 0, parity ^= 1;
    }
  };
  // Stages of a tile, from the first to before the end.
  struct Range {
    int begin, end;

    __device__ __forceinline__ bool has(int step) const { return begin <= step && step < end; }
  };
  struct Place {
    int split;        // of a cluster
    int first, step;  // its tiles are the first and those that follow in steps
    Range all;        // of each that it works on
    Range shared;     // for shared strips

    __device__ __forceinline__ explicit Place(const Params& p)
        : split(0), first(blockIdx.x), step(gridDim.x), all{0, p.steps}, shared{0, 0} {
      if constexpr (kClusters) {
        if (p.shared == 0) return;
        split = blockIdx.x % 2, first /= 2, step /= 2;
        const int half = p.steps >> 1;
        shared = split == 0 ? Range{0, half} : Range{half, p.steps};
        if (p.own == 0) all = shared;
      }
    }
  };
  struct Work {
    int batch;
    int own, shared;  // where these strips begin in a matrix

    __device__ __forceinline__ Work(const Params& p, const Place& place, int index)
        : batch(p.B > 1 ? index / p.tiles : 0) {
      own = shared = (index - batch * p.tiles) * p.tile_strips;
      if constexpr (kClusters) own += place.split * p.strips, shared += p.own;
    }
    // Where a strip of the stage is.
    __device__ __forceinline__ int strip(const Params& p, int of_stage) const {
      return !kClusters || of_stage < p.own ? own + of_stage : shared + of_stage - p.own;
    }
  };
  __device__ __forceinline__ static int all_strips(const Params& p) {
    return tile::ceil_div(p.N, kFourBitRows);
  }

  template <class Storage>
  __device__ __forceinline__ static void load_weights(const Params& p, Storage& shared,
                                                      const Place& place, const Work& at, int step,
                                                      int stage) {
    auto& full = shared.ring.full[stage];
    const bool shares = kClusters && place.shared.has(step);
    full.arrive_expect(p.w_place + p.own_bytes + (shares ? p.shared_bytes : 0));
    char* to = shared.stages + stage * p.stage_bytes + p.w_place;
    const uint64_t policy = tile::ptx::evict_first_policy();
    const int strips = at.batch * all_strips(p);  // before those of the matrix
    const auto load = [&](const CUtensorMap* map, char* to, int strip) {
      tile::ptx::bulk_tensor_load_by(policy, to, map, &full.word, 0, step * p.panels,
                                     strips + strip);
    };
    if (!kClusters || p.own > 0) load(&p.w, to, at.own);
    if (shares) load(&p.w_shared, to + p.own_bytes, at.shared);
  }
  template <class Storage>
  __device__ __forceinline__ static void load_tokens(const Params& p, Storage& shared,
                                                     const Work& at, int step, int stage) {
    auto& full = shared.ring.full[stage];
    const uint64_t policy = tile::ptx::evict_last_policy();
    char* to = shared.stages + stage * p.stage_bytes;
    const int first = 2 * step * p.panels;  // of 64 columns
    for (int i = 0; i < 2 * p.panels; i += p.x_box) {
      tile::ptx::bulk_tensor_load_by(policy, to + i * p.x_bytes, &p.x, &full.word,
                                     p.x_box > 1 ? 0 : 64 * (first + i), at.batch * p.M,
                                     p.x_box > 1 ? first + i : 0);
    }
  }

  // What the first stage has of one of its strips and panels, from memory. Zeros beyond the weight,
  // as in stages.
  template <FourBitFormat kFormat, class T>
  __device__ __forceinline__ static void load_first(const Params& p, const Place& place,
                                                    int of_stage, int panel,
                                                    FourBitTile<kFormat, T>& tile) {
    const Work at(p, place, place.first);
    const int panels = tile::ceil_div(p.K, kFourBitColumns), strips = all_strips(p);
    const int strip = at.strip(p, of_stage);
    panel += place.all.begin * p.panels;
    tile = {};
    if (strip >= strips || panel >= panels) return;
    const int64_t index = (int64_t{at.batch} * strips + strip) * panels + panel;
    tile.load(p.weight, static_cast<const char*>(p.weight.data) + index * p.tile_bytes,
              typename FourBitTile<kFormat, T>::Place(p.weight));
  }

  // Loads x of the first stage and weights of some that follow, when there is what they complete on
  // and nothing else. Returns how many stages have weights. releases: of a stage.
  template <class Storage>
  __device__ __forceinline__ static int begin(const Params& p, Storage& shared, const Place& place,
                                              int releases) {
    tile::ptx::prefetch_tensor_map(&p.x);
    for (int i = 0; i < p.stages; ++i) shared.ring.full[i].init(1);
    tile::ptx::fence_mbarrier_init();
    const Work at(p, place, place.first);
    const int stages = min(p.ahead, place.all.end - place.all.begin);
    if (stages > 0) {
      shared.ring.full[0].arrive_expect(p.w_place);
      load_tokens(p, shared, at, place.all.begin, 0);
    }
#pragma unroll 1
    for (int i = 1; i < stages; ++i) load_weights(p, shared, place, at, place.all.begin + i, i);
    for (int i = 0; i < p.stages; ++i) shared.ring.empty[i].init(releases);
    tile::ptx::fence_mbarrier_init();
    return stages;
  }
  template <class Storage>
  __device__ __forceinline__ static void load(const Params& p, Storage& shared, const Place& place,
                                              int begun) {
    Slot slot, oldest;  // on its way
    bool first = true;
    for (int index = place.first; index < p.B * p.tiles; index += place.step) {
      const Work at(p, place, index);
      for (int step = place.all.begin; step < place.all.end; ++step, slot.advance(p), --begun) {
        if (begun <= 0) {
          shared.ring.full[oldest.stage].wait(oldest.parity);
          oldest.advance(p);
          shared.ring.empty[slot.stage].wait(slot.parity ^ 1);
          load_weights(p, shared, place, at, step, slot.stage);
        }
        if (!first) load_tokens(p, shared, at, step, slot.stage);
        first = false;
      }
    }
  }
};

}  // namespace jaxkern
