// Loads the CUDA backend when it is asked for, from where this library lies.
#include <dlfcn.h>

#include <array>
#include <string>

#include "pie/backends.hpp"
#include "pie/error.hpp"
#include "plugin.hpp"

namespace pie {

namespace {

constexpr const char* plugin_name = "libpie_cuda.so";

// Next to libpie, or else where the system looks.
void* load_plugin() {
  Dl_info here{};
  std::string beside;
  if (::dladdr(reinterpret_cast<const void*>(&open_cuda), &here) != 0) {
    const std::string path = here.dli_fname;
    const std::size_t slash = path.rfind('/');
    beside = slash == std::string::npos ? "" : path.substr(0, slash + 1);
  }
  void* plugin = ::dlopen((beside + plugin_name).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (plugin == nullptr) plugin = ::dlopen(plugin_name, RTLD_NOW | RTLD_LOCAL);
  if (plugin != nullptr) return plugin;
  const char* why = ::dlerror();
  throw ConfigError(std::string("device is 'cuda': this build of Pie has no CUDA plugin (") +
                    (why == nullptr ? plugin_name : why) +
                    "): install it where a CUDA toolkit's nvcc is on the PATH, or use "
                    "device='cpu'.");
}

}  // namespace

std::unique_ptr<Backend> open_cuda(const CudaOptions& options) {
  const auto open = reinterpret_cast<PluginOpen>(::dlsym(load_plugin(), "pie_cuda_open"));
  std::array<char, 1024> error{};
  Backend* backend = nullptr;
  const PluginResult result =
      open == nullptr ? PluginResult::wrong_abi
                      : open(plugin_abi, &options, &backend, error.data(), error.size());
  switch (result) {
    case PluginResult::ok:
      return std::unique_ptr<Backend>(backend);
    case PluginResult::wrong_abi:
      throw ConfigError(std::string("device is 'cuda': the ") + plugin_name +
                        " here is of another version of Pie: install both anew.");
    case PluginResult::config:
      throw ConfigError(error.data());
    case PluginResult::capacity:
      throw CapacityError(error.data());
    case PluginResult::failure:
      break;
  }
  throw IoError(error.data());
}

Bytes cuda_frame_stride(Bytes frame_bytes) { return plugin_stride(frame_bytes); }

}  // namespace pie
