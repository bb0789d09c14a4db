// The attention kernel for every CPU: SSE2 on x86-64, NEON on aarch64.
#include "attention/kernel.hpp"

namespace pie::attention {

const Kernels portable_kernels = {"portable", fold, advance, finish};

}  // namespace pie::attention
