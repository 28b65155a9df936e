// The decode step with weights of bfloat16 and FP8.
#include "cuda/tests/decode_cases.h"

int main() {
  using namespace jaxkern;
  using enum decode::WeightFormat;
  using tile::bf16;
  using Step64 = decode::DecodeStep<bf16, 64, 1, 12>;
  using Step128 = decode::DecodeStep<bf16, 128, 1, 11>;
  const Shape llama = {2, 512, 1000, 8, 2, 64, 1536, 1024, false, false};
  const Shape qwen = {2, 768, 1000, 6, 1, 128, 1120, 512, true, false};
  const Shape small = {3, 64, 100, 2, 1, 64, 128, 64, true, true};  // blocks without rows
  const Shape long_rows = {1, 4096, 500, 64, 8, 64, 512, 64, false, false};
  test_model<Step64>("llama, empty", kBf16, llama, {0}, 3);
  test_model<Step64>("llama, 255", kBf16, llama, {255}, 3);
  test_model<Step64>("llama, 700", kBf16, llama, {700}, 2);
  test_model<Step64>("wide", kBf16, {1, 2048, 4000, 32, 8, 64, 8192, 256, false, false}, {30}, 2);
  test_model<Step64>("long rows", kBf16, long_rows, {3}, 2);
  test_model<Step64>("small", kBf16, small, {5}, 4);
  test_model<Step128>("qwen", kBf16, qwen, {300}, 2);
  test_model<Step128>("blocks of 136 rows", kBf16, {1, 256, 500, 2, 1, 128, 8960, 64, true, false},
                      {9}, 2);
  test_model<Step128>("qwen3", kBf16, {2, 512, 1000, 8, 2, 128, 1120, 512, false, true}, {31}, 3);
  using decode::DecodeStep;
  const Shape units_in_parts = {1, 512, 500, 8, 8, 64, 8192, 64, false, false};
  test_model<DecodeStep<bf16, 64, 4, 11>>("two sequences", kBf16, llama, {17, 400}, 2);
  test_model<DecodeStep<bf16, 64, 4, 11>>("four small sequences", kBf16, small, {0, 7, 31, 8}, 2);
  test_model<DecodeStep<bf16, 64, 4, 11>>("all in parts", kBf16, long_rows, {3}, 2);
  test_model<DecodeStep<bf16, 128, 4, 10>>("parts that are not even", kBf16,
                                           {1, 256, 500, 2, 1, 128, 5152, 64, false, true},
                                           {9, 8, 7}, 2);
  test_model<DecodeStep<bf16, 64, 8, 10>>("eight sequences", kBf16, llama,
                                          {0, 1, 31, 32, 255, 256, 257, 900}, 2);
  test_model<DecodeStep<bf16, 64, 8, 10>>("hidden units in parts", kBf16, units_in_parts,
                                          {1, 2, 3, 4, 5, 6, 7}, 2);
  test_model<DecodeStep<bf16, 128, 8, 9>>("five sequences", kBf16, qwen, {3, 500, 64, 0, 255}, 2);
  test_model<DecodeStep<bf16, 128, 8, 9>>("wide, five sequences", kBf16,
                                          {1, 4096, 20'000, 32, 8, 128, 1120, 64, false, false},
                                          {3, 9, 0, 1, 20}, 2);
  test_model<DecodeStep<bf16, 64, 16, 7>>(
      "16 sequences", kBf16, llama, {0, 1, 31, 32, 255, 256, 257, 900, 5, 64, 63, 500, 33, 2, 3, 4},
      2);
  test_model<DecodeStep<bf16, 64, 16, 7>>("nine small sequences", kBf16, small,
                                          {0, 7, 31, 8, 3, 2, 1, 0, 20}, 2);
  test_model<DecodeStep<bf16, 64, 16, 7>>("eleven sequences in parts", kBf16, units_in_parts,
                                          {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, 2);
  test_model<DecodeStep<bf16, 128, 16, 6>>("blocks of 136 rows, 13 sequences", kBf16,
                                           {1, 256, 500, 2, 1, 128, 8960, 64, true, false},
                                           {9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3}, 2);
  test_model<DecodeStep<bf16, 128, 16, 6>>("wide, ten sequences", kBf16,
                                           {1, 4096, 13'000, 32, 8, 128, 1120, 64, false, false},
                                           {9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, 2);

  using tile::e4m3;
  test_model<DecodeStep<e4m3, 64, 1, 12>>("FP8, llama, 255", kFp8, llama, {255}, 3);
  test_model<DecodeStep<e4m3, 64, 1, 12>>("FP8, long rows", kFp8, long_rows, {3}, 2);
  test_model<DecodeStep<e4m3, 64, 1, 12>>("FP8, small", kFp8, small, {5}, 4);
  test_model<DecodeStep<e4m3, 128, 1, 11>>(
      "FP8, qwen", kFp8, {2, 768, 1000, 6, 1, 128, 1152, 512, true, false}, {300}, 2);
  test_model<DecodeStep<e4m3, 64, 4, 11>>("FP8, four sequences", kFp8, small, {0, 7, 31, 8}, 2);
  test_model<DecodeStep<e4m3, 64, 8, 10>>("FP8, hidden units in parts", kFp8, units_in_parts,
                                          {1, 2, 3, 4, 5, 6, 7}, 2);
  test_model<DecodeStep<e4m3, 128, 16, 6>>("FP8, twelve sequences", kFp8,
                                           {1, 256, 500, 2, 1, 128, 8960, 64, true, false},
                                           {9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2}, 2);
  return test::finish();
}
