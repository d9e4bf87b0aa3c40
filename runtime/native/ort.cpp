// The nodes `sparsefx::Linear` and `sparsefx::Norm` for ONNX Runtime: a custom-op library inside the
// engine's own.
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ort_node.h"
#include "weight.h"

namespace sfx {
namespace {

using node::Input;
using node::refuse;
using node::Tensor;

// --- products ------------------------------------------------------------------------------------

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

Held pack_floats(const Input &input, const Tensor &t, const std::vector<int64_t> &want) {
  node::demand(input, t, want);
  sfx_source source{};
  source.n = t.dims[0];
  source.k = t.dims[1];
  source.type = t.stored.type;
  source.group_size = std::max<int64_t>(source.k, 1);
  source.values = t.stored.data;
  return packed(source);
}

// Inputs: x (…, k) float32; the stored buffers, constant; down, up and branch_scale where `branch`;
// bias where `biased`. Output: y (…, n) float32. The weight is packed when the session is created;
// so are down and up where they are constant, else for every run (adapters may be swapped).
// Immutable once it is created: several runs may share it.
class Linear {
public:
  static constexpr const char *kOp = "Linear";
  static constexpr int kResults = ort::kRequired;
  static std::string describe(ort::Api api, const ort::Info *info) {
    return ort::describe(api, info) + " of format '" + ort::read_string(api, info, "format") + "'";
  }

  Linear(ort::Api api, const ort::Info *info) : api_(api) {
    Form form{};
    form.n = n_ = ort::read_integer(api, info, "n");
    form.k = k_ = ort::read_integer(api, info, "k");
    form.layout = ort::read_integers(api, info, "layout");
    form.codec = ort::read_integers(api, info, "codec");
    form.a8_group = ort::read_integer(api, info, "a8_group");
    a8_ = node::flag(api, info, "a8");
    const std::vector<std::string> names = buffers(form);
    if (a8_ && !form.integers()) refuse("a8 needs a codec of integers");
    if (!a8_) form.a8_group = 0;
    const size_t after = 1 + names.size();
    branch_ = node::flag(api, info, "branch") ? after : 0;
    bias_ = node::flag(api, info, "biased") ? after + (branch_ ? 3 : 0) : 0;
    node::demand_inputs(api, info, after + (branch_ ? 3 : 0) + (bias_ ? 1 : 0));
    pack_weight(info, form, names);
    if (branch_) pack_branch(info);
  }

  void run(ort::Context *context) const {
    const Tensor x = node::first_input(api_, context);
    if (x.dims.back() != k_)
      refuse("input 0 (x) has shape " + node::sides(x.dims) + ", not (…, " + std::to_string(k_) +
             ")");
    std::vector<int64_t> dims = x.dims;
    dims.back() = n_;
    sfx_call call{};
    call.y = node::result(api_, context, 0, dims);
    call.m = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) call.m *= dims[i];
    if (!call.m || !n_) return;
    call.x = x.stored.data;
    call.x_stride = k_;
    call.y_stride = n_;
    call.x_type = SFX_F32;
    call.a8 = a8_;
    multiply(context, call);
  }

private:
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
      stored.push_back(node::tensor(api_, value).stored);
    }
    Unpacked unpacked;
    unpack(form, stored, unpacked);
    weight_ = packed(unpacked.source);
  }

  Input down_input() const { return {branch_, "down"}; }
  Input up_input() const { return {branch_ + 1, "up"}; }
  void pack_branch(const ort::Info *info) {
    if (const ort::Value *value = constant(info, branch_))
      down_ = pack_floats(down_input(), node::tensor(api_, value), {-1, k_});
    if (const ort::Value *value = constant(info, branch_ + 1))
      up_ = pack_floats(up_input(), node::tensor(api_, value), {n_, down_ ? down_->n : -1});
  }

  const float *vector(const ort::Context *context, const Input &which, int64_t size,
                      std::vector<float> &room) const {
    return node::vector(api_, context, which, size, room);
  }

  // Adds branch and bias to the call; what is made for this run alone lives until it returns.
  void multiply(ort::Context *context, sfx_call &call) const {
    Held down, up;
    std::vector<float> scale_room, bias_room;
    if (branch_) {
      if (!down_) down = pack_floats(down_input(), node::input(api_, context, down_input()), {-1, k_});
      call.down = down_ ? down_.get() : down.get();
      const int64_t rank = call.down->n;
      if (!up_) up = pack_floats(up_input(), node::input(api_, context, up_input()), {n_, rank});
      call.up = up_ ? up_.get() : up.get();
      call.branch_scale = vector(context, {branch_ + 2, "branch_scale"}, rank, scale_room);
    }
    if (bias_) call.bias = vector(context, {bias_, "bias"}, n_, bias_room);
    node::Pool pool{api_, context};
    call.threads = node::most_tasks();
    call.parallel = node::share_out;
    call.pool = &pool;
    char error[SFX_ERROR];
    if (sfx_linear(weight_.get(), &call, error)) refuse(error);
  }
};

// --- norms ---------------------------------------------------------------------------------------

// Inputs: x (…, k) float32; residual of its shape where `residual`; weight (k); bias (k) where
// `biased`. Outputs: y and, where `keep`, the sum, of the shape of x.
class Norm {
public:
  static constexpr const char *kOp = "Norm";
  static constexpr int kResults = ort::kVariadic;
  static std::string describe(ort::Api api, const ort::Info *info) {
    return ort::describe(api, info);
  }

  Norm(ort::Api api, const ort::Info *info) : api_(api) {
    eps_ = ort::read_number(api, info, "eps");
    centred_ = node::flag(api, info, "centred");
    residual_ = node::flag(api, info, "residual");
    biased_ = node::flag(api, info, "biased");
    keep_ = node::flag(api, info, "keep");
    if (keep_ && !residual_) refuse("keep needs a residual");
    node::demand_inputs(api, info, size_t{2} + residual_ + biased_);
    size_t count = 0;
    ort::must(api, ort::output_count(api, info, &count));
    if (count != size_t{1} + keep_) refuse("it has " + std::to_string(count) + " outputs, not " + std::to_string(1 + keep_));
  }

  void run(ort::Context *context) const {
    const Tensor x = node::first_input(api_, context);
    std::vector<float> weight, bias;
    size_t next = 1;
    sfx_norm_call call{};
    call.k = x.dims.back();
    if (residual_) {
      const Input which{next++, "residual"};
      const Tensor other = node::input(api_, context, which);
      node::demand(which, other, x.dims);
      if (other.stored.type != SFX_F32) refuse(which.text() + " must be float32");
      call.residual = other.stored.data;
    }
    call.weight = node::vector(api_, context, {next++, "weight"}, call.k, weight);
    if (biased_) call.bias = node::vector(api_, context, {next, "bias"}, call.k, bias);
    call.y = node::result(api_, context, 0, x.dims);
    if (keep_) call.sum = node::result(api_, context, 1, x.dims);
    call.x = x.stored.data;
    call.m = call.k ? x.stored.count / call.k : 0;
    call.type = SFX_F32;
    call.centred = centred_;
    call.eps = eps_;
    node::Pool pool{api_, context};
    call.threads = node::most_tasks();
    call.parallel = node::share_out;
    call.pool = &pool;
    char error[SFX_ERROR];
    if (sfx_norm(&call, error)) refuse(error);
  }

private:
  ort::Api api_;
  float eps_;
  bool centred_, residual_, biased_, keep_;
};

// --- the library ---------------------------------------------------------------------------------

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
    for (const ort::CustomOp *op : {&node::Op<Linear>::op, &node::Op<Norm>::op})
      ort::must(api, ort::add_op(api, fresh, op));
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
    return sfx::node::guarded(api, "registration", [&] { sfx::enlist(api, options); });
  char text[200];
  std::snprintf(text, sizeof text, "sparsefx needs ONNX Runtime %s or newer, this is %.50s",
                ort::kOldest, base->version());
  return ort::create_status(base->get_api(1), ort::kInvalidArgument, text);
}
