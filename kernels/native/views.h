// The types that Python's arguments become, and the table of kernels. All instruction sets share them.
#pragma once

#include <cstdint>

namespace vpo {

enum class Dtype : int { kBool = 0, kBfloat16 = 1, kFloat16 = 2, kFloat32 = 3, kFloat64 = 4 };

// A tensor [P, ...] of n elements per sample. Strides are in elements; 0 repeats, so a view may be expanded.
struct View {
    char* data;
    Dtype dtype;
    std::int64_t pair_stride;
    int dims;                     // of a sample, at most kMaxDims; contiguous neighbours are merged
    const std::int64_t* sizes;    // [dims]
    const std::int64_t* strides;  // [dims]

    bool contiguous() const { return dims == 0 || (dims == 1 && strides[0] == 1); }
};

// One number for all pairs, or float64 [P].
struct PerPair {
    double number;
    const double* each;

    double operator[](std::int64_t pair) const { return each ? each[pair] : number; }
};

// The target of a sample is `target`, or x0_scale * target + noise_scale * noise.
struct Noise {
    View noise;
    PerPair x0_scale, noise_scale;
};

constexpr int kMaxDims = 64;
constexpr std::int64_t kChunk = 1 << 14;  // elements of one unit of work; sums are formed chunk by chunk
// What is summed: the error change of winner and of loser, the errors of policy (winner, loser) and of reference (winner,
// loser), and a . b, where a and b are policy - target of winner and loser.
constexpr int kSums = 7;
constexpr int kSpilled = -128;            // marks a difference of ordered bits that does not fit 8

struct SumsJob {
    View policy[2], reference[2], target[2];  // winner, loser
    const Noise* noise;                       // or null
    const View* mask;                         // or null; bool, shared by both members
    bool product;                             // whether to compute a . b; else it is 0
};

struct GradientJob {
    View policy, target, gradient;
    const Noise* noise;
    const View* mask;
    const double* coefficient;  // [P]
    double scale;               // the gradient is scale * coefficient * (policy - target)
};

// Each kernel takes elements [begin, end) of a pair, in logical order, at most kChunk of them. `wide` arithmetic is
// double, else float. Results are the same bits for every instruction set.
struct Kernels {
    const char* name;
    void (*sums)(const SumsJob& job, bool wide, std::int64_t pair, std::int64_t begin, std::int64_t end,
                 double out[kSums]) noexcept;
    void (*gradient)(const GradientJob& job, bool wide, std::int64_t pair, std::int64_t begin,
                     std::int64_t end) noexcept;
    // Computes ordered(reference) - ordered(policy) of `count` bfloat16 bits, at most kChunk; returns how many are
    // kSpilled.
    std::int32_t (*encode)(const std::int16_t* reference, const std::int16_t* policy, std::int8_t* difference,
                           std::int64_t count) noexcept;
    // Computes the reference again, except for the spilled elements. `out` may be `policy`.
    void (*decode)(const std::int8_t* difference, const std::int16_t* policy, std::int16_t* out,
                   std::int64_t count) noexcept;
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace vpo
