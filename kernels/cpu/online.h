// Attention by online softmax: queries meet their keys tile by tile, with a running maximum, and only sums are kept
// (Milakov and Gimelshein 2018; Dao et al. 2022). Queries are columns, W to a vector; a column's result does not
// depend on the other columns.
#pragma once
#include <vector>

#include "vectors.h"

namespace gspo {

constexpr int TILE = 64;     // keys at a time
constexpr int COLUMNS = 48;  // queries at a time

struct Scores {
    float scale;    // of products; to base 2, if there is no cap
    float softcap;  // to base 2; 0: none
};

inline Scores base2(float scale, float softcap) {
    return {softcap != 0 ? scale / softcap : scale * LOG2E, softcap * LOG2E};
}

// How matrix products read numbers of type T: one by one, or in pairs.
template <typename T>
struct Element;
template <>
struct Element<float> {
    typedef float Type;
    static constexpr int per = 1;
};
template <>
struct Element<BF16> {
    typedef Pair Type;
    static constexpr int per = 2;
};

// Return n rows of `width` numbers, `step` apart, as the right operand of a product over rows: [n / per, pad].
inline const float* as_panel(const float* rows, long step, int n, int width, int pad, float* memory) {
    if (width == pad && step == width) return rows;
    for (int k = 0; k < n; ++k) widen(rows + k * step, width, memory + k * pad, pad);
    return memory;
}
inline const Pair* as_panel(const BF16* rows, long step, int n, int width, int pad, Pair* memory) {
    static const BF16 nothing[4096] = {};
    for (int k = 0; k < n; k += 2) {
        const BF16 *a = rows + k * step, *b = k + 1 < n ? a + step : nothing;
        Pair* to = memory + k / 2 * pad;
        int d = 0;
        for (; d + W <= width; d += W)
            *(UVecAt*)(to + d) = __builtin_convertvector(*(const HVecAt*)(a + d), UVec) |
                               __builtin_convertvector(*(const HVecAt*)(b + d), UVec) << 16;
        for (; d < width; ++d) to[d] = pair(a[d], b[d]);
        for (; d < pad; ++d) to[d] = 0;
    }
    return memory;
}

// Write one query as a column of `queries` [width / per, COLUMNS].
inline void as_column(const float* q, int width, float* queries) {
    for (int d = 0; d < width; ++d) queries[d * COLUMNS] = q[d];
}
inline void as_column(const BF16* q, int width, Pair* queries) {
    for (int d = 0; d < width; d += 2) queries[d / 2 * COLUMNS] = pair(q[d], q[d + 1]);
}

// Return the weights of `size` keys, [size, COLUMNS], as the left operand of a product over keys.
inline const float* as_factors(const float* weights, int, int, float*) { return weights; }
inline const Pair* as_factors(const float* weights, int size, int lanes, Pair* memory) {
    for (int k = 0; k < size; k += 2)
        for (int v = 0; v < lanes; v += W) {
            BF16 a[W], b[W] = {};
            store(a, load(weights + k * COLUMNS + v));
            if (k + 1 < size) store(b, load(weights + (k + 1) * COLUMNS + v));
            *(UVecAt*)(memory + k / 2 * COLUMNS + v) =
                __builtin_convertvector(*(const HVecAt*)a, UVec) | __builtin_convertvector(*(const HVecAt*)b, UVec) << 16;
        }
    return memory;
}

// Overwrite products [size] of W columns with scores to base 2; the keys begin at `start`, and a column sees those
// in [from, to). Returns the largest score, or `best` where that is larger.
inline Vec score(float* s, int size, int start, const int32_t* from, const int32_t* to, const Scores& how, Vec best) {
    const IVec first = *(const IVecAt*)from - start, last = *(const IVecAt*)to - start;
    bool all = how.softcap == 0;
    for (int m = 0; m < W; ++m) all &= first[m] <= 0 && last[m] >= size;
    for (int k = 0; k < size; ++k) {
        Vec x = load(s + k * COLUMNS) * splat(how.scale);
        if (!all) {
            if (how.softcap != 0) x = tanhv(x) * splat(how.softcap);
            const IVec here = k - IVec{};
            x = select((first <= here) & (here < last), x, splat(-INFINITY));
        }
        store(s + k * COLUMNS, x);
        best = max(best, x);
    }
    return best;
}

template <typename T>
struct Online {
    typedef typename Element<T>::Type E;
    static constexpr int per = Element<T>::per;
    int width, value_pad, count = 0, lanes = 0;
    std::vector<E> queries, panel, factors;  // [width, COLUMNS], [TILE, value_pad], [TILE, COLUMNS]
    std::vector<float> weights, found;       // [TILE, COLUMNS], [COLUMNS, value_pad]
    float top[COLUMNS], total[COLUMNS];
    int32_t from[COLUMNS], to[COLUMNS];

    Online(int width, int value_pad)
        : width(width), value_pad(value_pad), queries(width * COLUMNS), panel(TILE * value_pad), factors(TILE * COLUMNS),
          weights(TILE * COLUMNS), found(COLUMNS * value_pad) {}

    void begin(int columns) {
        count = columns, lanes = padded(columns);
        std::memset(found.data(), 0, sizeof(float) * count * value_pad);
        for (int m = 0; m < COLUMNS; ++m) top[m] = -INFINITY, total[m] = 0, from[m] = 0, to[m] = 0;
    }

    // Attend to `size` keys, the first of which has the position `start`.
    void meet(const T* keys, const T* values, long key_step, long value_step, int value_width, int size, int start,
              const Scores& how) {
        product(size, lanes, width / per, (const E*)keys, key_step / per, 1, queries.data(), COLUMNS, weights.data(),
                COLUMNS, false);
        for (int v = 0; v < lanes; v += W) {
            const Vec before = load(top + v);
            const Vec best = score(weights.data() + v, size, start, from + v, to + v, how, before);
            const Vec base = select(best == splat(-INFINITY), Vec{}, best);
            const Vec kept = exp2v(before - base);
            Vec mass = load(total + v) * kept;
            for (int k = 0; k < size; ++k) {
                const Vec w = exp2v(load(weights.data() + k * COLUMNS + v) - base);
                store(weights.data() + k * COLUMNS + v, w);
                mass += w;
            }
            store(top + v, best);
            store(total + v, mass);
            for (int m = v; m < v + W && m < count; ++m)
                for (int d = 0; kept[m - v] != 1 && d < value_pad; d += W) {
                    float* at = found.data() + m * value_pad + d;
                    store(at, load(at) * splat(kept[m - v]));
                }
        }
        const E* right = as_panel(values, value_step, size, value_width, value_pad, panel.data());
        const E* left = as_factors(weights.data(), size, lanes, factors.data());
        product(count, value_pad, (size + per - 1) / per, left, 1, COLUMNS, right, value_pad, found.data(), value_pad,
                true);
    }

    // The result of column m, [value_pad].
    float* result(int m) {
        float* mine = found.data() + m * value_pad;
        for (int d = 0; d < value_pad; d += W) store(mine + d, load(mine + d) * splat(share(m)));
        return mine;
    }
    // The factor of its weights 2^(score - top).
    float share(int m) const { return total[m] > 0 ? 1 / total[m] : 0; }
};

}  // namespace gspo
