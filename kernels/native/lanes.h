// Element types, vectors of kWidth elements and groups of two vectors, for any little-endian instruction set for which
// GCC and Clang can compile vectors.
// Included inside the namespace of one instruction set, so that no function is shared between two of them.

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef double Doubles __attribute__((vector_size(8 * kWidth)));
typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Integers __attribute__((vector_size(4 * kWidth)));
typedef std::int64_t LongIntegers __attribute__((vector_size(8 * kWidth)));
typedef std::uint64_t LongWords __attribute__((vector_size(8 * kWidth)));

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
struct Arithmetic;  // Vector: kWidth A. Mask: as many integers of A's size.

template <>
struct Arithmetic<float> {
    typedef Floats Vector;
    typedef Integers Mask;
};

template <>
struct Arithmetic<double> {
    typedef Doubles Vector;
    typedef LongIntegers Mask;
};

template <class Mask>
inline Mask select(Mask condition, Mask yes, Mask no) {
    return (condition & yes) | (~condition & no);
}

// --- to float: exact -------------------------------------------------------------------------------------

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof(values));
    return values;
}

inline Doubles load(const double* from) {
    Doubles values;
    std::memcpy(&values, from, sizeof(values));
    return values;
}

inline Words load_bits(const void* from) {
#if defined(__AVX512F__)
    return bit_cast<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)  // one instruction where GCC 12 would emit four
    return bit_cast<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
    Halves bits;
    std::memcpy(&bits, from, sizeof(bits));
    return __builtin_convertvector(bits, Words);
#endif
}

inline Floats load(const Bf16* from) { return bit_cast<Floats>(load_bits(from) << 16); }

inline Floats load(const F16* from) {
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return bit_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    const Integers bits = bit_cast<Integers>(load_bits(from));
    const Integers sign = (bits & 0x8000) << 16, exponent = bits & 0x7c00, rest = (bits & 0x7fff) << 13;
    const Floats small = __builtin_convertvector(bits & 0x3ff, Floats) * 0x1p-24f;  // subnormal halves
    const Integers normal = rest + (112 << 23), infinite = rest + (224 << 23);
    const Integers finite = select(exponent == 0, bit_cast<Integers>(small), normal);
    return bit_cast<Floats>(sign | select(exponent == 0x7c00, infinite, finite));
#endif
}

inline Doubles widen(Doubles values) { return values; }
inline Doubles widen(Floats values) { return __builtin_convertvector(values, Doubles); }

// --- from float: to nearest, ties to even ----------------------------------------------------------------

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

inline void store(double* to, Doubles values) { std::memcpy(to, &values, sizeof(values)); }

inline void store_bits(void* to, Words bits) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#else
    const Halves narrow = __builtin_convertvector(bits, Halves);
    std::memcpy(to, &narrow, sizeof(narrow));
#endif
}

// Rounds to bfloat16 in the upper halves of the words; the lower halves hold anything.
inline Words rounded_bf16(Floats values) {
    const Words bits = bit_cast<Words>(values), rounded = bits + 0x7fff + ((bits >> 16) & 1);
#if defined(__AVX512F__)
    const __m512 all = bit_cast<__m512>(values);
    const __mmask16 nan = _mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q);
    return bit_cast<Words>(_mm512_mask_mov_epi32(bit_cast<__m512i>(rounded), nan, _mm512_set1_epi32(0x7fc00000)));
#else
    const Integers number = values == values;
#if defined(__AVX2__)  // one instruction where GCC 12 would emit three
    const __m256i nan = _mm256_set1_epi32(0x7fc00000);
    return bit_cast<Words>(_mm256_blendv_epi8(nan, bit_cast<__m256i>(rounded), bit_cast<__m256i>(number)));
#else
    return bit_cast<Words>(select(number, bit_cast<Integers>(rounded), Integers{} + 0x7fc00000));
#endif
#endif
}

inline void store(Bf16* to, Floats values) {
    store_bits(to, rounded_bf16(values) >> 16);
}

inline void store(F16* to, Floats values) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_cvtps_ph(bit_cast<__m512>(values), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif defined(__F16C__)
    const __m128i halves = _mm256_cvtps_ph(bit_cast<__m256>(values), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
#else
    const Integers bits = bit_cast<Integers>(values), size = bits & 0x7fffffff;
    const Integers sign = (bits >> 16) & 0x8000;
    // Adding 0.5 leaves a subnormal half's digits, rounded, in the last bits.
    const Integers small = bit_cast<Integers>(bit_cast<Floats>(size) + 0.5f) - (126 << 23);
    const Integers normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    const Integers finite = select(size < (113 << 23), small, normal);
    const Integers infinite = select(size > (255 << 23), Integers{} + 0x7e00, Integers{} + 0x7c00);
    store_bits(to, bit_cast<Words>(sign | select(size >= (143 << 23), infinite, finite)));
#endif
}

// --- one element -----------------------------------------------------------------------------------------

inline float widen(Bf16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(F16 value) {
    F16 all[kWidth] = {value};
    return load(all)[0];
}

template <class To, class A>
inline To narrow(A value) {
    if constexpr (sizeof(To) == 2) {
        To all[kWidth];
        store(all, Floats{} + static_cast<float>(value));
        return all[0];
    } else {
        return static_cast<To>(value);
    }
}

// --- groups of two vectors -------------------------------------------------------------------------------
//
// Bfloat16 widens fastest in pairs: a 32-bit word holds an even and an odd element, each of which is the upper half of
// a float already. So a group of a bfloat16 prediction is split into even and odd elements; all other groups keep
// their order. `split` says which it is; it is the same for all groups of one expression.

constexpr int kGroup = 2 * kWidth;

template <class P>
constexpr bool kSplit = false;
template <>
inline constexpr bool kSplit<Bf16> = true;

template <class A>
struct Group {
    typename Arithmetic<A>::Vector part[2];

    // Adds each element to the double at its place in the group.
    void add_to(double* lanes) const {
        for (int k = 0; k < 2; ++k) store(lanes + kWidth * k, load(lanes + kWidth * k) + widen(part[k]));
    }
};

// Returns the place of element i in a group.
constexpr int place(int i, bool split) { return split ? kWidth * (i % 2) + i / 2 : i; }

// Loads a group, split into even and odd elements.
inline void load_split(const Bf16* from, Floats& even, Floats& odd) {
    Words words;
    std::memcpy(&words, from, sizeof(words));
    even = bit_cast<Floats>(words << 16);
    odd = bit_cast<Floats>(words & 0xffff0000);
}

inline void load_split(const float* from, Floats& even, Floats& odd) {
#if defined(__AVX512F__)
    const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + kWidth);
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = bit_cast<Floats>(_mm512_permutex2var_ps(low, evens, high));
    odd = bit_cast<Floats>(_mm512_permutex2var_ps(low, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), high));
#elif defined(__AVX2__)
    // A shuffle treats both halves of 128 bits alike, so each half takes four elements from either half of the 16.
    const auto four = [from](int at) { return _mm256_castps128_ps256(_mm_loadu_ps(from + at)); };
    const __m256 outer = _mm256_insertf128_ps(four(0), _mm_loadu_ps(from + 8), 1);
    const __m256 inner = _mm256_insertf128_ps(four(4), _mm_loadu_ps(from + 12), 1);
    even = bit_cast<Floats>(_mm256_shuffle_ps(outer, inner, 0x88));
    odd = bit_cast<Floats>(_mm256_shuffle_ps(outer, inner, 0xdd));
#else
    LongWords pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    even = bit_cast<Floats>(__builtin_convertvector(pairs, Words));
    odd = bit_cast<Floats>(__builtin_convertvector(pairs >> 32, Words));
#endif
}

template <bool split, class A, class T>
inline Group<A> load_group(const T* from) {
    Group<A> group;
    if constexpr (split) {
        load_split(from, group.part[0], group.part[1]);
    } else {
        for (int k = 0; k < 2; ++k) group.part[k] = load(from + kWidth * k);
    }
    return group;
}

template <bool split, class P, class A>
inline void store_group(P* to, const Group<A>& group) {
    if constexpr (split) {
        const Words even = rounded_bf16(group.part[0]), odd = rounded_bf16(group.part[1]);
#if defined(__AVX512F__)
        const __m512i low = bit_cast<__m512i>(even >> 16), high = bit_cast<__m512i>(odd);
        const Words words = bit_cast<Words>(_mm512_mask_blend_epi16(0xaaaaaaaa, low, high));
#elif defined(__AVX2__)  // one instruction where GCC 12 would emit two
        const __m256i low = bit_cast<__m256i>(even >> 16), high = bit_cast<__m256i>(odd);
        const Words words = bit_cast<Words>(_mm256_blend_epi16(low, high, 0xaa));
#else
        const Words words = (even >> 16) | (odd & 0xffff0000);
#endif
        std::memcpy(to, &words, sizeof(words));
    } else {
        for (int k = 0; k < 2; ++k) store(to + kWidth * k, group.part[k]);
    }
}

// Sets to 0 each element of the group whose mask byte is 0, even if it is NaN.
template <bool split, class A>
inline void hide(const std::uint8_t* mask, Group<A>& group) {
    typedef typename Arithmetic<A>::Mask Mask;
    Mask bytes[2];
    if constexpr (split) {
        const Integers pairs = bit_cast<Integers>(load_bits(mask));
        bytes[0] = pairs & 0xff;
        bytes[1] = pairs >> 8;
    } else {
        for (int k = 0; k < 2; ++k) {
#if defined(__AVX512F__)
            const __m128i each = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + kWidth * k));
            const Integers words = bit_cast<Integers>(_mm512_cvtepu8_epi32(each));
#elif defined(__AVX2__)
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask + kWidth * k));
            const Integers words = bit_cast<Integers>(_mm256_cvtepu8_epi32(eight));
#else
            Bytes each;
            std::memcpy(&each, mask + kWidth * k, sizeof(each));
            const Integers words = __builtin_convertvector(each, Integers);
#endif
            bytes[k] = __builtin_convertvector(words, Mask);
        }
    }
    for (int k = 0; k < 2; ++k) {
        const Mask kept = bytes[k] != 0;
        group.part[k] = bit_cast<typename Arithmetic<A>::Vector>(kept & bit_cast<Mask>(group.part[k]));
    }
}
