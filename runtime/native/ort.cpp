// The node `sparsefx::Linear` for ONNX Runtime: a custom-op library inside the engine's own.
//
// Inputs: x (…, k) float32; the stored buffers, constant; down, up and branch_scale where `branch`;
// bias where `biased`. Output: y (…, n) float32. The weight is packed when the session is created;
// so are down and up where they are constant, else for every run (adapters may be swapped).
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "floats.h"
#include "ort_api.h"
#include "unpack.h"
#include "weight.h"

namespace sfx {
namespace {

[[noreturn]] void refuse(const std::string &why) { throw std::invalid_argument(why); }

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
  std::snprintf(full, sizeof full, "sparsefx::Linear %.300s: %s", who.c_str(), why);
  return ort::create_status(api, ort::kFail, full);
}

// --- reading a node ------------------------------------------------------------------------------

// A tensor as it lies in memory.
struct Tensor {
  std::vector<int64_t> dims;
  Stored stored;
};

int type_of(int element) {
  switch (element) {
  case ort::kFloat: return SFX_F32;
  case ort::kFloat16: return SFX_F16;
  case ort::kBfloat16: return SFX_BF16;
  case ort::kUint8: return SFX_CODE;
  default: return -1;
  }
}

Tensor tensor(ort::Api api, const ort::Value *value) {
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

bool flag(ort::Api api, const ort::Info *info, const char *name) {
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
int32_t most_tasks() {
  static const unsigned threads = std::thread::hardware_concurrency();
  return static_cast<int32_t>(std::clamp(threads, 1u, 32u));
}

void one_task(void *user, size_t i) {
  Loop &loop = *static_cast<Loop *>(user);
  try {
    loop.body(loop.context, static_cast<int64_t>(i));
  } catch (...) { // only memory can be missing
    loop.failed = true;
  }
}

void share_out(void *pool, sfx_body body, void *context, int64_t count) {
  if (count <= 0) return;
  const Pool &p = *static_cast<Pool *>(pool);
  Loop loop;
  loop.body = body;
  loop.context = context;
  const size_t total = static_cast<size_t>(count);
  ort::must(p.api, ort::parallel_for(p.api, p.context, one_task, total, 0, &loop));
  if (loop.failed) throw std::bad_alloc();
}

// --- the kernel ----------------------------------------------------------------------------------

struct Free {
  void operator()(sfx_weight *w) const { sfx_free(w); }
};
using Held = std::unique_ptr<sfx_weight, Free>;

Held packed(const sfx_source &source) {
  char error[SFX_ERROR];
  Held out(sfx_pack(&source, error));
  if (!out) refuse(error);
  return out;
}

std::string sides(const std::vector<int64_t> &dims) {
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
void demand(const Input &input, const Tensor &t, const std::vector<int64_t> &want) {
  if (t.stored.type < SFX_F32 || t.stored.type > SFX_BF16)
    refuse(input.text() + " must be float32, float16 or bfloat16");
  bool fits = t.dims.size() == want.size();
  for (size_t i = 0; fits && i < want.size(); ++i) fits = want[i] < 0 || want[i] == t.dims[i];
  if (!fits) refuse(input.text() + " has shape " + sides(t.dims) + ", not " + sides(want));
}

Held pack_floats(const Input &input, const Tensor &t, const std::vector<int64_t> &want) {
  demand(input, t, want);
  sfx_source source{};
  source.n = t.dims[0];
  source.k = t.dims[1];
  source.type = t.stored.type;
  source.group_size = std::max<int64_t>(source.k, 1);
  source.values = t.stored.data;
  return packed(source);
}

// A vector as float32, converted into `room` unless it is already.
const float *floats(const Tensor &t, std::vector<float> &room) {
  if (t.stored.type == SFX_F32) return static_cast<const float *>(t.stored.data);
  room.resize(t.stored.count);
  read(room.data(), t.stored.data, 0, t.stored.count, t.stored.type);
  return room.data();
}

// Immutable once it is created: several runs may share it.
class Linear {
public:
  Linear(ort::Api api, const ort::Info *info, const std::string &who) : who_(who), api_(api) {
    Form form{};
    form.n = n_ = ort::read_integer(api, info, "n");
    form.k = k_ = ort::read_integer(api, info, "k");
    form.layout = ort::read_integers(api, info, "layout");
    form.codec = ort::read_integers(api, info, "codec");
    form.a8_group = ort::read_integer(api, info, "a8_group");
    a8_ = flag(api, info, "a8");
    const std::vector<std::string> names = buffers(form);
    if (a8_ && !form.integers()) refuse("a8 needs a codec of integers");
    if (!a8_) form.a8_group = 0;
    const size_t after = 1 + names.size();
    branch_ = flag(api, info, "branch") ? after : 0;
    bias_ = flag(api, info, "biased") ? after + (branch_ ? 3 : 0) : 0;
    const size_t want = after + (branch_ ? 3 : 0) + (bias_ ? 1 : 0);
    size_t count = 0;
    ort::must(api, ort::input_count(api, info, &count));
    if (count != want)
      refuse("it has " + std::to_string(count) + " inputs, not " + std::to_string(want));
    pack_weight(info, form, names);
    if (branch_) pack_branch(info);
  }

  ort::Api api() const { return api_; }
  const std::string &who() const { return who_; }

  void run(ort::Context *context) const {
    const Input first{0, "x"};
    const Tensor x = input(context, first);
    if (x.stored.type != SFX_F32) refuse(first.text() + " must be float32");
    if (x.dims.empty() || x.dims.back() != k_)
      refuse(first.text() + " has shape " + sides(x.dims) + ", not (…, " + std::to_string(k_) +
             ")");
    std::vector<int64_t> dims = x.dims;
    dims.back() = n_;
    ort::Value *value = nullptr;
    ort::must(api_, ort::output(api_, context, 0, dims.data(), dims.size(), &value));
    sfx_call call{};
    call.m = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) call.m *= dims[i];
    if (!call.m || !n_) return;
    ort::must(api_, ort::tensor_data(api_, value, &call.y));
    call.x = x.stored.data;
    call.x_stride = k_;
    call.y_stride = n_;
    call.x_type = SFX_F32;
    call.a8 = a8_;
    multiply(context, call);
  }

private:
  std::string who_;
  ort::Api api_;
  int64_t n_, k_;
  bool a8_;
  size_t branch_, bias_; // the first of their inputs; 0: none
  Held weight_, down_, up_; // down, up: null unless constant

  // The constant value of an input, or null.
  const ort::Value *constant(const ort::Info *info, size_t index) const {
    int is = 0;
    const ort::Value *value = nullptr;
    ort::must(api_, ort::constant_input(api_, info, index, &is, &value));
    return is ? value : nullptr;
  }

  void pack_weight(const ort::Info *info, const Form &form, const std::vector<std::string> &names) {
    std::vector<Stored> stored;
    for (const std::string &name : names) {
      const Input input{stored.size() + 1, name};
      const ort::Value *value = constant(info, input.index);
      if (!value) refuse(input.text() + " must be a constant initializer");
      stored.push_back(tensor(api_, value).stored);
    }
    Unpacked unpacked;
    unpack(form, stored, unpacked);
    weight_ = packed(unpacked.source);
  }

  Input down_input() const { return {branch_, "down"}; }
  Input up_input() const { return {branch_ + 1, "up"}; }
  void pack_branch(const ort::Info *info) {
    if (const ort::Value *value = constant(info, branch_))
      down_ = pack_floats(down_input(), tensor(api_, value), {-1, k_});
    if (const ort::Value *value = constant(info, branch_ + 1))
      up_ = pack_floats(up_input(), tensor(api_, value), {n_, down_ ? down_->n : -1});
  }

  Tensor input(const ort::Context *context, const Input &which) const {
    const ort::Value *value = nullptr;
    ort::must(api_, ort::input(api_, context, which.index, &value));
    if (!value) refuse(which.text() + " is missing");
    return tensor(api_, value);
  }
  const float *vector(const ort::Context *context, const Input &which, int64_t size,
                      std::vector<float> &room) const {
    const Tensor t = input(context, which);
    demand(which, t, {size});
    return floats(t, room);
  }

  // Adds branch and bias to the call; what is made for this run alone lives until it returns.
  void multiply(ort::Context *context, sfx_call &call) const {
    Held down, up;
    std::vector<float> scale_room, bias_room;
    if (branch_) {
      if (!down_) down = pack_floats(down_input(), input(context, down_input()), {-1, k_});
      call.down = down_ ? down_.get() : down.get();
      const int64_t rank = call.down->n;
      if (!up_) up = pack_floats(up_input(), input(context, up_input()), {n_, rank});
      call.up = up_ ? up_.get() : up.get();
      call.branch_scale = vector(context, {branch_ + 2, "branch_scale"}, rank, scale_room);
    }
    if (bias_) call.bias = vector(context, {bias_, "bias"}, n_, bias_room);
    Pool pool{api_, context};
    call.threads = most_tasks();
    call.parallel = share_out;
    call.pool = &pool;
    char error[SFX_ERROR];
    if (sfx_linear(weight_.get(), &call, error)) refuse(error);
  }
};

// --- the library ---------------------------------------------------------------------------------

ort::Status *create(const ort::CustomOp *, ort::Api api, const ort::Info *info, void **kernel) {
  std::string name;
  return guarded(api, name, [&] {
    name = ort::describe(api, info);
    *kernel = new Linear(api, info, name);
  });
}

ort::Status *compute(void *kernel, ort::Context *context) {
  const Linear &linear = *static_cast<Linear *>(kernel);
  return guarded(linear.api(), linear.who(), [&] { linear.run(context); });
}

using Op = const ort::CustomOp *;
// x, then as many inputs of any type as the attributes say.
const ort::CustomOp kLinear = {
    ort::kVersion,
    [](Op, ort::Api, const ort::Info *) -> void * { return nullptr; },
    [](Op) { return "Linear"; },
    [](Op) { return "CPUExecutionProvider"; },
    [](Op, size_t i) -> int { return i ? ort::kUndefined : ort::kFloat; },
    [](Op) -> size_t { return 2; },
    [](Op, size_t) -> int { return ort::kFloat; },
    [](Op) -> size_t { return 1; },
    [](void *, ort::Context *) {},
    [](void *kernel) { delete static_cast<Linear *>(kernel); },
    [](Op, size_t i) -> int { return i ? ort::kVariadic : ort::kRequired; },
    [](Op, size_t) -> int { return ort::kRequired; },
    [](Op, size_t) { return 0; },
    [](Op) { return 1; },
    [](Op) { return 0; },
    [](Op) { return 1; },
    [](Op) { return 1; },
    create,
    compute,
    nullptr,
    [](Op) { return 1; },
    [](Op) { return INT32_MAX; },
};

// The domain, one per ONNX Runtime in the process: sessions refer to it for as long as they live.
ort::Domain *domain(ort::Api api) {
  static std::mutex lock;
  static std::map<ort::Api, ort::Domain *> domains;
  const std::lock_guard<std::mutex> hold(lock);
  ort::Domain *&known = domains[api];
  if (known) return known;
  ort::Domain *fresh = nullptr;
  ort::must(api, ort::create_domain(api, "sparsefx", &fresh));
  try {
    ort::must(api, ort::add_op(api, fresh, &kLinear));
  } catch (...) {
    ort::release_domain(api, fresh);
    throw;
  }
  return known = fresh;
}

// Options that have the domain twice make no session: they are marked.
void enlist(ort::Api api, ort::SessionOptions *options) {
  constexpr char kMark[] = "sparsefx.registered";
  int has = 0;
  ort::must(api, ort::has_entry(api, options, kMark, &has));
  if (has) return;
  ort::must(api, ort::add_domain(api, options, domain(api)));
  ort::must(api, ort::add_entry(api, options, kMark, "1"));
}

} // namespace
} // namespace sfx

// What ONNX Runtime looks for in a custom-op library.
extern "C" SFX_API ort::Status *RegisterCustomOps(ort::SessionOptions *options,
                                                  const ort::Base *base) {
  if (const ort::Api api = base->get_api(ort::kVersion))
    return sfx::guarded(api, "registration", [&] { sfx::enlist(api, options); });
  char text[200];
  std::snprintf(text, sizeof text, "sparsefx needs ONNX Runtime %s or newer, this is %.50s",
                ort::kOldest, base->version());
  return ort::create_status(base->get_api(1), ort::kInvalidArgument, text);
}
