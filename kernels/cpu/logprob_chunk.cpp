// Process a chunk of logits between two matrix products: the two functions of kernels/logprob_chunk.py, each with one read (and
// one write) of the chunk. A thread has whole tokens, and works on a block of entries at a time.
#include "vectors.h"

namespace gspo {

constexpr int BLOCK = 1024;       // entries of a token whose logits fit in the L1 cache, and have a sum of their own
constexpr float LOWEST = -1e30f;  // instead of minus infinity, which times 0 is NaN

struct Shaping {  // outer * tanh(inner * raw) if capped, else inner * raw
    float inner, outer;
    bool capped;
    Vec operator()(Vec raw) const {
        const Vec u = raw * splat(inner);
        return capped ? splat(outer) * tanhv(u) : u;
    }
    // 1 - tanh^2 without cancellation: 4 x / (1 + x)^2 with x = exp(-2 |u|)
    Vec bend(Vec raw) const {
        const Vec u = raw * splat(inner), x = expv(splat(-2.0f) * max(u, -u)), y = splat(1.0f) + x;
        return splat(4.0f) * x / (y * y);
    }
};

struct Numbers {
    long tokens, width, stride, begin;  // of the chunk; begin: its first entry of the vocabulary
};

// Load up to W numbers, padded with `rest`.
template <typename T>
inline Vec load_some(const T* from, int count, float rest) {
    if (count >= W) return load(from);
    float x[W];
    for (int i = 0; i < W; ++i) x[i] = i < count ? load1(from + i) : rest;
    return load(x);
}
template <typename T>
inline void store_some(T* to, int count, Vec x) {
    if (count >= W) return store(to, x);
    for (int i = 0; i < count; ++i) store1(to + i, x[i]);
}

// Add a chunk to stats [3, tokens]: the maximum, the sum of exponentials, the target's logit.
template <typename T>
void statistics(const T* raw, const int64_t* targets, float* stats, const Numbers& n, const Shaping& shaped, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < n.tokens; ++token) {
        const T* row = raw + token * n.stride;
        float *m = stats + token, *s = m + n.tokens, *t = s + n.tokens;
        const long column = targets[token] - n.begin;
        if (column >= 0 && column < n.width) *t = shaped(splat(load1(row + column)))[0];
        for (long first = 0; first < n.width; first += BLOCK) {
            const int count = n.width - first < BLOCK ? n.width - first : BLOCK;
            float z[BLOCK];
            Vec best = splat(*m);
            for (int c = 0; c < count; c += W) {
                Vec x = max(splat(LOWEST), shaped(load_some(row + first + c, count - c, 0)));
                if (count - c < W)
                    for (int i = count - c; i < W; ++i) x[i] = LOWEST;
                store(z + c, x);
                best = max(best, x);
            }
            float top = best[0];
            for (int i = 1; i < W; ++i) top = best[i] > top ? best[i] : top;
            Vec mass = {};
            for (int c = 0; c < count; c += W) mass += expv(load(z + c) - splat(top));
            const float fade = expv(splat(*m - top))[0];
            *s = *s * fade + sum(mass);
            *m = top;
        }
    }
}

// Overwrite a chunk with its gradient; rows [3, tokens] as in kernels/logprob_chunk.py.
template <typename T>
void gradient(T* raw, const int64_t* targets, const float* rows, const Numbers& n, const Shaping& shaped, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < n.tokens; ++token) {
        T* row = raw + token * n.stride;
        const float* numbers = rows + token;
        const Vec m = splat(numbers[0]), log_s = splat(numbers[n.tokens]), slope = splat(numbers[2 * n.tokens]);
        auto of = [&](Vec x, Vec hit) {
            const Vec q = max(splat(LOWEST), shaped(x) - m - log_s);
            const Vec d = hit - expv(q) * slope;
            return shaped.capped ? d * shaped.bend(x) : d;
        };
        const long column = targets[token] - n.begin;
        const bool here = column >= 0 && column < n.width;
        const float chosen = here ? of(splat(load1(row + column)), slope)[0] : 0;
        for (long c = 0; c < n.width; c += W) {
            const int count = n.width - c < W ? n.width - c : W;
            store_some(row + c, count, of(load_some(row + c, count, 0), Vec{}));
        }
        if (here) store1(row + column, chosen);
    }
}

}  // namespace gspo

extern "C" {

void gspo_statistics(int bf16, const void* raw, const int64_t* targets, float* stats, const int64_t* sizes, float inner,
                     float outer, int capped, int threads) {
    const gspo::Numbers n = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const gspo::Shaping shaped = {inner, outer, capped != 0};
    if (bf16)
        gspo::statistics((const gspo::BF16*)raw, targets, stats, n, shaped, threads);
    else
        gspo::statistics((const float*)raw, targets, stats, n, shaped, threads);
}

void gspo_gradient(int bf16, void* raw, const int64_t* targets, const float* rows, const int64_t* sizes, float inner,
                   float outer, int capped, int threads) {
    const gspo::Numbers n = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const gspo::Shaping shaped = {inner, outer, capped != 0};
    if (bf16)
        gspo::gradient((gspo::BF16*)raw, targets, rows, n, shaped, threads);
    else
        gspo::gradient((float*)raw, targets, rows, n, shaped, threads);
}
}
