# Installs libpie, its headers and the CMake package `pie`; find_package(pie) gives pie::pie.
#
# Plain names instead of GNUInstallDirs: the same layout below a prefix and inside the wheel.
include(CMakePackageConfigHelpers)

install(TARGETS pie EXPORT pieTargets LIBRARY DESTINATION lib)
if(TARGET pie_cuda)
  install(TARGETS pie_cuda LIBRARY DESTINATION lib)
endif()
install(DIRECTORY cpp/include/pie DESTINATION include FILES_MATCHING PATTERN "*.hpp")
install(EXPORT pieTargets NAMESPACE pie:: DESTINATION lib/cmake/pie)

configure_package_config_file(cmake/pieConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/pieConfig.cmake
  INSTALL_DESTINATION lib/cmake/pie NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may break what compiles against it.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/pieConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/pieConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/pieConfigVersion.cmake
  DESTINATION lib/cmake/pie)
