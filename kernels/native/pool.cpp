// The threads behind for_each. They start at the first loop that needs them and then wait for the next one: awake for a
// moment, because backward follows forward, then asleep.
//
// A helper keeps off the processor that the caller is on. The system may put both on one, where other threads (OpenMP's
// among them) spin on the others; then the helper would wait for a loop and so keep the caller from opening it.

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "parallel.h"

namespace vpo {
namespace {

constexpr auto kAwake = std::chrono::microseconds(200);
constexpr auto kGlance = std::chrono::microseconds(10);  // more than 32 looks at a condition take

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns the number of the processor that this thread is on; -1 where that cannot be told or changed.
inline int processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// Moves this thread away from a processor if it is there; returns whether it is elsewhere now.
bool keep_off(int taken) noexcept {
    if (taken < 0 || processor() != taken) return true;
#if defined(__linux__)
    cpu_set_t usable;  // by the process: a user may have limited it since this thread began
    if (sched_getaffinity(getpid(), sizeof(usable), &usable) != 0) return false;
    CPU_CLR(taken, &usable);
    return CPU_COUNT(&usable) > 0 && sched_setaffinity(0, sizeof(usable), &usable) == 0;
#else
    return false;
#endif
}

// Waits for the condition, at most kAwake and as long as it is worth it; returns whether the condition came true. Time
// in which another thread has the processor does not count, for then the caller is late, too.
template <class Condition, class Worth>
bool soon(const Condition& condition, const Worth& worth) {
    auto before = std::chrono::steady_clock::now();
    for (std::chrono::nanoseconds left = kAwake; left.count() > 0 && worth();) {
        for (int i = 0; i < 32; ++i) {
            if (condition()) return true;
            relax();
        }
        const auto now = std::chrono::steady_clock::now();
        left -= std::min<std::chrono::nanoseconds>(now - before, kGlance);
        before = now;
    }
    return false;
}

// The pool lives until the process ends: its threads are never joined, and hold no resources.
class Pool {
  public:
    void share(Loop& loop, int helpers) noexcept {
        const std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
        if (mine) open(loop, helpers);
        loop.take();
        if (mine) close();
    }

  private:
    void open(Loop& loop, int helpers) noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        while (threads_ < helpers && start()) ++threads_;
        loop_ = &loop;
        places_ = helpers;
        caller_at_.store(processor(), std::memory_order_relaxed);
        opened_.fetch_add(1, std::memory_order_release);
        const bool wake = asleep_ > 0;
        lock.unlock();
        if (wake) wake_.notify_all();
    }

    // Lets no more helpers enter, and waits for those inside to finish their pieces.
    void close() noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        loop_ = nullptr;
        if (inside_ == 0) return;
        lock.unlock();
        soon([this] { return inside_.load(std::memory_order_acquire) == 0; }, [] { return true; });
        lock.lock();
        empty_.wait(lock, [this] { return inside_ == 0; });
    }

    bool start() noexcept {
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (const std::system_error&) {
            return false;  // the system grants no more threads: fewer do the work
        }
    }

    void serve() noexcept {
        std::uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        const auto opened = [&] { return opened_.load(std::memory_order_acquire) != seen; };
        const auto apart = [this] { return keep_off(caller_at_.load(std::memory_order_relaxed)); };
        for (;;) {
            if (!opened()) {
                lock.unlock();
                const bool busy = soon(opened, apart);
                lock.lock();
                if (!busy) {
                    ++asleep_;
                    wake_.wait(lock, opened);
                    --asleep_;
                }
            }
            seen = opened_;
            if (!loop_ || places_ == 0) continue;
            Loop& loop = *loop_;
            --places_;
            ++inside_;
            lock.unlock();
            apart();
            loop.take();
            lock.lock();
            if (--inside_ == 0) empty_.notify_one();
        }
    }

    std::mutex caller_;  // held for the length of a loop
    std::mutex mutex_;   // guards the members below; the atomics are also read without it
    std::condition_variable wake_, empty_;
    Loop* loop_ = nullptr;  // the loop that helpers may enter, or null
    int threads_ = 0, asleep_ = 0;
    int places_ = 0;  // helpers that may still enter
    std::atomic<int> inside_{0};
    std::atomic<int> caller_at_{-1};  // the processor on which the last loop was opened
    std::atomic<std::uint64_t> opened_{0};  // number of loops opened so far
};

std::atomic<Pool*> current{nullptr};

Pool& pool() noexcept {
    Pool* found = current.load(std::memory_order_acquire);
    if (found) return *found;
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
    delete made;
    return *found;
}

}  // namespace

void share(Loop& loop, int helpers) noexcept { pool().share(loop, helpers); }

void forget_pool_in_forks() {
    pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_relaxed); });
}

}  // namespace vpo
