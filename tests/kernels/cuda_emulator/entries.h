// What the emulator's C functions share.
#pragma once

#include <string>
#include <vector>

#include "emulator.h"
#include "layout.h"

namespace issp {

template <typename Body>
const char* guarded(const Body& body) {
  static std::string message;
  try {
    body();
    message.clear();
  } catch (const std::exception& error) {
    message = error.what();
  }
  emulator::forget_buffers();
  return message.empty() ? nullptr : message.c_str();
}

inline std::vector<Item> items_of(void** data, const int64_t* numels, int count) {
  std::vector<Item> items;
  for (int i = 0; i < count; ++i) append(items, data[i], numels[i]);
  return items;
}

// Seven numbers per tensor, the fields of Pattern; null: none has one.
inline std::vector<Pattern> patterns_of(const int64_t* numbers, size_t count) {
  std::vector<Pattern> found;
  for (const int64_t* x = numbers; x && found.size() < count; x += 7) {
    found.push_back({x[0], x[1], x[2], x[3], x[4], x[5], x[6]});
  }
  return found;
}

template <typename T>
T* allowed(void* data, uint64_t count) {
  emulator::allow(data, count * sizeof(T));
  return static_cast<T*>(data);
}

}  // namespace issp
