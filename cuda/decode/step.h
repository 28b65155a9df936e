// Launches the decode step.
#pragma once

#include <bit>

#include "cuda/decode/step_sm90.cuh"
#include "cuda/host/launch.h"

namespace jaxkern::decode {

// What the kernel takes. `workspace_bytes`: how many bytes it needs of the workspace.
inline StepParams plan_step(const DecodeParams& model, int64_t* workspace_bytes = nullptr) {
  StepParams p = {};
  p.model = model;
  p.scale_code = scale_code(model.format);
  const int heads = model.heads * model.head_dim;
  const auto rows = [&](int units, int K, int unit_rows = 1) {
    return make_rows(units, K, slice_format(model.format), unit_rows, model.multiprocessors,
                     model.head_dim);
  };
  p.rows[kQkv] = rows(heads + 2 * model.kv_heads * model.head_dim, model.width);
  p.rows[kOut] = rows(model.width, heads);
  p.rows[kGateUp] = rows(model.hidden, model.width, 2);
  p.rows[kDown] = rows(model.width, model.hidden);
  p.rows[kHead] = rows(model.vocabulary, model.width);

  int64_t bytes = sizeof(WorkspaceHeader);
  const auto reserve = [&]<class T>(Places<T>& places, int64_t size) {
    places = {reinterpret_cast<T*>(static_cast<char*>(model.workspace) + bytes), size, 1};
    bytes += 2 * size * static_cast<int64_t>(sizeof(T));
  };
  const int64_t batch = model.batch, splits = batch * kMaxSplits;
  p.squares_stride = (p.rows[kOut].blocks + 3) / 4 * 4;
  for (int phase = 0; phase < kHead; ++phase) {
    reserve(p.results[phase], batch * (phase == kAttention ? heads : p.rows[phase].count()));
  }
  reserve(p.ranks, batch * p.squares_stride);
  Places<uint64_t> histograms;
  reserve(histograms, 2 * batch * kBins);
  p.histograms = histograms.data;
  reserve(p.partials, splits * heads);
  reserve(p.out_squares, batch * p.squares_stride);
  reserve(p.down_squares, batch * p.squares_stride);
  reserve(p.logs, splits * model.heads);
  if (workspace_bytes != nullptr) *workspace_bytes = bytes;
  if (model.debug != nullptr) {
    auto* debug = static_cast<tile::bf16*>(model.debug);
    const uint32_t layers = std::bit_ceil(static_cast<uint32_t>(model.layers));
    for (Places<tile::bf16>& places : p.results) {
      places = {debug, places.size, layers - 1};
      debug += layers * places.size;
    }
  }
  return p;
}

template <class Step>
cudaError_t launch_decode_step_sm90(const DecodeParams& params, cudaStream_t stream) {
  StepParams p = plan_step(params);
  Step::plan(p);
  const int shared_bytes = Step::shared_bytes(params);
  const auto kernel = decode_step_sm90_kernel<Step>;
  if (cudaError_t error = allow_shared_bytes(kernel, shared_bytes)) return error;
  void* arguments[] = {&p};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(params.multiprocessors), dim3(Step::kThreads), arguments,
                                     shared_bytes, stream);
}

}  // namespace jaxkern::decode
