// How much CPU memory this process may have: the machine's, and what its control groups (version 2)
// allow, of which each is bounded by all that it is nested in.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "pie/error.hpp"
#include "pie/types.hpp"

namespace pie::cuda {

// `of_self` says which group the process is in, `root` is where the groups are mounted.
struct MemoryFiles {
  std::filesystem::path of_self = "/proc/self/cgroup";
  std::filesystem::path root = "/sys/fs/cgroup";
  std::filesystem::path machine = "/proc/meminfo";
};

// The process's group and all that it is nested in.
[[nodiscard]] inline std::vector<std::filesystem::path> memory_groups(const MemoryFiles& files) {
  std::vector<std::filesystem::path> found;
  std::ifstream groups(files.of_self);
  for (std::string line; std::getline(groups, line);) {
    if (!line.starts_with("0::/")) continue;
    for (std::filesystem::path group = line.substr(4);; group = group.parent_path()) {
      found.push_back(files.root / group);
      if (group.empty()) break;
    }
  }
  return found;
}

// The number after `key` in a file of lines that begin with one; 0 where there is none.
[[nodiscard]] inline Bytes number_after(const std::filesystem::path& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string word; file >> word;) {
    Bytes number = 0;
    if (word == key && file >> number) return number;
  }
  return 0;
}

// Ever.
[[nodiscard]] inline Bytes memory_limit(const MemoryFiles& files = {}) {
  Bytes limit =
      static_cast<Bytes>(::sysconf(_SC_PHYS_PAGES)) * static_cast<Bytes>(::sysconf(_SC_PAGESIZE));
  for (const std::filesystem::path& group : memory_groups(files)) {
    Bytes bytes = 0;
    if (std::ifstream(group / "memory.max") >> bytes) limit = std::min(limit, bytes);
  }
  return limit;
}

// Now, beside what is taken already. What a group uses for files the system takes back on demand.
[[nodiscard]] inline Bytes memory_free(const MemoryFiles& files = {}) {
  const Bytes available = number_after(files.machine, "MemAvailable:") * 1024;
  Bytes free = available > 0 ? available : memory_limit(files);
  for (const std::filesystem::path& group : memory_groups(files)) {
    Bytes limit = 0;
    Bytes used = 0;
    if (!(std::ifstream(group / "memory.max") >> limit)) continue;
    if (!(std::ifstream(group / "memory.current") >> used)) continue;
    const Bytes cached = number_after(group / "memory.stat", "inactive_file") +
                         number_after(group / "memory.stat", "active_file");
    used -= std::min(used, cached);
    free = std::min(free, limit - std::min(limit, used));
  }
  return free;
}

// Why the process should not take so much more of it; empty: it may. A part is left to all others:
// what is pinned cannot be swapped, and where the last of it is taken the system kills somebody.
[[nodiscard]] inline std::string memory_refusal(Bytes more, const MemoryFiles& files = {}) {
  const Bytes spared = std::max(Bytes{256} << 20, memory_limit(files) / 64);
  const Bytes free = memory_free(files);
  if (free >= more && free - more >= spared) return "";
  return sized(free) +
         " of CPU memory are free, by the machine and the process's control groups, and " +
         sized(spared) + " are left to others: free some";
}

}  // namespace pie::cuda
