// NVTX is headers only: a profiler brings what is behind them.
#include "kernels/trace.h"

#include <nvtx3/nvToolsExt.h>

namespace altiplano::cuda {

void BeginTraceRange(const char* name, uint64_t number) {
  nvtxEventAttributes_t attributes = {};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  attributes.payloadType = NVTX_PAYLOAD_TYPE_UNSIGNED_INT64;
  attributes.payload.ullValue = number;
  nvtxRangePushEx(&attributes);
}

void EndTraceRange() {
  nvtxRangePop();
}

}  // namespace altiplano::cuda
