// Memory as threads reach it: what an address must be, and what it may not be.

#include "traffic.h"

namespace ptx {
u8 *Thread::shared(u64 address, u32 bytes) {
    // Instructions take the low half of what was computed.
    const u32 at = (u32)address;
    if (at % bytes != 0) {
        throw Refusal("an access to shared memory at " + std::to_string(at) + " that is no multiple of its " + std::to_string(bytes) + " bytes");
    }
    if ((u64)at + bytes > block->shared.size()) {
        throw Refusal("an access beyond the block's " + std::to_string(block->shared.size()) + " bytes of shared memory");
    }
    if (block->watch) {
        block->watch->note(true, at, bytes);
    }
    return &block->shared[at];
}

u8 *Thread::global(u64 address, u32 bytes) {
    if (address % bytes != 0) {
        throw Refusal("an access of " + std::to_string(bytes) + " bytes to memory at an address that is no multiple of them");
    }
    if (block->watch) {
        block->watch->note(false, address, bytes);
    }
    return held(address, bytes);
}

u8 *Thread::held(u64 address, u32 bytes) {
    for (const Piece &piece : block->pieces) {
        if (address >= piece.begin && address < piece.end) {
            if (address + bytes > piece.end) {
                throw Refusal("an access of " + std::to_string(bytes) + " bytes that ends beyond its piece of memory of " + std::to_string(piece.end - piece.begin));
            }
            return (u8 *)address;
        }
    }
    Piece found;
    for (const auto &[name, memory] : block->module->globals) {
        found = {(u64)memory->data(), (u64)memory->data() + memory->size()};
        if (address >= found.begin && address < found.end) {
            block->pieces.push_back(found);
            return held(address, bytes);
        }
    }
    if (!block->module->find(address, &found)) {
        throw Refusal("an access to memory that nobody asked for");
    }
    block->pieces.push_back(found);
    return held(address, bytes);
}
} // namespace ptx
