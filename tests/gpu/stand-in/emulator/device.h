// The host's stand-in for device.cuh and for what CUDA C++ adds to C++: the same kernel sources, compiled by an
// ordinary compiler and run block after block. A thread of a block is a fiber; a barrier, and every exchange within a
// warp, is a place where fibers take turns. The order of the turns is the caller's choice: a kernel that reads what
// another thread of the block has yet to write gives other bits in another order.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
// A block runs alone, so what its threads share is static.
#define __shared__ static
#define DEVICE inline
#define SHARED_BYTES(name) unsigned char *const name = emulator::shared

struct uint3 {
    u32 x, y, z;
};
struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T> inline void __stcg(T *to, T value) { *to = value; }

inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u64 min(u64 a, u64 b) { return a < b ? a : b; }

namespace emulator {
const u32 WARP = 32;
const u32 MOST_SHARED = 256 * 1024;
alignas(128) extern unsigned char shared[MOST_SHARED];
extern uint3 thread_index, block_index, block_size, grid_size;

void fail(const char *what);
// Waits for all threads of the block, or of the warp, that have not returned.
void block_barrier();
void warp_barrier();
// Leaves `mine` for the warp and gives what lane `from` left; valid until `release`.
const void *const *offer(const void *mine);
void release();
inline u32 lane() { return thread_index.x % WARP; }

template <class T> T bits(float x) {
    T to;
    memcpy(&to, &x, sizeof to);
    return to;
}
inline float from_bits(u32 bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
} // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::warp_barrier(); }
inline float __uint_as_float(u32 bits) { return emulator::from_bits(bits); }
inline float __int_as_float(u32 bits) { return emulator::from_bits(bits); }

inline float __shfl_xor_sync(u32 mask, float x, u32 across) {
    if (mask != 0xFFFFFFFFu) {
        emulator::fail("a shuffle of a part of a warp");
    }
    const void *const *all = emulator::offer(&x);
    const float got = *(const float *)all[emulator::lane() ^ across];
    emulator::release();
    return got;
}

inline u16 round_bf16(float x) {
    u32 bits = emulator::bits<u32>(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        return 0x7FFF;
    }
    bits += 0x7FFFu + (bits >> 16 & 1);
    return (u16)(bits >> 16);
}

inline u16 round_f16(float x) {
    const _Float16 half = (_Float16)x;
    u16 bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

DEVICE u32 pack_bf16(float low, float high) { return round_bf16(low) | (u32)round_bf16(high) << 16; }
DEVICE u32 pack_f16(float low, float high) { return round_f16(low) | (u32)round_f16(high) << 16; }

DEVICE float wide_f16(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return (float)half;
}

DEVICE float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

DEVICE float divide_fast(float x, float y) { return y > 0x1p126f ? 0.0f : x / y; }

inline u32 shared_address(const void *at) { return (u32)((const unsigned char *)at - emulator::shared); }

inline void load_eight(u32 (&to)[4], u32 at, bool transposed) {
    const void *const row = emulator::shared + at;
    if (at % 16 != 0) {
        emulator::fail("a row of a matrix that does not begin at a multiple of 16 bytes");
    }
    const void *const *rows = emulator::offer(row);
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (u32 i = 0; i < 4; i++) {
        u16 pair[2];
        for (u32 j = 0; j < 2; j++) {
            const u32 r = transposed ? 2 * t + j : g, c = transposed ? g : 2 * t + j;
            pair[j] = ((const u16 *)rows[8 * i + r])[c];
        }
        to[i] = pair[0] | (u32)pair[1] << 16;
    }
    emulator::release();
}

DEVICE void load_matrices(u32 (&to)[4], u32 row) { load_eight(to, row, false); }
DEVICE void load_matrices_transposed(u32 (&to)[4], u32 row) { load_eight(to, row, true); }

inline float widen_bf16(u16 bits) { return emulator::from_bits((u32)bits << 16); }

template <float (*widen)(u16)> inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const void *const *all = emulator::offer(mine);
    const u32 g = emulator::lane() / 4, t = emulator::lane() % 4;
    // Element (row, k) of a and (k, column) of b, each with the lane that holds it.
    const auto left = [&](u32 row, u32 k) {
        const u32 word = ((const u32 *)all[row % 8 * 4 + k % 8 / 2])[row / 8 + k / 8 * 2];
        return widen((u16)(word >> k % 2 * 16));
    };
    const auto right = [&](u32 k, u32 column) {
        const u32 word = ((const u32 *)all[column * 4 + k % 8 / 2])[4 + k / 8];
        return widen((u16)(word >> k % 2 * 16));
    };
    for (u32 i = 0; i < 4; i++) {
        float sum = c[i];
        for (u32 k = 0; k < 16; k++) {
            sum += left(g + i / 2 * 8, k) * right(k, 2 * t + i % 2);
        }
        c[i] = sum;
    }
    emulator::release();
}

DEVICE void multiply_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<widen_bf16>(c, a, b0, b1); }
DEVICE void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<wide_f16>(c, a, b0, b1); }

// Copies arrive as late as they may: when they are waited for. Until then their place holds what it must not be.
namespace emulator {
struct Copies {
    struct One {
        void *to;
        const void *from;
        bool present;
        u32 group;
    };
    One pending[256];
    u32 count = 0, group = 0;
};
Copies &copies();
} // namespace emulator

DEVICE void copy_begin(u32 at, const void *from, bool present) {
    void *const to = emulator::shared + at;
    if (at % 16 != 0 || (uintptr_t)from % 16 != 0) {
        emulator::fail("a copy between addresses that are no multiples of 16 bytes");
    }
    emulator::Copies &copies = emulator::copies();
    if (copies.count == 256) {
        emulator::fail("more copies under way than the emulator holds");
    }
    memset(to, 0xFF, 16);
    copies.pending[copies.count++] = {to, from, present, copies.group};
}

DEVICE void copy_close() { emulator::copies().group++; }

template <int still> DEVICE void copy_wait() {
    emulator::Copies &copies = emulator::copies();
    u32 kept = 0;
    for (u32 i = 0; i < copies.count; i++) {
        const auto &one = copies.pending[i];
        if (one.group + still >= copies.group) {
            copies.pending[kept++] = one;
        } else if (one.present) {
            memcpy(one.to, one.from, 16);
        } else {
            memset(one.to, 0, 16);
        }
    }
    copies.count = kept;
}
