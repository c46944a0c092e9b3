#!/usr/bin/env python3
"""Breaks the CUDA kernels on purpose, one way at a time, and demands that their tests notice each in the simulator.

    mutation_test.py SOURCE_DIR BUILD_DIR [NAME...]

Needs a built cuda_kernels_test: its objects are linked with one kernel compiled from a broken copy. Mutations of RACES
leave values right in most orders; they are tried where BUILD_DIR was configured with ThreadSanitizer, and only they.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile

SYNC = "__syncthreads();"
LONG = "CudaPagedAttention*LongParts*"
# name, file in kernels/cuda, text, replacement, which of several, tests
MUTATIONS = [
    ("norm: no barrier before the warps' sums are read", "rms_norm.h", SYNC, "", 0, "CudaRowOps*"),
    ("norm: not of what the residual was rounded to", "rms_norm.cu",
     "Rounded(sum[i] + waiting.x[i], residual.bf16)", "sum[i] + waiting.x[i]", 0, "CudaRowOps*"),
    ("norm: one warp's sum is left out", "rms_norm.h", "unsigned warp = 0", "unsigned warp = 1", 0, "CudaRowOps*"),
    ("norm: a warp does not come to the barrier", "rms_norm.h", SYNC, "if (threadIdx.x < 64) __syncthreads();", 0,
     "CudaRowOps*"),
    ("all-reduce: no barrier before the flag", "all_reduce.cu", SYNC, "", 0, "CudaAllReduce*"),
    ("all-reduce: no barrier after the wait", "all_reduce.cu", SYNC, "", 1, "CudaAllReduce*"),
    ("all-reduce: the flag is not released", "all_reduce.cu", "ptx::StReleaseSys", "ptx::StRelaxedSys", 0,
     "CudaAllReduce*"),
    ("all-reduce: the flag is not acquired", "all_reduce.cu", "ptx::LdAcquireSys(flag)", "ptx::LdRelaxedSys(flag)", 0,
     "CudaAllReduce*"),
    ("all-reduce: one half of the mailbox", "all_reduce.cu", "MailOffset(call, mail)", "MailOffset(0, mail)", 0,
     "CudaAllReduce*"),
    ("all-reduce: the last rank is not waited for", "all_reduce.cu", "(threadIdx.x) < peers.ranks",
     "(threadIdx.x) < peers.ranks - 1", 0, "CudaAllReduce*"),
    ("all-reduce: the flag of the call before will do", "all_reduce.cu", "- call) >= 0", "- call) >= -1", 0,
     "CudaAllReduce*"),
    ("all-reduce: the second meeting is the first", "all_reduce.cu", "Meet(peers, 1, call)", "Meet(peers, 0, call)", 0,
     "CudaAllReduce*"),
    ("all-reduce: the first block counts the call", "all_reduce.cu", "!= gridDim.x - 1", "!= 0", 0, "CudaAllReduce*"),
    ("all-reduce: another order of the sum", "all_reduce.cu", "MailOf(peers, rank, call, Mail::kMessage, bf16)",
     "MailOf(peers, peers.ranks - rank, call, Mail::kMessage, bf16)", 0, "CudaAllReduce*"),
    ("all-reduce: no end to patience", "all_reduce.cu", "now - first_look > peers.patience_ns", "now == 0", 0,
     "CudaAllReduce*"),
    ("all-reduce: the host's word is not read", "all_reduce.cu", "if (SomebodyHasFailed(peers)) return kLeft;", "", 0,
     "CudaAllReduce*"),
    ("all-reduce and norm: the sum is not rounded", "all_reduce.cu", "Rounded(waiting.x[i], message.x.bf16)",
     "waiting.x[i]", 0, "CudaAllReduce*"),
    ("all-reduce and norm: no barrier between rows", "all_reduce.cu", SYNC, "", 2, "CudaAllReduce*"),
    ("norm: does not wait for the kernel before", "rms_norm.cu", "ptx::WaitForKernelsBefore();", "", 0, "CudaRowOps*"),
    ("silu: threads end without a wait", "silu_mul.cu", "ptx::WaitForKernelsBefore();",
     "if (threadIdx.x < 32) ptx::WaitForKernelsBefore();", 0, "CudaRowOps*"),
    ("embed: the id after the last is taken", "embed.cu", "id < vocab", "id <= vocab", 0, "CudaRowOps*"),
    ("embed: threads beyond the row write", "embed.cu", "if (pack >= packs) return;", "", 0, "CudaRowOps*"),
    ("gather: rows as they come", "gather_rows.cu", "from * x_stride", "row * x_stride", 0, "CudaRowOps*"),
    ("gather: strided loads", "gather_rows.cu", "+ from * x_stride + word)",
     "+ from * x_stride + (word * 2 < words ? word * 2 : word * 2 - words + (words + 1) % 2))", 0,
     "CudaRowOps*Traffic*"),
    ("silu: gate for up", "silu_mul.cu", "at + ffn, up", "at, up", 0, "CudaRowOps*"),
    ("rope: no barrier after the angles", "rope_store_kv.cu", SYNC, "", 0, "CudaRope*"),
    ("rope: turns the other way", "rope_store_kv.cu", "low[i] = x * c.x[i] - y * s.x[i];",
     "low[i] = x * c.x[i] + y * s.x[i];", 0, "CudaRope*"),
    ("rope: stores at slot -1", "rope_store_kv.cu", "if (!is_q && slot < 0) break;", "", 0, "CudaRope*"),
    ("rope: angles in f32", "rope_store_kv.cu", "static_cast<double>(position) * static_cast<double>(frequency)",
     "static_cast<float>(position) * frequency", 0, "CudaRope*"),
    ("attention: scores read before the barrier", "paged_attention.cu", SYNC, "", 1, "CudaPagedAttention*"),
    ("attention: weights read before the barrier", "paged_attention.cu", SYNC, "", 2, "CudaPagedAttention*"),
    ("attention: scores of the next split overwrite weights", "paged_attention.cu", SYNC, "", 3,
     "CudaPagedAttention*"),
    ("attention: the key after its own", "paged_attention.cu", "begin + key < KeysSeen", "begin + key <= KeysSeen", 0,
     "CudaPagedAttention*"),
    ("attention: old and new state exchanged", "paged_attention.cu",
     "Fold(ptx::LdShared(total + r), old_part, sum, new_part)", "Fold(ptx::LdShared(total + r), new_part, sum, old_part)",
     0, "CudaPagedAttention*"),
    ("attention: shared memory is used again too early", "paged_attention.cu", SYNC, "", 6, "CudaPagedAttention*"),
    ("attention: a split begins with the state of the one before", "paged_attention.cu",
     "ptx::StShared(largest + thread, kNoScore);", "", 1, "CudaPagedAttention*"),
    ("combine: states lie as far apart as rows are many", "paged_attention.cu", "(first + n) * cut.stride",
     "(first + n) * cut.rows", 0, LONG),
    ("combine: the last state is left out", "paged_attention.cu", "first + n >= cut.states",
     "first + n + 1 >= cut.states", 1, "CudaPagedAttention*"),
    ("combine: old and new state exchanged", "paged_attention.cu", "Fold(state, old_weight, sums[n], new_weight)",
     "Fold(state, new_weight, sums[n], old_weight)", 0, "CudaPagedAttention*"),
    ("attention: all heads leave their states in one place", "paged_attention.h", "state * args.kv_heads + kv_head",
     "state * args.kv_heads", 0, "CudaPagedAttention*"),
    ("attention: the item after the worker's last is done, too", "paged_attention.h", "ptx::LdGlobal(begins + 1)",
     "ptx::LdGlobal(begins + 1) + 1", 0, "CudaPagedAttention*"),
    ("attention: rows see one key less", "paged_attention.h", "/ args.group + 1 : 0", "/ args.group : 0", 0,
     "CudaPagedAttention*"),
    ("mma attention: no wait for the copies", "paged_attention_mma.cu", "ptx::CpAsyncWait<1>();", "", 0,
     "CudaPagedAttention*"),
    ("mma attention: waits for too few copies", "paged_attention_mma.cu", "CpAsyncWait<1>", "CpAsyncWait<2>", 0,
     "CudaPagedAttention*"),
    ("mma attention: copies into the stage in use", "paged_attention_mma.cu", "[stage ^ 1]", "[stage]", 0,
     "CudaPagedAttention*"),
    ("mma attention: no barrier after the queries", "paged_attention_mma.cu", SYNC, "", 0, "CudaPagedAttention*"),
    ("mma attention: states merged before the barrier", "paged_attention_mma.cu", SYNC, "", 2, "CudaPagedAttention*"),
    ("mma attention: the rows' state changes while it is read", "paged_attention_mma.cu", SYNC, "", 3,
     "CudaPagedAttention*"),
    ("mma attention: shared memory is used again too early", "paged_attention_mma.cu", SYNC, "", 5,
     "CudaPagedAttention*"),
    ("mma attention: every split's state in one place", "paged_attention_mma.cu", "split - tile.first_split", "0", 0,
     "CudaPagedAttention*"),
    ("mma attention: no swizzle", "paged_attention.h", "(chunk ^ (row & 7))", "chunk", 0,
     "CudaPagedAttention*Traffic*"),
    ("mma attention: keys by the pattern of values", "paged_attention_mma.cu",
     "stage[0][ChunkAt<kDim>(lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2)]",
     "stage[0][ChunkAt<kDim>(lane % 16, step * 2 + lane / 16)]", 0, "CudaPagedAttention*"),
    ("mma attention: halves of an operand exchanged", "paged_attention_mma.cu", "weights, {b[0], b[1]}",
     "weights, {b[1], b[0]}", 0, "CudaPagedAttention*"),
    ("mma attention: copies from beyond the context", "paged_attention_mma.cu", "inside = first_key + key < end",
     "inside = true", 0, "CudaPagedAttention*"),
    ("mma attention: the key after its own", "paged_attention_mma.cu", "key < seen[row]", "key <= seen[row]", 0,
     "CudaPagedAttention*"),
    ("mma attention: old sums keep their scale", "paged_attention_mma.cu", "own.sums[n][2 * row + 1] *= kept;", "", 0,
     "CudaPagedAttention*"),
    ("prefill: slots are filled before they are empty", "paged_attention_hopper.cu", "if (turn >= kSlots)", "if (false)", 0,
     LONG),
    ("prefill: waits for the other phase of an empty slot", "paged_attention_hopper.cu", "ParityOf(turn) ^ 1",
     "ParityOf(turn)", 0, LONG),
    ("prefill: waits for the other phase of a full slot", "paged_attention_hopper.cu",
     "full[SlotOf(turn)], ParityOf(turn));", "full[SlotOf(turn)], ParityOf(turn) ^ 1);", 0, LONG),
    ("prefill: no wait for a full slot", "paged_attention_hopper.cu", "Await(shared, turn + 1);", "", 0, LONG),
    ("prefill: no wait for the next full slot", "paged_attention_hopper.cu", "Await(shared, turn + 2);", "", 0, LONG),
    ("prefill: old sums keep their scale where one row's changes", "paged_attention_hopper.cu",
     "kept[0] != 1 || kept[1] != 1", "kept[0] != 1 && kept[1] != 1", 0, LONG),
    ("prefill: a slot is not released", "paged_attention_hopper.cu", "Release(shared, turn + 1);", "", 0, LONG),
    ("prefill: keys are released before their scores are there", "paged_attention_hopper.cu",
     "ptx::WgmmaWait<1>(scores); Release(shared, turn);", "Release(shared, turn); ptx::WgmmaWait<1>(scores);", 0, LONG),
    ("prefill: values are released before they are added", "paged_attention_hopper.cu",
     "ptx::WgmmaWait<0>(sums, weights); Release(shared, turn + 1);",
     "Release(shared, turn + 1); ptx::WgmmaWait<0>(sums, weights);", 0, LONG),
    ("prefill: expects too few bytes", "paged_attention_hopper.cu", "sizeof(shared.ring[0]))", "sizeof(shared.ring[0]) / 2)",
     0, LONG),
    ("prefill: a warp's arrival is not counted", "paged_attention_hopper.cu", "&shared.empty[slot], kPrefillConsumers",
     "&shared.empty[slot], kPrefillConsumers - 1", 0, LONG),
    ("prefill: a warpgroup without rows releases nothing", "paged_attention_hopper.cu", "turn < end_turn", "false", 0,
     LONG),
    ("prefill: the keys that a warpgroup does not see are taken for values", "paged_attention_hopper.cu",
     "if (runs < all_runs)", "if (false)", 0, LONG),
    ("prefill: values beyond the context stay", "paged_attention_hopper.cu",
     "ClearFrom(shared, SlotOf(turn), last);", "", 0, LONG),
    ("prefill: no proxy fence after the values are cleared", "paged_attention_hopper.cu", "ptx::FenceProxyAsync();", "", 0,
     LONG),
    ("prefill: no proxy fence after the mbarriers' initialization", "paged_attention_hopper.cu",
     "ptx::FenceProxyAsync();", "", 1, LONG),
    ("prefill: the last values are given away before all lanes have cleared them", "paged_attention_hopper.cu",
     "__syncwarp();", "", 0, LONG),
    ("prefill: no wgmma.fence", "paged_attention_hopper.cu", "ptx::WgmmaFence(scores, sums, weights);", "", 0, LONG),
    ("prefill: scores used before they are there", "paged_attention_hopper.cu", "ptx::WgmmaWait<1>(scores);", "", 0, LONG),
    ("prefill: weights change while they are read", "paged_attention_hopper.cu", "ptx::WgmmaWait<0>(sums, weights);", "", 0,
     LONG),
    ("prefill: the last values are not waited for", "paged_attention_hopper.cu", "ptx::WgmmaWait<0>(sums, weights);", "", 1,
     LONG),
    ("prefill: steps along the head by half", "paged_attention_hopper.cu", "step % 4 * 32", "step % 4 * 16", 0, LONG),
    ("prefill: atoms of keys at the wrong stride", "paged_attention_hopper.cu", "kLeadingUnused, kAtomBytes",
     "kLeadingUnused, kAtomBytes / 2", 0, LONG),
    ("prefill: boxes of values at the wrong stride", "paged_attention_hopper.cu", "kBoxBytes, kAtomBytes",
     "kAtomBytes, kAtomBytes", 0, LONG),
    ("prefill: values taken for K-major", "paged_attention_hopper.cu", "Wgmma<true>", "Wgmma<false>", 0, LONG),
    ("prefill: the second box at the first's columns", "paged_attention_hopper.cu", "64 * box", "0 * box", 0, LONG),
    ("prefill: old sums keep their scale", "paged_attention_hopper.cu", "sums[i] *= kept[i / 2 % 2];", ";", 0, LONG),
    ("prefill: the key after its own", "paged_attention_hopper.cu", ">= rows.seen", "> rows.seen", 0, LONG),
    ("prefill: the page before the last is loaded again", "paged_attention_hopper.cu", "Fill(shared, turn, values, row,",
     "Fill(shared, turn, values, row - kKeys,", 0, LONG),
    ("prefill: a row that sees nothing of a split has no weights", "paged_attention_hopper.cu",
     "largest == kNoScore ? 0.0f : largest", "largest", 0, LONG),
    ("prefill: the splits before are lost", "paged_attention_hopper.cu", "if (split > 0) FoldSplit",
     "if (false) FoldSplit", 0, LONG),
    ("prefill: old and new state exchanged", "paged_attention_hopper.cu",
     "Fold(ptx::FloatOfBits(parts[j]), old_weight[j / 2], sum, new_weight[j / 2])",
     "Fold(ptx::FloatOfBits(parts[j]), new_weight[j / 2], sum, old_weight[j / 2])", 0, LONG),
    ("prefill: a split begins with the sums of the one before", "paged_attention_hopper.cu", "sums[i] = 0;", ";", 0,
     LONG),
    ("prefill ping-pong: a turn is not passed on", "paged_attention_hopper.cu", "PassTensorCores(turns, key);", "",
     0, LONG),
    ("prefill ping-pong: the first turn of a split is not passed on", "paged_attention_hopper.cu",
     "PassTensorCores(turns, first_key);", "", 0, LONG),
    ("prefill ping-pong: nobody has the first turn", "paged_attention_hopper.cu",
     "if (turns.warpgroup == 1) PassTensorCores", "if (false) PassTensorCores", 0, LONG),
    ("prefill ping-pong: both have the first turn", "paged_attention_hopper.cu",
     "if (turns.warpgroup == 1) PassTensorCores", "PassTensorCores", 0, LONG),
    ("prefill ping-pong: each waits for the other's turn", "paged_attention_hopper.cu", "kPingPong + turns.warpgroup,",
     "kPingPong + 1 - turns.warpgroup,", 0, LONG),
    ("prefill ping-pong: one barrier for both", "paged_attention_hopper.cu", "kPingPong + turns.warpgroup,", "kPingPong,", 0,
     LONG),
    ("prefill ping-pong: a turn for one warpgroup", "paged_attention_hopper.cu", "turns.warpgroup, kConsumers",
     "turns.warpgroup, kConsumers / 2", 0, LONG),
    ("prefill ping-pong: turns by half of the threads", "paged_attention_hopper.cu", "kConsumers = 32 * kPrefillConsumers",
     "kConsumers = 16 * kPrefillConsumers", 0, LONG),
    ("prefill ping-pong: another count on each side", "paged_attention_hopper.cu", "1 - turns.warpgroup, kConsumers",
     "1 - turns.warpgroup, kConsumers + 32", 0, LONG),
    ("prefill ping-pong: a warpgroup leaves before its last turn", "paged_attention_hopper.cu",
     "if (first_key < turns.end)", "if (first_key + kKeys < turns.end)", 0, LONG),
    ("prefill ping-pong: the last turn is passed on to nobody", "paged_attention_hopper.cu",
     "first_key + turns.warpgroup * kKeys < turns.end", "first_key < turns.end", 0, LONG),
    ("prefill ping-pong: turns with one that sees no more keys", "paged_attention_hopper.cu",
     "SmallerOf(KeysSeen(args, tile, kGroupRows - 1), end) : 0", "end : 0", 0, LONG),
    ("prefill ping-pong: turns with one that has no rows", "paged_attention_hopper.cu",
     "tile.rows > kGroupRows ? SmallerOf(KeysSeen(args, tile, kGroupRows - 1), end) : 0",
     "SmallerOf(KeysSeen(args, tile, SmallerOf(kGroupRows, tile.rows) - 1), end)", 0, LONG),
    ("prefill ping-pong: no wait for the turn", "paged_attention_hopper.cu", "TakeTensorCores(turns, key);", "", 0, LONG),
    ("prefill ping-pong: passed on before the wgmmas", "paged_attention_hopper.cu",
     "IssueSums<kDim>(sums, weights, shared.ring[SlotOf(turn + 1)]); PassTensorCores(turns, key);",
     "PassTensorCores(turns, key); IssueSums<kDim>(sums, weights, shared.ring[SlotOf(turn + 1)]);", 0, LONG),
    ("prefill ping-pong: no turns", "paged_attention_hopper.cu", "tile.rows > kGroupRows ?", "false ?", 0, LONG),
    ("linear: no barrier before the warps' sums", "linear.cu", SYNC, "", 0, "CudaLinear*"),
    ("linear: operands disagree on K", "linear.cu", "{b.x, b.y}", "{b.y, b.x}", 0, "CudaLinear*"),
    ("linear: columns beyond N are loaded", "linear.cu", "k < args.k && ColumnOf(args, group, row + 8 * half) < args.n",
     "k < args.k", 0, "CudaLinear*"),
    ("linear: K beyond its end is loaded", "linear.cu", "k < args.k && token < args.tokens", "token < args.tokens", 0,
     "CudaLinear*"),
    ("linear: one warp's sum is left out", "linear.cu", "int w = 0; w", "int w = 1; w", 0, "CudaLinear*"),
    ("linear: does not accumulate", "linear.h", "sums[i] += before[i];", ";", 0, "CudaLinear*"),
    ("linear: gate for up", "linear.cu", "sum_of(token, at + 8)", "sum_of(token, at)", 0, "CudaLinear*SiluMul*"),
    ("linear: gate and up are not rounded", "linear.h", "Silu(Rounded(gate, args.x.bf16))", "Silu(gate)", 0,
     "CudaLinear*SiluMul*"),
    ("tiles: multiplied before the barrier", "linear_tiles.cu", SYNC, "", 0, "CudaLinear*"),
    ("tiles: the result is read before the barrier", "linear_tiles.cu", SYNC, "", 1, "CudaLinear*"),
    ("tiles: waits for too few copies", "linear_tiles.cu", "CpAsyncWait<kTileStages - 2>",
     "CpAsyncWait<kTileStages - 1>", 0, "CudaLinear*"),
    ("tiles: parts are added up as one", "linear_tiles.cu", "++step_of_part == steps_of_part", "step + 1 == steps", 0,
     "CudaLinear*ARow*"),
    ("tiles: a part begins with the last one's sum", "linear_tiles.cu", "d[i / 16][i / 4 % 4][i % 4] = 0;", "", 0,
     "CudaLinear*"),
    ("tiles: no swizzle", "linear_tiles.cu", "(chunk ^ (row & 1) * (kChunks / 2))", "chunk", 0, "CudaLinear*Traffic*"),
    ("tiles: tokens beyond T are loaded", "linear_tiles.cu", "k < args.k && first_token + row < args.tokens",
     "k < args.k", 0, "CudaLinear*"),
    ("tiles: weights beyond N are loaded", "linear_tiles.cu", "k < args.k && ColumnOf(args, group, row % 16) < args.n",
     "k < args.k", 0, "CudaLinear*"),
    ("tiles: K beyond its end is loaded", "linear_tiles.cu", "k < args.k && first_token + row < args.tokens",
     "first_token + row < args.tokens", 0, "CudaLinear*"),
    ("tiles: gate for up", "linear_tiles.cu", "LoadFour(from + 8, up)", "LoadFour(from, up)", 0,
     "CudaLinear*SiluMul*"),
    ("sample: warps' sums read before the barrier", "sample.cu", SYNC, "", 0, "CudaSample*"),
    ("sample: warps' sums written before all have read the last", "sample.cu", SYNC, "", 1, "CudaSample*"),
    ("sample: warps' maxima read before the barrier", "sample.cu", SYNC, "", 2, "CudaSample*"),
    ("sample: read whether it is the last block before the barrier", "sample.cu", SYNC, "", 8, "CudaSample*"),
    ("sample: bins counted before they are empty", "sample.cu", SYNC, "", 9, "CudaSample*"),
    ("sample: bins read before they are counted", "sample.cu", SYNC, "", 10, "CudaSample*"),
    ("sample: bins emptied before all have read them", "sample.cu", SYNC, "", 11, "CudaSample*Equal*"),
    ("sample: the slices' weights read before all are there", "sample.cu", SYNC, "", 12, "CudaSample*"),
    ("sample: the most probable read before all are there", "sample.cu", SYNC, "", 13, "CudaSample*"),
    ("sample: the first block concludes", "sample.cu", "== gridDim.x - 1", "== 0", 0, "CudaSample*"),
    ("sample: the next kernel counts blocks on", "sample.cu",
     "if (last) ptx::StGlobal(&row.memory.state.blocks_ended, 0u);", "", 0, "CudaSample*"),
    ("sample: the next search finds bins full", "sample.cu", "ptx::StGlobal(&row.memory.bins[bin], 0ull);", "", 0,
     "CudaSample*"),
    ("sample: counts are not atomic", "sample.cu",
     "ptx::AddShared(&bins[(key >> shift) & static_cast<uint32_t>(BinsOf(level) - 1)],",
     "[](auto* to, auto x) { const auto before = ptx::LdShared(to); __syncwarp(1u << threadIdx.x % 32); "
     "ptx::StShared(to, before + x); }(&bins[(key >> shift) & static_cast<uint32_t>(BinsOf(level) - 1)],", 0,
     "CudaSample*"),
    ("sample: one block's counts stand for all", "sample.cu", "ptx::AddGlobalInAnyOrder(&row.memory.bins[bin], amount)",
     "ptx::StGlobal(&row.memory.bins[bin], amount)", 0, "CudaSample*"),
    ("sample: elements of other prefixes are counted", "sample.cu", "(key ^ known) >> ShiftOf(level - 1) != 0", "false", 0,
     "CudaSample*"),
    ("sample: one tie too many", "sample.cu", "}).index + 1};", "}).index + 2};", 0, "CudaSample*"),
    ("sample: all ties are kept", "sample.cu", "if (before_last + 1 >= held / each)", "if (true)", 0, "CudaSample*"),
    ("sample: the higher of equal ids", "sample.cu", "b.index < a.index", "b.index > a.index", 0, "CudaSample*"),
    ("sample: the most probable of equals in another order", "sample.cu", "other.index < mine.index",
     "other.index > mine.index", 0, "CudaSample*"),
    ("sample: drawn in the first slice", "sample.cu", "for (; target >= ptx::LdShared(&weights[holder]); ++holder)", "if (false)",
     0, "CudaSample*"),
    ("sample: does not wait for the kernel before", "sample.cu", "ptx::WaitForKernelsBefore();", "", 0, "CudaSample*"),
    ("sample: a block's slice begins one too late", "sample.cu", "begin = static_cast<int>(blockIdx.x) * memory.slice;",
     "begin = static_cast<int>(blockIdx.x) * (memory.slice + 1);", 0, "CudaSample*"),
]
RACES = [
    ("all-reduce: no barrier before the flag", "all_reduce.cu", SYNC, "", 0, "CudaAllReduce*Sums*"),
    ("all-reduce: no barrier after the wait", "all_reduce.cu", SYNC, "", 1, "CudaAllReduce*Sums*"),
    ("all-reduce: the flag is not released", "all_reduce.cu", "ptx::StReleaseSys", "ptx::StRelaxedSys", 0,
     "CudaAllReduce*Sums*"),
    ("all-reduce: one half of the mailbox", "all_reduce.cu", "MailOffset(call, mail)", "MailOffset(0, mail)", 0,
     "CudaAllReduce*Calls*"),
    ("attention: the state before the barrier", "paged_attention.cu", SYNC, "", 0, "CudaPagedAttention*DecodeIs*"),
    ("attention: scores read before the barrier", "paged_attention.cu", SYNC, "", 1, "CudaPagedAttention*DecodeIs*"),
    ("mma attention: no __syncwarp before the stage is filled again", "paged_attention_mma.cu", "__syncwarp();", "", 1,
     "CudaPagedAttention*DecodeIs*"),
    ("mma attention: no __syncwarp after the wait", "paged_attention_mma.cu", "__syncwarp();", "", 0,
     "CudaPagedAttention*DecodeIs*"),
    ("mma attention: the last state is read before the barrier", "paged_attention_mma.cu", SYNC, "", 4,
     "CudaPagedAttention*DecodeIs*"),
    ("prefill: a slot is released before all lanes are done", "paged_attention_hopper.cu", "__syncwarp();", "", 1, LONG),
    ("prefill: queries read before all lanes have stored them", "paged_attention_hopper.cu", "__syncwarp();", "", 2, LONG),
    ("prefill: results are stored before all lanes have read their sums", "paged_attention_hopper.cu", "__syncwarp();",
     "", 3, LONG),
    ("prefill: results read before all lanes have stored them", "paged_attention_hopper.cu", "__syncwarp();", "", 4, LONG),
    ("prefill: slots are filled before they are empty", "paged_attention_hopper.cu", "if (turn >= kSlots)", "if (false)", 0,
     LONG),
    ("norm: no barrier before the warps' sums are read", "rms_norm.h", SYNC, "", 0, "CudaRowOps*RmsNormIs*"),
    ("sample: warps' maxima written before all have read the last", "sample.cu", SYNC, "", 3, "CudaSample*Equal*"),
    ("sample: a block has come before its threads have stored", "sample.cu", SYNC, "", 7, "CudaSample*Equal*"),
    ("sample: that a block has come orders nothing", "sample.cu", "ptx::AddGlobal(&row.memory.state.blocks_ended, 1u)",
     "std::atomic_ref(row.memory.state.blocks_ended).fetch_add(1u, std::memory_order_relaxed)", 0, "CudaSample*Equal*"),
]


def commands_of(build):
    """How one kernel is compiled for the simulator, and how the test is linked."""
    commands = subprocess.run(["ninja", "-C", build, "-t", "commands", "cuda_kernels_test"], check=True,
                              capture_output=True, text=True).stdout.splitlines()
    compile_ = next(c for c in commands if "cuda_simulator.dir/__/embed.cu.o -c" in c)
    link = next(c for c in reversed(commands) if " -o tests/cuda_kernels_test" in c)
    return compile_, re.sub(r"^: && | && :$", "", link).removeprefix("ccache ")


def nth(text, pattern, n):
    matches = list(re.finditer(pattern, text))
    return matches[n] if n < len(matches) else None


def caught(source, build, scratch, name, file, old, new, which, tests):
    folder = source / "kernels/cuda"
    text = (folder / file).read_text()
    # Formatting may have moved the text's line breaks.
    match = nth(text, r"\s+".join(re.escape(word) for word in old.split()), which)
    if match is None:
        return f"the text to break is no longer in {file}: {old}"
    copy = scratch / "kernels/cuda" / file
    copy.parent.mkdir(parents=True)
    copy.write_text(text[:match.start()] + new + text[match.end():])
    compile_, link = commands_of(build)
    # A header is broken for all kernels that include it.
    kernels = [file] if file.endswith(".cu") else [
        path.name for path in folder.glob("*.cu") if f'"kernels/cuda/{file}"' in path.read_text()]
    objects = []
    for kernel in kernels:
        origin = copy if kernel == file else folder / kernel
        objects.append(f"{scratch}/{kernel}.o")
        line = re.sub(r" -MD| -M[TF] \S+", "", compile_.replace(str(folder / "embed.cu"), str(origin)))
        line = re.sub(r" -o \S+", f" -o {objects[-1]}", line).replace("-Werror", "-w")
        line = line.replace(f"-I{source}", f"-I{scratch} -I{source}", 1)
        subprocess.run(line, shell=True, cwd=build, check=True)
    link = link.replace(" -o tests/cuda_kernels_test", f" {' '.join(objects)} -o {scratch}/test")
    subprocess.run(link, shell=True, cwd=build, check=True)
    env = dict(os.environ, TSAN_OPTIONS="halt_on_error=1")
    run = subprocess.run([scratch / "test", f"--gtest_filter={tests}", "--gtest_fail_fast"], env=env,
                         capture_output=True, text=True, errors="replace", timeout=300)
    if run.returncode == 0:
        return "NOT caught"
    output = run.stdout + run.stderr
    said = next((match for pattern in (r"deadlock in .*", r"kernel \w+, block .*", r"SUMMARY: .*", r"The difference .*",
                                       r"\S+: Failure") if (match := re.search(pattern, output))), None)
    print(f"caught: {name}: {said.group(0)[:160] if said else run.returncode}", flush=True)
    return None


def main():
    source, build = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    wanted = sys.argv[3:]
    tsan = "ALTIPLANO_SANITIZE:STRING=thread" in (build / "CMakeCache.txt").read_text()
    survivors = []
    for mutation in RACES if tsan else MUTATIONS:
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
