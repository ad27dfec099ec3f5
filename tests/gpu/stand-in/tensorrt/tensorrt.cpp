// Stands in for TensorRT 10 on a machine without a GPU, below ONNX Runtime's real TensorRT provider. An engine here is the ONNX
// model that the provider hands to the parser; ONNX Runtime's CPU kernels compute it, in f32, on the stand-in driver's memory
// and in the order of its streams. What TensorRT would refuse is refused: operators and types that its parser does not take,
// shapes outside a profile, weights that were left out, and, where an engine was built to take its own back, other weights.
// Nothing is said here of speed, nor of what TensorRT's own kernels compute.
//
// Classes of TensorRT's interface are an object with a table of virtual functions and a pointer to a second object, whose
// table holds the functions; the places in the tables are those of TensorRT 10.16's headers. A function that the provider asks
// for and that is not here ends the process with its place.
//
// Each build, load, refit and run is a line of JSON in the file that MUDIT_STAND_IN_TENSORRT names.
// MUDIT_STAND_IN_TENSORRT_FAILS makes builds fail, and with MUDIT_STAND_IN_TENSORRT_REFUSES the parser takes nothing.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>

#include "onnx.h"

extern "C" int stand_in_queue(void *stream, void (*run)(void *), const void *data, size_t bytes);
struct Block { uint64_t begin, end; };
extern "C" bool stand_in_block(uint64_t address, Block *found);

namespace {

// --- Tables of virtual functions.
template <int I, int N> void missing() {
  static const char *const interfaces[] = {"IBuilder", "INetworkDefinition", "IBuilderConfig", "IOptimizationProfile", "IRuntime", "ICudaEngine", "IExecutionContext", "IHostMemory", "ITensor", "ITimingCache", "IRefitter", "ISerializationConfig", "IParser", "IParserRefitter", "IPluginRegistry"};
  fprintf(stderr, "the stand-in for TensorRT has no function %d of %s\n", N, interfaces[I]);
  abort();
}
enum Interface { BUILDER, NETWORK, CONFIG, PROFILE, RUNTIME, ENGINE, CONTEXT, MEMORY, TENSOR, TIMINGS, REFITTER, SERIALIZATION, PARSER, PARSER_REFITTER, REGISTRY };
using Table = std::array<void *, 128>;
template <int I, int... N> constexpr Table all_missing(std::integer_sequence<int, N...>) { return {reinterpret_cast<void *>(missing<I, N>)...}; }
struct Slot { int place; void *function; };
template <int I> Table table(std::initializer_list<Slot> slots) {
  Table t = all_missing<I>(std::make_integer_sequence<int, 128>());
  for (const Slot &s : slots) t[size_t(s.place)] = s.function;
  return t;
}
#define AT(place, ...) Slot{place, reinterpret_cast<void *>(+__VA_ARGS__)}

// The two objects of a class: what the provider holds, and what that points to.
struct Face {
  void **destructors;
  void *inner;
  void **functions;
};
template <class T> T &of(void *inner) { return *reinterpret_cast<T *>(static_cast<char *>(inner) - offsetof(Face, functions)); }
template <class T> void *ends[2] = {
    reinterpret_cast<void *>(+[](T *self) { self->~T(); }),
    reinterpret_cast<void *>(+[](T *self) { delete self; }),
};
template <class T> struct Class : Face {
  Class() : Face{ends<T>, nullptr, nullptr} {
    static Table t = T::functions_of();
    functions = t.data();
    inner = &functions;
  }
  Class(const Class &) = delete;
};

struct Dims { int32_t count; int64_t size[8]; };
Dims dims(const std::vector<int64_t> &shape) {
  Dims d = {int32_t(shape.size()), {}};
  for (size_t i = 0; i < shape.size() && i < 8; i++) d.size[i] = shape[i];
  return d;
}
std::vector<int64_t> shape(const Dims &d) { return {d.size, d.size + d.count}; }

// TensorRT's numbers of element types.
int32_t type_of(int onnx_type) {
  switch (onnx_type) {
    case onnx::FLOAT: return 0;
    case onnx::FLOAT16: return 1;
    case onnx::INT32: return 3;
    case onnx::BOOL: return 4;
    case onnx::BFLOAT16: return 7;
    case onnx::INT64: return 8;
    default: return -1;
  }
}

// --- What is told: to the provider's log, and to whoever proves something.
void complain(void *logger, const std::string &words) {
  // ILogger's only function before its destructors; 1 is an error.
  if (logger) reinterpret_cast<void (*)(void *, int32_t, const char *)>((*static_cast<void ***>(logger))[0])(logger, 1, words.c_str());
}
std::mutex journal_lock;
void tell(const std::string &line) {
  const char *file = getenv("MUDIT_STAND_IN_TENSORRT");
  if (!file) return;
  const std::lock_guard<std::mutex> hold(journal_lock);
  if (FILE *out = fopen(file, "a")) {
    fprintf(out, "%s\n", line.c_str());
    fclose(out);
  }
}
std::string quoted(const std::string &text) {
  std::string out = "\"";
  for (const char c : text) { if (c == '"' || c == '\\') out += '\\'; out += c; }
  return out + '"';
}
std::string listed(const std::vector<int64_t> &numbers) {
  std::string out = "[";
  for (const int64_t n : numbers) out += (out.size() > 1 ? "," : "") + std::to_string(n);
  return out + "]";
}

// --- What the parser takes: docs/operators.md of onnx-tensorrt 10.15.
enum { FLOATS = 1, INTEGERS = 2, BOOLEANS = 4, ALL = 7 };
const std::map<std::string, int> OPERATORS = {
    {"Add", FLOATS | INTEGERS}, {"Attention", FLOATS}, {"AveragePool", FLOATS}, {"Cast", ALL}, {"Concat", ALL}, {"Constant", ALL}, {"Conv", FLOATS},
    {"ConvTranspose", FLOATS}, {"Cos", FLOATS}, {"DepthToSpace", FLOATS | INTEGERS}, {"Div", FLOATS | INTEGERS},
    {"Equal", FLOATS | INTEGERS}, {"Exp", FLOATS}, {"Expand", ALL}, {"Flatten", ALL}, {"Gather", ALL}, {"Gelu", FLOATS | INTEGERS},
    {"Gemm", FLOATS}, {"Identity", ALL}, {"LayerNormalization", FLOATS}, {"Less", FLOATS | INTEGERS}, {"Log", FLOATS},
    {"MatMul", FLOATS}, {"Max", FLOATS | INTEGERS}, {"MaxPool", FLOATS}, {"Mul", FLOATS | INTEGERS}, {"Neg", FLOATS | INTEGERS},
    {"Pad", FLOATS | INTEGERS}, {"Pow", FLOATS | INTEGERS}, {"Reciprocal", FLOATS}, {"ReduceMean", FLOATS | INTEGERS},
    {"ReduceSum", FLOATS | INTEGERS}, {"Relu", FLOATS | INTEGERS}, {"Reshape", ALL}, {"Shape", ALL}, {"Sigmoid", FLOATS},
    {"Sin", FLOATS}, {"Slice", ALL}, {"Softmax", FLOATS}, {"SpaceToDepth", FLOATS | INTEGERS}, {"Split", ALL}, {"Sqrt", FLOATS},
    {"Squeeze", ALL}, {"Sub", FLOATS | INTEGERS}, {"Tanh", FLOATS}, {"Transpose", ALL}, {"Unsqueeze", ALL}, {"Where", ALL},
};
int class_of(int onnx_type) {
  switch (onnx_type) {
    case onnx::FLOAT: case onnx::FLOAT16: case onnx::BFLOAT16: return FLOATS;
    case onnx::INT32: case onnx::INT64: return INTEGERS;
    case onnx::BOOL: return BOOLEANS;
    default: return 0;
  }
}
// Why a node is not taken; empty where it is.
std::string refusal(const onnx::Model &model, const onnx::Node &node) {
  if (getenv("MUDIT_STAND_IN_TENSORRT_REFUSES")) return "nothing is taken";
  const auto known = OPERATORS.find(node.op);
  if (!node.domain.empty() || known == OPERATORS.end()) return "no importer for " + node.domain + ":" + node.op;
  // Of attention it wants heads as an axis; it knows them by no attribute.
  if (node.op == "Attention" && (node.outputs.size() > 1 || node.attributes.count("q_num_heads"))) return "Attention that is not of (N, H, T, K)";
  if (node.op == "LayerNormalization" && node.outputs.size() > 1) return "LayerNormalization with more than one output";
  // A condition is boolean by its nature; data comes after it.
  for (size_t i = node.op == "Where" ? 1 : 0; i < node.inputs.size(); i++) {
    const auto type = model.types.find(node.inputs[i]);
    if (node.inputs[i].empty() || type == model.types.end()) continue;
    // Indices, axes and shapes are integers whatever the data.
    if (i > 0 && class_of(type->second) == INTEGERS) continue;
    if (!(class_of(type->second) & known->second)) return node.op + " does not take elements of ONNX's type " + std::to_string(type->second);
  }
  return "";
}

// --- An engine: what was built.
struct Range { std::vector<int64_t> min, opt, max; };
struct Plan {
  std::string model;
  std::map<std::string, Range> profile;
  uint64_t stripped = 0, compatible = 0;
  std::map<std::string, uint64_t> own;  // sums of the weights that were left out, where no others may come in their place
};
const std::string MAGIC = "stand-in for a TensorRT 10.16 engine\n";
std::string serialized(const Plan &p) {
  std::string out = MAGIC;
  onnx::put(out, 1, p.model);
  onnx::put(out, 2, p.stripped);
  onnx::put(out, 3, p.compatible);
  for (const auto &[name, sum] : p.own) {
    std::string one;
    onnx::put(one, 1, name);
    onnx::put(one, 2, sum);
    onnx::put(out, 4, one);
  }
  for (const auto &[name, range] : p.profile) {
    std::string one;
    onnx::put(one, 1, name);
    uint32_t number = 2;
    for (const auto *list : {&range.min, &range.opt, &range.max}) {
      std::string packed;
      for (const int64_t size : *list) onnx::put_varint(packed, uint64_t(size));
      onnx::put(one, number++, packed);
    }
    onnx::put(out, 5, one);
  }
  return out;
}
Plan deserialized(const char *data, size_t bytes) {
  if (bytes < MAGIC.size() || memcmp(data, MAGIC.data(), MAGIC.size())) throw std::runtime_error("this is no engine of this TensorRT");
  Plan p;
  onnx::each(data + MAGIC.size(), bytes - MAGIC.size(), [&](const onnx::Field &f) {
    switch (f.number) {
      case 1: p.model = f.text(); break;
      case 2: p.stripped = f.value; break;
      case 3: p.compatible = f.value; break;
      case 4: {
        std::string name;
        onnx::each(f.data, f.bytes, [&](const onnx::Field &part) { if (part.number == 1) name = part.text(); else p.own[name] = part.value; });
        break;
      }
      case 5: {
        std::string name;
        Range range;
        onnx::each(f.data, f.bytes, [&](const onnx::Field &part) {
          if (part.number == 1) { name = part.text(); return; }
          auto &list = part.number == 2 ? range.min : part.number == 3 ? range.opt : range.max;
          for (const char *at = part.data; at < part.data + part.bytes;) list.push_back(int64_t(onnx::varint(at, part.data + part.bytes)));
        });
        p.profile[name] = range;
      }
    }
  });
  return p;
}
// Whether TensorRT could fill the weight in later: it is of floats, and not a constant of a few elements.
bool weight(const onnx::Tensor &t) { return class_of(t.type) == FLOATS && t.raw.size() > 64; }

uint64_t sum_of(const std::string &bytes) {
  uint64_t sum = 1469598103934665603u;
  for (const char c : bytes) sum = (sum ^ uint8_t(c)) * 1099511628211u;
  return sum;
}

struct Memory : Class<Memory> {
  std::string bytes;
  static Table functions_of() {
    return table<MEMORY>({
        AT(2, [](void *self) -> void * { return of<Memory>(self).bytes.data(); }),
        AT(3, [](void *self) -> size_t { return of<Memory>(self).bytes.size(); }),
        AT(4, [](void *) -> int32_t { return 2; }),
    });
  }
};
Memory *memory(std::string bytes) {
  Memory *m = new Memory;
  m->bytes = std::move(bytes);
  return m;
}

struct TensorFace : Class<TensorFace> {
  onnx::Value value;
  bool input = false;
  static Table functions_of() {
    return table<TENSOR>({
        AT(3, [](void *self) -> const char * { return of<TensorFace>(self).value.name.c_str(); }),
        AT(5, [](void *self) -> Dims { return dims(of<TensorFace>(self).value.shape); }),
        AT(7, [](void *self) -> int32_t { return type_of(of<TensorFace>(self).value.type); }),
        AT(9, [](void *self) -> bool { return of<TensorFace>(self).input; }),
        AT(10, [](void *self) -> bool { return !of<TensorFace>(self).input; }),
        AT(21, [](void *) -> bool { return false; }),
        AT(22, [](void *) -> bool { return true; }),
    });
  }
};

struct Network : Class<Network> {
  uint32_t flags = 0;
  std::string bytes;
  onnx::Model model;
  std::vector<std::unique_ptr<TensorFace>> inputs, outputs;
  void take(const std::string &given) {
    bytes = given;
    model = onnx::read(bytes);
    for (auto [from, to] : {std::pair(&model.inputs, &inputs), std::pair(&model.outputs, &outputs)}) {
      for (const onnx::Value &v : *from) {
        to->push_back(std::make_unique<TensorFace>());
        to->back()->value = v;
        to->back()->input = to == &inputs;
      }
    }
  }
  static Table functions_of() {
    return table<NETWORK>({
        AT(12, [](void *self) -> int32_t { return int32_t(of<Network>(self).model.nodes.size()); }),
        AT(14, [](void *self) -> int32_t { return int32_t(of<Network>(self).inputs.size()); }),
        AT(15, [](void *self, int32_t i) -> void * { return of<Network>(self).inputs[size_t(i)].get(); }),
        AT(16, [](void *self) -> int32_t { return int32_t(of<Network>(self).outputs.size()); }),
        AT(17, [](void *self, int32_t i) -> void * { return of<Network>(self).outputs[size_t(i)].get(); }),
        AT(30, [](void *, const char *) {}),
    });
  }
};

struct Profile : Class<Profile> {
  std::map<std::string, Range> ranges;
  static Table functions_of() {
    return table<PROFILE>({
        AT(2, [](void *self, const char *name, int32_t which, const Dims &d) -> bool {
          Range &range = of<Profile>(self).ranges[name];
          (which == 0 ? range.min : which == 1 ? range.opt : range.max) = shape(d);
          return true;
        }),
        AT(3, [](void *self, const char *name, int32_t which) -> Dims {
          const Range &range = of<Profile>(self).ranges[name];
          return dims(which == 0 ? range.min : which == 1 ? range.opt : range.max);
        }),
        AT(9, [](void *) -> bool { return true; }),
    });
  }
};

// Measurements of kernels: a line for each kind of work.
struct Timings : Class<Timings> {
  std::set<std::string> known;
  static Table functions_of() {
    return table<TIMINGS>({
        AT(2, [](void *self) -> void * {
          std::string text;
          for (const std::string &line : of<Timings>(self).known) text += line + "\n";
          return memory(text);
        }),
        AT(3, [](void *self, const Face &other, bool) -> bool {
          const auto &more = of<Timings>(other.inner).known;
          of<Timings>(self).known.insert(more.begin(), more.end());
          return true;
        }),
    });
  }
};

struct Config : Class<Config> {
  uint32_t flags = 1u << 6;  // TF32, unless somebody turns it off
  std::vector<Profile *> profiles;
  Timings *timings = nullptr;
  std::map<int32_t, size_t> pools;
  int32_t level = 3, compatible = 0, streams = -1;
  static Table functions_of() {
    return table<CONFIG>({
        AT(8, [](void *self, uint32_t flags) { of<Config>(self).flags = flags; }),
        AT(9, [](void *self) -> uint32_t { return of<Config>(self).flags; }),
        AT(10, [](void *self, int32_t flag) { of<Config>(self).flags &= ~(1u << flag); }),
        AT(11, [](void *self, int32_t flag) { of<Config>(self).flags |= 1u << flag; }),
        AT(12, [](void *self, int32_t flag) -> bool { return of<Config>(self).flags >> flag & 1; }),
        AT(25, [](void *self, Profile *profile) -> int32_t {
          of<Config>(self).profiles.push_back(profile);
          return int32_t(of<Config>(self).profiles.size()) - 1;
        }),
        AT(26, [](void *self) -> int32_t { return int32_t(of<Config>(self).profiles.size()); }),
        AT(40, [](void *, const char *blob, size_t bytes) -> void * {
          Timings *t = new Timings;
          std::istringstream text(std::string(blob ? blob : "", blob ? bytes : 0));
          for (std::string line; std::getline(text, line);) t->known.insert(line);
          return t;
        }),
        AT(41, [](void *self, Timings *timings, bool) -> bool { of<Config>(self).timings = timings; return true; }),
        AT(42, [](void *self) -> void * { return of<Config>(self).timings; }),
        AT(43, [](void *self, int32_t pool, size_t bytes) { of<Config>(self).pools[pool] = bytes; }),
        AT(47, [](void *self, int32_t level) { of<Config>(self).level = level; }),
        AT(48, [](void *self) -> int32_t { return of<Config>(self).level; }),
        AT(49, [](void *self, int32_t level) { of<Config>(self).compatible = level; }),
        AT(54, [](void *self, int32_t streams) { of<Config>(self).streams = streams; }),
    });
  }
};

// Flags of the builder and of a network.
enum { FP16 = 0, BF16 = 17, STRIP_PLAN = 19, REFIT_IDENTICAL = 20, STRONGLY_TYPED = 1 };

struct Builder : Class<Builder> {
  void *logger = nullptr;
  std::vector<std::unique_ptr<Profile>> profiles;
  // Null where it is refused.
  Memory *build(const Network &network, const Config &config) {
    Plan plan;
    if (getenv("MUDIT_STAND_IN_TENSORRT_FAILS")) { complain(logger, "could not find any implementation for a node"); return nullptr; }
    if (!(network.flags >> STRONGLY_TYPED & 1)) {
      for (const auto &[name, type] : network.model.types) {
        if (!onnx::narrow(uint64_t(type)) || config.flags >> (type == onnx::FLOAT16 ? FP16 : BF16) & 1) continue;
        complain(logger, name + " is narrower than the builder is allowed to compute in");
        return nullptr;
      }
    }
    if (config.profiles.size() > 1) { complain(logger, "more than one profile"); return nullptr; }
    if (!config.profiles.empty()) plan.profile = config.profiles[0]->ranges;
    for (const onnx::Value &v : network.model.inputs) {
      const bool open = std::count(v.shape.begin(), v.shape.end(), -1) > 0;
      const auto range = plan.profile.find(v.name);
      if (open && range == plan.profile.end()) { complain(logger, "no profile for " + v.name); return nullptr; }
      if (range == plan.profile.end()) continue;
      for (const auto *list : {&range->second.min, &range->second.opt, &range->second.max}) {
        bool fits = list->size() == v.shape.size();
        for (size_t i = 0; fits && i < list->size(); i++) fits = v.shape[i] == -1 ? (*list)[i] > 0 : v.shape[i] == (*list)[i];
        if (!fits) { complain(logger, "the profile of " + v.name + " is not one of its shape"); return nullptr; }
      }
    }
    plan.stripped = config.flags >> STRIP_PLAN & 1;
    plan.compatible = config.compatible;
    std::set<std::string> work;
    for (const onnx::Node &n : network.model.nodes) {
      const auto type = network.model.types.find(n.outputs.empty() ? "" : n.outputs[0]);
      work.insert(n.op + " " + std::to_string(type == network.model.types.end() ? 0 : type->second) + " level " + std::to_string(config.level));
    }
    size_t measured = 0;
    if (config.timings) { for (const std::string &w : work) measured += config.timings->known.insert(w).second; } else measured = work.size();
    plan.model = network.bytes;
    size_t weights = 0;
    if (plan.stripped) {
      plan.model = onnx::with_initializers(network.bytes, [&](const onnx::Field &message) {
        const onnx::Tensor t = onnx::tensor_of(message);
        std::string out;
        weights += weight(t);
        if (weight(t) && config.flags >> REFIT_IDENTICAL & 1) plan.own[t.name] = sum_of(t.raw);
        onnx::each(message.data, message.bytes, [&](const onnx::Field &f) { if (f.number != 9 || !weight(t)) onnx::put(out, f); });
        return out;
      });
    }
    std::string profile;
    for (const auto &[name, range] : plan.profile)
      profile += (profile.empty() ? "" : ",") + quoted(name) + ":[" + listed(range.min) + "," + listed(range.opt) + "," + listed(range.max) + "]";
    std::ostringstream line;
    line << "{\"built\":{\"nodes\":" << network.model.nodes.size() << ",\"network_flags\":" << network.flags << ",\"flags\":" << config.flags << ",\"level\":" << config.level << ",\"compatible\":" << config.compatible << ",\"workspace\":"
         << (config.pools.count(0) ? int64_t(config.pools.at(0)) : -1) << ",\"profile\":{" << profile << "},\"measured\":" << measured
         << ",\"stripped_weights\":" << weights << ",\"model_bytes\":" << network.bytes.size() << "}}";
    tell(line.str());
    return memory(serialized(plan));
  }
  static Table functions_of() {
    return table<BUILDER>({
        AT(2, [](void *) -> bool { return true; }),
        AT(3, [](void *) -> bool { return true; }),
        AT(7, [](void *) -> void * { return new Config; }),
        AT(8, [](void *, uint32_t flags) -> void * { Network *n = new Network; n->flags = flags; return n; }),
        AT(9, [](void *self) -> void * {
          auto &all = of<Builder>(self).profiles;
          all.push_back(std::make_unique<Profile>());
          return all.back().get();
        }),
        AT(14, [](void *self, const Network &network, const Config &config) -> void * { return of<Builder>(self).build(network, config); }),
        AT(17, [](void *, int32_t) -> bool { return true; }),
    });
  }
};

// --- ONNX Runtime's own interface, by the places of its functions: the library is the one that loaded the provider.
struct Runtime {
  void *const *api = nullptr;
  void *environment = nullptr;
  template <int place, class... A> void call(A... arguments) const {
    void *status = reinterpret_cast<void *(*)(A...)>(api[place])(arguments...);
    if (!status) return;
    const std::string words = reinterpret_cast<const char *(*)(void *)>(api[2])(status);
    release<93>(status);
    throw std::runtime_error(words);
  }
  template <int place> void release(void *object) const { reinterpret_cast<void (*)(void *)>(api[place])(object); }
  Runtime() {
    void *library = dlopen("libonnxruntime.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (!library) throw std::runtime_error("ONNX Runtime is not loaded");
    struct Base { void *const *(*api)(uint32_t); const char *(*version)(); };
    const auto base = reinterpret_cast<const Base *(*)()>(dlsym(library, "OrtGetApiBase"))();
    api = base->api(20);
    call<3>(3, "stand-in for TensorRT", &environment);
  }
  static const Runtime &the() { static Runtime r; return r; }
};

struct Engine : Class<Engine> {
  void *logger = nullptr;
  Plan plan;
  onnx::Model model;
  std::set<std::string> absent;  // weights that were left out and not given since
  std::mutex lock;
  void *session = nullptr;
  // The large constants of the session, in f32: it gets them as inputs, since a model's message ends at 2 GB.
  std::vector<onnx::Tensor> constants;
  ~Engine() { forget(); }
  void forget() { if (session) Runtime::the().release<95>(session); session = nullptr; }
  void open(const Plan &given) {
    plan = given;
    model = onnx::read(plan.model);
    if (plan.stripped) {
      onnx::with_initializers(plan.model, [&](const onnx::Field &message) {
        const onnx::Tensor t = onnx::tensor_of(message);
        if (class_of(t.type) == FLOATS && t.raw.empty() && !t.listed) absent.insert(t.name);
        return std::string();
      });
    }
  }
  const onnx::Value *find(const std::string &name) const {
    for (const auto *list : {&model.inputs, &model.outputs}) for (const onnx::Value &v : *list) if (v.name == name) return &v;
    return nullptr;
  }
  void *loaded() {
    const std::lock_guard<std::mutex> hold(lock);
    if (session) return session;
    const Runtime &r = Runtime::the();
    void *options = nullptr;
    r.call<10>(&options);
    r.call<23>(options, 0);  // as it stands
    constants.clear();
    std::string rest = onnx::with_initializers(plan.model, [&](const onnx::Field &message) {
      onnx::Tensor t = onnx::tensor_of(message);
      if (!weight(t)) return std::string(message.data, message.bytes);
      if (onnx::narrow(uint64_t(t.type))) {
        std::string wide(t.raw.size() * 2, 0);
        for (size_t i = 0; i < t.raw.size() / 2; i++) {
          uint16_t bits;
          memcpy(&bits, &t.raw[2 * i], 2);
          const float value = onnx::widened(bits, t.type);
          memcpy(&wide[4 * i], &value, 4);
        }
        t.raw = wide;
      }
      constants.push_back(std::move(t));
      return std::string();
    });
    const std::string wide = onnx::with_inputs(onnx::wide(rest), constants);
    r.call<8>(r.environment, static_cast<const void *>(wide.data()), wide.size(), options, &session);
    r.release<100>(options);
    return session;
  }
  bool refit(const std::string &bytes) {
    std::map<std::string, std::string> given;
    onnx::with_initializers(bytes, [&](const onnx::Field &message) {
      const onnx::Tensor t = onnx::tensor_of(message);
      given[t.name] = t.raw;
      return std::string();
    });
    const std::lock_guard<std::mutex> hold(lock);
    forget();
    size_t filled = 0;
    bool whole = true;
    plan.model = onnx::with_initializers(plan.model, [&](const onnx::Field &message) {
      const onnx::Tensor t = onnx::tensor_of(message);
      const bool wanted = absent.count(t.name) || weight(t);
      const auto found = given.find(t.name);
      if (wanted && (found == given.end() || found->second.empty())) {
        if (absent.count(t.name)) { complain(logger, "no weights for " + t.name); whole = false; }
      }
      const auto own = plan.own.find(t.name);
      if (wanted && found != given.end() && own != plan.own.end() && own->second != sum_of(found->second)) {
        complain(logger, "weights of " + t.name + " are not those of the build, which was for identical ones");
        whole = false;
      }
      std::string out;
      const bool fill = wanted && found != given.end() && !found->second.empty();
      onnx::each(message.data, message.bytes, [&](const onnx::Field &f) { if (f.number != 9 || !fill) onnx::put(out, f); });
      if (fill) { onnx::put(out, 9, found->second); absent.erase(t.name); filled++; }
      return out;
    });
    tell("{\"refitted\":" + std::to_string(filled) + "}");
    return whole;
  }
  static Table functions_of();
};

struct Context : Class<Context> {
  Engine *engine = nullptr;
  std::map<std::string, std::vector<int64_t>> shapes;
  std::map<std::string, void *> addresses;
  bool set(const std::string &name, const std::vector<int64_t> &given) {
    const onnx::Value *v = engine->find(name);
    const auto refuse = [&](const std::string &words) { complain(engine->logger, words); return false; };
    if (!v || given.size() != v->shape.size()) return refuse("no such shape of " + name);
    const auto range = engine->plan.profile.find(name);
    for (size_t i = 0; i < given.size(); i++) {
      if (v->shape[i] != -1 && v->shape[i] != given[i]) return refuse("another shape of " + name);
      if (range != engine->plan.profile.end() && (given[i] < range->second.min[i] || given[i] > range->second.max[i]))
        return refuse("the shape of " + name + " is outside the engine's profile: " + listed(given));
    }
    shapes[name] = given;
    return true;
  }
  std::vector<int64_t> shape_of(const std::string &name) const {
    const onnx::Value *v = engine->find(name);
    if (!v) return {};
    const auto known = shapes.find(name);
    if (known != shapes.end()) return known->second;
    std::map<std::string, int64_t> symbols;
    for (const onnx::Value &input : engine->model.inputs) {
      const auto given = shapes.find(input.name);
      for (size_t i = 0; i < input.shape.size(); i++)
        if (input.shape[i] == -1 && given != shapes.end()) symbols[input.symbols[i]] = given->second[i];
    }
    std::vector<int64_t> out = v->shape;
    for (size_t i = 0; i < out.size(); i++) {
      if (out[i] != -1) continue;
      const auto symbol = symbols.find(v->symbols[i]);
      if (symbol != symbols.end()) out[i] = symbol->second;
    }
    return out;
  }
  bool enqueue(void *stream);
  static Table functions_of();
};

struct Bound { std::string name; int type; std::vector<int64_t> shape; void *address; size_t count, bytes; };
struct Run { Engine *engine; std::vector<Bound> *inputs, *outputs; };
void run(void *data) {
  const Run &run = *static_cast<Run *>(data);
  try {
    const Runtime &r = Runtime::the();
    void *session = run.engine->loaded(), *place = nullptr;
    r.call<69>(0, 0, &place);
    std::vector<std::vector<float>> wide(run.inputs->size() + run.outputs->size());
    std::vector<const char *> names[2];
    std::vector<void *> values[2];
    size_t which = 0;
    for (const bool output : {false, true}) {
      for (const Bound &b : output ? *run.outputs : *run.inputs) {
        auto &copy = wide[which++];
        void *address = b.address;
        size_t bytes = b.bytes;
        int type = b.type;
        if (onnx::narrow(uint64_t(type))) {
          copy.resize(b.count);
          for (size_t i = 0; !output && i < b.count; i++) copy[i] = onnx::widened(static_cast<const uint16_t *>(b.address)[i], type);
          address = copy.data(), bytes = b.count * 4, type = onnx::FLOAT;
        }
        void *value = nullptr;
        r.call<49>(static_cast<const void *>(place), address, bytes, b.shape.data(), b.shape.size(), type, &value);
        names[output].push_back(b.name.c_str());
        values[output].push_back(value);
      }
    }
    for (const onnx::Tensor &t : run.engine->constants) {
      void *value = nullptr;
      r.call<49>(static_cast<const void *>(place), const_cast<char *>(t.raw.data()), t.raw.size(), t.shape.data(), t.shape.size(), int(onnx::FLOAT), &value);
      names[0].push_back(t.name.c_str());
      values[0].push_back(value);
    }
    r.call<9>(session, static_cast<const void *>(nullptr), names[0].data(), values[0].data(), values[0].size(), names[1].data(), values[1].size(), values[1].data());
    which = run.inputs->size();
    for (const Bound &b : *run.outputs) {
      const auto &copy = wide[which++];
      for (size_t i = 0; i < copy.size(); i++) {
        uint16_t bits;
        if (b.type == onnx::BFLOAT16) {
          uint32_t word;
          memcpy(&word, &copy[i], 4);
          bits = uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
        } else {
          const _Float16 half = _Float16(copy[i]);
          memcpy(&bits, &half, 2);
        }
        static_cast<uint16_t *>(b.address)[i] = bits;
      }
    }
    for (const auto &list : values) for (void *value : list) r.release<96>(value);
    r.release<94>(place);
    tell("{\"ran\":" + std::to_string(run.inputs->empty() ? 0 : run.inputs->front().shape.empty() ? 1 : run.inputs->front().shape[0]) + "}");
  } catch (const std::exception &e) {
    fprintf(stderr, "the stand-in for TensorRT: %s\n", e.what());
    abort();
  }
}
// What is queued is played again by a recording, so that its lists stay.
bool Context::enqueue(void *stream) {
  if (!engine->absent.empty()) { complain(engine->logger, "weights are missing: " + *engine->absent.begin()); return false; }
  auto inputs = new std::vector<Bound>, outputs = new std::vector<Bound>;
  for (const bool output : {false, true}) {
    for (const onnx::Value &v : output ? engine->model.outputs : engine->model.inputs) {
      Bound b = {v.name, v.type, shape_of(v.name), addresses[v.name], 1, 0};
      for (const int64_t size : b.shape) {
        if (size < 0) { complain(engine->logger, "the shape of " + v.name + " is not known"); return false; }
        b.count *= size_t(size);
      }
      b.bytes = b.count * onnx::size_of(v.type);
      Block block;
      if (!stand_in_block(uint64_t(b.address), &block) || uint64_t(b.address) + b.bytes > block.end) {
        complain(engine->logger, v.name + " is not in memory of the device");
        return false;
      }
      (output ? outputs : inputs)->push_back(b);
    }
  }
  const Run what = {engine, inputs, outputs};
  return stand_in_queue(stream, run, &what, sizeof what) == 0;
}
Table Context::functions_of() {
  return table<CONTEXT>({
      AT(7, [](void *self) -> void * { return of<Context>(self).engine; }),
      AT(17, [](void *, int32_t, void *) -> bool { return true; }),
      AT(21, [](void *self, const char *name, const Dims &d) -> bool { return of<Context>(self).set(name, shape(d)); }),
      AT(22, [](void *self, const char *name) -> Dims { return dims(of<Context>(self).shape_of(name)); }),
      AT(24, [](void *self, const char *name, void *address) -> bool { of<Context>(self).addresses[name] = address; return true; }),
      AT(26, [](void *self, const char *name, void *address) -> bool { of<Context>(self).addresses[name] = address; return true; }),
      AT(27, [](void *self, const char *name, void *address) -> bool { of<Context>(self).addresses[name] = address; return true; }),
      AT(37, [](void *self, void *stream) -> bool { return of<Context>(self).enqueue(stream); }),
      AT(42, [](void *, void **, int32_t) {}),
  });
}

struct Serialization : Class<Serialization> {
  uint32_t flags = 0;
  static Table functions_of() {
    return table<SERIALIZATION>({
        AT(2, [](void *self, uint32_t flags) -> bool { of<Serialization>(self).flags = flags; return true; }),
        AT(3, [](void *self) -> uint32_t { return of<Serialization>(self).flags; }),
        AT(4, [](void *self, int32_t flag) -> bool { of<Serialization>(self).flags &= ~(1u << flag); return true; }),
        AT(5, [](void *self, int32_t flag) -> bool { of<Serialization>(self).flags |= 1u << flag; return true; }),
    });
  }
};

Table Engine::functions_of() {
  return table<ENGINE>({
      AT(3, [](void *self) -> int32_t { return int32_t(of<Engine>(self).model.nodes.size()); }),
      AT(4, [](void *self) -> void * { return memory(serialized(of<Engine>(self).plan)); }),
      AT(5, [](void *self, int32_t) -> void * { Context *c = new Context; c->engine = &of<Engine>(self); return c; }),
      AT(6, [](void *self) -> void * { Context *c = new Context; c->engine = &of<Engine>(self); return c; }),
      AT(7, [](void *) -> size_t { return 0; }),
      AT(8, [](void *self) -> bool { return of<Engine>(self).plan.stripped; }),
      AT(10, [](void *) -> int32_t { return 1; }),
      AT(19, [](void *self, const char *name) -> Dims { const onnx::Value *v = of<Engine>(self).find(name); return v ? dims(v->shape) : Dims{-1, {}}; }),
      AT(20, [](void *self, const char *name) -> int32_t { const onnx::Value *v = of<Engine>(self).find(name); return v ? type_of(v->type) : 0; }),
      AT(21, [](void *, const char *) -> int32_t { return 0; }),
      AT(22, [](void *, const char *) -> bool { return false; }),
      AT(23, [](void *self, const char *name) -> int32_t {
        for (const onnx::Value &v : of<Engine>(self).model.inputs) if (v.name == name) return 1;
        return of<Engine>(self).find(name) ? 2 : 0;
      }),
      AT(30, [](void *self) -> int32_t { const onnx::Model &m = of<Engine>(self).model; return int32_t(m.inputs.size() + m.outputs.size()); }),
      AT(31, [](void *self, int32_t i) -> const char * {
        const onnx::Model &m = of<Engine>(self).model;
        const size_t place = size_t(i);
        return (place < m.inputs.size() ? m.inputs[place] : m.outputs[place - m.inputs.size()]).name.c_str();
      }),
      AT(32, [](void *self) -> int32_t { return int32_t(of<Engine>(self).plan.compatible); }),
      AT(33, [](void *) -> int32_t { return 0; }),
      AT(39, [](void *) -> void * { return new Serialization; }),
      AT(40, [](void *self, Serialization &) -> void * { return memory(serialized(of<Engine>(self).plan)); }),
      AT(52, [](void *) -> int64_t { return 0; }),
  });
}

struct Loader : Class<Loader> {
  void *logger = nullptr;
  static Table functions_of() {
    return table<RUNTIME>({
        AT(3, [](void *self, const char *blob, size_t bytes) -> void * {
          Loader &loader = of<Loader>(self);
          try {
            auto engine = std::make_unique<Engine>();
            engine->logger = loader.logger;
            engine->open(deserialized(blob, bytes));
            tell("{\"loaded\":" + std::to_string(bytes) + ",\"without_weights\":" + std::to_string(engine->absent.size()) + "}");
            return engine.release();
          } catch (const std::exception &e) {
            complain(loader.logger, e.what());
            return nullptr;
          }
        }),
        AT(12, [](void *, int32_t) -> bool { return true; }),
        AT(21, [](void *, bool) {}),
    });
  }
};

struct Refitter : Class<Refitter> {
  Engine *engine = nullptr;
  bool whole = true;
  static Table functions_of() {
    return table<REFITTER>({
        AT(4, [](void *self) -> bool { return of<Refitter>(self).whole && of<Refitter>(self).engine->absent.empty(); }),
    });
  }
};

// --- The parser: classes with functions of their own.
struct Parser {
  void **functions;
  Network *network = nullptr;
  void *logger = nullptr;
  std::vector<std::pair<bool, std::vector<int64_t>>> parts;
  std::string pending;
  std::map<std::string, std::string> given;
  // Runs of nodes that are taken, or not.
  bool supports(const std::string &bytes) {
    const onnx::Model model = onnx::read(bytes);
    parts.clear();
    bool all = true;
    for (size_t i = 0; i < model.nodes.size(); i++) {
      const std::string why = refusal(model, model.nodes[i]);
      if (!why.empty()) tell("{\"refused\":" + quoted(model.nodes[i].name) + ",\"why\":" + quoted(why) + "}");
      if (parts.empty() || parts.back().first != why.empty()) parts.push_back({why.empty(), {}});
      parts.back().second.push_back(int64_t(i));
      all &= why.empty();
    }
    return all;
  }
  bool parse(const std::string &given, const char *path) {
    try {
      const std::string bytes = onnx::whole(given, path ? path : "");
      const onnx::Model model = onnx::read(bytes);
      for (const onnx::Node &n : model.nodes) {
        const std::string why = refusal(model, n);
        if (!why.empty()) throw std::runtime_error(n.name + ": " + why);
      }
      network->take(bytes);
      return true;
    } catch (const std::exception &e) {
      complain(logger, e.what());
      return false;
    }
  }
  static Table &functions_of() {
    static Table t = table<PARSER>({
        AT(0, [](Parser *self, const char *model, size_t bytes, const char *path) -> bool { return self->parse(std::string(model, bytes), path); }),
        AT(5, [](Parser *) -> int32_t { return 0; }),
        AT(8, [](Parser *self) { self->~Parser(); }),
        AT(9, [](Parser *self) { delete self; }),
        AT(11, [](Parser *, uint32_t) {}),
        AT(14, [](Parser *, int32_t) {}),
        AT(17, [](Parser *self, const char *model, size_t bytes, const char *) -> bool { return self->supports(std::string(model, bytes)); }),
        AT(18, [](Parser *self) -> int64_t { return int64_t(self->parts.size()); }),
        AT(19, [](Parser *self, int64_t i) -> bool { return self->parts[size_t(i)].first; }),
        AT(20, [](Parser *self, int64_t i, int64_t &count) -> int64_t * {
          auto &nodes = self->parts[size_t(i)].second;
          count = int64_t(nodes.size());
          return nodes.data();
        }),
        AT(21, [](Parser *self, const char *model, size_t bytes, const char *) -> bool { self->pending.assign(model, bytes); self->given.clear(); return true; }),
        AT(22, [](Parser *self, const char *name, const char *data, size_t bytes) -> bool { self->given[name].assign(data, bytes); return true; }),
        AT(23, [](Parser *self) -> bool { return self->supports(self->pending) && self->parse(onnx::with_values(self->pending, self->given), ""); }),
        AT(24, [](Parser *, const void *) -> bool { return true; }),
    });
    return t;
  }
};

struct ParserRefitter {
  void **functions;
  Refitter *refitter = nullptr;
  bool refit(const std::string &bytes, const char *path) {
    try {
      return refitter->whole = refitter->engine->refit(onnx::whole(bytes, path ? path : ""));
    } catch (const std::exception &e) {
      complain(refitter->engine->logger, e.what());
      return refitter->whole = false;
    }
  }
  static Table &functions_of() {
    static Table t = table<PARSER_REFITTER>({
        AT(0, [](ParserRefitter *self, const char *model, size_t bytes, const char *path) -> bool { return self->refit(std::string(model, bytes), path); }),
        AT(1, [](ParserRefitter *self, const char *file) -> bool {
          std::string bytes;
          if (FILE *in = fopen(file, "rb")) {
            char piece[65536];
            for (size_t n; (n = fread(piece, 1, sizeof piece, in)) > 0;) bytes.append(piece, n);
            fclose(in);
          }
          return self->refit(bytes, file);
        }),
        AT(2, [](ParserRefitter *) -> int32_t { return 0; }),
        AT(5, [](ParserRefitter *self) { self->~ParserRefitter(); }),
        AT(6, [](ParserRefitter *self) { delete self; }),
    });
    return t;
  }
};

}  // namespace

extern "C" {
int32_t getInferLibVersion() { return 101601; }
void *createInferBuilder_INTERNAL(void *logger, int32_t) { Builder *b = new Builder; b->logger = logger; return b; }
void *createInferRuntime_INTERNAL(void *logger, int32_t) { Loader *l = new Loader; l->logger = logger; return l; }
void *createInferRefitter_INTERNAL(void *engine, void *, int32_t) {
  Refitter *r = new Refitter;
  r->engine = static_cast<Engine *>(engine);
  return r;
}
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int) {
  return new Parser{Parser::functions_of().data(), static_cast<Network *>(network), logger, {}, {}, {}};
}
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *, int32_t) {
  return new ParserRefitter{ParserRefitter::functions_of().data(), static_cast<Refitter *>(refitter)};
}
void *getPluginRegistry() {
  static Table functions = table<REGISTRY>({
      AT(13, [](void *, int32_t *count) -> void * { *count = 0; return nullptr; }),
  });
  static void **registry = functions.data();
  return &registry;
}
}
