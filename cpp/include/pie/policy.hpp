// What stays on the device and what is streamed: a pure function from a snapshot to a plan.
//
// A policy reads no clock and keeps no memory; everything it may know is in the snapshot. The plan
// says for every block which lever serves it: the first streamed_blocks of a layer of a branch are
// streamed, the others resident. Streaming a prefix keeps both sides adjacent in the pool, so
// copies are large, and growing or shrinking it moves one boundary. Boundaries stay where they are
// while that serves, and where it does not a few of them move, by more than this one step needs.
#pragma once

#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "pie/types.hpp"

namespace pie {

// The blocks that some sequences share, or one has for itself, in the layers of one window, as they
// will be when the step has ended. Counts are per layer.
struct BranchView {
  std::uint32_t layers = 0;
  std::uint32_t full_blocks = 0;    // can be written, and then streamed
  std::uint32_t pinned_blocks = 0;  // stay on the device whatever the plan: the partial last block,
                                    // and one that the step fills, which an abort must give back
  bool active = false;              // read in the step
  std::uint32_t layer_class = 0;    // views of one class are of the same layers
  std::uint32_t streamed_frames = 0;  // by the plan in force, all its layers together
  std::uint32_t tokens = 0;           // held; a partial block that nobody fills counts as full
};

struct Snapshot {
  std::uint32_t layers = 0;            // of the model
  std::uint32_t device_frames = 0;     // for blocks and ring: capacity less staging
  std::uint32_t pool_frames = 0;       // the most the pool may hold; 0: there is none
  std::uint32_t copy_frames_best = 1;  // copies of this many frames reach the link's rate
  std::uint32_t growth_frames = 0;     // that a step of a token a sequence fills on average
  std::uint32_t ring_frames = 0;       // of the plan in force
  std::uint32_t wanted_frames = 0;     // that somebody wants streamed, though they may fit
  bool whole_layers = false;           // all blocks of a layer are to be on the device at once
  bool streams = false;                // compute runs on a stream
  std::span<const BranchView> branches;
};

struct Plan {
  std::uint32_t ring_frames = 0;
  std::vector<std::uint32_t> streamed_frames;  // per branch view, all its layers together
  bool write_behind = false;                   // write filled frames before the plan streams them

  [[nodiscard]] std::uint64_t streamed() const {
    return std::accumulate(streamed_frames.begin(), streamed_frames.end(), std::uint64_t{0});
  }
};

// Blocks of a view's `layer` that are streamed when `streamed_frames` are, spread evenly over its
// layers.
[[nodiscard]] std::uint32_t streamed_blocks(std::uint32_t streamed_frames, std::uint32_t layer,
                                            std::uint32_t layers);

// Whether a plan says of each of the snapshot's views how many of its full frames are streamed.
[[nodiscard]] bool is_plan_for(const Snapshot& snapshot, const Plan& plan);

// Frames the device must hold for `plan`: resident, pinned and ring. More than
// `snapshot.device_frames` means that the step cannot run.
[[nodiscard]] std::uint64_t device_frames_needed(const Snapshot& snapshot, const Plan& plan);

class Policy {
 public:
  Policy() = default;
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;
  virtual ~Policy() = default;

  [[nodiscard]] virtual Plan plan(const Snapshot& snapshot) const = 0;
  [[nodiscard]] virtual std::string name() const = 0;
};

// "off": nothing is streamed. "adaptive", "fit": just what the budget cannot hold, at the lowest
// price for what runs, or what is wanted where that is more. "fixed:F": the share F of the full
// frames, more where the budget demands.
// Throws ConfigError for anything else.
[[nodiscard]] std::unique_ptr<Policy> make_policy(const std::string& name);

}  // namespace pie
