#include "kernels/cuda/sim/host_copies.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "kernels/cuda/sim/core.h"

namespace altiplano::sim {

namespace {

// A copy whose end the host does not know of.
struct HostCopy {
  const void* stream;
  uint64_t number;
  char* host;
  size_t bytes;
  std::vector<char> arrives;  // at `host`; empty: the copy is from there
  uint64_t hash;              // of what it took
};

// One from device memory to device memory of which the host does not know the end.
struct DeviceCopy {
  const void* stream;
  uint64_t number;
  const char *to, *from;
  size_t bytes;

  bool Touches(const char* data, size_t n) const {
    return Overlap(to, bytes, data, n) || Overlap(from, bytes, data, n);
  }
  // One of them writes what the other one touches.
  bool Conflicts(const DeviceCopy& other) const { return Touches(other.to, other.bytes) || other.Touches(to, bytes); }
  static bool Overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
  }
};

// Of each stream, up to which of its copies.
using Progress = std::map<const void*, uint64_t>;

std::mutex mutex;
// Guarded by mutex, as all below. Alive for the whole process: streams and buffers may be released late.
std::list<HostCopy>& under_way = *new std::list<HostCopy>();  // in the order in which they were issued
std::list<DeviceCopy>& on_device = *new std::list<DeviceCopy>();
std::map<const void*, Progress>& points = *new std::map<const void*, Progress>();
uint64_t copies = 0;

// FNV-1a by words.
uint64_t Hash(const char* data, size_t bytes) {
  uint64_t hash = 0xCBF29CE484222325;
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    CopyBytes(&word, data + i, std::min<size_t>(8, bytes - i));  // the thread that waits does not read it, for TSan
    hash = (hash ^ word) * 0x100000001B3;
    hash ^= hash >> 29;
  }
  return hash;
}

void Finish(const HostCopy& copy) {
  if (!copy.arrives.empty()) {
    std::memcpy(copy.host, copy.arrives.data(), copy.bytes);
  } else if (Hash(copy.host, copy.bytes) != copy.hash) {
    Stick("pinned memory was written over before the host had waited for a copy of " + std::to_string(copy.bytes) +
          " bytes from it");
  }
}

template <typename Condition>
void FinishIf(const Condition& condition) {
  for (auto copy = under_way.begin(); copy != under_way.end();) {
    if (condition(*copy)) {
      Finish(*copy);
      copy = under_way.erase(copy);
    } else {
      ++copy;
    }
  }
}

void FinishOverlapping(const void* host, size_t bytes) {
  const auto* begin = static_cast<const char*>(host);
  FinishIf([&](const HostCopy& copy) { return copy.host < begin + bytes && begin < copy.host + copy.bytes; });
}

// Whether the copy is behind the point.
template <typename Copy>
bool IsBehind(const Progress& point, const Copy& copy) {
  const auto found = point.find(copy.stream);
  return found != point.end() && copy.number <= found->second;
}

void FinishUpTo(const void* point) {
  const Progress& progress = points[point];
  FinishIf([&](const HostCopy& copy) { return IsBehind(progress, copy); });
  on_device.remove_if([&](const DeviceCopy& copy) { return IsBehind(progress, copy); });
}

// The number of a new copy of the stream's.
uint64_t Number(const void* stream) {
  return points[stream][stream] = ++copies;
}

}  // namespace

void CopyToHost(void* stream, void* to, const void* from, size_t bytes) {
  std::lock_guard lock(mutex);
  if (!IsPinned(to, bytes)) {
    FinishUpTo(stream);
    std::memcpy(to, from, bytes);
    return;
  }
  FinishOverlapping(to, bytes);
  const auto* begin = static_cast<const char*>(from);
  under_way.push_back(
      {stream, Number(stream), static_cast<char*>(to), bytes, std::vector<char>(begin, begin + bytes), 0});
  PoisonBytes(to, bytes);
}

void CopyFromHost(void* stream, void* to, const void* from, size_t bytes) {
  std::lock_guard lock(mutex);
  const bool pinned = IsPinned(from, bytes);
  if (pinned) {
    FinishOverlapping(from, bytes);
  } else {
    FinishUpTo(stream);
  }
  std::memcpy(to, from, bytes);
  if (pinned) {
    auto* host = static_cast<char*>(const_cast<void*>(from));
    under_way.push_back({stream, Number(stream), host, bytes, {}, Hash(host, bytes)});
  }
}

void CopyOnDevice(void* stream, void* to, const void* from, size_t bytes) {
  std::lock_guard lock(mutex);
  DeviceCopy copy{stream, 0, static_cast<char*>(to), static_cast<const char*>(from), bytes};
  const Progress& known = points[stream];
  for (const DeviceCopy& other : on_device) {
    if (other.stream == stream || !copy.Conflicts(other) || IsBehind(known, other)) continue;
    Stick("a copy of " + std::to_string(bytes) +
          " bytes between device memory races with one of another stream: no event orders them");
  }
  std::memcpy(to, from, bytes);
  copy.number = Number(stream);
  // Whatever is behind this one is behind an equal one before it, too.
  on_device.remove_if([&](const DeviceCopy& other) {
    return other.stream == stream && other.to == copy.to && other.from == copy.from && other.bytes == bytes;
  });
  on_device.push_back(copy);
}

void RecordPoint(void* event, void* stream) {
  std::lock_guard lock(mutex);
  points[event] = points[stream];
}

void FollowPoint(void* stream, void* event) {
  std::lock_guard lock(mutex);
  Progress& progress = points[stream];
  for (const auto& [of, number] : points[event]) progress[of] = std::max(progress[of], number);
}

void ForgetPoint(void* stream_or_event) {
  std::lock_guard lock(mutex);
  points.erase(stream_or_event);
  on_device.remove_if([&](const DeviceCopy& copy) { return copy.stream == stream_or_event; });
}

void HostHasWaitedFor(void* stream_or_event) {
  std::lock_guard lock(mutex);
  FinishUpTo(stream_or_event);
}

void HostHasWaitedForAll() {
  std::lock_guard lock(mutex);
  FinishIf([](const HostCopy&) { return true; });
  on_device.clear();
}

void FinishCopiesOf(const void* memory, size_t bytes) {
  std::lock_guard lock(mutex);
  FinishOverlapping(memory, bytes);
  on_device.remove_if([&](const DeviceCopy& copy) { return copy.Touches(static_cast<const char*>(memory), bytes); });
}

}  // namespace altiplano::sim
