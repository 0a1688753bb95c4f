// Captured graphs as tapes: operators on tensors in slots, one after the other, without Python.
// fastmeta/engine/tape_writer.py writes them, in the format that `parse` reads.
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/tensor.h"

namespace fastmeta {
namespace {

using Slots = std::vector<std::optional<Tensor>>;

// An argument of an operator, as its schema wants it.
struct Argument {
  enum class Kind { kTensor, kPlain, kText, kOptional, kList };
  Kind kind = Kind::kPlain;
  int64_t slot = 0;             // kTensor
  std::string text;             // kText
  StableIValue plain = 0;       // kPlain: what fits a word, 0 for None
  std::vector<Argument> items;  // kOptional has one, kList any number
};

// One line of a tape.
struct Instruction {
  enum class Kind { kCall, kView, kEmpty, kScalar };
  Kind kind;
  std::string name, overload;       // kCall; kScalar has the name
  std::vector<Argument> arguments;  // kCall
  std::vector<int64_t> from, to;    // slots: what is read but by kCall, and what is written
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;  // kView: in elements, from where the source begins
  int32_t dtype = 0;   // kEmpty
  double scalar = 0;
  std::vector<int64_t> last;  // slots that nobody reads after this
};

struct Tape {
  int64_t slots = 0;
  std::vector<int64_t> inputs, constants, frame, outputs, saved;
  std::vector<Tensor> constant_tensors;
  std::vector<Instruction> instructions;
};

int32_t dtype_of(const std::string& name) {
  if (name == "float32") return aoti_torch_dtype_float32();
  if (name == "float64") return aoti_torch_dtype_float64();
  if (name == "bfloat16") return aoti_torch_dtype_bfloat16();
  if (name == "float16") return aoti_torch_dtype_float16();
  if (name == "int64") return aoti_torch_dtype_int64();
  if (name == "int32") return aoti_torch_dtype_int32();
  if (name == "int8") return aoti_torch_dtype_int8();
  STD_TORCH_CHECK(name == "bool", "fastmeta: a tape has no dtype ", name);
  return aoti_torch_dtype_bool();
}

template <typename T>
StableIValue word(T value) {
  return torch::stable::detail::from(value);
}

Argument parse_argument(std::istream& text) {
  Argument argument;
  std::string token;
  text >> token;
  const std::string rest = token.substr(1);
  switch (token[0]) {
    case 't':
      argument.kind = Argument::Kind::kTensor;
      argument.slot = std::stoll(rest);
      break;
    case 'i':
      argument.plain = word<int64_t>(std::stoll(rest));
      break;
    case 'f':
      argument.plain = word<double>(std::strtod(rest.c_str(), nullptr));
      break;
    case 'b':
      argument.plain = word<bool>(rest == "1");
      break;
    case 'd':
      argument.plain = word<int32_t>(dtype_of(rest));
      break;
    case 's':
      argument.kind = Argument::Kind::kText;
      argument.text = rest;
      break;
    case 'n':
      argument.plain = word(std::nullopt);
      break;
    case '?':
      argument.kind = Argument::Kind::kOptional;
      argument.items.push_back(parse_argument(text));
      break;
    default: {
      STD_TORCH_CHECK(token[0] == '[', "fastmeta: a tape has no argument ", token);
      argument.kind = Argument::Kind::kList;
      for (int64_t left = std::stoll(rest); left > 0; --left) {
        argument.items.push_back(parse_argument(text));
      }
    }
  }
  return argument;
}

std::vector<int64_t> parse_numbers(std::istream& text) {
  size_t count = 0;
  text >> count;
  std::vector<int64_t> numbers(count);
  for (auto& number : numbers) text >> number;
  return numbers;
}

// Strides: numbers, or a negative count of axes and these from the outermost to the innermost, of a
// dense layout of these sizes.
std::vector<int64_t> parse_strides(std::istream& text, const std::vector<int64_t>& sizes) {
  int64_t count = 0;
  text >> count;
  std::vector<int64_t> numbers(count < 0 ? -count : count);
  for (auto& number : numbers) text >> number;
  if (count >= 0) return numbers;
  std::vector<int64_t> strides(numbers.size());
  int64_t step = 1;
  for (auto axis = numbers.rbegin(); axis != numbers.rend(); ++axis) {
    strides.at(*axis) = step;
    step *= sizes.at(*axis);
  }
  return strides;
}

Instruction parse_instruction(const std::string& kind, std::istream& text) {
  Instruction line;
  if (kind == "call") {
    line.kind = Instruction::Kind::kCall;
    text >> line.name >> line.overload;
    if (line.overload == ".") line.overload.clear();
    size_t count = 0;
    text >> count;
    while (line.arguments.size() < count) line.arguments.push_back(parse_argument(text));
    line.to = parse_numbers(text);
  } else if (kind == "view") {
    line.kind = Instruction::Kind::kView;
    line.from = parse_numbers(text);
    line.to = parse_numbers(text);
    line.sizes = parse_numbers(text);
    line.strides = parse_strides(text, line.sizes);
    text >> line.offset;
  } else if (kind == "empty") {
    line.kind = Instruction::Kind::kEmpty;
    line.to = parse_numbers(text);
    line.sizes = parse_numbers(text);
    line.strides = parse_strides(text, line.sizes);
    std::string dtype;
    text >> dtype;
    line.dtype = dtype_of(dtype);
  } else {
    STD_TORCH_CHECK(kind == "scalar", "fastmeta: a tape has no line ", kind);
    line.kind = Instruction::Kind::kScalar;
    std::string value;
    text >> line.name >> value;
    line.scalar = std::strtod(value.c_str(), nullptr);
    line.from = parse_numbers(text);
    line.to = parse_numbers(text);
  }
  return line;
}

std::shared_ptr<Tape> parse(const std::string& program, std::vector<Tensor> constants) {
  auto tape = std::make_shared<Tape>();
  tape->constant_tensors = std::move(constants);
  std::istringstream text(program);
  std::string kind;
  while (text >> kind) {
    if (kind == "slots") {
      text >> tape->slots;
    } else if (kind == "inputs") {
      tape->inputs = parse_numbers(text);
    } else if (kind == "constants") {
      tape->constants = parse_numbers(text);
    } else if (kind == "frame") {
      tape->frame = parse_numbers(text);
    } else if (kind == "outputs") {
      tape->outputs = parse_numbers(text);
    } else if (kind == "saved") {
      tape->saved = parse_numbers(text);
    } else if (kind == "last") {
      tape->instructions.back().last = parse_numbers(text);
    } else {
      tape->instructions.push_back(parse_instruction(kind, text));
    }
  }
  return tape;
}

const Tensor& at(const Slots& slots, int64_t slot) {
  STD_TORCH_CHECK(slots[slot].has_value(), "fastmeta: a tape reads slot ", slot,
                  ", which is empty");
  return *slots[slot];
}

// An owned value for a boxed call, which takes it over.
StableIValue value_of(const Argument& argument, const Slots& slots) {
  switch (argument.kind) {
    case Argument::Kind::kTensor:
      return torch::stable::detail::from(at(slots, argument.slot));
    case Argument::Kind::kText:
      return word(argument.text);
    case Argument::Kind::kOptional:
      return word(new StableIValue(value_of(argument.items[0], slots)));
    case Argument::Kind::kList: {
      StableListHandle list;
      TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(argument.items.size(), &list));
      for (const auto& item : argument.items) {
        TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, value_of(item, slots)));
      }
      return word(list);
    }
    default:
      return argument.plain;
  }
}

void call(const Instruction& line, Slots& slots) {
  std::vector<StableIValue> stack;
  stack.reserve(most(line.arguments.size(), line.to.size()));
  for (const auto& argument : line.arguments) stack.push_back(value_of(argument, slots));
  if (stack.size() < line.to.size()) stack.resize(line.to.size());
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(line.name.c_str(), line.overload.c_str(),
                                               stack.data(), TORCH_ABI_VERSION));
  for (size_t i = 0; i < line.to.size(); ++i) {
    slots[line.to[i]] = torch::stable::detail::to<Tensor>(stack[i]);
  }
}

// Operators with a number, which boxed calls cannot carry.
AtenTensorHandle with_scalar(const Instruction& line, const Slots& slots) {
  const AtenTensorHandle a = at(slots, line.from[0]).get();
  AtenTensorHandle found = nullptr;
  if (line.name == "add") {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_add_Tensor(a, at(slots, line.from[1]).get(), line.scalar, &found));
  } else if (line.name == "sub") {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_aten_subtract_Tensor(a, at(slots, line.from[1]).get(), line.scalar, &found));
  } else if (line.name == "add_number") {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Scalar(a, line.scalar, 1, &found));
  } else if (line.name == "mul_number") {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Scalar(a, line.scalar, &found));
  } else {
    STD_TORCH_CHECK(line.name == "pow_number", "fastmeta: a tape has no operator ", line.name);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_pow_Tensor_Scalar(a, line.scalar, &found));
  }
  return found;
}

// Raises where a view would look beyond the memory of its source: tapes are also written for sizes
// that nobody ran.
void check_view(const Instruction& line, AtenTensorHandle source) {
  int64_t offset = 0, bytes = 0;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(source, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(source, &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(source, &dtype));
  int64_t last = offset + line.offset;
  for (size_t i = 0; i < line.sizes.size(); ++i) {
    if (line.sizes[i] == 0) return;
    last += (line.sizes[i] - 1) * line.strides[i];
  }
  const auto held = bytes / static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  STD_TORCH_CHECK(last < held, "fastmeta: a tape looks at element ", last, " of memory that holds ",
                  held);
}

void run(const Instruction& line, Slots& slots) {
  const auto ndim = static_cast<int64_t>(line.sizes.size());
  AtenTensorHandle found = nullptr;
  switch (line.kind) {
    case Instruction::Kind::kCall:
      return call(line, slots);
    case Instruction::Kind::kView:
      check_view(line, at(slots, line.from[0]).get());
      TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(at(slots, line.from[0]).get(), ndim,
                                                            line.sizes.data(), line.strides.data(),
                                                            line.offset, &found));
      break;
    case Instruction::Kind::kEmpty:
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, line.sizes.data(), line.strides.data(),
                                                      line.dtype, aoti_torch_device_type_cpu(), -1,
                                                      &found));
      break;
    case Instruction::Kind::kScalar:
      found = with_scalar(line, slots);
  }
  slots[line.to[0]] = Tensor(found);
}

// What lives longer than a call, by number.
template <typename T>
class Kept {
 public:
  int64_t put(T value) {
    const std::lock_guard<std::mutex> guard(lock_);
    values_.emplace(++last_, std::move(value));
    return last_;
  }
  T get(int64_t number, bool keep) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = values_.find(number);
    STD_TORCH_CHECK(found != values_.end(), "fastmeta: a tape or its frame is not there any more");
    if (keep) return found->second;
    T value = std::move(found->second);
    values_.erase(found);
    return value;
  }
  void drop(int64_t number) {
    T value;  // ends after the lock
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = values_.find(number);
    if (found == values_.end()) return;
    value = std::move(found->second);
    values_.erase(found);
  }

 private:
  std::mutex lock_;
  std::unordered_map<int64_t, T> values_;
  int64_t last_ = 0;
};

// Never destroyed: tensors may not outlive torch, which goes first.
Kept<std::shared_ptr<Tape>>& tapes() {
  static auto* const all = new Kept<std::shared_ptr<Tape>>;
  return *all;
}

Kept<std::vector<Tensor>>& frames() {
  static auto* const all = new Kept<std::vector<Tensor>>;
  return *all;
}

int64_t tape_new(std::string program, std::vector<Tensor> constants) {
  return tapes().put(parse(program, std::move(constants)));
}

void fill(Slots& slots, const std::vector<int64_t>& places, std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(places.size() == tensors.size(), "fastmeta: a tape reads ", places.size(),
                  " tensors, got ", tensors.size());
  for (size_t i = 0; i < places.size(); ++i) slots[places[i]] = std::move(tensors[i]);
  tensors.clear();
}

// Runs a tape on its inputs and on the frame that another one saved, which is gone afterwards
// unless it is to be kept; returns its outputs and the number of the frame that it saves, 0 if
// none.
std::tuple<std::vector<Tensor>, int64_t> tape_run(int64_t number, int64_t frame, bool keep,
                                                  std::vector<Tensor> inputs) {
  const std::shared_ptr<Tape> tape = tapes().get(number, true);
  Slots slots(tape->slots);
  auto constants = tape->constant_tensors;
  fill(slots, tape->constants, constants);
  fill(slots, tape->inputs, inputs);
  if (frame != 0) {
    auto saved = frames().get(frame, keep);
    fill(slots, tape->frame, saved);
  }
  for (const auto& line : tape->instructions) {
    run(line, slots);
    for (const int64_t slot : line.last) slots[slot].reset();
  }
  std::vector<Tensor> outputs, saved;
  for (const int64_t slot : tape->outputs) outputs.push_back(at(slots, slot));
  for (const int64_t slot : tape->saved) saved.push_back(at(slots, slot));
  return {std::move(outputs), saved.empty() ? 0 : frames().put(std::move(saved))};
}

void tape_drop(int64_t tape, int64_t frame) {
  tapes().drop(tape);
  frames().drop(frame);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CompositeExplicitAutograd, m) {
  m.impl("tape_new", TORCH_BOX(&tape_new));
  m.impl("tape_run", TORCH_BOX(&tape_run));
  m.impl("tape_drop", TORCH_BOX(&tape_drop));
}

}  // namespace fastmeta
