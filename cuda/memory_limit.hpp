// How much CPU memory this process may ever have: the machine's, or what the tightest of its
// control groups (version 2) allows.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

#include "pie/types.hpp"

namespace pie::cuda {

// `of_self` says which group the process is in, `root` is where the groups are mounted.
[[nodiscard]] inline Bytes memory_limit(const std::filesystem::path& of_self = "/proc/self/cgroup",
                                        const std::filesystem::path& root = "/sys/fs/cgroup") {
  Bytes limit =
      static_cast<Bytes>(::sysconf(_SC_PHYS_PAGES)) * static_cast<Bytes>(::sysconf(_SC_PAGESIZE));
  std::ifstream groups(of_self);
  for (std::string line; std::getline(groups, line);) {
    if (!line.starts_with("0::/")) continue;
    // A group is bounded by all that it is nested in.
    for (std::filesystem::path group = line.substr(4);; group = group.parent_path()) {
      Bytes bytes = 0;
      if (std::ifstream(root / group / "memory.max") >> bytes) limit = std::min(limit, bytes);
      if (group.empty()) break;
    }
  }
  return limit;
}

}  // namespace pie::cuda
