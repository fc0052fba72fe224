/* Products of a few rows with weights stored (out, in): y (M, N) = x (M, K) W (N, K)^T, as fast as memory gives W.

   A BLAS is made for many rows: it first copies W into blocks, which costs more than the product where each number of
   W is used once or a few times. Here W is read once, in order. This library stands in front of a BLAS and hands on
   whatever is not such a product. The vectors are as wide as the machine's that compiles it.

   Threads take stretches of W from a counter, so that one that wakes late or not at all delays nobody, and sleep
   between products: one that waits by spinning takes the core that prepares the next product. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

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

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(16)));
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
typedef void gemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

typedef struct {
    int m, n, k, lda, ldb, ldc;
    const float *a, *b;
    float *c;
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

static void stretch(const Product *p, int out, int last) {
    for (int next; out < last; out = next) {
        next = out + 8 < last ? out + 8 : last; /* for all rows before it leaves the nearest cache */
        for (int row = 0; row < p->m; row += 8) some(p, row, p->m - row < 8 ? p->m - row : 8, out, next);
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
        stretch(p, out, out + step < p->n ? out + step : p->n);
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

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
    if (order != ROW_MAJOR || trans_a != NO_TRANS || trans_b != TRANS || m > MOST_ROWS || alpha != 1 || beta != 0) {
        blas(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    const Product p = {m, n, k, lda, ldb, ldc, a, b, c};
    const int step = (STRETCH / (k + 1) + 8) / 8 * 8;
    if (pool.helpers && n >= 2 * step && !pthread_mutex_trylock(&pool_taken)) {
        together(&p, step);
        pthread_mutex_unlock(&pool_taken);
    } else
        stretch(&p, 0, n);
}
