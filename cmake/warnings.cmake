# The warnings every target of ours is compiled with; PIE_WERROR makes them errors.
function(pie_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wconversion)
  if(PIE_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()
