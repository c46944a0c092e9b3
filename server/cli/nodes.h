// Several nodes: from flags to a place in a group, and what a node does that does not lead.
#pragma once

#include "altiplano/config/v1/server_config.pb.h"
#include "kernels/device.h"
#include "server/base/status.h"
#include "server/cli/load_model.h"
#include "server/cli/start_notice.h"
#include "server/cli/stop_signal.h"
#include "server/cluster/group.h"
#include "server/model/checkpoint.h"

namespace altiplano::cli {

// Stages of the pipeline: as configured, or one for each node.
uint32_t PipelineStages(const config::v1::ServerConfig& config);

// Fills config->nodes() from the launcher. INVALID_ARGUMENT or
// FAILED_PRECONDITION naming the flag to change.
Status ResolveNodes(config::v1::ServerConfig* config);

// Of a config that ResolveNodes has seen. device: that this node computes on. Reads a row of each of the checkpoint's
// matrices.
StatusOr<cluster::GroupOptions> GroupOptionsOf(const config::v1::ServerConfig& config, const Checkpoint& checkpoint,
                                               Device device, const LoadHooks& hooks);

// Until the group ends, or stop asks for it. Returns the exit code.
int ServeAsFollower(const config::v1::ServerConfig& config, StopSignal& stop, StartNotice& notice);

}  // namespace altiplano::cli
