// How a test steers the emulator and what it asks afterwards: in every library of kernels.
#include <string>

#include "emulator.h"
#include "entries.h"

using namespace issp;

#pragma GCC visibility push(default)
extern "C" {

void emulator_options(uint64_t seed, uint32_t resident, int removed, uint32_t processors,
                      uint32_t shared_bytes, int refused, int debugs) {
  emulator::options() = {seed, resident, removed, processors, shared_bytes, refused, debugs != 0};
}
uint64_t emulator_launches() {
  return emulator::launch_count();
}
int emulator_sites() {
  return emulator::site_count();
}
const char* emulator_site_name(int number) {
  static std::string name;
  name = emulator::site_name(number);
  return name.c_str();
}
uint64_t emulator_switches() {
  return emulator::switch_count();
}

}  // extern "C"
#pragma GCC visibility pop
