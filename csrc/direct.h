// Calls without torch's dispatcher (direct.cpp), for module.cpp alone.
#pragma once

#include <Python.h>

namespace fastrnn {

// Adds its functions to a module; false with a Python exception.
bool add_direct(PyObject* module);

}  // namespace fastrnn
