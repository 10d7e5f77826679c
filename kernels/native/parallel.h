// Loops over independent pieces of work, shared among threads that are kept from call to call.
#pragma once

#include <atomic>
#include <cstdint>

namespace vpo {

// The pieces of one loop. A thread takes the next piece when it has done one, so that a busy core delays little.
class Loop {
  public:
    Loop(std::int64_t count, void (*work)(const void*, std::int64_t) noexcept, const void* context)
        : count_(count), work_(work), context_(context) {}

    // Does pieces until none is left.
    void take() noexcept {
        for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work_(context_, i);
    }

  private:
    const std::int64_t count_;
    void (*const work_)(const void*, std::int64_t) noexcept;
    const void* const context_;
    std::atomic<std::int64_t> next_{0};
};

// Does the loop's pieces on this thread and on at most `helpers` threads of the pool; returns when all are done. While
// another thread uses the pool, this one does them alone.
void share(Loop& loop, int helpers) noexcept;

// Makes a forked child, which has none of the pool's threads, start a pool of its own. To be called once.
void forget_pool_in_forks();

// Calls work(i) for each i in [0, count), on this thread and at most threads - 1 others. The work must not depend on
// the thread that does it, and must not throw.
template <class Work>
void for_each(std::int64_t count, int threads, const Work& work) {
    static_assert(noexcept(work(count)));
    Loop loop(count, [](const void* it, std::int64_t i) noexcept { (*static_cast<const Work*>(it))(i); }, &work);
    const std::int64_t helpers = (threads < count ? threads : count) - 1;
    if (helpers > 0) {
        share(loop, static_cast<int>(helpers));
    } else {
        loop.take();
    }
}

}  // namespace vpo
