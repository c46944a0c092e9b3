#include "kernels/cpu/linear.h"

#include "kernels/cpu/cpu_features.h"

namespace altiplano::cpu {

std::string LinearBackend() {
  return Name(CurrentIsa());
}

}  // namespace altiplano::cpu
