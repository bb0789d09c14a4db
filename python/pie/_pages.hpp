// What _pages.cpp adds to the module.
#pragma once

#include <nanobind/nanobind.h>

void bind_pages(nanobind::module_& module);
