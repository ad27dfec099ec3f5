// What a launch asks of shared memory and of the second-level cache, access by access of a warp: figures that need no GPU.
//
// A warp's access is what its lanes do at the same instruction for the same time. Shared memory has 32 banks of 4 bytes:
// lanes that want different words of one bank are served one after the other, 8 lanes at once where each wants 16 bytes.
// The cache gives sectors of 32 bytes.

#pragma once

#include "machine.h"

#include <algorithm>
#include <set>

namespace ptx {
struct Traffic {
    u64 turns = 0, least_turns = 0, sectors = 0, least_sectors = 0;

    // Bytes that the lanes of a warp want, each from an address, of shared memory.
    void shared(const std::vector<u64> &addresses, u32 bytes) {
        const u32 together = bytes <= 4 ? 32 : 128 / bytes;
        for (size_t begin = 0; begin < addresses.size(); begin += together) {
            std::set<u64> words[32];
            for (size_t n = begin; n < std::min(addresses.size(), begin + together); n++) {
                for (u64 word = addresses[n] / 4; word <= (addresses[n] + bytes - 1) / 4; word++) {
                    words[word % 32].insert(word);
                }
            }
            size_t most = 0;
            for (const auto &bank : words) {
                most = std::max(most, bank.size());
            }
            turns += most;
            least_turns++;
        }
    }

    void global(const std::vector<u64> &addresses, u32 bytes) {
        std::set<u64> touched, all;
        for (const u64 address : addresses) {
            all.insert(address);
            for (u64 sector = address / 32; sector <= (address + bytes - 1) / 32; sector++) {
                touched.insert(sector);
            }
        }
        sectors += touched.size();
        least_sectors += (all.size() * bytes + 31) / 32;
    }
};

// Accesses of a block's threads, to be put together warp by warp when the block is done.
class Watch {
  public:
    void note(u32 thread, const Instruction &i, bool shared, u64 address, u32 bytes) {
        logs[thread].push_back({{&i, shared}, address, bytes});
    }
    void add_to(Traffic &traffic) {
        for (u32 warp = 0; warp < MOST_THREADS / WARP; warp++) {
            // By instruction and by how often the lane has come to it; a copy is at both kinds of memory.
            std::map<Where, std::vector<std::vector<u64>>> accesses;
            std::map<Where, u32> widths;
            for (u32 lane = 0; lane < WARP; lane++) {
                std::map<Where, size_t> times;
                for (const Access &access : logs[warp * WARP + lane]) {
                    auto &all = accesses[access.where];
                    const size_t time = times[access.where]++;
                    all.resize(std::max(all.size(), time + 1));
                    all[time].push_back(access.address);
                    widths[access.where] = access.bytes;
                }
                logs[warp * WARP + lane].clear();
            }
            for (const auto &[where, times] : accesses) {
                for (const std::vector<u64> &addresses : times) {
                    where.second ? traffic.shared(addresses, widths[where]) : traffic.global(addresses, widths[where]);
                }
            }
        }
    }

  private:
    typedef std::pair<const Instruction *, bool> Where;
    struct Access {
        Where where;
        u64 address;
        u32 bytes;
    };
    std::vector<Access> logs[MOST_THREADS];
};
} // namespace ptx
