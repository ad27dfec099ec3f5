// Launches: threads of a block take turns at barriers and at what a warp does together.

#include "traffic.h"

#include <cstdlib>

namespace ptx {
namespace {
// Blocks of a launch whose accesses are counted, at most.
const u64 WATCHED = 4;

// One instruction of a thread, unless it is one that it waits for others with.
void step(Thread &t) {
    Frame &frame = t.frame();
    const Instruction &i = frame.function->code[frame.pc++];
    if (i.guard >= 0 && (frame.registers[i.guard] & 1) == i.unless) {
        return;
    }
    if (i.meets == Meets::Nobody) {
        i.run(t, i);
        return;
    }
    t.state = i.meets == Meets::Warp ? State::AtWarp : State::AtBlock;
    t.collective = &i;
}

// Runs a thread until it waits for others or is done.
void turn(Thread &t) {
    while (t.state == State::Ready) {
        step(t);
    }
}

// Runs the lanes of a warp in step until all wait or are done.
void march(Block &block, u32 warp) {
    const u32 begin = warp * WARP, end = std::min<u32>(begin + WARP, (u32)block.threads.size());
    const auto behind = [&](const Thread &t) { return t.frames.back().pc - ((u64)t.frames.size() << 32); };
    for (;;) {
        u64 last = ~0ull;
        for (u32 n = begin; n < end; n++) {
            last = block.threads[n].state == State::Ready ? std::min(last, behind(block.threads[n])) : last;
        }
        if (last == ~0ull) {
            return;
        }
        for (u32 n = begin; n < end; n++) {
            if (block.threads[n].state == State::Ready && behind(block.threads[n]) == last) {
                step(block.threads[n]);
            }
        }
        block.watch->add_up();
    }
}

// Does what a warp waits for where all of it has come; whether it did.
bool meet(Block &block, u32 warp) {
    const u32 begin = warp * WARP, end = begin + WARP;
    for (u32 n = begin; n < end; n++) {
        if (n >= block.threads.size() || block.threads[n].state != State::AtWarp) {
            return false;
        }
        if (block.threads[n].collective != block.threads[begin].collective) {
            throw Refusal("lanes of a warp wait at `" + block.threads[begin].collective->text + "` and at `" + block.threads[n].collective->text + "`");
        }
    }
    const Instruction &i = *block.threads[begin].collective;
    i.run(block.threads[begin], i);
    if (block.watch) {
        block.watch->add_up();
    }
    for (u32 n = begin; n < end; n++) {
        block.threads[n].state = State::Ready;
    }
    return true;
}

// Lets all threads go on that have come to the block's barrier, when all that are left have; whether it did.
bool open_barrier(Block &block) {
    const Instruction *barrier = nullptr;
    for (const Thread &t : block.threads) {
        if (t.state != State::AtBlock && t.state != State::Done) {
            return false;
        }
        if (t.state == State::AtBlock && barrier && t.collective != barrier) {
            throw Refusal("threads of a block wait at different barriers");
        }
        barrier = t.state == State::AtBlock ? t.collective : barrier;
    }
    for (Thread &t : block.threads) {
        t.state = t.state == State::AtBlock ? State::Ready : t.state;
    }
    return barrier != nullptr;
}

void run(Block &block, bool backwards) {
    const u32 threads = (u32)block.threads.size();
    for (;;) {
        const u32 warps = (threads + WARP - 1) / WARP;
        bool moved = false;
        for (u32 n = 0; n < threads; n++) {
            Thread &t = block.threads[backwards ? threads - 1 - n : n];
            if (t.state == State::Ready) {
                moved = true;
                block.watch ? march(block, t.number / WARP) : turn(t);
            }
        }
        for (u32 n = 0; n < warps; n++) {
            moved |= meet(block, backwards ? warps - 1 - n : n);
        }
        moved |= open_barrier(block);
        if (!moved) {
            break;
        }
    }
    for (const Thread &t : block.threads) {
        if (t.state != State::Done) {
            throw Refusal("threads wait for each other, one at `" + t.collective->text + "`");
        }
        if (!t.copies.empty()) {
            throw Refusal("a thread left before its copies had arrived");
        }
    }
}

// Registers of a thread at its beginning, but for its own number.
std::vector<u64> beginning(const Function &f, const u32 *grid, u32 threads, const u32 (&block)[3]) {
    std::vector<u64> registers(f.slot_count, ~0ull);
    for (const auto &[slot, value] : f.constants) {
        registers[slot] = value;
    }
    const std::pair<const char *, u64> known[] = {
        {"%ctaid.x", block[0]}, {"%ctaid.y", block[1]}, {"%ctaid.z", block[2]}, {"%nctaid.x", grid[0]}, {"%nctaid.y", grid[1]},
        {"%nctaid.z", grid[2]}, {"%ntid.x", threads}, {"%ntid.y", 1}, {"%ntid.z", 1}, {"%tid.y", 0}, {"%tid.z", 0}};
    for (const auto &[name, value] : known) {
        const auto found = f.slots.find(name);
        if (found != f.slots.end()) {
            registers[found->second] = value;
        }
    }
    return registers;
}

void run_blocks(const Function &f, const u32 *grid, u32 threads, u32 shared_bytes, bool backwards, void **arguments) {
    const u64 all = (u64)f.shared_bytes + shared_bytes;
    if (threads > f.most_threads || all > MOST_SHARED) {
        throw Refusal("a block of " + std::to_string(threads) + " threads and " + std::to_string(all) + " bytes of shared memory, compiled for " + std::to_string(f.most_threads) + " threads");
    }
    std::vector<u8> params(f.param_bytes, 0xFF);
    for (size_t n = 0; n < f.arguments.size(); n++) {
        const Variable &to = f.params.at(f.arguments[n]);
        memcpy(&params[to.address], arguments[n], to.bytes);
    }
    const auto own = f.slots.find("%tid.x");
    Block block;
    Watch watch;
    u64 watched = 0;
    const char *report = getenv("MUDIT_STAND_IN_TRAFFIC");
    block.module = f.module;
    block.threads.resize(threads);
    const u64 blocks = (u64)grid[0] * grid[1] * grid[2];
    for (u64 b = 0; b < blocks; b++) {
        const u64 number = backwards ? blocks - 1 - b : b;
        const u32 index[3] = {(u32)(number % grid[0]), (u32)(number / grid[0] % grid[1]), (u32)(number / grid[0] / grid[1])};
        const std::vector<u64> registers = beginning(f, grid, threads, index);
        block.shared.assign(all, 0xFF);
        for (u32 n = 0; n < threads; n++) {
            Thread &t = block.threads[n];
            t.block = &block;
            t.number = n;
            t.state = State::Ready;
            t.group = 0;
            t.frames.resize(1, {});
            Frame &frame = t.frame();
            frame.function = &f;
            frame.pc = 0;
            frame.registers = registers;
            frame.params = params;
            frame.local.assign(f.local_bytes, 0xFF);
            if (own != f.slots.end()) {
                frame.registers[own->second] = n;
            }
        }
        // Blocks are alike: a few tell for all.
        block.watch = report && b % (blocks / WATCHED + 1) == 0 ? &watch : nullptr;
        watched += block.watch != nullptr;
        run(block, backwards);
    }
    if (report) {
        const Traffic &t = watch.traffic;
        FILE *file = fopen(report, "a");
        fprintf(file, "%s", f.name.c_str());
        for (const u64 count : {t.instructions, t.turns, t.least_turns, t.sectors, t.least_sectors}) {
            fprintf(file, " %llu", (unsigned long long)(count * blocks / watched));
        }
        fprintf(file, "\n");
        fclose(file);
    }
}
} // namespace
} // namespace ptx

// What the stand-in driver asks for.
extern "C" {
static thread_local char complaint[512];

static const char *refused(const std::string &where, const std::exception &error) {
    snprintf(complaint, sizeof complaint, "%s: %s", where.c_str(), error.what());
    return complaint;
}

void *ptx_load(const char *text, ptx::Find find) {
    try {
        auto module = ptx::parse(text);
        module->find = find;
        return module.release();
    } catch (const std::exception &error) {
        fprintf(stderr, "%s\n", refused("PTX", error));
        return nullptr;
    }
}

void *ptx_function(void *module, const char *name) {
    const auto &functions = ((ptx::Module *)module)->functions;
    const auto found = functions.find(name);
    return found != functions.end() && found->second->entry ? found->second.get() : nullptr;
}

// Bytes of shared memory of a block, without what the launch adds.
uint32_t ptx_shared_bytes(const void *function) { return ((const ptx::Function *)function)->shared_bytes; }

const char *ptx_launch(const void *function, const uint32_t *grid, uint32_t threads, uint32_t shared_bytes, bool backwards, void **arguments) {
    const ptx::Function &f = *(const ptx::Function *)function;
    try {
        ptx::run_blocks(f, grid, threads, shared_bytes, backwards, arguments);
        return nullptr;
    } catch (const std::exception &error) {
        return refused(f.name, error);
    }
}

// Copies of a launch's arguments, for a launch that comes later or more than once.
void **ptx_keep(const void *function, void **arguments) {
    const ptx::Function &f = *(const ptx::Function *)function;
    void **copies = (void **)malloc((f.arguments.size() + 1) * sizeof(void *));
    for (size_t n = 0; n < f.arguments.size(); n++) {
        const uint32_t bytes = f.params.at(f.arguments[n]).bytes;
        copies[n] = memcpy(malloc(bytes + 1), arguments[n], bytes);
    }
    return copies;
}
}
