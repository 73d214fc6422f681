// Linear layers for few rows, by weights that were laid out once (panel.h).
#include "panel.h"

namespace gspo {

template <typename T>
void linear(const T* x, const void* laid_out, const T* bias, T* y, long m, long n, long k, int threads) {
    const long panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums(m * PANEL);
#pragma omp for schedule(static)
        for (long p = 0; p < panels; ++p) {
            const int columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
            through(x, laid_out, p, m, k, sums.data());
            for (long r = 0; r < m; ++r) {
                float* mine = sums.data() + r * PANEL;
                for (int c = 0; bias && c < columns; ++c) mine[c] += load1(bias + p * PANEL + c);
                narrow(mine, columns, y + r * n + p * PANEL);
            }
        }
    }
}

constexpr long LINE = 16;  // inputs in a cache line

// Copy a weight [n, k] to panels. An input is four bytes here: one float32, or a pair of bfloat16.
void lay_out(const uint32_t* weight, uint32_t* to, long n, long k, int threads) {
    const long panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < panels; ++p)
        for (long first = 0; first < k; first += LINE) {  // cache lines stay in the L1 cache until they are complete
            const long last = first + LINE < k ? first + LINE : k;
            for (long c = 0; c < PANEL; ++c) {
                const long row = p * PANEL + c;
                uint32_t* at = to + p * k * PANEL + c;
                for (long i = first; i < last; ++i) at[i * PANEL] = row < n ? weight[row * k + i] : 0;
            }
        }
}

}  // namespace gspo

extern "C" {

void gspo_lay_out(const void* weight, void* to, int64_t n, int64_t k, int threads) {
    gspo::lay_out((const uint32_t*)weight, (uint32_t*)to, n, k, threads);
}

void gspo_linear(int bf16, const void* x, const void* laid_out, const void* bias, void* y, int64_t m, int64_t n,
                 int64_t k, int threads) {
    if (bf16)
        gspo::linear((const gspo::BF16*)x, laid_out, (const gspo::BF16*)bias, (gspo::BF16*)y, m, n, k, threads);
    else
        gspo::linear((const float*)x, laid_out, (const float*)bias, (float*)y, m, n, k, threads);
}
}
