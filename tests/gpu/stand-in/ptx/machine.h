// A machine that runs PTX, the text that NVRTC gives to the driver: its threads, memory and instructions. Semantics are
// those of the PTX ISA, chapter "Instruction Set"; what is not known here is refused by name, never guessed.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {
typedef uint8_t u8;
typedef uint16_t u16;
typedef int16_t s16;
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;
typedef int64_t s64;
typedef float f32;
typedef double f64;

const u32 WARP = 32;
const u32 MOST_THREADS = 1024;
// What a block may have in all on compute capability 8.0.
const u32 MOST_SHARED = 163 * 1024;

struct Refusal : std::runtime_error {
    using runtime_error::runtime_error;
};

// Who must have come to an instruction before it is done.
enum class Meets { Nobody, Warp, Block };

struct Module;
struct Thread;
struct Instruction;
struct Function;
typedef void (*Run)(Thread &, const Instruction &);

// Operands are slots of the thread's registers; constants and addresses of variables have slots, too.
struct Instruction {
    Run run = nullptr;
    Meets meets = Meets::Nobody;
    std::vector<u32> slots;
    // Of operands in brackets: the slot that holds the base, and what is added to it.
    struct Place {
        u32 slot;
        s64 offset;
    };
    std::vector<Place> places;
    // The predicate it depends on, or none.
    s32 guard = -1;
    bool unless = false;
    // Bytes of an element and number of elements of an access; a count of copies.
    u32 size = 0, count = 1;
    u32 target = 0;
    // A call: the function, and where values that it takes and gives are among the caller's parameters, with their bytes.
    const Function *callee = nullptr;
    std::vector<std::pair<u32, u32>> given, returned;
    std::string text;
};

// A piece of the device's memory, and how one is found by an address in it.
struct Piece {
    u64 begin, end;
};
typedef bool (*Find)(u64 address, Piece *found);

struct Variable {
    u64 address;
    u32 bytes;
};

struct Function {
    std::string name;
    const Module *module = nullptr;
    bool entry = false;
    std::vector<Instruction> code;
    // Registers by name, and what they begin as where they hold a constant.
    std::map<std::string, u32> slots;
    std::vector<std::pair<u32, u64>> constants;
    // Parameters and what stands for those of calls, in one piece of memory of the thread; the first ones are a launch's.
    std::map<std::string, Variable> params;
    std::vector<std::string> arguments, results;
    u32 param_bytes = 0, local_bytes = 0, shared_bytes = 0, slot_count = 0;
    u32 most_threads = MOST_THREADS;

    u32 slot(const std::string &name) { return slots.try_emplace(name, slot_count).second ? slot_count++ : slots[name]; }
};

struct Module {
    std::map<std::string, std::unique_ptr<Function>> functions;
    std::map<std::string, std::unique_ptr<std::vector<u8>>> globals;
    Find find = nullptr;
    // Names of shared memory whose size the launch gives.
    std::vector<std::string> dynamic;
};

std::unique_ptr<Module> parse(const std::string &text);
// What an opcode does; fills in what the opcode says of the instruction.
Run decode(const std::string &opcode, bool unpacks, Instruction &instruction);

enum class State { Ready, AtBlock, AtWarp, Done };

struct Frame {
    const Function *function;
    u32 pc;
    std::vector<u64> registers;
    std::vector<u8> params, local;
};

struct Copy {
    u32 to;
    const u8 *from;
    u32 present, group;
};

struct Block;
class Watch;
struct Thread {
    Block *block;
    u32 number;
    State state;
    std::vector<Frame> frames;
    bool carry;
    std::vector<Copy> copies;
    u32 group;
    // What it waits for together with its warp.
    const Instruction *collective;

    Frame &frame() { return frames.back(); }
    u32 lane() const { return number % WARP; }
    u64 &slot(u32 index) { return frames.back().registers[index]; }

    template <class T> T get(const Instruction &i, u32 operand) {
        T value;
        memcpy(&value, &slot(i.slots[operand]), sizeof value);
        return value;
    }
    template <class T> void set(const Instruction &i, u32 operand, T value) {
        u64 bits = 0;
        memcpy(&bits, &value, sizeof value);
        slot(i.slots[operand]) = bits;
    }
    u64 address(const Instruction &i, u32 place) { return slot(i.places[place].slot) + i.places[place].offset; }
    u8 *shared(u64 address, u32 bytes);
    u8 *global(u64 address, u32 bytes);

  private:
    u8 *held(u64 address, u32 bytes);
};

struct Block {
    const Module *module;
    // Pieces of memory that were accessed before.
    std::vector<Piece> pieces;
    std::vector<Thread> threads;
    std::vector<u8> shared;
    // Who looks on, if anybody.
    Watch *watch = nullptr;

    // A thread of the warp of `of`.
    Thread &lane(const Thread &of, u32 lane) { return threads[of.number / WARP * WARP + lane]; }
};
} // namespace ptx
