// Linear layers for few rows, weights laid out once (panel.h).
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

}  // namespace gspo

extern "C" {

#ifdef __AVX512BF16__
int gspo_has_pairs = 1;
#else
int gspo_has_pairs = 0;
#endif

void gspo_linear(int bf16, const void* x, const void* laid_out, const void* bias, void* y, int64_t m, int64_t n,
                 int64_t k, int threads) {
    if (bf16)
        gspo::linear((const gspo::BF16*)x, laid_out, (const gspo::BF16*)bias, (gspo::BF16*)y, m, n, k, threads);
    else
        gspo::linear((const float*)x, laid_out, (const float*)bias, (float*)y, m, n, k, threads);
}
}
