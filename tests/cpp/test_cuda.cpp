// The CUDA backend: the conformance suite over the double of the driver, in each order that it can
// do things in, and what only this backend promises. The suite alone runs over a real driver too.
#include <unistd.h>

#include <array>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "conformance.hpp"
#include "fake.hpp"
#include "gpu_fixture.hpp"
#include "memory_limit.hpp"
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

// Over the double in each order; a GPU has one of its own.
Subject cuda(std::string name, fake::Order order, const std::string& pool_io = "auto") {
  const bool coherent = pool_io == "coherent";
  return testing::OnCuda::subject(
      std::move(name), [=](std::uint32_t device_frames, std::uint32_t pool_frames) {
        if (!is_double() && (order != fake::Order::earliest || coherent)) {
          throw ConfigError("a GPU has an order of its own");
        }
        fake::set_profile(coherent ? fake::gh200() : fake::Profile{});
        fake::set_order(order, 7);
        CudaOptions options = options_for(device_frames, pool_frames);
        options.pool_io = pool_io;
        try {
          return open_cuda(options);
        } catch (const ConfigError& error) {
          throw std::runtime_error(error.what());  // no reason to skip a test
        }
      });
}

INSTANTIATE_TEST_SUITE_P(Cuda, BackendConformance,
                         ::testing::Values(cuda("Earliest", fake::Order::earliest),
                                           cuda("Latest", fake::Order::latest),
                                           cuda("Random", fake::Order::random),
                                           cuda("Pageable", fake::Order::earliest, "pageable"),
                                           cuda("Coherent", fake::Order::random, "coherent")),
                         subject_name);

// Another backend's memory stands for a tensor's.
TEST(CudaAnywhere, TakesMemoryOfTheCallers) {
  const Subject on = testing::OnCuda::subject();
  if (is_double()) fake::set_profile({});
  const auto owner = open_cuda(options_for(12, 0));
  CudaOptions options = options_for(8, 8);
  options.device_memory = owner->address(4);
  {
    const auto backend = open_cuda(options);
    EXPECT_EQ(backend->capabilities().device_frames_max, 8U);
    EXPECT_EQ(backend->resize_device(12), 8U);
    EXPECT_EQ(backend->memory(), nullptr) << "nobody but the caller holds it";
    ASSERT_EQ(grow_pool(*backend, 8), 8U);
    on.fill(*backend, 0, 1);
    ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, 1}})));
    ASSERT_TRUE(is_ok(finish(*backend, to_device, {{7, 0, 1}})));
  }
  EXPECT_TRUE(on.holds(*owner, 11, 1)) << "it stays the caller's";
}

// ---- what only this backend promises ------------------------------------------------------------

// Over the double alone; another machine than the last test's.
class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!is_double()) GTEST_SKIP() << "of the double";
    become({});
  }
  void TearDown() override { become({}); }

  static void become(const fake::Profile& profile) {
    fake::set_profile(profile);
    fake::set_order(fake::Order::random, 3);
  }

  // What opening says when it refuses with an Error.
  template <class Error>
  static std::string refusal_of(const CudaOptions& options) {
    const fake::Holdings before = fake::holdings();
    try {
      static_cast<void>(open_cuda(options));
    } catch (const Error& error) {
      EXPECT_EQ(fake::holdings(), before) << "something was kept";
      return error.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return "";
  }
};

void expect_says(const std::string& said, const std::string& words) {
  EXPECT_NE(said.find(words), std::string::npos) << said;
}

TEST_F(Cuda, RefusesMachinesThatCannotServe) {
  CudaOptions options = options_for(4, 4);
  options.driver = "libnothing.so.1";
  expect_says(refusal_of<ConfigError>(options), "there is no NVIDIA driver here");
  options = options_for(4, 4);
  options.device = 1;
  expect_says(refusal_of<ConfigError>(options), "there are 1 GPUs here");
  become({.driver_version = 11080});
  expect_says(refusal_of<ConfigError>(options_for(4, 4)), "is for CUDA 11.8");
  become(fake::gb10());
  expect_says(refusal_of<ConfigError>(options_for(4, 4)), "shares its memory with the CPU");
  EXPECT_NE(open_cuda(options_for(4, 0)), nullptr);
}

TEST_F(Cuda, RefusesMoreThanIsFree) {
  become({.memory_bytes = std::size_t{64} << 20});
  const std::string said = refusal_of<CapacityError>(options_for(20'000, 0));
  expect_says(said, "of the 64.0 MiB (67108864 bytes) of NVIDIA H100 PCIe");
  expect_says(said, "are free");
}

TEST_F(Cuda, RefusesAPoolBeyondWhatTheProcessMayHave) {
  CudaOptions options = options_for(4, 4);
  options.pool_bytes = Bytes{1} << 50;
  expect_says(refusal_of<ConfigError>(options), "of CPU memory, by the machine and its control");
  const std::filesystem::path root =
      std::filesystem::path(::testing::TempDir()) / ("groups" + std::to_string(::getpid()));
  std::filesystem::create_directories(root / "outer/inner");
  const auto write = [&](const char* file, const char* words) {
    std::ofstream(root / file) << words << '\n';
  };
  write("self", "1:cpu:/elsewhere\n0::/outer/inner");
  write("meminfo", "MemTotal: 99999999 kB\nMemAvailable: 2097152 kB");
  const cuda::MemoryFiles files{root / "self", root, root / "meminfo"};
  const Bytes machine = cuda::memory_limit(files);
  EXPECT_EQ(machine, cuda::memory_limit({"/nowhere", root, root})) << "no group says anything";
  EXPECT_EQ(cuda::memory_free(files), Bytes{2} << 30);
  write("outer/inner/memory.max", "max");
  write("outer/inner/memory.current", "5000");
  EXPECT_EQ(cuda::memory_limit(files), machine);
  EXPECT_EQ(cuda::memory_free(files), Bytes{2} << 30);
  EXPECT_EQ(cuda::memory_refusal(Bytes{1} << 30, files), "");
  expect_says(cuda::memory_refusal(Bytes{2} << 30, files), "2147483648 bytes");
  write("outer/memory.max", "1073741824");
  write("outer/memory.current", "966367641");
  write("outer/memory.stat", "anon 1\nactive_file 214748364\ninactive_file 214748365");
  EXPECT_EQ(cuda::memory_limit(files), Bytes{1} << 30) << "of what it is nested in";
  EXPECT_EQ(cuda::memory_free(files), 536'870'912U) << "files are taken back on demand";
  EXPECT_EQ(cuda::memory_refusal(Bytes{256} << 20, files), "");
  expect_says(cuda::memory_refusal((Bytes{256} << 20) + 1, files), "left to others");
  write("outer/inner/memory.max", "8192");
  EXPECT_EQ(cuda::memory_limit(files), 8192U);
  EXPECT_EQ(cuda::memory_free(files), 3192U);
  std::filesystem::remove_all(root);
}

TEST_F(Cuda, GivesMemoryBack) {
  const fake::Holdings before = fake::holdings();
  {
    const auto backend = open_cuda(options_for(12'000, 20'000));
    const std::size_t full = fake::holdings().device_bytes;
    EXPECT_EQ(backend->resize_device(1), 1U);
    EXPECT_LT(fake::holdings().device_bytes, full / 2);
    EXPECT_EQ(backend->resize_device(12'000), 12'000U);
    EXPECT_EQ(fake::holdings().device_bytes, full);
    EXPECT_EQ(grow_pool(*backend, 20'000), 20'000U);
    const std::size_t pinned = fake::holdings().pinned_bytes;
    EXPECT_GE(pinned, 20'000 * stride);
    EXPECT_EQ(grow_pool(*backend, 100), 100U);
    EXPECT_LT(fake::holdings().pinned_bytes, pinned);
  }
  EXPECT_EQ(fake::holdings(), before);
}

TEST_F(Cuda, CopiesRunsThatSpanRegistrations) {
  const auto backend = open_cuda(options_for(64, 40'000));
  ASSERT_EQ(grow_pool(*backend, 40'000), 40'000U);
  const Subject on = testing::OnCuda::subject();
  for (FrameIndex i = 0; i < 32; ++i) on.fill(*backend, i, i);
  const FrameIndex end = 16'384;  // of the first 64 MiB
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, end - 16, 32}})));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{32, end - 16, 32}})));
  for (FrameIndex i = 0; i < 32; ++i) EXPECT_TRUE(on.holds(*backend, 32 + i, i));
}

// Each on streams of its own GPU; the double complains of memory used on a stream of another.
TEST_F(Cuda, SeveralGpusHaveACacheEach) {
  become({.devices = 2});
  using On = testing::OnCuda;
  CudaOptions second = options_for(4, 4);
  second.device = 1;
  const std::array backends = {open_cuda(options_for(4, 4)), open_cuda(second)};
  const std::array streams = {On::stream(5), Caller::get().stream_elsewhere()};
  for (const std::size_t i : {0U, 1U}) {
    Backend& backend = *backends[i];
    ASSERT_EQ(grow_pool(backend, 4), 4U);
    const Contents held = contents(backend, static_cast<std::uint32_t>(7 + i));
    backend.require_usable(streams[i]);
    EXPECT_THROW(backend.require_usable(streams[1 - i]), LogicError);
    On::write(backend, streams[i], 0, held);
    const Fence filled = backend.record(streams[i], Timing::unwanted);
    const Ticket write = submit(backend, to_pool, {{0, 0, 1}}, {{filled, {}}});
    const Ticket load = submit(backend, to_device, {{1, 0, 1}}, {{{}, write}});
    backend.depend(streams[i], {{}, load});
    const auto found = On::read(backend, streams[i], 1);
    ASSERT_EQ(collect(backend, 2).size(), 2U);
    Caller::get().synchronize(testing::handle_of(streams[i]));
    EXPECT_EQ(found(), held);
  }
  EXPECT_EQ(fake::take_violations(), std::vector<std::string>());
}

TEST_F(Cuda, RefusesMemoryThatIsNotThatGpus) {
  become({.devices = 2});
  const auto owner = open_cuda(options_for(12, 0));
  CudaOptions options = options_for(8, 8);
  options.device_memory = owner->address(4);
  const std::size_t held = fake::holdings().device_bytes;
  EXPECT_NE(open_cuda(options), nullptr);
  EXPECT_EQ(fake::holdings().device_bytes, held) << "none was taken beside the caller's";

  options.device = 1;
  expect_says(refusal_of<ConfigError>(options), "bytes of 'cuda:1': give memory of that GPU");
  options.device = 0;
  options.device_memory += 1;
  expect_says(refusal_of<ConfigError>(options), "is not aligned to 256 bytes");
  std::vector<std::byte> mine(std::size_t{8} * stride + 256);
  options.device_memory = mine.data() + 256 - reinterpret_cast<std::uintptr_t>(mine.data()) % 256;
  expect_says(refusal_of<ConfigError>(options), "bytes of 'cuda:0': give memory of that GPU");
  EXPECT_EQ(fake::take_violations(), std::vector<std::string>());
}

TEST_F(Cuda, SaysWhyItPinsNoMore) {
  const std::size_t now = fake::holdings().pinned_bytes;
  become({.pinnable_bytes = now + (std::size_t{100} << 20)});
  const auto backend = open_cuda(options_for(4, 40'000));
  const std::uint32_t frames = grow_pool(*backend, 40'000);
  EXPECT_EQ(frames, 24'576U) << "the first 96 MiB";
  expect_says(backend->pool_refusal(), "pinning more CPU memory failed: out of memory");
}

// Who goes on asking for as much gets it once the system has it, a second later.
TEST_F(Cuda, PinsMoreOnceTheSystemDoes) {
  const std::size_t now = fake::holdings().pinned_bytes;
  become({.pinnable_bytes = now + (std::size_t{100} << 20)});
  const auto backend = open_cuda(options_for(4, 40'000));
  ASSERT_LT(grow_pool(*backend, 40'000), 40'000U);
  become({});
  for (int i = 0; i < 400 && grow_pool(*backend, 40'000) < 40'000U; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  ASSERT_EQ(grow_pool(*backend, 40'000), 40'000U);
  EXPECT_EQ(backend->pool_refusal(), "");
  const Subject on = testing::OnCuda::subject();
  on.fill(*backend, 0, 7);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 39'999, 1}})));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{1, 39'999, 1}})));
  EXPECT_TRUE(on.holds(*backend, 1, 7));
}

TEST_F(Cuda, GoesOnWithMemoryThatIsNotPinned) {
  become({.pins = false});
  const auto backend = open_cuda({.frame_bytes = frame_bytes,
                                  .device_bytes = 4 * stride,
                                  .pool_bytes = 4 * stride,
                                  .driver = testing::driver_name()});
  EXPECT_EQ(backend->capabilities().pool_io, "pageable");
  expect_says(backend->capabilities().pool_io_reason, "does not pin");
  EXPECT_EQ(grow_pool(*backend, 4), 4U);
  EXPECT_TRUE(is_ok(finish(*backend, to_pool, {{0, 1, 2}})));
  EXPECT_TRUE(is_ok(finish(*backend, to_device, {{2, 1, 2}})));
}

TEST_F(Cuda, PinsNothingWhereTheGpuSharesThePageTables) {
  become(fake::gh200());
  fake::set_order(fake::Order::latest, 3);
  const fake::Holdings before = fake::holdings();
  const auto backend = open_cuda(options_for(64, 40'000));
  EXPECT_EQ(backend->capabilities().pool_io, "coherent");
  EXPECT_EQ(backend->capabilities().pool_io_reason, "");
  ASSERT_EQ(grow_pool(*backend, 40'000), 40'000U);
  EXPECT_EQ(fake::holdings().pinned_bytes, before.pinned_bytes);
  const Subject on = testing::OnCuda::subject();
  for (FrameIndex i = 0; i < 32; ++i) on.fill(*backend, i, i);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 100, 32}})));
  ASSERT_EQ(grow_pool(*backend, 200), 200U);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{32, 100, 32}})));
  for (FrameIndex i = 0; i < 32; ++i) EXPECT_TRUE(on.holds(*backend, 32 + i, i));
}

// What the device holds stays as it is: it may be the caller's.
TEST_F(Cuda, PinsCoherentMemoryWhereItsCopiesHoldUpTheCaller) {
  fake::Profile machine = fake::gh200();
  machine.coherent_waits = true;
  for (const bool pins : {true, false}) {
    machine.pins = pins;
    become(machine);
    fake::set_order(fake::Order::latest, 3);
    const Subject on = testing::OnCuda::subject();
    const auto owner = open_cuda(options_for(64, 0));
    for (FrameIndex i = 0; i < 64; ++i) on.fill(*owner, i, i);
    const std::size_t before = fake::holdings().pinned_bytes;  // the caller's own
    CudaOptions options = options_for(64, 40'000);
    options.device_memory = owner->address(0);
    auto backend = open_cuda(options);
    EXPECT_EQ(backend->capabilities().pool_io, pins ? "pinned" : "coherent");
    expect_says(backend->capabilities().pool_io_reason, "hold up who asks for them");
    if (!pins) expect_says(backend->capabilities().pool_io_reason, "does not pin");
    EXPECT_GT(backend->capabilities().in_place_share, 0);
    ASSERT_EQ(grow_pool(*backend, 40'000), 40'000U);
    EXPECT_EQ(fake::holdings().pinned_bytes - before, pins ? 40'000 * stride : 0);
    backend.reset();
    EXPECT_EQ(fake::holdings().pinned_bytes, before);
    for (FrameIndex i = 0; i < 64; ++i) EXPECT_TRUE(on.holds(*owner, i, i));
    for (const std::string& words : fake::take_violations()) ADD_FAILURE() << words;
  }
}

TEST_F(Cuda, TakesCpuMemoryAsItIsTold) {
  CudaOptions options = options_for(4, 4);
  options.pool_io = "coherent";
  expect_says(refusal_of<ConfigError>(options), "does not share the CPU's page tables");
  options.pool_io = "direct-uring";
  expect_says(refusal_of<ConfigError>(options), "use 'auto', 'pinned', 'coherent' or 'pageable'");
  options.pool_io = "pageable";
  EXPECT_EQ(open_cuda(options)->capabilities().pool_io, "pageable");
  become(fake::gh200());
  options.pool_io = "pinned";
  const std::size_t before = fake::holdings().pinned_bytes;  // the caller's own
  const auto backend = open_cuda(options);
  EXPECT_EQ(backend->capabilities().pool_io, "pinned");
  EXPECT_EQ(grow_pool(*backend, 4), 4U);
  EXPECT_GT(fake::holdings().pinned_bytes, before);
}

// By what the machine is, unless it is said.
TEST_F(Cuda, SaysHowMuchIsBestReadInPlace) {
  const auto share_of = [](const CudaOptions& options) {
    return open_cuda(options)->capabilities().in_place_share;
  };
  CudaOptions options = options_for(4, 4);
  EXPECT_EQ(share_of(options), 0);
  options.in_place_share = 0.25;
  EXPECT_EQ(share_of(options), 0.25);
  options.pool_io = "pageable";
  expect_says(refusal_of<ConfigError>(options), "cannot read a pool that is 'pageable'");
  become(fake::gh200());
  options = options_for(4, 4);
  EXPECT_NEAR(share_of(options), 450.0 / (450 + 4022), 1e-3);  // GB/s
  options.in_place_share = 0;
  EXPECT_EQ(share_of(options), 0);
  options = options_for(4, 0);
  EXPECT_EQ(share_of(options), 0) << "without a pool";
  become({.coherent = true, .memory_clock_khz = 0});
  EXPECT_EQ(share_of(options_for(4, 4)), 0) << "the driver does not say how fast memory is";
}

// A kernel may still read frames of the pool that are to go.
TEST_F(Cuda, ReadersOfThePoolComeBeforeItsEnd) {
  for (const bool coherent : {false, true}) {
    become(coherent ? fake::gh200() : fake::Profile{});
    fake::set_order(fake::Order::latest, 3);
    CudaOptions options = options_for(4, 40'000);
    options.in_place_share = 0.5;
    auto backend = open_cuda(options);
    ASSERT_EQ(grow_pool(*backend, 40'000), 40'000U);
    ASSERT_NE(backend->pool_address(), nullptr);
    std::uint32_t read = 0;
    const auto read_later = [&](FrameIndex frame) {
      const auto begin = reinterpret_cast<CUdeviceptr>(backend->pool_address() + frame * stride);
      const fake::Range range{begin, stride, false};
      fake::launch(Caller::get().stream(1), {&range, 1}, [&read] { ++read; });
    };
    read_later(39'999);
    EXPECT_EQ(backend->resize_pool(10).frames, 10U);
    EXPECT_EQ(read, 1U);
    read_later(9);
    backend.reset();
    EXPECT_EQ(read, 2U);
    for (const std::string& words : fake::take_violations()) ADD_FAILURE() << words;
  }
}

TEST_F(Cuda, DriversWithoutBatchesCopyOneByOne) {
  become({.driver_version = 12040});
  const auto backend = open_cuda(options_for(8, 8));
  ASSERT_EQ(grow_pool(*backend, 8), 8U);
  const auto before = fake::calls_by_name();
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, 1}, {2, 2, 1}, {4, 4, 1}})));
  auto after = fake::calls_by_name();
  EXPECT_EQ(after["cuMemcpyBatchAsync"],
            before.contains("cuMemcpyBatchAsync") ? before.at("cuMemcpyBatchAsync") : 0);
}

// What a step does to a backend: all that it calls but opening.
void use(Backend& backend) {
  const ComputeStream stream = testing::OnCuda::stream(1);
  if (grow_pool(backend, 8) < 8) return;
  const Fence filled = backend.record(stream, Timing::unwanted);
  const Ticket write = submit(backend, to_pool, {{0, 0, 2}, {3, 3, 1}}, {{filled, {}}});
  const Ticket load = submit(backend, to_device, {{4, 0, 2}}, {after(write)});
  backend.depend(stream, after(load));
  const Duplicate pair{4, 6};
  backend.duplicate(stream, {&pair, 1});
  static_cast<void>(backend.record(stream, Timing::wanted));
  backend.wait(forever);
  static_cast<void>(collect(backend, 2));
  static_cast<void>(backend.resize_device(5));
  static_cast<void>(backend.resize_device(8));
  static_cast<void>(backend.resize_pool(1));
}

// Whatever call of the driver fails: a refusal at opening, a lost device later, nothing leaked.
TEST_F(Cuda, SurvivesAnyCallThatFails) {
  static_cast<void>(testing::OnCuda::stream(1));
  const fake::Holdings before = fake::holdings();
  std::uint64_t failures = 0;
  for (std::uint64_t i = 1;; ++i) {
    const std::uint64_t calls = fake::calls();
    fake::fail_call(i, CUDA_ERROR_LAUNCH_FAILED);
    bool lost = false;
    try {
      const auto backend = open_cuda(options_for(8, 8));
      use(*backend);
      lost = !backend->health().ok;
    } catch (const ConfigError&) {
      lost = true;
    } catch (const CapacityError&) {
      lost = true;
    }
    failures += lost ? 1 : 0;
    const bool over = fake::calls() - calls < i;
    fake::fail_call(0, CUDA_SUCCESS);
    ASSERT_EQ(fake::holdings(), before) << "call " << i;
    if (over) break;
    ASSERT_LT(i, 1000U);
  }
  EXPECT_GT(failures, 20U);
}

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
