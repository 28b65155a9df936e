// Launches the decode step.
#pragma once

#include "cuda/decode/step_sm90.cuh"
#include "cuda/host/launch.h"

namespace jaxkern::decode {

// All but the pointers of the model.
inline void fill_rows(StepParams* p) {
  const DecodeParams& m = p->model;
  const int heads = m.heads * m.head_dim;
  const auto rows = [&](int units, int K, int unit_rows = 1) {
    return make_rows(units, K, unit_rows, m.multiprocessors);
  };
  p->rows[kQkv] = rows(heads + 2 * m.kv_heads * m.head_dim, m.width);
  p->rows[kOut] = rows(m.width, heads);
  p->rows[kGateUp] = rows(m.hidden, m.width, 2);
  p->rows[kDown] = rows(m.width, m.hidden);
  p->rows[kHead] = rows(m.vocabulary, m.width);
  // Vectors of one sequence are there whole, hidden units of several by parts.
  const int most = m.width > heads ? m.width : heads;
  p->part = m.batch == 1 && m.hidden > most ? m.hidden : most;
}

// Where the words are in the workspace, and how many bytes that has.
inline int64_t place_words(StepParams* p) {
  int64_t bytes = sizeof(WorkspaceHeader);
  for (int phase = 0; phase < kHead; ++phase) {
    const Rows& rows = p->rows[phase];
    const int64_t words = phase == kAttention
                              ? int64_t{p->model.heads} * kMaxSplits * head_words(p->model.head_dim)
                              : int64_t{rows.blocks} * rows.words;
    p->words[phase] = reinterpret_cast<Word*>(static_cast<char*>(p->model.workspace) + bytes);
    bytes += words * p->model.batch * static_cast<int64_t>(sizeof(Word));
  }
  return bytes;
}

inline int64_t workspace_bytes(const DecodeParams& params) {
  StepParams p = {.model = params};
  fill_rows(&p);
  return place_words(&p);
}

template <class Step>
cudaError_t launch_decode_step_sm90(const DecodeParams& params, cudaStream_t stream) {
  StepParams p = {.model = params};
  fill_rows(&p);
  place_words(&p);
  const int shared_bytes = Step::shared_bytes(p);
  const auto kernel = decode_step_sm90_kernel<Step>;
  if (cudaError_t error = allow_shared_bytes(kernel, shared_bytes)) return error;
  void* arguments[] = {&p};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(params.multiprocessors), dim3(Step::kThreads), arguments,
                                     shared_bytes, stream);
}

}  // namespace jaxkern::decode
