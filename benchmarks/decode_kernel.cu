// The decode step's kernel alone, for finding out what a change of it does: printed, not recorded.
//
//   F='-DJAXKERN_WEIGHT=bf16 -DJAXKERN_HEAD_DIM=64'
//   python tools/nvcc.py benchmarks/decode_kernel.cu /tmp/decode_kernel $F
//   /tmp/decode_kernel llama-3.2-1b 1 192 greedy
//
// JAXKERN_WEIGHT: bf16, e4m3, e2m1 (NVFP4, or with -DJAXKERN_FORMAT=kMxfp4 that) or s4. Arguments:
// a model with heads of JAXKERN_HEAD_DIM, sequences, tokens of each after the last of 32 steps in a
// launch, and how tokens are drawn: greedy, temperature, top_k, top_p or both. Prints microseconds
// a step, the median of half a second, and TB/s of weights. With -DJAXKERN_PROBES in $F also the
// microseconds a step that a block has of the parts of each phase (cuda/decode/probe.cuh), which
// themselves take about 1%.
#include <cstring>

#include "benchmarks/harness.cuh"
#include "cuda/decode/step.cu"
#include "cuda/host/device.h"

namespace jaxkern {
namespace {

using decode::DecodeParams, decode::Phase;
using decode::e2m1, decode::s4, decode::WeightFormat;
using tile::bf16, tile::e4m3;
using Weight = JAXKERN_WEIGHT;
#ifdef JAXKERN_FORMAT
constexpr WeightFormat kFormat = WeightFormat::JAXKERN_FORMAT;
#else
constexpr WeightFormat kFormat = std::is_same_v<Weight, bf16>   ? WeightFormat::kBf16
                                 : std::is_same_v<Weight, e4m3> ? WeightFormat::kFp8
                                 : std::is_same_v<Weight, e2m1> ? WeightFormat::kNvfp4
                                                                : WeightFormat::kInt4;
#endif
constexpr int kSteps = 32;

struct Shape {
  const char* name;
  int layers, width, vocabulary, heads, kv_heads, head_dim, hidden;
  bool bias;
};
constexpr Shape kShapes[] = {
    {"llama-3.2-1b", 16, 2048, 128256, 32, 8, 64, 8192, false},
    {"qwen2.5-0.5b", 24, 896, 151936, 14, 2, 64, 4864, true},
    {"qwen2.5-1.5b", 28, 1536, 151936, 12, 2, 128, 8960, true},
    {"llama-3.1-8b", 32, 4096, 128256, 32, 8, 128, 14336, false},
};

template <class T>
T* filled(const std::vector<T>& host) {
  T* data = bench::allocate<T>(host.size());
  const size_t bytes = host.size() * sizeof(T);
  bench::check(cudaMemcpy(data, host.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  return data;
}

// Halves of words that are numbers up to 1 of bfloat16, and small ones of other types of scales.
__global__ void words_kernel(uint32_t* words, int64_t size) {
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    uint32_t h = static_cast<uint32_t>(i) * 0x9e3779b9u;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    words[i] = (h ^ (h >> 13)) & 0x3f7f3f7f;
  }
}

struct Model {
  DecodeParams p = {};
  int* first_lengths;
  int64_t weight_bytes = 0;

  Model(const Shape& s, int batch, int tokens, const std::string& drawing) {
    p.layers = s.layers, p.width = s.width, p.vocabulary = s.vocabulary, p.heads = s.heads;
    p.kv_heads = s.kv_heads, p.head_dim = s.head_dim, p.hidden = s.hidden, p.batch = batch;
    p.capacity = (tokens + 31) / 32 * 32, p.norm_epsilon = 1e-5f, p.format = kFormat;
    bench::check(multiprocessor_count(&p.multiprocessors), "device");
    const int64_t heads = s.heads * s.head_dim, qkv = heads + 2 * s.kv_heads * s.head_dim;
    const int64_t width = s.width;
    const decode::StepParams plan = decode::plan_step(p);
    for (const Phase phase : {decode::kQkv, decode::kOut, decode::kGateUp, decode::kDown}) {
      add(phase, plan.rows[phase], s.layers);
    }
    add(decode::kHead, plan.rows[decode::kHead], 1);
    p.embedding = bench::normal_matrix<bf16>(s.vocabulary * width, 0.02f);
    p.norms = filled(std::vector<bf16>((2 * s.layers + 1) * width, __float2bfloat16_rn(1.0f)));
    if (s.bias) p.qkv_bias = bench::normal_matrix<bf16>(s.layers * qkv);
    std::vector<float> frequencies;
    for (int i = 0; i < s.head_dim / 2; ++i) {
      frequencies.push_back(std::pow(5e5f, -2.0f * i / s.head_dim));
    }
    p.frequencies = filled(frequencies);
    const int64_t cache = int64_t{s.layers} * batch * s.kv_heads * p.capacity * s.head_dim;
    p.keys = bench::normal_matrix<bf16>(cache), p.values = bench::normal_matrix<bf16>(cache);
    const std::vector<int> zeros(batch), lengths(batch, tokens - kSteps);
    p.tokens = filled(zeros), p.status = filled(zeros);
    p.lengths = filled(lengths), first_lengths = filled(lengths);
    p.logits = bench::allocate<float>(int64_t{batch} * s.vocabulary);
    int64_t bytes;
    decode::plan_step(p, &bytes);
    p.workspace = filled(std::vector<char>(bytes, -1));
    decode::Sampling& how = p.sampling;
    how.steps = kSteps;
    how.drawn = bench::allocate<int>(batch * kSteps), how.done = filled(zeros);
    if (drawing == "greedy") return;
    how.seeds = filled(std::vector<uint32_t>(2 * batch * kSteps, 0x12345678));
    how.parameters = filled(std::vector<float>{0.8f, 0.9f});
    if (drawing == "top_k" || drawing == "both") how.top_k = 50;
    how.top_p = drawing == "top_p" || drawing == "both";
  }

  // Normal numbers; of FP8, such that the largest ones saturate. Of four bits any, with scales that
  // are numbers.
  void add(Phase phase, const decode::Rows& rows, int layers) {
    const int64_t bytes = rows.place(layers, 0), count = int64_t{rows.count()} * rows.unit_rows;
    if constexpr (kFormat == WeightFormat::kBf16 || kFormat == WeightFormat::kFp8) {
      constexpr float kDeviation = kFormat == WeightFormat::kFp8 ? 100.0f : 0.02f;
      const auto size = static_cast<int64_t>(bytes / sizeof(Weight));
      p.weights[phase] = bench::normal_matrix<Weight>(size, kDeviation);
    } else {
      auto* words = bench::allocate<uint32_t>(bytes / 4);
      words_kernel<<<1024, 256>>>(words, bytes / 4);
      bench::check(cudaGetLastError(), "words_kernel");
      p.weights[phase] = words;
    }
    if (kFormat != WeightFormat::kBf16) {
      p.scales[phase] = filled(std::vector<float>(layers * count, 2e-4f));
    }
    weight_bytes += bytes;
  }

  // Microseconds a step.
  float launch(cudaEvent_t start, cudaEvent_t end) const {
    bench::check(
        cudaMemcpyAsync(p.lengths, first_lengths, p.batch * sizeof(int), cudaMemcpyDeviceToDevice),
        "cudaMemcpyAsync");
    bench::check(cudaEventRecord(start), "cudaEventRecord");
    bench::check(decode::launch_decode_step_of<Weight, JAXKERN_HEAD_DIM>(p, nullptr), "launch");
    bench::check(cudaEventRecord(end), "cudaEventRecord");
    bench::check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds;
    bench::check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
    return milliseconds * 1e3f / kSteps;
  }
};

#ifdef JAXKERN_PROBES
// The means over blocks that have a part of attention, and over those that have none.
void print_probes(float us) {
  uint32_t cycles[decode::kMaxMultiprocessors][decode::kPhases][decode::kParts];
  bench::check(cudaMemcpyFromSymbol(cycles, decode::probed_cycles, sizeof(cycles)), "probes");
  for (const bool attends : {true, false}) {
    double sums[decode::kPhases][decode::kParts] = {}, all = 0.0;
    for (const auto& block : cycles) {
      if ((block[decode::kAttention][decode::kMultiply] > 0) != attends) continue;
      for (int phase = 0; phase < decode::kPhases; ++phase) {
        for (int part = 0; part < decode::kParts; ++part) {
          sums[phase][part] += block[phase][part];
          all += block[phase][part];
        }
      }
    }
    std::printf("%-14s   take   wait receive multiply   send\n",
                attends ? "with attention" : "without it");
    const char* const names[] = {"qkv", "attention", "out", "gate_up", "down", "head"};
    for (int phase = 0; phase < decode::kPhases; ++phase) {
      const double (&x)[decode::kParts] = sums[phase];
      const double each = us / std::max(all, 1.0);
      std::printf("  %-12s %6.1f %6.1f %7.1f %8.1f %6.1f\n", names[phase], each * x[decode::kTake],
                  each * x[decode::kWait], each * x[decode::kReceive], each * x[decode::kMultiply],
                  each * x[decode::kSend]);
    }
  }
}
#endif

}  // namespace
}  // namespace jaxkern

int main(int count, char** arguments) {
  using namespace jaxkern;
  bench::require(count == 5, "wanted: MODEL SEQUENCES TOKENS greedy|temperature|top_k|top_p|both");
  const auto named = [&](const Shape& s) { return std::strcmp(s.name, arguments[1]) == 0; };
  const Shape* shape = std::find_if(std::begin(kShapes), std::end(kShapes), named);
  bench::require(shape != std::end(kShapes) && shape->head_dim == JAXKERN_HEAD_DIM,
                 "no such model with heads of JAXKERN_HEAD_DIM");
  const int batch = std::atoi(arguments[2]), tokens = std::atoi(arguments[3]);
  bench::require(batch >= 1 && batch <= decode::kMaxBatch, "sequences: wanted 1 to 16");
  bench::require(tokens >= kSteps, "tokens: wanted 32 or more");
  const Model model(*shape, batch, tokens, arguments[4]);
  cudaEvent_t start, end;
  bench::check(cudaEventCreate(&start), "cudaEventCreate");
  bench::check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> samples;
  for (float spent = 0.0f; spent < 0.5e6f; spent += samples.back() * kSteps) {
    samples.push_back(model.launch(start, end));
  }
  const float us = bench::median(samples);
  std::printf("%s b%d ctx%d %s: %.1f us, %.2f TB/s\n", shape->name, batch, tokens, arguments[4], us,
              model.weight_bytes / us * 1e-6);
#ifdef JAXKERN_PROBES
  print_probes(us);
#endif
}
