// A trace agrees with what was counted, and with itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

#include "pie/error.hpp"
#include "pie/trace.hpp"
#include "reference_model.hpp"
#include "serving.hpp"

namespace pie {
namespace {

using testing::Model;
using testing::Server;

constexpr std::size_t plenty = 100'000;

std::uint64_t frames_of(const Trace& trace, EventKind kind) {
  std::uint64_t frames = 0;
  for (const Event& event : trace.events) frames += event.kind == kind ? event.frames : 0;
  return frames;
}

Nanos time_of(const Trace& trace, EventKind kind) {
  Nanos time = 0;
  for (const Event& event : trace.events) {
    time += event.kind == kind ? event.ended_ns - event.began_ns : 0;
  }
  return time;
}

// Each step has all its layers, one after the other within it, and their attention within them.
void expect_whole(const Trace& trace, std::uint32_t layers) {
  std::map<std::uint64_t, std::vector<Event>> of_step;
  std::map<std::uint64_t, std::uint32_t> attended;
  for (const Event& event : trace.events) {
    EXPECT_LE(event.began_ns, event.ended_ns);
    if (event.kind == EventKind::layer) of_step[event.step].push_back(event);
    if (event.kind != EventKind::attention) continue;
    const Event& layer = of_step[event.step].back();
    EXPECT_EQ(layer.layer, event.layer);
    EXPECT_EQ(layer.began_ns, event.began_ns);
    EXPECT_LE(event.ended_ns, layer.ended_ns);
    ++attended[event.step];
  }
  for (const StepEvent& step : trace.steps) {
    const std::vector<Event>& found = of_step[step.step];
    ASSERT_EQ(found.size(), layers);
    EXPECT_EQ(attended[step.step], layers);
    EXPECT_LE(step.began_ns, found.front().began_ns);
    EXPECT_EQ(step.ended_ns, found.back().ended_ns);
    if (of_step.contains(step.step + 1)) {
      const Nanos next = of_step[step.step + 1].front().began_ns;
      EXPECT_LE(step.ended_ns, next);
    }
    for (std::uint32_t i = 0; i < layers; ++i) {
      EXPECT_EQ(found[i].layer, i);
      EXPECT_LE(found[i].streamed, found[i].frames);
      EXPECT_EQ(found[i].began_ns, i > 0 ? found[i - 1].ended_ns : found[i].began_ns);
    }
  }
}

TEST(Trace, OfAComputingThreadIsWhatIsCounted) {
  const Geometry geometry = testing::small_geometry(6);
  Model model(geometry, "fit", testing::small_machine(geometry, 60, 1000));
  const SequenceId id = model.add();
  model.cache().start_trace(plenty);
  model.step({{id, 320}}, Reader::kernel, geometry.layers);
  for (int i = 0; i < 20; ++i) model.step({{id, 1}}, Reader::kernel, geometry.layers);
  model.step({{id, 1}}, Reader::kernel, 3);  // and aborted
  const Stats stats = model.cache().stats();
  const Trace trace = model.cache().take_trace();
  ASSERT_EQ(trace.steps.size(), 21U);
  EXPECT_EQ(trace.dropped, 0U);
  expect_whole(trace, geometry.layers);
  const Bytes frame = geometry.frame_bytes();
  EXPECT_EQ(frames_of(trace, EventKind::load) * frame, stats.streamed_bytes);
  EXPECT_EQ(frames_of(trace, EventKind::write) * frame, stats.written_bytes);
  EXPECT_EQ(time_of(trace, EventKind::stall), stats.stall_ns);
  EXPECT_FALSE(trace.steps.front().decode);
  EXPECT_EQ(trace.steps.front().rows, 320U);
  EXPECT_TRUE(trace.steps.back().decode);
  EXPECT_GT(trace.steps.back().ring_frames, 0U);
  EXPECT_GT(trace.steps.back().loads.frames, 0U);
}

TEST(Trace, OfAStreamIsInItsTime) {
  testing::Serving serving = testing::gh200_34b();
  serving.geometry.layers = 12;
  serving.device_bytes = 1'200'000'000;
  serving.weights_ns = 4e6;
  Server server(serving, "adaptive", make_objective("throughput", 0.05, 0));
  for (int i = 0; i < 40; ++i) {
    if (server.running() < 14) server.start({2048, 1000});
    server.decode();
  }
  server.cache().start_trace(plenty);
  const Nanos stall = server.cache().stats().stall_ns;
  const Bytes streamed = server.cache().stats().streamed_bytes;
  for (int i = 0; i < 10; ++i) server.decode();
  const Trace trace = server.cache().take_trace();
  const Stats stats = server.cache().stats();
  ASSERT_EQ(trace.steps.size(), 10U);
  expect_whole(trace, 12);
  EXPECT_EQ(time_of(trace, EventKind::stall), stats.stall_ns - stall);
  const auto loaded =
      static_cast<double>(frames_of(trace, EventKind::load) * serving.geometry.frame_bytes());
  EXPECT_GT(loaded, 0);
  // What is asked for ahead of the first and of the last step is under way.
  EXPECT_NEAR(loaded / static_cast<double>(stats.streamed_bytes - streamed), 1, 0.3);
  for (std::size_t i = 0; i < 10; ++i) {
    const StepEvent& step = trace.steps[i];
    EXPECT_EQ(step.step, i + 1);
    EXPECT_GT(step.budget.frames, 0U);
    EXPECT_NE(step.budget.reason, Reason::starting);
    EXPECT_GE(static_cast<double>(step.ended_ns - step.began_ns), serving.weights_ns);
    EXPECT_GE(step.began_ns, i > 0 ? trace.steps[i - 1].ended_ns : 0);
  }
}

TEST(Trace, KeepsTheLastOfWhatIsMore) {
  const Geometry geometry = testing::small_geometry(4);
  Model model(geometry, "off", testing::small_machine(geometry, 60, 0));
  const SequenceId id = model.add();
  model.cache().start_trace(10);
  for (int i = 0; i < 30; ++i) model.step({{id, 1}}, Reader::kernel, geometry.layers);
  const Trace trace = model.cache().take_trace();
  ASSERT_EQ(trace.steps.size(), 10U);
  ASSERT_EQ(trace.events.size(), 10U);
  EXPECT_EQ(trace.dropped, 20U + 30 * 8 - 10);
  for (std::size_t i = 0; i < 10; ++i) EXPECT_EQ(trace.steps[i].step, 21 + i);
  EXPECT_EQ(trace.events.back().step, 30U);
  EXPECT_EQ(trace.events.back().layer, 3U);
  EXPECT_TRUE(std::ranges::is_sorted(trace.events, {}, &Event::step));
}

TEST(Trace, IsOfWhatComesAfterItsStart) {
  const Geometry geometry = testing::small_geometry(4);
  Model model(geometry, "fit", testing::small_machine(geometry, 60, 100));
  const SequenceId id = model.add();
  EXPECT_TRUE(model.cache().take_trace().steps.empty()) << "none was started";
  for (int round = 0; round < 2; ++round) {
    model.step({{id, 5}}, Reader::kernel, geometry.layers);
    model.cache().start_trace(plenty);
    model.step({{id, 1}}, Reader::kernel, geometry.layers);
    const Trace trace = model.cache().take_trace();
    ASSERT_EQ(trace.steps.size(), 1U);
    EXPECT_EQ(trace.steps[0].step, 1U);
    model.step({{id, 1}}, Reader::kernel, geometry.layers);
    EXPECT_TRUE(model.cache().take_trace().events.empty());
  }
}

TEST(Trace, RefusesLengthsThatCannotBe) {
  const Geometry geometry = testing::small_geometry(4);
  Model model(geometry, "fit", testing::small_machine(geometry, 60, 100));
  for (const std::size_t events : {std::size_t{0}, std::size_t{10'000'001}}) {
    EXPECT_THROW(model.cache().start_trace(events), ConfigError);
  }
}

}  // namespace
}  // namespace pie
