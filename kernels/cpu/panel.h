// Multiply few rows by a weight [N, K] that was laid out once in panels. A panel has 48 outputs; its weights
// are stored input by input, in bfloat16 by pairs of inputs: [N / 48, K, 48] or [N / 48, K / 2, 48, 2]. A few rows at a time
// are multiplied by a panel, which stays in the L2 cache for the next ones. Sums are float32.
#pragma once
#include <vector>

#include "online.h"

namespace gspo {

constexpr int PANEL = 48;  // three vectors of AVX-512; kernels/panel_linear_cpu.py has the same

// Multiply x [m, k] by panel p -> sums [m, PANEL].
template <typename T>
inline void through(const T* x, const void* laid_out, long p, long m, long k, float* sums) {
    typedef typename Element<T>::Type E;
    const long inner = k / Element<T>::per;
    product((int)m, PANEL, (int)inner, (const E*)x, inner, 1, (const E*)laid_out + p * inner * PANEL, PANEL, sums, PANEL, false);
}

}  // namespace gspo
