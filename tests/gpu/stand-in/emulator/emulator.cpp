// Runs the threads of a block as fibers. Comes after device.h.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {
alignas(128) unsigned char shared[MOST_SHARED];
uint3 thread_index, block_index, block_size, grid_size;

namespace {
const size_t STACK = 128 * 1024;
const u32 MOST_THREADS = 1024;

enum class State { Ready, AtBlock, AtWarp, Done };

struct Fiber {
    // Where it goes on; before its first turn there is only a stack to begin on.
    jmp_buf turn;
    bool begun;
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
    jmp_buf scheduler;
    void (*body)(void *);
    void *argument;
    const char *kernel;
};

Block *block;
unsigned char *stacks;
// What stopped a launch in the middle of its threads.
bool failed;
char failure[256];

// Turns change by jumps, which, unlike changes of context, ask the system for nothing.
__attribute__((noinline)) void to_scheduler() {
    if (!_setjmp(block->fibers[block->current].turn)) {
        _longjmp(block->scheduler, 1);
    }
}

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

// One thread of block after block.
void run_fiber() {
    for (;;) {
        block->body(block->argument);
        const u32 warp = block->current / WARP;
        block->fibers[block->current].state = State::Done;
        block->alive--;
        block->warps[warp].alive--;
        open_block_barrier();
        open_warp_barrier(warp);
        to_scheduler();
    }
}

__attribute__((noinline)) void to_fiber(u32 thread) {
    Fiber &fiber = block->fibers[thread];
    block->current = thread;
    thread_index = {thread, 0, 0};
    if (_setjmp(block->scheduler)) {
        return;
    }
    if (fiber.begun) {
        _longjmp(fiber.turn, 1);
    }
    fiber.begun = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + thread * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}
} // namespace

namespace {
// Threads that stand in the middle of a kernel begin anew at the next launch.
const char *abandon() {
    for (Fiber &fiber : block->fibers) {
        fiber.begun = false;
    }
    return failure;
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
        block = new Block();
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
                to_fiber(thread);
                if (failed) {
                    return abandon();
                }
            }
            if (!moved) {
                snprintf(failure, sizeof failure, "%s: threads of a block wait at different barriers", kernel);
                return abandon();
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
