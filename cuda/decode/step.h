// Launches the decode step.
#pragma once

#include "cuda/decode/step_sm90.cuh"
#include "cuda/host/device.h"
#include "cuda/host/launch.h"

namespace jaxkern::decode {

inline Matrices make_matrices(const DecodeParams& p, int multiprocessors) {
  const int heads = p.heads * p.head_dim, all_heads = heads + 2 * p.kv_heads * p.head_dim;
  return {
      .qkv = make_rows(all_heads, p.width, 1, multiprocessors),
      .out = make_rows(p.width, heads, 1, multiprocessors),
      .gate_up = make_rows(p.hidden, p.width, 2, multiprocessors),
      .down = make_rows(p.width, p.hidden, 1, multiprocessors),
      .head = make_rows(p.vocabulary, p.width, 1, multiprocessors),
  };
}

// Where the words are in the workspace, and how many bytes that has.
inline int64_t place_words(Words* words, const DecodeParams& p, const Matrices& rows) {
  char* start = static_cast<char*>(p.workspace);
  int64_t bytes = sizeof(WorkspaceHeader);
  const auto place = [&](int64_t count) {
    Word* at = reinterpret_cast<Word*>(start + bytes);
    bytes += count * p.batch * static_cast<int64_t>(sizeof(Word));
    return at;
  };
  const auto of = [](const Rows& r) { return int64_t{r.blocks} * r.words; };
  words->qkv = place(of(rows.qkv));
  words->attention = place(int64_t{p.heads} * kMaxSplits * head_words(p.head_dim));
  words->out = place(of(rows.out));
  words->gate_up = place(of(rows.gate_up));
  words->down = place(of(rows.down));
  return bytes;
}

template <class Step>
cudaError_t launch_decode_step_sm90(const DecodeParams& params, cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  StepParams p = {params, make_matrices(params, multiprocessors), {}};
  place_words(&p.words, params, p.rows);
  const int shared_bytes = Step::shared_bytes(p);
  const auto kernel = decode_step_sm90_kernel<Step>;
  if (cudaError_t error = allow_shared_bytes(kernel, shared_bytes)) return error;
  void* arguments[] = {&p};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(multiprocessors),
                                     dim3(Step::kThreads), arguments, shared_bytes, stream);
}

}  // namespace jaxkern::decode
