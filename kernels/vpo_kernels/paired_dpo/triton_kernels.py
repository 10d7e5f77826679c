"""GPU kernels of the paired DPO loss. ``reference.py`` has the formulas, ``triton.py`` launches these.

There are P pairs of n elements each, which are worked on in chunks. A tensor of elements comes as a *view*: (pointer,
stride between pairs, strides inside a sample). The last are () where a sample's elements lie one after the other, else
one per entry of ``sizes``, the sample's dimensions from the last to the first. Numbers per pair come as a float64, and
beside it either None or (pointer, stride), whose values then take its place. All strides count elements.

Results depend on the numbers and on n alone, not on strides, neighbours, warps or the GPU: chunks have a fixed
size, sums are explicit binary trees over logical positions (an addition of two has only one order), and
multiplications and additions stay apart (launched with enable_fp_fusion=False).
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803, SIM108
# This is written so that Triton 3.6 to 3.9 understand it: no None inside a tuple, and in the interpreter no range() of
# numbers that are not constant.

import triton
import triton.language as tl

from vpo_kernels.triton_parts import INTERPRETED, block_sum, kernel_part


@kernel_part
def _upcast(value, dtype: tl.constexpr):
    """Convert exactly. 16 bits go by way of float32, because the interpreter knows no other way."""
    if value.dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)


@kernel_part
def _round(value, dtype: tl.constexpr):
    """Round to nearest even, as torch casts: float64 reaches 16 bits by way of float32."""
    if dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@kernel_part
def _address(view, sizes, pair, lane):
    """Return the addresses of elements ``lane`` of a pair's sample, counted in logical order."""
    start = view[0] + pair * view[1]
    if len(view[2]) == 0:
        address = start + lane
    else:
        rest = lane
        offset = tl.full(lane.shape, 0, tl.int64)
        for dim in tl.static_range(len(sizes) - 1):
            offset += (rest % sizes[dim]).to(tl.int64) * view[2][dim]
            rest = rest // sizes[dim]
        address = start + (offset + rest.to(tl.int64) * view[2][len(sizes) - 1])
    return address


@kernel_part
def _load(view, sizes, pair, lane, inside, dtype: tl.constexpr):
    return _upcast(tl.load(_address(view, sizes, pair, lane), mask=inside, other=0.0), dtype)


@kernel_part
def _counted(mask, sizes, pair, lane, inside):
    """Return a mask of the elements that exist and that the loss counts."""
    if mask is not None:
        inside = inside & (tl.load(_address(mask, sizes, pair, lane), mask=inside, other=0) != 0)
    return inside


@kernel_part
def _per_pair(number, each, pair):
    """Return the number of one pair, as a float64 scalar."""
    if each is None:
        value = tl.full([], number, tl.float64)
    else:
        value = _upcast(tl.load(each[0] + pair * each[1]), tl.float64)
    return value


@kernel_part
def _per_pairs(number, each, pairs, exist):
    """Return the numbers of a block of pairs, in float64."""
    if each is None:
        values = tl.full(pairs.shape, number, tl.float64)
    else:
        values = _upcast(tl.load(each[0] + pairs * each[1], mask=exist, other=0.0), tl.float64)
    return values


@kernel_part
def _tree_sum(terms, PAIRS: tl.constexpr, LEVELS: tl.constexpr, SUMS: tl.constexpr):
    """Sum [PAIRS, 2**LEVELS, SUMS] to [PAIRS, SUMS]: first neighbours, then neighbouring sums of two, and so on."""
    for level in tl.static_range(LEVELS):
        terms = block_sum(tl.reshape(terms, [PAIRS, 1 << (LEVELS - level - 1), 2, SUMS]), axis=2)
    return tl.reshape(terms, [PAIRS, SUMS])


@kernel_part
def _store_two_sums(out, first, second, LEVELS: tl.constexpr):
    """Store the sums of two blocks of 2**LEVELS terms at ``out``."""
    sums = _tree_sum(tl.reshape(tl.join(first, second), [1, 1 << LEVELS, 2]), 1, LEVELS, 2)
    tl.store(out + tl.arange(0, 2)[None, :], sums)


@triton.jit
def partial_sums(
    partials,  # [P, chunks, SUMS], ARITHMETIC
    tensors,  # the six of contract.PairTensors, in its order
    noise,  # or None
    mask,  # of uint8, or None
    sizes,
    n,
    chunks,
    x0_scale: tl.float64,
    x0_scale_each,
    noise_scale: tl.float64,
    noise_scale_each,
    SUMS: tl.constexpr,  # 6: both error changes, four errors; 7: then a . b
    ARITHMETIC: tl.constexpr,
    INDEX: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Sum one chunk of 2**LEVELS elements of one pair; the grid is P * chunks. SUMS numbers are stored."""
    BLOCK: tl.constexpr = 1 << LEVELS
    program = tl.program_id(0).to(tl.int64)
    pair = program // chunks
    lane = (program % chunks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < n
    m_w = _load(tensors[0], sizes, pair, lane, inside, ARITHMETIC)
    m_l = _load(tensors[1], sizes, pair, lane, inside, ARITHMETIC)
    r_w = _load(tensors[2], sizes, pair, lane, inside, ARITHMETIC)
    r_l = _load(tensors[3], sizes, pair, lane, inside, ARITHMETIC)
    t_w = _load(tensors[4], sizes, pair, lane, inside, ARITHMETIC)
    t_l = _load(tensors[5], sizes, pair, lane, inside, ARITHMETIC)
    if noise is not None:
        scale = _per_pair(x0_scale, x0_scale_each, pair).to(ARITHMETIC)
        scaled_noise = _load(noise, sizes, pair, lane, inside, ARITHMETIC)
        scaled_noise *= _per_pair(noise_scale, noise_scale_each, pair).to(ARITHMETIC)
        t_w = scale * t_w + scaled_noise
        t_l = scale * t_l + scaled_noise
    counted = _counted(mask, sizes, pair, lane, inside)
    out = partials + program * SUMS
    # Two sums at a time, those of the reference first, because it is not needed after the error changes: all at once
    # would take more registers than two blocks of threads can have.
    c = tl.where(counted, r_w - t_w, 0.0)
    d = tl.where(counted, r_l - t_l, 0.0)
    _store_two_sums(out + 4, c * c, d * d, LEVELS)
    change_w = tl.where(counted, (m_w - r_w) * (m_w + r_w - 2 * t_w), 0.0)
    change_l = tl.where(counted, (m_l - r_l) * (m_l + r_l - 2 * t_l), 0.0)
    _store_two_sums(out, change_w, change_l, LEVELS)
    a = tl.where(counted, m_w - t_w, 0.0)
    b = tl.where(counted, m_l - t_l, 0.0)
    _store_two_sums(out + 2, a * a, b * b, LEVELS)
    if SUMS == 7:
        crossed = _tree_sum(tl.reshape(a * b, [1, BLOCK, 1]), 1, LEVELS, 1)
        tl.store(out + 6 + tl.full([1, 1], 0, tl.int32), crossed)


@kernel_part
def _log1p(x):
    """Return log(1 + x) for x >= 0, exact to the last digits also where x is small (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@kernel_part
def _add_chunks(
    sums,
    partials,
    pairs,
    chunks,
    SUMS: tl.constexpr,
    FIRST: tl.constexpr,
    KINDS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK_LEVELS: tl.constexpr,
):
    """Fill KINDS of the SUMS sums of each pair, from the one numbered FIRST on.

    Partial sums are added position by position over 2**CHUNK_LEVELS chunks, then as a tree.
    """
    COLUMNS: tl.constexpr = 1 << CHUNK_LEVELS
    kind = FIRST + tl.arange(0, KINDS)
    pair = tl.arange(0, PAIRS).to(tl.int64)
    first = 0
    while first < pairs:
        exist = pair < pairs
        columns = tl.arange(0, COLUMNS)
        total = tl.full([PAIRS, COLUMNS, KINDS], 0.0, tl.float64)
        start = 0
        while start < chunks:
            here = exist[:, None, None] & (columns < chunks)[None, :, None]
            position = (pair[:, None, None] * chunks + columns[None, :, None]) * SUMS + kind[None, None, :]
            total += tl.load(partials + position, mask=here, other=0.0).to(tl.float64)
            columns += COLUMNS
            start += COLUMNS
        total = _tree_sum(total, PAIRS, CHUNK_LEVELS, KINDS)
        tl.store(sums + pair[:, None] * SUMS + kind[None, :], total, mask=exist[:, None])
        pair += PAIRS
        first += PAIRS


@triton.jit
def _loser_scale(sums, pair, exist, mu, SUMS: tl.constexpr):
    """Return the factor of the loser's gradient (Diffusion-SDPO), from the pairs' sums 2 and 6, in float64."""
    aa = tl.load(sums + pair * SUMS + 2, mask=exist, other=0.0)
    ab = tl.load(sums + pair * SUMS + 6, mask=exist, other=0.0)
    bound = (1.0 - mu) * aa / tl.where(ab > 0, ab, 1.0)
    return tl.where(ab > 0, tl.where(bound > 1, 1.0, bound), 1.0)


@kernel_part
def _store_results(
    per_pair,
    sums,
    pair,
    pairs,
    exist,
    z,
    change_w,
    change_l,
    divisor,
    SUMS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """Store margin, both error changes and the four errors of some pairs."""
    tl.store(per_pair + pair, z.to(ARITHMETIC), mask=exist)
    tl.store(per_pair + pairs + pair, change_w.to(ARITHMETIC), mask=exist)
    tl.store(per_pair + 2 * pairs + pair, change_l.to(ARITHMETIC), mask=exist)
    share = 1.0 / divisor
    for kind in tl.static_range(2, 6):
        error = tl.load(sums + pair * SUMS + kind, mask=exist, other=0.0) * share
        tl.store(per_pair + (kind + 1) * pairs + pair, error.to(ARITHMETIC), mask=exist)


@kernel_part
def _add_all_chunks(
    sums, partials, pairs, chunks, SUMS: tl.constexpr, PAIRS: tl.constexpr, CHUNK_LEVELS: tl.constexpr
):
    """Add the chunks of all sums of every pair."""
    for i in tl.static_range(3):
        _add_chunks(sums, partials, pairs, chunks, SUMS, 2 * i, 2, PAIRS, CHUNK_LEVELS)
    if SUMS == 7:
        _add_chunks(sums, partials, pairs, chunks, SUMS, 6, 1, PAIRS, CHUNK_LEVELS)
    tl.debug_barrier()  # the sums are read by other threads, a pair each


@triton.jit
def finish(
    loss,  # scalar, ARITHMETIC
    per_pair,  # [7, P], ARITHMETIC: margin, both error changes, four errors
    coefficient,  # [2, P], float64
    slope,  # [2, P], float64
    sums,  # [P, SUMS], float64, scratch memory
    partials,  # [P, chunks, SUMS], ARITHMETIC
    pairs,
    chunks,
    norm: tl.float64,  # divides a pair's sums
    norm_each,
    beta: tl.float64,
    beta_each,
    weight: tl.float64,
    weight_each,
    anchor: tl.float64,
    mu: tl.float64,
    ANCHORED: tl.constexpr,
    SCALED: tl.constexpr,
    SUMS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PAIRS: tl.constexpr,  # so many pairs, and
    CHUNK_LEVELS: tl.constexpr,  # 2**CHUNK_LEVELS of their chunks, are added at a time
    PAIR_LEVELS: tl.constexpr,  # 2**PAIR_LEVELS pairs at a time go from sums to loss
):
    """Compute results and coefficients from partial sums, in float64, as ``reference.finish`` does; the grid is 1."""
    _add_all_chunks(sums, partials, pairs, chunks, SUMS, PAIRS, CHUNK_LEVELS)
    losses = tl.full([1 << PAIR_LEVELS], 0.0, tl.float64)
    pair = tl.arange(0, 1 << PAIR_LEVELS).to(tl.int64)
    first = 0
    while first < pairs:
        exist = pair < pairs
        divisor = tl.where(exist, _per_pairs(norm, norm_each, pair, exist), 1.0)
        half_beta = _per_pairs(beta, beta_each, pair, exist) / 2
        pair_weight = _per_pairs(weight, weight_each, pair, exist)
        change_w = tl.load(sums + pair * SUMS, mask=exist, other=0.0) / divisor
        change_l = tl.load(sums + pair * SUMS + 1, mask=exist, other=0.0) / divisor
        z = half_beta * (change_l - change_w)
        small = tl.exp(-tl.abs(z))
        loss_of_pair = tl.where(z < 0, -z, 0.0) + _log1p(small)
        push = pair_weight / (pairs * divisor)
        pull = push * half_beta * (tl.where(z < 0, 1.0, small) / (1.0 + small))
        winner, loser = pull, -pull
        loser_slope = half_beta / divisor
        if ANCHORED:
            loss_of_pair += anchor * (tl.load(sums + pair * SUMS + 2, mask=exist, other=0.0) / divisor)
            winner += anchor * push
        if SCALED:
            scale = _loser_scale(sums, pair, exist, mu, SUMS)
            loser, loser_slope = loser * scale, loser_slope * scale
        losses += tl.where(exist, pair_weight * loss_of_pair, 0.0)
        _store_results(per_pair, sums, pair, pairs, exist, z, change_w, change_l, divisor, SUMS, ARITHMETIC)
        tl.store(coefficient + pair, winner, mask=exist)
        tl.store(coefficient + pairs + pair, loser, mask=exist)
        tl.store(slope + pair, -half_beta / divisor, mask=exist)
        tl.store(slope + pairs + pair, loser_slope, mask=exist)
        pair += 1 << PAIR_LEVELS
        first += 1 << PAIR_LEVELS
    mean = _tree_sum(tl.reshape(losses, [1, 1 << PAIR_LEVELS, 1]), 1, PAIR_LEVELS, 1) / pairs
    tl.store(loss + tl.full([1, 1], 0, tl.int32), mean.to(ARITHMETIC))


@triton.jit
def gradients(
    grads,  # of winner and loser; () where not wanted
    policy,  # of winner and loser
    target,  # of winner and loser
    noise,  # or None
    mask,  # of uint8, or None
    sizes,
    n,
    pairs,
    chunks,
    coefficient,  # [2, P], float64
    grad_loss,  # scalar of any float dtype
    x0_scale: tl.float64,
    x0_scale_each,
    noise_scale: tl.float64,
    noise_scale_each,
    ARITHMETIC: tl.constexpr,
    INDEX: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Store 2 * coefficient * grad_loss * (policy - target), 0 where the mask is False; the grid is P * chunks."""
    BLOCK: tl.constexpr = 1 << LEVELS
    program = tl.program_id(0).to(tl.int64)
    pair = program // chunks
    lane = (program % chunks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < n
    counted = _counted(mask, sizes, pair, lane, inside)
    twice = 2 * _upcast(tl.load(grad_loss), tl.float64)
    if noise is not None:
        scale = _per_pair(x0_scale, x0_scale_each, pair).to(ARITHMETIC)
        scaled_noise = _load(noise, sizes, pair, lane, inside, ARITHMETIC)
        scaled_noise *= _per_pair(noise_scale, noise_scale_each, pair).to(ARITHMETIC)
    for i in tl.static_range(2):
        if len(grads[i]) > 0:
            t = _load(target[i], sizes, pair, lane, inside, ARITHMETIC)
            if noise is not None:
                t = scale * t + scaled_noise
            factor = (twice * tl.load(coefficient + i * pairs + pair)).to(ARITHMETIC)
            m = _load(policy[i], sizes, pair, lane, inside, ARITHMETIC)
            step = tl.where(counted, (m - t) * factor, 0.0)
            address = _address(grads[i], sizes, pair, lane)
            tl.store(address, _round(step, grads[i][0].dtype.element_ty), mask=inside)
