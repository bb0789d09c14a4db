// The attention kernel for CPUs with AVX2 and FMA.
#include "attention/kernel.hpp"

namespace pie::attention {

const Kernels avx2_kernels = {"avx2", fold, advance, finish};

}  // namespace pie::attention
