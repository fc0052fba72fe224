/* Products of a few rows with weights stored (out, in): y (M, N) = x (M, K) W (N, K)^T, as fast as memory gives W.

   A BLAS is made for many rows: it first copies W into blocks, which costs more than the product where each number of
   W is used once or a few times. Here W is read once, in order. This library stands in front of a BLAS and hands on
   whatever is not such a product. The vectors are as wide as the machine's that compiles it.

   Threads take stretches of W from a counter, so that one that wakes late or not at all delays nobody, and sleep
   between products: one that waits by spinning takes the core that prepares the next product.

   W may be packed as MLX packs it: 4 or 8 bits a number, 32 bits a word, the first number in the lowest bits; of each
   group of numbers q that follow each other the weights are q * scale + offset. A vector of words gives one of weights
   for each place in a word, so x is put in that order once. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define MOST_ROWS 16
#define AHEAD 2048            /* numbers of W that are asked for before they are wanted */
#define STRETCH (64 * 1024) /* numbers of W that a thread takes at once */
#define MOST_PACKED 64      /* the most rows that are multiplied by packed weights as they are */
#define TILE (1024 * 1024)  /* numbers of W that are unpacked at once where there are more rows */

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), may_alias));
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
typedef void gemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

typedef struct Product {
    int m, n, k, lda, ldb, ldc;
    const float *a, *b;
    float *c;
    void (*part)(const struct Product *, int out, int last); /* what is done for each out */
    const uint32_t *packed; /* in place of b */
    const float *scales, *offsets;
    int bits, group;
} Product;

/* The lanes of v together: halves onto each other first, since one after the other each would wait for the last. */
static inline float sum(vec v) {
#if WIDTH == 16
    typedef float half __attribute__((vector_size(32)));
    union { vec v; half h[2]; } a = {v};
    union { half v; quarter q[2]; } b = {a.h[0] + a.h[1]};
    quarter q = b.q[0] + b.q[1];
#elif WIDTH == 8
    union { vec v; quarter q[2]; } b = {v};
    quarter q = b.q[0] + b.q[1];
#else
    quarter q = v;
#endif
    return (q[0] + q[2]) + (q[1] + q[3]);
}

#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* `rows` rows of a times `outs` rows of b, `deep` vectors of each at once: constants where this is inlined, so that the
   sums are registers. */
static inline __attribute__((always_inline)) void block(const Product *p, int row, int out, const int rows,
                                                        const int outs, const int deep) {
    const float *a = p->a + (size_t)row * p->lda, *b = p->b + (size_t)out * p->ldb;
    const size_t lda = p->lda, ldb = p->ldb;
    vec sums[8][4][4];
    EACH(i, rows) EACH(j, outs) EACH(u, deep) sums[i][j][u] = (vec){0};
    int k = 0, whole = p->k / (deep * WIDTH) * (deep * WIDTH);
    for (; k < whole; k += deep * WIDTH)
        EACH(u, deep) {
            vec w[4];
            EACH(j, outs) {
                w[j] = *(const vec *)(b + j * ldb + k + u * WIDTH);
                __builtin_prefetch(b + j * ldb + k + u * WIDTH + AHEAD);
            }
            EACH(i, rows) {
                vec x = *(const vec *)(a + i * lda + k + u * WIDTH);
                EACH(j, outs) sums[i][j][u] += x * w[j];
            }
        }
    EACH(i, rows) EACH(j, outs) {
        vec v = sums[i][j][0];
        for (int u = 1; u < deep; u++) v += sums[i][j][u];
        float s = sum(v);
        for (int t = whole; t < p->k; t++) s += a[i * lda + t] * b[j * ldb + t];
        p->c[(size_t)(row + i) * p->ldc + out + j] = s;
    }
}

#define BLOCKS(ROWS, OUTS, U)                                                       \
    case ROWS:                                                                      \
        for (; out + OUTS <= last; out += OUTS) block(p, row, out, ROWS, OUTS, U);  \
        for (; out < last; out++) block(p, row, out, ROWS, 1, U);                   \
        break;

/* Outs from `out` to `last`: the sums of a block stay in registers, of which AVX-512 has 32 and others 16. */
static void some(const Product *p, int row, int rows, int out, int last) {
    switch (rows) {
#if WIDTH == 16
        BLOCKS(1, 4, 4) BLOCKS(2, 4, 2) BLOCKS(3, 4, 2) BLOCKS(4, 4, 1)
        BLOCKS(5, 4, 1) BLOCKS(6, 4, 1) BLOCKS(7, 2, 1) BLOCKS(8, 2, 1)
#else
        BLOCKS(1, 4, 2) BLOCKS(2, 4, 1) BLOCKS(3, 2, 1) BLOCKS(4, 2, 1)
        BLOCKS(5, 2, 1) BLOCKS(6, 2, 1) BLOCKS(7, 1, 1) BLOCKS(8, 1, 1)
#endif
    }
}

static void packed_some(const Product *p, int row, int rows, int out, int last);

static void stretch(const Product *p, int out, int last) {
    for (int next; out < last; out = next) {
        next = out + 8 < last ? out + 8 : last; /* for all rows before it leaves the nearest cache */
        for (int row = 0; row < p->m; row += 8)
            (p->packed ? packed_some : some)(p, row, p->m - row < 8 ? p->m - row : 8, out, next);
    }
}

/* The helpers, and the one product they work on. `ticket` counts products, so that each knows a new one. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    int helpers;
    unsigned ticket;
    const Product *product; /* NULL: none */
    int step;               /* outs taken at once */
    atomic_int next;        /* the first out that nobody has taken */
    atomic_int inside;      /* helpers that work on it */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER};
static pthread_mutex_t pool_taken = PTHREAD_MUTEX_INITIALIZER; /* by the thread whose product it is */

static void take(const Product *p, int step) {
    for (int out; (out = atomic_fetch_add(&pool.next, step)) < p->n;)
        p->part(p, out, out + step < p->n ? out + step : p->n);
}

static void *help(void *none) {
    unsigned seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.product || pool.ticket == seen) pthread_cond_wait(&pool.work, &pool.lock);
        seen = pool.ticket;
        const Product *p = pool.product;
        int step = pool.step;
        atomic_fetch_add(&pool.inside, 1);
        pthread_mutex_unlock(&pool.lock);
        take(p, step);
        atomic_fetch_sub(&pool.inside, 1);
        pthread_mutex_lock(&pool.lock);
    }
    return none;
}

static void together(const Product *p, int step) {
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.next, 0);
    pool.product = p;
    pool.step = step;
    pool.ticket++;
    pthread_cond_broadcast(&pool.work);
    pthread_mutex_unlock(&pool.lock);
    take(p, step);
    pthread_mutex_lock(&pool.lock);
    pool.product = NULL; /* from here on no helper begins */
    pthread_mutex_unlock(&pool.lock);
    while (atomic_load(&pool.inside)) sched_yield();
}

static gemm *blas;

/* Before anything else: the BLAS behind this library, and how many threads compute. Returns how many there are. */
int few_rows_start(gemm *behind, int threads) {
    pthread_t thread;
    blas = behind;
    while (pool.helpers < threads - 1 && !pthread_create(&thread, NULL, help, NULL)) {
        pthread_detach(thread);
        pool.helpers++;
    }
    return pool.helpers + 1;
}

static void share(const Product *p) {
    const int step = (STRETCH / (p->k + 1) + 8) / 8 * 8;
    if (pool.helpers && p->n >= 2 * step && !pthread_mutex_trylock(&pool_taken)) {
        together(p, step);
        pthread_mutex_unlock(&pool_taken);
    } else
        p->part(p, 0, p->n);
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
    if (order != ROW_MAJOR || trans_a != NO_TRANS || trans_b != TRANS || m > MOST_ROWS || alpha != 1 || beta != 0) {
        blas(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    const Product p = {m, n, k, lda, ldb, ldc, a, b, c, .part = stretch};
    share(&p);
}

/* --- packed --- */

/* `first` in the lower part of each 2 * span lanes, `second` in the upper. */
static inline vec either(vec first, vec second, int span) {
    words upper;
    EACH(i, WIDTH) upper[i] = i / span % 2 ? ~0u : 0;
    return (vec)(((words)first & ~upper) | ((words)second & upper));
}

/* The scale of each lane, of `parts` groups. left: groups to the end of the row. */
static inline __attribute__((always_inline)) vec spread(const float *s, const int parts, int left) {
    vec v[4];
    EACH(i, parts) v[i] = s[i < left ? i : left - 1] + (vec){0};
    if (parts == 4) return either(either(v[0], v[1], WIDTH / 4), either(v[2], v[3], WIDTH / 4), WIDTH / 2);
    return parts == 2 ? either(v[0], v[1], WIDTH / 2) : v[0];
}

static inline int blocks_of(const Product *p) { return (p->k * p->bits / 32 + WIDTH - 1) / WIDTH; }

/* Words `at` to at + WIDTH of a row; zeros behind its end. */
static inline words words_at(const uint32_t *row, int at, int count) {
    if (at + WIDTH <= count) return *(const words *)(row + at);
    uint32_t end[WIDTH] = {0};
    memcpy(end, row + at, 4 * (count - at));
    return *(const words *)end;
}

/* `outs` rows of W times `rows` rows of x. */
static inline __attribute__((always_inline)) void packed_block(const Product *p, int row, int out, const int rows,
                                                               const int outs, const int parts) {
    const int bits = p->bits, each = 32 / bits, count = p->k / each, groups = p->k / p->group, blocks = blocks_of(p);
    const uint32_t mask = (1u << bits) - 1;
    const uint32_t *w = p->packed + (size_t)out * count;
    const float *scales = p->scales + (size_t)out * groups, *offsets = p->offsets + (size_t)out * groups;
    const vec *x = (const vec *)p->a + (size_t)row * blocks * each;
    vec sums[8][4];
    EACH(i, rows) EACH(j, outs) sums[i][j] = (vec){0};
    for (int b = 0; b < blocks; b++) {
        const int group = b * WIDTH * each / p->group;
        words packed[4];
        vec scale[4], offset[4];
        EACH(j, outs) {
            packed[j] = words_at(w + (size_t)j * count, b * WIDTH, count);
            scale[j] = spread(scales + (size_t)j * groups + group, parts, groups - group);
            offset[j] = spread(offsets + (size_t)j * groups + group, parts, groups - group);
        }
        for (int u = 0; u < each; u++) {
            vec weight[4];
            EACH(j, outs) {
                weight[j] = __builtin_convertvector((ints)(packed[j] & mask), vec) * scale[j] + offset[j];
                packed[j] >>= bits;
            }
            EACH(i, rows) {
                const vec v = x[((size_t)i * blocks + b) * each + u];
                EACH(j, outs) sums[i][j] += v * weight[j];
            }
        }
    }
    EACH(i, rows) EACH(j, outs) p->c[(size_t)(row + i) * p->ldc + out + j] = sum(sums[i][j]);
}

#if WIDTH == 16
#define WIDE 4
#else
#define WIDE 2
#endif
#define PACKED_BLOCKS(ROWS, OUTS, PARTS)                                                     \
    case ROWS:                                                                               \
        for (; out + OUTS <= last; out += OUTS) packed_block(p, row, out, ROWS, OUTS, PARTS); \
        for (; out < last; out++) packed_block(p, row, out, ROWS, 1, PARTS);                 \
        break;
#define PACKED_SOME(PARTS)                                                                                  \
    static void packed_some_##PARTS(const Product *p, int row, int rows, int out, int last) {               \
        switch (rows) {                                                                                     \
            PACKED_BLOCKS(1, WIDE, PARTS) PACKED_BLOCKS(2, WIDE, PARTS) PACKED_BLOCKS(3, 2, PARTS)          \
            PACKED_BLOCKS(4, 2, PARTS) PACKED_BLOCKS(5, 2, PARTS) PACKED_BLOCKS(6, 2, PARTS)                \
            PACKED_BLOCKS(7, 2, PARTS) PACKED_BLOCKS(8, 2, PARTS)                                           \
        }                                                                                                   \
    }
PACKED_SOME(1)
PACKED_SOME(2)
PACKED_SOME(4)

static void packed_some(const Product *p, int row, int rows, int out, int last) {
    const int parts = WIDTH * 32 / p->bits / p->group; /* groups that share a vector of words; 0: one has several */
    (parts == 4 ? packed_some_4 : parts == 2 ? packed_some_2 : packed_some_1)(p, row, rows, out, last);
}

/* Weights as they are, into c: those of a word at once. */
static void unpack(const Product *p, int out, int last) {
    typedef uint32_t eight_words __attribute__((vector_size(32)));
    typedef int32_t eight_ints __attribute__((vector_size(32)));
    typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
    typedef uint8_t octets __attribute__((vector_size(8), aligned(4), may_alias));
    const eight_words shifts = {0, 4, 8, 12, 16, 20, 24, 28};
    const int numbers = 8 * p->bits / 32; /* words for eight numbers */
    const uint32_t *w = p->packed + (size_t)out * (p->k / 8) * numbers;
    float *to = p->c + (size_t)out * p->k;
    for (size_t i = (size_t)out * p->k; i < (size_t)last * p->k; i += 8, w += numbers, to += 8) {
        const size_t group = i / p->group;
        const eight_ints q = numbers == 1 ? (eight_ints)((*w >> shifts) & 15)
                                          : __builtin_convertvector(*(const octets *)w, eight_ints);
        *(eight *)to = __builtin_convertvector(q, eight) * p->scales[group] + p->offsets[group];
    }
}

/* A row of x as the vectors of packed weights have it: block, lane, place in the word -> block, place, lane. */
static void in_order(const float *x, long stride, int k, int each, float *to) {
    int at = 0;
    for (; at + WIDTH * each <= k; at += WIDTH * each)
        for (int u = 0; u < each; u++)
            for (int lane = 0; lane < WIDTH; lane++) *to++ = x[(at + lane * each + u) * stride];
    for (int u = 0; at < k && u < each; u++)
        for (int lane = 0; lane < WIDTH; lane++) {
            const int from = at + lane * each + u;
            *to++ = from < k ? x[from * stride] : 0;
        }
}

/* By the BLAS, so many outs at a time as were unpacked for it. */
static void many_rows(const Product *p, const float *x, long row_stride, long column_stride) {
    const int most = TILE / p->k + 1, tile = p->n < most ? p->n : most;
    const int apart = column_stride != 1 || row_stride < p->k; /* a BLAS takes no rows that overlap or go backwards */
    const size_t size = (size_t)p->k * ((apart ? p->m : 0) + tile);
    float *tiles = malloc(4 * size), *rows = tiles + (size_t)p->k * tile;
    for (int i = 0; apart && i < p->m; i++)
        for (int at = 0; at < p->k; at++) rows[(size_t)i * p->k + at] = x[i * row_stride + at * column_stride];
    for (int out = 0; out < p->n; out += tile) {
        Product some = *p;
        some.n = p->n - out < tile ? p->n - out : tile;
        some.c = tiles;
        some.packed += (size_t)out * p->k * p->bits / 32;
        some.scales += (size_t)out * (p->k / p->group);
        some.offsets += (size_t)out * (p->k / p->group);
        some.part = unpack;
        share(&some);
        blas(ROW_MAJOR, NO_TRANS, TRANS, p->m, some.n, p->k, 1, apart ? rows : x, apart ? p->k : row_stride, tiles,
             p->k, 0, p->c + out, p->n);
    }
    free(tiles);
}

/* y (M, N) = x (M, K) W (N, K)^T, W packed. strides: numbers from one row of x, and one column, to the next. */
void few_rows_packed(int m, int n, int k, const float *x, long row_stride, long column_stride, const uint32_t *w,
                     const float *scales, const float *offsets, int bits, int group, float *y) {
    Product p = {.m = m, .n = n, .k = k, .c = y, .ldc = n, .packed = w, .scales = scales, .offsets = offsets,
                 .bits = bits, .group = group, .part = stretch};
    const int each = 32 / bits;
    if (m > MOST_PACKED) {
        many_rows(&p, x, row_stride, column_stride);
        return;
    }
    const size_t wide = (size_t)blocks_of(&p) * WIDTH * each; /* K, to the end of the last vector */
    float *ordered = aligned_alloc(64, 4 * m * wide);
    for (int i = 0; i < m; i++) in_order(x + i * row_stride, column_stride, k, each, ordered + i * wide);
    p.a = ordered;
    share(&p);
    free(ordered);
}
