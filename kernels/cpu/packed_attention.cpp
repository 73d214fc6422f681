// Causal attention of sequences that share tokens, forward and backward (kernels/packed_attention_cpu.py says what is computed).
// A task is a row, a KV head and some columns; keys are read in place, one run of consecutive tokens after another.
#include "online.h"

namespace gspo {

struct Rows {
    int count;
    const int32_t *first_key, *keys;                  // [R + 1], [..]: the tokens of each sequence, by position
    const int32_t *first_query, *queries, *positions; // [R + 1], [..], [..]: the tokens with a query
};

struct Strides {
    long token, head;
};

struct Shape {
    int tokens, heads, kv_heads, width, value_width, window;  // window 0: all
};

struct Task {
    int row, kv_head, at;  // columns from `at` on: query at / group of the row, head at % group of the KV head
};

inline std::vector<Task> tasks_of(const Rows& rows, const Shape& n) {
    std::vector<Task> tasks;
    for (int r = 0; r < rows.count; ++r)
        for (int h = 0; h < n.kv_heads; ++h)
            for (int at = 0; at < (rows.first_query[r + 1] - rows.first_query[r]) * (n.heads / n.kv_heads); at += COLUMNS)
                tasks.push_back({r, h, at});
    return tasks;
}

// Column m of a task: its token and head, and the keys [from, to) that it sees.
struct Column {
    int token, head, from, to;
};
inline int columns_of(const Rows& rows, const Shape& n, const Task& t, Column* columns) {
    const int group = n.heads / n.kv_heads, first = rows.first_query[t.row];
    const int all = (rows.first_query[t.row + 1] - first) * group;
    const int count = all - t.at < COLUMNS ? all - t.at : COLUMNS;
    for (int m = 0; m < count; ++m) {
        const int query = first + (t.at + m) / group, position = rows.positions[query];
        const int from = n.window && position >= n.window ? position - n.window + 1 : 0;
        columns[m] = {rows.queries[query], t.kv_head * group + (t.at + m) % group, from, position + 1};
    }
    return count;
}

// Call `visit(first token, count, position)` for each run of at most TILE consecutive tokens among the keys that columns see.
template <typename F>
inline void runs(const Rows& rows, int row, const Column* columns, int count, F visit) {
    const int32_t* keys = rows.keys + rows.first_key[row];
    int start = columns[0].from, end = 0;
    for (int m = 0; m < count; ++m) {
        if (columns[m].from < start) start = columns[m].from;
        if (columns[m].to > end) end = columns[m].to;
    }
    while (start < end) {
        int size = 1;
        while (size < TILE && start + size < end && keys[start + size] == keys[start] + size) ++size;
        visit(keys[start], size, start);
        start += size;
    }
}

template <typename T>
void forward(const T* q, const T* k, const T* v, Strides qs, Strides ks, Strides vs, const Rows& rows, const Shape& n,
             const Scores& how, T* out, float* top, int threads) {
    const std::vector<Task> tasks = tasks_of(rows, n);
#pragma omp parallel num_threads(threads)
    {
        Online<T> work(n.width, padded(n.value_width));
        Column columns[COLUMNS];
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); ++i) {
            const Task& t = tasks[i];
            work.begin(columns_of(rows, n, t, columns));
            for (int m = 0; m < work.count; ++m) {
                const Column& c = columns[m];
                as_column(q + c.token * qs.token + c.head * qs.head, n.width, work.queries.data() + m);
                work.from[m] = c.from, work.to[m] = c.to;
            }
            runs(rows, t.row, columns, work.count, [&](long token, int size, int start) {
                work.meet(k + token * ks.token + t.kv_head * ks.head, v + token * vs.token + t.kv_head * vs.head, ks.token,
                          vs.token, n.value_width, size, start, how);
            });
            for (int m = 0; m < work.count; ++m) {
                const long where = (long)columns[m].token * n.heads + columns[m].head;
                narrow(work.result(m), n.value_width, out + where * n.value_width);
                top[2 * where] = work.top[m], top[2 * where + 1] = work.share(m);
            }
        }
    }
}

// Return n rows of `width` numbers as the right operand of a product over rows, and the step from row (or pair) to row.
inline std::pair<const float*, long> rows_as_panel(const float* rows, long step, int n, int width, int pad, float* memory) {
    if (width == pad) return {rows, step};
    return {as_panel(rows, step, n, width, pad, memory), pad};
}
inline std::pair<const Pair*, long> rows_as_panel(const BF16* rows, long step, int n, int width, int pad, Pair* memory) {
    return {as_panel(rows, step, n, width, pad, memory), pad};
}

// Return numbers [size, COLUMNS] of keys and columns as the left operand of a product over columns.
inline const float* over_columns(const float* numbers, int, int, float*) { return numbers; }
inline const Pair* over_columns(const float* numbers, int size, int lanes, Pair* memory) {
    for (int k = 0; k < size; ++k) narrow(numbers + k * COLUMNS, lanes, (BF16*)memory + k * COLUMNS);
    return memory;
}

// The memory of a thread in the backward of a task; its sums of dkeys and dvalues are [Hk, T, D].
template <typename T>
struct Back {
    typedef typename Element<T>::Type E;
    static constexpr int per = Element<T>::per;
    const Shape& n;
    const int pad, value_pad;
    std::vector<T> q_rows, d_rows;                            // [COLUMNS, D], [COLUMNS, Dv]
    std::vector<E> q_columns, d_columns;                      // [D, COLUMNS], [Dv, COLUMNS]
    std::vector<E> q_memory, d_memory, factors, keys;         // [COLUMNS, D], [COLUMNS, Dv], [TILE, COLUMNS], [TILE, D]
    std::pair<const E*, long> q_panel, d_panel;               // the rows as right sides
    std::vector<float> weights, slopes, dq;                   // [TILE, COLUMNS] twice, [COLUMNS, D]
    float top[COLUMNS], share[COLUMNS], delta[COLUMNS];
    int32_t from[COLUMNS], to[COLUMNS];
    int count = 0, lanes = 0;

    explicit Back(const Shape& n)
        : n(n), pad(padded(n.width)), value_pad(padded(n.value_width)), q_rows(n.width * COLUMNS),
          d_rows(n.value_width * COLUMNS), q_columns(n.width * COLUMNS), d_columns(n.value_width * COLUMNS),
          q_memory(pad * COLUMNS), d_memory(value_pad * COLUMNS), factors(TILE * COLUMNS), keys(TILE * pad),
          weights(TILE * COLUMNS), slopes(TILE * COLUMNS), dq(pad * COLUMNS) {}

    void column(int m, const T* q, const T* d, const T* out, const float* scored, const Column& c) {
        as_column(q, n.width, q_columns.data() + m);
        as_column(d, n.value_width, d_columns.data() + m);
        std::memcpy(q_rows.data() + m * n.width, q, sizeof(T) * n.width);
        std::memcpy(d_rows.data() + m * n.value_width, d, sizeof(T) * n.value_width);
        double dot = 0;
        for (int i = 0; i < n.value_width; ++i) dot += (double)load1(d + i) * load1(out + i);
        delta[m] = dot, top[m] = scored[0], share[m] = scored[1], from[m] = c.from, to[m] = c.to;
    }

    // Prepare the products, once all columns have been set.
    void begin() {
        for (int m = count; m < lanes; ++m) from[m] = to[m] = 0, top[m] = share[m] = delta[m] = 0;
        q_panel = rows_as_panel(q_rows.data(), n.width, count, n.width, pad, q_memory.data());
        d_panel = rows_as_panel(d_rows.data(), n.value_width, count, n.value_width, value_pad, d_memory.data());
        std::memset(dq.data(), 0, sizeof(float) * pad * count);
    }

    // Overwrite both products [size, COLUMNS]: with the attention weights, and with the gradient of q k^T.
    void slope(int size, int start, const Scores& how, float scale) {
        for (int v = 0; v < lanes; v += W) {
            const IVec first = *(const IVecAt*)(from + v) - start, last = *(const IVecAt*)(to + v) - start;
            const Vec base = load(top + v), part = load(share + v), mean = load(delta + v);
            for (int k = 0; k < size; ++k) {
                float *w = weights.data() + k * COLUMNS + v, *s = slopes.data() + k * COLUMNS + v;
                Vec x = load(w) * splat(how.scale), bend = splat(scale);
                if (how.softcap != 0) {
                    const Vec t = tanhv(x);
                    x = t * splat(how.softcap);
                    bend = (splat(1.0f) - t * t) * splat(scale);
                }
                const IVec here = k - IVec{};
                x = select((first <= here) & (here < last), exp2v(x - base) * part, Vec{});
                store(w, x);
                store(s, x * (load(s) - mean) * bend);
            }
        }
    }

    void meet(const T* k, const T* v, long key_step, long value_step, int size, int start, const Scores& how, float scale,
              float* dk, float* dv) {
        product(size, lanes, n.width / per, (const E*)k, key_step / per, 1, q_columns.data(), COLUMNS, weights.data(), COLUMNS,
                false);
        product(size, lanes, n.value_width / per, (const E*)v, value_step / per, 1, d_columns.data(), COLUMNS, slopes.data(),
                COLUMNS, false);
        slope(size, start, how, scale);
        const int pairs = (count + per - 1) / per;
        const E* left = over_columns(weights.data(), size, lanes, factors.data());
        product(size, value_pad, pairs, left, COLUMNS / per, 1, d_panel.first, d_panel.second, dv, value_pad, true);
        left = over_columns(slopes.data(), size, lanes, factors.data());
        product(size, pad, pairs, left, COLUMNS / per, 1, q_panel.first, q_panel.second, dk, pad, true);
        const auto panel = rows_as_panel(k, key_step, size, n.width, pad, keys.data());
        left = as_factors(slopes.data(), size, lanes, factors.data());
        product(count, pad, (size + per - 1) / per, left, 1, COLUMNS, panel.first, panel.second, dq.data(), pad, true);
    }
};

template <typename T>
void backward(const T* dout, const T* q, const T* k, const T* v, const T* out, const float* top, Strides qs, Strides ks,
              Strides vs, const Rows& rows, const Shape& n, const Scores& how, float scale, T* dq, T* dk, T* dv, float* sums,
              int threads) {
    const std::vector<Task> tasks = tasks_of(rows, n);
    const int pad = padded(n.width), value_pad = padded(n.value_width);
    const long per_head = (long)n.tokens * (pad + value_pad), each = per_head * n.kv_heads;
#pragma omp parallel num_threads(threads)
    {
        int me = 0, all = 1;
#ifdef _OPENMP
        me = omp_get_thread_num(), all = omp_get_num_threads();
#endif
        Back<T> work(n);
        Column columns[COLUMNS];
        float* mine = sums + me * each;
        std::memset(mine, 0, sizeof(float) * each);
        for (size_t i = me; i < tasks.size(); i += all) {  // the same tasks for the same thread: sums in one order
            const Task& t = tasks[i];
            work.count = columns_of(rows, n, t, columns), work.lanes = padded(work.count);
            for (int m = 0; m < work.count; ++m) {
                const Column& c = columns[m];
                const long where = (long)c.token * n.heads + c.head;
                work.column(m, q + c.token * qs.token + c.head * qs.head, dout + where * n.value_width,
                            out + where * n.value_width, top + 2 * where, c);
            }
            work.begin();
            float *dkeys = mine + t.kv_head * per_head, *dvalues = dkeys + (long)n.tokens * pad;
            runs(rows, t.row, columns, work.count, [&](long token, int size, int start) {
                work.meet(k + token * ks.token + t.kv_head * ks.head, v + token * vs.token + t.kv_head * vs.head, ks.token,
                          vs.token, size, start, how, scale, dkeys + token * pad, dvalues + token * value_pad);
            });
            for (int m = 0; m < work.count; ++m)
                narrow(work.dq.data() + m * pad, n.width,
                       dq + ((long)columns[m].token * n.heads + columns[m].head) * n.width);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < (long)n.tokens * n.kv_heads; ++i) {
            const long token = i / n.kv_heads, head = i % n.kv_heads;
            float* to = sums + head * per_head;
            for (int other = 1; other < all; ++other) {
                const float* from = to + other * each;
                for (int d = 0; d < pad; d += W)
                    store(to + token * pad + d, load(to + token * pad + d) + load(from + token * pad + d));
                const long at = (long)n.tokens * pad + token * value_pad;
                for (int d = 0; d < value_pad; d += W) store(to + at + d, load(to + at + d) + load(from + at + d));
            }
            narrow(to + token * pad, n.width, dk + i * n.width);
            narrow(to + (long)n.tokens * pad + token * value_pad, n.value_width, dv + i * n.value_width);
        }
    }
}

}  // namespace gspo

namespace {
struct Given {  // pointers and numbers in the order in which kernels/packed_attention_cpu.py puts them
    gspo::Rows rows;
    gspo::Shape shape;
    gspo::Strides q, k, v;

    Given(void* const* p, const int64_t* n)
        : rows{(int)n[0], (const int32_t*)p[0], (const int32_t*)p[1], (const int32_t*)p[2], (const int32_t*)p[3],
               (const int32_t*)p[4]},
          shape{(int)n[1], (int)n[2], (int)n[3], (int)n[4], (int)n[5], (int)n[6]}, q{n[7], n[8]}, k{n[9], n[10]},
          v{n[11], n[12]} {}
};
}  // namespace

extern "C" {

void gspo_rows(int bf16, void* const* rows, const int64_t* numbers, const void* q, const void* k, const void* v,
               float scale, float softcap, void* out, float* top, int threads) {
    const Given g(rows, numbers);
    const gspo::Scores how = gspo::base2(scale, softcap);
    if (bf16)
        gspo::forward((const gspo::BF16*)q, (const gspo::BF16*)k, (const gspo::BF16*)v, g.q, g.k, g.v, g.rows, g.shape, how,
                      (gspo::BF16*)out, top, threads);
    else
        gspo::forward((const float*)q, (const float*)k, (const float*)v, g.q, g.k, g.v, g.rows, g.shape, how, (float*)out,
                      top, threads);
}

void gspo_rows_back(int bf16, void* const* rows, const int64_t* numbers, const void* dout, const void* q, const void* k,
                    const void* v, const void* out, const float* top, float scale, float softcap, void* dq, void* dk, void* dv,
                    float* sums, int at_most, int threads) {
    const Given g(rows, numbers);
    const gspo::Scores how = gspo::base2(scale, softcap);
    auto back = [&](auto type) {
        typedef decltype(type) T;
        gspo::backward((const T*)dout, (const T*)q, (const T*)k, (const T*)v, (const T*)out, top, g.q, g.k, g.v, g.rows,
                       g.shape, how, scale, (T*)dq, (T*)dk, (T*)dv, sums, threads < at_most ? threads : at_most);
    };
    bf16 ? back(gspo::BF16{}) : back(0.0f);
}
}
