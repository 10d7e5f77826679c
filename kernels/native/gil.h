// Release of Python's global lock while kernels run.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace vpo {

// Does what nanobind's gil_scoped_release does, except at the end of the process. When a daemon thread asks for the
// lock then, Python 3.11 ends it by unwinding its stack, which would abort the process at the first C++ function that
// may not throw. Here such a thread waits until the process is gone, as it does in newer versions of Python.
class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil&) = delete;

    ~WithoutGil() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) pause();
        }
    }

  private:
    PyThreadState* const state_;
};

}  // namespace vpo
