/* Included by _kernels.c once for each instruction set: SUFFIX(name) names its functions, TARGET chooses the set. */

/* half precision to single, exactly: the exponent is rebased by a multiplication, which also mends subnormals */
TARGET static inline void SUFFIX(decode16)(const uint16_t *restrict from, int kind, int64_t n, float *restrict to)
{
    uint32_t *bits = (uint32_t *)to;
    if (kind == BF16) {
        for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)from[i] << 16;
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint32_t code = from[i], size = (code & 0x7FFFu) << 13, got;
        float value;
        memcpy(&value, &size, 4);
        value *= 0x1p112f;
        memcpy(&got, &value, 4);
        got = (code & 0x7C00u) == 0x7C00u ? size | 0x7F800000u : got;
        bits[i] = got | (code & 0x8000u) << 16;
    }
}

/* n codes from element `at` on as float32; float32 itself is not copied */
TARGET static inline const float *SUFFIX(decode)(const void *from, int kind, const float *table, int64_t at, int64_t n,
                                                 float *to)
{
    if (kind == F32) return (const float *)from + at;
    if (kind == TABLE) {
        const uint8_t *codes = (const uint8_t *)from + at;
        for (int64_t i = 0; i < n; i++) to[i] = table[codes[i]];
        return to;
    }
    SUFFIX(decode16)((const uint16_t *)from + at, kind, n, to);
    return to;
}

TARGET static inline int64_t SUFFIX(broken)(const float *x, int64_t n)
{
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        count += (bits & 0x7F800000u) == 0x7F800000u;
    }
    return count;
}

/* sums over finite float32 values */
TARGET static void SUFFIX(add_single)(const float *restrict x, const float *restrict y, int64_t n, double tiny,
                                      double *restrict out)
{
    double a = 0, b = 0, aa = 0, bb = 0, ab = 0, abs_d = 0, dd = 0, abs_a = 0, rel = 0, max_d = 0, max_rel = 0;
    int32_t normal = 0, zero_a = 0, zero_b = 0, changed = 0;
    const float small = (float)tiny;
#pragma omp simd reduction(+ : normal, zero_a, zero_b, changed)
    for (int64_t i = 0; i < n; i++) {
        normal += fabsf(x[i]) >= small;
        zero_a += x[i] == 0.0f;
        zero_b += y[i] == 0.0f;
        changed += x[i] != y[i];
    }
#pragma omp simd reduction(+ : a, b, aa, bb, ab, abs_d, dd, abs_a, rel) reduction(max : max_d, max_rel)
    for (int64_t i = 0; i < n; i++) {
        double u = x[i], v = y[i], d = v - u, size = fabs(d), base = fabs(u);
        a += u;
        b += v;
        aa += u * u;
        bb += v * v;
        ab += u * v;
        abs_d += size;
        dd += d * d;
        abs_a += base;
        double part = size / (base >= tiny ? base : HUGE_VAL); /* no branch: what is too small counts 0 */
        rel += part;
        max_d = size > max_d ? size : max_d;
        max_rel = part > max_rel ? part : max_rel;
    }
    const double found[MAX_D] = {(double)n, a, b, aa, bb, ab, abs_d, dd, abs_a, rel, normal, zero_a, zero_b, changed};
    for (int k = 0; k < NAN_A; k++) out[k] += found[k];
    out[MAX_D] = max_d > out[MAX_D] ? max_d : out[MAX_D];
    out[MAX_REL] = max_rel > out[MAX_REL] ? max_rel : out[MAX_REL];
}

/* the same where both sides are equal */
TARGET static void SUFFIX(add_equal)(const float *restrict x, int64_t n, double tiny, double *restrict out)
{
    double a = 0, aa = 0, abs_a = 0;
    int32_t normal = 0, zero = 0;
    const float small = (float)tiny;
#pragma omp simd reduction(+ : normal, zero)
    for (int64_t i = 0; i < n; i++) {
        normal += fabsf(x[i]) >= small;
        zero += x[i] == 0.0f;
    }
#pragma omp simd reduction(+ : a, aa, abs_a)
    for (int64_t i = 0; i < n; i++) {
        double u = x[i];
        a += u;
        aa += u * u;
        abs_a += fabs(u);
    }
    out[N] += (double)n;
    out[A] += a;
    out[B] += a;
    out[AA] += aa;
    out[BB] += aa;
    out[AB] += aa;
    out[ABS_A] += abs_a;
    out[REL_N] += normal;
    out[ZERO_A] += zero;
    out[ZERO_B] += zero;
}

/* the same over finite float64 values */
TARGET static void SUFFIX(add_double)(const double *restrict x, const double *restrict y, int64_t n, double tiny,
                                      double *restrict out)
{
    double a = 0, b = 0, aa = 0, bb = 0, ab = 0, abs_d = 0, dd = 0, abs_a = 0, rel = 0, max_d = 0, max_rel = 0;
    int64_t normal = 0, zero_a = 0, zero_b = 0, changed = 0;
#pragma omp simd reduction(+ : a, b, aa, bb, ab, abs_d, dd, abs_a, rel, normal, zero_a, zero_b, changed) \
    reduction(max : max_d, max_rel)
    for (int64_t i = 0; i < n; i++) {
        double u = x[i], v = y[i], d = v - u, size = fabs(d), base = fabs(u);
        a += u;
        b += v;
        aa += u * u;
        bb += v * v;
        ab += u * v;
        abs_d += size;
        dd += d * d;
        abs_a += base;
        double part = size / (base >= tiny ? base : HUGE_VAL); /* no branch: what is too small counts 0 */
        rel += part;
        max_d = size > max_d ? size : max_d;
        max_rel = part > max_rel ? part : max_rel;
        normal += base >= tiny;
        zero_a += u == 0.0;
        zero_b += v == 0.0;
        changed += u != v;
    }
    const double found[MAX_D] = {(double)n, a, b, aa, bb, ab, abs_d, dd, abs_a, rel,
                                 (double)normal, (double)zero_a, (double)zero_b, (double)changed};
    for (int k = 0; k < NAN_A; k++) out[k] += found[k];
    out[MAX_D] = max_d > out[MAX_D] ? max_d : out[MAX_D];
    out[MAX_REL] = max_rel > out[MAX_REL] ? max_rel : out[MAX_REL];
}

/* float64 or mixed with it: n <= SUB elements; finite pairs move to the front */
TARGET static void SUFFIX(sums_wide)(const void *a, int kind_a, const float *table_a, const void *b, int kind_b,
                                     const float *table_b, int64_t at, int64_t n, double tiny, double *out)
{
    ALIGNED double x[SUB], y[SUB];
    ALIGNED float single[SUB];
    int64_t kept = 0;
    for (int side = 0; side < 2; side++) {
        const void *from = side ? b : a;
        double *to = side ? y : x;
        if ((side ? kind_b : kind_a) == F64) {
            memcpy(to, (const double *)from + at, (size_t)n * 8);
        } else {
            const float *values = SUFFIX(decode)(from, side ? kind_b : kind_a, side ? table_b : table_a, at, n, single);
            for (int64_t i = 0; i < n; i++) to[i] = values[i];
        }
    }
    for (int64_t i = 0; i < n; i++) {
        int good_a = isfinite(x[i]), good_b = isfinite(y[i]);
        if (good_a && good_b) {
            x[kept] = x[i];
            y[kept++] = y[i];
            continue;
        }
        out[NAN_A] += !good_a;
        out[NAN_B] += !good_b;
        if (kind_a == kind_b)
            out[OTHER] += memcmp(x + i, y + i, 8) != 0;
        else
            out[OTHER] += x[i] != y[i] && !(isnan(x[i]) && isnan(y[i]));
    }
    if (kept) SUFFIX(add_double)(x, y, kept, tiny, out);
}

TARGET static void SUFFIX(sums)(const void *a, int kind_a, const float *table_a, const void *b, int kind_b,
                                const float *table_b, int64_t n, double tiny, double *out)
{
    static const int width[] = {2, 2, 4, 8, 1};
    ALIGNED float one[SUB], two[SUB];
    for (int64_t at = 0; at < n; at += SUB) {
        int64_t m = n - at < SUB ? n - at : SUB, kept = 0;
        if (kind_a == F64 || kind_b == F64) {
            SUFFIX(sums_wide)(a, kind_a, table_a, b, kind_b, table_b, at, m, tiny, out);
            continue;
        }
        const float *x = SUFFIX(decode)(a, kind_a, table_a, at, m, one);
        const float *y = SUFFIX(decode)(b, kind_b, table_b, at, m, two);
        int64_t bad_a = SUFFIX(broken)(x, m), bad_b = SUFFIX(broken)(y, m);
        if (!bad_a && !bad_b) {
            int w = width[kind_a];
            if (kind_a == kind_b && table_a == table_b &&
                !memcmp((const char *)a + at * w, (const char *)b + at * w, (size_t)(m * w)))
                SUFFIX(add_equal)(x, m, tiny, out);
            else
                SUFFIX(add_single)(x, y, m, tiny, out);
            continue;
        }
        out[NAN_A] += (double)bad_a;
        out[NAN_B] += (double)bad_b;
        for (int64_t i = 0; i < m; i++) {
            if (isfinite(x[i]) && isfinite(y[i])) {
                one[kept] = x[i];
                two[kept++] = y[i];
            } else if (kind_a == kind_b && table_a == table_b) {
                out[OTHER] += memcmp(x + i, y + i, 4) != 0;
            } else {
                out[OTHER] += x[i] != y[i] && !(isnan(x[i]) && isnan(y[i]));
            }
        }
        if (kept) SUFFIX(add_single)(one, two, kept, tiny, out);
    }
}

/* the code that comes `k`-th by value: negative ones downwards, then positive ones upwards */
static inline uint32_t SUFFIX(code_at)(uint32_t k)
{
    return k < 32768 ? 65535 - k : k - 32768;
}

TARGET static double SUFFIX(ranks16)(const uint16_t *codes, int64_t n, int kind, uint32_t *hist, float *table)
{
    uint32_t *other = hist + BINS;
    memset(hist, 0, 2 * BINS * sizeof *hist);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) { /* two tables: equal neighbours do not wait for each other */
        uint64_t four;
        memcpy(&four, codes + i, 8);
        hist[four & 0xFFFF]++;
        other[four >> 16 & 0xFFFF]++;
        hist[four >> 32 & 0xFFFF]++;
        other[four >> 48]++;
    }
    for (; i < n; i++) hist[codes[i]]++;
    for (i = 0; i < BINS; i++) hist[i] += other[i];
    const uint32_t top = kind == BF16 ? 0x7F80 : 0x7C00;
    uint64_t bad = 0;
    for (uint32_t k = top; k < 0x8000; k++) bad += hist[k] + (uint64_t)hist[k | 0x8000];
    if (bad) return -1.0;
    hist[0] += hist[0x8000]; /* zeros tie, whatever their sign */
    hist[0x8000] = 0;
    int64_t before = 0;
    double squares = 0;
    for (uint32_t k = 0; k < BINS; k++) {
        uint32_t code = SUFFIX(code_at)(k);
        int64_t count = hist[code];
        double rank = (double)(2 * before + count - n);
        table[code] = (float)rank;
        squares += (double)count * rank * rank;
        before += count;
    }
    table[0x8000] = table[0];
    return squares;
}

/* sorts n records by their upper 32 bits, least digit first; the result is in `two` */
TARGET static void SUFFIX(sort_records)(uint64_t *one, uint64_t *two, int64_t n)
{
    static const int shift[3] = {32, 43, 54};
    uint32_t count[3][2048];
    memset(count, 0, sizeof count);
    for (int64_t i = 0; i < n; i++)
        for (int pass = 0; pass < 3; pass++) count[pass][one[i] >> shift[pass] & 2047]++;
    for (int pass = 0; pass < 3; pass++) {
        uint64_t *from = pass & 1 ? two : one, *to = pass & 1 ? one : two;
        uint32_t at = 0;
        for (int k = 0; k < 2048; k++) {
            uint32_t here = count[pass][k];
            count[pass][k] = at;
            at += here;
        }
        for (int64_t i = 0; i < n; i++) to[count[pass][from[i] >> shift[pass] & 2047]++] = from[i];
    }
}

/* bits of a float32 that ascend with its value as unsigned numbers; -0 becomes +0 */
TARGET static inline uint32_t SUFFIX(ascending)(float value)
{
    uint32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, 4);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

/* Records travel as (key, partner): sorted by a's value they get a's rank, sorted by b's value they meet b's rank, so
 * that no pass reads or writes at random. out: sum of products of ranks, sums of squares of a's and b's. */
TARGET static void SUFFIX(spearman32)(const float *a, const float *b, int64_t n, uint64_t *one, uint64_t *two,
                                      double *out)
{
    double squares_a = 0, squares_b = 0, cross = 0;
    for (int64_t i = 0; i < n; i++) one[i] = (uint64_t)SUFFIX(ascending)(a[i]) << 32 | SUFFIX(ascending)(b[i]);
    SUFFIX(sort_records)(one, two, n);
    for (int64_t i = 0, end = 0; i < n;) {
        uint64_t key = two[i] >> 32;
        for (end = i + 1; end < n && two[end] >> 32 == key;) end++;
        float rank = (float)(i + end - n);
        uint32_t bits;
        memcpy(&bits, &rank, 4);
        squares_a += (double)(end - i) * rank * rank;
        for (; i < end; i++) two[i] = two[i] << 32 | bits;
    }
    SUFFIX(sort_records)(two, one, n);
    for (int64_t i = 0, end = 0; i < n;) {
        uint64_t key = one[i] >> 32;
        double sum = 0;
        for (end = i; end < n && one[end] >> 32 == key; end++) {
            float rank;
            uint32_t bits = (uint32_t)one[end];
            memcpy(&rank, &bits, 4);
            sum += rank;
        }
        double rank = (double)(i + end - n);
        squares_b += (double)(end - i) * rank * rank;
        cross += sum * rank;
        i = end;
    }
    out[0] = cross;
    out[1] = squares_a;
    out[2] = squares_b;
}

TARGET static double SUFFIX(cross)(const uint16_t *codes_a, const float *ranks_a, const uint16_t *codes_b,
                                   const float *ranks_b, int64_t n)
{
    double total = 0;
    for (int64_t at = 0; at < n; at += SUB) {
        const uint16_t *p = codes_a + at, *q = codes_b + at;
        int64_t m = n - at < SUB ? n - at : SUB;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < m; i++) sum += (double)ranks_a[p[i]] * (double)ranks_b[q[i]];
        total += sum;
    }
    return total;
}

/* |b - a| of up to SUB elements as the bits of a float32 */
TARGET static inline void SUFFIX(sizes)(const void *a, int kind_a, const void *b, int kind_b, int64_t at, int64_t n,
                                        uint32_t *restrict bits)
{
    ALIGNED float one[SUB], two[SUB];
    const float *x = SUFFIX(decode)(a, kind_a, NULL, at, n, one), *y = SUFFIX(decode)(b, kind_b, NULL, at, n, two);
    for (int64_t i = 0; i < n; i++) {
        float size = fabsf(y[i] - x[i]);
        memcpy(bits + i, &size, 4);
    }
}

/* counts |b - a| by its upper bits; four tables, as differences of bf16 numbers fall into few bins and an increment
 * waits for the one before it in the same place */
TARGET static void SUFFIX(count_sizes)(const void *a, int kind_a, const void *b, int kind_b, int64_t n, uint32_t *hist)
{
    ALIGNED uint32_t bits[SUB];
    memset(hist, 0, 4 * BINS * sizeof *hist);
    for (int64_t at = 0; at < n; at += SUB) {
        int64_t m = n - at < SUB ? n - at : SUB, i = 0;
        SUFFIX(sizes)(a, kind_a, b, kind_b, at, m, bits);
        for (; i + 4 <= m; i += 4) {
            hist[bits[i] >> LOW_BITS]++;
            hist[BINS + (bits[i + 1] >> LOW_BITS)]++;
            hist[2 * BINS + (bits[i + 2] >> LOW_BITS)]++;
            hist[3 * BINS + (bits[i + 3] >> LOW_BITS)]++;
        }
        for (; i < m; i++) hist[bits[i] >> LOW_BITS]++;
    }
    for (int64_t i = 0; i < BINS; i++) hist[i] += hist[BINS + i] + hist[2 * BINS + i] + hist[3 * BINS + i];
}

/* counts the lower bits of |b - a| inside the bins whose slot is not 0: two tables of 2^LOW_BITS counters a slot */
TARGET static void SUFFIX(count_inside)(const void *a, int kind_a, const void *b, int kind_b, int64_t n,
                                        const uint8_t *slot, uint32_t *fine)
{
    ALIGNED uint32_t bits[SUB];
    uint32_t kept[SUB + 1];
    for (int64_t at = 0; at < n; at += SUB) {
        int64_t m = n - at < SUB ? n - at : SUB;
        int count = 0;
        SUFFIX(sizes)(a, kind_a, b, kind_b, at, m, bits);
        for (int64_t i = 0; i < m; i++) { /* without a branch: which elements hit is random */
            kept[count] = bits[i];
            count += slot[bits[i] >> LOW_BITS] != 0;
        }
        for (int i = 0; i < count; i++) {
            uint32_t table = 2 * (slot[kept[i] >> LOW_BITS] - 1u) + (i & 1);
            fine[(table << LOW_BITS) + (kept[i] & (LOWS - 1))]++;
        }
    }
}

TARGET static int SUFFIX(quantiles)(const void *a, int kind_a, const void *b, int kind_b, int64_t n,
                                    const int64_t *wanted, int count, uint32_t *work, float *values)
{
    uint8_t slot[BINS];
    uint32_t bins[MAX_WANTED];
    int64_t before[MAX_WANTED], seen = 0;
    int slots = 0, k = 0;
    memset(slot, 0, sizeof slot);
    SUFFIX(count_sizes)(a, kind_a, b, kind_b, n, work);
    for (uint32_t bin = 0; bin < BINS && k < count; bin++) {
        int64_t here = work[bin];
        for (; k < count && wanted[k] < seen + here; k++) {
            if (!slot[bin]) slot[bin] = (uint8_t)++slots;
            bins[k] = bin;
            before[k] = seen;
        }
        seen += here;
    }
    if (k < count) return -1;
    memset(work, 0, (size_t)slots * 2 * LOWS * sizeof *work);
    SUFFIX(count_inside)(a, kind_a, b, kind_b, n, slot, work);
    for (k = 0; k < count; k++) {
        const uint32_t *fine = work + 2 * LOWS * (slot[bins[k]] - 1);
        int64_t left = wanted[k] - before[k];
        uint32_t low = 0;
        for (int64_t here; left >= (here = (int64_t)fine[low] + fine[low + LOWS]); low++) left -= here;
        uint32_t found = bins[k] << LOW_BITS | low;
        memcpy(values + k, &found, 4);
    }
    return 0;
}

TARGET static int SUFFIX(rounds_to)(const float *fine, const uint16_t *codes, int kind, int64_t n)
{
    ALIGNED float want[SUB];
    for (int64_t at = 0; at < n; at += SUB) {
        int64_t m = n - at < SUB ? n - at : SUB;
        int32_t wrong = 0;
        SUFFIX(decode16)(codes + at, kind, m, want);
        for (int64_t i = 0; i < m; i++) {
            uint32_t bits, size, got, expected;
            memcpy(&bits, fine + at + i, 4);
            memcpy(&expected, want + i, 4);
            size = bits & 0x7FFFFFFFu;
            if (kind == BF16) {
                got = (size + 0x7FFFu + (size >> 16 & 1)) & 0xFFFF0000u;
            } else {
                /* below 2^-14 the step is 2^-24: adding 0.5 leaves that step; else round at bit 13 */
                float value, rounded;
                memcpy(&value, &size, 4);
                rounded = (value + 0.5f) - 0.5f;
                memcpy(&got, &rounded, 4);
                uint32_t normal = (size + 0xFFFu + (size >> 13 & 1)) & 0xFFFFE000u;
                normal = normal >= 0x47800000u ? 0x7F800000u : normal;
                got = size < 0x38800000u ? got : normal;
            }
            int nan = size > 0x7F800000u, nan_too = (expected & 0x7FFFFFFFu) > 0x7F800000u;
            wrong += nan || nan_too ? nan != nan_too : (got | (bits & 0x80000000u)) != expected && (got | (expected & 0x7FFFFFFFu)) != 0;
        }
        if (wrong) return 0;
    }
    return 1;
}
