// What ranks of one process hold on one device: told by whoever loads them, shown by whoever serves.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace altiplano {

// As it was when the ranks were ready.
struct DeviceMemory {
  std::string device;                                                   // "GPU 3: NVIDIA H200, ..., PCI 0000:1B:00.0"
  int replica = 0;                                                      // whose ranks they are
  std::vector<int> ranks;                                               // numbered through all stages
  uint64_t weight_bytes = 0, activation_bytes = 0, kv_cache_bytes = 0;  // of these ranks together
  uint64_t free_bytes = 0, total_bytes = 0;                             // of the device, whoever has the rest
};

}  // namespace altiplano
