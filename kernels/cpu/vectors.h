// Small matrix products and elementwise functions in float32, on a CPU's vector registers.
//
// They use the vector extensions of GCC and Clang, at the width of a register: sixteen numbers with AVX-512, eight with AVX,
// four with NEON and SSE. The same source compiles on every machine; the only intrinsics are the products of bfloat16
// pairs, where they exist.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512BF16__)
#define GSPO_HAS_PAIRS 1
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define GSPO_HAS_PAIRS 1
#include <arm_neon.h>
#else
#define GSPO_HAS_PAIRS 0
#endif

namespace gspo {

#if defined(__AVX512F__)
constexpr int W = 16, REGISTERS = 32;  // numbers in a vector; vectors that a processor holds
#elif defined(__AVX__)
constexpr int W = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4, REGISTERS = 32;
#else
constexpr int W = 4, REGISTERS = 16;
#endif
typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IVec __attribute__((vector_size(W * 4)));
typedef uint32_t UVec __attribute__((vector_size(W * 4)));
typedef uint16_t HVec __attribute__((vector_size(W * 2)));
// The same in memory, at any address.
typedef Vec VecAt __attribute__((aligned(4), may_alias));
typedef IVec IVecAt __attribute__((aligned(4), may_alias));
typedef UVec UVecAt __attribute__((aligned(4), may_alias));
typedef HVec HVecAt __attribute__((aligned(2), may_alias));

struct BF16 {
    uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }
inline Vec select(IVec mask, Vec a, Vec b) { return (Vec)((mask & (IVec)a) | (~mask & (IVec)b)); }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }

inline Vec load(const float* p) { return *(const VecAt*)p; }
inline Vec load(const BF16* p) { return (Vec)(__builtin_convertvector(*(const HVecAt*)p, UVec) << 16); }
inline void store(float* p, Vec x) { *(VecAt*)p = x; }
inline void store(BF16* p, Vec x) {  // to nearest, ties to even, NaN stays NaN
    UVec u = (UVec)x;
    UVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    IVec nan = x != x;
    rounded = (rounded & ~(UVec)nan) | ((UVec)nan & 0x7fc0);
    *(HVecAt*)p = __builtin_convertvector(rounded, HVec);
}
inline float load1(const float* p) { return *p; }
inline float load1(const BF16* p) {
    uint32_t u = (uint32_t)p->bits << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
inline void store1(float* p, float x) { *p = x; }
inline void store1(BF16* p, float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    p->bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

inline float sum(Vec x) {  // in halves
    float y[W];
    std::memcpy(y, &x, sizeof x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) y[i] += y[i + half];
    return y[0];
}

// 2^x for x <= 127, to 2e-7 of its value; 0 below -126.
inline Vec exp2v(Vec x) {
    IVec small = x < splat(-126.0f);
    x = max(x, splat(-126.0f));
    Vec shifted = x + splat(12582912.0f);  // 1.5 * 2^23: its low bits are x rounded to a whole number
    IVec whole = (IVec)shifted - (IVec)splat(12582912.0f);
    Vec f = x - (shifted - splat(12582912.0f));
    Vec p = splat(1.5403530e-4f);
    p = p * f + splat(1.3333558e-3f);
    p = p * f + splat(9.6181291e-3f);
    p = p * f + splat(5.5504109e-2f);
    p = p * f + splat(2.4022651e-1f);
    p = p * f + splat(6.9314718e-1f);
    p = p * f + splat(1.0f);
    Vec scaled = (Vec)((IVec)p + (whole << 23));
    return select(small, Vec{}, scaled);
}

constexpr float LOG2E = 1.4426950408889634f;

// e^x for x <= 88, to 1e-7 of its value; 0 below -87, and NaN stays NaN. Coefficients are a minimax fit of
// (e^r - 1 - r) / r^2 on |r| <= log(2) / 2; log 2 is subtracted in two parts, the first of few bits.
inline Vec expv(Vec x) {
    const IVec small = x < splat(-87.0f);
    x = select(small, splat(-87.0f), x);
    const Vec shifted = x * splat(LOG2E) + splat(12582912.0f);  // as in exp2v
    const IVec whole = (IVec)shifted - (IVec)splat(12582912.0f);
    const Vec n = shifted - splat(12582912.0f);
    const Vec r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
    Vec p = splat(1.38146128e-3f);
    p = p * r + splat(8.36871006e-3f);
    p = p * r + splat(4.1668389e-2f);
    p = p * r + splat(0.166665211f);
    p = p * r + splat(0.49999994f);
    p = p * (r * r) + r + splat(1.0f);
    return select(small, Vec{}, p * (Vec)((whole + 127) << 23));
}

inline Vec tanhv(Vec x) {
    Vec bounded = max(splat(-10.0f), select(x < splat(10.0f), x, splat(10.0f)));
    return splat(1.0f) - splat(2.0f) / (exp2v(bounded * splat(2 * LOG2E)) + splat(1.0f));
}

inline Vec sigmoid(Vec x) {
    const Vec bounded = max(splat(-80.0f), x);
    return splat(1.0f) / (splat(1.0f) + exp2v(bounded * splat(-LOG2E)));
}

// The elements of small matrix products: a float32 number, or a pair of bfloat16 numbers, whose two products are added.
typedef uint32_t Pair;
inline Vec right(const float* b) { return load(b); }
inline Vec times(Vec sum, float a, Vec b) { return sum + splat(a) * b; }
inline UVec right(const Pair* b) { return *(const UVecAt*)b; }
#if defined(__AVX512BF16__)
inline Vec times(Vec sum, Pair a, UVec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}
#elif GSPO_HAS_PAIRS
inline Vec times(Vec sum, Pair a, UVec b) {
    return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)(a - UVec{}), (bfloat16x8_t)b);
}
#else
inline Vec times(Vec sum, Pair a, UVec b) {
    const UVec x = a - UVec{};
    return sum + (Vec)(x << 16) * (Vec)(b << 16) + (Vec)(x & 0xffff0000u) * (Vec)(b & 0xffff0000u);
}
#endif
inline Pair pair(BF16 a, BF16 b) { return a.bits | (Pair)b.bits << 16; }

// C[r][c] (+)= sum_i A[r * ar + i * ai] * B[i * ldb + c] for r < R, c < V * W. Meanwhile the vectors ahead[i * ldb + v * W],
// v < AHEAD, are fetched from memory to the L2 cache.
template <int R, int V, int AHEAD = 0, typename E>
inline void block(int inner, const E* a, long ar, long ai, const E* b, long ldb, float* c, long ldc, bool add,
                  const E* ahead = nullptr) {
    Vec acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = add ? load(c + r * ldc + v * W) : Vec{};
    for (int i = 0; i < inner; ++i) {
        decltype(right(b)) row[V];
        for (int v = 0; v < V; ++v) row[v] = right(b + i * ldb + v * W);
        for (int v = 0; v < AHEAD; ++v) __builtin_prefetch(ahead + i * ldb + v * W, 0, 2);
        for (int r = 0; r < R; ++r) {
            const E x = a[r * ar + i * ai];
            for (int v = 0; v < V; ++v) acc[r][v] = times(acc[r][v], x, row[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, acc[r][v]);
}

// The same for `rows` rows, fewer than R: all in one block, as one of few rows takes as long as one of many.
template <int R, int V, typename E>
inline void rest(int rows, int inner, const E* a, long ar, long ai, const E* b, long ldb, float* c, long ldc, bool add) {
    if constexpr (R > 1) {
        if (rows == R - 1)
            block<R - 1, V>(inner, a, ar, ai, b, ldb, c, ldc, add);
        else
            rest<R - 1, V>(rows, inner, a, ar, ai, b, ldb, c, ldc, add);
    }
}

// How many rows a block has, so that its sums, the row of B and a number of A stay in registers.
template <int V, typename E>
constexpr int rows_at_once() {
    constexpr bool apart = sizeof(E) == 4 && !GSPO_HAS_PAIRS && !std::is_same<E, float>::value;  // pairs take twice the room
    constexpr int fit = (REGISTERS - (apart ? 2 * V + 2 : V + 1)) / V;
    return fit >= 8 ? 8 : fit >= 6 ? 6 : 4;
}

template <int V, typename E>
inline void columns(int rows, int inner, const E* a, long ar, long ai, const E* b, long ldb, float* c, long ldc,
                    bool add) {
    constexpr int R = rows_at_once<V, E>();
    int at = 0;
    for (; at + R <= rows; at += R) block<R, V>(inner, a + at * ar, ar, ai, b, ldb, c + at * ldc, ldc, add);
    rest<R, V>(rows - at, inner, a + at * ar, ar, ai, b, ldb, c + at * ldc, ldc, add);
}

// The same for any number of columns that is a multiple of W: C [rows, cols] (+)= A [rows, inner] B [inner, cols].
template <typename E>
inline void product(int rows, int cols, int inner, const E* a, long ar, long ai, const E* b, long ldb, float* c, long ldc,
                    bool add) {
    int at = 0;
    if constexpr (REGISTERS == 32) {
        if (cols % (4 * W) == 3 * W) {
            columns<3>(rows, inner, a, ar, ai, b, ldb, c, ldc, add);
            at = 3 * W;
        }
        for (; at + 4 * W <= cols; at += 4 * W) columns<4>(rows, inner, a, ar, ai, b + at, ldb, c + at, ldc, add);
    }
    for (; at + 2 * W <= cols; at += 2 * W) columns<2>(rows, inner, a, ar, ai, b + at, ldb, c + at, ldc, add);
    for (; at < cols; at += W) columns<1>(rows, inner, a, ar, ai, b + at, ldb, c + at, ldc, add);
}

inline int padded(int n) { return (n + W - 1) / W * W; }

// Convert n numbers to float32, and write zeros up to `width`.
template <typename T>
inline void widen(const T* from, int n, float* to, int width) {
    int i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = load1(from + i);
    for (; i < width; ++i) to[i] = 0;
}
template <typename T>
inline void narrow(const float* from, int n, T* to) {
    int i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    for (; i < n; ++i) store1(to + i, from[i]);
}

}  // namespace gspo
