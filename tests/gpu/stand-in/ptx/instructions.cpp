// What each opcode does.

#include "collective.h"

#include <cfenv>
#include <cmath>

namespace ptx {
namespace {
template <class T> T least(T a, T b) { return b < a ? b : a; }
template <class T> T greatest(T a, T b) { return a < b ? b : a; }
// Of a number and no number, the number.
template <> f32 least(f32 a, f32 b) { return fminf(a, b); }
template <> f32 greatest(f32 a, f32 b) { return fmaxf(a, b); }
template <> f64 least(f64 a, f64 b) { return fmin(a, b); }

#define A get<T>(i, 1)
#define B get<T>(i, 2)
#define C get<T>(i, 3)
#define ONE(name, type, value) {name, [](Thread &t, const Instruction &i) { typedef type T; const T a = t.A; t.set<T>(i, 0, (T)(value)); }}
#define TWO(name, type, value)                                                                                                 \
    {name, [](Thread &t, const Instruction &i) {                                                                               \
         typedef type T;                                                                                                       \
         const T a = t.A, b = t.B;                                                                                             \
         t.set<T>(i, 0, (T)(value));                                                                                           \
     }}
#define THREE(name, type, value)                                                                                               \
    {name, [](Thread &t, const Instruction &i) {                                                                               \
         typedef type T;                                                                                                       \
         const T a = t.A, b = t.B, c = t.C;                                                                                    \
         t.set<T>(i, 0, (T)(value));                                                                                           \
     }}
#define CONVERT(name, from, to, value)                                                                                         \
    {name, [](Thread &t, const Instruction &i) {                                                                               \
         const from a = t.get<from>(i, 1);                                                                                     \
         t.set<to>(i, 0, (to)(value));                                                                                         \
     }}
#define WIDE(name, type, wide) {name, [](Thread &t, const Instruction &i) { t.set<wide>(i, 0, (wide)t.get<type>(i, 1) * (wide)t.get<type>(i, 2)); }}
// Sums that keep or take the carry.
#define CARRIED(name, value)                                                                                                   \
    {name, [](Thread &t, const Instruction &i) {                                                                               \
         const u64 a = t.get<u32>(i, 1), b = t.get<u32>(i, 2), c = i.slots.size() > 3 ? t.get<u32>(i, 3) : 0, in = t.carry;   \
         (void)c, (void)in;                                                                                                    \
         const u64 sum = (value);                                                                                              \
         t.set<u32>(i, 0, (u32)sum);                                                                                           \
         if (i.text.find(".cc") != std::string::npos) t.carry = sum >> 32 & 1;                                                 \
     }}

u32 pack_bf16(f32 high, f32 low) {
    const auto round = [](f32 x) -> u32 {
        u32 bits;
        memcpy(&bits, &x, sizeof bits);
        return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFF : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    };
    return round(high) << 16 | round(low);
}

u32 pack_f16(f32 high, f32 low) {
    const auto round = [](f32 x) -> u32 {
        const _Float16 half = (_Float16)x;
        u16 bits;
        memcpy(&bits, &half, sizeof bits);
        return bits;
    };
    return round(high) << 16 | round(low);
}

f32 fused_downward(f32 a, f32 b, f32 c) {
    volatile f32 x = a, y = b, z = c;
    fesetround(FE_DOWNWARD);
    const volatile f32 value = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return value;
}

f32 power_of_two(f32 x) {
    const f32 y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

// About 20 bits of the reciprocal; what is below the smallest normal number is 0.
f64 reciprocal_approximate(f64 x) {
    u64 bits;
    const f64 y = 1.0 / (fabs(x) < 2.2250738585072014e-308 ? copysign(0.0, x) : x);
    memcpy(&bits, &y, sizeof bits);
    bits &= 0xFFFFFFFF00000000u;
    f64 value;
    memcpy(&value, &bits, sizeof value);
    return fabs(value) < 2.2250738585072014e-308 ? copysign(0.0, value) : value;
}

// By the reciprocal; what is below the smallest normal number is 0, and so is the quotient of a number by one above 2^126.
f32 divide_approximate(f32 a, f32 b) {
    const auto flushed = [](f32 x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; };
    a = flushed(a);
    b = flushed(b);
    if (fabsf(b) > 0x1p126f) {
        return std::isinf(a) ? NAN : copysignf(0.0f, a) * copysignf(1.0f, b);
    }
    return flushed(a * (1.0f / b));
}

void insert_bits(Thread &t, const Instruction &i) {
    const u32 a = t.get<u32>(i, 1), b = t.get<u32>(i, 2), at = t.get<u32>(i, 3) & 255, length = t.get<u32>(i, 4) & 255;
    const u64 mask = at > 31 ? 0 : ((1ull << (length > 32 ? 32 : length)) - 1) << at;
    t.set<u32>(i, 0, (u32)((b & ~mask) | ((u64)a << at & mask)));
}

// A shift by more than all bits leaves none.
template <class T> T shifted(T a, u32 by, bool left) { return by >= 8 * sizeof(T) ? 0 : left ? (T)(a << by) : (T)(a >> by); }
#define SHIFT(name, type, left) {name, [](Thread &t, const Instruction &i) { t.set<type>(i, 0, shifted(t.get<type>(i, 1), t.get<u32>(i, 2), left)); }}

const std::map<std::string, Run> &table() {
    static const std::map<std::string, Run> all = {
        ONE("mov.b32", u32, a), ONE("mov.u32", u32, a), ONE("mov.f32", u32, a), ONE("mov.b64", u64, a), ONE("mov.u64", u64, a),
        ONE("mov.f64", u64, a), ONE("mov.u16", u16, a), ONE("mov.b16", u16, a), ONE("mov.pred", u64, a), ONE("cvta.to.global.u64", u64, a),
        TWO("add.f32", f32, a + b), TWO("add.rn.f32", f32, a + b), TWO("add.rn.f64", f64, a + b), TWO("add.s16", u16, a + b),
        TWO("add.s32", u32, a + b), TWO("add.s64", u64, a + b), TWO("add.u64", u64, a + b), TWO("sub.f32", f32, a - b),
        TWO("sub.rn.f32", f32, a - b), TWO("sub.rn.f64", f64, a - b), TWO("sub.s16", u16, a - b), TWO("sub.s32", u32, a - b),
        TWO("sub.s64", u64, a - b), TWO("mul.f32", f32, a * b), TWO("mul.rn.f32", f32, a * b), TWO("mul.rn.f64", f64, a * b),
        TWO("mul.lo.s16", u16, (u32)a * b), TWO("mul.lo.s32", u32, a * b), TWO("mul.lo.u32", u32, a * b), TWO("mul.lo.s64", u64, a * b),
        TWO("mul.hi.u32", u32, (u64)a * b >> 32), WIDE("mul.wide.u16", u16, u32), WIDE("mul.wide.u32", u32, u64), WIDE("mul.wide.s32", s32, s64),
        THREE("mad.lo.s32", u32, a * b + c), THREE("fma.rn.f32", f32, fmaf(a, b, c)), THREE("fma.rn.f64", f64, fma(a, b, c)),
        THREE("fma.rm.f32", f32, fused_downward(a, b, c)),
        TWO("div.u32", u32, b ? a / b : ~0u), TWO("div.u64", u64, b ? a / b : ~0ull), TWO("div.rn.f32", f32, a / b), TWO("div.rn.f64", f64, a / b),
        TWO("div.approx.ftz.f32", f32, divide_approximate(a, b)),
        TWO("min.u32", u32, least(a, b)), TWO("min.u64", u64, least(a, b)), TWO("min.f64", f64, least(a, b)), TWO("max.u32", u32, greatest(a, b)),
        TWO("max.f32", f32, greatest(a, b)), TWO("min.f32", f32, least(a, b)), ONE("neg.f32", f32, -a), ONE("neg.f64", f64, -a),
        ONE("neg.s32", u32, 0 - a), ONE("neg.s64", u64, 0 - a), ONE("abs.f64", f64, fabs(a)), ONE("abs.f32", f32, fabsf(a)),
        ONE("sqrt.rn.f32", f32, sqrtf(a)), ONE("sqrt.rn.f64", f64, sqrt(a)), ONE("rcp.rn.f32", f32, 1.0f / a),
        ONE("rcp.approx.ftz.f64", f64, reciprocal_approximate(a)), ONE("ex2.approx.ftz.f32", f32, power_of_two(a)),
        TWO("and.b32", u32, a & b), TWO("and.b64", u64, a & b), TWO("and.pred", u64, a & b), TWO("or.b32", u32, a | b), TWO("or.b64", u64, a | b),
        TWO("or.pred", u64, a | b), TWO("xor.b32", u32, a ^ b), TWO("xor.b64", u64, a ^ b), TWO("xor.pred", u64, a ^ b), ONE("not.b32", u32, ~a),
        ONE("not.b64", u64, ~a), ONE("not.pred", u64, !a), SHIFT("shl.b16", u16, true), SHIFT("shl.b32", u32, true), SHIFT("shl.b64", u64, true),
        SHIFT("shr.u32", u32, false), SHIFT("shr.u64", u64, false), {"bfi.b32", insert_bits}, CONVERT("clz.b64", u64, u32, a ? __builtin_clzll(a) : 64),
        CARRIED("add.cc.u32", a + b), CARRIED("addc.u32", a + b + in), CARRIED("addc.cc.u32", a + b + in),
        CARRIED("sub.cc.u32", a - b), CARRIED("subc.u32", a - b - in), CARRIED("subc.cc.u32", a - b - in),
        CARRIED("mad.lo.cc.u32", (u32)(a * b) + c), CARRIED("madc.lo.cc.u32", (u32)(a * b) + c + in),
        CARRIED("madc.hi.u32", (a * b >> 32) + c + in), CARRIED("madc.hi.cc.u32", (a * b >> 32) + c + in),
        CONVERT("cvt.u16.u32", u32, u16, a), CONVERT("cvt.u32.u16", u16, u32, a), CONVERT("cvt.u32.u64", u64, u32, a),
        CONVERT("cvt.u64.u16", u16, u64, a), CONVERT("cvt.u64.u32", u32, u64, a), CONVERT("cvt.f32.f16", u16, f32, widen_f16(a)),
        CONVERT("cvt.f64.f32", f32, f64, a), CONVERT("cvt.rn.f32.f64", f64, f32, a), CONVERT("cvt.rn.f32.s32", s32, f32, a),
        CONVERT("cvt.rn.f32.u32", u32, f32, a), CONVERT("cvt.rn.f64.s32", s32, f64, a), CONVERT("cvt.rn.f64.u32", u32, f64, a),
        CONVERT("cvt.rni.s32.f64", f64, s32, nearbyint(a)), CONVERT("cvt.rzi.u64.f64", f64, u64, a > 0 ? trunc(a) : 0), CONVERT("cvt.sat.f32.f32", f32, f32, a > 0 ? fminf(a, 1) : 0),
        {"cvt.rn.bf16x2.f32", [](Thread &t, const Instruction &i) { t.set<u32>(i, 0, pack_bf16(t.get<f32>(i, 1), t.get<f32>(i, 2))); }},
        {"cvt.rn.f16x2.f32", [](Thread &t, const Instruction &i) { t.set<u32>(i, 0, pack_f16(t.get<f32>(i, 1), t.get<f32>(i, 2))); }},
        {"shfl.sync.bfly.b32", shuffle_butterfly}, {"bar.warp.sync", nothing_else}, {"bar.sync", nothing_else},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", load_matrices<false>}, {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", load_matrices<true>},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply<widen_bf16>}, {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply<widen_f16>},
    };
    return all;
}

u32 bytes_of(const std::string &type) {
    static const std::map<std::string, u32> sizes = {{"b8", 1}, {"u8", 1}, {"u16", 2}, {"b16", 2}, {"u32", 4}, {"b32", 4}, {"s32", 4}, {"f32", 4}, {"u64", 8}, {"b64", 8}, {"s64", 8}, {"f64", 8}};
    const auto found = sizes.find(type);
    if (found == sizes.end()) {
        throw Refusal("a type of PTX that the machine does not know: " + type);
    }
    return found->second;
}

enum class Space { Global, Shared, Local, Param };

template <Space space> u8 *reach(Thread &t, const Instruction &i) {
    const u64 address = t.address(i, 0);
    const u32 bytes = i.size * i.count;
    if (space == Space::Shared) {
        return t.shared(address, bytes);
    }
    if (space == Space::Global) {
        return t.global(address, bytes);
    }
    std::vector<u8> &memory = space == Space::Local ? t.frame().local : t.frame().params;
    if (address + bytes > memory.size()) {
        throw Refusal("an access beyond a thread's own memory");
    }
    return &memory[address];
}

// Slots hold the elements of a load or store, one after the other.
template <Space space> void load(Thread &t, const Instruction &i) {
    const u8 *from = reach<space>(t, i);
    u64 values[4] = {};
    for (u32 e = 0; e < i.count; e++) {
        memcpy(&values[e], from + e * i.size, i.size);
    }
    for (u32 e = 0; e < i.count; e++) {
        t.slot(i.slots[e]) = values[e];
    }
}

template <Space space> void store(Thread &t, const Instruction &i) {
    u8 *to = reach<space>(t, i);
    for (u32 e = 0; e < i.count; e++) {
        memcpy(to + e * i.size, &t.slot(i.slots[e]), i.size);
    }
}

// Both halves of a register, or one made of two.
template <class Part, class Whole> void unpack(Thread &t, const Instruction &i) {
    const Whole whole = t.get<Whole>(i, 2);
    t.set<Part>(i, 0, (Part)whole);
    t.set<Part>(i, 1, (Part)(whole >> 8 * sizeof(Part)));
}
template <class Part, class Whole> void pack(Thread &t, const Instruction &i) {
    t.set<Whole>(i, 0, (Whole)t.get<Part>(i, 1) | (Whole)t.get<Part>(i, 2) << 8 * sizeof(Part));
}

template <class T> Run comparison(const std::string &how) {
    static const std::map<std::string, Run> all = {
#define COMPARE(name, value) {name, [](Thread &t, const Instruction &i) { const T a = t.get<T>(i, 1), b = t.get<T>(i, 2); t.set<u64>(i, 0, (value)); }}
        COMPARE("eq", a == b), COMPARE("ne", a < b || a > b), COMPARE("lt", a < b), COMPARE("le", a <= b), COMPARE("gt", a > b),
        COMPARE("ge", a >= b), COMPARE("ltu", !(a >= b)), COMPARE("leu", !(a > b)), COMPARE("gtu", !(a <= b)), COMPARE("geu", !(a < b)),
        COMPARE("neu", !(a == b)), COMPARE("equ", !(a < b || a > b)),
    };
    const auto found = all.find(how);
    return found == all.end() ? nullptr : found->second;
}

template <class T> void select(Thread &t, const Instruction &i) { t.set<T>(i, 0, t.get<u64>(i, 3) & 1 ? t.get<T>(i, 1) : t.get<T>(i, 2)); }

// Copies arrive as late as they may: when they are waited for. Until then their place holds what it must not be.
void copy_begin(Thread &t, const Instruction &i) {
    const u32 to = (u32)t.address(i, 0), present = t.get<u32>(i, 1);
    const u64 from = t.address(i, 1);
    if (from % 16 != 0 || present > 16 || t.get<u32>(i, 0) != 16) {
        throw Refusal("a copy that is not of 16 bytes from a multiple of 16");
    }
    memset(t.shared(to, 16), 0xFF, 16);
    // Of what is not present nothing is read.
    t.copies.push_back({to, present ? t.global(from, present) : nullptr, present, t.group});
}
void copy_close(Thread &t, const Instruction &) { t.group++; }
void copy_wait(Thread &t, const Instruction &i) {
    const u32 pending = t.get<u32>(i, 0);
    std::vector<Copy> kept;
    for (const Copy &copy : t.copies) {
        if (copy.group + pending >= t.group) {
            kept.push_back(copy);
            continue;
        }
        u8 *to = &t.block->shared[copy.to];
        memset(to, 0, 16);
        if (copy.present) {
            memcpy(to, copy.from, copy.present);
        }
    }
    t.copies = kept;
}

void jump(Thread &t, const Instruction &i) { t.frame().pc = i.target; }

void call(Thread &t, const Instruction &i) {
    const Function &callee = *i.callee;
    Frame frame = {&callee, 0, std::vector<u64>(callee.slot_count, ~0ull), std::vector<u8>(callee.param_bytes, 0xFF), std::vector<u8>(callee.local_bytes, 0xFF)};
    for (const auto &[slot, value] : callee.constants) {
        frame.registers[slot] = value;
    }
    for (size_t n = 0; n < i.given.size(); n++) {
        const Variable &to = callee.params.at(callee.arguments[n]);
        memcpy(&frame.params[to.address], &t.frame().params[i.given[n].first], to.bytes);
    }
    t.frames.push_back(std::move(frame));
}

void leave(Thread &t, const Instruction &) {
    if (t.frames.size() == 1) {
        t.state = State::Done;
        return;
    }
    const Frame done = std::move(t.frames.back());
    t.frames.pop_back();
    // The caller stands behind its call.
    const Instruction &i = t.frame().function->code[t.frame().pc - 1];
    for (size_t n = 0; n < i.returned.size(); n++) {
        const Variable &from = done.function->params.at(done.function->results[n]);
        memcpy(&t.frame().params[i.returned[n].first], &done.params[from.address], from.bytes);
    }
}

std::vector<std::string> parts_of(const std::string &opcode) {
    std::vector<std::string> parts(1);
    for (const char c : opcode) {
        if (c == '.') {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

Run memory_access(const std::vector<std::string> &parts, Instruction &i) {
    static const std::map<std::string, std::pair<Run, Run>> spaces = {
        {"global", {load<Space::Global>, store<Space::Global>}}, {"shared", {load<Space::Shared>, store<Space::Shared>}},
        {"local", {load<Space::Local>, store<Space::Local>}}, {"param", {load<Space::Param>, store<Space::Param>}}};
    const auto found = spaces.find(parts[1]);
    if (found == spaces.end()) {
        return nullptr;
    }
    i.size = bytes_of(parts.back());
    for (const std::string &part : parts) {
        i.count = part == "v2" ? 2 : part == "v4" ? 4 : i.count;
    }
    return parts[0] == "ld" ? found->second.first : found->second.second;
}
} // namespace

Run decode(const std::string &opcode, bool unpacks, Instruction &i) {
    const std::vector<std::string> parts = parts_of(opcode);
    const std::string &first = parts[0], &type = parts.back();
    if (opcode == "bar.sync") {
        i.meets = Meets::Block;
    } else if (opcode == "bar.warp.sync" || first == "shfl" || first == "ldmatrix" || first == "mma") {
        i.meets = Meets::Warp;
    }
    if (first == "mov" && i.slots.size() == 3) {
        return type == "b64" ? unpacks ? unpack<u32, u64> : pack<u32, u64> : type == "b32" ? unpacks ? unpack<u16, u32> : pack<u16, u32> : nullptr;
    }
    if (first == "ld" || first == "st") {
        return memory_access(parts, i);
    }
    if (first == "setp" && parts.size() == 3) {
        const std::string &how = parts[1];
        return type == "u32" || type == "b32" ? comparison<u32>(how) : type == "s32" ? comparison<s32>(how) : type == "u64" || type == "b64" ? comparison<u64>(how)
            : type == "s64" ? comparison<s64>(how) : type == "f32" ? comparison<f32>(how) : type == "f64" ? comparison<f64>(how) : type == "u16" ? comparison<u16>(how) : nullptr;
    }
    if (first == "selp") {
        return bytes_of(type) == 8 ? select<u64> : bytes_of(type) == 4 ? select<u32> : select<u16>;
    }
    static const std::map<std::string, Run> others = {
        {"cp.async.cg.shared.global", copy_begin}, {"cp.async.commit_group", copy_close}, {"cp.async.wait_group", copy_wait},
        {"bra", jump}, {"bra.uni", jump}, {"call.uni", call}, {"call", call}, {"ret", leave}};
    const auto other = others.find(opcode);
    if (other != others.end()) {
        return other->second;
    }
    const auto found = table().find(opcode);
    return found == table().end() ? nullptr : found->second;
}
} // namespace ptx
