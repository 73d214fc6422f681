// The attention of a decoding step by itself, for models whose layers are not those of decoder_layers.cpp.
#include "decode.h"

namespace gspo {

struct Sequences {  // the pointers of Readers
    const int32_t *first_page, *pages, *sizes, *first_slot, *slots, *hidden;
    Readers readers(int64_t count) const { return {(int)count, first_page, pages, sizes, first_slot, slots, hidden}; }
};

struct Tensors {  // pointers in the order in which kernels/decode_attention_cpu.py puts them
    void *prompt_keys, *prompt_values, *keys, *values;  // pages
    const void *q, *key, *value;                        // of the new tokens
    Sequences prompts, answers;
    const int64_t *page, *offset;
    void *scratch, *out;
};

struct Numbers {  // likewise
    int64_t slots, heads, kv_heads, width, value_width, prompt_page, page, prompts, answers;
    int64_t q_slot, q_head, key_slot, key_head, value_slot, value_head;  // strides
};

template <typename T>
void step(const Tensors& p, const Numbers& n, const Scores& how, int threads) {
    const Shape shape = {(int)n.slots, (int)n.heads, (int)n.kv_heads, (int)n.width, (int)n.value_width};
    write_pages((T*)p.keys, (const T*)p.key, n.key_slot, n.key_head, p.page, p.offset, shape.slots, shape.kv_heads,
                (int)n.page, shape.width);
    write_pages((T*)p.values, (const T*)p.value, n.value_slot, n.value_head, p.page, p.offset, shape.slots, shape.kv_heads,
                (int)n.page, shape.value_width);
    const Pool<T> pools[2] = {
        {(const T*)p.prompt_keys, (const T*)p.prompt_values, (int)n.prompt_page, p.prompts.readers(n.prompts)},
        {(const T*)p.keys, (const T*)p.values, (int)n.page, p.answers.readers(n.answers)},
    };
#pragma omp parallel num_threads(threads)
    {
        Online<T> work(shape.width, padded(shape.value_width));
        decode(pools, shape, (const T*)p.q, n.q_slot, n.q_head, how, work, (float*)p.scratch, (T*)p.out);
    }
}

}  // namespace gspo

extern "C" void gspo_decode(int bf16, void* const* pointers, const int64_t* numbers, float scale, float softcap,
                            int threads) {
    gspo::Tensors tensors;
    gspo::Numbers sizes;
    std::memcpy(&tensors, pointers, sizeof tensors);
    std::memcpy(&sizes, numbers, sizeof sizes);
    const gspo::Scores how = gspo::base2(scale, softcap);
    if (bf16)
        gspo::step<gspo::BF16>(tensors, sizes, how, threads);
    else
        gspo::step<float>(tensors, sizes, how, threads);
}
