// The C interface of the CPU engine: pack a weight once, multiply by it many times.
//
// Nothing here knows torch or ONNX Runtime. All matrices are row-major. Every function that can
// fail returns 0 on success, else writes a sentence into `error` (at most SFX_ERROR bytes).
#ifndef SPARSEFX_H
#define SPARSEFX_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SFX_ABI 3
#define SFX_ERROR 256
#define SFX_API __attribute__((visibility("default")))

enum sfx_type { SFX_F32 = 0, SFX_F16 = 1, SFX_BF16 = 2, SFX_CODE = 3 };
enum sfx_activation { SFX_NONE = 0, SFX_RELU = 1, SFX_SILU = 2, SFX_GELU = 3, SFX_GELU_TANH = 4 };

// A dense weight W (n, k) with a mask, to be packed. value = (code - zero_point) * scale.
typedef struct {
  int64_t n, k;
  int32_t type;               // SFX_CODE: one byte per code; else float values of that type
  int32_t bits;               // of a code: 2…8; ignored for floats
  int32_t zero;               // the zero point where `zero_points` is null
  int64_t group_size;         // columns that share a scale; at least 1
  int64_t a8_group;           // columns that share an activation scale, 0: the whole row
  const void *values;         // (n, k): uint8 codes 0 … 2^bits - 1, or floats
  const uint8_t *mask;        // (n, k): 1 = stored; null: all are
  const uint16_t *scales;     // (n, ceil(k / group_size)) fp16; null for floats
  const uint8_t *zero_points; // as scales; null: `zero` everywhere
} sfx_source;

typedef struct sfx_weight sfx_weight; // immutable; may be used from any number of threads

// Runs body(context, i) for i in 0 … count-1, possibly in parallel, and returns when all are done.
typedef void (*sfx_body)(void *context, int64_t i);
typedef void (*sfx_parallel)(void *pool, sfx_body body, void *context, int64_t count);

// y = act(x · Wᵀ + bias + ((x · downᵀ) ⊙ branch_scale) · upᵀ) ⊙ multiply + residual
typedef struct {
  const void *x;              // (m, k), rows `x_stride` elements apart, of type x_type
  void *y;                    // (m, n), rows `y_stride` elements apart, of type x_type
  int64_t m, x_stride, y_stride;
  int32_t x_type;             // SFX_F32, SFX_F16 or SFX_BF16; bias, multiply and residual too
  int32_t a8;                 // round x to int8, one scale per row (or per the weight's a8_group)
  int32_t activation;
  int32_t threads;            // at most so many
  const void *bias;           // (n) or null
  const void *multiply;       // (m, n) contiguous or null
  const void *residual;       // (m, n) contiguous or null
  const sfx_weight *down;     // (rank, k) or null: no branch
  const sfx_weight *up;       // (n, rank)
  const float *branch_scale;  // (rank) or null: ones
  sfx_parallel parallel;      // null: OpenMP if the process has it, else serial
  void *pool;                 // handed to `parallel`
} sfx_call;

// One of several weights of one k that multiply the same x.
typedef struct {
  const sfx_weight *weight;   // (n, k), n the part's own
  const void *bias;           // as in sfx_call, for this part
  const sfx_weight *down, *up;
  const float *branch_scale;
  void *y;                    // (m, n), rows `y_stride` elements apart; a gate's second part has none
  int64_t y_stride;
} sfx_part;

// A low-rank branch that some rows of a batch have.
typedef struct {
  const sfx_weight *down;     // (rank, k)
  const sfx_weight *up;       // (n, rank)
  const float *scale;         // (rank)
} sfx_branch;

// y = (s - mean) / √(mean((s - mean)²) + eps) ⊙ weight + bias of each row s = x + residual, rounded
// to `type`; mean is 0 unless `centred`.
typedef struct {
  const void *x;              // (m, k) contiguous, of `type`
  const void *residual;       // (m, k) contiguous or null
  void *sum;                  // (m, k) contiguous: s; null where x is s, or s is not asked for
  void *y;                    // (m, k) contiguous
  int64_t m, k;
  int32_t type;               // SFX_F32, SFX_F16 or SFX_BF16
  int32_t centred;            // LayerNorm, else RMS norm
  int32_t threads;            // at most so many
  float eps;
  const void *weight, *bias;  // (k) or null
  sfx_parallel parallel;      // as in sfx_call
  void *pool;
} sfx_norm_call;

// y = x ⊙ cos + (-x₁, x₀) ⊙ sin along the last axis, x₀ and x₁ the halves of x there: float32.
typedef struct {
  const float *x, *cos, *sin;
  float *y;
  int64_t size[3];            // of the axes before the last
  int64_t x_stride[3], y_stride[3], cos_stride[3], sin_stride[3]; // in elements; of the last: 1
  int64_t half;               // half of the last axis
  int64_t threads;            // at most so many
  sfx_parallel parallel;      // as in sfx_call
  void *pool;
} sfx_rotary_call;

SFX_API int32_t sfx_abi(void);
SFX_API const char *sfx_isa(void);                 // the instruction set in use
SFX_API int sfx_set_isa(const char *name, char *error); // "auto" or one of sfx_isas
SFX_API const char *sfx_isas(void);                // those this machine can run, best first
SFX_API const char *sfx_threading(void);           // "openmp" or "serial"
SFX_API sfx_weight *sfx_pack(const sfx_source *source, char *error);
SFX_API void sfx_free(sfx_weight *weight);
SFX_API int64_t sfx_bytes(const sfx_weight *weight); // read per product at m = 1
SFX_API const char *sfx_family(const sfx_weight *weight); // how it is laid out in memory
SFX_API int sfx_linear(const sfx_weight *weight, const sfx_call *call, char *error);
// sfx_linear of every part, bit for bit, over activations that are prepared once and loops that are
// shared out once. y, y_stride, bias, down, up and branch_scale are the parts', not the call's.
// `gated`: of two parts of one n, y = act(x · W₀ᵀ + …) ⊙ (x · W₁ᵀ + …) ⊙ multiply + residual.
// Otherwise only a part alone may have multiply and residual.
SFX_API int sfx_linear_parts(const sfx_part *parts, int32_t count, int32_t gated,
                             const sfx_call *call, char *error);
// y = residual + ((x · downᵀ) ⊙ scale) · upᵀ, x and y contiguous: of m rows in `batch` equal parts,
// part i has the branch which[i], or none where that is -1. Of the call's further fields x_type,
// threads, parallel and pool count.
SFX_API int sfx_add_branches(const sfx_branch *branches, int32_t count, const int32_t *which,
                             int64_t batch, const sfx_call *call, char *error);
SFX_API int sfx_norm(const sfx_norm_call *call, char *error);
SFX_API int sfx_rotary(const sfx_rotary_call *call, char *error);

#ifdef __cplusplus
}
#endif
#endif
