// Reads PTX.

#include "machine.h"

#include <cctype>

namespace ptx {
namespace {
class Reader {
  public:
    explicit Reader(const std::string &text) {
        // Comments to the end of the line; NVRTC writes no others.
        for (size_t at = 0; at < text.size(); at++) {
            if (text.compare(at, 2, "//") == 0) {
                at = text.find('\n', at);
                if (at == std::string::npos) {
                    break;
                }
            }
            all += text[at];
        }
    }

    bool more() {
        while (at < all.size() && isspace((u8)all[at])) {
            at++;
        }
        return at < all.size();
    }
    char peek() { return more() ? all[at] : 0; }
    bool take(char c) { return peek() == c ? (at++, true) : false; }
    void expect(char c) {
        if (!take(c)) {
            throw Refusal(std::string("PTX: expected `") + c + "` at `" + all.substr(at, 40) + "`");
        }
    }
    // A word: names, numbers, opcodes, directives.
    std::string word() {
        peek();
        const size_t begin = at;
        while (at < all.size() && (isalnum((u8)all[at]) || strchr("_$%.-", all[at]))) {
            at++;
        }
        if (begin == at) {
            throw Refusal("PTX: expected a word at `" + all.substr(at, 40) + "`");
        }
        return all.substr(begin, at - begin);
    }
    // Everything up to a character, which is taken, too.
    std::string until(char c) {
        const size_t begin = at;
        at = all.find(c, at);
        if (at == std::string::npos) {
            throw Refusal(std::string("PTX: `") + c + "` is missing");
        }
        return all.substr(begin, at++ - begin);
    }
    bool ahead(const char *text) { return peek() && all.compare(at, strlen(text), text) == 0; }

  private:
    std::string all;
    size_t at = 0;
};

u32 size_of(const std::string &type) {
    return type == ".pred" ? 8 : (u32)std::stoul(type.substr(2)) / 8;
}

// A declaration behind its space: alignment, type, name, and how many; none for as many as the launch says.
struct Declared {
    std::string name;
    u32 bytes, alignment, element;
};

Declared declaration(Reader &reader) {
    u32 alignment = 1;
    std::string word = reader.word();
    if (word == ".align") {
        alignment = (u32)std::stoul(reader.word());
        word = reader.word();
    }
    const u32 size = size_of(word);
    Declared declared = {reader.word(), size, alignment > size ? alignment : size, size};
    if (reader.take('[')) {
        declared.bytes = reader.peek() == ']' ? 0 : size * (u32)std::stoul(reader.word());
        reader.expect(']');
    }
    return declared;
}

u32 placed(u32 &end, const Declared &declared) {
    const u32 at = (end + declared.alignment - 1) / declared.alignment * declared.alignment;
    end = at + declared.bytes;
    return at;
}

class Body {
  public:
    Body(Reader &reader, Module &module, Function &function) : reader(reader), module(module), f(function) {}

    void read() {
        u32 depth = 1;
        while (depth > 0) {
            if (reader.take('{')) {
                depth++;
            } else if (reader.take('}')) {
                depth--;
            } else {
                statement();
            }
        }
        // A launch's memory lies behind the function's own.
        for (const std::string &name : module.dynamic) {
            const auto used = symbols.find(name);
            if (used != symbols.end()) {
                f.shared_bytes = (f.shared_bytes + 15) / 16 * 16;
                f.constants.emplace_back(used->second, f.shared_bytes);
            }
        }
        for (const auto &[instruction, label] : jumps) {
            if (!labels.count(label)) {
                throw Refusal("PTX: no label " + label);
            }
            f.code[instruction].target = labels.at(label);
        }
        const std::string last = f.code.empty() ? "" : f.code.back().text.substr(0, 3);
        if (last != "ret" && last != "bra") {
            throw Refusal("PTX: " + f.name + " has no end");
        }
    }

  private:
    Reader &reader;
    Module &module;
    Function &f;
    std::map<std::string, u32> labels, symbols;
    std::map<std::string, u64> shared, local;
    std::vector<std::pair<size_t, std::string>> jumps;

    void statement() {
        s32 guard = -1;
        bool unless = false;
        if (reader.take('@')) {
            unless = reader.take('!');
            guard = (s32)f.slot(reader.word());
        }
        const std::string word = reader.word();
        if (reader.take(':')) {
            labels[word] = (u32)f.code.size();
            return;
        }
        if (word[0] == '.') {
            declare(word);
            return;
        }
        Instruction i;
        i.guard = guard;
        i.unless = unless;
        instruct(word, std::move(i));
    }

    void declare(const std::string &space) {
        if (space == ".pragma") {
            reader.until(';');
            return;
        }
        if (space == ".reg") {
            // Registers have slots when they are first used.
            reader.until(';');
            return;
        }
        const Declared declared = declaration(reader);
        reader.expect(';');
        if (space == ".shared") {
            shared[declared.name] = placed(f.shared_bytes, declared);
        } else if (space == ".local") {
            local[declared.name] = placed(f.local_bytes, declared);
        } else if (space == ".param") {
            if (!f.params.count(declared.name)) {
                f.params[declared.name] = {placed(f.param_bytes, declared), declared.bytes};
            }
        } else {
            throw Refusal("PTX: a declaration that the machine does not know: " + space);
        }
    }

    u32 constant(const std::string &name, u64 value) {
        const bool known = f.slots.count(name);
        const u32 slot = f.slot(name);
        if (!known) {
            f.constants.emplace_back(slot, value);
        }
        return slot;
    }

    u32 operand(const std::string &word) {
        const char first = word[0];
        if (first == '%') {
            return f.slot(word);
        }
        if (word.compare(0, 2, "0f") == 0 || word.compare(0, 2, "0d") == 0) {
            return constant(word, std::stoull(word.substr(2), nullptr, 16));
        }
        if (isdigit((u8)first) || first == '-') {
            return constant(word, first == '-' ? (u64)std::stoll(word) : std::stoull(word, nullptr, 0));
        }
        if (f.params.count(word)) {
            return constant(word, f.params.at(word).address);
        }
        if (shared.count(word) || local.count(word)) {
            return constant(word, shared.count(word) ? shared.at(word) : local.at(word));
        }
        for (const std::string &name : module.dynamic) {
            if (name == word) {
                return symbols[word] = f.slot(word);
            }
        }
        if (module.globals.count(word)) {
            return constant(word, (u64)module.globals.at(word)->data());
        }
        throw Refusal("PTX: `" + word + "` is declared nowhere");
    }

    void instruct(const std::string &opcode, Instruction i) {
        if (opcode == "call" || opcode == "call.uni") {
            call(opcode, std::move(i));
            return;
        }
        i.text = opcode;
        bool unpacks = false, first = true;
        while (!reader.take(';')) {
            if (reader.take('[')) {
                const u32 slot = operand(reader.word());
                const s64 offset = reader.take('+') ? std::stoll(reader.word()) : 0;
                reader.expect(']');
                i.places.push_back({slot, offset});
            } else if (reader.take('{')) {
                unpacks |= first;
            } else if (!reader.take(',') && !reader.take('}') && !reader.take('|')) {
                const std::string name = reader.word();
                i.text += " " + name;
                if (opcode.compare(0, 3, "bra") == 0) {
                    jumps.emplace_back(f.code.size(), name);
                } else {
                    i.slots.push_back(operand(name));
                }
            }
            first = false;
        }
        finish(opcode, unpacks, std::move(i));
    }

    void finish(const std::string &opcode, bool unpacks, Instruction i) {
        i.run = decode(opcode, unpacks, i);
        if (!i.run) {
            throw Refusal("PTX: an instruction that the machine does not know: " + opcode);
        }
        f.code.push_back(std::move(i));
    }

    // call (results), function, (arguments);
    void call(const std::string &opcode, Instruction i) {
        std::vector<std::string> groups[2];
        std::string name;
        u32 group = 0;
        while (!reader.take(';')) {
            if (reader.take('(')) {
                while (!reader.take(')')) {
                    groups[group].push_back(reader.word());
                    reader.take(',');
                }
                group = 1;
            } else if (!reader.take(',')) {
                name = reader.word();
                group = 1;
            }
        }
        if (!module.functions.count(name)) {
            throw Refusal("PTX: a call of " + name + ", which is not there");
        }
        i.text = opcode + " " + name;
        i.callee = module.functions.at(name).get();
        const auto places = [&](const std::vector<std::string> &names) {
            std::vector<std::pair<u32, u32>> all;
            for (const std::string &one : names) {
                all.emplace_back((u32)f.params.at(one).address, f.params.at(one).bytes);
            }
            return all;
        };
        i.returned = places(groups[0]);
        i.given = places(groups[1]);
        finish(opcode, false, std::move(i));
    }
};

// A list of parameters in parentheses; their names in order.
std::vector<std::string> parameters(Reader &reader, Function &f) {
    std::vector<std::string> names;
    reader.expect('(');
    while (!reader.take(')')) {
        if (reader.word() != ".param") {
            throw Refusal("PTX: a parameter that is none");
        }
        const Declared declared = declaration(reader);
        f.params[declared.name] = {placed(f.param_bytes, declared), declared.bytes};
        names.push_back(declared.name);
        reader.take(',');
    }
    return names;
}

void function(Reader &reader, Module &module, bool entry) {
    auto read = std::make_unique<Function>();
    read->entry = entry;
    if (!entry && reader.peek() == '(') {
        read->results = parameters(reader, *read);
    }
    read->name = reader.word();
    read->arguments = parameters(reader, *read);
    // What was declared before is the same function.
    Function *f = module.functions.try_emplace(read->name, std::make_unique<Function>()).first->second.get();
    *f = std::move(*read);
    f->module = &module;
    while (reader.peek() == '.') {
        const std::string directive = reader.word();
        if (directive == ".maxntid") {
            f->most_threads = 1;
            do {
                f->most_threads *= (u32)std::stoul(reader.word());
            } while (reader.take(','));
        } else if (directive == ".minnctapersm") {
            reader.word();
        } else {
            throw Refusal("PTX: a directive that the machine does not know: " + directive);
        }
    }
    if (reader.take(';')) {
        return;
    }
    reader.expect('{');
    Body(reader, module, *f).read();
}

void global(Reader &reader, Module &module) {
    const Declared declared = declaration(reader);
    auto memory = std::make_unique<std::vector<u8>>(declared.bytes);
    if (reader.take('=')) {
        const bool list = reader.take('{');
        u32 at = 0;
        do {
            const std::string word = reader.word();
            const u64 value = word[0] == '-' ? (u64)std::stoll(word) : std::stoull(word);
            memcpy(memory->data() + at, &value, declared.element);
            at += declared.element;
        } while (reader.take(','));
        if (list) {
            reader.expect('}');
        }
    }
    reader.expect(';');
    module.globals[declared.name] = std::move(memory);
}
} // namespace

std::unique_ptr<Module> parse(const std::string &text) {
    auto module = std::make_unique<Module>();
    Reader reader(text);
    while (reader.more()) {
        const std::string word = reader.word();
        if (word == ".version" || word == ".target" || word == ".address_size") {
            reader.word();
        } else if (word == ".visible" || word == ".weak") {
            continue;
        } else if (word == ".entry" || word == ".func") {
            function(reader, *module, word == ".entry");
        } else if (word == ".global") {
            global(reader, *module);
        } else if (word == ".extern") {
            if (reader.word() != ".shared") {
                throw Refusal("PTX: something external that is no shared memory");
            }
            module->dynamic.push_back(declaration(reader).name);
            reader.expect(';');
        } else {
            throw Refusal("PTX: `" + word + "` at the top");
        }
    }
    return module;
}
} // namespace ptx
