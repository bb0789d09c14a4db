// The attention kernel for CPUs with AVX-512 F, BW, DQ and VL.
#include "attention/kernel.hpp"

namespace pie::attention {

const Kernels avx512_kernels = {"avx512", fold, advance, finish};

}  // namespace pie::attention
