// Encoding and decoding of ordered_delta: threads share the chunks; spilled elements, which do not fit into 8 bits,
// are listed apart.

#include "delta.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "gil.h"
#include "parallel.h"

namespace nb = nanobind;

namespace vpo {
namespace {

// The arrays of one call. A chunk is kChunk elements, so that its count of spilled elements fits 16 bits, and that
// the second pass finds in the cache what the first has just written.
struct Delta {
    std::int64_t elements;
    std::int8_t* difference;
    std::int32_t* index;
    std::int16_t* value;
    std::int64_t spilled;
};

template <class T>
T* array(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::int64_t chunks(std::int64_t elements) { return (elements + kChunk - 1) / kChunk; }

// Returns, of eight differences, the high bits of those bytes that are kSpilled, that is 0x80.
std::uint64_t spilled_bytes(const std::int8_t* difference) {
    constexpr std::uint64_t kHigh = 0x8080808080808080u;
    std::uint64_t bits;
    std::memcpy(&bits, difference, sizeof(bits));
    return ~((bits & ~kHigh) + ~kHigh) & bits & kHigh;  // no carry leaves its byte
}

// Lists the spilled elements in [begin, end), from entry `first` of the list on. All indices are written before the
// values, so that the processor can fetch the values, which have left the caches, without waiting for each in turn.
void collect(const Delta& delta, const std::int16_t* reference, std::int64_t begin, std::int64_t end,
             std::int64_t first) noexcept {
    std::int64_t at = first, i = begin;
    for (; i + 8 <= end; i += 8) {
        for (std::uint64_t left = spilled_bytes(delta.difference + i); left; left &= left - 1) {
            delta.index[at++] = static_cast<std::int32_t>(i + __builtin_ctzll(left) / 8);
        }
    }
    for (; i < end; ++i) {
        if (delta.difference[i] == kSpilled) delta.index[at++] = static_cast<std::int32_t>(i);
    }
    for (std::int64_t j = first; j < at; ++j) delta.value[j] = reference[delta.index[j]];
}

// Writes the values whose index is in [begin, end) to their places. Indices ascend.
void restore(const Delta& delta, std::int16_t* out, std::int64_t begin, std::int64_t end) noexcept {
    const std::int32_t *first = delta.index, *last = first + delta.spilled;
    for (const std::int32_t* at = std::lower_bound(first, last, begin); at < last && *at < end; ++at) {
        if (*at >= begin) out[*at] = delta.value[at - first];
    }
}

void encode_delta(const std::string& instruction_set, std::int64_t elements, std::uintptr_t reference_at,
                  std::uintptr_t policy_at, std::uintptr_t difference_at, int threads, const nb::callable& allocate) {
    const Kernels& chosen = kernels_for(instruction_set);
    const auto *reference = array<const std::int16_t>(reference_at), *policy = array<const std::int16_t>(policy_at);
    Delta delta{elements, array<std::int8_t>(difference_at), nullptr, nullptr, 0};
    const std::int64_t count = chunks(elements);
    const int used = useful_threads(elements, threads);
    std::vector<std::int64_t> first(count);  // spilled elements of a chunk; later, of the chunks before it
    {
        const WithoutGil released;
        for_each(count, used, [&](std::int64_t i) noexcept {
            const std::int64_t begin = i * kChunk, length = std::min(kChunk, elements - begin);
            first[i] = chosen.encode(reference + begin, policy + begin, delta.difference + begin, length);
        });
        for (std::int64_t& each : first) delta.spilled += std::exchange(each, delta.spilled);
    }
    const auto [index_at, value_at] = nb::cast<std::pair<std::uintptr_t, std::uintptr_t>>(allocate(delta.spilled));
    delta.index = array<std::int32_t>(index_at);
    delta.value = array<std::int16_t>(value_at);
    const WithoutGil released;
    for_each(count, used, [&](std::int64_t i) noexcept {
        const std::int64_t begin = i * kChunk, end = std::min(begin + kChunk, elements);
        if (first[i] < (i + 1 < count ? first[i + 1] : delta.spilled)) collect(delta, reference, begin, end, first[i]);
    });
}

void decode_delta(const std::string& instruction_set, std::int64_t elements, std::uintptr_t difference_at,
                  std::uintptr_t index_at, std::uintptr_t value_at, std::int64_t spilled, std::uintptr_t policy_at,
                  std::uintptr_t out_at, int threads) {
    const Kernels& chosen = kernels_for(instruction_set);
    const auto* policy = array<const std::int16_t>(policy_at);
    auto* out = array<std::int16_t>(out_at);
    const Delta delta{elements, array<std::int8_t>(difference_at), array<std::int32_t>(index_at),
                      array<std::int16_t>(value_at), spilled};
    const WithoutGil released;
    for_each(chunks(elements), useful_threads(elements, threads), [&](std::int64_t i) noexcept {
        const std::int64_t begin = i * kChunk, end = std::min(begin + kChunk, elements);
        chosen.decode(delta.difference + begin, policy + begin, out + begin, end - begin);
        restore(delta, out, begin, end);
    });
}

}  // namespace

void bind_delta(nb::module_& m) {
    m.def("encode_delta", &encode_delta, nb::arg("instruction_set"), nb::arg("elements"), nb::arg("reference"),
          nb::arg("policy"), nb::arg("difference"), nb::arg("threads"), nb::arg("allocate"));
    m.def("decode_delta", &decode_delta, nb::arg("instruction_set"), nb::arg("elements"), nb::arg("difference"),
          nb::arg("index"), nb::arg("value"), nb::arg("spilled"), nb::arg("policy"), nb::arg("out"),
          nb::arg("threads"));
}

}  // namespace vpo
