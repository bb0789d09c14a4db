// Directories, alignment and growth of the pool file. See pool_file.hpp.
#include "pool_file.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string_view>
#include <system_error>

#include "pie/backends.hpp"
#include "pie/error.hpp"

namespace pie {
namespace {

constexpr Bytes chunk_bytes = Bytes{64} << 20;
constexpr Bytes block_bytes_max = 4096;
constexpr std::string_view memory_prefix = "tmpfs:";

std::string describe(int error) { return std::generic_category().message(error); }

bool has_memory_prefix(const std::string& dir) { return dir.starts_with(memory_prefix); }

// The directory itself, without a prefix.
std::string path_of(const std::string& dir) {
  if (dir.empty()) return default_pool_dir();
  return has_memory_prefix(dir) ? dir.substr(memory_prefix.size()) : dir;
}

bool is_directory(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

bool is_memory(const std::string& path) {
  struct statfs status{};
  if (::statfs(path.c_str(), &status) != 0) return false;
  return status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC;
}

bool is_writable(const std::string& path) { return ::access(path.c_str(), W_OK | X_OK) == 0; }

[[noreturn]] void refuse_dir(const std::string& path, const std::string& because) {
  throw ConfigError("pool_dir '" + path + "' cannot hold the pool file: " + because);
}

// What to do about an error from making a file.
const char* remedy_of(int error) {
  switch (error) {
    case ENOSPC:
      return "Free space or inodes on its disk, or name another.";
    case EMFILE:
    case ENFILE:
      return "Close files, or raise the limit on open ones (ulimit -n).";
    case EDQUOT:
      return "Free some of this user's quota, or name another.";
    default:
      return "Make it writable for this user or name another.";
  }
}

void check_dir(const std::string& path, bool memory_allowed) {
  if (::access(path.c_str(), F_OK) != 0) {
    refuse_dir(path, describe(errno) + ". Make the directory or name another.");
  }
  if (!is_directory(path)) refuse_dir(path, "it is not a directory. Name one on a disk.");
  if (is_memory(path) && !memory_allowed) {
    refuse_dir(path,
               "it is on tmpfs, which is memory and not disk. Name a directory on a disk, or '" +
                   std::string(memory_prefix) + path + "' to take memory on purpose.");
  }
  if (!is_writable(path)) {
    refuse_dir(path, describe(errno) + ". " + remedy_of(errno));
  }
}

// Opened without direct I/O, since a file system that lacks it may refuse only after making the
// file. A named file is unlinked at once.
int make_file(const std::string& path) {
  const int nameless = ::open(path.c_str(), O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (nameless >= 0) return nameless;
  std::string name = path + "/pie-pool-XXXXXX";
  const int named = ::mkostemp(name.data(), O_CLOEXEC);
  if (named < 0) refuse_dir(path, describe(errno) + " when making a file. " + remedy_of(errno));
  ::unlink(name.c_str());
  return named;
}

// What direct I/O on this file asks of offsets and addresses, 0 where the file cannot do it. More,
// the file system's block, unless that pads a frame by over an eighth: to ext4 and XFS a write of
// part of a block is exclusive, and waits for every transfer in flight on the file.
Bytes direct_alignment(int file, Bytes frame_bytes) {
  struct statx status{};
  unsigned mask = STATX_BASIC_STATS;
#ifdef STATX_DIOALIGN
  mask |= STATX_DIOALIGN;
#endif
  if (::statx(file, "", AT_EMPTY_PATH, mask, &status) != 0) return block_bytes_max;
  const Bytes block = std::min<Bytes>(status.stx_blksize, block_bytes_max);
#ifdef STATX_DIOALIGN
  if ((status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) return 0;
    const auto least = std::max<Bytes>(status.stx_dio_offset_align, status.stx_dio_mem_align);
    const bool pads_much = round_up(frame_bytes, block) - frame_bytes > frame_bytes / 8;
    return pads_much ? least : std::max(block, least);
  }
#endif
  return block;
}

bool set_direct(int file) {
  const int flags = ::fcntl(file, F_GETFL);
  return flags >= 0 && ::fcntl(file, F_SETFL, flags | O_DIRECT) == 0;
}

// 0 or an errno value. Taking the space makes reads of it zeros; no byte is written.
int take_space(int file, Bytes from, Bytes to) {
  while (::fallocate(file, 0, static_cast<off_t>(from), static_cast<off_t>(to - from)) != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

// Gives back what lies beyond `bytes`. Where that fails the space is merely lost to others.
void cut(int file, Bytes bytes) {
  if (::ftruncate(file, static_cast<off_t>(bytes)) != 0) return;
}

}  // namespace

PoolFile::PoolFile(const std::string& dir, bool direct, Bytes frame_bytes) : dir_(path_of(dir)) {
  check_dir(dir_, has_memory_prefix(dir));
  descriptor_ = make_file(dir_);
  const int error = take_space(descriptor_, 0, 1);
  if (error == EOPNOTSUPP || error == ENOSYS) {
    ::close(descriptor_);
    refuse_dir(dir_,
               "its file system cannot take space in advance (fallocate), so a write could meet a "
               "full disk. Name a directory on ext4, XFS, btrfs or tmpfs.");
  }
  cut(descriptor_, 0);
  // Memory accepts the flag and means nothing by it.
  const Bytes alignment =
      direct && !is_memory(dir_) ? direct_alignment(descriptor_, frame_bytes) : 0;
  direct_ = alignment != 0 && set_direct(descriptor_);
  alignment_ = direct_ ? alignment : buffered_alignment;
}

PoolFile::~PoolFile() { ::close(descriptor_); }

Bytes PoolFile::grow(Bytes asked) {
  refusal_.clear();
  const int error = asked > bytes_ ? extend(asked) : 0;
  if (error != 0) {
    refusal_ = "the pool file in '" + dir_ + "' cannot grow from " + std::to_string(bytes_) +
               " to " + std::to_string(asked) + " bytes: " + describe(error) + " (" +
               std::to_string(free_disk_bytes(dir_)) +
               " bytes are free there). Free some, or name another pool_dir or a smaller pool.";
  }
  return bytes_;
}

void PoolFile::shrink(Bytes bytes) {
  if (bytes >= bytes_) return;
  cut(descriptor_, bytes);
  bytes_ = bytes;
}

int PoolFile::extend(Bytes to) {
  const int error = take_space(descriptor_, bytes_, to);
  if (error == 0) {
    bytes_ = to;
  } else {
    cut(descriptor_, bytes_);  // a failed attempt may have taken all there was
  }
  return error;
}

std::string default_pool_dir() {
  const char* named = std::getenv("TMPDIR");
  for (const std::string path : {named != nullptr ? named : "", "/var/tmp", "/tmp"}) {
    if (is_directory(path) && is_writable(path) && !is_memory(path)) return path;
  }
  throw ConfigError(
      "there is no default place for the pool file: none of $TMPDIR, /var/tmp and /tmp is a "
      "writable "
      "directory on a disk. Name one as pool_dir.");
}

Bytes free_disk_bytes(const std::string& dir) {
  const std::string path = path_of(dir);
  struct statvfs status{};
  if (::statvfs(path.c_str(), &status) != 0) refuse_dir(path, describe(errno) + ".");
  return Bytes{status.f_bavail} * status.f_frsize;
}

}  // namespace pie
