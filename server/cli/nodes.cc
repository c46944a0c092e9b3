#include "server/cli/nodes.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "server/base/log.h"
#include "server/base/strings.h"
#include "server/cli/command.h"
#include "server/cli/load_model.h"
#include "server/cli/terminal.h"
#include "server/cli/units.h"
#include "server/cli/version.h"
#include "server/cluster/secret.h"
#include "server/engine/start_watch.h"
#include "server/model/fingerprint.h"

namespace altiplano::cli {

uint32_t PipelineStages(const config::v1::ServerConfig& config) {
  const uint32_t stages = config.model().pipeline_parallel();
  return stages > 0 ? stages : config.nodes().count();
}

Status ResolveNodes(config::v1::ServerConfig* config) {
  config::v1::Nodes& nodes = *config->mutable_nodes();
  if (nodes.launcher() != "none") {
    ASSIGN_OR_RETURN(const cluster::Place place, cluster::PlaceFromEnvironment(nodes.launcher(), std::getenv));
    nodes.set_count(static_cast<uint32_t>(place.nodes));
    nodes.set_rank(static_cast<uint32_t>(place.rank));
    if (nodes.leader().empty()) nodes.set_leader(place.leader);
  }
  const uint32_t count = nodes.count();
  if (nodes.rank() >= count) {
    return InvalidArgument(
        StrCat("--node-rank is ", nodes.rank(), ", with --nodes ", count, " it must be less than ", count));
  }
  if (count > 1 && nodes.leader().empty())
    return InvalidArgument(StrCat("--nodes ", count, " needs --leader HOST:PORT"));
  if (nodes.leader().starts_with("unix:") || nodes.leader().ends_with(":0")) {
    return InvalidArgument(
        StrCat("--leader is ", nodes.leader(), ", must be HOST:PORT with a port that the other nodes know"));
  }
  if (count == 1 && !nodes.leader().empty() && nodes.launcher() == "none") {
    return InvalidArgument("--leader is for several nodes, and --nodes is 1; raise it, or leave --leader out");
  }
  if (count > 1 && config->model().replicas() > 1) {
    return InvalidArgument("--replicas and --nodes exclude each other: run a group of nodes for each replica");
  }
  const uint32_t stages = config->model().pipeline_parallel();
  if (stages % count != 0) {
    return InvalidArgument(
        StrCat("--pipeline-parallel is ", stages, ", with --nodes ", count, " it must be a multiple of ", count));
  }
  // Found out now rather than when the leader listens already.
  if (const std::string& file = nodes.secret_file(); count > 1 && !file.empty()) {
    RETURN_IF_ERROR(cluster::ReadSecret(file).status());
  }
  return OkStatus();
}

StatusOr<cluster::GroupOptions> GroupOptionsOf(const config::v1::ServerConfig& config, const Checkpoint& checkpoint,
                                               Device device, const LoadHooks& hooks) {
  cluster::GroupOptions options;
  options.place.rank = static_cast<int>(config.nodes().rank());
  options.place.nodes = static_cast<int>(config.nodes().count());
  options.place.leader = config.nodes().leader();
  options.join_patience = CheckedMilliseconds(config.nodes().join_timeout());
  options.silence = CheckedMilliseconds(config.scheduler().step_deadline());
  options.health_deadline = CheckedMilliseconds(config.scheduler().health_deadline());
  options.cancelled = hooks.cancelled;
  StartWatch watch(CheckedMilliseconds(config.scheduler().start_timeout()), hooks.on_start_hang, hooks.on_start_phase);
  watch.Begin("reading the model's fingerprint");
  if (const std::string& file = config.nodes().secret_file(); !file.empty()) {
    ASSIGN_OR_RETURN(options.secret, cluster::ReadSecret(file));
  }
  ASSIGN_OR_RETURN(options.terms["model"], Fingerprint(checkpoint));
  options.terms["version"] = StrCat(kVersion, " ", kCommit);
  options.terms["nodes"] = StrCat(config.nodes().count());
  options.terms["dtype"] = config.model().dtype();
  options.terms["device"] = device == Device::kCuda ? "cuda" : "cpu";
  options.terms["tensor-parallel"] = StrCat(config.model().tensor_parallel());
  options.terms["pipeline-parallel"] = StrCat(PipelineStages(config));
  options.terms["max-model-len"] = StrCat(config.model().max_context());
  options.terms["batch-invariant"] = config.model().batch_invariant() ? "true" : "false";
  options.terms["block-size"] = StrCat(BlockSize(config.kv().block_size(), device));
  options.terms["max-num-seqs"] = StrCat(config.scheduler().max_num_seqs());
  options.terms["max-num-batched-tokens"] = StrCat(config.scheduler().max_num_batched_tokens());
  return options;
}

int ServeAsFollower(const config::v1::ServerConfig& config, StopSignal& stop, StartNotice& notice) {
  const std::string& path = config.model().path();
  LoadHooks hooks{.progress = LoadProgressPrinter(),
                  .cancelled = {},
                  .on_step = {},
                  .on_start_hang = EndHungStart("serve", FailInLog),
                  .on_start_phase = [&notice](const std::string& what) { notice.Begin(what); }};
  auto checkpoint = [&] {
    StartWatch watch(CheckedMilliseconds(config.scheduler().start_timeout()), hooks.on_start_hang,
                     hooks.on_start_phase);
    watch.Begin("opening the model's files");
    return Checkpoint::Open(path);
  }();
  if (!checkpoint.ok()) return FailInLog("serve", checkpoint.status().message(), ExitCodeOfLoad(checkpoint.status()));
  // The signal comes to all nodes at once: this one stays until the leader has drained, or can have.
  std::atomic<bool> ready{false};
  const Duration drain =
      CheckedDuration(config.drain().delay()) + CheckedDuration(config.drain().timeout()) + std::chrono::seconds(5);
  TimePoint give_up = kNever;
  hooks.cancelled = [&] {
    if (stop.count() == 0) return false;
    if (!ready || stop.count() > 1) return true;
    if (give_up == kNever) {
      log::Info("waiting for the leader to drain");
      give_up = Clock::Real().Now() + drain;
    }
    return Clock::Real().Now() > give_up;
  };
  auto executor_options = ExecutorOptionsOf(config, hooks);
  if (!executor_options.ok()) {
    return FailInLog("serve", executor_options.status().message(), ExitCodeOfLoad(executor_options.status()));
  }
  auto options = GroupOptionsOf(config, **checkpoint, executor_options->device, hooks);
  if (!options.ok()) return FailInLog("serve", options.status().message(), ExitCodeOfLoad(options.status()));
  const cluster::Place& place = options->place;
  log::Info("joining the leader", {{"leader", place.leader}, {"node", place.rank}, {"nodes", place.nodes}});
  bool served = false;
  for (;;) {
    ready = false;
    const Status end = cluster::Follow(*options, **checkpoint, *executor_options, [&] {
      ready = served = true;
      notice.End();
      PrintReadyLine(StrFormat("READY node=%d of=%d leader=%s", place.rank, place.nodes, place.leader.c_str()));
    });
    if (end.ok() || end.code() == Code::kCancelled) {
      log::Info("stopped", {{"why", end.ok() ? "the leader has stopped" : "a signal"}});
      return kExitOk;
    }
    if (!ready) {
      const bool refused = end.code() == Code::kFailedPrecondition || end.code() == Code::kInvalidArgument;
      // A leader whose group cannot be formed again ends with this code, too.
      const bool lost_again = served && end.code() == Code::kUnavailable;
      return FailInLog("serve", end.message(), refused ? kExitUsage : lost_again ? kExitRestart : ExitCodeOfLoad(end));
    }
    log::Error("the group has ended", {{"why", end.message()}});
    if (config.scheduler().on_engine_failure() != "restart") return kExitRestart;
    log::Info("joining the leader again", {{"leader", place.leader}});
  }
}

}  // namespace altiplano::cli
