#include "tests/kernels/cuda/ptx/program_testlib.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <optional>
#include <utility>

namespace altiplano::ptx_machine {
namespace {

std::string_view Trim(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())) != 0) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())) != 0) text.remove_suffix(1);
  return text;
}
bool Holds(std::string_view text, std::string_view part) {
  return text.find(part) != text.npos;
}
// The next word of a declaration, which is then gone from it.
std::string_view TakeWord(std::string_view* text) {
  *text = Trim(*text);
  size_t end = 0;
  while (end < text->size() && std::isspace(static_cast<unsigned char>((*text)[end])) == 0) ++end;
  const std::string_view word = text->substr(0, end);
  *text = Trim(text->substr(end));
  return word;
}
// At commas outside of braces and brackets.
std::vector<std::string_view> SplitOperands(std::string_view text) {
  std::vector<std::string_view> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : ',';
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (c != ',' || depth > 0) continue;
    if (const std::string_view part = Trim(text.substr(begin, i - begin)); !part.empty()) parts.push_back(part);
    begin = i + 1;
  }
  return parts;
}
std::string_view Inside(std::string_view text) {  // of braces or brackets
  return Trim(text.substr(1, text.size() - 2));
}

// .b16 and the like.
uint8_t BytesOfType(std::string_view type) {
  if (type.ends_with("64")) return 8;
  if (type.ends_with("32") || type.ends_with("x2")) return 4;
  if (type.ends_with("16")) return 2;
  return type.ends_with("8") ? 1 : 0;
}

struct Variable {
  uint32_t align = 1, bytes = 0;
  std::string name;
};
// ".align 8 .b8 name[24]", ".u64 name"; of "name[]" 0 bytes.
Variable ReadVariable(std::string_view text) {
  Variable variable;
  uint32_t of_element = 0;
  while (text.starts_with(".")) {
    const std::string_view word = TakeWord(&text);
    if (word == ".align") {
      const std::string_view align = TakeWord(&text);
      std::from_chars(align.data(), align.data() + align.size(), variable.align);
    } else if (BytesOfType(word) != 0) {
      of_element = BytesOfType(word);
    }
  }
  variable.align = std::max(variable.align, of_element);
  uint32_t count = 1;
  if (const size_t bracket = text.find('['); bracket != text.npos) {
    count = 0;
    std::from_chars(text.data() + bracket + 1, text.data() + text.size(), count);
    text = text.substr(0, bracket);
  }
  variable.bytes = of_element * count;
  variable.name = std::string(Trim(text));
  return variable;
}

// Moves vanish, parameters are operands, and how often waiting threads ask is chance; integers of 64 bits are two of
// 32, and divisions are sequences.
uint8_t IssueSlotsOf(std::string_view name) {
  const auto begins = [&](std::string_view prefix) { return name.starts_with(prefix); };
  if (begins("mov.") || begins("cvta.") || begins("ld.param.") || begins("mbarrier.try_wait.")) return 0;
  if (begins("div.") || begins("rem.")) return name.ends_with(".f32") ? 9 : 20;
  const bool accesses = begins("ld.") || begins("st.") || begins("atom.") || begins("mbarrier.") || begins("cp.");
  return name.ends_with("64") && !accesses ? 2 : 1;
}

class Reader {
 public:
  Reader(std::string file, std::vector<std::string>* errors) : file_(std::move(file)), errors_(errors) {}

  std::map<std::string, Kernel> Read(std::string_view text) {
    // Statements end with a semicolon, but for labels, scopes, and a kernel's head before its body.
    std::string statement;
    for (size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      if (text.substr(i).starts_with("//")) {
        i = std::min(text.find('\n', i), text.size() - 1);
        ++line_;
        continue;
      }
      if (c == '\n') ++line_;
      const std::string_view so_far = Trim(statement);
      const bool header =
          so_far.starts_with(".version") || so_far.starts_with(".target") || so_far.starts_with(".address_size");
      const bool head_of_kernel = Holds(so_far, ".entry");
      if (c == ';' || (header && c == '\n')) {
        if (!header) Statement(so_far);
      } else if (c == '{' && (so_far.empty() || head_of_kernel)) {
        if (head_of_kernel) BeginKernel(so_far);
        scopes_.emplace_back();
      } else if (c == '}' && so_far.empty()) {
        scopes_.pop_back();
        if (scopes_.empty()) EndKernel();
      } else if (c == ':' && kernel_ != nullptr && !Holds(so_far, " ") && !Holds(so_far, ".")) {
        const int here = static_cast<int>(kernel_->code.size());
        if (!labels_.try_emplace(std::string(so_far), here).second) Fail("a label twice", so_far);
      } else {
        statement += c;
        continue;
      }
      statement.clear();
    }
    return std::move(kernels_);
  }

 private:
  struct Declared {
    Register at;
    uint8_t bytes;  // 0: a predicate
  };

  void Fail(std::string_view what, std::string_view text) {
    errors_->push_back(file_ + ":" + std::to_string(line_) + ": " + std::string(what) + ": " + std::string(text));
  }

  void BeginKernel(std::string_view head) {
    const size_t open = head.find('('), close = head.rfind(')');
    std::string_view before = head.substr(0, open);
    before = Trim(before.substr(before.rfind(".entry") + 6));
    kernel_ = &kernels_[WithoutHashes(std::string(before))];
    kernel_->name = std::string(before);
    kernel_->file = file_;
    parameters_.clear();
    if (open != head.npos) {
      for (std::string_view each : SplitOperands(head.substr(open + 1, close - open - 1))) {
        TakeWord(&each);  // .param
        const Variable variable = ReadVariable(each);
        uint32_t& at = kernel_->parameter_bytes;
        at = (at + variable.align - 1) / variable.align * variable.align;
        kernel_->parameters.push_back(variable.bytes);
        kernel_->parameter_begin.push_back(at);
        parameters_[variable.name] = at;
        at += variable.bytes;
      }
    }
    if (const size_t most = head.find(".maxntid"); most != head.npos) {
      const char* number = head.data() + most + 9;
      std::from_chars(number, head.data() + head.size(), kernel_->most_threads);
    }
    scopes_.clear();
    labels_.clear();
    branches_.clear();
    constants_.clear();
    of_kernel_.clear();
    shared_.clear();
  }

  void EndKernel() {
    for (const auto& [index, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) Fail("no such label", label);
      if (found != labels_.end()) kernel_->code[index].target = found->second;
    }
    // A body may end without a word.
    Instruction end;
    end.op = Op::kExit;
    end.line = line_;
    kernel_->code.push_back(end);
    kernel_ = nullptr;
  }

  Register Take(uint32_t bytes) {
    const Register at = kernel_->register_bytes;
    kernel_->register_bytes += bytes;
    return at;
  }
  Declared Declare(uint8_t bytes) { return {Take(bytes == 0 ? 4 : std::max<uint32_t>(bytes, 4) * kLanes), bytes}; }

  void DeclareRegisters(std::string_view text) {
    TakeWord(&text);  // .reg
    const std::string_view type = TakeWord(&text);
    const uint8_t bytes = BytesOfType(type);
    if (bytes == 0 && type != ".pred") return Fail("a type of registers that is not known", type);
    for (std::string_view name : SplitOperands(text)) {
      int count = -1;
      if (const size_t open = name.find('<'); open != name.npos) {
        std::from_chars(name.data() + open + 1, name.data() + name.size(), count);
        name = name.substr(0, open);
      }
      for (int i = 0; i < std::max(count, 1); ++i) {
        scopes_.back()[std::string(name) + (count < 0 ? "" : std::to_string(i))] = Declare(bytes);
      }
    }
  }

  void DeclareShared(std::string_view text) {
    const bool dynamic = text.starts_with(".extern");
    if (dynamic) TakeWord(&text);
    TakeWord(&text);  // .shared
    const Variable variable = ReadVariable(text);
    (kernel_ == nullptr ? of_file_ : of_kernel_)[variable.name] = {variable, dynamic};
  }

  const Declared* FindRegister(std::string_view name) {
    for (size_t i = scopes_.size(); i > 0; --i) {
      const auto found = scopes_[i - 1].find(std::string(name));
      if (found != scopes_[i - 1].end()) return &found->second;
    }
    return nullptr;
  }
  Register Constant(uint64_t bits, bool wide) {
    const auto [found, added] = constants_.try_emplace({bits, wide});
    if (added) {
      found->second = Take((wide ? 8 : 4) * kLanes);
      kernel_->constants.push_back({found->second, bits, wide});
    }
    return found->second;
  }
  Register Special(std::string_view name, bool wide) {
    const auto [found, added] = kernel_->special.try_emplace({std::string(name), wide});
    if (added) found->second = Take((wide ? 8 : 4) * kLanes);
    return found->second;
  }
  // Where a variable in shared memory lies, the first time that the kernel names it.
  std::optional<Register> Shared(std::string_view name, bool wide) {
    for (auto* known : {&of_kernel_, &of_file_}) {
      const auto found = known->find(std::string(name));
      if (found == known->end()) continue;
      const auto& [variable, dynamic] = found->second;
      if (dynamic) return Special("%dynamic", wide);
      const auto [at, added] = shared_.try_emplace(variable.name, kernel_->shared_bytes);
      if (added) {
        at->second = (at->second + variable.align - 1) / variable.align * variable.align;
        kernel_->shared_bytes = at->second + variable.bytes;
      }
      return Constant(kSharedBegin + at->second, wide);
    }
    return std::nullopt;
  }

  static std::optional<uint64_t> Number(std::string_view text) {
    uint64_t value = 0;
    const bool negative = text.starts_with("-");
    if (negative) text.remove_prefix(1);
    int base = 10;
    if (text.starts_with("0f") || text.starts_with("0d") || text.starts_with("0x") || text.starts_with("0F") ||
        text.starts_with("0D")) {
      text.remove_prefix(2);
      base = 16;
    }
    if (text.ends_with("U")) text.remove_suffix(1);
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
    if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
    return negative ? -value : value;
  }

  int64_t ReadNumber(std::string_view text) {
    const auto number = Number(text);
    if (!number.has_value()) Fail("not a number", text);
    return static_cast<int64_t>(number.value_or(0));
  }

  // bytes: 0 for a predicate.
  Register Operand(std::string_view text, uint8_t bytes) {
    if (text.starts_with("[")) text = Inside(text);
    if (const Declared* found = FindRegister(text)) {
      if ((found->bytes == 0) != (bytes == 0) || (bytes == 8) != (found->bytes == 8)) {
        Fail("a register of another width than the instruction's", text);
      }
      return found->at;
    }
    const bool wide = bytes == 8;
    if (text == "WARP_SZ") return Constant(kLanes, wide);
    if (const auto number = Number(text); number.has_value()) return Constant(*number, wide);
    if (const auto shared = Shared(text, wide); shared.has_value()) return *shared;
    if (const auto found = parameters_.find(std::string(text)); found != parameters_.end()) {
      return Constant(found->second, wide);
    }
    static constexpr std::array kSpecial = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                            "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                            "%nctaid.y", "%nctaid.z", "%laneid"};
    if (std::find(kSpecial.begin(), kSpecial.end(), text) != kSpecial.end()) return Special(text, false);
    Fail("an operand that is not known", text);
    return 0;
  }

  // "[%rd1+16]", "[name_param_0]": a register and an offset, in the instruction's space.
  void Address(std::string_view text, Instruction* to) {
    if (!text.starts_with("[")) return Fail("not an address", text);
    text = Inside(text);
    const size_t sign = text.find_first_of("+-", 1);
    std::string_view base = Trim(text.substr(0, sign));
    if (sign != text.npos) {
      std::string_view offset = Trim(text.substr(sign + (text[sign] == '+' ? 1 : 0)));
      to->offset = ReadNumber(offset);
    }
    const Declared* found = FindRegister(base);
    to->wide_address = to->space == Space::kGlobal || (found != nullptr && found->bytes == 8);
    to->operands.push_back(Operand(base, to->wide_address ? 8 : 4));
  }

  void Statement(std::string_view text) {
    if (text.empty() || text.starts_with(".pragma")) return;
    if (text.starts_with(".reg")) return DeclareRegisters(text);
    if (text.starts_with(".shared") || text.starts_with(".extern .shared")) return DeclareShared(text);
    if (kernel_ == nullptr || text.starts_with(".")) return Fail("a declaration that is not known", text);
    Instruction made;
    made.line = line_;
    if (text.starts_with("@")) {
      std::string_view guard = TakeWord(&text).substr(1);
      made.guarded = true;
      made.guard_negated = guard.starts_with("!");
      if (made.guard_negated) guard.remove_prefix(1);
      made.guard = Operand(guard, 0);
    }
    const std::string name(TakeWord(&text));
    const std::vector<std::string_view> operands = SplitOperands(text);
    if (!Decode(name, operands, &made)) Fail("an instruction that is not known", name + " " + std::string(text));
    made.issue_slots = IssueSlotsOf(name);
    kernel_->code.push_back(std::move(made));
  }

  void Parts(std::string_view braces, uint8_t bytes, Instruction* to) {
    for (const std::string_view each : SplitOperands(Inside(braces))) to->operands.push_back(Operand(each, bytes));
  }

  bool Decode(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    const auto begins = [&](std::string_view prefix) { return name.starts_with(prefix); };
    if (name == "bra" || name == "bra.uni") {
      to->op = Op::kBranch;
      branches_.emplace_back(kernel_->code.size(), std::string(of[0]));
      return true;
    }
    if (name == "ret" || name == "exit") return to->op = Op::kExit, true;
    if (name == "trap") return to->op = Op::kTrap, true;
    if (name == "griddepcontrol.wait" || name == "griddepcontrol.launch_dependents" || begins("fence.") ||
        begins("membar.") || begins("cp.async.bulk.prefetch.L2.global")) {
      return to->op = Op::kNothing, true;
    }
    if (begins("mov.b") && (of[0].starts_with("{") || of[1].starts_with("{"))) return DecodeMove(name, of, to);
    if (name == "mov.u64" && of[1] == "%globaltimer") {
      to->op = Op::kTimer;
      to->operands = {Operand(of[0], 8)};
      return true;
    }
    if (name == "cvta.param.u64") return DecodeLanes("add.s64", {of[0], of[1], "%parameters"}, to);
    if (begins("ld.") || begins("st.")) return DecodeAccess(name, of, to);
    if (begins("atom.")) return DecodeAtomic(name, of, to);
    if (begins("bar.sync") || begins("bar.arrive")) {
      to->op = begins("bar.sync") ? Op::kBarrierSync : Op::kBarrierArrive;
      for (const std::string_view each : of) to->operands.push_back(Operand(each, 4));
      return true;
    }
    if (begins("shfl.sync.")) return DecodeShuffle(name, of, to);
    return DecodeLanes(name, of, to) || DecodeWarp(name, of, to) || DecodeAsync(name, of, to);
  }

  bool DecodeLanes(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    const LaneOperation* found = FindLaneOperation(name);
    if (found == nullptr || found->operand_bytes.size() != of.size()) return false;
    to->op = Op::kEachLane;
    to->function = found->function;
    for (size_t i = 0; i < of.size(); ++i) {
      to->operands.push_back(of[i] == "%parameters" ? Special(of[i], true) : Operand(of[i], found->operand_bytes[i]));
    }
    return true;
  }

  // The whole first.
  bool DecodeMove(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    const bool apart = of[0].starts_with("{");
    const uint8_t bytes = BytesOfType(name);
    to->op = Op::kMove;
    to->register_bytes = bytes;
    to->apart = apart;
    to->operands.push_back(Operand(of[apart ? 1 : 0], bytes));
    Parts(of[apart ? 0 : 1], bytes / 2, to);
    to->count = static_cast<uint8_t>(to->operands.size() - 1);
    to->bytes = static_cast<uint8_t>(bytes / to->count);
    return to->count == 2;
  }

  bool DecodeAccess(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    const bool load = name.starts_with("ld.");
    to->op = load ? Op::kLoad : Op::kStore;
    if (Holds(name, ".shared")) {
      to->space = Space::kShared;
    } else if (Holds(name, ".param")) {
      to->space = Space::kParam;
    } else if (!Holds(name, ".global")) {
      return false;
    }
    to->orders = Holds(name, ".acquire") || Holds(name, ".release");
    to->among_gpus = to->orders || Holds(name, ".relaxed");
    const std::string type = name.substr(name.rfind('.'));
    to->bytes = BytesOfType(type);
    to->is_signed = type[1] == 's';
    to->register_bytes = std::max<uint8_t>(to->bytes, 4);
    const std::string_view data = of[load ? 0 : 1], address = of[load ? 1 : 0];
    if (data.starts_with("{")) {
      Parts(data, to->register_bytes, to);
    } else {
      const Declared* found = FindRegister(data);
      // A register may be wider than what is loaded into it.
      if (found != nullptr && found->bytes == 8) to->register_bytes = 8;
      to->operands.push_back(Operand(data, to->register_bytes));
    }
    to->count = static_cast<uint8_t>(to->operands.size());
    Address(address, to);
    return to->bytes != 0;
  }

  bool DecodeAtomic(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    if (!Holds(name, ".add.u")) return false;
    to->op = Op::kAtomicAdd;
    to->space = Holds(name, ".shared") ? Space::kShared : Space::kGlobal;
    to->bytes = to->register_bytes = BytesOfType(name);
    to->operands.push_back(Operand(of[0], to->bytes));
    to->operands.push_back(Operand(of[2], to->bytes));
    Address(of[1], to);
    return true;
  }

  // What is received, what is given, the lane or mask, the clamp, the members' mask.
  bool DecodeShuffle(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    to->exchange = name == "shfl.sync.bfly.b32";
    if (!to->exchange && name != "shfl.sync.idx.b32") return false;
    to->op = Op::kShuffle;
    to->operands.push_back(Operand(Trim(of[0].substr(0, of[0].find('|'))), 4));
    for (size_t i = 1; i < 5; ++i) to->operands.push_back(Operand(of[i], 4));
    if (const size_t bar = of[0].find('|'); bar != of[0].npos) {
      to->operands.push_back(Operand(Trim(of[0].substr(bar + 1)), 0));
    }
    return true;
  }

  bool DecodeWarp(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    if (name == "bar.warp.sync") {
      to->op = Op::kMeet;
      to->operands = {Operand(of[0], 4)};
    } else if (name.starts_with("setmaxnreg.")) {
      to->op = Op::kMeet;
    } else if (name == "wgmma.fence.sync.aligned") {
      to->op = Op::kWgmmaFence;
    } else if (name == "wgmma.commit_group.sync.aligned") {
      to->op = Op::kWgmmaCommit;
    } else if (name == "wgmma.wait_group.sync.aligned") {
      to->op = Op::kWgmmaWait;
      to->offset = ReadNumber(of[0]);
    } else if (name == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") {
      to->op = Op::kMma;
      for (const std::string_view each : of) Parts(each, 4, to);
      return to->operands.size() == 14;
    } else if (name.starts_with("ldmatrix.sync.aligned.m8n8.x4.") && name.ends_with(".shared.b16")) {
      to->op = Op::kLdMatrix;
      to->space = Space::kShared;
      to->transposed = Holds(name, ".trans.");
      Parts(of[0], 4, to);
      Address(of[1], to);
    } else {
      return name.starts_with("wgmma.mma_async.") && DecodeProduct(name, of, to);
    }
    return true;
  }

  // d, a or its descriptor, b's descriptor, whether d is added to; a and b are neither negated; whether they are
  // transposed, a only if it has a descriptor.
  bool DecodeProduct(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    for (const int columns : {16, 32, 64, 128}) {
      if (name == "wgmma.mma_async.sync.aligned.m64n" + std::to_string(columns) + "k16.f32.bf16.bf16") {
        to->count = static_cast<uint8_t>(columns);
      }
    }
    if (to->count == 1 || of.size() < 7) return false;
    to->op = Op::kWgmma;
    to->a_is_shared = !of[1].starts_with("{");
    Parts(of[0], 4, to);
    if (to->a_is_shared) {
      to->operands.push_back(Operand(of[1], 8));
    } else {
      Parts(of[1], 4, to);
    }
    to->operands.push_back(Operand(of[2], 8));
    to->operands.push_back(Operand(of[3], 0));
    to->transposed = of.back() == "1";
    const bool a_as_modelled = to->a_is_shared ? of.size() == 8 && of[6] == "0" : of.size() == 7;
    return a_as_modelled && of[4] == "1" && of[5] == "1" && (of.back() == "0" || of.back() == "1") &&
           to->operands.size() == to->count / 2 + (to->a_is_shared ? 3U : 6U);
  }

  bool DecodeAsync(const std::string& name, const std::vector<std::string_view>& of, Instruction* to) {
    if (name == "cp.async.cg.shared.global" && of[2] == "16") {
      to->op = Op::kCopyAsync;
      to->operands = {Operand(of[0], 4), Operand(of[1], 8), Operand(of[3], 4)};
    } else if (name == "cp.async.commit_group") {
      to->op = Op::kCopyCommit;
    } else if (name == "cp.async.wait_group") {
      to->op = Op::kCopyWait;
      to->offset = ReadNumber(of[0]);
    } else if (name == "mbarrier.init.shared::cta.b64") {
      to->op = Op::kMbarrierInit;
      to->operands = {Operand(of[0], 4), Operand(of[1], 4)};
    } else if (name == "mbarrier.arrive.shared::cta.b64" && of[0] == "_") {
      to->op = Op::kMbarrierArrive;
      to->operands = {Operand(of[1], 4), Constant(0, false)};
    } else if (name == "mbarrier.arrive.expect_tx.shared::cta.b64" && of[0] == "_") {
      to->op = Op::kMbarrierArrive;
      to->operands = {Operand(of[1], 4), Operand(of[2], 4)};
    } else if (name == "mbarrier.try_wait.parity.shared::cta.b64") {
      to->op = Op::kMbarrierTryWait;
      to->operands = {Operand(of[0], 0), Operand(of[1], 4), Operand(of[2], 4)};
    } else if (name == "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes") {
      // Where to, the map, the corner's column and row, the mbarrier.
      to->op = Op::kCopyBox;
      const std::vector<std::string_view> source = SplitOperands(Inside(of[1]));
      to->operands = {Operand(of[0], 4), Operand(source[0], 8)};
      Parts(source[1], 4, to);
      to->operands.push_back(Operand(of[2], 4));
    } else {
      return false;
    }
    return true;
  }

  const std::string file_;
  std::vector<std::string>* const errors_;
  int line_ = 1;
  std::map<std::string, Kernel> kernels_;
  using SharedVariables = std::map<std::string, std::pair<Variable, bool>>;  // with whether it is the dynamic one
  SharedVariables of_file_, of_kernel_;
  // Of the kernel that is being read:
  Kernel* kernel_ = nullptr;
  std::vector<std::map<std::string, Declared>> scopes_;
  std::map<std::string, uint32_t> parameters_;  // where they begin
  std::map<std::pair<uint64_t, bool>, Register> constants_;
  std::map<std::string, uint32_t> shared_;  // where they begin
  std::map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

}  // namespace

std::string WithoutHashes(std::string name) {
  for (const std::string_view before : {"__N__", "_cu_"}) {
    for (size_t at = name.find(before); at != name.npos; at = name.find(before, at + 1)) {
      for (size_t i = at + before.size(); i < std::min(name.size(), at + before.size() + 8); ++i) name[i] = '0';
    }
  }
  return name;
}

std::map<std::string, Kernel> ReadPtx(const std::string& file, std::string_view text,
                                      std::vector<std::string>* errors) {
  return Reader(file, errors).Read(text);
}

}  // namespace altiplano::ptx_machine
