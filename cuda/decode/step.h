// Launches the decode step.
#pragma once

#include "cuda/decode/step_sm90.cuh"
#include "cuda/host/launch.h"

namespace jaxkern::decode {

// What the kernel takes. `workspace_bytes`: that its words end there in the workspace.
inline StepParams plan_step(const DecodeParams& model, int64_t* workspace_bytes = nullptr) {
  StepParams p = {};
  p.model = model;
  const int heads = model.heads * model.head_dim;
  const auto rows = [&](int units, int K, int unit_rows = 1) {
    return make_rows(units, K, unit_rows, model.multiprocessors);
  };
  p.rows[kQkv] = rows(heads + 2 * model.kv_heads * model.head_dim, model.width);
  p.rows[kOut] = rows(model.width, heads);
  p.rows[kGateUp] = rows(model.hidden, model.width, 2);
  p.rows[kDown] = rows(model.width, model.hidden);
  p.rows[kHead] = rows(model.vocabulary, model.width);
  // Vectors of one sequence are there whole, hidden units of several by parts.
  const int most = model.width > heads ? model.width : heads;
  p.part = model.batch == 1 && model.hidden > most ? model.hidden : most;

  int64_t bytes = sizeof(WorkspaceHeader);
  for (int phase = 0; phase < kHead; ++phase) {
    const Rows& of = p.rows[phase];
    const int64_t words = phase == kAttention
                              ? int64_t{model.heads} * kMaxSplits * head_words(model.head_dim)
                              : int64_t{of.blocks} * of.words;
    p.words[phase] = reinterpret_cast<Word*>(static_cast<char*>(model.workspace) + bytes);
    bytes += words * model.batch * static_cast<int64_t>(sizeof(Word));
  }
  if (workspace_bytes != nullptr) *workspace_bytes = bytes;
  return p;
}

template <class Step>
cudaError_t launch_decode_step_sm90(const DecodeParams& params, cudaStream_t stream) {
  StepParams p = plan_step(params);
  const int shared_bytes = Step::shared_bytes(p);
  const auto kernel = decode_step_sm90_kernel<Step>;
  if (cudaError_t error = allow_shared_bytes(kernel, shared_bytes)) return error;
  void* arguments[] = {&p};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(params.multiprocessors), dim3(Step::kThreads), arguments,
                                     shared_bytes, stream);
}

}  // namespace jaxkern::decode
