// What a host may know of its GPU's copies. Private to the simulator.
//
// What is issued on a stream runs at once. But what a copy brings to pinned memory shows there when the host has waited
// for it, and NaN until then; and what a copy takes from pinned memory must still be the same when the host has waited
// for it, since it might be taken as late as that. A copy of other host memory has been made when it is issued: CUDA
// makes the host wait for it.
//
// Of two copies from device memory to device memory that touch the same bytes, one of them writing, one must be known
// to be behind the other: on the same stream, behind an event, or by a host that has waited. Kernels are not looked at.
#pragma once

#include <cstddef>
#include <string>

namespace altiplano::sim {

void CopyToHost(void* stream, void* to, const void* from, size_t bytes);
void CopyFromHost(void* stream, void* to, const void* from, size_t bytes);

void CopyOnDevice(void* stream, void* to, const void* from, size_t bytes);

// Streams and events are points that a host can wait for: an event for what its stream has made when it was recorded,
// a stream for all it has made, and for what the events that it waits for stand for.
void RecordPoint(void* event, void* stream);
void FollowPoint(void* stream, void* event);
void ForgetPoint(void* stream_or_event);
// Of a wait, or of an answer that what was recorded has been passed.
void HostHasWaitedFor(void* stream_or_event);
void HostHasWaitedForAll();

// Before pinned or device memory is freed, which waits for the copies under way.
void FinishCopiesOf(const void* memory, size_t bytes);

}  // namespace altiplano::sim
