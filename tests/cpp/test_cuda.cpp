// The CUDA backend: the conformance suite over the double of the driver, in each order that it can
// do things in, and what only this backend promises. The suite alone runs over a real driver too.
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "conformance.hpp"
#include "fake.hpp"
#include "gpu_fixture.hpp"
#include "pie/backends.hpp"
#include "pie/error.hpp"

namespace pie {
namespace {

using namespace conformance;
using testing::Caller;
using testing::is_double;

constexpr Bytes frame_bytes = 4000;
constexpr Bytes stride = 4096;

CudaOptions options_for(std::uint32_t device_frames, std::uint32_t pool_frames) {
  return {.frame_bytes = frame_bytes,
          .device_bytes = device_frames * stride,
          .pool_bytes = pool_frames * stride,
          .driver = testing::driver_name()};
}

// ---- conformance --------------------------------------------------------------------------------

template <fake::Order order>
struct InOrder : testing::OnCuda {
  static std::unique_ptr<Backend> open(std::uint32_t device_frames, std::uint32_t pool_frames) {
    if (!is_double() && order != fake::Order::earliest) {
      throw ConfigError("a GPU has an order of its own");
    }
    fake::set_order(order, 7);
    try {
      return open_cuda(options_for(device_frames, pool_frames));
    } catch (const ConfigError& error) {
      throw std::runtime_error(error.what());  // no reason to skip a test
    }
  }
};

INSTANTIATE_TYPED_TEST_SUITE_P(CudaEarliest, BackendConformance, InOrder<fake::Order::earliest>);
INSTANTIATE_TYPED_TEST_SUITE_P(CudaLatest, BackendConformance, InOrder<fake::Order::latest>);
INSTANTIATE_TYPED_TEST_SUITE_P(CudaRandom, BackendConformance, InOrder<fake::Order::random>);

// No test may leave behind what the double complained of.
class Listener : public ::testing::EmptyTestEventListener {
  void OnTestEnd(const ::testing::TestInfo& /*test*/) override {
    for (const std::string& words : fake::take_violations()) ADD_FAILURE() << words;
  }
};

}  // namespace
}  // namespace pie

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new pie::Listener);
  return RUN_ALL_TESTS();
}
