// The decode step against a scalar loop over the same rounded values.
#include <numeric>

#include "cuda/decode/step.h"
#include "cuda/host/device.h"
#include "cuda/tests/decode_model.h"

namespace jaxkern {
namespace {

using decode::DecodeParams;
using decode::Rows;
// Four e4m3 numbers in a word: see docs/decode.md.
uint32_t word_of(const uint8_t (&x)[4]) {
  const auto half = [&](uint32_t one, uint32_t two, uint32_t others) {
    return (one >> 7) << 15 | (two >> 3 & 15) << 11 | (one & 127) << 4 | (others >> 7) << 3 |
           (two & 7);
  };
  return half(x[0], x[2], x[3]) | half(x[1], x[3], x[2]) << 16;
}

// A slice of a row, as docs/decode.md packs it.
void pack_slice(std::vector<bf16>& to, const float* values) {
  for (int k = 0; k < decode::kSlice; ++k) to.push_back(__float2bfloat16_rn(values[k]));
}
void pack_slice(std::vector<tile::e4m3>& to, const float* values) {
  for (int word = 0; word < 16; ++word) {
    const int c = word / 4, h = word / 2 % 2, j = word % 2;
    uint8_t x[4];
    for (int i = 0; i < 4; ++i) x[i] = tile::e4m3(values[32 * h + 8 * c + 4 * j + i]).__x;
    const uint32_t bits = word_of(x);
    for (int i = 0; i < 4; ++i) {
      to.emplace_back().__x = static_cast<uint8_t>(bits >> 8 * i);
    }
  }
}

// Rows of units, as docs/decode.md packs them, and their scales. `matrix`: [unit_rows][units][K].
template <class Weight>
void pack(std::vector<Weight>& to, Floats& scales, const Floats& matrix, const Rows& rows,
          int units) {
  const size_t K = rows.K, columns = rows.columns;
  const bool fp8 = !std::is_same_v<Weight, bf16>;
  const Floats own = scales_of(matrix, K);
  scales.insert(scales.end(), own.begin(), own.end());
  for (int block = 0, first = 0; block < rows.blocks; ++block) {
    const int count = rows.each + (block < rows.extra);
    for (size_t slice = 0; slice < K / columns; ++slice) {
      for (int part = 0; part < rows.unit_rows; ++part) {
        for (int unit = first; unit < first + count; ++unit) {
          const size_t index = size_t(part) * units + unit;
          const float* row = matrix.data() + index * K + slice * columns;
          Floats values(row, row + columns);
          if (fp8) {
            for (float& value : values) value /= own[index];
          }
          pack_slice(to, values.data());
        }
      }
    }
    first += count;
  }
}

// Rows of all heads of query, then of key, then of value, by the heads that belong together.
Floats grouped(const Shape& s, const Floats& rows) {
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

template <class Weight>
struct Packed {
  std::vector<Weight> qkv, out, gate_up, down, head;
  Floats scales[decode::kPhases];
  std::vector<bf16> embedding, norms, bias, qk_norms;

  Packed(const Model& m, const Rows (&rows)[decode::kPhases]) {
    const auto append = [](std::vector<bf16>& to, const Floats& x) {
      for (float value : x) to.push_back(__float2bfloat16_rn(value));
    };
    for (const Layer& layer : m.layers) {
      pack(qkv, scales[decode::kQkv], grouped(m.s, layer.qkv), rows[decode::kQkv],
           (m.s.heads + 2 * m.s.kv_heads) * m.s.head_dim);
      pack(out, scales[decode::kOut], layer.out, rows[decode::kOut], m.s.width);
      pack(gate_up, scales[decode::kGateUp], layer.gate_up, rows[decode::kGateUp], m.s.hidden);
      pack(down, scales[decode::kDown], layer.down, rows[decode::kDown], m.s.width);
      append(norms, layer.attention_norm);
      append(norms, layer.mlp_norm);
      append(bias, grouped(m.s, layer.bias));
      append(qk_norms, layer.q_norm);
      append(qk_norms, layer.k_norm);
    }
    pack(head, scales[decode::kHead], m.head, rows[decode::kHead], m.s.vocabulary);
    append(norms, m.norm);
    append(embedding, m.embedding);
  }
};

// The cache of the sequences, NaN where there is nothing.
void fill_cache(const Shape& s, const std::vector<Sequence>& sequences, std::vector<bf16>& keys,
                std::vector<bf16>& values) {
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
void test_model(const std::string& what, const Shape& s, const std::vector<int>& lengths,
                int steps) {
  using Weight = typename Step::Weight;
  const bool fp8 = !std::is_same_v<Weight, bf16>;
  const Model m(s, fp8);
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
  p.fp8 = fp8;
  int64_t workspace_bytes;
  const decode::StepParams plan = decode::plan_step(p, &workspace_bytes);
  const Packed<Weight> packed(m, plan.rows);
  std::vector<bf16> host_keys, host_values;
  fill_cache(s, sequences, host_keys, host_values);
  const test::Array<Weight> qkv(packed.qkv), out(packed.out), gate_up(packed.gate_up),
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

}  // namespace
}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  using tile::bf16;
  using Step64 = decode::DecodeStep<bf16, 64, 1, 12>;
  using Step128 = decode::DecodeStep<bf16, 128, 1, 11>;
  const Shape llama = {2, 512, 1000, 8, 2, 64, 1536, 1024, false, false};
  const Shape qwen = {2, 768, 1000, 6, 1, 128, 1120, 512, true, false};
  const Shape small = {3, 64, 100, 2, 1, 64, 128, 64, true, true};  // blocks without rows
  const Shape long_rows = {1, 4096, 500, 64, 8, 64, 512, 64, false, false};
  test_model<Step64>("llama, empty", llama, {0}, 3);
  test_model<Step64>("llama, 255", llama, {255}, 3);
  test_model<Step64>("llama, 700", llama, {700}, 2);
  test_model<Step64>("wide", {1, 2048, 4000, 32, 8, 64, 8192, 256, false, false}, {30}, 2);
  test_model<Step64>("long rows", long_rows, {3}, 2);
  test_model<Step64>("small", small, {5}, 4);
  test_model<Step128>("qwen", qwen, {300}, 2);
  test_model<Step128>("blocks of 136 rows", {1, 256, 500, 2, 1, 128, 8960, 64, true, false}, {9},
                      2);
  test_model<Step128>("qwen3", {2, 512, 1000, 8, 2, 128, 1120, 512, false, true}, {31}, 3);
  using decode::DecodeStep;
  const Shape units_in_parts = {1, 512, 500, 8, 8, 64, 8192, 64, false, false};
  test_model<DecodeStep<bf16, 64, 4, 11>>("two sequences", llama, {17, 400}, 2);
  test_model<DecodeStep<bf16, 64, 4, 11>>("four small sequences", small, {0, 7, 31, 8}, 2);
  test_model<DecodeStep<bf16, 64, 4, 11>>("all in parts", long_rows, {3}, 2);
  test_model<DecodeStep<bf16, 128, 4, 10>>(
      "parts that are not even", {1, 256, 500, 2, 1, 128, 5152, 64, false, true}, {9, 8, 7}, 2);
  test_model<DecodeStep<bf16, 64, 8, 9>>("eight sequences", llama,
                                         {0, 1, 31, 32, 255, 256, 257, 900}, 2);
  test_model<DecodeStep<bf16, 64, 8, 9>>("hidden units in parts", units_in_parts,
                                         {1, 2, 3, 4, 5, 6, 7}, 2);
  test_model<DecodeStep<bf16, 128, 8, 8>>("five sequences", qwen, {3, 500, 64, 0, 255}, 2);
  test_model<DecodeStep<bf16, 128, 8, 8>>("wide, five sequences",
                                          {1, 4096, 20'000, 32, 8, 128, 1120, 64, false, false},
                                          {3, 9, 0, 1, 20}, 2);
  test_model<DecodeStep<bf16, 64, 16, 7>>(
      "16 sequences", llama, {0, 1, 31, 32, 255, 256, 257, 900, 5, 64, 63, 500, 33, 2, 3, 4}, 2);
  test_model<DecodeStep<bf16, 64, 16, 7>>("nine small sequences", small,
                                          {0, 7, 31, 8, 3, 2, 1, 0, 20}, 2);
  test_model<DecodeStep<bf16, 64, 16, 7>>("eleven sequences in parts", units_in_parts,
                                          {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, 2);
  test_model<DecodeStep<bf16, 128, 16, 6>>("blocks of 136 rows, 13 sequences",
                                           {1, 256, 500, 2, 1, 128, 8960, 64, true, false},
                                           {9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3}, 2);
  test_model<DecodeStep<bf16, 128, 16, 6>>("wide, ten sequences",
                                           {1, 4096, 13'000, 32, 8, 128, 1120, 64, false, false},
                                           {9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, 2);

  using tile::e4m3;
  test_model<DecodeStep<e4m3, 64, 1, 12>>("FP8, llama, 255", llama, {255}, 3);
  test_model<DecodeStep<e4m3, 64, 1, 12>>("FP8, long rows", long_rows, {3}, 2);
  test_model<DecodeStep<e4m3, 64, 1, 12>>("FP8, small", small, {5}, 4);
  test_model<DecodeStep<e4m3, 128, 1, 11>>(
      "FP8, qwen", {2, 768, 1000, 6, 1, 128, 1152, 512, true, false}, {300}, 2);
  test_model<DecodeStep<e4m3, 64, 4, 11>>("FP8, four sequences", small, {0, 7, 31, 8}, 2);
  test_model<DecodeStep<e4m3, 64, 8, 9>>("FP8, hidden units in parts", units_in_parts,
                                         {1, 2, 3, 4, 5, 6, 7}, 2);
  test_model<DecodeStep<e4m3, 128, 16, 6>>("FP8, twelve sequences",
                                           {1, 256, 500, 2, 1, 128, 8960, 64, true, false},
                                           {9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2}, 2);
  return test::finish();
}
