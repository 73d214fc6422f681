// A step of attention by itself, for models whose layers are not those of stack.cpp.
#include "decode.h"

namespace gspo {

template <typename T>
void step(void* const* p, const int64_t* n, const Scores& how, int threads) {
    auto i32 = [&](int k) { return (const int32_t*)p[k]; };
    const Shape shape = {(int)n[0], (int)n[1], (int)n[2], (int)n[3], (int)n[4]};
    const int prompt_page = n[5], page = n[6];
    const int64_t *fresh = (const int64_t*)p[19], *offsets = (const int64_t*)p[20];
    write((T*)p[2], (const T*)p[5], n[11], n[12], fresh, offsets, shape.slots, shape.kv_heads, page, shape.width);
    write((T*)p[3], (const T*)p[6], n[13], n[14], fresh, offsets, shape.slots, shape.kv_heads, page, shape.value_width);
    const Pool<T> pools[2] = {
        {(const T*)p[0], (const T*)p[1], prompt_page, {(int)n[7], i32(7), i32(8), i32(9), i32(10), i32(11), i32(12)}},
        {(const T*)p[2], (const T*)p[3], page, {(int)n[8], i32(13), i32(14), i32(15), i32(16), i32(17), i32(18)}},
    };
#pragma omp parallel num_threads(threads)
    {
        Online<T> work(shape.width, padded(shape.value_width));
        decode(pools, shape, (const T*)p[4], n[9], n[10], how, work, (float*)p[21], (T*)p[22]);
    }
}

}  // namespace gspo

// Pointers and numbers in the order in which kernels/decode_cpu.py puts them.
extern "C" void gspo_decode(int bf16, void* const* pointers, const int64_t* numbers, float scale, float softcap,
                            int threads) {
    const gspo::Scores how = gspo::base2(scale, softcap);
    if (bf16)
        gspo::step<gspo::BF16>(pointers, numbers, how, threads);
    else
        gspo::step<float>(pointers, numbers, how, threads);
}
