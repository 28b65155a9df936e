// The decode step against a scalar loop over the same rounded values: what its tests share.
#pragma once

#include <numeric>

#include "cuda/decode/step.h"
#include "cuda/host/device.h"
#include "cuda/tests/decode_model.h"

namespace jaxkern {

using decode::DecodeParams;
using decode::Rows;

// Rows of all heads of query, then of key, then of value, by the heads that belong together.
inline Floats grouped(const Shape& s, const Floats& rows) {
  const int group = s.heads / s.kv_heads;
  const size_t head = rows.size() / (s.heads + 2 * s.kv_heads);
  Floats y;
  const auto append = [&](int i) {
    y.insert(y.end(), rows.begin() + i * head, rows.begin() + (i + 1) * head);
  };
  for (int k = 0; k < s.kv_heads; ++k) {
    for (int g = 0; g < group; ++g) append(k * group + g);
    append(s.heads + k);
    append(s.heads + s.kv_heads + k);
  }
  return y;
}

struct Packed {
  Bytes qkv, out, gate_up, down, head;
  Floats scales[decode::kPhases];
  std::vector<bf16> embedding, norms, bias, qk_norms;

  Packed(const Model& m, const Rows (&rows)[decode::kPhases]) {
    const auto append = [](std::vector<bf16>& to, const Floats& x) {
      for (float value : x) to.push_back(__float2bfloat16_rn(value));
    };
    for (const Layer& layer : m.layers) {
      pack(qkv, m.format, scales[decode::kQkv], grouped(m.s, layer.qkv), rows[decode::kQkv],
           (m.s.heads + 2 * m.s.kv_heads) * m.s.head_dim);
      pack(out, m.format, scales[decode::kOut], layer.out, rows[decode::kOut], m.s.width);
      pack(gate_up, m.format, scales[decode::kGateUp], layer.gate_up, rows[decode::kGateUp],
           m.s.hidden);
      pack(down, m.format, scales[decode::kDown], layer.down, rows[decode::kDown], m.s.width);
      append(norms, layer.attention_norm);
      append(norms, layer.mlp_norm);
      append(bias, grouped(m.s, layer.bias));
      append(qk_norms, layer.q_norm);
      append(qk_norms, layer.k_norm);
    }
    pack(head, m.format, scales[decode::kHead], m.head, rows[decode::kHead], m.s.vocabulary);
    append(norms, m.norm);
    append(embedding, m.embedding);
  }
};

// The cache of the sequences, NaN where there is nothing.
inline void fill_cache(const Shape& s, const std::vector<Sequence>& sequences,
                       std::vector<bf16>& keys, std::vector<bf16>& values) {
  const size_t B = sequences.size(), T = s.capacity, dim = s.head_dim;
  keys.assign(s.layers * B * s.kv_heads * T * dim, __float2bfloat16_rn(NAN));
  values = keys;
  for (int l = 0; l < s.layers; ++l) {
    for (size_t n = 0; n < B; ++n) {
      for (int k = 0; k < s.kv_heads; ++k) {
        const size_t start = ((l * B + n) * s.kv_heads + k) * T * dim;
        for (int t = 0; t < sequences[n].length(); ++t) {
          for (size_t d = 0; d < dim; ++d) {
            keys[start + ((t / 8 * (dim / 32) + d / 32) * 8 + t % 8) * 32 + d % 32] =
                __float2bfloat16_rn(sequences[n].keys[l][k][t][d]);
            values[start + (t / 32 * dim + d) * 32 + t % 32] =
                __float2bfloat16_rn(sequences[n].values[l][k][t][d]);
          }
        }
      }
    }
  }
}

// Several tokens in one launch: each has the largest logit, or nearly. When all sequences but one
// have ended from the start and that one does steps end.
template <class Step>
void test_draws(const std::string& what, DecodeParams p, std::vector<Sequence>& sequences) {
  constexpr int kSteps = 4;
  const int B = p.batch, V = p.vocabulary;
  const test::Array<int> tokens(std::vector<int>(B, 1)), done(std::vector<int>(B, 0)),
      drawn(std::vector<int>(B * kSteps, -1));
  const test::Array<float> logits(size_t(B) * V);
  p.tokens = tokens.data(), p.logits = logits.data();
  p.sampling.steps = kSteps, p.sampling.drawn = drawn.data(), p.sampling.done = done.data();
  test::check(decode::launch_decode_step_sm90<Step>(p, nullptr), what);
  test::synchronize(what);
  const std::vector<int> got = drawn.host();
  Floats short_of, last;
  for (int n = 0; n < B; ++n) {
    for (int i = 0; i < kSteps; ++i) {
      last = sequences[n].step(i == 0 ? 1 : got[n * kSteps + i - 1]);
      const int token = got[n * kSteps + i];
      const bool known = token >= 0 && token < V;
      short_of.push_back(*std::max_element(last.begin(), last.end()) - (known ? last[token] : NAN));
    }
  }
  test::compare(what + ", drawn", short_of, Floats(short_of.size(), 0.0f), 1, 0.1f);
  test::compare(what + ", done", done.host(), std::vector<int>(B, 0), 1);

  // The first token of the last sequence ends it.
  std::vector<int> ended(B, 1);
  ended[B - 1] = 0;
  const test::Array<int> most(ended), once(std::vector<int>(B * kSteps, -1));
  std::vector<int> next, repeated;
  for (int n = 0; n < B; ++n) next.push_back(got[n * kSteps + kSteps - 1]);
  const test::Array<int> start(next);
  p.tokens = start.data(), p.sampling.done = most.data(), p.sampling.drawn = once.data();
  std::vector<int> all(V);
  std::iota(all.begin(), all.end(), 0);
  const test::Array<int> stops(all);  // any token does
  p.sampling.stop_tokens = stops.data(), p.sampling.stop_count = V;
  test::check(decode::launch_decode_step_sm90<Step>(p, nullptr), what);
  test::synchronize(what);
  for (int n = 0; n < B; ++n) {
    last = sequences[n].step(next[n]);
    const int token = n < B - 1 ? next[n] : once.host()[n * kSteps];
    repeated.insert(repeated.end(), kSteps, token);
  }
  const int token = repeated.back();
  test::compare(what + ", repeated", once.host(), repeated, 1);
  test::compare(what + ", ended", most.host(), std::vector<int>(B, 1), 1);
  const bool known = token >= 0 && token < V;
  const Floats most_short = {*std::max_element(last.begin(), last.end()) -
                             (known ? last[token] : NAN)};
  test::compare(what + ", the last", most_short, Floats{0.0f}, 1, 0.1f);
}

template <class Step>
void test_model(const std::string& what, WeightFormat format, const Shape& s,
                const std::vector<int>& lengths, int steps) {
  const Model m(s, format);
  const int B = static_cast<int>(lengths.size());
  int multiprocessors;
  test::check(multiprocessor_count(&multiprocessors), "device");
  std::vector<Sequence> sequences(B, Sequence(m));
  for (int n = 0; n < B; ++n) {  // any keys and values
    for (int l = 0; l < s.layers; ++l) {
      for (int k = 0; k < s.kv_heads; ++k) {
        for (int t = 0; t < lengths[n]; ++t) {
          const int seed = ((n * 100 + l) * 100 + k) * 10000 + t;
          sequences[n].keys[l][k].push_back(normal(s.head_dim, 1.0f, seed));
          sequences[n].values[l][k].push_back(normal(s.head_dim, 1.0f, -seed - 1));
        }
      }
    }
  }
  DecodeParams p = {};
  p.layers = s.layers, p.width = s.width, p.vocabulary = s.vocabulary, p.heads = s.heads;
  p.kv_heads = s.kv_heads, p.head_dim = s.head_dim, p.hidden = s.hidden;
  p.batch = B, p.capacity = s.capacity, p.norm_epsilon = kEpsilon;
  p.multiprocessors = multiprocessors;
  p.format = format;
  int64_t workspace_bytes;
  const decode::StepParams plan = decode::plan_step(p, &workspace_bytes);
  const Packed packed(m, plan.rows);
  std::vector<bf16> host_keys, host_values;
  fill_cache(s, sequences, host_keys, host_values);
  const test::Array<uint8_t> qkv(packed.qkv), out(packed.out), gate_up(packed.gate_up),
      down(packed.down), head(packed.head);
  const test::Array<float> qkv_scales(packed.scales[decode::kQkv]),
      out_scales(packed.scales[decode::kOut]), gate_up_scales(packed.scales[decode::kGateUp]),
      down_scales(packed.scales[decode::kDown]), head_scales(packed.scales[decode::kHead]);
  p.scales[decode::kQkv] = qkv_scales.data(), p.scales[decode::kOut] = out_scales.data();
  p.scales[decode::kGateUp] = gate_up_scales.data();
  p.scales[decode::kDown] = down_scales.data(), p.scales[decode::kHead] = head_scales.data();
  const test::Array<bf16> embedding(packed.embedding), norms(packed.norms), bias(packed.bias),
      qk_norms(packed.qk_norms), keys(host_keys), values(host_values);
  const test::Array<float> frequencies(m.frequencies);
  const test::Array<int> device_lengths(lengths), status(std::vector<int>(B, decode::kOk));
  p.weights[decode::kQkv] = qkv.data(), p.weights[decode::kOut] = out.data();
  p.weights[decode::kGateUp] = gate_up.data(), p.weights[decode::kDown] = down.data();
  p.weights[decode::kHead] = head.data(), p.embedding = embedding.data();
  p.norms = norms.data();
  p.qkv_bias = s.bias ? bias.data() : nullptr, p.qk_norms = s.norms ? qk_norms.data() : nullptr;
  p.frequencies = frequencies.data(), p.lengths = device_lengths.data();
  p.status = status.data();
  p.keys = keys.data(), p.values = values.data();
  const test::Array<char> workspace(std::vector<char>(workspace_bytes, -1));
  p.workspace = workspace.data();
  for (int step = 0; step < steps; ++step) {
    std::vector<int> tokens;
    Floats wanted;
    for (int n = 0; n < B; ++n) {
      tokens.push_back((step * 7919 + n * 104729 + 3) % s.vocabulary);
      const Floats logits = sequences[n].step(tokens.back());
      wanted.insert(wanted.end(), logits.begin(), logits.end());
    }
    const test::Array<int> device_tokens(tokens);
    const test::Array<float> logits(wanted.size());
    p.tokens = device_tokens.data(), p.logits = logits.data();
    const std::string at = what + ", step " + std::to_string(step);
    test::check(decode::launch_decode_step_sm90<Step>(p, nullptr), at);
    test::synchronize(at);
    test::compare(at, logits.host(), wanted, s.vocabulary, 0.05f);
  }
  test_draws<Step>(what, p, sequences);
  std::vector<int> after;
  for (const Sequence& sequence : sequences) after.push_back(sequence.length());
  test::compare(what + ", lengths", device_lengths.host(), after, 1);
  fill_cache(s, sequences, host_keys, host_values);
  const auto floats = [](const std::vector<bf16>& x) {
    Floats y;
    for (bf16 v : x) y.push_back(test::to_float(v));
    return y;
  };
  test::compare(what + ", keys", floats(keys.host()), floats(host_keys), s.head_dim, 0.05f);
  test::compare(what + ", values", floats(values.host()), floats(host_values), s.head_dim, 0.05f);
}

}  // namespace jaxkern
