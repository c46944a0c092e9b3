#!/usr/bin/env python3
"""Breaks the scheduler on purpose, one way at a time, and demands that the simulator notices each.

    mutation_test.py SOURCE_DIR BUILD_DIR [NAME...]

Needs a built sim_test: its objects are linked with one scheduler source compiled from a broken copy.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile

SEEDS = "3000"
# name, file in server/scheduler, text, replacement
MUTATIONS = [
    ("blocks return while a step in flight touches them", "scheduler.cc",
     "InFlight* in_flight = FindInFlight(sequence->last_step);", "InFlight* in_flight = nullptr;"),
    ("blocks of a step in flight are never given back", "scheduler_apply.cc",
     "for (BlockId block : in_flight.retired) pool_.Unretire(block);", ""),
    ("a prefix hit may cover the whole prompt", "scheduler_plan.cc",
     "(sequence->known() - 1) / options_.block_size", "sequence->known() / options_.block_size"),
    ("blocks are published before they are computed", "scheduler_apply.cc",
     "sequence->computed >> block_shift_", "BlocksFor(sequence->computed)"),
    ("tenants share prefixes", "prefix_cache.cc", "tenant, salt}) {", "salt}) {"),
    ("a block's name ignores what is before it", "prefix_cache.cc", "sha.Update(parent.data(), parent.size());", ""),
    ("evicted blocks are still found", "prefix_cache.cc", "if (taken->was_kept) Erase(taken->block);", ""),
    ("siblings write into the shared tail block", "scheduler_apply.cc",
     "(request.prompt_size - 1) / options_.block_size",
     "(request.prompt_size + options_.block_size - 1) / options_.block_size"),
    ("siblings start before the prompt is computed", "scheduler_apply.cc",
     "sequence->computed >= request.prompt_size", "sequence->computed > 0"),
    ("siblings' share is never let go", "scheduler.cc", "if (request.num_unadmitted == 0) DropShare(request);", ""),
    ("shares keep the pool when nothing runs", "scheduler_plan.cc",
     "DropShare(*sharing_.back());\n      continue;", ""),
    ("a preempted sequence keeps waiting for its token", "scheduler_apply.cc",
     "if (sampled != nullptr) --sequence->pending;", "if (sampled != nullptr && sequence->slot >= 0) --sequence->pending;"),
    ("a preempted sequence forgets its history", "scheduler_plan.cc",
     "init.output_history = sequence->generated;", "init.output_history.clear();"),
    ("a sequence's blocks are known to its new slot", "scheduler_plan.cc",
     "sequence->needs_init ? 0 : BlocksFor(sequence->scheduled)", "BlocksFor(sequence->scheduled)"),
    ("a preempted sequence counts as computed", "scheduler_apply.cc",
     "if (sequence->state == Sequence::State::kRunning) {", "{"),
    ("the oldest running request is preempted", "scheduler_plan.cc",
     "if (sequence->request != oldest) last = sequence;", "if (last == nullptr) last = sequence;"),
    ("the oldest running request is remembered beyond its end", "scheduler.cc",
     "if (sequence->request == oldest_ && oldest_->num_running == 0) oldest_ = nullptr;", ""),
    ("a victim comes back in the same plan", "scheduler_plan.cc", "if (!pressed_) AdmitWaiting", "AdmitWaiting"),
    ("results of ended sequences are not dropped", "scheduler_apply.cc",
     "if (sequence->state == Sequence::State::kEnded) return;\n", ""),
    ("NaN is ignored", "scheduler_apply.cc",
     "if (sampled != nullptr && !sampled->finite) return FailNonFinite(call, request);", ""),
    ("what is NaN keeps its name", "scheduler_apply.cc",
     "for (BlockId block : sequence.blocks) cache_.Withdraw(block);", ""),
    ("cancels wait for the next Plan", "scheduler_apply.cc", "  TakeCommands(call);\n", ""),
    ("deadlines are forgotten after admission", "scheduler.cc",
     "return request.admitted ? earliest :", "return request.admitted ? kNever :"),
    ("prompt scores are planned twice after a preemption", "scheduler_plan.cc",
     "if (first < request.scored) return;\n  CHECK(first == request.scored);", "request.scored = first;"),
    ("prompt scores read the prefix cache", "scheduler_plan.cc", "request.uses_cache && request.scoring_complete()",
     "request.uses_cache"),
    ("stops are not banned before min_new_tokens", "scheduler_plan.cc",
     "planned.sample && generated < request.min_new_tokens", "false"),
    ("a slot is lost at each end", "scheduler.cc", "free_slots_.push_back(sequence->slot);", ""),
    ("a chunk may exceed the budget", "scheduler_plan.cc",
     "int32_t tokens = std::min(sequence->remaining(), budget_left);", "int32_t tokens = sequence->remaining();"),
    ("a target may have to start before its request came", "scheduler.cc",
     "std::max(live->start_by, request.arrival) - Aged(request)", "live->start_by - Aged(request)"),
    ("a missed target goes to the end of the queue", "scheduler_plan.cc",
     "request.start_by += options_.default_ttft_target;", "request.start_by += 100 * options_.default_ttft_target;"),
    ("priority does not age", "scheduler.cc",
     "options_.priority_ageing > Duration(0) ? 0 :", ""),
    ("ageing priorities are worth nothing", "scheduler.cc", "return Duration(static_cast<int64_t>(std::clamp(worth,",
     "return Duration(0 * static_cast<int64_t>(std::clamp(worth,"),
    ("what is hopeless waits for its deadline", "scheduler.cc",
     "++hopeless_; ErrorDetail detail;", "return; ErrorDetail detail;"),
    ("targets are counted by the last token", "scheduler_apply.cc", "if (!request.first_token_at) {", "{"),
    ("the most served tenant is next", "scheduler_plan.cc",
     "for (size_t index : share_.Order()) {\n const Account& account = accounts_[index];",
     "for (size_t i = accounts_.size(); i-- > 0;) { const Account& account = accounts_[share_.Order()[i]];"),
    ("idle tenants hoard credit", "fair_share.cc", "account.level = std::max(account.level, floor_);", ""),
    ("what is computed again is charged again", "scheduler_plan.cc",
     "std::max(sequence->charged, sequence->scheduled)", "sequence->scheduled"),
    ("weights are ignored", "fair_share.cc", "parts / account->weight", "parts"),
    ("a tenant's limit of running sequences is ignored", "scheduler_plan.cc",
     "&& account.load.running_sequences < account.max_running", ""),
    ("ageing has the wrong sign", "scheduler.cc",
     "std::max(live->start_by, request.arrival) - Aged(request)",
     "std::max(live->start_by, request.arrival) + Aged(request)"),
    ("priorities are the wrong way round", "scheduler.cc", "-int64_t{request->priority}", "int64_t{request->priority}"),
    ("whoever has most time goes first", "scheduler.cc",
     "std::max(live->start_by, request.arrival) - Aged(request)",
     "request.arrival + (request.arrival - std::max(live->start_by, request.arrival)) - Aged(request)"),
    ("targets do not order the queue", "scheduler.cc", "if (request.ttft_target > Duration(0)) {", "if (false) {"),
    ("deadlines do not order the queue", "scheduler.cc",
     "live->start_by = std::min(live->start_by, request.deadline - prefill);", ""),
    ("a prompt takes no longer beside what decodes", "scheduler.cc", "PrefillTime(0, live->prompt_size, decodes_)",
     "PrefillTime(0, live->prompt_size, {})"),
    ("a missed target hurries for ever", "scheduler_plan.cc", "if (StopHurrying(sequence, call.now)) continue;", ""),
    ("the prefix cache gives no hope", "scheduler.cc", "CertainPrefillTime(cached, request.prompt_size - cached)",
     "CertainPrefillTime(0, request.prompt_size)"),
    ("a badly learned cost makes hopeless", "scheduler_plan.cc",
     "options_.learn_step_cost ? std::max(0.0, 1 - 2 * learner_.error()) : 1", "1.0"),
    ("prompts are not charged to the tenant", "scheduler_plan.cc", "end - begin + (kAnswerService - 1) * answer",
     "kAnswerService * answer"),
    ("an answer's token is charged as a prompt's", "scheduler_plan.cc", "kAnswerService = 2;", "kAnswerService = 1;"),
    ("debts are never settled", "fair_share.cc", "lowest == INT64_MAX ? highest : lowest",
     "lowest == INT64_MAX ? floor_ : lowest"),
    ("a tenant runs one more than it may", "scheduler_plan.cc",
     "account.load.running_sequences < account.max_running", "account.load.running_sequences <= account.max_running"),
    ("a tenant at its limit holds up the others", "scheduler_plan.cc",
     "if (!account.waiting.empty() && account.load.running_sequences < account.max_running) {",
     "if (!account.waiting.empty() && account.load.running_sequences >= account.max_running) return nullptr;"
     "if (!account.waiting.empty()) {"),
    ("the first in order gives up", "scheduler_plan.cc", "if (sequence->request != oldest) last = sequence;",
     "if (sequence->request != oldest && last == nullptr) last = sequence;"),
    ("the newest gives up, whatever its priority", "scheduler_plan.cc",
     "if (sequence->request != oldest) last = sequence;",
     "if (sequence->request != oldest && (last == nullptr || last->request->order <= sequence->request->order))"
     " last = sequence;"),
    ("the tenant that has had least gives up", "scheduler_plan.cc",
     "Sequence* last = nullptr; for (size_t account : order_) {",
     "Sequence* last = nullptr; for (size_t account : std::vector<size_t>(order_.rbegin(), order_.rend())) {"),
    ("victims give up for blocks that come back anyway", "scheduler_plan.cc",
     "while (pool_.available() == 0 && pool_.num_retiring() < shortage_) {", "while (pool_.available() == 0) {"),
    ("a victim's request keeps its prompt for siblings", "scheduler_plan.cc",
     "if (victim != wanting) DropShare(request);", ""),
    ("no headroom is left at an admission", "scheduler_plan.cc",
     "(num_running_ << std::min(sequence.preempted, kMostDoublings)) / 4", "0"),
    ("a victim comes back with the usual headroom", "scheduler_plan.cc",
     "std::min(sequence.preempted, kMostDoublings)", "0"),
    ("a head that did not fit is left alone for long", "scheduler_plan.cc", "kRetryBlockedAfterSteps = 8;",
     "kRetryBlockedAfterSteps = 80;"),
    ("salts share prefixes", "prefix_cache.cc", "tenant, salt}) {", "tenant}) {"),
    ("what several have found is evicted like any other", "block_pool.cc", "At(id).valued = true;", ""),
    ("what several have found may fill the pool", "block_pool.cc", "valued_.size <= size() / 2",
     "valued_.size <= size()"),
    ("prefixes are forgotten from their beginnings", "scheduler.cc",
     "auto block = sequence->blocks.rbegin(); block != sequence->blocks.rend(); ++block",
     "auto block = sequence->blocks.begin(); block != sequence->blocks.end(); ++block"),
    ("the last block of a prefix is not found", "scheduler_plan.cc", "i < most; ++i", "i + 1 < most; ++i"),
    ("cached tokens are counted as the prompt's", "scheduler_plan.cc",
     "event.cached_tokens = static_cast<uint32_t>(sequence->computed);",
     "event.cached_tokens = static_cast<uint32_t>(std::min(sequence->computed + options_.block_size,"
     " request.prompt_size - 1) / options_.block_size * options_.block_size);"),
    ("a tenant's prompts are counted when they arrive", "scheduler.cc",
     "account.load.waiting_tokens += prompt_size;",
     "account.load.waiting_tokens += prompt_size; account.load.prompt_tokens += static_cast<uint64_t>(prompt_size);"),
    ("a prompt that waits may break the ceiling", "scheduler_plan.cc", "std::max(1, PrefillRoom(sequence->scheduled))",
     "budget_left_"),
    ("each prompt gets a block over the ceiling", "scheduler_plan.cc", "return prefills_ > 0 ? room : std::max",
     "return std::max"),
    ("under a ceiling the first prompt waits, too", "scheduler_plan.cc",
     "return prefills_ > 0 ? room : std::max(room, std::min(options_.block_size, budget_left_));", "return room;"),
    ("prompts use one token less than fits under the ceiling", "scheduler_plan.cc",
     "most = middle - 1;", "most = std::max(room, middle - 2);"),
    ("one token of a prompt never takes longer than two", "scheduler_plan.cc",
     "if (most < 2 || !fits(2)) return most > 0 && fits(1) ? 1 : 0; int32_t room = 2;", "int32_t room = 0;"),
    ("one token behind a prefix attends to nothing", "scheduler_plan.cc",
     "learner_.cost().kv_token_us * static_cast<double>(prompt.decode_context)", "0"),
    ("the last token of the budget is kept from decodes", "scheduler_plan.cc",
     "if (remaining != 1 || budget_left_ == 0) return;", "if (remaining != 1 || budget_left_ <= 1) return;"),
    ("tokens that come in time are late", "scheduler_apply.cc", "late <= Duration(0)", "late < Duration(0)"),
    ("a tenant may have one more waiting", "queue_bounds.cc",
     "tenant.requests >= limits.max_queued_requests", "tenant.requests > limits.max_queued_requests"),
    ("the queue takes one more", "queue_bounds.cc", "requests_ < options_.max_requests ||",
     "requests_ <= options_.max_requests ||"),
    ("others keep a tenant out", "queue_bounds.cc", "|| tenant.requests < tenant.own_requests", ""),
    ("who was admitted still waits", "queue_bounds.cc", "tokens_ -= prompt_tokens; CHECK", "CHECK"),
    ("who gives up counts as drained", "queue_bounds.cc", "if (admitted) tenant.admissions.Add", "tenant.admissions.Add"),
    ("the hint is that of all tenants", "queue_bounds.cc", "tenant.requests / rate / 2", "requests_ / rate / 2"),
    ("one token too many", "scheduler_apply.cc", "sequence.known() + 1 >=", "sequence.known() >="),
    ("a checkpoint forgets what accounts have had", "scheduler_restore.cc",
     "share_.Restore(i, checkpoint.accounts[i], accounts_[i].live > 0);",
     "share_.Restore(i, {}, accounts_[i].live > 0);"),
    ("a checkpoint forgets what has been charged", "scheduler_restore.cc", "sequence->charged = from.charged;", ""),
    ("a checkpoint forgets who is valued", "scheduler_restore.cc", "if (valued) pool_.SetValued(cached);", ""),
    ("a checkpoint forgets which cached block is oldest", "scheduler_checkpoint.cc",
     "BlockId block = pool_.oldest_cached(valued); block >= 0; block = pool_.younger(block)",
     "BlockId block = 0; block < pool_.size(); ++block) if (pool_.refs(block) == 0 && cache_.published(block) && "
     "pool_.valued(block) == valued"),
    ("a checkpoint forgets victims", "scheduler_restore.cc", "sequence->preempted = from.preempted;", ""),
    ("a checkpoint forgets what steps cost", "scheduler_restore.cc",
     "if (checkpoint.learner) learner_ = *checkpoint.learner;", ""),
    ("a checkpoint forgets targets that are missed already", "scheduler_restore.cc", "live->hurries = from.hurries;", ""),
    ("a checkpoint forgets commands", "scheduler_restore.cc", "StopSequence(stop.key, stop.sequence);", "(void)stop;"),
    ("a checkpoint forgets what a step retires", "scheduler_checkpoint.cc", "PutBlocks(in_flight.retired, out);",
     "PutBlocks({}, out);"),
]


def library_line(build):
    """Compiler, flags and libraries with which sim_test was made."""
    commands = subprocess.run(["ninja", "-C", build, "-t", "commands", "sim_test"], check=True, capture_output=True,
                              text=True).stdout.splitlines()
    link = next(c for c in reversed(commands) if " -o tests/sim_test" in c)
    compile_ = next(c for c in commands if "scheduler.dir/scheduler/scheduler.cc.o -c" in c)
    link = re.sub(r"^: && | && :$", "", link)
    return link.removeprefix("ccache "), compile_


def caught(source, build, scratch, name, file, old, new):
    text = (source / "server/scheduler" / file).read_text()
    # Formatting may have moved the text's line breaks.
    pattern = r"\s+".join(re.escape(word) for word in old.split())
    broken, count = re.subn(pattern, lambda _: new, text, count=1)
    if count != 1:
        return f"the text to break is no longer in {file}: {old}"
    copy = scratch / "server/scheduler" / file
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(broken)
    link, compile_ = library_line(build)
    original = str(source / "server/scheduler" / file)
    compile_ = compile_.replace("scheduler.dir/scheduler/scheduler.cc.o", f"scheduler.dir/scheduler/{file}.o")
    compile_ = compile_.replace(str(source / "server/scheduler/scheduler.cc"), original)
    compile_ = re.sub(r" -MD| -M[TF] \S+", "", compile_.replace(original, str(copy)))
    compile_ = re.sub(r" -o \S+", f" -o {scratch}/broken.o", compile_).replace("-Werror", "-w")
    subprocess.run(compile_, shell=True, cwd=build, check=True)
    link = re.sub(r" -o tests/sim_test", f" {scratch}/broken.o -o {scratch}/sim", link)
    subprocess.run(link, shell=True, cwd=build, check=True)
    env = dict(os.environ, ALTIPLANO_SIM_SEEDS=SEEDS)
    run = subprocess.run([scratch / "sim", "--gtest_filter=Simulator.Seeds"], env=env, capture_output=True, text=True,
                         timeout=120)
    if run.returncode == 0:
        return "NOT caught"
    said = [line for line in (run.stdout + run.stderr).splitlines()
            if re.search(r"broken invariant|tick \d+|replay|ERROR: Addr|signal", line)]
    print(f"caught: {name}: {said[0].strip() if said else run.returncode}", flush=True)
    return None


def main():
    source, build = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    wanted = sys.argv[3:]
    survivors = []
    for mutation in MUTATIONS:
        if wanted and not any(w in mutation[0] for w in wanted):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            problem = caught(source, build, pathlib.Path(scratch), *mutation)
        if problem:
            survivors.append(f"{mutation[0]}: {problem}")
            print(survivors[-1], flush=True)
    sys.exit("\n" + "\n".join(survivors) if survivors else 0)


if __name__ == "__main__":
    main()
