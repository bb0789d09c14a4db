// The host backend: the conformance suite in each way of doing I/O, and what only it promises,
// which is where its file lies and who can see it, that memory and disk are taken when needed and
// not before, and that a full disk or a failing one is reported and never worse than that.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>

#include "conformance.hpp"
#include "pie/backends.hpp"

namespace pie {
namespace {

using namespace conformance;
namespace fs = std::filesystem;

constexpr Bytes frame_bytes = 12288;  // 3 blocks of most disks
constexpr Bytes mib = Bytes{1} << 20;

HostOptions options_for(std::uint32_t device_frames, std::uint32_t pool_frames,
                        const std::string& pool_io = "auto", const std::string& pool_dir = "") {
  return {.frame_bytes = frame_bytes,
          .device_bytes = device_frames * frame_bytes,
          .pool_bytes = pool_frames * frame_bytes,
          .pool_dir = pool_dir,
          .pool_io = pool_io};
}

// The calling thread computes.
Subject on_this_thread(std::string name, const std::string& pool_io,
                       const std::string& pool_dir = "") {
  return {.name = std::move(name),
          .open =
              [=](std::uint32_t device_frames, std::uint32_t pool_frames) {
                return open_host(options_for(device_frames, pool_frames, pool_io, pool_dir));
              },
          .stream = [](std::uint32_t number) -> ComputeStream { return {number}; },
          .write = [](Backend& backend, ComputeStream /*stream*/, FrameIndex frame,
                      const Contents& bytes) { std::ranges::copy(bytes, backend.address(frame)); },
          .read = [](Backend& backend, ComputeStream /*stream*/, FrameIndex frame) -> Read {
            const std::byte* at = backend.address(frame);
            return
                [found = Contents(at, at + backend.capabilities().frame_stride)] { return found; };
          },
          .synchronize = [](Backend& /*backend*/, ComputeStream /*stream*/) {}};
}

// What `open_host` says when it refuses these options with an Error.
template <class Error>
std::string refusal_of(const HostOptions& options) {
  try {
    static_cast<void>(open_host(options));
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

// A directory of its own for a test, removed with it.
class TempDir {
 public:
  explicit TempDir(const std::string& parent = default_pool_dir()) : path_(parent + "/pie-XXXXXX") {
    if (::mkdtemp(path_.data()) == nullptr) throw std::runtime_error("no temporary directory");
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() { fs::remove_all(path_); }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Descriptors of this process whose link text contains `text`.
std::vector<int> descriptors(const std::string& text) {
  std::vector<int> found;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code gone;  // the iterator's own descriptor
    const std::string link = fs::read_symlink(entry.path(), gone).string();
    if (!gone && link.find(text) != std::string::npos) {
      found.push_back(std::stoi(entry.path().filename().string()));
    }
  }
  return found;
}

// Threads of this process, less those that the kernel keeps for io_uring.
std::size_t threads_listed() {
  std::size_t count = 0;
  for (const auto& entry : fs::directory_iterator("/proc/self/task")) {
    std::ifstream file(entry.path() / "comm");
    std::string name;
    std::getline(file, name);
    if (!name.starts_with("iou-")) ++count;
  }
  return count;
}

// One that was joined may be listed for a moment longer.
std::size_t thread_count() {
  for (std::size_t before = threads_listed();;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    const std::size_t now = threads_listed();
    if (now == before) return now;
    before = now;
  }
}

// Limits the size of every file for a while; exceeding it is EFBIG, as a full disk is ENOSPC.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(Bytes bytes) : signal_before_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, signal_before_);
  }

 private:
  void (*signal_before_)(int);
  rlimit before_{};
};

// An empty ext4 of its own in `dir`, for root; detached with the object.
class SmallDisk {
 public:
  SmallDisk(const std::string& dir, Bytes bytes) : path_(dir + "/disk") {
    const std::string image = dir + "/image";
    std::ofstream(image).close();
    fs::resize_file(image, bytes);
    fs::create_directory(path_);
    const std::string command = "(mkfs.ext4 -q -m 0 '" + image + "' && mount -o loop '" + image +
                                "' '" + path_ + "') >/dev/null 2>&1";
    // NOLINTNEXTLINE(bugprone-command-processor): of the test's own words and paths
    mounted_ = std::system(command.c_str()) == 0;
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  ~SmallDisk() {
    if (mounted_) ::umount2(path_.c_str(), MNT_DETACH);
  }
  [[nodiscard]] bool mounted() const { return mounted_; }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
  bool mounted_ = false;
};

class EnvironmentVariable {
 public:
  EnvironmentVariable(std::string name, const std::string& value) : name_(std::move(name)) {
    if (const char* before = std::getenv(name_.c_str())) before_ = before;
    ::setenv(name_.c_str(), value.c_str(), 1);
  }
  EnvironmentVariable(const EnvironmentVariable&) = delete;
  EnvironmentVariable& operator=(const EnvironmentVariable&) = delete;
  ~EnvironmentVariable() {
    if (before_) {
      ::setenv(name_.c_str(), before_->c_str(), 1);
    } else {
      ::unsetenv(name_.c_str());
    }
  }

 private:
  std::string name_;
  std::optional<std::string> before_;
};

TEST(HostDirectory, Missing) {
  const auto refusal = refusal_of<ConfigError>(options_for(1, 1, "auto", "/no/where"));
  EXPECT_NE(refusal.find("'/no/where'"), std::string::npos);
  EXPECT_NE(refusal.find("No such file"), std::string::npos);
}

TEST(HostDirectory, IsAFile) {
  const TempDir dir;
  const std::string file = dir.path() + "/file";
  std::ofstream(file) << "x";
  const auto refusal = refusal_of<ConfigError>(options_for(1, 1, "auto", file));
  EXPECT_NE(refusal.find("not a directory"), std::string::npos);
}

TEST(HostDirectory, Unwritable) {
  if (::geteuid() == 0) {
    // Permissions do not stop root, a file system without writable files does.
    const auto refusal = refusal_of<ConfigError>(options_for(1, 1, "auto", "/proc"));
    EXPECT_NE(refusal.find("'/proc'"), std::string::npos);
    return;
  }
  const TempDir dir;
  fs::permissions(dir.path(), fs::perms::owner_read | fs::perms::owner_exec);
  const auto refusal = refusal_of<ConfigError>(options_for(1, 1, "auto", dir.path()));
  EXPECT_NE(refusal.find("Permission denied"), std::string::npos);
}

TEST(HostDirectory, MemoryMustBeAskedFor) {
  const auto refusal = refusal_of<ConfigError>(options_for(1, 1, "auto", "/dev/shm"));
  EXPECT_NE(refusal.find("tmpfs"), std::string::npos);
  EXPECT_NE(refusal.find("'tmpfs:/dev/shm'"), std::string::npos) << "says what to write instead";
  EXPECT_EQ(open_host(options_for(1, 1, "auto", "tmpfs:/dev/shm"))->capabilities().pool_io,
            "buffered-threads");
  EXPECT_THROW(static_cast<void>(open_host(options_for(1, 1, "direct-uring", "tmpfs:/dev/shm"))),
               ConfigError);
  EXPECT_THROW(static_cast<void>(open_host(options_for(1, 1, "direct-threads", "tmpfs:/dev/shm"))),
               ConfigError);
}

TEST(HostDirectory, DefaultIsTmpdirIfThatIsADisk) {
  const TempDir dir;
  {
    const EnvironmentVariable tmpdir("TMPDIR", dir.path());
    EXPECT_EQ(default_pool_dir(), dir.path());
    const auto backend = open_host(options_for(1, 1));
    EXPECT_EQ(descriptors(dir.path()).size(), 1U);
  }
  const EnvironmentVariable tmpdir("TMPDIR", "/dev/shm");
  EXPECT_NE(default_pool_dir(), "/dev/shm");
}

TEST(HostDirectory, FreeBytes) {
  EXPECT_GT(free_disk_bytes(""), 0U);
  EXPECT_GT(free_disk_bytes("tmpfs:/dev/shm"), 0U);
  EXPECT_THROW(static_cast<void>(free_disk_bytes("/no/where")), ConfigError);
}

TEST(HostOptions, RefusesWhatCannotWork) {
  auto no_frame_bytes = options_for(1, 1);
  no_frame_bytes.frame_bytes = 0;
  EXPECT_THROW(static_cast<void>(open_host(no_frame_bytes)), ConfigError);
  EXPECT_THROW(static_cast<void>(open_host(options_for(0, 1))), ConfigError);
  auto small_pool = options_for(1, 1);
  small_pool.pool_bytes = frame_bytes - 1;
  EXPECT_THROW(static_cast<void>(open_host(small_pool)), ConfigError);
  EXPECT_THROW(static_cast<void>(open_host(options_for(1, 1, "telepathy"))), ConfigError);
}

TEST(HostOptions, ArenaBeyondAllMemoryIsACapacityError) {
  auto options = options_for(1, 0);
  options.frame_bytes = options.device_bytes = Bytes{1} << 50U;
  const auto refusal = refusal_of<CapacityError>(options);
  EXPECT_NE(refusal.find("device tier"), std::string::npos);
}

TEST(HostOptions, StrideIsWhatDirectIoNeeds) {
  auto options = options_for(4, 4);
  options.frame_bytes = 1000;
  const auto backend = open_host(options);
  const Bytes stride = backend->capabilities().frame_stride;
  EXPECT_EQ(stride, host_frame_stride(options));
  EXPECT_GE(stride, 1000U);
  EXPECT_EQ(backend->capabilities().device_frames, options.device_bytes / stride);
  EXPECT_EQ(backend->capabilities().pool_frames, options.pool_bytes / stride);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(backend->address(0)) % (2 * mib), 0U);
  options.pool_io = "buffered-threads";
  EXPECT_EQ(open_host(options)->capabilities().frame_stride, 1024U);
}

TEST(HostOptions, AutoTakesTheFirstThatWorks) {
  const std::string taken = open_host(options_for(1, 1))->capabilities().pool_io;
  for (const std::string better : {"direct-uring", "direct-threads"}) {
    if (better == taken) break;
    EXPECT_THROW(static_cast<void>(open_host(options_for(1, 1, better))), ConfigError);
  }
  EXPECT_EQ(open_host(options_for(1, 1, taken))->capabilities().pool_io, taken);
}

TEST(HostWithoutPool, HasNoFileNoRingNoThread) {
  const auto files = descriptors("");
  const auto threads = thread_count();
  const auto backend = open_host(options_for(4, 0));
  EXPECT_EQ(descriptors("").size(), files.size());
  EXPECT_EQ(thread_count(), threads);
  EXPECT_EQ(backend->capabilities().pool_frames, 0U);
  EXPECT_EQ(backend->capabilities().pool_io, "none");
  EXPECT_EQ(backend->resize_pool(5).frames, 0U);
  EXPECT_FALSE(backend->pool_refusal().empty());
  EXPECT_THROW(submit(*backend, to_pool, {{0, 0, 1}}), LogicError);
  backend->wait(forever);
  EXPECT_EQ(backend->poll({}), 0U);
  EXPECT_TRUE(backend->health().ok);
}

TEST(HostMemory, ArenaTakesNoPageBeforeItIsUsed) {
  auto options = options_for(1, 4096);
  options.device_bytes = 256 * mib;
  const auto backend = open_host(options);
  ASSERT_EQ(backend->resize_pool(4096).frames, 4096U);
  const auto resident_pages = [&] {
    const auto page = static_cast<Bytes>(::sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> pages(options.device_bytes / page);
    if (::mincore(backend->address(0), options.device_bytes, pages.data()) != 0) pages.clear();
    EXPECT_FALSE(pages.empty());
    return static_cast<Bytes>(std::ranges::count_if(pages, [](auto p) { return (p & 1) != 0; })) *
           page;
  };
  EXPECT_EQ(resident_pages(), 0U);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{0, 0, 1}})));
  EXPECT_GT(resident_pages(), 0U);
  EXPECT_LE(resident_pages(), 2 * mib) << "one huge page";
}

TEST(HostMemory, ArenaStaysMappedForWhoeverHoldsIt) {
  unsigned char page = 0;
  auto backend = open_host(options_for(1, 1));
  std::byte* address = backend->address(0);
  std::shared_ptr<const void> memory = backend->memory();
  address[0] = std::byte{7};
  backend.reset();
  EXPECT_EQ(address[0], std::byte{7});
  memory.reset();
  EXPECT_EQ(::mincore(address, 1, &page), -1);
}

TEST(HostMemory, ArenaIsUnmappedWithTheBackend) {
  unsigned char page = 0;
  std::byte* address = nullptr;
  {
    const auto backend = open_host(options_for(1, 0));
    address = backend->address(0);
    ASSERT_EQ(::mincore(address, 1, &page), 0);
  }
  EXPECT_EQ(::mincore(address, 1, &page), -1);
  EXPECT_EQ(errno, ENOMEM) << "not mapped";
}

Bytes resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  Bytes pages = 0;
  statm >> pages >> pages;
  return pages * static_cast<Bytes>(::sysconf(_SC_PAGESIZE));
}

TEST(HostMemory, GrowsInPlaceAndGivesBackWhatItLoses) {
  const std::uint32_t frames = 20000;  // 234 MiB
  const auto backend = open_host(options_for(100, 0));
  std::byte* const start = backend->address(0);
  EXPECT_THROW(static_cast<void>(backend->address(100)), LogicError);
  ASSERT_EQ(backend->resize_device(frames), frames);
  EXPECT_EQ(backend->address(0), start);
  fill(*backend, 50, 5);
  const Bytes before = resident_bytes();
  std::memset(backend->address(100), 1, (frames - 100) * frame_bytes);
  const Bytes full = resident_bytes();
  EXPECT_GT(full, before + 200 * mib);
  ASSERT_EQ(backend->resize_device(100), 100U);
  EXPECT_LT(resident_bytes(), full - 200 * mib);
  EXPECT_TRUE(holds(*backend, 50, 5));
  EXPECT_THROW(static_cast<void>(backend->address(100)), LogicError);
}

TEST(HostMemory, MayBeTheCallers) {
  HostOptions options = options_for(4, 4);
  std::vector<std::byte> memory(options.device_bytes + 2 * 4096);
  void* aligned = memory.data();
  std::size_t room = memory.size();
  options.device_memory =
      static_cast<std::byte*>(std::align(4096, options.device_bytes, aligned, room));
  {
    const auto backend = open_host(options);
    EXPECT_EQ(backend->address(0), options.device_memory);
    EXPECT_EQ(backend->memory(), nullptr) << "it is the caller's";
    ASSERT_EQ(backend->resize_pool(4).frames, 4U);
    fill(*backend, 1, 3);
    ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{1, 2, 1}})));
    ASSERT_TRUE(is_ok(finish(*backend, to_device, {{0, 2, 1}})));
    EXPECT_TRUE(holds(*backend, 0, 3));
    EXPECT_EQ(backend->resize_device(2), 2U);
    EXPECT_EQ(backend->resize_device(100), 4U) << "no more than there is";
    EXPECT_TRUE(holds(*backend, 1, 3)) << "and nothing of it was given back";
  }
  options.device_memory += 64;
  EXPECT_THROW(static_cast<void>(open_host(options)), ConfigError);
}

TEST(HostMemory, FramesNeverWrittenAreZero) {
  const auto backend = open_host(options_for(2, 2));
  ASSERT_EQ(backend->resize_pool(2).frames, 2U);
  fill(*backend, 1, 3);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{1, 1, 1}})));
  EXPECT_TRUE(std::all_of(backend->address(1), backend->address(1) + frame_bytes,
                          [](std::byte b) { return b == std::byte{0}; }));
}

// What follows runs in each way of doing I/O.
class HostPool : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    try {
      static_cast<void>(open(1, 1));
    } catch (const ConfigError& error) {
      GTEST_SKIP() << "not on this machine: " << error.what();
    }
  }
  // The pool file is the only open file in the test's directory.
  std::unique_ptr<Backend> open(std::uint32_t device_frames, std::uint32_t pool_frames) const {
    return open_host(options_for(device_frames, pool_frames, GetParam(), dir_.path()));
  }
  [[nodiscard]] int file() const {
    const auto found = descriptors(dir_.path());
    EXPECT_EQ(found.size(), 1U);
    return found.empty() ? -1 : found[0];
  }
  [[nodiscard]] struct stat file_status() const {
    struct stat status{};
    EXPECT_EQ(::fstat(file(), &status), 0);
    return status;
  }

  const TempDir dir_;
};

TEST_P(HostPool, FileIsNamelessPrivateAndNotInherited) {
  const auto backend = open(1, 1);
  EXPECT_EQ(backend->capabilities().pool_io, GetParam());
  EXPECT_EQ(file_status().st_nlink, 0U);
  EXPECT_EQ(file_status().st_mode & 07777U, 0600U);
  EXPECT_NE(::fcntl(file(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ((::fcntl(file(), F_GETFL) & O_DIRECT) != 0, GetParam().starts_with("direct"));
  EXPECT_TRUE(fs::is_empty(dir_.path()));
}

TEST_P(HostPool, FileIsClosedWithTheBackend) {
  {
    const auto backend = open(1, 1);
  }
  EXPECT_TRUE(descriptors(dir_.path()).empty());
}

TEST_P(HostPool, ThreadsAreStartedByTheFirstCopyIfAtAll) {
  std::thread([] {}).join();  // a sanitizer starts a thread of its own with the first one
  const auto before = thread_count();
  const auto backend = open(1, 1);
  ASSERT_EQ(backend->resize_pool(1).frames, 1U);
  EXPECT_EQ(thread_count(), before);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, 1}})));
  EXPECT_EQ(thread_count(), before + (GetParam() == "direct-uring" ? 0 : 4));
}

TEST_P(HostPool, SpaceIsTakenBeforeUseAndGivenBack) {
  const std::uint32_t frames = 20000;  // 234 MiB
  const auto backend = open(1, frames);
  EXPECT_EQ(file_status().st_blocks, 0);
  for (const std::uint32_t size : {1U, frames, 3000U, frames + 1000, 0U}) {
    ASSERT_EQ(backend->resize_pool(size).frames, size);
    EXPECT_EQ(static_cast<Bytes>(file_status().st_size), size * frame_bytes);
    const auto taken = static_cast<Bytes>(file_status().st_blocks) * 512;
    EXPECT_GE(taken, size * frame_bytes);
    EXPECT_LE(taken, size * frame_bytes + mib);
  }
}

TEST_P(HostPool, WhatChangedOnDiskIsSeenInThatFrameAlone) {
  const auto backend = open(4, 8);
  ASSERT_EQ(backend->resize_pool(8).frames, 8U);
  for (std::uint32_t i = 0; i < 4; ++i) fill(*backend, i, i + 1);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 2, 4}})));
  // Through the page cache, which direct reads take note of.
  const int garble =
      ::open(("/proc/self/fd/" + std::to_string(file())).c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(garble, 0);
  const Bytes stride = backend->capabilities().frame_stride;
  std::byte byte{};
  const auto at = static_cast<off_t>(3 * stride + 1000);
  ASSERT_EQ(::pread(garble, &byte, 1, at), 1);
  byte ^= std::byte{0x10};
  ASSERT_EQ(::pwrite(garble, &byte, 1, at), 1);
  ::fsync(garble);
  for (std::uint32_t i = 0; i < 4; ++i) {
    const Completion completion = finish(*backend, to_device, {{i, 2 + i, 1}});
    EXPECT_EQ(completion.status, i == 1 ? Status::corrupt : Status::ok) << i;
  }
  EXPECT_EQ(finish(*backend, to_device, {{0, 2, 4}}).status, Status::corrupt);

  // A frame that comes back with the content of another is wrong too.
  std::vector<std::byte> other(stride);
  ASSERT_EQ(::pread(garble, other.data(), stride, static_cast<off_t>(2 * stride)),
            static_cast<ssize_t>(stride));
  ASSERT_EQ(::pwrite(garble, other.data(), stride, static_cast<off_t>(4 * stride)),
            static_cast<ssize_t>(stride));
  ::fsync(garble);
  EXPECT_EQ(finish(*backend, to_device, {{2, 4, 1}}).status, Status::corrupt);
  ::close(garble);

  fill(*backend, 0, 9);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 3, 1}})));
  EXPECT_TRUE(is_ok(finish(*backend, to_device, {{1, 3, 1}}))) << "written again, it is well";
}

TEST_P(HostPool, WriteThatWaitsForALoadIsCheckedAsWhatWasLoaded) {
  const auto backend = open(2, 3);
  ASSERT_EQ(backend->resize_pool(3).frames, 3U);
  fill(*backend, 0, 1);
  fill(*backend, 1, 2);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, 1}})));
  const Ticket load = submit(*backend, to_device, {{1, 0, 1}});
  submit(*backend, to_pool, {{1, 1, 1}}, {after(load)});
  for (const Completion& completion : collect(*backend, 2)) EXPECT_TRUE(is_ok(completion));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{0, 1, 1}})));
  EXPECT_TRUE(holds(*backend, 0, 1));
}

TEST_P(HostPool, WhatWaitsForACorruptLoadFailsAndIsNotStarted) {
  const auto backend = open(2, 3);
  ASSERT_EQ(backend->resize_pool(3).frames, 3U);
  fill(*backend, 0, 1);
  fill(*backend, 1, 2);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, 2}})));
  const int garble =
      ::open(("/proc/self/fd/" + std::to_string(file())).c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_GE(garble, 0);
  ASSERT_EQ(::pwrite(garble, "garbled", 7, 0), 7);
  ::fsync(garble);
  ::close(garble);
  const Ticket load = submit(*backend, to_device, {{0, 0, 1}});
  const Ticket write = submit(*backend, to_pool, {{0, 1, 1}}, {after(load)});
  const auto all = collect(*backend, 2);
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(find(all, load)->status, Status::corrupt);
  EXPECT_EQ(find(all, load)->error, EBADMSG);
  EXPECT_EQ(find(all, write)->status, Status::failed);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{0, 1, 1}})));
  EXPECT_TRUE(holds(*backend, 0, 2)) << "the write did not take place";
}

TEST_P(HostPool, FullDiskRefusesGrowthAndKeepsWhatThereIs) {
  const auto backend = open(1, 20000);
  fill(*backend, 0, 1);
  ASSERT_EQ(backend->resize_pool(10).frames, 10U);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 9, 1}})));
  {
    const FileSizeLimit full(100 * mib);
    const std::uint32_t fits = 8000;  // 94 MiB
    EXPECT_EQ(backend->resize_pool(fits).frames, fits);
    EXPECT_EQ(backend->pool_refusal(), "");
    EXPECT_EQ(backend->resize_pool(20000).frames, fits);
    EXPECT_NE(backend->pool_refusal().find(dir_.path()), std::string::npos);
    EXPECT_NE(backend->pool_refusal().find("File too large"), std::string::npos);
  }
  EXPECT_EQ(static_cast<Bytes>(file_status().st_size), 8000 * frame_bytes);
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{0, 9, 1}})));
  EXPECT_TRUE(holds(*backend, 0, 1));
  EXPECT_EQ(backend->resize_pool(20000).frames, 20000U) << "and asks again";
  EXPECT_EQ(backend->pool_refusal(), "");
}

// A refused growth gives back what the file system had taken on the way to finding out.
TEST_P(HostPool, DiskThatIsReallyFullIsLeftAsItWas) {
  const TempDir parent;
  const SmallDisk disk(parent.path(), 96 * mib);
  if (!disk.mounted()) GTEST_SKIP() << "only root, with loop devices, can mount a small disk";
  const Bytes free_before = free_disk_bytes(disk.path());
  const auto backend = open_host(options_for(2, 20000, GetParam(), disk.path()));
  EXPECT_EQ(backend->resize_pool(10).frames, 10U);
  EXPECT_EQ(backend->resize_pool(20000).frames, 10U);
  EXPECT_NE(backend->pool_refusal().find("No space left"), std::string::npos);
  EXPECT_GE(free_disk_bytes(disk.path()), free_before - 2 * mib);
  fill(*backend, 0, 5);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 9, 1}})));
  ASSERT_TRUE(is_ok(finish(*backend, to_device, {{1, 9, 1}})));
  EXPECT_TRUE(holds(*backend, 1, 5));
}

// The file ends at frame `broken`: reads before it work, reads of it fail.
TEST_P(HostPool, ReadsFailFromTheBrokenFrameOn) {
  constexpr std::uint32_t frames = 12;
  for (std::uint32_t broken = 0; broken < frames; ++broken) {
    const auto backend = open(frames, frames);
    ASSERT_EQ(backend->resize_pool(frames).frames, frames);
    for (std::uint32_t i = 0; i < frames; ++i) fill(*backend, i, i);
    ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, frames}})));
    for (std::uint32_t i = 0; i < frames; ++i) fill(*backend, i, 99);
    ASSERT_EQ(::ftruncate(file(), static_cast<off_t>(broken * frame_bytes)), 0);

    for (std::uint32_t i = 0; i < frames; ++i) submit(*backend, to_device, {{i, i, 1}});
    for (const Completion& completion : collect(*backend, frames)) {
      const auto frame = static_cast<std::uint32_t>(completion.ticket.id) - 1;
      EXPECT_EQ(is_ok(completion), frame < broken);
      EXPECT_EQ(completion.error, frame < broken ? 0 : EIO);
      EXPECT_EQ(holds(*backend, frame, frame), frame < broken);
    }
    EXPECT_TRUE(backend->health().ok) << "a failed copy is not a lost device";
  }
}

// A transfer that crosses the end of the file is short: what is there arrives, then it is an error.
TEST_P(HostPool, RunAcrossTheEndOfTheFileFailsAsAWhole) {
  constexpr std::uint32_t frames = 400;  // 4.7 MiB, several segments
  const auto backend = open(frames, frames);
  ASSERT_EQ(backend->resize_pool(frames).frames, frames);
  for (std::uint32_t i = 0; i < frames; ++i) fill(*backend, i, i);
  ASSERT_TRUE(is_ok(finish(*backend, to_pool, {{0, 0, frames}})));
  for (std::uint32_t i = 0; i < frames; ++i) fill(*backend, i, 999);
  ASSERT_EQ(::ftruncate(file(), static_cast<off_t>(399 * frame_bytes + 5000)), 0);
  const Completion completion = finish(*backend, to_device, {{0, 0, frames}});
  EXPECT_EQ(completion.status, Status::failed);
  EXPECT_EQ(completion.error, EIO);
  EXPECT_TRUE(holds(*backend, 398, 398));
  EXPECT_TRUE(is_ok(finish(*backend, to_device, {{0, 0, 399}}))) << "later copies are unharmed";
}

// Writes stop at a size limit, some of them in their middle. What waits for them fails likewise.
TEST_P(HostPool, WritesFailFromTheLimitOnAndSoDoTheirDependents) {
  constexpr std::uint32_t frames = 12;
  for (std::uint32_t broken = 0; broken < frames; ++broken) {
    const auto backend = open(2 * frames, frames);
    ASSERT_EQ(backend->resize_pool(frames).frames, frames);
    for (std::uint32_t i = 0; i < frames; ++i) fill(*backend, i, i);
    const FileSizeLimit full(broken * frame_bytes + 4096);
    for (std::uint32_t i = 0; i < frames; ++i) {
      const Ticket write = submit(*backend, to_pool, {{i, i, 1}});
      submit(*backend, to_device, {{frames + i, i, 1}}, {after(write)});
    }
    for (const Completion& completion : collect(*backend, std::size_t{2} * frames)) {
      const auto frame = static_cast<std::uint32_t>(completion.ticket.id) - 1;
      EXPECT_EQ(is_ok(completion), frame < broken);
      EXPECT_EQ(completion.error, frame < broken ? 0 : EFBIG);
      EXPECT_EQ(holds(*backend, frames + frame, frame), frame < broken);
    }
  }
}

// A failure is inherited along a chain, also by tickets that are submitted long after it was
// polled.
TEST_P(HostPool, FailureIsInheritedAlongAChain) {
  const auto backend = open(8, 8);
  ASSERT_EQ(backend->resize_pool(8).frames, 8U);
  ASSERT_EQ(::ftruncate(file(), 0), 0);
  Ticket last = submit(*backend, to_device, {{0, 0, 1}});
  for (std::uint32_t i = 1; i < 4; ++i) {
    last = submit(*backend, to_pool, {{i, i, 1}}, {after(last)});
    last = submit(*backend, to_device, {{i, i, 1}}, {after(last)});
  }
  const auto all = collect(*backend, 7);
  ASSERT_EQ(all.size(), 7U);
  for (const Completion& completion : all) EXPECT_EQ(completion.error, EIO);
  EXPECT_EQ(file_status().st_size, 0) << "no write was started";
  submit(*backend, to_pool, {{5, 5, 1}}, {after(last)});
  const auto late = collect(*backend, 1);
  ASSERT_EQ(late.size(), 1U);
  EXPECT_EQ(late[0].error, EIO);
}

// Twelve segments, two at a time: the two calls made here cannot have seen the last of them end.
TEST_P(HostPool, DependOnATicketInFlightIsRefused) {
  const auto backend = open(1000, 1000);
  ASSERT_EQ(backend->resize_pool(1000).frames, 1000U);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1000}});
  EXPECT_THROW(backend->depend({}, after(write)), LogicError);
  ASSERT_EQ(collect(*backend, 1).size(), 1U);
  backend->depend({}, after(write));
}

// The held ticket comes first in its lane and starts last: once the long write has ended.
TEST_P(HostPool, HeldTicketDoesNotHoldUpThoseBehindIt) {
  const auto backend = open(1002, 1002);
  ASSERT_EQ(backend->resize_pool(1002).frames, 1002U);
  const Ticket write = submit(*backend, to_pool, {{0, 0, 1000}});
  const Ticket held = submit(*backend, to_device, {{1000, 0, 1}}, {after(write)});
  const Ticket free = submit(*backend, to_device, {{1001, 1001, 1}});
  const auto all = collect(*backend, 3);
  ASSERT_EQ(all.size(), 3U);
  EXPECT_LT(find(all, free)->began, find(all, held)->began);
  EXPECT_GE(find(all, held)->began, find(all, write)->ended);
}

INSTANTIATE_TEST_SUITE_P(Io, HostPool,
                         testing::Values("direct-uring", "direct-threads", "buffered-threads"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::erase(name, '-');
                           return name;
                         });

// The ring is taken away while copies are in flight: everything ends as failed, once, and stays so.
TEST(HostRing, LossFailsEverythingAndIsReported) {
  const auto backend = open_host(options_for(256, 256));
  if (backend->capabilities().pool_io != "direct-uring") GTEST_SKIP() << "no io_uring here";
  ASSERT_EQ(backend->resize_pool(256).frames, 256U);
  const auto rings = descriptors("io_uring");
  ASSERT_EQ(rings.size(), 1U);
  submit(*backend, to_pool, {{0, 0, 1}});
  const int null = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  ASSERT_GE(::dup2(null, rings[0]), 0);
  ::close(null);
  const Ticket read = submit(*backend, to_device, {{1, 1, 200}});
  const auto all = collect(*backend, 2);
  ASSERT_EQ(all.size(), 2U);
  ASSERT_NE(find(all, read), nullptr);
  EXPECT_EQ(find(all, read)->status, Status::failed);
  EXPECT_NE(find(all, read)->error, 0);
  EXPECT_FALSE(backend->health().ok);
  EXPECT_NE(backend->health().first_error.find("direct-uring"), std::string::npos);
  EXPECT_EQ(finish(*backend, to_pool, {{0, 0, 1}}).status, Status::failed);
}

INSTANTIATE_TEST_SUITE_P(Host, BackendConformance,
                         testing::Values(on_this_thread("DirectUring", "direct-uring"),
                                         on_this_thread("DirectThreads", "direct-threads"),
                                         on_this_thread("BufferedThreads", "buffered-threads"),
                                         on_this_thread("Memory", "auto", "tmpfs:/dev/shm")),
                         subject_name);

}  // namespace
}  // namespace pie
