// What decode_cases.h compares with: a scalar loop over the same rounded values.
#pragma once

#include <functional>
#include <numeric>

#include "cuda/tests/decode_pack.h"

namespace jaxkern {

struct Shape {
  int layers, width, vocabulary, heads, kv_heads, head_dim, hidden, capacity;
  bool bias, norms;
};

inline float bf(float x) { return test::round_to<bf16>(x); }

inline Floats normal(size_t size, float deviation, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0.0f, deviation);
  Floats values(size);
  for (float& x : values) x = bf(distribution(random));
  return values;
}

// Weights of one layer, rows by columns; gate's rows and then up's.
struct Layer {
  Floats attention_norm, qkv, bias, q_norm, k_norm, out, mlp_norm, gate_up, down;
};

struct Model {
  Shape s;
  WeightFormat format;  // matrices have what that can say
  std::vector<Layer> layers;
  Floats embedding, norm, head, frequencies;

  Model(const Shape& shape, WeightFormat format) : s(shape), format(format) {
    int seed = 1;
    const int heads = s.heads * s.head_dim, all = heads + 2 * s.kv_heads * s.head_dim;
    const auto matrix = [&](int rows, int cols) {
      const Floats w = normal(size_t(rows) * cols, 1.0f / std::sqrt(float(cols)), seed++);
      return rounded_to(format, w, cols);
    };
    const auto weights = [&](int size) {
      Floats w = normal(size, 0.2f, seed++);
      for (float& x : w) x = bf(x + 1.0f);
      return w;
    };
    for (int l = 0; l < s.layers; ++l) {
      layers.push_back({weights(s.width), matrix(all, s.width), normal(all, 0.5f, seed++),
                        weights(s.head_dim), weights(s.head_dim), matrix(s.width, heads),
                        weights(s.width), matrix(2 * s.hidden, s.width),
                        matrix(s.width, s.hidden)});
    }
    embedding = normal(size_t(s.vocabulary) * s.width, 1.0f, seed++);
    norm = weights(s.width);
    head = matrix(s.vocabulary, s.width);
    for (int i = 0; i < s.head_dim / 2; ++i) {
      frequencies.push_back(std::pow(10000.0f, -2.0f * i / s.head_dim));
    }
  }
};

inline Floats times(const Floats& matrix, const Floats& x) {
  Floats y;
  for (size_t r = 0; r < matrix.size() / x.size(); ++r) {
    const float* row = matrix.data() + r * x.size();
    y.push_back(
        static_cast<float>(std::inner_product(x.begin(), x.end(), row, 0.0, std::plus<>(),
                                              [](float a, float b) { return double(a) * b; })));
  }
  return y;
}

inline float rstd(const Floats& x, float epsilon) {
  double sum = 0.0;
  for (float v : x) sum += double(v) * v;
  return static_cast<float>(1.0 / std::sqrt(sum / x.size() + epsilon));
}

// x, rounded, times weights, rounded; the other factor is rstd of x rounded.
inline Floats weighted(const Floats& x, const Floats& weights) {
  Floats y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(bf(bf(x[i]) * weights[i]));
  return y;
}
inline Floats rounded(Floats x) {
  for (float& v : x) v = bf(v);
  return x;
}

constexpr float kEpsilon = 1e-5f;

// One sequence, and what its cache has: [layer][kv head][token][head_dim].
struct Sequence {
  const Model& m;
  std::vector<std::vector<std::vector<Floats>>> keys, values;

  explicit Sequence(const Model& model) : m(model) {
    keys.assign(m.s.layers, std::vector<std::vector<Floats>>(m.s.kv_heads));
    values = keys;
  }
  int length() const { return static_cast<int>(keys[0][0].size()); }

  Floats rotate(const float* x, const Floats& norm, int position) const {
    const int dim = m.s.head_dim, half = dim / 2;
    Floats y(x, x + dim);
    if (m.s.norms) {
      const float factor = rstd(y, kEpsilon);
      for (int i = 0; i < dim; ++i) y[i] *= factor * norm[i];
    }
    for (int i = 0; i < half; ++i) {
      const float angle = position * m.frequencies[i], a = y[i], b = y[i + half];
      y[i] = bf(a * std::cos(angle) - b * std::sin(angle));
      y[i + half] = bf(b * std::cos(angle) + a * std::sin(angle));
    }
    return y;
  }

  Floats step(int token) {
    const Shape& s = m.s;
    const int dim = s.head_dim, position = length(), group = s.heads / s.kv_heads;
    Floats h(m.embedding.begin() + size_t(token) * s.width,
             m.embedding.begin() + size_t(token + 1) * s.width);
    for (int l = 0; l < s.layers; ++l) {
      const Layer& layer = m.layers[l];
      Floats qkv = times(layer.qkv, weighted(h, layer.attention_norm));
      const float factor = rstd(rounded(h), kEpsilon);
      for (size_t i = 0; i < qkv.size(); ++i) {
        qkv[i] = bf(qkv[i] * factor + (s.bias ? layer.bias[i] : 0.0f));
      }
      Floats heads;
      for (int k = 0; k < s.kv_heads; ++k) {
        keys[l][k].push_back(rotate(qkv.data() + (s.heads + k) * dim, layer.k_norm, position));
        const float* value = qkv.data() + (s.heads + s.kv_heads + k) * dim;
        values[l][k].push_back(Floats(value, value + dim));
        for (int g = 0; g < group; ++g) {
          const Floats query = rotate(qkv.data() + (k * group + g) * dim, layer.q_norm, position);
          Floats scores;
          for (const Floats& key : keys[l][k]) scores.push_back(times(key, query)[0]);
          const float most = *std::max_element(scores.begin(), scores.end());
          double sum = 0.0;
          std::vector<double> result(dim);
          for (size_t t = 0; t < scores.size(); ++t) {
            const double weight = std::exp((double(scores[t]) - most) / std::sqrt(double(dim)));
            sum += weight;
            for (int d = 0; d < dim; ++d) result[d] += weight * values[l][k][t][d];
          }
          for (double x : result) heads.push_back(bf(static_cast<float>(x / sum)));
        }
      }
      Floats out = times(layer.out, heads);
      for (int i = 0; i < s.width; ++i) h[i] += out[i];
      const Floats gate_up = times(layer.gate_up, weighted(h, layer.mlp_norm));
      const float mlp_factor = rstd(rounded(h), kEpsilon);
      Floats units;
      for (int i = 0; i < s.hidden; ++i) {
        const float gate = gate_up[i] * mlp_factor;
        units.push_back(bf(gate / (1.0f + std::exp(-gate)) * gate_up[s.hidden + i] * mlp_factor));
      }
      const Floats down = times(layer.down, units);
      for (int i = 0; i < s.width; ++i) h[i] += down[i];
    }
    Floats logits = times(m.head, weighted(h, m.norm));
    const float factor = rstd(rounded(h), kEpsilon);
    for (float& x : logits) x *= factor;
    return logits;
  }
};

}  // namespace jaxkern
