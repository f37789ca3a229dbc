#include "order.h"

#include <algorithm>

namespace issp::emulator {

SharedClock join(const SharedClock& a, const SharedClock& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto joined = std::make_shared<Clock>(*a);
  for (const auto& [block, theirs] : *b) {
    Known& ours = (*joined)[block];
    if (theirs.era > ours.era) {
      ours = theirs;
    } else if (theirs.era == ours.era) {
      for (const auto& [thread, releases] : theirs.releases) {
        ours.releases[thread] = std::max(ours.releases[thread], releases);
      }
    }
  }
  return joined;
}

bool GlobalOrder::before(const Event& event, const Witness& who) {
  if (event.block == ~0u) return true;
  if (event.block == who.block) return event.thread == who.thread || event.era < who.era;
  if (!who.knows) return false;
  const auto found = who.knows->find(event.block);
  if (found == who.knows->end()) return false;
  const Known& known = found->second;
  if (event.era != known.era) return event.era < known.era;
  const auto releases = known.releases.find(event.thread);
  return releases != known.releases.end() && event.releases < releases->second;
}

SharedClock GlobalOrder::published(Witness& who) {
  ++who.releases;
  auto own = std::make_shared<Clock>();
  (*own)[who.block] = {who.era, {{who.thread, who.releases}}};
  return join(who.knows, own);
}

std::string GlobalOrder::read(Witness& who, uintptr_t address, bool strong) {
  Place& place = places_[address];
  if (!before(place.writer, who) && !(strong && place.writer.strong)) {
    return "reads what block " + std::to_string(place.writer.block) + ", thread " +
           std::to_string(place.writer.thread) + " writes";
  }
  Event* same_block[2] = {};
  for (Event& reader : place.readers) {
    if (reader.block == who.block) same_block[same_block[0] ? 1 : 0] = &reader;
  }
  const Event now = event(who, strong);
  if (!same_block[0]) {
    place.readers.push_back(now);
  } else if (same_block[0]->era != who.era || same_block[0]->thread == who.thread) {
    *same_block[0] = now;
  } else if (same_block[1]) {
    *same_block[1] = now;
  } else {
    place.readers.push_back(now);
  }
  return "";
}

std::string GlobalOrder::write(Witness& who, uintptr_t address, bool strong) {
  Place& place = places_[address];
  if (!before(place.writer, who) && !(strong && place.writer.strong)) {
    return "writes what block " + std::to_string(place.writer.block) + ", thread " +
           std::to_string(place.writer.thread) + " writes";
  }
  for (const Event& reader : place.readers) {
    if (!before(reader, who) && !(strong && reader.strong)) {
      return "writes what block " + std::to_string(reader.block) + ", thread " +
             std::to_string(reader.thread) + " reads";
    }
  }
  place.readers.clear();
  place.writer = event(who, strong);
  return "";
}

void GlobalOrder::fence(Witness& who) const {
  who.knows = join(who.knows, who.pending);
  who.pending = nullptr;
  who.fenced = published(who);
}

void GlobalOrder::acquire(Witness& who, uintptr_t address) {
  who.knows = join(who.knows, places_[address].released);
}

void GlobalOrder::release(Witness& who, uintptr_t address) {
  places_[address].released = published(who);
}

void GlobalOrder::atomic(Witness& who, uintptr_t address) {
  Place& place = places_[address];
  who.pending = join(who.pending, place.released);
  place.released = join(place.released, who.fenced);
}

}  // namespace issp::emulator
