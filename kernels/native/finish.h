// Computes results and coefficients from the sums of the pairs, as reference.finish does. The forty
// small torch operations of the latter would take longer than the sums of a small sample.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "views.h"

namespace vpo {

struct Options {
    PerPair beta, pair_weight;
    bool mean;
    double winner_anchor;
    std::optional<double> loser_scaling;
};

// Where results go: loss [] and per_pair [kSums, P] (margin, then all sums but a . b, divided), float32 or float64;
// coefficient and slope float64 [2, P].
struct Results {
    void *loss, *per_pair;
    double *coefficient, *slope;
};

inline double log_sigmoid(double x) { return std::fmin(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

// Returns what Diffusion-SDPO multiplies the loser's gradient by; NaN in `squares` stays NaN.
inline double loser_scale(double mu, double squares, double product) {
    if (!(product > 0)) return 1;
    const double bound = (1 - mu) * squares / product;
    return bound < 0 ? 0 : bound > 1 ? 1 : bound;
}

// sums: [kSums, P], see views.h. counted: number of elements that count, per pair or for all pairs.
template <class Out>
void finish(const double* sums, std::int64_t pairs, PerPair counted, const Options& options,
            const Results& results) {
    double total = 0;
    Out* per_pair = static_cast<Out*>(results.per_pair);
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
        const double norm = options.mean ? counted[pair] : 1.0;
        const double winner_change = sums[pair] / norm, loser_change = sums[pairs + pair] / norm;
        const double squares = sums[2 * pairs + pair], product = sums[6 * pairs + pair];
        const double beta = options.beta[pair], weight = options.pair_weight[pair];
        const double margin = beta / 2 * (loser_change - winner_change);
        double loss = -log_sigmoid(margin);
        if (options.winner_anchor != 0) loss += options.winner_anchor * (squares / norm);
        total += weight * loss;
        const double push = weight / (static_cast<double>(pairs) * norm);
        const double pull = push * beta / 2 / (1 + std::exp(margin));
        const double slope = beta / 2 / norm;
        const double scale = options.loser_scaling ? loser_scale(*options.loser_scaling, squares, product) : 1;
        results.coefficient[pair] = pull + options.winner_anchor * push;
        results.coefficient[pairs + pair] = -pull * scale;
        results.slope[pair] = -slope;
        results.slope[pairs + pair] = slope * scale;
        per_pair[pair] = static_cast<Out>(margin);
        for (int kind = 0; kind < kSums - 1; ++kind) {
            per_pair[(kind + 1) * pairs + pair] = static_cast<Out>(sums[kind * pairs + pair] / norm);
        }
    }
    *static_cast<Out*>(results.loss) = static_cast<Out>(total / static_cast<double>(pairs));
}

}  // namespace vpo
