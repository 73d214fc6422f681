// Multiply few rows by a weight [N, K] that was laid out once in panels. A panel has 48 outputs; its weights
// are stored input by input, in bfloat16 by pairs of inputs: [N / 48, K, 48] or [N / 48, K / 2, 48, 2]. A few rows at a time
// are multiplied by a panel, which stays in the L2 cache for the next ones. Sums are float32.
#pragma once
#include <vector>

#include "online.h"

namespace gspo {

constexpr int PANEL = 48;  // three vectors of AVX-512; kernels/panel_linear_cpu.py has the same

// Multiply x [m, k] by panel p -> sums [m, PANEL]. Meanwhile the next panel is fetched: a panel's row is three cache lines, which
// the first blocks of rows share, so that reading memory and multiplying go on at the same time.
template <typename T>
inline void through(const T* x, const void* laid_out, long p, long m, long k, float* sums) {
    typedef typename Element<T>::Type E;
    const long inner = k / Element<T>::per;
    const E *a = (const E*)x, *b = (const E*)laid_out + p * inner * PANEL, *next = b + inner * PANEL;
    long r = 0;
    if constexpr (PANEL == 3 * W) {
        constexpr int ROWS = rows_at_once<3, E>();
        const long blocks = m / ROWS;
        for (long j = 0; j < blocks; ++j, r += ROWS) {
            const E* mine = a + r * inner;
            float* to = sums + r * PANEL;
            if (blocks == 1)
                block<ROWS, 3, 3>((int)inner, mine, inner, 1, b, PANEL, to, PANEL, false, next);
            else if (blocks == 2 && j == 0)
                block<ROWS, 3, 2>((int)inner, mine, inner, 1, b, PANEL, to, PANEL, false, next);
            else if (j < 3)
                block<ROWS, 3, 1>((int)inner, mine, inner, 1, b, PANEL, to, PANEL, false, next + (blocks == 2 ? 2 : j) * W);
            else
                block<ROWS, 3>((int)inner, mine, inner, 1, b, PANEL, to, PANEL, false);
        }
    }
    product((int)(m - r), PANEL, (int)inner, a + r * inner, inner, 1, b, PANEL, sums + r * PANEL, PANEL, false);
}

}  // namespace gspo
