// How the operators fail: by exceptions that become torch's RuntimeError.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <sstream>
#include <stdexcept>

// Absent from torch 2.11 and 2.12: null then.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastrnn {

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

// Not STABLE_TORCH_ERROR_CODE_CHECK, whose message is the source line of the call instead of torch's own words.
inline void succeed(AOTITorchError code, const char* doing) {
  if (code == TORCH_SUCCESS) return;
  if (torch_exception_get_what_without_backtrace) fail(torch_exception_get_what_without_backtrace());
  fail("fastrnn: ", doing, " failed");
}

}  // namespace fastrnn
