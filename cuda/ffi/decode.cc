#include <bit>
#include <tuple>

#include "cuda/decode/launch.h"
#include "cuda/decode/rows.h"
#include "cuda/ffi/common.h"

namespace jaxkern {
namespace {

constexpr auto F32 = ffi::DataType::F32;
constexpr auto S32 = ffi::DataType::S32;
constexpr auto U32 = ffi::DataType::U32;
constexpr auto BF16 = ffi::DataType::BF16;

ffi::Error decode_step(
    cudaStream_t stream, ffi::AnyBuffer tokens, ffi::AnyBuffer lengths, ffi::AnyBuffer status,
    ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::AnyBuffer workspace, ffi::AnyBuffer done,
    ffi::AnyBuffer embedding, ffi::AnyBuffer norms, ffi::AnyBuffer qkv, ffi::AnyBuffer out,
    ffi::AnyBuffer gate_up, ffi::AnyBuffer down, ffi::AnyBuffer head, ffi::AnyBuffer qkv_scale,
    ffi::AnyBuffer out_scale, ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down_scale,
    ffi::AnyBuffer head_scale, ffi::AnyBuffer frequencies, ffi::AnyBuffer qkv_bias,
    ffi::AnyBuffer qk_norms, ffi::AnyBuffer stop_tokens, ffi::AnyBuffer seeds,
    ffi::AnyBuffer sampling, ffi::AnyBuffer debug, ffi::Result<ffi::AnyBuffer> drawn,
    ffi::Result<ffi::AnyBuffer> logits, ffi::Result<ffi::AnyBuffer> new_lengths,
    ffi::Result<ffi::AnyBuffer> new_status, ffi::Result<ffi::AnyBuffer> new_keys,
    ffi::Result<ffi::AnyBuffer> new_values, ffi::Result<ffi::AnyBuffer> new_workspace,
    ffi::Result<ffi::AnyBuffer> new_done, ffi::Result<ffi::AnyBuffer> new_debug,
    int32_t format_code, float epsilon, int32_t multiprocessors, int32_t top_k, bool top_p) {
  Checks checks("decode_step");
  checks.rank("keys", keys, 7).rank("embedding", embedding, 2).rank("out", out, 2);
  checks.rank("down", down, 2).rank("workspace", workspace, 1);
  checks.rank("drawn", *drawn, 2).rank("stop_tokens", stop_tokens, 1);
  checks.that(format_code >= 0 && format_code <= 4, "format", std::to_string(format_code),
              "0 to 4");
  if (format_code > 0)
    checks.rank("qkv_scale", qkv_scale, 2).rank("gate_up_scale", gate_up_scale, 2);
  for (const auto& [name, buffer] : {std::pair("keys", &keys), std::pair("embedding", &embedding),
                                     std::pair("out", &out), std::pair("down", &down)}) {
    checks.that(buffer->element_count() > 0, name, "is empty", "values");
  }
  checks.that(multiprocessors > 0 && multiprocessors <= decode::kMaxMultiprocessors,
              "multiprocessors", "is " + std::to_string(multiprocessors),
              "1 to " + std::to_string(decode::kMaxMultiprocessors));
  if (checks.failed()) return checks.error();
  const auto dims = keys.dimensions();  // [L, B, K, T / 8, H / 32, 8, 32]
  const int64_t L = dims[0], B = dims[1], K = dims[2], T = 8 * dims[3], H = 32 * dims[4];
  const int64_t V = embedding.dimensions()[0], D = embedding.dimensions()[1];
  const auto format = decode::WeightFormat(format_code);
  const bool scaled = format != decode::WeightFormat::kBf16;
  const auto [columns, scale_bytes] = decode::slice_format(format);
  const int64_t all =
      scaled ? qkv_scale.dimensions()[1] : out.dimensions()[1] / D + 2 * K * H;  // (N + 2 K) H
  const int64_t N = all / H - 2 * K;
  const int64_t F = scaled ? gate_up_scale.dimensions()[1] / 2 : down.dimensions()[1] / D;
  checks.that(N > 0 && K > 0, "qkv", "has " + std::to_string(N) + " heads of query", "some");
  checks.that(D % columns == 0 && F > 0 && F % columns == 0, "down",
              "is " + std::to_string(D) + " by " + std::to_string(F),
              "multiples of " + std::to_string(columns));
  checks.that(N * H % columns == 0, "out", "has " + std::to_string(N * H) + " columns",
              "a multiple of " + std::to_string(columns));
  if (checks.failed()) return checks.error();
  // Elements of the matrix of a layer.
  const auto elements = [&](int64_t units, int64_t inputs, int unit_rows = 1) {
    const decode::Rows rows = decode::make_rows(static_cast<int>(units), static_cast<int>(inputs),
                                                decode::slice_format(format), unit_rows,
                                                multiprocessors, static_cast<int>(H));
    return rows.place(1, 0) / (scaled ? 4 : 2);
  };
  const int64_t steps = drawn->dimensions()[1];
  const bool draws = steps > 0, noisy = seeds.element_count() > 0;
  const bool debugs = debug.element_count() > 0;
  const bool has_bias = qkv_bias.element_count() > 0, has_norms = qk_norms.element_count() > 0;
  checks.shape("keys", keys, {L, B, K, T / 8, H / 32, 8, 32})
      .shape("values", values, {L, B, K, T / 32, H, 32})
      .shape("tokens", tokens, {B})
      .shape("lengths", lengths, {B})
      .shape("status", status, {B})
      .shape("done", done, {B})
      .shape("drawn", *drawn, {B, steps})
      .shape("norms", norms, {2 * L + 1, D})
      .shape("qkv", qkv, {L, elements(all, D)})
      .shape("out", out, {L, elements(D, N * H)})
      .shape("gate_up", gate_up, {L, elements(F, D, 2)})
      .shape("down", down, {L, elements(D, F)})
      .shape("head", head, {elements(V, D)})
      .shape("frequencies", frequencies, {H / 2})
      .shape("logits", *logits, {B, V})
      .dtype("logits", *logits, {F32})
      .dtype("frequencies", frequencies, {F32});
  if (has_bias) checks.shape("qkv_bias", qkv_bias, {L, all});
  if (has_norms) checks.shape("qk_norms", qk_norms, {L, 2, H});
  if (debugs) {
    const auto layers = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(L)));
    checks.shape("debug", debug, {layers * B * (all + N * H + 2 * D + F)})
        .dtype("debug", debug, {BF16})
        .that(new_debug->untyped_data() == debug.untyped_data(), "debug", "is not aliased",
              "results in its place")
        .that(!draws, "debug", "is given with steps that draw tokens", "a step that does not");
  }
  if (noisy) {
    checks.shape("seeds", seeds, {steps, B, 2}).shape("sampling", sampling, {2});
    checks.dtype("sampling", sampling, {F32}).dtype("seeds", seeds, {U32});
    checks.that(V < decode::kMaxVocabulary, "head", "has " + std::to_string(V) + " rows",
                "fewer than " + std::to_string(decode::kMaxVocabulary));
    checks.that(top_k >= 0, "top_k", "is " + std::to_string(top_k), "0 or above");
  }
  checks.dtype("tokens", tokens, {S32})
      .dtype("lengths", lengths, {S32})
      .dtype("status", status, {S32})
      .dtype("done", done, {S32})
      .dtype("drawn", *drawn, {S32})
      .dtype("stop_tokens", stop_tokens, {S32})
      .dtype("workspace", workspace, {S32})
      .dtype("keys", keys, {BF16})
      .dtype("values", values, {BF16})
      .dtype("embedding", embedding, {BF16})
      .dtype("norms", norms, {BF16})
      .dtype("qkv", qkv, {scaled ? U32 : BF16})
      .dtype("out", out, {qkv.element_type()})
      .dtype("gate_up", gate_up, {qkv.element_type()})
      .dtype("down", down, {qkv.element_type()})
      .dtype("head", head, {qkv.element_type()})
      .dtype("qkv_bias", qkv_bias, {BF16})
      .dtype("qk_norms", qk_norms, {BF16});
  const std::tuple<const char*, ffi::AnyBuffer*, decode::Phase> scales[] = {
      {"qkv_scale", &qkv_scale, decode::kQkv},
      {"out_scale", &out_scale, decode::kOut},
      {"gate_up_scale", &gate_up_scale, decode::kGateUp},
      {"down_scale", &down_scale, decode::kDown},
      {"head_scale", &head_scale, decode::kHead}};
  if (scaled) {
    checks.shape("qkv_scale", qkv_scale, {L, all})
        .shape("out_scale", out_scale, {L, D})
        .shape("gate_up_scale", gate_up_scale, {L, 2 * F})
        .shape("down_scale", down_scale, {L, D})
        .shape("head_scale", head_scale, {V});
    for (const auto& [name, buffer, phase] : scales) checks.dtype(name, *buffer, {F32});
  }
  checks.that(H == 64 || H == 128, "keys", "have heads of " + std::to_string(H), "64 or 128")
      .that(B <= decode::kMaxBatch, "tokens", "has " + std::to_string(B),
            "at most " + std::to_string(decode::kMaxBatch));
  checks.that(N % K == 0 && N / K <= decode::kMaxGroup, "out",
              "has " + std::to_string(N) + " heads",
              "a multiple of keys' " + std::to_string(K) + ", of up to " +
                  std::to_string(decode::kMaxGroup));
  const int64_t rows = int64_t{decode::max_rows(static_cast<int>(H))} * multiprocessors;
  checks.that(D <= rows, "down", "has " + std::to_string(D) + " rows",
              "at most " + std::to_string(rows));
  const int64_t units = int64_t{decode::kMaxUnits} * multiprocessors;
  checks.that(B * K <= units, "keys", "have " + std::to_string(B * K) + " heads of all sequences",
              "at most " + std::to_string(units));
  // Written in place.
  checks.that(new_lengths->untyped_data() == lengths.untyped_data() &&
                  new_status->untyped_data() == status.untyped_data() &&
                  new_done->untyped_data() == done.untyped_data() &&
                  new_keys->untyped_data() == keys.untyped_data() &&
                  new_values->untyped_data() == values.untyped_data() &&
                  new_workspace->untyped_data() == workspace.untyped_data(),
              "the cache", "is not aliased", "results in its place");
  if (checks.failed()) return checks.error();
  decode::DecodeParams params = {};
  params.layers = static_cast<int>(L);
  params.width = static_cast<int>(D);
  params.vocabulary = static_cast<int>(V);
  params.heads = static_cast<int>(N);
  params.kv_heads = static_cast<int>(K);
  params.head_dim = static_cast<int>(H);
  params.hidden = static_cast<int>(F);
  params.batch = static_cast<int>(B);
  params.capacity = static_cast<int>(T);
  params.multiprocessors = multiprocessors;
  params.norm_epsilon = epsilon;
  params.format = format;
  params.weights[decode::kQkv] = qkv.untyped_data();
  params.weights[decode::kOut] = out.untyped_data();
  params.weights[decode::kGateUp] = gate_up.untyped_data();
  params.weights[decode::kDown] = down.untyped_data();
  params.weights[decode::kHead] = head.untyped_data();
  for (const auto& [name, buffer, phase] : scales) {
    params.scales[phase] = scaled ? buffer->typed_data<float>() : nullptr;
  }
  params.embedding = embedding.untyped_data();
  params.norms = norms.untyped_data();
  params.qkv_bias = has_bias ? qkv_bias.untyped_data() : nullptr;
  params.qk_norms = has_norms ? qk_norms.untyped_data() : nullptr;
  params.frequencies = frequencies.typed_data<float>();
  params.tokens = tokens.typed_data<int32_t>();
  params.lengths = lengths.typed_data<int32_t>();
  params.status = status.typed_data<int32_t>();
  params.keys = keys.untyped_data();
  params.values = values.untyped_data();
  params.logits = logits->typed_data<float>();
  params.workspace = workspace.untyped_data();
  params.debug = debugs ? debug.untyped_data() : nullptr;
  if (draws) {
    decode::Sampling& how = params.sampling;
    how.steps = static_cast<int>(steps);
    how.drawn = drawn->typed_data<int32_t>();
    how.done = done.typed_data<int32_t>();
    how.stop_tokens = stop_tokens.typed_data<int32_t>();
    how.stop_count = static_cast<int>(stop_tokens.element_count());
    how.seeds = noisy ? seeds.typed_data<uint32_t>() : nullptr;
    how.parameters = noisy ? sampling.typed_data<float>() : nullptr;
    how.top_k = top_k;
    how.top_p = top_p;
  }
  const int64_t bytes = decode::decode_workspace_bytes(params);
  const auto has = static_cast<int64_t>(workspace.size_bytes());
  checks.that(has >= bytes, "workspace", "has " + std::to_string(has) + " bytes",
              std::to_string(bytes));
  if (checks.failed()) return checks.error();
  return launch_error("decode_step", decode::launch_decode_step(params, stream));
}

}  // namespace

JAXKERN_DEFINE_HANDLER(DecodeStep, decode_step,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // tokens
                           .Arg<ffi::AnyBuffer>()  // lengths
                           .Arg<ffi::AnyBuffer>()  // status
                           .Arg<ffi::AnyBuffer>()  // keys
                           .Arg<ffi::AnyBuffer>()  // values
                           .Arg<ffi::AnyBuffer>()  // workspace
                           .Arg<ffi::AnyBuffer>()  // done
                           .Arg<ffi::AnyBuffer>()  // embedding
                           .Arg<ffi::AnyBuffer>()  // norms
                           .Arg<ffi::AnyBuffer>()  // qkv
                           .Arg<ffi::AnyBuffer>()  // out
                           .Arg<ffi::AnyBuffer>()  // gate_up
                           .Arg<ffi::AnyBuffer>()  // down
                           .Arg<ffi::AnyBuffer>()  // head
                           .Arg<ffi::AnyBuffer>()  // qkv_scale
                           .Arg<ffi::AnyBuffer>()  // out_scale
                           .Arg<ffi::AnyBuffer>()  // gate_up_scale
                           .Arg<ffi::AnyBuffer>()  // down_scale
                           .Arg<ffi::AnyBuffer>()  // head_scale
                           .Arg<ffi::AnyBuffer>()  // frequencies
                           .Arg<ffi::AnyBuffer>()  // qkv_bias
                           .Arg<ffi::AnyBuffer>()  // qk_norms
                           .Arg<ffi::AnyBuffer>()  // stop_tokens
                           .Arg<ffi::AnyBuffer>()  // seeds
                           .Arg<ffi::AnyBuffer>()  // sampling
                           .Arg<ffi::AnyBuffer>()  // debug
                           .Ret<ffi::AnyBuffer>()  // drawn
                           .Ret<ffi::AnyBuffer>()  // logits
                           .Ret<ffi::AnyBuffer>()  // lengths
                           .Ret<ffi::AnyBuffer>()  // status
                           .Ret<ffi::AnyBuffer>()  // keys
                           .Ret<ffi::AnyBuffer>()  // values
                           .Ret<ffi::AnyBuffer>()  // workspace
                           .Ret<ffi::AnyBuffer>()  // done
                           .Ret<ffi::AnyBuffer>()  // debug
                           .Attr<int32_t>("format")
                           .Attr<float>("epsilon")
                           .Attr<int32_t>("multiprocessors")
                           .Attr<int32_t>("top_k")
                           .Attr<bool>("top_p"));

}  // namespace jaxkern
