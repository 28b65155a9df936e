// The steps of a launch: what a layer's phases are, and what is worked out once a step or once.
#pragma once

#include "cuda/decode/consumer.cuh"

namespace jaxkern::decode {

// Cosine and sine of an angle of up to 2^17, within 2^-20.
__device__ __forceinline__ float2 unit_vector(float angle) {
  constexpr float kTurn = 6.28318548f, kTurnRest = -1.74845553e-7f;  // 2 pi
  const float turns = rintf(angle * (1.0f / kTurn));
  angle = fmaf(-turns, kTurnRest, fmaf(-turns, kTurn, angle));
  return make_float2(__cosf(angle), __sinf(angle));
}

template <class Weight, int kHeadDim, int kBatch, int kStages>
struct Steps : Consumer<Weight, kHeadDim, kBatch, kStages> {
  using Consumer = decode::Consumer<Weight, kHeadDim, kBatch, kStages>;
  using Consumer::arrivals, Consumer::attention, Consumer::batch, Consumer::draw, Consumer::header;
  using Consumer::p, Consumer::shared, Consumer::slot;

  // Of what the cache has before a step.
  __device__ __forceinline__ int length(int n, int step) const {
    return min(shared.lengths[n] + step, p.model.capacity);
  }

  // The number of this thread, from which nothing is worked out ahead: that would take registers in
  // all phases.
  __device__ __forceinline__ static int thread() {
    int x = threadIdx.x;
    tile::ptx::work_out_here(x);
    return x;
  }

  // What there is before the first step.
  __device__ __forceinline__ void begin() {
    const int n = thread();
    if (n < batch()) {
      const int token = p.model.tokens[n], before = p.model.status[n];
      const bool known = token >= 0 && token < p.model.vocabulary;
      shared.status[n] = before == kOk && !known ? kTokenOutOfRange : before;
      shared.lengths[n] = p.model.lengths[n];
      shared.draw.tokens[n] = token;
      shared.draw.done[n] = p.model.sampling.steps > 0 && p.model.sampling.done[n] != 0;
    }
    if (n < kHead) shared.before[n] = header().before[n];
    if (n == 0) {
      shared.ended = false;
      shared.layers = header().layers;
      shared.draw.exchanges = header().exchanges;
      shared.draw.rounds = header().rounds;
      // Nobody has arrived in this launch yet, because that takes values of this block.
      shared.draw.exchange_arrivals = header().counters[kHead].count;
      shared.draw.round_arrivals = header().round_counter.count;
    }
    sync_consumers();
  }

  // What follows from the lengths before a step.
  __device__ __forceinline__ void plan(int step) {
    shared.units.init(p.model, [&](int n) { return length(n, step); });
    constexpr int kPairs = kHeadDim / 2;
#pragma unroll 1
    for (int i = thread(); i < batch() * kPairs; i += kConsumers) {
      const int n = i / kPairs, pair = i % kPairs;
      shared.rotation[n][pair] = unit_vector(length(n, step) * p.model.frequencies[pair]);
    }
  }

  // Logits.
  __device__ __forceinline__ void step(int step) {
    const int layers = p.model.layers;
    int n = thread();
    if (n == 0) shared.turn.arrive();
    if (n < batch() && shared.status[n] == kOk && length(n, step) == p.model.capacity) {
      shared.status[n] = kCacheFull;
    }
#pragma unroll 1
    for (int layer = 0; layer < layers; ++layer) {
      if (p.hold_qkv) {
        HeldQkv<Weight> held;
        held.take(tile::settled(shared.stream), slot, p.rows[kQkv], blockIdx.x);
        shared.probe.take(kQkv, kTake);
        this->template multiply_held<kQkv>(layer, held);
      } else {
        this->template multiply_rows<kQkv>(layer);
      }
      // The wait for attention is the longest: the weights of out leave the ring before it.
      if (p.hold_out) {
        HeldOut<Weight, kHeadDim> held;
        held.take(tile::settled(shared.stream), slot, p.rows[kOut], blockIdx.x);
        shared.probe.take(kOut, kTake);
        attention(layer);
        this->template multiply_held<kOut>(layer, held);
      } else {
        attention(layer);
        this->template multiply_rows<kOut>(layer);
      }
      this->template multiply_rows<kGateUp>(layer);
      this->template multiply_rows<kDown>(layer);
    }
    draw.begin();
    this->template multiply_rows<kHead>(layers);
    n = thread();
    if (n < kHead) shared.before[n] += arrivals(static_cast<Phase>(n), layers);
    if (n == 0) shared.layers += layers;
  }

  __device__ __forceinline__ void run() {
    const int steps = p.model.sampling.steps;
    begin();
    shared.probe.begin();
    int count = 0;
#pragma unroll 1
    while (true) {
      plan(count);  // while others' ranks are on their way
      sync_consumers();
      if (count > 0 && !draw.finish(count - 1)) break;
      shared.probe.take(kHead, kTake);
      step(count);
      ++count;
      if (steps == 0) break;
      draw.start();
    }
    shared.probe.end();
    const int n = thread();
    if (n == 0 && count < steps) {
      shared.ended = true;
      shared.turn.arrive();
    }
    // All blocks have sent what the head needs, so they have read these.
    if (blockIdx.x == 0) {
      if (n < batch()) {
        p.model.lengths[n] = length(n, count);
        p.model.status[n] = shared.status[n];
        if (steps > 0) p.model.sampling.done[n] = shared.draw.done[n];
      }
      if (n < kHead) header().before[n] = shared.before[n];
      if (n == 0) {
        header().layers = shared.layers;
        header().exchanges = shared.draw.exchanges;
        header().rounds = shared.draw.rounds;
      }
    }
  }
};

}  // namespace jaxkern::decode
