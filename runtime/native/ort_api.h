// The part of ONNX Runtime's C interface that ort.cpp uses, in declarations of our own.
//
// ONNX Runtime hands out a table of functions that is only ever appended to, so a function is known
// by its place in it. The places below are those of version 17, unchanged in 29.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ort {

constexpr uint32_t kVersion = 17; // the first with KernelContext_ParallelFor
constexpr char kOldest[] = "1.17";

// Objects of ONNX Runtime; only pointers to them are passed around.
struct Status;         // OrtStatus: null means success
struct SessionOptions; // OrtSessionOptions
struct Domain;         // OrtCustomOpDomain
struct Info;           // OrtKernelInfo: a node while its kernel is created
struct Context;        // OrtKernelContext: a node while it runs
struct Value;          // OrtValue
struct Shape;          // OrtTensorTypeAndShapeInfo
struct CustomOp;

using Api = void (*const *)(); // OrtApi
struct Base {                  // OrtApiBase
  Api (*get_api)(uint32_t version); // null: this ONNX Runtime is older
  const char *(*version)();
};

enum Code { kFail = 1, kInvalidArgument = 2 };                                   // OrtErrorCode
enum Element { kUndefined = 0, kFloat = 1, kUint8 = 2, kFloat16 = 10, kBfloat16 = 16 };
enum Arity { kRequired = 0, kVariadic = 2 }; // OrtCustomOpInputOutputCharacteristic

// The function at `place` of the table.
template <int place, class Signature> struct Function;
template <int place, class Result, class... Arguments>
struct Function<place, Result(Arguments...)> {
  Result operator()(Api api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api[place])(arguments...);
  }
};

inline constexpr Function<0, Status *(int code, const char *text)> create_status{};
inline constexpr Function<2, const char *(const Status *)> error_message{};
inline constexpr Function<93, void(Status *)> release_status{};

inline constexpr Function<26, Status *(const char *name, Domain **)> create_domain{};
inline constexpr Function<27, Status *(Domain *, const CustomOp *)> add_op{};
inline constexpr Function<28, Status *(SessionOptions *, Domain *)> add_domain{};
inline constexpr Function<101, void(Domain *)> release_domain{};
inline constexpr Function<130, Status *(SessionOptions *, const char *key, const char *value)>
    add_entry{};
inline constexpr Function<237, Status *(const SessionOptions *, const char *key, int *has)>
    has_entry{};

inline constexpr Function<51, Status *(Value *, void **data)> tensor_data{};
inline constexpr Function<65, Status *(const Value *, Shape **)> tensor_shape{};
inline constexpr Function<60, Status *(const Shape *, int *element)> element_type{};
inline constexpr Function<61, Status *(const Shape *, size_t *)> dimensions_count{};
inline constexpr Function<62, Status *(const Shape *, int64_t *, size_t)> dimensions{};
inline constexpr Function<99, void(Shape *)> release_shape{};

// Where `out` is null these write how long it must be, for a text with its final zero.
inline constexpr Function<87, Status *(const Info *, const char *name, char *out, size_t *)> text{};
inline constexpr Function<163, Status *(const Info *, const char *name, int64_t *out, size_t *)>
    integers{};
inline constexpr Function<244, Status *(const Info *, char *out, size_t *)> node_name{};
inline constexpr Function<85, Status *(const Info *, const char *name, float *)> number{};
inline constexpr Function<86, Status *(const Info *, const char *name, int64_t *)> integer{};
inline constexpr Function<230, Status *(const Info *, size_t *)> input_count{};
inline constexpr Function<231, Status *(const Info *, size_t *)> output_count{};
inline constexpr Function<249, Status *(const Info *, size_t index, int *is, const Value **)>
    constant_input{};

inline constexpr Function<90, Status *(const Context *, size_t index, const Value **)> input{};
inline constexpr Function<91, Status *(Context *, size_t index, const int64_t *, size_t, Value **)>
    output{};
// Runs task(user, i) for i in 0 … total-1 on the session's threads; 0 batches: a task at a time.
inline constexpr Function<274, Status *(const Context *, void (*task)(void *user, size_t i),
                                        size_t total, size_t batches, void *user)>
    parallel_for{};

struct CustomOp { // OrtCustomOp as of version 17; enums are ints
  uint32_t version;
  void *(*create)(const CustomOp *, Api, const Info *); // not called where create_v2 is
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  int (*input_type)(const CustomOp *, size_t index);
  size_t (*input_types)(const CustomOp *);
  int (*output_type)(const CustomOp *, size_t index);
  size_t (*output_types)(const CustomOp *);
  void (*compute)(void *kernel, Context *); // not called where compute_v2 is
  void (*destroy)(void *kernel);
  int (*input_arity)(const CustomOp *, size_t index);
  int (*output_arity)(const CustomOp *, size_t index);
  int (*input_memory)(const CustomOp *, size_t index);
  int (*variadic_inputs_least)(const CustomOp *);
  int (*variadic_inputs_alike)(const CustomOp *);
  int (*variadic_outputs_least)(const CustomOp *);
  int (*variadic_outputs_alike)(const CustomOp *);
  Status *(*create_v2)(const CustomOp *, Api, const Info *, void **kernel);
  Status *(*compute_v2)(void *kernel, Context *);
  Status *(*infer_shape)(const CustomOp *, void *);
  int (*first_version)(const CustomOp *);
  int (*last_version)(const CustomOp *);
};

// --- the same, throwing std::exception -----------------------------------------------------------

// Throws what `status` says, if it is no success.
inline void must(Api api, Status *status) {
  if (!status) return;
  const std::string why = error_message(api, status);
  release_status(api, status);
  throw std::runtime_error(why);
}

inline int64_t read_integer(Api api, const Info *info, const char *name) {
  int64_t out = 0;
  must(api, integer(api, info, name, &out));
  return out;
}
inline float read_number(Api api, const Info *info, const char *name) {
  float out = 0;
  must(api, number(api, info, name, &out));
  return out;
}
inline std::vector<int64_t> read_integers(Api api, const Info *info, const char *name) {
  size_t size = 0;
  must(api, integers(api, info, name, nullptr, &size));
  std::vector<int64_t> out(size);
  if (size) must(api, integers(api, info, name, out.data(), &size));
  return out;
}

// The first characters of a text for messages; a file may hold anything.
template <class Read> std::string read_text(Api api, Read &&read) {
  size_t size = 0;
  must(api, read(nullptr, &size));
  std::string out(size, '\0');
  if (size) must(api, read(&out[0], &size));
  out.resize(std::min<size_t>(size ? size - 1 : 0, 100));
  for (char &c : out)
    if (c < ' ' || c > '~') c = '?';
  return out;
}
inline std::string read_string(Api api, const Info *info, const char *name) {
  return read_text(api, [&](char *to, size_t *size) { return text(api, info, name, to, size); });
}
// The node's name.
inline std::string describe(Api api, const Info *info) {
  return "'" + read_text(api, [&](char *to, size_t *size) {
           return node_name(api, info, to, size);
         }) + "'";
}

} // namespace ort
