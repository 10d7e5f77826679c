// The extension module vpo_kernels._native. Tensors come as address, dtype and strides, so that nothing here
// depends on torch. _native.pyi says what the functions promise; only the files native.py of paired_dpo and of
// ordered_delta call them.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "delta.h"
#include "dispatch.h"
#include "finish.h"
#include "gil.h"
#include "parallel.h"
#include "views.h"

namespace nb = nanobind;

namespace vpo {
namespace {

using Sizes = std::vector<std::int64_t>;
using Tensor = std::tuple<std::uintptr_t, int, Sizes>;  // address, dtype, strides
using Numbers = std::tuple<double, std::uintptr_t>;     // a number, or the address of float64 [P] in its place
using Scaled = std::tuple<Tensor, Numbers, Numbers>;    // noise, x0_scale, noise_scale
using Chosen = std::tuple<Numbers, Numbers, bool, double, std::optional<double>>;  // as in contract.Options
using Graded = std::tuple<Tensor, Tensor, Tensor, std::uintptr_t>;  // policy, target, gradient, coefficient

constexpr std::int64_t kElementsPerThread = 1 << 15;  // with fewer, sharing costs more than it saves

// The views of one call, and the merged sizes and strides that they point to.
class Views {
  public:
    Views(const Sizes& shape, bool wide) : shape_(shape), wide_(wide) {
        for (std::size_t dim = 1; dim < shape.size(); ++dim) elements_ *= shape[dim];
    }

    std::int64_t pairs() const { return shape_.at(0); }
    std::int64_t elements() const { return elements_; }  // per sample
    std::int64_t chunks() const { return (elements_ + kChunk - 1) / kChunk; }

    View operator()(const Tensor& tensor) {
        const auto& [address, dtype, strides] = tensor;
        if (strides.size() != shape_.size()) throw std::invalid_argument("strides and shape differ in length");
        if (static_cast<Dtype>(dtype) == Dtype::kFloat64 && !wide_) throw std::invalid_argument("float64 needs wide");
        std::vector<std::int64_t> sizes, steps;  // innermost first
        for (std::size_t dim = shape_.size() - 1; dim > 0; --dim) {
            if (shape_[dim] == 1) continue;
            if (!sizes.empty() && strides[dim] == sizes.back() * steps.back()) {
                sizes.back() *= shape_[dim];
            } else {
                sizes.push_back(shape_[dim]);
                steps.push_back(strides[dim]);
            }
        }
        if (sizes.size() > kMaxDims) throw std::invalid_argument("more than 64 dimensions");
        std::reverse(sizes.begin(), sizes.end());
        std::reverse(steps.begin(), steps.end());
        kept_.push_back(std::make_unique<Kept>(Kept{std::move(sizes), std::move(steps)}));
        const Kept& kept = *kept_.back();
        return {reinterpret_cast<char*>(address), static_cast<Dtype>(dtype),
                strides[0],                       static_cast<int>(kept.sizes.size()),
                kept.sizes.data(),                kept.strides.data()};
    }

  private:
    struct Kept {
        std::vector<std::int64_t> sizes, strides;
    };

    const Sizes& shape_;
    const bool wide_;
    std::int64_t elements_ = 1;
    std::vector<std::unique_ptr<Kept>> kept_;
};

PerPair per_pair(const Numbers& numbers) {
    return {std::get<0>(numbers), reinterpret_cast<const double*>(std::get<1>(numbers))};
}

std::optional<Noise> noise_of(Views& views, const std::optional<Scaled>& scaled) {
    if (!scaled) return std::nullopt;
    const auto& [tensor, x0_scale, noise_scale] = *scaled;
    return Noise{views(tensor), per_pair(x0_scale), per_pair(noise_scale)};
}

std::optional<View> mask_of(Views& views, const std::optional<Tensor>& mask) {
    if (!mask) return std::nullopt;
    return views(*mask);
}

template <class T>
const T* pointer(const std::optional<T>& value) {
    return value ? &*value : nullptr;
}

bool has_avx2() {
#if defined(__x86_64__)
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    if (has_avx512() && has_avx2()) found.push_back(&kAvx512);
    if (has_avx2()) found.push_back(&kAvx2);
#endif
    found.push_back(&kBaseline);
    return found;
}

// Returns the kernels that this processor can run, the fastest first. It asks the processor once, because a virtual
// machine takes microseconds to answer.
const std::vector<const Kernels*>& kernels() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* each : kernels()) names.emplace_back(each->name);
    return names;
}

}  // namespace

const Kernels& kernels_for(const std::string& name) {
    for (const Kernels* each : kernels()) {
        if (name == each->name) return *each;
    }
    throw std::invalid_argument("this processor has no instruction set " + name);
}

int useful_threads(std::int64_t elements, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(elements / kElementsPerThread, 1, std::max(threads, 1)));
}

namespace {

std::tuple<std::int64_t, std::int64_t> chunk_bounds(const Views& views, std::int64_t chunk) {
    return {chunk * kChunk, std::min((chunk + 1) * kChunk, views.elements())};
}

// Computes the sums [kSums, P] of a job; each pair's chunks are added in order.
std::vector<double> sums(const Kernels& chosen, const Views& views, const SumsJob& job, bool wide, int threads) {
    const std::int64_t chunks = views.chunks(), pairs = views.pairs();
    std::vector<double> partial(pairs * chunks * kSums), result(kSums * pairs);
    for_each(pairs * chunks, useful_threads(2 * pairs * views.elements(), threads), [&](std::int64_t i) noexcept {
        const auto [begin, end] = chunk_bounds(views, i % chunks);
        chosen.sums(job, wide, i / chunks, begin, end, &partial[i * kSums]);
    });
    for (std::int64_t i = 0; i < pairs * chunks; ++i) {
        for (int which = 0; which < kSums; ++which) result[which * pairs + i / chunks] += partial[i * kSums + which];
    }
    return result;
}

void forward(const std::string& instruction_set, const Sizes& shape, const std::vector<Tensor>& tensors,
             const std::optional<Scaled>& scaled, const std::optional<Tensor>& mask, const Numbers& counted,
             const Chosen& options, bool wide, int threads, const std::vector<std::uintptr_t>& out) {
    if (tensors.size() != 6 || out.size() != 4) throw std::invalid_argument("forward takes 6 tensors and 4 results");
    const Kernels& chosen = kernels_for(instruction_set);
    Views views(shape, wide);
    const std::optional<Noise> noise = noise_of(views, scaled);
    const std::optional<View> hidden = mask_of(views, mask);
    const auto& [beta, pair_weight, mean, winner_anchor, loser_scaling] = options;
    SumsJob job{};
    for (int member = 0; member < 2; ++member) {
        job.policy[member] = views(tensors[member]);
        job.reference[member] = views(tensors[2 + member]);
        job.target[member] = views(tensors[4 + member]);
    }
    job.noise = pointer(noise);
    job.mask = pointer(hidden);
    job.product = loser_scaling.has_value();
    const auto at = [&](int i) { return reinterpret_cast<void*>(out[i]); };
    const Results results{at(0), at(1), static_cast<double*>(at(2)), static_cast<double*>(at(3))};
    const WithoutGil released;
    const std::vector<double> found = sums(chosen, views, job, wide, threads);
    (wide ? finish<double> : finish<float>)(
        found.data(), views.pairs(), per_pair(counted),
        {per_pair(beta), per_pair(pair_weight), mean, winner_anchor, loser_scaling}, results);
}

void gradient(const std::string& instruction_set, const Sizes& shape, const std::vector<Graded>& members,
              const std::optional<Scaled>& scaled, const std::optional<Tensor>& mask, double scale, bool wide,
              int threads) {
    const Kernels& chosen = kernels_for(instruction_set);
    Views views(shape, wide);
    const std::optional<Noise> noise = noise_of(views, scaled);
    const std::optional<View> hidden = mask_of(views, mask);
    std::vector<GradientJob> jobs;
    for (const auto& [policy, target, gradient, coefficient] : members) {
        jobs.push_back({views(policy), views(target), views(gradient), pointer(noise), pointer(hidden),
                        reinterpret_cast<const double*>(coefficient), scale});
    }
    const std::int64_t chunks = views.chunks(), per_member = views.pairs() * chunks;
    const std::int64_t count = per_member * static_cast<std::int64_t>(jobs.size());
    const std::int64_t elements = views.pairs() * views.elements() * static_cast<std::int64_t>(jobs.size());
    const WithoutGil released;
    for_each(count, useful_threads(elements, threads), [&](std::int64_t i) noexcept {
        const auto [begin, end] = chunk_bounds(views, i % chunks);
        chosen.gradient(jobs[i / per_member], wide, i % per_member / chunks, begin, end);
    });
}

}  // namespace
}  // namespace vpo

NB_MODULE(_native, m) {
    vpo::forget_pool_in_forks();
    m.def("instruction_sets", &vpo::instruction_sets);
    m.def("forward", &vpo::forward, nb::arg("instruction_set"), nb::arg("shape"), nb::arg("tensors"),
          nb::arg("noise").none(), nb::arg("mask").none(), nb::arg("counted"), nb::arg("options"), nb::arg("wide"),
          nb::arg("threads"), nb::arg("out"));
    m.def("gradient", &vpo::gradient, nb::arg("instruction_set"), nb::arg("shape"), nb::arg("members"),
          nb::arg("noise").none(), nb::arg("mask").none(), nb::arg("scale"), nb::arg("wide"),
          nb::arg("threads"));
    vpo::bind_delta(m);
}
