/* The hot loops of measuring, as plain C functions that Python calls through ctypes (which releases the GIL).
 *
 * _kernels_body.h holds the loops and is compiled once for each instruction set; the table below picks one when the
 * library is first used. Sums run in double lanes; nothing is built with -ffast-math: NaN and infinities keep their
 * meaning, and only the reductions named in the `omp simd` lines are reordered. */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#define ALIGNED
#else
#define EXPORT __attribute__((visibility("default")))
#define ALIGNED __attribute__((aligned(64)))
#endif

/* kinds of codes */
enum { BF16, F16, F32, F64, TABLE };
/* places in the sums, in the order of metrics.SUMS */
enum { N, A, B, AA, BB, AB, ABS_D, DD, ABS_A, REL, REL_N, ZERO_A, ZERO_B, CHANGED, NAN_A, NAN_B, OTHER, MAX_D, MAX_REL,
       SUMS };
/* elements decoded at a time: two float64 arrays of this length stay in the first-level cache */
#define SUB 1024
/* |d| as float32 has 31 bits: the upper ones choose a bin, the lower ones a place inside it */
#define LOW_BITS 15
#define LOWS (1u << LOW_BITS)
#define BINS 65536
#define MAX_WANTED 16

#define SUFFIX(name) name##_plain
#define TARGET
#include "_kernels_body.h"
#undef SUFFIX
#undef TARGET

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define MANY_TARGETS 1
#define SUFFIX(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c,bmi2")))
#include "_kernels_body.h"
#undef SUFFIX
#undef TARGET
#define SUFFIX(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,f16c,bmi2")))
#include "_kernels_body.h"
#undef SUFFIX
#undef TARGET
#endif

static int level = 0;

/* 0 plain, 1 AVX2, 2 AVX-512; `limit` lowers it for tests. Returns the level in use. */
EXPORT int lineage_level(int limit)
{
    level = 0;
#ifdef MANY_TARGETS
    __builtin_cpu_init();
    if (limit >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
    if (limit >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        level = 2;
#else
    (void)limit;
#endif
    return level;
}

#ifdef MANY_TARGETS
#define PICK(name) (level == 2 ? name##_avx512 : level == 1 ? name##_avx2 : name##_plain)
#else
#define PICK(name) name##_plain
#endif

/* Adds the sums of n element pairs to out[SUMS]. */
EXPORT void lineage_sums(const void *a, int kind_a, const float *table_a, const void *b, int kind_b,
                         const float *table_b, int64_t n, double tiny, double *out)
{
    PICK(sums)(a, kind_a, table_a, b, kind_b, table_b, n, tiny, out);
}

/* Doubled ranks of 16-bit floats by code, centred: table[65536]; their sum of squares over all elements, or -1 where
 * an element is not finite. hist: 2 * 65536 counters of work space. */
EXPORT double lineage_ranks16(const uint16_t *codes, int64_t n, int kind, uint32_t *hist, float *table)
{
    return PICK(ranks16)(codes, n, kind, hist, table);
}

/* Sum of products of the ranks that the tables give two lists of codes. */
EXPORT double lineage_cross(const uint16_t *codes_a, const float *ranks_a, const uint16_t *codes_b,
                            const float *ranks_b, int64_t n)
{
    return PICK(cross)(codes_a, ranks_a, codes_b, ranks_b, n);
}

/* Doubled centred ranks of finite float32 values: sum of products and both sums of squares to out[3]; one, two: work
 * space of n elements each. */
EXPORT void lineage_spearman32(const float *a, const float *b, int64_t n, uint64_t *one, uint64_t *two, double *out)
{
    PICK(spearman32)(a, b, n, one, two, out);
}

/* Order statistics of |b - a| (float32): values[k] is the one at place wanted[k], wanted ascending, count at most
 * MAX_WANTED. All elements finite. work: MAX_WANTED * 65536 counters. */
EXPORT int lineage_quantiles(const void *a, int kind_a, const void *b, int kind_b, int64_t n, const int64_t *wanted,
                             int count, uint32_t *work, float *values)
{
    if (count < 0 || count > MAX_WANTED) return -1;
    return PICK(quantiles)(a, kind_a, b, kind_b, n, wanted, count, work, values);
}

/* 1 where rounding the floats `fine` to the 16-bit format gives the codes (any NaN equals any NaN). */
EXPORT int lineage_rounds_to(const float *fine, const uint16_t *codes, int kind, int64_t n)
{
    return PICK(rounds_to)(fine, codes, kind, n);
}

/* Copies `count` runs of `bytes` bytes that start at the byte offsets `starts` one behind the other. */
EXPORT void lineage_copy_runs(const char *from, const int64_t *starts, int64_t count, int64_t bytes, char *to)
{
    for (int64_t k = 0; k < count; k++) memcpy(to + k * bytes, from + starts[k], (size_t)bytes);
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", "Loops of lineage.measure.native.", -1, NULL,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModule_Create(&module);
}
