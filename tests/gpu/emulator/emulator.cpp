// Runs the threads of a block as fibers.

#include "device.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace emulator {
alignas(128) unsigned char shared[MOST_SHARED];
uint3 thread_index, block_index, block_size, grid_size;

namespace {
const size_t STACK = 128 * 1024;
const u32 MOST_THREADS = 1024;

enum class State { Ready, AtBlock, AtWarp, Done };

struct Fiber {
    ucontext_t context;
    State state;
    Copies copies;
};

struct Warp {
    const void *offers[WARP];
    u32 waiting, alive;
};

struct Block {
    Fiber fibers[MOST_THREADS];
    Warp warps[MOST_THREADS / WARP];
    u32 threads, current, waiting, alive;
    ucontext_t scheduler;
    void (*body)(void *);
    void *argument;
    const char *kernel;
};

Block *block;
unsigned char *stacks;
// A fiber that is left by an exception of the emulator's must not go on.
bool failed;
char failure[256];

void to_scheduler() { swapcontext(&block->fibers[block->current].context, &block->scheduler); }

void open_block_barrier() {
    if (block->alive > 0 && block->waiting == block->alive) {
        block->waiting = 0;
        for (u32 i = 0; i < block->threads; i++) {
            if (block->fibers[i].state == State::AtBlock) {
                block->fibers[i].state = State::Ready;
            }
        }
    }
}

void open_warp_barrier(u32 number) {
    Warp &warp = block->warps[number];
    if (warp.alive > 0 && warp.waiting == warp.alive) {
        warp.waiting = 0;
        for (u32 i = number * WARP; i < (number + 1) * WARP && i < block->threads; i++) {
            if (block->fibers[i].state == State::AtWarp) {
                block->fibers[i].state = State::Ready;
            }
        }
    }
}

void run_fiber() {
    block->body(block->argument);
    const u32 warp = block->current / WARP;
    block->fibers[block->current].state = State::Done;
    block->alive--;
    block->warps[warp].alive--;
    open_block_barrier();
    open_warp_barrier(warp);
    to_scheduler();
}
} // namespace

void fail(const char *what) {
    if (!failed) {
        failed = true;
        snprintf(failure, sizeof failure, "%s: %s (block %u %u %u, thread %u)", block->kernel, what, block_index.x,
                 block_index.y, block_index.z, thread_index.x);
    }
    to_scheduler();
}

Copies &copies() { return block->fibers[block->current].copies; }

void block_barrier() {
    block->fibers[block->current].state = State::AtBlock;
    block->waiting++;
    open_block_barrier();
    if (block->fibers[block->current].state != State::Ready) {
        to_scheduler();
    }
}

void warp_barrier() {
    const u32 warp = block->current / WARP;
    if (block->warps[warp].alive != WARP) {
        fail("an exchange in a warp that some threads have left");
    }
    block->fibers[block->current].state = State::AtWarp;
    block->warps[warp].waiting++;
    open_warp_barrier(warp);
    if (block->fibers[block->current].state != State::Ready) {
        to_scheduler();
    }
}

const void *const *offer(const void *mine) {
    const void **offers = block->warps[block->current / WARP].offers;
    offers[block->current % WARP] = mine;
    warp_barrier();
    return offers;
}

void release() { warp_barrier(); }

// Runs `body` for every thread of every block; null, or what went wrong.
const char *run(const char *kernel, const u32 *grid, u32 threads, u32 shared_bytes, bool backwards,
                void (*body)(void *), void *argument) {
    if (!block) {
        block = new Block;
        stacks = (unsigned char *)mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    failed = false;
    if (threads > MOST_THREADS || shared_bytes > MOST_SHARED) {
        return "a block larger than the emulator's";
    }
    block->kernel = kernel;
    block->body = body;
    block->argument = argument;
    block->threads = threads;
    block_size = {threads, 1, 1};
    grid_size = {grid[0], grid[1], grid[2]};
    const u64 blocks = (u64)grid[0] * grid[1] * grid[2];
    for (u64 b = 0; b < blocks; b++) {
        const u64 number = backwards ? blocks - 1 - b : b;
        block_index = {(u32)(number % grid[0]), (u32)(number / grid[0] % grid[1]), (u32)(number / grid[0] / grid[1])};
        memset(shared, 0xFF, shared_bytes);
        block->waiting = 0;
        block->alive = threads;
        for (u32 i = 0; i < threads; i++) {
            Fiber &fiber = block->fibers[i];
            fiber.state = State::Ready;
            fiber.copies.count = fiber.copies.group = 0;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks + i * STACK;
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, run_fiber, 0);
        }
        for (u32 w = 0; w * WARP < threads; w++) {
            block->warps[w] = {{}, 0, min(WARP, threads - w * WARP)};
        }
        while (block->alive > 0) {
            bool moved = false;
            for (u32 i = 0; i < threads; i++) {
                const u32 thread = backwards ? threads - 1 - i : i;
                if (block->fibers[thread].state != State::Ready) {
                    continue;
                }
                moved = true;
                block->current = thread;
                thread_index = {thread, 0, 0};
                swapcontext(&block->scheduler, &block->fibers[thread].context);
                if (failed) {
                    return failure;
                }
            }
            if (!moved) {
                return "threads of a block wait for each other at different barriers";
            }
        }
    }
    return nullptr;
}
} // namespace emulator

namespace {
// A kernel with the arguments that a launch gives as an array of addresses.
template <class... A> struct Call {
    void (*kernel)(A...);
    void **arguments;

    template <size_t... I> void with(std::index_sequence<I...>) { kernel(*(A *)arguments[I]...); }
    static void run(void *call) { ((Call *)call)->with(std::index_sequence_for<A...>()); }
};

template <class... A>
const char *launch(const char *name, void (*kernel)(A...), const u32 *grid, u32 threads, u32 shared_bytes,
                   bool backwards, void **arguments) {
    Call<A...> call = {kernel, arguments};
    return emulator::run(name, grid, threads, shared_bytes, backwards, Call<A...>::run, &call);
}
} // namespace
