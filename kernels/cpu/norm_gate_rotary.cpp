// RMSNorm, gated activation and rotary positions, forward and backward. kernels/norm_gate_rotary_cpu.py says what is computed.
// Arithmetic is float32; inputs and outputs are float32 or bfloat16.
#include <vector>

#include "vectors.h"

namespace gspo {

constexpr int SMALL = 32768;  // numbers below which a second thread costs more than it saves

inline int threads_for(long numbers, int threads) { return numbers < SMALL ? 1 : threads; }

template <typename X, typename P, typename Y>
void norm(const X* x, const P* weight, float offset, float eps, Y* y, float* scale, long rows, int width, int threads) {
#pragma omp parallel for num_threads(threads_for(rows* width, threads)) schedule(static)
    for (long r = 0; r < rows; ++r) {
        const X* from = x + r * width;
        Vec squares = {};
        float rest = 0;
        int d = 0;
        for (; d + W <= width; d += W) {
            const Vec v = load(from + d);
            squares += v * v;
        }
        for (; d < width; ++d) rest += load1(from + d) * load1(from + d);
        const float s = 1 / std::sqrt((sum(squares) + rest) / width + eps);
        scale[r] = s;
        for (d = 0; d + W <= width; d += W)
            store(y + r * width + d, load(from + d) * splat(s) * (load(weight + d) + splat(offset)));
        for (; d < width; ++d) store1(y + r * width + d, load1(from + d) * s * (load1(weight + d) + offset));
    }
}

// dweight [threads, width] gets each thread's sum; the caller adds them up.
template <typename X, typename P, typename Y>
void norm_back(const Y* dy, const X* x, const P* weight, float offset, const float* scale, X* dx, float* dweight,
               long rows, int width, int threads) {
    const int pad = padded(width), used = threads_for(rows * width, threads);
#pragma omp parallel num_threads(used)
    {
        int me = 0;
#ifdef _OPENMP
        me = omp_get_thread_num();
#endif
        std::vector<float> memory(4 * pad, 0.0f);
        float *w = memory.data(), *v = w + pad, *g = v + pad, *dw = g + pad;
        widen(weight, width, w, pad);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; ++r) {
            widen(x + r * width, width, v, pad);
            widen(dy + r * width, width, g, pad);
            const float s = scale[r];
            Vec dot = {};
            for (int d = 0; d < pad; d += W) {
                const Vec mine = load(g + d), xs = load(v + d) * splat(s);
                store(dw + d, load(dw + d) + mine * xs);
                const Vec weighted = mine * (load(w + d) + splat(offset));
                store(g + d, weighted);
                dot += weighted * xs;
            }
            const float mean = sum(dot) / width;
            for (int d = 0; d < pad; d += W)
                store(v + d, (load(g + d) - load(v + d) * splat(s * mean)) * splat(s));
            narrow(v, width, dx + r * width);
        }
        std::memcpy(dweight + (long)me * width, dw, sizeof(float) * width);
    }
}

template <typename T>
void silu(const T* gate, const T* up, T* out, long n, int threads) {
    const long blocks = n / W;
#pragma omp parallel for num_threads(threads_for(n, threads)) schedule(static)
    for (long b = 0; b < blocks; ++b) {
        const Vec g = load(gate + b * W);
        store(out + b * W, g * sigmoid(g) * load(up + b * W));
    }
    for (long i = blocks * W; i < n; ++i) {
        const float g = load1(gate + i);
        store1(out + i, g / (1 + std::exp(-g)) * load1(up + i));
    }
}

template <typename T>
void silu_back(const T* dout, const T* gate, const T* up, T* dgate, T* dup, long n, int threads) {
    const long blocks = n / W;
#pragma omp parallel for num_threads(threads_for(n, threads)) schedule(static)
    for (long b = 0; b < blocks; ++b) {
        const Vec g = load(gate + b * W), d = load(dout + b * W), s = sigmoid(g);
        store(dgate + b * W, d * load(up + b * W) * s * (splat(1.0f) + g * (splat(1.0f) - s)));
        store(dup + b * W, d * g * s);
    }
    for (long i = blocks * W; i < n; ++i) {
        const float g = load1(gate + i), d = load1(dout + i), s = 1 / (1 + std::exp(-g));
        store1(dgate + i, d * load1(up + i) * s * (1 + g * (1 - s)));
        store1(dup + i, d * g * s);
    }
}

// Rotate x [B, H, T, D], given by strides, with cos and sin [B or 1, T, D] -> y [B, T, H, D]; `back`: the transposed map.
template <typename X, typename C, typename Y>
void rotate(const X* x, const int64_t* stride, const C* cos, const C* sin, long per_batch, Y* y, int batch, int heads,
            long tokens, int width, bool back, int threads) {
    const int half = width / 2, pad = padded(half);
    const long rows = batch * tokens;
#pragma omp parallel num_threads(threads_for(rows* heads* width, threads))
    {
        std::vector<float> memory(6 * pad, 0.0f);
        float *c = memory.data(), *s = c + 2 * pad, *v = s + 2 * pad;
#pragma omp for schedule(static)
        for (long row = 0; row < rows; ++row) {
            const long b = row / tokens, t = row % tokens, at = b * per_batch + t * width;
            widen(cos + at, half, c, pad);
            widen(cos + at + half, half, c + pad, pad);
            widen(sin + at, half, s, pad);
            widen(sin + at + half, half, s + pad, pad);
            for (int h = 0; h < heads; ++h) {
                const X* from = x + b * stride[0] + h * stride[1] + t * stride[2];
                Y* to = y + (row * heads + h) * width;
                widen(from, half, v, pad);
                widen(from + half, half, v + pad, pad);
                for (int d = 0; d < pad; d += W) {
                    const Vec low = load(v + d), high = load(v + pad + d);
                    if (back) {
                        store(v + d, low * load(c + d) + high * load(s + pad + d));
                        store(v + pad + d, high * load(c + pad + d) - low * load(s + d));
                    } else {
                        store(v + d, low * load(c + d) - high * load(s + d));
                        store(v + pad + d, high * load(c + pad + d) + low * load(s + pad + d));
                    }
                }
                narrow(v, half, to);
                narrow(v + pad, half, to + half);
            }
        }
    }
}

}  // namespace gspo

using gspo::BF16;

#define BY_TYPE(bf16, T, call) \
    if (bf16) {                \
        using T = BF16;        \
        call;                  \
    } else {                   \
        using T = float;       \
        call;                  \
    }

extern "C" {

void gspo_norm(int x_bf16, int w_bf16, int y_bf16, const void* x, const void* weight, float offset, float eps, void* y,
               float* scale, int64_t rows, int64_t width, int threads) {
    BY_TYPE(x_bf16, X, BY_TYPE(w_bf16, P, BY_TYPE(y_bf16, Y, gspo::norm((const X*)x, (const P*)weight, offset, eps,
                                                                       (Y*)y, scale, rows, (int)width, threads))))
}

void gspo_norm_back(int x_bf16, int w_bf16, int y_bf16, const void* dy, const void* x, const void* weight, float offset,
                   const float* scale, void* dx, float* dweight, int64_t rows, int64_t width, int threads) {
    BY_TYPE(x_bf16, X, BY_TYPE(w_bf16, P, BY_TYPE(y_bf16, Y, gspo::norm_back((const Y*)dy, (const X*)x, (const P*)weight,
                                                                            offset, scale, (X*)dx, dweight, rows,
                                                                            (int)width, threads))))
}

void gspo_silu(int bf16, const void* gate, const void* up, void* out, int64_t n, int threads) {
    BY_TYPE(bf16, T, gspo::silu((const T*)gate, (const T*)up, (T*)out, n, threads))
}

void gspo_silu_back(int bf16, const void* dout, const void* gate, const void* up, void* dgate, void* dup, int64_t n,
                    int threads) {
    BY_TYPE(bf16, T, gspo::silu_back((const T*)dout, (const T*)gate, (const T*)up, (T*)dgate, (T*)dup, n, threads))
}

void gspo_rotate(int x_bf16, int c_bf16, int y_bf16, const void* x, const int64_t* stride, const void* cos,
                 const void* sin, int64_t per_batch, void* y, int64_t batch, int64_t heads, int64_t tokens,
                 int64_t width, int back, int threads) {
    BY_TYPE(x_bf16, X, BY_TYPE(c_bf16, C, BY_TYPE(y_bf16, Y, gspo::rotate((const X*)x, stride, (const C*)cos,
                                                                         (const C*)sin, per_batch, (Y*)y, (int)batch,
                                                                         (int)heads, tokens, (int)width, back, threads))))
}
}
