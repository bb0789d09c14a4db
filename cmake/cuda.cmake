# Finds the headers of a CUDA toolkit, from 12.0 on; the plugin is built where they are.
#
# PIE_CUDA: AUTO builds the plugin where it can be, ON fails where it cannot, OFF leaves it out.
function(pie_find_cuda wanted)
  if(wanted STREQUAL "OFF")
    return()
  endif()
  find_program(PIE_NVCC nvcc PATHS /usr/local/cuda/bin)
  if(PIE_NVCC)
    file(REAL_PATH "${PIE_NVCC}" nvcc)
    cmake_path(GET nvcc PARENT_PATH nvcc_dir)
  endif()
  find_path(PIE_CUDA_INCLUDE_DIR cudaTypedefs.h
    PATHS ${nvcc_dir}/../include ${nvcc_dir}/../targets/x86_64-linux/include
          ${nvcc_dir}/../targets/sbsa-linux/include /usr/local/cuda/include)
  mark_as_advanced(PIE_NVCC PIE_CUDA_INCLUDE_DIR)
  if(PIE_CUDA_INCLUDE_DIR)
    message(STATUS "Pie: CUDA plugin with the headers in ${PIE_CUDA_INCLUDE_DIR}")
  elseif(wanted STREQUAL "ON")
    message(FATAL_ERROR "PIE_CUDA is ON, and no CUDA toolkit was found (cudaTypedefs.h): "
                        "install one, put its nvcc on the PATH, or set PIE_CUDA=OFF.")
  else()
    message(STATUS "Pie: no CUDA toolkit was found, the CUDA plugin is left out")
  endif()
endfunction()
