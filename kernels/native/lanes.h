// Element types, vectors of eight elements and groups of 16, for any little-endian instruction set for which GCC and
// Clang can compile vectors.
// Included inside the namespace of one instruction set, so that no function is shared between two of them.

typedef float F32x8 __attribute__((vector_size(32)));
typedef double F64x8 __attribute__((vector_size(64)));
typedef std::uint8_t U8x8 __attribute__((vector_size(8)));
typedef std::uint16_t U16x8 __attribute__((vector_size(16)));
typedef std::uint32_t U32x8 __attribute__((vector_size(32)));
typedef std::int32_t I32x8 __attribute__((vector_size(32)));
typedef std::int64_t I64x8 __attribute__((vector_size(64)));
typedef std::uint64_t U64x8 __attribute__((vector_size(64)));

struct Bf16 {
    std::uint16_t bits;
};

struct F16 {
    std::uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class A>
struct Arithmetic;  // Vector: eight A. Mask: as many integers of A's size.

template <>
struct Arithmetic<float> {
    typedef F32x8 Vector;
    typedef I32x8 Mask;
};

template <>
struct Arithmetic<double> {
    typedef F64x8 Vector;
    typedef I64x8 Mask;
};

template <class Mask>
inline Mask select(Mask condition, Mask yes, Mask no) {
    return (condition & yes) | (~condition & no);
}

// --- to float: exact -------------------------------------------------------------------------------------

inline F32x8 load(const float* from) {
    F32x8 values;
    std::memcpy(&values, from, sizeof(values));
    return values;
}

inline F64x8 load(const double* from) {
    F64x8 values;
    std::memcpy(&values, from, sizeof(values));
    return values;
}

inline U32x8 load_bits(const void* from) {
#if defined(__AVX2__)  // one instruction where GCC 12 would emit four
    return bit_cast<U32x8>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
    U16x8 bits;
    std::memcpy(&bits, from, sizeof(bits));
    return __builtin_convertvector(bits, U32x8);
#endif
}

inline F32x8 load(const Bf16* from) { return bit_cast<F32x8>(load_bits(from) << 16); }

inline F32x8 load(const F16* from) {
#if defined(__F16C__)
    return bit_cast<F32x8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    const I32x8 bits = bit_cast<I32x8>(load_bits(from));
    const I32x8 sign = (bits & 0x8000) << 16, exponent = bits & 0x7c00, rest = (bits & 0x7fff) << 13;
    const F32x8 small = __builtin_convertvector(bits & 0x3ff, F32x8) * 0x1p-24f;  // subnormal halves
    const I32x8 normal = rest + (112 << 23), infinite = rest + (224 << 23);
    const I32x8 finite = select(exponent == 0, bit_cast<I32x8>(small), normal);
    return bit_cast<F32x8>(sign | select(exponent == 0x7c00, infinite, finite));
#endif
}

inline F64x8 widen(F64x8 values) { return values; }
inline F64x8 widen(F32x8 values) { return __builtin_convertvector(values, F64x8); }

// --- from float: to nearest, ties to even ----------------------------------------------------------------

inline void store(float* to, F32x8 values) { std::memcpy(to, &values, sizeof(values)); }

inline void store(double* to, F64x8 values) { std::memcpy(to, &values, sizeof(values)); }

inline void store_bits(void* to, U32x8 bits) {
    const U16x8 narrow = __builtin_convertvector(bits, U16x8);
    std::memcpy(to, &narrow, sizeof(narrow));
}

// Rounds to bfloat16 in the upper halves of the words; the lower halves hold anything.
inline U32x8 rounded_bf16(F32x8 values) {
    const U32x8 bits = bit_cast<U32x8>(values), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const I32x8 number = values == values;
#if defined(__AVX2__)  // one instruction where GCC 12 would emit three
    const __m256i nan = _mm256_set1_epi32(0x7fc00000);
    return bit_cast<U32x8>(_mm256_blendv_epi8(nan, bit_cast<__m256i>(rounded), bit_cast<__m256i>(number)));
#else
    return bit_cast<U32x8>(select(number, bit_cast<I32x8>(rounded), I32x8{} + 0x7fc00000));
#endif
}

inline void store(Bf16* to, F32x8 values) {
    store_bits(to, rounded_bf16(values) >> 16);
}

inline void store(F16* to, F32x8 values) {
#if defined(__F16C__)
    const __m128i halves = _mm256_cvtps_ph(bit_cast<__m256>(values), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
#else
    const I32x8 bits = bit_cast<I32x8>(values), size = bits & 0x7fffffff;
    const I32x8 sign = (bits >> 16) & 0x8000;
    // Adding 0.5 leaves a subnormal half's digits, rounded, in the last bits.
    const I32x8 small = bit_cast<I32x8>(bit_cast<F32x8>(size) + 0.5f) - (126 << 23);
    const I32x8 normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    const I32x8 finite = select(size < (113 << 23), small, normal);
    const I32x8 infinite = select(size > (255 << 23), I32x8{} + 0x7e00, I32x8{} + 0x7c00);
    store_bits(to, bit_cast<U32x8>(sign | select(size >= (143 << 23), infinite, finite)));
#endif
}

// --- one element -----------------------------------------------------------------------------------------

inline float widen(Bf16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(F16 value) {
    F16 eight[8] = {value};
    return load(eight)[0];
}

template <class To, class A>
inline To narrow(A value) {
    if constexpr (sizeof(To) == 2) {
        To eight[8];
        store(eight, F32x8{} + static_cast<float>(value));
        return eight[0];
    } else {
        return static_cast<To>(value);
    }
}

// --- groups of 16 elements -------------------------------------------------------------------------------
//
// Bfloat16 widens fastest in pairs: a 32-bit word holds an even and an odd element, each of which is the upper half of
// a float already. So a group of a bfloat16 prediction is split into even and odd elements; all other groups keep
// their order. `split` says which it is; it is the same for all groups of one expression.

constexpr int kGroup = 16;

template <class P>
constexpr bool kSplit = false;
template <>
inline constexpr bool kSplit<Bf16> = true;

template <class A>
struct Group {
    typename Arithmetic<A>::Vector part[2];

    // Adds each element to the double at its place in the group.
    void add_to(double* lanes) const {
        for (int k = 0; k < 2; ++k) store(lanes + 8 * k, load(lanes + 8 * k) + widen(part[k]));
    }
};

// Returns the place of element i in a group.
constexpr int place(int i, bool split) { return split ? 8 * (i % 2) + i / 2 : i; }

// Loads 16 elements, split into even and odd ones.
inline void load_split(const Bf16* from, F32x8& even, F32x8& odd) {
    U32x8 words;
    std::memcpy(&words, from, sizeof(words));
    even = bit_cast<F32x8>(words << 16);
    odd = bit_cast<F32x8>(words & 0xffff0000);
}

inline void load_split(const float* from, F32x8& even, F32x8& odd) {
#if defined(__AVX2__)
    // A shuffle treats both halves of 128 bits alike, so each half takes four elements from either half of the 16.
    const auto four = [from](int at) { return _mm256_castps128_ps256(_mm_loadu_ps(from + at)); };
    const __m256 outer = _mm256_insertf128_ps(four(0), _mm_loadu_ps(from + 8), 1);
    const __m256 inner = _mm256_insertf128_ps(four(4), _mm_loadu_ps(from + 12), 1);
    even = bit_cast<F32x8>(_mm256_shuffle_ps(outer, inner, 0x88));
    odd = bit_cast<F32x8>(_mm256_shuffle_ps(outer, inner, 0xdd));
#else
    U64x8 pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    even = bit_cast<F32x8>(__builtin_convertvector(pairs, U32x8));
    odd = bit_cast<F32x8>(__builtin_convertvector(pairs >> 32, U32x8));
#endif
}

template <bool split, class A, class T>
inline Group<A> load_group(const T* from) {
    Group<A> group;
    if constexpr (split) {
        load_split(from, group.part[0], group.part[1]);
    } else {
        for (int k = 0; k < 2; ++k) group.part[k] = load(from + 8 * k);
    }
    return group;
}

template <bool split, class P, class A>
inline void store_group(P* to, const Group<A>& group) {
    if constexpr (split) {
        const U32x8 even = rounded_bf16(group.part[0]), odd = rounded_bf16(group.part[1]);
#if defined(__AVX2__)  // one instruction where GCC 12 would emit two
        const __m256i low = bit_cast<__m256i>(even >> 16), high = bit_cast<__m256i>(odd);
        const U32x8 words = bit_cast<U32x8>(_mm256_blend_epi16(low, high, 0xaa));
#else
        const U32x8 words = (even >> 16) | (odd & 0xffff0000);
#endif
        std::memcpy(to, &words, sizeof(words));
    } else {
        for (int k = 0; k < 2; ++k) store(to + 8 * k, group.part[k]);
    }
}

// Sets to 0 each element of the group whose mask byte is 0, even if it is NaN.
template <bool split, class A>
inline void hide(const std::uint8_t* mask, Group<A>& group) {
    typedef typename Arithmetic<A>::Mask Mask;
    Mask bytes[2];
    if constexpr (split) {
        const I32x8 pairs = bit_cast<I32x8>(load_bits(mask));
        bytes[0] = pairs & 0xff;
        bytes[1] = pairs >> 8;
    } else {
        for (int k = 0; k < 2; ++k) {
#if defined(__AVX2__)
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + 8 * k));
            const I32x8 words = bit_cast<I32x8>(_mm256_cvtepu8_epi32(eight));
#else
            U8x8 eight;
            std::memcpy(&eight, mask + 8 * k, sizeof(eight));
            const I32x8 words = __builtin_convertvector(eight, I32x8);
#endif
            bytes[k] = __builtin_convertvector(words, Mask);
        }
    }
    for (int k = 0; k < 2; ++k) {
        const Mask kept = bytes[k] != 0;
        group.part[k] = bit_cast<typename Arithmetic<A>::Vector>(kept & bit_cast<Mask>(group.part[k]));
    }
}
