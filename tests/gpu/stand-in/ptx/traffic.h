// What a launch asks of shared memory and of the second-level cache, access by access of a warp: figures that need no GPU.
//
// The lanes of a warp go in step here: of those that can go on, the ones that are furthest behind in the text do. Shared memory has 32 banks of 4 bytes:
// lanes that want different words of one bank are served one after the other, 8 lanes at once where each wants 16 bytes.
// The cache gives sectors of 32 bytes.

#pragma once

#include "machine.h"

#include <algorithm>
#include <set>

namespace ptx {
struct Traffic {
    u64 instructions = 0, turns = 0, least_turns = 0, sectors = 0, least_sectors = 0;

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

// The accesses of one instruction of a warp.
class Watch {
  public:
    Traffic traffic;

    void note(bool shared, u64 address, u32 bytes) {
        auto &access = accesses[shared];
        access.first = bytes;
        access.second.push_back(address);
    }
    void add_up() {
        traffic.instructions++;
        if (!accesses[true].second.empty()) {
            traffic.shared(accesses[true].second, accesses[true].first);
        }
        if (!accesses[false].second.empty()) {
            traffic.global(accesses[false].second, accesses[false].first);
        }
        accesses[0].second.clear();
        accesses[1].second.clear();
    }

  private:
    std::pair<u32, std::vector<u64>> accesses[2];
};
} // namespace ptx
