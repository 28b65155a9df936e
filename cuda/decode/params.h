// Arguments of the decode step. L layers, D width, V vocabulary, N heads, K kv heads, H head dim,
// B sequences, T tokens that the cache has room for. Weights are packed as docs/decode.md has it.
#pragma once

#include <cstdint>

namespace jaxkern::decode {

inline constexpr int kMaxBatch = 16;
inline constexpr int kMaxGroup = 8;       // heads that share a kv head
inline constexpr int kMaxSplits = 16;     // of the tokens of a sequence, in attention
inline constexpr int kSplitTokens = 256;  // a split has at least so many, if there are
inline constexpr int kMaxUnits = 8;       // of attention, a multiprocessor
inline constexpr int kMaxMultiprocessors = 256;
inline constexpr int kBins = 256;               // of sampling's histograms
inline constexpr int kMaxVocabulary = 1 << 20;  // that they have bits for

// What weights are: the numbers are those of the attribute of calls. The last three have four bits,
// and scales of 16 columns of a row or of 32.
enum class WeightFormat : int32_t { kBf16, kFp8, kNvfp4, kMxfp4, kInt4 };

// Types of weights that instances are for, besides bf16 and e4m3: of kNvfp4 and kMxfp4, and
// integers.
struct e2m1 {};
struct s4 {};

// What became of a sequence: the first thing that did. Its logits are NaN from then on.
enum Status { kOk, kTokenOutOfRange, kCacheFull };

// The phases of a layer, and the head.
enum Phase { kQkv, kAttention, kOut, kGateUp, kDown, kHead, kPhases };

// Arrivals of those who have sent what they have of a phase, in a cache line of its own. The head
// sends the ranks that sampling exchanges.
struct Counter {
  uint32_t count;
  uint32_t padding[31];
};

// The start of the workspace, all bits of which are set before the first step, and which is kept
// from step to step. What blocks send each other follows, see exchange.cuh.
struct WorkspaceHeader {
  Counter counters[kPhases];
  Counter round_counter;     // arrivals of sampling's rounds of histograms
  uint32_t before[kPhases];  // what the counters had when the last step had ended
  uint32_t layers;  // of all steps so far, from -1 on, and exchanges and rounds of sampling
  uint32_t exchanges, rounds;
  uint32_t padding[32 - kPhases - 3];
};

// How tokens are drawn from logits, and for how many steps.
struct Sampling {
  int steps;               // at most; 0 is one step, after which no token is drawn
  int* drawn;              // [B, steps]
  int* done;               // [B], whether a sequence has ended: its token repeats from then on
  const int* stop_tokens;  // [stop_count], that end a sequence; when all have ended steps do
  int stop_count;
  const uint32_t* seeds;    // [steps, B, 2], keys of threefry, or null: the largest logit
  const float* parameters;  // temperature, and top_p where it filters
  int top_k;                // 0: all
  bool top_p;               // whether it filters
};

struct DecodeParams {
  int layers, width, vocabulary, heads, kv_heads, head_dim, hidden;
  int batch, capacity;  // B, T
  int multiprocessors;  // that the weights are packed for
  float norm_epsilon;
  WeightFormat format;
  const void* weights[kPhases];  // packed, all layers; attention has none
  const float* scales[kPhases];  // of their rows, all layers; null of bfloat16
  const void* embedding;         // [V, D] bfloat16
  const void* norms;             // [2 L + 1, D] bfloat16: attention's, the MLP's, ..., the last
  const void* qkv_bias;          // [L, (N + 2 K) H] bfloat16 or null
  const void* qk_norms;          // [L, 2, H] bfloat16 or null
  const float* frequencies;      // [H / 2], radians a token
  const int* tokens;             // [B]
  int* lengths;                  // [B], of what the cache has; more after, where there was room
  int* status;                   // [B], of Status
  void *keys, *values;           // the cache, bfloat16
  float* logits;                 // [B, V], of the last step
  void* workspace;
  // Or null: for debugging, what all layers' phases hand on, bfloat16 of which all bits are set
  // before. One phase after the other [layers', ...], each as in plan.h; layers' is the power of
  // two from L on, and a layer is where its number since the first step is, from -1 on. The
  // workspace has to be as before the first step.
  void* debug;
  Sampling sampling;
};

}  // namespace jaxkern::decode
