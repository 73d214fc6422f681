// Attention of one new token a slot over keys and values in pages (kernels/decode_attention.py says what is computed).
//
// All slots that read a sequence, and all query heads of its KV head, are columns of the same matrix products.
#pragma once
#include "online.h"

namespace gspo {

// Sequences of keys, each with its pages and the slots that read it.
struct Readers {
    int count;
    const int32_t *first_page, *pages;   // [count + 1], pages of sequence t: first_page[t] .. first_page[t + 1]
    const int32_t* sizes;                // [count], tokens
    const int32_t *first_slot, *slots;   // [count + 1], ...
    const int32_t* hidden;               // [S], how many tokens at its start a slot does not see
};

template <typename T>
struct Pool {
    const T *keys, *values;  // [n, Hk, page, D]
    int page;
    Readers readers;
};

struct Shape {
    int slots, heads, kv_heads, width, value_width;
};

template <typename T>
void attend(const Pool<T>& pool, int sequence, int kv_head, const Shape& n, const T* q, long q_slot, long q_head,
            const Scores& how, Online<T>& work, float* out, float* lse) {
    const Readers& r = pool.readers;
    const int group = n.heads / n.kv_heads, size = r.sizes[sequence];
    const int first = r.first_slot[sequence], members = (r.first_slot[sequence + 1] - first) * group;
    for (int at = 0; at < members; at += COLUMNS) {
        work.begin(members - at < COLUMNS ? members - at : COLUMNS);
        int unseen = size;
        for (int m = 0; m < work.count; ++m) {
            const int slot = r.slots[first + (at + m) / group], head = kv_head * group + (at + m) % group;
            as_column(q + slot * q_slot + head * q_head, n.width, work.queries.data() + m);
            work.from[m] = r.hidden[slot], work.to[m] = size;
            if (work.from[m] < unseen) unseen = work.from[m];
        }
        for (int start = unseen / TILE * TILE; start < size;) {
            const int offset = start % pool.page;
            int some = size - start < TILE ? size - start : TILE;
            if (some > pool.page - offset) some = pool.page - offset;
            const long page = r.pages[r.first_page[sequence] + start / pool.page];
            const long row = (page * n.kv_heads + kv_head) * pool.page + offset;
            work.meet(pool.keys + row * n.width, pool.values + row * n.value_width, n.width, n.value_width, n.value_width,
                      some, start, how);
            start += some;
        }
        for (int m = 0; m < work.count; ++m) {
            const int slot = r.slots[first + (at + m) / group], head = kv_head * group + (at + m) % group;
            const long where = (long)slot * n.heads + head;
            std::memcpy(out + where * work.value_pad, work.result(m), sizeof(float) * work.value_pad);
            lse[where] = work.total[m] > 0 ? work.top[m] + std::log2(work.total[m]) : -INFINITY;
        }
    }
}

// Attend to prompts and answers and merge the two results. All threads of a team call this together; `scratch` has
// 2 * slots * heads * (value_pad + 1) numbers.
template <typename T>
void decode(const Pool<T>* pools, const Shape& n, const T* q, long q_slot, long q_head, const Scores& how,
            Online<T>& work, float* scratch, T* out) {
    const int value_pad = padded(n.value_width);
    const long rows = (long)n.slots * n.heads;
    float* found[2] = {scratch, scratch + rows * value_pad};  // of the prompts, of the answers
    float* lse[2] = {scratch + 2 * rows * value_pad, scratch + 2 * rows * value_pad + rows};
    const int of_prompts = pools[0].readers.count * n.kv_heads;
    const int tasks = of_prompts + pools[1].readers.count * n.kv_heads;
#pragma omp for schedule(dynamic, 4)
    for (int task = 0; task < tasks; ++task) {
        const int part = task >= of_prompts, mine = part ? task - of_prompts : task;
        attend(pools[part], mine / n.kv_heads, mine % n.kv_heads, n, q, q_slot, q_head, how, work, found[part],
               lse[part]);
    }
#pragma omp for schedule(static)
    for (long row = 0; row < rows; ++row) {
        const float a = lse[0][row], b = lse[1][row], most = a > b ? a : b;
        const float x = std::exp2(a - most), y = std::exp2(b - most), share = 1 / (x + y);
        float* mine = found[1] + row * value_pad;
        const float* prompt = found[0] + row * value_pad;
        for (int d = 0; d < value_pad; d += W)
            store(mine + d, load(prompt + d) * splat(x * share) + load(mine + d) * splat(y * share));
        narrow(mine, n.value_width, out + row * n.value_width);
    }
}

// Write each slot's new key (or value) to its place in its page.
template <typename T>
void write_pages(T* pool, const T* rows, long by_slot, long by_head, const int64_t* pages, const int64_t* offsets,
                 int slots, int heads, int page, int width) {
    for (int s = 0; s < slots; ++s)
        for (int h = 0; h < heads; ++h)
            std::memcpy(pool + ((pages[s] * heads + h) * page + offsets[s]) * width,
                        rows + s * by_slot + h * by_head, sizeof(T) * width);
}

}  // namespace gspo
