// Python's lock, given up while kernels run.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace vpo {

// As nanobind's gil_scoped_release, but at the end of the process: Python 3.11 ends a daemon thread that asks for the
// lock then by unwinding its stack, which would abort the process at the first C++ function that may not throw. Such
// a thread waits here instead until the process is gone, as newer versions of Python have it.
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
