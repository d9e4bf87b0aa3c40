// What the nodes of ort.cpp share: reading tensors and attributes, messages, a session's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "floats.h"
#include "ort_api.h"
#include "sparsefx.h"
#include "unpack.h"

namespace sfx {
namespace node {

[[noreturn]] inline void refuse(const std::string &why) { throw std::invalid_argument(why); }

// Runs body; what it throws becomes a status. Nothing may be thrown into ONNX Runtime.
template <class Body> ort::Status *guarded(ort::Api api, const std::string &who, Body &&body) {
  const char *why = "unknown error";
  char text[1024];
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc &) {
    why = "out of memory";
  } catch (const std::exception &error) {
    std::snprintf(text, sizeof text, "%s", error.what());
    why = text;
  } catch (...) {
  }
  char full[1400];
  std::snprintf(full, sizeof full, "sparsefx::%.300s: %s", who.c_str(), why);
  return ort::create_status(api, ort::kFail, full);
}

// --- reading a node ------------------------------------------------------------------------------

// A tensor as it lies in memory.
struct Tensor {
  std::vector<int64_t> dims;
  Stored stored;
};

inline int type_of(int element) {
  switch (element) {
  case ort::kFloat: return SFX_F32;
  case ort::kFloat16: return SFX_F16;
  case ort::kBfloat16: return SFX_BF16;
  case ort::kUint8: return SFX_CODE;
  default: return -1;
  }
}

inline Tensor tensor(ort::Api api, const ort::Value *value) {
  ort::Shape *raw = nullptr;
  ort::must(api, ort::tensor_shape(api, value, &raw));
  const auto release = [api](ort::Shape *s) { ort::release_shape(api, s); };
  const std::unique_ptr<ort::Shape, decltype(release)> shape(raw, release);
  int element = ort::kUndefined;
  size_t rank = 0;
  ort::must(api, ort::element_type(api, raw, &element));
  ort::must(api, ort::dimensions_count(api, raw, &rank));
  Tensor out{std::vector<int64_t>(rank), {nullptr, 1, type_of(element)}};
  ort::must(api, ort::dimensions(api, raw, out.dims.data(), rank));
  for (const int64_t side : out.dims) out.stored.count *= side;
  void *data = nullptr;
  // No text is asked for its bytes: that is an error of its own.
  if (out.stored.type >= 0)
    ort::must(api, ort::tensor_data(api, const_cast<ort::Value *>(value), &data));
  out.stored.data = data;
  return out;
}

inline bool flag(ort::Api api, const ort::Info *info, const char *name) {
  const int64_t value = ort::read_integer(api, info, name);
  if (value != 0 && value != 1) refuse(std::string(name) + " must be 0 or 1");
  return value == 1;
}

// --- threads -------------------------------------------------------------------------------------

struct Pool {
  ort::Api api;
  const ort::Context *context;
};
struct Loop {
  sfx_body body;
  void *context;
  std::atomic<bool> failed{false};
};

// The interface does not say how many threads a session has. More tasks than threads do no harm.
inline int32_t most_tasks() {
  static const unsigned threads = std::thread::hardware_concurrency();
  return static_cast<int32_t>(std::clamp(threads, 1u, 32u));
}

inline void one_task(void *user, size_t i) {
  Loop &loop = *static_cast<Loop *>(user);
  try {
    loop.body(loop.context, static_cast<int64_t>(i));
  } catch (...) { // only memory can be missing
    loop.failed = true;
  }
}

inline void share_out(void *pool, sfx_body body, void *context, int64_t count) {
  if (count <= 0) return;
  const Pool &p = *static_cast<Pool *>(pool);
  Loop loop;
  loop.body = body;
  loop.context = context;
  const size_t total = static_cast<size_t>(count);
  ort::must(p.api, ort::parallel_for(p.api, p.context, one_task, total, 0, &loop));
  if (loop.failed) throw std::bad_alloc();
}

// --- inputs --------------------------------------------------------------------------------------

inline std::string sides(const std::vector<int64_t> &dims) {
  std::string out = "(";
  for (const int64_t side : dims) out += (out.size() > 1 ? ", " : "") + std::to_string(side);
  return out + ")";
}

// What the messages call an input.
struct Input {
  size_t index;
  std::string name;
  std::string text() const { return "input " + std::to_string(index) + " (" + name + ")"; }
};

// Floats of these sides; a side of -1 may be any.
inline void demand(const Input &input, const Tensor &t, const std::vector<int64_t> &want) {
  if (t.stored.type < SFX_F32 || t.stored.type > SFX_BF16)
    refuse(input.text() + " must be float32, float16 or bfloat16");
  bool fits = t.dims.size() == want.size();
  for (size_t i = 0; fits && i < want.size(); ++i) fits = want[i] < 0 || want[i] == t.dims[i];
  if (!fits) refuse(input.text() + " has shape " + sides(t.dims) + ", not " + sides(want));
}

// A vector as float32, converted into `room` unless it is already.
inline const float *floats(const Tensor &t, std::vector<float> &room) {
  if (t.stored.type == SFX_F32) return static_cast<const float *>(t.stored.data);
  room.resize(t.stored.count);
  read(room.data(), t.stored.data, 0, t.stored.count, t.stored.type);
  return room.data();
}

inline Tensor input(ort::Api api, const ort::Context *context, const Input &which) {
  const ort::Value *value = nullptr;
  ort::must(api, ort::input(api, context, which.index, &value));
  if (!value) refuse(which.text() + " is missing");
  return tensor(api, value);
}
inline const float *vector(ort::Api api, const ort::Context *context, const Input &which,
                           int64_t size, std::vector<float> &room) {
  const Tensor t = input(api, context, which);
  demand(which, t, {size});
  return floats(t, room);
}

// x (…, k) float32, the first input.
inline Tensor first_input(ort::Api api, const ort::Context *context) {
  const Input first{0, "x"};
  Tensor x = input(api, context, first);
  if (x.stored.type != SFX_F32) refuse(first.text() + " must be float32");
  if (x.dims.empty()) refuse(first.text() + " has no axis");
  return x;
}
inline float *result(ort::Api api, ort::Context *context, size_t index,
                     const std::vector<int64_t> &dims) {
  ort::Value *value = nullptr;
  void *data = nullptr;
  ort::must(api, ort::output(api, context, index, dims.data(), dims.size(), &value));
  ort::must(api, ort::tensor_data(api, value, &data));
  return static_cast<float *>(data);
}

inline void demand_inputs(ort::Api api, const ort::Info *info, size_t want) {
  size_t count = 0;
  ort::must(api, ort::input_count(api, info, &count));
  if (count != want)
    refuse("it has " + std::to_string(count) + " inputs, not " + std::to_string(want));
}

// --- the op --------------------------------------------------------------------------------------

// Kernel: a class with kOp, its name in the domain, describe(api, info) for messages, a constructor
// of the same, kResults, the arity of its outputs, and run(context).
template <class Kernel> class Op {
  struct Held {
    Held(ort::Api a, const ort::Info *info, const std::string &w) : api(a), who(w), kernel(a, info) {}
    ort::Api api;
    std::string who;
    Kernel kernel;
  };
  using Self = const ort::CustomOp *;

  static ort::Status *create(Self, ort::Api api, const ort::Info *info, void **held) {
    std::string who = Kernel::kOp;
    return guarded(api, who, [&] {
      who += " " + Kernel::describe(api, info);
      *held = new Held(api, info, who);
    });
  }
  static ort::Status *compute(void *held, ort::Context *context) {
    const Held &h = *static_cast<Held *>(held);
    return guarded(h.api, h.who, [&] { h.kernel.run(context); });
  }

public:
  static constexpr ort::CustomOp op = {
      ort::kVersion,
      [](Self, ort::Api, const ort::Info *) -> void * { return nullptr; },
      [](Self) { return Kernel::kOp; },
      [](Self) { return "CPUExecutionProvider"; },
      [](Self, size_t i) -> int { return i ? ort::kUndefined : ort::kFloat; },
      [](Self) -> size_t { return 2; },
      [](Self, size_t) -> int { return ort::kFloat; },
      [](Self) -> size_t { return 1; },
      [](void *, ort::Context *) {},
      [](void *held) { delete static_cast<Held *>(held); },
      [](Self, size_t i) -> int { return i ? ort::kVariadic : ort::kRequired; },
      [](Self, size_t) -> int { return Kernel::kResults; },
      [](Self, size_t) { return 0; },
      [](Self) { return 1; },
      [](Self) { return 0; },
      [](Self) { return 1; },
      [](Self) { return 1; },
      create,
      compute,
      nullptr,
      [](Self) { return 1; },
      [](Self) { return INT32_MAX; },
  };
};

} // namespace node
} // namespace sfx
