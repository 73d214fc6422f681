// Draw one token a row of logits by inverse CDF: the draw of gspo/rollout/draw_tokens.py, not truncated. A row is read twice.
#include <vector>

#include "vectors.h"

namespace gspo {

constexpr int BLOCK = 256;  // entries that are summed in float32 before float64 takes over

inline uint32_t mix(uint32_t x) {  // lowbias32
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}
inline uint32_t fold(uint32_t state, int64_t value) { return mix(state * 0x9E3779B1u + mix((uint32_t)value) + 0x85EBCA6Bu); }

inline double uniform(int64_t key, int64_t position) {
    const uint64_t high = fold((uint32_t)key, 2 * position), low = fold((uint32_t)key, 2 * position + 1);
    return ((double)(high << 21 ^ low) + 0.5) / 9007199254740992.0;
}

template <typename T>
struct Row {
    const T* logits;
    long size;
    float inverse, top;  // 1 / temperature; the largest logit

    // (logit - top) / temperature of W entries from `at` on; minus infinity after the last entry.
    Vec below(long at) const {
        if (at + W <= size) return (load(logits + at) - splat(top)) * splat(inverse);
        Vec x;
        for (int i = 0; i < W; ++i) x[i] = at + i < size ? (load1(logits + at + i) - top) * inverse : -INFINITY;
        return x;
    }
    float below1(long at) const { return (load1(logits + at) - top) * inverse; }
};

template <typename T>
inline float largest(const T* logits, long size) {
    Vec best = splat(-INFINITY);
    long c = 0;
    for (; c + W <= size; c += W) best = max(best, load(logits + c));
    float top = -INFINITY;
    for (int i = 0; i < W; ++i) top = best[i] > top ? best[i] : top;
    for (; c < size; ++c) top = load1(logits + c) > top ? load1(logits + c) : top;
    return top;
}

// Return the first entry at which the running sum of weights reaches the share u of the total.
template <typename T>
long pick(const Row<T>& row, const std::vector<float>& sums, double total, double u) {
    const double goal = u * total;
    double upto = 0;
    size_t block = 0;
    while (block + 1 < sums.size() && upto + sums[block] < goal) upto += sums[block++];
    while (block > 0 && sums[block] == 0) upto -= sums[--block];  // rounding went past the last block with a weight
    float weights[BLOCK];
    const long first = (long)block * BLOCK;
    double inside = 0;
    for (int c = 0; c < BLOCK; c += W) store(weights + c, expv(row.below(first + c)));
    for (int c = 0; c < BLOCK; ++c) inside += weights[c];
    const double rest = (goal - upto) / sums[block] * inside;  // how far into the block
    double reached = 0;
    long last = first < row.size ? first : row.size - 1;
    for (int c = 0; c < BLOCK && first + c < row.size; ++c) {
        if (weights[c] == 0) continue;
        last = first + c, reached += weights[c];
        if (reached >= rest) break;
    }
    return last;
}

template <typename T>
void draw(const T* logits, const int64_t* sizes, const int64_t* keys, const int64_t* positions, float inverse, bool greedy,
          int64_t* tokens, float* logprobs, float* entropies, int threads) {
    const long rows = sizes[0], size = sizes[1], stride = sizes[2];
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums((size + BLOCK - 1) / BLOCK);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; ++r) {
            const Row<T> row = {logits + r * stride, size, inverse, largest(logits + r * stride, size)};
            double total = 0, bent = 0;
            for (size_t b = 0; b < sums.size(); ++b) {
                Vec mass = {}, bends = {};
                for (int c = 0; c < BLOCK; c += W) {
                    const Vec q = row.below((long)b * BLOCK + c), p = expv(q);
                    mass += p;
                    bends += p * max(splat(-1e30f), q);  // not 0 times minus infinity
                }
                sums[b] = sum(mass);
                total += sums[b], bent += sum(bends);
            }
            long token = 0;
            if (greedy)
                while (token + 1 < size && load1(row.logits + token) != row.top) ++token;
            else
                token = pick(row, sums, total, uniform(keys[r], positions[r]));
            tokens[r] = token;
            logprobs[r] = row.below1(token) - std::log(total);
            entropies[r] = std::log(total) - bent / total;
        }
    }
}

}  // namespace gspo

extern "C" void gspo_draw(int bf16, const void* logits, const int64_t* sizes, const int64_t* keys, const int64_t* positions,
                          float inverse, int greedy, int64_t* tokens, float* logprobs, float* entropies, int threads) {
    if (bf16)
        gspo::draw((const gspo::BF16*)logits, sizes, keys, positions, inverse, greedy, tokens, logprobs, entropies, threads);
    else
        gspo::draw((const float*)logits, sizes, keys, positions, inverse, greedy, tokens, logprobs, entropies, threads);
}
