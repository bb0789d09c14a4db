# Finds xxHash's header; its functions are compiled into the library.
find_path(PIE_XXHASH_INCLUDE_DIR xxhash.h)
mark_as_advanced(PIE_XXHASH_INCLUDE_DIR)

function(pie_use_xxhash target)
  if(NOT PIE_XXHASH_INCLUDE_DIR)
    message(FATAL_ERROR "Pie needs xxhash.h: install libxxhash-dev (Debian), xxhash-devel (Fedora) "
                        "or xxhash (conda, Homebrew) and configure again.")
  endif()
  target_include_directories(${target} SYSTEM PRIVATE ${PIE_XXHASH_INCLUDE_DIR})
endfunction()
