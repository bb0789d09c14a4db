# Finds liburing, the static library before the shared one, so that the wheel needs nothing installed.
#
# Without it the library is complete: reader threads do the I/O of the pool file, and stats() says so.
find_path(PIE_URING_INCLUDE_DIR liburing.h)
find_library(PIE_URING_LIBRARY NAMES liburing.a uring)
mark_as_advanced(PIE_URING_INCLUDE_DIR PIE_URING_LIBRARY)

function(pie_use_liburing target)
  if(PIE_URING_INCLUDE_DIR AND PIE_URING_LIBRARY)
    message(STATUS "Pie: io_uring through ${PIE_URING_LIBRARY}")
    target_include_directories(${target} SYSTEM PRIVATE ${PIE_URING_INCLUDE_DIR})
    target_link_libraries(${target} PRIVATE ${PIE_URING_LIBRARY})
    target_compile_definitions(${target} PRIVATE PIE_HAVE_LIBURING=1)
  else()
    message(STATUS "Pie: liburing not found, the pool file is read by threads instead "
                   "(install liburing-dev or liburing-devel and configure again for io_uring)")
  endif()
endfunction()
