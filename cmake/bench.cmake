# The benchmarks, plain programs that print a table: build/<preset>/bench/<name>.
function(pie_bench name)
  add_executable(bench_${name} bench/${name}.cpp)
  target_include_directories(bench_${name} PRIVATE cpp/src)
  target_link_libraries(bench_${name} PRIVATE pie::pie Threads::Threads)
  set_target_properties(bench_${name} PROPERTIES
    OUTPUT_NAME ${name} RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bench)
  pie_warnings(bench_${name})
endfunction()

pie_bench(adaptive)
pie_bench(attention)
pie_bench(pool_read)
pie_bench(planning)
pie_bench(paced_read)
pie_use_liburing(bench_paced_read)
target_include_directories(bench_adaptive PRIVATE tests/cpp)  # the server that is simulated
