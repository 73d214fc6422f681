// Run one new token a slot through all decoder layers in one call (kernels/decoder_layers_cpu.py says what is computed).
//
// One team of threads runs from the first layer to the last: between two stages threads wait for each other, never for
// Python.
#include "decode.h"
#include "panel.h"

namespace gspo {

struct Layer {  // pointers in the order in which kernels/decoder_layers_cpu.py puts them
    const float* norm;                    // [K]
    const void *q, *k, *v, *o;                            // laid out
    const float *q_bias, *k_bias, *v_bias, *o_bias;       // nullptr: none
    const float *q_norm, *k_norm, *mlp_norm;              // the first two may be nullptr
    const void *gate, *up, *down;
    void *prompt_keys, *prompt_values, *keys, *values;
};

struct Numbers {  // likewise
    int64_t layers, slots, heads, kv_heads, width, value_width, hidden, between, prompt_page, page, prompts, answers;
};

inline void normalize(const float* x, const float* weight, int width, float eps, float* y) {
    Vec squares = {};
    float rest = 0;
    int d = 0;
    for (; d + W <= width; d += W) squares += load(x + d) * load(x + d);
    for (; d < width; ++d) rest += x[d] * x[d];
    const float s = 1 / std::sqrt((sum(squares) + rest) / width + eps);
    for (d = 0; d + W <= width; d += W) store(y + d, load(x + d) * splat(s) * load(weight + d));
    for (; d < width; ++d) y[d] = x[d] * s * weight[d];
}

// Apply rotary positions to one head.
inline void rotate(float* x, const float* cos, const float* sin, int width) {
    const int half = width / 2;
    for (int d = 0; d < half; ++d) {
        const float low = x[d], high = x[half + d];
        x[d] = low * cos[d] - high * sin[d];
        x[half + d] = high * cos[half + d] + low * sin[half + d];
    }
}

// Write every row of x, normalized, as T.
template <typename T>
void norms(const float* x, const float* weight, long rows, int width, float eps, T* y) {
    std::vector<float> line(width);
#pragma omp for schedule(static)
    for (long r = 0; r < rows; ++r) {
        normalize(x + r * width, weight, width, eps, line.data());
        narrow(line.data(), width, y + r * width);
    }
}

struct Weight {
    const void* laid_out;
    const float* bias;  // nullptr: none
    long n;
    long panels() const { return (n + PANEL - 1) / PANEL; }
};

// Multiply x by weights whose outputs are side by side -> y [m, line] float32, written or added to.
template <typename T, int COUNT>
void times_weights(const T* x, const Weight (&weights)[COUNT], long m, long k, float* sums, float* y, long line, bool add) {
    long all = 0;
    for (const Weight& w : weights) all += w.panels();
#pragma omp for schedule(static)
    for (long at = 0; at < all; ++at) {
        const Weight* w = weights;
        long p = at, before = 0;
        for (; p >= w->panels(); ++w) p -= w->panels(), before += w->n;
        const int columns = w->n - p * PANEL < PANEL ? w->n - p * PANEL : PANEL;
        through(x, w->laid_out, p, m, k, sums);
        for (long r = 0; r < m; ++r) {
            float *to = y + r * line + before + p * PANEL, *mine = sums + r * PANEL;
            for (int c = 0; c < columns; ++c)
                to[c] = (add ? to[c] : 0) + mine[c] + (w->bias ? w->bias[p * PANEL + c] : 0);
        }
    }
}

// y = silu(gate(x)) * up(x).
template <typename T>
void gated(const T* x, const Layer& layer, long m, long n, long k, float* sums, float* more, T* y) {
#pragma omp for schedule(static)
    for (long p = 0; p < (n + PANEL - 1) / PANEL; ++p) {
        const int columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
        through(x, layer.gate, p, m, k, sums);
        through(x, layer.up, p, m, k, more);
        for (long r = 0; r < m; ++r) {
            float line[PANEL];
            for (int v = 0; v < PANEL; v += W) {
                const Vec g = load(sums + r * PANEL + v);
                store(line + v, g * sigmoid(g) * load(more + r * PANEL + v));
            }
            narrow(line, columns, y + r * n + p * PANEL);
        }
    }
}

// Normalize and rotate qkv [slots, (H + 2 Hk) D]; write queries to q, keys and values to the answers' pages.
template <typename T>
void write_qkv(float* qkv, const Layer& layer, const Numbers& n, float eps, const float* cos, const float* sin,
               const int64_t* pages, const int64_t* offsets, T* q) {
    const long line = (n.heads + n.kv_heads) * n.width + n.kv_heads * n.value_width;
#pragma omp for schedule(static)
    for (long s = 0; s < n.slots; ++s) {
        float* mine = qkv + s * line;
        for (int h = 0; h < n.heads + n.kv_heads; ++h) {
            float* x = mine + h * n.width;
            const float* norm = h < n.heads ? layer.q_norm : layer.k_norm;
            if (norm) normalize(x, norm, n.width, eps, x);
            rotate(x, cos + s * n.width, sin + s * n.width, n.width);
        }
        narrow(mine, n.heads * n.width, q + s * n.heads * n.width);
        for (int h = 0; h < n.kv_heads; ++h) {
            const long row = (pages[s] * n.kv_heads + h) * n.page + offsets[s];
            narrow(mine + (n.heads + h) * n.width, n.width, (T*)layer.keys + row * n.width);
            narrow(mine + (n.heads + n.kv_heads) * n.width + h * n.value_width, n.value_width,
                   (T*)layer.values + row * n.value_width);
        }
    }
}

template <typename T>
void stack(const Layer* layers, const Numbers& n, const Readers& prompts, const Readers& answers, const int64_t* pages,
           const int64_t* offsets, const float* cos, const float* sin, float* x, float scale, float eps, int threads) {
    const Shape shape = {(int)n.slots, (int)n.heads, (int)n.kv_heads, (int)n.width, (int)n.value_width};
    const long m = n.slots, line = (n.heads + n.kv_heads) * n.width + n.kv_heads * n.value_width;
    const long attended = n.heads * n.value_width, value_pad = padded(n.value_width);
    const Scores how = base2(scale, 0);
    std::vector<T> normal(m * n.hidden), q(m * n.heads * n.width), found(m * attended), between(m * n.between);
    std::vector<float> qkv(m * line), scratch(2 * m * n.heads * (value_pad + 1));
#pragma omp parallel num_threads(threads)
    {
        Online<T> work(n.width, value_pad);
        std::vector<float> sums(m * PANEL), more(m * PANEL);
        for (const Layer* layer = layers; layer != layers + n.layers; ++layer) {
            norms(x, layer->norm, m, n.hidden, eps, normal.data());
            const Weight in[] = {{layer->q, layer->q_bias, n.heads * n.width},
                                 {layer->k, layer->k_bias, n.kv_heads * n.width},
                                 {layer->v, layer->v_bias, n.kv_heads * n.value_width}};
            times_weights(normal.data(), in, m, n.hidden, sums.data(), qkv.data(), line, false);
            write_qkv(qkv.data(), *layer, n, eps, cos, sin, pages, offsets, q.data());
            const Pool<T> pools[2] = {
                {(const T*)layer->prompt_keys, (const T*)layer->prompt_values, (int)n.prompt_page, prompts},
                {(const T*)layer->keys, (const T*)layer->values, (int)n.page, answers},
            };
            decode(pools, shape, q.data(), n.heads * n.width, n.width, how, work, scratch.data(), found.data());
            const Weight out[] = {{layer->o, layer->o_bias, n.hidden}};
            times_weights(found.data(), out, m, attended, sums.data(), x, n.hidden, true);
            norms(x, layer->mlp_norm, m, n.hidden, eps, normal.data());
            gated(normal.data(), *layer, m, n.between, n.hidden, sums.data(), more.data(), between.data());
            const Weight down[] = {{layer->down, nullptr, n.hidden}};
            times_weights(between.data(), down, m, n.between, sums.data(), x, n.hidden, true);
        }
    }
}

}  // namespace gspo

extern "C" void gspo_stack(int bf16, void* const* layers, const int64_t* numbers, void* const* sequences,
                           const int64_t* pages, const int64_t* offsets, const float* cos, const float* sin, float* x,
                           float scale, float eps, int threads) {
    gspo::Numbers n;
    std::memcpy(&n, numbers, sizeof n);
    auto readers = [&](int at, int64_t count) {
        const int32_t* const* p = (const int32_t* const*)sequences + at;
        return gspo::Readers{(int)count, p[0], p[1], p[2], p[3], p[4], p[5]};
    };
    const gspo::Readers prompts = readers(0, n.prompts), answers = readers(6, n.answers);
    const gspo::Layer* all = (const gspo::Layer*)layers;
    if (bf16)
        gspo::stack<gspo::BF16>(all, n, prompts, answers, pages, offsets, cos, sin, x, scale, eps, threads);
    else
        gspo::stack<float>(all, n, prompts, answers, pages, offsets, cos, sin, x, scale, eps, threads);
}
