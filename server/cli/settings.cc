// The table. Names follow vLLM's where it has one.
#include <algorithm>
#include <array>

#include "server/cli/config.h"

namespace altiplano::cli {

namespace {

constexpr int64_t kMillion = 1 << 20;

constexpr std::array kSettings = {
    Flag{.name = "listen",
         .type = FlagType::kAddress,
         .default_value = "127.0.0.1:50051",
         .meaning =
             "Where gRPC listens: HOST:PORT, or unix:/path of a socket to make. Port 0 takes a free one, which the "
             "READY line names. There is neither TLS nor authentication: leave the loopback address only behind a "
             "proxy that has both.",
         .example = "0.0.0.0:50051",
         .field = "listen",
         .group = kGroupListening},
    Flag{.name = "admin-listen",
         .type = FlagType::kAddress,
         .default_value = "",
         .meaning = "Where AdminService (drain, resume, log level, cache reset, flight record) listens, for operators "
                    "only. Without it "
                    "there is none.",
         .example = "127.0.0.1:50052",
         .field = "admin_listen",
         .group = kGroupListening},
    Flag{.name = "model",
         .type = FlagType::kPath,
         .default_value = "",
         .meaning = "A Hugging Face folder as downloaded (config.json, safetensors, tokenizer), a GGUF v3 file, or "
                    "random:8b for "
                    "random weights in a published shape (1b, 3b, 8b, 70b, 405b; random:8b,layers=4,seed=7; "
                    "random:405b,rank-of=8 is what one "
                    "tensor-parallel rank of 8 has).",
         .example = "models/Llama-3.2-1B-Instruct",
         .field = "model.path",
         .group = kGroupModel},
    Flag{.name = "served-model-name",
         .type = FlagType::kText,
         .default_value = "",
         .meaning = "What clients call the model. Without it: the name that the checkpoint gives itself.",
         .example = "assistant",
         .field = "model.name",
         .group = kGroupModel},
    Flag{.name = "dtype",
         .type = FlagType::kChoice,
         .default_value = "bf16",
         .meaning = "Number format of weights, activations and KV cache in memory; sums are in f32 with either. bf16 "
                    "takes half the memory and is about twice as fast to decode.",
         .example = "f32",
         .field = "model.dtype",
         .choices = "bf16|f32",
         .group = kGroupModel},
    Flag{.name = "chat-format",
         .type = FlagType::kChoice,
         .default_value = "auto",
         .meaning =
             "How a chat becomes a prompt: auto recognises the checkpoint's own template; none serves plain text "
             "only; the others are described in docs/chat_formats.md.",
         .example = "llama3.1",
         .field = "model.chat_format",
         .choices = "auto|none|llama3|llama3.1|llama3.2|llama3.3|llama3-meta|vllm-llama3.1-json|vllm-llama3.2-json|"
                    "vllm-llama3.2-pythonic|chatml|smollm2|llama-guard-2|llama-guard-3|llama-guard-3-cookbook",
         .group = kGroupModel},
    Flag{.name = "max-model-len",
         .type = FlagType::kCount,
         .default_value = "0",
         .meaning = "Most tokens of a prompt and its answer, at least 2. 0: as many as the model was made for.",
         .example = "8192",
         .field = "model.max_context",
         .max = 1 << 24,
         .alias = "context-length",
         .group = kGroupModel},
    Flag{.name = "device",
         .type = FlagType::kChoice,
         .default_value = "cpu",
         .meaning =
             "What computes. cuda is a GPU for each rank of each replica, as --devices says; where there are too few, "
             "or none that this program has kernels for (altiplano version names them), it ends with exit code 69. "
             "auto is cuda where that works, else cpu. No kernel of this project has run on a GPU yet.",
         .example = "cuda",
         .field = "model.device",
         .choices = "auto|cpu|cuda",
         .group = kGroupModel},
    Flag{.name = "devices",
         .type = FlagType::kText,
         .default_value = "",
         .meaning = "With --device cuda, the number of each rank's GPU: --tensor-parallel numbers for the first stage "
                    "of the first replica, as many for each other stage on this node, then the other replicas' "
                    "likewise. They count the GPUs that CUDA_VISIBLE_DEVICES leaves, from 0 on, and the log names each "
                    "one's PCI address. Ranks may share a GPU that is named several times, which is of no use but to "
                    "tests. Empty: 0, 1, 2 ...",
         .example = "4,5,6,7",
         .field = "model.devices",
         .group = kGroupModel},
    Flag{.name = "isa",
         .type = FlagType::kChoice,
         .default_value = "auto",
         .meaning = "Highest CPU instruction set to use. auto is the fastest that this machine has (on Intel's never "
                    "avx512_bf16); a level that it has not ends with exit code 69.",
         .example = "avx2",
         .field = "model.isa",
         .choices = "auto|avx2|avx512|avx512_bf16|amx_bf16",
         .group = kGroupModel},
    Flag{.name = "batch-invariant",
         .type = FlagType::kBool,
         .default_value = "false",
         .meaning =
             "On a GPU an answer is to the bit independent of what else is in the batch, of how its prompt is cut into "
             "steps and of what was cached. This keeps prompts and batches of more than 8 from the fastest kernels. "
             "On the CPU it changes nothing.",
         .field = "model.batch_invariant",
         .group = kGroupModel},
    Flag{.name = "cuda-graphs",
         .type = FlagType::kChoice,
         .default_value = "auto",
         .meaning = "Whether a GPU replays the steps that only decode from graphs, captured before READY for each of a "
                    "few batch sizes: auto, nccl (batches whose all-reduces are NCCL's too: beyond 8 MiB, which only "
                    "405B has) or off. On the CPU it changes nothing.",
         .example = "off",
         .field = "model.cuda_graphs",
         .choices = "auto|nccl|off",
         .group = kGroupModel},
    Flag{.name = "overlap-kernels",
         .type = FlagType::kBool,
         .default_value = "true",
         .meaning = "Let small kernels start while the one before them ends, on GPUs that can (sm_90).",
         .field = "model.overlap_kernels",
         .group = kGroupModel},
    Flag{.name = "tensor-parallel",
         .type = FlagType::kCount,
         .default_value = "1",
         .meaning =
             "Ranks that the model is split into: each has its part of every layer and of the vocabulary. On the "
             "CPU they share --threads. altiplano inspect tells which numbers a model can be split into.",
         .example = "2",
         .field = "model.tensor_parallel",
         .min = 1,
         .max = 64,
         .alias = "tp",
         .group = kGroupModel},
    Flag{.name = "check-ranks",
         .type = FlagType::kBool,
         .default_value = "false",
         .meaning = "Compare by hashes what the ranks of a group hold that should be the same, after each call between "
                    "them, and end a group that differs with the ranks named. Slow: for finding a broken device.",
         .field = "model.check_ranks",
         .group = kGroupModel},
    Flag{.name = "pipeline-parallel",
         .type = FlagType::kCount,
         .default_value = "0",
         .meaning = "Stages that the layers are split into, each of --tensor-parallel ranks. For models too large for "
                    "one machine: an answer is no sooner there, since a token goes through all stages. 0: one for each "
                    "node.",
         .example = "2",
         .field = "model.pipeline_parallel",
         .max = 64,
         .alias = "pp",
         .group = kGroupModel},
    Flag{.name = "replicas",
         .type = FlagType::kCount,
         .default_value = "1",
         .meaning =
             "Engines of the same model behind one front end. Each has its own ranks, KV cache, queue and limits; "
             "a request goes to the one that has its beginning cached or the least to do. On the CPU they share "
             "the weights and --threads, with --device cuda each has its own GPUs. One that fails is left out while "
             "another serves.",
         .example = "2",
         .field = "model.replicas",
         .min = 1,
         .max = 64,
         .alias = "data-parallel-size",
         .group = kGroupModel},
    Flag{.name = "nodes",
         .type = FlagType::kCount,
         .default_value = "1",
         .meaning = "Machines that serve one model together, a run of the pipeline's stages each. All get the same "
                    "flags but for --node-rank; clients talk to the leader.",
         .example = "2",
         .field = "nodes.count",
         .min = 1,
         .max = 64,
         .alias = "nnodes",
         .group = kGroupNodes},
    Flag{.name = "node-rank",
         .type = FlagType::kCount,
         .default_value = "0",
         .meaning = "Which of them this one is. 0 leads; the others load their layers and do what it plans.",
         .example = "1",
         .field = "nodes.rank",
         .max = 63,
         .group = kGroupNodes},
    Flag{.name = "leader",
         .type = FlagType::kAddress,
         .default_value = "",
         .meaning =
             "Where the leader listens for the other nodes, as they reach it. Nothing between nodes is encrypted: keep "
             "this address, and the ports that they open for each other, inside.",
         .example = "10.0.0.1:50060",
         .field = "nodes.leader",
         .group = kGroupNodes},
    Flag{.name = "launcher",
         .type = FlagType::kChoice,
         .default_value = "none",
         .meaning = "Take --nodes, --node-rank and --leader (port 50060) from the environment that LeaderWorkerSet, "
                    "Slurm's srun (one task a node) or Open MPI's mpirun (which does not name the leader) sets.",
         .example = "slurm",
         .field = "nodes.launcher",
         .choices = "none|lws|slurm|openmpi",
         .group = kGroupNodes},
    Flag{.name = "node-secret-file",
         .type = FlagType::kPath,
         .default_value = "",
         .meaning = "A file with a secret of at least 16 bytes that all nodes have: leader and followers prove to each "
                    "other that they know it before a node joins. It is not sent. Without it whoever reaches the "
                    "leader may join.",
         .example = "/run/secrets/altiplano-nodes",
         .field = "nodes.secret_file",
         .group = kGroupNodes},
    Flag{.name = "join-timeout",
         .type = FlagType::kDuration,
         .default_value = "10m",
         .meaning = "How long nodes wait for each other before they give up.",
         .example = "1h",
         .field = "nodes.join_timeout",
         .least = "1ms",
         .group = kGroupNodes},
    Flag{.name = "kv-memory",
         .type = FlagType::kBytes,
         .default_value = "0",
         .meaning =
             "Memory for the KV cache, of all replicas together. 0: what --max-num-seqs full contexts can use, but at "
             "most half of the memory that is free after loading, or on a GPU nearly all of it.",
         .example = "4GiB",
         .field = "kv.memory",
         .group = kGroupKv},
    Flag{.name = "block-size",
         .type = FlagType::kCount,
         .default_value = "0",
         .meaning =
             "Tokens in a KV block, a power of two. Whole blocks are shared between equal prefixes. 0: 16 on the "
             "CPU, 64 on a GPU.",
         .example = "32",
         .field = "kv.block_size",
         .max = 1024,
         .group = kGroupKv},
    Flag{.name = "enable-prefix-caching",
         .type = FlagType::kBool,
         .default_value = "true",
         .meaning = "Keep the KV blocks of finished requests and reuse them for prompts that begin alike.",
         .field = "kv.prefix_cache",
         .group = kGroupKv},
    Flag{.name = "max-num-seqs",
         .type = FlagType::kCount,
         .default_value = "256",
         .meaning = "Most sequences that compute at one time.",
         .example = "64",
         .field = "scheduler.max_num_seqs",
         .min = 1,
         .max = 65536,
         .alias = "max-running-requests",
         .group = kGroupScheduling},
    Flag{.name = "max-num-batched-tokens",
         .type = FlagType::kCount,
         .default_value = "2048",
         .meaning =
             "Most tokens computed in one step, prefill and decode together. Smaller steps make streams steadier, "
             "larger ones make long prompts faster.",
         .example = "512",
         .field = "scheduler.max_num_batched_tokens",
         .min = 1,
         .max = kMillion,
         .group = kGroupScheduling},
    Flag{.name = "max-queued-requests",
         .type = FlagType::kCount,
         .default_value = "512",
         .meaning = "Most requests that wait; more are refused with RESOURCE_EXHAUSTED and a time to retry after.",
         .example = "64",
         .field = "scheduler.max_queued_requests",
         .min = 1,
         .max = kMillion,
         .group = kGroupScheduling},
    Flag{.name = "max-queued-tokens",
         .type = FlagType::kCount,
         .default_value = "4194304",
         .meaning = "Most prompt tokens that wait, of all requests together.",
         .example = "1000000",
         .field = "scheduler.max_queued_tokens",
         .min = 1,
         .max = 1ll << 40,
         .group = kGroupScheduling},
    Flag{.name = "max-itl",
         .type = FlagType::kDuration,
         .default_value = "0",
         .meaning = "While answers are streamed, prompts get no more of a step than keeps it within this time by "
                    "--step-cost. 0: no ceiling.",
         .example = "50ms",
         .field = "scheduler.max_itl",
         .group = kGroupScheduling},
    Flag{.name = "step-cost",
         .type = FlagType::kText,
         .meaning = "What a step costs on this machine, for --max-itl and for judging deadlines: a preset's name or a "
                    "file, as of altiplano simulate. Without it nothing is known until steps have been measured.",
         .example = "config/step_cost.json",
         .field = "scheduler.step_cost",
         .group = kGroupScheduling},
    Flag{.name = "learn-step-cost",
         .type = FlagType::kBool,
         .default_value = "true",
         .meaning = "Correct --step-cost by every step that is measured. False keeps to it as it is.",
         .field = "scheduler.learn_step_cost",
         .group = kGroupScheduling},
    Flag{.name = "default-ttft-target",
         .type = FlagType::kDuration,
         .default_value = "10s",
         .meaning =
             "Requests wait in the order in which they must start to meet their ttft_target; one that names none "
             "counts as if it had to start by this, and one that missed its own gets this much more.",
         .example = "2s",
         .field = "scheduler.default_ttft_target",
         .group = kGroupScheduling},
    Flag{.name = "priority-ageing",
         .type = FlagType::kDuration,
         .default_value = "0",
         .meaning =
             "So much more waiting makes up for one level of priority. 0: nothing does, and higher priorities can "
             "keep lower ones waiting for ever.",
         .example = "5s",
         .field = "scheduler.priority_ageing",
         .group = kGroupScheduling},
    Flag{.name = "tenants",
         .type = FlagType::kText,
         .default_value = "",
         .meaning = "Who shares the server: NAME:weight=N,max-running=N,max-queued=N,max-queued-tokens=N, with a "
                    "semicolon between two; * is everybody else. Service is as the weights while several want it; the "
                    "limits, of sequences, requests and prompt tokens, are each tenant's own. Empty: nobody is told "
                    "from anybody.",
         .example = "gold:weight=4;free:weight=1,max-queued=20",
         .field = "scheduler.tenants",
         .group = kGroupScheduling},
    Flag{.name = "health-deadline",
         .type = FlagType::kDuration,
         .default_value = "4s",
         .meaning = "Health is NOT_SERVING while a step has got nowhere for longer, or for three times as long as it "
                    "was predicted to take, and while another node has not been heard of for longer. A replica of "
                    "several gets no new requests then. That ends nothing: see --step-deadline.",
         .example = "2s",
         .field = "scheduler.health_deadline",
         .least = "1ms",
         .group = kGroupScheduling},
    Flag{.name = "step-deadline",
         .type = FlagType::kDuration,
         .default_value = "30s",
         .meaning = "A rank that keeps the others waiting for longer, or gets nowhere by itself, ends the engine, as "
                    "does a node that is not heard of for longer: see --on-engine-failure.",
         .example = "10s",
         .field = "scheduler.step_deadline",
         .least = "1ms",
         .group = kGroupScheduling},
    Flag{.name = "start-timeout",
         .type = FlagType::kDuration,
         .default_value = "2m",
         .meaning =
             "When no rank gets any further with loading and warming up for this long, the program ends with code "
             "75, however long the start may take. 0: it is waited for.",
         .example = "10m",
         .field = "scheduler.start_timeout",
         .group = kGroupScheduling},
    Flag{.name = "on-engine-failure",
         .type = FlagType::kChoice,
         .default_value = "exit",
         .meaning =
             "When a device or a rank fails, live requests end with UNAVAILABLE. Then: exit ends the program with code "
             "75 for its supervisor to start it again; restart loads the model again in the same process, and exits "
             "when that fails or the next step does; stay keeps answering NOT_SERVING until it is stopped.",
         .example = "restart",
         .field = "scheduler.on_engine_failure",
         .choices = "exit|restart|stay",
         .group = kGroupScheduling},
    Flag{.name = "threads",
         .type = FlagType::kCount,
         .default_value = "0",
         .meaning = "Threads that compute, with --device cpu. 0: one for each core this process may use.",
         .example = "8",
         .field = "threads.compute",
         .max = 1024,
         .group = kGroupThreads},
    Flag{.name = "load-threads",
         .type = FlagType::kCount,
         .default_value = "4",
         .meaning = "Threads that read the checkpoint.",
         .example = "16",
         .field = "threads.load",
         .min = 1,
         .max = 256,
         .group = kGroupThreads},
    Flag{.name = "text-threads",
         .type = FlagType::kCount,
         .default_value = "2",
         .meaning = "Threads that render chats and tokenize.",
         .example = "8",
         .field = "threads.text",
         .min = 1,
         .max = 256,
         .group = kGroupThreads},
    Flag{.name = "log-level",
         .type = FlagType::kChoice,
         .default_value = "info",
         .meaning = "Least severe lines that are logged, on stderr. Prompts and answers never are.",
         .example = "warn",
         .field = "log.level",
         .choices = "debug|info|warn|error|off",
         .group = kGroupLogs},
    Flag{.name = "log-format",
         .type = FlagType::kChoice,
         .default_value = "auto",
         .meaning = "auto is text on a terminal and JSON lines elsewhere.",
         .example = "json",
         .field = "log.format",
         .choices = "auto|text|json",
         .group = kGroupLogs},
    Flag{.name = "flight-record-memory",
         .type = FlagType::kBytes,
         .default_value = "32MiB",
         .meaning = "Memory for the record of the scheduler's last steps, which altiplano admin dump-flight-record "
                    "fetches: thousands of steps of hundreds of sequences. No prompts or answers are in it. 0: none.",
         .example = "256MiB",
         .field = "log.flight_record_memory",
         .group = kGroupLogs},
    Flag{.name = "flight-record-dir",
         .type = FlagType::kPath,
         .default_value = "/tmp",
         .meaning = "Folder for that record when a device or a rank fails, and when the process dies of a bug. "
                    "\"\": none is written then.",
         .example = "/var/lib/altiplano",
         .field = "log.flight_record_dir",
         .group = kGroupLogs},
    Flag{.name = "drain-delay",
         .type = FlagType::kDuration,
         .default_value = "0s",
         .meaning = "After SIGTERM health is NOT_SERVING at once, but new requests are still taken for this long: time "
                    "for a load balancer to look elsewhere.",
         .example = "5s",
         .field = "drain.delay",
         .group = kGroupStopping},
    Flag{.name = "drain-timeout",
         .type = FlagType::kDuration,
         .default_value = "30s",
         .meaning = "How long live requests may then take to finish before they are ended with UNAVAILABLE. A second "
                    "SIGTERM ends them at once. The exit code is 0 in each case.",
         .example = "5m",
         .field = "drain.timeout",
         .group = kGroupStopping},
};

// `least`: what a limit must be, so that not every request is refused by it.
constexpr Flag Size(std::string_view name, std::string_view field, std::string_view bytes, std::string_view meaning,
                    std::string_view example, std::string_view least = "0") {
  return {.name = name,
          .type = FlagType::kBytes,
          .default_value = bytes,
          .meaning = meaning,
          .example = example,
          .field = field,
          .least = least,
          .group = kGroupLimits};
}
constexpr Flag Count(std::string_view name, std::string_view field, std::string_view count, std::string_view meaning,
                     std::string_view example, int64_t least = 0) {
  return {.name = name,
          .type = FlagType::kCount,
          .default_value = count,
          .meaning = meaning,
          .example = example,
          .field = field,
          .min = least,
          .max = kMillion,
          .group = kGroupLimits};
}
constexpr Flag Time(std::string_view name, std::string_view field, std::string_view time, std::string_view meaning,
                    std::string_view example, std::string_view least = "0") {
  return {.name = name,
          .type = FlagType::kDuration,
          .default_value = time,
          .meaning = meaning,
          .example = example,
          .field = field,
          .least = least,
          .group = kGroupLimits};
}

// frontend/limits.h; a test holds the defaults together.
constexpr std::array kLimitSettings = {
    Size("max-message-size", "limits.message_size", "16MiB", "Largest message taken from a client.", "32MiB", "1KiB"),
    Count("max-streams-per-connection", "limits.streams_per_connection", "100",
          "Most calls at one time on a connection.", "1000", 1),
    Time("keepalive-time", "limits.keepalive_time", "60s",
         "A connection that is silent for this long is pinged, so that the blocks of dead clients come free.", "30s",
         "1s"),
    Time("keepalive-timeout", "limits.keepalive_timeout", "20s", "A ping not answered by then ends the connection.",
         "5s", "1ms"),
    Time(
        "min-client-ping-interval", "limits.min_client_ping_interval", "5s",
        "A client's pings that come sooner than this after one another end its connection at the third, if nothing was "
        "sent to it meanwhile. 0: it may ping as often as it likes.",
        "10s"),
    Size("max-prompt-size", "limits.prompt_size", "4MiB",
         "Largest prompt: text, or a chat's contents and tools together.", "1MiB", "1B"),
    Count("max-chat-messages", "limits.chat_messages", "2048", "Most messages of a chat.", "100"),
    Count("max-tools", "limits.tools", "128", "Most tools offered in a request.", "16"),
    Count("max-sequences", "limits.sequences", "16", "Most independent answers to one prompt.", "4", 1),
    Count("max-stop-strings", "limits.stop_strings", "16", "Most stop strings of a request.", "4"),
    Size("max-stop-string-size", "limits.stop_string_size", "256", "Longest stop string.", "64"),
    Count("max-stop-ids", "limits.stop_ids", "128", "Most stop token ids of a request.", "16"),
    Count("max-logit-bias", "limits.logit_bias", "1024", "Most entries of a request's logit_bias.", "300"),
    Count("max-logprobs", "limits.top_logprobs", "20", "Most alternatives listed for a token.", "5"),
    Size("max-request-id-size", "limits.request_id_size", "128", "Longest request id that a client may choose.", "64"),
    Size("max-tenant-size", "limits.tenant_size", "128", "Longest name of a tenant.", "64"),
    Size("max-cache-salt-size", "limits.cache_salt_size", "128", "Longest salt of the prefix cache.", "64"),
    Time("max-queue-wait", "limits.queue_wait", "60s",
         "A request not admitted by then is refused, also where it names no time of its own.", "10s", "1ms"),
    Count("max-unprepared-requests", "limits.unprepared_requests", "512", "Most requests waiting to be tokenized.",
          "64", 1),
    Size("max-unprepared-size", "limits.unprepared_size", "256MiB", "Most bytes of these together.", "64MiB", "1KiB"),
    Size("max-unread-size", "limits.unread_size", "256KiB",
         "A stream whose client leaves more output than this unread is ended.", "1MiB", "1B"),
    Time("max-unread-time", "limits.unread_time", "30s", "So is one whose client takes no message for this long.",
         "10s", "1ms"),
};

}  // namespace

std::span<const Flag> Settings() {
  static const std::vector<Flag> all = [] {
    std::vector<Flag> settings(kSettings.begin(), kSettings.end());
    settings.insert(settings.end(), kLimitSettings.begin(), kLimitSettings.end());
    return settings;
  }();
  return all;
}

std::vector<Flag> SettingsOf(std::span<const std::string_view> groups) {
  std::vector<Flag> chosen;
  for (const Flag& flag : Settings()) {
    if (std::find(groups.begin(), groups.end(), flag.group) != groups.end()) chosen.push_back(flag);
  }
  return chosen;
}

}  // namespace altiplano::cli
