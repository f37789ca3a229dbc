// Which accesses to global memory are ordered, as CUDA's memory model sees it.
//
// A barrier orders the threads of a block. Between blocks only this does: a release store, or an
// atomic after a fence, publishes what its thread knows; an acquire load, or an atomic before a
// fence, that reads it learns it. Two accesses to one address that nothing orders, one of them a
// write, at least one of them neither atomic nor acquire/release, are a race. Kernels of one stream
// are ordered by their launches.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace issp::emulator {

// What is known to be over in another block: all eras before `era`, and of that era what the listed
// threads did before their release number `releases`. An era ends with each barrier of the block.
struct Known {
  uint32_t era = 0;
  std::map<uint32_t, uint32_t> releases;  // thread -> how many
};
using Clock = std::map<uint32_t, Known>;  // by block
using SharedClock = std::shared_ptr<const Clock>;

SharedClock join(const SharedClock& a, const SharedClock& b);

// A thread's part in this; its block's number and era come with every call.
struct Witness {
  uint32_t block = 0, thread = 0, era = 0, releases = 0;
  SharedClock knows;    // may be null
  SharedClock fenced;   // what it published at its last fence
  SharedClock pending;  // read by atomics since, learned at the next fence
};

class GlobalOrder {
 public:
  void clear() { places_.clear(); }
  // Each returns an empty string or the race.
  std::string read(Witness& who, uintptr_t address, bool strong);
  std::string write(Witness& who, uintptr_t address, bool strong);
  void fence(Witness& who) const;
  void acquire(Witness& who, uintptr_t address);
  void release(Witness& who, uintptr_t address);
  void atomic(Witness& who, uintptr_t address);

 private:
  struct Event {
    uint32_t block = ~0u, thread = 0, era = 0, releases = 0;
    bool strong = false;
  };
  struct Place {
    Event writer;
    std::vector<Event> readers;  // per block at most two, of its latest reading era
    SharedClock released;
  };
  static Event event(const Witness& who, bool strong) {
    return {who.block, who.thread, who.era, who.releases, strong};
  }
  static bool before(const Event& event, const Witness& who);
  static SharedClock published(Witness& who);
  std::unordered_map<uintptr_t, Place> places_;
};

}  // namespace issp::emulator
