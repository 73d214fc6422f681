// Multiply few rows by a weight [N, K] that was laid out once in panels. A panel has three vectors of outputs; its weights
// are stored input by input, in bfloat16 by pairs of inputs: [N / 48, K, 48] or [N / 48, K / 2, 48, 2]. Eight rows at a time
// are multiplied by a panel, which stays in the L2 cache for the next eight. Sums are float32.
#pragma once
#include <vector>

#include "online.h"

namespace gspo {

constexpr int PANEL = 3 * W;

// Multiply x [m, k] by panel p -> sums [m, PANEL].
template <typename T>
inline void through(const T* x, const void* laid_out, long p, long m, long k, float* sums) {
    typedef typename Element<T>::Type E;
    const long inner = k / Element<T>::per;
    columns<3>((int)m, (int)inner, (const E*)x, inner, 1, (const E*)laid_out + p * inner * PANEL, PANEL, sums, PANEL, false);
}

}  // namespace gspo
