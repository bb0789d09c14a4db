# The C++ tests: one executable per tests/cpp/test_*.cpp, each of its cases a test of ctest.
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  message(FATAL_ERROR "The C++ tests need GoogleTest, which was not found. "
                      "Install it (Debian: apt-get install libgtest-dev) or set PIE_TESTS=OFF.")
endif()
include(GoogleTest)

# Code of tests is compiled fast, since that is most of what a fresh clone waits for: hardly
# optimised, and without the checks of pointers, which take longest to compile: one that is bad is
# the address sanitizer's to find. The library has them all.
function(pie_test_code target)
  target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>
    $<$<CONFIG:RelWithDebInfo>:-fno-sanitize=null,alignment,object-size,vptr>)
  pie_warnings(${target})
endfunction()

function(pie_test name)
  add_executable(test_${name} tests/cpp/test_${name}.cpp)
  target_include_directories(test_${name} PRIVATE cpp/src tests/cpp)
  target_link_libraries(test_${name} PRIVATE pie::pie GTest::gtest_main Threads::Threads)
  pie_test_code(test_${name})
  # The time-out is a guard against a hang, far above what a case takes under a sanitizer.
  gtest_discover_tests(test_${name} DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 600)
endfunction()

# What every backend must do, run by the tests of each.
add_library(conformance OBJECT tests/cpp/conformance.cpp)
target_include_directories(conformance PRIVATE cpp/src tests/cpp)
target_link_libraries(conformance PUBLIC pie::pie GTest::gtest)
pie_test_code(conformance)

pie_test(adaptive)
pie_test(allocation)
pie_test(attention)
pie_test(cache)
pie_test(frame_pool)
pie_test(host)
pie_test(parallel)
pie_test(policy)
pie_test(scenarios)
pie_test(scheduler)
pie_test(sharing)
pie_test(sim)
pie_test(swarm)
pie_test(trace)
pie_test(trajectory)
foreach(backend host sim)
  target_link_libraries(test_${backend} PRIVATE conformance)
endforeach()

# The CUDA backend, over a double of the driver.
if(TARGET pie_cuda)
  add_library(fake_driver SHARED tests/fake_driver/fake.cpp)
  target_include_directories(fake_driver PUBLIC tests/fake_driver)
  target_include_directories(fake_driver SYSTEM PUBLIC ${PIE_CUDA_INCLUDE_DIR})
  pie_test_code(fake_driver)
  function(pie_cuda_test name)
    pie_test(${name})
    target_sources(test_${name} PRIVATE cuda/driver.cpp)
    target_include_directories(test_${name} PRIVATE cuda)
    target_link_libraries(test_${name} PRIVATE fake_driver ${CMAKE_DL_LIBS})
    target_compile_definitions(test_${name} PRIVATE
      PIE_FAKE_DRIVER="$<TARGET_FILE:fake_driver>")
    add_dependencies(test_${name} pie_cuda)
  endfunction()
  pie_cuda_test(cuda)
  pie_cuda_test(cuda_swarm)
  target_link_libraries(test_cuda PRIVATE conformance)
endif()

# A function compiled for AVX-512 but shared with the rest of the library (a weak symbol) would end
# the process on a lesser CPU. Optimised builds alone inline what has to be.
if(CMAKE_BUILD_TYPE STREQUAL "Release")
  add_test(NAME kernels_share_no_code COMMAND sh -c "! nm -C --defined-only \"$@\" | grep -E ' [WVu] '"
    sh $<FILTER:$<TARGET_OBJECTS:pie>,INCLUDE,avx[0-9]+.cpp> COMMAND_EXPAND_LISTS)
endif()
