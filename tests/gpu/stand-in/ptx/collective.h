// Instructions that a warp does together. Each lane has come to it; registers of all lanes are read before any is written.

#pragma once

#include "machine.h"

namespace ptx {
inline f32 widen_bf16(u16 bits) {
    const u32 word = (u32)bits << 16;
    f32 value;
    memcpy(&value, &word, sizeof value);
    return value;
}

inline f32 widen_f16(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return (f32)half;
}

// shfl.sync.bfly.b32 d|p, a, b, c, mask: a of the lane whose number differs from this one's by the bits of b.
inline void shuffle_butterfly(Thread &any, const Instruction &i) {
    u32 got[WARP];
    bool inside[WARP];
    for (u32 lane = 0; lane < WARP; lane++) {
        Thread &own = any.block->lane(any, lane);
        const u32 c = own.get<u32>(i, 4), segment = c >> 8 & 31, clamp = c & 31;
        if (own.get<u32>(i, 5) != 0xFFFFFFFFu) {
            throw Refusal("a shuffle of a part of a warp");
        }
        const u32 last = (lane & segment) | (clamp & ~segment), from = lane ^ (own.get<u32>(i, 3) & 31);
        inside[lane] = from <= last;
        got[lane] = any.block->lane(any, inside[lane] ? from : lane).get<u32>(i, 2);
    }
    for (u32 lane = 0; lane < WARP; lane++) {
        any.block->lane(any, lane).set<u32>(i, 0, got[lane]);
        any.block->lane(any, lane).set<u64>(i, 1, inside[lane]);
    }
}

inline void nothing_else(Thread &, const Instruction &) {}

// ldmatrix .m8n8.x4 .b16: lanes 8i to 8i + 7 give the addresses of the rows of matrix i; each lane receives of each matrix two
// neighbours of a row, of a column where `transposed`.
template <bool transposed> void load_matrices(Thread &any, const Instruction &i) {
    u16 matrix[4][8][8];
    for (u32 lane = 0; lane < WARP; lane++) {
        Thread &own = any.block->lane(any, lane);
        memcpy(matrix[lane / 8][lane % 8], own.shared(own.address(i, 0), 16), 16);
    }
    for (u32 lane = 0; lane < WARP; lane++) {
        for (u32 m = 0; m < 4; m++) {
            u16 pair[2];
            for (u32 j = 0; j < 2; j++) {
                const u32 fixed = lane / 4, moving = lane % 4 * 2 + j;
                pair[j] = transposed ? matrix[m][moving][fixed] : matrix[m][fixed][moving];
            }
            any.block->lane(any, lane).set<u32>(i, m, pair[0] | (u32)pair[1] << 16);
        }
    }
}

// mma .m16n8k16 .row.col with f32 sums: d = a b + c. Element e of a lane's fragment, by the tables of "Matrix Fragments for
// mma.m16n8k16 with floating point type".
template <f32 (*widen)(u16)> void multiply(Thread &any, const Instruction &i) {
    f32 a[16][16], b[16][8], c[16][8];
    for (u32 lane = 0; lane < WARP; lane++) {
        Thread &own = any.block->lane(any, lane);
        const u32 group = lane >> 2, within = lane % 4;
        const auto half = [&](u32 first, u32 e) { return widen((u16)(own.get<u32>(i, first + e / 2) >> e % 2 * 16)); };
        for (u32 e = 0; e < 8; e++) {
            const bool upper = e < 2 || (e >= 4 && e < 6);
            a[upper ? group : group + 8][within * 2 + (e & 1) + (e < 4 ? 0 : 8)] = half(4, e);
        }
        for (u32 e = 0; e < 4; e++) {
            b[within * 2 + (e & 1) + (e < 2 ? 0 : 8)][group] = half(8, e);
            c[e < 2 ? group : group + 8][within * 2 + (e & 1)] = own.get<f32>(i, 10 + e);
        }
    }
    for (u32 lane = 0; lane < WARP; lane++) {
        const u32 group = lane >> 2, within = lane % 4;
        for (u32 e = 0; e < 4; e++) {
            const u32 row = e < 2 ? group : group + 8, column = within * 2 + (e & 1);
            // The order of the sum is not specified.
            f64 sum = c[row][column];
            for (u32 k = 0; k < 16; k++) {
                sum += (f64)a[row][k] * b[k][column];
            }
            any.block->lane(any, lane).set<f32>(i, e, (f32)sum);
        }
    }
}
} // namespace ptx
