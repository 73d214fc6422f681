// Call kernels for tests/helpers/emulated_kernels.py: read calls from the standard input, write what became of their memory.
//
// A call: the kernel's number; the count of buffers, of each its size and bytes; the count of addresses, of each four numbers:
// the buffer in which it stands, where, the buffer that it means, and where in that. The first buffer has the arguments, eight
// bytes each. All numbers are int64. The answer has all buffers' bytes. Whoever writes beside a buffer is told of.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

union Slot {
    int64_t whole;
    float number;
    void* address;
};

#include "kernel_table.h"  // run(kernel, slots), made of kernels/native_signatures.py

namespace {

constexpr int64_t GUARD = 64;
constexpr unsigned char MARK = 0xa5;

void read(void* to, int64_t size) {
    if (size && std::fread(to, size, 1, stdin) != 1) std::exit(std::feof(stdin) ? 0 : 2);
}
int64_t number() {
    int64_t x = 0;
    read(&x, sizeof x);
    return x;
}

struct Buffer {
    int64_t size;
    std::vector<unsigned char> memory;
    unsigned char* begin;

    explicit Buffer(int64_t size) : size(size), memory(size + 3 * GUARD, MARK) {
        const uintptr_t at = (uintptr_t)memory.data() + GUARD;
        begin = memory.data() + GUARD + (GUARD - at % GUARD) % GUARD;
    }
    bool whole() const {
        for (const unsigned char* p = memory.data(); p != memory.data() + memory.size(); ++p)
            if ((p < begin || p >= begin + size) && *p != MARK) return false;
        return true;
    }
};

}  // namespace

int main() {
    for (;;) {
        const int64_t kernel = number();
        std::vector<Buffer> buffers;
        buffers.reserve(1 << 16);
        for (int64_t count = number(); count; --count) {
            buffers.emplace_back(number());
            read(buffers.back().begin, buffers.back().size);
        }
        for (int64_t count = number(); count; --count) {
            const int64_t in = number(), at = number(), target = number(), offset = number();
            void* address = buffers[target].begin + offset;
            std::memcpy(buffers[in].begin + at, &address, sizeof address);
        }
        run(kernel, (const Slot*)buffers[0].begin);
        for (const Buffer& b : buffers) {
            if (!b.whole()) {
                std::fprintf(stderr, "kernel %d wrote beside a buffer of %lld bytes\n", (int)kernel, (long long)b.size);
                return 3;
            }
            std::fwrite(b.begin, 1, b.size, stdout);
        }
        std::fflush(stdout);
    }
}
