// What a server gains that admits by the cache's headroom, on simulated machines.
//
//   adaptive [steps]              on three machines, requests as fast as they are admitted
//   adaptive scenarios            on five, loads and machines that change (scenarios.hpp)
//   adaptive scenarios N [steps]  on the N-th of them; contexts that grow do so by 600 to 1,800
//                                 tokens, so that what is too much shows in some 900 steps only
//
// Requests of 2,048 tokens come as fast as they are admitted, answer 64 to 319 tokens each, and go.
// First with fixed numbers of them at once, from what the device holds (1.00) up; then as many as
// the headroom allows, for the most throughput and for steps within 5 % of what they would take
// with all their KV on the device. Every copy and every step takes what the model of the machine
// says, so the figures are the same wherever this runs.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "scenarios.hpp"

namespace {

using pie::testing::Served;
using pie::testing::Server;
using pie::testing::Serving;

constexpr std::uint32_t prompt = 2048;
constexpr double answer = 192;       // on average
constexpr std::uint32_t ahead = 64;  // tokens of each that there is to be room for

void print(const char* what, const Served& served, double best) {
  std::printf(
      "  %-22s %6.1f running, %8.0f tokens/s, %5.2f of the best, %4.1f %% of KV streamed, "
      "%5.1f %% of steps beyond 1.05\n",
      what, served.running, served.tokens_per_s, served.tokens_per_s / best,
      100 * served.streamed_share, 100 * served.slow_share);
  std::fflush(stdout);
}

Served serve(const Serving& serving, const std::string& objective, std::size_t running, int steps) {
  Server server(serving, "adaptive", pie::make_objective(objective, 0.05, 0), ahead);
  return pie::testing::serve(server, steps, running, prompt);
}

void measure(const Serving& serving, int steps) {
  const double tokens =
      static_cast<double>(serving.device_bytes) / pie::testing::token_bytes(serving);
  const double fits = tokens / (prompt + answer / 2);
  std::printf("%s: the device holds %.0f requests\n", serving.name.c_str(), fits);
  double best = 0;
  for (const double times : {0.75, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75}) {
    const auto running = static_cast<std::size_t>(fits * times);
    const Served served = serve(serving, "throughput", running, steps);
    best = std::max(best, served.tokens_per_s);
    print(("fixed, " + std::to_string(times).substr(0, 4)).c_str(), served, best);
  }
  print("adaptive, throughput", serve(serving, "throughput", 0, steps), best);
  print("adaptive, transparent", serve(serving, "transparent", 0, steps), best);
}

// A model of 36 layers whose steps are mostly its weights, as much of it as is simulated in
// minutes.
Serving deep_machine() {
  Serving serving = pie::testing::small_machine();
  serving.geometry.layers *= 3;
  serving.device_bytes *= 3;
  serving.pool_bytes *= 3;
  serving.weights_ns *= 3;
  serving.prefill_ns_per_token *= 3;
  return serving;
}

void measure_scenarios(const Serving& serving, int steps) {
  const pie::testing::Request usual = pie::testing::usual_request(serving);
  const std::size_t fits = pie::testing::fits(serving, usual);
  std::printf("%s: the device holds %zu requests of %u tokens\n", serving.name.c_str(), fits,
              usual.prompt);
  for (const auto& scenario : pie::testing::scenarios(serving, usual, steps)) {
    const double best = pie::testing::best_of_fixed(serving, scenario, steps, fits);
    const auto fast = pie::testing::play_adaptive(serving, scenario, steps, "throughput");
    const auto even = pie::testing::play_adaptive(serving, scenario, steps, "transparent");
    std::printf(
        "  %-34s throughput %5.2f of the best of five fixed numbers, %d reversals; transparent "
        "%5.2f, %4.1f %% of steps beyond 1.05, room for %.2f of what arithmetic allows\n",
        scenario.name.c_str(), fast.tokens_per_s / best, fast.reversals, even.tokens_per_s / best,
        100 * even.slow_share, even.capacity);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool scenarios = argc > 1 && std::string(argv[1]) == "scenarios";
  const int steps = argc > 1 ? std::atoi(argv[1]) : 480;
  try {
    if (scenarios) {
      const std::vector<Serving> machines = {
          deep_machine(), pie::testing::gh200_opt_13b(), pie::testing::h100_llama_8b(),
          pie::testing::rtx4090_27b(), pie::testing::cpu_small()};
      const std::size_t first = argc > 2 ? std::strtoul(argv[2], nullptr, 10) - 1 : 0;
      const std::size_t last = argc > 2 ? first + 1 : machines.size();
      const int scenario_steps = argc > 3 ? std::atoi(argv[3]) : 240;
      for (std::size_t i = first; i < last; ++i) measure_scenarios(machines.at(i), scenario_steps);
      return 0;
    }
    for (const Serving& serving :
         {pie::testing::gh200_34b(), pie::testing::gh200_opt_13b(), pie::testing::rtx4090_27b()}) {
      measure(serving, steps);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
