// Copies runs of a strided view, in logical order, to and from a buffer. Included inside the namespace of one
// instruction set.

inline std::int64_t size_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBool: return 1;
        case Dtype::kBfloat16:
        case Dtype::kFloat16: return 2;
        case Dtype::kFloat32: return 4;
        case Dtype::kFloat64: break;
    }
    return 8;
}

// Calls visit(offset, stride, length, done) for each line of elements within [begin, begin + count) of a pair: `length`
// elements from `offset` on, `stride` apart, which follow `done` elements of the run.
template <class Visit>
void for_lines(const View& view, std::int64_t pair, std::int64_t begin, std::int64_t count, Visit visit) {
    std::int64_t offset = pair * view.pair_stride;
    if (view.dims == 0) return visit(offset, std::int64_t{1}, count, std::int64_t{0});
    std::int64_t index[kMaxDims];
    for (int dim = view.dims - 1; dim >= 0; --dim) {
        index[dim] = begin % view.sizes[dim];
        begin /= view.sizes[dim];
        offset += index[dim] * view.strides[dim];
    }
    const int last = view.dims - 1;
    for (std::int64_t done = 0;;) {
        const std::int64_t left = view.sizes[last] - index[last];
        const std::int64_t length = left < count - done ? left : count - done;
        visit(offset, view.strides[last], length, done);
        done += length;
        if (done == count) return;
        offset -= index[last] * view.strides[last];
        index[last] = 0;
        for (int dim = last - 1; dim >= 0; --dim) {
            offset += view.strides[dim];
            if (++index[dim] < view.sizes[dim]) break;
            offset -= view.sizes[dim] * view.strides[dim];
            index[dim] = 0;
        }
    }
}

template <class T, class A>
void read_as(const View& view, std::int64_t pair, std::int64_t begin, std::int64_t count, A* out) {
    const T* data = reinterpret_cast<const T*>(view.data);
    for_lines(view, pair, begin, count, [=](auto offset, auto stride, auto length, auto done) {
        const T* from = data + offset;
        A* to = out + done;
        std::int64_t i = 0;
        if constexpr (sizeof(T) == 2 && sizeof(A) == 4) {
            if (stride == 1) {
                for (; i + kWidth <= length; i += kWidth) store(to + i, load(from + i));
            }
        }
        for (; i < length; ++i) to[i] = widen(from[i * stride]);
    });
}

template <class A>
void read_run(const View& view, std::int64_t pair, std::int64_t begin, std::int64_t count, A* out) {
    switch (view.dtype) {
        case Dtype::kBfloat16: return read_as<Bf16>(view, pair, begin, count, out);
        case Dtype::kFloat16: return read_as<F16>(view, pair, begin, count, out);
        case Dtype::kFloat32: return read_as<float>(view, pair, begin, count, out);
        case Dtype::kFloat64:
            if constexpr (sizeof(A) == 8) return read_as<double>(view, pair, begin, count, out);
            break;
        case Dtype::kBool: break;
    }
}

inline void read_bytes(const View& view, std::int64_t pair, std::int64_t begin, std::int64_t count,
                       std::uint8_t* out) {
    for_lines(view, pair, begin, count, [&view, out](auto offset, auto stride, auto length, auto done) {
        const char* from = view.data + offset;
        if (stride == 0) {
            std::memset(out + done, *from, length);
        } else {
            for (std::int64_t i = 0; i < length; ++i) out[done + i] = from[i * stride];
        }
    });
}

template <class T, class A>
void write_as(const View& view, std::int64_t pair, std::int64_t begin, std::int64_t count, const A* from) {
    T* data = reinterpret_cast<T*>(view.data);
    for_lines(view, pair, begin, count, [=](auto offset, auto stride, auto length, auto done) {
        T* to = data + offset;
        std::int64_t i = 0;
        if constexpr (sizeof(T) == 2 && sizeof(A) == 4) {
            if (stride == 1) {
                for (; i + kWidth <= length; i += kWidth) store(to + i, load(from + done + i));
            }
        }
        for (; i < length; ++i) to[i * stride] = narrow<T>(from[done + i]);
    });
}

template <class A>
void write_run(const View& view, std::int64_t pair, std::int64_t begin, std::int64_t count, const A* from) {
    switch (view.dtype) {
        case Dtype::kBfloat16: return write_as<Bf16>(view, pair, begin, count, from);
        case Dtype::kFloat16: return write_as<F16>(view, pair, begin, count, from);
        case Dtype::kFloat32: return write_as<float>(view, pair, begin, count, from);
        case Dtype::kFloat64:
            if constexpr (sizeof(A) == 8) return write_as<double>(view, pair, begin, count, from);
            break;
        case Dtype::kBool: break;
    }
}
