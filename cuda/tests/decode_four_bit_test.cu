// The decode step with weights of four bits.
#include "cuda/tests/decode_cases.h"

int main() {
  using namespace jaxkern;
  using enum decode::WeightFormat;
  using decode::DecodeStep, decode::e2m1, decode::s4;
  const Shape llama = {2, 512, 1000, 8, 2, 64, 1536, 1024, false, false};
  const Shape qwen = {2, 768, 1000, 6, 1, 128, 1152, 512, true, false};
  const Shape small = {3, 128, 100, 2, 1, 64, 256, 64, true, true};  // blocks without rows
  const Shape wide = {1, 2048, 4000, 32, 8, 64, 8192, 256, false, false};
  const Shape long_rows = {1, 4096, 500, 64, 8, 64, 512, 64, false, false};
  const Shape largest = {1, 256, 500, 2, 1, 128, 8960, 64, true, false};  // 136 rows
  for (const auto& [name, format] : {std::pair("NVFP4", kNvfp4), std::pair("MXFP4", kMxfp4)}) {
    const auto what = [name = std::string(name)](const char* of) { return name + ", " + of; };
    test_model<DecodeStep<e2m1, 64, 1, 11>>(what("llama, 255"), format, llama, {255}, 3);
    test_model<DecodeStep<e2m1, 64, 1, 11>>(what("wide"), format, wide, {30}, 2);
    test_model<DecodeStep<e2m1, 64, 1, 11>>(what("long rows"), format, long_rows, {3}, 2);
    test_model<DecodeStep<e2m1, 64, 1, 11>>(what("small"), format, small, {5}, 4);
    test_model<DecodeStep<e2m1, 128, 1, 10>>(what("qwen"), format, qwen, {300}, 2);
    test_model<DecodeStep<e2m1, 128, 1, 10>>(what("136 rows"), format, largest, {9}, 2);
    test_model<DecodeStep<e2m1, 64, 8, 9>>(what("five sequences"), format, wide, {1, 2, 3, 4, 5},
                                           2);
    test_model<DecodeStep<e2m1, 128, 16, 5>>(what("twelve sequences"), format, largest,
                                             {9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2}, 2);
  }
  test_model<DecodeStep<s4, 64, 1, 11>>("int4, llama, 255", kInt4, llama, {255}, 3);
  test_model<DecodeStep<s4, 64, 1, 11>>("int4, wide", kInt4, wide, {30}, 2);
  test_model<DecodeStep<s4, 64, 1, 11>>("int4, small", kInt4, small, {5}, 4);
  test_model<DecodeStep<s4, 128, 1, 10>>("int4, 136 rows", kInt4, largest, {9}, 2);
  test_model<DecodeStep<s4, 64, 8, 9>>("int4, five sequences", kInt4, wide, {1, 2, 3, 4, 5}, 2);
  return test::finish();
}
