#!/usr/bin/env python3
"""Breaks stages, replicas, nodes and what finds hangs on purpose, one way at a time, and demands that tests notice each.

    mutation_test.py SOURCE_DIR BUILD_DIR [NAME...]

Needs a built engine_test, cluster_test and cli_test.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from mutation_testlib import Mutation, Tree, run  # noqa: E402

# name, file, text, replacement, tests, program
MUTATIONS = [
    ("health: a step may get nowhere for ever", "server/engine/engine.cc",
     "return clock_.Now().time_since_epoch() - since <", "return true || clock_.Now().time_since_epoch() - since <",
     "OverdueStep*", "engine_test"),
    ("health: predictions count for nothing", "server/engine/engine.cc",
     "std::max(options_.health_deadline, kPatienceFactor * predicted)", "options_.health_deadline",
     "OverdueStep*", "engine_test"),
    ("health: a short prediction shortens the deadline", "server/engine/engine.cc",
     "std::max(options_.health_deadline, kPatienceFactor * predicted)", "kPatienceFactor * predicted",
     "OverdueStep*", "engine_test"),
    ("health: progress is ignored", "server/engine/engine.cc",
     "std::max(started, step_got_on_.load(std::memory_order_acquire))", "started", "OverdueStep*", "engine_test"),
    ("health: progress is not told of", "server/engine/local_executor.cc",
     "if (ExecutorObserver* observer = executor_.observer_) observer->OnProgress();", "",
     "Hangs.ASlowStep*", "engine_test"),
    ("health: silence is ignored", "server/engine/engine.cc",
     "|| silent_.load(std::memory_order_acquire)", "", "OverdueStep*", "engine_test"),
    ("restart: without an end", "server/engine/engine.cc", "options_.restart && !restarted_ &&",
     "options_.restart &&", "Engine.StartsAgain*", "engine_test"),
    ("restart: one that hangs is waited for", "server/engine/engine.cc", "GiveUp(); });", "});",
     "Engine.ARestartThatHangs*", "engine_test"),
    ("replicas: affinity is ignored", "server/engine/replica_router.cc",
     "- CachedTokens(replica, route.chain));", ");", "Replica*", "engine_test"),
    ("replicas: load is ignored", "server/engine/replica_router.cc",
     "replica.prompt_tokens + kSequenceTokens * replica.sequences + prompt_tokens", "prompt_tokens",
     "Replica*", "engine_test"),
    ("replicas: an overdue one gets requests", "server/engine/replica_set.cc",
     "if (!healthy[at]) continue;", "", "ReplicaSet.*", "engine_test"),
    ("replicas: an overdue one counts as empty", "server/engine/replica_set.cc",
     "routing_->ForgetIfFailed(i, replicas_[i]->failures());",
     "if (!healthy[i]) routing_->router.Forget(static_cast<int>(i));", "ReplicaSet.*", "engine_test"),
    ("start: nobody looks", "server/engine/start_watch.cc", "if (now - since_ < patience) return OkStatus();",
     "return OkStatus();", "StartPhase*", "engine_test"),
    ("start: ranks that get on hang", "server/engine/start_watch.cc",
     "if (std::exchange(seen_, progresses) != progresses) since_ = now;", "", "StartPhase*", "engine_test"),
    ("start: a rank that is done is named", "server/engine/start_watch.cc", "if (!progresses[index]) continue;", "",
     "StartPhase*", "engine_test"),
    ("hangs: the ranks that came are named", "kernels/comm/in_process.cc", "if (!present_[other])",
     "if (present_[other])", "TensorParallel.ARankThatHangs*", "engine_test"),
    ("stages: the wrong layers", "server/model/weights.cc", "shard_.first_layer(config_) +", "",
     "PipelineParallel.StagesChangeNoBit", "engine_test"),
    ("ranks: KV heads are replicated in the wrong order", "server/model/weights.cc",
     "kv_begin = shard_.first_kv_head(config_) * dim", "kv_begin = shard_.rank % config_.kv_heads * dim",
     "TensorParallel.EveryNumber*", "engine_test"),
    ("stages: sampled ids are not waited for", "server/engine/rank_worker.cc", "(needs_last ? 0 : 1)", "1u",
     "PipelineParallel.StagesChangeNoBit", "engine_test"),
    ("nodes: other terms are accepted", "server/cluster/leader.cc", "if (value == mine) continue;", "continue;",
     "GroupTest.ANodeWithOtherTerms*", "cluster_test"),
    ("nodes: the secret is not compared", "server/cluster/leader.cc", "EqualInConstantTime(answer.proof(),",
     "answer.has_proof() || EqualInConstantTime(answer.proof(),", "GroupTest.ALeaderProves*", "cluster_test"),
    ("nodes: the leader need not know the secret", "server/cluster/follower.cc",
     "if (!EqualInConstantTime(", "if (false && !EqualInConstantTime(", "GroupTest.OnlyWhoKnows*", "cluster_test"),
    ("nodes: a stale token is accepted", "server/cluster/data_links.cc",
     "greeting != Greeting(peers.token, before, rank)",
     "!greeting.ends_with(Greeting(\"\", before, rank))", "DataLinks*", "cluster_test"),
    ("nodes: the largest pool decides", "server/cluster/leader.cc", "std::min(formed.scheduler.num_blocks",
     "std::max(formed.scheduler.num_blocks", "GroupTest.TheSmallest*", "cluster_test"),
    ("nodes: a start that hangs is not told to the leader", "server/cluster/follower.cc",
     "call.SendFarewell(status);", "", "GroupTest.AFollowerThatHangs*", "cluster_test"),
    ("nodes: who gives up first is the cause of a start that hangs", "server/cluster/leader.cc",
     "(starts ? start_patience : kCausePatience)", "kCausePatience", "GroupTest.AStartThatHangs*", "cluster_test"),
    ("nodes: a leader whose start hangs leaves without a word", "server/cluster/leader.cc",
     "EndByHang(*group, status);", "", "GroupTest.AStartThatHangs*", "cluster_test"),
    ("nodes: a start that hung is a node that was lost", "server/cluster/follower.cc",
     "message.ended().start_hung() ? Code::kDeadlineExceeded : Code::kUnavailable", "Code::kUnavailable",
     "GroupTest.AStartThatHangs*", "cluster_test"),
    ("nodes: what a node suffers from is its end", "server/cluster/follower.cc",
     "status = Unexpected(*last);", ";", "GroupTest.AStartThatHangs*", "cluster_test"),
    ("start: nobody looks while the fingerprint is read", "server/cli/nodes.cc",
     "watch.Begin(\"reading the model's fingerprint\");", "", "Nodes.AFileSystem*", "cli_test"),
]

if __name__ == "__main__":
    run(Tree.of_arguments(), [Mutation(*mutation) for mutation in MUTATIONS])
