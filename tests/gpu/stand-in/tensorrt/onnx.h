// What the stand-in for TensorRT reads and changes of an ONNX model: protobuf's wire format, and the messages' numbers.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace onnx {

// ONNX's numbers of element types.
enum Type { FLOAT = 1, INT32 = 6, INT64 = 7, BOOL = 9, FLOAT16 = 10, BFLOAT16 = 16 };
inline size_t size_of(int type) {
  switch (type) {
    case BOOL: return 1;
    case FLOAT16: case BFLOAT16: return 2;
    case FLOAT: case INT32: return 4;
    case INT64: return 8;
    default: return 0;
  }
}

struct Field {
  uint32_t number = 0, wire = 0;
  uint64_t value = 0;           // of a number
  const char *data = nullptr;   // of bytes
  size_t bytes = 0;
  std::string text() const { return std::string(data, bytes); }
};

inline uint64_t varint(const char *&at, const char *end) {
  uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (at == end) break;
    const uint8_t byte = uint8_t(*at++);
    value |= uint64_t(byte & 127) << shift;
    if (byte < 128) return value;
  }
  throw std::runtime_error("a number of the model is cut off");
}

inline void each(const char *at, size_t bytes, const std::function<void(const Field &)> &visit) {
  for (const char *end = at + bytes; at < end;) {
    Field f;
    const uint64_t key = varint(at, end);
    f.number = uint32_t(key >> 3), f.wire = key & 7;
    switch (f.wire) {
      case 0: f.value = varint(at, end); break;
      case 1: f.bytes = 8; break;
      case 2: f.bytes = varint(at, end); break;
      case 5: f.bytes = 4; break;
      default: throw std::runtime_error("the model is not one of protobuf");
    }
    if (f.wire) {
      if (f.bytes > size_t(end - at)) throw std::runtime_error("the model is cut off");
      f.data = at;
      at += f.bytes;
    }
    visit(f);
  }
}
inline void each(const std::string &message, const std::function<void(const Field &)> &visit) { each(message.data(), message.size(), visit); }

inline void put_varint(std::string &out, uint64_t value) {
  for (; value > 127; value >>= 7) out += char(value | 128);
  out += char(value);
}
inline void put(std::string &out, uint32_t number, const std::string &bytes) {
  put_varint(out, number << 3 | 2);
  put_varint(out, bytes.size());
  out += bytes;
}
inline void put(std::string &out, uint32_t number, uint64_t value) {
  put_varint(out, number << 3);
  put_varint(out, value);
}
inline void put(std::string &out, const Field &f) {
  if (f.wire == 0) return put(out, f.number, f.value);
  put_varint(out, f.number << 3 | f.wire);
  if (f.wire == 2) put_varint(out, f.bytes);
  out.append(f.data, f.bytes);
}

struct Value {
  std::string name;
  int type = 0;
  std::vector<int64_t> shape;        // -1 where an axis is open
  std::vector<std::string> symbols;  // of those axes
};
struct Node {
  std::string op, domain, name;
  std::vector<std::string> inputs, outputs;
  std::set<std::string> attributes;
};
struct Model {
  std::vector<Value> inputs, outputs;
  std::vector<Node> nodes;
  std::map<std::string, int> types;  // of every value that the model tells it of
  std::map<std::string, size_t> initializers;  // their bytes
};

inline Value value_of(const Field &message) {
  Value v;
  each(message.data, message.bytes, [&](const Field &f) {
    if (f.number == 1) v.name = f.text();
    if (f.number != 2) return;
    each(f.data, f.bytes, [&](const Field &tensor) {
      if (tensor.number != 1) return;
      each(tensor.data, tensor.bytes, [&](const Field &t) {
        if (t.number == 1) v.type = int(t.value);
        if (t.number != 2) return;
        each(t.data, t.bytes, [&](const Field &dim) {
          int64_t size = -1;
          std::string symbol;
          each(dim.data, dim.bytes, [&](const Field &d) {
            if (d.number == 1) size = int64_t(d.value);
            if (d.number == 2) symbol = d.text();
          });
          v.shape.push_back(size);
          v.symbols.push_back(symbol);
        });
      });
    });
  });
  return v;
}

struct Tensor {
  std::string name, raw;
  std::vector<int64_t> shape;
  int type = 0;
  bool listed = false;  // its values are numbers of the message
  std::map<std::string, std::string> elsewhere;  // where the values lie, unless in the model
};
inline Tensor tensor_of(const Field &message) {
  Tensor t;
  each(message.data, message.bytes, [&](const Field &f) {
    if (f.number == 1 && f.wire == 0) t.shape.push_back(int64_t(f.value));
    if (f.number == 1 && f.wire == 2) for (const char *at = f.data; at < f.data + f.bytes;) t.shape.push_back(int64_t(varint(at, f.data + f.bytes)));
    if (f.number == 2) t.type = int(f.value);
    if (f.number == 8) t.name = f.text();
    if (f.number == 9) t.raw = f.text();
    if (f.number == 4 || f.number == 5 || f.number == 7) t.listed = true;
    if (f.number != 13) return;
    std::string key, value;
    each(f.data, f.bytes, [&](const Field &e) { (e.number == 1 ? key : value) = e.text(); });
    t.elsewhere[key] = value;
  });
  return t;
}

inline Model read(const std::string &bytes) {
  Model m;
  each(bytes, [&](const Field &graph) {
    if (graph.number != 7) return;
    each(graph.data, graph.bytes, [&](const Field &f) {
      switch (f.number) {
        case 1: {
          Node n;
          each(f.data, f.bytes, [&](const Field &part) {
            switch (part.number) {
              case 1: n.inputs.push_back(part.text()); break;
              case 2: n.outputs.push_back(part.text()); break;
              case 3: n.name = part.text(); break;
              case 4: n.op = part.text(); break;
              case 5: each(part.data, part.bytes, [&](const Field &a) { if (a.number == 1) n.attributes.insert(a.text()); }); break;
              case 7: n.domain = part.text(); break;
            }
          });
          m.nodes.push_back(n);
          break;
        }
        case 5: {
          const Tensor t = tensor_of(f);
          m.types[t.name] = t.type;
          m.initializers[t.name] = t.raw.size();
          break;
        }
        case 11: m.inputs.push_back(value_of(f)); break;
        case 12: m.outputs.push_back(value_of(f)); break;
        case 13: { const Value v = value_of(f); m.types[v.name] = v.type; break; }
      }
    });
  });
  std::vector<Value> fed;
  for (const Value &v : m.inputs) {
    m.types[v.name] = v.type;
    if (!m.initializers.count(v.name)) fed.push_back(v);
  }
  m.inputs = fed;
  for (const Value &v : m.outputs) m.types[v.name] = v.type;
  return m;
}

// A copy of the model whose initializers went through `change`, which gives a tensor's new message; without those for which it
// is empty.
inline std::string with_initializers(const std::string &bytes, const std::function<std::string(const Field &)> &change) {
  std::string model;
  each(bytes, [&](const Field &f) {
    if (f.number != 7) return put(model, f);
    std::string graph;
    each(f.data, f.bytes, [&](const Field &part) {
      if (part.number != 5) return put(graph, part);
      const std::string changed = change(part);
      if (!changed.empty()) put(graph, 5, changed);
    });
    put(model, 7, graph);
  });
  return model;
}

// The model with all its values inside: those of other files are looked for beside the model.
inline std::string whole(const std::string &bytes, const std::string &path) {
  return with_initializers(bytes, [&](const Field &message) {
    const Tensor t = tensor_of(message);
    if (t.elsewhere.empty()) return std::string(message.data, message.bytes);
    const auto number = [&](const char *key) { return t.elsewhere.count(key) ? std::stoull(t.elsewhere.at(key)) : 0ull; };
    const std::string &place = t.elsewhere.at("location");
    const std::string file = path.substr(0, path.find_last_of('/') + 1) + place;
    std::string values(number("length"), 0);
    FILE *in = place.empty() || place[0] == '*' ? nullptr : fopen(file.c_str(), "rb");
    const bool read = in && !fseek(in, long(number("offset")), SEEK_SET) && fread(values.data(), 1, values.size(), in) == values.size();
    if (in) fclose(in);
    if (!read) throw std::runtime_error("values of " + t.name + " are not in " + file);
    std::string out;
    each(message.data, message.bytes, [&](const Field &f) { if (f.number != 13 && f.number != 14) put(out, f); });
    put(out, 9, values);
    return out;
  });
}

// The model with tensors of f32 as further inputs.
inline std::string with_inputs(const std::string &bytes, const std::vector<Tensor> &tensors) {
  std::string model;
  each(bytes, [&](const Field &f) {
    if (f.number != 7) return put(model, f);
    std::string graph(f.data, f.bytes);
    for (const Tensor &t : tensors) {
      std::string shape, tensor, type, value;
      for (const int64_t size : t.shape) {
        std::string dim;
        put(dim, 1, uint64_t(size));
        put(shape, 1, dim);
      }
      put(tensor, 1, uint64_t(FLOAT));
      put(tensor, 2, shape);
      put(type, 1, tensor);
      put(value, 1, t.name);
      put(value, 2, type);
      put(graph, 11, value);
    }
    put(model, 7, graph);
  });
  return model;
}

// The model whose tensors of another place have the values that were given for them.
inline std::string with_values(const std::string &bytes, const std::map<std::string, std::string> &given) {
  return with_initializers(bytes, [&](const Field &message) {
    const Tensor t = tensor_of(message);
    const auto found = given.find(t.name);
    if (found == given.end()) return std::string(message.data, message.bytes);
    std::string out;
    each(message.data, message.bytes, [&](const Field &f) { if (f.number != 9 && f.number != 13 && f.number != 14) put(out, f); });
    put(out, 9, found->second);
    return out;
  });
}

inline float widened(uint16_t bits, int type) {
  if (type == BFLOAT16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}
inline bool narrow(uint64_t type) { return type == FLOAT16 || type == BFLOAT16; }

// The message of a tensor in f32, where it was narrower.
inline std::string wide_tensor(const Field &message) {
  const Tensor t = tensor_of(message);
  std::string out;
  std::vector<float> values;
  if (narrow(t.type)) {
    for (size_t i = 0; i + 1 < t.raw.size(); i += 2) {
      uint16_t bits;
      memcpy(&bits, t.raw.data() + i, 2);
      values.push_back(widened(bits, t.type));
    }
  }
  each(message.data, message.bytes, [&](const Field &f) {
    if (f.number == 2 && narrow(f.value)) return put(out, 2, uint64_t(FLOAT));
    if (f.number == 5 && narrow(t.type)) {  // bits that are kept as numbers
      const char *at = f.data;
      while (at < f.data + f.bytes) values.push_back(widened(uint16_t(varint(at, f.data + f.bytes)), t.type));
      return;
    }
    if (f.number == 9 && narrow(t.type)) return;
    put(out, f);
  });
  if (narrow(t.type)) put(out, 9, std::string(reinterpret_cast<const char *>(values.data()), values.size() * 4));
  return out;
}

// The model in f32, so that a CPU computes it: bf16 and f16 become f32 everywhere.
inline std::string wide(const std::string &bytes) {
  const std::function<std::string(const Field &)> type = [&](const Field &message) {
    std::string out;
    each(message.data, message.bytes, [&](const Field &f) {
      if (f.number != 1) return put(out, f);
      std::string tensor;
      each(f.data, f.bytes, [&](const Field &t) {
        if (t.number == 1 && narrow(t.value)) put(tensor, 1, uint64_t(FLOAT)); else put(tensor, t);
      });
      put(out, 1, tensor);
    });
    return out;
  };
  const auto value = [&](const Field &message) {
    std::string out;
    each(message.data, message.bytes, [&](const Field &f) { if (f.number == 2) put(out, 2, type(f)); else put(out, f); });
    return out;
  };
  const auto node = [&](const Field &message) {
    std::string out;
    each(message.data, message.bytes, [&](const Field &f) {
      if (f.number != 5) return put(out, f);
      std::string attribute, name;
      each(f.data, f.bytes, [&](const Field &a) { if (a.number == 1) name = a.text(); });
      each(f.data, f.bytes, [&](const Field &a) {
        if (a.number == 3 && name == "to" && narrow(a.value)) return put(attribute, 3, uint64_t(FLOAT));
        if (a.number == 5) return put(attribute, 5, wide_tensor(a));
        put(attribute, a);
      });
      put(out, 5, attribute);
    });
    return out;
  };
  std::string model;
  each(bytes, [&](const Field &f) {
    if (f.number != 7) return put(model, f);
    std::string graph;
    each(f.data, f.bytes, [&](const Field &part) {
      switch (part.number) {
        case 1: return put(graph, 1, node(part));
        case 5: return put(graph, 5, wide_tensor(part));
        case 11: case 12: case 13: return put(graph, part.number, value(part));
        default: put(graph, part);
      }
    });
    put(model, 7, graph);
  });
  return model;
}

}  // namespace onnx
