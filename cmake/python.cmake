# The extension pie._core and its stub.
#
# Split mode: nanobind's run-time part lives in the package nanobind-backend, so that one abi3 wheel
# serves every Python from 3.10 on.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module
  ${SKBUILD_SABI_COMPONENT})
execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nanobind_ROOT COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind 3.0 CONFIG REQUIRED)

nanobind_add_module(_core BACKEND_MODULE nanobind_backend NB_SUPPRESS_WARNINGS
  python/pie/_core.cpp python/pie/_layers.cpp python/pie/_pages.cpp)
target_link_libraries(_core PRIVATE pie::pie)
set_target_properties(_core PROPERTIES INSTALL_RPATH $ORIGIN/lib)
pie_warnings(_core)

# At build time, not at install time: there a failure is loud.
nanobind_add_stub(_core_stub MODULE _core OUTPUT _core.pyi
  PYTHON_PATH $<TARGET_FILE_DIR:_core> DEPENDS _core)

# Relative to the package directory: scikit-build-core's wheel.install-dir is "pie".
install(TARGETS _core LIBRARY DESTINATION .)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_core.pyi DESTINATION .)
