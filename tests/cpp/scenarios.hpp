// Loads and machines that change while a server runs, on simulated machines.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "serving.hpp"

namespace pie::testing {

// How many requests want to run at a step, of what kind, and what happens to the machine before it.
struct Scenario {
  std::string name;
  std::function<std::size_t(int step)> wanted;
  Request request;
  std::function<void(Server&, int step)> before = [](Server&, int) {};
  std::vector<int> changes = {};  // steps at which what is best changes
  SimFaults faults = {};
  std::size_t at_once = 4;  // requests that are admitted before a step, at most
};

// Requests that the device of a machine holds at once, half way through their answers.
[[nodiscard]] inline std::size_t fits(const Serving& serving, const Request& request) {
  const double tokens = static_cast<double>(serving.device_bytes) / token_bytes(serving);
  return static_cast<std::size_t>(tokens / (request.prompt + request.answer / 2.0));
}

// Prompts of 2,048 tokens, or as much shorter as it takes for the device to hold 32 of them: with
// fewer, which number of them is best says more of how they divide the device than of the machine.
[[nodiscard]] inline Request usual_request(const Serving& serving) {
  Request usual{2048, 128};
  while (fits(serving, usual) < 32 && usual.prompt > 128) usual = {usual.prompt / 2, usual.answer};
  return usual;
}

// `usual`: what is requested, of which the device holds `fits` at once.
[[nodiscard]] inline std::vector<Scenario> scenarios(const Serving& serving, const Request& usual,
                                                     int steps) {
  const std::size_t fits = testing::fits(serving, usual);
  const int third = steps / 3;
  const auto many = [fits](int) { return 4 * fits; };
  const Request growing{usual.prompt / 2, usual.prompt * 75 / 128};
  const auto slow_link = [third](Server& server, int step) {
    if (step == third) server.slow_link(4);
    if (step == 2 * third) server.slow_link(1);
  };
  SimFaults lying;
  lying.lying = 1;
  lying.lying_bytes = serving.device_bytes / 4;
  const auto shrink = [third](Server& server, int step) {
    if (step != third) return;
    const Stats stats = server.cache().stats();
    server.cache().resize(stats.device_bytes / 5 * 4, stats.pool_bytes);
  };
  const auto burst = [fits, third](int step) {
    return step < third || step >= 2 * third ? fits * 3 / 4 : fits * 3 / 2;
  };
  const auto prompts = [usual](Server& server, int step) {
    if (step % 16 == 0) server.prefill({2 * usual.prompt, 0});
  };
  std::vector<Scenario> all = {
      {"steady decode", many, usual},
      {"growing contexts", many, growing},
      {"a burst comes and goes", burst, usual, [](Server&, int) {}, {third, 2 * third}},
      {"long prompts in between", many, usual, prompts},
      {"a link 4 times slower for a while", many, usual, slow_link, {third, 2 * third}},
      {"a link that lies about its rate", many, usual, [](Server&, int) {}, {}, lying},
      {"memory that shrinks", many, usual, shrink, {third}}};
  for (Scenario& scenario : all) scenario.at_once = std::max<std::size_t>(4, fits / 8);
  return all;
}

// What a server came to in a scenario, once it had `settle` steps to learn, and after each change
// again.
struct Outcome {
  double tokens_per_s = 0;
  double slow_share = 0;  // of decode steps took more than 1.05 of what they would have alone
  double running = 0;     // on average
  double capacity = 0;    // on average, of what arithmetic allows: see `tokens_allowed`
  int reversals = 0;      // of the budget's direction
  int counted = 0;        // steps
};

// With `cap` requests at once at most, or with 0 as many as the headroom allows.
inline Outcome play(Server& server, const Scenario& scenario, int steps, std::size_t cap,
                    int settle = 32) {
  std::mt19937 random(9);
  Outcome outcome;
  double tokens = 0;
  double slow = 0;
  Nanos time = 0;
  int last_change = 0;
  Bytes budget = 0;
  int sign = 0;
  for (int step = 0; step < steps; ++step) {
    scenario.before(server, step);
    if (std::ranges::find(scenario.changes, step) != scenario.changes.end()) last_change = step;
    const std::size_t wanted = scenario.wanted(step);
    if (server.running() > wanted) server.leave(server.running() - wanted);
    const Nanos began = server.now();
    for (std::size_t more = 0; more < scenario.at_once &&
                               server.running() < (cap > 0 ? std::min(cap, wanted) : wanted);) {
      Request next = scenario.request;
      next.answer = next.answer / 2 + static_cast<std::uint32_t>(random() % next.answer);
      if (cap == 0 && !server.admit(next)) break;
      if (cap > 0) server.start(next);
      ++more;
    }
    const auto made = static_cast<double>(server.decode());
    if (step - last_change < settle) continue;
    tokens += made;
    time += server.now() - began;
    slow += server.step_ns() > 1.05 * server.alone_ns() ? 1 : 0;
    outcome.running += static_cast<double>(server.running());
    outcome.capacity += server.capacity_share(0.05);
    const Bytes now = server.cache().stats().budget_bytes;
    const int way = now > budget ? 1 : now < budget ? -1 : 0;
    outcome.reversals += budget > 0 && way * sign < 0 ? 1 : 0;
    if (way != 0) sign = way;
    budget = now;
    ++outcome.counted;
  }
  outcome.tokens_per_s = tokens * 1e9 / static_cast<double>(time);
  outcome.slow_share = slow / outcome.counted;
  outcome.running /= outcome.counted;
  outcome.capacity /= outcome.counted;
  return outcome;
}

// As many requests as the headroom allows. For throughput half of what is answered on average is
// kept free for each that runs; else all that they may come to answer, since those that come
// together grow together.
inline Outcome play_adaptive(const Serving& serving, const Scenario& scenario, int steps,
                             const std::string& objective, Nanos* took = nullptr) {
  const std::uint32_t answer = scenario.request.answer;
  const std::uint32_t ahead = objective == "throughput" ? answer / 2 : answer * 3 / 2;
  Server server(serving, "adaptive", make_objective(objective, 0.05, 0), ahead, scenario.faults);
  const Outcome outcome = play(server, scenario, steps, 0);
  if (took != nullptr) *took = server.now();
  return outcome;
}

// Tokens a second with the best of five fixed numbers of requests at most.
inline double best_of_fixed(const Serving& serving, const Scenario& scenario, int steps,
                            std::size_t fits) {
  double best = 0;
  for (const double times : {0.8, 1.0, 1.15, 1.3, 1.5}) {
    Server server(serving, "fit", {}, 64, scenario.faults);
    const auto cap = static_cast<std::size_t>(static_cast<double>(fits) * times);
    best = std::max(best, play(server, scenario, steps, cap).tokens_per_s);
  }
  return best;
}

}  // namespace pie::testing
